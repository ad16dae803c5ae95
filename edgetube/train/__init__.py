"""Training: video models that start from image models, and their training on labelled clips. Needs PyTorch."""
