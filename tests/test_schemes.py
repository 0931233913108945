"""Schemes: who teaches whom, and when; each against what its definition says, and exact when it is resumed."""
import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kdlab as kd
from kdlab import schemes
from kdlab.distilling import fingerprint


def data(n=64, seed=0, labels=True):
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=gen)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    return TensorDataset(x, y) if labels else TensorDataset(x)


def loader(**kwargs): return DataLoader(data(**kwargs), 16, shuffle=True)


def net(seed=0, width=8):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width), nn.Dropout(0.2), nn.ReLU(), nn.Linear(width, 3))


@pytest.fixture(scope="module")
def teacher():
    model = net(9, 32)
    kd.distill(model, None, loader(n=256, seed=1), epochs=8, lr=0.02, progress=False)
    return model


OPTIONS = dict(epochs=2, progress=False)


def plain(run): return [{k: v for k, v in h.items() if k != "seconds"} for h in run.history]


# chains

def chain(teacher, **options):
    return schemes.teacher_assistants(net(), teacher, [net(1, 16), net(2, 12)], loader(), loader(seed=2), **OPTIONS | options)


def test_a_chain_is_its_runs_one_after_the_other(teacher):
    runs = chain(teacher, seed=5)
    assert runs.names == ["assistant1", "assistant2", "student"] and runs.finished and "3 of 3 stages" in repr(runs)
    assert [run.teacher for run in runs] == [teacher, runs[0].student, runs[1].student]
    above = teacher
    for i, (run, fresh) in enumerate(zip(runs, (net(1, 16), net(2, 12), net()))):
        alone = kd.distill(fresh, above, loader(), loader(seed=2), seed=5 + i, **OPTIONS)
        assert fingerprint(alone.student) == fingerprint(run.student) and plain(alone) == plain(run)
        above = alone.student
    assert runs.student is runs[2].student and runs.history is runs[2].history
    kd.show(runs)


def test_a_chain_may_have_epochs_of_its_own_for_each_stage(teacher):
    assert [len(run.history) for run in chain(teacher, epochs=[1, 2, 3])] == [1, 2, 3]
    with pytest.raises(ValueError, match="one for each of the 3 stages, got 2"): chain(teacher, epochs=[1, 2])


def again(make_runs, tmp_path):
    "A row that is cut after every epoch and resumed each time is the row that was never cut."
    def stop(run): raise KeyboardInterrupt

    whole = make_runs()
    for stage in range(len(whole)): # of two epochs each
        cut = make_runs(out=tmp_path, resume=True, callbacks=[stop])
        assert len(cut) == stage + 1 and not cut.finished and cut.last.status == "interrupted"
    resumed = make_runs(out=tmp_path, resume=True)
    assert resumed.finished and [fingerprint(r.student) for r in resumed] == [fingerprint(r.student) for r in whole]
    assert [plain(r) for r in resumed] == [plain(r) for r in whole]
    with pytest.raises(FileExistsError, match="resume=True"): make_runs(out=tmp_path)


def test_a_chain_is_resumed_exactly(teacher, tmp_path):
    again(lambda **o: chain(teacher, **o), tmp_path)


def test_a_resumed_chain_with_another_beginning_is_refused(teacher, tmp_path):
    chain(teacher, out=tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1-assistant1", "2-assistant2", "3-student"]
    with pytest.raises(ValueError, match="teacher_fingerprint"): chain(net(7, 32), out=tmp_path, resume=True)


def test_wrong_chains(teacher):
    same = net(1)
    with pytest.raises(ValueError, match="assistants is empty"): schemes.teacher_assistants(net(), teacher, [], loader())
    with pytest.raises(ValueError, match="one of its own"): schemes.teacher_assistants(net(), teacher, [same, same], loader())
    with pytest.raises(ValueError, match="one of its own"): schemes.teacher_assistants(net(), teacher, [teacher], loader())
    with pytest.raises(TypeError, match="function from parameters"): chain(teacher, optimizer=torch.optim.SGD(net().parameters(), 0.1))
    with pytest.raises(TypeError, match="unexpected keyword"): chain(teacher, epoch=3)


@pytest.mark.parametrize("first", ["labels", "teacher"])
def test_born_again_generations(teacher, first, tmp_path):
    ban = lambda **o: schemes.born_again(net, loader(), loader(seed=2), generations=2,
                                         teacher=teacher if first == "teacher" else None, **OPTIONS | o)
    runs = ban()
    assert runs.names == ["generation0", "generation1", "generation2"] and runs[1].teacher is runs[0].student
    paper = (kd.CrossEntropy() + kd.SoftKL(T=1)).equation()
    assert [run.plan["objective"] == paper for run in runs] == [first == "teacher", True, True]
    assert [run.plan["student_start"] for run in runs] == [fingerprint(net(i)) for i in range(3)] # each started anew
    again(ban, tmp_path)
    assert ban(losses=kd.SoftKL(T=2))[1].plan["objective"] == kd.SoftKL(T=2).equation() or first == "labels"


def test_born_again_needs_fresh_networks(teacher):
    one = net()
    with pytest.raises(ValueError, match=r"make\(1\) returned the teacher itself"): schemes.born_again(lambda i: one, loader(), **OPTIONS)
    with pytest.raises(ValueError, match="generations must be"): schemes.born_again(net, loader(), generations=0)


def test_stages_train_one_student(teacher, tmp_path):
    hint = kd.Hint(project="auto").on("3")
    plan = [dict(losses=hint, epochs=2), dict(epochs=2, lr=0.01)]
    make = lambda **o: schemes.stage_wise(net(), teacher, loader(), loader(seed=2), stages=plan, progress=False, **o)
    runs = make()
    assert runs[0].student is runs[1].student and runs[0].plan["objective"] != runs[1].plan["objective"]
    heads = []
    student = net()
    schemes.stage_wise(student, teacher, loader(), stages=plan, progress=False,
                       callbacks=[lambda run: heads.append(copy.deepcopy(student[4].weight))])
    assert torch.equal(heads[0], net()[4].weight) and torch.equal(heads[1], heads[0]) and not torch.equal(heads[2], heads[1])
    again(make, tmp_path)
    for wrong in ([], [hint]):
        with pytest.raises(ValueError, match="stages must be dicts"): schemes.stage_wise(net(), teacher, loader(), stages=wrong)


# several teachers

def others(n=3):
    "Teachers that differ, and are sure of what they say."
    models = [net(20 + i, 16).eval() for i in range(n)]
    for m in models: nn.init.normal_(m[4].weight, std=2., generator=torch.Generator().manual_seed(3))
    return models


def alike(a, b):
    "Do two students say the same?"
    x = data(seed=7).tensors[0]
    torch.testing.assert_close(kd.frozen(a)(x), kd.frozen(b)(x), rtol=1e-3, atol=1e-3)


def batch(): return data(n=16, seed=4).tensors


def probabilities(models, x, T): return torch.stack([(m(x).double() / T).softmax(-1) for m in models])


@pytest.mark.parametrize("T", [1., 4.])
def test_uniform_teachers_are_the_mean_of_their_probabilities(T):
    models, (x, y) = others(), batch()
    team = schemes.Teachers(models, T=T)
    with torch.no_grad(): want = probabilities(models, x, T).mean(0)
    torch.testing.assert_close((team(x).double() / T).softmax(-1), want, rtol=1e-5, atol=1e-7)
    assert not torch.allclose((team(x) / (2 * T)).softmax(-1).double(), probabilities(models, x, 2 * T).mean(0), atol=1e-3)


def test_given_weights_and_the_mean_of_logits():
    models, (x, y) = others(), batch()
    w = torch.tensor([.5, .2, .3]).double()
    for given in ([5, 2, 3], w):
        got = schemes.Teachers(models, given, T=2.)(x)
        torch.testing.assert_close((got.double() / 2).softmax(-1), (w[:, None, None] * probabilities(models, x, 2.)).sum(0), rtol=1e-5, atol=1e-7)
    got = schemes.Teachers(models, [5, 2, 3], mean="logits")(x)
    torch.testing.assert_close(got.double(), sum(a * m(x).double() for a, m in zip(w, models)), rtol=1e-5, atol=1e-6)
    alone = schemes.Teachers(models, [0, 1, 0], T=3.)(x) # a teacher without weight is not heard
    torch.testing.assert_close((alone / 3).softmax(-1), (models[1](x) / 3).softmax(-1))


@pytest.mark.parametrize("K", [2, 3, 5])
def test_confidence_is_the_papers_equation(K):
    gen = torch.Generator().manual_seed(0)
    z, y = 3 * torch.randn(K, 20, 4, generator=gen).double(), torch.randint(4, (20,), generator=gen)
    got = schemes.teachers.confidence(z, y)
    for n in range(20):
        L = torch.stack([-z[k, n].softmax(0)[y[n]].log() for k in range(K)])
        want = (1 - L.exp() / L.exp().sum()) / (K - 1)
        torch.testing.assert_close(got[:, n].double(), want, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(got.sum(0), torch.ones(20))


def test_confidence_without_labels_is_uniform():
    models, (x, y) = others(), batch()
    half = torch.where(torch.arange(16) < 8, y, -100)
    team, uniform = schemes.Teachers(models, "confidence"), schemes.Teachers(models)
    torch.testing.assert_close(team(x), uniform(x))
    torch.testing.assert_close(team(x, half)[8:], uniform(x)[8:])
    torch.testing.assert_close(team(x, half)[:8], team(x, y)[:8])
    assert not torch.allclose(team(x, y), uniform(x), atol=1e-3)
    torch.testing.assert_close(schemes.Teachers(models[:1], "confidence", T=1.)(x, y).softmax(-1), models[0](x).softmax(-1))


def test_learned_weights_are_the_best_there_are():
    gen = torch.Generator().manual_seed(0)
    p = torch.rand(3, 300, generator=gen).double() * torch.tensor([[1.], [.9], [.5]])
    w = schemes.teachers.stacked(p)
    gradient = (p / (w[:, None] * p).sum(0)).mean(1) # optimal on the simplex: 1 where w > 0, at most 1 elsewhere
    assert w.sum() == pytest.approx(1) and (gradient <= 1 + 1e-4).all() and (gradient[w > 1e-3] > 1 - 1e-4).all()
    models, loaders = others(), [(x, y) for x, y in DataLoader(data(n=64, seed=4), 16)]
    team = schemes.Teachers(models, "learned")
    with pytest.raises(ValueError, match="have not been learnt: call .fit"): kd.distill(net(), team, loader(), **OPTIONS)
    assert team.fit(loaders) is team and team.weights.sum() == pytest.approx(1)
    x, y = data(n=64, seed=4).tensors
    chances = torch.stack([kd.frozen(m)(x).softmax(-1)[torch.arange(64), y] for m in models])
    torch.testing.assert_close(team.weights.double(), schemes.teachers.stacked(chances))
    assert "weights learned 0." in repr(team)


def test_a_student_of_several_teachers(teacher, tmp_path):
    team = lambda **o: schemes.Teachers([teacher, *others(2)], **o)
    run = kd.distill(net(), team(), loader(), loader(seed=2), **OPTIONS)
    assert "3 teachers, mean of probabilities at T=4, weights uniform" in repr(run) and run.outputs["teacher"].shape == (64, 3)
    assert run.plan["objective"] == (0.1 * kd.CrossEntropy() + 0.9 * kd.SoftKL(T=4)).equation()
    kd.show(run)
    sgd = OPTIONS | dict(optimizer=lambda p: torch.optim.SGD(p, 0.1)) # Adam would make steps out of rounding
    three, one = (kd.distill(net(), t, loader(), **sgd) for t in (schemes.Teachers([teacher] * 3), teacher))
    alike(three.student, one.student)
    prints = {team(**o).fingerprint for o in ({}, dict(T=2.), dict(mean="logits"), dict(weights="confidence"), dict(weights=[1, 2, 3]))}
    assert len(prints) == 5 and team().fingerprint == run.plan["teacher_fingerprint"]


def test_gradients_of_several_losses_are_those_of_one_mean(teacher):
    models, (x, y) = others(), batch()
    z = torch.randn(16, 3, dtype=torch.float64, requires_grad=True)
    soft = kd.SoftKL(T=4)
    w = schemes.teachers.confidence(torch.stack([m(x) for m in models]), y)
    each = sum((a * kd.SoftKL(T=4, reduction="none")(z, m(x).double())).mean() for a, m in zip(w, models))
    one = soft(z, schemes.Teachers(models, "confidence", T=4.)(x, y).double())
    torch.testing.assert_close(*[torch.autograd.grad(loss, z)[0] for loss in (each, one)], rtol=1e-4, atol=1e-6)


def test_teachers_may_be_caches(teacher, tmp_path):
    samples = kd.tasks.Samples(*data().tensors, torch.arange(64))
    numbered = lambda **o: kd.tasks.loader(samples, 16, ids=True, **o)
    models = [teacher, *others(1)]
    stored = [kd.cache.store(m, numbered(), tmp_path / str(i)) for i, m in enumerate(models)]
    runs = [kd.distill(net(), schemes.Teachers(t), numbered(shuffle=True), **OPTIONS) for t in (models, stored, [stored[0], models[1]])]
    for run in runs[1:]: alike(run.student, runs[0].student)
    top = kd.cache.store(teacher, numbered(), tmp_path / "top", top_k=2)
    with pytest.raises(TypeError, match="does not give whole logits"): kd.distill(net(), schemes.Teachers([top]), numbered(), **OPTIONS)


@pytest.mark.parametrize("wrong, says", [
    (lambda t: schemes.Teachers([]), "models is empty"), (lambda t: schemes.Teachers([t], T=0), "T must be"),
    (lambda t: schemes.Teachers([t], "best"), "weights must be"), (lambda t: schemes.Teachers([t], [1, 2]), "weights must be"),
    (lambda t: schemes.Teachers([t], [-1]), "weights must be"), (lambda t: schemes.Teachers([t], mean="mode"), "mean must be"),
    (lambda t: schemes.Teachers([t]).fit([]), "fit.. is for weights='learned'"),
    (lambda t: schemes.Teachers([t], "learned").fit([]), "no batches"),
    (lambda t: schemes.Teachers([t], "learned").fit(loader(labels=False)), "needs labels"),
    (lambda t: schemes.Teachers([t, nn.Linear(6, 5)])(batch()[0]), "one shape"),
    (lambda t: kd.distill(net(), schemes.Teachers([t]), loader(), losses=kd.SoftKL(T=2), **OPTIONS), "another temperature"),
    (lambda t: kd.distill(net(), schemes.Teachers([t]), loader(), losses=kd.SoftKL(T=kd.schedules.linear(4, 1)), **OPTIONS), "another temp"),
    (lambda t: kd.distill(net(), schemes.Teachers([t]), loader(), losses=kd.Hint().on("3"), **OPTIONS), "compares features"),
])
def test_wrong_teams(teacher, wrong, says):
    with pytest.raises(ValueError, match=says): wrong(teacher)


def test_teachers_are_modules_or_sources(teacher):
    with pytest.raises(TypeError, match="a teacher is a module"): schemes.Teachers([teacher, lambda x: x])
    mean = schemes.Teachers([teacher], mean="logits")
    assert kd.distill(net(), mean, loader(), losses=kd.SoftKL(T=kd.schedules.linear(4, 1)), **OPTIONS).finished
