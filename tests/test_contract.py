"""The public contract (DESIGN section 3) over every row loss, backend, dtype, mask and layout."""
import copy
import functools
import inspect
import math
import os
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

import kdlab as kd
from kdlab import ops, reference
from kdlab.functional import forward_kl
from kdlab.losses.objective import _groups

BACKENDS = ["torch"] + (["cpp"] if ops._C is not None else [])
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
INF, NAN = math.inf, math.nan

backends = pytest.mark.parametrize("backend", BACKENDS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).split(".")[1])


def logits(*shape, seed=0, scale=3.0, dtype=torch.float32):
    gen = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=gen, dtype=torch.float64)).to(dtype)


def pair(*shape, dtype=torch.float32):
    return logits(*shape, seed=1, dtype=dtype), logits(*shape, seed=2, dtype=dtype)


def value_and_grad(f, student):
    student = student.detach().requires_grad_()
    value = f(student)
    return value.detach(), torch.autograd.grad(value.sum(), student)[0]


class Case:
    "A row loss with its own options: the function, its module, and its two readings in the reference, called alike."
    def __init__(self, name, module, **options):
        self.name, self.options, self.has_T = name, options, name != "logit_mse"
        self.module = functools.partial(module, **options)
        self.mix = tuple(options.values())

    def __repr__(self): return "-".join([self.name, *(f"{x:g}" for x in self.mix)])

    def __call__(self, s, t, *args, **options):
        if not self.has_T: options.pop("T", None), options.pop("t_squared", None)
        return getattr(kd.functional, self.name)(s, t, *args, **self.options, **options)

    def read(self, reading, s, t, T):
        return getattr(reference, reading + self.name)(s, t, T if self.has_T else 1.0, *self.mix)


LOSSES = [Case("forward_kl", kd.ForwardKL), Case("reverse_kl", kd.ReverseKL), Case("jsd", kd.JSD, beta=0.5),
          Case("jsd", kd.JSD, beta=0.1), Case("skew_kl", kd.SkewKL, alpha=0.1), Case("skew_kl", kd.SkewKL, alpha=0.7),
          Case("skew_reverse_kl", kd.SkewReverseKL, alpha=0.1), Case("skew_reverse_kl", kd.SkewReverseKL, alpha=0.7),
          Case("total_variation", kd.TotalVariation), Case("soft_cross_entropy", kd.SoftCrossEntropy),
          Case("logit_mse", kd.LogitMSE, center=False), Case("logit_mse", kd.LogitMSE, center=True)]
FORWARD = LOSSES[0]


def runs(loss, backend):
    "Does this backend know the loss?"
    try: loss(torch.zeros(1, 2), torch.zeros(1, 2), backend=backend)
    except ValueError as e: return "no kernel" not in str(e)
    return True


CASES = [(loss, backend) for loss in LOSSES for backend in BACKENDS if runs(loss, backend)]
cases = pytest.mark.parametrize("loss, backend", CASES, ids=str)
all_losses = pytest.mark.parametrize("loss", LOSSES, ids=str)


def oracle(student, teacher, T, t_squared=True, loss=FORWARD, reading=""):
    "A loss by row in float64, and d(sum of rows)/d student, both from the definition."
    rows, grad = value_and_grad(lambda s: loss.read(reading, s, teacher.double(), T), student.double())
    factor = T * T if t_squared and loss.has_T else 1.0
    return factor * rows, factor * grad


# what a row loss computes

@cases
@dtypes
@pytest.mark.parametrize("T", [0.5, 1.0, 4.0])
def test_value_and_gradient_are_those_of_the_definition(loss, backend, dtype, T):
    s, t = pair(6, 13, dtype=dtype)
    rows, grad = oracle(s, t, T, loss=loss)
    got, got_grad = value_and_grad(lambda x: loss(x, t, T=T, backend=backend), s)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and got_grad.dtype == dtype
    torch.testing.assert_close(got.double(), rows.mean(), rtol=1e-6, atol=0)
    rounding = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    assert (got_grad.double() - grad / 6).abs().max() <= rounding * (grad / 6).abs().max() + 1e-7 * (dtype == torch.float16)


@cases
def test_it_is_not_one_of_the_usual_mistakes(loss, backend):
    s, t = pair(6, 13)
    got = loss(s, t, T=4.0, backend=backend).item()
    right = oracle(s, t, 4.0, loss=loss)[0].mean().item()
    assert got == pytest.approx(right, rel=1e-6)
    wrong = {"divided by C": right / 13, "not divided by the batch": right * 6, "no T²": right / 16,
             "arguments swapped": oracle(t, s, 4.0, loss=loss)[0].mean().item()}
    if not loss.has_T: del wrong["no T²"]
    if loss.name in ("total_variation", "logit_mse") or loss.options == {"beta": 0.5}: del wrong["arguments swapped"] # symmetric
    if loss.mix and loss.mix[0] not in (0.5, True, False):
        other = Case(loss.name, kd.JSD, mix=1 - loss.mix[0])
        wrong["mixture the wrong way round"] = oracle(s, t, 4.0, loss=other)[0].mean().item()
    for name, value in wrong.items(): assert abs(got - value) > 0.01 * right, name


@backends
def test_limits_of_the_family(backend):
    s, t = pair(6, 13)
    f = functools.partial
    same = lambda a, b: torch.testing.assert_close(a(s, t, T=2.0), b(s, t, T=2.0), rtol=2e-6, atol=0)
    forward, reverse = (f(x, backend=backend if runs(x, backend) else "torch") for x in LOSSES[:2])
    F_, auto = kd.functional, "auto" if backend == "cpp" else backend
    same(f(F_.jsd, beta=0, backend=auto), forward)
    same(f(F_.jsd, beta=1.0, backend=auto), reverse)
    same(f(F_.skew_kl, alpha=0, backend=auto), forward)
    same(f(F_.skew_reverse_kl, alpha=0.0, backend=auto), reverse)
    assert F_.skew_kl(s, t, alpha=1, backend=auto) == 0 and F_.skew_reverse_kl(s, t, alpha=1, backend=auto) == 0
    torch.testing.assert_close(F_.jsd(s, t, backend=auto), F_.jsd(t, s, backend=auto))
    torch.testing.assert_close(F_.jsd(s, t, beta=0.2, backend=auto), F_.jsd(t, s, beta=0.8, backend=auto))
    torch.testing.assert_close(F_.skew_reverse_kl(s, t, backend=auto), F_.skew_kl(t, s, backend=auto))
    torch.testing.assert_close(reverse(s, t), forward(t, s))
    apart = torch.tensor([[50.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 50.0], [0.0, 0.0]])
    torch.testing.assert_close(F_.total_variation(*apart, reduction="none", backend=auto), torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(F_.jsd(*apart, reduction="none", backend=auto), torch.tensor([math.log(2), 0.0]))
    assert 0 < F_.total_variation(s, t, backend=auto) < 1
    entropy = torch.distributions.Categorical(logits=t / 2).entropy().mean() * 4
    same(f(F_.soft_cross_entropy, backend=auto), lambda *a, **k: forward(*a, **k) + entropy)


@backends
@pytest.mark.parametrize("name, option", [("jsd", "beta"), ("skew_kl", "alpha"), ("skew_reverse_kl", "alpha")])
@pytest.mark.parametrize("value", [-0.1, 1.5, NAN, "0.5", True])
def test_the_weight_of_a_mixture_lies_between_0_and_1(backend, name, option, value):
    with pytest.raises(ValueError, match=f"{option} must be a number from 0 to 1, got"):
        getattr(kd.functional, name)(*pair(2, 3), **{option: value}, backend=backend)
    module = {"jsd": kd.JSD, "skew_kl": kd.SkewKL, "skew_reverse_kl": kd.SkewReverseKL}[name]
    with pytest.raises(ValueError, match=option): module(**{option: value})


@backends
def test_torchs_own_spelling(backend):
    s, t = pair(6, 13)
    spelt = F.kl_div((s / 3).log_softmax(-1), (t / 3).log_softmax(-1), reduction="batchmean", log_target=True)
    torch.testing.assert_close(forward_kl(s, t, T=3.0, backend=backend), 9 * spelt)
    torch.testing.assert_close(forward_kl(s, t, T=3.0, t_squared=False, backend=backend), spelt)


@all_losses
@pytest.mark.parametrize("gap", [2.0, 1e-2, 1e-5])
@pytest.mark.parametrize("T", [0.05, 1.0, 100.0])
def test_the_stable_reading_against_fifty_digits(loss, gap, T):
    from mpmath import mp, mpf, exp, log
    t = logits(1, 7, seed=3)
    s = t + gap * logits(1, 7, seed=4)
    kl = lambda a, b: sum(x * log(x / y) for x, y in zip(a, b))
    mix = lambda a, b, w: [w * x + (1 - w) * y for x, y in zip(a, b)]
    with mp.workdps(50):
        q, p = ([exp(mpf(z.item()) / T) for z in row] for row in (s[0], t[0]))
        q, p = ([z / sum(row) for z in row] for row in (q, p))
        a = mpf(loss.mix[0]) if loss.mix else None
        d = [mpf(x.item()) - mpf(y.item()) for x, y in zip(s[0], t[0])]
        exact = {"forward_kl": lambda: kl(p, q), "reverse_kl": lambda: kl(q, p), "skew_kl": lambda: kl(p, mix(p, q, a)),
                 "jsd": lambda: a * kl(p, mix(p, q, a)) + (1 - a) * kl(q, mix(p, q, a)),
                 "skew_reverse_kl": lambda: kl(q, mix(q, p, a)),
                 "total_variation": lambda: sum(abs(x - y) for x, y in zip(p, q)) / 2,
                 "soft_cross_entropy": lambda: -sum(x * log(y) for x, y in zip(p, q)),
                 "logit_mse": lambda: sum((x - a * sum(d) / 7)**2 for x in d)}[loss.name]()
        for dtype, digits in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
            got = loss.read("stable_", s.to(dtype), t.to(dtype), T).item()
            if dtype == torch.float64: assert abs(mpf(got) / exact - 1) < digits
            else: assert got == pytest.approx(loss.read("stable_", s.float().double(), t.float().double(), T).item(), rel=digits)


@cases
@pytest.mark.parametrize("gap", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("T", [0.1, 1.0, 20.0, 100.0])
def test_accurate_where_the_student_has_nearly_converged(loss, backend, gap, T):
    t = logits(8, 100, seed=3, scale=1.0)
    s = t + gap * logits(8, 100, seed=4, scale=1.0)
    want, want_grad = oracle(s, t, T, False, loss, "stable_")
    got, got_grad = value_and_grad(lambda x: loss(x, t, T=T, t_squared=False, reduction="none", backend=backend), s)
    assert ((got.double() - want).abs() / want).max() < 1e-6
    assert (got_grad.double() - want_grad).abs().max() < 2e-6 * want_grad.abs().max()


@cases
def test_an_offset_of_the_logits_changes_nothing(loss, backend):
    s, t = pair(4, 9)
    s, t = s.round(decimals=2), t.round(decimals=2)
    far = loss(s.double() + 1e4, t.double() - 1e4, T=2.0, backend=backend)
    if loss.options == {"center": False}: assert far > 1e8 # the one that sees it
    else: torch.testing.assert_close(far, loss(s.double(), t.double(), T=2.0), rtol=1e-9, atol=0)


@cases
def test_classes_may_be_permuted(loss, backend):
    s, t = pair(4, 9)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(loss(s[:, order], t[:, order], backend=backend), loss(s, t, backend=backend))


@backends
def test_large_T_tends_to_centred_logit_mse(backend):
    s, t = pair(4, 9)
    d = s - t
    want = (d - d.mean(-1, keepdim=True)).square().sum(-1).mean() / (2 * 9)
    torch.testing.assert_close(forward_kl(s, t, T=1e3, backend=backend), want, rtol=1e-2, atol=0)
    torch.testing.assert_close(kd.functional.logit_mse(s, t, center=True) / 18, want)
    torch.testing.assert_close(kd.functional.reverse_kl(s, t, T=1e3), want, rtol=1e-2, atol=0)
    torch.testing.assert_close(kd.functional.jsd(s, t, T=1e3), want / 4, rtol=1e-2, atol=0) # beta (1 - beta)
    torch.testing.assert_close(kd.functional.skew_kl(s, t, T=1e3), .81 * want, rtol=1e-2, atol=0) # (1 - alpha)²


# sizes, layouts

@cases
@pytest.mark.parametrize("C", [1, 2, 7, 16, 17, 252, 507, 1271, 32000])
def test_numbers_of_classes(loss, backend, C):
    s, t = pair(3, C)
    rows, grad = oracle(s, t, 2.0, loss=loss)
    got, got_grad = value_and_grad(lambda x: loss(x, t, T=2.0, reduction="none", backend=backend), s)
    torch.testing.assert_close(got.double(), rows, rtol=1e-6, atol=1e-12)
    assert (got_grad.double() - grad).abs().max() <= 1e-6 * grad.abs().max()


@cases
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (2, 0, 4)])
def test_nothing_is_worth_zero(loss, backend, shape):
    s, t = pair(*shape)
    got, grad = value_and_grad(lambda x: loss(x, t, backend=backend), s)
    assert got == 0 and grad.shape == s.shape


@backends
@dtypes
@pytest.mark.parametrize("layout", ["sliced", "transposed", "strided rows", "expanded", "token axis", "dense"])
def test_layouts(backend, dtype, layout):
    base_s, base_t = pair(6, 8, 10, dtype=dtype)
    view = {"sliced": lambda x: x[0, :, :7], "transposed": lambda x: x[0].t(), "strided rows": lambda x: x[0, ::2],
            "expanded": lambda x: x[:1, :1].expand(4, 3, 10), "token axis": lambda x: x[:, 1:-1],
            "dense": lambda x: x.permute(0, 2, 1)}[layout]
    dim = 1 if layout == "dense" else -1
    s, t = view(base_s), view(base_t)
    plain_s, plain_t = (x.movedim(dim, -1).contiguous() for x in (s, t))
    want, want_grad = value_and_grad(lambda x: forward_kl(x, plain_t, T=2.0, backend=backend), plain_s)
    leaf = s.detach().requires_grad_()
    value = forward_kl(leaf, t, T=2.0, dim=dim, backend=backend)
    grad, = torch.autograd.grad(value, leaf)
    torch.testing.assert_close(value, want)
    torch.testing.assert_close(grad.movedim(dim, -1), want_grad)
    assert grad.shape == s.shape and grad.dtype == dtype
    if backend == "cpp" and layout in ("transposed", "dense"): assert grad.stride() == s.stride()


@backends
def test_one_row_without_a_batch(backend):
    s, t = pair(5)
    torch.testing.assert_close(forward_kl(s, t, backend=backend), forward_kl(s[None], t[None]))


@backends
def test_student_and_teacher_may_differ_in_dtype(backend):
    s, t = pair(4, 9)
    got, grad = value_and_grad(lambda x: forward_kl(x, t.bfloat16(), backend=backend), s)
    want, want_grad = value_and_grad(lambda x: forward_kl(x, t.bfloat16().float(), backend=backend), s)
    assert torch.equal(got, want) and torch.equal(grad, want_grad)
    assert forward_kl(s, t.double(), backend=backend).dtype == torch.float64


# masks, labels, weights, reductions

@cases
@dtypes
def test_masked_rows_are_exactly_zero_even_where_they_hold_nan(loss, backend, dtype):
    s, t = pair(6, 11, dtype=dtype)
    mask = torch.tensor([True, False, True, True, False, True])
    y = torch.tensor([0, 1, -100, 2, 3, 4])
    s[1], t[1], s[2], t[4] = NAN, NAN, INF, NAN
    count = mask & (y != -100)
    rows, grad = oracle(s[count], t[count], 2.0, loss=loss)
    run = lambda reduction: lambda x: loss(x, t, y, T=2.0, mask=mask, reduction=reduction, backend=backend)
    got, got_grad = value_and_grad(run("none"), s)
    assert got[~count].eq(0).all() and got_grad[~count].eq(0).all()
    torch.testing.assert_close(got[count].double(), rows, rtol=1e-6, atol=0)
    torch.testing.assert_close(value_and_grad(run("sum"), s)[0].double(), rows.sum(), rtol=1e-6, atol=0)
    got, got_grad = value_and_grad(run("mean"), s)
    torch.testing.assert_close(got.double(), rows.mean(), rtol=1e-6, atol=0)
    assert got_grad[~count].eq(0).all()
    torch.testing.assert_close(got_grad[count].double(), grad / 3, rtol=2**-7, atol=1e-5)


@cases
def test_all_masked_is_zero_with_a_live_graph(loss, backend):
    s, t = pair(3, 5)
    got, grad = value_and_grad(lambda x: loss(x, t, mask=torch.zeros(3, dtype=torch.bool), backend=backend), s)
    assert got == 0 and grad.eq(0).all()


@cases
def test_row_weight_multiplies_rows_and_not_the_denominator(loss, backend):
    s, t = pair(3, 5)
    w = torch.tensor([2.0, 0.0, 0.5])
    rows, grad = oracle(s, t, 1.0, loss=loss)
    got, got_grad = value_and_grad(lambda x: loss(x, t, row_weight=w, backend=backend), s)
    torch.testing.assert_close(got.double(), (w * rows).sum() / 3)
    torch.testing.assert_close(got_grad.double(), w[:, None] * grad / 3, rtol=1e-5, atol=1e-7)


@backends
@pytest.mark.parametrize("number", [6, 6.0, torch.tensor(6.0), torch.tensor(6)])
def test_micro_batches_with_a_normalizer_are_one_batch(backend, number):
    s, t = pair(6, 5)
    whole, whole_grad = value_and_grad(lambda x: forward_kl(x, t, backend=backend), s)
    parts = [value_and_grad(lambda x: forward_kl(x, t[i:j], normalizer=number, backend=backend), s[i:j]) for i, j in ((0, 2), (2, 6))]
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole)
    torch.testing.assert_close(torch.cat([g for _, g in parts]), whole_grad)


@backends
def test_labels_is_target_by_another_name(backend):
    s, t = pair(4, 5)
    y = torch.tensor([1, -100, 2, 3])
    assert torch.equal(forward_kl(s, t, labels=y, backend=backend), forward_kl(s, t, y, backend=backend))
    assert torch.equal(forward_kl(s, t, y + 10**6, backend=backend), forward_kl(s, t, backend=backend)) # not range-checked
    assert forward_kl(s, t, y, ignore_index=2, backend=backend) == forward_kl(s, t, mask=y != 2, backend=backend)


# hostile values

@backends
@dtypes
def test_excluded_classes(backend, dtype):
    s = torch.tensor([[0., 1., -INF, 2.], [0., 1., -INF, 2.], [0., 1., 3., 2.], [1., -INF, -INF, 0.]], dtype=dtype)
    t = torch.tensor([[1., 0., -INF, 1.], [1., 0., 2., 1.], [1., 0., -INF, 1.], [0., -INF, 1., -INF]], dtype=dtype)
    T = 2.0
    got, grad = value_and_grad(lambda x: forward_kl(x, t, T=T, reduction="none", backend=backend), s)
    three = oracle(s[:1, [0, 1, 3]], t[:1, [0, 1, 3]], T)[0]
    torch.testing.assert_close(got[0].double(), three[0], rtol=1e-6, atol=0) # excluded by both: as if it were absent
    assert grad[0, 2] == 0
    p_s, p_t = ((x.double() / T).softmax(-1) for x in (s, t))
    assert got[1] == INF and got[3] == INF and got[2].isfinite()
    torch.testing.assert_close(grad.double(), T * (p_s - p_t), rtol=2**-7, atol=1e-6) # finite, also where the value is not


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_a_class_that_only_the_student_excludes_is_infinite_also_where_its_probability_underflows(backend, dtype):
    s = torch.tensor([[0., 1., -INF]], dtype=dtype)
    t = torch.tensor([[1e4, 0., -1e4]], dtype=dtype)
    got, grad = value_and_grad(lambda x: forward_kl(x, t, backend=backend), s)
    assert got == INF and grad.isfinite().all() and grad[0, 2] == 0


# Rows: a class excluded by both, by the student only, by the teacher only, and no class in common.
EXCLUDED = {"forward_kl": (0, INF, 0, INF), "soft_cross_entropy": (0, INF, 0, INF), "reverse_kl": (0, 0, INF, INF)}


@pytest.mark.parametrize("loss, backend", [c for c in CASES if c[0].name != "logit_mse"], ids=str)
@dtypes
@pytest.mark.parametrize("C", [4, 400])
def test_the_table_of_excluded_classes(loss, backend, dtype, C):
    s, t = pair(4, C, dtype=dtype)
    s[0, 2] = t[0, 2] = s[1, 2] = t[2, 2] = s[3, 0::2] = t[3, 1::2] = -INF
    T, present = 2.0, torch.arange(C) != 2
    got, grad = value_and_grad(lambda x: loss(x, t, T=T, reduction="none", backend=backend), s)
    kind = EXCLUDED.get(loss.name, (0, 0, 0, 0))
    assert got.isinf().tolist() == [k == INF for k in kind] and not got.isnan().any()
    rounding = dict(rtol=2**-7, atol=1e-6)
    alone, alone_grad = oracle(s[:1, present], t[:1, present], T, loss=loss)
    torch.testing.assert_close(got[:1].double(), alone, rtol=1e-6, atol=0) # excluded by both: as if it were absent
    torch.testing.assert_close(grad[:1, present].double(), alone_grad, **rounding)
    assert grad[0, 2] == 0
    # -inf is the limit of a logit that falls and falls
    low_s, low_t = s.double().clamp(min=-1500.0), t.double().clamp(min=-1500.0)
    rows, want = oracle(low_s, low_t, T, loss=loss, reading="stable_")
    finite = got.isfinite()
    torch.testing.assert_close(got[finite].double(), rows[finite], rtol=1e-6, atol=0)
    if loss.name == "reverse_kl":
        assert grad[2:].isnan().all()
        grad, want = grad[:2], want[:2]
    torch.testing.assert_close(grad.double(), want, **rounding)


@cases
@dtypes
def test_a_spoilt_row_spoils_no_other(loss, backend, dtype):
    s, t = pair(6, 20, dtype=dtype)
    clean, clean_grad = value_and_grad(lambda x: loss(x, t, reduction="none", backend=backend), s)
    bad = s.clone()
    bad_t = t.clone()
    bad[1, 3], bad[2, 0], bad_t[3, 7], bad[4], bad_t[5] = NAN, INF, NAN, -INF, -INF
    got, grad = value_and_grad(lambda x: loss(x, bad_t, reduction="none", backend=backend), bad)
    if loss.has_T: assert got[1:].isnan().all() and grad[1:].isnan().all()
    else: assert not got[1:].isfinite().any() and not grad[1:].isfinite().all(-1).any() # a difference may be infinite
    assert torch.equal(got[0], clean[0]) and torch.equal(grad[0], clean_grad[0])


@cases
@pytest.mark.parametrize("T", [0.05, 1.0, 100.0])
def test_extreme_logits(loss, backend, T):
    s = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 5.0], [1e4, 1e4, 1e4], [1e-40, 0.0, -1e-40]])
    t = torch.tensor([[1e4, 0.0, -1e4], [1e4, -1e4, 5.0], [0.0, 0.0, 0.0], [0.0, 1e-40, 0.0]])
    if loss.name == "total_variation" and backend == "cpp": s, t = s[:3], t[:3] # the sign of a subnormal, which the kernel takes as 0
    rows, grad = oracle(s, t, T, loss=loss, reading="stable_")
    got, got_grad = value_and_grad(lambda x: loss(x, t, T=T, reduction="none", backend=backend), s)
    torch.testing.assert_close(got.double(), rows, rtol=1e-6, atol=1e-30)
    assert ((got_grad.double() - grad).abs().amax(-1) <= 1e-6 * grad.abs().amax(-1) + 1e-13 * rows.abs() + 1e-37).all()


# autograd

@cases
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_gradcheck_and_gradgradcheck(loss, backend, reduction):
    s, t = pair(3, 4, dtype=torch.float64)
    s[2] = t[2] + 0.02 * s[2] # near the teacher
    s.requires_grad_()
    y, mask = torch.tensor([0, -100, 2]), torch.tensor([True, True, True])
    f = lambda x: loss(x, t, y, T=2.0, mask=mask, reduction=reduction, backend=backend)
    assert torch.autograd.gradcheck(f, s) and torch.autograd.gradgradcheck(f, s)


@cases
@dtypes
def test_backward_twice_and_incoming_gradients(loss, backend, dtype):
    s, t = pair(5, 6, dtype=dtype)
    leaf = s.requires_grad_()
    value = loss(leaf, t, T=2.0, reduction="none", backend=backend)
    g = torch.tensor([1.0, -2.0, 0.0, 3.0, 0.5], dtype=value.dtype)
    first, = torch.autograd.grad(value, leaf, g, retain_graph=True)
    again, = torch.autograd.grad(value, leaf, g)
    torch.testing.assert_close(first, again, rtol=2**-7, atol=1e-6)
    _, rows_grad = oracle(s.detach(), t, 2.0, loss=loss)
    torch.testing.assert_close(first.double(), g.double()[:, None] * rows_grad, rtol=2**-7, atol=1e-5)


@backends
def test_float16_gradient_survives_a_grad_scaler(backend):
    s, t = pair(2048, 10, dtype=torch.float16)
    leaf = s.requires_grad_()
    (forward_kl(leaf, t, T=4.0, backend=backend) * 2.0**16).backward()
    grad = oracle(s.detach(), t, 4.0)[1] / 2048 * 2.0**16
    assert (leaf.grad.double() - grad).abs().max() <= 2**-11 * grad.abs().max()


@cases
def test_the_teacher_gets_a_gradient_only_when_asked(loss, backend):
    s, t = pair(3, 4)
    s.requires_grad_(), t.requires_grad_()
    loss(s, t, backend=backend).backward()
    assert t.grad is None
    loss(s, t, detach_teacher=False).backward()
    assert t.grad.abs().max() > 0
    if backend == "cpp":
        with pytest.raises(ValueError, match="detach_teacher"): loss(s, t, detach_teacher=False, backend="cpp")


@backends
def test_no_grad_gives_no_graph(backend):
    s, t = pair(3, 4)
    with torch.no_grad(): assert not forward_kl(s.requires_grad_(), t, backend=backend).requires_grad


@all_losses
def test_functorch_and_forward_mode_take_the_reference(loss):
    s, t = pair(5, 4)
    each = torch.func.vmap(lambda a, b: loss(a[None], b[None], T=2.0))(s, t)
    torch.testing.assert_close(each, loss(s, t, T=2.0, reduction="none"))
    grad = torch.func.grad(lambda x: loss(x, t, T=2.0))(s)
    torch.testing.assert_close(grad, value_and_grad(lambda x: loss(x, t, T=2.0), s)[1])
    v = logits(5, 4, seed=9)
    _, tangent = torch.func.jvp(lambda x: loss(x, t, T=2.0), (s,), (v,))
    torch.testing.assert_close(tangent, (grad * v).sum())


def test_a_learnable_temperature_gets_its_gradient():
    s, t = pair(5, 4, dtype=torch.float64)
    T = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    for loss in LOSSES[:10]: assert torch.autograd.gradcheck(lambda T: loss(s, t, T=T), T)


@backends
def test_autocast_is_switched_off_inside(backend):
    s, t = pair(5, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = forward_kl(s, t, T=2.0, backend=backend)
    assert got.dtype == torch.float32 and torch.equal(got, forward_kl(s, t, T=2.0, backend=backend))


@pytest.mark.skipif(ops._C is None, reason="the compiled core is not built")
def test_the_same_bits_from_one_and_two_threads():
    s, t = pair(1000, 1271)
    y = torch.randint(1271, (1000,), generator=torch.Generator().manual_seed(0))
    objective = 0.1 * kd.CrossEntropy() + 0.9 * kd.SoftKL()
    results = []
    for n in (1, 2, 1):
        torch.set_num_threads(n)
        results.append(value_and_grad(lambda x: objective(x, t, y), s))
    torch.set_num_threads(1)
    for value, grad in results[1:]: assert torch.equal(value, results[0][0]) and torch.equal(grad, results[0][1])


# compile, export, operators

@pytest.fixture(scope="module")
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("soft, reduction", [(kd.SoftKL, "mean"), (kd.SoftKL, "none"), (kd.JSD, "mean"), (kd.ReverseKL, "mean"),
                                            (kd.LogitMSE, "mean")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_compile_without_graph_breaks(fresh_compiler, dtype, soft, reduction):
    torch._dynamo.reset() # each case is a first compilation, not one more of the same function
    s, t = pair(6, 9, dtype=dtype)
    y, mask = torch.tensor([0, 1, -100, 2, 3, 4]), torch.tensor([True] * 5 + [False])
    loss = 0.1 * kd.CrossEntropy(reduction=reduction) + 0.9 * soft(reduction=reduction)
    f = lambda x: 2 * loss(x, t, y, mask=mask)
    want, want_grad = value_and_grad(f, s)
    got, grad = value_and_grad(torch.compile(f, fullgraph=True), s)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(grad, want_grad, rtol=2**-10, atol=1e-5)


def test_a_schedule_does_not_recompile(fresh_compiler):
    s, t = pair(6, 9)
    y = torch.arange(6)
    loss = 0.1 * kd.CrossEntropy() + 0.9 * kd.SoftKL()
    soft = loss.losses[1]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    frames = []
    for T, w in ((4.0, 0.9), (3.0, 0.8), (2.0, 0.7), (1.5, 0.6)):
        soft.T, loss.weights = T, (1 - w, w)
        torch.testing.assert_close(compiled(s, t, y), loss(s, t, y))
        frames.append(counter.frame_count)
    assert frames == frames[:1] * 4


@pytest.mark.skipif(ops._C is None, reason="the compiled core is not built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_opcheck(dtype):
    s, t = pair(4, 5, dtype=dtype)
    number = lambda x: torch.tensor(x, dtype=torch.float64)
    args = (s.requires_grad_(), t, torch.tensor([0, 1, -100, 2]), torch.tensor([True, False, True, True]), None, number(2.0),
            number(0.9), number(0.1), None, True, -100, "mean", True, True, dtype != torch.float16)
    torch.library.opcheck(ops.soft_kl_op, args)
    back = (torch.tensor(1.0), *args[:-1])
    torch.library.opcheck(ops.soft_kl_backward_op, (back[0], s.detach(), *back[2:]))


@pytest.mark.skipif(ops._C is None, reason="the compiled core is not built")
def test_a_compiled_loss_runs_the_kernel(fresh_compiler):
    targets = []

    def look(graph, _):
        targets.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    torch.compile(kd.SoftKL(), backend=look, fullgraph=True)(*pair(3, 4))
    assert any("kdlab.soft_kl" in t for t in targets) and not any("softmax" in t for t in targets)


def test_export(fresh_compiler):
    s, t = pair(4, 5)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.loss = kd.SoftKL()

        def forward(self, s, t): return self.loss(s, t)

    program = torch.export.export(Model(), (s, t))
    torch.testing.assert_close(program.module()(s, t), kd.SoftKL()(s, t))


def test_a_bad_label_is_nan_under_compile(fresh_compiler):
    s, t = pair(3, 4)
    y = torch.tensor([0, 7, 1])
    loss = kd.CrossEntropy(reduction="none")
    got, grad = value_and_grad(torch.compile(lambda x: loss(x, None, y), fullgraph=True), s)
    assert got[1].isnan() and got[[0, 2]].isfinite().all() and grad[1].isnan().all() and grad[[0, 2]].isfinite().all()


def test_without_the_core_everything_runs_on_plain_torch(fresh_compiler, monkeypatch):
    monkeypatch.setattr(ops, "_C", None)
    s, t = pair(3, 4)
    y = torch.tensor([0, 7, -100])
    objective = 0.1 * kd.CrossEntropy(reduction="none") + 0.9 * kd.SoftKL(reduction="none")
    want, want_grad = value_and_grad(lambda x: objective(x, t, y.clamp(max=3)), s)
    got, grad = value_and_grad(torch.compile(lambda x: objective(x, t, y), fullgraph=True, backend="aot_eager"), s)
    torch.testing.assert_close((got[0], grad[0]), (want[0], want_grad[0]))
    assert got[1].isnan() and grad[1].isnan().all() and got[2] == 0 and grad[2].eq(0).all()
    with pytest.raises(ValueError, match="not built"): forward_kl(s, t, backend="cpp")


def run_with(backend, code):
    "Run Python in a process where KDLAB_BACKEND is set; what it prints, or the end of its error."
    code = "import torch, kdlab as kd\nfrom kdlab import ops\ns, t = torch.zeros(2, 3, requires_grad=True), torch.ones(2, 3)\n" + code
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"KDLAB_BACKEND": backend}, capture_output=True, text=True)
    return (done.stdout or done.stderr).strip().splitlines()[-1]


def test_the_environment_chooses_what_auto_means():
    look = "print(type(kd.functional.forward_kl(s, t).grad_fn).__name__, type(kd.functional.hint(s, t).grad_fn).__name__)"
    kernels = run_with("", look)
    assert run_with("auto", look) == kernels == run_with("cpp", look) and ("KL" in kernels) == (ops._C is not None)
    assert "KL" not in run_with("torch", look) and run_with("torch", look) != kernels
    explicit = "print(ops.choose('cpp', s, t, None, ops.Question()))"
    if ops._C is not None: assert run_with("torch", explicit) == "cpp"
    assert "backend='cuda' cannot run here" in run_with("cuda", look)
    assert "cannot run here" in run_with("cpp", "kd.functional.forward_kl(s, t, T=torch.tensor(2., requires_grad=True))")
    assert run_with("gpu", look) == "ValueError: the environment variable KDLAB_BACKEND must be auto, torch, cpp or cuda, got 'gpu'"


# modules and weights

@all_losses
def test_function_and_module_share_options_and_defaults(loss):
    function = {k: p.default for k, p in inspect.signature(getattr(kd.functional, loss.name)).parameters.items()}
    for module, other in ((loss.module.func, {}), *([(kd.SoftKL, {"T": 4.0})] if loss is FORWARD else [])):
        init = {k: p.default for k, p in inspect.signature(module.__init__).parameters.items() if k != "self"}
        call = {k: p.default for k, p in inspect.signature(module.forward).parameters.items() if k != "self"}
        assert not set(init) & set(call) and set(init) | set(call) == set(function)
        assert {**init, **call} == {**function, **other}


@backends
def test_cross_entropy(backend):
    s, t = pair(6, 9)
    y = torch.tensor([0, 1, -100, 2, 3, 8])
    loss = kd.CrossEntropy(backend=backend)
    got, grad = value_and_grad(lambda x: loss(x, None, y), s)
    want, want_grad = value_and_grad(lambda x: F.cross_entropy(x, y), s)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(grad, want_grad, rtol=1e-5, atol=1e-8)
    assert torch.equal(loss(s, t, y), loss(s, None, y))


@cases
@dtypes
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_objective_in_one_sweep_is_the_sum_of_its_terms(loss, backend, dtype, reduction):
    s, t = pair(6, 9, dtype=dtype)
    y = torch.tensor([0, 1, -100, 2, 3, 8])
    mask = torch.tensor([True, True, True, False, True, True])
    options = dict(reduction=reduction, backend=backend)
    soft, hard = loss.module(**options, **({"T": 3} if loss.has_T else {})), kd.CrossEntropy(**options)
    objective = 0.3 * hard + 1.7 * soft
    assert len(_groups(objective)) == 1
    got, grad = value_and_grad(lambda x: objective(x, t, y, mask=mask), s)
    want, want_grad = value_and_grad(lambda x: 0.3 * hard(x, None, y, mask=mask) + 1.7 * soft(x, t, y, mask=mask), s)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad, want_grad, rtol=2**-6, atol=1e-4 if dtype in (torch.float32, torch.float64) else 2e-2)
    by_function = loss(s, t, y, T=3.0, mask=mask, **options)
    torch.testing.assert_close(soft(s, t, y, mask=mask), by_function, rtol=0, atol=0)


@cases
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_parts_add_up(loss, backend, reduction):
    s, t = pair(6, 9)
    y = torch.tensor([0, 1, -100, 2, 3, 8])
    objective = 0.3 * kd.CrossEntropy(reduction=reduction, backend=backend) + 1.7 * loss.module(reduction=reduction, backend=backend)
    parts = objective.parts(s.requires_grad_(), t, y)
    assert set(parts) == {"cross_entropy", loss.name} and not any(p.rows.requires_grad for p in parts.values())
    total = sum(p.weight * p.rows for p in parts.values())
    assert total[2] == 0
    torch.testing.assert_close(total.sum() / (5 if reduction == "mean" else 1), objective(s, t, y).detach())
    torch.testing.assert_close(parts[loss.name].rows[0].double(), oracle(s[:1].detach(), t[:1], 1.0, loss=loss)[0][0], rtol=1e-6, atol=0)


def test_equations():
    assert kd.SoftKL().equation() == "4²·KL(softmax(teacher/4) ‖ softmax(student/4))"
    assert kd.ReverseKL().equation() == "KL(softmax(student/1) ‖ softmax(teacher/1))"
    assert kd.SkewReverseKL(alpha=0.2).equation() == "KL(softmax(student/1) ‖ 0.2·softmax(student/1) + 0.8·softmax(teacher/1))"
    jsd = "(0.3·KL(softmax(teacher/1) ‖ M) + 0.7·KL(softmax(student/1) ‖ M)), M = 0.3·softmax(teacher/1) + 0.7·softmax(student/1)"
    assert kd.JSD(beta=0.3).equation() == jsd and repr(kd.JSD(T=2, beta=0.3)) == "JSD(beta=0.3, T=2)"
    assert repr(0.5 * kd.LogitMSE(center=True)) == "0.5·LogitMSE(center=True)"


def test_weights_are_operators():
    ce, kl = kd.CrossEntropy(), kd.SoftKL()
    objective = 2 * (0.5 * ce + kl / 4) - kl
    assert objective.weights == (1.0, 0.5, -1.0) and objective.losses[0] is ce
    assert sum([ce, kl]).weights == (1.0, 1.0) and (-kl).weights == (-1.0,)
    assert repr(0.1 * ce + 0.9 * kd.SoftKL(T=2)) == "0.1·CrossEntropy() + 0.9·SoftKL(T=2)"
    for wrong in ("a", None, torch.ones(2)):
        with pytest.raises((TypeError, ValueError, RuntimeError)): wrong * kl
    with pytest.raises(ValueError, match="finite"): NAN * kl
    with pytest.raises(TypeError): kl + 1


def test_a_term_of_weight_zero_is_not_computed():
    s, _ = pair(3, 4)
    y = torch.arange(3)
    assert (0 * kd.SoftKL() + kd.CrossEntropy())(s, None, y) == kd.CrossEntropy()(s, None, y) # no teacher needed
    value = (0 * kd.SoftKL())(s.requires_grad_(), None)
    value.backward()
    assert value == 0 and s.grad.eq(0).all()


def test_losses_copy_and_pickle():
    s, t = pair(3, 4)
    y = torch.arange(3)
    objective = 0.1 * kd.CrossEntropy() + 0.9 * kd.SoftKL(T=3)
    for twin in (copy.deepcopy(objective), pickle.loads(pickle.dumps(objective))):
        assert torch.equal(twin(s, t, y), objective(s, t, y))
        twin.losses[1].T = 1
        assert objective.losses[1].T == 3
    assert objective.state_dict() == {} and torch.equal(objective.half()(s, t, y), objective(s, t, y))


# bad input

@pytest.mark.parametrize("call, error, words", [
    (lambda s, t: forward_kl(s, t[:, :3]), ValueError, r"student \(4, 5\) and teacher \(4, 3\).*vocabular"),
    (lambda s, t: forward_kl(s, t[:2]), ValueError, r"student \(4, 5\) and teacher \(2, 5\)"),
    (lambda s, t: forward_kl(s.long(), t), TypeError, "student must hold floating-point logits"),
    (lambda s, t: forward_kl(s, (t, t)), TypeError, r"teacher must be a tensor of logits, got tuple.*\[0\]"),
    (lambda s, t: forward_kl(s, t, T=0), ValueError, "T must be a number > 0, got 0"),
    (lambda s, t: forward_kl(s, t, T=-1.0), ValueError, "T must be a number > 0"),
    (lambda s, t: forward_kl(s, t, T=NAN), ValueError, "T must be a number > 0"),
    (lambda s, t: forward_kl(s, t, T="4"), ValueError, "T must be a number > 0"),
    (lambda s, t: kd.SoftKL(T=0), ValueError, "T must be a number > 0"),
    (lambda s, t: forward_kl(s, t, backend="triton"), ValueError, "backend must be.*triton"),
    (lambda s, t: kd.SoftKL(backend="triton"), ValueError, "backend must be.*triton"),
    (lambda s, t: forward_kl(s, t, backend="cuda"), ValueError, "cuda"),
    (lambda s, t: forward_kl(s, t, reduction="batchmean"), ValueError, "reduction must be.*batchmean"),
    (lambda s, t: forward_kl(s, t, reduction="sum", normalizer=3), ValueError, "normalizer"),
    (lambda s, t: forward_kl(s, t, normalizer=0), ValueError, "normalizer must be > 0"),
    (lambda s, t: forward_kl(s, t, mask=torch.ones(4)), TypeError, "mask must be bool"),
    (lambda s, t: forward_kl(s, t, mask=torch.ones(5, dtype=torch.bool)), ValueError, r"mask must have the shape.*\(4,\)"),
    (lambda s, t: forward_kl(s, t, torch.zeros(4)), TypeError, "target must be integer"),
    (lambda s, t: forward_kl(s, t, torch.zeros(4, 1).long()), ValueError, "target must have the shape"),
    (lambda s, t: forward_kl(s, t, torch.zeros(4).long(), labels=torch.zeros(4).long()), ValueError, "two names"),
    (lambda s, t: forward_kl(s, t, row_weight=torch.ones(4).long()), TypeError, "row_weight must be float"),
    (lambda s, t: forward_kl(s, t, dim=2), ValueError, "dim=2"),
    (lambda s, t: forward_kl(s.sum(), t.sum()), ValueError, "class dimension"),
    (lambda s, t: forward_kl(s, t, temperature=2), TypeError, "temperature"),
    (lambda s, t: kd.CrossEntropy()(s, None), ValueError, "needs labels"),
    (lambda s, t: kd.SoftKL()(s, None), TypeError, "teacher"),
])
def test_bad_arguments_are_named(call, error, words):
    with pytest.raises(error, match=words): call(*pair(4, 5))


@backends
@pytest.mark.parametrize("label", [5, -1, 2**40])
def test_a_label_out_of_range_raises(backend, label):
    s, t = pair(4, 5)
    y = torch.tensor([0, -100, label, 1])
    for loss in (kd.CrossEntropy(backend=backend), kd.CrossEntropy(backend=backend) + kd.SoftKL(backend=backend)):
        for grad in (True, False):
            with pytest.raises(ValueError, match=f"label {label} at row 2.*5 classes"): loss(s.detach().requires_grad_(grad), t, y)
    masked = torch.tensor([True, True, False, True])
    assert kd.CrossEntropy(backend=backend)(s, None, y, mask=masked).isfinite() # a masked row's label is not looked at
