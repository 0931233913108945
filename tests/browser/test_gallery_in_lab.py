"""The gallery notebook in a real JupyterLab: all widgets on one page, by keyboard, reloaded, in both themes; then
converted, under Voilà, and as pages from disk."""
import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

from kdlab.widgets.gallery import EXHIBITS
from lab import PLOTS, ROOT, SHOTS, Record, Traffic, free_port, need, write_notebook

SHOWN = len(EXHIBITS) + 1  # and the challenge
WIDGET = ".kd-widget:not(.kd-widget .kd-widget)"
LOCAL = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))


@pytest.fixture(scope="module")
def book(lab, browser):
    book = lab.open(browser, ROOT / "nbs" / "widgets.ipynb", width=1360, height=3000)
    book.traffic = Traffic(book.page)
    book.run_all()
    book.drawn(SHOWN)
    return book


def box(book, i):
    return book.page.locator(WIDGET).nth(i)


def traces(book):
    return book.page.evaluate(f"{PLOTS}.map(p => p.data.length)")


def test_all_widgets_come_in_one_light_page(book):
    assert book.traffic.bytes < 8 * 2 ** 20
    assert all(n > 0 for n in traces(book)) and book.stderr() == []


@pytest.mark.parametrize("i", range(len(EXHIBITS)), ids=[x.module for x in EXHIBITS])
def test_the_keyboard_moves_each_widget(book, i):
    "The first control that can be reached by Tab changes the sentence; where nothing is computed yet, the picture."
    widget, page = box(book, i), book.page
    control = widget.locator(".kd-controls :is(input, select)").first
    control.focus()
    shown = f"""i => {{ const w = document.querySelectorAll('{WIDGET}')[i], p = w.querySelector('.js-plotly-plot');
        const parts = p.data.map(d => [d.x, d.y, d.z, d.marker?.color]);
        return w.querySelector('.kd-text').textContent + JSON.stringify([parts, p.layout.shapes, p.layout.yaxis?.type]) }}"""
    before = page.evaluate(shown, i)
    kind = control.evaluate("e => e.type")
    at_end = kind == "range" and control.evaluate("e => e.value === e.max")
    page.keyboard.press({"checkbox": "Space", "range": "Home" if at_end else "ArrowRight"}.get(kind, "ArrowDown"))
    page.wait_for_function(f"([i, was]) => ({shown})(i) !== was", arg=[i, before])
    assert widget.locator(".kd-error").is_hidden()
    assert page.evaluate("document.activeElement.tagName") in ("INPUT", "SELECT"), "the focus stays"
    widget.locator(".kd-reset").press("Enter")
    page.wait_for_function(f"([i, was]) => ({shown})(i) === was", arg=[i, before])


def test_a_measurement_starts_and_stops(book):
    i = next(k for k, x in enumerate(EXHIBITS) if x.module == "kernels")
    widget = box(book, i)
    widget.get_by_role("button", name="Measure").press("Enter")
    stop = widget.get_by_role("button", name="Stop")
    stop.wait_for(state="visible")
    assert widget.locator(".kd-panel").get_attribute("aria-busy") == "true"
    stop.press("Enter")
    stop.wait_for(state="hidden", timeout=30_000)
    assert widget.locator(".kd-error").is_hidden()


def test_a_run_is_drawn_while_it_trains(book):
    i = next(k for k, x in enumerate(EXHIBITS) if x.module == "live")
    widget = box(book, i)
    widget.get_by_role("button", name="Start").press("Enter")
    said = f"i => document.querySelectorAll('{WIDGET}')[i].querySelector('.kd-text').textContent"
    book.page.wait_for_function(f"i => ({said})(i).startsWith('Epoch ')", arg=i, timeout=60_000)
    book.page.wait_for_function(f"i => ({said})(i).includes('The run is finished')", arg=i, timeout=120_000)
    plot = book.page.evaluate(f"i => document.querySelectorAll('{WIDGET}')[i].querySelector('.js-plotly-plot').data[0].x", i)
    assert plot[-1] == 60 and plot == sorted(plot)


def test_a_reload_keeps_all_traces(book, lab):
    before = traces(book)
    book.save_and_reload()
    book.drawn(SHOWN)
    assert traces(book) == before
    saved = lab.root / "widgets.ipynb"
    assert "widgets" not in json.loads(saved.read_text())["metadata"] and saved.stat().st_size < 200_000


@pytest.mark.parametrize("theme", ["Dark", "Light"])
def test_both_themes(book, theme):
    book.theme(f"JupyterLab {theme}")
    for i, x in enumerate(EXHIBITS): book.shot(f"{x.module}_{theme.lower()}", f"{WIDGET} >> nth={i}")
    assert [v for v in book.violations() if v[1] in ("serious", "critical")] == []


def test_nothing_left_the_machine(book):
    assert book.record.outside == [] and book.record.failed == []


def small(folder):
    "A notebook with two widgets, one of them changed before it is shown."
    cells = ["import kdlab as kd\nview = kd.TSquaredBalance()\nview.T = 8.0\nview", "kd.CapacityGap()"]
    return write_notebook(folder / "two.ipynb", cells)


def drawn_data(page, plots=2):
    page.wait_for_function("n => [...document.querySelectorAll('.js-plotly-plot .main-svg')].length >= n", arg=plots, timeout=60_000)
    return page.evaluate(f"{PLOTS}.map(p => p.data.length)")


def test_a_converted_notebook_shows_the_figures(browser, tmp_path):
    done = subprocess.run([sys.executable, "-m", "nbconvert", "--execute", "--to", "html", small(tmp_path)], cwd=tmp_path,
                          env=LOCAL | dict(KDLAB_STATIC="1"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = browser.new_context(viewport=dict(width=1200, height=1300)).new_page()
    errors = []
    page.on("pageerror", lambda e: errors.append(str(e)))
    page.route("**/*", lambda route: route.continue_() if route.request.url.startswith("file:") else route.abort())
    page.goto((tmp_path / "two.html").as_uri())
    assert drawn_data(page) == [8, 8] and errors == []
    assert "At T = 8 with T²" in page.locator(".kd-text").first.text_content()
    page.screenshot(path=SHOTS / "converted.png")


def test_voila_shows_the_figures(browser, tmp_path):
    need(find_spec("voila"), "Voilà check skipped: pip install voila")
    port = free_port()
    server = subprocess.Popen([sys.executable, "-m", "voila", small(tmp_path), "--no-browser", f"--port={port}",
                               "--Voila.ip=127.0.0.1"], cwd=tmp_path, env=LOCAL | dict(JUPYTER_CONFIG_DIR=str(tmp_path)),
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        page = browser.new_context(viewport=dict(width=1200, height=1300)).new_page()
        page.route("**/*", lambda r: r.continue_() if f"127.0.0.1:{port}" in r.request.url or r.request.url.startswith(
            ("blob:", "data:")) else r.abort())  # Voilà's own template asks for an icon font
        for _ in range(100):
            try:
                page.goto(f"http://127.0.0.1:{port}/")
                break
            except Exception: page.wait_for_timeout(300)
        assert drawn_data(page) == [8, 8]
        slider = page.get_by_label("Temperature T").first
        slider.focus()
        page.keyboard.press("Home")
        page.wait_for_function("document.querySelector('.kd-text').textContent.startsWith('At T = 1 ')")
        page.screenshot(path=SHOTS / "voila.png")
    finally:
        server.terminate()
        server.wait(20)


def test_the_pages_open_from_disk(browser, tmp_path):
    done = subprocess.run([sys.executable, "-m", "kdlab", "gallery", "--out", tmp_path / "gallery"], env=LOCAL,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for scheme in ("light", "dark"):
        page = browser.new_context(viewport=dict(width=1200, height=900), color_scheme=scheme).new_page()
        record = Record(page)
        page.route("**/*", lambda route: route.continue_() if route.request.url.startswith("file:") else route.abort())
        page.goto((tmp_path / "gallery" / "index.html").as_uri())
        page.screenshot(path=SHOTS / f"gallery_{scheme}.png", full_page=True)
        links = page.locator("h2 a").evaluate_all("links => links.map(a => a.href)")
        assert len(links) == len(EXHIBITS)
        for link in links:
            page.goto(link)
            page.wait_for_selector("#kd-plot .main-svg")
            assert page.locator("#kd-text").text_content()
            moved = page.locator("#kd-controls :is(input, select)")
            if moved.count():
                before = page.locator("body").inner_text() + page.evaluate("JSON.stringify(document.getElementById('kd-plot').layout)")
                moved.first.focus()
                page.keyboard.press({"checkbox": "Space", "range": "End"}.get(moved.first.evaluate("e => e.type"), "ArrowDown"))
                after = page.locator("body").inner_text() + page.evaluate("JSON.stringify(document.getElementById('kd-plot').layout)")
                if after == before: page.keyboard.press("Home")
            page.screenshot(path=SHOTS / f"page_{link.rsplit('/', 1)[1].removesuffix('.html')}_{scheme}.png")
        assert record.console == [] and record.failed == [] and record.outside == []
