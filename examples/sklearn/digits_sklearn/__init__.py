"""Handwritten digits with Flower's Message API and scikit-learn."""
