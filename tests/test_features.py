"""The losses on features: values against numpy, gradients against the float64 definitions, and the public contract."""
import copy
import inspect
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import kdlab as kd
from kdlab import feature_ops, ops
from kdlab import feature_reference as reference
from kdlab.functional import attention_transfer, channel_kl, cosine, hint
from kdlab.reference import stable_forward_kl

BACKENDS = ["torch"] + (["cpp"] if ops._C is not None else [])
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 1e-6, torch.float64: 5e-12, torch.bfloat16: 2**-8, torch.float16: 2**-11}
ISAS = ops._C.info()["isas"] if ops._C is not None else []
INF, NAN = math.inf, math.nan

backends = pytest.mark.parametrize("backend", BACKENDS)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).split(".")[1])
needs_core = pytest.mark.skipif(ops._C is None, reason="the compiled core is not built")


def features(*shape, seed=0, dtype=torch.float32, scale=1.0):
    gen = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=gen, dtype=torch.float64) + 0.2).to(dtype)


def value_and_grad(f, student):
    student = student.detach().requires_grad_()
    value = f(student)
    return value.detach(), torch.autograd.grad(value.sum(), student)[0]


def definition_hint(s, t): return reference.hint(s.flatten(1), t.flatten(1))
def definition_direction(s, t): return reference.hint(s.flatten(1), t.flatten(1), normalize=True)
def direction(*args, **options): return hint(*args, normalize=True, **options)
def definition_channel_kl(s, t): return 16 * reference.channel_kl(s.flatten(2), t.flatten(2), 4.0).mean(1)
def stable_channel_kl(s, t): return 16 * stable_forward_kl(s.flatten(2), t.flatten(2), 4.0).mean(1)
def sample_channel_kl(s, t, reduction="mean", **options):
    value = channel_kl(s, t, reduction=reduction, **options)
    return value.mean(1) if reduction == "none" else value / (s.shape[1] if reduction == "sum" else 1)


# name: (function, definition by sample, student shape, teacher shape, is the scale divided out?)
CASES = {
    "hint": (hint, definition_hint, (5, 3, 4, 6), (5, 3, 4, 6)),
    "normalised hint": (direction, definition_direction, (5, 3, 4, 6), (5, 3, 4, 6)),
    "cosine": (cosine, reference.cosine, (5, 37), (5, 37)),
    "attention": (attention_transfer, reference.attention_transfer, (5, 3, 4, 6), (5, 7, 4, 6)),
    "attention, larger student": (attention_transfer, reference.attention_transfer, (5, 3, 7, 10), (5, 4, 3, 4)),
    "attention, larger teacher": (attention_transfer, reference.attention_transfer, (5, 6, 3, 4), (5, 3, 6, 9)),
    "attention, higher and wider": (attention_transfer, reference.attention_transfer, (5, 2, 3, 8), (5, 3, 5, 4)),
    "channel_kl": (sample_channel_kl, definition_channel_kl, (5, 3, 4, 6), (5, 3, 4, 6)),
}
cases = pytest.mark.parametrize("case", CASES)


def pair(case, dtype=torch.float32):
    return features(*CASES[case][2], seed=1, dtype=dtype), features(*CASES[case][3], seed=2, dtype=dtype)


def grad_error(got, want):
    return ((got.double() - want).abs().max() / want.abs().max()).item()


# values

def test_values_in_numpy():
    s, t = features(4, 3, 5, 6, seed=1, dtype=torch.float64), features(4, 2, 5, 6, seed=2, dtype=torch.float64)
    u = features(4, 3, 5, 6, seed=3, dtype=torch.float64)
    a, b, c = s.numpy(), t.numpy(), u.numpy()
    length = lambda x: np.sqrt((x**2).sum(-1, keepdims=True))
    flat = lambda x: x.reshape(len(x), -1)
    assert hint(s, u).item() == pytest.approx(((a - c)**2).mean())
    x, y = flat(a) / length(flat(a)), flat(c) / length(flat(c))
    assert hint(s, u, normalize=True).item() == pytest.approx(((x - y)**2).mean())
    assert cosine(s.flatten(1), u.flatten(1)).item() == pytest.approx((1 - (x * y).sum(-1)).mean())
    p, q = (flat((z**2).mean(1)) for z in (a, b))
    assert attention_transfer(s, t).item() == pytest.approx(((p / length(p) - q / length(q))**2).mean())
    p, q = (np.exp(z.reshape(4, 3, -1) / 4) for z in (c, a))
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    assert channel_kl(s, u).item() == pytest.approx(16 * (p * np.log(p / q)).sum(-1).mean())


@backends
@dtypes
@cases
def test_value_and_gradient_are_those_of_the_definition(backend, dtype, case):
    f, definition, *_ = CASES[case]
    s, t = pair(case, dtype)
    rows, grad = value_and_grad(lambda x: definition(x, t.double()), s.double())
    for reduction, want, scale in (("none", rows, 1), ("sum", rows.sum(), 1), ("mean", rows.mean(), len(s))):
        got, got_grad = value_and_grad(lambda x: f(x, t, reduction=reduction, backend=backend), s)
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and got_grad.dtype == dtype
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)
        assert grad_error(got_grad, grad / scale) <= ROUNDING[dtype] + 1e-5 * (dtype == torch.float16)


@pytest.mark.parametrize("isa", ISAS)
@cases
def test_every_instruction_set(isa, case):
    f, definition, *_ = CASES[case]
    before = ops._C.info()["isa"]
    ops._C.set_isa(isa)
    try:
        for dtype in DTYPES:
            s, t = pair(case, dtype)
            rows, grad = value_and_grad(lambda x: definition(x, t.double()), s.double())
            got, got_grad = value_and_grad(lambda x: f(x, t, reduction="none", backend="cpp"), s)
            torch.testing.assert_close(got.double(), rows, rtol=2e-6, atol=0)
            assert grad_error(got_grad, grad) <= 2 * ROUNDING[dtype] + 1e-5 * (dtype == torch.float16)
    finally: ops._C.set_isa(before)


@backends
@pytest.mark.parametrize("n", [1, 2, 7, 16, 31, 64, 1271, 40000])
def test_sizes(backend, n):
    for f, definition in ((hint, definition_hint), (direction, definition_direction), (cosine, reference.cosine)):
        s, t = features(3, n, seed=1), features(3, n, seed=2)
        rows, grad = value_and_grad(lambda x: definition(x, t.double()), s.double())
        got, got_grad = value_and_grad(lambda x: f(x, t, reduction="none", backend=backend), s)
        torch.testing.assert_close(got.double(), rows, rtol=1e-6, atol=1e-12)
        if n > 1 or f is hint: assert grad_error(got_grad, grad) <= 2e-6 # one number has no direction to change


@backends
@pytest.mark.parametrize("times", [1e-4, 0.3, 1.0, 3.0, 1e4])
@pytest.mark.parametrize("f, definition", [(direction, definition_direction), (cosine, reference.cosine)])
def test_lengths_may_differ(backend, times, f, definition):
    s, t = features(6, 300, seed=1), times * features(6, 300, seed=2)
    rows, grad = value_and_grad(lambda x: definition(x, t.double()), s.double())
    got, got_grad = value_and_grad(lambda x: f(x, t, reduction="none", backend=backend), s)
    torch.testing.assert_close(got.double(), rows, rtol=1e-6, atol=0)
    assert grad_error(got_grad, grad) <= 1e-6
    t[:, :256] *= 1e-3 # the first elements do not tell the length
    rows, grad = value_and_grad(lambda x: definition(x, t.double()), s.double())
    got, got_grad = value_and_grad(lambda x: f(x, t, reduction="none", backend=backend), s)
    torch.testing.assert_close(got.double(), rows, rtol=1e-6, atol=0)
    assert grad_error(got_grad, grad) <= 1e-6


@backends
@pytest.mark.parametrize("channels, pixels", [(1, 1), (5, 3), (64, 49), (9, 1025)])
def test_sizes_of_maps(backend, channels, pixels):
    s, t = features(2, channels, pixels, 1, seed=1), features(2, channels + 2, pixels, 1, seed=2)
    rows, grad = value_and_grad(lambda x: reference.attention_transfer(x, t.double()), s.double())
    got, got_grad = value_and_grad(lambda x: attention_transfer(x, t, reduction="none", backend=backend), s)
    torch.testing.assert_close(got.double(), rows, rtol=1e-6, atol=1e-12)
    assert (got_grad.double() - grad).abs().max() <= 1e-6 * max(grad.abs().max(), 1e-3)


@backends
@pytest.mark.parametrize("gap", [1e-2, 1e-4])
@pytest.mark.parametrize("case", ["hint", "normalised hint", "cosine", "attention", "channel_kl"])
def test_accurate_where_the_student_has_nearly_converged(backend, gap, case):
    f, definition, shape, _ = CASES[case]
    shape = shape if len(shape) == 2 else (5, 3, 8, 8)
    t = features(*shape, seed=2)
    s = t + gap * features(*shape, seed=1)
    stable = {"cosine": reference.stable_cosine, "channel_kl": stable_channel_kl}.get(case, definition)
    rows, grad = value_and_grad(lambda x: stable(x, t.double()), s.double())
    got, got_grad = value_and_grad(lambda x: f(x, t, reduction="none", backend=backend), s)
    tolerance = 1e-6 if case != "attention" else 1e-7 / gap # two maps cannot be subtracted before they are made
    torch.testing.assert_close(got.double(), rows, rtol=max(tolerance, 1e-6), atol=0)
    assert grad_error(got_grad, grad) <= max(tolerance, 2e-6)


@backends
def test_they_are_not_the_usual_mistakes(backend):
    s, t = features(4, 3, 5, 6, seed=1), features(4, 3, 5, 6, seed=2)
    d = s - t
    assert hint(s, t, backend=backend).item() == pytest.approx(d.square().mean().item(), rel=1e-6)
    per_channel = hint(F.normalize(s), F.normalize(t), backend=backend)
    sampled = hint(s, t, normalize=True, backend=backend)
    assert abs(per_channel - sampled) > 0.01 * sampled # each pixel normalised over channels instead of the sample
    right = attention_transfer(s, t, backend=backend)
    absolute, unnormalised = ([m(s), m(t)] for m in (lambda x: F.normalize(x.abs().mean(1).flatten(1)),
                                                     lambda x: x.square().mean(1).flatten(1)))
    for a, b in (absolute, unnormalised): assert abs((a - b).square().mean() - right) > 0.01 * right
    right = channel_kl(s, t, backend=backend)
    over_channels = kd.functional.forward_kl(s, t, T=4.0, dim=1)
    swapped, no_square = channel_kl(t, s, backend=backend), right / 16
    for wrong in (over_channels, swapped, no_square): assert abs(wrong - right) > 1e-3 * right
    a, b = s.flatten(1), t.flatten(1)
    assert abs(cosine(a, b, backend=backend) - (1 - F.cosine_similarity(a, b, dim=0).mean())) > 0.01


@backends
def test_invariances(backend):
    s, t = features(4, 3, 5, 6, seed=1), features(4, 3, 5, 6, seed=2)
    turn, _ = torch.linalg.qr(features(90, 90, seed=3, dtype=torch.float64))
    flip = torch.randperm(3, generator=torch.Generator().manual_seed(0))
    each = torch.tensor([0.01, 1.0, 3.0, 500.0]).view(4, 1, 1, 1)
    a, b = s.double().flatten(1), t.double().flatten(1)
    for f in (hint, direction, cosine): # a rotation of both
        torch.testing.assert_close(f(a @ turn, b @ turn, backend=backend), f(a, b, backend=backend))
    for f in (direction, attention_transfer): # a scale for each sample
        torch.testing.assert_close(f(each * s, t, backend=backend), f(s, t, backend=backend))
        torch.testing.assert_close(f(s, each * t, backend=backend), f(s, t, backend=backend))
    torch.testing.assert_close(cosine(3 * a, -2 * -b, backend=backend), cosine(a, b, backend=backend))
    torch.testing.assert_close(attention_transfer(-s[:, flip], t, backend=backend), attention_transfer(s, t, backend=backend))
    torch.testing.assert_close(channel_kl(s + each, t - each, backend=backend), channel_kl(s, t, backend=backend), rtol=1e-3, atol=0)
    torch.testing.assert_close(2 * cosine(a, b) / 90, hint(a, b, normalize=True)) # the gap is 2 (1 - cos)


# shapes, masks, layouts

@backends
def test_tokens_are_samples_of_hint_and_cosine(backend):
    s, t = features(2, 5, 8, seed=1), features(2, 5, 8, seed=2)
    mask = torch.tensor([[True, True, False, True, False], [True, False, True, True, True]])
    for f in (hint, direction, cosine):
        rows = f(s.flatten(0, 1), t.flatten(0, 1), reduction="none", backend=backend).view(2, 5)
        torch.testing.assert_close(f(s, t, reduction="none", backend=backend), rows)
        torch.testing.assert_close(f(s, t, backend=backend), rows.mean())
        torch.testing.assert_close(f(s, t, mask=mask, backend=backend), rows[mask].mean())
        one = torch.tensor([False, True])
        torch.testing.assert_close(f(s, t, mask=one, reduction="none", backend=backend), rows * one[:, None])


def test_tokens_are_the_pixels_of_attention_and_channel_kl():
    s, t = features(2, 6, 8, seed=1), features(2, 6, 8, seed=2)
    image = lambda x: x.transpose(1, 2).unflatten(2, (2, 3))
    torch.testing.assert_close(attention_transfer(s, t), attention_transfer(image(s), image(t)))
    torch.testing.assert_close(channel_kl(s, t), channel_kl(image(s), image(t)))
    mask = torch.tensor([[True] * 6, [True, True, True, True, False, False]])
    torch.testing.assert_close(attention_transfer(s, t, mask=mask[:, :1].flatten()), attention_transfer(s, t))
    whole, short = (attention_transfer(s[i:i + 1, :n], t[i:i + 1, :n]) for i, n in ((0, 6), (1, 4)))
    s[1, 4:], t[1, 5] = NAN, INF
    torch.testing.assert_close(attention_transfer(s, t, mask=mask), (6 * whole + 4 * short) / 10) # every entry counts alike
    torch.testing.assert_close(attention_transfer(s, t, mask=mask, reduction="none"), torch.stack([whole, short]))
    got, grad = value_and_grad(lambda x: channel_kl(x, t, mask=mask), s)
    rows = torch.cat([channel_kl(s[i:i + 1, :n], t[i:i + 1, :n], reduction="none") for i, n in ((0, 6), (1, 4))])
    torch.testing.assert_close(got, rows.mean())
    assert grad[1, 4:].eq(0).all() and grad.isfinite().all()
    empty = torch.tensor([[True] * 6, [False] * 6])
    for f in (attention_transfer, channel_kl):
        got, grad = value_and_grad(lambda x: f(x, t, mask=empty), s)
        torch.testing.assert_close(got, f(s[:1], t[:1]))
        assert grad[1].eq(0).all()


@backends
@dtypes
@cases
def test_masked_samples_are_exactly_zero_even_where_they_hold_nan(backend, dtype, case):
    f = CASES[case][0]
    s, t = pair(case, dtype)
    mask = torch.tensor([True, False, True, False, True])
    want, want_grad = value_and_grad(lambda x: f(x, t[mask], backend=backend), s[mask])
    s[1], t[3] = NAN, INF
    got, grad = value_and_grad(lambda x: f(x, t, mask=mask, backend=backend), s)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(grad[mask], want_grad)
    assert grad[~mask].eq(0).all()
    assert f(s, t, mask=mask, reduction="none", backend=backend)[~mask].eq(0).all()
    got, grad = value_and_grad(lambda x: f(x, t, mask=torch.zeros(5, dtype=torch.bool), backend=backend), s)
    assert got == 0 and grad.eq(0).all()


@backends
@cases
def test_no_samples_one_sample_and_zeros(backend, case):
    f, definition, *_ = CASES[case]
    s, t = pair(case)
    got, grad = value_and_grad(lambda x: f(x, t[:0], backend=backend), s[:0])
    assert got == 0 and grad.shape == s[:0].shape
    torch.testing.assert_close(f(s[:1], t[:1], backend=backend), definition(s[:1].double(), t[:1].double())[0].float())
    s[1], t[2], s[3], t[3] = 0, 0, 0, 0
    got, grad = value_and_grad(lambda x: f(x, t, reduction="none", backend=backend), s)
    torch.testing.assert_close(got.double(), definition(s.double(), t.double()))
    assert grad.isfinite().all()
    if case != "cosine" and s.shape == t.shape: assert got[3] == 0 and grad[3].eq(0).all()
    if case == "cosine": assert got[1:4].eq(1).all()
    if s.shape == t.shape:
        same, grad = value_and_grad(lambda x: f(x, s, backend=backend), s)
        assert same == (0.4 if case == "cosine" else 0) and grad.abs().max() < 1e-7


@backends
@cases
def test_a_spoilt_sample_spoils_no_other(backend, case):
    f = CASES[case][0]
    s, t = pair(case)
    clean, clean_grad = value_and_grad(lambda x: f(x, t, reduction="none", backend=backend), s)
    s[1].view(-1)[3], s[2].view(-1)[0], t[3].view(-1)[5] = NAN, INF, NAN
    got, grad = value_and_grad(lambda x: f(x, t, reduction="none", backend=backend), s)
    assert got[[1, 3]].isnan().all() and not got[2].isfinite()
    assert torch.equal(got[[0, 4]], clean[[0, 4]]) and torch.equal(grad[[0, 4]], clean_grad[[0, 4]])


@backends
@dtypes
@pytest.mark.parametrize("layout", ["channels_last", "both channels_last", "sliced", "transposed", "expanded"])
@pytest.mark.parametrize("f", [hint, direction, attention_transfer, channel_kl])
def test_layouts(backend, dtype, layout, f):
    s, t = features(4, 6, 6, 6, seed=1, dtype=dtype), features(4, 6, 6, 6, seed=2, dtype=dtype)
    last = lambda x: x.to(memory_format=torch.channels_last)
    view = {"channels_last": lambda x: last(x) if x is s else x, "both channels_last": last, "sliced": lambda x: x[:, 1:4, ::2],
            "transposed": lambda x: x.transpose(2, 3), "expanded": lambda x: x[:1].expand(4, 6, 6, 6)}[layout]
    a, b = view(s), view(t)
    want, want_grad = value_and_grad(lambda x: f(x, b.contiguous(), backend=backend), a.contiguous())
    leaf = a.detach().requires_grad_()
    value = f(leaf, b, backend=backend)
    grad, = torch.autograd.grad(value, leaf)
    torch.testing.assert_close(value, want)
    torch.testing.assert_close(grad, want_grad)
    if backend == "cpp" and "channels_last" in layout and f is not channel_kl: assert grad.stride() == a.stride()


@backends
@cases
def test_student_and_teacher_may_differ_in_dtype(backend, case):
    f = CASES[case][0]
    s, t = pair(case)
    got, grad = value_and_grad(lambda x: f(x, t.bfloat16(), backend=backend), s)
    want, want_grad = value_and_grad(lambda x: f(x, t.bfloat16().float(), backend=backend), s)
    assert torch.equal(got, want) and torch.equal(grad, want_grad)
    assert f(s, t.double(), backend=backend).dtype == torch.float64
    got, grad = value_and_grad(lambda x: f(x, t, backend=backend), s.half())
    assert got.dtype == torch.float32 and grad.dtype == torch.float16
    with torch.autocast("cpu", dtype=torch.bfloat16): assert torch.equal(f(s, t, backend=backend), f(s, t, backend=backend).float())


# autograd, threads, compile

@backends
@pytest.mark.parametrize("reduction", ["none", "mean"])
@cases
def test_gradcheck_and_gradgradcheck(backend, case, reduction):
    f = CASES[case][0]
    s, t = (x[:2] for x in pair(case, torch.float64))
    if s.dim() == 4: s, t = s[..., :3, :4], t[..., :2, :4] if "attention" in case else t[..., :3, :4]
    s = s.contiguous().requires_grad_()
    g = lambda x: f(x, t, mask=torch.tensor([True, True]), reduction=reduction, backend=backend)
    assert torch.autograd.gradcheck(g, s) and torch.autograd.gradgradcheck(g, s)


@backends
@dtypes
@cases
def test_backward_twice_and_incoming_gradients(backend, dtype, case):
    f, definition, *_ = CASES[case]
    s, t = pair(case, dtype)
    leaf = s.clone().requires_grad_()
    loss = f(leaf, t, reduction="none", backend=backend)
    g = torch.tensor([1.0, -2.0, 0.0, 3.0, 0.5], dtype=loss.dtype)
    first, = torch.autograd.grad(loss, leaf, g, retain_graph=True)
    again, = torch.autograd.grad(loss, leaf, g)
    torch.testing.assert_close(first, again, rtol=2**-6, atol=1e-6)
    _, grad = value_and_grad(lambda x: definition(x, t.double()) * g, s.double())
    assert grad_error(first, grad) <= 2 * ROUNDING[dtype] + 1e-5 * (dtype == torch.float16)


@backends
@cases
def test_float16_gradient_survives_a_grad_scaler(backend, case):
    f, definition, *_ = CASES[case]
    s, t = pair(case, torch.float16)
    leaf = s.clone().requires_grad_()
    (f(leaf, t, backend=backend) * 2.0**12).backward()
    grad = value_and_grad(lambda x: definition(x, t.double()).mean() * 2.0**12, s.double())[1]
    assert grad_error(leaf.grad, grad) <= 2**-11


@backends
@cases
def test_the_teacher_gets_a_gradient_only_when_asked(backend, case):
    f = CASES[case][0]
    s, t = pair(case)
    s.requires_grad_(), t.requires_grad_()
    f(s, t, backend=backend).backward()
    assert t.grad is None and s.grad.abs().max() > 0
    f(s, t, detach_teacher=False).backward()
    assert t.grad.abs().max() > 0
    with torch.no_grad(): assert not f(s, t, backend=backend).requires_grad
    if backend == "cpp":
        with pytest.raises(ValueError, match="detach_teacher"): f(s, t, detach_teacher=False, backend="cpp")


@cases
def test_functorch_takes_the_reference(case):
    f = CASES[case][0]
    s, t = pair(case)
    grad = torch.func.grad(lambda x: f(x, t))(s)
    torch.testing.assert_close(grad, value_and_grad(lambda x: f(x, t), s)[1])
    each = torch.func.vmap(lambda a, b: f(a[None], b[None]))(s, t)
    torch.testing.assert_close(each, f(s, t, reduction="none"))


@needs_core
@cases
def test_the_same_bits_from_one_two_and_four_threads(case):
    f, _, s_shape, t_shape = CASES[case]
    wide = lambda shape: (37, *shape[1:2], 61, 33) if len(shape) == 4 else (37, 5003)
    s, t = features(*wide(s_shape), seed=1), features(*wide(t_shape), seed=2)
    results = []
    for n in (1, 2, 4, 1):
        torch.set_num_threads(n)
        results.append(value_and_grad(lambda x: f(x, t, backend="cpp"), s))
    torch.set_num_threads(1)
    for value, grad in results[1:]: assert torch.equal(value, results[0][0]) and torch.equal(grad, results[0][1])


@needs_core
@pytest.mark.parametrize("case", ["hint", "normalised hint", "attention"])
def test_gradients_larger_than_the_cache(case):
    f, definition, *_ = CASES[case]
    s, t = features(20, 64, 32, 32, seed=1), features(20, 64, 32, 32, seed=2)
    rows, grad = value_and_grad(lambda x: definition(x, t.double()), s.double())
    got, got_grad = value_and_grad(lambda x: f(x, t, reduction="none", backend="cpp"), s)
    torch.testing.assert_close(got.double(), rows, rtol=1e-6, atol=0)
    assert grad_error(got_grad, grad) <= 1e-6


@pytest.fixture(scope="module")
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_compile_without_graph_breaks(fresh_compiler, case, dtype):
    f = CASES[case][0]
    torch._dynamo.reset()
    s, t = pair(case, dtype)
    mask = torch.tensor([True, False, True, True, True])
    g = lambda x: 2 * f(x, t, mask=mask)
    want, want_grad = value_and_grad(g, s)
    got, grad = value_and_grad(torch.compile(g, fullgraph=True, backend="aot_eager"), s)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(grad, want_grad, rtol=2**-10, atol=1e-5)


@needs_core
@pytest.mark.parametrize("loss", feature_ops.FEATURE_LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_opcheck(loss, dtype, reduction):
    shape = (3, 2, 3, 2) if loss == "attention_transfer" else (3, 8)
    s, t = features(*shape, seed=1, dtype=dtype), features(*shape, seed=2, dtype=dtype)
    mask = torch.tensor([True, False, True])
    torch.library.opcheck(feature_ops.features_op, (s.requires_grad_(), t, mask, loss, reduction, dtype != torch.float16))
    g = torch.ones(3 if reduction == "none" else ())
    torch.library.opcheck(feature_ops.features_backward_op, (g, s.detach(), t, mask, loss, reduction))


# modules

MODULES = {kd.Hint: hint, kd.AttentionTransfer: attention_transfer, kd.Cosine: cosine, kd.ChannelKL: channel_kl}


@pytest.mark.parametrize("module", MODULES)
def test_function_and_module_share_options_and_defaults(module):
    function = {k: p.default for k, p in inspect.signature(MODULES[module]).parameters.items()}
    own = ("self", "project", "project_teacher") # a module has parameters of its own, a function has none
    init = {k: p.default for k, p in inspect.signature(module.__init__).parameters.items() if k not in own}
    call = {k: p.default for k, p in inspect.signature(module.forward).parameters.items() if k != "self"}
    assert not set(init) & set(call) and {**init, **call} == function


def test_modules_are_weighted_and_added():
    s, t = features(4, 6, 5, seed=1), features(4, 6, 5, seed=2)
    mask = torch.tensor([True, False, True, True])
    objective = 0.5 * kd.Hint(normalize=True) + 1e3 * kd.AttentionTransfer() - kd.Cosine() + kd.ChannelKL(T=2) / 4 + 3 * kd.Hint()
    want = (0.5 * hint(s, t, normalize=True, mask=mask) + 1e3 * attention_transfer(s, t, mask=mask)
            - cosine(s, t, mask=mask) + channel_kl(s, t, T=2, mask=mask) / 4 + 3 * hint(s, t, mask=mask))
    got = objective(s.requires_grad_(), t, mask=mask)
    torch.testing.assert_close(got, want)
    parts = objective.parts(s, t, mask=mask)
    assert list(parts) == ["hint", "attention_transfer", "cosine", "channel_kl", "hint#2"]
    torch.testing.assert_close(parts["hint"].rows, hint(s, t, normalize=True, mask=mask, reduction="none").detach())
    assert [p.weight for p in parts.values()] == [0.5, 1e3, -1, 0.25, 3] and not any(p.rows.requires_grad for p in parts.values())
    assert "ChannelKL(T=2)" in repr(objective) and "AttentionTransfer()" in repr(objective)
    with pytest.raises(TypeError, match="row_weight"): (2 * kd.Hint())(s, t, row_weight=torch.ones(4))
    nothing = (0 * kd.Hint())(s, None)
    nothing.backward()
    assert nothing == 0 and s.grad.eq(0).all() and (0 * kd.Hint(reduction="none"))(s, None).shape == (4, 6)


def test_modules_copy_pickle_and_compile(fresh_compiler):
    s, t = features(4, 6, 5, seed=1), features(4, 6, 5, seed=2)
    objective = kd.Hint(normalize=True) + 1e3 * kd.AttentionTransfer() + kd.ChannelKL(T=2) + 2 * kd.Cosine()
    for twin in (copy.deepcopy(objective), pickle.loads(pickle.dumps(objective))):
        assert torch.equal(twin(s, t), objective(s, t))
    torch._dynamo.reset()
    compiled = torch.compile(objective, fullgraph=True, backend="aot_eager")(s, t)
    assert compiled.dtype == torch.float32
    torch.testing.assert_close(compiled, objective(s, t))


# bad input

@pytest.mark.parametrize("call, error, words", [
    (lambda s, t: hint(s, t[:, :2]), ValueError, r"student \(4, 3, 5, 6\) and teacher \(4, 2, 5, 6\).*Conv2d\(3, 2, 1\)"),
    (lambda s, t: hint(s, t[..., :3]), ValueError, r"adaptive_avg_pool2d\(x, \(5, 3\)\)"),
    (lambda s, t: hint(s[:3], t), ValueError, r"same samples.*student \(3, 3, 5, 6\)"),
    (lambda s, t: hint(s, t.flatten(1)), ValueError, r"hint compares two tensors.*student \(4, 3, 5, 6\) and teacher \(4, 90\)"),
    (lambda s, t: hint(s[:, 0], t[:, 0, :, :2]), ValueError, r"Linear\(6, 2\)"),
    (lambda s, t: hint(s[:, 0], t[:, 0, :2]), ValueError, "same tokens"),
    (lambda s, t: attention_transfer(s[:, 0], t[:, 0, :2]), ValueError, "same tokens"),
    (lambda s, t: attention_transfer(s.flatten(1), t.flatten(1)), ValueError, r"\(B, N, D\) or \(B, C, H, W\)"),
    (lambda s, t: cosine(s, t), ValueError, r"cosine compares.*flatten\(1\)"),
    (lambda s, t: channel_kl(s, t, T=0), ValueError, "T must be a number > 0"),
    (lambda s, t: channel_kl(s, t, reduction="sum", normalizer=2), ValueError, "normalizer"),
    (lambda s, t: hint(s, (t, t)), TypeError, r"teacher must be a tensor of features, got tuple.*\[0\]"),
    (lambda s, t: hint(s.long(), t), TypeError, "student must hold floating-point features"),
    (lambda s, t: hint(s, t, mask=torch.ones(4)), TypeError, "mask must be bool"),
    (lambda s, t: hint(s, t, mask=torch.ones(4, 3, dtype=torch.bool)), ValueError, r"mask of hint must have the shape \(4,\)"),
    (lambda s, t: hint(s, t, reduction="avg"), ValueError, "reduction must be"),
    (lambda s, t: hint(s, t, backend="triton"), ValueError, "backend must be"),
    (lambda s, t: hint(s, t, backend="cuda"), ValueError, "cuda"),
    (lambda s, t: hint(s, t, normalise=True), TypeError, "normalise"),
    (lambda s, t: kd.Hint(reduction="avg"), ValueError, "reduction must be"),
    (lambda s, t: kd.ChannelKL(T=-1), ValueError, "T must be a number > 0"),
])
def test_bad_arguments_are_named(call, error, words):
    with pytest.raises(error, match=words): call(features(4, 3, 5, 6, seed=1), features(4, 3, 5, 6, seed=2))


@needs_core
def test_a_kernel_that_is_missing_is_named():
    s = features(2, 5, 3)
    with pytest.raises(ValueError, match="no kernel for a mask of tokens"):
        attention_transfer(s, s, mask=torch.ones(2, 5, dtype=torch.bool), backend="cpp")
