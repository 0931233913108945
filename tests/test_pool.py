"""The road to the kernel: memory of large gradients that is used again, and the ordinary case in one C call."""
import os
import subprocess
import sys
import threading
import weakref

import pytest
import torch

import kdlab as kd
from kdlab import ops
from kdlab.functional import forward_kl

_C = pytest.importorskip("kdlab._C", reason="kdlab._C is not built: KDLAB_EXT=1 python setup.py build_ext --inplace")

MIB = 1 << 20
ASIDE = 2048 # where in a huge page a buffer begins: see pool.cpp
CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
ordinary_runs = pytest.mark.skipif(not ops._ordinary, reason="this torch does not describe its tensors to C")


@pytest.fixture(autouse=True)
def empty_pool():
    ops.empty_cache()
    yield
    ops.empty_cache()


def tensor(*shape, dtype=torch.float32):
    return torch.from_dlpack(_C.empty(shape, CODES[dtype]))


def pair(*shape, dtype=torch.float32, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(*shape, generator=gen, dtype=torch.float64).to(dtype) for _ in range(2))


def run_python(code, **environment):
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


# memory that is used again

@pytest.mark.parametrize("dtype", CODES, ids=str)
@pytest.mark.parametrize("shape", [(), (0, 5), (3, 5), (2, 3, 4), (300, 1000), (2, MIB), (5 * MIB + 1,)])
def test_a_capsule_becomes_an_ordinary_tensor(dtype, shape):
    x = tensor(*shape, dtype=dtype)
    assert x.shape == shape and x.dtype == dtype and x.device.type == "cpu" and x.is_contiguous()
    assert x.data_ptr() % (2 * MIB) == ASIDE if x.nbytes >= 2 * MIB else x.data_ptr() % 64 == 0 # of a huge page
    assert (x.fill_(1) == 1).all() and x.clone().sum(dtype=torch.float64) == x.numel()


def test_memory_comes_back_when_the_last_view_dies():
    x = tensor(2 * MIB)
    place, view = x.data_ptr(), x.view(2, MIB)[1]
    del x
    assert _C.pool()["idle"] == 0
    del view
    assert _C.pool()["idle"] == 8 * MIB and tensor(2 * MIB).data_ptr() == place


def test_memory_of_an_unused_capsule_comes_back():
    capsule = _C.empty((2 * MIB,), 0)
    del capsule
    assert _C.pool()["idle_buffers"] == 1


def test_memory_comes_back_from_another_thread():
    box = [tensor(2 * MIB)]
    thread = threading.Thread(target=box.clear)
    thread.start()
    thread.join()
    assert _C.pool()["idle_buffers"] == 1


def test_small_tensors_do_not_use_the_pool():
    before = _C.pool()
    tensor(_C.pooled_from // 4 - 1)
    assert _C.pool() == before
    tensor(_C.pooled_from // 4)
    assert _C.pool()["idle"] == _C.pooled_from


def test_sizes_that_fit_share_memory_and_others_do_not():
    place = tensor(8 * MIB).data_ptr()
    assert tensor(4 * MIB).data_ptr() != place
    assert tensor(7 * MIB).data_ptr() == place


def test_the_cache_can_be_emptied_while_tensors_live():
    kept, dropped = tensor(2 * MIB).fill_(3), tensor(2 * MIB)
    del dropped
    assert _C.pool()["idle"] == 8 * MIB
    ops.empty_cache()
    assert _C.pool()["idle"] == 0 and (kept == 3).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mask", [False, True])
def test_gradients_are_recycled_and_not_copied(dtype, mask):
    s, t = pair(130, 20000, dtype=dtype)
    s.requires_grad_()
    options = {"mask": torch.ones(130, dtype=torch.bool)} if mask else {}
    places, start = [], _C.pool()
    for _ in range(3):
        forward_kl(s, t, T=4.0, **options).backward()
        places.append(s.grad.data_ptr())
        s.grad = None
    assert len(set(places)) == 1 and places[0] % (2 * MIB) == ASIDE # a clone would lie elsewhere
    now = _C.pool()
    assert now["fresh"] == start["fresh"] + 1 and now["reused"] == start["reused"] + 2


f = kd.functional
FEATURES = {"hint": f.hint, "normalised hint": lambda s, t: f.hint(s, t, normalize=True),
            "attention": f.attention_transfer, "channel_kl": f.channel_kl,
            "cosine": lambda s, t: f.cosine(s.flatten(1), t.flatten(1)), "similarity": f.similarity,
            "dist": lambda s, t: f.dist(s.flatten(1), t.flatten(1))}


@pytest.mark.parametrize("loss, dtype", [
    (loss, dtype) for loss in FEATURES for dtype in (torch.float32, torch.bfloat16, torch.float16)
    if loss != "similarity" or dtype == torch.float32]) # that of similarity is made in float32 and then rounded
def test_gradients_of_features_are_recycled_and_not_copied(loss, dtype):
    s, t = pair(10, 16, 160, 100, dtype=dtype)
    s.requires_grad_()
    places, start = [], _C.pool()
    for _ in range(3):
        FEATURES[loss](s, t).backward()
        places.append(s.grad.data_ptr())
        s.grad = None
    now = _C.pool()
    assert len(set(places)) == 1 and places[0] % (2 * MIB) == ASIDE
    assert now["fresh"] == start["fresh"] + 1 and now["reused"] == start["reused"] + 2 and now["idle_buffers"] == 1


@pytest.mark.parametrize("loss", [forward_kl, *FEATURES.values()], ids=["forward_kl", *FEATURES])
def test_a_gradient_that_somebody_holds_is_left_alone(loss):
    s, t = pair(10, 16, 160, 100)
    s.requires_grad_()
    first, = torch.autograd.grad(loss(s, t), s)
    copy, kept = first.clone(), first.flatten()[1:] # a view holds it as well
    del first
    second, = torch.autograd.grad(loss(3 * s, t), s)
    assert second.untyped_storage().data_ptr() != kept.untyped_storage().data_ptr() and torch.equal(kept, copy.flatten()[1:])
    value = loss(s, t)
    one, = torch.autograd.grad(value, s, retain_graph=True)
    two, = torch.autograd.grad(value, s)
    assert one.data_ptr() != two.data_ptr() and torch.equal(one, two)


@pytest.mark.parametrize("limit, idle", [("8", 8), ("9", 8), ("0", 0), ("1000", 24), ("many", 24)])
def test_the_pool_is_bounded(limit, idle):
    code = """
import torch
from kdlab import _C
x = [torch.from_dlpack(_C.empty((n << 18,), 0)) for n in (4, 8, 4, 8)]
while x: x.pop(0)
print(_C.pool()["idle"] >> 20)"""
    assert int(run_python(code, KDLAB_POOL_MB=limit)) == idle


def test_many_threads_at_once():
    wrong = []

    def work(number):
        for i in range(60):
            x = tensor((1 + (i + number) % 3) * MIB).fill_(number)
            if not (x == number).all(): wrong.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert not wrong and _C.pool()["idle"] <= _C.pool()["limit"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_uses_the_pool():
    "While a thread of the parent takes and gives without pause."
    code = """
import os, threading, torch
from kdlab import _C
stop = []
def work():
    while not stop: torch.from_dlpack(_C.empty((1 << 20,), 0))
thread = threading.Thread(target=work); thread.start()
for _ in range(30):
    child = os.fork()
    if not child:
        for _ in range(3): torch.from_dlpack(_C.empty((1 << 20,), 0))
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
stop.append(1); thread.join()"""
    run_python(code)


def test_tensors_may_outlive_the_interpreter():
    run_python("""
import builtins, torch
from kdlab import _C
builtins.kept = [torch.from_dlpack(_C.empty((1 << n,), 0)) for n in (2, 21)]
capsule = _C.empty((1 << 21,), 0)""")


# the ordinary case

def ordinary(s, t, y=None, T=4.0, t_squared=True, kl_weight=1.0, ce_weight=0.0, ignore_index=-100):
    return ops.ordinary(s, t, y, T, t_squared, kl_weight, ce_weight, ignore_index, "forward_kl", 0.0)


def in_full(s, t, y=None, T=4.0, t_squared=True, kl_weight=1.0, ce_weight=0.0):
    q = ops.Question(T, t_squared, kl_weight, ce_weight, use_ce=ce_weight != 0)
    return ops.answer(s, t, y, None, None, q, "cpp")


@ordinary_runs
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(128, 10), (5, 300), (3, 4, 50), (7,), (1, 1), (0, 4), (300, 4000)])
@pytest.mark.parametrize("labelled", [False, True])
def test_the_ordinary_case_equals_the_general_one(dtype, shape, labelled):
    s, t = pair(*shape, dtype=dtype)
    s.requires_grad_()
    options = {"T": 3, "kl_weight": 0.9, "t_squared": False}
    y = None
    if labelled and 0 not in shape:
        y = torch.arange(s[..., 0].numel()).reshape(shape[:-1]) % shape[-1]
        if y.numel() > 1: y.view(-1)[1] = -100
        options["ce_weight"] = 0.1
    got, want = ordinary(s, t, y, **options), in_full(s, t, y, **options)
    assert torch.equal(got, want) and got.dtype == want.dtype and got.shape == () and got.requires_grad
    for incoming in (1.0, -2.5):
        g, w = (torch.autograd.grad(x * incoming, s, retain_graph=True)[0] for x in (got, want))
        assert torch.equal(g, w) and g.dtype == dtype and g.shape == shape
    with torch.no_grad(): assert torch.equal(ordinary(s, t, y, **options), want.detach())
    assert not ordinary(s.detach(), t, y, **options).requires_grad


@ordinary_runs
def test_later_derivatives_of_the_ordinary_case():
    s, t = pair(4, 6, dtype=torch.float64)
    s.requires_grad_()
    y = torch.tensor([0, 1, -100, 2])
    f = lambda x: ordinary(x, t, y, T=2.0, kl_weight=0.7, ce_weight=0.3)
    assert f(s) is not None and torch.autograd.gradcheck(f, s) and torch.autograd.gradgradcheck(f, s)
    loss = f(s)
    first, second, third = (torch.autograd.grad(loss, s, retain_graph=True)[0] for _ in range(3))
    assert torch.equal(first, second) and torch.equal(first, third)


@ordinary_runs
def test_changed_logits_do_not_give_a_wrong_second_gradient():
    s, t = pair(4, 6)
    hidden = s.requires_grad_() * 1
    loss = ordinary(hidden, t)
    torch.autograd.grad(loss, hidden, retain_graph=True)
    with torch.no_grad(): hidden.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"): loss.backward()


@ordinary_runs
def test_what_is_out_of_the_ordinary_is_left_to_the_general_path():
    s, t = pair(4, 6)
    y = torch.tensor([0, 1, 5, 2])
    leaf = s.clone().requires_grad_()
    assert ordinary(torch.nn.Parameter(s), t, y, ce_weight=1.0) is not None

    class Subclass(torch.Tensor): pass

    for case in [(s, t[:3]), (s, t[:, :5]), (s.t(), t.t()), (s[:, ::2], t[:, ::2]), (s, t.double()), (s.long(), t.long()),
                 (s, leaf), (leaf.half(), t.half()), (s.as_subclass(Subclass), t), (s.sum(), t.sum()), (s.numpy(), t),
                 (s, None), (None, None), (s.to_sparse(), t), (s.to("meta"), t.to("meta")), (s.cfloat(), t.cfloat()),
                 (s, t, y.int()), (s, t, y[:3]), (s, t, y[:, None]), (s, t, y.float())]:
        assert ordinary(*case) is None
    for option in [{"T": 0.0}, {"T": -1.0}, {"T": float("nan")}, {"T": float("inf")}, {"T": torch.tensor(2.0)}, {"T": "4"},
                   {"T": True}, {"T": 10**400}, {"kl_weight": torch.tensor(1.0)}, {"ignore_index": "x"}, {"ignore_index": 2**70}]:
        assert ordinary(s, t, y, **option) is None
    assert ordinary(s, t, y + 1, ce_weight=1.0) is None # a label out of range: the general path names it
    with pytest.raises(ValueError, match="label 6 at row 2"): (kd.CrossEntropy() + kd.SoftKL())(s, t, y + 1)
    assert torch.func.vmap(lambda a: torch.tensor(ordinary(a, t) is None))(s[None]).all()


@ordinary_runs
def test_the_public_ways_in_take_it(monkeypatch):
    "Function, module and objective, also with labels and an integer temperature."
    def general(*args): raise AssertionError("took the general path")

    monkeypatch.setattr(ops, "answer", general)
    s, t = pair(4, 6)
    y = torch.tensor([0, 1, -100, 2])
    s.requires_grad_()
    for call in (lambda: forward_kl(s, t), lambda: forward_kl(s, t, y, T=4), lambda: kd.SoftKL()(s, t),
                 lambda: kd.SoftKL(T=2)(s, t, y), lambda: (0.1 * kd.CrossEntropy() + 0.9 * kd.SoftKL())(s, t, y)):
        call().backward()
    for call in (lambda: forward_kl(s, t, reduction="sum"), lambda: kd.SoftKL(backend="torch")(s, t),
                 lambda: forward_kl(s, t, normalizer=3), lambda: kd.SoftKL()(s, t, mask=y > 0)):
        with pytest.raises(AssertionError, match="general path"): call()


@ordinary_runs
def test_nothing_is_left_behind():
    resource = pytest.importorskip("resource")
    s, t = pair(256, 1000)
    s.requires_grad_()
    loss = ordinary(s, t)
    gone = weakref.ref(loss)
    del loss
    assert gone() is None
    peak = []
    for _ in range(2):
        for _ in range(300): ordinary(s, t).backward()
        peak.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert peak[1] - peak[0] < 100_000 # KiB (bytes on macOS); 300 gradients are 300 MB
