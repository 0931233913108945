"""The compiled kernels of the divergence family against the stable reading in float64, on every instruction set."""
import math

import pytest
import torch

import kdlab as kd
from kdlab import logit_reference, ops, reference

pytestmark = pytest.mark.skipif(ops._C is None, reason="the compiled core is not built")
ISAS = [] if ops._C is None else ops._C.info()["isas"]
NAN, INF = math.nan, math.inf
FAMILY = [("reverse_kl", {}), ("total_variation", {}), ("soft_cross_entropy", {}), ("jsd", {"beta": 0.5}), ("jsd", {"beta": 0.1}),
          ("jsd", {"beta": 0.9}), ("skew_kl", {"alpha": 0.1}), ("skew_kl", {"alpha": 0.7}), ("skew_reverse_kl", {"alpha": 0.1}),
          ("skew_reverse_kl", {"alpha": 0.7}), ("dkd", {"alpha": 1.0, "beta": 8.0}), ("dkd", {"alpha": 2.0, "beta": 0.5}),
          ("nkd", {"gamma": 1.5})]
family = pytest.mark.parametrize("name, mix", FAMILY, ids=lambda x: x if isinstance(x, str) else "-".join(f"{v:g}" for v in x.values()))
ROUNDING = {torch.float32: 0.0, torch.float64: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@pytest.fixture(params=ISAS)
def isa(request):
    before = ops._C.info()["isa"]
    ops._C.set_isa(request.param)
    yield request.param
    ops._C.set_isa(before)


def rows_and_gradient(f, s):
    s = s.detach().requires_grad_()
    rows = f(s)
    return rows.detach(), torch.autograd.grad(rows.sum(), s)[0]


def labels(name, s):
    "The target of a divergence that reads labels."
    return [7 * torch.arange(len(s)) % s.shape[1]] if name in ("dkd", "nkd") else []


def kernel(name, mix, s, t, T, *args, **options):
    f, args = getattr(kd.functional, name), args or labels(name, s)
    return rows_and_gradient(lambda x: f(x, t, *args, T=T, **mix, t_squared=False, reduction="none", backend="cpp", **options), s)


def truth(name, mix, s, t, T, *args):
    args = args or labels(name, s)
    f = getattr(logit_reference if args else reference, "stable_" + name)
    return rows_and_gradient(lambda x: f(x, t.double(), *args, T, *mix.values(), *[False] * (name == "nkd")), s.double())


def data(kind, rows, C):
    gen = torch.Generator().manual_seed(C)
    normal = lambda scale=1.0: scale * torch.randn(rows, C, generator=gen, dtype=torch.float64)
    s, t = normal(), normal()
    peak = torch.zeros(rows, C, dtype=torch.float64).scatter(1, torch.randint(C, (rows, 1), generator=gen), 1.0)
    height = torch.linspace(5, 20, rows, dtype=torch.float64).unsqueeze(1)
    return {
        "ordinary": lambda: (s, t), "wide": lambda: (3 * s, 3 * t), "offset": lambda: (s + 1e4, t - 1e4), "near": lambda: (t + 0.3 * s, t),
        "nearer": lambda: (t + 1e-2 * s, t), "nearest": lambda: (t + 1e-4 * s, t), "both sure": lambda: (s + height * peak, t + height * peak),
        "sure and near": lambda: (t + height * peak + 1e-2 * s, t + height * peak), "student sure": lambda: (s + height * peak, t),
        "teacher sure": lambda: (s, t + height * peak), "rising": lambda: (s + torch.linspace(0, 90, C), t + torch.linspace(-50, 60, C)),
        "disjoint": lambda: (s + 20 * (torch.arange(C) % 2), t + 20 * (torch.arange(C) % 2 == 0))}[kind]()


KINDS = ["ordinary", "wide", "offset", "near", "nearer", "nearest", "both sure", "sure and near", "student sure", "teacher sure", "rising",
         "disjoint"]


def assert_close(got, want, dtype, base):
    "Rows to 2e-6, gradients to 3e-6 of their row's largest (the portable kernels have no fused multiply-add: 4e-6 for both)."
    (rows, grad), (rows_want, grad_want) = got, want
    tol = 1e-11 if dtype == torch.float64 else 4e-6 if base else 2e-6
    assert ((rows.double() - rows_want).abs() <= tol * rows_want.abs().clamp(min=1e-10)).all(), (rows, rows_want)
    top = grad_want.abs().amax(-1, keepdim=True).clamp(min=1e-7)
    excess = (grad.double() - grad_want).abs() - ROUNDING[dtype] * grad_want.abs() - (2.0**-25 if dtype == torch.float16 else 0)
    assert (excess / top).max() <= max(tol, 3e-6 * (tol > 1e-9)), (excess / top).amax(-1)


@family
@pytest.mark.parametrize("C", [5, 16, 40, 41, 100, 1000])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients(isa, name, mix, C, kind):
    s, t = (x.float() for x in data(kind, 11, C))
    for T in (0.5, 1.0, 4.0, 100.0):
        assert_close(kernel(name, mix, s, t, T), truth(name, mix, s, t, T), torch.float32, isa == "base")


@family
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=lambda d: str(d).split(".")[1])
@pytest.mark.parametrize("C", [7, 41, 252, 1271])
def test_dtypes(isa, name, mix, C, dtype):
    for kind in ("ordinary", "near", "wide", "both sure"):
        s, t = (x.to(dtype) for x in data(kind, 5, C))
        assert_close(kernel(name, mix, s, t, 2.0), truth(name, mix, s, t, 2.0), dtype, isa == "base")


@family
@pytest.mark.parametrize("C", [10, 300])
def test_excluded_classes_and_spoilt_rows(isa, name, mix, C):
    s, t = (x.float() for x in data("ordinary", 9, C))
    clean = kernel(name, mix, s, t, 2.0)
    s, t = s.clone(), t.clone()
    s[1, 3] = t[1, 3] = -INF
    t[2] = s[2] + 1e-3 * t[2]
    s[2, 0] = t[2, 0] = -INF  # absent, and near
    s[3, 4], t[4, 5], s[5, C - 1], t[6, 0], s[7], t[8] = NAN, NAN, INF, INF, -INF, -INF
    rows, grad = kernel(name, mix, s, t, 2.0)
    assert torch.equal(rows[0], clean[0][0]) and torch.equal(grad[0], clean[1][0])
    assert rows[3:].isnan().all() and grad[3:].isnan().all()
    for row, gone in ((1, 3), (2, 0)):
        keep = torch.arange(C) != gone
        y = [y[row:row + 1] - (y[row:row + 1] > gone).long() for y in labels(name, s)]
        want = truth(name, mix, s[row:row + 1, keep], t[row:row + 1, keep], 2.0, *y)
        assert grad[row, gone] == 0
        assert_close((rows[row:row + 1], grad[row:row + 1, keep]), want, torch.float32, isa == "base")


@family
@pytest.mark.parametrize("shape", [(500, 10), (60, 1271), (9, 9000)])
def test_the_same_bits_for_any_threads(isa, name, mix, shape):
    s, t = data("ordinary", *shape)
    s, t = s.float(), t.float()
    s[::7] = t[::7] + 1e-3 * s[::7]
    y = torch.arange(shape[0]) % shape[1]
    objective = 0.1 * kd.CrossEntropy() + 0.9 * {"jsd": kd.JSD, "skew_kl": kd.SkewKL, "skew_reverse_kl": kd.SkewReverseKL,
        "reverse_kl": kd.ReverseKL, "total_variation": kd.TotalVariation, "soft_cross_entropy": kd.SoftCrossEntropy, "dkd": kd.DKD, "nkd": kd.NKD}[name](T=2, **mix)
    results = []
    try:
        for n in (1, 2, 3, 1):
            torch.set_num_threads(n)
            results.append(rows_and_gradient(lambda x: objective(x, t, y), s))
    finally: torch.set_num_threads(1)
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(r, results[0]))
    ce, ce_grad = rows_and_gradient(lambda x: kd.CrossEntropy()(x, None, y), s)
    if name == "nkd": soft, soft_grad = rows_and_gradient(lambda x: logit_reference.stable_nkd(x, t.double(), y, 2.0) / 4, s.double())
    else: soft, soft_grad = truth(name, mix, s, t, 2.0, *[y] * (name == "dkd"))
    torch.testing.assert_close(results[0][0].double(), 0.1 * ce.double() + 0.9 * 4 * soft.mean(), rtol=2e-6, atol=0)
    want = 0.1 * ce_grad.double() + 0.9 * 4 * soft_grad / len(s)
    assert (results[0][1].double() - want).abs().max() <= 4e-6 * want.abs().max()


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("C", [1, 5, 40, 41, 1000])
def test_squares_of_differences(isa, C, center):
    s, t = data("ordinary", 9, C) if C > 1 else (torch.ones(9, 1), torch.zeros(9, 1))
    s, t = s.float() + torch.linspace(-1e3, 1e4, 9)[:, None], t.float() - 1e4
    if C > 5: s[1, 4], t[2, 1], s[3, 2], t[3, 2], s[4, 3], t[5, 0], s[6] = -INF, -INF, -INF, -INF, INF, NAN, NAN
    mask = torch.arange(9) != 6
    def ours(x): return kd.functional.logit_mse(x, t, center=center, mask=mask, reduction="none", backend="cpp")
    def exact(x): return torch.where(mask, reference.logit_mse(x, t.double(), center=center), 0)
    (rows, grad), (want, want_grad) = rows_and_gradient(ours, s), rows_and_gradient(exact, s.double())
    want_grad[6] = 0
    torch.testing.assert_close(rows.double(), want, rtol=2e-6, atol=1e-6, equal_nan=True)
    size = want_grad.where(want_grad.isfinite(), 0).abs().amax(-1, keepdim=True)
    assert torch.equal(grad.isfinite(), want_grad.isfinite()) and torch.equal(grad.isnan(), want_grad.isnan())
    off = (grad.double() - want_grad).abs()
    assert (off[want_grad.isfinite()] <= (2e-6 * size + 1e-6).expand_as(off)[want_grad.isfinite()]).all()


@pytest.mark.parametrize("name, option", [("jsd", "beta"), ("skew_kl", "alpha"), ("skew_reverse_kl", "alpha")])
@pytest.mark.parametrize("C", [10, 300])
def test_the_ends_of_the_mixtures(isa, name, option, C):
    "Where a mixture is nearly one of its two sides, what is left of the other keeps its digits."
    for weight in (0.0, 1e-4, 0.01, 0.999, 1.0):
        for kind in ("ordinary", "wide", "near", "nearer", "both sure"):
            s, t = (x.float() for x in data(kind, 7, C))
            rows, grad = kernel(name, {option: weight}, s, t, 2.0)
            assert_close((rows, grad), truth(name, {option: weight}, s, t, 2.0), torch.float32, isa == "base")
        if weight == 1 and name != "jsd": assert rows.eq(0).all() and grad.eq(0).all()


@pytest.mark.parametrize("name, mix", [("forward_kl", {}), *FAMILY], ids=lambda x: x if isinstance(x, str) else "-".join(f"{v:g}" for v in x.values()))
def test_the_bar_for_a_batch(name, mix, isa):
    "float32: the sum over a batch to 1e-6, and its gradient to 1e-6 of the largest, whatever the temperature (one divergence: 1.2e-6)."
    bar, wrong = 1.5e-6 if isa == "base" else 1.2e-6 if name == "skew_reverse_kl" else 1e-6, {}
    for C in (10, 100, 1000):
        for kind in KINDS:
            s, t = (x.float() for x in data(kind, 16, C))
            for T in (0.1, 1.0, 100.0):
                (rows, grad), (rows_want, grad_want) = kernel(name, mix, s, t, T), truth(name, mix, s, t, T)
                total, top = rows_want.sum(), grad_want.abs().max()
                if total.isfinite(): wrong[kind, C, T, "loss"] = abs(rows.double().sum() - total) / abs(total).clamp(min=1e-10)
                if top > 1e-9: wrong[kind, C, T, "gradient"] = (grad.double() - grad_want).abs().max() / top   # below, float64 is rounded too
    assert len(wrong) > 150 and {k: v.item() for k, v in wrong.items() if v > bar} == {}
