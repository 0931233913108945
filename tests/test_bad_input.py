"What a view does with data that it cannot show, and with the unusual that it can; every widget of the gallery."
import inspect
import re

import numpy as np
import pytest

import kdlab as kd
from kdlab.figures import kit as figures
from kdlab.figures.temperature import temperature_lens
from kdlab.widgets.challenge import closeness
from kdlab.widgets.gallery import EXHIBITS
from kdlab.widgets.kit import KDWidget

N, OPTIONS = 12, ("hide", "T", "epochs", "options", "budget", "deal_seed", "state")
UNREAD = {("live", "teacher"), ("live", "train"), ("live", "valid")}  # kd.distill reads them, when Start is pressed
NAN, INF = float("nan"), float("inf")
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
    "steps of the clinic": (lambda v: kd.BugClinic(np.ones((1, 2, 2, 5)), steps=v), [0, 20], [-1, 4], [-5, -4]),
}


@pytest.mark.parametrize("name", RISING)
def test_numbers_along_an_axis_rise_and_make_sense(name):
    view, good, *outside = RISING[name]
    name = name.split()[0]
    for value in (good, tuple(good), np.array(good)): assert view(value).panel.error == ""
    for value in (*outside, good[::-1], [1, 1], [np.nan, 1], [1, np.inf], ["a", "b"], "ab", [], [None, 1], [False, True]):
        said = tells(view(value), rf"^{name} must be one number or more .*in rising order, such as \[", r"; got \[")
        assert "nan" not in said or value[0] is np.nan
    tells(view(5), f"^{name} must be a list; got int")
    tells(view([*good, 100]), "must|shape")


@pytest.mark.parametrize("view, name, bad, good", [
    (kd.BugClinic, "deal_seed", (-1, 1.5, "x", None, True, NAN, [], 2**32), (0, np.int64(3))),
    (kd.CompareKernels, "budget", (-1, np.nan, np.inf, "x", None, True, [], 10**6), (0, 0.3))])
def test_a_number_that_makes_no_sense_is_told(view, name, bad, good):
    for value in good: assert view(**{name: value}).panel.error == ""
    for value in bad: tells(view(**{name: value}), f"^{name} must be a .*number .*; got")


def test_names_are_told_by_their_argument_and_anything_else_is_read_as_text():
    clinic = np.ones((1, 2, 2, 5))
    tells(kd.BugClinic(clinic, names=["a"]), "^names must hold 2 names, .*; got 1")
    tells(kd.BugClinic(clinic, names=5), "^names must be a list; got int")
    for view in (kd.TransferSet(RUNS, [1, 2], [None, []]), kd.PlaceboTeacher({"mine": RUNS[..., 0]}, [1, 2], [None, []])):
        assert view.panel.error == "" and "None" in view.panel.text


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


WRONG = {  # of each kind of state: what is allowed, what is not
    "Float": ("a finite number", ("x", None, NAN, INF, -INF, np.inf, True, [], {}, np.ones(3), 10**400, object())),
    "Int": ("a whole number", ("x", None, NAN, INF, 0.5, np.float32(0.5), True, [], {}, np.ones(3))),
    "Bool": ("True or False", ("x", None, NAN, 2, -1, 0.5, [], {})),
    "Unicode": ("text", (None, NAN, 5, True, [], {}, ["x"])),
    "List": ("a list of whole numbers", ("x", None, NAN, 5, {}, ["x"], [0.5], [None], np.array([0.5]))),
}
every = pytest.mark.parametrize("exhibit", EXHIBITS, ids=lambda x: x.module)


@every
def test_a_state_of_the_wrong_kind_raises_and_changes_nothing(exhibit):
    view = exhibit.kind(**good(exhibit))
    start, text = view.state(), view.panel.text
    for name, trait in view.traits(kd=True).items():
        wanted, values = WRONG[type(trait).__name__]
        for value in values:
            for change in (lambda: setattr(view, name, value), lambda: view.assign(**{name: value})):
                with pytest.raises(ValueError, match=rf"^{name} must be {wanted}; got ") as told: change()
                assert len(str(told.value)) < 120
    assert view.state() == start and view.panel.text == text and view.panel.error == ""


@every
def test_a_state_beyond_its_control_is_told(exhibit):
    view = exhibit.kind(**good(exhibit))
    for c in view.panel.controls:
        start = view.state().get(c["name"], 0.0)
        if isinstance(start, float | bool): continue  # or a button
        for value in ("nothing",) if isinstance(start, str) else (min(c["values"]) - 1, max(c["values"]) + 1, 10**30):
            setattr(view, c["name"], value)
            assert re.search(rf"^{c['name']} must (lie in -?\d+\.\.\d+|be one of )", view.panel.error), (c["name"], value)
            assert repr(value) in view.panel.error
            view.reset()
            assert view.panel.error == ""


@pytest.mark.parametrize("view, name, values", [
    (kd.DKDSplit, "T", (0, -1)), (kd.DKDSplit, "alpha", (-1,)), (kd.DKDSplit, "beta", (-1,)), (kd.DKDSplit, "confidence", (-1, 1)),
    (kd.Distillery, "noise", (-0.1, 1e6)), (kd.Precision, "distance", (0, -1)), (kd.Precision, "T", (0, -1)),
    (kd.AlphaT, "alpha", (-0.1, 1.1)), (kd.AlphaT, "T", (0, -1)), (kd.TSquaredBalance, "T", (0, -1)), (kd.DarkKnowledge, "T", (0, -1)),
    (kd.Simplex, "teacher_first", (-1, 0, 1)), (kd.Simplex, "student_split", (0, 1, 2)), (kd.Reliability, "T", (0, -1)),
    (kd.CoveringOrSeeking, "separation", (-1, 99)), (kd.CoveringOrSeeking, "weight", (0, 1)), (kd.BugClinic, "wrong", (-1,)),
    (kd.BugClinic, "won", ([], [-1], [-2] * 8, [11] * 8))])
def test_a_number_out_of_its_range_is_told(view, name, values):
    view = view()
    for value in values:
        setattr(view, name, value)
        assert view.panel.error.startswith(f"{name} must "), (value, view.panel.error)
        assert str(value) in view.panel.error
        view.reset()
        assert view.panel.error == ""


def test_arguments_of_the_wrong_kind_raise_when_a_view_is_made():
    logits = np.zeros((3, 4))
    for value in ("x", None, NAN, INF, [], {}):
        with pytest.raises(ValueError, match="^T must be a finite number; got "): kd.TemperatureLens(logits, T=value)
        with pytest.raises(ValueError, match="^distance must be a finite number; got "): kd.Precision(distance=value)
    with pytest.raises(ValueError, match="^dtype must be text; got 16"): kd.Precision(dtype=16)
    with pytest.raises(ValueError, match="^example must be a whole number; got 'x'"): kd.TemperatureLens.from_state(dict(example="x"), logits)
    with pytest.raises(ValueError, match="^state must be a dict, .*; got str"): kd.TemperatureLens.from_state("T", logits)
    for value in (None, 5, NAN):
        with pytest.raises(ValueError, match="^hide must be a list; got "): kd.TemperatureLens(logits, hide=value)
    for value in (["slider"], "slider", [["T"]], [None], {"a": 1}):
        with pytest.raises(ValueError, match="^hide may hold .*'example'.*, got "): kd.TemperatureLens(logits, hide=value)


def test_numbers_of_numpy_and_a_lone_name_are_taken():
    lens = kd.TemperatureLens(np.zeros((3, 4)), T=np.float32(2), hide="example")
    lens.example, lens.log_axis = np.int64(2), np.True_
    assert lens.state() == dict(T=2.0, example=2, log_axis=True) and type(lens.example) is int and lens.panel.error == ""
    assert lens.hidden == ["example"] and [c["name"] for c in lens.panel.controls] == ["T", "log_axis"]
    gap = kd.TeacherStudentGap(np.eye(4), np.eye(4), [0, 1, 2, 3])
    gap.picked = np.array([1, 2])
    gap.assign(picked=np.array([1, 2]))
    assert gap.picked == [1, 2] and gap.panel.error == ""
    gap.picked = [1, 4]
    assert gap.panel.error == "picked must hold rows in 0..3; got [1, 4]"


@pytest.mark.parametrize("epochs", ["x", None, NAN, INF, -1, 0, 1.5, True, [], {}])
def test_epochs_of_a_live_run(epochs):
    net = type("Net", (), dict(state_dict=lambda self: {}))()
    assert kd.LiveRun(net, None, [], epochs=3).panel.text == "3 epochs to go."
    tells(kd.LiveRun(net, None, [], epochs=epochs), rf"^epochs must be a whole number of at least 1, .*; got {re.escape(repr(epochs))}")


SCORES = {"alone": [1.0, 2.0], "taught": [2.0, 3.5]}


@pytest.mark.parametrize("name, values", [
    ("scores", ("x", None, 5, [], {}, {1: [1.0]}, {"a": []}, {"a": "x"}, {"a": [1, NAN]}, {"a": [[1]]}, {"a": ["x"]}, {"a": [1], "b": [1, 2]})),
    ("differences", ("x", 5, [], {"nobody": 1}, {"taught": "x"}, {"taught": 1.5})), ("guess", ("x", 5, [], {"alone": "x"}, {"alone": INF}, {"alone": [1]}, {"nobody": 1})),
    ("base", (None, 5, [], {})), ("unit", (None, 5, [])), ("title", (None, 5, []))])
def test_a_comparison_of_what_cannot_be_compared_says_so(name, values):
    for value in values:
        view = kd.Comparison(**dict(scores=SCORES) | {name: value})
        assert re.search(rf"^{name}(\[.+\])? (must|names)", view.panel.error), (value, view.panel.error)


def test_a_challenge_and_a_link_say_what_they_need():
    lens, half = kd.TemperatureLens(np.zeros((3, 4))), lambda **state: 0.5
    for wrong, what in (({"view": 5}, "a view must be a widget"), ({"question": 5}, "question must be text; got int"),
                        ({"goal": "x"}, "goal must be a function of the state"), ({"answer": None}, "answer must be text")):
        with pytest.raises(ValueError, match=what): kd.Challenge(**dict(view=lens, question="q", goal=half) | wrong)
    for value in (None, "x", NAN, [], np.ones(2)):
        with pytest.raises(ValueError, match="goal must return a number between 0 and 1"): kd.Challenge(lens, "q", lambda **state: value)
    assert [kd.Challenge(lens, "q", lambda **state: v).score for v in (True, np.True_, np.float32(0.5), -INF, INF)] == [1, 1, 0.5, 0, 1]
    with pytest.raises(ValueError, match=r"^name must be text; got list"): kd.link(lens, lens, name=["T"])
    with pytest.raises(ValueError, match="two views or more"): kd.link(lens, name="T")
    with pytest.raises(ValueError, match="must be a widget of kdlab"): kd.link(lens, 5, name="T")
    for name in ("goal", "width", "tolerance"):
        for value in ("x", None, NAN, INF, []):
            with pytest.raises(ValueError, match=f"{name} must be a finite number; got"): closeness(**dict(value=1, goal=1, width=1) | {name: value})
    with pytest.raises(ValueError, match="value must be a .*number"): closeness("x", 1, 1)
    assert closeness(NAN, 1, 1) == closeness(INF, 1, 1) == 0 and closeness(1, 1, 1) == 1
