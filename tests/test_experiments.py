"Nets trained in a stack are the nets trained alone, and verdicts follow from the numbers."
import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kdlab import experiments as ex
from kdlab import nets
from kdlab.losses import CrossEntropy, ForwardKL, SoftKL
from kdlab.tasks import Samples, digits


def arm(loss, n, seed):
    g = torch.Generator().manual_seed(seed)
    x, z = torch.randn(n, 1, 8, 8, generator=g), 3 * torch.randn(n, 10, generator=g)
    return ex.Arm(x, loss, teacher=z, labels=torch.randint(10, (n,), generator=g), seed=seed)


def by_hand(net, arm, loss, steps, batch_size, lr):
    "The plain loop: one net, Adam, half a cosine."
    optimizer = torch.optim.Adam(net.parameters(), lr=lr)
    for step, rows in enumerate(ex.batches(len(arm.x), batch_size, steps, arm.seed)):
        optimizer.param_groups[0]["lr"] = lr * (1 + np.cos(np.pi * step / steps)) / 2
        optimizer.zero_grad()
        loss(net(arm.x[rows]), arm.teacher[rows], arm.labels[rows]).backward()
        optimizer.step()
    return net


def hinton(T):
    return lambda s, t, y: T * T * F.kl_div((s / T).log_softmax(-1), (t / T).softmax(-1), reduction="batchmean")


def half(s, t, y):
    return 0.5 * F.cross_entropy(s, y) + 0.5 * hinton(4)(s, t, y)


@pytest.mark.parametrize("make", [nets.student_mlp, lambda seed: nets.cnn((3, 4), 8, seed=seed)], ids=["mlp", "cnn"])
def test_a_stacked_net_is_the_net_trained_alone_by_a_plain_loop(make):
    soft, mixed, hard, sharp = SoftKL(T=4), 0.5 * CrossEntropy() + 0.5 * SoftKL(T=4), CrossEntropy(), ForwardKL()
    plan = [(soft, hinton(4)), (mixed, half), (soft, hinton(4)), (hard, lambda s, t, y: F.cross_entropy(s, y)),
            (sharp, hinton(1)), (hard, lambda s, t, y: F.cross_entropy(s, y))]
    arms = [arm(loss, n=30 + 7 * i, seed=i) for i, (loss, _) in enumerate(plan)]
    stack = [make(seed=i) for i in range(len(plan))]
    alone = copy.deepcopy(stack)
    assert ex.train_many(stack, arms, steps=25, batch_size=16, lr=2e-3) == stack
    for net, twin, one, (_, loss) in zip(stack, alone, arms, plan):
        by_hand(twin, one, loss, steps=25, batch_size=16, lr=2e-3)
        for p, q in zip(net.parameters(), twin.parameters()):
            torch.testing.assert_close(p, q, atol=2e-4, rtol=1e-3)


def test_an_arm_reads_only_what_its_loss_needs():
    kl, ce, full = SoftKL(T=2), CrossEntropy(), arm(None, 40, 1)
    bare = [ex.Arm(full.x, kl, teacher=full.teacher, seed=1), ex.Arm(full.x, ce, labels=full.labels, seed=1)]
    both = [ex.Arm(full.x, loss, full.teacher, full.labels, seed=1) for loss in (kl, ce)]
    a, b = (ex.train_many([nets.tiny_mlp(), nets.tiny_mlp()], plan, steps=5) for plan in (bare, both))
    for net, twin in zip(a, b):
        assert torch.equal(net.head.weight, twin.head.weight)
    with pytest.raises(ValueError, match="needs labels"):
        ex.train_many([nets.tiny_mlp()], [ex.Arm(full.x, ce, teacher=full.teacher)], steps=1)


def test_training_in_a_stack_repeats():
    plan = [arm(SoftKL(T=3), 50, seed) for seed in (1, 2)]
    a, b = (ex.train_many([nets.tiny_mlp(seed=s) for s in (1, 2)], plan, steps=10) for _ in range(2))
    assert all(torch.equal(p, q) for n, m in zip(a, b) for p, q in zip(n.parameters(), m.parameters()))
    assert not torch.equal(a[0].head.weight, a[1].head.weight)


def test_batches_are_full_shuffled_passes():
    order = ex.batches(10, 4, 15, seed=3)
    assert order.shape == (15, 4)
    passes = order.flatten().view(6, 10)
    assert all(sorted(p) == list(range(10)) for p in passes.tolist())
    assert not torch.equal(passes[0], passes[1])
    assert torch.equal(order, ex.batches(10, 4, 15, seed=3)) and not torch.equal(order, ex.batches(10, 4, 15, seed=4))
    assert ex.batches(3, 8, 2).shape == (2, 8)


def test_a_trial_starts_alike_within_a_seed_and_keeps_the_order_of_seeds():
    kl, ce, seeds = SoftKL(), CrossEntropy(), (4, 2)
    make = lambda seed: {"soft": arm(kl, 40, seed), "labels": arm(ce, 40, seed)}
    trained = ex.trial(make, seeds, nets.tiny_mlp, steps=8, batch_size=10)
    assert list(trained) == ["soft", "labels"]
    for i, seed in enumerate(seeds):
        for name, loss in (("soft", kl), ("labels", ce)):
            alone = ex.train_many([nets.tiny_mlp(seed=seed)], [arm(loss, 40, seed)], steps=8, batch_size=10)[0]
            torch.testing.assert_close(trained[name][i].head.weight, alone.head.weight, atol=1e-5, rtol=1e-4)


def test_stacks_that_cannot_be_are_refused():
    plan = [arm(SoftKL(), 20, 1)]
    with pytest.raises(ValueError, match="2 nets and 1 arms"):
        ex.train_many([nets.tiny_mlp(), nets.tiny_mlp()], plan)
    with pytest.raises(ValueError, match="same layers"):
        ex.train_many([nets.tiny_mlp(), nets.student_mlp()], plan * 2)
    with pytest.raises(ValueError, match="batch norm"):
        ex.train_many([torch.nn.Sequential(torch.nn.Flatten(), torch.nn.BatchNorm1d(64))], plan)


def test_the_thread_count_comes_back_even_after_an_error():
    before = torch.get_num_threads()
    with pytest.raises(ValueError):
        ex.train_many([], [])
    with ex.one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_accuracy_and_recall_by_hand():
    logits = torch.eye(3)[[0, 1, 1, 2]]
    samples = Samples(logits, torch.tensor([0, 1, 2, 2]), torch.arange(4))
    assert ex.accuracy(torch.nn.Identity(), samples) == 75
    assert [ex.accuracy(torch.nn.Identity(), samples, label=k) for k in range(3)] == [100, 100, 50]


def test_paired_is_the_paired_t_interval():
    from scipy import stats
    rng = np.random.RandomState(0)
    a, b = rng.normal(3, 1, 7), rng.normal(2, 1, 7)
    result, expected = ex.paired(a, b), stats.ttest_rel(a, b).confidence_interval(0.95)
    np.testing.assert_allclose((result.low, result.high), (expected.low, expected.high), rtol=1e-9)
    assert result.mean == pytest.approx((a - b).mean()) and result.wins == (a > b).sum() and result.seeds == 7
    mirrored = ex.paired(b, a)
    np.testing.assert_allclose((mirrored.low, mirrored.high), (-result.high, -result.low), rtol=1e-9)


@pytest.mark.parametrize("difference, verdict", [
    ([1, 2, 3, 2, 2], "wins"), ([-1, -2, -3, -2, -2], "loses"), ([1, -1, 2, -2, 1], "no difference here"),
    ([0, 0, 0, 0, 0], "no difference here"), ([0, 0, 0, 0, 5], "no difference here"), ([2, 2], "wins")])
def test_the_verdict_follows_from_the_interval(difference, verdict):
    result = ex.paired(difference, [0] * len(difference))
    assert result.verdict == verdict and repr(result).endswith(verdict)


def test_paired_wants_pairs():
    for a, b in (([1.0], [2.0]), ([1.0, 2.0], [1.0])):
        with pytest.raises(ValueError, match="at least 2 seeds"):
            ex.paired(a, b)


def test_dark_knowledge_is_real_on_forty_digits():
    "A short run of lesson 1: soft targets of a real teacher beat labels on the same forty images."
    task, kl, ce = digits(), SoftKL(T=8), CrossEntropy()
    teacher = nets.teacher_mlp()
    ex.train_many([teacher], [ex.Arm(task.train.x, ce, labels=task.train.y)], steps=400)
    assert ex.accuracy(teacher, task.test) > 94

    def arms(seed):
        few = task.few(4, seed).train
        return {"soft": ex.Arm(few.x, kl, teacher(few.x).detach(), seed=seed),
                "labels": ex.Arm(few.x, ce, labels=few.y, seed=seed)}

    students = ex.trial(arms, range(3), steps=200, batch_size=40)
    score = {name: [ex.accuracy(net, task.test) for net in trained] for name, trained in students.items()}
    assert ex.paired(score["soft"], score["labels"]).mean > 2
