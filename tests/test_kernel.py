"""The compiled kernel, driven by addresses, against the equations in float64."""
import ctypes
import math

import numpy as np
import pytest
import torch

_C = pytest.importorskip("kdlab._C", reason="kdlab._C is not built: KDLAB_EXT=1 python setup.py build_ext --inplace")

ISAS = _C.info()["isas"]
CODES = {"float32": 0, "float64": 1, "bfloat16": 2, "float16": 3}
REDUCTIONS = {"none": 0, "sum": 1, "mean": 2}
ROUNDING = {"float32": 0, "float64": 0, "bfloat16": 2.0**-8, "float16": 2.0**-11}
NAN, INF = float("nan"), float("inf")


# On x86 the base kernels have no fused multiply-add: their exponentials lose a little more.
def accuracy():
    return 2e-6 if _C.info()["isa"] == "base" else 1e-6


@pytest.fixture(params=ISAS)
def isa(request):
    before = _C.info()["isa"]
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


# ---- the equations -------------------------------------------------------------------------------------------------
def softmax(z):
    with np.errstate(invalid="ignore"):
        e = np.exp(z - z.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)


def definition(s, t, T):
    "KL(teacher || student) of each row and its gradient, as the equation is written."
    with np.errstate(invalid="ignore", divide="ignore"):
        ls, lt = (z / T - z.max(-1, keepdims=True) / T for z in (s, t))
        ls, lt = (z - np.log(np.exp(z).sum(-1, keepdims=True)) for z in (ls, lt))
        p, q = np.exp(lt), np.exp(ls)
        terms = np.where((t == -INF) & (s < INF) & (s == s), 0.0, p * (lt - ls))
        spoiled = np.isnan(p).any(-1) | np.isnan(q).any(-1)
        return np.where(spoiled, NAN, terms.sum(-1)), (q - p) / T


def near(s, t, T):
    "The same where the student is close to its teacher: v = log(p_s / p_t) without cancellation. Finite logits."
    p = softmax(t / T)
    d = s - t
    d = d - np.take_along_axis(d, t.argmax(-1, keepdims=True), -1)
    w = (d - np.sum(p * d, -1, keepdims=True)) / T
    v = w - np.log1p(np.sum(p * np.expm1(w), -1, keepdims=True))
    psi = np.where(abs(v) < 0.01, v * v * (1 / 2 + v * (1 / 6 + v * (1 / 24 + v / 120))), np.expm1(v) - v)
    return np.sum(p * psi, -1), p * np.expm1(v) / T


def cross_entropy(s, y):
    "Hard cross-entropy of each row at T=1 and its gradient; accurate for confident students too."
    top = s.max(-1, keepdims=True)
    a, rows = s - top, np.arange(len(s))
    h = np.exp(a)
    others = h.copy()
    others[rows, y] = 0
    rest, hy = others.sum(-1), h[rows, y]
    with np.errstate(divide="ignore", invalid="ignore"):
        loss = np.where(hy > 0.5, np.log1p(rest / hy), np.log(rest + hy) - a[rows, y])
    grad = h / h.sum(-1, keepdims=True)
    grad[rows, y] = -rest / h.sum(-1)
    return loss, grad


# ---- the kernel ----------------------------------------------------------------------------------------------------
def encode(x, dtype):
    "float64 -> array of the kernel's dtype (bfloat16 as its bits)."
    if dtype == "bfloat16":
        return torch.from_numpy(np.ascontiguousarray(x)).bfloat16().view(torch.int16).numpy()
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(x).astype(dtype)


def decode(x, dtype):
    if dtype == "bfloat16":
        return torch.from_numpy(x).view(torch.bfloat16).double().numpy()
    return x.astype(np.float64)


def address(x):
    return 0 if x is None else x.ctypes.data


class Result(dict):
    __getattr__ = dict.__getitem__


def soft_kl(s, t=None, y=None, *, dtype="float32", T=1.0, t_squared=True, kl_weight=1.0, ce_weight=0.0, mask=None,
            row_weight=None, grad_in=None, reduction="none", normalizer=NAN, ignore_index=-100, threads=1, pad=0,
            need_grad=True, need_rows=True, need_out=True):
    "Call the kernel. `pad` puts the rows of the logits that many elements further apart."
    rows, cols = s.shape
    loss_dtype = "float64" if dtype == "float64" else "float32"

    def spread(x):
        if x is None:
            return None
        wide = np.full((rows, cols + pad), np.nan)
        wide[:, :cols] = x
        return encode(wide, dtype)

    as_loss = lambda x: None if x is None else np.atleast_1d(np.asarray(x, dtype=loss_dtype))
    s, t = spread(s), spread(t)
    y = None if y is None else np.asarray(y, dtype=np.int64)
    mask = None if mask is None else np.asarray(mask, dtype=np.uint8)
    row_weight, grad_in = as_loss(row_weight), as_loss(grad_in)
    grad = np.ones((rows, cols), s.dtype) if need_grad else None
    kl, ce = (np.full(rows, 7, loss_dtype) if need_rows else None for _ in range(2))
    out = np.full(rows if reduction == "none" else 1, 7, loss_dtype) if need_out else None
    bad = _C.soft_kl(*map(address, (s, t, y, mask, row_weight, grad_in, grad, kl if t is not None else None,
                                    ce if y is not None else None, out)),
                     CODES[dtype], CODES[loss_dtype], rows, cols, cols + pad, cols + pad, T,
                     T * T if t_squared else 1.0, kl_weight, ce_weight, REDUCTIONS[reduction], normalizer,
                     ignore_index, threads)
    return Result(bad=bad, out=out, kl=kl, ce=ce, raw=grad, grad=None if grad is None else decode(grad, dtype))


def logits(rows, cols, seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    return scale * rng.standard_normal((rows, cols)), scale * rng.standard_normal((rows, cols))


def rounded(x, dtype):
    return decode(encode(x, dtype), dtype)


def assert_close(got, want, what="loss", tol=None):
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want), err_msg=what)
    np.testing.assert_array_equal(np.isinf(got), np.isinf(want), err_msg=what)
    ok = np.isfinite(want)
    error = np.abs(np.asarray(got, np.float64)[ok] - want[ok]) / np.maximum(np.abs(want[ok]), 1e-10)
    assert error.size == 0 or error.max() <= (tol or accuracy()), f"{what}: relative error {error.max():.3g}"


def assert_grad(got, want, dtype):
    "Each row within 1e-6 of its own largest gradient, and one rounding of the dtype."
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    ok = ~np.isnan(want).any(-1)
    got, want = got[ok], want[ok]
    top = np.abs(want).max(-1, keepdims=True, initial=0)
    tiny = {"float16": 2.0**-25}.get(dtype, 1e-37)
    excess = np.abs(got - want) - ROUNDING[dtype] * np.abs(want) - tiny
    worst = (excess / np.maximum(top, 1e-7)).max(initial=0)
    assert worst <= accuracy(), f"gradient: error {worst:.3g} of the largest"


# ---- values --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("cols", [1, 2, 7, 10, 15, 16, 17, 33, 100, 252, 1271, 32000])
@pytest.mark.parametrize("dtype", CODES)
def test_values(isa, dtype, cols):
    rows = 3 if cols > 2000 else 19
    s, t = (rounded(x, dtype) for x in logits(rows, cols, seed=cols, scale=3))
    y = np.random.default_rng(1).integers(0, cols, rows)
    for T in (1.0, 4.0):
        kl, kl_grad = definition(s, t, T)
        if cols == 1:
            kl, kl_grad = 0 * kl, 0 * kl_grad
        ce, ce_grad = cross_entropy(s, y)
        r = soft_kl(s, t, y, dtype=dtype, T=T, kl_weight=0.9, ce_weight=0.1, pad=5)
        assert r.bad == -1
        assert_close(r.kl, T * T * kl, what="kl")
        assert_close(r.ce, ce, what="ce")
        assert_close(r.out, 0.9 * T * T * kl + 0.1 * ce)
        assert_grad(r.grad, 0.9 * T * T * kl_grad + 0.1 * ce_grad, dtype)
        r = soft_kl(s, t, dtype=dtype, T=T, t_squared=False)
        assert_close(r.out, kl)
        assert_grad(r.grad, kl_grad, dtype)
        r = soft_kl(s, None, y, dtype=dtype, T=T, kl_weight=0.0, ce_weight=2.0)
        assert_close(r.out, 2 * ce)
        assert_grad(r.grad, 2 * ce_grad, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_vocabulary(isa, dtype):
    s, t = (rounded(x, dtype) for x in logits(2, 128256, scale=2))
    kl, grad = definition(s, t, 2.0)
    r = soft_kl(s, t, dtype=dtype, T=2.0)
    assert_close(r.out, 4 * kl)
    assert_grad(r.grad, 4 * grad, dtype)


@pytest.mark.parametrize("cols", [10, 100, 1000])
@pytest.mark.parametrize("T", [0.05, 0.1, 0.5, 1, 4, 20, 100])
def test_temperature_and_offset(isa, cols, T):
    for offset in (0, 1e4, -1e4):
        s, t = (rounded(x + offset, "float32") for x in logits(40, cols, seed=3))
        t = rounded(t + 0.5 * offset, "float32")
        kl, grad = (definition if T < 10 else near)(s, t, T)
        r = soft_kl(s, t, T=T)
        assert_close(r.out, T * T * kl)
        assert_grad(r.grad, T * T * grad, "float32")


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("shape", ["rising", "late peak", "late peak of the teacher", "low start", "excluded start"])
def test_rows_that_outgrow_their_first_classes(isa, dtype, shape):
    "The kernel starts from the largest of the first classes, wherever the maximum is."
    cols, y = 1271, np.arange(16) % 2 * 1200 + 20
    s, t = logits(16, cols, seed=8)
    if shape == "rising": s, t = s + np.linspace(0, 90, cols), t + np.linspace(-50, 60, cols)
    if shape == "late peak": s[:, 700], t[:, 700] = s[:, 700] + 9, t[:, 700] + 12
    if shape == "late peak of the teacher": t[:, -1] += 40
    if shape == "low start": s[:, :600], t[:, :600] = s[:, :600] - 200, t[:, :600] - 300
    if shape == "excluded start": s[:, :600] = t[:, :600] = -INF
    s, t = rounded(s, dtype), rounded(t, dtype)
    for T in (1.0, 4.0):
        kl, kl_grad = definition(s, t, T)
        ce, ce_grad = cross_entropy(s, y)
        r = soft_kl(s, t, y, dtype=dtype, T=T, kl_weight=0.9, ce_weight=0.1)
        assert_close(r.kl, T * T * kl, what="kl")
        assert_close(r.ce, ce, what="ce")
        assert_grad(r.grad, 0.9 * T * T * kl_grad + 0.1 * ce_grad, dtype)


def test_huge_logits(isa):
    for cols in (10, 300):
        s, t = (rounded(x, "float32") for x in logits(20, cols, scale=1e4))
        for T in (0.05, 1.0, 100.0):
            kl, grad = definition(s, t, T)
            r = soft_kl(s, t, T=T)
            assert_close(r.out, T * T * kl)
            assert_grad(r.grad, T * T * grad, "float32")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("cols", [7, 10, 40, 252, 1271])
def test_near_convergence(isa, dtype, cols):
    for distance in (3.0, 1.0, 0.3, 0.1, 1e-2, 1e-3):
        for offset in (0, 1e4):
            t, noise = logits(16, cols, seed=5, scale=2)
            s, t = rounded(t + distance * noise + offset, dtype), rounded(t, dtype)
            for T in (0.5, 1.0, 4.0, 100.0):
                kl, grad = near(s, t, T)
                r = soft_kl(s, t, dtype=dtype, T=T)
                assert_close(r.out, T * T * kl)
                assert_grad(r.grad, T * T * grad, dtype)


BEGIN_CLOSE = {  # what follows the first hundred classes; the two may be changed in place
    "close to the end": lambda s, t: None,
    "far apart later": lambda s, t: np.multiply(s[:, 700:], -1, out=s[:, 700:]),
    "one class apart": lambda s, t: np.add(s[:, 900], 7, out=s[:, 900]),
    "shifted later": lambda s, t: np.add(s[:, 100:], 0.4, out=s[:, 100:]),
    "drifting": lambda s, t: np.add(s, np.linspace(0, 0.6, s.shape[1]), out=s),
    "both rising": lambda s, t: [np.add(x, np.linspace(0, 30, s.shape[1]), out=x) for x in (s, t)],
    "sure": lambda s, t: [np.add(x[:, 800], more, out=x[:, 800]) for x, more in ((s, 12.1), (t, 12))],
    "very sure": lambda s, t: [np.add(x[:, 800], more, out=x[:, 800]) for x, more in ((s, 30.1), (t, 30))],
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("later", BEGIN_CLOSE)
def test_rows_that_begin_close(isa, dtype, later):
    "The first classes decide in which form a row is tried; the result is right whatever follows."
    y = np.arange(12)
    for cols in (1271, 1280):
        t, noise = logits(12, cols, seed=6, scale=2)
        for distance, offset in ((1e-3, 0), (0.05, 0), (0.05, 30)):
            s = t + distance * noise + offset
            t_now = t.copy()
            BEGIN_CLOSE[later](s, t_now)
            s, t_now = rounded(s, dtype), rounded(t_now, dtype)
            ce, ce_grad = cross_entropy(s, y)
            for T in (1.0, 4.0, 20.0):
                kl, grad = near(s, t_now, T)
                r = soft_kl(s, t_now, dtype=dtype, T=T)
                assert_close(r.out, T * T * kl)
                assert_grad(r.grad, T * T * grad, dtype)
                r = soft_kl(s, t_now, y, dtype=dtype, T=T, kl_weight=0.5, ce_weight=0.5)
                assert_close(r.kl, T * T * kl)
                assert_close(r.ce, ce)
                assert_grad(r.grad, (T * T * grad + ce_grad) / 2, dtype)


def test_excluded_classes_in_rows_that_begin_close(isa):
    t, noise = logits(4, 300, seed=7)
    s = t + 0.01 * noise
    s[:3, 200], t[:2, 200] = -INF, -INF  # both, both, only the student
    s, t = rounded(s, "float32"), rounded(t, "float32")
    s[1, 210] = t[1, 210] = NAN
    r = soft_kl(s, t, T=4.0)
    kl, grad = near(np.delete(s, 200, 1), np.delete(t, 200, 1), 4.0)
    assert_close(r.out[[0, 3]], 16 * np.append(kl[0], near(s[3:], t[3:], 4.0)[0]))
    assert_grad(np.delete(r.grad[:1], 200, 1), 16 * grad[:1], "float32")
    assert r.grad[0, 200] == 0 and np.isnan(r.out[1]) and np.isnan(r.grad[1]).all() and r.out[2] == INF
    assert_grad(r.grad[2:3], 16 * definition(s[2:3], t[2:3], 4.0)[1], "float32")


@pytest.mark.parametrize("T", [1, 2, 3, 4, 8])
def test_hard_label_beside_a_temperature(isa, T):
    "At some temperatures the label's exponentials are made from the teacher's and student's; that costs no digits."
    for scale in (1, 6):
        s, t = (rounded(x, "float32") for x in logits(16, 1271, seed=9, scale=scale))
        y = s.argmax(-1)
        y[8:] = np.random.default_rng(2).integers(0, 1271, 8)
        kl, kl_grad = definition(s, t, T)
        ce, ce_grad = cross_entropy(s, y)
        r = soft_kl(s, t, y, T=float(T), kl_weight=0.5, ce_weight=0.5)
        assert_close(r.kl, T * T * kl, what="kl")
        assert_close(r.ce, ce, what="ce")
        assert_grad(r.grad, (T * T * kl_grad + ce_grad) / 2, "float32")


def test_confident_rows(isa):
    "Both sure of one class: the gradient is far smaller than the probabilities that it is the difference of."
    rng = np.random.default_rng(0)
    for cols in (10, 64, 500):
        s, t = logits(60, cols, seed=8)
        y = rng.integers(0, cols, 60)
        s[np.arange(60), y] += rng.uniform(5, 20, 60)
        t[np.arange(60), y] += rng.uniform(5, 20, 60)
        s, t = rounded(s, "float32"), rounded(t, "float32")
        kl, grad = near(s, t, 1.0)
        r = soft_kl(s, t)
        assert_close(r.out, kl)
        assert_grad(r.grad, grad, "float32")
        ce, ce_grad = cross_entropy(s, y)
        r = soft_kl(s, None, y, kl_weight=0.0, ce_weight=1.0)
        assert_close(r.out, ce)
        assert_grad(r.grad, ce_grad, "float32")


def test_student_equal_to_teacher(isa):
    for cols in (1, 10, 1000):
        s, _ = logits(5, cols, scale=5)
        r = soft_kl(s, s)
        assert (r.out == 0).all() and (r.grad == 0).all()


def test_oracle():
    "near() agrees with 40 digits where the definition in float64 does not, and with the definition elsewhere."
    from mpmath import mp, mpf, exp, log
    t, noise = logits(1, 7)
    for distance, T in ((1e-3, 100.0), (1.0, 1.0)):
        s = t + distance * noise
        with mp.workdps(40):
            e = [[exp(mpf(float(z)) / mpf(T)) for z in row] for row in (s[0], t[0])]
            q, p = ([z / sum(row) for z in row] for row in e)
            exact = float(sum(a * log(a / b) for a, b in zip(p, q)))
        assert abs(near(s, t, T)[0][0] / exact - 1) < 1e-9
    assert abs(definition(s, t, 1.0)[0][0] / exact - 1) < 1e-12


# ---- what counts ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("cols", [10, 300])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_rows_that_do_not_count(isa, cols, reduction):
    s, t = (rounded(x, "float32") for x in logits(40, cols, seed=2))
    y = np.arange(40) % cols
    mask = np.arange(40) % 3 != 0
    y[[1, 2, 39]] = -7
    out = ~mask | (y == -7)
    T, w = 2.0, np.linspace(0.5, 2, 40)
    row_weight = np.where(out, NAN, w)
    ce, ce_grad = cross_entropy(s, np.where(out, 0, y))
    kl, kl_grad = definition(s, t, T)
    s[out], t[out] = NAN, INF
    keep = lambda x: np.where(out if x.ndim == 1 else out[:, None], 0, x)
    value, grad = 0.7 * T * T * kl + 0.3 * ce, 0.7 * T * T * kl_grad + 0.3 * ce_grad
    g = np.linspace(-1, 2, 40) if reduction == "none" else np.array([3.0])
    r = soft_kl(s, t, y, T=T, mask=mask, row_weight=row_weight, ignore_index=-7, kl_weight=0.7, ce_weight=0.3,
                reduction=reduction, grad_in=g)
    want, n = keep(w * value), (~out).sum()
    scale = {"none": g[:, None], "sum": g, "mean": g / n}[reduction] * w[:, None]
    assert_close(r.out, {"none": want, "sum": want.sum(keepdims=True), "mean": want.sum(keepdims=True) / n}[reduction],
                 tol=2e-6)
    assert_close(r.kl, keep(T * T * kl), what="kl")
    assert_close(r.ce, keep(ce), what="ce")
    assert_grad(r.grad, keep(scale * grad), "float32")
    assert (r.grad[out] == 0).all() and not np.signbit(r.grad[out]).any()


def test_normalizer(isa):
    s, t = logits(6, 30)
    total = soft_kl(s, t, reduction="sum")
    for n, want in ((3.0, 3.0), (NAN, 6.0)):
        r = soft_kl(s, t, reduction="mean", normalizer=n)
        assert_close(r.out, total.out / want)
        assert_grad(r.grad, total.grad / want, "float32")
    r = soft_kl(s, t, reduction="mean", mask=np.zeros(6))
    assert r.out[0] == 0 and (r.grad == 0).all()


def test_ignore_index_without_hard_term(isa):
    "A target matters only through ignore_index then: its range is not checked."
    s, t = logits(5, 20)
    y = np.array([3, -100, 99, -5, 0])
    r = soft_kl(s, t, y, need_rows=False)
    assert r.bad == -1
    assert_close(r.out, np.where(y == -100, 0, definition(rounded(s, "float32"), rounded(t, "float32"), 1.0)[0]))


def test_bad_label(isa):
    s, t = logits(5, 20)
    for y, bad in (([1, 2, 20, 3, -1], 2), ([1, -1, 3, 4, 5], 1), ([0, 19, -100, 4, 5], -1)):
        assert soft_kl(s, t, y, ce_weight=1.0).bad == bad
        assert soft_kl(s, t, y).bad == bad                        # the terms of each row are wanted
    assert soft_kl(s, t, [1, 2, 20, 3, 4], ce_weight=1.0, mask=[1, 1, 0, 1, 1]).bad == -1


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_empty(isa, reduction):
    for shape in ((0, 10), (0, 0), (4, 0)):
        r = soft_kl(np.zeros(shape), np.zeros(shape), reduction=reduction)
        assert r.bad == -1 and (r.out == 0).all() and (r.kl == 0).all()


def test_absent_outputs(isa):
    for cols in (10, 100):
        s, t = logits(7, cols)
        y = np.arange(7)
        full = soft_kl(s, t, y, ce_weight=0.5, reduction="mean")
        only = soft_kl(s, t, y, ce_weight=0.5, reduction="mean", need_rows=False, need_out=False)
        assert (only.raw == full.raw).all()
        value = soft_kl(s, t, y, ce_weight=0.5, reduction="mean", need_rows=False, need_grad=False)
        assert value.out == full.out


# ---- values that are not numbers -----------------------------------------------------------------------------------
@pytest.mark.parametrize("cols", [7, 16, 40, 300])
@pytest.mark.parametrize("dtype", CODES)
def test_excluded_classes(isa, dtype, cols):
    s, t = (rounded(x, dtype) for x in logits(6, cols, seed=4))
    kl_plain, _ = definition(s, t, 2.0)
    s[0, 1] = t[0, 1] = -INF                                      # by both: absent
    t[1, 2] = -INF                                                # by the teacher only
    s[2, 3] = -INF                                                # by the student only: +inf
    s[3, 0] = t[3, 0] = -INF
    s[3, 1:] = t[3, 1:] + rounded(1e-3 * s[3, 1:], dtype)         # absent, and close to the teacher
    s[3] = rounded(s[3], dtype)
    t[4, cols - 1] = s[4, cols - 1] = -INF
    kl, grad = definition(s, t, 2.0)
    present = slice(1, None)
    kl[3], grad[3, 1:] = (x[0] for x in near(s[3:4, present], t[3:4, present], 2.0))
    grad[3, 0] = 0
    assert kl[2] == INF and np.isfinite(kl[[0, 1, 3, 4, 5]]).all() and np.isfinite(grad).all()
    r = soft_kl(s, t, dtype=dtype, T=2.0)
    assert_close(r.out, 4 * kl)
    assert_grad(r.grad, 4 * grad, dtype)
    assert r.grad[0, 1] == 0 and r.grad[3, 0] == 0
    assert_close(r.out[5:], 4 * kl_plain[5:])


@pytest.mark.parametrize("cols", [10, 33, 300])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bad_values_spoil_their_own_row(isa, dtype, cols):
    clean_s, clean_t = (rounded(x, dtype) for x in logits(60, cols, seed=6))
    clean = soft_kl(clean_s, clean_t, dtype=dtype)
    places = [0, cols // 2, cols - 1]
    row = 1
    s, t = clean_s.copy(), clean_t.copy()
    spoiled = []
    for place in places:
        for bad in (NAN, INF):
            s[row, place] = bad
            t[row + 2, place] = bad
            spoiled += [row, row + 2]
            row += 4
    s[row], t[row + 2] = -INF, -INF
    spoiled += [row, row + 2]
    r = soft_kl(s, t, dtype=dtype)
    fine = np.setdiff1d(np.arange(60), spoiled)
    assert np.isnan(r.out[spoiled]).all() and np.isnan(r.grad[spoiled]).all()
    assert (r.out[fine] == clean.out[fine]).all() and (r.raw[fine] == clean.raw[fine]).all()
    assert np.isnan(soft_kl(s, t, dtype=dtype, reduction="mean").out).all()


def test_label_at_minus_infinity(isa):
    for cols in (10, 100):
        s, t = logits(3, cols)
        s[1, 4] = t[1, 4] = -INF
        r = soft_kl(s, t, [4, 4, 4], ce_weight=1.0)
        assert r.ce[1] == INF and r.out[1] == INF and np.isfinite(r.grad).all() and np.isfinite(r.out[[0, 2]]).all()
        assert abs(soft_kl(s, None, [4, 4, 4], kl_weight=0.0, ce_weight=1.0).grad[1, 4] + 1) < 1e-6


def test_finite_mask_values(isa):
    "Logits of -1e30 or the lowest float are a common way to mask."
    for low in (-1e30, float(np.finfo(np.float32).min)):
        for cols in (10, 200):
            s, t = logits(3, cols)
            s[:, 3] = t[:, 3] = low
            s, t = rounded(s, "float32"), rounded(t, "float32")
            kl, grad = definition(s, t, 4.0)
            r = soft_kl(s, t, T=4.0)
            assert_close(r.out, 16 * kl)
            assert_grad(r.grad, 16 * grad, "float32")


def test_subnormal_logits(isa):
    for cols in (10, 100):
        s, t = logits(4, cols)
        s[:, ::3], t[:, ::2] = 1e-41, -1e-40
        kl, grad = definition(rounded(s, "float32"), rounded(t, "float32"), 1.0)
        r = soft_kl(s, t)
        assert_close(r.out, kl)
        assert_grad(r.grad, grad, "float32")


# ---- the same bits, whatever the threads ---------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(1000, 10), (37, 5000), (301, 257)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_same_bits_for_any_threads(isa, dtype, shape):
    s, t = logits(*shape, seed=9)
    y = np.arange(shape[0]) % shape[1]
    y[5::11] = -100
    s[::7] = t[::7] + 1e-3 * s[::7]
    first = soft_kl(s, t, y, dtype=dtype, T=3.0, ce_weight=0.1, reduction="mean")
    for threads in (1, 2, 3, 4):
        again = soft_kl(s, t, y, dtype=dtype, T=3.0, ce_weight=0.1, reduction="mean", threads=threads)
        assert again.out == first.out and (again.raw == first.raw).all() and (again.kl == first.kl).all()


def test_calls_from_many_python_threads(isa):
    from concurrent.futures import ThreadPoolExecutor
    s, t = logits(64, 500, seed=11)
    want = soft_kl(s, t, T=2.0).raw
    with ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda _: soft_kl(s, t, T=2.0).raw, range(40)):
            assert (got == want).all()


def test_large_gradient_is_streamed(isa):
    "Rows of a gradient that outgrows the cache equal the same rows computed alone."
    s, t = logits(80, 32768, seed=10)
    whole = soft_kl(s, t, T=4.0, threads=2)
    for r in (0, 41, 79):
        alone = soft_kl(s[r:r + 1], t[r:r + 1], T=4.0)
        assert alone.out == whole.out[r] and (alone.raw == whole.raw[r]).all()


def test_denormals_come_back(isa):
    s, t = logits(300, 1000)
    soft_kl(s, t, threads=2)
    smallest = np.float32(np.finfo(np.float32).tiny)
    assert smallest / np.float32(2) > 0
    assert (torch.full((1 << 16,), float(smallest)) / 2 > 0).all()


# ---- scale, info ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("cols", [1, 10, 100])
def test_scale(isa, dtype, cols):
    x = rounded(logits(9, cols)[0], dtype)
    for factor_dtype in ("float32", "float64"):
        for per_row in (False, True):
            factor = np.linspace(0, 2, 9 if per_row else 1, dtype=factor_dtype) + (0 if per_row else 3)
            g = encode(x, dtype)
            _C.scale(address(g), CODES[dtype], 9, cols, address(factor), CODES[factor_dtype], per_row, 2)
            want = x * rounded(factor.astype(np.float64), "float32" if dtype != "float64" else dtype).reshape(-1, 1)
            assert_grad(decode(g, dtype), want, dtype)
    g = encode(np.array([[1.0, NAN]]), dtype)
    _C.scale(address(g), CODES[dtype], 1, 2, address(np.zeros(1)), 1, True, 1)
    assert decode(g, dtype)[0, 0] == 0 and np.isnan(decode(g, dtype)[0, 1])


def test_info_and_isa():
    info = _C.info()
    assert info["isas"][0] == "base" and info["isa"] in info["isas"] and info["threads"] >= 1
    before = info["isa"]
    for name in ("base", "avx2", "avx512"):
        _C.set_isa(name)
        assert _C.info()["isa"] == name if name in ISAS else _C.info()["isa"] in ISAS
    with pytest.raises(ValueError, match="avx512"):
        _C.set_isa("mmx")
    _C.set_isa(before)


def test_isa_from_environment():
    import os
    import subprocess
    import sys
    for name in ("base", "avx2", "avx512", "nonsense"):
        code = "import torch, kdlab._C as c; print(c.info()['isa'])"
        done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "KDLAB_ISA": name},
                              capture_output=True, text=True, check=True)
        assert done.stdout.strip() in ISAS
        assert name not in ISAS or done.stdout.strip() == name


def test_rounding_to_bfloat16_by_the_cpu_changes_nothing():
    "Some CPUs have an instruction for it; bit for bit it does what the kernels do without. Trivial on the others."
    import os
    import subprocess
    import sys
    code = """
import sys, torch, kdlab as kd
s, t = (torch.randn(6, 1271, generator=torch.manual_seed(i)).mul(3).bfloat16() for i in range(2))
s[1, 5], t[2, 7], s[3] = float("nan"), float("inf"), t[3]
t[4, :70] = s[4, :70] = float("-inf")
s.requires_grad_()
kd.functional.forward_kl(s, t, T=2., reduction="sum", backend="cpp").backward()
sys.stdout.buffer.write(s.grad.view(torch.int16).numpy().tobytes())
"""
    first, second = (subprocess.run([sys.executable, "-c", code], env={**os.environ, "KDLAB_BF16": how}, capture_output=True,
                                    check=True).stdout for how in ("1", "0"))
    assert len(first) == 6 * 1271 * 2 and first == second
