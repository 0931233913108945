"""Weights and temperatures that follow a schedule, and teachers that are no module, in a loss and in a run."""
import copy
import inspect
import math
import pickle

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kdlab as kd
from kdlab.distilling import fingerprint
from kdlab.losses import Loss
from kdlab.losses.objective import Moving, Number
from kdlab.terms import Seen, Source, scheduled


def falling(t): return 4 - 3 * t


class Ramp:
    "A schedule with a name and a file form."
    def __init__(self, start, end): self.start, self.end = start, end
    def __call__(self, t): return self.start + (self.end - self.start) * t
    def __repr__(self): return f"ramp({self.start:g}, {self.end:g})"


def rows(n=8, classes=5, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(n, classes, generator=gen), torch.randn(n, classes, generator=gen), torch.randint(classes, (n,), generator=gen)


def loader(n=64, seed=0, **kwargs):
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))
    return DataLoader(TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()), 16, **({"shuffle": True} | kwargs))


def net(seed=0, width=8):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3))


def distill(student, teacher, **kwargs):
    options = dict(epochs=4, progress=False, valid=loader(seed=2)) | kwargs
    return kd.distill(student, teacher, options.pop("train", loader()), options.pop("valid"), **options)


# the numbers

def test_a_number_that_moves_is_a_float_with_a_schedule():
    half = 0.5 * Moving(Ramp(2, 4))
    assert half == 1.0 and half.at(1) == 2.0 and (-half).at(1) == -2.0 and (half / 2).at(1) == 1.0
    assert (half * Moving(Ramp(1, 0))).at(0.5) == 0.75
    for twin in (copy.deepcopy(half), pickle.loads(pickle.dumps(half))): assert twin == 1.0 and twin.at(1) == 2.0


@pytest.mark.parametrize("schedule, error, words", [
    (lambda t: math.nan, ValueError, r"schedule\(t\) is nan at progress 0"),
    (lambda t: "much", TypeError, "failed at 0"),
    (lambda: 1., TypeError, "takes progress in"),
])
def test_a_schedule_that_gives_no_number_is_named(schedule, error, words):
    with pytest.raises(error, match=words): schedule * kd.SoftKL()


def test_what_cannot_be_a_weight_or_a_temperature():
    for wrong in (kd.SoftKL(), nn.Linear(2, 2), int): # callable, but no schedules
        with pytest.raises(TypeError, match="weighted by a number"): kd.CrossEntropy() * wrong
    with pytest.raises(TypeError, match="multiply by a schedule"): kd.SoftKL() / falling
    with pytest.raises(ValueError, match="T must be a number > 0"): kd.SoftKL(T=lambda t: -1.)
    with pytest.raises(ValueError, match="T must be a number > 0"): (1 * kd.SoftKL(T=Ramp(1, 0))).advance(1.)


def losses_with_T():
    import kdlab.losses.features, kdlab.losses.logits, kdlab.losses.relations, kdlab.losses.sparse  # noqa: F401, E401
    every, todo = [], [Loss]
    while todo: todo += (found := todo.pop().__subclasses__()); every += found
    return sorted({c for c in every if isinstance(inspect.getattr_static(c, "T", None), Number) and not c.__name__.startswith("_")
                   and "T" in inspect.signature(c).parameters and c.__module__.startswith("kdlab")}, key=lambda c: c.__name__)


@pytest.mark.parametrize("cls", losses_with_T(), ids=lambda c: c.__name__)
def test_every_temperature_may_follow_a_schedule(cls):
    around = [kd.ForwardKL()] if "loss" in inspect.signature(cls).parameters else []
    objective = 1. * cls(*around, T=Ramp(4, 1))
    loss = objective.losses[0]
    assert loss.T == 4 and "ramp(4, 1)" in repr(loss)
    objective.advance(0.5)
    assert loss.T == 2.5 and loss._T_tensor.item() == 2.5
    loss.T = 3 # a number ends the schedule
    objective.advance(1.)
    assert loss.T == 3


def test_an_objective_moves_all_that_moves():
    zs, zt, y = rows()
    objective = Ramp(0, 1) * kd.CrossEntropy() + 0.5 * (falling * kd.SoftKL(T=Ramp(4, 2)))
    for t in (0., 0.25, 1.):
        objective.advance(t)
        still = t * kd.CrossEntropy() + 0.5 * falling(t) * kd.SoftKL(T=4 - 2 * t)
        torch.testing.assert_close(objective(zs, zt, y), still(zs, zt, y), rtol=1e-6, atol=0)
        assert objective.weights == still.weights
    assert objective.equation() == ("ramp(0, 1)·CE(labels, student) + 0.5·falling(t)·ramp(4, 2)²·"
                                    "KL(softmax(teacher/ramp(4, 2)) ‖ softmax(student/ramp(4, 2)))")
    assert "SoftKL(T=4) - ramp(0, 1)·CrossEntropy()" == repr(kd.SoftKL() - Ramp(0, 1) * kd.CrossEntropy())
    assert scheduled(objective) == {"CrossEntropy weight": 1.0, "SoftKL weight": 0.5, "SoftKL T": 2.0}


def test_losses_inside_losses_move():
    zs, zt, _ = rows()
    objective = 2 * kd.Standardized(Ramp(1, 3) * kd.ForwardKL(T=Ramp(1, 2)))
    objective.advance(0.5)
    torch.testing.assert_close(objective(zs, zt), (2 * kd.Standardized(2 * kd.ForwardKL(T=1.5)))(zs, zt))


def test_a_compiled_objective_follows_its_schedule_without_compiling_again():
    from torch._dynamo.testing import CompileCounter
    zs, zt, y = rows()
    objective, counter = Ramp(1, 2) * kd.CrossEntropy() + 0.5 * kd.SoftKL(T=Ramp(4, 2)), CompileCounter()
    compiled = torch.compile(objective, backend=counter)
    for t in (0., 0.2, 0.4, 0.8):
        objective.advance(t)
        torch.testing.assert_close(compiled(zs, zt, y), objective(zs, zt, y))
    assert counter.frame_count == 1


# in a run

def test_a_run_moves_its_schedules_before_every_step(teacher=net(9, 32)):
    seen = []

    class Spy(Ramp):
        def __call__(self, t): seen.append(t); return super().__call__(t)

    objective = Spy(0.5, 1) * kd.CrossEntropy() + kd.SoftKL(T=Ramp(4, 2))
    run = distill(net(), teacher, losses=objective, epochs=4)
    assert set(seen) >= {(epoch + step / 4) / 4 for epoch in range(4) for step in range(4)}
    assert [h["scheduled"] for h in run.history] == [{"CrossEntropy weight": 0.5 + e / 8, "SoftKL T": 4 - e / 2} for e in range(4)]
    assert run.plan["schedules"]["SoftKL T"] == [3.5, 3, 2.5, 2, 4] and "ramp(4, 2)²" in run.plan["objective"]
    assert "scheduled" not in repr(run) and run.objective.weights[0] == 1.


def test_schedules_change_what_is_learnt_as_by_hand(teacher=net(9, 32)):
    train, student = loader(shuffle=False), net()
    by_hand, kl, ce = copy.deepcopy(student), kd.SoftKL(), kd.CrossEntropy()
    distill(student, teacher, train=train, losses=Ramp(0, 1) * ce + kd.SoftKL(T=Ramp(4, 1)), lr=0.1, scheduler=None, epochs=2,
            optimizer=lambda p: torch.optim.SGD(p, 0.1))
    for step, (x, y) in enumerate([*train, *train]):
        t = step / 8
        kl.T = 4 - 3 * t
        zs = by_hand(x)
        loss = t * ce(zs, None, y) + kl(zs, teacher(x).detach())
        for p, g in zip(by_hand.parameters(), torch.autograd.grad(loss, list(by_hand.parameters()))): p.data -= 0.1 * g
    for p, q in zip(student.parameters(), by_hand.parameters()): torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_a_resumed_run_goes_on_with_its_schedules(tmp_path, teacher=net(9, 32)):
    options = lambda T=4: dict(losses=Ramp(0, 1) * kd.CrossEntropy() + kd.SoftKL(T=lambda t: T - 2 * t), epochs=4)
    whole = distill(net(), teacher, **options())

    def stop(run):
        if run.epoch == 2: raise KeyboardInterrupt

    distill(net(), teacher, out=tmp_path, callbacks=[stop], **options())
    with pytest.raises(ValueError, match="schedules: .*saved"): distill(net(), teacher, out=tmp_path, resume=True, **options(T=5))
    resumed = distill(net(), teacher, out=tmp_path, resume=True, **options())
    assert fingerprint(resumed.student) == fingerprint(whole.student)
    assert [h["scheduled"] for h in resumed.history] == [h["scheduled"] for h in whole.history]
    loaded = kd.load(tmp_path, net())
    assert loaded.history == resumed.history


def test_a_loader_without_a_length_moves_by_whole_epochs(teacher=net(9, 32)):
    seen = []
    distill(net(), teacher, train=Batches(), epochs=2, losses=(lambda t: seen.append(t) or 1.) * kd.SoftKL())
    assert set(seen) == {0., 0.25, 0.5, 0.75, 1.}


class Batches:
    "Batches that cannot be counted."
    def __iter__(self): return iter(list(loader(shuffle=False)))


def test_the_best_epoch_is_not_judged_by_a_loss_that_moves(teacher=net(9, 32)):
    unlabelled = DataLoader(TensorDataset(torch.randn(32, 6)), 16)
    best = lambda weight: distill(net(), teacher, valid=unlabelled, losses=weight * kd.SoftKL()).best["monitor"]
    assert best(1.) == "valid_loss" and best(Ramp(1, 0.1)) == "valid_agreement"


# teachers that are no module

class Mean(Source):
    "The mean of several teachers' logits."
    about = "the mean of two"

    def __init__(self, *models): self.models = models

    @property
    def fingerprint(self): return "+".join(map(fingerprint, self.models))

    def answer(self, batch, x, y): return sum(kd.frozen(m)(x) for m in self.models) / len(self.models)


class Both(nn.Module):
    def __init__(self, *models): super().__init__(); self.models = nn.ModuleList(models)
    def forward(self, x): return sum(m(x) for m in self.models) / len(self.models)


def test_a_source_teaches_as_the_module_that_says_the_same(tmp_path):
    models = net(8, 16), net(9, 32)
    run = distill(net(), Mean(*models), out=tmp_path)
    assert fingerprint(run.student) == fingerprint(distill(net(), Both(*models)).student)
    assert "teacher  the mean of two" in repr(run) and run.history[-1]["valid_agreement"] <= 1
    assert kd.load(tmp_path, net(), Mean(*models)).teacher.models == models
    with pytest.raises(ValueError, match="not the model that taught"): kd.load(tmp_path, net(), Mean(net(7), models[1]))
    with pytest.raises(ValueError, match="teacher_fingerprint"): distill(net(), Mean(net(7), models[1]), out=tmp_path, resume=True)


class Stored(Source):
    "Answers by the ids of samples; k of them, if asked."
    about, fingerprint = "stored", "stored"

    def __init__(self, logits, k=None): self.logits, self.k, self.asked = logits, k, []

    def answer(self, batch, x, y):
        self.asked.append((x.device.type, y is not None))
        said = self.logits[batch["ids"]].log_softmax(-1)
        return said if self.k is None else tuple(said.topk(self.k))

    def objective(self): return None if self.k is None else 0.1 * kd.CrossEntropy() + 0.9 * kd.SparseForwardKL(tail="bucket")


def with_ids(labels=True):
    data = loader(shuffle=False).dataset
    whole = [{"x": x, "ids": torch.tensor(i)} | ({"y": y} if labels else {}) for i, (x, y) in enumerate(data)]
    return DataLoader(whole, 16, shuffle=True)


@pytest.mark.parametrize("k", [None, 3])
def test_stored_answers_find_their_samples(k):
    teacher = net(9, 32)
    stored = Stored(kd.frozen(teacher)(loader(shuffle=False).dataset.tensors[0]), k)
    losses = None if k else 0.1 * kd.CrossEntropy() + 0.9 * kd.SoftKL(T=1)
    run = distill(net(), stored, train=with_ids(), valid=with_ids(), losses=losses)
    live = distill(net(), teacher, train=with_ids(), valid=with_ids(), losses=0.1 * kd.CrossEntropy() + 0.9 * kd.SoftKL(T=1))
    for p, q in zip(run.student.parameters(), live.student.parameters()): torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)
    assert run.history[-1]["valid_agreement"] == live.history[-1]["valid_agreement"]
    assert ("teacher" in run.outputs) == (k is None) and set(stored.asked) == {("cpu", True)}


def test_a_source_may_show_layers_and_refuse_losses():
    teacher = net(9, 8)

    class Layers(Source):
        about, fingerprint = "layers", "1"
        def answer(self, batch, x, y): h = teacher[0](x); return Seen(teacher[1:](h), {"first": h})

        def check(self, objective):
            if any(loss.bound and loss.bound.teacher != "first" for _, loss in objective.terms()): raise ValueError("only first")

    losses = [kd.SoftKL(), kd.Hint().on(student="0", teacher="first")]
    run = distill(net(), Layers(), losses=losses)
    plain = distill(net(), teacher, losses=[kd.SoftKL(), kd.Hint().on("0")])
    assert fingerprint(run.student) == fingerprint(plain.student)
    with pytest.raises(ValueError, match="only first"): distill(net(), Layers(), losses=kd.Hint().on("0"))
    with pytest.raises(ValueError, match="layers is no module: pass the module as project="):
        distill(net(), Layers(), losses=kd.Hint(project="auto").on(student="0", teacher="first"))


def test_a_source_that_changes_stops_the_run():
    class Restless(Mean):
        calls = 0
        def answer(self, batch, x, y): self.calls += 1; return super().answer(batch, x, y)
        fingerprint = property(lambda self: str(self.calls))

    with pytest.raises(RuntimeError, match="the teacher changed in epoch 1"): distill(net(), Restless(net(9, 32)))


# losses from the student alone

class Spread(Loss):
    "Keeps logits small; asks neither teacher nor labels."
    role = "self"
    def forward(self, student, teacher=None, target=None): return student.square().mean()
    def equation(self): return "mean student²"


@pytest.mark.parametrize("labels", [True, False])
def test_a_loss_from_the_student_alone_needs_neither_teacher_nor_labels(labels):
    train = with_ids(labels)
    run = distill(net(), None, train=train, valid=train, losses=[Spread(), 0.1 * kd.CrossEntropy()], epochs=2)
    assert run.history[-1]["terms"]["Spread"] < run.history[0]["terms"]["Spread"] and "valid_loss" in run.history[-1]
    assert ("CrossEntropy" in run.history[0]["terms"]) == labels
    inner = distill(net(), None, train=train, losses=[Spread(), Spread().on("0")], epochs=1)
    assert list(inner.history[0]["terms"]) == ["Spread", "Spread 0"]
    with pytest.raises(ValueError, match="needs a teacher"): distill(net(), None, losses=Spread() + kd.SoftKL())
