"Precision, Compare kernels, Live run: their numbers against torch, their views without a browser."
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from kdlab import timing
from kdlab.figures import precision
from kdlab.widgets.kernels import BATCHES, CompareKernels
from kdlab.widgets.kit import Work
from kdlab.widgets.precision import Precision


@pytest.mark.parametrize("dtype", precision.DTYPES)
def test_rounding_is_that_of_torch(dtype):
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(10_000) * 10.0 ** rng.integers(-4, 5, 10_000)).astype(np.float32)
    x = np.concatenate([x, np.float32([0, -0.0, 1 + 2 ** -8, 1 + 3 * 2 ** -8, np.inf, -np.inf, 1e-30])])
    assert np.array_equal(precision.rounded(x, dtype), torch.tensor(x).to(getattr(torch, dtype)).float().numpy())
    with pytest.raises(ValueError, match="dtype must be one of bfloat16, float16, float32"): precision.rounded(x, "int8")


@pytest.mark.parametrize("dtype", precision.DTYPES)
@pytest.mark.parametrize("distance", [1.0, 1e-2])
def test_step_by_step_is_what_torch_does(dtype, distance):
    "The same size of error as torch's own operators in that dtype."
    student, teacher = precision.logits_at(distance, 10, dtype, seeds=20)
    T, (_, slope) = 2.0, precision.exact(student, teacher, 2.0)
    s = torch.tensor(student).to(getattr(torch, dtype)).requires_grad_()
    t = torch.tensor(teacher).to(s.dtype)
    log_s, log_t = (F.log_softmax(z / T, -1) for z in (s, t))
    (F.kl_div(log_s, log_t, log_target=True, reduction="sum") * T ** 2).backward()
    error = lambda g: np.median(abs(g - slope).max(-1) / abs(slope).max(-1))
    ours, theirs = error(precision.step_by_step(student, teacher, T, dtype)[1]), error(s.grad.float().numpy())
    assert 0.5 < ours / theirs < 2


def test_the_exact_form_is_the_definition_where_that_holds():
    student, teacher = (z.astype(np.float64) for z in precision.logits_at(1.0, 10, "float32"))
    for T in (1.0, 4.0):
        s, t = torch.tensor(student, requires_grad=True), torch.tensor(teacher)
        rows = F.kl_div(F.log_softmax(s / T, -1), F.log_softmax(t / T, -1), log_target=True, reduction="none").sum(-1) * T * T
        rows.sum().backward()
        loss, gradient = precision.exact(student, teacher, T)
        assert np.allclose(loss, rows.detach(), rtol=1e-12) and np.allclose(gradient, s.grad, atol=1e-14)


@pytest.mark.parametrize("name, value", [("dtype", "float16"), ("distance", 1.0), ("T", 8.0), ("classes", 1000)])
def test_precision_tells_another_story_at_other_settings(name, value):
    view = Precision()
    before, bars = view.panel.text, view.fig.data[0].y
    setattr(view, name, value)
    assert view.panel.error == "" and view.panel.text != before
    view.reset()
    assert view.panel.text == before and view.fig.data[0].y == bars


@pytest.fixture
def kernels():
    rows = lambda c: [(way, b, c, s * b, 0.9 * s * b, 1.2 * s * b, None if way == "no memory" else 6 * b * c)
                      for way, s in (("eager", 8e-6), ("core", 1e-6), ("no memory", 4e-6)) for b in BATCHES]
    return CompareKernels({(c, "float32"): rows(c) for c in (10, 1000)})


def test_the_kernels_show_what_was_measured(kernels):
    assert kernels.panel.error == ""
    time = {t.name: t.y for t in kernels.fig.data if t.name in ("eager", "core") and t.xaxis != "x2"}
    assert np.allclose(np.divide(time["eager"], time["core"]), 8)
    assert "core takes 256 µs and is 8.0 times as fast" in kernels.panel.text
    assert [t.y for t in kernels.fig.data if t.name == "no memory" and t.xaxis == "x2"] == [(None,) * len(BATCHES)]


@pytest.mark.parametrize("name, value", [("batch", 16), ("classes", 10), ("dtype", "bfloat16")])
def test_the_kernels_follow_their_controls(kernels, name, value):
    before, sent = kernels.panel.text, []
    kernels.fig.observe(lambda change: sent.append(change["new"]) if change["new"] else None, "_py2js_update")
    setattr(kernels, name, value)
    assert kernels.panel.error == "" and kernels.panel.text != before and len(sent) <= 1
    assert ("press Measure" in kernels.panel.text) == (name == "dtype")
    kernels.reset()
    assert kernels.panel.text == before


def test_measuring_is_a_button_that_can_be_stopped():
    view = CompareKernels(budget=0.0)
    view._heard(view.panel, {"type": "press", "name": "measure"}, None)
    assert {m[1] for m in view.measured[1000, "float32"]} == set(BATCHES) and view.panel.busy == ""
    view.classes = 10
    work = Work(view, view.measure())
    work._step(), work._step()
    assert view.panel.busy and {m[1] for m in view.measured[10, "float32"]} == {BATCHES[0]}
    work.stop()
    work.finish()
    assert view.panel.busy == "" and {m[1] for m in view.measured[10, "float32"]} == {BATCHES[0]}


def test_the_kernels_code_runs(kernels, capsys):
    kernels.assign(batch=16, classes=10)
    exec(kernels.code(), {})
    assert capsys.readouterr().out.splitlines()[0].startswith("eager PyTorch ")


def test_a_race_wants_rows_and_classes():
    with pytest.raises(ValueError, match="rows must be at least 1 and classes at least 2; got 0 and 10"): timing.race(0, 10)


def test_extra_memory_is_what_a_call_adds():
    if timing.extra_bytes(lambda: None) is None: pytest.skip("this system does not tell")
    for megabytes in (8, 64):
        got = timing.extra_bytes(lambda: torch.ones(megabytes, 2 ** 18)) / 2 ** 20
        assert abs(got - megabytes) < 1.5
