"""The numbers behind reliability, layer match, bug clinic and distillery, against hand calculation."""
import json

import numpy as np
import pytest
import torch

from kdlab import functional
from kdlab.figures import clinic, distillery, match, reliability, stored


def plain(fig):
    "The figure as plain JSON: what a page is given."
    return json.loads(fig.to_json())


def calibrated(n=4000, seed=0):
    "Logits of three classes whose labels are drawn from their own probabilities."
    rng = np.random.RandomState(seed)
    z = 2 * rng.randn(n, 3)
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    return z, (rng.uniform(size=(n, 1)) > p.cumsum(1)).sum(1)


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_the_best_temperature_undoes_a_factor(factor):
    z, y = calibrated()
    T = reliability.best_T(factor * z, y)
    assert abs(T / factor - 1) < 0.08
    around = [reliability.log_loss(factor * z, y, t) for t in (0.97 * T, T, 1.03 * T)]
    assert around[1] == min(around)


def test_ece_by_hand():
    "Confidences .9 .9 | .7 .7, right 1 0 | 1 1: the bins are off by .4 and .3, so ECE is 35 points."
    z = np.log([[0.9, 0.1], [0.9, 0.1], [0.7, 0.3], [0.7, 0.3]])
    twice = np.repeat(z, 2, axis=0)  # the even rows only choose T
    y = np.repeat([0, 1, 0, 0], 2)
    now = reliability.reliability_numbers(twice, y, bins=5)
    assert np.isclose(now["ece"], 35) and np.allclose(now["accuracy"][[3, 4]], [1, 0.5])
    assert np.allclose(now["confidence"][[3, 4]], [0.7, 0.9]) and np.isnan(now["accuracy"][:3]).all()
    assert np.allclose(now["share"], [0, 0, 0, 0.5, 0.5])


@pytest.mark.parametrize("equal_mass", [False, True])
def test_chance_explains_the_ece_of_a_calibrated_model_and_not_of_a_sharpened_one(equal_mass):
    z, y = calibrated(1000)
    good, bad = (reliability.reliability_numbers(k * z, y, bins=10, equal_mass=equal_mass) for k in (1, 3))
    assert good["ece"] < good["chance"] and bad["ece"] > 2 * bad["chance"]
    assert bad["interval"][0] < bad["ece"] < bad["interval"][1]


def test_equal_counts_are_equal():
    z, y = calibrated(800)
    share = reliability.reliability_numbers(z, y, bins=8, equal_mass=True)["share"]
    assert np.allclose(share, 1 / 8, atol=0.01)


def test_the_temperature_moves_no_answer():
    z, y = calibrated(200)
    says = [reliability.reliability_numbers(z, y, T)["says"].tolist() for T in (0.3, 1, 4)]
    assert says[0] == says[1] == says[2]


def test_reliability_figure_shows_its_numbers():
    a = stored.load()
    z, y = a["students"][0, 2, 2], a["labels"]
    fig, now = reliability.reliability_figure(z, y, 1.0, images=a["images"]), reliability.reliability_numbers(z, y)
    full = now["share"] > 0
    assert np.allclose(fig.data[0].y, now["accuracy"][full])
    assert np.allclose(np.add(fig.data[1].base, fig.data[1].y), now["confidence"][full])
    assert {"x"} == set(fig.data[1].marker.pattern.shape) - {"/"}  # not sure enough: the second channel says so
    assert fig.data[-1].type == "heatmap" and len(fig.data[-2].text) == reliability.MISTAKES
    assert len(reliability.reliability_figure(z, y).data) == len(fig.data) - 1
    plain(fig)


def test_a_model_without_mistakes():
    z = 5 * np.eye(4)[np.arange(40) % 4]
    fig = reliability.reliability_figure(z, np.arange(40) % 4)
    assert fig.data[-1].text == () and "is right in 100.0%" in reliability.reliability_sentence(z, np.arange(40) % 4)


def test_reliability_needs_rows():
    with pytest.raises(ValueError, match="at least 4 examples"):
        reliability.reliability_numbers(np.eye(3), [0, 1, 2])


# layer match

def test_cka_is_that_of_the_library():
    rng = np.random.RandomState(0)
    x, y = rng.randn(40, 6, 2), rng.randn(40, 9) + 1
    assert np.isclose(match.linear_cka(x, y), 1 - float(functional.cka(torch.tensor(x).flatten(1), torch.tensor(y))))
    turn = np.linalg.qr(rng.randn(9, 9))[0]
    assert np.isclose(match.linear_cka(x, y), match.linear_cka(x, 3 * y @ turn + 5))
    assert np.isclose(match.linear_cka(y, y @ turn), 1) and np.isnan(match.linear_cka(x, np.ones((40, 2))))


def test_the_plane_holds_most_of_the_spread():
    rng = np.random.RandomState(0)
    x = rng.randn(50, 5) * [5, 1, 3, 0.1, 0.1]
    xy, centred = match.plane(x), x - x.mean(0)
    values = np.linalg.svd(centred, compute_uv=False)
    assert np.allclose((xy**2).sum(0), values[:2]**2) and np.allclose(xy.mean(0), 0)
    assert match.plane(np.arange(4.0)[:, None])[:, 1].tolist() == [0, 0, 0, 0]


def test_turning_finds_rotation_reflection_and_size():
    rng = np.random.RandomState(0)
    xy = rng.randn(30, 2)
    turn = np.array([[0.6, 0.8], [0.8, -0.6]])  # a reflection
    moved, explained = match.align(xy @ turn / 7 + 3, xy)
    assert np.allclose(moved, xy - xy.mean(0)) and np.isclose(explained, 1)
    noise, weak = match.align(rng.randn(30, 2), xy)
    assert weak < 0.5 and np.isclose(np.linalg.norm(noise), np.linalg.norm(xy - xy.mean(0)))
    assert match.align(np.zeros((30, 2)), xy)[1] == 0


def test_match_numbers_by_hand():
    cka = np.zeros((2, 2, 1, 2, 3))  # seeds, without and with projector, one moment, 2 x 3 layers
    cka[0, 0, 0] = [[0.9, 0.5, 0.1], [0.2, 0.6, 0.7]]
    cka[:, 1, 0, 1, 2] = [0.8, 0.2]
    now = match.match_numbers(cka, 0, 0, 0, (1, 1))
    assert now["value"] == 0.6 and now["best"] == 2 and now["mean"] == -0.3
    assert np.isclose(match.match_numbers(cka, 1, 0, 0, (1, 2))["mean"], 0.15)  # +0.1 and +0.2


@pytest.mark.parametrize("long", [False, True])
def test_match_figure_shows_pair_class_and_example(long):
    a = stored.load()
    names = [f"digit {k}" if long else str(k) for k in range(10)]
    planes = a["layer_teacher"][1, 2], a["layer_student"][1, 0, 1, 3]
    fig = match.match_figure(a["layer_cka"], 0, 1, 1, (2, 3), planes, a["labels"][:200], (stored.LAYERS,) * 2,
                             stored.LAYER_STEPS, names, klass=3, example=7)
    assert np.allclose(fig.data[0].z, a["layer_cka"][1, 0, 1])
    assert np.allclose(fig.data[2].y, a["layer_cka"][:, 0, :, 2, 3].mean(0))
    frame = fig.layout.shapes[0]
    assert (frame.x0, frame.y0) == (2.5, 1.5) and fig.data[6].x == (fig.data[5].x[7],)
    cloud = fig.data[5]
    clear = np.array(cloud.marker.opacity) == 1 if long else np.char.startswith(cloud.textfont.color, "rgba") == 0
    assert (clear == (a["labels"][:match.MOST] == 3)).all() and len(cloud.x) == len(clear) == match.MOST
    plain(fig)


# bug clinic

@pytest.fixture(scope="module")
def charts():
    return np.delete(stored.load()["clinic"], 1, axis=1)


def test_every_bug_has_a_clue():
    assert set(stored.BUGS) == set(clinic.CLUES)


def test_differences_are_paired_by_seed():
    runs = np.zeros((3, 2, 1, 5))
    runs[:, 0, 0, 0], runs[:, 1, 0, 0] = [1, 5, 9], [2, 6, 10]  # one more in each seed, whatever its level
    assert clinic.difference(runs, 1, 0) == (1, 0)


@pytest.mark.parametrize("charts, wrong, worth", [(0, 0, 10), (4, 0, 6), (2, 2, 2), (4, 3, 0)])
def test_points_by_hand(charts, wrong, worth):
    assert clinic.points(charts, wrong) == worth


def test_each_case_is_dealt_once_and_in_another_order_by_another_seed():
    assert sorted(clinic.deal(8, 3)) == list(range(8)) and list(clinic.deal(8, 0)) != list(clinic.deal(8, 1))


def test_the_loss_axis_is_monotone_and_holds_negative_values():
    v = np.array([-100, -1, -0.01, 0, 0.01, 1, 100])
    assert (np.diff(clinic.squash(v)) > 0).all() and np.isclose(clinic.squash(1000) - clinic.squash(100), 1)


def test_every_fingerprint_is_in_the_charts_that_its_clue_names(charts):
    first = charts[:, :, 0, clinic.LOSS] / charts[:, :1, 0, clinic.LOSS]
    at = {bug: k for k, bug in enumerate(["right", *stored.BUGS[2:]])}
    gradient = charts[:, 0, 0, clinic.GRADIENT] / charts[:, at["no T²"], 0, clinic.GRADIENT]
    assert (1 / first[:, at["no T²"]] > 20).all() and (gradient > 15).all()
    assert (7 < 1 / first[:, at["mean over classes"]]).all() and (1 / first[:, at["mean over classes"]] < 9.5).all()
    assert (first[:, at["swapped arguments"]] < 0.95).all()
    assert (charts[:, at["probabilities as log-probabilities"], :, clinic.LOSS] < 0).all()
    assert (charts[:, at["double softmax"], -1, clinic.LOSS] > 1).all()
    drift = charts[:, :, -1, clinic.BUFFERS] > 0
    assert drift[:, at["teacher in train mode"]].all() and drift.sum() == len(charts)
    worse = charts[:, :, :, clinic.TEACHER].min(2) < 50
    assert worse[:, at["no detach"]].all() and worse.sum() == len(charts)


def test_closed_charts_are_empty_and_axes_give_nothing_away(charts):
    shut, other = (clinic.clinic_figure(charts, stored.CLINIC_STEPS, bug) for bug in (3, 6))
    assert all(len(shut.data[k].x) == 0 for k in range(3, 15)) and len(shut.data[2].x) == len(stored.CLINIC_STEPS)
    axes = lambda fig: [fig.layout[f"yaxis{k}"].to_plotly_json() for k in ("", 2, 3, 4, 5)]
    wide = clinic.clinic_figure(charts, stored.CLINIC_STEPS, 6, open_charts=range(5))
    assert axes(shut) == axes(other) == axes(wide)
    assert [t.type for t in shut.data] == [t.type for t in wide.data]
    assert np.allclose(wide.data[5].y, clinic.squash(charts[0, 6, :, clinic.LOSS]))
    plain(wide)


def test_a_run_that_blew_up_is_drawn_with_gaps(charts):
    broken = charts.copy()
    broken[0, 1, 3:, :2] = np.nan
    fig = clinic.clinic_figure(broken, stored.CLINIC_STEPS, 1, 0, range(5))
    assert fig.data[5].y[3:] == (None,) * 5
    assert "to nan" in clinic.clinic_sentence(broken, 1, 0, range(5))
    plain(fig)


# distillery

@pytest.mark.parametrize("widths", [(2, 3), (2, 6, 2), (2, 5, 4, 3)])
@pytest.mark.parametrize("T", [1.0, 4.0])
@pytest.mark.parametrize("hard", [False, True])
def test_the_nets_gradient_is_that_of_finite_differences(widths, T, hard):
    rng, c = np.random.RandomState(1), widths[-1]
    theta, x = distillery.first_weights(widths, 2), rng.randn(6, 2)
    targets = np.eye(c)[rng.randint(c, size=6)] if hard else rng.dirichlet(np.ones(c), 6)
    at = lambda t: distillery.loss_and_gradient(t, widths, x, targets, T)[0]
    numeric = [(at(theta + d) - at(theta - d)) / 2e-6 for d in 1e-6 * np.eye(len(theta))]
    np.testing.assert_allclose(distillery.loss_and_gradient(theta, widths, x, targets, T)[1], numeric, atol=1e-7)


def test_the_nets_loss_is_that_of_the_library():
    rng, widths = np.random.RandomState(0), (2, 8, 3)
    theta, x, t = distillery.first_weights(widths, 0), rng.randn(9, 2), rng.randn(9, 3)
    p = np.exp(t / 4) / np.exp(t / 4).sum(1, keepdims=True)
    z = distillery.forward(theta, widths, x)[-1]
    library = functional.forward_kl(torch.tensor(z), torch.tensor(t), T=4.0)
    assert np.isclose(distillery.loss_and_gradient(theta, widths, x, p, 4.0)[0], float(library))


@pytest.mark.parametrize("name, classes", [*zip(distillery.DATA, (2, 2, 3, 2))])
def test_points_are_balanced_inside_the_plane_and_learnable(name, classes):
    x, y = distillery.make_points(name, 300, 0.1, np.random.RandomState(0))
    assert np.bincount(y).tolist() == [300 // classes] * classes
    assert np.abs(x).max() < distillery.REACH
    world = distillery.make_world(name, noise=0.05)
    assert world["teacher"].right(*world["test"]) > 90


def test_students_start_equal_and_training_in_parts_is_training_at_once():
    world = distillery.make_world()
    race, whole = (distillery.Race(world, labels=2, unlabelled=30) for _ in range(2))
    assert (race.students[0].theta == race.students[1].theta).all()
    race.to(20).to(50)
    whole.to(50)
    assert race.history == whole.history and (race.students[1].theta == whole.students[1].theta).all()
    with pytest.raises(ValueError, match="at step 50 already"):
        race.to(10)


def test_who_learns_from_what():
    world = distillery.make_world("three spirals", seed=3)
    race = distillery.Race(world, labels=4, unlabelled=25, T=2.0)
    x, y = world["pool"]
    hard, distilled = race.students
    assert np.bincount(y[race.rows]).tolist() == [4, 4, 4] and not set(race.rows) & set(race.more)
    assert (hard.x == x[race.rows]).all() and (hard.targets.argmax(1) == y[race.rows]).all() and hard.T == 1
    teacher = world["teacher"].logits(distilled.x) / 2
    assert len(distilled.x) == 12 + 25 and np.allclose(np.log(distilled.targets) - teacher,
                                                       (np.log(distilled.targets) - teacher)[:, :1])


def test_the_field_says_class_and_certainty():
    world = distillery.make_world()
    z = distillery.field(world["teacher"], 2)
    p = world["teacher"].logits(np.array([[distillery.GRID[5], distillery.GRID[30]]]))
    assert int(z[30, 5]) == p.argmax() and z.min() >= 0.01 and z.max() <= 1.99


def test_race_figure_shows_the_race():
    race = distillery.Race(distillery.make_world("rings"), unlabelled=10).to(20)
    fig = distillery.race_figure(race, ["in", "out"])
    assert fig.data[8].y == tuple(h[1] for h in race.history) and len(fig.data[5].x) == 10
    assert set(fig.data[4].marker.symbol) == {"circle", "x"} and fig.data[-1].name == "out"
    plain(fig)


def test_a_higher_temperature_makes_the_asked_points_lighter():
    world = distillery.make_world()
    light = [np.mean([int(c[4:-1].split(",")[0]) for c in distillery.race_figure(race).data[5].marker.color])
             for race in (distillery.Race(world, T=T) for T in (1.0, 4.0, 16.0))]
    assert light[0] < light[1] < light[2]


@pytest.mark.parametrize("x, y, message", [
    (np.zeros((20, 3)), [0] * 20, r"shape \(N, 2\), ten or more; got float64 \(20, 3\)"),
    (np.zeros((5, 2)), [0] * 5, "ten or more"),
    (np.full((20, 2), np.nan), [0] * 20, "points hold NaN"),
    (np.zeros((20, 2)), None, "labels must hold the class"),
    (np.zeros((20, 2)), [0] * 20, "got 1 classes from 0 to 0"),
    (np.zeros((2000, 2)), np.arange(2000) % 1000, "got 1000 classes"),
    (np.zeros((20, 2)), [0, 2] * 10, "each of them there; got 2 classes from 0 to 2"),
    (np.zeros((20, 2)), [0.5] * 20, "labels must be whole numbers"),
])
def test_points_that_do_not_fit_say_what_to_give(x, y, message):
    with pytest.raises(ValueError, match=message):
        distillery.check_points(x, y)
