"""Every operator as torch sees it: opcheck on the very calls that the losses make, torch.compile in one graph, torch.export. And every
family of kernels from four Python threads at once, and in a forked child."""
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset

import kdlab as kd
from kdlab import functional as f, ops

pytest.importorskip("kdlab._C", reason="kdlab._C is not built: KDLAB_EXT=1 python setup.py build_ext --inplace")


def drawn(*shape, seed=0): return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


LABELS, MASK = torch.tensor([0, 1, -100, 3]), torch.tensor([True, True, True, False])
Z, Z_T, MAPS = drawn(4, 7, seed=1), drawn(4, 7, seed=2), (drawn(4, 3, 4, 5, seed=1), drawn(4, 3, 4, 5, seed=2))
ROWS, FEATURES = (drawn(6, 9, seed=1), drawn(6, 9, seed=2)), (drawn(5, 8, seed=1), drawn(5, 8, seed=2))
HIDDEN, HEADS = (drawn(4, 5, seed=3), drawn(4, 6, seed=4)), (drawn(7, 5, seed=5), drawn(7, 6, seed=6))
STORED = torch.topk(Z_T.log_softmax(-1), 3)
both = 0.1 * kd.CrossEntropy() + 0.9 * kd.SoftKL()


def row_loss(name, **options): return lambda z, y=LABELS: getattr(f, name)(z, Z_T, y, T=2.0, mask=MASK, **options)


# name: (loss of one tensor, that tensor). Of every operator each kind, tail and layout that has code of its own.
KINDS = {name: (row_loss(name), Z) for name in (
    "forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "total_variation", "soft_cross_entropy", "dkd", "nkd")} | {
    "logit_mse": (lambda z: f.logit_mse(z, Z_T, LABELS, center=True), Z)}
CASES = KINDS | {
    "rows": (row_loss("forward_kl", reduction="none", row_weight=drawn(4)), Z),
    "CE + KD": (lambda z: both(z, Z_T, LABELS), Z),
    "hint": (lambda x: f.hint(x, FEATURES[1].to(x)), FEATURES[0]),
    "direction": (lambda x: f.hint(x, FEATURES[1], normalize=True), FEATURES[0]),
    "cosine": (lambda x: f.cosine(x, FEATURES[1]), FEATURES[0]),
    "attention_transfer": (lambda x: f.attention_transfer(x, MAPS[1]), MAPS[0]),
    "channel_kl": (lambda x: f.channel_kl(x, MAPS[1]), MAPS[0]),
    "rkd_angle": (lambda x: f.rkd_angle(x, FEATURES[1]), FEATURES[0]),
    "rkd_distance": (lambda x: f.rkd_distance(x, FEATURES[1]), FEATURES[0]),
    "similarity": (lambda x: f.similarity(x, FEATURES[1]), FEATURES[0]),
    "dist": (lambda z: f.dist(z, ROWS[1].to(z), T=2.0), ROWS[0]),
    "sparse_forward_kl": (lambda z: f.sparse_forward_kl(z, *STORED, tail="bucket"), Z),
    "sparse_reverse_kl": (lambda z: f.sparse_reverse_kl(z, *STORED), Z),
    "linear_forward_kl": (lambda h: f.linear_forward_kl(h, HEADS[0], HIDDEN[1], HEADS[1], LABELS, hard_weight=0.3), HIDDEN[0]),
    "linear_jsd": (lambda h: f.linear_jsd(h, HEADS[0], HIDDEN[1], HEADS[1], reduction="none"), HIDDEN[0]),
}
PLAIN = {"rkd_distance", "similarity"} # these are torch's own operations
WAITS = "forward_kl", "dkd", "rows", "hint", "dist" # float16: backward makes their gradient
cases = pytest.mark.parametrize("name", CASES)


class Recorded(TorchDispatchMode):
    "The calls of kdlab's operators, with what they were given."
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "kdlab": self.calls.append((op, args, kwargs or {}))
        return op(*args, **(kwargs or {}))


def value_and_grad(loss, x):
    x = x.detach().clone().requires_grad_()
    value = loss(x)
    return value.detach(), torch.autograd.grad(value.sum(), x)[0]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def check(name, dtype=torch.float32):
    "Schema, autograd, fake tensors and AOT dispatch of every operator that forward and backward call."
    loss, x = CASES[name]
    with Recorded() as record: value_and_grad(loss, x.to(dtype))
    assert bool(record.calls) == (name not in PLAIN)
    for op, args, kwargs in record.calls:
        wants = lambda x: x.requires_grad and not op.name().endswith("_backward") # that has no derivative of its own
        args = [x.detach().requires_grad_(wants(x)) if isinstance(x, torch.Tensor) else x for x in args]
        torch.library.opcheck(op, args, kwargs)
    return len(record.calls)


@cases
def test_opcheck(name): check(name)


@pytest.mark.parametrize("name", WAITS)
def test_opcheck_of_float16(name): assert check(name, torch.float16) == 2


@pytest.mark.parametrize("name", KINDS)
def test_compile_in_one_graph(name):
    loss, x = CASES[name]
    want, got = value_and_grad(loss, x), value_and_grad(torch.compile(loss, fullgraph=True, backend="aot_eager"), x)
    torch.testing.assert_close(got, want)


@cases
def test_export(name):
    loss, x = CASES[name]

    class Model(torch.nn.Module):
        def forward(self, x): return loss(x)

    program = torch.export.export(Model(), (x,))
    assert any("kdlab." in module.code for module in program.graph_module.modules()) == (name not in PLAIN)
    torch.testing.assert_close(program.module()(x), loss(x))


# ---- threads and forks ---------------------------------------------------------------------------------------------
@cases
def test_four_python_threads_at_once(name):
    loss, x = CASES[name]
    many = [x + 0.1 * i for i in range(4)]
    want = [value_and_grad(loss, y) for y in many]
    with ThreadPoolExecutor(4) as pool: got = list(pool.map(lambda y: value_and_grad(loss, y), many * 5))
    for i, pair in enumerate(got): assert torch.equal(pair[0], want[i % 4][0]) and torch.equal(pair[1], want[i % 4][1])


class Losses(Dataset):
    "Item i: loss and gradient of case i, and the threads that a kernel may use where that is computed."
    def __len__(self): return len(CASES)
    def __getitem__(self, i): return *value_and_grad(*list(CASES.values())[i]), ops.threads()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_data_loader_worker_computes_the_same_and_does_not_hang():
    "After the parent has used two threads in each of them, which its children do not have."
    big = drawn(64, 4000, seed=7), drawn(64, 4000, seed=8)
    try:
        torch.set_num_threads(2)
        for name in ("forward_kl", "hint", "dist"): value_and_grad(lambda x: getattr(f, name)(x, big[1]), big[0])
        value_and_grad(lambda x: f.sparse_forward_kl(x, *torch.topk(big[1].log_softmax(-1), 9)), big[0])
        want = [Losses()[i] for i in range(len(CASES))]
        loader = DataLoader(Losses(), None, num_workers=2, multiprocessing_context="fork", timeout=60)
        got = list(loader)
    finally: torch.set_num_threads(1)
    for name, (loss, grad, threads), (value, slope, own) in zip(CASES, got, want):
        torch.testing.assert_close((loss, grad), (value, slope), rtol=1e-6, atol=1e-7, msg=lambda m: f"{name}: {m}")
        assert threads == 1 and own == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_bare_fork_keeps_to_one_thread():
    "torch's number of threads is still 2 there, and a second thread would be waited for without end."
    code = """
import os, torch
from kdlab import functional as f, ops
torch.set_num_threads(2)
s, t = torch.randn(64, 4000), torch.randn(64, 4000)
stored = torch.topk(t.log_softmax(-1), 9)
losses = [lambda x: f.forward_kl(x, t), lambda x: f.jsd(x, t), lambda x: f.dkd(x, t, torch.arange(64)), lambda x: f.hint(x, t),
          lambda x: f.cosine(x, t), lambda x: f.dist(x, t), lambda x: f.sparse_forward_kl(x, *stored)]
def slope(loss):
    x = s.detach().requires_grad_()
    return torch.autograd.grad(loss(x), x)[0]
want = [slope(loss) for loss in losses]
child = os.fork()
if not child:
    fine = ops.threads() == 1 and torch.get_num_threads() == 2
    for loss, slopes in zip(losses, want): fine &= slope(loss).numpy().tobytes() == slopes.numpy().tobytes()
    os._exit(7 if fine else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
