"""Matrix, board, split, triangle, covering or seeking without a browser: each trait to data, message and sentence."""
import json
import re

import numpy as np
import pytest

from kdlab.figures import stored
from kdlab.figures.board import board_numbers
from kdlab.figures.cover import GRID, STARTS, cover_numbers, descend, divergences, gaussian, slopes, two_peaks
from kdlab.figures.dark import class_tree, dark_matrix, likeness, shown_classes
from kdlab.figures.simplex import LOSSES, level_lines, loss_at, plane, simplex_numbers, walk, weights
from kdlab.figures.split import shares, split_numbers
from kdlab.widgets.board import AlphaT
from kdlab.widgets.cover import CoveringOrSeeking
from kdlab.widgets.dark import DarkKnowledge
from kdlab.widgets.simplex import Simplex
from kdlab.widgets.split import DKDSplit
from test_widgets import messages


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    y = rng.permutation(np.arange(60) % 10)
    teacher = rng.normal(size=(60, 10)) + 3 * np.eye(10)[y]
    student = rng.normal(size=(60, 10)) + 1.5 * np.eye(10)[y]
    return dict(teacher=teacher, student=student, y=y, images=rng.random((60, 8, 8)))


def press(view, name, value):
    "What the browser sends when a control moves."
    view.panel.values = view.panel.values | {name: value}


def follows(view, name, value):
    "The change is one message to the figure and a new sentence; the same value again is none."
    sent, before = messages(view.fig), view.panel.text
    press(view, name, value)
    assert view.panel.error == "" and getattr(view, name) == value
    assert sent == ["_py2js_update"] and view.panel.text != before
    setattr(view, name, value)
    assert len(sent) == 1


def round_trip(view, *args, **state):
    "A saved state makes the same view; reset goes back."
    start = view.state()
    view.assign(**state)
    twin = type(view).from_state(json.loads(json.dumps(view.state())), *args)
    assert twin.state() == view.state() and twin.panel.text == view.panel.text
    view.panel._handle_custom_msg({"type": "reset"}, [])
    assert view.state() == start


def softmax(z, T=1.0):
    e = np.exp(z / T - (z / T).max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.fixture
def dark(arrays):
    return DarkKnowledge(arrays["teacher"], arrays["images"], arrays["y"])


@pytest.mark.parametrize("name, value", [("T", 1.0), ("cluster", True), ("row", 5), ("col", 5)])
def test_dark_one_message_a_change(dark, name, value):
    follows(dark, name, value)


@pytest.mark.parametrize("T", [1.0, 4.0, 20.0])
def test_dark_shows_the_shares_of_the_wrong_probability(dark, arrays, T):
    press(dark, "T", T)
    p, y, shown = softmax(arrays["teacher"], T), arrays["y"], np.array(dark.fig.data[0].z, dtype=float)
    for i in range(10):
        mean = p[y == i].mean(0)
        mean[i] = 0
        assert np.allclose(np.delete(shown[i], i), 100 * np.delete(mean, i) / mean.sum(), atol=0.06)
        assert np.isnan(shown[i, i])


def test_dark_orders_matrix_and_labels_by_the_tree(dark):
    plain = np.array(dark.fig.data[0].z, dtype=float)
    press(dark, "cluster", True)
    order = [int(k) for k in dark.fig.layout.xaxis.ticktext]
    assert sorted(order) == list(range(10)) and order != list(range(10))
    assert np.allclose(np.array(dark.fig.data[0].z, dtype=float), plain[np.ix_(order, order)], equal_nan=True)
    xs = [x for x in dark.fig.data[1].x if x is not None]
    pairs = np.reshape(xs, (-1, 4))
    assert len(pairs) == 9 and (np.diff(np.sort(pairs[:, [0, 2]])) > 0).all()


def test_dark_looks_behind_the_cell_that_is_clicked(dark, arrays):
    order = [int(k) for k in dark.fig.layout.xaxis.ticktext]
    at = dict(trace_indexes=[0], point_indexes=[[3, 7]], xs=[7], ys=[3])
    dark.fig._js2py_pointsCallback = dict(event_type="plotly_click", points=at)
    assert (dark.row, dark.col) == (order[3], order[7])
    p, rows = softmax(arrays["teacher"], 4), np.flatnonzero(arrays["y"] == 3)
    rows = rows[np.argsort(-p[rows, 7])]
    assert [t.split("#")[1] for t in dark.fig.data[3].text] == [str(i) for i in rows[:12]]
    image = arrays["images"][rows[0]]
    shown = np.array([row[:8] for row in dark.fig.data[2].z[:8]], dtype=float)
    assert np.allclose(shown, (image - image.min()) / np.ptp(image))


@pytest.mark.parametrize("T, row, col", [(1.0, 2, 3), (6.0, 9, 0)])
def test_dark_code_runs(dark, arrays, T, row, col):
    dark.assign(T=T, row=row, col=col)
    space = dict(logits=arrays["teacher"].tolist(), labels=arrays["y"])
    exec(dark.code(), space)
    assert np.isclose(100 * space["share"], dark.fig.data[0].z[row][col], atol=0.06)
    assert [f"#{i}" for i in space["behind"]] == [t.split(" ")[1] for t in dark.fig.data[3].text]


def test_dark_state(dark, arrays):
    round_trip(dark, arrays["teacher"], arrays["images"], arrays["y"], T=8.0, cluster=True, row=2, col=7)


def test_dark_without_labels_images_or_some_classes(arrays):
    view = DarkKnowledge(arrays["teacher"], class_names=[f"species {k}" for k in range(10)])
    assert view.panel.error == "" and "species" in view.panel.text
    y = np.where(arrays["y"] == 4, 5, arrays["y"])
    view = DarkKnowledge(arrays["teacher"], labels=y)
    view.assign(row=4, cluster=True)
    assert view.panel.error == "" and "no example is a 4" in view.panel.text
    assert all(v is None for v in view.fig.data[0].z[[int(k) for k in view.fig.layout.xaxis.ticktext].index(4)])


def test_dark_shows_twenty_of_a_thousand_classes():
    rng = np.random.default_rng(1)
    z = rng.normal(size=(300, 1000))
    z[:, 700] += 6
    z[:, 31] += 5.5
    view = DarkKnowledge(z)
    assert view.panel.error == "" and np.shape(view.fig.data[0].z) == (20, 20)
    assert {31, 700} <= set(view.classes) and (view.row, view.col) in ((31, 700), (700, 31))


@pytest.mark.parametrize("call, message", [
    (lambda a: DarkKnowledge(a["teacher"][:, :1]), "at least two classes"),
    (lambda a: DarkKnowledge(a["teacher"][None]), r"shape \(N, C\)"),
    (lambda a: DarkKnowledge(a["teacher"], images=a["images"][:5]), r"images must have shape \(60, height, width\)"),
    (lambda a: DarkKnowledge(a["teacher"], labels=a["y"] + 1), "labels must lie in 0..9"),
    (lambda a: DarkKnowledge(a["teacher"], class_names="ab"), "class_names must hold 10"),
])
def test_dark_wrong_arguments_are_told(arrays, call, message):
    assert re.search(message, call(arrays).panel.error)


def test_dark_tells_what_is_wrong_in_the_widget(arrays):
    z = arrays["teacher"].copy()
    z[2, 4] = np.nan
    assert "NaN or infinity in 1 of 60 rows" in DarkKnowledge(z).panel.error
    view = DarkKnowledge(arrays["teacher"])
    view.row = 10
    assert view.panel.error == "row must lie in 0..9, got 10"
    view.assign(row=0, T=0.0)
    assert "T must be > 0" in view.panel.error
    view.reset()
    assert view.panel.error == ""


def test_the_matrix_and_tree_by_hand():
    two = dark_matrix([[0.0, 0.0, np.log(2)], [0.0, 0.0, np.log(2)]], [0, 0], T=1)
    assert np.allclose(two["mean"][0], [0.25, 0.25, 0.5]) and np.allclose(two["share"][0, 1:], [1 / 3, 2 / 3])
    assert np.isnan(two["mean"][1:]).all() and np.isclose(two["wrong"][0], 0.75)
    like = likeness(two["share"])
    assert np.allclose(like, like.T) and like[0, 2] == pytest.approx(1 / 3)
    merges, order = class_tree(two["share"])
    assert set(merges[0, :2]) == {0, 2} and merges[0, 2] == pytest.approx(2 / 3)
    assert abs(order.index(0) - order.index(2)) == 1
    assert len(shown_classes(np.full((30, 30), 0.1), 7)) == 7


@pytest.fixture
def split(arrays):
    return DKDSplit(arrays["teacher"], arrays["student"], arrays["y"])


@pytest.mark.parametrize("name, value", [
    ("alpha", 2.0), ("beta", 0.5), ("confidence", 0.95), ("T", 1.0), ("example", 7)])
def test_split_one_message_a_change(split, name, value):
    follows(split, name, value)


@pytest.mark.parametrize("T", [1.0, 8.0])
@pytest.mark.parametrize("i", [0, 17])
def test_split_parts_make_the_whole_divergence(arrays, T, i):
    p, q = softmax(arrays["teacher"][i], T), softmax(arrays["student"][i], T)
    now = split_numbers(arrays["teacher"][i], arrays["student"][i], arrays["y"][i], T)
    assert np.isclose(now["kd"], (p * np.log(p / q)).sum()) and np.isclose(now["rest"], 1 - p[arrays["y"][i]])
    sure = split_numbers(arrays["teacher"][i], arrays["student"][i], arrays["y"][i], T, confidence=0.9)
    assert np.isclose(sure["others"], now["others"]) and np.isclose(sure["rest"], 0.1)
    moved = 0.1 * p / now["rest"]
    moved[arrays["y"][i]] = 0.9
    assert np.isclose(sure["kd"], (moved * np.log(moved / q)).sum())


def test_split_keeps_what_a_sure_teacher_knows():
    "At 1 - p_t = 1e-30 the other classes still have their proportions."
    now = split_numbers([0.0, -69.0, -69.0 + np.log(3)], [0.0, 0.0, 0.0], 0, T=1)
    assert np.allclose(now["hats"][0], [0.25, 0.75]) and 0 < now["rest"] < 1e-29
    assert shares(now, 0, 0)["DKD"]["share"] == 0  # nothing is left of the loss


@pytest.mark.parametrize("state", [dict(), dict(confidence=0.99, beta=2.0), dict(T=1.0, alpha=0.5, example=9)])
def test_split_code_runs(split, arrays, state):
    split.assign(**state)
    space = dict(teacher_logits=arrays["teacher"], student_logits=arrays["student"].tolist(), labels=arrays["y"])
    exec(split.code(), space)
    first, second = ([t for t in split.fig.data if t.type == "bar"][k] for k in (4, 5))
    kd_share = 100 * (1 - space["p_t"]) * space["others"] / space["kd"]
    assert np.allclose(second.x, [kd_share, 100 * split.beta * space["others"] / space["dkd"]])
    assert np.allclose(np.add(first.x, second.x), 100) and f"= {space['kd']:.3g} nats" in split.panel.text
    assert np.allclose(split.fig.data[2].y, np.delete(space["p"], space["y"]) / (1 - space["p"][space["y"]]))


def test_split_markers_lie_on_their_curves(split):
    split.assign(confidence=0.9, beta=1.0)
    for k in (6, 8):
        line, mark = split.fig.data[k], split.fig.data[k + 1]
        assert np.isclose(np.interp(mark.x[0], line.x, line.y), mark.y[0], atol=1) and mark.x[0] == pytest.approx(1)


def test_split_state(split, arrays):
    round_trip(split, arrays["teacher"], arrays["student"], arrays["y"], alpha=0.0, confidence=0.8, T=2.0, example=4)


def test_split_takes_what_comes(arrays):
    two = DKDSplit([[0.0, 2.0]], [[1.0, 0.0]])
    assert two.panel.error == "" and len(two.fig.data[2].y) == 1
    z = np.random.default_rng(0).normal(size=(2, 1000))
    many = DKDSplit(z, z[::-1], class_names=[f"species {k}" for k in range(1000)])
    assert many.panel.error == "" and len(many.fig.data[2].y) == 12
    broken = arrays["student"].copy()
    broken[1, 1] = np.inf
    view = DKDSplit(arrays["teacher"], broken)
    assert view.panel.error == ""
    view.example = 1
    assert "choose another example" in view.panel.error
    view.assign(example=0, confidence=1.0)
    assert "confidence must lie in (0, 1)" in view.panel.error
    assert re.search("must have one shape", DKDSplit(arrays["teacher"], arrays["student"][:5]).panel.error)
    assert re.search("at least two classes", DKDSplit([[1.0]], [[1.0]]).panel.error)


@pytest.fixture
def board(arrays):
    scores = 80 + np.random.default_rng(2).random((5, 7, 5))
    return AlphaT(arrays["teacher"], arrays["student"], arrays["y"], scores=scores)


@pytest.mark.parametrize("name, value", [("alpha", 0.3), ("T", 16.0), ("example", 11)])
def test_board_one_message_a_change(board, name, value):
    follows(board, name, value)


@pytest.mark.parametrize("alpha, T", [(0.0, 1.0), (0.3, 4.0), (1.0, 16.0)])
def test_board_pushes_are_the_gradient_of_the_terms(arrays, alpha, T):
    t, s, y = (arrays[k][5] for k in ("teacher", "student", "y"))
    now, step = board_numbers(t, s, y, alpha, T), 1e-5
    whole = lambda z: sum(board_numbers(t, z, y, alpha, T)[k] for k in ("hard", "soft"))
    slope = [(whole(s + step * e) - whole(s - step * e)) / (2 * step) for e in np.eye(10)]
    assert np.allclose(now["push_hard"] + now["push_soft"], -np.array(slope), atol=1e-8)
    assert (now["push_share"] == 0) == (alpha == 1) and (now["loss_share"] == 100) == (alpha == 0)


@pytest.mark.parametrize("state", [dict(), dict(alpha=0.1, T=1.0), dict(alpha=0.7, T=8.0, example=20)])
def test_board_code_runs(board, arrays, state):
    board.assign(**state)
    space = dict(teacher_logits=arrays["teacher"].tolist(), student_logits=arrays["student"], labels=arrays["y"])
    exec(board.code(), space)
    assert np.allclose(board.fig.data[0].x, [space["loss_share"], space["push_share"]])
    assert np.allclose(board.fig.data[4].y, space["push_hard"] + space["push_soft"])
    assert np.allclose(board.fig.data[2].y, space["push_soft"])


def test_board_marks_the_cell_and_tells_its_scores(board):
    board.assign(alpha=0.3, T=8.0)
    mark, = board.fig.layout.shapes
    scores = board.map[0]
    assert (mark.x0, mark.y0) == (2.5, 1.5)
    assert f"reach {scores[:, 2, 3].mean():.1f} ±" in board.panel.text
    assert np.allclose(board.fig.data[-1].y, scores[:, 2].mean(0))
    at = dict(trace_indexes=[5], point_indexes=[[6, 0]], xs=[0], ys=[6])
    board.fig._js2py_pointsCallback = dict(event_type="plotly_click", points=at)
    assert (board.alpha, board.T) == (1.0, 1.0)


def test_board_state(board, arrays):
    rest = arrays["teacher"], arrays["student"], arrays["y"], None, board.map[0]
    round_trip(board, *rest, alpha=0.1, T=2.0, example=3)


def test_board_stored_runs_are_the_default():
    view = AlphaT()
    mean = stored.load()["alpha_t"].mean(0)
    assert np.allclose(view.fig.data[5].z, mean)
    labels_only, hot = mean[-1].mean(), mean[:-1, 3:].min()
    assert hot > labels_only + 5  # what the text beside the widget says
    assert np.ptp(mean[:-1, 3]) < 1 < np.ptp(mean[3])


def test_board_takes_what_comes(arrays):
    own = AlphaT(arrays["teacher"], arrays["student"])
    assert own.panel.error == "" and len(own.fig.data) == 5 and "students" not in own.panel.text
    z = np.random.default_rng(0).normal(size=(2, 1000))
    many = AlphaT(z, z[::-1], class_names=[f"species {k}" for k in range(1000)])
    assert many.panel.error == "" and 12 <= len(many.fig.data[2].y) <= 13
    broken = arrays["student"].copy()
    broken[1, 1] = np.nan
    view = AlphaT(arrays["teacher"], broken)
    view.example = 1
    assert "choose another example" in view.panel.error
    view.assign(example=0, alpha=1.5)
    assert view.panel.error == "alpha must lie in 0..1, got 1.5"
    wrong = AlphaT(arrays["teacher"], arrays["student"], scores=np.ones((2, 3)))
    assert "of shape (seeds, 7, 5): accuracy in percent for each alpha and temperature; got float64 (2, 3)" in wrong.panel.error


@pytest.fixture
def cover():
    return CoveringOrSeeking()


@pytest.mark.parametrize("name, value", [("separation", 3.0), ("weight", 0.2), ("start", 0)])
def test_cover_one_message_a_change(cover, name, value):
    follows(cover, name, value)


@pytest.mark.parametrize("loss", ["forward", "reverse"])
@pytest.mark.parametrize("mu, sigma", [(0.3, 1.0), (-2.0, 2.5)])
def test_cover_slopes_are_those_of_the_loss(loss, mu, sigma):
    log_p, step = two_peaks(5, 0.3), 1e-5
    value = lambda m, s: divergences(log_p, gaussian(GRID, [m], [s]))[loss][0]
    d_mu, d_log = slopes(GRID, log_p, np.array([mu]), np.array([sigma]), loss)
    assert np.isclose(d_mu[0], (value(mu + step, sigma) - value(mu - step, sigma)) / (2 * step), rtol=1e-5)
    up, down = sigma * np.exp(step), sigma * np.exp(-step)
    assert np.isclose(d_log[0], (value(mu, up) - value(mu, down)) / (2 * step), rtol=1e-5)


@pytest.mark.parametrize("separation, weight", [(0.0, 0.5), (3.0, 0.2), (8.0, 0.7)])
def test_cover_forward_kl_matches_mean_and_width(separation, weight):
    p = np.exp(two_peaks(separation, weight))
    mean = (p * GRID).sum()
    path = descend(GRID, np.log(p), "forward")
    width = np.sqrt((p * (GRID - mean) ** 2).sum())
    assert np.allclose(path["mu"][-1], mean, atol=5e-3) and np.allclose(path["sigma"][-1], width, atol=5e-3)


def test_cover_reverse_kl_sits_on_the_peak_that_is_near():
    now = cover_numbers(two_peaks(10, 0.6))
    assert np.allclose(now["reverse"]["mu"][-1], 5 * np.sign(STARTS), atol=1e-2)
    assert np.allclose(now["reverse"]["ends"]["reverse"], [-np.log(0.6)] * 4 + [-np.log(0.4)] * 4, atol=1e-3)
    assert now["reverse"]["places"] == 2 and now["forward"]["places"] == 1
    assert cover_numbers(two_peaks(1, 0.6))["reverse"]["places"] == 1


@pytest.mark.parametrize("state", [dict(), dict(separation=9.0, start=0), dict(separation=2.0, weight=0.9, start=7)])
def test_cover_code_runs(cover, state):
    cover.assign(**state)
    space = {}
    exec(cover.code(), space)
    for name, trace in (("forward", 1), ("reverse", 2)):
        mu, sigma = space["ends"][name]
        assert f"{name} KL ends at mean {mu:.1f}, width {sigma:.1f}" in cover.panel.text
        assert np.allclose(cover.fig.data[trace].y, np.exp(gaussian(GRID, [mu], [sigma])[0]) / 0.16, atol=1e-4)


def test_cover_state(cover):
    round_trip(cover, separation=4.0, weight=0.3, start=1)


def test_cover_of_ordered_classes():
    z = np.random.default_rng(0).normal(size=(3, 7))
    view = CoveringOrSeeking(z, class_names="abcdefg")
    follows(view, "example", 2)
    assert [c["name"] for c in view.panel.controls] == ["example", "start"]
    p = softmax(z[2])
    assert np.allclose(view.fig.data[0].y, p, atol=1e-4)
    space = dict(logits=z.tolist())
    exec(view.code(), space)
    assert f"forward KL ends at mean {space['ends']['forward'][0]:.1f}" in view.panel.text
    twin = CoveringOrSeeking.from_state(view.state(), z)
    assert twin.panel.text == view.panel.text
    many = CoveringOrSeeking(np.random.default_rng(0).normal(size=(1, 1000)))
    assert many.panel.error == "" and len(many.fig.layout.xaxis.ticktext) == 9
    assert CoveringOrSeeking([[0.0, 1.0]]).panel.error == ""


def test_cover_tells_what_is_wrong(cover):
    cover.weight = 1.0
    assert cover.panel.error == "weight must lie between 0 and 1, got 1.0"
    cover.reset()
    cover.start = 99
    assert cover.panel.error == "start must lie in 0..7, got 99"
    view = CoveringOrSeeking([[0.0, 1.0, 2.0], [0.0, np.nan, 2.0]])
    view.example = 1
    assert "choose another example" in view.panel.error
    assert re.search("at least two classes", CoveringOrSeeking([[1.0]]).panel.error)
    assert re.search("class_names must hold 3", CoveringOrSeeking([[0.0, 1.0, 2.0]], class_names="ab").panel.error)


@pytest.fixture
def simplex():
    return Simplex()


@pytest.mark.parametrize("name, value", [("loss", 4), ("teacher_first", 0.3), ("teacher_split", 0.2),
                                         ("student_first", 0.5), ("student_split", 0.05)])
def test_simplex_one_message_a_change(simplex, name, value):
    follows(simplex, name, value)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("p", [[0.6, 0.3, 0.1], [0.02, 0.96, 0.02]])
def test_simplex_level_lines_lie_on_their_level(name, p):
    lines, on_edge = level_lines(name, p)
    wanted = np.broadcast_to(np.array([1.0, 0.3, 0.1, 0.03, 0.01])[:, None], on_edge.shape)
    free = lines.min(-1) > 1e-4  # forward KL is infinite at an edge: close by, a step of rounding moves it much
    assert free.sum() > 20 and np.allclose(loss_at(name, p, lines)[free], wanted[free], rtol=1e-3)
    assert (loss_at(name, p, lines)[on_edge] <= wanted[on_edge]).all() and (lines.min(-1)[on_edge] < 1e-9).all()
    assert np.allclose(lines.sum(-1), 1) and lines.min() >= 0


@pytest.mark.parametrize("name", LOSSES)
def test_simplex_the_walk_goes_down(name):
    p = np.array([0.5, 0.2, 0.3])
    path = walk(name, p, [0.1, 0.1, 0.8])
    assert (np.diff(loss_at(name, p, path)) <= 1e-12).all() and np.allclose(path.sum(1), 1)
    assert np.allclose(walk(name, p, p)[-1], p) == (name != "cross-entropy")


def test_simplex_from_a_student_that_is_sure_and_wrong(simplex):
    "What the text beside the widget says."
    left = [w["left"][5] for w in simplex_numbers([0.6, 0.3, 0.1], [0.02, 0.96, 0.02])]
    assert left[1] < 50 < left[2] and min(left[3:]) > 90


@pytest.mark.parametrize("loss", range(5))
def test_simplex_code_runs(simplex, loss):
    simplex.assign(loss=loss, student_first=0.1, student_split=0.4)
    space = {}
    exec(simplex.code(), space)
    strong = [t for t in simplex.fig.data if t.line.width == 4][0]
    assert np.allclose(np.transpose([strong.x, strong.y]), plane(np.array(space["path"])), atol=1e-3)
    assert f"{space['apart']:.2f} away" in simplex.panel.text


def test_simplex_a_disc_is_dropped(simplex):
    sent = messages(simplex.fig)
    x, y = plane([0.25, 0.5, 0.25])
    drop = {"shapes[1].x0": x - 0.1, "shapes[1].x1": x + 0.1, "shapes[1].y0": y - 0.1, "shapes[1].y1": y + 0.1}
    simplex.fig._js2py_relayout = dict(relayout_data=drop, source_view_id="v")
    assert (simplex.student_first, simplex.student_split) == (0.25, 0.67)
    assert "_py2js_update" in sent and "from (A 0.25, B 0.50, C 0.25)" in simplex.panel.text
    at = simplex.fig.layout.shapes[1]
    assert np.isclose(at.x1 - at.x0, 0.064) and np.allclose((at.x0 + at.x1) / 2, x, atol=0.01)
    wide = drop | {"shapes[1].x0": x - 0.2, "shapes[1].x1": x + 0.2}
    simplex.fig._js2py_relayout = dict(relayout_data=wide, source_view_id="v")
    assert np.isclose(simplex.fig.layout.shapes[1].x1 - simplex.fig.layout.shapes[1].x0, 0.064)  # it was only resized
    out = {"shapes[0].x0": 2.0, "shapes[0].x1": 2.2, "shapes[0].y0": -1.0, "shapes[0].y1": -1.2}
    simplex.fig._js2py_relayout = dict(relayout_data=out, source_view_id="v")
    assert (simplex.teacher_first, simplex.panel.error) == (0.01, "")
    assert np.allclose(weights(*plane([0.2, 0.3, 0.5])), [0.2, 0.3, 0.5])


def test_simplex_state(simplex):
    round_trip(simplex, loss=3, teacher_first=0.35, student_split=0.5)


def test_simplex_of_own_logits(arrays):
    view = Simplex(arrays["teacher"], arrays["student"], arrays["y"], [f"species {k}" for k in range(10)])
    follows(view, "example", 9)
    label = arrays["y"][9]
    three = [label, *[k for k in np.argsort(-arrays["teacher"][9]) if k != label][:2]]
    p = softmax(arrays["teacher"][9][three])
    assert abs(view.teacher_first - p[0]) <= 0.01 and f"species {three[1]} " in view.panel.text
    twin = Simplex.from_state(view.state() | dict(student_first=0.5), arrays["teacher"], arrays["student"], arrays["y"])
    assert twin.student_first == 0.5 and twin.teacher_first == view.teacher_first
    many = Simplex(*np.random.default_rng(0).normal(size=(2, 3, 1000)))
    assert many.panel.error == ""


def test_simplex_tells_what_is_wrong(simplex, arrays):
    simplex.student_first = 1.0
    assert "must lie between 0 and 1" in simplex.panel.error
    simplex.reset()
    simplex.loss = 7
    assert simplex.panel.error == "loss must lie in 0..4, got 7"
    broken = arrays["student"].copy()
    broken[[0, 3]] = np.nan
    view = Simplex(arrays["teacher"], broken)
    assert "choose another example" in view.panel.error
    view.example = 1
    assert view.panel.error == ""
    view.example = 3
    assert "choose another example" in view.panel.error
    assert re.search("at least three classes", Simplex([[1.0, 2.0]], [[1.0, 2.0]]).panel.error)
    assert re.search("must have one shape", Simplex(arrays["teacher"], arrays["student"][:5]).panel.error)
    assert re.search("class_names must hold 3", Simplex(class_names="ab").panel.error)
