"""Small data and networks that several files of tests train."""
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kdlab as kd


def data(n=64, seed=0, labels=True):
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=gen)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    return TensorDataset(x, y) if labels else TensorDataset(x)


def loader(**kwargs): return DataLoader(data(**kwargs), 16, shuffle=True)


def net(seed=0, width=8):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width), nn.Dropout(0.2), nn.ReLU(), nn.Linear(width, 3))


def taught(seed=9, width=32):
    "A network that knows its data."
    model = net(seed, width)
    kd.distill(model, None, loader(n=256, seed=1), epochs=8, lr=0.02, progress=False)
    return model


# in float64 and without batch norm, where parts of a batch add up to it

def exact_net(seed=0, width=8):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3)).double()


def exact_data(n, missing):
    "Samples, a share of which has no label."
    gen = torch.Generator().manual_seed(1)
    x, y = torch.randn(n, 6, generator=gen, dtype=torch.float64), torch.randint(3, (n,), generator=gen)
    return TensorDataset(x, torch.where(torch.rand(n, generator=gen) < missing, -100, y))
