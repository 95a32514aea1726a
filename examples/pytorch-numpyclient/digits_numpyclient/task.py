"""The model and the data, and the model's weights as a list; nothing here knows of Flower."""

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


def get_weights(net):
    return [value.cpu().numpy() for value in net.state_dict().values()]


def set_weights(net, parameters):
    names = net.state_dict().keys()
    net.load_state_dict({name: torch.tensor(value) for name, value in zip(names, parameters, strict=True)})


def load_images():
    """Return train images, test images, train labels, test labels: 1437 and 360 images of 1x8x8 pixels."""
    digits = load_digits()
    images = (digits.images / 16).astype(np.float32)[:, None]
    return train_test_split(images, digits.target, test_size=0.2, random_state=SEED, stratify=digits.target)


def load_partition(partition_id, num_partitions, batch_size=32):
    """Return the loader of one node; its share of each digit is its own (non-IID)."""
    images, _, labels, _ = load_images()
    rng = np.random.default_rng(SEED)
    shares = rng.dirichlet([0.5] * num_partitions, size=10)
    owner = np.array([rng.choice(num_partitions, p=shares[label]) for label in labels])
    images, labels = images[owner == partition_id], labels[owner == partition_id]
    data = TensorDataset(torch.from_numpy(images), torch.from_numpy(labels))
    # batch normalisation has no statistics of a last batch of one image
    return DataLoader(data, batch_size, shuffle=True, drop_last=len(data) % batch_size == 1)


def load_test():
    _, images, _, labels = load_images()
    return DataLoader(TensorDataset(torch.from_numpy(images), torch.from_numpy(labels)), 360)


def train(net, loader, epochs, lr):
    """Return the mean loss of the last epoch."""
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    net.train()
    for _ in range(epochs):
        total = 0.0
        for images, labels in loader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(images), labels)
            loss.backward()
            optimizer.step()
            total += loss.item() * len(labels)
    return total / len(loader.dataset)


@torch.no_grad()
def test(net, loader):
    """Return the accuracy."""
    net.eval()
    correct = sum((net(images).argmax(1) == labels).sum().item() for images, labels in loader)
    return correct / len(loader.dataset)
