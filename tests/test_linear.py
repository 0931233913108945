"""Divergences from hidden states: the same numbers as whole logits, whatever the chunks, and never the whole logits."""
import inspect

import pytest
import torch
import torch.nn.functional as F

import kdlab as kd
from kdlab import ops
from kdlab.functional import linear as engine
from kdlab.functional import linear_forward_kl
from kdlab.functional.linear import linear_op

KINDS = {"forward_kl": {}, "reverse_kl": {}, "jsd": {"beta": 0.3}, "skew_kl": {"alpha": 0.2},
         "skew_reverse_kl": {"alpha": 0.2}, "total_variation": {}, "soft_cross_entropy": {}}
MODULES = {"forward_kl": kd.LinearForwardKL, "reverse_kl": kd.LinearReverseKL, "jsd": kd.LinearJSD,
           "skew_kl": kd.LinearSkewKL, "skew_reverse_kl": kd.LinearSkewReverseKL,
           "total_variation": kd.LinearTotalVariation, "soft_cross_entropy": kd.LinearSoftCrossEntropy}
kinds = pytest.mark.parametrize("kind", KINDS)

BACKENDS = ["torch"] + (["cpp"] if ops._C is not None else [])
backends = pytest.mark.parametrize("backend", BACKENDS)


def heads(rows=(3, 11), classes=57, D=8, E=12, dtype=torch.float64, seed=0):
    gen = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=gen, dtype=torch.float64).to(dtype)
    hs, ws, bs = randn(*rows, D), randn(classes, D) / D**0.5, randn(classes)
    ht, wt, bt = randn(*rows, E), randn(classes, E) / E**0.5, randn(classes)
    y = torch.randint(classes, rows, generator=gen)
    return [x.requires_grad_() for x in (hs, ws, bs)], [ht, wt, bt], y


def whole(student, teacher, y=None, hard_weight=0.0, soft_weight=1.0, kind="forward_kl", **options):
    z_s, z_t = F.linear(*student), F.linear(*teacher)
    loss = soft_weight * getattr(kd.functional, kind)(z_s, z_t, y, backend="torch", **options)
    if not hard_weight: return loss
    options = {k: v for k, v in options.items() if k not in ("T", "beta", "alpha")}
    return loss + hard_weight * kd.CrossEntropy(backend="torch", reduction=options.pop("reduction", "mean"))(z_s, None, y, **options)


def chunked(student, teacher, y=None, kind="forward_kl", **options):
    (hs, ws, bs), (ht, wt, bt) = student, teacher
    return getattr(kd.functional, f"linear_{kind}")(hs, ws, ht, wt, y, student_bias=bs, teacher_bias=bt, **options)


def same(student, one, other, g=None, **tolerance):
    torch.testing.assert_close(one, other, **tolerance)
    g = torch.ones_like(one) if g is None else g
    for a, b in zip(torch.autograd.grad(one, student, g), torch.autograd.grad(other, student, g)):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, **tolerance)


@backends
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("chunk", [1, 7, 33, 1000, None])
def test_the_same_as_whole_logits(backend, reduction, chunk):
    student, teacher, y = heads()
    y[0, :4] = -100
    mask = torch.rand(3, 11, generator=torch.Generator().manual_seed(1)) > 0.3
    options = dict(T=2.0, mask=mask, reduction=reduction, hard_weight=0.3, soft_weight=1.7)
    g = torch.randn(3, 11, dtype=torch.float64) if reduction == "none" else torch.tensor(2.5, dtype=torch.float64)
    same(student, chunked(student, teacher, y, chunk=chunk, backend=backend, **options), whole(student, teacher, y, **options), g)


@backends
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_narrow_dtypes(backend, dtype, tolerance):
    student, teacher, y = heads(dtype=dtype)
    one = chunked(student, teacher, y, T=2.0, hard_weight=0.5, chunk=8, backend=backend)
    assert one.dtype == torch.float32
    same(student, one, whole(student, teacher, y, T=2.0, hard_weight=0.5), rtol=tolerance, atol=tolerance)


@backends
def test_without_bias_and_with_row_weight_and_normalizer(backend):
    student, teacher, y = heads()
    student, teacher = student[:2], teacher[:2]
    w = torch.rand(3, 11, dtype=torch.float64)
    options = dict(T=3.0, row_weight=w, normalizer=7.0)
    one = linear_forward_kl(*student, *teacher, chunk=5, backend=backend, **options)
    same(student, one, whole(student, teacher, **options))


@backends
def test_backward_twice_gradcheck_and_create_graph(backend):
    student, teacher, y = heads(rows=(4,), classes=5, D=2, E=3)
    for reduction in ("mean", "none"):
        f = lambda *s: chunked(s, teacher, y, T=2.0, hard_weight=0.5, chunk=3, reduction=reduction, backend=backend)
        assert torch.autograd.gradcheck(f, student) and torch.autograd.gradgradcheck(f, student)


@backends
def test_only_the_gradients_that_are_asked_for(backend):
    student, teacher, y = heads()
    frozen = [student[0], student[1].detach(), None]
    loss = chunked(frozen, teacher[:2] + [None], y, chunk=5, backend=backend)
    torch.testing.assert_close(torch.autograd.grad(loss, student[0])[0],
                               torch.autograd.grad(whole(frozen, teacher[:2]), student[0])[0])
    with torch.no_grad(): assert not chunked(student, teacher, backend=backend).requires_grad


def test_no_gradient_is_made_where_nobody_asks(monkeypatch):
    monkeypatch.setattr(engine, "_products", None)
    student, teacher, _ = heads()
    with torch.no_grad(): loss = chunked(student, teacher)
    assert loss == chunked([x.detach() for x in student], teacher)


@backends
def test_nothing_and_all_masked(backend):
    student, teacher, _ = heads(rows=(0,))
    loss = chunked(student, teacher, backend=backend)
    assert loss == 0 and torch.autograd.grad(loss, student[1])[0].eq(0).all()
    student, teacher, _ = heads()
    loss = chunked(student, teacher, mask=torch.zeros(3, 11, dtype=torch.bool), backend=backend)
    assert loss == 0 and torch.autograd.grad(loss, student[0])[0].eq(0).all()


def test_the_teacher_trains_through_whole_logits():
    student, teacher, _ = heads()
    teacher[1].requires_grad_()
    chunked(student, teacher).backward()
    assert teacher[1].grad is None
    chunked(student, teacher, detach_teacher=False).backward()
    assert teacher[1].grad.abs().max() > 0


@kinds
def test_every_divergence(kind):
    student, teacher, y = heads(rows=(23,))
    mask = torch.arange(23) % 3 != 1
    options = dict(T=2.0, mask=mask, hard_weight=0.3, kind=kind, **KINDS[kind])
    for reduction, g in (("mean", torch.tensor(1.5, dtype=torch.float64)), ("none", torch.rand(23, dtype=torch.float64))):
        same(student, chunked(student, teacher, y, chunk=7, reduction=reduction, **options),
             whole(student, teacher, y, reduction=reduction, **options), g)
    small, teacher, _ = heads(rows=(3,), classes=4, D=2, E=2)
    f = lambda *s: chunked(s, teacher, kind=kind, chunk=2, **KINDS[kind])
    assert torch.autograd.gradcheck(f, small)


def test_the_mixtures_ends():
    student, teacher, _ = heads()
    for beta, kind in ((0, "forward_kl"), (1, "reverse_kl")):
        torch.testing.assert_close(chunked(student, teacher, kind="jsd", beta=beta), chunked(student, teacher, kind=kind))
    with pytest.raises(ValueError, match="beta must be a number from 0 to 1, got 2"): chunked(student, teacher, kind="jsd", beta=2)


@pytest.mark.skipif(ops._C is None, reason="the compiled core is not built")
@kinds
def test_a_kernel_is_used_where_there_is_one(kind, monkeypatch):
    used, call = [], ops._Call.__call__
    monkeypatch.setattr(ops._Call, "__call__", lambda self, **x: used.append(self.q.kind) or call(self, **x))
    student, teacher, _ = heads(dtype=torch.float32)
    loss = chunked(student, teacher, kind=kind, chunk=20, **KINDS[kind])
    assert used == [kind] * 2 * (kind in ops._KERNELS)
    torch.testing.assert_close(loss, chunked(student, teacher, kind=kind, backend="torch", **KINDS[kind]))


@backends
def test_a_row_that_does_not_count_may_hold_anything(backend, monkeypatch):
    student, teacher, y = heads()
    mask = torch.ones(3, 11, dtype=torch.bool)
    mask[0, 3] = mask[2, 10] = False
    y[1, 1] = -100
    want = chunked(student, teacher, y, mask=mask, backend=backend)
    grads = torch.autograd.grad(want, student)
    with torch.no_grad():
        for x in (student[0], teacher[0]): x[0, 3], x[2, 10], x[1, 1] = torch.nan, torch.inf, -torch.inf
    for device in ("cpu", "gpu"): # where rows are left out, and where zeros take their place
        if device == "gpu": monkeypatch.setattr(engine, "_may_look", lambda x: False)
        got = chunked(student, teacher, y, mask=mask, chunk=5, backend=backend)
        for a, b in zip((got, *torch.autograd.grad(got, student)), (want, *grads)): torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    spoilt = chunked(student, teacher, y, reduction="none", backend=backend)
    assert spoilt[0, 3].isnan() and spoilt.isnan().sum() == 2 and spoilt[1, 1] == 0


@backends
@pytest.mark.parametrize("spread, near", [(1.0, 1e-3), (40.0, 1.0), (1.0, 0.1)])
def test_rows_that_need_care_though_the_gradient_is_written_over_the_logits(backend, spread, near):
    (hs, ws, bs), (ht, wt, bt), y = heads(rows=(40,), classes=1003, dtype=torch.float32)
    with torch.no_grad(): student = [(ht + near * torch.randn_like(ht)) * spread, wt.clone(), bt + 1e3]
    student = [x.detach().requires_grad_() for x in student]
    teacher = [ht * spread, wt, bt]
    one = chunked(student, teacher, y, T=2.0, chunk=16, backend=backend)
    # the logits as the products round them, then everything in float64
    z_s, z_t = F.linear(*student).detach(), F.linear(*teacher)
    exact = z_s.double().requires_grad_()
    want = kd.functional.forward_kl(exact, z_t.double(), y, T=2.0)
    g, = torch.autograd.grad(want, exact)
    assert abs(one - want) < 1e-6 * want
    for got, grad in zip(torch.autograd.grad(one, student), (g @ wt.double(), g.t() @ student[0].double(), g.sum(0))):
        assert (got - grad).abs().max() < 1e-5 * grad.abs().max()


@backends
def test_student_and_teacher_of_different_dtypes(backend):
    for ours, theirs in ((torch.float32, torch.float64), (torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        student, _, y = heads(dtype=ours)
        _, teacher, _ = heads(dtype=theirs)
        tolerance = 3e-2 if torch.bfloat16 in (ours, theirs) else 1e-5
        one = chunked(student, teacher, y, T=2.0, hard_weight=0.5, chunk=8, backend=backend)
        same(student, one, whole(student, teacher, y, T=2.0, hard_weight=0.5), rtol=tolerance, atol=tolerance)


@backends
def test_autocast_computes_as_linear_does(backend):
    student, teacher, y = heads(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        one, other = chunked(student, teacher, y, hard_weight=0.5, chunk=8, backend=backend), whole(student, teacher, y, hard_weight=0.5)
        assert one.dtype == torch.float32
        same(student, one, other, rtol=2e-2, atol=2e-3)
        hidden = F.linear(student[0].detach(), torch.eye(8)) # what the layer before hands out: bfloat16 beside a float32 head
        assert hidden.dtype == torch.bfloat16
        torch.testing.assert_close(chunked([hidden, *student[1:]], teacher, chunk=8, backend=backend), one.new_tensor(
            whole([hidden, *student[1:]], teacher).item()), rtol=1e-5, atol=1e-5)
    exact = whole(student, teacher, y, hard_weight=0.5)
    assert 0 < abs(one - exact) < 0.05 * exact # the products were in bfloat16


def test_micro_batches_make_the_whole():
    student, teacher, _ = heads(rows=(12,))
    parts = [chunked([student[0][i:i + 4], *student[1:]], [teacher[0][i:i + 4], *teacher[1:]], kind="jsd", normalizer=12.0)
             for i in (0, 4, 8)]
    same(student, sum(parts), chunked(student, teacher, kind="jsd"))


def test_the_logits_are_never_whole(monkeypatch):
    sizes, logits = [], engine._logits
    monkeypatch.setattr(engine, "_logits", lambda *x: sizes.append(logits(*x).shape) or logits(*x))
    student, teacher, y = heads(rows=(512,), classes=4000, dtype=torch.float32)
    backend = BACKENDS[-1]
    chunked(student, teacher, y, chunk=128, backend=backend).backward()
    assert sizes == [(128, 4000)] * 8
    keep = torch.arange(512) < 100 # the others are not even multiplied
    sizes.clear()
    chunked(student, teacher, y, chunk=128, mask=keep, backend=backend).backward()
    assert sizes == [(100, 4000)] * 2


@pytest.mark.parametrize("frozen", [(0,), (1, 2), (0, 1)])
def test_frozen_parts_skip_their_products(frozen, monkeypatch):
    made, products = [], engine._products
    monkeypatch.setattr(engine, "_products", lambda h, p, g, grads: made.append([x is not None for x in grads]) or products(h, p, g, grads))
    student, teacher, _ = heads()
    for i in frozen: student[i].requires_grad_(False)
    chunked(student, teacher, chunk=33).backward()
    assert made == [[i not in frozen for i in range(3)]]


def operands(dtype=torch.float32, reduction="mean", backend="auto"):
    student, teacher, y = heads(rows=(5,), classes=7, D=3, E=2, dtype=dtype)
    numbers = [torch.tensor(x, dtype=torch.float64) for x in (2.0, 1.0, 0.3)]
    waits = reduction == "none" or dtype == torch.float16
    return (None, *student, *teacher, y, torch.arange(5) != 2, None, *numbers, None, True, -100, reduction, True,
            "forward_kl", 0.0, backend, 2, [not waits] * 3)


@pytest.mark.parametrize("dtype, reduction, backend", [
    (torch.float32, "mean", BACKENDS[-1]), (torch.float64, "none", BACKENDS[-1]), (torch.float32, "sum", "torch"),
    (torch.float16, "mean", "torch")])
def test_opcheck(dtype, reduction, backend):
    torch.library.opcheck(linear_op, operands(dtype, reduction, backend))


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("kind, backend, reduction, dtype", [
    ("forward_kl", "auto", "mean", torch.float32), ("jsd", "torch", "none", torch.float32),
    ("forward_kl", "auto", "none", torch.float64), ("reverse_kl", "auto", "sum", torch.float16)])
def test_compile_in_one_graph(kind, backend, reduction, dtype, fresh_compiler):
    student, teacher, y = heads(dtype=dtype)
    y[0, :3] = -100
    f = lambda *s: chunked(s, teacher, y, kind=kind, T=2.0, hard_weight=0.3, chunk=8, reduction=reduction, backend=backend)
    g = torch.rand(3, 11).to(torch.promote_types(dtype, torch.float32)) if reduction == "none" else None
    same(student, torch.compile(f, fullgraph=True, backend="aot_eager")(*student), f(*student), g)


def test_compile_with_inductor_and_a_schedule_without_recompiling(fresh_compiler):
    from torch._dynamo.testing import CompileCounterWithBackend
    student, teacher, y = heads(dtype=torch.float32)
    loss, counter = kd.LinearJSD(T=2.0, hard_weight=0.3), CompileCounterWithBackend("inductor")
    call = lambda f: f(*student[:2], *teacher[:2], y, student_bias=student[2], teacher_bias=teacher[2])
    compiled, frames = torch.compile(loss, fullgraph=True, backend=counter), []
    for T in (1.0, 2.0, 3.0):
        loss.T, loss.hard_weight, loss.soft_weight = T, T / 10, 1 / T
        same(student, call(compiled), call(loss))
        frames.append(counter.frame_count)
    assert frames == frames[:1] * 3


def test_export():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.loss = torch.nn.Linear(8, 57), kd.LinearReverseKL(T=2.0)

        def forward(self, hs, ht, wt): return self.loss(hs, self.head.weight, ht, wt, student_bias=self.head.bias)

    model, (student, teacher, _) = Model(), heads(dtype=torch.float32)
    inputs = student[0].detach(), *teacher[:2]
    program = torch.export.export(model, inputs)
    assert "kdlab.linear_loss" in program.graph_module.code
    torch.testing.assert_close(program.module()(*inputs), model(*inputs))


def test_the_operator_has_no_second_derivative_and_says_so():
    args = operands()
    grad, = torch.autograd.grad(linear_op(*args)[0], args[1])
    assert grad.abs().max() > 0
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(linear_op(*args)[0], args[1], create_graph=True)


@backends
def test_a_bad_label_is_nan_where_nothing_may_raise(backend, fresh_compiler):
    student, teacher, y = heads(rows=(6,), dtype=torch.float32)
    y[2] = 57
    f = lambda *s: chunked(s, teacher, y, hard_weight=0.3, chunk=4, reduction="none", backend=backend)
    rows = torch.compile(f, fullgraph=True, backend="aot_eager")(*student)
    assert rows.isnan().tolist() == [False, False, True, False, False, False]


@kinds
def test_module_and_function_share_options_and_defaults(kind):
    function, module = getattr(kd.functional, f"linear_{kind}"), MODULES[kind]
    defaults = lambda f: {k: p.default for k, p in inspect.signature(f).parameters.items() if k != "self"}
    assert {**defaults(module.__init__), **defaults(module.forward)} == defaults(function)
    student, teacher, y = heads()
    loss = module(T=3.0, hard_weight=0.2, soft_weight=2.0, **KINDS[kind])
    want = function(*student[:2], *teacher[:2], y, T=3.0, hard_weight=0.2, soft_weight=2.0, **KINDS[kind])
    assert loss(*student[:2], *teacher[:2], y) == want
    assert f"T=3, hard_weight=0.2, soft_weight=2" in repr(loss)


@pytest.mark.parametrize("change, words", [
    (dict(student_weight=torch.zeros(57, 9)), r"student_weight must be.*\(3, 11, 8\).*\(57, 9\)"),
    (dict(teacher_weight=torch.zeros(58, 12, dtype=torch.float64)), "same classes, got 57 and 58.*vocabulary"),
    (dict(teacher_hidden=torch.zeros(3, 10, 12, dtype=torch.float64)), "same rows"),
    (dict(student_bias=torch.zeros(3)), "student_bias must have one number a class"),
    (dict(student_hidden=torch.zeros(3, 11, 8)), "one dtype and device"),
    (dict(T=0.0), "T must be"),
    (dict(target=torch.full((3, 11), 57)), "label 57 at row 0.*57 classes"),
    (dict(hard_weight=1.0, target=None), "needs labels"),
    (dict(student_bias=torch.zeros(57)), "student_bias is torch.float32.*student_weight torch.float64"),
    (dict(chunk=0), "chunk must be a whole number of rows > 0, or None, got 0"),
])
def test_bad_arguments_are_named(change, words):
    (hs, ws, _), (ht, wt, _), y = heads()
    arguments = dict(student_hidden=hs, student_weight=ws, teacher_hidden=ht, teacher_weight=wt, target=y, hard_weight=0.5)
    with pytest.raises(ValueError, match=words): linear_forward_kl(**arguments | change)


def test_estimate_memory():
    way = kd.estimate_memory(1024, 32_000, 512)
    assert way["linear"] < way["linear_torch"] < way["logits_inplace"] < way["sparse"] < way["logits"] < way["logits_torch"] < way["eager"]
    logits, head = 1024 * 32_000 * 4, 32_000 * 512 * 4 + 1024 * 512 * 4
    assert way["eager"] == 7 * logits and way["logits"] == 3 * logits and way["logits_inplace"] == 2 * logits
    assert way["linear"] == 2 * 205 * 32_000 * 4 + head # 5 chunks of 205 rows
    assert kd.estimate_memory(1024, 32_000, 512, chunk=128)["linear"] == 2 * 128 * 32_000 * 4 + head
    gpu = kd.estimate_memory(8192, 128_256, 4096, 2, device="cuda")
    assert gpu["linear"] < gpu["eager"] / 3
