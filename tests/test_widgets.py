"""Live views without a browser: a trait moves the data and the sentence, in one message; state, code and export."""
import json
import re
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pytest
from plotly.basedatatypes import Undefined

from kdlab.figures.gap import CHOICES
from kdlab.widgets import kit
from kdlab.widgets.gap import TeacherStudentGap
from kdlab.widgets.temperature import TemperatureLens

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    y = rng.integers(10, size=60)
    teacher = rng.normal(size=(60, 10)) + 3 * np.eye(10)[y]
    student = rng.normal(size=(60, 10)) + 1.5 * np.eye(10)[y]
    return dict(teacher=teacher, student=student, y=y, images=rng.random((60, 8, 8)))


@pytest.fixture
def lens(arrays):
    return TemperatureLens(arrays["teacher"], images=arrays["images"], labels=arrays["y"])


@pytest.fixture
def gap(arrays):
    return TeacherStudentGap(arrays["teacher"], arrays["student"], arrays["y"], images=arrays["images"])


def messages(figure):
    "A list that grows with each edit that the figure sends to the browser."
    sent = []
    names = [n for n in figure.trait_names() if n.startswith("_py2js_")]
    assert len(names) >= 7
    figure.observe(lambda change: sent.append(change["name"]) if change["new"] else None, names)
    return sent


def sends(widget, monkeypatch):
    "A list of what the widget sends over its comm."
    sent = []
    monkeypatch.setattr(widget, "send_state", lambda key=None: sent.append(key))
    return sent


def softmax(z, T):
    e = np.exp(z / T - (z / T).max())
    return e / e.sum()


def test_the_slider_moves_bars_markers_and_sentence(lens, arrays):
    lens.panel.values = lens.panel.values | {"T": 8.0}  # what the browser sends
    p = softmax(arrays["teacher"][0], 8)
    assert lens.T == 8 and np.allclose(lens.fig.data[0].y, p) and lens.fig.data[2].x == (8,)
    assert np.isclose(lens.fig.data[2].y[0], -(p * np.log(p)).sum())
    assert lens.panel.text.startswith(f"At T = 8 the teacher gives {p.argmax()} a probability of {p.max():.2f}")
    lens.example = 3
    assert np.allclose(lens.fig.data[0].y, softmax(arrays["teacher"][3], 8))
    assert np.allclose(lens.fig.data[7].z, arrays["images"][3])
    lens.log_axis = True
    assert lens.fig.layout.yaxis2.type == "log"


@pytest.mark.parametrize("name, value", [("T", 1.0), ("example", 5), ("log_axis", True)])
def test_one_message_a_change_in_the_lens(lens, monkeypatch, name, value):
    sent, panel = messages(lens.fig), sends(lens.panel, monkeypatch)
    setattr(lens, name, value)
    assert sent == ["_py2js_update"] and len(panel) == 1
    setattr(lens, name, value)
    assert len(sent) == 1


def test_an_update_names_every_value_that_it_sends(lens):
    "plotly's sentinel for 'as it was' would be written into the data that later views show."
    sent = []
    lens.fig.observe(lambda change: sent.append(change["new"]), "_py2js_update")
    lens.example = 5  # new colours for the bars, the same for the markers
    color = sent[0]["style_data"]["marker.color"]
    assert sent[0]["style_traces"] == list(range(8)) and color[4] == "#0072B2" and color[6] == "#D55E00"
    assert not any(value is Undefined for values in sent[0]["style_data"].values() for value in values)


def test_few_things_go_over_the_wire(lens):
    sent = []
    lens.fig._send = lambda message, buffers=None: sent.append(list(message["state"]))
    lens.T = 8.0
    assert sent == [["_py2js_update"], ["_alt"]]
    assert lens.fig._py2js_update is None  # a page that is opened now does not get it again


def test_an_edit_by_hand_outlives_the_next_update(lens):
    lens.fig.update_layout(height=700)
    lens.T = 8.0
    assert lens.fig.layout.height == 700 and lens.fig.get_state()["_widget_layout"]["height"] == 700


def test_a_property_that_goes_leaves_the_live_figure():
    live = kit.KDFigure()
    for marker in (dict(color="red"), {}, dict(size=3)):
        kit.show(live, go.Figure([dict(type="scatter", y=[1], marker=marker)], dict(xaxis_title_text="x" if marker else None)))
        state = live.get_state()
        assert state["_widget_data"][0].get("marker", {}) == marker
        assert state["_widget_layout"].get("xaxis", {}).get("title", {}) == (dict(text="x") if marker else {})


@pytest.mark.parametrize("name, value", [
    ("which", "disagree"), ("klass", 3), ("page", 1), ("lasso", True), ("picked", [1, 2])])
def test_one_message_a_change_in_the_gap(gap, name, value):
    sent = messages(gap.fig)
    setattr(gap, name, value)
    assert sent == ["_py2js_update"]
    gap.reset()
    assert len(sent) == 2


def test_several_values_are_one_message(gap):
    sent = messages(gap.fig)
    gap.assign(which="disagree", klass=3, page=0)
    gap.assign(which="disagree")
    assert sent == ["_py2js_update"]


def test_the_saved_state_is_that_of_the_live_figure():
    fig = kit.KDFigure()
    fig.add_scatter(y=[1, 2])
    fig.add_bar(y=[3])
    fig.data[0].y = [5, 6]
    fig.update_layout(title_text="late")
    state = fig.get_state()
    assert [t["y"] for t in state["_widget_data"]] == [[5, 6], [3]]
    assert state["_widget_layout"]["title"]["text"] == "late"
    assert state["_view_name"] and state["_esm"]  # embedding drops what counts as a default
    assert fig.get_state("_config").keys() == {"_config"}
    embedded = fig.get_manager_state(widgets=[fig], drop_defaults=True)["state"][fig.model_id]["state"]
    assert len(embedded["_widget_data"]) == 2 and embedded["_view_name"]


def test_figures_share_one_bundle(lens, gap):
    assert lens.fig._bundle is gap.fig._bundle and len(lens.fig._bundle.source) > 1e6
    assert len(json.dumps(lens.fig.get_state(), default=str)) < 60_000
    old = lens.fig._bundle
    old.close()
    assert kit.KDFigure()._bundle is not old


def test_the_stock_figure_serves_where_a_private_name_is_gone(monkeypatch):
    assert kit._can_share() and issubclass(kit.KDFigure, go.FigureWidget)
    monkeypatch.delattr(kit.plotly.basewidget.BaseFigureWidget, "_widget_data")
    assert not kit._can_share()


def test_show_replaces_other_traces():
    live = kit.KDFigure([dict(type="bar", y=[1])])
    kit.show(live, go.Figure([dict(type="scatter", y=[1, 2]), dict(type="bar", y=[3])], dict(height=99)))
    assert [t.type for t in live.data] == ["scatter", "bar"] and live.layout.height == 99


@pytest.mark.parametrize("T, example", [(0.25, 0), (4.0, 7), (20.0, 59)])
def test_code_of_the_lens_gives_the_same_numbers(lens, arrays, T, example):
    lens.assign(T=T, example=example)
    space = {"logits": arrays["teacher"].tolist()}
    exec(lens.code(), space)
    assert np.allclose(space["p"], lens.fig.data[0].y) and np.isclose(space["entropy"], lens.fig.data[2].y[0])
    assert np.isclose(space["top1"], lens.fig.data[4].y[0]) and np.isclose(space["top3"], lens.fig.data[6].y[0])
    assert f"gives {space['order'][0]} a" in lens.panel.text


@pytest.mark.parametrize("which", CHOICES)
@pytest.mark.parametrize("klass, picked", [(-1, []), (3, []), (-1, list(range(20)))])
def test_code_of_the_gap_gives_the_same_choice(gap, arrays, which, klass, picked):
    gap.assign(which=which, klass=klass, picked=picked)
    space = dict(teacher_logits=arrays["teacher"], student_logits=arrays["student"], labels=arrays["y"])
    exec(gap.code(), space)
    assert np.allclose(space["gap"], gap.fig.data[5].y)
    clear = sum(sum(gap.fig.data[k].marker.color) for k in range(1, 5))
    assert len(space["shown"]) == clear
    assert re.search(rf"Shown: (all )?{clear}\b", gap.panel.text)


def test_state_round_trip_and_reset(gap, lens, arrays):
    gap.assign(which="disagree", klass=2, picked=[1, 5])
    state = json.loads(json.dumps(gap.state()))
    twin = TeacherStudentGap.from_state(state, arrays["teacher"], arrays["student"], arrays["y"])
    assert twin.state() == gap.state() and twin.panel.text == gap.panel.text
    twin.reset()
    assert twin.state() == dict(which="all", klass=-1, page=0, lasso=False, picked=[])
    warm = TemperatureLens(arrays["teacher"], T=2.0)
    warm.assign(T=9.0, example=3)
    warm.panel._handle_custom_msg({"type": "reset"}, [])  # the button
    assert warm.state() == dict(T=2.0, example=0, log_axis=False)
    with pytest.raises(ValueError, match="has no .'temperature'.; its state is .'T', 'example', 'log_axis'."):
        warm.assign(temperature=3)


def test_hidden_controls_are_not_sent(arrays):
    lens = TemperatureLens(arrays["teacher"], hide=["example", "reset", "title"])
    assert [c["name"] for c in lens.panel.controls] == ["T", "log_axis"] and set(lens.panel.values) == {"T", "log_axis"}
    assert lens.panel.title == "" and not lens.panel.can_reset
    with pytest.raises(ValueError, match="hide may hold .*'example'.*got .'slider'."):
        TemperatureLens(arrays["teacher"], hide=["slider"])


def test_a_click_and_a_box_filter_the_other_views(gap, arrays):
    point = lambda trace, i: dict(trace_indexes=[trace], point_indexes=[i], xs=[0], ys=[0])
    gap.fig._js2py_pointsCallback = dict(event_type="plotly_click", points=point(5, 4))
    assert gap.klass == 4 and "of class 4" in gap.panel.text
    gap.fig._js2py_pointsCallback = dict(event_type="plotly_click", points=point(5, 4))
    assert gap.klass == -1
    gap.page = 2
    box = dict(type="box", selector_state=dict(xrange=[0, 1], yrange=[0, 1]))
    both = dict(trace_indexes=[1, 2], point_indexes=[0, 0], xs=[0, 0], ys=[0, 0])
    gap.fig._js2py_pointsCallback = dict(event_type="plotly_selected", points=both, selector=box)
    first = [int(np.flatnonzero(gap.numbers["group"] == group)[0]) for group in (0, 1)]
    assert gap.picked == sorted(first) and gap.page == 0 and len(gap.fig.data[6].text) == 2
    none = dict(trace_indexes=[], point_indexes=[], xs=[], ys=[])
    gap.fig._js2py_pointsCallback = dict(event_type="plotly_selected", points=none)  # said when an outline goes
    assert gap.picked == sorted(first)
    gap.fig._js2py_pointsCallback = dict(event_type="plotly_selected", points=none, selector=box)
    assert gap.picked == []


def test_the_outline_of_a_selection_is_cleared(gap):
    sent = messages(gap.fig)
    outline = [dict(type="rect", xref="x", yref="y", x0=0, x1=1, y0=0, y1=1)]
    gap.fig._js2py_relayout = dict(relayout_data={"selections": outline}, source_view_id="v")
    assert sent[-1] == "_py2js_relayout" and not gap.fig.to_plotly_json()["layout"].get("selections")
    json.dumps(gap.fig.get_state()["_widget_layout"])


def test_pages_follow_the_choice(gap):
    pages = lambda: len(next(c for c in gap.panel.controls if c["name"] == "page")["values"])
    assert pages() == 4  # 60 examples, 16 a page
    gap.page = 3
    gap.panel.values = gap.panel.values | {"which": "both wrong"}
    assert gap.page == 0 and pages() == 1


def test_an_error_is_shown_and_goes_again(lens, arrays):
    lens.T = -1.0
    assert lens.panel.error == "T must be > 0, got -1.0" and lens.panel.text == ""
    lens.T = 2.0
    assert lens.panel.error == "" and lens.panel.text.startswith("At T = 2 ")
    broken = arrays["teacher"].copy()
    broken[2, 4] = np.nan
    lens = TemperatureLens(broken)
    lens.example = 2
    assert "hold NaN or infinity" in lens.panel.error and "choose another example" in lens.panel.error
    lens.example = 99
    assert lens.panel.error == "example must lie in 0..59, got 99"
    first = TemperatureLens(broken[2:3])
    assert "NaN" in first.panel.error
    first.logits[0, 4] = 0.0
    first.T = 1.0
    assert first.panel.error == "" and len(first.fig.data) == 7


def test_any_failure_of_a_view_is_shown(lens, monkeypatch):
    monkeypatch.setattr(lens, "draw", lambda **state: 1 / 0)
    lens.T = 1.0
    assert lens.panel.error == "ZeroDivisionError: division by zero"


@pytest.mark.parametrize("call, message", [
    (lambda a: TemperatureLens(a["teacher"][:, :1]), "at least two classes"),
    (lambda a: TemperatureLens(a["teacher"], images=a["images"][:5]), r"images must have shape \(60, height, width\)"),
    (lambda a: TemperatureLens(a["teacher"], labels=a["y"] + 5), "labels must lie in 0..9"),
    (lambda a: TeacherStudentGap(a["teacher"], a["student"][:, :5], a["y"]), "must have one shape"),
    (lambda a: TeacherStudentGap(a["teacher"], a["student"], a["y"], ids=[1]), "ids must hold 60 names"),
    (lambda a: TeacherStudentGap(a["teacher"] * np.nan, a["student"], a["y"]), "teacher_logits hold NaN"),
])
def test_wrong_arguments_are_told(arrays, call, message):
    assert re.search(message, call(arrays).panel.error)


def test_a_thousand_classes_and_no_pictures():
    z = np.random.default_rng(0).normal(size=(3, 1000))
    lens = TemperatureLens(z, labels=[1, 2, 3])
    assert len(lens.fig.data[0].y) == 13 and lens.panel.error == ""
    gap = TeacherStudentGap(z, z[::-1], [1, 2, 3], class_names=[f"class {k}" for k in range(1000)])
    assert len(gap.fig.data[5].y) == 20 and gap.panel.error == ""


def test_the_page_holds_all_states_and_loads_nothing(lens, gap, tmp_path):
    lens.T = 4.5  # between two steps of the slider: it becomes one
    html = lens.to_html(tmp_path / "lens.html", bundle="file").read_text()
    assert "http" not in html and (tmp_path / "plotly.min.js").exists()
    blob = json.loads(re.search(r'id="kd-data">(.*?)</script>', html, re.S)[1])
    T, log = blob["controls"]
    assert 4.5 in T["values"] and len(blob["states"]) == len(T["values"]) * 2
    assert blob["values"] == {"T": 4.5, "log_axis": False}
    at = T["values"].index(8.0)
    lens.T = 8.0
    assert np.allclose(blob["states"][f"{at},0"]["data"]["0"]["y"], lens.fig.data[0].y)
    assert blob["states"][f"{at},0"]["text"] == lens.panel.text
    only = gap.to_html(tmp_path / "gap.html", controls=["which"]).read_text()
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", only)
    with pytest.raises(ValueError, match="at most 1000 states"):
        lens.to_html(tmp_path / "x.html", controls=["T", "example"])
    with pytest.raises(ValueError, match="controls may hold"):
        lens.to_html(tmp_path / "x.html", controls=["temperature"])


def test_figures_and_widgets_never_import_torch_and_figures_no_widgets():
    for file in (ROOT / "kdlab").glob("figures/*.py"):
        assert not re.search(r"^\s*(import|from) (torch|ipywidgets|anywidget)", file.read_text(), re.M), file
    for file in (ROOT / "kdlab").glob("widgets/*.py"):
        assert not re.search(r"^\s*(import|from) torch", file.read_text(), re.M), file
