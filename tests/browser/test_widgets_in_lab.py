"""Both widgets in a real JupyterLab: keyboard, clicks, reload, themes, accessibility; and the exported page."""
import json

import pytest

from lab import PLOTS, SHOTS, Record

SETUP = """\
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from kdlab.widgets.gap import TeacherStudentGap
from kdlab.widgets.temperature import TemperatureLens
digits = load_digits()
x, y, images = digits.data / 16, digits.target, digits.images[1000:]
teacher, student = (LogisticRegression(max_iter=200).fit(x[:n], y[:n]) for n in (1000, 60))
t, s = (net.decision_function(x[1000:]) for net in (teacher, student))"""
LENS = "lens = TemperatureLens(t, images=images, labels=y[1000:])\nlens.example = 3\nlens.example = 0\nlens"
GAP = "gap = TeacherStudentGap(t, s, y[1000:], images=images)\ngap"


@pytest.fixture(scope="module")
def book(lab, browser):
    book = lab.show(browser, "two_widgets", (SETUP, LENS, GAP))
    book.drawn(2)
    return book


def data(book, plot, trace, key):
    return book.page.evaluate(f"{PLOTS}[{plot}].data[{trace}]['{key}']")


def clear(book, group):
    "Which points of a group are not faded."
    colors = book.page.evaluate(f"{PLOTS}[1].data[{group}].marker.color")
    return [i for i, color in enumerate(colors) if color]


def press(book, keys, widget):
    "Press keys one by one, then wait until the sentence of the widget is a new one; return it."
    before = book.words(widget)
    for key in keys:
        book.page.keyboard.press(key)
    book.changed(widget, before)
    return settled(book, widget)


def settled(book, widget):
    "The sentence, once it and the plot agree and nothing moves any more."
    look = f"JSON.stringify({PLOTS}[{widget}].data.map(d => [d.y, d.marker?.color]))"
    last = None
    while last != (last := (book.words(widget), book.page.evaluate(look))):
        book.page.wait_for_timeout(150)
    return last[0]


def test_a_change_before_the_first_view_leaves_the_other_traces_alone(book):
    assert [data(book, 0, trace, "marker")["color"] for trace in (2, 4, 6)] == ["#009E73", "#0072B2", "#D55E00"]


def test_the_slider_moves_plot_and_sentence(book):
    book.page.locator("input[data-name=T]").focus()
    soft = data(book, 0, 0, "y")
    text = press(book, ["ArrowRight"] * 3, 0)
    assert text.startswith("At T = 7 the teacher gives 1 ")
    assert max(data(book, 0, 0, "y")) < max(soft) and data(book, 0, 2, "x") == [7]
    assert book.page.locator(".js-plotly-plot").first.get_attribute("aria-label") == text
    assert press(book, ["Home"], 0).startswith("At T = 0.25 ")


def test_the_keyboard_alone_reaches_every_control(book):
    book.page.locator("input[data-name=T]").focus()
    seen = []
    for _ in range(9):
        seen.append(book.page.evaluate("document.activeElement.dataset.name ?? document.activeElement.textContent"))
        book.page.keyboard.press("Tab")
    assert seen == ["T", "example", "log_axis", "Reset", "which", "klass", "page", "lasso", "Reset"]
    book.page.locator("input[data-name=log_axis]").focus()
    book.page.keyboard.press("Space")
    book.page.wait_for_function(f"() => {PLOTS}[0].layout.yaxis2.type === 'log'")
    book.page.locator("input[data-name=example]").focus()
    press(book, ["ArrowRight"] * 3, 0)
    assert book.page.locator("input[data-name=example]").get_attribute("aria-valuetext") == "3 (5)"
    book.page.locator(".kd-reset").first.focus()
    assert press(book, ["Enter"], 0).startswith("At T = 4 ")
    assert book.page.evaluate(f"{PLOTS}[0].layout.yaxis2.type") == "linear"


def test_lists_filter_all_views(book):
    book.page.locator("select[data-name=which]").focus()
    text = press(book, ["o"], 1)  # typing a letter chooses in a native list
    assert text.endswith("only the teacher right.")
    assert clear(book, 1) == [] and len(clear(book, 2)) > 0
    assert min(data(book, 1, 5, "y")) >= 0
    book.page.locator("select[data-name=klass]").focus()
    assert " of class 2, " in press(book, ["2"], 1)
    captions = data(book, 1, 6, "text")
    assert captions and all(c.startswith("<b>2</b>") for c in captions)


def test_pointing_filters_all_views(book):
    book.page.locator(".kd-reset").nth(1).click()
    assert settled(book, 1).endswith("Shown: all 797.")
    plot = book.page.locator(".js-plotly-plot").nth(1)
    box = plot.locator(".xy .nsewdrag, .nsewdrag.drag").first.bounding_box()
    at = lambda fx, fy: (box["x"] + fx * box["width"], box["y"] + fy * box["height"])
    book.page.mouse.move(*at(0.5, 0.75))
    book.page.mouse.down()
    book.page.mouse.move(*at(0.8, 0.95), steps=8)
    book.page.mouse.up()
    said = "what => document.querySelectorAll('.kd-text')[1].textContent.includes(what)"
    book.page.wait_for_function(said, arg="picked by hand")
    settled(book, 1)
    shown = sum(len(clear(book, k)) for k in range(1, 5))
    assert 0 < shown < 100 and f"of the {shown} picked by hand" in book.words(1)
    confidence = data(book, 1, 2, "x")
    assert all(0.45 < confidence[i] < 0.85 for i in clear(book, 2))
    dim = "p => [...p.querySelectorAll('.scatterlayer .point')].filter(e => Number(e.style.opacity) < 1).length"
    assert plot.evaluate(dim) == 0  # plotly's own dimming is off
    assert plot.locator(".selectionlayer path").count() == 0  # an outline left behind would choose again
    book.shot("gap_picked", ".kd-widget >> nth=1")
    book.page.locator(".kd-reset").nth(1).click()
    assert settled(book, 1).endswith("Shown: all 797.")
    bars = plot.locator(".bars .point path")
    bars.nth(1).click(force=True)
    book.page.wait_for_function(said, arg="of class 1")
    assert book.page.locator("select[data-name=klass]").input_value() == "2"  # 'all' comes first


def test_a_reload_keeps_all_traces(book, lab):
    book.page.locator("input[data-name=T]").focus()
    before = press(book, ["End"], 0), settled(book, 1)
    bars = data(book, 0, 0, "y"), data(book, 1, 5, "y")
    book.save_and_reload()
    book.drawn(2)
    assert [len(p) for p in book.page.evaluate(f"{PLOTS}.map(p => p.data)")] == [8, 12]
    assert (data(book, 0, 0, "y"), data(book, 1, 5, "y")) == bars
    assert (book.words(0), book.words(1)) == before
    book.page.locator("input[data-name=T]").focus()
    assert press(book, ["Home"], 0).startswith("At T = 0.25 ")  # and it still moves
    bundles = book.page.evaluate("Object.keys(globalThis[Symbol.for('kdlab.plotly')]).length")
    saved = (lab.root / "two_widgets.ipynb")
    assert bundles == 1 and "widgets" not in json.loads(saved.read_text())["metadata"] and saved.stat().st_size < 50_000


def test_an_error_is_said_in_the_widget(book):
    book.execute("lens.T = -1.0")
    error = book.page.locator(".kd-error").first
    error.wait_for(state="visible")
    assert error.text_content() == "T must be > 0, got -1.0" and error.get_attribute("role") == "alert"
    book.execute("lens.reset(); gap.reset()")
    error.wait_for(state="hidden")


@pytest.mark.parametrize("theme", ["Dark", "Light"])
def test_both_themes(book, theme):
    book.theme(f"JupyterLab {theme}")
    book.shot(f"lens_{theme.lower()}", ".kd-widget >> nth=0")
    book.shot(f"gap_{theme.lower()}", ".kd-widget >> nth=1")
    ink, paper = book.page.evaluate("""() => ['.xtick text', '.main-svg'].map(what => {
        const style = getComputedStyle(document.querySelector('.js-plotly-plot ' + what));
        return what === '.main-svg' ? style.backgroundColor : style.fill; })""")
    assert ("255, 255, 255" in ink) == (theme == "Dark") and paper == "rgba(0, 0, 0, 0)"
    assert book.violations() == []


def test_two_views_of_one_widget_move_together(book):
    book.page.evaluate("""() => {
        const panel = window.jupyterapp.shell.currentWidget;
        panel.content.activeCellIndex = panel.content.widgets.length - 1; }""")
    book.command("notebook:insert-cell-below")
    cell = "window.jupyterapp.shell.currentWidget.content.activeCell"
    book.page.evaluate(f"() => {cell}.model.sharedModel.setSource('lens')")
    book.command("notebook:run-cell")
    book.drawn(3)
    book.page.locator("input[data-name=T]").last.focus()
    text = press(book, ["ArrowRight"], 2)
    assert book.words(0) == text and data(book, 0, 0, "y") == data(book, 2, 0, "y")
    book.command("notebook:delete-cell")
    book.drawn(2)
    book.page.locator("input[data-name=T]").focus()
    assert press(book, ["Home"], 0).startswith("At T = 0.25 ") and data(book, 0, 2, "x") == [0.25]


def test_plots_follow_the_width_of_the_page(book):
    width = f"() => {PLOTS}.map(p => p.querySelector('.main-svg').clientWidth)"
    wide = book.page.evaluate(width)
    book.page.set_viewport_size(dict(width=1160, height=2400))
    book.page.wait_for_function(f"was => ({width})().every((w, i) => w < was[i])", arg=wide)
    book.page.set_viewport_size(dict(width=1360, height=2400))
    book.page.wait_for_function(f"was => ({width})().every((w, i) => w === was[i])", arg=wide)


def test_a_narrow_page_shows_the_whole_plot(book):
    narrow = "w => document.querySelectorAll('.kd-widget').forEach(e => { e.style.width = w })"
    sizes = """() => [...document.querySelectorAll('.kd-widget')].map(e => [e.getBoundingClientRect().right,
        e.querySelector('.main-svg').getBoundingClientRect().right, e.querySelector('.main-svg').clientWidth,
        Math.max(...[...e.querySelectorAll('.kd-control, button')].map(c => c.getBoundingClientRect().right))])"""
    book.page.evaluate(narrow, "480px")
    book.page.wait_for_function("() => [...document.querySelectorAll('.js-plotly-plot')].every(e => e.style.transform === 'scale(0.6)')")
    for theme in ("Dark", "Light"):
        book.theme(f"JupyterLab {theme}")
        for name, i in (("lens", 0), ("gap", 1)): book.shot(f"{name}_narrow_{theme.lower()}", f".kd-widget >> nth={i}")
    for edge, plot, width, controls in book.page.evaluate(sizes): assert width == 800 and plot <= edge + 1 and controls <= edge
    book.page.locator(".kd-reset").nth(1).click()
    settled(book, 1)
    book.page.locator(".js-plotly-plot").nth(1).locator(".bars .point path").nth(1).click(force=True)  # the pointer follows
    book.page.wait_for_function("() => document.querySelectorAll('.kd-text')[1].textContent.includes('of class 1')")
    book.page.locator(".kd-reset").nth(1).click()
    book.page.evaluate(narrow, "")
    book.page.wait_for_function("() => [...document.querySelectorAll('.js-plotly-plot')].every(e => !e.style.transform)")
    settled(book, 1)


def test_nothing_went_wrong_on_the_way(book):
    book.assert_clean()


def test_the_exported_page_works_alone(book, browser, tmp_path):
    file = tmp_path / "lens.html"
    book.execute(f"lens.reset(); lens.to_html({str(file)!r})")
    page = browser.new_context(viewport=dict(width=1200, height=800), color_scheme="dark").new_page()
    record = Record(page)
    page.route("**/*", lambda route: route.continue_() if route.request.url == file.as_uri() else route.abort())
    page.goto(file.as_uri())
    page.wait_for_selector("#kd-plot .main-svg")
    text = page.locator("#kd-text")
    assert text.text_content().startswith("At T = 4 ")
    page.get_by_label("Temperature T").focus()
    page.keyboard.press("ArrowRight")
    assert text.text_content().startswith("At T = 5 ")
    assert page.evaluate("document.getElementById('kd-plot').data[2].x") == [5]
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    assert page.evaluate("document.getElementById('kd-plot').layout.yaxis2.type") == "log"
    page.screenshot(path=SHOTS / "export_dark.png")
    page.set_viewport_size(dict(width=480, height=800))
    page.wait_for_function("() => document.getElementById('kd-plot').style.transform.startsWith('scale')")
    page.wait_for_function("() => document.querySelector('#kd-plot .main-svg').clientWidth === 800")
    assert page.evaluate("document.documentElement.scrollWidth") <= 480
    page.screenshot(path=SHOTS / "export_narrow.png")
    assert record.console == [] and record.failed == [] and record.outside == []
