"""Views that listen to the pointer, in a real JupyterLab: a disc is dragged, a cell is clicked; keyboard, themes, axe."""
import pytest

from lab import PLOTS

VIEWS = ("Simplex", "DarkKnowledge", "AlphaT", "DKDSplit", "CoveringOrSeeking")


@pytest.fixture(scope="module")
def book(lab, browser):
    book = lab.show(browser, "pointing", [f"import kdlab as kd\nkd.{name}()" for name in VIEWS], height=4600)
    book.drawn(len(VIEWS))
    return book


def test_a_disc_follows_the_pointer_and_the_sliders_follow_the_disc(book):
    plot = book.page.locator(".js-plotly-plot").first
    disc = lambda k: plot.locator(".shapelayer path").nth(k).bounding_box()
    before, box, there = book.words(0), disc(1), disc(0)
    middle = lambda b: (b["x"] + b["width"] / 2, b["y"] + b["height"] / 2)
    (x, y), (to_x, to_y) = middle(box), middle(there)
    book.page.mouse.move(x, y)
    book.page.mouse.down()
    book.page.mouse.move((x + to_x) / 2, (y + to_y) / 2, steps=6)
    book.page.mouse.up()
    text = book.changed(0, before)
    assert "(A 0.31, B 0.63, C 0.06)" in text, text
    slider = book.page.locator("input[data-name=student_first]").first
    assert slider.get_attribute("aria-valuetext") == "0.31"
    book.page.locator(".kd-reset").first.click()
    assert book.changed(0, text) == before
    book.page.wait_for_timeout(300)
    assert abs(disc(1)["x"] - box["x"]) < 1 and abs(disc(1)["width"] - box["width"]) < 1


def test_a_click_looks_behind_a_cell(book):
    plot, before = book.page.locator(".js-plotly-plot").nth(1), book.words(1)
    box = plot.locator(".heatmaplayer image, .heatmaplayer .hm image").first.bounding_box()
    at = lambda row, col: (box["x"] + (col + 0.5) * box["width"] / 10, box["y"] + (row + 0.5) * box["height"] / 10)
    book.page.mouse.move(*at(9, 4))
    book.page.wait_for_timeout(200)
    book.page.mouse.click(*at(9, 4))
    assert " a true 9 gives " in book.changed(1, before)
    captions = book.page.evaluate(f"{PLOTS}[1].data[3].text")
    assert len(captions) == 12 and captions[0].startswith("<b>0.")
    pixels = book.page.evaluate(f"{PLOTS}[1].layout.shapes[0]")
    assert (pixels["x0"], pixels["y0"]) == (3.5, 8.5)


@pytest.mark.parametrize("theme", ["Dark", "Light"])
def test_both_themes(book, theme):
    book.theme(f"JupyterLab {theme}")
    for k, name in enumerate(VIEWS):
        book.shot(f"{name.lower()}_{theme.lower()}", f".kd-widget >> nth={k}")
    assert book.violations() == []


def test_the_keyboard_alone_changes_every_sentence(book):
    for k in range(len(VIEWS)):
        before = book.words(k)
        book.page.locator(".kd-widget").nth(k).locator("input[type=range]").first.focus()
        book.page.keyboard.press("ArrowRight")
        assert book.changed(k, before)


def test_nothing_went_wrong_on_the_way(book):
    book.assert_clean()
