"""Losses bound to layers, and the projectors between them: the right shapes, in the optimizer, saved, and never shared by chance."""
import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kdlab as kd
from kdlab.losses.features import FeatureLoss


def net(width, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(inplace=True), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 3))


@pytest.fixture
def student(): return net(6)


@pytest.fixture
def teacher(): return net(16, 1)


X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


# Projector

@pytest.mark.parametrize("s, t, parameters, text", [
    ((2, 6), (2, 10), 70, "6 -> 10, linear, 70 parameters"),
    ((2, 5, 6), (2, 5, 10), 70, "6 -> 10, linear, 70 parameters"),
    ((2, 3, 8, 8), (2, 7, 8, 8), 28, "3 -> 7, 1x1 convolution, 28 parameters"),
    ((2, 3, 8, 8), (2, 7, 4, 4), 28, "3 -> 7, 1x1 convolution, to 4x4, 28 parameters"),
    ((2, 3, 4, 4), (2, 7, 9, 8), 28, "to 9x8"), ((2, 3, 8, 4), (2, 7, 4, 8), 28, "to 4x8"),
])
def test_a_projector_has_the_shape_of_the_teacher(s, t, parameters, text):
    project = kd.Projector(s, t)
    assert project(torch.randn(s)).shape == t and project(torch.randn(7, *s[1:])).shape == (7, *t[1:])
    assert sum(p.numel() for p in project.parameters()) == parameters and text in repr(project)
    assert all(p.grad is not None for p in (project(torch.randn(s)).sum().backward(), *project.parameters())[1:])


def test_what_a_projector_computes():
    x = torch.randn(2, 3, 8, 4)
    project = kd.Projector(x, (2, 5, 4, 8))
    w, b = project.layer.weight[:, :, 0, 0], project.layer.bias
    pixels = torch.einsum("oc,bchw->bohw", w, F.adaptive_avg_pool2d(x, (4, 4))) + b[:, None, None]
    torch.testing.assert_close(project(x), F.interpolate(pixels, (4, 8), mode="bilinear"))
    assert kd.Projector((1, 3), (1, 4), bias=False).layer.bias is None


def test_a_projector_without_a_change_of_size_takes_any_size():
    assert kd.Projector((2, 3, 8, 8), (2, 7, 8, 8))(torch.randn(1, 3, 12, 10)).shape == (1, 7, 12, 10)


@pytest.mark.parametrize("s, t, words", [((2, 3, 8, 8), (2, 16, 5), "same kind"), ((2, 3), (2, 3, 4), "same kind"), ((2,), (2,), "same kind"),
                                         ((2, 5, 8), (2, 6, 8), "keeps the number of tokens")])
def test_shapes_that_cannot_meet(s, t, words):
    with pytest.raises(ValueError, match=words) as e: kd.Projector(s, t)
    assert str(s) in str(e.value) and str(t) in str(e.value)


def test_a_projector_is_made_where_the_features_are_and_moves():
    project = kd.Projector(torch.zeros(2, 4, dtype=torch.float64), (2, 6))
    assert project.layer.weight.dtype == torch.float64
    assert kd.Hint(project=project).to("meta").project.layer.weight.is_meta


# project=

@pytest.mark.parametrize("make", [kd.Hint, kd.Cosine, lambda **o: kd.ChannelKL(T=2, **o)], ids=["Hint", "Cosine", "ChannelKL"])
def test_losses_project_the_student(make):
    s, t = torch.randn(3, 5, 6, requires_grad=True), torch.randn(3, 5, 8)
    loss = make(project=nn.Linear(6, 8))
    want = make()(loss.project(s), t)
    torch.testing.assert_close(loss(s, t), want)
    torch.testing.assert_close(loss.parts(s, t)[loss.term].rows, make().parts(loss.project(s), t)[loss.term].rows)
    loss(s, t).backward()
    assert s.grad.abs().sum() > 0 and loss.project.weight.grad.abs().sum() > 0 and len(list((2 * loss).parameters())) == 2


def test_a_projector_of_the_teacher_trains_and_the_teacher_does_not():
    s, t = torch.randn(3, 6, requires_grad=True), torch.randn(3, 8, requires_grad=True)
    loss = kd.Hint(project_teacher=nn.Linear(8, 6))
    loss(s, t).backward()
    assert t.grad is None and loss.project_teacher.weight.grad.abs().sum() > 0
    want = torch.autograd.grad((s - loss.project_teacher(t)).square().mean(), loss.project_teacher.weight)[0]
    torch.testing.assert_close(loss.project_teacher.weight.grad, want)
    kd.Hint(project_teacher=nn.Linear(8, 6), detach_teacher=False)(s, t).backward()
    assert t.grad.abs().sum() > 0


@pytest.mark.parametrize("options", [{"project": "yes"}, {"project": 3}, {"project_teacher": "auto"}])
def test_what_project_takes(options):
    with pytest.raises(TypeError, match=f"{next(iter(options))} must be a module"): kd.Hint(**options)


def test_a_loss_that_waits_says_how_to_go_on():
    loss = kd.Hint(project="auto")
    assert loss.pending() and list(loss.parameters()) == []
    for act in (loss, 2 * loss + kd.CKA(), loss.parts):
        with pytest.raises(RuntimeError, match=r"Hint\(project='auto'\) has no projector yet.*kd.build.*kd.Projector"): act(torch.zeros(2, 3), torch.zeros(2, 4))


# .on

def subclasses(cls):
    return {cls, *(d for c in cls.__subclasses__() for d in subclasses(c))}


SINGLE = sorted((c for c in subclasses(FeatureLoss) if c.__module__.startswith("kdlab") and hasattr(c, "term")),
                key=lambda c: c.__name__)


@pytest.mark.parametrize("cls", SINGLE, ids=lambda c: c.__name__)
def test_every_loss_on_features_can_be_bound(cls):
    try: loss = cls()
    except TypeError: pytest.skip("it is made for certain shapes")
    bound = loss.on("layer3")
    names = ("layer3",) if loss.several else "layer3"
    assert type(bound) is cls and bound.bound == (names, names) and loss.bound is None and bound is not loss
    assert repr(bound) == f"{loss!r}.on({names!r})"


def test_a_bound_loss_called_with_tensors_works_as_before():
    s, t = torch.randn(2, 4, 3, 8, 8)
    for loss in (kd.Hint(normalize=True), kd.AttentionTransfer(), kd.RKD(distance=1), kd.ChannelKL(T=3)):
        bound = loss.on(student="a", teacher="b")
        assert torch.equal(loss(s, t), bound(s, t)) and torch.equal((3 * bound)(s, t), (3 * loss)(s, t))
    z, w, y = torch.randn(4, 5), torch.randn(4, 5), torch.tensor([1, 0, 2, 4])
    objective = 0.1 * kd.CrossEntropy() + 0.9 * kd.SoftKL()
    assert torch.equal(objective.on("exit")(z, w, y), objective(z, w, y))


def test_lists_pair_in_order_and_are_summed():
    loss = 2 * kd.Hint().on(student=["a", "b"], teacher=["c", "d"]) + kd.AttentionTransfer().on(["e"])
    assert [(w, type(l).__name__, tuple(l.bound)) for w, l in loss.terms()] == [
        (2, "Hint", ("a", "c")), (2, "Hint", ("b", "d")), (1, "AttentionTransfer", ("e", "e"))]
    assert repr(loss) == "2·Hint().on(student='a', teacher='c') + 2·Hint().on(student='b', teacher='d') + AttentionTransfer().on('e')"
    assert loss.equation().startswith("2·mean (s - t)² [student a, teacher c] + 2·mean (s - t)² [student b, teacher d] + ")


def test_an_objective_binds_all_its_terms_and_labels_need_no_teacher():
    loss = (0.5 * kd.CrossEntropy() + kd.SoftKL()).on(student="exit", teacher="head")
    assert [(w, tuple(l.bound)) for w, l in loss.terms()] == [(0.5, ("exit", None)), (1, ("exit", "head"))]
    assert tuple(kd.CrossEntropy().on("exit").bound) == ("exit", None) == tuple(kd.CrossEntropy().on(student="exit").bound)
    with pytest.raises(ValueError, match="on.. pairs layers in order, got 2 of the student.*1 of the teacher"): kd.Hint().on(student=["a", "b"], teacher="c")
    for wrong in (dict(), dict(student="a"), dict(teacher="a")):
        with pytest.raises((TypeError, ValueError), match="on()"): kd.Hint().on(**wrong)
    with pytest.raises(TypeError, match="one name for both models"): kd.Hint().on("a", student="b")
    with pytest.raises(TypeError, match="on.. takes names of layers"): kd.Hint().on(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no layer for the student"): kd.Hint().on([])


def test_a_loss_of_several_outputs_takes_a_list_as_one_input():
    class Flow(FeatureLoss):
        several, term = True, "flow"
        def __init__(self): super().__init__("mean", True, "auto")
        def forward(self, student, teacher, target=None, *, mask=None): return sum((a - b).square().mean() for a, b in zip(student, teacher))

    loss = Flow().on(student=["0", "2"], teacher=["2", "0"])
    assert type(loss) is Flow and loss.bound == (("0", "2"), ("2", "0"))
    built = kd.build(Flow().on(["?"]), net(6), net(6))
    assert built.losses[0].bound.student == ("0", "1", "2", "3", "4")


def test_copies_share_parameters_but_not_options():
    project = nn.Linear(3, 4)
    loss = kd.ChannelKL(T=4, project=project)
    bound = loss.on("a")
    assert bound.project is project is loss.project
    bound.T = 2
    assert (loss.T, bound.T) == (4, 2) and loss._T_tensor.item() == 4 and bound._T_tensor.item() == 2
    with pytest.raises(ValueError, match="has parameters of its own, so each pair"): loss.on(["a", "b"])
    assert loss.on("a").on("b").bound.student == "b"


# build

def test_build_makes_projectors_and_leaves_the_losses_as_they_are(student, teacher):
    losses = 0.1 * kd.CrossEntropy() + 3 * kd.Hint(project="auto").on(student="1", teacher="3") + kd.RKD().on("2")
    objective = kd.build(losses, student, teacher, X)
    assert [w for w, _ in objective.terms()] == [0.1, 3, 1] and losses.losses[1].pending()
    assert [tuple(p.shape) for p in objective.parameters()] == [(16, 6), (16,)]
    other = kd.build(losses, student, teacher, X)
    assert not torch.equal(next(objective.parameters()), next(other.parameters()))
    assert "project=Projector(6 -> 16, linear, 112 parameters)).on(student='1', teacher='3')" in repr(objective)
    assert "[student 1, teacher 3, s projected]" in objective.equation()


def test_every_pair_gets_a_projector_of_its_own(student, teacher):
    objective = kd.build(kd.Hint(project="auto").on(["0", "4"]), student, teacher, X)
    assert [repr(l.project) for l in objective.losses] == ["Projector(6 -> 16, linear, 112 parameters)", "Projector(3 -> 3, linear, 12 parameters)"]


def test_patterns_expand_in_both_models(student, teacher):
    objective = kd.build(2 * kd.Similarity().on(student="?", teacher="?"), student, teacher)
    assert [(w, l.bound.student, l.bound.teacher) for w, l in objective.terms()] == [(2, str(i), str(i)) for i in range(5)]
    deeper = nn.Sequential(*teacher, nn.ReLU())
    with pytest.raises(ValueError, match="got 5 of the student.*6 of the teacher"): kd.build(kd.CKA().on("?"), student, deeper)


def test_build_says_what_is_missing(student, teacher):
    waiting = kd.Hint(project="auto")
    with pytest.raises(ValueError, match="bound to no layers: add .on"): kd.build(waiting, student, teacher, X)
    with pytest.raises(ValueError, match="pass x="): kd.build(waiting.on("1"), student, teacher)
    with pytest.raises(ValueError, match="Sequential has no layer '7'; the nearest names are"): kd.build(kd.CKA().on("7"), student, teacher)
    with pytest.raises(ValueError, match="compares with a teacher, got teacher=None"): kd.build(kd.CKA().on("1"), student, None)


def test_build_leaves_the_models_alone(student, teacher):
    student.insert(1, nn.BatchNorm1d(6))
    before = copy.deepcopy(student.state_dict())
    kd.build(kd.Hint(project="auto").on(student="0", teacher="0"), student, torch.compile(teacher, backend="aot_eager"), X)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), student.state_dict().values())) and student.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in (*student.modules(), *teacher.modules()))


def test_built_losses_are_saved_copied_and_pickled(student, teacher):
    losses = 1.0 * kd.Hint(project="auto").on(student="1", teacher="3")
    objective = kd.build(losses, student, teacher, X)
    s, t = torch.randn(4, 6), torch.randn(4, 16)
    for twin in (copy.deepcopy(objective), pickle.loads(pickle.dumps(objective))):
        assert torch.equal(twin(s, t), objective(s, t)) and twin.losses[0].bound == objective.losses[0].bound
        assert next(twin.parameters()) is not next(objective.parameters())
    file = io.BytesIO()
    torch.save(objective.state_dict(), file)
    file.seek(0)
    fresh = kd.build(losses, student, teacher, X)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(fresh(s, t), objective(s, t))
    assert copy.deepcopy(losses).losses[0].pending() and pickle.loads(pickle.dumps(losses)).losses[0].pending()


def test_an_adapter_in_a_loop_of_your_own(student, teacher):
    project = kd.Projector((5, 6), (5, 16))
    hint, kl = kd.Hint(project=project), kd.SoftKL(T=4)
    optimizer = torch.optim.SGD([*student.parameters(), *hint.parameters()], lr=0.1)
    first = None
    for _ in range(40):
        with kd.Taps(student, ["3"]) as fs, kd.Taps(teacher, ["3"]) as ft:
            zs, zt = student(X), kd.frozen(teacher)(X)
            loss = kl(zs, zt) + hint(fs["3"], ft["3"])
        first = first or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5 * first and all(p.grad is None for p in teacher.parameters())
