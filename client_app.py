"""Flower looks for the client app here; it lives in the package."""

from autoflip_flwr.experiment.client import app

__all__ = ["app"]
