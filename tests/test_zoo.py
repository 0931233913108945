"""The losses on maps (and goldens for others): a second writing in numpy, definitions in float64, invariances, the public contract."""
import copy
import functools
import inspect
import math
import pickle
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import goldfiles
import kdlab as kd
from kdlab import map_reference as maps
from kdlab import token_reference as tokens

f = kd.functional
GOLD = goldfiles.load("zoo")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 5e-6, torch.float64: 1e-10, torch.bfloat16: 2**-7, torch.float16: 2**-10}
INF, NAN = math.inf, math.nan
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).split(".")[1])


def features(*shape, seed=0, dtype=torch.float64):
    gen = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=gen, dtype=torch.float64) + 0.2).to(dtype)


def each(x, g):
    "g of a tensor, or of each of several."
    return g(x) if isinstance(x, torch.Tensor) else tuple(each(y, g) for y in x)


def tensors(x): return [x] if isinstance(x, torch.Tensor) else [z for y in x for z in tensors(y)]


def value_and_grads(loss, student):
    student = each(student, lambda x: x.detach().requires_grad_())
    value = loss(student)
    return value.detach(), torch.autograd.grad(value.sum(), tensors(student))


class Case(NamedTuple):
    "A loss, what it is made of, and what holds for it."
    function: object
    module: object # makes a module; takes the options that all share
    definition: object # (student, teacher) -> a value a sample
    student: tuple # shape, or shapes
    teacher: tuple
    equal: bool = True # 0 where both are equal
    scale: bool = False # does the scale of either side change nothing?


MARGIN = torch.tensor([-0.4, -0.9, -0.1])
WHERE = (torch.arange(5 * 4 * 6).view(5, 4, 6) % 3).float()
SAME = (5, 3, 4, 6), (5, 3, 4, 6)
attended = lambda s, t: torch.stack([a / b for a, b in zip(*maps.imitation(s, t, maps.spatial_attention(t)))])
chosen = lambda s, t: torch.stack([a / b for a, b in zip(*maps.imitation(s, t, WHERE[:len(s)].to(s.dtype)))])
PLANES = features(9, 7, seed=5)


def planes_module(**options):
    loss = kd.LSH(7, planes=9, **options).double()
    loss.directions.copy_(PLANES)
    return loss


CASES = {
    "nst": Case(f.nst, kd.NST, maps.nst, (5, 3, 4, 6), (5, 4, 3, 4), scale=True),
    "ickd": Case(f.ickd, kd.ICKD, maps.ickd, *SAME, scale=True),
    "fsp": Case(f.fsp, kd.FSP, maps.fsp, ((5, 3, 4, 6), (5, 2, 2, 3)), ((5, 3, 6, 6), (5, 2, 3, 4))),
    "factor_transfer": Case(f.factor_transfer, kd.FactorTransfer, maps.factor_transfer, (5, 3, 4, 6), (5, 4, 3, 4), scale=True),
    "activation_boundary": Case(f.activation_boundary, kd.ActivationBoundary, maps.activation_boundary, *SAME, equal=False),
    "overhaul": Case(functools.partial(f.overhaul, margin=MARGIN), functools.partial(kd.Overhaul, MARGIN),
                     lambda s, t: maps.overhaul(s, t, MARGIN.to(s.dtype)), *SAME),
    "hierarchical_context": Case(f.hierarchical_context, kd.HierarchicalContext, maps.hierarchical_context, *SAME),
    "imitation": Case(f.imitation, kd.Imitation, attended, *SAME),
    "fourier": Case(f.fourier, kd.Fourier, maps.fourier, *SAME),
    "lsh": Case(functools.partial(f.lsh, directions=PLANES), planes_module, lambda s, t: tokens.lsh(s, t, PLANES), (5, 7), (5, 7), equal=False),
    "attention_map": Case(functools.partial(f.attention_map, scores=True), functools.partial(kd.AttentionMap, scores=True),
                          lambda s, t: tokens.attention_map(s, t, scores=True), (5, 2, 4, 6), (5, 2, 4, 6)),
    "token_relation": Case(f.token_relation, kd.TokenRelation, tokens.token_relation, (5, 4, 6), (5, 4, 8)),
}
cases = pytest.mark.parametrize("name", CASES)
modules = {name: case.module for name, case in CASES.items()}


def pair(name, dtype=torch.float64, B=5):
    make = lambda shape, seed: (features(*shape, seed=seed, dtype=dtype)[:B] if isinstance(shape[0], int)
                                else tuple(make(s, seed + 7 * i) for i, s in enumerate(shape)))
    return make(CASES[name].student, 1), make(CASES[name].teacher, 2)


# goldens

def test_the_goldens_are_what_their_script_writes_and_it_knows_no_kdlab():
    assert goldfiles.imports("zoo") <= {"json", "math", "pathlib", "numpy", "writing"}
    assert goldfiles.is_what_its_script_writes("zoo", rel=1e-11)


def given(name, dtype=torch.float64):
    x = torch.tensor(GOLD["inputs"][name])
    return x if x.dtype == torch.bool else torch.tensor(GOLD["inputs"][name], dtype=dtype)


def norm():
    bn = nn.BatchNorm2d(2).double()
    with torch.no_grad(): bn.weight.copy_(-given("gamma")), bn.bias.copy_(given("beta")) # the sign of a weight does not count
    return bn


def flows(loss):
    "FSP of a first layer, the second ones being the golden ones."
    return lambda s, t, **k: loss((s, given("student2", s.dtype)), (t, given("teacher2", t.dtype)), **k)


GOLDEN = {
    "nst": (f.nst, "wide"), "ickd": (f.ickd, "teacher"), "fsp": (flows(f.fsp), "teacher"),
    "factor_transfer": (f.factor_transfer, "wide"), "activation_boundary": (f.activation_boundary, "teacher"),
    "activation_boundary wide": (functools.partial(f.activation_boundary, margin=2.5), "teacher"),
    "overhaul": (functools.partial(f.overhaul, margin=given("margins")), "teacher"),
    "hierarchical_context": (f.hierarchical_context, "teacher"), "imitation": (f.imitation, "teacher"),
    "imitation where": (functools.partial(f.imitation, where=given("where")), "teacher"), "fourier": (f.fourier, "teacher"),
    "correlation_congruence": (f.correlation_congruence, "wider"),
    "correlation_congruence wide": (functools.partial(f.correlation_congruence, gamma=2.0, order=5), "wider"),
    "similarity_kl": (f.similarity_kl, "wider"), "similarity_kl soft": (functools.partial(f.similarity_kl, tau=0.5), "wider"),
    "lsh": (lambda s, t, **k: f.lsh(s, t, directions=given("planes", s.dtype), bias=given("bias", s.dtype), **k), "hidden_teacher"),
    "attention_map": (functools.partial(f.attention_map, scores=True), "scores_teacher"),
    "token_relation": (functools.partial(f.token_relation, heads=2), "hidden_wider"),
}
PARTNER = {"wider": ("vectors", "samples", 2), "hidden_teacher": ("hidden", "tokens", 2), "hidden_wider": ("hidden", "tokens", 2),
           "scores_teacher": ("scores", "tokens", 2)} # of a teacher: student, mask, and a sample that it leaves out
golden = pytest.mark.parametrize("name", GOLDEN)


@golden
@dtypes
def test_value_and_gradient_are_the_golden_ones(name, dtype):
    loss, teacher = GOLDEN[name]
    student, mask, out = PARTNER.get(teacher, ("student", "mask", 1))
    gold, mask = GOLD["losses"][name], given(mask)
    s, t = given(student, dtype), given(teacher, dtype)
    rel = {torch.float32: 1e-5, torch.float64: 1e-9, torch.bfloat16: 0.1, torch.float16: 2e-2}[dtype]
    value, (grad,) = value_and_grads(lambda x: loss(x, t, mask=mask), s)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and grad.dtype == dtype
    assert value.item() == pytest.approx(gold["value"], rel=rel)
    want = torch.tensor(gold["gradient"], dtype=torch.float64)
    assert (grad.double() - want).abs().max() <= rel * want.abs().max() and grad[out].eq(0).all()
    if "rows" in gold:
        rows = loss(s, t, mask=mask, reduction="none").double()
        torch.testing.assert_close(rows, torch.tensor(gold["rows"], dtype=torch.float64), rtol=rel, atol=rel * 1e-2)


@golden
def test_it_is_none_of_the_usual_mistakes(name):
    loss, teacher = GOLDEN[name]
    student, mask, _ = PARTNER.get(teacher, ("student", "mask", 1))
    got, wrong = loss(given(student), given(teacher), mask=given(mask)).item(), GOLD["losses"][name]["wrong"]
    assert len(wrong) >= 2
    for mistake, value in wrong.items(): assert abs(got - value) > 0.01 * abs(got), mistake


def test_margins_of_a_batch_norm():
    torch.testing.assert_close(f.margin_of(norm()), given("margins", torch.float32))
    assert torch.equal(kd.Overhaul(norm()).margin, f.margin_of(norm()))
    far = nn.BatchNorm1d(4)
    with torch.no_grad(): far.bias.copy_(torch.tensor([40.0, -40.0, 1.0, -1.0])), far.weight.copy_(torch.tensor([1.0, 1.0, 0.0, 0.0]))
    margin = f.margin_of(far)
    assert -0.03 < margin[0] < 0 and margin[1:].tolist() == [-40, 0, -1]
    with pytest.raises(TypeError, match="margin_of takes a batch norm"): f.margin_of(nn.ReLU())
    with pytest.raises(TypeError, match="margin_of takes a batch norm"): kd.Overhaul(nn.BatchNorm2d(3, affine=False))


# the definitions

@cases
@dtypes
def test_value_and_gradient_are_those_of_the_definition(name, dtype):
    case = CASES[name]
    s, t = pair(name, dtype)
    wide = each(t, lambda x: x.double())
    rows, grads = value_and_grads(lambda x: case.definition(x, wide), each(s, lambda x: x.double()))
    for reduction, want, scale in (("none", rows, 1), ("sum", rows.sum(), 1), ("mean", rows.mean(), rows.numel())):
        got, got_grads = value_and_grads(lambda x: case.function(x, t, reduction=reduction), s)
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(got.double(), want, rtol=5e-6, atol=1e-9)
        for g, w in zip(got_grads, grads):
            assert g.dtype == dtype and (g.double() - w / scale).abs().max() <= ROUNDING[dtype] * w.abs().max() / scale


@cases
@pytest.mark.parametrize("gap", [1e-2, 1e-4])
def test_accurate_where_the_student_has_nearly_converged(name, gap):
    case = CASES[name]
    if not case.equal: return
    t = pair(name)[0]
    s = each(t, lambda x: x + gap * features(*x.shape, seed=9))
    s, t = (each(x, lambda x: x.float()) for x in (s, t))
    want, grads = value_and_grads(lambda x: case.definition(x, each(t, lambda x: x.double())).mean(), each(s, lambda x: x.double()))
    got, got_grads = value_and_grads(lambda x: case.function(x, t), s)
    loose = 1e-6 / gap # maps cannot be subtracted before they are made
    torch.testing.assert_close(got.double(), want, rtol=loose, atol=0)
    for g, w in zip(got_grads, grads): assert (g.double() - w).abs().max() <= loose * w.abs().max()


@cases
def test_masked_samples_are_exactly_zero_even_where_they_hold_nan(name):
    loss = CASES[name].function
    mask = torch.tensor([True, False, True, False, True])
    for dtype in DTYPES:
        s, t = pair(name, dtype)
        want, want_grads = value_and_grads(lambda x: loss(x, each(t, lambda x: x[mask])), each(s, lambda x: x[mask]))
        for x, y in zip(tensors(s), tensors(t)): x[1], y[3] = NAN, INF
        got, grads = value_and_grads(lambda x: loss(x, t, mask=mask), s)
        torch.testing.assert_close(got, want)
        for g, w in zip(grads, want_grads):
            torch.testing.assert_close(g[mask], w, rtol=2**-6, atol=1e-6)
            assert g[~mask].eq(0).all()
        assert loss(s, t, mask=mask, reduction="none")[~mask].eq(0).all()
        got, grads = value_and_grads(lambda x: loss(x, t, mask=torch.zeros(5, dtype=torch.bool)), s)
        assert got == 0 and all(g.eq(0).all() for g in grads)


@cases
@pytest.mark.parametrize("kind", ["none", "one", "zeros", "some zeros", "identical", "constant", "one pixel"])
def test_no_nan_in_degenerate_batches(name, kind):
    case = CASES[name]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        s, t = pair(name, dtype)
        if kind in ("none", "one"): s, t = (each(x, lambda x: x[:["none", "one"].index(kind)]) for x in (s, t))
        if kind == "zeros": s = each(s, torch.zeros_like)
        if kind == "some zeros":
            for x, y in zip(tensors(s), tensors(t)): x[1], y[2], x[3], y[3] = 0, 0, 0, 0
        if kind == "identical": t = s
        if kind == "constant": s = each(s, lambda x: torch.ones_like(x) / 3)
        if kind == "one pixel" and name != "lsh": s, t = (each(x, lambda x: x[..., :1, :1]) for x in (s, t))
        got, grads = value_and_grads(lambda x: case.function(x, t), s)
        assert got.isfinite() and all(g.isfinite().all() for g in grads)
        if kind == "none": assert got == 0
        if kind == "identical" and case.equal:
            assert abs(got) < 1e-12
            assert all(g.abs().max() < 1e-6 for g in grads) or name == "factor_transfer"
        if kind == "one" and name != "imitation":
            torch.testing.assert_close(got.double(), case.definition(*(each(x, lambda x: x.double()) for x in (s, t)))[0].mean(), rtol=1e-5, atol=1e-9)


@cases
def test_a_spoilt_sample_spoils_no_other(name):
    loss = CASES[name].function
    s, t = pair(name)
    clean, clean_grads = value_and_grads(lambda x: loss(x, t, reduction="none"), s)
    for x, y in zip(tensors(s), tensors(t)): x[1].view(-1)[3], y[3].view(-1)[1] = NAN, NAN
    got, grads = value_and_grads(lambda x: loss(x, t, reduction="none"), s)
    assert got[1].isnan().any()
    assert torch.equal(got[[0, 2, 4]], clean[[0, 2, 4]])
    for g, c in zip(grads, clean_grads): assert torch.equal(g[[0, 2, 4]], c[[0, 2, 4]])


@cases
def test_gradcheck_and_gradgradcheck(name):
    loss = CASES[name].function
    s, t = pair(name, B=2)
    if name != "lsh": s, t = (each(x, lambda x: x[..., :2, :3].contiguous()) for x in (s, t))
    leaves = tuple(x.requires_grad_() for x in tensors(s))
    back = lambda xs: xs if isinstance(s, tuple) else xs[0]
    for reduction in ("mean", "none"):
        if name == "overhaul" and reduction == "none": continue
        g = lambda *xs: loss(back(xs), t, mask=torch.tensor([True, True]), reduction=reduction)
        assert torch.autograd.gradcheck(g, leaves) and torch.autograd.gradgradcheck(g, leaves)


@cases
def test_teacher_autocast_dtypes_and_layouts(name):
    loss = CASES[name].function
    s, t = (each(x, lambda x: x.float().requires_grad_()) for x in pair(name))
    loss(s, t).backward(retain_graph=True)
    assert all(x.grad is None for x in tensors(t)) and all(x.grad.abs().max() > 0 for x in tensors(s))
    value = loss(s, t, detach_teacher=False)
    if name not in ("activation_boundary", "lsh"): # of these teachers only signs are used
        value.backward()
        assert all(x.grad.abs().max() > 0 for x in tensors(t))
    s, t = (each(x, lambda x: x.detach()) for x in (s, t))
    with torch.autocast("cpu", dtype=torch.bfloat16): assert torch.equal(loss(s, t), value)
    assert loss(s, each(t, lambda x: x.double())).dtype == torch.float64
    torch.testing.assert_close(loss(s, each(t, lambda x: x.bfloat16())), loss(s, each(t, lambda x: x.bfloat16().float())))
    last = lambda x: x.to(memory_format=torch.channels_last) if x.dim() == 4 else x[:, None].transpose(-1, 1).transpose(-1, 1)[:, 0]
    torch.testing.assert_close(loss(each(s, last), t), value.detach())
    grads = value_and_grads(lambda x: loss(x, t), s)[1]
    for got, want in zip(tensors(torch.func.grad(lambda x: loss(x, t))(s)), grads): torch.testing.assert_close(got, want)


@cases
def test_compile_without_graph_breaks(name):
    torch._dynamo.reset()
    loss = CASES[name].function
    s, t = pair(name, torch.float32)
    mask = torch.tensor([True, False, True, True, True])
    g = lambda x: 2 * loss(x, t, mask=mask)
    want, want_grads = value_and_grads(g, s)
    got, grads = value_and_grads(torch.compile(g, fullgraph=True, backend="aot_eager"), s)
    torch.testing.assert_close(got, want)
    for a, b in zip(grads, want_grads): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


# invariances

@cases
def test_scale_and_zero(name):
    case = CASES[name]
    s, t = pair(name)
    if case.scale:
        torch.testing.assert_close(case.function(3 * s, 0.2 * t), case.function(s, t))
    else: assert abs(case.function(each(s, lambda x: 3 * x), t) - case.function(s, t)) > 1e-3
    if case.equal: assert abs(case.function(s, s)) < 1e-13
    assert case.function(s, t) > 1e-3


def test_what_each_loss_does_not_see():
    s, t = features(4, 3, 4, 6, seed=1), features(4, 3, 4, 6, seed=2)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    pixels = lambda x: x.flatten(2)[..., order].view_as(x)
    turn, _ = torch.linalg.qr(features(24, 24, seed=3))
    rotated = lambda x: (x.flatten(2) @ turn).view_as(x)
    signs = torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64).view(3, 1, 1)
    same = torch.testing.assert_close
    for loss in (f.nst, f.factor_transfer): # channels have neither order nor sign
        same(loss(signs * s.flip(1), t), loss(s, t))
    each_channel = torch.tensor([0.1, 2.0, 30.0], dtype=torch.float64).view(3, 1, 1)
    same(f.nst(each_channel * s, t), f.nst(s, t))
    for loss in (f.nst, f.ickd): same(loss(rotated(s), rotated(t)), loss(s, t)) # space may turn, for Gram matrices of channels
    same(f.ickd(rotated(s), t), f.ickd(s, t))
    for loss in (f.nst, f.ickd, f.factor_transfer, f.activation_boundary): same(loss(pixels(s), pixels(t)), loss(s, t))
    same(f.fsp((rotated(s), rotated(t)), (t, s)), f.fsp((s, t), (t, s)))
    for shift in (1, 2, 3):
        same(f.fourier(s.roll((shift, 2 * shift), (2, 3)), t), f.fourier(s, t)) # a cyclic shift
        same(f.fourier(s.flatten(2).transpose(1, 2).roll(shift, 1), t.flatten(2).transpose(1, 2)),
             f.fourier(s.flatten(2).transpose(1, 2), t.flatten(2).transpose(1, 2)))
    same(f.fourier(-s, t), f.fourier(s, t))
    assert f.fourier(s, t) <= f.hint(s, t)
    beyond = 50 * s.sign()
    assert f.activation_boundary(beyond, s) == 0 and f.activation_boundary(-beyond, s) > 1000
    below = torch.where(t <= 0, -9.0, t)
    assert f.overhaul(below, t, margin=torch.full((3,), -0.5)) == 0 # what does not pass need only be negative
    torch.testing.assert_close(f.overhaul(t, t, margin=torch.full((3,), -100.0)), torch.tensor(0.0, dtype=torch.float64))


def test_imitation_in_chosen_places():
    s, t = features(4, 3, 4, 6, seed=1), features(4, 3, 4, 6, seed=2)
    box = torch.zeros(4, 4, 6, dtype=torch.bool)
    box[:, 1:3, 2:4], box[3] = True, False
    torch.testing.assert_close(f.imitation(s, t, where=box), f.hint(s[:3, :, 1:3, 2:4], t[:3, :, 1:3, 2:4]))
    rows = f.imitation(s, t, where=box, reduction="none")
    assert rows[3] == 0 and torch.equal(rows, f.imitation(s, t, where=7.0 * box, reduction="none"))
    torch.testing.assert_close(f.imitation(s, t, where=box, reduction="sum"), rows.sum())
    assert f.imitation(s, t, where=torch.zeros(4, 4, 6)) == 0
    torch.testing.assert_close(kd.Imitation()(s, t, where=box), f.imitation(s, t, where=box))
    torch.testing.assert_close(f.imitation(s, t, softness=1e9), f.hint(s, t)) # attention spread evenly
    spread = s.clone()
    spread[1, 0, 0, 0] = NAN # outside a box NaN stays NaN: weights multiply, a mask removes
    assert f.imitation(spread, t, where=box).isnan() and f.imitation(spread, t, where=box, mask=torch.arange(4) != 1).isfinite()


def test_hierarchical_context_leaves_out_levels_that_are_not_smaller():
    for size, levels in (((8, 8), (4, 2, 1)), ((4, 4), (2, 1)), ((1, 1), ()), ((2, 3), (2, 1)), ((5, 1), (4, 2, 1))):
        s, t = features(2, 3, *size, seed=1), features(2, 3, *size, seed=2)
        values = [F.mse_loss(s, t)] + [F.mse_loss(*(F.adaptive_avg_pool2d(x, [min(n, m) for m in size]) for x in (s, t))) for n in levels]
        weights = [0.5**i for i in range(len(values))]
        torch.testing.assert_close(f.hierarchical_context(s, t), sum(w * v for w, v in zip(weights, values)) / sum(weights))


def test_what_losses_on_tokens_do_not_see():
    s, t, same = features(3, 5, 8, seed=1), features(3, 5, 8, seed=2), torch.testing.assert_close
    turn, _ = torch.linalg.qr(features(8, 8, seed=3))
    order = torch.randperm(5, generator=torch.Generator().manual_seed(0))
    for x in (s @ turn, -s): same(f.token_relation(x, t), f.token_relation(s, t))
    same(f.token_relation(s[:, order], t[:, order], heads=4), f.token_relation(s, t, heads=4))
    w = features(64, 8, seed=4)
    for length in (0.1, 30.0): same(f.lsh(s, length * t, directions=w), f.lsh(s, t, directions=w))
    same(f.lsh(s @ turn, t @ turn, directions=w @ turn), f.lsh(s, t, directions=w))
    assert f.lsh(0 * s, t, directions=w).item() == pytest.approx(math.log(2))
    assert f.lsh(100 * t, t, directions=w) < 0.01 < f.lsh(-t, t, directions=w)
    a, b = features(3, 2, 5, 5, seed=5), features(3, 2, 5, 5, seed=6)
    p, q = a.softmax(-1), b.softmax(-1)
    same(f.attention_map(p, q), f.attention_map(a + 7, b - features(3, 2, 5, 1), scores=True))
    same(f.attention_map(p[:, :, :, order], q[:, :, :, order]), f.attention_map(p, q))
    same(f.attention_map(p, q.mean(1, keepdim=True), heads="mean"), f.attention_map(p.mean(1, keepdim=True), q.mean(1, keepdim=True)))
    same(f.attention_map(p.flip(1), q, heads="mean"), f.attention_map(p, q, heads="mean"))
    same(f.attention_map(p, q), f.forward_kl(a, b))


def test_tokens_that_do_not_count_are_neither_queries_nor_keys():
    mask = torch.tensor([[True, True, True, False], [True] * 4, [False] * 4])
    s, t, a, b = features(3, 4, 6, seed=1), features(3, 4, 6, seed=2), features(3, 2, 4, 4, seed=3), features(3, 2, 4, 4, seed=4)
    for x in (s, t): x[0, 3], x[2] = NAN, INF
    for x in (a, b): x[0, :, 3], x[0, :, :, 3], x[2] = NAN, INF, NAN
    w = features(9, 6, seed=5)
    for loss, s, t, cut in ((functools.partial(f.lsh, directions=w), s, t, lambda x: x[:1, :3]), (f.token_relation, s, t, lambda x: x[:1, :3]),
                            (functools.partial(f.attention_map, scores=True), a, b, lambda x: x[:1, :, :3, :3])):
        rows = loss(s, t, mask=mask, reduction="none")
        torch.testing.assert_close(rows[0, :3], loss(cut(s), cut(t), reduction="none")[0])
        torch.testing.assert_close(rows[1], loss(s[1:2], t[1:2], reduction="none")[0])
        assert rows[0, 3] == 0 and rows[2].eq(0).all()
        value, (grad,) = value_and_grads(lambda x: loss(x, t, mask=mask), s)
        torch.testing.assert_close(value, rows.sum() / 7)
        assert grad.isfinite().all() and grad[2].eq(0).all()
        value, (grad,) = value_and_grads(lambda x: loss(x, t, mask=torch.zeros(3, 4, dtype=torch.bool)), s)
        assert value == 0 and grad.eq(0).all()
        torch.testing.assert_close(loss(s, t, mask=torch.tensor([False, True, False])), rows[1].mean())


def test_attention_with_zeros_and_masks():
    p, q = features(2, 3, 4, 5, seed=1).softmax(-1), features(2, 3, 4, 5, seed=2).softmax(-1)
    for x in (p, q): x[..., 4] = 0 # a key that nobody looks at
    value, (grad,) = value_and_grads(lambda x: f.attention_map(x, q), p)
    torch.testing.assert_close(value, f.attention_map(p[..., :4], q[..., :4]))
    assert grad.isfinite().all()
    assert f.attention_map(p, q[..., [4, 0, 1, 2, 3]]) == INF # the student never looks where the teacher does
    p[:, :, 1] = 0 # a query without keys adds nothing
    value, (grad,) = value_and_grads(lambda x: f.attention_map(x, q), p)
    torch.testing.assert_close(value, f.attention_map(p, q, reduction="none").mean())
    assert value.isfinite() and grad.isfinite().all() and f.attention_map(p, q, reduction="none")[:, 1].eq(0).all()
    mask = torch.tensor([[True] * 4, [True, False, True, True]]) # of queries; there are more keys
    assert f.attention_map(p, q, mask=mask, reduction="none")[1, 1] == 0


def test_planes_are_buffers_and_wait_for_a_width():
    torch.manual_seed(0)
    loss = kd.LSH(planes=32, project="auto", std=0.5).on("0")
    assert loss.pending() and list(loss.parameters()) == [] and "std=0.5" in repr(loss)
    with pytest.raises(RuntimeError, match="kd.build"): loss(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(RuntimeError, match="kd.build"): kd.LSH()(torch.zeros(2, 3), torch.zeros(2, 3))
    built = kd.build(2 * loss + kd.LSH().on("1"), nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 4)), nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 4)), torch.zeros(2, 3))
    first, second = built.losses
    assert first.directions.shape == (32, 8) and second.directions.shape == (2048, 4) and abs(first.directions.std() - 0.5) < 0.1
    assert [tuple(p.shape) for p in built.parameters()] == [(8, 5), (8,)] and set(second.state_dict()) == {"directions", "bias"}
    s, t = torch.randn(6, 5), torch.randn(6, 8)
    for twin in (copy.deepcopy(first), pickle.loads(pickle.dumps(first))): assert torch.equal(twin(s, t), first(s, t))
    fresh = kd.LSH(4)
    fresh.load_state_dict(second.state_dict())
    assert torch.equal(fresh(s[:, :4], t[:, :4]), second(s[:, :4], t[:, :4]))
    second.balance(torch.randn(999, 4) + 5)
    assert second.bias.abs().max() > 1 and kd.LSH(4).to("meta").directions.is_meta


# modules

@cases
def test_function_and_module_share_options_and_defaults(name):
    case = CASES[name]
    if name == "lsh": return # the function takes planes, the module draws them
    function = case.function.func if isinstance(case.function, functools.partial) else case.function
    module = case.module.func if isinstance(case.module, functools.partial) else case.module
    of = lambda g, own=("self", "project", "project_teacher"): {k: p.default for k, p in inspect.signature(g).parameters.items() if k not in own}
    init, call = of(module.__init__), of(module.forward)
    assert not set(init) & set(call) and {**init, **call} == of(function)


@cases
def test_modules_copy_pickle_have_a_state_and_are_weighted(name):
    case = CASES[name]
    loss = case.module()
    s, t = pair(name)
    mask = torch.tensor([True, False, True, True, True])
    torch.testing.assert_close(loss(s, t, mask=mask), case.function(s, t, mask=mask))
    rows = case.module(reduction="none")(s, t, mask=mask)
    torch.testing.assert_close(rows, case.function(s, t, mask=mask, reduction="none"))
    objective = 2 * loss
    for twin in (copy.deepcopy(objective), pickle.loads(pickle.dumps(objective))):
        assert torch.equal(twin(s, t), objective(s, t)) and repr(twin) == repr(objective)
        twin.load_state_dict(objective.state_dict())
    parts = objective.parts(s, t, mask=mask)
    assert list(parts) == [loss.term] and not parts[loss.term].rows.requires_grad
    torch.testing.assert_close(parts[loss.term].rows, rows)
    assert loss.equation() in objective.equation() and (0 * loss)(s, t) == 0
    torch.testing.assert_close(objective(s, t), 2 * case.function(s, t))
    with pytest.raises(ValueError, match=f"{loss.term} has no kernel"): case.module(backend="cpp")
    with pytest.raises(ValueError, match="reduction must be"): case.module(reduction="avg")
    assert next(iter(loss.to("meta").buffers()), torch.empty(0, device="meta")).is_meta


def test_losses_bound_to_layers_train_a_student():
    torch.manual_seed(0)
    conv = lambda i, o: nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(inplace=True))
    net = lambda w: nn.Sequential(conv(1, 4), conv(4, w), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(w, 3))
    student, teacher = net(4), net(6)
    x, y = torch.randn(8, 1, 6, 6), torch.arange(8) % 3
    losses = (kd.CrossEntropy() + kd.NST().on("1") + kd.FSP().on(["0.0", "0"]) + kd.FactorTransfer().on("1")
              + sum(make(project="auto").on("1") for make in (kd.ICKD, kd.HierarchicalContext, kd.Imitation, kd.Fourier))
              + kd.ActivationBoundary(project="auto").on("1.1") + kd.Overhaul(teacher[1][1], project="auto").on("1.1"))
    objective = kd.build(losses, student, teacher, x)
    assert sum(p.numel() for p in objective.parameters()) == 6 * (4 * 6 + 6) # six projectors
    before = copy.deepcopy(objective.state_dict())
    run = kd.distill(student, teacher, [(x, y)], epochs=3, losses=objective, progress=False)
    assert all(math.isfinite(v) for row in run.history for v in row.values() if isinstance(v, float))
    assert not any(torch.equal(v, before[k]) for k, v in objective.state_dict().items() if "margin" not in k)


class Attention(nn.Module):
    "A self-attention whose queries, keys, values and map can be tapped."
    def __init__(self, width):
        super().__init__()
        self.q, self.k, self.v, self.map = nn.Linear(4, width), nn.Linear(4, width), nn.Linear(4, width), nn.Softmax(-1)
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        heads = lambda x: x.unflatten(-1, (2, -1)).transpose(1, 2)
        q, k, v = (heads(layer(x)) for layer in (self.q, self.k, self.v))
        return self.head((self.map(q @ k.transpose(-1, -2)) @ v).transpose(1, 2).flatten(2).mean(1))


def test_a_transformer_learns_the_relations_of_another():
    torch.manual_seed(0)
    student, teacher, x = Attention(8), Attention(12), torch.randn(16, 5, 4)
    losses = (kd.AttentionMap().on("map") + kd.TokenRelation(heads=2).on(["q", "k", "v"]) + kd.LSH(planes=64, project="auto").on("v")
              + kd.Cosine(project="auto").on("q") + kd.Fourier(project="auto").on("k"))
    run = kd.distill(student, teacher, [(x, torch.zeros(16).long())], epochs=30, lr=0.02, losses=losses, progress=False)
    first, last = (run.history[i]["terms"] for i in (0, -1))
    assert len(first) == 7 and all(last[name] < 0.8 * first[name] for name in first)


# bad input

@pytest.mark.parametrize("call, error, words", [
    (lambda s, t: f.nst(s, t[:3]), ValueError, r"nst needs the same samples.*\(5, 3, 4, 6\) and teacher \(3, 3, 4, 6\)"),
    (lambda s, t: f.ickd(s, t[:, :2]), ValueError, r"Conv2d\(3, 2, 1\)"),
    (lambda s, t: f.fsp(s, t), TypeError, r"student of fsp must be two feature maps, \(first, second\), got Tensor"),
    (lambda s, t: f.fsp((s, s, s), (t, t)), TypeError, "got 3 of them"),
    (lambda s, t: f.fsp((s, s), (t, t[:, :2])), ValueError, r"fsp needs features of the same shape.*Conv2d\(3, 2, 1\)"),
    (lambda s, t: f.fsp((s, s[:2]), (t, t[:2])), ValueError, "fsp needs the same samples"),
    (lambda s, t: f.overhaul(s, t, margin=torch.zeros(2)), ValueError, r"margin of overhaul must hold a number a channel, \(3,\), got \(2,\)"),
    (lambda s, t: f.overhaul(s, t, margin=0.5), ValueError, "margin_of"),
    (lambda s, t: f.overhaul(s, t), TypeError, "margin"),
    (lambda s, t: f.activation_boundary(s, t, margin=-1), ValueError, "margin must be >= 0"),
    (lambda s, t: kd.ActivationBoundary(-1), ValueError, "margin must be >= 0"),
    (lambda s, t: f.hierarchical_context(s, t[..., :3]), ValueError, r"adaptive_avg_pool2d\(x, \(4, 3\)\)"),
    (lambda s, t: f.imitation(s, t, where=torch.ones(5, 1, 4, 6)), ValueError, r"a weight for each pixel, \(5, 4, 6\), got \(5, 1, 4, 6\)"),
    (lambda s, t: f.imitation(s, t, where=[1]), TypeError, "where must be a tensor"),
    (lambda s, t: f.imitation(s, t, softness=0), ValueError, "softness must be > 0"),
    (lambda s, t: kd.Imitation(softness=0), ValueError, "softness must be > 0"),
    (lambda s, t: f.lsh(s[:, 0], t[:, 0], directions=torch.ones(9, 4)), ValueError, r"directions of lsh must be \(K, 6\).*got \(9, 4\)"),
    (lambda s, t: f.lsh(s[:, 0], t[:, 0], directions=torch.ones(9, 6), bias=torch.ones(2)), ValueError, r"bias of lsh must be \(9,\)"),
    (lambda s, t: kd.LSH(planes=0), ValueError, "planes must be 1 or more"),
    (lambda s, t: f.attention_map(s, t[:, :2]), ValueError, "heads='mean' compares"),
    (lambda s, t: f.attention_map(s[:, 0], t[:, 0]), ValueError, r"\(B, heads, queries, keys\)"),
    (lambda s, t: f.attention_map(s, t[..., :3]), ValueError, "same samples and tokens"),
    (lambda s, t: f.attention_map(s, t, heads="all"), ValueError, "heads must be 'each' or 'mean'"),
    (lambda s, t: f.attention_map((s,), t), TypeError, "pick one layer"),
    (lambda s, t: kd.AttentionMap(heads=3), ValueError, "heads must be 'each' or 'mean'"),
    (lambda s, t: f.token_relation(s[:, 0], t[:, 0], heads=4), ValueError, "heads=4 does not divide the widths"),
    (lambda s, t: f.token_relation(s[:, 0], t[:, 0, :3]), ValueError, "same tokens"),
    (lambda s, t: kd.TokenRelation(heads=0), ValueError, "heads must be 1 or more"),
    (lambda s, t: f.fourier(s, t, backend="cuda"), ValueError, "fourier has no kernel"),
    (lambda s, t: f.fourier(s.flatten(1), t.flatten(1)), ValueError, r"\(B, N, D\) or \(B, C, H, W\)"),
    (lambda s, t: f.nst(s, t, mask=torch.ones(5, 4, dtype=torch.bool)), ValueError, r"mask of nst must have the shape \(5,\)"),
    (lambda s, t: f.factor_transfer(s, t, reduction="avg"), ValueError, "reduction must be"),
])
def test_bad_arguments_are_named(call, error, words):
    with pytest.raises(error, match=words): call(*pair("ickd"))
