"""Schemes: who teaches whom, and when; each against what its definition says, and exact when it is resumed."""
import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import kdlab as kd
from kdlab import schemes
from kdlab.distilling import fingerprint
from small import data, loader, net, taught


@pytest.fixture(scope="module")
def teacher(): return taught()


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
    assert kd.show(runs).problem is None


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
    assert kd.show(run).problem is None
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


# peers

def calm(seed=0, width=8):
    "A net whose rows do not depend on chance or on each other."
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 3))


def kl(p, q): return (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1).mean()


@pytest.mark.parametrize("K", [2, 3])
def test_peers_learn_what_the_paper_says(K):
    z = torch.randn(5, K, 4, dtype=torch.float64, requires_grad=True)
    y = torch.randint(4, (5,))
    loss = schemes.FromPeers(kd.ForwardKL())(z) + schemes.EachPeer(kd.CrossEntropy())(z, None, y)
    loss.backward()
    for k in range(K): # equation 6 with 5: each student has a loss of its own, in which the others are constants
        own = z[:, k].detach().requires_grad_()
        mine = nn.functional.cross_entropy(own, y) + sum(kl(z[:, j].detach(), own) for j in range(K) if j != k) / (K - 1)
        torch.testing.assert_close(z.grad[:, k], torch.autograd.grad(mine, own)[0])


def test_a_run_of_peers_is_the_loop_that_one_would_write(teacher):
    x, y = data().tensors
    batches, teach = list(zip(x.split(16), y.split(16))), kd.frozen(teacher)
    for t in (None, teacher):
        students = [calm(0), calm(1, 12)]
        schemes.mutual(students, batches, teacher=t, epochs=2, lr=.01, scheduler=None, progress=False)
        mine = [calm(0), calm(1, 12)]
        optimizers = [torch.optim.Adam(m.parameters(), lr=.01) for m in mine]
        for x_, y_ in batches * 2:
            z = [m(x_) for m in mine]
            losses = [nn.functional.cross_entropy(z[k], y_) + kl(z[1 - k].detach(), z[k]) for k in (0, 1)]
            if t is not None: losses = [loss + 16 * kl(teach(x_) / 4, z[k] / 4) for k, loss in enumerate(losses)]
            for loss, optimizer in zip(losses, optimizers):
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        for a, b in zip(students, mine): alike(a, b)


def test_mutual_learning_is_symmetric():
    run = lambda *seeds: schemes.mutual([calm(s) for s in seeds], loader(), epochs=3, progress=False).student.students
    (a, b), (c, d) = run(0, 1), run(1, 0)
    alike(a, d), alike(b, c)
    one, other = run(2, 2)
    assert fingerprint(one) == fingerprint(other) != fingerprint(calm(2)) # twins stay twins


def test_the_cohort_is_one_student_for_the_run(teacher, tmp_path):
    cohort = lambda **o: schemes.mutual([net(0), net(1, 12)], loader(), loader(seed=2), **OPTIONS | o)
    run = cohort()
    x = data(seed=2).tensors[0]
    mean = torch.stack([kd.frozen(s)(x).softmax(-1) for s in run.student.students]).mean(0)
    torch.testing.assert_close(kd.frozen(run.student)(x).exp(), mean)
    assert set(run.history[0]["terms"]) == {"EachPeer all", "FromPeers all"} and "valid_accuracy" in run.history[0]
    assert kd.show(run).problem is None and kd.show(cohort(teacher=teacher)).problem is None

    def stop(run):
        if run.epoch == 1: raise KeyboardInterrupt

    cohort(out=tmp_path, callbacks=[stop])
    resumed = cohort(out=tmp_path, resume=True)
    assert fingerprint(resumed.student) == fingerprint(run.student) and plain(resumed) == plain(run)
    back = kd.load(tmp_path, schemes.Peers([net(5), net(6, 12)]))
    assert fingerprint(back.student) == fingerprint(run.student)


def test_peers_learn_from_each_other_without_labels(teacher):
    students = [calm(0), calm(1)]
    x = data(seed=7).tensors[0]
    apart = lambda: kl(*(kd.frozen(s)(x) for s in students)).item()
    before = apart()
    run = schemes.mutual(students, loader(labels=False), epochs=20, lr=.02, progress=False)
    assert apart() < 0.2 * before and any("without labels" in note for note in run.notes)


def test_the_teacher_of_peers_may_be_anything(teacher, tmp_path):
    samples = kd.tasks.Samples(*data().tensors, torch.arange(64))
    numbered = kd.tasks.loader(samples, 16, ids=True)
    cache, top = (kd.cache.store(teacher, numbered, tmp_path / str(k), top_k=k, T=4. if k else 1.) for k in (None, 2))
    run = lambda t, **o: schemes.mutual([calm(0), calm(1)], numbered, numbered, teacher=t, **OPTIONS | o)
    by_model, by_cache, by_team = (run(t) for t in (teacher, cache, schemes.Teachers([teacher])))
    assert fingerprint(by_model.student) == fingerprint(by_cache.student) and by_model.plan["teacher"] == cache.plan["teacher"]
    alike(by_team.student, by_model.student)
    assert run(top, taught=kd.SparseForwardKL(T=4.)).finished
    with pytest.raises(ValueError, match="use kd.SparseForwardKL"): run(top)
    with pytest.raises(ValueError, match="another temperature"): run(schemes.Teachers([teacher], T=2.))


def test_weights_and_losses_of_peers(teacher):
    run = schemes.mutual([calm(0), calm(1)], loader(), teacher=teacher, labels=.5 * kd.CrossEntropy(), peers=2 * kd.JSD(.5),
                         taught=.1 * kd.SoftKL(T=2) + kd.DKD(), **OPTIONS)
    weights = [w for w, _ in run.objective.terms()]
    assert weights == [.5, 2, .1, 1]
    halved = schemes.mutual([calm(0), calm(1)], loader(), peers=0 * kd.ForwardKL(), **OPTIONS).student.students
    alone = kd.distill(calm(0), None, loader(), **OPTIONS).student
    alike(halved[0], alone)


@pytest.mark.parametrize("wrong, says", [
    (lambda t: schemes.mutual([calm()], loader()), "two or more different"),
    (lambda t: schemes.mutual([t, t], loader()), "two or more different"),
    (lambda t: schemes.mutual([calm(), calm(1)], loader(), taught=kd.SoftKL()), "pass teacher="),
    (lambda t: schemes.mutual([calm(), nn.Linear(6, 4)], loader(), **OPTIONS), "one shape"),
    (lambda t: schemes.FromPeers(kd.ForwardKL())(torch.zeros(3, 4)), "needs what all peers say"),
    (lambda t: schemes.EachPeer(kd.CrossEntropy() + kd.SoftKL()), "a single loss is wanted"),
])
def test_wrong_cohorts(teacher, wrong, says):
    with pytest.raises(ValueError, match=says): wrong(teacher)


# its own teacher

class Tokens(nn.Module):
    def __init__(self): super().__init__(); torch.manual_seed(0); self.embed, self.mix, self.head = nn.Linear(1, 5), nn.Linear(5, 7), nn.Linear(7, 3)

    def forward(self, x): return self.head(self.mix(self.embed(x.unsqueeze(-1)).tanh()).tanh().mean(1))


def test_exits_fit_maps_tokens_and_vectors():
    x = torch.rand(4, 1, 8, 8)
    maps = schemes.Exits(kd.nets.cnn((4, 6), 8), ["relu1", "relu2", "relu"], x)
    with kd.Taps(maps.model, ["relu2"]) as taps:
        maps.model(x)
        want = maps.exits[1].head(taps["relu2"].mean((2, 3)))
    every = maps.every(x)
    torch.testing.assert_close(every[1], want)
    assert [z.shape for z in every] == [(4, 10)] * 4 and torch.equal(every[3], maps.model(x)) and torch.equal(maps(x), every[3])
    rows = schemes.Exits(Tokens(), ["embed", "mix"], torch.rand(2, 6))
    assert [e.head.in_features for e in rows.exits] == [5, 7] and [z.shape for z in rows.every(torch.rand(2, 6))] == [(2, 3)] * 3
    state = torch.get_rng_state()
    twins = [schemes.Exits(Tokens(), ["embed"], torch.rand(2, 6), seed=s) for s in (0, 0, 1)]
    assert fingerprint(twins[0]) == fingerprint(twins[1]) != fingerprint(twins[2])
    assert not any(m._forward_hooks for m in twins[0].modules()) and copy.deepcopy(twins[0]) is not None and state is not None


def exits(): return schemes.Exits(Tokens(), ["embed", "mix"], data().tensors[0])


def test_early_exits_minimise_the_papers_objective():
    x, y = data().tensors
    run = schemes.early_exits(exits(), [(x, y)], [(x, y)], T=3., alpha=.3, epochs=1, progress=False)
    *early, z = kd.frozen(run.student, lambda m, x: m.every(x))(x)
    ce = nn.functional.cross_entropy
    want = ce(z, y) + sum(.7 * ce(e, y) + .3 * 9 * kl(z / 3, e / 3) for e in early)
    assert run.history[0]["valid_loss"] == pytest.approx(want.item(), rel=1e-5)


def test_the_head_learns_nothing_from_the_exits():
    z = [torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    loss = schemes.FromItself(kd.SoftKL(T=3))
    loss(tuple(z)).backward()
    assert z[0].grad.abs().sum() > 0 and z[1].grad is None
    torch.testing.assert_close(loss(tuple(z)), 9 * kl(z[1].detach() / 3, z[0] / 3))


def test_early_exits_need_neither_teacher_nor_labels(tmp_path):
    run = lambda **o: schemes.early_exits(exits(), loader(), loader(seed=2), **OPTIONS | o)
    whole = run()
    assert list(whole.history[0]["terms"]) == ["CrossEntropy", "CrossEntropy exits.0", "CrossEntropy exits.1", "FromItself exits.0+model",
                                               "FromItself exits.1+model"]
    assert list(run(alpha=0.).history[0]["terms"]) == ["CrossEntropy", "CrossEntropy exits.0", "CrossEntropy exits.1"]
    assert kd.show(whole).problem is None

    def stop(run): raise KeyboardInterrupt

    run(out=tmp_path, callbacks=[stop])
    assert fingerprint(run(out=tmp_path, resume=True).student) == fingerprint(whole.student)
    student = exits()
    head = fingerprint(student.model.head)
    schemes.early_exits(student, loader(labels=False), **OPTIONS)
    assert fingerprint(student.model.head) == head # nothing to learn for it without labels


def test_exits_of_a_model_that_has_its_own():
    class Own(nn.Module):
        def __init__(self): super().__init__(); torch.manual_seed(0); self.body, self.exit, self.head = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 3)

        def forward(self, x): h = self.body(x).relu(); return {"logits": self.head(h), "early": self.exit(h)}

    run = schemes.early_exits(Own(), loader(), exits=["exit"], head="head", **OPTIONS)
    assert "FromItself exit+head" in run.history[0]["terms"]
    with pytest.raises(ValueError, match="exits= names the layers"): schemes.early_exits(Own(), loader())
    with pytest.raises(ValueError, match="alpha must be"): schemes.early_exits(exits(), loader(), alpha=2)
    with pytest.raises(ValueError, match="compares two outputs"): schemes.FromItself(kd.SoftKL())(torch.zeros(2, 3))
