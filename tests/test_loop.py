"""Steps of a run: four quarters are one batch, clipped gradients, half precision, schedulers, compiled models."""
import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kdlab as kd
from kdlab.checkpoints import fingerprint
from kdlab.loop import Ways, steps_in
from kdlab.parallel import Team
from kdlab.terms import Batch, Seen, parts_of, weigh


def net(seed=0, width=8):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3)).double()


def data(n=48, missing=0.):
    gen = torch.Generator().manual_seed(1)
    x, y = torch.randn(n, 6, generator=gen, dtype=torch.float64), torch.randint(3, (n,), generator=gen)
    return TensorDataset(x, torch.where(torch.rand(n, generator=gen) < missing, -100, y))


def distill(student, teacher, batch=24, missing=0., **kwargs):
    options = dict(epochs=2, progress=False, losses=0.3 * kd.CrossEntropy() + 0.7 * kd.SoftKL()) | kwargs
    return kd.distill(student, teacher, options.pop("train", None) or DataLoader(data(missing=missing), batch),
                      DataLoader(data(12), 12), **options)


def close(one, other, tight=1e-10):
    for a, b in zip((one.student, one.objective), (other.student, other.objective)):
        for p, q in zip(a.state_dict().values(), b.state_dict().values()): torch.testing.assert_close(p, q, rtol=tight, atol=tight)
    for a, b in zip(one.history, other.history):
        for key in ("train_loss", "valid_loss"): assert a[key] == pytest.approx(b[key], rel=tight * 10)
        assert a.get("terms", {}) == pytest.approx(b.get("terms", {}), rel=tight * 10)


# four quarters are one batch

OBJECTIVES = {
    "row losses": lambda: 0.3 * kd.CrossEntropy() + 0.7 * kd.SoftKL(),
    "hard alone": lambda: 1. * kd.CrossEntropy(label_smoothing=0.1),
    "a row loss of its own": lambda: 0.5 * kd.CrossEntropy() + kd.NKD() + kd.Standardized(kd.ForwardKL()) + kd.LogitMSE(),
    "features": lambda: kd.SoftKL() + 2 * kd.Hint(project="auto").on("0") + kd.Cosine(project="auto").on("1"),
    "sums": lambda: kd.CrossEntropy(reduction="sum") + 0.1 * kd.ForwardKL(reduction="sum"),
    "schedules": lambda: (lambda t: t) * kd.CrossEntropy() + kd.SoftKL(T=lambda t: 4 - 2 * t),
}


@pytest.mark.parametrize("missing", [0., 0.6])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_four_micro_batches_are_one_batch(name, missing):
    teacher = net(9, 16)
    one, other = (distill(net(), teacher, batch, missing, losses=OBJECTIVES[name](), accumulate=k) for batch, k in ((24, 1), (6, 4)))
    close(one, other)
    assert fingerprint(one.student) != fingerprint(net())


def test_the_mean_of_micro_batches_would_be_something_else():
    teacher, x, y = net(9, 16), *data(24, 0.6).tensors
    objective, student = 0.3 * kd.CrossEntropy() + 0.7 * kd.SoftKL(), net()
    whole = weigh(objective, Seen(student(x), {}), Seen(teacher(x), {}), y)[0]
    quarters = [Batch(None, x[i:i + 6], y[i:i + 6], None) for i in range(0, 24, 6)]
    see = lambda b: (Seen(student(b.x), {}), Seen(teacher(b.x), {}), b.y)
    shares, n = parts_of(objective, see(quarters[0])[0], quarters, Team())
    assert n == 24 and len({s["CrossEntropy"] for s in shares}) > 1 and {s["SoftKL"] for s in shares} == {0.25}
    together = sum(weigh(objective, *see(b), shares=s)[0] for b, s in zip(quarters, shares))
    torch.testing.assert_close(together, whole, rtol=1e-12, atol=0)
    assert abs(sum(weigh(objective, *see(b))[0] for b in quarters) / 4 - whole) > 1e-3 * whole


def test_a_last_step_may_have_fewer_batches():
    teacher = net(9, 16)
    whole = distill(net(), teacher, 24, train=DataLoader(data(54), 24)) # 24, 24, 6
    parts = distill(net(), teacher, 6, train=DataLoader(data(54), 6), accumulate=4) # 4, 4, 1
    close(whole, parts)
    assert steps_in(range(9), 4) == 3 and steps_in(range(8), 4) == 2 and steps_in(iter(())) is None


class Tokens(nn.Module):
    "Logits for every token."
    def __init__(self, seed): super().__init__(); torch.manual_seed(seed); self.body, self.head = nn.Linear(6, 8).double(), nn.Linear(8, 3).double()
    def forward(self, x, attention_mask): return self.head(self.body(x))


@pytest.mark.parametrize("labels", ["each token", "some tokens", "none"])
def test_micro_batches_of_tokens(labels):
    gen = torch.Generator().manual_seed(0)
    x, lengths = torch.randn(24, 5, 6, generator=gen, dtype=torch.float64), torch.randint(1, 6, (24,), generator=gen)
    mask = (torch.arange(5) < lengths[:, None]).long()
    y = torch.where(torch.rand(24, 5, generator=gen) < (0.5 if labels == "some tokens" else 0), -100, torch.randint(3, (24, 5), generator=gen))

    def batches(n):
        rows = [slice(i, i + n) for i in range(0, 24, n)]
        return [{"x": {"x": x[r], "attention_mask": mask[r]}} | ({} if labels == "none" else {"y": y[r]}) for r in rows]

    losses = [kd.SoftKL(), kd.Hint().on("body")] + [0.5 * kd.CrossEntropy()] * (labels != "none")
    run = lambda n, k: kd.distill(Tokens(0), Tokens(1), batches(n), epochs=2, losses=losses, accumulate=k, progress=False)
    one, other = run(12, 1), run(3, 4)
    for p, q in zip(one.student.parameters(), other.student.parameters()): torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10)
    for a, b in zip(one.history, other.history): assert a["terms"] == pytest.approx(b["terms"])


def test_a_part_without_labels_is_not_an_error():
    y = torch.full((24,), -100)
    y[:3] = torch.tensor([0, 1, 2])
    train = lambda n: DataLoader(TensorDataset(data(24).tensors[0], y), n)
    close(*(distill(net(), None, train=train(n), losses=kd.CrossEntropy(), accumulate=k) for n, k in ((24, 1), (6, 4))))


def test_losses_that_compare_samples_say_that_they_see_a_part():
    run = distill(net(), net(9, 8), 6, losses=kd.SoftKL() + kd.RKD().on("0") + kd.DIST(), accumulate=4)
    assert any("RKD, DIST compare only the samples of one part of a batch with each other (accumulate=4)" in note for note in run.notes)
    assert not distill(net(), net(9, 8), losses=kd.SoftKL() + kd.RKD().on("0")).notes
    losses = kd.ConfidenceWeighted(kd.SoftKL(), normalize=True) + kd.DifficultyWeighted(kd.SoftKL()) + 0.1 * kd.CRD(size=48, width=4).on("1")
    note, = distill(net(), net(9, 8), 6, losses=losses, accumulate=4).notes
    assert note.startswith("ConfidenceWeighted, CRD compare only the samples of one part of a batch")
    note, = distill(net(), net(9, 8), 6, losses=kd.SoftKL() + kd.SimKD().on("1"), accumulate=4).notes
    assert note.startswith("batch norm sees one part of a batch")
    normed = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    assert any("batch norm sees one part" in note for note in distill(normed, net(9, 8), 6, accumulate=4).notes)


def test_every_loss_that_refuses_single_rows_says_that_it_couples_them():
    import kdlab.losses.relations
    todo, every = [kd.losses.Loss], []
    while todo: todo += (found := todo.pop().__subclasses__()); every += found
    own = [c for c in every if c.__module__.startswith("kdlab") and not c.__name__.startswith("_") and not c.__subclasses__()]
    coupled = []
    for cls in own:
        try: cls(reduction="none")
        except ValueError as e:
            if "none" in str(e) and "reduction" in str(e): coupled.append(cls)
        except TypeError: pass
    assert kdlab.losses.relations.RKD in coupled and [c.__name__ for c in coupled if not c.couples] == []


# gradients

def test_clipped_gradients_are_those_of_torch():
    teacher, losses = net(9, 16), lambda: 30 * kd.SoftKL() + kd.Hint(project="auto").on("0")
    run = distill(net(), teacher, clip=0.5, losses=losses(), epochs=1, optimizer=lambda p: torch.optim.SGD(p, 0.1), scheduler=None)
    student = net()
    objective = kd.build(losses(), student, teacher, data().tensors[0])
    start = distill(net(), teacher, losses=losses(), epochs=1, optimizer=lambda p: torch.optim.SGD(p, 0.), scheduler=None).objective
    objective.load_state_dict(start.state_dict())
    held, norms = [*student.parameters(), *objective.parameters()], []
    for x, y in DataLoader(data(), 24):
        with kd.Taps(student, ["0"]) as fs, kd.Taps(teacher, ["0"]) as ft:
            loss = 30 * objective.losses[0](student(x), kd.frozen(teacher)(x)) + objective.losses[1](fs["0"], ft["0"])
        grads = torch.autograd.grad(loss, held)
        norms.append(torch.stack([g.norm() for g in grads]).norm().item())
        for p, g in zip(held, grads): p.data -= 0.1 * min(1., 0.5 / (norms[-1] + 1e-6)) * g
    for p, q in zip(student.parameters(), run.student.parameters()): torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10)
    assert max(norms) > 0.5 and run.history[0]["gradient_norm"] == pytest.approx(sum(norms) / 2)
    assert "gradient_norm" not in distill(net(), teacher, epochs=1).history[0]


def test_a_large_clip_changes_nothing():
    assert fingerprint(distill(net(), net(9), clip=1e9).student) == fingerprint(distill(net(), net(9)).student)


# schedulers

def test_a_scheduler_takes_a_step_after_each_step():
    seen = []

    class Spy(torch.optim.lr_scheduler.LambdaLR):
        def step(self, *args): seen.append(1); super().step(*args)

    run = distill(net(), net(9), 6, accumulate=3, scheduler=lambda o: Spy(o, lambda n: 1 / (n + 1)))
    assert len(seen) == 1 + 2 * 3 # once when it is made
    assert run.history[1]["lr"] == pytest.approx(3e-3 / 4)
    default = distill(net(), net(9), 6, accumulate=3)
    assert default.history[1]["lr"] == pytest.approx(3e-3 / 2) # half of the cosine


def test_a_plateau_waits_for_the_valid_loss():
    plateau = lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=10., threshold_mode="abs")
    run = distill(net(), net(9), scheduler=plateau, epochs=3)
    assert [h["lr"] for h in run.history] == pytest.approx([3e-3, 3e-3, 3e-4])
    with pytest.raises(ValueError, match="ReduceLROnPlateau waits for the valid loss: pass valid="):
        kd.distill(net(), net(9), DataLoader(data(), 24), scheduler=plateau, progress=False)


# precision

@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_close_and_weights_stay_float32(precision):
    losses = lambda: [kd.CrossEntropy(), kd.SoftKL(), kd.Hint(project="auto").on("0")]
    seen = []
    train = DataLoader(TensorDataset(data().tensors[0].float(), data().tensors[1]), 24)

    def run(precision):
        student = net().float()
        student[0].register_forward_hook(lambda m, i, o: seen.append((precision, o.dtype)) if m.training else None)
        return kd.distill(student, net(9, 16).float(), train, train, epochs=3, losses=losses(), precision=precision, progress=False)

    half, full = run(precision), run("fp32")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert set(seen) == {(precision, dtype), ("fp32", torch.float32)}
    assert all(p.dtype == torch.float32 for p in half.student.parameters()) and half.finished
    for key in ("train_loss", "valid_loss"): assert half.history[-1][key] == pytest.approx(full.history[-1][key], rel=0.03)
    assert half.plan["precision"] == precision


def test_steps_that_overflow_in_float16_are_skipped_and_counted():
    train = DataLoader(TensorDataset(data().tensors[0].float(), data().tensors[1]), 24)
    student = net().float()
    first = [False] * 10 + [True]
    student[0].weight.register_hook(lambda grad: grad / 0 if first.pop() else None)
    run = kd.distill(student, net(9).float(), train, epochs=2, precision="fp16", progress=False)
    assert "1 steps were skipped: gradients overflowed in float16" in run.notes
    assert all(p.isfinite().all() for p in student.parameters())


def test_a_resumed_run_keeps_its_scale_and_its_tally(tmp_path):
    train = DataLoader(TensorDataset(data(missing=0.5).tensors[0].float(), data(missing=0.5).tensors[1]), 6)
    options = dict(epochs=4, precision="fp16", clip=1., accumulate=2, progress=False)
    make = lambda: (net().float(), net(9).float(), train)
    whole = kd.distill(*make(), **options)

    def stop(run):
        if run.epoch == 2: raise KeyboardInterrupt

    kd.distill(*make(), out=tmp_path, callbacks=[stop], **options)
    resumed = kd.distill(*make(), out=tmp_path, resume=True, **options)
    assert fingerprint(resumed.student) == fingerprint(whole.student) and resumed.notes == whole.notes and whole.notes
    plain = lambda run: [{k: v for k, v in h.items() if k != "seconds"} for h in run.history]
    assert plain(resumed) == plain(whole)
    with pytest.raises(ValueError, match="accumulate: 2 saved, 1 now"): kd.distill(*make(), out=tmp_path, resume=True, **options | {"accumulate": 1})


# compiled

def test_compiled_models_learn_the_same_and_show_their_layers():
    losses = lambda: [kd.CrossEntropy(), kd.SoftKL(), kd.Hint(project="auto").on("0")]
    plain, compiled = (distill(net(), net(9, 16), losses=losses(), compile=c) for c in (False, {"backend": "eager"}))
    close(plain, compiled, 1e-9)
    assert type(compiled.student) is nn.Sequential and "_orig_mod" not in "".join(compiled.student.state_dict())


# bad input

@pytest.mark.parametrize("kwargs, error, words", [
    (dict(clip=0), ValueError, "clip is the largest norm of the gradients, > 0, got 0"),
    (dict(clip=-1.), ValueError, "clip is"),
    (dict(accumulate=0), ValueError, "accumulate is a whole number of batches >= 1, got 0"),
    (dict(accumulate=1.5), ValueError, "accumulate is"),
    (dict(precision="half"), ValueError, "precision must be fp32, bf16 or fp16, got 'half'"),
    (dict(compile="fast"), TypeError, "compile must be True, False or options"),
    (dict(gather=True), ValueError, "gather=True is for several processes"),
    (dict(processes=2), ValueError, "processes=2, and there is 1: start the script with torchrun --nproc-per-node 2"),
    (dict(processes=0), ValueError, "processes must be a whole number >= 1"),
])
def test_bad_arguments_are_named(kwargs, error, words):
    student = net()
    with pytest.raises(error, match=words): distill(student, net(9), **kwargs)
    assert fingerprint(student) == fingerprint(net())


def test_a_script_that_does_not_know_of_torchrun_is_stopped(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="processes=1, and this is one of 2: each would train all of it"): distill(net(), net(9))


def test_ways_are_plain():
    assert Ways(clip=1.).check().written() == {"clip": 1., "accumulate": 1, "precision": "fp32", "processes": 1, "gather": False}
    assert copy.copy(Ways()).team.first


# evaluation

def test_padding_says_nothing_about_agreement():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    agree, differ = Tokens(0), Tokens(0)
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    with torch.no_grad(): differ.head.bias += torch.tensor([0., 0., 100.])
    named = torch.where(mask[..., None] > 0, x, 1000.) # in the padding both say what the weights say
    batch = [{"x": {"x": named, "attention_mask": mask}}]
    teacher, student = (m(named, mask).argmax(-1) for m in (agree, differ))
    want = (teacher == student)[mask.bool()].double().mean().item()
    run = kd.distill(differ, agree, batch, batch, epochs=1, losses=kd.SoftKL(), optimizer=lambda p: torch.optim.SGD(p, 0.), scheduler=None, progress=False)
    assert run.history[0]["valid_agreement"] == pytest.approx(want)


def test_arrays_for_widgets_are_kept_while_they_are_small():
    small = distill(net(), net(9), epochs=1)
    assert {k: tuple(v.shape) for k, v in small.outputs.items()} == {"student": (12, 3), "teacher": (12, 3), "labels": (12,), "inputs": (12, 6)}
    wide = [nn.Sequential(nn.Linear(6, 100_000)) for _ in range(2)]
    valid = DataLoader(TensorDataset(torch.randn(12, 6), torch.arange(12)), 4)
    run = kd.distill(*wide, valid, valid, epochs=1, losses=kd.SoftKL(), progress=False)
    assert set(run.outputs) == {"labels", "inputs"} and 0 <= run.history[0]["valid_accuracy"] <= 1
