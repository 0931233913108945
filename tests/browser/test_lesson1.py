"""Lesson 1 in JupyterLab: it runs from top to bottom, the lens follows the keyboard, a reload keeps everything."""
import re

import pytest

from lab import PLOTS, ROOT

LESSON = ROOT / "nbs" / "course" / "01_what_a_teacher_knows.ipynb"
WIDGETS = 6  # the lens, the gap, and four comparisons


@pytest.fixture(scope="module")
def book(lab, browser):
    book = lab.open(browser, LESSON)
    book.run_all(timeout=300)
    book.drawn(WIDGETS)
    return book


def said(book, widget=0): return book.words(widget)


def bars(book):
    "Heights of the lens's bars."
    return book.page.evaluate(f"() => [...{PLOTS}[0].data[0].y]")


def press(book, key):
    "Press a key on the slider T, and wait until sentence and bars are new ones."
    before = said(book), bars(book)
    book.page.locator("input[data-name=T]").focus()
    book.page.keyboard.press(key)
    both_new = "([text, y]) => document.querySelector('.kd-text').textContent !== text && String(BARS) !== String(y)"
    book.page.wait_for_function(both_new.replace("BARS", f"[...{PLOTS}[0].data[0].y]"), arg=list(before))


def test_it_runs_and_shows_what_it_promises(book):
    assert book.stderr() == []
    assert [said(book, i).split(" ")[0] for i in range(WIDGETS)] == ["At", "Of", "Mean", "Mean", "Mean", "Mean"]
    assert not book.page.locator(".kd-error:visible").count()
    def verdict(widget, arm):
        return re.search(rf" {arm} [-+][\d.]+ \[[^]]*\], ([a-z ]+)", said(book, widget).partition("Minus")[2])[1]
    assert verdict(2, "soft T=8") == "wins"
    assert [verdict(2, placebo) for placebo in ("smoothing", "shuffled")] == ["no difference here"] * 2
    assert [verdict(3, arm) for arm in ("soft T=8", "shuffled")] == ["wins", "loses"]
    assert verdict(4, "hard") == "wins" and verdict(5, "soft T=8") != "wins"


def test_the_keyboard_moves_lens_and_sentence(book):
    assert said(book).startswith("At T = 1 ")
    sharp = bars(book)
    for _ in range(3):
        press(book, "ArrowRight")
    assert said(book).startswith("At T = 1.75 ")
    press(book, "End")
    assert said(book).startswith("At T = 20 ") and max(bars(book)) < max(sharp) / 2


def test_a_reload_keeps_the_traces(book):
    before = [said(book, i) for i in range(WIDGETS)], bars(book)
    traces = book.page.evaluate(f"() => {PLOTS}.map(p => p.data.length)")
    assert min(traces) > 1
    book.save_and_reload()
    book.drawn(WIDGETS)
    assert book.page.evaluate(f"() => {PLOTS}.map(p => p.data.length)") == traces
    assert ([said(book, i) for i in range(WIDGETS)], bars(book)) == before
    press(book, "Home")  # and it still moves
    assert said(book).startswith("At T = 0.25 ")


def test_an_exercise_answers_and_hints_open_one_by_one(book):
    hints = book.page.locator("details summary", has_text="Hint 1 of 3")
    hints.first.focus()
    assert not book.page.get_by_text("Hint 2 of 3").first.is_visible()
    book.page.keyboard.press("Enter")
    book.page.get_by_text("Hint 2 of 3").first.wait_for(state="visible")
    assert not book.page.get_by_text("Hint 3 of 3").first.is_visible()


def test_pictures_are_kept(book):
    for theme in ("Light", "Dark"):
        book.theme(f"JupyterLab {theme}")
        for i, name in enumerate(("lens", "gap", "unseen", "same_40", "more_images", "tiny")):
            assert book.shot(f"lesson1_{name}_{theme.lower()}", f".kd-widget >> nth={i}").stat().st_size > 10_000


def test_nothing_went_wrong_on_the_way(book):
    book.assert_clean()
