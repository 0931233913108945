"What holds for every widget, and the gallery that shows them all."
import ast
import itertools
import json
import pkgutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import kdlab as kd
from kdlab import figures, widgets
from kdlab.figures import kit
from kdlab.widgets.experiments import Comparison
from kdlab.widgets.gallery import EXHIBITS, write_gallery, write_index
from kdlab.widgets.kit import KDWidget

ROOT = Path(__file__).resolve().parents[1]
by_module = pytest.mark.parametrize("exhibit", EXHIBITS, ids=lambda x: x.module)
_views = {}


@pytest.fixture
def view(exhibit):
    "One view an exhibit, with nothing computed; back at its start."
    if exhibit.module not in _views: _views[exhibit.module] = exhibit.view()
    _views[exhibit.module].reset()
    return _views[exhibit.module]


def modules(package):
    return [f"{package.__name__}.{m.name}" for m in pkgutil.iter_modules(package.__path__)]


def moves(view):
    "A few other values of each control: (name, value)."
    for c in view.controls(**view.state()):
        others = [v for v in c["values"] if v != view.state().get(c["name"])]
        for value in dict.fromkeys(others[:1] + others[-1:]): yield c["name"], value


def test_every_widget_is_in_the_gallery():
    found = set()
    for name in modules(widgets):
        module = import_module(name)
        found |= {v for v in vars(module).values() if isinstance(v, type) and issubclass(v, KDWidget)
                  and v.__module__ == name and not v.__name__.startswith("_")}
    assert found - {KDWidget, Comparison} == {x.kind for x in EXHIBITS}
    assert len({x.module for x in EXHIBITS}) == len(EXHIBITS) == len({x.title for x in EXHIBITS})
    for x in EXHIBITS: assert getattr(kd, x.name) is x.kind, "public widgets are names of kdlab"


def test_no_figure_and_no_widget_imports_torch():
    names = modules(figures) + modules(widgets)
    code = f"import sys\nfrom importlib import import_module\nfor n in {names}: import_module(n)\nprint('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


@by_module
def test_texts_ask_and_answer(exhibit):
    assert "?" in exhibit.question and "?" in exhibit.prediction and exhibit.conclusion.endswith(".")
    assert exhibit.kind.title and exhibit.kind.caption.endswith(".") and exhibit.kind.__doc__


@by_module
def test_a_sketch_is_the_figure_that_plotly_makes(exhibit, view):
    with kit.sketching(): sketch = view.draw(**view.state())
    assert isinstance(sketch, dict) and sketch["data"]
    whole = kit.plain(view.draw(**view.state()).to_plotly_json())  # plotly drops and renames, and checks each name
    assert kit.changes(sketch, whole) == ({}, {})
    assert json.dumps(sketch["layout"].get("shapes")) == json.dumps(whole["layout"].get("shapes")), "in the same order"


@by_module
def test_each_control_changes_what_is_shown(exhibit, view):
    assert view.panel.error == ""
    shown = lambda: (view.panel.text, json.dumps(view.fig.to_plotly_json(), default=str, sort_keys=True), view.state())
    start, told = shown(), set()
    for name, value in list(moves(view)):
        sent = []
        hear = lambda change: sent.append(change["new"]) if change["new"] else None
        view.fig.observe(hear, "_py2js_update")
        view.panel.values = view.panel.values | {name: value}  # what the browser sends
        view.fig.unobserve(hear, "_py2js_update")
        now = shown()
        assert view.panel.error == "" and len(sent) <= 1, f"{name} = {value}: {view.panel.error}"
        if now[:2] != start[:2] or view.panel.text != start[0]: told.add(name)
        assert view.panel.text and getattr(view, name) == value
        view.reset()
        assert shown() == start, f"{name} = {value} and reset"
    computed = {"classes", "dtype", "log_loss"} if exhibit.action else set()  # they change what is computed later
    assert {c["name"] for c in view.controls(**view.state()) if c["kind"] != "button"} - told <= computed | {"batch"}


@by_module
def test_the_sentence_follows_every_control(exhibit, view):
    if exhibit.action: pytest.skip("says that nothing was computed yet")
    start, told = view.panel.text, set()
    for name, value in list(moves(view)):
        setattr(view, name, value)
        if view.panel.text != start: told.add(name)
        view.reset()
    how_drawn = {c["name"] for c in view.controls(**view.state()) if c["name"].startswith(("log_", "lasso", "page", "order"))}
    assert {c["name"] for c in view.controls(**view.state()) if c["kind"] != "button"} - told <= how_drawn


@by_module
def test_a_state_can_be_kept(exhibit, view):
    for name, value in itertools.islice(moves(view), 3): setattr(view, name, value)
    state, text = json.loads(json.dumps(view.state())), view.panel.text
    again = exhibit.kind.from_state(state, **exhibit.given())
    assert again.state() == view.state() and again.panel.text == text
    with pytest.raises(ValueError, match="has no .'nothing'"): view.assign(nothing=1)


@by_module
def test_controls_can_be_hidden(exhibit, view):
    names = [c["name"] for c in view.controls(**view.state())]
    hidden = exhibit.kind(**exhibit.given(), hide=[*names, "title", "reset"])
    assert hidden.panel.controls == [] and hidden.panel.title == "" and not hidden.panel.can_reset
    with pytest.raises(ValueError, match="hide may hold"): exhibit.kind(**exhibit.given(), hide=["nothing"])


@by_module
def test_the_code_is_python(exhibit, view):
    for name, value in [("", None), *list(moves(view))[:4]]:
        if name: setattr(view, name, value)
        assert ast.parse(view.code()).body


@by_module
def test_a_page_of_each(exhibit, view, tmp_path):
    assert set(exhibit.kind.page_controls) <= {c["name"] for c in view.controls(**view.state())}
    page = view.to_html(tmp_path / "page.html", controls=[], bundle="file").read_text()
    assert f"<h1>{exhibit.title}</h1>" in page and 'src="plotly.min.js"' in page and "http" not in page.split("<script>")[0]
    assert list(tmp_path.glob("*.tmp")) == []


def test_the_gallery_leads_to_its_pages(tmp_path):
    some = [x for x in EXHIBITS if x.module in ("balance", "capacity")]
    pages = list(write_gallery(tmp_path, some))
    assert [p.name for p in pages] == [*(f"{x.module}.html" for x in some), "index.html"]
    index = pages[-1].read_text()
    for x in some: assert f'href="{x.module}.html"' in index and x.question.split("'")[0] in index
    assert (tmp_path / "plotly.min.js").stat().st_size > 1e6
    assert "http" not in write_index(tmp_path).read_text()


def test_a_page_is_not_written_when_the_computation_fails(monkeypatch, tmp_path):
    live = next(x for x in EXHIBITS if x.module == "live")
    broken = live._replace(given=lambda: live.given() | dict(lr="fast"))
    with pytest.raises(RuntimeError, match="LiveRun.train.. failed: "): list(write_gallery(tmp_path, [broken]))
    assert not list(tmp_path.iterdir())
    lens = next(x for x in EXHIBITS if x.module == "temperature")
    with pytest.raises(ValueError, match="at least two classes"):
        list(write_gallery(tmp_path, [lens._replace(given=lambda: dict(logits=[[1.0]]))]))


def test_the_notebook_shows_them_all():
    cells = json.loads((ROOT / "nbs" / "widgets.ipynb").read_text())["cells"]
    prose = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    code = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    at = [prose.index(f"## {x.title}\n") for x in EXHIBITS]
    assert at == sorted(at), "in the order of the list"
    for x in EXHIBITS:
        assert f"kd.{x.name}(" in code
        for text in (x.question, x.prediction, x.conclusion): assert text in prose, f"{x.title}: {text}"
