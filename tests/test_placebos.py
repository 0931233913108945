"Placebos: the teacher's top class and entropy, and nothing else of it."
import pytest
import torch

from kdlab import placebos

MAKERS = {
    "smoothing": placebos.smoothing,
    "class_mean": placebos.class_mean,
    "permuted_per_sample": lambda z, T: placebos.permuted_per_sample(z),
    "permuted_per_class": lambda z, T: placebos.permuted_per_class(z),
}


@pytest.fixture(scope="module")
def logits():
    "Teacher-like rows: sure and unsure ones, several of each class."
    g = torch.Generator().manual_seed(0)
    scale = torch.logspace(-1, 1.3, 200)[:, None]
    return torch.randn(200, 10, generator=g) * scale


def softmax(z, T=1.0):
    return (z.double() / T).softmax(-1)


def test_entropy_by_hand():
    z = torch.log(torch.tensor([[0.5, 0.25, 0.25]]))
    assert placebos.entropy(z).item() == pytest.approx(1.5 * torch.log(torch.tensor(2.)).item())
    assert placebos.entropy(2 * z, T=2.0).item() == pytest.approx(placebos.entropy(z).item())
    assert placebos.entropy(torch.tensor([[0., float("-inf")]])).item() == 0


@pytest.mark.parametrize("T", [1.0, 4.0, 8.0])
@pytest.mark.parametrize("name", MAKERS)
def test_every_placebo_has_the_entropy_and_the_top_class_of_each_row(logits, name, T):
    placebo = MAKERS[name](logits, T)
    assert placebo.shape == logits.shape and placebo.dtype == logits.dtype
    torch.testing.assert_close(placebos.entropy(placebo.double(), T), placebos.entropy(logits.double(), T),
                               atol=1e-6, rtol=1e-5)
    if name != "class_mean":
        assert torch.equal(placebo.argmax(-1), logits.argmax(-1))
    assert not torch.allclose(placebo, logits)


@pytest.mark.parametrize("T", [1.0, 8.0])
def test_smoothing_treats_all_other_classes_alike(logits, T):
    p = softmax(placebos.smoothing(logits, T), T).sort(descending=True).values
    torch.testing.assert_close(p[:, 1:], p[:, -1:].expand(-1, 9))


def test_permutations_keep_each_rows_numbers(logits):
    for make in (placebos.permuted_per_sample, placebos.permuted_per_class):
        assert torch.equal(make(logits, seed=2).sort().values, logits.sort().values)
        assert torch.equal(make(logits, seed=2), make(logits, seed=2))
        assert not torch.equal(make(logits, seed=2), make(logits, seed=3))


def test_per_class_moves_every_other_class_in_one_way():
    z = torch.arange(10.0).repeat(6, 1)
    z[:3, 2], z[3:, 7] = 100.0, 50.0
    moved = placebos.permuted_per_class(z)
    assert (moved[0] == moved[1]).all() and (moved[3] == moved[4]).all()
    for row, top in ((0, 2), (3, 7)):
        stay = (moved[row] == z[row]).nonzero().flatten().tolist()
        assert stay == [top]
    with pytest.raises(ValueError, match="2 classes"):
        placebos.permuted_per_class(torch.zeros(4, 2))


def test_per_sample_is_uniform_over_the_other_classes():
    z = torch.arange(5.0).repeat(20000, 1)
    moved = placebos.permuted_per_sample(z, seed=1)
    assert (moved[:, 4] == 4).all()
    counts = torch.stack([(moved[:, :4] == v).float().mean(0) for v in range(4)])
    assert (counts - 0.25).abs().max() < 0.015


def test_class_mean_is_the_mean_of_the_soft_targets(logits):
    T = 4.0
    placebo, p, top = placebos.class_mean(logits, T), softmax(logits, T), logits.argmax(-1)
    for label in top.unique():
        rows = top == label
        log_mean, shape = p[rows].mean(0).log(), placebo[rows].double()
        centred = lambda v: v - v.mean(-1, keepdim=True)
        direction = centred(log_mean) / centred(log_mean).norm()
        cosine = (centred(shape) / centred(shape).norm(dim=-1, keepdim=True)) @ direction
        torch.testing.assert_close(cosine, torch.ones_like(cosine), atol=1e-6, rtol=0)


def test_extreme_and_constant_rows_stay_finite():
    z = torch.tensor([[1e4, 0., 3.], [0., 50., -50.], [0.3, 0.3, 0.3]])
    for make in MAKERS.values():
        placebo = make(z, 8.0)
        assert placebo.isfinite().all()
        torch.testing.assert_close(placebos.entropy(placebo, 8.0), placebos.entropy(z, 8.0), atol=1e-5, rtol=1e-4)
