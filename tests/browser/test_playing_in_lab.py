"""Views that are played with, in a real JupyterLab by keyboard and pointer: training with Stop, a quiz, clicks, axe."""
from importlib.util import find_spec

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from lab import need

VIEWS = ("Reliability", "LayerMatch", "BugClinic", "Distillery")
PLOTS = "[...document.querySelectorAll('.js-plotly-plot')]"
RELIABILITY, MATCH, CLINIC, DISTILLERY = range(4)


@pytest.fixture(scope="module")
def book(lab, browser, tmp_path_factory):
    cells = [new_code_cell(f"import kdlab as kd\nkd.{name}()") for name in VIEWS]
    notebook = new_notebook(cells=cells)
    notebook.metadata.kernelspec = dict(name="python3", display_name="python3", language="python")
    path = tmp_path_factory.mktemp("source") / "playing.ipynb"
    nbformat.write(notebook, path)
    book = lab.open(browser, path, width=1360, height=4600)
    book.run_all()
    drawn(book)
    return book


def drawn(book):
    ready = f"{PLOTS}.filter(p => p.querySelector('.main-svg')).length === {len(VIEWS)}"
    book.page.wait_for_function(ready, timeout=60_000)


def words(book, view): return book.page.locator(".kd-text").nth(view).text_content()


def changed(book, view, before):
    "The sentence, once it is a new one."
    book.page.wait_for_function("([i, was]) => document.querySelectorAll('.kd-text')[i].textContent !== was",
                                arg=[view, before])
    return words(book, view)


def press(book, view, control, key):
    "Press a key on a control, and wait for the new sentence."
    before = words(book, view)
    book.page.locator(".kd-widget").nth(view).locator(control).press(key)
    return changed(book, view, before)


def click(book, view, axis, x, y):
    "Click at a place of a subplot, in its own coordinates, and wait for the new sentence."
    before = words(book, view)
    place = f"""([x, y]) => {{ const p = {PLOTS}[{view}], box = p.getBoundingClientRect(), l = p._fullLayout;
        const h = l['xaxis{axis}'], v = l['yaxis{axis}'];
        return [box.x + h._offset + h.l2p(x), box.y + v._offset + v.l2p(y)] }}"""
    at = book.page.evaluate(place, [x, y])
    book.page.mouse.move(*at)
    book.page.wait_for_timeout(300)  # plotly looks for the point below the pointer
    book.page.mouse.click(*at)
    return changed(book, view, before)


# clicks on Stop as soon as the sentence tells of the third picture: a test that waits outside may come too late
STOPPER = """i => { const widget = document.querySelectorAll('.kd-widget')[i], text = widget.querySelector('.kd-text');
    new MutationObserver((_, me) => { if (/after [3-9]0 steps/.test(text.textContent)) {
        me.disconnect(); widget.querySelector('.kd-stop').click(); } })
        .observe(text, { childList: true, characterData: true, subtree: true }) }"""


def test_training_starts_by_keyboard_and_stops(book):
    widget = book.page.locator(".kd-widget").nth(DISTILLERY)
    book.page.evaluate(STOPPER, DISTILLERY)
    widget.get_by_role("button", name="Train").press("Enter")
    stop = widget.get_by_role("button", name="Stop")
    stop.wait_for(state="visible")
    stop.wait_for(state="hidden")
    step = int(words(book, DISTILLERY).split("after ")[1].split()[0])
    assert 30 <= step < 300
    curve = book.page.evaluate(f"{PLOTS}[{DISTILLERY}].data[8].x")
    assert curve == list(range(0, step + 1, 10))
    assert "after 0 steps" in press(book, DISTILLERY, "input[data-name=labels]", "ArrowRight")


def test_the_quiz_is_played_by_keyboard(book):
    assert "the loss goes from" in press(book, CLINIC, "input[data-name=loss]", "Space")
    assert "It is not" in press(book, CLINIC, "select", "ArrowDown")
    assert book.page.evaluate(f"{PLOTS}[{CLINIC}].data[15].y[0]") == 10 - 1 - 3
    assert press(book, CLINIC, "input[data-name=case]", "ArrowRight").startswith("Case 2, seed 0: The student")


def test_the_button_finds_the_best_temperature(book):
    text = press(book, RELIABILITY, "button[data-name=best]", "Enter")
    best = float(text.split("best T is ")[1].rstrip("."))
    assert abs(book.page.evaluate(f"{PLOTS}[{RELIABILITY}].data[10].x[0]") - best) < 0.006


def test_a_cell_and_an_example_are_chosen_by_a_click(book):
    assert "relu2 of the teacher and pool of the student" in click(book, MATCH, "", 2, 1)
    x, y = book.page.evaluate(f"[{PLOTS}[{MATCH}].data[5].x[20], {PLOTS}[{MATCH}].data[5].y[20]]")
    assert "The ring is around example 20," in click(book, MATCH, "3", x, y)


@pytest.mark.parametrize("theme", ["Dark", "Light"])
def test_both_themes(book, theme):
    book.theme(f"JupyterLab {theme}")
    for k, name in enumerate(VIEWS):
        book.shot(f"{name.lower()}_{theme.lower()}", f".kd-widget >> nth={k}")
    need(find_spec("axe_playwright_python"), "axe checks skipped: pip install axe-playwright-python")
    from axe_playwright_python.sync_playwright import Axe
    found = Axe().run(book.page, context=".kd-widget").response["violations"]
    assert [(v["id"], v["impact"], v["nodes"][0]["html"]) for v in found] == []


def test_a_reload_keeps_the_traces(book):
    traces = f"{PLOTS}.map(p => p.data.length)"
    before = book.page.evaluate(traces), [words(book, k) for k in range(4)]
    book.save_and_reload()
    drawn(book)
    assert (book.page.evaluate(traces), [words(book, k) for k in range(4)]) == before


def test_nothing_went_wrong_on_the_way(book):
    book.assert_clean()
