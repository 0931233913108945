"""Divergences from a teacher's top k classes: every tail policy, every corner of what was stored, both backends."""
import inspect
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import kdlab as kd
from kdlab import ops, sparse_forms, sparse_ops, sparse_reference
from kdlab.functional import forward_kl, reverse_kl, sparse_forward_kl, sparse_reverse_kl, top_k
from kdlab.sparse_ops import sparse_op

BACKENDS = ["torch"] + (["cpp"] if ops._C is not None else [])
TAILS = sparse_reference.TAILS
ASKED = [(sparse_forward_kl, tail) for tail in TAILS] + [(sparse_reverse_kl, tail) for tail in ("bucket", "uniform")]
backends = pytest.mark.parametrize("backend", BACKENDS)
tails = pytest.mark.parametrize("tail", TAILS)
asked = pytest.mark.parametrize("f, tail", ASKED)
core = pytest.mark.skipif(ops._C is None, reason="the compiled core is not built")


def case(rows=(9,), C=37, k=5, T=2.0, dtype=torch.float64, seed=0, spread=3.0):
    gen = torch.Generator().manual_seed(seed)
    student, teacher = (spread * torch.randn(*rows, C, generator=gen, dtype=torch.float64) for _ in range(2))
    return student.to(dtype).requires_grad_(), teacher, *top_k(teacher, k, T=T)


def usable(f, tail, backend):
    return "torch" if f is sparse_reverse_kl and tail == "uniform" else backend


def by_hand(student, log_probs, ids, T, tail):
    "One row, one class at a time, in Python's own numbers."
    q = [math.exp(x / T) for x in student]
    q = [x / sum(q) for x in q]
    p = {int(i): math.exp(x) for x, i in zip(log_probs, ids) if x > -math.inf}
    P, Q = sum(p.values()), sum(q[i] for i in p)
    if tail == "renormalise": p = {i: x / P for i, x in p.items()}
    value = sum(x * math.log(x / q[i]) for i, x in p.items())
    r, others = 1 - P, [i for i in range(len(q)) if i not in p]
    if tail == "bucket": value += r * math.log(r / (1 - Q))
    if tail == "uniform": value += sum(r / len(others) * math.log(r / len(others) / q[i]) for i in others)
    return value


@backends
@tails
def test_the_equation(backend, tail):
    T = 2.0
    student, _, log_probs, ids = case(T=T)
    log_probs[2, 3] = -torch.inf # padding
    rows = sparse_forward_kl(student, log_probs, ids, T=T, tail=tail, reduction="none", backend=backend)
    want = [T**2 * by_hand(s, p, i, T, tail) for s, p, i in zip(student.tolist(), log_probs.tolist(), ids.tolist())]
    torch.testing.assert_close(rows, torch.tensor(want, dtype=torch.float64), rtol=1e-10, atol=1e-12)
    plain = sparse_forward_kl(student, log_probs, ids, T=T, tail=tail, t_squared=False, backend=backend)
    torch.testing.assert_close(plain, rows.mean() / T**2)


@backends
def test_the_gradient_table(backend):
    student, _, log_probs, ids = case(rows=(1,), T=1.0, spread=1.0)
    p = torch.zeros(1, 37, dtype=torch.float64).scatter(-1, ids, log_probs.exp())
    q, inside = student.softmax(-1).detach(), torch.zeros(1, 37, dtype=torch.bool).scatter(-1, ids, True)
    P, Q, n = p.sum(), q[inside].sum(), 37 - 5
    want = {"drop": torch.where(inside, P * q - p, P * q), "renormalise": q - p / P,
            "bucket": torch.where(inside, q - p, q * (1 - (1 - P) / (1 - Q))),
            "uniform": torch.where(inside, q - p, q - (1 - P) / n)}
    for tail in TAILS:
        grad, = torch.autograd.grad(sparse_forward_kl(student, log_probs, ids, tail=tail, backend=backend), student)
        torch.testing.assert_close(grad, want[tail], rtol=1e-10, atol=1e-13)


@backends
@asked
def test_all_classes_kept_is_the_dense_loss(backend, f, tail):
    student, teacher, log_probs, ids = case(k=37)
    dense = forward_kl if f is sparse_forward_kl else reverse_kl
    got = f(student, log_probs, ids, T=2.0, tail=tail, backend=usable(f, tail, backend))
    want = dense(student, teacher, T=2.0)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in (got, want)))


@backends
def test_uniform_is_the_dense_loss_of_the_teacher_put_together_again(backend):
    for f, dense in ((sparse_forward_kl, forward_kl), (sparse_reverse_kl, reverse_kl)):
        student, _, log_probs, ids = case(T=3.0)
        p = torch.ones(9, 37, dtype=torch.float64) * (1 - log_probs.exp().sum(-1, keepdim=True)) / 32
        p.scatter_(-1, ids, log_probs.exp())
        got = f(student, log_probs, ids, T=3.0, tail="uniform", backend=usable(f, "uniform", backend))
        want = dense(student, 3.0 * p.log(), T=3.0)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in (got, want)))


@backends
def test_bucket_is_below_the_whole_and_zero_at_the_teacher(backend):
    student, teacher, log_probs, ids = case(T=1.0, spread=1.0)
    whole = forward_kl(student, teacher, reduction="none")
    parts = [sparse_forward_kl(student, *top_k(teacher, k), reduction="none", backend=backend) for k in (1, 5, 20, 36)]
    for less, more in zip(parts, parts[1:] + [whole]): assert (less <= more + 1e-12).all()
    same = teacher.clone().requires_grad_()
    loss = sparse_forward_kl(same, log_probs, ids, backend=backend)
    assert abs(loss) < 1e-14 and torch.autograd.grad(loss, same)[0].abs().max() < 1e-14


def by_autograd(f, student, log_probs, ids, **question):
    "Loss by row and gradient from the stable definition, in float64."
    kind = f.__name__.removeprefix("sparse_")
    exact = student.detach().double().requires_grad_()
    rows = sparse_ops.torch_sparse(exact, log_probs, ids, None, None, sparse_ops.Question(kind, reduction="none", **question))
    return rows.detach(), torch.autograd.grad(rows.sum(), exact)[0]


@backends
@pytest.mark.parametrize("dtype, loss_bar, grad_bar", [
    (torch.float32, 1e-6, 1e-6), (torch.bfloat16, 1e-6, 2**-8), (torch.float16, 1e-6, 2**-11), (torch.float64, 1e-9, 1e-9)])
@asked
def test_accuracy(backend, dtype, loss_bar, grad_bar, f, tail):
    if usable(f, tail, backend) != backend: pytest.skip("no kernel")
    for C, k in ((7, 3), (64, 16), (1000, 16), (1271, 100)):
        for T in (0.1, 1.0, 100.0):
            student, teacher, log_probs, ids = case((4,), C, k, T)
            for s in (student, teacher + 0.1 * student, teacher + 1e-3 * student, teacher + 1e4 if dtype != torch.float16 else student):
                s = s.detach().to(dtype).requires_grad_()
                want, want_grad = by_autograd(f, s, log_probs, ids, T=T, t_squared=False, tail=tail)
                got = f(s, log_probs, ids, T=T, t_squared=False, tail=tail, reduction="none", backend=backend)
                grad, = torch.autograd.grad(got.sum(), s)
                finite = want.isfinite() # a reverse row whose rest is below 1e-6 is infinite
                assert torch.equal(got[~finite].double(), want[~finite])
                got, grad, want, want_grad = got[finite], grad[finite], want[finite], want_grad[finite]
                assert ((got - want).abs() <= loss_bar * want.abs() + 1e-12).all()
                top = want_grad.abs().amax(-1, keepdim=True)
                floor = 2**-24 if dtype == torch.float16 else 1e-11 # float16 has no smaller number
                assert ((grad.double() - want_grad).abs() <= grad_bar * top + floor).all()


@backends
@pytest.mark.parametrize("C, k", [(8, 5), (16, 15), (64, 60)])
def test_few_classes_outside_of_the_kept_ones(backend, C, k):
    "What belongs to the tail is small beside the sums over the row that it is made of."
    gen = torch.Generator().manual_seed(C)
    teacher = 2 * torch.randn(500, C, generator=gen, dtype=torch.float64)
    student = (teacher + .2 * torch.randn(500, C, generator=gen, dtype=torch.float64)).float()
    ids = torch.rand(500, C, generator=gen).argsort(-1)[:, :k]
    options = dict(tail="uniform", reduction="none")
    stored = teacher.log_softmax(-1).gather(-1, ids), ids
    want = sparse_forward_kl(student.double(), *stored, backend="torch", **options)
    got = sparse_forward_kl(student, *stored, backend=backend, **options)
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-9)


@backends
@asked
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_masks_reductions_weights_and_layouts(backend, f, tail, dtype):
    backend = usable(f, tail, backend)
    student, teacher, log_probs, ids = case(rows=(2, 9), dtype=dtype)
    mask = torch.rand(2, 9, generator=torch.Generator().manual_seed(1)) > 0.3
    y = torch.zeros(2, 9, dtype=torch.int32)
    y[1, 1] = -100
    weight = torch.rand(2, 9)
    counts = mask & (y != -100)
    options = dict(T=2.0, tail=tail, backend=backend)
    plain = f(student, log_probs, ids, reduction="none", **options)
    assert plain.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and plain.shape == (2, 9)
    want = torch.where(counts, plain * weight, 0)
    with torch.no_grad(): broken = student.masked_fill(~counts.unsqueeze(-1), torch.nan)
    broken, log_probs = broken.requires_grad_(), log_probs.masked_fill(~counts.unsqueeze(-1), torch.nan)
    ids = ids.masked_fill(~counts.unsqueeze(-1), -7)
    ask = lambda s, **more: f(s, log_probs, ids, y, mask=mask, row_weight=weight, **options, **more)
    torch.testing.assert_close(ask(broken, reduction="none"), want)
    torch.testing.assert_close(ask(broken, reduction="sum"), want.sum())
    torch.testing.assert_close(ask(broken), want.sum() / counts.sum())
    torch.testing.assert_close(ask(broken, normalizer=11), want.sum() / 11)
    grad, = torch.autograd.grad(ask(broken, reduction="sum"), broken)
    assert grad.dtype == dtype and grad[~counts].eq(0).all() and grad[counts].isfinite().all()
    strided = broken.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    padded = torch.cat([broken.detach(), broken.detach()], -1)[..., :37].requires_grad_()
    for other in (strided, padded):
        assert not other.is_contiguous()
        torch.testing.assert_close(torch.autograd.grad(ask(other, reduction="sum"), other)[0], grad)


@backends
@tails
def test_nothing_kept(backend, tail):
    student, teacher, *_ = case()
    for log_probs, ids in (top_k(teacher, 0), (torch.full((9, 3), -torch.inf), torch.full((9, 3), -1))):
        loss = sparse_forward_kl(student, log_probs, ids, tail=tail, backend=backend)
        grad, = torch.autograd.grad(loss, student)
        if tail != "uniform": assert loss == 0 and grad.abs().max() < 1e-15
        else: torch.testing.assert_close(loss, forward_kl(student, torch.zeros_like(student)))


@backends
@asked
def test_no_rows_and_no_classes(backend, f, tail):
    options = dict(tail=tail, backend=usable(f, tail, backend))
    for shape in ((0, 4), (3, 0)):
        s = torch.zeros(shape, requires_grad=True)
        k = min(2, shape[1])
        loss = f(s, torch.zeros(shape[0], k), torch.zeros(shape[0], k, dtype=torch.long), **options)
        assert loss == 0 and torch.autograd.grad(loss, s)[0].shape == shape


@backends
@tails
def test_a_mass_above_one_by_rounding(backend, tail):
    student, _, log_probs, ids = case(k=37, T=1.0)
    more = log_probs + 3e-4
    got = sparse_forward_kl(student, more, ids, tail=tail, backend=backend)
    exact = sparse_forward_kl(student, log_probs, ids, tail=tail, backend=backend)
    if tail == "drop": torch.testing.assert_close(got, math.exp(3e-4) * (exact + 3e-4))
    else: torch.testing.assert_close(got, exact)
    loose = top_k(student.detach(), 36) # the rest is below 1e-6 in most rows
    assert sparse_forward_kl(student, *loose, backend=backend).abs() < 1e-6


@backends
@tails
def test_infinities_and_nan_stay_in_their_row(backend, tail):
    student, _, log_probs, ids = case(rows=(9,), T=1.0)
    with torch.no_grad():
        student[1, ids[1, 2]] = -torch.inf # the student excludes a class that was kept: infinite
        student[2] = torch.where(torch.zeros(37, dtype=torch.bool).scatter(0, ids[2], True), student[2], -torch.inf) # and all others
        student[3, 5] = torch.nan
        student[4, 6] = torch.inf
        student[5] = -torch.inf
        student[8, ids[8, 0]] = torch.inf
    log_probs[6, 0], log_probs[7, 1] = torch.nan, torch.inf
    rows = sparse_forward_kl(student, log_probs, ids, tail=tail, reduction="none", backend=backend)
    assert rows[0].isfinite() and rows[1] == torch.inf and rows[3:].isnan().all()
    assert rows[2].isfinite() if tail in ("drop", "renormalise") else rows[2] == torch.inf
    grad, = torch.autograd.grad(rows, student, torch.ones_like(rows))
    assert grad[0].isfinite().all() and grad[1].isfinite().all() and grad[3:].isnan().all()


@backends
@asked
def test_rows_of_all_sorts_in_one_large_batch(backend, f, tail, monkeypatch):
    "Ordinary, near, equal, padded, empty, excluded, spoilt, masked: each gets the care that it needs and disturbs no other."
    monkeypatch.setattr(sparse_forms, "_BLOCK", 2**15)
    backend = usable(f, tail, backend)
    student, teacher, log_probs, ids = case((80,), 700, 9, spread=2.0)
    with torch.no_grad():
        student[::4] = teacher[::4] + 1e-2 * student[::4]
        student[1::8] = teacher[1::8] + 1e-5 * student[1::8]
        student[40:48] = teacher[40:48]
        student[2, 5], student[3, ids[3, 1]], student[6], student[10, ids[10, 0]] = torch.nan, -torch.inf, -torch.inf, torch.inf
        student[50:54] += 1e4
        student[60:70, 100:300] = -torch.inf
    log_probs[7:24:3, 4:] = -torch.inf
    log_probs[26], log_probs[30, 2] = -torch.inf, torch.nan
    log_probs[70:74] = log_probs[70:74].log_softmax(-1)
    mask = torch.ones(80, dtype=torch.bool)
    mask[[2, 11, 12]] = False
    for dtype in (torch.float32, torch.float64):
        s = student.detach().to(dtype)
        want, want_grad = by_autograd(f, s.masked_fill(~mask[:, None], 0), log_probs, ids, T=2.0, tail=tail)
        want, want_grad = want.masked_fill(~mask, 0), want_grad.masked_fill(~mask[:, None], 0)
        got = f(s.requires_grad_(), log_probs, ids, T=2.0, tail=tail, mask=mask, reduction="none", backend=backend)
        grad, = torch.autograd.grad(got, s, torch.ones_like(got))
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-14, equal_nan=True)
        top = want_grad.abs().nan_to_num(0).amax(-1, keepdim=True).clamp(min=1e-9)
        torch.testing.assert_close(grad.double() / top, want_grad / top, rtol=0, atol=1e-6, equal_nan=True)


@backends
def test_a_tail_too_far_away_for_exponentials(backend):
    student = torch.tensor([[0.0, -1.0, -3000.0, -3001.0, -3002.0], [0.0, -1.0, -torch.inf, -3001.0, -3001.0]])
    log_probs, ids = torch.tensor([[0.6, 0.3]] * 2).log(), torch.tensor([[0, 1]] * 2)
    for f in (sparse_forward_kl, sparse_reverse_kl):
        for dtype in (torch.float32, torch.float64):
            s = student.to(dtype).requires_grad_()
            got, (want, want_grad) = f(s, log_probs, ids, backend=backend, reduction="none"), by_autograd(f, s, log_probs, ids)
            torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)
            torch.testing.assert_close(torch.autograd.grad(got.sum(), s)[0].double(), want_grad, rtol=1e-5, atol=1e-7)


@backends
def test_a_reverse_row_without_a_rest_is_infinite(backend):
    student, _, log_probs, ids = case(T=1.0)
    rows = sparse_reverse_kl(student, log_probs.log_softmax(-1), ids, reduction="none", backend=backend)
    assert rows.eq(torch.inf).all() and torch.autograd.grad(rows.sum(), student)[0].isnan().all()


BAD = {"out": ("the class 37 at row 4.*37 classes", lambda p, i: (p, i + (37 - i) * (torch.arange(45).view(9, 5) == 22))),
       "negative": ("the class -1 at row 0", lambda p, i: (p, i - i.amin(-1, keepdim=True) - 1)),
       "twice": ("twice at row 0", lambda p, i: (p, i.clone().index_fill_(1, torch.tensor([1]), 3).index_fill_(1, torch.tensor([4]), 3))),
       "mass": ("mass .* more than 1.*not logits or probabilities", lambda p, i: (p.exp(), i))}


@backends
@pytest.mark.parametrize("kind", BAD)
def test_values_that_cannot_be(backend, kind):
    words, spoil = BAD[kind]
    student, _, log_probs, ids = case()
    log_probs, ids = spoil(log_probs, ids)
    ask = lambda s, **more: sparse_forward_kl(s, log_probs, ids, backend=backend, **more)
    for s in (student, student.detach()):
        with pytest.raises(ValueError, match=words): ask(s)
    bad = sparse_ops.bad_rows(log_probs, ids, 37)
    assert ask(student, mask=~bad).isfinite()
    rows = torch.compile(lambda s: ask(s, reduction="none"), fullgraph=True, backend="aot_eager")(student)
    assert (rows.isnan() == bad).all()
    grad, = torch.autograd.grad(rows, student, torch.ones_like(rows))
    assert (grad.isnan().all(-1) == bad).all() and (grad.isnan().any(-1) == bad).all()


@backends
@asked
def test_gradcheck_and_create_graph(backend, f, tail):
    student, _, log_probs, ids = case(rows=(3,), C=6, k=2, spread=1.0)
    g = lambda s: f(s, log_probs, ids, T=2.0, tail=tail, backend=usable(f, tail, backend))
    assert torch.autograd.gradcheck(g, student) and torch.autograd.gradgradcheck(g, student)
    loss = g(student)
    first, again = (torch.autograd.grad(loss, student, torch.tensor(x), retain_graph=True)[0] for x in (1.0, 3.0))
    torch.testing.assert_close(3 * first, again)


@core
def test_float16_folds_the_incoming_gradient_in_before_rounding():
    student, _, log_probs, ids = case(rows=(512,), dtype=torch.float16, k=3)
    scale = 2.0**14
    grad, = torch.autograd.grad(scale * sparse_forward_kl(student, log_probs, ids, T=2.0), student)
    exact = student.detach().double().requires_grad_()
    want, = torch.autograd.grad(scale * sparse_forward_kl(exact, log_probs, ids, T=2.0), exact)
    assert (grad.double() - want).abs().max() < 2**-11 * want.abs().max()


@core
@tails
def test_the_same_bits_for_any_number_of_threads_and_instruction_sets_agree(tail):
    student, _, log_probs, ids = case(rows=(64,), C=3001, k=20, dtype=torch.float32)
    results, isas = [], ops._C.info()
    try:
        for isa in isas["isas"]:
            ops._C.set_isa(isa)
            for threads in (1, 2, 4):
                torch.set_num_threads(threads)
                loss = sparse_forward_kl(student, log_probs, ids, T=2.0, tail=tail)
                results.append((loss.detach(), torch.autograd.grad(loss, student)[0]))
            assert all(torch.equal(a, b) for r in results[-2:] for a, b in zip(r, results[-3]))
    finally:
        torch.set_num_threads(1)
        ops._C.set_isa(isas["isa"])
    for loss, grad in results:
        torch.testing.assert_close(loss, results[0][0], rtol=1e-6, atol=0)
        assert (grad - results[0][1]).abs().max() < 1e-6 * grad.abs().max()


@core
def test_four_python_threads_at_once():
    cases = [case(rows=(40,), C=2000, k=9, seed=i, dtype=torch.float32) for i in range(4)]
    def work(c):
        s, _, log_probs, ids = c
        loss = sparse_forward_kl(s, log_probs, ids, T=2.0)
        return loss.detach(), torch.autograd.grad(loss, s)[0]
    want = [work(c) for c in cases]
    with ThreadPoolExecutor(4) as pool: got = list(pool.map(work, cases * 5))
    for i, (loss, grad) in enumerate(got): assert torch.equal(loss, want[i % 4][0]) and torch.equal(grad, want[i % 4][1])


@core
@pytest.mark.parametrize("dtype, reduction", [(torch.float32, "mean"), (torch.float64, "none"), (torch.float16, "mean")])
def test_opcheck(dtype, reduction):
    student, _, log_probs, ids = case(rows=(4,), dtype=dtype)
    torch.library.opcheck(sparse_op, (None, student, log_probs, ids, torch.arange(4) != 1, None, torch.tensor(2.0), None,
                                      "forward_kl", "bucket", True, reduction, dtype != torch.float16))


@core
def test_the_operator_has_no_second_derivative_and_says_so():
    student, _, log_probs, ids = case()
    loss, _ = sparse_op(None, student, log_probs, ids, None, None, torch.tensor(1.0), None, "forward_kl", "drop", True, "mean", True)
    with pytest.raises(RuntimeError, match="no second derivative"): torch.autograd.grad(loss, student, create_graph=True)


@asked
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_compile_in_one_graph(f, tail, dtype):
    torch._dynamo.reset()
    student, _, log_probs, ids = case(rows=(2, 5), dtype=dtype)
    mask = torch.arange(10).view(2, 5) != 3
    g = lambda s: f(s, log_probs, ids, T=2.0, tail=tail, mask=mask)
    one, other = g(student), torch.compile(g, fullgraph=True, backend="aot_eager")(student)
    torch.testing.assert_close(one, other)
    torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in (one, other)))
    torch._dynamo.reset()


def test_module_objective_and_parts():
    student, teacher, log_probs, ids = case(T=2.0)
    y = torch.arange(9)
    loss = kd.SparseForwardKL(T=2.0, tail="uniform")
    stored = top_k(teacher, 5, T=2.0)
    assert loss(student, stored) == sparse_forward_kl(student, *stored, T=2.0, tail="uniform")
    both = 0.1 * kd.CrossEntropy() + 0.9 * loss
    want = 0.1 * kd.CrossEntropy()(student, None, y) + 0.9 * loss(student, stored)
    torch.testing.assert_close(both(student, stored, y), want)
    parts = both.parts(student, stored, y)
    assert set(parts) == {"cross_entropy", "sparse_forward_kl"} and parts["sparse_forward_kl"].weight == 0.9
    torch.testing.assert_close(sum(p.weight * p.rows.mean() for p in parts.values()), want)
    assert "tail=uniform" in repr(both) and loss.equation().startswith("2²·KL(top k of softmax(teacher/2)")
    none = (0 * loss)(student, stored)
    assert none == 0 and torch.autograd.grad(none, student)[0].eq(0).all()
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(student, stored, y), want)
    for f, module in ((sparse_forward_kl, kd.SparseForwardKL), (sparse_reverse_kl, kd.SparseReverseKL)):
        defaults = lambda g: {k: p.default for k, p in inspect.signature(g).parameters.items() if k != "self"}
        mine = defaults(module.__init__) | defaults(module.forward)
        mine.pop("teacher")
        theirs = defaults(f)
        assert mine == {k: v for k, v in theirs.items() if not k.startswith("teacher_")}


def test_top_k():
    teacher = torch.randn(3, 4, 50, dtype=torch.bfloat16)
    log_probs, ids = top_k(teacher, 6, T=2.0)
    assert log_probs.dtype == torch.float32 and ids.shape == (3, 4, 6)
    want = (teacher.float() / 2).log_softmax(-1)
    torch.testing.assert_close(log_probs, want.gather(-1, ids))
    torch.testing.assert_close(log_probs, want.topk(6).values)
    assert not top_k(teacher.float().requires_grad_(), 2).log_probs.requires_grad
    for k in (51, -1, 2.0, True):
        with pytest.raises(ValueError, match="k must be a whole number from 0 to the 50 classes"): top_k(teacher, k)


@pytest.mark.parametrize("change, error, words", [
    (dict(tail="mean"), ValueError, "tail must be one of 'drop', 'renormalise', 'bucket', 'uniform', got 'mean'"),
    (dict(T=0.0), ValueError, "T must be a number > 0"),
    (dict(teacher_log_probs=torch.zeros(9, 5, 1)), ValueError, r"teacher_log_probs must have k entries for each row.*\(9, 5, 1\)"),
    (dict(teacher_ids=torch.zeros(9, 4, dtype=torch.long)), ValueError, r"must have one shape, got \(9, 5\) and \(9, 4\)"),
    (dict(teacher_ids=torch.zeros(9, 5)), TypeError, "teacher_ids must hold integers, got torch.float32; the order is"),
    (dict(teacher_log_probs=[1]), TypeError, "teacher_log_probs must be a tensor, got list"),
    (dict(mask=torch.ones(9)), TypeError, "mask must be bool"),
    (dict(target=torch.zeros(8, dtype=torch.long)), ValueError, "target must have the shape"),
    (dict(normalizer=3, reduction="sum"), ValueError, "normalizer replaces the denominator"),
    (dict(backend="cuda"), ValueError, "no CUDA kernel for sparse"),
])
def test_bad_arguments_are_named(change, error, words):
    student, _, log_probs, ids = case()
    with pytest.raises(error, match=words):
        sparse_forward_kl(**dict(student=student, teacher_log_probs=log_probs, teacher_ids=ids) | change)


def test_more_bad_arguments():
    student, teacher, log_probs, ids = case()
    with pytest.raises(ValueError, match="tail='drop' makes KL.*infinite.*'bucket' or 'uniform'"):
        sparse_reverse_kl(student, log_probs, ids, tail="drop")
    with pytest.raises(ValueError, match="'renormalise' makes"): kd.SparseReverseKL(tail="renormalise")
    with pytest.raises(TypeError, match=r"sparse_forward_kl needs the teacher as a pair \(log_probs, ids\).*got Tensor"):
        kd.SparseForwardKL()(student, teacher)
    with pytest.raises(ValueError, match="no kernel for reverse_kl with tail='uniform'" if ops._C else "cannot run here"):
        sparse_reverse_kl(student, log_probs, ids, tail="uniform", backend="cpp")
