"""The shipped Flower app: configuration, data, models, local training, run record."""
