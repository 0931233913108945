"""Histories as tables, and TensorBoard where it is installed."""
import sys
import types

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kdlab as kd
from kdlab.logs import History, flat


def distill(**kwargs):
    torch.manual_seed(0)
    x = torch.randn(32, 4)
    train = DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), 16)
    return kd.distill(nn.Linear(4, 2), nn.Linear(4, 2), train, **({"epochs": 3, "progress": False} | kwargs))


def test_a_history_is_a_table_with_every_number():
    run = distill(losses=(lambda t: 1 - t) * kd.CrossEntropy() + kd.SoftKL(), valid=None, clip=1.)
    table = run.table()
    assert isinstance(table, History) and len(table) == 3
    assert {"epoch", "train_loss", "terms/SoftKL", "scheduled/CrossEntropy weight", "gradient_norm", "lr", "seconds"} <= set(table.columns)
    assert f"{run.history[1]['train_loss']:.4g}" in table[1]
    lines = repr(table).splitlines()
    assert len(lines) == 4 and lines[0].split()[:2] == ["epoch", "train_loss"]
    assert table._repr_html_().count("<tr>") == 4


def test_numbers_that_come_late_leave_a_gap():
    table = History([{"epoch": 1, "a": 1.}, {"epoch": 2, "a": 2., "terms": {"b": 3.}}])
    assert table.columns == ("epoch", "a", "terms/b") and table[0] == ("1", "1", "") and table[1] == ("2", "2", "3")
    assert flat({"epoch": 1, "terms": {}}) == {"epoch": 1} and repr(History([])) == ""


@pytest.fixture
def board(monkeypatch):
    "A stand-in for the package."
    class SummaryWriter:
        made, said = [], []
        def __init__(self, folder, purge_step): self.made.append((folder, purge_step)); self.open = True
        def add_scalar(self, name, value, step): assert self.open; self.said.append((name, value, step))
        def flush(self): pass
        def close(self): self.open = False

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    return SummaryWriter


def test_tensorboard_gets_every_number_of_every_epoch(board, tmp_path):
    run = distill(callbacks=[kd.tensorboard(tmp_path)])
    assert board.made == [(str(tmp_path), 1)]
    for entry in run.history:
        assert {(name, value, entry["epoch"]) for name, value in flat(entry).items() if name != "epoch"} <= set(board.said)


def test_a_resumed_run_purges_what_it_repeats(board, tmp_path):
    def stop(run):
        if run.epoch == 2: raise KeyboardInterrupt

    distill(callbacks=[kd.tensorboard(tmp_path / "log"), stop], out=tmp_path / "run")
    distill(callbacks=[kd.tensorboard(tmp_path / "log")], out=tmp_path / "run", resume=True)
    assert [step for _, step in board.made] == [1, 3]


def test_without_the_package_one_line_says_so(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ModuleNotFoundError, match=r"^kd.tensorboard needs the package tensorboard: pip install tensorboard$"): kd.tensorboard(tmp_path)
