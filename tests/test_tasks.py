"The data: splits that never move, subsets that keep their promise, loaders and views that repeat."
import hashlib

import numpy as np
import pytest
import torch

from kdlab import tasks

PINNED = {  # sizes a class, fingerprint of the ids, ink in sixteenths: a change here is a change of every result
    "train": ([99, 101, 98, 102, 101, 101, 101, 100, 97, 100], "202e8979f6bd7586", 312195),
    "valid": ([29, 30, 30, 30, 30, 30, 30, 29, 29, 30], "b2669675c04d4894", 93628),
    "test": ([50, 51, 49, 51, 50, 51, 50, 50, 48, 50], "a3806d2b83f19eb7", 155895),
}
SUBSETS = {"digits-few": "a36d4bceb235136a", "digits-no-3": "9e1b631f72eae3bc", "digits-100-labels": "28bcd20270a14a61"}


def fingerprint(ids):
    return hashlib.sha256(ids.numpy().astype("<i8").tobytes()).hexdigest()[:16]


def splits(task):
    return {"train": task.train, "valid": task.valid, "test": task.test}


@pytest.fixture(scope="module")
def digits():
    return tasks.digits()


@pytest.mark.parametrize("part", PINNED)
def test_the_default_split_of_the_digits_is_pinned(digits, part):
    samples = splits(digits)[part]
    ink = int((samples.x.double() * 16).sum().round())
    assert (samples.y.bincount().tolist(), fingerprint(samples.ids), ink) == PINNED[part]


@pytest.mark.parametrize("name", SUBSETS)
def test_the_named_subsets_are_pinned(name):
    assert fingerprint(tasks.get(name).train.ids) == SUBSETS[name]


@pytest.mark.parametrize("name", ["digits", "moons", "spirals", "rings", "blobs"])
@pytest.mark.parametrize("seed", [0, 3])
def test_splits_are_disjoint_balanced_and_typed(name, seed):
    task = tasks.get(name, seed=seed)
    ids = torch.cat([part.ids for part in splits(task).values()])
    assert ids.unique().numel() == len(ids)
    for part in splits(task).values():
        assert part.x.dtype == torch.float32 and part.y.dtype == part.ids.dtype == torch.int64
        assert len(part.x) == len(part.y) == len(part.ids)
        share = part.y.bincount(minlength=len(task.classes)) / len(part.y)
        assert (share * len(task.classes) - 1).abs().max() < 0.06


def test_digits_are_complete_and_true_to_their_ids(digits):
    from sklearn.datasets import load_digits
    data, parts = load_digits(), splits(digits).values()
    assert sorted(torch.cat([p.ids for p in parts]).tolist()) == list(range(1797))
    for part in parts:
        np.testing.assert_array_equal(part.x[:, 0].numpy() * 16, data.images[part.ids])
        np.testing.assert_array_equal(part.y, data.target[part.ids])
    assert digits.train.x.min() == 0 and digits.train.x.max() == 1
    assert digits.in_shape == (1, 8, 8) and digits.classes == tuple("0123456789")


@pytest.mark.parametrize("name", tasks.TASKS)
def test_a_seed_repeats_and_another_seed_differs(name):
    first, again, other = (tasks.get(name, seed=s) for s in (5, 5, 6))
    for part, same in zip(splits(first).values(), splits(again).values()):
        assert torch.equal(part.x, same.x) and torch.equal(part.ids, same.ids)
    assert not torch.equal(first.test.x, other.test.x)


def test_few_takes_as_many_of_each_class_and_leaves_the_task_alone(digits):
    few = digits.few(per_class=4, seed=1)
    assert few.train.y.bincount().tolist() == [4] * 10 and few.unlabelled is None
    assert torch.isin(few.train.ids, digits.train.ids).all() and len(digits.train) == 1000
    assert few.test is digits.test and few.valid is digits.valid
    assert not torch.equal(few.train.ids, digits.few(4, seed=2).train.ids)
    with pytest.raises(ValueError, match="per_class must be 1 to 97"):
        digits.few(per_class=98)


def test_without_drops_a_class_from_training_only(digits):
    unseen = digits.without(3)
    assert len(unseen.train) == 1000 - 102 and 3 not in unseen.train.y
    assert set(unseen.train.ids.tolist()) == set(digits.train.ids[digits.train.y != 3].tolist())
    assert 3 in unseen.valid.y and 3 in unseen.test.y
    assert set(digits.without(3, 8).train.y.tolist()) == {0, 1, 2, 4, 5, 6, 7, 9}
    with pytest.raises(ValueError, match="nothing is left"):
        digits.without(*range(10))


def test_low_label_hides_labels_but_no_image(digits):
    low = digits.low_label(100)
    assert low.train.y.bincount().tolist() == [10] * 10
    assert len(low.unlabelled) == 900 and low.unlabelled.y is None
    assert sorted(low.train.ids.tolist() + low.unlabelled.ids.tolist()) == digits.train.ids.tolist()
    assert low.transfer.y is None and sorted(low.transfer.ids.tolist()) == digits.train.ids.tolist()
    where = {int(i): k for k, i in enumerate(digits.train.ids)}
    positions = [where[int(i)] for i in low.transfer.ids]
    assert torch.equal(low.transfer.x, digits.train.x[positions])
    assert "900 unlabelled" in repr(low)


def test_hidden_labels_cannot_be_used_again(digits):
    low = digits.low_label(100)
    for cut in (lambda: low.without(3), lambda: low.few(2), lambda: low.low_label(50)):
        with pytest.raises(ValueError, match="low_label.. last"):
            cut()
    with pytest.raises(ValueError, match="multiple of the number of classes, got 101"):
        digits.low_label(101)
    assert len(digits.without(3).low_label(90).train) == 90


def test_every_prefix_of_a_balanced_order_is_balanced():
    y = np.repeat([0, 1, 2], [60, 30, 10])
    order = tasks.balanced_order(y, seed=4)
    assert sorted(order) == list(range(100))
    for n in range(1, 101):
        counts = np.bincount(y[order[:n]], minlength=3)
        assert np.abs(counts - n * np.array([.6, .3, .1])).max() <= 1


def test_split_rejects_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="at most 4 rows"):
        tasks.split("x", torch.zeros(4, 2), torch.tensor([0, 1, 0, 1]), ("a", "b"), (3, 1, 1))


def test_loaders_repeat_shuffle_and_leave_the_global_stream_alone(digits):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, again, other = (digits.loaders(64, seed=s) for s in (1, 1, 2))
    epochs = [[torch.cat([y for _, y in l.train]) for _ in range(2)] for l in (first, again, other)]
    assert torch.equal(epochs[0][0], epochs[1][0]) and torch.equal(epochs[0][1], epochs[1][1])
    assert not torch.equal(epochs[0][0], epochs[0][1]) and not torch.equal(epochs[0][0], epochs[2][0])
    assert torch.equal(torch.cat([y for _, y in first.test]), digits.test.y)
    assert torch.equal(torch.get_rng_state(), before)


def test_ids_travel_through_shuffled_batches(digits):
    seen = []
    for batch in digits.loaders(64, ids=True).train:
        position = torch.searchsorted(digits.train.ids, batch["id"])
        assert torch.equal(digits.train.x[position], batch["x"]) and torch.equal(digits.train.y[position], batch["y"])
        seen += batch["id"].tolist()
    assert sorted(seen) == digits.train.ids.tolist()


def test_unlabelled_batches_hold_inputs_only(digits):
    transfer = digits.low_label(100).transfer
    (x,) = next(iter(tasks.loader(transfer, 32)))
    assert x.shape == (32, 1, 8, 8)
    assert set(next(iter(tasks.loader(transfer, 32, ids=True)))) == {"id", "x"}


def test_augmentation_depends_on_seed_and_epoch_only(digits):
    x = digits.train.x[:50]
    view = tasks.augment(x, seed=1, epoch=2)
    torch.manual_seed(123)
    assert torch.equal(view, tasks.augment(x, seed=1, epoch=2))
    assert not torch.equal(view, tasks.augment(x, seed=1, epoch=3))
    assert not torch.equal(view, tasks.augment(x, seed=2, epoch=2))
    assert view.shape == x.shape and view.dtype == x.dtype and view.min() >= 0 and view.max() <= 1


def test_augmentation_can_be_nothing_or_a_shift_by_whole_pixels():
    x = torch.rand(20, 1, 6, 9)
    torch.testing.assert_close(tasks.augment(x, shift=0, degrees=0, noise=0), x, atol=1e-5, rtol=0)
    moved = tasks.augment(x, seed=3, shift=1, degrees=0, noise=0)
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1))
    for image, candidates in zip(moved, padded):
        shifts = [candidates[:, r:r + 6, c:c + 9] for r in range(3) for c in range(3)]
        assert min((image - s).abs().max() for s in shifts) < 1e-5


@pytest.mark.parametrize("shape", [(20, 20), (20, 40)])
def test_augmentation_turns_without_stretching(shape):
    height, width = shape
    image = torch.zeros(1, 1, height, width)
    for along in range(-4, 5):  # a bar of nine pixels with its middle on a pixel
        image[0, 0, height // 2, width // 2 + along] = 1
    turned = torch.cat([tasks.augment(image, epoch=e, shift=0, degrees=90, noise=0) for e in range(20)])
    rows, columns = torch.meshgrid(torch.arange(height) + .5, torch.arange(width) + .5, indexing="ij")
    mass = turned.sum(dim=(1, 2, 3))
    middle = lambda place: (turned[:, 0] * place).sum(dim=(1, 2)) / mass
    spread = middle(rows ** 2) - middle(rows) ** 2 + middle(columns ** 2) - middle(columns) ** 2
    assert spread.min() > 5.5 and spread.max() < 8.5  # 60 / 9 = 6.7 before it is turned, plus interpolation


def test_augmented_samples_redraw_images_and_keep_labels_and_ids(digits):
    samples = tasks.Augmented(digits.train, seed=1, noise=0.0)
    first = samples.x
    samples.set_epoch(4)
    assert torch.equal(samples.x, tasks.augment(digits.train.x, seed=1, epoch=4, noise=0.0))
    assert not torch.equal(samples.x, first)
    samples.set_epoch(0)
    assert torch.equal(samples.x, first) and samples.y is digits.train.y and samples.ids is digits.train.ids
    x, y = next(iter(tasks.loader(samples, 16)))
    assert torch.equal(x, first[:16]) and torch.equal(y, digits.train.y[:16])
    assert samples.unlabelled().y is None


def test_points_lie_where_the_formulas_say():
    rings = tasks.rings(noise=0.0)
    radius = rings.train.x.norm(dim=1)
    assert torch.allclose(radius, torch.where(rings.train.y == 0, 0.5, 1.0))
    moons = tasks.moons(noise=0.0).train
    sign = torch.where(moons.y == 0, 1.0, -1.0)[:, None]
    assert torch.allclose((sign * moons.x + torch.tensor([.5, .25])).norm(dim=1), torch.ones(200))
    blobs = tasks.blobs(noise=0.0, centres=3)
    assert blobs.train.x.unique(dim=0).shape[0] <= 4 and len(blobs.classes) == 3
    arms = tasks.spirals(arms=2, noise=0.0).train
    radius, angle = arms.x.norm(dim=1), torch.atan2(arms.x[:, 1], arms.x[:, 0])
    expected = 2 * torch.pi * (0.75 * radius + arms.y / 2)
    assert torch.allclose(torch.cos(angle - expected), torch.ones(300), atol=1e-4)


def test_an_unknown_task_names_the_nearest():
    with pytest.raises(ValueError, match="no task 'moon'; did you mean 'moons'"):
        tasks.get("moon")
    with pytest.raises(ValueError, match="tasks: digits"):
        tasks.get("zzz")
