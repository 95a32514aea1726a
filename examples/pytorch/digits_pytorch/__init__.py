"""Handwritten digits with Flower's Message API and PyTorch."""
