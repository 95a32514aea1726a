"""Flower looks for the client app here; it lives in the package."""

from autoflip_flwr.experiment.startup import light_imports

with light_imports():
    from autoflip_flwr.experiment.client import app

__all__ = ["app"]
