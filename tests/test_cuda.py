"""The CUDA kernels: always on the host, where the emulator of tests/native runs their source thread by thread under
the Python that calls them; on the device, with the same tests, where there is one."""
import ctypes
import importlib.util
import math
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import kdlab as kd
from kdlab import cuda_ops, feature_ops, logit_reference, ops, reference
from kdlab.functional.divergences import question

ROOT = Path(__file__).parents[1]
NATIVE = ROOT / "tests" / "native"
SECONDS = str(max(2, float(os.environ.get("KDLAB_FUZZ_SECONDS", 0)) / 4)) # the CPU kernels take the whole time
INF, NAN = math.inf, math.nan
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 2**-8, torch.float16: 2**-11}
LOSSES = [("forward_kl", {}), ("reverse_kl", {}), ("jsd", {"beta": .5}), ("jsd", {"beta": .1}),
          ("skew_kl", {"alpha": .1}), ("skew_kl", {"alpha": .7}), ("skew_reverse_kl", {"alpha": .1}),
          ("skew_reverse_kl", {"alpha": .7}), ("total_variation", {}), ("soft_cross_entropy", {}),
          ("dkd", {"alpha": 1., "beta": 8.}), ("dkd", {"alpha": 2., "beta": .5}), ("nkd", {"gamma": 1.5}),
          ("logit_mse", {"center": False}), ("logit_mse", {"center": True})]
LABELLED = "dkd", "nkd" # those that need labels
INPLACE = [x for x in LOSSES if x[0] not in ("nkd", "logit_mse")]
IDS = ["-".join([name, *map(str, options.values())]) for name, options in LOSSES]
losses = pytest.mark.parametrize("name, options", LOSSES, ids=IDS)
inplace_losses = pytest.mark.parametrize("name, options", INPLACE, ids=IDS[:len(INPLACE)])
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).split(".")[1])


# ---- how it is compiled --------------------------------------------------------------------------------------------
def test_no_kernel_spills():
    "`ptxas -v` of the last build: for every kernel and architecture, no stack, no spills, at most 168 registers."
    log = ROOT / "build" / "cuda_resources.txt"
    if not log.exists():
        insist = os.environ.get("KDLAB_EXT") == "1" and os.environ.get("KDLAB_CUDA", "auto") != "0" and shutil.which("nvcc")
        assert not insist, "nvcc is here, but the build left no build/cuda_resources.txt: see what it said"
        pytest.skip("the CUDA kernels were not built here")
    text = log.read_text()
    kernels = re.findall(r"Compiling entry function '(\w+)' for '(sm_\d+)'", text)
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text)
    assert len(kernels) == len(spills) and sum("softened_rows" in name for name, _ in kernels) % 16 == 0
    assert set(spills) == {("0", "0", "0")}
    assert max(map(int, re.findall(r"Used (\d+) registers", text))) <= 168


def test_the_module_loads_without_a_driver_and_says_what_is_missing():
    module = pytest.importorskip("kdlab._CUDA", reason="the CUDA kernels were not built here")
    count, why = module.devices()
    assert count > 0 or "CUDA" in why or "device" in why
    if count: return
    with pytest.raises(RuntimeError, match="CUDA: "): module.scale(0, 0, 1, 1, 0, 0, False, 0, 0)
    with pytest.raises(ValueError, match="backend='cuda' cannot run here: the CUDA kernels find no device"):
        kd.functional.forward_kl(torch.zeros(2, 3), torch.zeros(2, 3), backend="cuda")


# ---- the kernels on the host ---------------------------------------------------------------------------------------
def compiled(compiler, folder, flags, *sources):
    "Object files of the sources, two at a time."
    def one(source):
        target = folder / f"{source.name}.o"
        include = "-I", ROOT / "csrc", "-I", NATIVE
        subprocess.run([compiler, *flags, *include, "-x", "c++", "-c", source, "-o", target], check=True)
        return target
    with ThreadPoolExecutor(2) as pool: return list(pool.map(one, sources))


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    "kdlab._CUDA, its kernels run by the emulator; `order` sets the order of the threads."
    compiler, folder = shutil.which("g++"), tmp_path_factory.mktemp("emulated")
    pybind11 = pytest.importorskip("pybind11")
    if compiler is None: pytest.skip("no g++: the kernels are not emulated")
    flags = ["-std=c++17", "-O1", "-fPIC", "-ffp-contract=off", "-fvisibility=hidden", "-DKDLAB_EMULATE",
             '-DKDLAB_CUDA_ARCHS="emulated"', "-I", pybind11.get_include(), "-I", sysconfig.get_path("include")]
    names = "rows.cu", "decoupled.cu", "squares.cu", "binding.cpp", "features.cu"
    sources = [ROOT / "csrc" / "cuda" / name for name in names]
    objects = compiled(compiler, folder, flags, *sources, NATIVE / "cuda_emulated.cpp")
    path = folder / "_CUDA.so"
    subprocess.run([compiler, "-shared", *objects, "-o", path], check=True)
    spec = importlib.util.spec_from_file_location("kdlab_emulated._CUDA", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.order = ctypes.CDLL(str(path)).emulator_order
    return module


@pytest.fixture
def emulation(emulated, monkeypatch):
    "Tensors on the CPU count as tensors on a GPU, and its kernels are emulated."
    cuda_ops._unsupported.cache_clear()
    monkeypatch.setattr(cuda_ops, "kernels", lambda: (emulated, None))
    monkeypatch.setattr(cuda_ops, "on_gpu", lambda x: True)
    monkeypatch.setattr(cuda_ops, "_place", lambda x: (0, 0))
    yield emulated
    emulated.order(0)
    emulated.limits(0, 0)
    cuda_ops._unsupported.cache_clear()


@pytest.fixture(params=["emulated", "device"])
def device(request):
    "Where a test computes: every test that asks for it runs on both."
    if request.param == "emulated":
        request.getfixturevalue("emulation")
        return "cpu"
    if not torch.cuda.is_available() or cuda_ops.nothing_here(): pytest.skip("no GPU, or no kernels for it")
    return "cuda"


def test_random_cases_agree_with_the_definition_and_stay_in_bounds(tmp_path):
    "The fuzz program of the CPU kernels drives the emulated ones: AddressSanitizer, several orders of threads."
    compiler = shutil.which("g++")
    if compiler is None: pytest.skip("no g++")
    flags = ["-std=c++17", "-O0", "-g", "-ffp-contract=off", "-fsanitize=address", "-DKDLAB_EMULATE"]
    objects = compiled(compiler, tmp_path, flags, NATIVE / "cuda_as_cpu.cpp", NATIVE / "fuzz.cpp")
    fuzz = tmp_path / "fuzz"
    if subprocess.run([compiler, "-fsanitize=address", *objects, "-o", fuzz]).returncode: pytest.skip("no sanitizer")
    settings = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run([fuzz, SECONDS], capture_output=True, text=True, env=settings)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert int(done.stdout.split()[0]) > 20


# ---- the contract --------------------------------------------------------------------------------------------------
def logits(*shape, seed=0, scale=3.0, dtype=torch.float32):
    gen = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=gen, dtype=torch.float64)).to(dtype)


def pair(*shape, dtype=torch.float32): return logits(*shape, seed=1, dtype=dtype), logits(*shape, seed=2, dtype=dtype)


def value_and_grad(f, student):
    student = student.detach().requires_grad_()
    value = f(student)
    return value.detach().cpu(), torch.autograd.grad(value.sum(), student)[0].cpu()


def labels_of(x): return 5 * torch.arange(x.shape[0]) % max(1, x.shape[-1])


def run(device, name, options, s, t, y=None, **more):
    "Value and gradient by the kernel."
    if y is None and name in LABELLED: y = labels_of(s)
    if name == "logit_mse": more.pop("T", None)
    to = lambda x: x.to(device) if isinstance(x, torch.Tensor) else x
    more = {k: to(v) for k, v in more.items()}
    f, rest = getattr(kd.functional, name), [to(t), to(y)]
    return value_and_grad(lambda x: f(x, *rest, backend="cuda", **options, **more), to(s))


def oracle(name, options, s, t, T=1., y=None):
    "Rows and d(sum of rows)/d student, in float64 on the CPU; T² included."
    y = labels_of(s) if y is None else y
    t, more = t.double(), options.values()
    if name == "logit_mse": rows = lambda x: reference.stable_logit_mse(x, t, **options)
    elif name == "nkd": rows = lambda x: logit_reference.stable_nkd(x, t, y, T, *more)
    elif name == "dkd": rows = lambda x: T * T * logit_reference.stable_dkd(x, t, y, T, *more)
    else: rows = lambda x: T * T * getattr(reference, f"stable_{name}")(x, t, T, *more)
    return value_and_grad(rows, s.double())


def assert_same(got, want, rtol=1e-6, atol=1e-12): torch.testing.assert_close(got.double(), want, rtol=rtol, atol=atol)


def assert_grad(got, want, dtype=torch.float32, slack=1):
    error = (got.double() - want).abs().max()
    top = want.abs().max()
    assert error <= slack * ROUNDING[dtype] * top + 1e-7 * (dtype == torch.float16), f"{error / top:.3g} of the largest"


@losses
@dtypes
@pytest.mark.parametrize("T", [0.5, 4.0])
def test_value_and_gradient(device, name, options, dtype, T):
    s, t = pair(6, 13, dtype=dtype)
    rows, grad = oracle(name, options, s, t, T)
    got, got_grad = run(device, name, options, s, t, T=T)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and got_grad.dtype == dtype
    assert_same(got, rows.mean())
    # The emulator's exp2 and division are as wrong as those of the device are allowed to be, each time.
    assert_grad(got_grad, grad / 6, dtype, slack=2 if device == "cpu" and dtype == torch.float32 else 1)


@losses
@pytest.mark.parametrize("gap", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("T", [0.1, 1.0, 100.0])
def test_accurate_where_the_student_has_nearly_converged(device, name, options, gap, T):
    t = logits(6, 100, seed=3, scale=1.0)
    s = t + gap * logits(6, 100, seed=4, scale=1.0)
    want, want_grad = oracle(name, options, s, t, T)
    got, got_grad = run(device, name, options, s, t, T=T, reduction="none")
    assert ((got.double() - want).abs() / want).max() < 1e-6
    assert (got_grad.double() - want_grad).abs().max() < 2e-6 * want_grad.abs().max()


@pytest.mark.parametrize("name", ["jsd", "skew_kl", "skew_reverse_kl"])
@pytest.mark.parametrize("mix", [1e-3, .01, .95, .999])
def test_mixtures_that_are_nearly_one_of_their_sides(device, name, mix):
    for scale, apart in (1., 1.), (3., 3.), (1., 1e-2): # ordinary rows, wide ones, and a student that has nearly converged
        t = logits(6, 100, seed=5, scale=scale)
        s = (t if apart < 1 else 0) + logits(6, 100, seed=6, scale=apart)
        options = {"beta" if name == "jsd" else "alpha": mix}
        want, want_grad = oracle(name, options, s, t, 2.)
        got, got_grad = run(device, name, options, s, t, T=2., reduction="none")
        assert ((got.double() - want).abs() / want).max() < 2e-6
        assert ((got_grad.double() - want_grad).abs() / want_grad.abs().amax(-1, keepdim=True)).max() < 3e-6


@pytest.mark.parametrize("C", [7, 1271])
@pytest.mark.parametrize("alpha, beta", [(0., 1.), (1., 0.), (0., 0.)])
def test_a_part_of_weight_0_is_not_there_where_it_is_infinite(device, C, alpha, beta):
    s, t = pair(4, C)
    y = labels_of(s)
    s[0, y[0]], s[1, (y[1] + 1) % C], s[2, y[2]], s[3, (y[3] + 1) % C] = -INF, -INF, NAN, NAN
    options = {"alpha": alpha, "beta": beta}
    got, _ = run(device, "dkd", options, s, t, T=2., reduction="none")
    torch.testing.assert_close(got.double(), oracle("dkd", options, s, t, 2.)[0], rtol=1e-6, atol=0, equal_nan=True)
    assert got.isfinite().tolist() == [beta >= alpha, alpha >= beta, False, False]


@pytest.mark.parametrize("name, options", [LOSSES[i] for i in (0, 1, 2, 10, 12, 14)],
                         ids=["forward_kl", "reverse_kl", "jsd", "dkd", "nkd", "logit_mse"])
@pytest.mark.parametrize("C, dtype", [(0, 0), (1, 0), (2, 0), (7, 0), (10, 2), (252, 2), (507, 0), (1271, 1),
                                      (1271, 3), (32000, 0), (128256, 2)])
def test_numbers_of_classes(device, name, options, C, dtype):
    dtype = DTYPES[dtype]
    s, t = pair(2, C, dtype=dtype)
    rows, grad = oracle(name, options, s, t, 2.)
    got, got_grad = run(device, name, options, s, t, T=2., reduction="none")
    assert_same(got, rows)
    if C: assert_grad(got_grad, grad, dtype)


@losses
@dtypes
def test_masked_rows_are_exactly_zero_even_where_they_hold_nan(device, name, options, dtype):
    s, t = pair(6, 11, dtype=dtype)
    mask, y = torch.tensor([True, False, True, True, False, True]), torch.tensor([0, 1, -100, 2, 3, 4])
    s[1], t[1], s[2], t[4] = NAN, NAN, INF, NAN
    count = mask & (y != -100)
    rows, grad = oracle(name, options, s[count], t[count], 2., y[count])
    got, got_grad = run(device, name, options, s, t, y, T=2., mask=mask, reduction="none")
    assert got[~count].eq(0).all() and got_grad[~count].eq(0).all()
    assert_same(got[count], rows)
    got, got_grad = run(device, name, options, s, t, y, T=2., mask=mask)
    assert_same(got, rows.mean())
    assert got_grad[~count].eq(0).all()
    assert_grad(got_grad[count], grad / 3, dtype)


@pytest.mark.parametrize("C", [11, 3000])
def test_labels_weights_and_divergence_in_one_sweep(device, C):
    s, t = pair(5, C)
    y, w = torch.tensor([0, 3, -100, C - 1, 10]), torch.tensor([1., 2., NAN, 0., .5])
    rows, q = question(*(x.to(device) for x in (s, t, y)), hard_weight=.25, soft_weight=.75, row_weight=w.to(device),
                       T=3., reduction="sum", kind="jsd", mix=.5)
    got, got_grad = value_and_grad(lambda x: ops.answer(x, *rows[1:], q, "cuda"), s.to(device))
    keep = y != -100
    kl, kl_grad = oracle("jsd", {"beta": .5}, s[keep], t[keep], 3.)
    ce, ce_grad = value_and_grad(lambda x: reference.stable_cross_entropy(x, y[keep]), s[keep].double())
    assert_same(got, (w[keep] * (.75 * kl + .25 * ce)).sum())
    assert_grad(got_grad[keep], w[keep, None] * (.75 * kl_grad + .25 * ce_grad))
    assert got_grad[~keep].eq(0).all()
    terms = ops.row_terms(s.to(device), *rows[1:4], q, "cuda")
    assert_same(terms["jsd"].cpu()[keep], kl)
    assert_same(terms["cross_entropy"].cpu()[keep], ce)
    assert terms["jsd"][2] == 0 == terms["cross_entropy"][2]


def test_cross_entropy_alone_and_a_confident_student(device):
    s, y = logits(4, 700), torch.tensor([3, 699, 0, 5])
    s[0, 3] += 40
    rows, q = question(s.to(device), None, y.to(device), hard_weight=1., reduction="none")
    got, got_grad = value_and_grad(lambda x: ops.answer(x, *rows[1:], q, "cuda"), s.to(device))
    ce, grad = value_and_grad(lambda x: reference.stable_cross_entropy(x, y), s.double())
    assert_same(got, ce, rtol=5e-6)
    assert_grad(got_grad, grad)
    others = torch.arange(700) != 3 # these are 1e-15 and keep their digits; the label's is minus their sum
    torch.testing.assert_close(got_grad[0, others].double(), grad[0, others], rtol=1e-5, atol=0)
    assert_same(got_grad[0, 3], -grad[0, others].sum(), rtol=5e-6)


def test_a_bad_label_spoils_its_row_and_no_other(device):
    s, t = pair(3, 9)
    y = torch.tensor([1, 9, -5])
    rows, q = question(*(x.to(device) for x in (s, t, y)), hard_weight=1., reduction="none")
    got, grad = value_and_grad(lambda x: ops.answer(x, *rows[1:], q, "cuda"), s.to(device))
    assert got[1:].isnan().all() and grad[1:].isnan().all() and got[0].isfinite() and grad[0].isfinite().all()


APART = ("dkd", {"alpha": 1., "beta": 8.}), ("nkd", {"gamma": 1.5}), ("logit_mse", {"center": True})
apart = pytest.mark.parametrize("name, options", APART, ids=[name for name, _ in APART])


@apart
@pytest.mark.parametrize("C", [1, 2, 6, 3000])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=["float32", "float64"])
def test_cross_entropy_beside_a_loss_that_sets_the_label_apart(device, name, options, C, dtype):
    s, t = pair(5, C, dtype=dtype)
    y, w = labels_of(s), torch.tensor([1., 2., NAN, 0., .5], dtype=dtype)
    y[2] = -100
    mix, others = options.get("alpha", options.get("center", 0.)), options.get("beta", options.get("gamma", 0.))
    T = 1. if name == "logit_mse" else 3.
    rows, q = question(*(x.to(device) for x in (s, t, y)), hard_weight=.25, soft_weight=.75, row_weight=w.to(device),
                       T=T, reduction="sum", kind=name, mix=float(mix), others=others)
    got, grad = value_and_grad(lambda x: ops.answer(x, *rows[1:], q, "cuda"), s.to(device))
    keep = y != -100
    soft, soft_grad = oracle(name, options, s[keep], t[keep], T, y[keep])
    ce, ce_grad = value_and_grad(lambda x: reference.stable_cross_entropy(x, y[keep]), s[keep].double())
    assert_same(got, (w[keep] * (.75 * soft + .25 * ce)).sum())
    want = w[keep, None] * (.75 * soft_grad + .25 * ce_grad)
    if want.abs().max() > 0: assert_grad(grad[keep], want, dtype)
    assert grad[~keep].eq(0).all()
    terms = ops.row_terms(s.to(device), *rows[1:4], q, "cuda")
    assert_same(terms[name].cpu()[keep], soft)
    assert_same(terms["cross_entropy"].cpu()[keep], ce)


@pytest.mark.parametrize("name, options", [*APART, ("soft_cross_entropy", {})])
@pytest.mark.parametrize("C", [7, 1271])
@pytest.mark.parametrize("T", [.05, 1., 100.])
def test_rows_that_are_sure_and_rows_that_lie_far_away(device, name, options, C, T):
    s, t = pair(6, C)
    y = labels_of(s)
    s[0, y[0]] += 30 * T # sure of the label, both
    t[0, y[0]] += 31 * T
    s[1, (y[1] + 1) % C] += 30 * T # sure of another class
    t[1, (y[1] + 1) % C] += 31 * T
    s[2, y[2]] += 30 * T # of different ones
    t[2, (y[2] + 1) % C] += 30 * T
    s[3:5] += 1e4
    t[4] -= 1e4
    s[5] = t[5] + 1e-3 * s[5]
    want, want_grad = oracle(name, options, s, t, T)
    got, grad = run(device, name, options, s, t, T=T, reduction="none")
    assert_same(got, want, rtol=2e-6)
    for i in range(6): # a sure row's is small, and float64 has its label's from a difference
        assert (grad[i].double() - want_grad[i]).abs().max() < 3e-6 * want_grad[i].abs().max() + 1e-13


@apart
def test_labels_that_a_side_excludes_and_labels_out_of_range(device, name, options):
    s, t = pair(8, 6)
    y = labels_of(s)
    for i in (0, 1): s[i, y[i]] = -INF
    for i in (0, 2): t[i, y[i]] = -INF
    s[3], t[3] = -INF, -INF # the label is the only class
    s[3, y[3]], t[3, y[3]] = 1., 2.
    s[4, y[4]], t[5, y[5]] = NAN, INF
    want, want_grad = oracle(name, options, s, t, 2.)
    got, grad = run(device, name, options, s, t, T=2., reduction="none")
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0, equal_nan=True)
    fine = want.isfinite()
    torch.testing.assert_close(grad[fine].double(), want_grad[fine], rtol=1e-5, atol=1e-6)
    if name == "logit_mse": return
    assert got[1] == INF and got[4:6].isnan().all() and grad[4:6].isnan().all() and got[3] == 0
    if device == "cuda": return # there and in a graph a bad label may not raise; here Python asks first
    rows, q = question(s, t, y, T=2., reduction="none", kind=name, mix=1., others=1.)
    y[6], y[7] = 6, -5
    got, grad = value_and_grad(lambda x: ops.answer(x, *rows[1:], q, "cuda"), s)
    assert got[6:].isnan().all() and grad[6:].isnan().all() and got[0].isfinite() and grad[0].isfinite().all()


@losses
@pytest.mark.parametrize("C", [6, 3000])
def test_excluded_classes_and_spoilt_rows(device, name, options, C):
    s, t = pair(8, C)
    s[0, 1] = t[0, 1] = -INF # both: as if it were not there
    s[1, 2] = -INF # the student alone
    t[2, 3] = -INF # the teacher alone
    s[3], t[4] = -INF, -INF # nothing left
    s[5, 4], t[6, 5] = NAN, INF
    got, got_grad = run(device, name, options, s, t, T=2., reduction="none")
    want, want_grad = oracle(name, options, s, t, 2.)
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0, equal_nan=True)
    rows = slice(None) if name == "logit_mse" else [0, 1, 2, 7] # the others are wholly NaN, whatever autograd makes of them
    torch.testing.assert_close(got_grad[rows].double(), want_grad[rows], rtol=1e-5, atol=1e-6, equal_nan=True)
    if name != "logit_mse": assert got[3:7].isnan().all() and got_grad[3:7].isnan().all()
    assert got[7].isfinite()


@pytest.mark.parametrize("layout", ["sliced", "strided rows", "token axis", "dense", "expanded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts(device, layout, dtype):
    base_s, base_t = pair(6, 8, 50, dtype=dtype)
    view = {"sliced": lambda x: x[0, :, 3:46], "strided rows": lambda x: x[0, ::2], "token axis": lambda x: x[:, 1:-1],
            "dense": lambda x: x.permute(0, 2, 1), "expanded": lambda x: x[:1, :1].expand(4, 3, 50)}[layout]
    dim = 1 if layout == "dense" else -1
    s, t = view(base_s.to(device)), view(base_t.to(device))
    got, grad = value_and_grad(lambda x: kd.functional.forward_kl(x, t, T=2., dim=dim, backend="cuda"), s)
    rows, want = oracle("forward_kl", {}, *(x.cpu().movedim(dim, -1) for x in (s, t)), 2.)
    assert_same(got, rows.mean())
    assert_grad(grad.movedim(dim, -1), want / rows.numel(), dtype)


@pytest.mark.parametrize("shared, cluster", [(0, 0), (6 << 10, 4), (2 << 10, 16), (0, 1), (1 << 10, 1)],
                         ids=["own plan", "clusters of 4", "clusters of 16", "one block", "read twice"])
@pytest.mark.parametrize("shift", [(0, 0), (1, 1), (1, 2)], ids=["aligned", "shifted alike", "shifted apart"])
def test_ways_to_lay_a_row_on_threads(device, shared, cluster, shift):
    C = 5003
    room = lambda: torch.empty(3 * C + 4, dtype=torch.bfloat16, device=device)
    s, t = (room()[n:n + 3 * C].view(3, C).copy_(x) for n, x in zip(shift, pair(3, C)))
    module = cuda_ops.kernels()[0]
    module.limits(shared, cluster)
    try:
        for name, options in (LOSSES[0], LOSSES[2], LOSSES[10], LOSSES[12], LOSSES[14]):
            rows, want = oracle(name, options, s.cpu(), t.cpu(), 2.)
            got, grad = run(device, name, options, s, t, T=2.)
            assert_same(got, rows.mean())
            assert_grad(grad, want / 3, torch.bfloat16)
    finally: module.limits(0, 0)


@pytest.mark.parametrize("C", [10, 3000, 40000])
def test_the_gradient_may_take_the_students_place(device, C):
    s, t = (x.to(device) for x in pair(3, C))
    _, q = question(s, t, kind="jsd", mix=.5)
    apart, call = torch.empty_like(s), ops._Call(s, t, None, None, None, q)
    call(out=call.empty_out(), grad=apart)
    call(out=call.empty_out(), grad=s)
    assert torch.equal(s, apart)


@inplace_losses
@pytest.mark.parametrize("dtype, shared, cluster", [(torch.float16, 0, 0), (torch.float32, 1 << 10, 1)],
                         ids=["own plan", "read twice"])
def test_inplace_grad(device, name, options, dtype, shared, cluster):
    "Rows of which some are close, one that does not count, and a gradient for each row."
    s, t = (x.to(device) for x in pair(4, 603, dtype=dtype))
    s[::2] = t[::2] + 1e-2 * s[::2]
    y, results = torch.tensor([0, 1, -100, 3], device=device), []
    module = cuda_ops.kernels()[0]
    module.limits(shared, cluster)
    try:
        for inplace in (False, True):
            z = s.clone().requires_grad_() * 1
            place, f = z.data_ptr(), getattr(kd.functional, name)
            rows = f(z, t, y, T=2., reduction="none", backend="cuda", inplace_grad=inplace, **options)
            grad, = torch.autograd.grad(rows, z, torch.arange(4., device=device))
            results.append((rows.detach(), grad))
            assert (grad.data_ptr() == place) == inplace == bool(z.isnan().all())
    finally: module.limits(0, 0)
    assert all(map(torch.equal, *results)) and results[0][1][2].eq(0).all()


@pytest.mark.parametrize("name", ["jsd", "dkd", "nkd", "logit_mse"])
def test_repeated_runs_are_the_same_to_the_bit(device, name):
    s, t = (x.to(device) for x in pair(40, 2100))
    mask = torch.arange(40).ne(3).to(device)
    once = lambda: run(device, name, {}, s, t, mask=mask)
    first = once()
    for order in (1, 2, 3):
        if device == "cpu": cuda_ops.kernels()[0].order(order) # threads in another order: a missing barrier would show
        again = once()
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


def test_many_rows_are_counted_and_added_up_in_parts(device):
    s, t = (x.to(device) for x in pair(20000, 2))
    mask = (torch.arange(20000) % 3 == 0).to(device)
    got, grad = value_and_grad(lambda x: kd.functional.forward_kl(x, t, mask=mask, backend="cuda"), s)
    rows, want = oracle("forward_kl", {}, s.cpu()[::3], t.cpu()[::3])
    assert_same(got, rows.mean())
    assert_grad(grad[::3], want / len(rows))


def test_numbers_on_the_device(device):
    s, t = (x.to(device) for x in pair(4, 9))
    T, w, n = (torch.tensor(x, device=device) for x in (3., .5, 7.))
    rows, q = question(s, t, soft_weight=w, T=T, normalizer=n)
    got, grad = value_and_grad(lambda x: ops.answer(x, *rows[1:], q, "cuda"), s)
    want, want_grad = oracle("forward_kl", {}, s.cpu(), t.cpu(), 3.)
    assert_same(got, .5 * want.sum() / 7)
    assert_grad(grad, .5 * want_grad / 7)


def test_incoming_gradients_and_second_derivatives(device):
    s, t = (x.to(device) for x in pair(4, 9, dtype=torch.float64))
    student = s.clone().requires_grad_()
    loss = kd.functional.forward_kl(student, t, T=2., backend="cuda")
    once, = torch.autograd.grad(3 * loss, student, retain_graph=True)
    again, = torch.autograd.grad(loss, student, retain_graph=True)
    torch.testing.assert_close(once, 3 * again)
    rows = kd.functional.forward_kl(student, t, T=2., reduction="none", backend="cuda")
    each, = torch.autograd.grad(rows, student, torch.tensor([1., 0., 2., -1.], dtype=torch.float64, device=device))
    torch.testing.assert_close(each, 4 * again * torch.tensor([1., 0., 2., -1.], device=device)[:, None])
    grad, = torch.autograd.grad(loss, student, create_graph=True)
    assert torch.autograd.grad(grad.square().sum(), student)[0].isfinite().all()


def test_compiled_and_exported_calls_reach_the_same_kernel(device, monkeypatch):
    s, t = (x.to(device) for x in pair(4, 9))
    calls, real = [], cuda_ops.rows
    monkeypatch.setattr(cuda_ops, "rows", lambda *a, **k: calls.append(1) or real(*a, **k))
    f = torch.compile(lambda x: kd.functional.forward_kl(x, t, T=2.), fullgraph=True, backend="aot_eager")
    got, grad = value_and_grad(f, s)
    rows, want = oracle("forward_kl", {}, s.cpu(), t.cpu(), 2.)
    assert calls
    assert_same(got, rows.mean())
    assert_grad(grad, want / 4)


# ---- features ------------------------------------------------------------------------------------------------------
FEATURES = [("hint", (3, 7)), ("hint", (2, 40000)), ("direction", (3, 7)), ("direction", (2, 20001)),
            ("cosine", (5, 48)), ("attention_transfer", (3, 5, 4, 6)), ("attention_transfer", (2, 70, 7, 7))]


def compare_features(device, loss, s, t, mask=None, reduction="none"):
    "Value and gradient by the kernel, and what they should be."
    want = value_and_grad(lambda x: feature_ops.torch_features(x, t.double(), mask, loss, reduction), s.double())
    where = None if mask is None else mask.to(device)
    features = lambda x: feature_ops.features(x, t.to(device), where, loss, reduction, "cuda")
    return *value_and_grad(features, s.to(device)), *want


@pytest.mark.parametrize("loss, shape", FEATURES, ids=str)
@dtypes
@pytest.mark.parametrize("masked", [False, True])
def test_features(device, loss, shape, dtype, masked):
    s, t = (x / 3 for x in pair(*shape, dtype=dtype))
    mask = torch.arange(shape[0]) != 1 if masked else None
    if masked: s[1] = NAN
    for reduction in ("mean", "none"):
        got, grad, want, want_grad = compare_features(device, loss, s, t, mask, reduction)
        assert_same(got, want)
        assert_grad(grad, want_grad, dtype)
        if masked: assert grad[1].eq(0).all()


@pytest.mark.parametrize("loss", ["direction", "cosine", "hint"])
def test_features_that_nearly_agree_and_zero_vectors(device, loss):
    t = logits(3, 300, scale=1.)
    s = 5 * t + 1e-4 * logits(3, 300, seed=7, scale=1.)
    s[2] = 0
    got, grad, want, want_grad = compare_features(device, loss, s, t)
    assert_same(got, want)
    for row in range(3): assert_grad(grad[row], want_grad[row])


@pytest.mark.parametrize("student, teacher", [((2, 4, 8, 8), (2, 6, 4, 4)), ((2, 4, 5, 7), (2, 3, 3, 9)),
                                              ((2, 3, 6, 6), (2, 2, 12, 9))])
def test_attention_of_maps_of_different_sizes(device, student, teacher):
    s, t = logits(*student, seed=1), logits(*teacher, seed=2)
    got, grad, want, want_grad = compare_features(device, "attention_transfer", s, t, reduction="sum")
    assert_same(got, want)
    assert_grad(grad, want_grad)


def test_no_samples(device):
    for shape in ((0, 5), (3, 0)):
        s = torch.zeros(shape, device=device)
        got, grad = value_and_grad(lambda x: feature_ops.features(x, s, None, "hint", "mean", "cuda"), s)
        assert got == 0 and grad.shape == shape


# ---- what the Python passes on -------------------------------------------------------------------------------------
class Recorder(SimpleNamespace):
    "Stands for the module: remembers what it was called with."
    def __init__(self): super().__init__(calls=[], archs="none")
    def devices(self): return 1, None
    def unsupported(self, device): return None
    def workspace(self, rows): return 256 + rows
    def rows(self, *args): self.calls.append(args)
    def scale(self, *args): self.calls.append(args)


@pytest.fixture
def recorder(monkeypatch):
    fake = Recorder()
    cuda_ops._unsupported.cache_clear()
    monkeypatch.setattr(cuda_ops, "kernels", lambda: (fake, None))
    monkeypatch.setattr(cuda_ops, "on_gpu", lambda x: True)
    monkeypatch.setattr(cuda_ops, "_place", lambda x: (3, 0xabc))
    yield fake
    cuda_ops._unsupported.cache_clear()


def test_addresses_strides_numbers_device_and_stream(recorder):
    base_s, base_t = pair(4, 12)
    s, t, y = base_s[:, :9].requires_grad_(), base_t[:, 3:], torch.tensor([1, 2, -100, 0])
    T = torch.tensor(2.5)
    kd.functional.jsd(s, t, y, T=T, beta=1, mask=y >= 0, normalizer=5., reduction="mean", backend="cuda")
    args, = recorder.calls
    student, teacher, target, mask, weight, grad_in, grad, kl, ce, out = args[:10]
    assert (student, teacher, target, weight, grad_in, kl, ce) == (s.data_ptr(), t.data_ptr(), y.data_ptr(), 0, 0, 0, 0)
    assert mask and grad and out
    assert args[10:16] == (0, 0, 4, 9, 12, 12)
    (T_value, T_at), t_squared, kl_weight, ce_weight, reduction, normalizer, ignore_index = args[16:23]
    kind, mix, others = args[23:26]
    device, stream, space = args[26:]
    assert T_value == 0 and T_at and t_squared # the address of a float64 copy: its value was not looked at
    assert ce_weight[1] == 0 == normalizer[1] and normalizer[0] == 5. and reduction == 2 and ignore_index == -100
    assert kind == cuda_ops.KERNELS.index("jsd") and (mix, others) == (1, 0) and (device, stream) == (3, 0xabc)
    assert space


def test_auto_takes_the_kernels_on_a_gpu_and_says_why_not_otherwise(recorder, monkeypatch):
    s, t = pair(2, 3)
    q = ops.Question(kind="jsd", mix=.5)
    assert ops.choose("auto", s, t, None, q) == "cuda"
    assert ops.choose("auto", s, t.clone().requires_grad_(), None, q) == "torch"
    with monkeypatch.context() as few:
        few.setattr(cuda_ops, "KERNELS", ("forward_kl",))
        assert ops.choose("auto", s, t.detach(), None, q) == "torch"
        with pytest.raises(ValueError, match="no kernel for jsd"): ops.choose("cuda", s, t.detach(), None, q)
    assert feature_ops.choose_features("auto", s, s, has_cuda=True) == "cuda"
    with pytest.raises(ValueError, match="it has no CUDA kernel"): feature_ops.choose_features("cuda", s, s)
    monkeypatch.setattr(cuda_ops, "why_not", lambda x: "device 3 is not supported: too old")
    assert ops.choose("auto", s, t.detach(), None, q) == "torch"
    with pytest.raises(ValueError, match="backend='cuda' cannot run here: device 3 is not supported: too old"):
        ops.choose("cuda", s, t.detach(), None, q)


def test_the_check_up_tells_which_it_is(monkeypatch):
    monkeypatch.setattr(cuda_ops, "kernels", lambda: (None, "No module named 'kdlab._CUDA'"))
    assert cuda_ops.summary() == (False, "the CUDA kernels are not built (No module named 'kdlab._CUDA')")
    assert "not built" in str(kd.doctor().facts["CUDA"])


def test_the_benchmark_writes_all_rows_or_none(tmp_path):
    spec = importlib.util.spec_from_file_location("gpu_benchmark", ROOT / "benchmarks" / "gpu.py")
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    ms = {"kdlab": 2., "compile": 5., "copy": 1.5}
    goals = ("compile", "times_ours", 2), ("kdlab", "share_of_copy", .85)
    rows = bench.table("x", torch.float32, ms, {"kdlab": 10.}, goals)
    assert [r["met"] for r in rows] == ["no", "yes", ""] and rows[0]["share_of_copy"] == .75
    bench.write(tmp_path / "x.csv", rows)
    assert (tmp_path / "x.csv").read_text().splitlines()[2].startswith("x,float32,compile,5,2.5,0.3")
    with pytest.raises(ValueError): bench.write(tmp_path / "x.csv", [{"nobody": 1}])
    assert len((tmp_path / "x.csv").read_text().splitlines()) == 4


def test_the_benchmark_says_what_is_missing():
    if torch.cuda.is_available() and not cuda_ops.nothing_here(): pytest.skip("it would run here")
    done = subprocess.run([sys.executable, ROOT / "benchmarks" / "gpu.py"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("nothing to measure: ") and done.stderr.count("\n") == 1


# ---- only on a device ----------------------------------------------------------------------------------------------
@pytest.fixture
def gpu():
    if not torch.cuda.is_available() or cuda_ops.nothing_here(): pytest.skip("no GPU, or no kernels for it")


def test_the_stream_of_the_caller_is_used(gpu):
    s, t = (x.cuda() for x in pair(512, 32000))
    want = kd.functional.forward_kl(s, t, backend="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        late = torch.empty_like(s)
        torch.cuda._sleep(50_000_000) # a kernel on another stream would read what is not there yet
        late.copy_(s)
        got = kd.functional.forward_kl(late, t, backend="cuda")
    side.synchronize()
    assert torch.equal(got, want)


def test_cuda_graphs(gpu):
    s, t = (x.cuda() for x in pair(64, 1000))
    student, T = s.clone().requires_grad_(), torch.tensor(1., device="cuda")

    def step():
        loss = kd.functional.forward_kl(student, t, T=T, mask=mask, backend="cuda")
        return loss, torch.autograd.grad(loss, student)[0]

    mask = torch.ones(64, dtype=torch.bool, device="cuda")
    for _ in range(3): step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): loss, grad = step()
    with torch.no_grad(): student.copy_(2 * s)
    T.fill_(3.)
    mask[:10] = False
    graph.replay()
    want, want_grad = step()
    assert torch.equal(loss, want) and torch.equal(grad, want_grad)


def test_the_current_device_stays_what_it_was(gpu):
    if torch.cuda.device_count() < 2: pytest.skip("one device only")
    s, t = (x.to("cuda:1") for x in pair(4, 9))
    kd.functional.forward_kl(s, t, backend="cuda")
    assert torch.cuda.current_device() == 0
