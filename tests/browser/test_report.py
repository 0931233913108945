"The report of an experiment, opened from a file with no network: drawn, answering the keyboard, in both themes."
import pytest

import kdlab as kd
from kdlab.cli import main
from lab import SHOTS, Record

PLOTS = "[...document.querySelectorAll('.plot')]"


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    assert main(["distill", "--seeds", "2", "--epochs", "5", "--out", str(out)]) == 0
    return out / "report.html"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_report_offline(browser, report, scheme):
    context = browser.new_context(viewport=dict(width=1180, height=900), color_scheme=scheme, offline=True)
    page = context.new_page()
    record = Record(page)
    page.goto(report.as_uri())
    page.wait_for_function(f"{PLOTS}.filter(p => p.querySelector('.main-svg')).length === 4")
    SHOTS.mkdir(exist_ok=True)
    page.screenshot(path=SHOTS / f"report_{scheme}.png", full_page=True)

    lens, gap = page.locator("figure").nth(3), page.locator("figure").nth(2)
    top = lambda: page.evaluate(f"Math.max(...{PLOTS}[3].data[0].y)")
    assert lens.locator(".kd-text").text_content().startswith("At T = 4 ")
    before = top()
    page.get_by_label("Temperature T").focus()
    page.keyboard.press("ArrowRight")
    assert lens.locator(".kd-text").text_content().startswith("At T = 6 ") and top() < before
    assert lens.locator(".plot").get_attribute("aria-label").startswith("At T = 6 ")

    shown = lambda: page.evaluate(f"JSON.stringify({PLOTS}[2].data[1])") # the examples where both are right
    all_of_them = shown()
    gap.get_by_role("combobox", name="Examples").focus()
    page.keyboard.press("ArrowDown")
    assert "where the two disagree" in gap.locator(".kd-text").text_content() and shown() != all_of_them

    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 20, 20)"}[scheme]
    assert page.evaluate("document.documentElement.scrollWidth") <= 1180
    assert record.console == [] and record.failed == [] and record.outside == []
    context.close()


def test_report_fits_a_narrow_window(browser, report):
    page = browser.new_context(viewport=dict(width=420, height=900), offline=True).new_page()
    page.goto(report.as_uri())
    page.wait_for_selector(".plot .main-svg")
    assert page.evaluate("document.documentElement.scrollWidth") <= 420 # wide parts scroll in themselves


@pytest.fixture(scope="module")
def gap_report(tmp_path_factory):
    task = kd.tasks.digits().few(10)
    train, _, test = task.loaders()
    teacher, student = kd.nets.teacher_cnn(), kd.nets.student_cnn()
    kd.distill(teacher, None, kd.tasks.digits().loaders().train, epochs=3, progress=False)
    kd.distill(student, teacher, train, epochs=10, progress=False)
    return kd.report(kd.gap(student, teacher, test), tmp_path_factory.mktemp("gap") / "gap.html")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_gap_report_offline(browser, gap_report, scheme):
    context = browser.new_context(viewport=dict(width=1180, height=900), color_scheme=scheme, offline=True)
    page = context.new_page()
    record = Record(page)
    page.goto(gap_report.as_uri())
    page.wait_for_function(f"{PLOTS}.length === 5 && {PLOTS}.every(p => p.querySelector('.main-svg'))")
    SHOTS.mkdir(exist_ok=True)
    page.screenshot(path=SHOTS / f"gap_report_{scheme}.png", full_page=True)
    assert all(page.evaluate(f"{PLOTS}.map(p => p.getAttribute('aria-label').length > 40)"))
    page.get_by_role("combobox", name="Examples").focus()
    page.keyboard.press("ArrowDown")
    assert "where the two disagree" in page.locator("figure").nth(1).locator(".kd-text").text_content()
    table = page.locator(".scroll").first
    assert table.evaluate("e => e.scrollWidth <= e.clientWidth") # nothing of the measures is out of sight
    assert record.console == [] and record.failed == [] and record.outside == []
    context.close()
