"""Two processes are one: the same script under torchrun and alone, with every kind of loss, and what happens when they differ."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import kdlab as kd
from kdlab.checkpoints import fingerprint
from kdlab.parallel import Team, _cut, part, share


def net(seed=0, width=8):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3)).double()


def data(n=50, missing=0.5):
    gen = torch.Generator().manual_seed(1)
    x, y = torch.randn(n, 6, generator=gen, dtype=torch.float64), torch.randint(3, (n,), generator=gen)
    return TensorDataset(x, torch.where(torch.rand(n, generator=gen) < missing, -100, y))


class Stream(IterableDataset):
    def __iter__(self): return iter(data())


def scenario(name, processes, out=None):
    "A run by name."
    losses, options, train = [0.3 * kd.CrossEntropy(), 0.7 * kd.SoftKL()], {}, DataLoader(data(), 10, shuffle=True)
    if name == "features": losses += [2 * kd.Hint(project="auto").on("0"), kd.Cosine(project="auto").on("1")]
    if name == "relations":
        losses += [5 * kd.RKD().on("0"), kd.DIST(), kd.CKA().on("1")]
        options = {"gather": processes > 1}
    if name == "memory":
        losses += [0.1 * kd.CRD(size=60, width=4).on("1"), kd.ConfidenceWeighted(kd.ForwardKL(), normalize=True)]
        options = {"gather": processes > 1}
        train = [{"x": x, "y": y, "id": 100 + torch.arange(len(x)) + 10 * i} for i, (x, y) in enumerate(DataLoader(data(), 10))]
    if name == "accumulated": options = {"accumulate": 2, "clip": 0.3}
    if name == "schedules": losses = [(lambda t: t) * kd.CrossEntropy(), kd.SoftKL(T=lambda t: 4 - 2 * t)]
    if name == "stream": train = DataLoader(Stream(), 10)
    if name == "batches": train = [{"x": x, "y": y} for x, y in DataLoader(data(), 10)]
    if name == "workers": train = DataLoader(data(), 10, shuffle=True, num_workers=1)
    if name == "half": return kd.distill(net().float(), net(9, 16).float(), DataLoader(single(), 10), epochs=2, precision="fp16",
                                         processes=processes, progress=False)
    return kd.distill(net(), net(9, 16), train, DataLoader(data(20), 10), epochs=3, losses=losses, processes=processes, out=out,
                      resume=out is not None, progress=False, **options)


def single(): return TensorDataset(data().tensors[0].float(), data().tensors[1])


NAMES = ["rows", "features", "relations", "memory", "accumulated", "schedules", "stream", "batches", "workers", "half"]

SCRIPT = """
import json, os, sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
import test_parallel as t
import kdlab as kd

out, rank = {out!r}, int(os.environ["RANK"])
for name in t.NAMES:
    run = t.scenario(name, 2)
    torch.save({{"student": run.student.state_dict(), "objective": run.objective.state_dict(), "history": run.history, "notes": run.notes}}, f"{{out}}/{{name}}.{{rank}}.pt")

# a run that is cut off by a callback of the first process, and resumed
def stop(run):
    if run.epoch == 2: raise KeyboardInterrupt

options = dict(epochs=3, processes=2, out=f"{{out}}/run", progress=False, losses=[kd.SoftKL(), kd.Hint(project="auto").on("0")])
args = lambda: (t.net(), t.net(9, 16), t.DataLoader(t.data(), 10, shuffle=True), t.DataLoader(t.data(20), 10))
cut = kd.distill(*args(), callbacks=[stop], **options)
resumed = kd.distill(*args(), resume=True, **options)
whole = kd.distill(*args(), **(options | {{"out": None}}))
calls, errors = [], {{}}
kd.distill(*args(), callbacks=[lambda run: calls.append(run.epoch)], **(options | {{"out": None}}))

# what must not pass in silence
def fails(name, **kwargs):
    try: kd.distill(*(kwargs.pop("args", None) or args()), **(dict(epochs=1, processes=2, progress=False) | kwargs))
    except Exception as e: errors[name] = f"{{type(e).__name__}}: {{e}}"

fails("one asked for", processes=1)
fails("other students", args=(t.net(rank), *args()[1:]))
fails("tiny batch", args=(*args()[:2], t.DataLoader(t.data(11), 10)))
asked = []
stopped = kd.distill(*args(), stop=lambda: asked.append(1) or (rank == 1 and len(asked) == 3), **(options | {{"out": None}}))
json.dump({{"cut": cut.status, "epochs": cut.epoch, "same": t.fingerprint(resumed.student) == t.fingerprint(whole.student),
           "calls": calls, "errors": errors, "stopped": [stopped.status, len(asked)]}}, open(f"{{out}}/rest.{{rank}}.json", "w"))
"""


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    "Where two processes under torchrun left what they did."
    out = tmp_path_factory.mktemp("pair")
    script = out / "script.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), out=str(out)))
    env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[:6000]
    return out


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_are_one(pair, name):
    alone = scenario(name, 1)
    ranks = [torch.load(pair / f"{name}.{rank}.pt", weights_only=True) for rank in (0, 1)]
    tight = 1e-9 if name != "half" else 1e-3
    for state in ranks:
        for mine, theirs in ((alone.student, state["student"]), (alone.objective, state["objective"])):
            for key, value in mine.state_dict().items(): torch.testing.assert_close(theirs[key], value, rtol=tight, atol=tight)
    assert ranks[0]["history"][-1].keys() == alone.history[-1].keys()
    for ours, theirs in zip(alone.history, ranks[0]["history"]):
        for key in ("train_loss", "valid_loss", "terms", "scheduled", "gradient_norm"):
            if key in ours: assert theirs[key] == pytest.approx(ours[key], rel=max(tight, 1e-6)), key
    moved = net() if name != "half" else net().float()
    assert fingerprint(alone.student) != fingerprint(moved)


def test_both_processes_end_with_the_same_bits(pair):
    for name in NAMES:
        ranks = [torch.load(pair / f"{name}.{rank}.pt", weights_only=True) for rank in (0, 1)]
        for part in ("student", "objective"):
            for key, value in ranks[0][part].items(): assert torch.equal(value, ranks[1][part][key]), (name, key)


def test_without_gather_losses_that_compare_samples_say_what_they_see():
    run = scenario("relations", 1)
    from kdlab.loop import Ways, cautions
    note, = cautions(run.student, run.objective, Ways(team=Team(2)))
    assert note == "RKD, DIST, CKA compare only the samples of one part of a batch with each other (processes=2)"
    assert cautions(run.student, run.objective, Ways(team=Team(2), gather=True)) == []


def test_only_the_first_process_writes_and_calls_back(pair):
    rest = [json.loads((pair / f"rest.{rank}.json").read_text()) for rank in (0, 1)]
    assert [r["calls"] for r in rest] == [[1, 2, 3], []]
    assert kd.load(pair / "run", net()).status == "finished"


def test_what_stops_one_process_stops_both_and_a_resumed_run_is_the_same(pair):
    for rank in (0, 1):
        rest = json.loads((pair / f"rest.{rank}.json").read_text())
        assert (rest["cut"], rest["epochs"], rest["same"]) == ("interrupted", 2, True)
        assert rest["stopped"] == ["interrupted", 3]


@pytest.mark.parametrize("name, words", [
    ("one asked for", "ValueError: processes=1, and this is one of 2"),
    ("other students", "ValueError: the processes do not train the same run: they differ in student_start"),
    ("tiny batch", "ValueError: a batch of 1 samples cannot be shared by 2 processes: use drop_last=True"),
])
def test_what_must_not_pass_in_silence(pair, name, words):
    for rank in (0, 1): assert words in json.loads((pair / f"rest.{rank}.json").read_text())["errors"][name]


# how a batch is cut, without processes

def test_parts_are_the_whole():
    for n in (2, 5, 7, 10):
        for size in (1, 2): assert [i for rank in range(size) for i in range(n)[part(n, Team(size, rank))]] == list(range(n))
    with pytest.raises(ValueError, match="a batch of 2 samples cannot be shared by 3"): part(2, Team(3, 1))


def test_every_kind_of_loader_is_cut():
    whole = [x for x, _ in DataLoader(data(), 10)]
    for loader in (DataLoader(data(), 10), DataLoader(Stream(), 10), list(DataLoader(data(), 10)), DataLoader(data(), batch_sampler=[list(range(i, i + 10)) for i in range(0, 50, 10)])):
        parts = [[x for x, _ in share(loader, Team(2, rank))] for rank in (0, 1)]
        for batch, *halves in zip(whole, *parts): assert torch.equal(torch.cat(halves), batch)
    mine = DataLoader(data(), 10, sampler=DistributedSampler(data(), num_replicas=2, rank=0))
    assert share(mine, Team(2, 0)) is mine and share(mine, Team()) is mine


def test_batches_of_any_kind_are_cut():
    batch = {"x": torch.arange(4), "names": ["a", "b", "c", "d"], "more": (torch.ones(4, 2), {"n": torch.tensor(3.)}), "note": "all"}
    half = _cut(batch, slice(2, 4))
    assert half["x"].tolist() == [2, 3] and half["names"] == ["c", "d"] and half["more"][0].shape == (2, 2)
    assert half["more"][1]["n"] == 3 and half["note"] == "all"
