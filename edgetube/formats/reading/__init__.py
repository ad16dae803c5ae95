"""What checkpoint formats share: files, tensors whose use is recorded, encoder blocks, processors' settings."""
