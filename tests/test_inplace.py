"""inplace_grad=True: the gradient in the place of the logits. It is the gradient, it needs no memory, and it never trains wrongly:
whatever could is refused before anything is written, or raises in backward."""
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import kdlab as kd
from kdlab import ops
from kdlab.functional import forward_kl

pytest.importorskip("kdlab._C", reason="kdlab._C is not built: KDLAB_EXT=1 python setup.py build_ext --inplace")

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LOSSES = {"forward_kl": {}, "reverse_kl": {}, "jsd": {"beta": 0.3}, "skew_kl": {"alpha": 0.1}, "skew_reverse_kl": {"alpha": 0.1},
          "total_variation": {}, "soft_cross_entropy": {}, "dkd": {}}
losses = pytest.mark.parametrize("name", LOSSES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).split(".")[1])


def pair(*shape, dtype=torch.float32):
    gen = torch.Generator().manual_seed(1)
    return tuple((3 * torch.randn(*shape, generator=gen)).to(dtype) for _ in range(2))


def made(values):
    "Logits that something computed, and what it computed them from; it kept nothing of them."
    leaf = values.clone().requires_grad_()
    return leaf * 1, leaf


def gradients(f, values, grad_out=None):
    "The loss, its gradient, and where that lies relative to the logits: with and without inplace_grad."
    out = []
    for inplace in (False, True):
        z, _ = made(values)
        place = z.data_ptr()
        loss = f(z, inplace)
        grad, = torch.autograd.grad(loss, z, grad_out)
        out.append((loss.detach(), grad, grad.data_ptr() == place))
    return out


# ---- the same numbers ----------------------------------------------------------------------------------------------
@losses
@dtypes
@pytest.mark.parametrize("shape", [(7, 5), (2, 3, 10), (5, 300), (3, 1271), (0, 4), (3, 0), (9,)], ids=str)
def test_the_same_bits(name, dtype, shape):
    s, t = pair(*shape, dtype=dtype)
    y = torch.full(shape[:-1], shape[-1] - 1 if shape[-1] else -100)
    f = lambda z, inplace: getattr(kd.functional, name)(z, t, y, T=2.0, inplace_grad=inplace, **LOSSES[name])
    (loss, grad, _), (got, got_grad, there) = gradients(f, s)
    assert torch.equal(got, loss) and torch.equal(got_grad, grad) and there and got_grad.dtype == dtype


@losses
@dtypes
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_masks_weights_and_incoming_gradients(name, dtype, reduction):
    "A row that does not count is zero, whatever it holds; a gradient that comes in scales what lies there."
    s, t = pair(6, 40, dtype=dtype)
    s[1], t[4] = torch.nan, torch.inf
    options = dict(target=torch.tensor([0, 1, -100, 3, 4, 5]), mask=torch.tensor([True, False, True, True, False, True]),
                   row_weight=torch.tensor([1.0, torch.nan, 2.0, 0.5, 1.0, 3.0]), reduction=reduction, **LOSSES[name])
    f = lambda z, inplace: getattr(kd.functional, name)(z, t, inplace_grad=inplace, **options)
    g = torch.linspace(-1, 2, 6) if reduction == "none" else torch.tensor(3.0)
    g = g.double() if dtype is torch.float64 else g
    (loss, grad, _), (got, got_grad, there) = gradients(f, s, g)
    assert torch.equal(got, loss) and torch.equal(got_grad, grad) and there
    assert (got_grad[[1, 2, 4]] == 0).all() and (got_grad[0] != 0).any()


@pytest.mark.parametrize("isa", ops._C.info()["isas"])
def test_rows_that_are_read_twice(isa):
    "Close rows, rising rows and excluded classes take a second look at the logits: before the gradient lies there."
    before = ops._C.info()["isa"]
    ops._C.set_isa(isa)
    try:
        s, t = pair(60, 2000)
        s[::4] = t[::4] + 1e-3 * s[::4]
        s[1::4] += torch.linspace(0, 90, 2000)
        s[2::8, 5] = t[2::8, 5] = -torch.inf
        y = torch.arange(60)
        for name, options in LOSSES.items():
            soft = {"forward_kl": kd.ForwardKL, "jsd": kd.JSD}.get(name)
            f = lambda z, inplace: getattr(kd.functional, name)(z, t, y, T=4.0, inplace_grad=inplace, **options)
            if soft is not None: f = lambda z, inplace: (0.1 * kd.CrossEntropy() + 0.9 * soft(T=4, inplace_grad=inplace))(z, t, y)
            (loss, grad, _), (got, got_grad, there) = gradients(f, s)
            assert torch.equal(got, loss) and torch.equal(got_grad, grad) and there
    finally: ops._C.set_isa(before)


def test_large_logits_and_any_number_of_threads():
    s, t = pair(80, 32768) # of a gradient that is streamed past the cache
    (want, grad, _), (loss, got, there) = gradients(lambda z, inplace: forward_kl(z, t, T=4.0, inplace_grad=inplace), s)
    assert torch.equal(want, loss) and torch.equal(grad, got) and there
    try:
        torch.set_num_threads(4)
        loss, got, _ = gradients(lambda z, inplace: forward_kl(z, t, T=4.0, inplace_grad=inplace), s)[1]
    finally: torch.set_num_threads(1)
    assert torch.equal(want, loss) and torch.equal(grad, got)


def test_four_python_threads_at_once():
    s, t = pair(64, 500)
    f = lambda z, inplace: forward_kl(z, t, T=2.0, inplace_grad=inplace)
    want = gradients(f, s)[0]
    with ThreadPoolExecutor(4) as pool:
        for _ in pool.map(lambda _: [torch.testing.assert_close(x[:2], want[:2], rtol=0, atol=0) for x in gradients(f, s)], range(24)): pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_through_a_model_under_autocast_and_a_scaler(dtype):
    torch.manual_seed(0)
    head, x, (_, t) = torch.nn.Linear(5, 40), torch.randn(8, 5), pair(8, 40)
    results = []
    for inplace in (False, True):
        head.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.float32):
            z = head(x).to(torch.bfloat16 if dtype is torch.float32 else dtype)
            loss = forward_kl(z, t.to(z.dtype), T=2.0, inplace_grad=inplace)
        (1024 * loss).backward()
        results.append((loss.detach(), head.weight.grad.clone(), head.bias.grad.clone()))
    assert all(map(torch.equal, *results)) and results[0][1].abs().max() > 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak of memory is read from /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_no_memory_but_the_logits(dtype):
    "Beside them, mebibytes of forward and backward together; the loss apart takes another tensor of their size."
    code = f"""
import ctypes, torch, kdlab as kd
torch.set_num_threads(1)
shape, dtype = (64, 131072), torch.{dtype}
t, leaf = torch.randn(shape).to(dtype), torch.zeros((), dtype=dtype).requires_grad_()
def peak(): return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024
def extra(inplace):
    z = torch.randn(shape).to(dtype) + leaf
    kd.empty_cache()
    ctypes.CDLL(None).malloc_trim(0)
    open("/proc/self/clear_refs", "w").write("5")
    before = peak()
    loss = kd.functional.forward_kl(z, t, T=2.0, inplace_grad=inplace)
    z.register_hook(lambda g: after.append(peak() - before))
    loss.backward()
after = []
for inplace in (True, False, True): extra(inplace)
print(*after[1:], t.nbytes / 2**20)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    apart, inplace, tensor = map(float, done.stdout.split())
    assert inplace < 2.5 and apart > 0.9 * tensor # two rows of float32 and the workspace


def test_the_memory_goes_with_the_gradient():
    "After backward a name of the logits keeps nothing but one NaN."
    s, t = pair(8, 40)
    z, leaf = made(s)
    forward_kl(z, t, inplace_grad=True).backward()
    assert z.isnan().all() and z.shape == s.shape and z.untyped_storage().nbytes() == 4 and leaf.grad.isfinite().all()


# ---- what raises in backward ---------------------------------------------------------------------------------------
def test_a_head_that_kept_its_logits_raises():
    s, t = pair(8, 40)
    for keeps in (torch.tanh, torch.sigmoid, lambda x: torch.tanh(x).relu(), lambda x: x.softmax(-1)):
        leaf = s.clone().requires_grad_()
        z = keeps(leaf)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            forward_kl(z, t, inplace_grad=True).backward()
        assert leaf.grad is None


def test_a_cap_that_kept_something_else_is_right():
    "30 tanh(z / 30): the product is written over, and what tanh kept is not."
    s, t = pair(8, 40)
    grads = []
    for inplace in (False, True):
        leaf = s.clone().requires_grad_()
        forward_kl(30 * torch.tanh(leaf / 30), t, inplace_grad=inplace).backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_another_use_of_the_logits(dtype):
    s, t = pair(8, 40, dtype=dtype)
    keeps, keeps_not = lambda z: z.float().pow(2).sum() + (z * z).sum(), lambda z: z.float().log_softmax(-1)[:, 0].sum()
    want, got = [], []
    for inplace, grads in ((False, want), (True, got)): # before the loss, and content with what it kept itself
        z, leaf = made(s)
        (keeps_not(z) + forward_kl(z, t, inplace_grad=inplace)).backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    z, leaf = made(s)
    first = keeps(z)
    loss = forward_kl(z, t, inplace_grad=True) + first # float16 writes only in its backward, which comes first here
    with pytest.raises(RuntimeError, match="modified by an inplace operation"): loss.backward()


def test_the_logits_are_nan_for_whoever_comes_late():
    s, t = pair(8, 40)
    z, _ = made(s)
    forward_kl(z, t, inplace_grad=True)
    assert z.isnan().all() and z.dtype == s.dtype and z.requires_grad and (z.float() * 2).sum().isnan()
    half, _ = made(s.half())
    loss = forward_kl(half, t.half(), inplace_grad=True)
    assert torch.equal(half, s.half()) # its gradient waits for backward
    loss.backward()
    assert half.isnan().all()


def test_a_change_between_forward_and_backward_raises():
    s, t = pair(8, 40)
    for dtype in (torch.float32, torch.float16):
        z, _ = made(s.to(dtype))
        alias = z.detach()
        loss = forward_kl(z, t.to(dtype), inplace_grad=True)
        alias.zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"): loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_one_backward_and_no_second_derivative(dtype):
    s, t = pair(8, 40, dtype=dtype)
    z, leaf = made(s)
    loss = forward_kl(z, t, inplace_grad=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward.*retain_graph=True.*inplace_grad=False"): loss.backward()
    z, leaf = made(s)
    loss = forward_kl(z, t, inplace_grad=True)
    with pytest.raises(RuntimeError, match="create_graph=True.*inplace_grad=False"):
        torch.autograd.grad(loss, leaf, create_graph=True)


def test_checkpoints_and_saved_tensors_elsewhere():
    s, t = pair(8, 40)
    w = torch.randn(40, 40, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.float16):
        grads = []
        for way in ("plain", "checkpoint", "on the cpu"):
            leaf = s.to(dtype).requires_grad_()
            head = lambda x: forward_kl(x @ w.to(dtype), t.to(dtype), inplace_grad=way != "plain")
            if way == "checkpoint": loss = checkpoint(head, leaf, use_reentrant=False)
            elif way == "on the cpu":
                with save_on_cpu(): loss = head(leaf)
            else: loss = head(leaf)
            grads.append(torch.autograd.grad(loss, leaf)[0])
        assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])


# ---- what is refused, with nothing written -------------------------------------------------------------------------
def refused(z, t, match, before=None, **options):
    "It raises, and neither the logits nor their version changed."
    values, version = z.detach().clone() if before is None else before, z._version
    with pytest.raises(ValueError, match=f"inplace_grad=True cannot write the gradient over student: .*{match}"):
        forward_kl(z, t, inplace_grad=True, **options)
    assert torch.equal(z, values) and z._version == version


def test_leaves_views_and_expanded_tensors():
    s, t = pair(8, 40)
    refused(s.clone().requires_grad_(), t, "leaf")
    refused(torch.nn.Parameter(s.clone()), t, "Parameter")
    z, _ = made(s)
    for view in (z[2:], z[:, :20], z.view(8, 40), z.unflatten(0, (2, 4)), z.chunk(2)[0], z.detach_().requires_grad_()[:]):
        refused(view, torch.zeros_like(view), "view")
    refused(made(s)[0].mT, t.mT, "view")
    refused(made(s)[0], t, "view.*classes last", dim=0)
    refused(torch.nn.Linear(4, 40)(torch.randn(2, 3, 4)), torch.zeros(2, 3, 40), r"hidden\.flatten")
    refused(made(s[:1])[0].expand(8, 40), t, "expanded.*contiguous")
    by_columns = torch.empty_strided((8, 40), (1, 8)).copy_(s).requires_grad_() * 1 # a product lies as its factors do
    refused(by_columns, t, r"contiguous; pass student\.contiguous\(\)")


def test_the_class_dimension_by_its_positive_name():
    s, t = pair(8, 40)
    (loss, grad, _), (got, got_grad, there) = gradients(lambda z, i: forward_kl(z, t, dim=1, inplace_grad=i), s)
    assert torch.equal(loss, got) and torch.equal(grad, got_grad) and there


def test_other_arguments_in_the_same_memory():
    z, _ = made(pair(8, 40)[0])
    refused(z, z, "teacher lies in the same memory")
    refused(z, z.detach(), "teacher")
    refused(z, torch.from_dlpack(z.detach()), r"teacher.*teacher\.clone\(\)") # another storage, the same bytes
    refused(z, torch.zeros(8, 40), "row_weight", row_weight=z.detach()[:, 3])
    refused(z, torch.zeros(8, 40), "T lies", T=z.detach()[0, 0])


def test_dtypes():
    s, t = pair(8, 40)
    refused(made(s.bfloat16())[0], t, r"narrower than the teacher.*teacher\.to\(student\.dtype\)")
    refused(made(s.half())[0], t.bfloat16(), "narrower")
    (loss, grad, _), (got, got_grad, there) = gradients(lambda z, i: forward_kl(z, t.bfloat16(), inplace_grad=i), s)
    assert torch.equal(loss, got) and torch.equal(grad, got_grad) and there


def test_where_no_kernel_computes():
    s, t = pair(8, 40)
    refused(made(s)[0], t, "you asked for it", backend="torch")
    refused(made(s)[0], t, "learnable", T=torch.tensor(2.0, requires_grad=True))
    refused(made(s)[0], t, "each row has its own temperature", T=torch.full((8,), 2.0))
    refused(made(s)[0], t.clone().requires_grad_(), "teacher needs a gradient", detach_teacher=False)
    with pytest.raises(TypeError, match="inplace_grad"): kd.functional.nkd(s, t, torch.arange(8), inplace_grad=True)
    with pytest.raises(ValueError, match="torch.func"):
        torch.func.grad(lambda x: forward_kl(x * 1, t, inplace_grad=True))(s)


def test_under_a_compiler():
    s, t = pair(8, 40)
    f = lambda x: forward_kl(x * 1, t, inplace_grad=True)

    class Model(torch.nn.Module):
        def forward(self, x): return f(x)

    leaf = s.clone().requires_grad_()
    torch._dynamo.reset()
    with pytest.raises(ValueError, match="torch.compile"): torch.compile(f, backend="aot_eager")(leaf)
    with pytest.raises(Exception, match="inplace_grad=True|exception"): torch.compile(f, backend="aot_eager", fullgraph=True)(leaf)
    with pytest.raises(ValueError, match="torch.export"): torch.export.export(Model(), (leaf,))
    with torch.no_grad(): # nothing to write
        torch.testing.assert_close(torch.compile(f, backend="aot_eager", fullgraph=True)(leaf), forward_kl(s, t))
    capped = torch.compile(torch.tanh, backend="aot_eager") # a compiled head keeps its output as well
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        forward_kl(capped(leaf), t, inplace_grad=True).backward()
    torch._dynamo.reset()


def test_nothing_is_written_without_a_gradient():
    s, t = pair(8, 40)
    z, _ = made(s)
    want = forward_kl(s, t)
    with torch.no_grad(): assert torch.equal(forward_kl(z, t, inplace_grad=True), want)
    with torch.inference_mode(): assert torch.equal(forward_kl(z, t, inplace_grad=True), want)
    assert torch.equal(forward_kl(s, t, inplace_grad=True), want) # asks for none, and may then be anything
    assert torch.equal(forward_kl(s[:, :20], t[:, :20], inplace_grad=True), forward_kl(s[:, :20], t[:, :20]))
    assert torch.equal(z, s) and z._version == 0


def test_a_bad_label_is_found_before_anything_is_written():
    s, t = pair(8, 40)
    y = torch.tensor([0, 1, 2, 3, 4, 5, 6, 40])
    objective = 0.1 * kd.CrossEntropy() + 0.9 * kd.SoftKL(inplace_grad=True)
    z, leaf = made(s)
    with pytest.raises(ValueError, match="label 40 at row 7"): objective(z, t, y)
    assert torch.equal(z, s) and z._version == 0
    y[7] = -100
    objective(z, t, y).backward() # and may then be used
    assert leaf.grad[:7].ne(0).any(1).all() and leaf.grad[7].eq(0).all()


# ---- modules, objectives and runs ----------------------------------------------------------------------------------
def test_modules_remember_it():
    s, t = pair(8, 40)
    for module in (kd.ForwardKL, kd.SoftKL, kd.ReverseKL, kd.JSD, kd.SkewKL, kd.SkewReverseKL, kd.TotalVariation,
                   kd.SoftCrossEntropy, kd.DKD):
        loss = module(inplace_grad=True)
        (want, grad, _), (got, got_grad, there) = gradients(lambda z, i: module(inplace_grad=i)(z, t, torch.arange(8)), s)
        assert torch.equal(want, got) and torch.equal(grad, got_grad) and there
        assert "inplace_grad=True" in repr(loss) and "inplace_grad" not in repr(module())


@pytest.mark.parametrize("order", [0, 1])
def test_an_objective_computes_it_last(order):
    s, t = pair(8, 40)
    y = torch.arange(8)
    others = [0.2 * kd.CrossEntropy(weight=torch.rand(40)), 0.3 * kd.ReverseKL()]

    def f(z, inplace):
        last = 0.5 * kd.SoftKL(inplace_grad=inplace)
        return sum([last, *others] if order else [*others, last])(z, t, y)

    (want, grad, _), (got, got_grad, there) = gradients(f, s)
    torch.testing.assert_close((got, got_grad), (want, grad), rtol=1e-6, atol=1e-9)


def test_cross_entropy_joins_it_in_one_sweep():
    s, t = pair(8, 40)
    y = torch.arange(8)
    f = lambda z, inplace: (0.1 * kd.CrossEntropy() + 0.9 * kd.SoftKL(inplace_grad=inplace))(z, t, y)
    (want, grad, _), (got, got_grad, there) = gradients(f, s)
    assert torch.equal(want, got) and torch.equal(grad, got_grad) and there


def test_an_objective_takes_one():
    one, two = 0.5 * kd.SoftKL(inplace_grad=True), 0.5 * kd.JSD(inplace_grad=True)
    with pytest.raises(ValueError, match=r"one term of an objective.*SoftKL.*JSD"): one + two
    with pytest.raises(ValueError, match="one term of an objective"): kd.SoftKL(inplace_grad=True).on(["a", "b"])
    s, t = pair(8, 40)
    z, _ = made(s)
    assert torch.equal((one + kd.CrossEntropy()).parts(z, t, torch.arange(8))["forward_kl"].rows, kd.SoftKL(reduction="none")(s, t))
    assert torch.equal(z, s) # parts have no gradient


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("options", [{}, {"accumulate": 2}, {"precision": "bf16"}], ids=str)
def test_a_run_is_the_same_run(missing, options):
    "With its report of every term, samples without labels, parts of batches, features of the same student, and validation."
    gen = torch.Generator().manual_seed(0)
    x, y = torch.randn(48, 6, generator=gen), torch.arange(48) % 3
    if missing: y[::5] = -100
    net = lambda seed: torch.manual_seed(seed) and torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    runs = []
    for inplace in (False, True):
        loss = [0.3 * kd.SoftKL(inplace_grad=inplace), 0.6 * kd.CrossEntropy(), 0.1 * kd.ReverseKL(), 0.1 * kd.Hint().on("0")]
        loader = DataLoader(TensorDataset(x, y), 12)
        runs.append(kd.distill(net(0), net(1), loader, loader, epochs=2, losses=loss, progress=False, **options))
    a, b = (torch.cat([p.flatten() for p in run.student.parameters()]) for run in runs)
    rtol, atol = (0.05, 1e-3) if options.get("precision") == "bf16" else (1e-4, 1e-6) # gradients are added in another order
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol)
    for old, new in zip(runs[0].history, runs[1].history):
        assert list(new) == list(old)
        for key in set(old) - {"seconds"}: assert new[key] == pytest.approx(old[key], rel=rtol), key


def test_a_run_that_diverges_says_that_the_logits_are_gone():
    train = DataLoader(TensorDataset(torch.ones(4, 6), torch.arange(4) % 3), 4)
    student = torch.nn.Linear(6, 3)
    student.bias.data[0] = torch.nan
    with pytest.raises(FloatingPointError, match="the student's logits were written over; inplace_grad=False keeps them"):
        kd.distill(student, torch.nn.Linear(6, 3), train, losses=kd.SoftKL(inplace_grad=True), epochs=1, progress=False)
