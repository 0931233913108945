"""The stored runs are those that today's code makes."""
import numpy as np
import pytest

from kdlab import tasks, widget_data
from kdlab.figures import stored


@pytest.fixture(scope="module")
def fresh():
    return widget_data.make(0)


def test_a_fresh_seed_is_the_stored_one(fresh):
    kept = {name: array[0] for name, array in stored.load().items() if name not in ("images", "labels")}
    assert kept.keys() == fresh.keys()
    assert {name: a.shape for name, a in kept.items()} == {name: a.shape for name, a in fresh.items()}
    for name in ("alpha_t", "placebo_same", "placebo_unseen", "capacity", "transfer"):  # in points
        apart = np.abs(kept[name] - fresh[name])
        assert np.median(apart) < 1 and np.percentile(apart, 90) < 4, name
    for name in ("teacher", "students"):  # another machine rounds differently, and training magnifies it
        agree = (kept[name].argmax(-1) == fresh[name].argmax(-1)).mean()
        assert agree > 0.95, name
    assert np.abs(kept["layer_cka"] - fresh["layer_cka"]).max() < 0.1
    assert np.median(np.abs(kept["clinic"] - fresh["clinic"])) < 0.5


def test_the_pictures_are_the_test_images_of_the_task():
    test, arrays = tasks.digits().test, stored.load()
    np.testing.assert_array_equal(arrays["labels"], test.y.numpy())
    np.testing.assert_allclose(arrays["images"], test.x[:, 0].numpy())


def test_the_file_is_small():
    assert stored.PATH.stat().st_size < 3_000_000


def test_every_axis_has_its_names():
    arrays = stored.load()
    assert arrays["students"].shape[1:3] == (len(stored.STUDENTS), len(stored.STEPS))
    assert arrays["alpha_t"].shape == (5, len(stored.ALPHAS), len(stored.TEMPERATURES))
    assert arrays["placebo_same"].shape == arrays["placebo_unseen"].shape == (5, len(stored.ARMS), len(stored.STEPS))
    assert arrays["capacity"].shape == (5, len(stored.WIDTHS), 3)
    assert arrays["transfer"].shape == (5, len(stored.SIZES), len(stored.SOURCES), 2)
    assert arrays["layer_cka"].shape == (5, 2, len(stored.LAYER_STEPS), len(stored.LAYERS), len(stored.LAYERS))
    assert arrays["layer_student"].shape == (5, 2, len(stored.LAYER_STEPS), len(stored.LAYERS), 200, 2)
    assert arrays["layer_teacher"].shape == (5, len(stored.LAYERS), 200, 2)
    assert arrays["clinic"].shape == (5, len(stored.BUGS), len(stored.CLINIC_STEPS), len(stored.SYMPTOMS))


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = stored.write(tmp_path / "runs.npz", dict(a=np.ones(3)))
    before = path.read_bytes()
    with pytest.raises(Exception):
        stored.write(path, {"a": np.ones(3), "b" * 70000: np.ones(1)})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
