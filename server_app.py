"""Flower looks for the server app here; it lives in the package."""

from autoflip_flwr.experiment.server import app

__all__ = ["app"]
