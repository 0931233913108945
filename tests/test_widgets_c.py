"Precision, Compare kernels, Live run: their numbers against torch, their views without a browser."
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from kdlab.figures import precision
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
