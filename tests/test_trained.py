"""The losses with networks of their own: goldens of their formulas, values by hand, the contract, and that they are trained."""
import copy
import functools
import inspect
import json
import math
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kdlab as kd
from kdlab import trained_reference as reference
from kdlab.functional import hierarchical_context
from kdlab.losses import trained

GOLD = json.loads((Path(__file__).parent / "goldens" / "zoo.json").read_text(encoding="utf-8"))
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 1e-3, torch.float64: 1e-9, torch.bfloat16: 0.1, torch.float16: 2e-2}
INF, NAN = math.inf, math.nan
HEAD = nn.Linear(5, 3)
PARAPHRASER = kd.Paraphraser((1, 5, 4, 6), rate=0.4)
MAPS = (6, 3, 4, 6), (6, 5, 4, 6)
LEVELS = [(6, 3, 4, 6), (6, 4, 2, 3)], [(6, 5, 8, 6), (6, 6, 2, 2)]


def features(*shape, seed=0, dtype=torch.float64):
    gen = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=gen, dtype=torch.float64) + 0.2).to(dtype)


def each(x, g): return g(x) if isinstance(x, torch.Tensor) else [each(y, g) for y in x]
def tensors(x): return [x] if isinstance(x, torch.Tensor) else [z for y in x for z in tensors(y)]


# name: (class and options, shapes of the student, of the teacher)
CASES = {
    "VID maps": (kd.VID, *MAPS), "VID tokens": (kd.VID, (6, 4, 3), (6, 4, 5)), "VID vectors": (kd.VID, (6, 3), (6, 5)),
    "VID sizes": (kd.VID, (6, 3, 4, 6), (6, 5, 2, 8)),
    "MGD": (functools.partial(kd.MGD, share=0.0), *MAPS), "MGD same width": (functools.partial(kd.MGD, share=0.0), MAPS[1], MAPS[1]),
    "SimKD": (kd.SimKD, (6, 3, 4, 6), (6, 5, 2, 8)), "SimKD vectors": (kd.SimKD, (6, 3), (6, 5)),
    "SRRL": (functools.partial(kd.SRRL, HEAD), *MAPS), "SRRL vectors": (functools.partial(kd.SRRL, HEAD, by="softmax", beta=2), (6, 3), (6, 5)),
    "ReviewKD": (kd.ReviewKD, *LEVELS), "SemCKD": (kd.SemCKD, LEVELS[0], [*LEVELS[1], (6, 2, 4, 4)]),
    "LearntFactors": (kd.LearntFactors, (6, 3, 4, 6), (6, 5, 2, 8)),
    "LearntFactors ready": (functools.partial(kd.LearntFactors, paraphraser=PARAPHRASER), *MAPS),
    "CRD": (functools.partial(kd.CRD, size=20, width=4, tau=0.5), *MAPS), "CRD drawn": (functools.partial(kd.CRD, size=20, width=4, others=7), (6, 3), (6, 5)),
}
cases = pytest.mark.parametrize("name", CASES)


def pair(name, dtype=torch.float64):
    make = lambda shape, seed: [make(s, seed + 7 * i) for i, s in enumerate(shape)] if isinstance(shape, list) else features(*shape, seed=seed, dtype=dtype)
    return make(CASES[name][1], 1), make(CASES[name][2], 2)


def made(name, dtype=torch.float64, **options):
    torch.manual_seed(0)
    loss = CASES[name][0](*CASES[name][1:], **options).to(dtype)
    norms = [m for m in loss.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        for i, m in enumerate(norms): m.weight.uniform_(0.5, 1.5), m.bias.uniform_(-0.5, 0.5)
    return loss


def call(loss, s, t, **options):
    "The value, with the same random numbers in every call and no memory of it."
    torch.manual_seed(1)
    return copy.deepcopy(loss)(s, t, **options)


def value_and_grads(f, student):
    student = each(student, lambda x: x.detach().requires_grad_())
    value = f(student)
    return value.detach(), torch.autograd.grad(value.sum(), tensors(student))


# the formulas

def given(name): return torch.tensor(GOLD["inputs"][name], dtype=torch.float64)


FORMULAS = {
    "vid": ("student", "teacher", lambda s, t: reference.vid(s, t, given("variance"))[torch.tensor(GOLD["inputs"]["mask"])]),
    "srrl": ("vectors", "equal", lambda s, t: reference.srrl(s, t, (s @ given("head"), t @ given("head")), 2.0)),
    "srrl softmax": ("vectors", "equal", lambda s, t: reference.srrl(s, t, (s @ given("head"), t @ given("head")), 2.0, "softmax")),
    "semckd": ("apart", "key", lambda s, t: reference.semckd(s, *(x / x.norm(dim=-1, keepdim=True) for x in (given("query"), t)))),
    "factors": ("student", "teacher", lambda s, t: reference.factors(s, t)[torch.tensor(GOLD["inputs"]["mask"])]),
    "contrast": ("pair", "others", lambda s, t: reference.contrast(s, t, given("log_mean"))),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_formulas_are_golden_and_none_of_the_usual_mistakes(name):
    student, teacher, formula = FORMULAS[name]
    gold = GOLD["losses"][name]
    value, (grad,) = value_and_grads(lambda s: formula(s, given(teacher)).mean(), given(student))
    assert value.item() == pytest.approx(gold["value"], rel=1e-10)
    torch.testing.assert_close(grad, torch.tensor(gold["gradient"], dtype=torch.float64), rtol=1e-8, atol=1e-10)
    assert len(gold["wrong"]) >= 2
    for mistake, wrong in gold["wrong"].items(): assert abs(value - wrong) > 0.01 * abs(value), mistake


# values by hand

def test_vid_is_a_likelihood_whose_scales_train():
    s, t = pair("VID maps")
    loss = made("VID maps")
    v = F.softplus(loss.layers.alpha) + 1e-5
    torch.testing.assert_close(v, torch.full((5,), 5.0, dtype=torch.float64))
    w = [m.weight[:, :, 0, 0] for m in loss.layers["mean"] if isinstance(m, nn.Conv2d)]
    mean = torch.einsum("oc,bchw->bohw", w[2], (torch.einsum("oc,bchw->bohw", w[1], torch.einsum("oc,bchw->bohw", w[0], s).relu())).relu())
    want = (((t - mean)**2 / v.view(5, 1, 1) + v.log().view(5, 1, 1)) / 2).mean((1, 2, 3))
    torch.testing.assert_close(loss(s, t), want.mean())
    torch.testing.assert_close(kd.VID(s, t, variance=0.3).layers.alpha.exp().log1p() + 1e-5, torch.full((5,), 0.3, dtype=torch.float64))
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        loss(s, t).backward()
        optimizer.step()
    assert reference.variance(loss.layers.alpha).max() < 2.0 and loss(s, t) < want.mean()


def test_simkd_leads_to_the_classifier_of_the_teacher():
    s, t = pair("SimKD")
    loss = made("SimKD").eval()
    small = F.adaptive_avg_pool2d(s, (2, 6)), F.adaptive_avg_pool2d(t, (2, 6))
    torch.testing.assert_close(loss(s, t), F.mse_loss(loss.layers(small[0]), small[1]))
    assert loss.translate(s).shape == (6, 5, 4, 6) and [m.weight.shape[:2] for m in loss.layers if isinstance(m, nn.Conv2d)] == [(2, 3), (2, 2), (5, 2)]
    vectors = made("SimKD vectors").eval()
    assert vectors.translate(s[:, :, 0, 0]).shape == (6, 5)


def test_a_reused_classifier():
    torch.manual_seed(0)
    conv = lambda i, o: nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.ReLU(inplace=True))
    student = nn.Sequential(conv(1, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    teacher = nn.Sequential(conv(1, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    x = torch.randn(16, 1, 5, 5)
    run = kd.distill(student, teacher, [(x, torch.zeros(16).long())], epochs=2, losses=kd.SimKD().on("0"), progress=False)
    model = kd.reuse(run.student, run.objective, teacher[3]).eval()
    want = teacher[3](run.objective.losses[0].eval().translate(student[0](x)).mean((2, 3)))
    torch.testing.assert_close(model(x), want)
    twin = copy.deepcopy(model)
    assert twin.classifier is not teacher[3] and torch.equal(twin(x), model(x))
    same = kd.reuse(run.student, run.objective, teacher[1:], pool=False).eval()
    torch.testing.assert_close(same(x), want)
    twin.load_state_dict(model.state_dict())
    for wrong in (kd.SimKD().on("0"), kd.Hint().on("0"), kd.SimKD((2, 4, 5, 5), (2, 8, 5, 5))):
        with pytest.raises(ValueError, match="reuse needs one SimKD that is bound"): kd.reuse(student, wrong, teacher[3])


def test_srrl_freezes_a_copy_of_the_classifier():
    s, t = pair("SRRL")
    head = nn.Linear(5, 3).double()
    loss = kd.SRRL(head, s, t)
    assert len(list(loss.parameters())) == 3 and {"classifier.weight", "classifier.bias"} < set(loss.state_dict())
    h_s, h_t = loss.layers(s).mean((2, 3)), t.mean((2, 3))
    want = F.mse_loss(h_s, h_t) + F.mse_loss(head(h_s), head(h_t))
    torch.testing.assert_close(loss(s, t), want)
    with torch.no_grad(): head.weight.zero_()
    torch.testing.assert_close(loss(s, t), want)
    assert head.weight.requires_grad and head.training
    soft = kd.SRRL(head, s, t, by="softmax", beta=3.0)
    h_s = soft.layers(s).mean((2, 3))
    torch.testing.assert_close(soft(s, t), F.mse_loss(h_s, h_t) + 3 * F.cross_entropy(head(h_s), head(h_t).softmax(-1)))


def test_reviewkd_fuses_from_the_deepest_level_up():
    s, t = pair("ReviewKD")
    loss = made("ReviewKD")
    shallow, deep = loss.layers
    assert deep.weights is None and shallow.weights.weight.shape == (2, 8, 1, 1)
    y = deep.enter(s[1])
    y = F.interpolate(y, (2, 2), mode="nearest")
    x = shallow.enter(s[0])
    up = F.interpolate(y, (4, 6), mode="nearest")
    z = torch.sigmoid(shallow.weights(torch.cat([x, up], 1)))
    x = F.interpolate(x * z[:, :1] + up * z[:, 1:], (8, 6), mode="nearest")
    want = hierarchical_context(deep.leave(y), t[1]) + hierarchical_context(shallow.leave(x), t[0])
    torch.testing.assert_close(loss(s, t), want)


def test_semckd_weighs_layers_by_attention():
    s, t = pair("SemCKD")
    loss = made("SemCKD")
    length = lambda x: x / x.norm(dim=-1, keepdim=True)
    q, k = ([length(f.layers(x.flatten(1) @ x.flatten(1).T)) for f, x in zip(loss.layers[n], side)] for n, side in (("query", s), ("key", t)))
    want = 0
    for i, a in enumerate(s):
        attention = torch.stack([(q[i] * k[j]).sum(1) for j in range(3)], 1).softmax(1)
        for j, b in enumerate(t):
            size = [min(n) for n in zip(a.shape[2:], b.shape[2:])]
            x, y = F.adaptive_avg_pool2d(a, size), F.adaptive_avg_pool2d(b, size)
            want = want + (attention[:, j] * (loss.layers["regression"][i][j](x) - y).square().mean((1, 2, 3))).mean() / 2
    torch.testing.assert_close(loss(s, t), want)
    smaller = [each(x, lambda x: x[:4]) for x in (s, t)]
    assert loss(*smaller).isfinite() and loss.samples == 6
    with pytest.raises(ValueError, match="takes 6 samples at most, got 7"): loss(*(each(x, lambda x: torch.cat([x, x[:1]])) for x in (s, t)))


def test_mgd_erases_anew_and_the_generator_restores():
    s, t = pair("MGD")
    loss = made("MGD")
    x = loss.layers["align"](s)
    torch.testing.assert_close(loss(s, t), F.mse_loss(loss.layers["generate"](x), t))
    for over, shape in (("pixels", (6, 1, 4, 6)), ("channels", (6, 5, 1, 1))):
        loss.share, loss.over = 0.4, over
        torch.manual_seed(3)
        got = loss(s, t)
        torch.manual_seed(3)
        kept = (torch.rand(shape) >= 0.4).double()
        torch.testing.assert_close(got, F.mse_loss(loss.layers["generate"](x * kept), t))
        assert loss(s, t) != got and 0.4 < kept.mean() < 0.8


def test_factors_are_compared_whole_and_a_new_paraphraser_learns_from_reconstruction_alone():
    s, t = pair("LearntFactors")
    loss = made("LearntFactors")
    own, length = loss.layers["paraphraser"], lambda x: F.normalize(x.flatten(1), dim=1)
    f_s, f_t = loss.layers["translator"](s), own(t)
    assert f_s.shape == (6, 2, 4, 6) and f_t.shape == (6, 2, 2, 8) and own.restore(t).shape == t.shape
    small = F.adaptive_avg_pool2d(f_s, (2, 6)), F.adaptive_avg_pool2d(f_t, (2, 6))
    apart, lost = F.l1_loss(*map(length, small)), F.l1_loss(own.decode(f_t), t)
    torch.testing.assert_close(loss(s, t), apart + lost)
    want = torch.autograd.grad(lost, [*own.parameters()])
    loss(s, t).backward()
    for p, g in zip(own.parameters(), want): torch.testing.assert_close(p.grad, g)


def test_a_paraphraser_is_trained_by_reconstruction_and_frozen_in_the_loss():
    teacher, x = net(4, 1), torch.randn(16, 1, 8, 8)
    before, drawn = copy.deepcopy(teacher.state_dict()), torch.random.get_rng_state()
    known = kd.paraphraser(teacher, "1", [(x, torch.zeros(16).long())], rate=0.25, epochs=60, lr=1e-2)
    assert torch.equal(drawn, torch.random.get_rng_state()) and teacher.training
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    t = teacher[:2](x).detach()
    error = lambda p: F.l1_loss(p.restore(t), t).item()
    assert error(known) < 0.6 * error(kd.Paraphraser(t, rate=0.25)) and not known.training
    same = kd.paraphraser(teacher, "1", [x], rate=0.25, epochs=60, lr=1e-2)
    assert all(torch.equal(a, b) for a, b in zip(known.parameters(), same.parameters()))
    loss = kd.LearntFactors(paraphraser=known).on("1")
    frozen = copy.deepcopy(known.state_dict())
    run = kd.distill(net(3, 0), teacher, [(x, torch.zeros(16).long())], epochs=2, losses=[kd.CrossEntropy(), 5 * loss], progress=False)
    made = run.objective.losses[1]
    assert all(torch.equal(v, frozen[k]) for k, v in made.paraphraser.state_dict().items())
    assert {n.split(".")[1] for n, _ in made.named_parameters()} == {"translator"} and "frozen" in repr(made.paraphraser)
    assert made(teacher[:2](x)[:, :6], teacher[:2](x)).item() == pytest.approx(
        reference.factors(made.layers["translator"](teacher[:2](x)[:, :6]), known(teacher[:2](x))).mean().item(), rel=1e-5)
    with pytest.raises(ValueError, match="train has no batches"): kd.paraphraser(teacher, "1", [])
    with pytest.raises(ValueError, match=r"takes maps \(B, C, H, W\), got \(16, 3\)"): kd.paraphraser(teacher, "4", [x])
    with pytest.raises(ValueError, match="epochs must be"): kd.paraphraser(teacher, "1", [x], epochs=0)


def contrast_by_hand(loss, s, t, ids, labels=None):
    "CRD, pair by pair."
    bank, unit = loss.layers["bank"], lambda x: x / x.norm(dim=-1, keepdim=True)
    g_s, g_t = unit(loss.layers["student"](s.flatten(1))), unit(loss.layers["teacher"](t.flatten(1)))
    total = 0
    for i, (anchor, other, memory) in enumerate(((g_s, g_t, bank.teacher), (g_t, g_s, bank.student))):
        scores = anchor @ memory.T / loss.tau
        every = torch.cat([(g_s * g_t).sum(1) / loss.tau, scores.flatten()])
        mean = every.exp().mean() if bank.log_mean[i].isnan() else bank.log_mean[i].exp()
        for b in range(len(s)):
            wrong = [k for k in range(loss.size) if k != ids[b] and (labels is None or labels[b] < 0 or bank.labels[k] != labels[b])]
            a, noise = torch.exp((anchor[b] * other[b]).sum() / loss.tau), len(wrong) * mean
            total = total - torch.log(a / (a + noise)) - torch.log(noise / (scores[b, wrong].exp() + noise)).sum()
    return total / len(s)


def test_crd_and_its_bank():
    s, t = pair("CRD")
    loss = made("CRD")
    bank, ids, places = loss.layers["bank"], torch.tensor([3, 0, 19, 700, 8, 2]), torch.arange(6)
    want = contrast_by_hand(loss, s, t, places).detach()
    before = bank.student.clone()
    torch.testing.assert_close(loss(s, t, ids=ids), want)
    g = F.normalize(loss.layers["student"](s.flatten(1)), dim=1)
    torch.testing.assert_close(bank.student[:6], g)  # nothing of the noise that stood there is left
    assert torch.equal(bank.student[6:], before[6:]) and not bank.log_mean.isnan().any() and bank.next == 6
    assert bank.ids[:6].tolist() == ids.tolist() and bank.ids[6:].eq(-1).all()
    labels, turned = torch.tensor([0, 1, 1, -100, 2, 0]), torch.tensor([5, 4, 3, 2, 1, 0])
    constant = bank.log_mean.clone()
    want = contrast_by_hand(loss, s, t, places.flip(0)).detach()
    torch.testing.assert_close(loss(s, t, labels, ids=ids.flip(0)), want)  # no label was known yet
    torch.testing.assert_close(bank.student[turned], F.normalize(0.5 * g[turned] + 0.5 * g, dim=1))
    assert bank.labels[turned].tolist() == labels.tolist() and bank.next == 6
    want = contrast_by_hand(loss, s, t, turned, labels).detach()
    torch.testing.assert_close(loss(s, t, labels, ids=ids.flip(0)), want)
    assert torch.equal(bank.log_mean, constant)
    mask = torch.tensor([True, False, True, True, False, True])
    want = contrast_by_hand(loss, s[mask], t[mask], turned[mask], labels[mask]).detach()
    torch.testing.assert_close(loss(s, t, labels, ids=ids.flip(0), mask=mask), want)


def test_a_bank_that_is_too_small_forgets_the_oldest():
    s, t = pair("CRD")
    loss = kd.CRD(s, t, size=8, width=4)
    bank = loss.layers["bank"]
    for i in range(0, 12, 3): loss(s[:3], t[:3], ids=torch.tensor([i, i + 1, i + 2]))
    assert bank.ids.sort().values.tolist() == list(range(4, 12)) and bank.next == 4
    loss(s, t, ids=torch.tensor([8, 20, 21, 4, 22, 23]))  # those of the batch stay, whether old or not
    assert bank.ids.sort().values.tolist() == [4, 8, 10, 11, 20, 21, 22, 23]
    saved = {k: v.clone() for k, v in loss.state_dict().items()}
    assert loss.eval()(s, t, ids=torch.tensor([8, 99, 98, 4, 22, 23])).isfinite()  # samples of a valid set
    assert all(torch.equal(v, saved[k]) for k, v in loss.state_dict().items())
    tiny = kd.CRD(s, t, size=2, width=4)
    assert tiny(s, t, ids=torch.arange(6)).isfinite() and set(tiny.layers["bank"].ids.tolist()) <= set(range(6))


def test_a_run_gives_the_bank_the_ids_of_its_samples():
    student, teacher = net(3, 0), net(5, 1)
    gen = torch.Generator().manual_seed(0)
    x, y = torch.randn(20, 1, 8, 8, generator=gen), torch.arange(20) % 3
    rows = [{"x": x[i], "y": y[i]} | {"id": 7 * i} for i in range(20)]
    loader = lambda part: torch.utils.data.DataLoader(part, 5, shuffle=True)
    losses = lambda: kd.CrossEntropy() + 0.1 * kd.CRD(size=20, width=8).on("3")
    run = kd.distill(student, teacher, loader(rows), loader(rows[:5]), epochs=3, losses=losses(), progress=False)
    bank = run.objective.losses[1].layers["bank"]
    assert bank.next == 0 and bank.ids.sort().values.tolist() == [7 * i for i in range(20)]
    assert torch.equal(bank.labels, y[bank.ids // 7])
    for train in (kd.cache.Numbered(torch.utils.data.TensorDataset(x, y)), kd.cache.Numbered(torch.utils.data.TensorDataset(x), first=50)):
        run = kd.distill(net(3, 0), teacher, loader(train), epochs=2, losses=kd.SoftKL() + 0.1 * kd.CRD(size=30, width=8).on("3"), progress=False)
        assert run.objective.losses[1].layers["bank"].next == 20
    words = [{"x": x, "y": y.float()[:, None].expand(20, 3).softmax(1), "id": [f"sample {i}" for i in range(20)]}]  # mixed labels, ids in words
    run = kd.distill(net(3, 0), teacher, words, epochs=2, losses=losses(), progress=False)
    bank = run.objective.losses[1].layers["bank"]
    assert bank.ids.eq(-1).all() and bank.labels.eq(-1).all() and bank.next == 0
    y[::2] = -100
    run = kd.distill(net(3, 0), teacher, [{"x": x, "y": y, "id": torch.arange(20)}], epochs=1, losses=kd.SoftKL() + kd.CRD(size=20, width=8).on("3"), progress=False)
    assert run.objective.losses[1].layers["bank"].labels.tolist() == y.tolist()


def test_the_bank_as_a_queue():
    s, t = pair("CRD")
    loss = made("CRD")
    bank = loss.layers["bank"]
    for step in range(4):
        want = contrast_by_hand(loss, s, t, [(6 * step + i) % 20 for i in range(6)]).detach()
        torch.testing.assert_close(loss(s, t), want)
        assert bank.next == 6 * (step + 1) % 20
    g = F.normalize(loss.layers["student"](s.flatten(1)), dim=1)
    torch.testing.assert_close(bank.student[:4], g[2:])  # the newest stand where the oldest were
    saved = {k: v.clone() for k, v in loss.state_dict().items()}
    loss.parts(s, t)
    with torch.no_grad(): loss(s, t)
    loss.eval()
    loss(s, t)
    assert all(torch.equal(v, saved[k]) for k, v in loss.state_dict().items())
    one = kd.CRD(s, t, size=1, width=4)
    assert one(s[:1], t[:1]).isfinite() and kd.CRD(s, t, size=3, width=4)(s, t).isfinite()


# the contract

@cases
def test_values_dtypes_and_gradients(name):
    s, t = pair(name)
    loss = made(name)
    want, grads = value_and_grads(lambda x: call(loss, x, t), s)
    for dtype in DTYPES:
        a, b = pair(name, dtype)
        got, got_grads = value_and_grads(lambda x: call(loss.to(torch.promote_types(dtype, torch.float32)), x, b), a)
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert got.item() == pytest.approx(want.item(), rel=ROUNDING[dtype], abs=ROUNDING[dtype])
        for g, w in zip(got_grads, grads):
            assert g.dtype == dtype and g.isfinite().all()
            if dtype in (torch.float32, torch.float64): assert (g.double() - w).norm() <= 0.02 * w.norm()
        loss = made(name)
    a, b = pair(name, torch.float32)
    loss = made(name, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16): assert torch.equal(call(loss, a, b), call(loss, each(a, lambda x: x), b))


@cases
def test_reductions_and_masks(name):
    s, t = pair(name)
    loss = made(name)
    rows = call(made(name, reduction="none"), s, t)
    assert rows.shape == (6,)
    torch.testing.assert_close(call(loss, s, t), rows.mean())
    torch.testing.assert_close(call(made(name, reduction="sum"), s, t), rows.sum())
    mask = torch.tensor([True, False, True, True, False, True])
    cut = [each(x, lambda x: x[mask]) for x in (s, t)]
    want, want_grads = value_and_grads(lambda x: call(loss, x, cut[1]), cut[0])
    for x, y in zip(tensors(s), tensors(t)): x[1], y[4] = NAN, INF
    got, grads = value_and_grads(lambda x: call(loss, x, t, mask=mask), s)
    torch.testing.assert_close(got, want)
    for g, w in zip(grads, want_grads):
        torch.testing.assert_close(g[mask], w)
        assert g[~mask].eq(0).all()
    assert call(made(name, reduction="none"), s, t, mask=mask)[~mask].eq(0).all()
    got, grads = value_and_grads(lambda x: call(loss, x, t, mask=torch.zeros(6, dtype=torch.bool)), s)
    assert got == 0 and all(g.eq(0).all() for g in grads)


@cases
@pytest.mark.parametrize("kind", ["none", "one", "one pixel", "zeros", "equal"])
def test_no_nan_in_degenerate_batches(name, kind):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        s, t = pair(name, dtype)
        if kind in ("none", "one"): s, t = (each(x, lambda x: x[:["none", "one"].index(kind)]) for x in (s, t))
        if kind == "one pixel" and not name.startswith("CRD"): s, t = (each(x, lambda x: x[:1, ..., :1, :1] if x.dim() == 4 else x[:1]) for x in (s, t))
        if kind == "zeros": s, t = each(s, torch.zeros_like), each(t, torch.zeros_like)
        if kind == "equal": s, t = (each(x, lambda x: x[:1].expand_as(x).clone()) for x in (s, t))
        loss = made(name, torch.float32)
        got, grads = value_and_grads(lambda x: loss(x, t), s)
        assert got.isfinite() and all(g.isfinite().all() for g in grads)
        if kind == "none": assert got == 0
        assert all(b.isfinite().all() for n, b in loss.named_buffers() if "log_mean" not in n)


@cases
def test_gradcheck(name):
    s, t = (each(x, lambda x: x[:3]) for x in pair(name))
    loss = made(name)
    if "CRD" in name: # after a first batch: its constant has no gradient
        loss(s, t)
        loss.eval()
    leaves = tuple(x.requires_grad_() for x in tensors(s))
    def g(*xs):
        torch.manual_seed(0)
        return loss(list(xs) if isinstance(s, list) else xs[0], t)
    assert torch.autograd.gradcheck(g, leaves)


@cases
def test_the_teacher_gets_no_gradient_and_every_parameter_one(name):
    s, t = (each(x, lambda x: x.requires_grad_()) for x in pair(name))
    loss = made(name)
    loss(s, t).backward()
    assert all(x.grad is None for x in tensors(t)) and all(x.grad.abs().max() > 0 for x in tensors(s))
    assert list(loss.parameters()) and all(p.grad is not None for p in loss.parameters())
    loss = made(name, detach_teacher=False)
    loss(s, t).backward()
    assert all(x.grad.abs().max() > 0 for x in tensors(t))
    with torch.no_grad(): assert not loss(s, t).requires_grad


@cases
def test_modules_copy_pickle_move_and_have_a_state(name):
    s, t = pair(name)
    objective = 2 * made(name)
    assert sum(p.numel() for p in objective.parameters()) > 0 and "parameters" in repr(objective)
    for twin in (copy.deepcopy(objective), pickle.loads(pickle.dumps(objective))):
        assert torch.equal(call(twin, s, t), call(objective, s, t)) and repr(twin) == repr(objective)
    torch.manual_seed(9)
    fresh = 2 * CASES[name][0](*CASES[name][1:]).double()
    assert call(fresh, s, t) != call(objective, s, t)
    fresh.load_state_dict(objective.state_dict())
    assert torch.equal(call(fresh, s, t), call(objective, s, t))
    state = {k: v.clone() for k, v in objective.state_dict().items()}
    parts = objective.parts(s, t)
    assert [p.rows.shape for p in parts.values()] == [(6,)] and not any(p.rows.requires_grad for p in parts.values())
    assert all(torch.equal(v, state[k]) or v.isnan().any() for k, v in objective.state_dict().items())
    assert objective.equation().startswith("2·") and all(p.is_meta for p in objective.to("meta").parameters())
    assert (0 * made(name))(s, t) == 0 and (0 * made(name, reduction="none"))(s, t).shape == (6,)


@cases
def test_they_compile_without_graph_breaks(name):
    torch._dynamo.reset()
    s, t = pair(name, torch.float32)
    loss, twin = made(name, torch.float32), made(name, torch.float32)
    if "drawn" in name: return  # random numbers differ
    want, grads = value_and_grads(lambda x: loss(x, t), s)
    got, got_grads = value_and_grads(torch.compile(lambda x: twin(x, t), fullgraph=True, backend="aot_eager"), s)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    for a, b in zip(got_grads, grads): torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


# bound, built, trained

def conv(i, o): return nn.Sequential(nn.Conv2d(i, o, 3, padding=1, stride=1 + (i == 1)), nn.ReLU(inplace=True))


def net(width, seed):
    torch.manual_seed(seed)
    return nn.Sequential(conv(1, width), conv(width, 2 * width), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 3))


def test_they_wait_for_shapes_and_are_trained_by_a_run():
    student, teacher = net(3, 0), net(5, 1)
    x, y = torch.randn(12, 1, 8, 8), torch.arange(12) % 3
    losses = (0.1 * kd.CrossEntropy() + kd.VID().on("0") + kd.MGD().on("0") + kd.SimKD().on("1") + kd.SRRL(teacher[4]).on("1") + kd.LearntFactors().on("0")
              + kd.ReviewKD().on(["0", "1"]) + kd.SemCKD().on(student=["0", "1"], teacher=["1", "0"]) + 0.1 * kd.CRD(size=50, width=8).on("3"))
    waiting = [loss for _, loss in losses.terms() if not isinstance(loss, kd.CrossEntropy)]
    assert all(l.pending() and "waits for shapes" in repr(l) for l in waiting) and not [*losses.parameters()]
    for loss in waiting:
        with pytest.raises(RuntimeError, match="has no networks yet.*kd.build"): loss(torch.zeros(2, 3), torch.zeros(2, 3))
    torch.manual_seed(0)
    objective = kd.build(losses, student, teacher, x)
    before = {n: p.clone() for n, p in objective.named_parameters()}
    frozen = copy.deepcopy(teacher.state_dict())
    run = kd.distill(student, teacher, [(x, y)], epochs=4, losses=objective, progress=False)
    assert all(math.isfinite(v) for row in run.history for v in row.values() if isinstance(v, float))
    still = [n for n, p in run.objective.named_parameters() if torch.equal(p, before[n])]
    assert not still and all(torch.equal(v, frozen[k]) for k, v in teacher.state_dict().items())
    assert not any(p is q for p in run.objective.parameters() for q in teacher.parameters())
    assert run.objective.losses[-1].layers["bank"].next == 48
    again = kd.build(losses, net(3, 0), teacher, x)
    again.load_state_dict(run.objective.state_dict())


@pytest.mark.parametrize("name", ["VID maps", "ReviewKD", "CRD"])
def test_copies_for_several_pairs_are_refused(name):
    loss = made(name)
    names = ["a", "b"] if not loss.several else None
    if names is None: assert loss.on(["a", "b"]).bound.student == ("a", "b")
    else:
        with pytest.raises(ValueError, match="has parameters of its own, so each pair"): loss.on(names)
    bound = loss.on("a")
    assert next(bound.parameters()) is next(loss.parameters())


def test_mixed_precision_with_a_scaler():
    student, teacher = net(3, 0), net(5, 1)
    x = torch.randn(8, 1, 8, 8)
    objective = kd.build(kd.VID().on("0") + kd.ReviewKD().on(["0", "1"]) + kd.CRD(size=20, width=8).on("3"), student, teacher, x)
    optimizer, scaler = torch.optim.SGD([*student.parameters(), *objective.parameters()], lr=0.01), torch.amp.GradScaler("cpu", init_scale=256.0)
    for _ in range(2):
        with kd.Taps(student, ["0", "1", "3"], copy=True) as ours, kd.Taps(teacher, ["0", "1", "3"], copy=True) as theirs:
            with torch.autocast("cpu", dtype=torch.float16):
                student(x), kd.frozen(teacher)(x)
                vid, review, crd = objective.losses
                loss = vid(ours["0"], theirs["0"]) + review((ours["0"], ours["1"]), (theirs["0"], theirs["1"])) + crd(ours["3"], theirs["3"])
            assert ours["0"].dtype == torch.float16 and loss.dtype == torch.float32
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer), scaler.update()
        assert all(p.grad.isfinite().all() for p in objective.parameters())


@pytest.mark.parametrize("make, error, words", [
    (lambda: kd.VID((2, 3)), TypeError, "VID takes the shapes of both sides"),
    (lambda: kd.VID(variance=0), ValueError, "variance must be > 0"),
    (lambda: kd.VID(variance=1e-6), ValueError, "its floor"),
    (lambda: kd.MGD(share=1.0), ValueError, "share must be from 0 to below 1"),
    (lambda: kd.MGD(over="all"), ValueError, "over must be"),
    (lambda: kd.SimKD(factor=0), ValueError, "factor must be a whole number"),
    (lambda: kd.SRRL(torch.ones(3, 5)), TypeError, "classifier must be a module"),
    (lambda: kd.SRRL(HEAD, by="kl"), ValueError, "by must be"),
    (lambda: kd.ReviewKD([(2, 3, 4, 4)], [(2, 3, 4, 4)] * 2), ValueError, "as many levels on both sides"),
    (lambda: made("ReviewKD")(*(x[:1] for x in pair("ReviewKD"))), ValueError, "fuses 2 levels, got 1 and 1"),
    (lambda: made("ReviewKD")(pair("MGD")[0], pair("MGD")[1]), TypeError, "reviewkd compares several layers at once"),
    (lambda: made("VID maps")(pair("VID maps")[0][:3], pair("VID maps")[1]), ValueError, "vid needs the same samples"),
    (lambda: made("VID tokens")(features(6, 3, 3), features(6, 4, 5)), ValueError, "same tokens"),
    (lambda: made("MGD")(pair("MGD")[0], pair("MGD")[1][..., :3]), ValueError, r"adaptive_avg_pool2d\(x, \(4, 3\)\)"),
    (lambda: made("MGD")(*pair("MGD")[::-1]), ValueError, r"networks of mgd were made for a student with \(6, 3, 4, 6\) and a teacher with \(6, 5, 4, 6\), got \(6, 5"),
    (lambda: made("CRD")(pair("CRD")[0][..., :3], pair("CRD")[1]), ValueError, "networks of crd were made for"),
    (lambda: made("ReviewKD")(pair("ReviewKD")[1], pair("ReviewKD")[1]), ValueError, "make another ReviewKD for these"),
    (lambda: made("VID maps")(*pair("VID vectors")), ValueError, "networks of vid were made for"),
    (lambda: made("MGD")(*pair("MGD"), mask=torch.ones(6)), TypeError, "mask must be bool"),
    (lambda: kd.LearntFactors(paraphraser=HEAD), TypeError, "must be a kd.Paraphraser"),
    (lambda: kd.Paraphraser((2, 3, 4, 4), rate=0), ValueError, "rate must be > 0"),
    (lambda: kd.CRD(size=0), ValueError, "size must be a whole number"),
    (lambda: kd.CRD(momentum=1), ValueError, "momentum must be"),
    (lambda: kd.CRD(tau=0), ValueError, "tau must be > 0"),
    (lambda: made("CRD")(*pair("CRD"), ids=torch.ones(6)), TypeError, "ids must be integer"),
    (lambda: made("CRD")(*pair("CRD"), ids=torch.ones(5).long()), ValueError, "ids must have the shape"),
    (lambda: made("CRD", reduction="avg"), ValueError, "reduction must be"),
])
def test_bad_arguments_are_named(make, error, words):
    with pytest.raises(error, match=words): make()


def test_options_are_documented_alike():
    for cls in (kd.VID, kd.MGD, kd.SimKD, kd.SRRL, kd.LearntFactors, kd.ReviewKD, kd.SemCKD, kd.CRD):
        init = inspect.signature(cls.__init__).parameters
        assert init["reduction"].default == "mean" and init["detach_teacher"].default is True
        assert issubclass(cls, trained.TrainedLoss) and "arXiv" in cls.__doc__ or "openreview" in cls.__doc__
