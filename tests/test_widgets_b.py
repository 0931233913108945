"""Reliability, layer match, bug clinic and distillery without a browser: data, messages, state, text, code, errors."""
import asyncio
import json
import re

import numpy as np
import pytest

from kdlab.figures import stored
from kdlab.widgets.challenge import Challenge
from kdlab.widgets.clinic import BugClinic
from kdlab.widgets.distillery import Distillery
from kdlab.widgets.match import LayerMatch
from kdlab.widgets.reliability import Reliability

VIEWS = {"reliability": Reliability, "match": LayerMatch, "clinic": BugClinic,
         "distillery": Distillery}
CHANGES = [  # a control, and a value that it does not have at birth
    ("reliability", "model", 2), ("reliability", "step", 2), ("reliability", "seed", 3), ("reliability", "bins", 20),
    ("reliability", "T", 2.0), ("reliability", "equal_mass", True),
    ("match", "hint", True), ("match", "step", 1), ("match", "seed", 2), ("match", "teacher", 0),
    ("match", "student", 2),
    ("match", "klass", 3), ("match", "example", 9),
    ("clinic", "case", 3), ("clinic", "seed", 2), ("clinic", "loss", True), ("clinic", "gradient", True),
    ("clinic", "teacher", True), ("clinic", "buffers", True), ("clinic", "guess", 4),
    ("distillery", "data", "rings"), ("distillery", "noise", 0.3), ("distillery", "labels", 10),
    ("distillery", "T", 1.0), ("distillery", "unlabelled", 10), ("distillery", "width", 4),
    ("distillery", "teacher_width", 4),
    ("distillery", "seed", 3), ("distillery", "step", 30),
]


@pytest.fixture(scope="module")
def made():
    "One view of each kind; a test that changes it resets it."
    return {name: view() for name, view in VIEWS.items()}


def messages(figure):
    "A list that grows with each edit that the figure sends to the browser."
    sent = []
    names = [n for n in figure.trait_names() if n.startswith("_py2js_")]
    assert len(names) >= 7
    figure.observe(lambda change: sent.append(change["name"]) if change["new"] else None, names)
    return sent


@pytest.mark.parametrize("kind, name, value", CHANGES)
def test_one_message_and_another_sentence_for_each_control(made, kind, name, value):
    view = made[kind]
    text, sent = view.panel.text, messages(view.fig)
    view.panel.values = view.panel.values | {name: value}  # what the browser sends
    assert getattr(view, name) == value and view.panel.error == ""
    assert sent == ["_py2js_update"]
    assert view.panel.text != text and view.fig._alt == view.panel.text
    view.reset()
    assert view.panel.text == text


@pytest.mark.parametrize("kind", VIEWS)
def test_every_control_is_tried(made, kind):
    named = {c["name"] for c in made[kind].panel.controls if c["kind"] != "button"}
    assert named == {name for k, name, _ in CHANGES if k == kind}
    assert all(c["label"] for c in made[kind].panel.controls)


@pytest.mark.parametrize("kind", VIEWS)
def test_state_round_trip_hide_and_full_state(made, kind):
    view = made[kind]
    for name, value in [(n, v) for k, n, v in CHANGES if k == kind][:2]:
        setattr(view, name, value)
    twin = VIEWS[kind].from_state(json.loads(json.dumps(view.state())))
    assert twin.state() == view.state() and twin.panel.text == view.panel.text
    shown = twin.fig.get_state()["_widget_data"]
    assert len(shown) == len(view.fig.data) and twin.fig.get_state()["_view_name"]
    view.reset()
    name = view.panel.controls[0]["name"]
    bare = VIEWS[kind](hide=[name, "reset", "title"])
    assert name not in bare.panel.values and not bare.panel.can_reset and bare.panel.title == ""


@pytest.mark.parametrize("kind", VIEWS)
def test_the_page_loads_nothing(made, kind, tmp_path):
    view = made[kind]
    html = view.to_html(tmp_path / "page.html", bundle="file").read_text()
    assert "http" not in html and view.panel.text[:40] in html


# reliability

@pytest.mark.parametrize("state", [dict(), dict(model=2, step=2, T=0.5, bins=20), dict(seed=4, equal_mass=True, T=1.4)])
def test_code_of_reliability(made, state):
    view = made["reliability"]
    view.assign(**state)
    space = dict(logits=view._logits(view.model, view.step, view.seed), labels=view.labels)
    exec(view.code(), space)
    assert np.isclose(space["ece"], view.fig.data[11].y[0])
    assert f"ECE {space['ece']:.1f}%" in view.panel.text and f"best T is {space['best']:.2f}" in view.panel.text
    view.reset()


def test_the_button_goes_to_the_best_temperature(made):
    view = made["reliability"]
    sent = messages(view.fig)
    view.panel._handle_custom_msg({"type": "press", "name": "best"}, [])
    assert f"best T is {view.T:.2f}" in view.panel.text and sent == ["_py2js_update"]
    view.reset()


def test_reliability_of_own_models():
    rng = np.random.RandomState(0)
    y = rng.randint(1000, size=50)
    z = rng.randn(50, 1000) + 8 * np.eye(1000)[y]
    view = Reliability(z, y, class_names=[f"class {k}" for k in range(1000)])
    assert view.panel.error == "" and "model" not in view.panel.values and "seed" not in view.panel.values
    two = Reliability({"A": z, "B": -z}, y)
    two.model = 1
    assert two.panel.text.startswith("B: At T = 1")
    two.model = 7
    assert two.panel.error == "model must lie in 0..1, got 7"


@pytest.mark.parametrize("call, message", [
    (lambda: Reliability(np.zeros((8, 1)), np.zeros(8, int)), "at least two classes"),
    (lambda: Reliability(np.full((8, 3), np.nan), np.zeros(8, int)), "hold NaN"),
    (lambda: Reliability(np.zeros((8, 3))), "labels must hold the true class"),
    (lambda: Reliability(np.zeros((8, 3)), np.zeros(7, int)), r"labels must be whole numbers of shape \(8,\)"),
    (lambda: Reliability({"a": np.zeros((8, 3)), "b": np.zeros((8, 4))}, np.zeros(8, int)), "with one shape"),
    (lambda: Reliability(np.zeros((8, 3)), np.zeros(8, int), images=np.zeros((3, 8, 8))), r"shape \(8, height"),
])
def test_reliability_says_what_to_give(call, message):
    assert re.search(message, call().panel.error)


def test_too_few_examples_are_told_in_the_widget():
    assert "at least 4 examples" in Reliability(np.eye(3), [0, 1, 2]).panel.error


# layer match

def features(n=20):
    rng = np.random.RandomState(0)
    x = rng.randn(n, 6)
    return {"first": x, "map": rng.randn(n, 2, 3, 3)}, {"a": x[:, :3], "b": np.tanh(x)}


@pytest.mark.parametrize("state", [dict(), dict(hint=True, step=1, seed=3, teacher=1, student=4)])
def test_code_of_layer_match(made, state):
    view = made["match"]
    view.assign(**state)
    space = {}
    exec(view.code(), space)
    assert f"CKA of {space['value']:.2f}" in view.panel.text and f"{space['mean']:+.3f}" in view.panel.text
    assert f"layer of the student is {stored.LAYERS[space['best']]} (" in view.panel.text
    view.reset()


def test_layer_match_of_own_features():
    teacher, student = features()
    view = LayerMatch(teacher, student)
    assert view.panel.error == "" and {"teacher", "student", "klass", "example"} == set(view.panel.values)
    sent = messages(view.fig)
    view.teacher = 0
    assert sent == ["_py2js_update"]
    for view.teacher, view.student in ((0, 0), (0, 1), (1, 0)):
        space = dict(teacher_features=teacher, student_features=student)
        exec(view.code(), space)
        assert f"CKA of {space['value']:.2f}" in view.panel.text
        assert np.isclose(space["value"], view.fig.data[0].z[view.teacher][view.student])
    view.student = 9
    assert view.panel.error == "student must lie in 0..1, got 9"


def test_clicks_choose_pair_and_example(made):
    view = made["match"]
    view.point("click", [(0, [1, 3])])  # a cell of the map, as plotly names it
    assert (view.teacher, view.student) == (1, 3)
    cloud = [k for k, one in enumerate(view.fig.data) if one.xaxis == "x4"][0]
    view.point("click", [(cloud, 17)])
    view.point("click", [(1, 2)])  # a curve: nothing to choose
    assert view.example == 17 and (view.teacher, view.student) == (1, 3)
    view.reset()


@pytest.mark.parametrize("call, message", [
    (lambda t, s: LayerMatch(t["first"], s), "teacher_features must be a dict of arrays"),
    (lambda t, s: LayerMatch(t, None), "student_features must be a dict of arrays"),
    (lambda t, s: LayerMatch(t, {"a": np.zeros(20)}), r"must have shape \(N, ...\)"),
    (lambda t, s: LayerMatch(t, {"a": np.ones((20, 3))}), "the same for all examples"),
    (lambda t, s: LayerMatch(t, {"a": np.full((20, 3), np.nan)}), "holds NaN"),
    (lambda t, s: LayerMatch(t, {"a": s["a"][:9]}), r"the same examples in the same order; got \[9, 20\]"),
    (lambda t, s: LayerMatch(t, s, labels=[1, 2]), r"labels must be whole numbers of shape \(20,\)"),
    (lambda t, s: LayerMatch(t, s, images=np.zeros((2, 8, 8))), r"images must have shape \(20"),
])
def test_layer_match_says_what_to_give(call, message):
    assert re.search(message, call(*features()).panel.error)


def test_layer_match_with_a_thousand_classes():
    teacher, student = features(30)
    y = np.arange(30) * 33
    view = LayerMatch(teacher, student, y, class_names=[f"class {k}" for k in range(1000)])
    view.klass = 0
    assert view.panel.error == "" and "Class class 0 stands out" in view.panel.text


# bug clinic

@pytest.fixture
def clinic():
    return BugClinic()


def press(view, **values):
    view.panel.values = view.panel.values | values


def test_a_right_guess_counts_once_and_a_wrong_one_costs(clinic):
    answer = int(clinic.order[0])
    press(clinic, loss=True)
    press(clinic, guess=(answer + 1) % 8)
    assert clinic.wrong == 1 and "It is not" in clinic.panel.text and clinic.score == 0
    press(clinic, guess=answer)
    assert clinic.score == clinic.won[0] == 10 - 1 - 3 and "6 points" in clinic.panel.text
    press(clinic, guess=(answer + 1) % 8)
    assert clinic.won[0] == 6 and clinic.wrong == 1
    assert clinic.fig.data[-1].text[0] == "6" and clinic.fig.data[-1].y[0] == 6


def test_another_case_has_closed_charts_and_a_solved_one_open_charts(clinic):
    press(clinic, loss=True, teacher=True)
    press(clinic, guess=int(clinic.order[0]))
    press(clinic, case=1)
    assert not clinic.loss and clinic.guess == -1 and "the loss goes" not in clinic.panel.text
    press(clinic, case=0)
    assert clinic.loss and clinic.buffers and clinic.guess == clinic.order[0] and "8 points" in clinic.panel.text
    clinic.reset()
    assert clinic.score == 0 and clinic.won == [-1] * 8


def test_all_cases_can_be_solved(clinic):
    for k in range(8):
        press(clinic, case=k)
        press(clinic, guess=int(clinic.order[k]))
    assert clinic.score == 80 and clinic.panel.error == ""


def test_a_quiz_in_the_middle_can_be_saved(clinic):
    press(clinic, case=2, loss=True)
    press(clinic, guess=int(clinic.order[3]))
    state = json.loads(json.dumps(clinic.state()))
    twin = BugClinic.from_state(state)
    assert twin.state() == state and twin.wrong == 1 and twin.loss and twin.panel.text == clinic.panel.text
    press(twin, guess=int(twin.order[2]))
    assert twin.won[2] == 10 - 1 - 3


def test_a_challenge_follows_the_quiz(clinic):
    task = Challenge(clinic, "Find two.", lambda won, **_: min(1.0, sum(p >= 0 for p in won) / 2))
    press(clinic, guess=int(clinic.order[0]))
    assert task.score == 0.5
    press(clinic, case=1)
    press(clinic, guess=int(clinic.order[1]))
    assert task.reached


def test_code_of_the_clinic_shows_the_charts_and_hides_the_answer(clinic):
    clinic.assign(case=5, seed=3, loss=True, gradient=True, teacher=True, buffers=True)
    space = {}
    exec(clinic.code(), space)
    for k, name in enumerate(("accuracy", "loss", "gradient", "teacher", "drift")):
        assert np.allclose(space[name], clinic.fig.data[3 * k + 2].customdata)
    assert not any(name in clinic.code() for name in stored.BUGS if name != "right")


def test_a_clinic_of_own_runs():
    runs = np.random.RandomState(0).rand(3, 4, 5)
    view = BugClinic(runs, ["fine", "a", "b"], [0, 5, 10, 20], deal_seed=2)
    space = dict(runs=runs[None])
    exec(view.code(), space)
    assert np.allclose(space["accuracy"], view.fig.data[2].customdata) and "seed" not in view.panel.values
    view.guess = int(view.order[0])
    assert f'It is "{view.names[view.order[0]]}": 10 points.' in view.panel.text
    view.case = 7
    assert view.panel.error == "case must lie in 0..2, got 7"


@pytest.mark.parametrize("args, message", [
    ((np.zeros((3, 4)),), r"numbers of shape \(seeds, bugs, steps, 5\).*got float64 \(3, 4\)"),
    ((np.zeros((1, 4, 5)),), "a right run first, one bug or more"),
    ((np.full((2, 4, 5), np.nan),), "hold no accuracy of the student"),
    ((np.zeros((2, 4, 5)), ["a"]), "2 names"),
    ((np.zeros((2, 4, 5)), None, [1]), "steps must hold 4 numbers"),
])
def test_the_clinic_says_what_to_give(args, message):
    assert re.search(message, BugClinic(*args).panel.error)


# distillery

@pytest.mark.parametrize("state", [dict(step=40), dict(data="three spirals", labels=5, T=2.0, seed=4, step=25),
                                   dict(data="rings", noise=0.3, unlabelled=0, width=4, teacher_width=8, step=10)])
def test_code_of_the_distillery(made, state):
    view = made["distillery"]
    view.assign(**state)
    space = {}
    exec(view.code(), space)
    assert np.isclose(space["hard"], view.fig.data[8].y[-1]) and np.isclose(space["distilled"], view.fig.data[9].y[-1])
    assert f"teacher has {space['teacher']:.1f}%" in view.panel.text
    view.reset()


def test_a_change_starts_a_new_race_and_steps_go_on(made):
    view = made["distillery"]
    view.panel._handle_custom_msg({"type": "press", "name": "one"}, [])
    view.panel._handle_custom_msg({"type": "press", "name": "one"}, [])
    race = view._race[1]
    assert view.step == 20 and [h[0] for h in race.history] == [0, 10, 20]
    view.step = 30
    assert view._race[1] is race
    view.labels = 5
    assert view.step == 0 and view._race[1] is not race
    view.step = 40
    view.panel._handle_custom_msg({"type": "press", "name": "again"}, [])
    assert view.step == 0 and "after 0 steps" in view.panel.text
    view.reset()


def test_training_is_heard_between_its_steps_and_can_be_stopped():
    async def use():
        view, seen = Distillery(), []
        view.panel.observe(lambda change: seen.append(change["new"]), "busy")
        view.panel._handle_custom_msg({"type": "press", "name": "train"}, [])
        while view.step < 30:
            await asyncio.sleep(0.001)
        assert view.panel.busy.startswith("training: step")
        view.panel.values = view.panel.values | {"seed": 1}  # another race, and it goes on
        while view.step < 20 or view.seed != 1:
            await asyncio.sleep(0.001)
        view.panel._handle_custom_msg({"type": "stop"}, [])
        await view._work.task
        assert view.panel.busy == "" and 20 <= view.step < 300 and view.panel.error == ""
        return seen
    assert len(asyncio.run(use())) > 3


def test_training_runs_to_the_end_and_again():
    view = Distillery()
    view.press("train")
    assert view.step == 300 and view.panel.busy == "" and len(view.fig.data[8].x) == 31
    before = view.panel.text
    view.press("train")  # from the start
    assert view.panel.text == before
    view.step = 999
    assert view.panel.error == "step must lie in 0..300, got 999"


def test_a_distillery_of_own_points():
    rng = np.random.RandomState(0)
    x = 50 + 20 * rng.randn(120, 2)
    y = (x[:, 0] > 50).astype(int)
    view = Distillery(x, y, class_names=["low", "high"])
    assert view.panel.error == "" and not {"data", "noise"} & set(view.panel.values)
    view.step = 20
    space = dict(points=x, labels=y)
    exec(view.code(), space)
    assert np.isclose(space["distilled"], view.fig.data[9].y[-1]) and view.fig.data[-1].name == "high"
    view.seed = 3
    assert view.panel.error == ""
    assert re.search("class_names must hold 2 names", Distillery(x, y, class_names=["one"]).panel.error)


def test_the_stored_runs_have_what_the_views_show():
    assert {"students", "teacher", "clinic", "layer_cka"} <= set(stored.load())
