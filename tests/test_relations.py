"""The losses on relations: values against numpy and the float64 definitions, invariances, and the public contract."""
import copy
import inspect
import math
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

import kdlab as kd
from kdlab import ops, relation_ops
from kdlab import relation_reference as reference
from kdlab.functional import (
    cka, correlation_congruence, dist, pkt, rkd, rkd_angle, rkd_distance, similarity, similarity_kl)

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 2e-6, torch.float64: 1e-10, torch.bfloat16: 2**-8, torch.float16: 2**-11}
INF, NAN = math.inf, math.nan
definition_rkd = lambda s, t: 25 * reference.rkd_distance(s, t) + 50 * reference.rkd_angle(s, t)

# name: (function, definition, backends)
CASES = {
    "similarity": (similarity, reference.similarity, "torch cpp"),
    "rkd_distance": (rkd_distance, reference.rkd_distance, "torch cpp"),
    "rkd_angle": (rkd_angle, reference.rkd_angle, "torch cpp"),
    "rkd": (rkd, definition_rkd, "torch cpp"),
    "pkt": (pkt, reference.pkt, "torch cpp"),
    "correlation_congruence": (correlation_congruence, reference.correlation_congruence, "torch"),
    "similarity_kl": (similarity_kl, reference.similarity_kl, "torch"),
    "cka": (cka, reference.cka, "torch cpp"),
    "dist": (dist, reference.dist, "torch cpp"),
}
RUNS = [(name, backend) for name, (*_, backends) in CASES.items() for backend in backends.split()
        if backend == "torch" or ops._C is not None]
runs = pytest.mark.parametrize("case, backend", RUNS, ids=lambda x: x)
cases = pytest.mark.parametrize("case", CASES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).split(".")[1])
needs_core = pytest.mark.skipif(ops._C is None, reason="the compiled core is not built")


def features(*shape, seed=0, dtype=torch.float32):
    gen = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=gen, dtype=torch.float64) + 0.3).to(dtype)


def pair(case, B=9, dtype=torch.float32):
    return features(B, 12, seed=1, dtype=dtype), features(B, 12 if case == "dist" else 7, seed=2, dtype=dtype)


def value_and_grad(f, student):
    student = student.detach().requires_grad_()
    value = f(student)
    return value.detach(), torch.autograd.grad(value, student)[0]


def grad_error(got, want):
    return ((got.double() - want).abs().max() / want.abs().max()).item()


def test_values_in_numpy():
    s, t = (x.double() for x in pair("rkd", 6))
    a, b = s.numpy(), t.numpy()
    length = lambda x: np.sqrt((x**2).sum(-1, keepdims=True))
    smooth = lambda d: np.where(abs(d) < 1, d * d / 2, abs(d) - 0.5)
    G, H = a @ a.T, b @ b.T
    assert similarity(s, t).item() == pytest.approx(((G / length(G) - H / length(H))**2).mean())
    distances = [np.array([[np.sqrt(((x - y)**2).sum()) for y in z] for x in z]) for z in (a, b)]
    d, e = (x / x[x > 0].mean() for x in distances)
    assert rkd_distance(s, t).item() == pytest.approx(smooth(d - e).mean())
    def cosine(x, i, j, k):
        u, v = x[i] - x[j], x[k] - x[j]
        return u @ v / np.sqrt((u @ u) * (v @ v)) if i != j != k else 0.0
    gaps = [cosine(a, i, j, k) - cosine(b, i, j, k) for i in range(6) for j in range(6) for k in range(6)]
    assert rkd_angle(s, t).item() == pytest.approx(smooth(np.array(gaps)).mean())
    K, M = ((1 + (x / length(x)) @ (x / length(x)).T) / 2 for x in (a, b))
    q, p = K / K.sum(1, keepdims=True), M / M.sum(1, keepdims=True)
    assert pkt(s, t).item() == pytest.approx((p * np.log(p / q)).mean())
    x, y = a - a.mean(0), b - b.mean(0)
    hsic = lambda u, v: ((u.T @ v)**2).sum()
    assert cka(s, t).item() == pytest.approx(1 - hsic(x, y) / np.sqrt(hsic(x, x) * hsic(y, y)))
    s, t = (x.double() for x in pair("dist", 6))
    q, p = (np.exp(z / 2) / np.exp(z / 2).sum(-1, keepdims=True) for z in (s.numpy(), t.numpy()))
    rows = np.mean([1 - np.corrcoef(x, y)[0, 1] for x, y in zip(p, q)])
    columns = np.mean([1 - np.corrcoef(x, y)[0, 1] for x, y in zip(p.T, q.T)])
    assert dist(s, t, T=2.0).item() == pytest.approx(4 * (rows + columns))


@runs
@dtypes
def test_value_and_gradient_are_those_of_the_definition(case, backend, dtype):
    f, definition, _ = CASES[case]
    s, t = pair(case, dtype=dtype)
    want, grad = value_and_grad(lambda x: definition(x, t.double()), s.double())
    got, got_grad = value_and_grad(lambda x: f(x, t, backend=backend), s)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and got_grad.dtype == dtype
    torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=0)
    assert grad_error(got_grad, grad) <= ROUNDING[dtype] + 1e-5 * (dtype == torch.float16)


@runs
@pytest.mark.parametrize("B", [2, 3, 17, 40])
def test_sizes(case, backend, B):
    f, definition, _ = CASES[case]
    s, t = pair(case, B)
    want, grad = value_and_grad(lambda x: definition(x, t.double()), s.double())
    got, got_grad = value_and_grad(lambda x: f(x, t, backend=backend), s)
    torch.testing.assert_close(got.double(), want, rtol=3e-6, atol=1e-9)
    assert (got_grad.double() - grad).abs().max() <= 3e-6 * max(grad.abs().max(), 1e-3)


@needs_core
@pytest.mark.parametrize("isa", ops._C.info()["isas"] if ops._C is not None else [])
@pytest.mark.parametrize("B, n", [(1, 1), (3, 70), (9, 4097), (70, 33)])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.float64, torch.float32),
                                    (torch.bfloat16, torch.float16)], ids=str)
def test_gram_matrices_of_the_core(isa, B, n, dtypes):
    before = ops._C.info()["isa"]
    ops._C.set_isa(isa)
    try:
        s, t = (features(B, n, seed=k, dtype=dtypes[k]) for k in range(2))
        keep = torch.arange(B) % 3 != 1
        s[~keep], W = NAN, features(B, B, seed=3, dtype=torch.float64)
        if B == 1: keep = None
        wide = torch.promote_types(torch.promote_types(*dtypes), torch.float32)
        for exact, centre in ((False, False), (True, False), (True, True)):
            def both(X, core, wide=wide):
                X = X.detach().requires_grad_()
                G = relation_ops.gram(X, keep, exact, centre, wide, core)
                return G.detach(), torch.autograd.grad((G * W).sum(), X)[0].double()
            want, grad = both(s.double(), False, torch.float64)
            results = []
            for threads in (1, 2, 4):
                torch.set_num_threads(threads)
                results.append(both(s, True))
            torch.set_num_threads(1)
            for G, g in results[1:]: assert torch.equal(G, results[0][0]) and torch.equal(g, results[0][1])
            G, g = results[0]
            assert (G - want).abs().max() <= (1e-13 if exact or wide is torch.float64 else 1e-6) * want.abs().max()
            assert (g - grad).abs().max() <= ROUNDING[dtypes[0]] * grad.abs().max() + 1e-12
        if keep is not None: t[1] = INF
        exact = relation_ops.gram_pair(s.double(), t.double(), keep, torch.float64)
        for x, y in zip(relation_ops.gram_pair(s, t, keep, wide, True), exact):
            assert (x - y).abs().max() <= 1e-6 * y.abs().max()
    finally: ops._C.set_isa(before)


@needs_core
@pytest.mark.parametrize("isa", ops._C.info()["isas"] if ops._C is not None else [])
def test_angles_on_every_instruction_set(isa):
    before = ops._C.info()["isa"]
    ops._C.set_isa(isa)
    try:
        for B in (4, 8, 21, 33): # within one tile of rows, all of one, and parts of the last
            s, t = (x.double() for x in pair("rkd_angle", B))
            want, grad = value_and_grad(lambda x: reference.rkd_angle(x, t), s)
            got, got_grad = value_and_grad(lambda x: rkd_angle(x, t, backend="cpp"), s)
            torch.testing.assert_close(got, want)
            assert grad_error(got_grad, grad) <= 1e-10
            torch.testing.assert_close(rkd_angle(s, t, backend="cpp"), want)
    finally: ops._C.set_isa(before)


@runs
def test_accurate_where_the_student_has_nearly_converged(case, backend):
    f, definition, _ = CASES[case]
    t = features(9, 12, seed=2)
    s = t + 1e-3 * features(9, 12, seed=1)
    want, grad = value_and_grad(lambda x: definition(x, t.double()), s.double())
    got, got_grad = value_and_grad(lambda x: f(x, t, backend=backend), s)
    torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=0)
    assert grad_error(got_grad, grad) <= 2e-6


@pytest.mark.parametrize("gap", [1e-2, 1e-4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_similarity_of_long_features_near_convergence(gap, dtype):
    t = features(16, 5000, seed=2, dtype=dtype)
    s = (t.float() + gap * features(16, 5000, seed=1)).to(dtype)
    want, grad = value_and_grad(lambda x: reference.similarity(x, t.double()), s.double())
    mask = torch.ones(16, dtype=torch.bool)
    for options in ({}, {"mask": mask}):
        got, got_grad = value_and_grad(lambda x: similarity(x, t, **options), s)
        torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=0)
        assert grad_error(got_grad, grad) <= max(2e-6, ROUNDING[dtype])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak of memory is read from /proc")
@pytest.mark.parametrize("loss, shape, most", [
    ("rkd_angle", (256, 512), 3.3), ("similarity", (32, 400_000), 4), ("rkd_distance", (32, 400_000), 5), ("pkt", (32, 400_000), 5),
    ("cka", (32, 400_000), 5)])
def test_memory_beside_the_gradient(loss, shape, most):
    "Megabytes: pieces and matrices of pairs; nothing of the features' size."
    code = f"""
import ctypes, torch, kdlab as kd
torch.set_num_threads(1)
f = kd.functional.{loss}
s, t = torch.randn{shape}.requires_grad_(), torch.randn{shape}
def peak(): return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024
for _ in range(2): torch.autograd.grad(f(s, t), s)
kd.empty_cache()
ctypes.CDLL(None).malloc_trim(0)
open("/proc/self/clear_refs", "w").write("5")
before = peak()
torch.autograd.grad(f(s, t), s)
print(peak() - before - s.nbytes / 2**20)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) <= most


def test_they_are_not_the_usual_mistakes():
    s, t = pair("rkd")
    length = lambda x: x / x.norm(dim=1, keepdim=True)
    G, H = s @ s.T, t @ t.T
    right = similarity(s, t)
    for wrong in ((G - H).square().mean(), (length(s) @ length(s).T - length(t) @ length(t).T).square().mean(),
                  (G / G.norm() - H / H.norm()).square().mean()): assert abs(wrong - right) > 0.01 * right
    squared = torch.nn.functional.smooth_l1_loss(*(torch.cdist(x, x)**2 / (torch.cdist(x, x)**2).mean() for x in (s, t)))
    assert abs(squared - rkd_distance(s, t)) > 0.01 * squared
    assert abs(pkt(t, s) - pkt(s, t)) > 1e-3 * pkt(s, t)
    not_centred = 1 - (s.T @ t).norm()**2 / ((s.T @ s).norm() * (t.T @ t).norm())
    assert abs(not_centred - cka(s, t)) > 0.01
    z, y = pair("dist")
    right = dist(z, y, T=4.0)
    assert abs(dist(z, y, T=4.0, t_squared=False) * 16 - right) < 1e-5 and abs(dist(z.T, y.T, T=4.0) - right) > 1e-3 * right


@cases
def test_invariances(case):
    f = CASES[case][0]
    s, t = (x.double() for x in pair(case))
    want, order = f(s, t), torch.randperm(9, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(f(s[order], t[order]), want)
    if case == "dist":
        classes = torch.randperm(12, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(f(s[:, classes], t[:, classes]), want)
        torch.testing.assert_close(f(s + torch.arange(9.)[:, None], t), want)
        return
    turn, _ = torch.linalg.qr(features(12, 12, seed=3, dtype=torch.float64))
    torch.testing.assert_close(f(3 * s @ turn, t), want)
    torch.testing.assert_close(f(s, 0.1 * t), want)
    assert f(s, 2 * s @ turn) < 1e-9
    if case in ("rkd_distance", "rkd_angle", "rkd", "cka"): torch.testing.assert_close(f(s + 5, t - 1), want)
    maps = s.view(9, 3, 2, 2)
    torch.testing.assert_close(f(maps.to(memory_format=torch.channels_last), t), want)
    torch.testing.assert_close(f(s.view(9, 3, 4), t), want)


@runs
def test_masked_samples_are_left_out_even_where_they_hold_nan(case, backend):
    f = CASES[case][0]
    s, t = pair(case)
    mask = torch.ones(9, dtype=torch.bool)
    mask[[1, 4, 8]] = False
    want, want_grad = value_and_grad(lambda x: f(x, t[mask], backend=backend), s[mask])
    s[1], t[4], s[8] = NAN, INF, NAN
    got, grad = value_and_grad(lambda x: f(x, t, mask=mask, backend=backend), s)
    torch.testing.assert_close(got, want, rtol=2e-6, atol=1e-9)
    torch.testing.assert_close(grad[mask], want_grad, rtol=1e-4, atol=1e-6)
    assert grad[~mask].eq(0).all()
    got, grad = value_and_grad(lambda x: f(x, t, mask=torch.zeros(9, dtype=torch.bool), backend=backend), s)
    assert got == (1 if case == "cka" else 0) and grad.eq(0).all()


def test_rows_of_dist_without_a_label_do_not_count():
    s, t = pair("dist")
    y = torch.arange(9)
    y[[2, 5]] = -100
    want = dist(s[y != -100], t[y != -100])
    for options in ({"target": y}, {"labels": y}): torch.testing.assert_close(dist(s, t, **options), want)
    torch.testing.assert_close(kd.DIST()(s, t, y), want)
    dense = lambda x: x.view(3, 3, 12).movedim(-1, 1)
    torch.testing.assert_close(dist(dense(s), dense(t), y.view(3, 3), dim=1), want)


@runs
@pytest.mark.parametrize("kind", ["none", "one", "two", "zeros", "some zeros", "equal", "identical", "constant"])
def test_no_nan_in_degenerate_batches(case, backend, kind):
    f = CASES[case][0]
    s, t = pair(case)
    if kind in ("none", "one", "two"): s, t = (x[:["none", "one", "two"].index(kind)] for x in (s, t))
    if kind == "zeros": s = torch.zeros_like(s)
    if kind == "some zeros": s[2:4], t[3:5] = 0, 0
    if kind == "equal": s[1], t[1] = s[0], t[5]
    if kind == "identical": t = s.clone()
    if kind == "constant": s = s[:1].expand_as(s).contiguous()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        got, grad = value_and_grad(lambda x: f(x, t.to(dtype), backend=backend), s.to(dtype))
        assert got.isfinite() and grad.isfinite().all()
    if kind == "identical": assert f(s, t, backend=backend) < 1e-7


@runs
def test_gradcheck_and_gradgradcheck(case, backend):
    f = CASES[case][0]
    s, t = (x[:4, :5] for x in pair(case, dtype=torch.float64))
    s = s.contiguous().requires_grad_()
    mask = torch.tensor([True, True, False, True])
    for options in ({}, {"mask": mask}):
        g = lambda x: f(x, t, backend=backend, **options)
        assert torch.autograd.gradcheck(g, s) and torch.autograd.gradgradcheck(g, s)


@cases
def test_teacher_gradient_autocast_and_functorch(case):
    f = CASES[case][0]
    s, t = pair(case)
    s.requires_grad_(), t.requires_grad_()
    loss = f(s, t)
    loss.backward(retain_graph=True)
    assert t.grad is None and s.grad.abs().max() > 0
    first = s.grad.clone()
    loss.backward()
    torch.testing.assert_close(s.grad, 2 * first)
    f(s, t, detach_teacher=False).backward()
    assert t.grad.abs().max() > 0
    s, t = s.detach(), t.detach()
    with torch.autocast("cpu", dtype=torch.bfloat16): assert torch.equal(f(s, t), f(s.clone(), t))
    torch.testing.assert_close(torch.func.grad(lambda x: f(x, t))(s), first, rtol=1e-4, atol=1e-7)


@cases
def test_compile_without_graph_breaks(case):
    torch._dynamo.reset()
    f = CASES[case][0]
    s, t = pair(case)
    mask = torch.ones(9, dtype=torch.bool)
    mask[2] = False
    g = lambda x: 2 * f(x, t, mask=mask)
    want, want_grad = value_and_grad(g, s)
    got, grad = value_and_grad(torch.compile(g, fullgraph=True, backend="aot_eager"), s)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(grad, want_grad, rtol=1e-4, atol=1e-7)


@needs_core
def test_angles_opcheck_threads_and_large_batches():
    G, H = (relation_ops.gram(features(5, 12, seed=x), None, True, True) for x in (1, 2))
    for mask in (None, torch.arange(5) != 3):
        torch.library.opcheck(relation_ops.angles_op, (G.requires_grad_(), H, mask, True),
                              test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))
    s, t = features(150, 12, seed=1), features(150, 7, seed=2)
    results = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        G = [relation_ops.samples(x, None, True, True) for x in (s, t)]
        G = [x @ x.T for x in G] if not results else G_first
        G_first = G
        results.append(value_and_grad(lambda x: relation_ops.rkd_angle_kernel(x, G[1], None), G[0]))
    torch.set_num_threads(1)
    for value, grad in results[1:]: assert torch.equal(value, results[0][0]) and torch.equal(grad, results[0][1])
    want, grad = value_and_grad(lambda x: rkd_angle(x, t, backend="torch"), s)
    got, got_grad = value_and_grad(lambda x: rkd_angle(x, t, backend="cpp"), s)
    torch.testing.assert_close(got, want)
    assert grad_error(got_grad, grad.double()) < 1e-6


def logits(B, C, dtype=torch.float32):
    return features(B, C, seed=1, dtype=dtype), features(B, C, seed=2, dtype=dtype)


@needs_core
@pytest.mark.parametrize("isa", ops._C.info()["isas"] if ops._C is not None else [])
@pytest.mark.parametrize("B, C", [(1, 7), (3, 1), (7, 252), (100, 33), (20, 1271)])
def test_kernel_of_dist(isa, B, C):
    before = ops._C.info()["isa"]
    ops._C.set_isa(isa)
    try:
        for dtype in DTYPES:
            for T in (0.5, 4.0):
                s, t = logits(B, C, dtype)
                want, grad = value_and_grad(lambda x: dist(x, t.double(), T=T, backend="torch"), s.double())
                got, got_grad = value_and_grad(lambda x: dist(x, t, T=T, backend="cpp"), s)
                torch.testing.assert_close(got.double(), want, rtol=5e-6, atol=0)
                tolerance = max(ROUNDING[dtype], 1e-5 if dtype != torch.float64 else 0)
                assert (got_grad.double() - grad).abs().max() <= tolerance * grad.abs().max() + 1e-9
    finally: ops._C.set_isa(before)


@needs_core
@pytest.mark.parametrize("isa", ops._C.info()["isas"] if ops._C is not None else [])
@pytest.mark.parametrize("T", [1.0, 4.0])
@pytest.mark.parametrize("gap", [1e-1, 1e-2, 1e-4])
def test_dist_of_students_that_have_nearly_converged(isa, T, gap):
    before = ops._C.info()["isa"]
    ops._C.set_isa(isa)
    try:
        t = 3 * features(60, 37, seed=2)
        s = t + gap * features(60, 37, seed=1)
        s[::7] = t[::7] + features(9, 37, seed=3) # some rows are still apart
        want, grad = value_and_grad(lambda x: dist(x, t.double(), T=T, backend="torch"), s.double())
        got, got_grad = value_and_grad(lambda x: dist(x, t, T=T, backend="cpp"), s)
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)
        assert grad_error(got_grad, grad) <= 1e-6
        s = t + gap * features(60, 37, seed=1)
        want, grad = value_and_grad(lambda x: dist(x, t.double(), T=T, backend="torch"), s.double())
        got, got_grad = value_and_grad(lambda x: dist(x, t, T=T, backend="cpp"), s)
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)
        assert grad_error(got_grad, grad) <= 2e-6
    finally: ops._C.set_isa(before)


@needs_core
@pytest.mark.parametrize("rows", [2, 3])
def test_two_points_lie_on_a_line(rows):
    s, t = logits(rows, 50)
    want, grad = value_and_grad(lambda x: dist(x, t.double(), backend="torch"), s.double())
    got, got_grad = value_and_grad(lambda x: dist(x, t, backend="cpp"), s)
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)
    assert grad_error(got_grad, grad) <= 3e-6


@needs_core
def test_dist_threads_layouts_and_operators():
    s, t = logits(501, 300)
    results = []
    for n in (1, 2, 4):
        torch.set_num_threads(n)
        results.append(value_and_grad(lambda x: dist(x, t, backend="cpp"), s))
    torch.set_num_threads(1)
    for value, grad in results[1:]: assert torch.equal(value, results[0][0]) and torch.equal(grad, results[0][1])
    for view in (lambda x: x[:, 3:77], lambda x: x[::2], lambda x: x[:300].t()):
        want, grad = value_and_grad(lambda x: dist(x, view(t).contiguous()), view(s).contiguous())
        leaf = view(s).detach().requires_grad_()
        value = dist(leaf, view(t))
        torch.testing.assert_close(value, want)
        torch.testing.assert_close(torch.autograd.grad(value, leaf)[0], grad)
    mask, T = torch.tensor([True, False, True, True]), torch.tensor(2.0, dtype=torch.float64)
    for dtype in (torch.float32, torch.float16):
        s, t = logits(4, 5, dtype)
        torch.library.opcheck(relation_ops.dist_op, (s.requires_grad_(), t, mask, T, True, dtype == torch.float32))
        torch.library.opcheck(relation_ops.dist_backward_op, (torch.tensor(1.0), s.detach(), t, mask, T, True))
    want, grad = value_and_grad(lambda x: 2.0**10 * dist(x, t, backend="torch"), s.detach().double())
    got, got_grad = value_and_grad(lambda x: 2.0**10 * dist(x, t, backend="cpp"), s) # as a GradScaler does
    assert grad_error(got_grad, grad) <= 2**-10


MODULES = {kd.Similarity: similarity, kd.RKD: rkd, kd.RKDDistance: rkd_distance, kd.RKDAngle: rkd_angle, kd.PKT: pkt,
           kd.CorrelationCongruence: correlation_congruence, kd.SimilarityKL: similarity_kl,
           kd.CKA: cka, kd.DIST: dist}


@pytest.mark.parametrize("module", MODULES)
def test_function_and_module_share_options_and_defaults(module):
    function = {k: p.default for k, p in inspect.signature(MODULES[module]).parameters.items()}
    init = {k: p.default for k, p in inspect.signature(module.__init__).parameters.items() if k != "self"}
    call = {k: p.default for k, p in inspect.signature(module.forward).parameters.items() if k != "self"}
    assert not set(init) & set(call) and {**init, **call} == function


def test_modules_are_weighted_and_added():
    s, t = pair("rkd")
    objective = kd.RKD(distance=2) + 3e3 * kd.Similarity() + 3e4 * kd.PKT() - kd.CKA()
    want = rkd(s, t, distance=2) + 3e3 * similarity(s, t) + 3e4 * pkt(s, t) - cka(s, t)
    for twin in (objective, copy.deepcopy(objective), pickle.loads(pickle.dumps(objective))):
        torch.testing.assert_close(twin(s, t), want)
    parts = objective.parts(s, t)
    torch.testing.assert_close(sum(p.weight * p.rows for p in parts.values()), want)
    z, y = pair("dist")
    labels = torch.arange(9)
    both = kd.CrossEntropy() + 2 * kd.DIST(T=4)
    torch.testing.assert_close(both(z, y, labels), kd.CrossEntropy()(z, None, labels) + 2 * dist(z, y, T=4))
    assert repr(both) == "CrossEntropy() + 2·DIST(T=4)"


@pytest.mark.parametrize("call, error, words", [
    (lambda s, t: similarity(s[:3], t), ValueError, r"same samples.*student \(3, 12\) and teacher \(9, 7\)"),
    (lambda s, t: rkd(s, t, reduction="none"), ValueError, "reduction of rkd must be 'mean', got 'none'.*no value belongs"),
    (lambda s, t: kd.PKT(reduction="none"), ValueError, "reduction of pkt"),
    (lambda s, t: cka(s, t, mask=torch.ones(9, 12, dtype=torch.bool)), ValueError, r"mask of cka must have the shape \(9,\)"),
    (lambda s, t: cka(s[0], t[0]), ValueError, r"features \(B, ...\)"),
    (lambda s, t: pkt(s, [t]), TypeError, "teacher must be a tensor of features, got list"),
    (lambda s, t: pkt(s.long(), t), TypeError, "floating-point"),
    (lambda s, t: similarity_kl(s, t, tau=0), ValueError, "tau must be > 0"),
    (lambda s, t: kd.SimilarityKL(tau=-1), ValueError, "tau must be > 0"),
    (lambda s, t: correlation_congruence(s, t, order=0), ValueError, "order must be a whole number"),
    (lambda s, t: kd.CorrelationCongruence(gamma=0), ValueError, "gamma must be > 0"),
    (lambda s, t: similarity_kl(s, t, backend="cpp"), ValueError, "similarity_kl has no kernel"),
    (lambda s, t: kd.SimilarityKL(reduction="none"), ValueError, "reduction of similarity_kl"),
    (lambda s, t: dist(s, s, T=torch.tensor(2., requires_grad=True), backend="cpp"), ValueError, "temperature is learnable"),
    (lambda s, t: dist(s, t), ValueError, "same shape"),
    (lambda s, t: dist(s, s, reduction="sum"), ValueError, "reduction of dist"),
    (lambda s, t: kd.DIST(T=0), ValueError, "T must be"),
    (lambda s, t: rkd(s, t, backend="tpu"), ValueError, "backend must be"),
    (lambda s, t: rkd_angle(s, t.requires_grad_(), detach_teacher=False, backend="cpp"), ValueError, "detach_teacher"),
])
def test_bad_arguments_are_named(call, error, words):
    with pytest.raises(error, match=words): call(*pair("rkd"))
