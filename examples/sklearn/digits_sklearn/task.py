"""The model and the data, and the model's arrays by name."""

import numpy as np
from flwr.app import Array, ArrayRecord
from sklearn.datasets import load_digits
from sklearn.linear_model import SGDClassifier
from sklearn.model_selection import train_test_split

SEED = 1
CLASSES = np.arange(10)


def make_model(lr=0.1):
    """Return a logistic regression of 10 x 64 coefficients, all zero."""
    model = SGDClassifier(loss="log_loss", learning_rate="constant", eta0=lr, random_state=SEED)
    model.classes_ = CLASSES
    model.coef_, model.intercept_ = np.zeros((10, 64)), np.zeros(10)
    return model


def get_arrays(model):
    return ArrayRecord({"coef": Array(model.coef_), "intercept": Array(model.intercept_)})


def set_arrays(model, arrays):
    model.coef_, model.intercept_ = arrays["coef"].numpy(), arrays["intercept"].numpy()


def load_pixels():
    """Return train pixels, test pixels, train labels, test labels: 1437 and 360 rows of 64 pixels."""
    digits = load_digits()
    return train_test_split(digits.data / 16, digits.target, test_size=0.2, random_state=SEED, stratify=digits.target)


def load_partition(partition_id, num_partitions):
    """Return the pixels and labels of one node; its share of each digit is its own (non-IID)."""
    pixels, _, labels, _ = load_pixels()
    rng = np.random.default_rng(SEED)
    shares = rng.dirichlet([0.5] * num_partitions, size=10)
    owner = np.array([rng.choice(num_partitions, p=shares[label]) for label in labels])
    return pixels[owner == partition_id], labels[owner == partition_id]


def load_test():
    _, pixels, _, labels = load_pixels()
    return pixels, labels
