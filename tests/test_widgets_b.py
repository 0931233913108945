"""Reliability, layer match, bug clinic and distillery without a browser: data, one message, state, text, code, errors."""
import json

import numpy as np
import pytest

from kdlab.figures import stored
from kdlab.widgets.reliability import Reliability

VIEWS = {"reliability": Reliability}
CHANGES = [  # a control, and a value that it does not have at birth
    ("reliability", "model", 2), ("reliability", "step", 2), ("reliability", "seed", 3), ("reliability", "bins", 20),
    ("reliability", "T", 2.0), ("reliability", "equal_mass", True),
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
    with pytest.raises(ValueError, match=message):
        call()


def test_too_few_examples_are_told_in_the_widget():
    assert "at least 4 examples" in Reliability(np.eye(3), [0, 1, 2]).panel.error


def test_the_stored_runs_have_what_the_views_show():
    assert {"students", "teacher", "clinic", "layer_cka"} <= set(stored.load())
