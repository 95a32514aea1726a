"""Handwritten digits with a Flower NumPyClient and PyTorch."""
