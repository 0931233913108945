"What a view does with data that it cannot show, and with the unusual that it can; every widget of the gallery."
import inspect
import re

import numpy as np
import pytest

from kdlab.widgets.gallery import EXHIBITS
from kdlab.widgets.kit import KDWidget

N, OPTIONS = 12, ("hide", "T", "epochs", "options", "budget", "deal_seed", "state", "alphas", "temperatures")
UNREAD = {("live", "teacher"), ("live", "train"), ("live", "valid")}  # kd.distill reads them, when Start is pressed
BAD = {
    "five dimensions": np.zeros((2, 3, 4, 5, 6)), "no dimension": 7.5, "words": [["a"] * 10] * N, "an object": object(),
    "nothing": [], "uneven rows": [[1, 2], [3]],
}


def good(exhibit, c=10):
    "Arguments that the view can show."
    rng = np.random.default_rng(0)
    t, y = rng.normal(size=(N, c)), rng.integers(0, c, N)
    whole = dict(logits=t, teacher_logits=t, student_logits=t + rng.normal(size=t.shape), labels=y, images=rng.random((N, 8, 8)))
    points = dict(points=rng.normal(size=(40, 2)), labels=np.arange(40) % 2)
    layers = whole | dict(teacher_features={"a": rng.normal(size=(N, 5))}, student_features={"b": rng.normal(size=(N, 5))})
    given = {"distillery": points, "match": layers}.get(exhibit.module, whole)
    given = {name: value for name, value in given.items() if name in arguments(exhibit)}
    return given if {"logits", "teacher_logits", "points", "teacher_features"} & set(given) else exhibit.given()


def arguments(exhibit):
    return [p for p in inspect.signature(exhibit.kind).parameters if p not in OPTIONS]


def of_logits(*wanted):
    return [(x, name) for x in EXHIBITS for name in arguments(x) if name in (wanted or ("logits", "teacher_logits", "student_logits"))]


def tells(view, *words):
    "The view has no picture and no controls, and says the words."
    assert isinstance(view, KDWidget) and view.panel.controls == [] == view.controls() and not view.panel.can_reset
    assert view.children == (view.panel,) and view.panel.text.startswith("There is no picture.")
    for word in words: assert re.search(word, view.panel.error), view.panel.error
    assert view.panel.error[0].islower() and "Error" not in view.panel.error, "not a traceback's words"
    return view.panel.error


ids = lambda pairs: [f"{x.module}-{name}" for x, name in pairs]
logits = pytest.mark.parametrize("exhibit, name", of_logits(), ids=ids(of_logits()))
READ = [(x, name) for x in EXHIBITS for name in arguments(x) if (x.module, name) not in UNREAD]


@pytest.mark.parametrize("exhibit, name", READ, ids=ids(READ))
def test_a_view_of_bad_data_says_what_to_give(exhibit, name):
    start = good(exhibit)
    for what, value in BAD.items():
        view = exhibit.kind(**start | {name: value})
        harmless = name in ("ids", "class_names", "measured") or exhibit.module == "cover" and name == "logits"
        if view.problem is None and harmless: continue  # anything that can be read as a name is one
        assert view.problem is not None, what
        tells(view)
        with pytest.raises(ValueError, match=re.escape(view.panel.error)): view.code()
        view.assign(**view.state())
        view.reset()
        assert view.panel.error, "moving what is there does not help"


@logits
def test_wrong_shape(exhibit, name):
    tells(exhibit.kind(**good(exhibit) | {name: np.zeros((2, 3, 4, 5))}), name, r"shape \(N, C\)", r"got float64 \(2, 3, 4, 5\)|got .*4, 5")


@logits
def test_one_class(exhibit, name):
    tells(exhibit.kind(**good(exhibit) | {name: np.zeros((N, 1))}), name, "at least two classes", r"Give \(N, C\)")


@logits
def test_nan(exhibit, name):
    view = exhibit.kind(**good(exhibit) | {name: np.full((N, 10), np.nan)})
    assert "There is no picture." in view.panel.text and view.fig not in view.children
    assert re.search("NaN", view.panel.error) and re.search("[Gg]ive finite|leave these rows out", view.panel.error)


@logits
def test_one_row_of_nan(exhibit, name):
    "A view of one example at a time shows the others."
    start = good(exhibit)
    start[name] = start[name].copy()
    start[name][3, 2] = np.nan
    view = exhibit.kind(**start)
    if "example" in view.panel.values:
        assert view.panel.error == "" and view.fig in view.children
        view.example = 3
        assert "NaN" in view.panel.error and "choose another example" in view.panel.error
        assert "example" in view.panel.values, "the way out is open"
        view.example = 0
    assert bool(view.panel.error) == (view.fig not in view.children)


PICTURED = [(x, name) for x, name in of_logits("images") if x.module != "placebo"]  # its pictures come with its targets


@pytest.mark.parametrize("exhibit, name", PICTURED, ids=ids(PICTURED))
def test_missing_and_wrong_images(exhibit, name):
    start = good(exhibit)
    assert exhibit.kind(**start | {name: None}).panel.error == ""
    tells(exhibit.kind(**start | {name: np.zeros((5, 8, 8))}), r"images must have shape \(12, height, width\)", "got .5, 8, 8.")
    tells(exhibit.kind(**start | {name: np.zeros((N, 8, 8, 3))}), "one grey image per example")


NAMED = [(x, name) for x, name in of_logits("class_names") if {"logits", "teacher_logits"} & set(arguments(x))]


@pytest.mark.parametrize("exhibit, name", NAMED, ids=ids(NAMED))
def test_a_thousand_classes(exhibit, name):
    start = good(exhibit, 1000)
    view = exhibit.kind(**start, class_names=[f"a class of long name {k}" for k in range(1000)])
    assert view.panel.error == "" and len(view.panel.text) < 700
    for name, axis in view.fig.layout.to_plotly_json().items():
        if name[1:5] == "axis": assert len(axis.get("ticktext", ())) <= 21, name
    lists = [c for c in view.panel.controls if c["kind"] == "choice"]
    assert all(len(c["values"]) <= 1001 for c in lists)


def test_what_does_not_exist_raises():
    for x in EXHIBITS:
        with pytest.raises(TypeError if x.module not in ("precision", "live") else (ValueError, TypeError)):
            x.kind(**x.given() | dict(nothing=1), hide=["nothing"])


def test_half_of_what_belongs_together_is_told():
    for x in EXHIBITS:
        names = [n for n in arguments(x) if n in ("student_logits", "labels", "images", "sizes", "widths", "steps", "student_features")]
        if x.module in ("live", "kernels", "precision", "temperature", "gap", "cover"): continue
        for name in names: tells(x.kind(**{name: good(x).get(name, [1])}), f"{name} without", "as well, or leave")


def test_the_page_and_the_converted_notebook_say_it_too(tmp_path, monkeypatch):
    for x in EXHIBITS:
        first = next((n for n in arguments(x) if (x.module, n) not in UNREAD), None)
        if first is None: continue
        view = x.kind(**good(x) | {first: 7.5})
        page = view.to_html(tmp_path / "page.html").read_text()
        message = re.search(r'id="kd-error" role="alert">(.+?)</p>', page)[1]
        assert message and "<script src" not in page and len(page) < 30_000 and '"controls": []' in page
        monkeypatch.setenv("KDLAB_STATIC", "1")
        out = view._repr_mimebundle_()
        monkeypatch.delenv("KDLAB_STATIC")
        assert f'role="alert">{message}' in out["text/html"] and view.panel.error in out["text/plain"]


def test_a_page_of_which_some_states_cannot_be_drawn(tmp_path):
    lens = next(x for x in EXHIBITS if x.module == "temperature")
    start = good(lens)
    start["logits"][3] = np.nan
    page = lens.kind(**start).to_html(tmp_path / "lens.html", controls=["example"], bundle="file").read_text()
    assert page.count("choose another example") == 1 and 'id="kd-error" role="alert" hidden' in page
    assert "plotly.min.js" in page
