"What a view does with data that it cannot show, and with the unusual that it can; every widget of the gallery."
import inspect
import re

import numpy as np
import pytest

import kdlab as kd
from kdlab.figures import kit as figures
from kdlab.figures.temperature import temperature_lens
from kdlab.widgets.gallery import EXHIBITS
from kdlab.widgets.kit import KDWidget

N, OPTIONS = 12, ("hide", "T", "epochs", "options", "budget", "deal_seed", "state")
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
    assert view.children == (view.panel,) and view.panel.text == figures.NO_PICTURE
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
    assert view.panel.text == figures.NO_PICTURE and view.fig not in view.children
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


RUNS = np.random.default_rng(0).uniform(0, 100, (3, 2, 2, 2))  # seeds, then what each view reads from it
RISING = {  # argument: a view of it, an example that is shown, what lies outside
    "alphas": (lambda v: kd.AlphaT(scores=RUNS[..., 0], temperatures=[1, 2], alphas=v), [0, 1], [-0.1, 0.5], [0.5, 1.1]),
    "temperatures": (lambda v: kd.AlphaT(scores=RUNS[..., 0], alphas=[0, 1], temperatures=v), [1, 2.5], [0, 1], [-1, 2]),
    "widths": (lambda v: kd.CapacityGap(RUNS[:, :, [0, 1, 0], 0], RUNS[:, 0, 0, 0], v), [2, 4], [0, 4], [-3, 4]),
    "sizes": (lambda v: kd.TransferSet(RUNS, v, ["a", "b"]), [10, 20], [0, 20], [-1, 4]),
    "steps": (lambda v: kd.PlaceboTeacher({"mine": RUNS[..., 0]}, v, ["a", "b"]), [0, 20], [-1, 4], [-5, -4]),
}


@pytest.mark.parametrize("name", RISING)
def test_numbers_along_an_axis_rise_and_make_sense(name):
    view, good, *outside = RISING[name]
    for value in (good, tuple(good), np.array(good)): assert view(value).panel.error == ""
    for value in (*outside, good[::-1], [1, 1], [np.nan, 1], [1, np.inf], ["a", "b"], "ab", [], [None, 1], [False, True]):
        said = tells(view(value), rf"^{name} must be one number or more .*in rising order, such as \[", r"; got \[")
        assert "nan" not in said or value[0] is np.nan
    tells(view(5), f"^{name} must be a list; got int")
    tells(view([*good, 100]), "must|shape")


@pytest.mark.parametrize("view, name, bad, good", [
    (kd.BugClinic, "deal_seed", (-1, 1.5, "x", None), (0, np.int64(3))),
    (kd.CompareKernels, "budget", (-1, np.nan, np.inf, "x", None), (0, 0.3))])
def test_a_number_that_makes_no_sense_is_told(view, name, bad, good):
    for value in good: assert view(**{name: value}).panel.error == ""
    for value in bad: tells(view(**{name: value}), f"^{name} must be a .*number .*; got")


def test_two_teachers_are_enough_for_a_capacity_gap():
    view = kd.CapacityGap(RUNS[:, :, [0, 1, 0], 0], RUNS[:, 0, 0, 0], [2, 4])
    assert view.panel.error == "" and view.width == 1 and view.panel.values["width"] == 1


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
        assert message and figures.NO_PICTURE in page and "<script src" not in page and len(page) < 30_000 and '"controls": []' in page
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


def test_a_view_that_builds_on_another_tells_it_too():
    class Mine(kd.TemperatureLens):
        def __init__(self, logits):
            super().__init__(logits)
            self.most = self.logits.max()
    assert Mine([[1.0, 2.0]]).most == 2
    tells(Mine([[1.0]]), "at least two classes")


def test_show_tells_what_does_not_fit_and_raises_what_it_cannot_read():
    tells(kd.show(np.zeros((3, 1))), "at least two classes")
    tells(kd.show((np.zeros((3, 4)), np.zeros((2, 4))), labels=[0, 1, 2]), "must have one shape")
    with pytest.raises(ValueError, match="a pair is .student, teacher., got 3"): kd.show((1, 2, 3))
    with pytest.raises(ValueError, match="NaN"): temperature_lens([np.nan, 1.0])
