"""Plain torch's closed forms: losses and gradients against autograd through the stable reading in float64."""
import math

import pytest
import torch

import kdlab as kd
from kdlab import closed_forms, ops, reference

NAN, INF = math.nan, math.inf
KINDS = [("forward_kl", 0.0), ("soft_cross_entropy", 0.0), ("reverse_kl", 0.0), ("total_variation", 0.0), ("jsd", 0.5), ("jsd", 0.1),
         ("jsd", 0.9), ("skew_kl", 0.1), ("skew_kl", 0.7), ("skew_reverse_kl", 0.1), ("skew_reverse_kl", 0.7), ("jsd", 0.0), ("jsd", 1.0),
         ("skew_kl", 0.0), ("skew_reverse_kl", 0.0), ("dkd", 0.5), ("dkd", 0.0), ("nkd", 0.0), ("logit_mse", 0.0), ("logit_mse", 1.0)]
kinds = pytest.mark.parametrize("kind, mix", KINDS)
ROUNDING = {torch.float32: 0.0, torch.float64: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def data(rows, C, gap=1.0, scale=1.0, seed=0):
    gen = torch.Generator().manual_seed(seed)
    normal = lambda: scale * torch.randn(rows, C, generator=gen, dtype=torch.float64)
    t = normal()
    return t + gap * normal(), t, torch.randint(C, (rows,), generator=gen)


def answer(s, t, y=None, mask=None, weight=None, closed=True, **question):
    "Loss and gradient of the sum of what is returned, by the closed form, or by autograd in float64."
    q = ops.Question(others=2.0, **question)
    if y is None and q.kind in ("dkd", "nkd"): y = torch.arange(len(s)) % s.shape[-1]
    s = (s if closed else s.double()).detach().requires_grad_()
    t = t if closed else t.double()
    loss = (ops._torch_answer if closed else ops.torch_loss)(s, t, y, mask, weight, q)
    assert ("ClosedForm" in type(loss.grad_fn).__name__) == closed
    return loss.detach(), torch.autograd.grad(loss.sum(), s)[0]


def assert_close(got, want, dtype, tol=1e-6):
    "Losses to `tol`, gradients to `tol` of their row's largest and one rounding."
    (rows, grad), (rows_want, grad_want) = got, want
    if dtype is torch.float64: tol = 1e-11
    assert ((rows.double() - rows_want).abs() <= tol * rows_want.abs()).all(), (rows, rows_want)
    top = grad_want.abs().amax(-1, keepdim=True)
    excess = (grad.double() - grad_want).abs() - ROUNDING[dtype] * grad_want.abs() - (2.0**-25 if dtype is torch.float16 else 0)
    assert (excess <= tol * top).all(), (excess / top).amax(-1)


@kinds
@pytest.mark.parametrize("dtype", list(ROUNDING), ids=lambda d: str(d).split(".")[1])
@pytest.mark.parametrize("C, gap", [(7, 1.0), (300, 0.3), (40, 1e-5), (1000, 2.0)])
def test_loss_and_gradient(kind, mix, dtype, C, gap):
    s, t, y = (x.to(dtype) if x.is_floating_point() else x for x in data(90, C, gap))
    for T in (1.0, 4.0):
        options = dict(T=T, kind=kind, mix=mix, reduction="none")
        assert_close(answer(s, t, **options), answer(s, t, closed=False, **options), dtype)
        options |= dict(use_ce=True, ce_weight=0.3, kl_weight=0.7)
        assert_close(answer(s, t, y, **options), answer(s, t, y, closed=False, **options), dtype)


@kinds
def test_rows_of_all_sorts_in_one_batch(kind, mix, monkeypatch):
    "Ordinary, near, equal, excluded, spoilt, masked: each gets the care that it needs and disturbs no other."
    monkeypatch.setattr(closed_forms, "_BLOCK", 16384)
    s, t, y = data(60, 500)
    s[::4] = t[::4] + 1e-2 * s[::4]
    s[1::8] = t[1::8] + 1e-6 * s[1::8]
    s[2] = t[2]
    s[:, 40:44] = t[:, 40:44] = -INF
    y = y.masked_fill((y >= 40) & (y < 44), 0)
    s[5, 3], t[6, 4], s[7], s[9, 8], t[11, 9], t[13] = NAN, NAN, -INF, -INF, -INF, INF
    s[30:33] += 1e4
    s, t = s.float(), t.float()
    mask = torch.ones(60, dtype=torch.bool)
    mask[[5, 20, 21]] = False
    options = dict(T=2.0, kind=kind, mix=mix, reduction="none", use_ce=True, ce_weight=0.5)
    rows, grad = answer(s, t, y, mask, **options)
    want, grad_want = answer(s, t, y, mask, closed=False, **options)
    torch.testing.assert_close(rows.double(), want, rtol=1e-6, atol=0, equal_nan=True)
    top = grad_want.abs().nan_to_num(0).amax(-1, keepdim=True).clamp(min=1e-30)
    torch.testing.assert_close(grad.double() / top, grad_want / top, rtol=0, atol=1e-6, equal_nan=True)


@kinds
def test_many_rows_of_few_classes(kind, mix):
    "They go in one block, whose memory is not that of a question asked on the way."
    s, t, y = data(5000, 6)
    s[::9] = t[::9] + 1e-6 * s[::9]
    options = dict(T=2.0, kind=kind, mix=mix, reduction="none")
    assert_close(answer(s.float(), t.float(), y, **options), answer(s.float(), t.float(), y, closed=False, **options), torch.float32)


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_careful_form_alone(kind, mix, dtype, monkeypatch):
    "What a GPU gets, on the CPU."
    alone = lambda rows, form, grad: closed_forms._on_gpu(rows, form._replace(dtype=form.result), grad)
    monkeypatch.setattr(closed_forms, "_in_blocks", alone)
    for gap in (1.0, 1e-2, 1e-4):
        s, t, y = (x.to(dtype) if x.is_floating_point() else x for x in data(20, 60, gap, seed=1))
        s[3, 5] = t[3, 5] = s[4, 7] = t[5, 8] = -INF
        y = y.masked_fill((y == 5) | (y == 7), 0)
        options = dict(T=2.0, kind=kind, mix=mix, reduction="none", use_ce=True, ce_weight=0.3)
        rows, grad = answer(s, t, y, **options)
        want, grad_want = answer(s, t, y, closed=False, **options)
        torch.testing.assert_close(rows.double(), want, rtol=2e-6, atol=0)
        top = grad_want.abs().nan_to_num(0).amax(-1, keepdim=True)
        if kind != "total_variation": # the sign of a difference of the last digit is anybody's guess
            torch.testing.assert_close(grad.double() / top, grad_want / top, rtol=0, atol=5e-6, equal_nan=True)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind, mix", KINDS[:6:2] + KINDS[-5::2])
def test_weights_masks_temperatures_and_the_incoming_gradient(reduction, kind, mix):
    s, t, y = data(30, 400)
    s, t = s.float().reshape(5, 6, 400), t.float().reshape(5, 6, 400)
    y, mask = y.reshape(5, 6), torch.arange(30).reshape(5, 6) % 7 != 0
    gen = torch.Generator().manual_seed(1)
    weight, T = (torch.rand(5, 6, generator=gen) + 0.5 for _ in range(2))
    weight[0, 0] = NAN
    y[1, 1] = -100
    for temperature in (2.0, torch.tensor(2.0), T):
        for soft in (0.7, torch.tensor(0.7), 0.0):
            options = dict(T=temperature, kl_weight=soft, ce_weight=torch.tensor(0.3), use_ce=True, reduction=reduction, kind=kind,
                           mix=mix, t_squared=soft != 0.7, normalizer=7 if reduction == "mean" and soft == 0.7 else None)
            got, want = (answer(s, t, y, mask, weight, closed, **options) for closed in (True, False))
            torch.testing.assert_close(got[0].double(), want[0].double(), rtol=1e-6, atol=1e-9)
            torch.testing.assert_close(got[1].double(), want[1], rtol=1e-5, atol=1e-7)
    leaf = s.detach().requires_grad_()
    loss = kd.functional.forward_kl(leaf, t, T=2.0, reduction=reduction, backend="torch")
    once, = torch.autograd.grad(loss.sum(), leaf, retain_graph=True)
    thrice, = torch.autograd.grad(3 * loss.sum(), leaf)
    torch.testing.assert_close(thrice, 3 * once)


def test_ordinary_rows_are_never_computed_twice(monkeypatch):
    "The test for digits lets pass what it should, and most rows of float32 stay float32."
    seen = []
    real = closed_forms._quick
    monkeypatch.setattr(closed_forms, "_quick", lambda rows, form, *a: (seen.append((form.dtype, len(rows.student))), real(rows, form, *a))[1])
    monkeypatch.setattr(closed_forms, "_careful", lambda *a: pytest.fail("an ordinary row was taken for a difficult one"))
    s, t, _ = (x.float() for x in data(256, 1000))
    for kind, mix in KINDS[:11]: answer(s, t, kind=kind, mix=mix, T=4.0)
    seen.clear()
    answer(s, t, T=4.0)
    assert sum(n for dtype, n in seen if dtype is torch.float64) < 64 and {dtype for dtype, _ in seen[:1]} == {torch.float32}


def test_what_the_closed_form_cannot_do_goes_to_autograd():
    s, t, _ = data(3, 4)
    s.requires_grad_()
    takes = lambda t=t, weight=None, **q: ops._has_closed_form(s, t, weight, ops.Question(**q))
    learns = torch.tensor(2.0, requires_grad=True)
    assert takes() and takes(T=torch.tensor(2.0))
    for no in (dict(T=learns), dict(kl_weight=learns), dict(normalizer=learns), dict(weight=learns)):
        assert not takes(**no)
    assert not takes(t=t.clone().requires_grad_())
    assert not torch.func.vmap(lambda x: torch.tensor(ops._has_closed_form(x[None], x[None], None, ops.Question())))(t).any()


def test_inference_mode_leaves_nothing_behind():
    closed_forms.empty_cache()
    s, t, _ = (x.float() for x in data(8, 600))
    with torch.inference_mode(): value = kd.functional.forward_kl(s, t, backend="torch")
    assert answer(s, t)[0] == value
    kd.empty_cache()
    assert not vars(closed_forms._kept)
