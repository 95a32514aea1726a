"""Flower looks for the client app here; it lives in the package."""

import os

from autoflip_flwr.experiment.startup import light_imports

# Before PyTorch is loaded: on a busy machine its threads else spin while they wait for each other's core.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

with light_imports():
    from autoflip_flwr.experiment.client import app

__all__ = ["app"]
