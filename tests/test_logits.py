"""The losses on logits: values and gradients against a second writing in numpy, invariances, the contract, the wrappers."""
import copy
import functools
import inspect
import math
import pickle

import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from torch import nn

import goldfiles
import kdlab as kd
from kdlab import logit_reference, ops
from kdlab.losses.objective import _groups

f = kd.functional
GOLD = goldfiles.load("logits")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 2**-8, torch.float16: 2**-11}
INF, NAN = math.inf, math.nan
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).split(".")[1])


def given(name):
    x = torch.tensor(GOLD["inputs"][name])
    return torch.tensor(GOLD["inputs"][name], dtype=torch.float64) if x.is_floating_point() else x


S, Z, W, MIXED, T = given("student"), given("teacher"), given("weight"), given("mixed"), GOLD["inputs"]["T"]
Y, MASK = given("target"), given("mask")
VALID = MASK & (Y != -100)


def logits(*shape, seed=0, scale=3.0, dtype=torch.float64):
    gen = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=gen, dtype=torch.float64)).to(dtype)


def value_and_grad(loss, student):
    student = student.detach().requires_grad_()
    value = loss(student)
    return value.detach(), torch.autograd.grad(value.sum(), student)[0]


# goldens

def test_the_goldens_are_what_their_script_writes_and_it_knows_no_kdlab():
    assert goldfiles.imports("logits") <= {"json", "math", "pathlib", "numpy", "writing"}
    assert goldfiles.is_what_its_script_writes("logits", rel=1e-12)


def case(name, module, target=Y, mask=MASK, **options):
    "A loss by its golden's name: function and module, called as (student, teacher, **given)."
    function = functools.partial(getattr(f, name.split()[0]), **options)
    if name.startswith("cross_entropy"): call = lambda s, t, **k: function(s, target, mask=mask, **k)
    else: call = lambda s, t, **k: function(s, t, target, mask=mask, **k)
    return pytest.param(name, call, lambda **k: functools.partial(module(**options, **k), target=target, mask=mask), id=name)


VALID_Y = torch.where(VALID, Y, -100)
CASES = [
    case("forward_kl", kd.ForwardKL, T=T), case("reverse_kl", kd.ReverseKL, T=T), case("jsd", kd.JSD, T=T, beta=0.3),
    case("skew_kl", kd.SkewKL, T=T), case("skew_reverse_kl", kd.SkewReverseKL, T=T),
    case("total_variation", kd.TotalVariation, T=T), case("soft_cross_entropy", kd.SoftCrossEntropy, T=T),
    case("logit_mse", kd.LogitMSE), case("logit_mse centred", kd.LogitMSE, center=True),
    case("binary_forward_kl", kd.BinaryForwardKL, T=T), case("soft_spearman", kd.SoftSpearman),
    case("soft_spearman strength 3", kd.SoftSpearman, strength=3.0), case("dist", kd.DIST, T=T),
    case("dist weighted", kd.DIST, T=T, inter=2.0, intra=0.5), case("nkd", kd.NKD, T=T),
    case("dkd", kd.DKD, T=T, alpha=1.0, beta=8.0), case("teacher_free", kd.TeacherFree, T=T),
    case("cross_entropy", kd.CrossEntropy), case("cross_entropy smoothed", kd.CrossEntropy, label_smoothing=0.1),
    case("cross_entropy weighted", kd.CrossEntropy, weight=W),
    case("cross_entropy weighted smoothed", kd.CrossEntropy, weight=W, label_smoothing=0.1),
    case("cross_entropy mixed", kd.CrossEntropy, target=MIXED, mask=VALID),
    case("cross_entropy mixed weighted smoothed", kd.CrossEntropy, target=MIXED, mask=VALID, weight=W, label_smoothing=0.1),
]
golden = pytest.mark.parametrize("name, call, module", CASES)


@golden
@dtypes
def test_value_and_gradient_are_the_golden_ones(name, call, module, dtype):
    gold = GOLD["losses"][name]
    rounded = dtype in (torch.bfloat16, torch.float16)
    if rounded and name.startswith(("soft_spearman", "dist")): pytest.skip("its inputs would be others, after rounding")
    s, t = S.to(dtype), Z.to(dtype)
    value, grad = value_and_grad(lambda x: call(x, t), s)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and grad.dtype == dtype
    rel = 5e-2 if rounded else {torch.float32: 3e-6, torch.float64: 1e-11}[dtype]
    assert value.item() == pytest.approx(gold["value"], rel=rel)
    want = torch.tensor(gold["gradient"], dtype=torch.float64)
    assert (grad.double() - want).abs().max() <= rel * want.abs().max()
    assert grad[~VALID].eq(0).all()
    torch.testing.assert_close(module()(s, t), call(s, t), rtol=0, atol=0)
    if "rows" in gold:
        torch.testing.assert_close(call(s, t, reduction="none").double(), torch.tensor(gold["rows"], dtype=torch.float64),
                                   rtol=rel, atol=rel)


@golden
def test_it_is_none_of_the_usual_mistakes(name, call, module):
    got, wrong = call(S, Z).item(), GOLD["losses"][name]["wrong"]
    assert len(wrong) >= 2
    for mistake, value in wrong.items(): assert abs(got - value) > 0.01 * abs(got), mistake


def test_the_golden_of_standardised_logits():
    gold = GOLD["losses"]["standardized"]
    both = kd.Standardized(kd.ForwardKL(T=T)), lambda s, t, y, mask: f.forward_kl(f.standardize(s), f.standardize(t), y, T=T, mask=mask)
    for loss in both:
        value, grad = value_and_grad(lambda x: loss(x, Z, Y, mask=MASK), S)
        assert value.item() == pytest.approx(gold["value"], rel=1e-11)
        torch.testing.assert_close(grad, torch.tensor(gold["gradient"], dtype=torch.float64), rtol=1e-9, atol=1e-12)
        for mistake, wrong in gold["wrong"].items(): assert abs(value - wrong) > 0.01 * value, mistake


@pytest.mark.parametrize("name, rows", [
    ("confidence max", lambda: f.confidence_weight(Z)), ("confidence entropy", lambda: f.confidence_weight(Z, by="entropy")),
    ("confidence label", lambda: f.confidence_weight(Z, Y, by="label")), ("difficulty", lambda: f.difficulty_weight(S, Z, Y)),
    ("entropy", lambda: f.entropy_weight(S, Z)), ("spearman", lambda: f.spearman(S, Z)), ("kendall", lambda: f.kendall(S, Z)),
    ("soft_rank", lambda: f.soft_rank(S)),
    ("virtual teacher", lambda: f.virtual_teacher(Y.clamp(min=0), 6, dtype=torch.float64).softmax(-1))])
def test_measures_and_weights_are_the_golden_ones(name, rows):
    torch.testing.assert_close(rows(), torch.tensor(GOLD["rows"][name], dtype=torch.float64), rtol=1e-11, atol=1e-13)


# cross-entropy is torch's

@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("soft", [False, True], ids=["labels", "probabilities"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dense", [False, True])
def test_cross_entropy_is_that_of_torch(smoothing, weighted, soft, reduction, dense):
    s = logits(5, 6, 3, seed=1) if dense else logits(5, 6, seed=1)
    y = torch.arange(15).reshape(5, 3) % 6 if dense else torch.tensor([0, 5, -100, 2, 2])
    if dense: y[0, 1] = -100
    target = logits(*s.shape, seed=2).softmax(1) if soft else y
    options = dict(weight=W if weighted else None, label_smoothing=smoothing, reduction=reduction)
    want, want_grad = value_and_grad(lambda x: F.cross_entropy(x, target, **options), s)
    for call in (lambda x: f.cross_entropy(x, target, dim=1, **options), lambda x: kd.CrossEntropy(dim=1, **options)(x, None, target)):
        got, grad = value_and_grad(call, s)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(grad, want_grad)


def test_cross_entropy_adds_masks_weights_of_rows_and_a_normaliser():
    for target in (Y, MIXED):
        for options in ({"weight": W}, {"label_smoothing": 0.2}, {}):
            rows = f.cross_entropy(S, target, reduction="none", **options)
            w = torch.linspace(0, 2, 7, dtype=torch.float64)
            valid = MASK & (Y != -100) if target is Y else MASK
            total = (rows * w)[valid].sum()
            assert f.cross_entropy(S, target, mask=MASK, row_weight=w, reduction="sum", **options).item() == pytest.approx(total.item())
            assert f.cross_entropy(S, target, mask=MASK, row_weight=w, normalizer=3, **options).item() == pytest.approx(total.item() / 3)
    p = MIXED.clone().requires_grad_()
    f.cross_entropy(S, p).backward()
    torch.testing.assert_close(p.grad, -S.log_softmax(-1) / 7)  # a target may be learnt


def test_cross_entropy_where_torch_divides_nothing_by_nothing():
    none = torch.full((7,), -100)
    assert F.cross_entropy(S, none).isnan() and f.cross_entropy(S, none, label_smoothing=0.1) == 0
    assert f.cross_entropy(S, torch.full((7,), 4), weight=W) == 0  # class 4 has no weight
    s = S.clone()
    s[:, 1] = -INF  # what has no probability costs nothing
    assert f.cross_entropy(s, torch.eye(6, dtype=torch.float64)[[0, 2, 3, 4, 5, 0, 2]]).isfinite()
    assert f.cross_entropy(s, MIXED) == INF and f.cross_entropy(s, torch.zeros(7, dtype=torch.long), label_smoothing=0.1) == INF


def test_the_plain_case_is_fused_and_the_others_are_not():
    soft = kd.SoftKL()
    assert len(_groups(kd.CrossEntropy() + soft)) == len(_groups(kd.CrossEntropy() + soft, Y)) == 1
    assert len(_groups(kd.CrossEntropy() + soft, MIXED)) == 2
    for loss in (kd.CrossEntropy(weight=W), kd.CrossEntropy(label_smoothing=0.1), kd.TeacherFree()):
        assert len(_groups(loss + soft)) == 2
        for target in (Y, MIXED)[:1 + isinstance(loss, kd.CrossEntropy)]:
            objective = 0.3 * loss + 0.7 * soft
            want = 0.3 * loss(S, None, target) + 0.7 * soft(S, Z, target if target is Y else None)
            torch.testing.assert_close(objective(S, Z, target), want)
            parts = objective.parts(S, Z, target)
            assert [p.weight for p in parts.values()] == [0.3, 0.7] and all(p.rows.shape == (7,) for p in parts.values())
    mixup = 0.1 * kd.CrossEntropy() + 0.9 * soft
    torch.testing.assert_close(mixup(S, Z, MIXED), 0.1 * F.cross_entropy(S, MIXED) + 0.9 * soft(S, Z))
    torch.testing.assert_close(mixup(S, Z, labels=MIXED), mixup(S, Z, MIXED))


# the contract, for the losses that have no kernel

class Loss:
    def __init__(self, name, module, **options):
        self.name, self.module, self.options = name, functools.partial(module, **options), options

    def __repr__(self): return self.name
    def __call__(self, s, t, y=None, **k): return getattr(f, self.name)(s, t, y, **self.options, **k)


NEW = [Loss("nkd", kd.NKD, T=2.0), Loss("dkd", kd.DKD, T=2.0), Loss("binary_forward_kl", kd.BinaryForwardKL, T=2.0), Loss("soft_spearman", kd.SoftSpearman),
       Loss("teacher_free", kd.TeacherFree, T=2.0)]
new = pytest.mark.parametrize("loss", NEW, ids=str)


@pytest.mark.parametrize("name, module", [("nkd", kd.NKD), ("dkd", kd.DKD), ("binary_forward_kl", kd.BinaryForwardKL), ("teacher_free", kd.TeacherFree),
                                          ("soft_spearman", kd.SoftSpearman), ("cross_entropy", kd.CrossEntropy), ("dist", kd.DIST)])
def test_function_and_module_share_options_and_defaults(name, module):
    called = {"student", "teacher", "target", "labels", "mask", "row_weight", "normalizer"}
    names = lambda g: {n: p.default for n, p in inspect.signature(g).parameters.items() if n not in called | {"self"}}
    assert names(module.__init__) == names(getattr(f, name))
    assert names(module.__init__).get("reduction") == "mean"


@new
@dtypes
def test_masked_rows_are_exactly_zero_even_where_they_hold_nan(loss, dtype):
    s, t = S.to(dtype).clone(), Z.to(dtype).clone()
    clean, clean_grad = value_and_grad(lambda x: loss(x, t, Y, mask=MASK), s)
    s[4], s[2], t[4] = NAN, INF, NAN
    y = torch.where(MASK, Y, 99)  # the label of a masked row is not looked at
    w = torch.where(VALID, 1.0, NAN)
    got, grad = value_and_grad(lambda x: loss(x, t, y, mask=MASK, row_weight=w), s)
    torch.testing.assert_close(got, clean), torch.testing.assert_close(grad, clean_grad)
    rows = loss(s, t, y, mask=MASK, reduction="none")
    assert rows[~VALID].eq(0).all() and grad[~VALID].eq(0).all()


@new
def test_reductions_weights_and_nothing(loss):
    y = Y.clamp(min=0)
    rows = loss(S, Z, y, reduction="none")
    w = torch.linspace(0, 2, 7, dtype=torch.float64)
    assert loss(S, Z, y, reduction="sum").item() == pytest.approx(rows.sum().item())
    assert loss(S, Z, y, row_weight=w).item() == pytest.approx((w * rows).sum().item() / 7)
    halves = [loss(S[i:j], Z[i:j], y[i:j], normalizer=7) for i, j in ((0, 3), (3, 7))]
    assert sum(halves).item() == pytest.approx(rows.mean().item())
    value, grad = value_and_grad(lambda x: loss(x, Z, y, mask=torch.zeros(7, dtype=torch.bool)), S)
    assert value == 0 and grad.eq(0).all()
    for shape in ((0, 6), (2, 0, 6)):
        value, grad = value_and_grad(lambda x: loss(x, torch.zeros(shape), torch.zeros(shape[:-1]).long()), torch.zeros(shape))
        assert value == 0 and grad.shape == shape
    one = loss(S[0], Z[0], y[0], reduction="none")  # a row without a batch
    torch.testing.assert_close(one, rows[0])


@new
def test_layouts(loss):
    s, t, y = logits(3, 6, 4, seed=1), logits(3, 6, 4, seed=2), torch.arange(12).reshape(3, 4) % 6
    last = loss(s.movedim(1, -1), t.movedim(1, -1), y, reduction="none")
    torch.testing.assert_close(loss(s, t, y, dim=1, reduction="none"), last)
    torch.testing.assert_close(loss.module(dim=1, reduction="none")(s, t, y), last)


@new
def test_a_spoilt_row_spoils_no_other(loss):
    y = Y.clamp(min=0)
    clean, clean_grad = value_and_grad(lambda x: loss(x, Z, y, reduction="none"), S)
    s, t = S.clone(), Z.clone()
    s[1, 3], s[2, 0], t[3, 5], s[4] = NAN, INF, NAN, -INF
    got, grad = value_and_grad(lambda x: loss(x, t, y, reduction="none"), s)
    bad = [1, 2, 4] if loss.name == "teacher_free" else [1, 2, 3] if loss.name == "binary_forward_kl" else [1, 2, 3, 4]
    assert not got[bad].isfinite().any()
    others = [i for i in range(7) if i not in (1, 2, 3, 4)]
    assert torch.equal(got[others], clean[others]) and torch.equal(grad[others], clean_grad[others])


@new
def test_one_class_equal_classes_and_identical_inputs(loss):
    y = torch.zeros(3, dtype=torch.long)
    if loss.name != "teacher_free":
        value, grad = value_and_grad(lambda x: loss(x, torch.ones(3, 1), y), torch.zeros(3, 1))
        assert value.isfinite() and grad.isfinite().all()
    value, grad = value_and_grad(lambda x: loss(x, torch.ones(3, 5), y), torch.zeros(3, 5))
    assert value.isfinite() and grad.isfinite().all()
    value, grad = value_and_grad(lambda x: loss(x, Z, Y), Z)
    assert value.isfinite() and grad.isfinite().all()
    if loss.name in ("binary_forward_kl", "soft_spearman"): assert value == 0 and grad.abs().max() < 1e-12


@new
def test_the_teacher_gets_a_gradient_only_when_asked(loss):
    if loss.name == "teacher_free": return
    t = Z.clone().requires_grad_()
    loss(S.clone().requires_grad_(), t, Y).backward()
    assert t.grad is None
    loss(S, t, Y, detach_teacher=False).backward()
    assert t.grad.abs().max() > 0


@new
def test_gradcheck(loss):
    s, t = logits(3, 4, seed=3), logits(3, 4, seed=4).requires_grad_()
    y, mask = torch.tensor([0, -100, 2]), torch.tensor([True, True, True])
    s.requires_grad_()
    g = lambda x: loss(x, t.detach(), y, mask=mask)
    assert torch.autograd.gradcheck(g, s) and torch.autograd.gradgradcheck(g, s)
    if loss.name != "teacher_free":
        assert torch.autograd.gradcheck(lambda a, b: loss(a, b, y, detach_teacher=False), (s, t))


@new
def test_functorch_and_compile(loss):
    s, t, y = S.float(), Z.float(), Y.clamp(min=0)
    rows = loss(s, t, y, reduction="none")
    torch.testing.assert_close(torch.func.vmap(lambda a, b, c: loss(a[None], b[None], c[None]))(s, t, y), rows)
    grad = value_and_grad(lambda x: loss(x, t, y), s)[1]
    torch.testing.assert_close(torch.func.grad(lambda x: loss(x, t, y))(s), grad)
    torch._dynamo.reset()
    module = loss.module()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    got, got_grad = value_and_grad(lambda x: compiled(x, t, y), s)
    torch.testing.assert_close(got, module(s, t, y)), torch.testing.assert_close(got_grad, grad)
    torch._dynamo.reset()


def test_a_bad_label_raises_on_the_cpu():
    bad = torch.tensor([0, 1, 2, 6, 0, 1, 2])
    calls = [lambda y, **k: f.nkd(S, Z, y, **k), lambda y, **k: f.cross_entropy(S, y, label_smoothing=0.1, **k),
             lambda y, **k: f.teacher_free(S, None, y, **k)]
    for call in calls:
        with pytest.raises(ValueError, match="label 6 at row 3.*6 classes"): call(bad)
        call(bad, mask=bad != 6)
    for call in (lambda: f.difficulty_weight(S, Z, bad), lambda: f.confidence_weight(Z, bad), lambda: f.smooth_labels(bad, 6)):
        with pytest.raises(ValueError, match="label 6"): call()


@pytest.mark.parametrize("call, error, words", [
    (lambda: f.nkd(S, Z), ValueError, "nkd needs labels"), (lambda: f.nkd(S, Z, MIXED), ValueError, "one class index a row"),
    (lambda: f.nkd(S, None, Y), TypeError, "teacher must be a tensor"), (lambda: kd.NKD()(S, None, Y), TypeError, "teacher"),
    (lambda: f.nkd(S, Z, Y, T=0), ValueError, "T must be a number > 0"), (lambda: f.nkd(S, Z, Y, gamma="1"), ValueError, "gamma"),
    (lambda: f.binary_forward_kl(S, Z, backend="cpp"), ValueError, "no kernel"), (lambda: kd.SoftSpearman(backend="cuda"), ValueError, "no kernel"),
    (lambda: f.binary_forward_kl(S, Z[:, :3]), ValueError, r"student \(7, 6\) and teacher \(7, 3\)"),
    (lambda: f.soft_spearman(S, Z, strength=0), ValueError, "strength must be a number > 0"),
    (lambda: f.soft_rank(S, -1.0), ValueError, "strength"), (lambda: f.top_k_overlap(S, Z, 7), ValueError, "k must be.*6 classes"),
    (lambda: f.standardize(S.long()), TypeError, "floating-point"),
    (lambda: f.cross_entropy(S), ValueError, "needs labels"),
    (lambda: f.cross_entropy(S, MIXED[:, :3]), ValueError, "target must have the shape"),
    (lambda: f.cross_entropy(S, torch.zeros(7)), TypeError, "target must be integer"),
    (lambda: f.cross_entropy(S, Y, weight=torch.ones(5)), ValueError, r"one number a class, \(6,\), got \(5,\)"),
    (lambda: f.cross_entropy(S, Y, weight=[1.0] * 6), TypeError, "weight must be a float tensor"),
    (lambda: f.cross_entropy(S, Y, label_smoothing=2), ValueError, "label_smoothing must be a number from 0 to 1, got 2"),
    (lambda: kd.CrossEntropy(label_smoothing=-1), ValueError, "label_smoothing"),
    (lambda: f.cross_entropy(S, MIXED, backend="cpp"), ValueError, "no kernel"),
    (lambda: f.cross_entropy(S, Y, labels=Y), ValueError, "two names"),
    (lambda: f.confidence_weight(Z, by="sure"), ValueError, "by must be one of max, entropy, label, got 'sure'"),
    (lambda: f.confidence_weight(Z, by="label"), ValueError, "needs labels"),
    (lambda: f.difficulty_weight(S, Z, None), ValueError, "needs labels"),
    (lambda: f.virtual_teacher(Y, 6, 0.1), ValueError, "correct must lie between 1/6 and 1"),
    (lambda: f.virtual_teacher(Y, 1), ValueError, "2 classes"), (lambda: f.smooth_labels(MIXED, 6), TypeError, "class indices"),
    (lambda: f.teacher_free(S), ValueError, "pass target="), (lambda: f.teacher_free(S, None, MIXED), TypeError, "class indices"),
    (lambda: f.dist(S, Z, inter=NAN), ValueError, "inter must be a finite number"),
    (lambda: f.forward_kl(S, Z, T=torch.ones(3)), ValueError, r"T must have the shape.*\(7,\), got \(3,\)"),
    (lambda: f.forward_kl(S, Z, T=torch.ones(7).long()), TypeError, "T must be float"),
    (lambda: f.forward_kl(S, Z, T=torch.ones(7), backend="cpp"), ValueError, "own temperature|not built"),
    (lambda: kd.SoftKL(T=torch.tensor(2.0, requires_grad=True)), TypeError, "must be an nn.Parameter"),
    (lambda: kd.Standardized(kd.CrossEntropy()), ValueError, r"add that one outside: Standardized\(\.\.\.\) \+ CrossEntropy"),
    (lambda: kd.Standardized(kd.Hint()), ValueError, "compare logits"), (lambda: kd.Standardized(3), TypeError, "kdlab loss"),
    (lambda: kd.RowWeighted(kd.DIST(), None), ValueError, "no value belongs to one row"),
    (lambda: kd.ConfidenceWeighted(kd.SoftKL(), "sure"), ValueError, "by must be"),
    (lambda: kd.DifficultyWeighted(kd.SoftKL())(S, Z), ValueError, "needs labels"),
])
def test_bad_arguments_are_named(call, error, words):
    with pytest.raises(error, match=words): call()


# invariances

def test_shifts_scales_and_permutations():
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    place = torch.argsort(order)
    y = Y.clamp(min=0)
    far_s, far_t = S.round(decimals=2) + 1e4, Z.round(decimals=2) - 1e4
    near_s, near_t = S.round(decimals=2), Z.round(decimals=2)
    for loss in NEW:
        want = loss(near_s, near_t, y)
        torch.testing.assert_close(loss(S[:, order], Z[:, order], place[y]), loss(S, Z, y))
        far = loss(far_s, far_t, y)
        if loss.name == "binary_forward_kl": assert abs(far - want) > 1  # each logit means something by itself
        else: torch.testing.assert_close(far, want, rtol=1e-8, atol=0)
    torch.testing.assert_close(f.cross_entropy(far_s, y, weight=W), f.cross_entropy(near_s, y, weight=W), rtol=1e-9, atol=0)
    for loss in (kd.Standardized(kd.ForwardKL(T=2)), kd.Standardized(kd.DIST()), kd.Standardized(kd.ReverseKL() + kd.JSD())):
        torch.testing.assert_close(loss(7 * S - 3, Z / 9 + 2), loss(S, Z))  # scale and shift
    row = lambda s, t: (1 - torch.stack([torch.corrcoef(torch.stack(x))[0, 1] for x in zip(s.softmax(-1), t.softmax(-1))])).mean()
    torch.testing.assert_close(f.dist(S, Z, intra=0.0), row(S, Z))
    torch.testing.assert_close(f.dist(S, Z, inter=3.0, intra=3.0), 3 * f.dist(S, Z))
    torch.testing.assert_close(f.dist(S, Z, inter=0.0) + f.dist(S, Z, intra=0.0), f.dist(S, Z, backend="torch"))
    p, a = Z.softmax(-1), torch.linspace(0.2, 0.9, 7, dtype=torch.float64)[:, None]
    mixed = (a * p + (1 - a) / 6).log()  # Pearson sees no change of scale or level of the probabilities
    assert f.dist(mixed, Z, intra=0.0) < 1e-12 and f.forward_kl(mixed, Z) > 0.01


def test_ranks_see_no_rising_map():
    rising = lambda x: x**3 + 2 * x + x.exp()
    for measure in (f.spearman, f.kendall, functools.partial(f.top_k_overlap, k=2)):
        torch.testing.assert_close(measure(rising(S), Z.tanh()), measure(S, Z))
        torch.testing.assert_close(measure(Z, Z), torch.ones(7, dtype=torch.float64))
    torch.testing.assert_close(f.spearman(-Z, Z), -torch.ones(7, dtype=torch.float64))
    settled = functools.partial(f.soft_spearman, strength=1e-4)
    torch.testing.assert_close(settled(rising(S), Z.tanh()), settled(S, Z))
    value, grad = value_and_grad(lambda x: settled(x, Z), S)
    torch.testing.assert_close(value, (1 - f.spearman(S, Z)).mean())
    assert grad.abs().max() < 1e-6  # the order is settled


def test_the_limits_of_large_T():
    d = S - Z
    torch.testing.assert_close(f.binary_forward_kl(S, Z, T=1e4), d.square().sum(-1).mean() / 8, rtol=1e-3, atol=0)
    virtual = f.virtual_teacher(Y.clamp(min=0), 6, dtype=torch.float64)
    want = f.logit_mse(S, virtual, center=True) / (2 * 6)
    torch.testing.assert_close(f.teacher_free(S, None, Y.clamp(min=0), T=1e4), want, rtol=1e-2, atol=0)
    far = lambda T: f.nkd(S, Z, Y, T=T, t_squared=False)
    label = -(Z.softmax(-1) * S.log_softmax(-1)).gather(-1, Y.clamp(min=0)[:, None])[Y != -100].mean()
    assert far(1e6).item() == pytest.approx(label.item() + 1.5 * math.log(5), rel=1e-5)  # the others become uniform
    standard = kd.Standardized(kd.LogitMSE())(S, Z) / (2 * 6)  # 1 - Pearson of the logits
    torch.testing.assert_close(kd.Standardized(kd.ForwardKL(T=1e4))(S, Z), standard, rtol=1e-3, atol=0)


def test_stored_log_probabilities_serve_as_logits():
    stored = Z.log_softmax(-1)
    for name in ("forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "total_variation", "soft_cross_entropy", "dist"):
        for T in (1.0, 4.0):
            torch.testing.assert_close(getattr(f, name)(S, stored, T=T), getattr(f, name)(S, Z, T=T), msg=name)
    torch.testing.assert_close(f.nkd(S, stored, Y), f.nkd(S, Z, Y))
    torch.testing.assert_close(f.soft_spearman(S, stored), f.soft_spearman(S, Z))
    torch.testing.assert_close(f.logit_mse(S, stored, center=True), f.logit_mse(S, Z, center=True))
    torch.testing.assert_close(f.standardize(stored), f.standardize(Z))
    assert abs(f.logit_mse(S, stored) - f.logit_mse(S, Z)) > 1 and abs(f.binary_forward_kl(S, stored) - f.binary_forward_kl(S, Z)) > 0.1


def test_the_parts_of_nkd():
    bolder = S.clone()
    y = Y.clamp(min=0)
    bolder[torch.arange(7), y] += 5
    label = lambda s: -(Z.softmax(-1) * s.log_softmax(-1)).gather(-1, y[:, None])[:, 0]
    second = lambda s: f.nkd(s, Z, y, reduction="none") - label(s)
    torch.testing.assert_close(second(bolder), second(S))  # the label's logit is not among the others
    gap = second(S) - second(Z)  # cross-entropy less its lowest value is a KL
    assert (gap > 0).all()
    one = torch.tensor([[0.0, -INF]], dtype=torch.float64)  # two classes, one of them absent
    assert f.nkd(one, one, torch.tensor([0])) == 0


def test_excluded_classes():
    s, t, y = S.clone(), Z.clone(), Y.clamp(min=0) % 5
    s[:, 5] = t[:, 5] = -INF  # absent for both: as if it were not there
    for loss in NEW[:1] + NEW[2:3]:
        got, grad = value_and_grad(lambda x: loss(x, t, y, reduction="none"), s)
        torch.testing.assert_close(got, loss(s[:, :5], t[:, :5], y, reduction="none"), rtol=1e-9, atol=1e-12)
        assert grad.isfinite().all() and grad[:, 5].eq(0).all()
    torch.testing.assert_close(f.standardize(s)[:, :5], f.standardize(s[:, :5]))
    assert f.standardize(s)[:, 5].isneginf().all()
    s, t = S.clone(), Z.clone()
    s[:, 5] = -INF
    assert f.nkd(s, t, torch.zeros(7).long()) == INF  # the student rules out what the teacher does not
    low = S.clone()
    low[:, 5] = -50  # for ranks it is the lowest logit
    torch.testing.assert_close(f.soft_spearman(s, t), f.soft_spearman(low, t))


# ranks

def test_ranks_are_those_of_scipy():
    x = S.round()
    for row, got in zip(x, logit_reference.ranks(x)): assert got.tolist() == scipy.stats.rankdata(row).tolist()
    for row, other, rho, tau in zip(x, Z, f.spearman(x, Z), f.kendall(x, Z)):
        assert rho.item() == pytest.approx(scipy.stats.spearmanr(row, other)[0])
        assert tau.item() == pytest.approx(scipy.stats.kendalltau(row, other)[0])
    assert f.spearman(torch.zeros(1, 4), torch.randn(1, 4)) == 0 == f.kendall(torch.zeros(1, 4), torch.randn(1, 4))
    assert f.spearman(torch.tensor([[NAN, 1.0]]), torch.tensor([[0.0, 1.0]])).isnan()


@pytest.mark.parametrize("n", [1, 2, 3, 40])
@pytest.mark.parametrize("strength", [0.01, 1.0, 30.0])
def test_soft_ranks_in_pieces_against_pooling_by_hand(monkeypatch, n, strength):
    script = goldfiles.script("logits")
    x = logits(4, n, seed=n)
    x[2] = x[2].round()  # with ties
    script.C = n
    want = torch.tensor(script.soft_ranks(x.numpy(), strength))
    torch.testing.assert_close(f.soft_rank(x, strength), want, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(want.sum(-1), torch.full((4,), n * (n + 1) / 2, dtype=torch.float64))
    monkeypatch.setattr(logit_reference, "_PIECE", 7 * n)  # a few starts at a time
    torch.testing.assert_close(f.soft_rank(x, strength), want, rtol=1e-9, atol=1e-9)


def test_soft_ranks_have_the_gradient_of_their_blocks():
    x = logits(3, 5, seed=5).requires_grad_()
    for strength in (0.5, 3.0): assert torch.autograd.gradcheck(lambda x: f.soft_rank(x, strength), x)
    exact = torch.tensor([[0.0, 10.0, 20.0]], requires_grad=True)
    assert torch.autograd.grad(f.soft_rank(exact)[0, 1], exact)[0].eq(0).all()


# temperatures

DIVERGENCES = "forward_kl reverse_kl jsd skew_kl skew_reverse_kl total_variation soft_cross_entropy nkd binary_forward_kl".split()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_temperature_for_each_row(name):
    loss = getattr(f, name)
    T = torch.linspace(0.5, 6, 7, dtype=torch.float64)
    rows = loss(S, Z, Y, T=T, mask=MASK, reduction="none")
    each = torch.stack([loss(S[i:i + 1], Z[i:i + 1], Y[i:i + 1], T=T[i].item(), mask=MASK[i:i + 1]) for i in range(7)])
    torch.testing.assert_close(rows, each)
    for t_squared in (True, False):
        g = lambda T: loss(S, Z, Y, T=T, mask=MASK, t_squared=t_squared)
        assert torch.autograd.gradcheck(g, T.clone().requires_grad_())
    spoilt = torch.where(VALID, T, NAN).requires_grad_()  # of a row that does not count
    value = loss(S, Z, Y, T=spoilt, mask=MASK)
    value.backward()
    torch.testing.assert_close(value, rows[VALID].mean()), torch.testing.assert_close(spoilt.grad[~VALID], torch.zeros(2).double())
    assert loss(S.float(), Z.float(), Y, T=T.float(), mask=MASK).item() == pytest.approx(rows[VALID].mean().item(), rel=1e-6)
    torch.testing.assert_close(value_and_grad(lambda x: loss(x, Z, Y, T=torch.full((7,), 2.0)), S)[1],
                               value_and_grad(lambda x: loss(x, Z, Y, T=2.0), S)[1])
    learnt = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda T: loss(S, Z, Y, T=T), learnt)


@pytest.mark.parametrize("module", [kd.SoftKL, kd.ReverseKL, kd.JSD, kd.NKD, kd.BinaryForwardKL, kd.TeacherFree, kd.DIST])
def test_a_module_learns_its_temperature(module):
    loss = module(T=nn.Parameter(torch.tensor(3.0)))
    assert [p is loss.T for p in loss.parameters()] == [True] and loss.state_dict()["T"] == 3 and "T=3" in repr(loss) + loss.equation()
    objective = 0.1 * kd.CrossEntropy() + 0.9 * loss
    torch.testing.assert_close(objective(S, Z, Y), 0.1 * kd.CrossEntropy()(S, None, Y) + 0.9 * module(T=3.0)(S, Z, Y))
    before = objective(S, Z, Y)
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.01)
    before.backward()
    assert loss.T.grad.abs() > 0
    optimizer.step()
    assert objective(S, Z, Y) < before
    with pytest.raises(TypeError, match="parameter 'T'"): loss.T = 2.0
    twin = copy.deepcopy(objective)
    with torch.no_grad(): twin.losses[1].T += 1
    assert twin(S, Z, Y) != objective(S, Z, Y)
    fresh = 0.1 * kd.CrossEntropy() + 0.9 * module(T=nn.Parameter(torch.tensor(1.0)))
    fresh.load_state_dict(objective.state_dict())
    assert torch.equal(fresh(S, Z, Y), objective(S, Z, Y))


# mixed precision, copies

def test_autocast_and_grad_scaler():
    torch.manual_seed(0)
    x, y = torch.randn(32, 8), torch.randint(5, (32,))
    teacher = torch.randn(32, 5) * 3
    losses = [0.1 * kd.CrossEntropy() + 0.9 * kd.SoftKL(), kd.CrossEntropy(label_smoothing=0.1) + kd.NKD(), kd.Standardized(kd.JSD(T=2)),
              kd.ConfidenceWeighted(kd.ReverseKL()), kd.SoftSpearman() + kd.BinaryForwardKL(), kd.TeacherFree() + kd.DIST()]
    for dtype in (torch.bfloat16, torch.float16):
        for loss in losses:
            student = nn.Linear(8, 5)
            plain = copy.deepcopy(student)
            loss(plain(x), teacher, y).backward()
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
            optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
            with torch.autocast("cpu", dtype=dtype):
                z = student(x)
                value = loss(z, teacher, y)
            assert z.dtype == dtype and value.dtype == torch.float32
            assert torch.equal(value, loss(z, teacher, y))  # autocast changes nothing inside
            scaler.scale(value).backward()
            scaler.unscale_(optimizer)
            want = plain.weight.grad
            assert (student.weight.grad - want).abs().max() < 0.1 * want.abs().max(), loss
            before = student.weight.detach().clone()
            scaler.step(optimizer), scaler.update()
            assert not torch.equal(before, student.weight)


def named_weights(student, teacher, target): return teacher.softmax(-1).amax(-1)


MODULES = [kd.NKD(T=2, gamma=1.0), kd.BinaryForwardKL(T=3), kd.SoftSpearman(strength=2.0), kd.TeacherFree(),
           kd.CrossEntropy(weight=W.float(), label_smoothing=0.1), kd.Standardized(kd.ForwardKL(T=2)), kd.DIST(inter=2.0),
           kd.RowWeighted(kd.SoftKL(), named_weights), kd.ConfidenceWeighted(kd.JSD()), kd.DifficultyWeighted(kd.SoftCrossEntropy(T=2)),
           kd.EntropyWeighted(0.5 * kd.SoftKL() + kd.NKD())]


@pytest.mark.parametrize("loss", MODULES, ids=lambda m: type(m).__name__)
def test_modules_copy_pickle_and_have_a_state(loss):
    objective = 0.5 * loss + kd.ReverseKL()
    want = objective(S, Z, Y)
    for twin in (copy.deepcopy(objective), pickle.loads(pickle.dumps(objective))):
        assert torch.equal(twin(S, Z, Y), want) and repr(twin) == repr(objective)
        twin.load_state_dict(objective.state_dict())
    assert list(objective.state_dict()) == (["losses.0.weight"] if isinstance(loss, kd.CrossEntropy) else [])
    assert objective.equation() and objective.parts(S, Z, Y) and (0 * loss)(S.requires_grad_(False), Z) == 0
    torch.testing.assert_close((2 * loss)(S, Z, Y), 2 * loss(S, Z, Y))


def test_class_weights_are_a_buffer():
    loss = kd.CrossEntropy(weight=torch.ones(6))
    assert loss.double().weight.dtype == torch.float64 and [n for n, _ in loss.named_buffers()] == ["weight"]
    loss.load_state_dict({"weight": W})
    torch.testing.assert_close(loss(S, None, Y), F.cross_entropy(S, Y, weight=W))


# wrappers and row weights

def test_standardised_goes_around_any_soft_loss():
    z_s, z_t = f.standardize(S), f.standardize(Z)
    for inner in (kd.SoftKL(), kd.ReverseKL(T=2), kd.JSD(), kd.SkewKL(), kd.SkewReverseKL(), kd.TotalVariation(), kd.LogitMSE(),
                  kd.SoftCrossEntropy(), kd.NKD(), kd.DIST(), kd.SoftSpearman(), 0.5 * kd.SoftKL() + kd.ReverseKL()):
        outer = kd.Standardized(inner)
        torch.testing.assert_close(outer(S, Z, Y, mask=MASK), inner(z_s, z_t, Y, mask=MASK))
        torch.testing.assert_close((2 * outer + kd.CrossEntropy())(S, Z, Y), 2 * inner(z_s, z_t, Y) + kd.CrossEntropy()(S, None, Y))
    dense = kd.Standardized(kd.SoftKL(dim=1))
    torch.testing.assert_close(dense(S.t()[None], Z.t()[None]), kd.Standardized(kd.SoftKL())(S, Z))
    flat = torch.full((1, 4), 2.0, requires_grad=True)
    value = f.standardize(flat)
    value.sum().backward()
    assert value.eq(0).all() and flat.grad.eq(0).all()
    assert torch.autograd.gradcheck(f.standardize, logits(3, 5).requires_grad_())
    half = f.standardize(S.half())
    torch.testing.assert_close(half, f.standardize(S.half().double()).float()), torch.testing.assert_close(half.var(-1, correction=0), torch.ones(7))


def test_row_weights_multiply_rows():
    cases = [(kd.RowWeighted(kd.SoftKL(), named_weights), Z.softmax(-1).amax(-1)),
             (kd.ConfidenceWeighted(kd.SoftKL(), "label"), f.confidence_weight(Z, Y, by="label")),
             (kd.DifficultyWeighted(kd.SoftKL()), f.difficulty_weight(S, Z, Y)), (kd.EntropyWeighted(kd.SoftKL()), f.entropy_weight(S, Z))]
    for loss, w in cases:
        torch.testing.assert_close(loss(S, Z, Y, mask=MASK), kd.SoftKL()(S, Z, Y, mask=MASK, row_weight=w))
        twice = torch.full((7,), 2.0, dtype=torch.float64)
        torch.testing.assert_close(loss(S, Z, Y, row_weight=twice), 2 * loss(S, Z, Y))
        loss.normalize = True
        want = (w * kd.SoftKL(reduction="none")(S, Z, Y))[VALID].sum() / w[VALID].sum()
        torch.testing.assert_close(loss(S, Z, torch.where(MASK, Y, 99), mask=MASK), want)
        s = S.clone().requires_grad_()
        loss(s, Z, Y).backward()
        assert s.grad[2].eq(0).all() and s.grad.isfinite().all()


AROUND = {"Standardized": lambda: kd.Standardized(kd.ForwardKL()), "RowWeighted": lambda: kd.RowWeighted(kd.SoftKL(), named_weights),
          "ConfidenceWeighted": lambda: kd.ConfidenceWeighted(kd.SoftKL(), normalize=True), "DifficultyWeighted": lambda: kd.DifficultyWeighted(kd.SoftKL()),
          "EntropyWeighted": lambda: kd.EntropyWeighted(kd.SoftKL())}


@pytest.mark.parametrize("name", AROUND)
def test_what_does_not_count_may_hold_anything(name):
    loss, y, mask = AROUND[name](), torch.arange(7) % 3, torch.ones(7, dtype=torch.bool)
    y[1], mask[4] = -100, False
    s, z = S.clone(), Z.clone()
    s[1], s[4], z[1], z[4] = torch.nan, torch.inf, torch.inf, torch.nan
    s.requires_grad_(), (clean := S.clone().requires_grad_())
    loss(s, z, y, mask=mask).backward(), loss(clean, Z, y, mask=mask).backward()
    torch.testing.assert_close(s.grad, clean.grad)
    assert s.grad[1].eq(0).all() and s.grad[4].eq(0).all() and s.grad[0].ne(0).any()
    for part in loss.parts(s, z, labels=y, mask=mask).values(): assert part.rows[[1, 4]].eq(0).all() and part.rows.isfinite().all()


@pytest.mark.parametrize("name", AROUND)
def test_no_classes_and_no_rows_are_zero(name):
    for shape in ((4, 0), (0, 5), (0, 0)):
        s, y = torch.zeros(shape, requires_grad=True), torch.full(shape[:1], -100)
        value = AROUND[name]()(s, torch.zeros(shape), y)
        value.backward()
        assert value == 0 and s.grad.shape == shape


@pytest.mark.parametrize("name", AROUND)
@pytest.mark.parametrize("given, error, words", [
    (dict(mask=torch.ones(3, dtype=torch.bool)), ValueError, "mask must have the shape"), (dict(mask=torch.ones(7)), TypeError, "mask must be bool"),
    (dict(row_weight=torch.ones(3)), ValueError, "row_weight must have the shape"), (dict(labels=torch.zeros(3).long()), ValueError, "target must have the shape"),
])
def test_what_goes_around_a_loss_names_wrong_arguments(name, given, error, words):
    with pytest.raises(error, match=words): AROUND[name]()(S, Z, **({"labels": Y} | given))


def test_weights_of_rows_must_be_one_number_a_row():
    for by, error, words in ((lambda s, t, y: torch.ones(3), ValueError, "weights of by= must have the shape"), (lambda s, t, y: 1., TypeError, "weights of rows must be a tensor")):
        with pytest.raises(error, match=words): kd.RowWeighted(kd.SoftKL(), by)(S, Z, Y)


def test_row_weights_at_their_ends():
    sure = torch.tensor([[200.0, 0.0], [0.0, 200.0], [0.0, 0.0]], dtype=torch.float64)
    y = torch.zeros(3, dtype=torch.long)
    assert f.confidence_weight(sure, by="entropy").tolist() == [1, 1, 0]
    assert f.confidence_weight(sure, y, by="label").tolist() == pytest.approx([1, 0, 0.5])
    teacher = torch.tensor([[800.0, 0.0]] * 3, dtype=torch.float64)  # its loss underflows to 0
    assert f.difficulty_weight(sure, teacher, y).tolist()[1:] == [1, 1]
    assert f.difficulty_weight(teacher, teacher, y).tolist() == [0, 0, 0]
    for w in (f.confidence_weight(S.requires_grad_()), f.entropy_weight(S, Z)): assert not w.requires_grad
    S.requires_grad_(False)
    assert f.entropy_weight(S, Z, Y)[2] == 0 == f.confidence_weight(Z, Y)[2]


def test_a_weight_stands_before_the_whole_of_a_sum():
    assert (2 * kd.CRD()).equation() == "2·(log(1 + e^(c - a)) + Σ log(1 + e^(a_k - c)), a = g(s)·g(t)/0.07, both ways)"
    assert (0.5 * kd.NKD() + kd.Hint()).equation().startswith("0.5·(-p_y log q_y - 1.5·4²·Σ p̂ log q̂ over")
    assert (2 * kd.SoftKL(T=2) - 3 * kd.JSD()).equation().startswith("2·2²·KL(softmax(teacher/2) ‖ softmax(student/2)) - 3·(0.5·KL(")


# labels as a teacher

def test_label_smoothing_is_a_teacher():
    y = torch.where(Y == -100, 0, Y)
    for e in (0.0, 0.1, 1.0):
        teacher = f.smooth_labels(y, 6, e, dtype=torch.float64)
        torch.testing.assert_close(f.soft_cross_entropy(S, teacher), F.cross_entropy(S, y, label_smoothing=e))
        kl, ce = (value_and_grad(lambda x: g(x), S)[1] for g in (lambda x: f.forward_kl(x, teacher), lambda x: f.cross_entropy(x, y, label_smoothing=e)))
        torch.testing.assert_close(kl, ce)
    torch.testing.assert_close(f.soft_cross_entropy(S, f.smooth_labels(Y, 6, 0.1).double(), Y), F.cross_entropy(S, Y, label_smoothing=0.1))


def test_teacher_free_needs_no_teacher():
    loss = kd.TeacherFree(T=5.0, correct=0.9)
    want = f.forward_kl(S, f.virtual_teacher(Y, 6, 0.9, dtype=torch.float64), Y, T=5.0)
    torch.testing.assert_close(loss(S, None, Y), want)
    torch.testing.assert_close((0.9 * kd.CrossEntropy() + 0.1 * loss)(S, None, Y), 0.9 * kd.CrossEntropy()(S, None, Y) + 0.1 * want)
    torch.testing.assert_close(f.teacher_free(S, None, Y, T=5.0, correct=0.9, t_squared=False), want / 25)
    assert abs(f.teacher_free(S, None, Y) - f.teacher_free(S, None, Y, correct=0.9)) > 0.01


# labels that are missing

LABELLED = [kd.NKD(T=2), kd.DKD(T=2), kd.DifficultyWeighted(kd.SoftKL()), kd.ConfidenceWeighted(kd.SoftKL(), "label"),
            kd.Standardized(kd.NKD())]


@pytest.mark.parametrize("loss", LABELLED, ids=lambda m: type(m).__name__)
def test_rows_without_a_label_count_in_no_term_of_a_loss_that_needs_them(loss):
    from kdlab.terms import Seen, weigh
    assert loss.needs_labels and not kd.SoftKL().needs_labels and not kd.ConfidenceWeighted(kd.SoftKL()).needs_labels
    valid = Y != -100
    value, grad = value_and_grad(lambda x: loss(x, Z, Y), S)
    torch.testing.assert_close(value, loss(S[valid], Z[valid], Y[valid]))
    assert grad[~valid].eq(0).all() and loss(S, Z, torch.full((7,), -100)) == 0
    soft = kd.ReverseKL()  # needs no labels: in a run it counts every row
    got, worth = weigh(2 * loss + soft + kd.CrossEntropy(), Seen(S, {}), Seen(Z, {}), Y)
    torch.testing.assert_close(got, 2 * loss(S, Z, Y) + soft(S, Z) + f.cross_entropy(S, Y))
    assert len(worth) == 3
    got, worth = weigh(2 * loss + soft, Seen(S, {}), Seen(Z, {}), None)  # no label at all
    torch.testing.assert_close(got, soft(S, Z))
