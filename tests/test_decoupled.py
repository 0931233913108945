"""Decoupled distillation: its two parts, their identity with Hinton's KL, and the rows where a part has nothing to compare."""
import math

import pytest
import torch

import kdlab as kd
from kdlab import logit_reference, ops, reference
from kdlab.functional.decoupled import dkd_parts
from kdlab.losses.objective import _groups

f = kd.functional
INF = math.inf
BACKENDS = ["torch"] + (["cpp"] if ops._C is not None else [])
Y = torch.tensor([0, 6, 3, 3, 1, 5])


def pair(gap=3.0, C=7, seed=0):
    gen = torch.Generator().manual_seed(seed)
    t = 3 * torch.randn(6, C, generator=gen, dtype=torch.float64)
    return t + gap * torch.randn(6, C, generator=gen, dtype=torch.float64), t


@pytest.mark.parametrize("T", [0.5, 1.0, 4.0, 50.0])
@pytest.mark.parametrize("gap", [3.0, 1e-2, 1e-4])
def test_hintons_kl_is_the_sum_of_the_two_parts(T, gap):
    s, t = pair(gap)
    tckd, nckd = dkd_parts(s, t, Y, T=T, t_squared=False)
    p = (t / T).softmax(-1).gather(-1, Y[:, None])[:, 0]
    torch.testing.assert_close(tckd + (1 - p) * nckd, reference.stable_forward_kl(s, t, T), rtol=1e-7, atol=1e-18)
    whole = f.dkd(s, t, Y, T=T, alpha=0.3, beta=2.0, reduction="none")
    torch.testing.assert_close(whole, T * T * (0.3 * tckd + 2 * nckd))


def test_the_parts_are_those_of_the_definition_and_accurate_near_convergence():
    s, t = pair()
    for got, want in zip(logit_reference.stable_dkd_parts(s, t, Y, 2.0), logit_reference.dkd_parts(s, t, Y, 2.0)):
        torch.testing.assert_close(got, want)
    from mpmath import mp, mpf, exp, log
    s, t = pair(1e-4)
    with mp.workdps(50):
        q, p = ([exp(mpf(z.item()) / 8) for z in row] for row in (s[1], t[1]))
        q, p = ([z / sum(row) for z in row] for row in (q, p))
        kl = lambda a, b: sum(x * log(x / y) for x, y in zip(a, b))
        hat = lambda a: [x / (1 - a[6]) for x in a[:6]]
        exact = kl([p[6], 1 - p[6]], [q[6], 1 - q[6]]), kl(hat(p), hat(q))
    for got, want in zip(logit_reference.stable_dkd_parts(s, t, Y, 8.0), exact):
        assert got[1].item() == pytest.approx(float(want), rel=1e-6)


@pytest.mark.parametrize("C, backend", [(7, "torch"), *((300, backend) for backend in BACKENDS)])
@pytest.mark.parametrize("gap", [1e-2, 1e-4, 1e-6])
def test_tckd_keeps_its_digits_where_the_log_odds_agree_by_chance(C, gap, backend):
    "Student and teacher differ about every class, and yet nearly not about the label."
    from mpmath import mp, mpf, exp, log
    t, s = (x.float().double() for x in (pair(C=C)[1], pair(C=C, seed=1)[1]))
    y = Y % C
    rest = [z.scatter(-1, y[:, None], -INF).logsumexp(-1) for z in (t, s)]
    s = s.scatter(-1, y[:, None], (t.gather(-1, y[:, None])[:, 0] - rest[0] + rest[1] + gap)[:, None]).float()
    leaf = s.double().requires_grad_()
    tckd, _ = logit_reference.stable_dkd_parts(leaf, t, y)
    slope = torch.autograd.grad(tckd.sum(), leaf)[0].gather(-1, y[:, None])[:, 0]
    got = f.dkd(s.requires_grad_(), t.float(), y, T=1.0, beta=0.0, reduction="none", backend=backend)
    grad = torch.autograd.grad(got.sum(), s)[0].gather(-1, y[:, None])[:, 0]
    with mp.workdps(60):
        for i in range(6):
            p, q = (exp(mpf(z[i, y[i]].item())) / sum(exp(mpf(x.item())) for x in z[i]) for z in (t, s))
            value = float(p * log(p / q) + (1 - p) * log((1 - p) / (1 - q)))
            assert tckd[i].item() == pytest.approx(value, rel=1e-8) and got[i].item() == pytest.approx(value, rel=1e-6)
            assert slope[i].item() == pytest.approx(float(q - p), rel=1e-8) and grad[i].item() == pytest.approx(float(q - p), rel=1e-6)


def test_a_part_of_weight_0_is_not_there():
    s, t = (x.float() for x in pair(C=70))
    tckd, nckd = dkd_parts(s, t, Y)
    s[0, 9] = s[1, 6] = -INF  # another class, then the label
    for backend, T in ((BACKENDS[-1], 4.0), ("torch", 4.0), ("torch", torch.tensor(4.0, requires_grad=True))):
        torch.testing.assert_close(f.dkd(s, t, Y, T=T, beta=0.0, reduction="none", backend=backend)[2:], tckd[2:])
        torch.testing.assert_close(f.dkd(s, t, Y, T=T, alpha=0.0, beta=1.0, reduction="none", backend=backend)[1:], nckd[1:])
        assert f.dkd(s, t, Y, T=T, beta=0.0, reduction="none", backend=backend)[0].isfinite()
    assert [x.isinf().tolist()[:3] for x in dkd_parts(s, t, Y)] == [[False, True, False], [True, False, False]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("C", [7, 40, 300])
def test_a_part_of_weight_0_is_not_there_where_it_is_infinite(backend, C):
    s, t = (x.float() for x in pair(C=C))
    s[0, Y[0]] = s[1, (Y[1] + 1) % 7] = -INF # the label, then another class
    s[2, 0], t[3, Y[3]] = math.nan, math.nan
    got = {w: f.dkd(s, t, Y, T=2.0, alpha=w[0], beta=w[1], reduction="none", backend=backend) for w in ((0., 1.), (1., 0.), (0., 0.))}
    assert got[0., 1.][0].isfinite() and got[0., 1.][1] == INF
    assert got[1., 0.][0] == INF and got[1., 0.][1].isfinite()
    assert got[0., 0.][:2].eq(0).all() and all(x[2:4].isnan().all() and x[4:].isfinite().all() for x in got.values())


def test_the_second_part_does_not_see_the_label():
    s, t = pair()
    bold = s.scatter_add(-1, Y[:, None], torch.full((6, 1), 5.0, dtype=s.dtype))
    one, two = dkd_parts(s, t, Y), dkd_parts(bold, t, Y)
    torch.testing.assert_close(one[1], two[1])
    assert (one[0] - two[0]).abs().min() > 1e-3


def test_parts_come_with_their_weights():
    s, t = pair()
    y = torch.where(Y == 6, -100, Y)
    mask = torch.tensor([True] * 5 + [False])
    objective = 0.5 * kd.DKD(T=2, alpha=0.3, beta=2) + kd.CrossEntropy()
    parts = objective.parts(s.requires_grad_(), t, y, mask=mask)
    assert set(parts) == {"tckd", "nckd", "cross_entropy"} and (parts["tckd"].weight, parts["nckd"].weight) == (0.15, 1.0)
    total = sum(part.weight * part.rows for part in parts.values())
    assert not total.requires_grad and total[[1, 5]].eq(0).all()
    torch.testing.assert_close(total.sum() / 4, objective(s, t, y, mask=mask).detach())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("more", [0, 60])  # few classes and many are computed in different ways
def test_excluded_classes(backend, more):
    s, t = (torch.cat([x[:5], torch.full((5, more), -INF, dtype=x.dtype)], 1) for x in pair())
    y = torch.full((5,), 2)
    s[0, 4] = t[0, 4] = -INF  # another class, by both: absent
    s[1, 2] = t[1, 2] = -INF  # the label, by both: there is no question whether it is the label
    s[2, 2] = -INF  # the label, by the student only
    t[3, 2] = -INF  # the label, by the teacher only
    others = torch.arange(7 + more) != 2
    s[4, others] = t[4, others] = -INF  # no other class
    leaf = s.requires_grad_()
    tckd, nckd = dkd_parts(leaf, t, y)
    rows = f.dkd(leaf, t, y, reduction="none", backend=backend)
    grad, = torch.autograd.grad(rows[[0, 1, 3, 4]].sum(), leaf)
    keep = torch.arange(7 + more) != 4
    torch.testing.assert_close(rows[0], f.dkd(s[:1, keep], t[:1, keep], y[:1], reduction="none")[0])
    assert torch.equal(rows.isfinite(), torch.tensor([True, True, False, True, True])) and rows[2] == INF
    torch.testing.assert_close(rows[[0, 1, 3, 4]].detach(), 16 * (tckd + 8 * nckd)[[0, 1, 3, 4]] / 16)
    assert tckd[1] == 0 and nckd[1] > 0 and tckd[2] == INF and tckd[3].isfinite() and tckd[4] == nckd[4] == 0
    assert grad.isfinite().all() and grad[0, 4] == 0 and grad[4].eq(0).all()


@pytest.mark.parametrize("C", [1, 2])
def test_few_classes(C):
    s, t = pair(C=C)
    y = torch.zeros(6, dtype=torch.long)
    tckd, nckd = dkd_parts(s, t, y, T=1.0)
    assert nckd.abs().max() == 0
    torch.testing.assert_close(tckd, reference.forward_kl(s, t), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("C", [7, 70])
def test_a_row_without_any_logit_or_spoilt_is_nan_and_no_other(C):
    s, t = pair(C=C)
    clean = f.dkd(s, t, Y, reduction="none")
    s[1], t[2], s[3, 3], t[4, 1] = -INF, -INF, INF, math.nan  # 3 and 1 are the labels
    s[5], t[5] = -INF, -INF
    for backend in BACKENDS:
        leaf = s.clone().requires_grad_()
        rows = f.dkd(leaf, t, Y, reduction="none", backend=backend)
        grad, = torch.autograd.grad(rows.sum(), leaf)
        torch.testing.assert_close(rows[0], clean[0])
        assert rows[1:].isnan().all() and grad[0].isfinite().all() and grad[1:5].isnan().all()


def test_what_the_kernel_cannot_do_goes_to_plain_torch_and_agrees():
    s, t = pair(C=70)
    want = f.dkd(s, t, Y, T=2.0)
    each = torch.full((6,), 2.0, dtype=torch.float64)
    T, teacher = torch.tensor(2.0, dtype=torch.float64, requires_grad=True), t.clone().requires_grad_()
    torch.testing.assert_close(f.dkd(s, t, Y, T=each), want)
    f.dkd(s, t, Y, T=T).backward()
    f.dkd(s, teacher, Y, T=2.0, detach_teacher=False).backward()
    assert T.grad.abs() > 0 and teacher.grad.abs().max() > 0
    mapped = torch.func.vmap(lambda a, b, y: f.dkd(a[None], b[None], y[None], T=2.0))(s, t, Y)
    torch.testing.assert_close(mapped.mean(), want)
    few = s[:2, :5].clone().requires_grad_()
    dkd = lambda x: f.dkd(x, t[:2, :5], torch.tensor([4, 1]))
    assert torch.autograd.gradcheck(dkd, few) and torch.autograd.gradgradcheck(dkd, few)


def test_with_cross_entropy_it_is_one_sweep():
    s, t = (x.float() for x in pair(C=70))
    objective = 0.3 * kd.CrossEntropy() + 0.7 * kd.DKD(T=2, alpha=0.5, beta=2)
    assert len(_groups(objective)) == 1
    y = torch.where(Y == 6, -100, Y)
    apart = 0.3 * f.cross_entropy(s, y, backend="torch") + 0.7 * f.dkd(s, t, y, T=2, alpha=0.5, beta=2, backend="torch")
    torch.testing.assert_close(objective(s, t, y), apart, rtol=1e-6, atol=0)


def test_bad_arguments_are_named():
    s, t = pair()
    for call, words in ((lambda: f.dkd(s, t), "dkd needs labels"), (lambda: f.dkd(s, t, Y, beta=math.nan), "beta must be a finite"),
                        (lambda: f.dkd(s, t, Y + 1), "label 7 at row 1"), (lambda: f.dkd(s, t, Y, backend="gpu"), "backend must be"),
                        (lambda: kd.DKD(alpha="a"), "alpha must be"), (lambda: kd.DKD(T=0), "T must be")):
        with pytest.raises(ValueError, match=words): call()
