"""Figures and report of a gap: what the figures say, a page without network, and the cases with less in them."""
import json
import re

import numpy as np
import pytest
import torch
from plotly.offline import get_plotlyjs

import kdlab as kd
from kdlab import gap_reports
from kdlab.figures import kit, measures
from kdlab.gaps import compare

RNG = np.random.default_rng(0)
Y = np.arange(120) % 4
TEACHER = RNG.normal(size=(120, 4)) + 4 * np.eye(4)[Y]
STUDENT = TEACHER + RNG.normal(size=(120, 4)) * np.where(Y == 2, 4, 1)[:, None]
NAMES = ["a<b", "dog", "owl", "bat"]


@pytest.fixture
def gap():
    g = compare(STUDENT, TEACHER, Y, class_names=NAMES, inputs=RNG.random((120, 1, 8, 8)))
    g.cka, g.student.layers, g.teacher.layers = np.array([[.9, .1], [.2, np.nan]]), ["s1", "s2"], ["t1", "t2"]
    return g


def plain(page): return page.replace(get_plotlyjs(), "")


def blobs(page): return [json.loads(b) for b in re.findall(r'<script type="application/json">(.*?)</script>', page, re.S)]


def as_json(fig): return json.dumps(fig.to_plotly_json(), default=lambda o: o.to_plotly_json() if hasattr(o, "to_plotly_json") else o.tolist())


# figures

def test_classes_stand_by_what_was_lost(gap):
    parts = gap.per_class()
    fig = measures.class_figure(parts, NAMES)
    assert fig.layout.yaxis.ticktext[0] == "owl (30)" and list(fig.data[2].x) == sorted(fig.data[2].x)
    assert fig.data[0].x[0] == pytest.approx(100 * parts["teacher"][2])
    clear = [parts["low"][k] > 0 or parts["high"][k] < 0 for k in measures.class_rows(parts)]
    assert [s == "diamond" for s in fig.data[2].marker.symbol] == clear and clear[0]
    assert "It lost most in owl" in measures.class_sentence(parts, NAMES)


def test_of_many_classes_the_largest_differences_are_shown():
    parts = dict(count=np.r_[0, np.ones(49)], difference=np.r_[np.nan, np.linspace(-.5, .3, 49)])
    rows = measures.class_rows(parts)
    assert len(rows) == 20 and 0 not in rows and rows[0] == 1 and 49 in rows


def test_figures_without_numbers_that_json_lacks(gap):
    both = [gap.calibration(who) for who in ("teacher", "student")]
    gap.teacher.similarity[1] = gap.student.similarity[1] = np.nan # a class without samples
    for fig in (measures.class_figure(gap.per_class(), NAMES), measures.calibration_figure(*both),
                measures.similarity_figure(gap.teacher.similarity, gap.student.similarity, NAMES),
                measures.cka_figure(gap.cka, gap.student.layers, gap.teacher.layers),
                measures.agreement_figure(gap.agree, gap.teacher.confidence, gap.student.confidence)):
        text = as_json(fig)
        assert "NaN" not in text and "Infinity" not in text and "bdata" not in text


def test_reliability_bars_show_the_arrays(gap):
    now = gap.calibration("student")
    fig = measures.calibration_figure(gap.calibration("teacher"), now)
    full = now["count"] > 0
    assert np.allclose(fig.data[2].y, 100 * now["accuracy"][full]) and fig.data[2].xaxis == "x2"
    assert [p == "/" for p in fig.data[2].marker.pattern.shape] == (now["confidence"] > now["accuracy"])[full].tolist()
    assert sum(fig.data[5].y) == pytest.approx(100)


def test_wrong_shares_by_hand():
    shares = measures.wrong_shares([[.8, .15, .05], [.1, .5, .4], [np.nan] * 3])
    assert np.allclose(shares[:2], [[np.nan, .75, .25], [.2, np.nan, .8]], equal_nan=True) and np.isnan(shares[2]).all()


def test_difference_map_says_student_minus_teacher():
    t, s = np.array([[.8, .15, .05], [.1, .5, .4], [.1, .1, .8]]), np.array([[.8, .05, .15], [.1, .5, .4], [.1, .1, .8]])
    fig = measures.similarity_figure(t, s, list("abc"))
    order = list(fig.layout.xaxis.ticktext)
    assert fig.data[2].z[order.index("a")][order.index("b")] == -50 and fig.data[0].z[order.index("a")][order.index("b")] == 75
    assert "a true a, of which b gets 25% of the wrong probability instead of 75%" in measures.similarity_sentence(t, s, list("abc"), .5)


def test_layers_are_framed_by_row():
    fig = measures.cka_figure([[.2, .9], [np.nan, np.nan]], ["x", "y"], ["p", "q"])
    assert [(s.x0, s.y0) for s in fig.layout.shapes] == [(.5, -.5)] and list(fig.data[0].z[1]) == [None, None]


def test_marks_have_a_second_channel():
    assert measures.LOOKS["teacher"]["symbol"] != measures.LOOKS["student"]["symbol"]
    fig = measures.agreement_figure([True, False], [.5, .5], [.5, .5])
    assert len({t.marker.symbol for t in fig.data}) == 2


# the page

def test_page_is_one_file_and_escaped(gap):
    page = gap_reports.gap_page(gap)
    rest = plain(page)
    assert page.count(get_plotlyjs()) == 1
    assert not re.search(r"https?:|//cdn|<link|<iframe|<img|@import|url\(|\bsrc=", rest)
    assert "a<b" not in re.sub(r"<script.*?</script>", "", rest, flags=re.S) and rest.count('role="img"') == 5
    assert all(b["states"][next(iter(b["states"]))]["text"] for b in blobs(rest))
    assert "prefers-color-scheme: dark" in rest and rest.count("<h1>") == 1


def test_every_measure_is_in_the_table(gap):
    rest = plain(gap_reports.gap_page(gap))
    for row in gap.table(): assert all(cell in rest for cell in row if "‖" not in cell)
    worst = gap.where("disagree")[0]
    assert f'<th scope="row">{worst}</th>' in rest


def test_gallery_has_a_state_for_each_choice(gap):
    one = blobs(plain(gap_reports.gap_page(gap)))[1]
    assert len(one["states"]) == 6 and any(t["type"] == "heatmap" for t in one["fig"]["data"])
    ids = json.dumps(one)
    assert all(f"#{i}" in ids for i in gap.where("only the teacher right")[:3])


def test_without_labels():
    g = compare(STUDENT, TEACHER)
    rest = plain(gap_reports.gap_page(g))
    assert "agree on" in gap_reports.headline(g) and "Class by class" not in rest and "the teacher&#x27;s choice" in rest
    assert "no labels: accuracy" in rest and rest.count('role="img"') == 2


def test_two_classes_have_no_matrix():
    rest = plain(gap_reports.gap_page(compare(STUDENT[:, :2], TEACHER[:, :2], Y % 2)))
    assert "Which wrong answers are near" not in rest and "Class by class" in rest


def test_a_sample_of_many_keeps_the_groups():
    y = np.arange(6000) % 4
    teacher = RNG.normal(size=(6000, 4)) + 2 * np.eye(4)[y]
    g = compare(teacher + RNG.normal(size=(6000, 4)), teacher, y)
    rows = gap_reports.sampled(g, 600)
    share = np.bincount(g.groups(), minlength=4) / 6000
    assert 600 <= len(rows) <= 604 and np.allclose(np.bincount(g.groups()[rows], minlength=4) / len(rows), share, atol=.004)
    assert "every group has its share" in plain(gap_reports.gap_page(g))


@pytest.mark.parametrize("shift, words", [(0, "No gap in accuracy"), (3, "better than its teacher"), (-3, "behind its teacher")])
def test_headline_reads_the_interval(shift, words):
    sharpen = lambda z, k: z + k * np.eye(4)[Y]
    weak = RNG.normal(size=(120, 4)) + .5 * np.eye(4)[Y]
    g = compare(sharpen(weak, max(shift, 0)), sharpen(weak, max(-shift, 0)), Y)
    assert words in gap_reports.headline(g)


def test_written_in_one_step(gap, tmp_path, monkeypatch):
    path = kd.report(gap, tmp_path / "deep" / "gap.html")
    old = path.read_text(encoding="utf-8")
    assert old.startswith("<!doctype html>") and [p.name for p in path.parent.iterdir()] == ["gap.html"]

    def broken(*args): raise OSError("disk full")
    monkeypatch.setattr(gap_reports.os, "replace", broken)
    with pytest.raises(OSError): kd.report(gap, path)
    assert path.read_text(encoding="utf-8") == old and [p.name for p in path.parent.iterdir()] == ["gap.html"]


@pytest.mark.parametrize("shape, shown", [((120, 8, 8), True), ((120, 1, 8, 8), True), ((120, 3, 40, 40), True), ((120, 5), False), ((120, 7, 8, 8), False)])
def test_images_of_several_shapes(gap, shape, shown):
    one = blobs(plain(gap_reports.gap_page(gap, RNG.random(shape))))[1]
    walls = [t for t in one["fig"]["data"] if t["type"] == "heatmap"]
    assert bool(walls) == shown
    if shape[-1] == 40: assert len(walls[0]["z"]) < 2 * 40 # smaller pictures
    with pytest.raises(ValueError, match="images must hold 120 pictures"): gap_reports.gap_page(gap, np.zeros((3, 8, 8)))


def test_a_run_has_a_report(tmp_path):
    task = kd.tasks.digits().few(4)
    train, valid, _ = task.loaders()
    student, teacher = kd.nets.tiny_mlp(), kd.nets.teacher_cnn()
    run = kd.distill(student, teacher, train, valid, epochs=1, progress=False)
    rest = plain(kd.report(run, tmp_path / "run.html", class_names=list("abcdefghij")).read_text(encoding="utf-8"))
    assert "from the logits that the run kept" in rest and '"j"' in rest
    alone = kd.distill(student, None, train, valid, epochs=1, progress=False)
    with pytest.raises(ValueError, match="this run had no teacher"): kd.report(alone, tmp_path / "x.html")
    blind = kd.distill(student, teacher, train, epochs=1, progress=False)
    with pytest.raises(ValueError, match="kept no logits of student and teacher"): kd.report(blind, tmp_path / "x.html")
    with pytest.raises(TypeError, match="takes a Gap .* or a Run .*, got list"): kd.report([1], tmp_path / "x.html")


# from stored logits

def test_compare_equals_gap(gap):
    class Fixed(torch.nn.Module):
        def __init__(self, z):
            super().__init__()
            self.z = torch.nn.Parameter(torch.as_tensor(z))

        def forward(self, x): return self.z[x]

    g = kd.gap(Fixed(STUDENT), Fixed(TEACHER), [(torch.arange(120), torch.as_tensor(Y))], latency=False)
    for name, row in gap.summary().items(): np.testing.assert_allclose(row["between" if "between" in row else "student"][0],
                                                                       g.summary()[name]["between" if "between" in row else "student"][0])


@pytest.mark.parametrize("call, message", [
    (lambda: compare(STUDENT[:5], TEACHER), r"a row for each of the 120 samples.*got \(5, 4\)"),
    (lambda: compare(STUDENT[:, :3], TEACHER), "different classes"),
    (lambda: compare(STUDENT[0], TEACHER[0]), r"student's logits must be \(N, C\).*got \(4,\)"),
    (lambda: compare(STUDENT, TEACHER, Y[:3]), "labels must be whole numbers of shape"),
    (lambda: compare(STUDENT, TEACHER, ids=[1]), "ids must hold 120 names"),
    (lambda: compare(STUDENT * np.nan, TEACHER), "student's logits hold NaN"),
    (lambda: compare(STUDENT[:0], TEACHER[:0]), "no samples"),
    (lambda: compare(STUDENT, TEACHER, T=-1), "T must be > 0"),
])
def test_compare_refuses_what_does_not_fit(call, message):
    with pytest.raises(ValueError, match=message): call()


def test_compare_tokens():
    "A row for each token with a label; pictures of sentences would not fit the rows."
    shape, y = (12, 10, 4), np.where(np.arange(120) % 10 < 7, Y, -100).reshape(12, 10)
    g = compare(STUDENT.reshape(shape), TEACHER.reshape(shape), y, inputs=np.zeros((12, 10)))
    assert g.n == 84 and g.ids[7] == "1:0" and g.inputs is None and "intervals are too narrow" in " ".join(g.notes)
    keep = np.arange(120) % 10 < 7
    np.testing.assert_allclose(g.kl, compare(STUDENT[keep], TEACHER[keep]).kl)
    assert "Class by class" in plain(gap_reports.gap_page(g))


# the widget

def test_show_a_gap(gap):
    from kdlab.widgets.gap import TeacherStudentGap
    from kdlab.widgets.temperature import TemperatureLens
    some = compare(STUDENT, TEACHER, np.where(np.arange(120) < 100, Y, -100), ids=[f"s{i}" for i in range(120)])
    view = kd.show(some)
    assert isinstance(view, TeacherStudentGap) and len(view.numbers["y"]) == 100 and view.ids[99] == "s99"
    assert kd.show(gap).images.shape == (120, 8, 8) and kd.show(gap).names == NAMES
    assert isinstance(kd.show(compare(STUDENT, TEACHER)), TemperatureLens)
    with pytest.raises(ValueError, match="kept no logits"): kd.show(compare(STUDENT, TEACHER, Y, keep=10))
