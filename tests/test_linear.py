"""linear_forward_kl: the same numbers as whole logits, whatever the chunks, and never the whole logits."""
import inspect

import pytest
import torch
import torch.nn.functional as F

import kdlab as kd
from kdlab import ops
from kdlab.functional import linear_forward_kl
from kdlab.losses.linear import LinearForwardKL

BACKENDS = ["torch"] + (["cpp"] if ops._C is not None else [])
backends = pytest.mark.parametrize("backend", BACKENDS)


def heads(rows=(3, 11), classes=57, D=8, E=12, dtype=torch.float64, seed=0):
    gen = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=gen, dtype=torch.float64).to(dtype)
    hs, ws, bs = randn(*rows, D), randn(classes, D) / D**0.5, randn(classes)
    ht, wt, bt = randn(*rows, E), randn(classes, E) / E**0.5, randn(classes)
    y = torch.randint(classes, rows, generator=gen)
    return [x.requires_grad_() for x in (hs, ws, bs)], [ht, wt, bt], y


def whole(student, teacher, y=None, hard_weight=0.0, soft_weight=1.0, **options):
    z_s, z_t = F.linear(*student), F.linear(*teacher)
    loss = soft_weight * kd.functional.forward_kl(z_s, z_t, y, backend="torch", **options)
    if not hard_weight: return loss
    options.pop("T", None)
    return loss + hard_weight * kd.CrossEntropy(backend="torch", reduction=options.pop("reduction", "mean"))(z_s, None, y, **options)


def chunked(student, teacher, y=None, **options):
    (hs, ws, bs), (ht, wt, bt) = student, teacher
    return linear_forward_kl(hs, ws, ht, wt, y, student_bias=bs, teacher_bias=bt, **options)


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


@pytest.mark.skipif(ops._C is None, reason="the compiled core is not built")
def test_the_logits_are_never_whole():
    rows, classes = 512, 4000
    student, teacher, y = heads(rows=(rows,), classes=classes, dtype=torch.float32)
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in (out if isinstance(out, tuple) else [out]) if isinstance(x, torch.Tensor))
            return out

    with Watch(): chunked(student, teacher, y, chunk=128).backward()
    assert max(sizes) <= 128 * classes < rows * classes


def test_module_and_function_share_options_and_defaults():
    function = {k: p.default for k, p in inspect.signature(linear_forward_kl).parameters.items()}
    init = {k: p.default for k, p in inspect.signature(LinearForwardKL.__init__).parameters.items() if k != "self"}
    call = {k: p.default for k, p in inspect.signature(LinearForwardKL.forward).parameters.items() if k != "self"}
    assert {**init, **call} == function


@pytest.mark.parametrize("change, words", [
    (dict(student_weight=torch.zeros(57, 9)), r"student_weight must be.*\(3, 11, 8\).*\(57, 9\)"),
    (dict(teacher_weight=torch.zeros(58, 12, dtype=torch.float64)), "same classes, got 57 and 58.*vocabulary"),
    (dict(teacher_hidden=torch.zeros(3, 10, 12, dtype=torch.float64)), "same rows"),
    (dict(student_bias=torch.zeros(3)), "student_bias must have one number a class"),
    (dict(student_hidden=torch.zeros(3, 11, 8)), "one dtype and device"),
    (dict(T=0.0), "T must be"),
    (dict(target=torch.full((3, 11), 57)), "label 57 at row 0.*57 classes"),
    (dict(hard_weight=1.0, target=None), "needs labels"),
])
def test_bad_arguments_are_named(change, words):
    (hs, ws, _), (ht, wt, _), y = heads()
    arguments = dict(student_hidden=hs, student_weight=ws, teacher_hidden=ht, teacher_weight=wt, target=y, hard_weight=0.5)
    with pytest.raises(ValueError, match=words): linear_forward_kl(**arguments | change)


def test_estimate_memory():
    way = kd.estimate_memory(1024, 32_000, 512)
    assert way["linear"] < way["logits"] < way["eager"]
    assert way["eager"] == 7 * 1024 * 32_000 * 4 + 32_000 * 512 * 4
