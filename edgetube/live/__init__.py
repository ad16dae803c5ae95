"""Live video: sources that fail and come back, windows over their frames, and one engine for many of them."""
