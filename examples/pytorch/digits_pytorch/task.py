"""The model and the data; nothing here knows of Flower."""

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

SEED = 1


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(32)
        self.fc1 = nn.Linear(32 * 2 * 2, 64)
        self.fc2 = nn.Linear(64, 10)

    def forward(self, x):
        x = torch.max_pool2d(torch.relu(self.bn1(self.conv1(x))), 2)
        x = torch.max_pool2d(torch.relu(self.bn2(self.conv2(x))), 2)
        return self.fc2(torch.relu(self.fc1(x.flatten(1))))


def load_images():
    """Return train images, test images, train labels, test labels: 1437 and 360 images of 1x8x8 pixels."""
    digits = load_digits()
    images = (digits.images / 16).astype(np.float32)[:, None]
    return train_test_split(images, digits.target, test_size=0.2, random_state=SEED, stratify=digits.target)


def load_partition(partition_id, num_partitions, batch_size=32):
    """Return the loaders of one node, for training and validation; its share of each digit is its own (non-IID)."""
    images, _, labels, _ = load_images()
    rng = np.random.default_rng(SEED)
    shares = rng.dirichlet([1.0] * num_partitions, size=10)
    owner = np.array([rng.choice(num_partitions, p=shares[label]) for label in labels])
    data = [TensorDataset(torch.from_numpy(images[i]), torch.from_numpy(labels[i])) for i in split(owner, partition_id)]
    # batch normalisation has no statistics of a last batch of one image
    single = len(data[0]) % batch_size == 1
    return DataLoader(data[0], batch_size, shuffle=True, drop_last=single), DataLoader(data[1], batch_size)


def split(owner, partition_id):
    """Return the indices of a node's images: four fifths to train with, one fifth to validate with."""
    mine = np.flatnonzero(owner == partition_id)
    return np.split(mine, [len(mine) * 4 // 5])


def load_test():
    _, images, _, labels = load_images()
    return DataLoader(TensorDataset(torch.from_numpy(images), torch.from_numpy(labels)), 360)


def train(model, loader, epochs, lr):
    """Return the mean loss of the last epoch."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    model.train()
    for _ in range(epochs):
        total = 0.0
        for images, labels in loader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            total += loss.item() * len(labels)
    return total / len(loader.dataset)


@torch.no_grad()
def test(model, loader):
    """Return the accuracy."""
    model.eval()
    correct = sum((model(images).argmax(1) == labels).sum().item() for images, labels in loader)
    return correct / max(len(loader.dataset), 1)
