"""Transfer sets and curricula: what a teacher is asked about, and the order in which a student meets it."""
import numpy as np
import pytest
import torch

import kdlab as kd
from kdlab.distilling import fingerprint
from kdlab.schedules import constant, linear
from kdlab.tasks import Samples
from kdlab.transfer import Curriculum, Mixup, Noise, difficulty, joined


def samples(n=40, first=0, labels=True):
    gen = torch.Generator().manual_seed(n)
    x = torch.rand(n, 2, 3, generator=gen)
    return Samples(x, torch.arange(n) % 4 if labels else None, first + torch.arange(n))


DRAWN = {"mixup": lambda seed=0: Mixup(samples(), .4, seed=seed), "labels too": lambda seed=0: Mixup(samples(), classes=4, seed=seed),
         **{kind: lambda seed=0, kind=kind: Noise(samples(), 30, kind, seed=seed) for kind in ("gaussian", "uniform", "marginal")},
         "curriculum": lambda seed=0: Curriculum(samples(), torch.rand(40), epochs=4, seed=seed)}


@pytest.mark.parametrize("make", DRAWN.values(), ids=DRAWN)
def test_each_epoch_is_drawn_anew_and_can_be_drawn_again(make):
    torch.manual_seed(0)
    a = make()
    torch.manual_seed(0)
    b = make()
    first = a.x.clone()
    assert torch.equal(first, b.x) and not torch.equal(first, make(1).x)
    np.random.seed(7), torch.manual_seed(7), a.set_epoch(3), b.set_epoch(3)
    assert torch.equal(a.x, b.x) and not torch.equal(a.x, first) and a.x.dtype == torch.float32
    a.set_epoch(0)
    assert torch.equal(a.x, first)
    assert len(a) == len(a.x) == len(a.ids) == (30 if isinstance(a, Noise) else 40)


@pytest.mark.parametrize("make", DRAWN.values(), ids=DRAWN)
@pytest.mark.parametrize("ids", [False, True])
def test_a_run_on_drawn_samples_is_resumed_exactly(make, ids, tmp_path):
    net = lambda seed=0: kd.nets.mlp((6,), 4, (2, 3), seed)
    run = lambda **o: kd.distill(net(), net(1), kd.tasks.loader(make(), 10, True, ids=ids), losses=kd.SoftKL(), epochs=4, progress=False, **o)
    torch.manual_seed(0)
    whole = run()
    seen = []

    def stop(run):
        seen.append(run.history[-1]["train_loss"])
        if run.epoch == 2: raise KeyboardInterrupt

    torch.manual_seed(0)
    run(out=tmp_path, callbacks=[stop])
    torch.manual_seed(0)
    assert fingerprint(run(out=tmp_path, resume=True).student) == fingerprint(whole.student) and len(set(seen)) == 2


def test_joined_marks_what_has_no_label():
    both = joined(samples(10), samples(6, 100, labels=False))
    assert both.y.tolist() == [i % 4 for i in range(10)] + [-100] * 6 and len(both.ids.unique()) == 16
    assert joined(samples(3, labels=False), samples(4, 9, labels=False)).y is None
    with pytest.raises(ValueError, match="share ids"): joined(samples(3), samples(4))
    with pytest.raises(ValueError, match="at least"): joined()


def test_mixtures_lie_between_two_samples_and_share_their_labels():
    data = samples()
    mixed = Mixup(data, classes=4, seed=3)
    rng = np.random.RandomState([3, 5])
    mixed.set_epoch(5)
    other, share = torch.from_numpy(rng.permutation(40)), torch.from_numpy(rng.beta(1., 1., 40)).float()
    want = share[:, None, None] * data.x + (1 - share)[:, None, None] * data.x[other]
    torch.testing.assert_close(mixed.x, want)
    one_hot = torch.eye(4)[data.y]
    torch.testing.assert_close(mixed.y, share[:, None] * one_hot + (1 - share)[:, None] * one_hot[other])
    assert mixed.ids.equal(data.ids) and Mixup(data).y is None and .4 < share.mean() < .6


def test_a_run_learns_from_mixed_labels():
    task = kd.tasks.blobs()
    train = kd.tasks.loader(Mixup(task.train, classes=4), 20, True)
    run = kd.distill(kd.nets.mlp((32,), 4, (2,)), None, train, kd.tasks.loader(task.valid), epochs=30, lr=.02, progress=False)
    assert run.history[-1]["valid_accuracy"] > .85


def test_noise_has_the_moments_it_promises():
    data = samples(500)
    x, like = Noise(data, 20000).x, data.x
    torch.testing.assert_close(x.mean(0), like.mean(0), atol=.02, rtol=0)
    torch.testing.assert_close(x.std(0), like.std(0), atol=.02, rtol=0)
    u = Noise(data, 20000, "uniform").x
    assert (u >= like.amin(0)).all() and (u <= like.amax(0)).all() and (u.amax(0) - like.amax(0)).abs().max() < .01
    m = Noise(data, 20000, "marginal").x
    assert all(set(m[:, i, j].tolist()) <= set(like[:, i, j].tolist()) for i in range(2) for j in range(3))
    flat = m.flatten(1)
    assert torch.corrcoef((flat + 0).T).fill_diagonal_(0).abs().max() < .05 # pixels are independent
    assert Noise(data).y is None and len(Noise(data)) == 500


def test_difficulty():
    z, y = torch.tensor([[5., 0, 0], [0, 0, 0], [0, 5, 0]]), torch.zeros(3, dtype=torch.long)
    assert difficulty(z, y).argsort().tolist() == [0, 1, 2] and difficulty(z)[1] == pytest.approx(np.log(3))
    torch.testing.assert_close(difficulty(z, y), torch.nn.functional.cross_entropy(z, y, reduction="none"))
    assert difficulty(torch.tensor([[0., -torch.inf]]))[0] == 0


def test_a_curriculum_shows_the_easiest_share():
    data, hard = samples(), torch.rand(40, generator=torch.Generator().manual_seed(0))
    lesson = Curriculum(data, hard, epochs=10, pacing=linear(.1, 1))
    ranks = hard.argsort().argsort()
    for epoch in range(10):
        lesson.set_epoch(epoch)
        k = int(np.ceil((.1 + .9 * epoch / 10) * 40 - 1e-9))
        shown = ranks[lesson.ids]
        assert set(shown.tolist()) == set(range(k)) and len(shown) == 40
        counts = shown.bincount()
        assert counts.max() - counts.min() <= 1 # whole passes, and a part of one
        assert torch.equal(lesson.x, data.x[lesson.ids]) and torch.equal(lesson.y, data.y[lesson.ids])
    assert set(Curriculum(data, -hard, epochs=1, pacing=constant(.05)).ids.tolist()) == set(hard.topk(2).indices.tolist())


def test_a_curriculum_of_a_cache(tmp_path):
    teacher, data = kd.nets.mlp((6,), 4, (2, 3), 1), samples()
    cache = kd.cache.store(teacher, kd.tasks.loader(data, ids=True), tmp_path)
    lesson = Curriculum(data, difficulty(cache[data.ids], data.y), epochs=4)
    run = lambda t: kd.distill(kd.nets.mlp((6,), 4, (2, 3)), t, kd.tasks.loader(lesson, 10, True, ids=True), epochs=4, progress=False)
    for a, b in zip(run(cache).student.parameters(), run(teacher).student.parameters()): torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    mixed = kd.tasks.loader(Mixup(data), 10, ids=True)
    with pytest.raises(ValueError, match="not those that the teacher saw"): kd.distill(kd.nets.mlp((6,), 4, (2, 3)), cache, mixed, progress=False)


@pytest.mark.parametrize("wrong, says", [
    (lambda: Mixup(samples(), 0), "alpha must be"), (lambda: Mixup(samples(labels=False), classes=4), "have none"),
    (lambda: Noise(samples(), kind="pink"), "kind must be"), (lambda: Noise(samples(), 0), "n must be"),
    (lambda: Curriculum(samples(), torch.rand(3), epochs=2), "a number for each of 40"),
    (lambda: Curriculum(samples(), torch.rand(40), epochs=0), "epochs must be"),
    (lambda: Curriculum(samples(), torch.rand(40), epochs=2, pacing=linear(0, 1)), "share in"),
])
def test_wrong_arguments_are_named(wrong, says):
    with pytest.raises(ValueError, match=says): wrong()
