"""The numbers behind the figures against hand calculation, and what the builders make of them."""
import json
import re

import numpy as np
import plotly.graph_objects as go
import pytest
import torch

from kdlab.figures import kit
from kdlab.figures.gap import (CHOICES, GROUPS, PER_PAGE, chosen, class_gap, gallery_rows, gap_classes, gap_figure,
                               gap_numbers, gap_sentence)
from kdlab.figures.temperature import lens_bars, lens_numbers, lens_sentence, temperature_lens

ROW = np.log([8.0, 4.0, 2.0, 2.0])  # probabilities 1/2, 1/4, 1/8, 1/8 at T = 1


def test_softmax_by_hand():
    assert np.allclose(kit.softmax(ROW), [1 / 2, 1 / 4, 1 / 8, 1 / 8])
    root = np.sqrt([8.0, 4, 2, 2])
    assert np.allclose(kit.softmax(ROW, 2), root / root.sum())
    assert np.allclose(kit.softmax([[1e4, 0], [-1e4, 0]]), [[1, 0], [0, 1]])
    assert kit.softmax([0.0, -np.inf], 0.1).tolist() == [1, 0]
    with pytest.raises(ValueError, match="T must be > 0, got -1"):
        kit.softmax(ROW, -1)


def test_entropy_in_nats_by_hand():
    assert np.isclose(kit.entropy([1 / 2, 1 / 4, 1 / 8, 1 / 8]), 1.75 * np.log(2))
    assert np.allclose(kit.entropy([[1, 0], [0.5, 0.5]]), [0, np.log(2)])
    assert str(kit.entropy([1.0, 0.0])) == "0.0"


def test_ranking_and_mass():
    assert kit.ranking([0.2, 0.5, 0.2, 0.1]).tolist() == [1, 0, 2, 3]
    assert np.isclose(kit.top_mass([0.2, 0.5, 0.2, 0.1], 2), 0.7)
    assert np.allclose(kit.top_mass([[0.9, 0.1], [0.4, 0.6]], 1), [0.9, 0.6])


def test_tensors_are_taken_as_arrays():
    z = torch.randn(3, 4, dtype=torch.bfloat16, requires_grad=True)
    assert np.array_equal(kit.check_logits(z), z.detach().double().numpy())
    assert kit.check_labels(torch.tensor([0, 3, 1]), 3, 4).tolist() == [0, 3, 1]
    assert kit.check_images(torch.zeros(3, 1, 8, 8), 3).shape == (3, 8, 8)


@pytest.mark.parametrize("call, message", [
    (lambda: kit.check_logits(np.zeros((2, 3, 4)), "teacher_logits"), r"teacher_logits must be numbers of shape \(N"),
    (lambda: kit.check_logits(np.zeros((5, 1))), "at least two classes"),
    (lambda: kit.check_logits([["a", "b"]]), "must be numbers"),
    (lambda: kit.check_labels([0, 1], 3, 4), r"shape \(3,\)"),
    (lambda: kit.check_labels([0.5, 1.0], 2, 4), "whole numbers"),
    (lambda: kit.check_labels([0, 4], 2, 4), r"0\.\.3 for 4 classes, got 0\.\.4"),
    (lambda: kit.check_images(np.zeros((2, 8, 8, 3)), 2), r"\(2, height, width\)"),
    (lambda: kit.check_names(["a"], 2), "2 names"),
    (lambda: kit.check_ids([1], 2), "2 names"),
    (lambda: kit.page(go.Figure(), "t", "x", bundle="net"), "bundle must be"),
])
def test_bad_input_says_what_to_give(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_series_differ_in_colour_and_in_a_second_channel():
    looks = [kit.series(i) for i in range(6)]
    for channel in ("color", "dash", "symbol", "pattern"):
        assert len({look[channel] for look in looks}) == 6
    assert kit.fade("#102030", 0.5) == "rgba(16, 32, 48, 0.5)"


def contrast(color, paper):
    "Contrast ratio of WCAG 2."
    light = [sum(w * (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4)
                 for w, v in zip((0.2126, 0.7152, 0.0722), (int(c[i:i + 2], 16) / 255 for i in (1, 3, 5))))
             for c in (color, paper)]
    return (max(light) + 0.05) / (min(light) + 0.05)


def test_ink_reads_on_light_and_dark_paper():
    assert contrast(kit.INK, "#ffffff") >= 4.5 and contrast(kit.INK, "#111111") >= 4


def test_changes_hold_only_what_differs():
    old, new = (go.Figure([dict(type="bar", y=y, marker=dict(color="red"))], dict(title_text=title)).to_plotly_json()
                for y, title in (([1, 2], "a"), ([1, 3], "b")))
    assert kit.changes(old, new) == ({0: {"y": [1, 3]}}, {"title.text": "b"})
    assert kit.changes(old, old) == ({}, {})
    assert kit.changes(new, go.Figure([dict(type="bar", y=[1, 3])]).to_plotly_json()) == (
        {0: {"marker.color": None}}, {"title.text": None})


def test_lens_numbers_by_hand():
    now = lens_numbers(ROW, 1)
    assert np.allclose(now["p"], [1 / 2, 1 / 4, 1 / 8, 1 / 8]) and now["order"].tolist() == [0, 1, 2, 3]
    assert np.isclose(now["entropy"], 1.75 * np.log(2)) and np.isclose(now["most"], np.log(4))
    assert now["top1"] == 0.5 and now["top3"] == 0.875
    hot = lens_numbers(ROW, 1000)
    assert np.isclose(hot["entropy"], np.log(4), atol=1e-5) and hot["order"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_lens_refuses_what_has_no_softmax(bad):
    with pytest.raises(ValueError, match="NaN or infinity"):
        lens_numbers([0.0, bad])
    assert lens_numbers([0.0, -np.inf])["p"].tolist() == [1, 0]


def test_lens_figure_shows_the_numbers():
    fig = temperature_lens(ROW, T=2, label=1, image=np.eye(3), class_names=list("abcd"))
    now = lens_numbers(ROW, 2)
    assert np.allclose(fig.data[0].y, now["p"]) and fig.layout.xaxis2.ticktext == ("a", "b", "c", "d")
    assert fig.data[0].marker.pattern.shape == ("", "/", "", "")
    assert [fig.data[i].y[0] for i in (2, 4, 6)] == [now["entropy"], now["top1"], now["top3"]]
    assert all(fig.data[i].x == (2,) for i in (2, 4, 6)) and fig.data[7].type == "heatmap"
    assert fig.layout.yaxis2.range == (0, 1.05) and len(temperature_lens(ROW).data) == 7


def test_lens_curves_pass_through_the_markers():
    fig = temperature_lens(ROW, T=3)
    for line, mark in ((1, 2), (3, 4), (5, 6)):
        at = np.interp(3, fig.data[line].x, fig.data[line].y)
        assert np.isclose(at, fig.data[mark].y[0], atol=2e-3)


def test_a_thousand_classes_become_top_k_and_the_rest():
    row = np.random.default_rng(0).normal(size=1000)
    names, heights, classes = lens_bars(row, 2.0, [f"c{k}" for k in range(1000)])
    assert classes[:-1] == kit.ranking(row)[:12].tolist() and names[-1] == "988 others"
    assert np.isclose(sum(heights), 1) and np.isclose(heights[0], kit.softmax(row, 2).max())
    last = int(np.argmin(row))
    assert lens_bars(row, 2.0, [""] * 1000, label=last)[2][-2:] == [last, -1]


def test_lens_sentence():
    assert lens_sentence(ROW, 1) == ("At T = 1 the teacher gives 0 a probability of 0.50, then 1 with 0.25; "
                                     "entropy 1.21 nats of at most 1.39.")
    named = lens_sentence(ROW, 1, label=1, class_names=["cat", "dog", "x", "y"])
    assert "gives cat a probability of 0.50 (the label is dog), then" in named
    assert "over 0.99, then 1 with 4.5e-05" in lens_sentence([10.0, 0.0], 1)


# eight examples of three classes: predictions of teacher and student beside the labels
Y = np.array([0, 0, 0, 0, 1, 1, 2, 2])
T_SAYS = np.array([0, 0, 0, 1, 1, 0, 2, 0])
S_SAYS = np.array([0, 1, 2, 1, 0, 1, 2, 1])


def one_hot_logits(says, margin=2.0):
    return margin * np.eye(3)[says]


@pytest.fixture
def numbers():
    return gap_numbers(one_hot_logits(T_SAYS), one_hot_logits(S_SAYS, 1.0), Y)


def test_gap_numbers_by_hand(numbers):
    assert numbers["group"].tolist() == [0, 1, 1, 3, 1, 2, 0, 3]
    high, low = np.exp(2) / (np.exp(2) + 2), 1 / (np.exp(2) + 2)
    assert np.allclose(numbers["teacher"]["confidence"], np.where(T_SAYS == Y, high, low))
    assert [r.sum() for r in numbers["right"]] == [5, 3]


def test_filters(numbers):
    assert chosen(numbers, "disagree").tolist() == (T_SAYS != S_SAYS).tolist()
    assert np.flatnonzero(chosen(numbers, GROUPS[1], klass=0)).tolist() == [1, 2]
    assert np.flatnonzero(chosen(numbers, "all", -1, [2, 6])).tolist() == [2, 6]
    assert sum(chosen(numbers, g).sum() for g in GROUPS) == 8 and CHOICES[0] == "all"
    with pytest.raises(ValueError, match="which must be one of all"):
        chosen(numbers, "wrong")
    with pytest.raises(ValueError, match="klass must lie in 0..2"):
        chosen(numbers, klass=3)


def test_class_gap_by_hand(numbers):
    assert class_gap(numbers).tolist() == [50, 0, 0]  # 3/4 - 1/4, 1/2 - 1/2, 1/2 - 1/2
    parts = [class_gap(numbers, chosen(numbers, g)) for g in GROUPS]
    assert np.allclose(sum(parts), class_gap(numbers)) and parts[1].tolist() == [50, 50, 0]
    accuracy = [np.array([(says == Y)[Y == c].mean() for c in range(3)]) for says in (T_SAYS, S_SAYS)]
    assert np.allclose(class_gap(numbers), 100 * (accuracy[0] - accuracy[1]))


def test_gallery_pages():
    rng = np.random.default_rng(0)
    many = gap_numbers(rng.normal(size=(40, 3)), rng.normal(size=(40, 3)), rng.integers(3, size=40))
    pages = [gallery_rows(many, np.ones(40, bool), page) for page in range(3)]
    rows = sum((p[0] for p in pages), [])
    assert sorted(rows) == list(range(40)) and pages[0][1] == 3 and len(pages[0][0]) == PER_PAGE
    gaps = np.abs(many["teacher"]["confidence"] - many["student"]["confidence"])[rows]
    assert (np.diff(gaps) <= 0).all()
    assert gallery_rows(many, np.zeros(40, bool), 5) == ([], 1)


def test_gap_figure_fades_what_is_not_chosen(numbers):
    fig = gap_figure(numbers, GROUPS[1], klass=0, images=np.random.rand(8, 4, 4))
    assert [fig.data[k].marker.color for k in range(1, 5)] == [(0, 0), (1, 1, 0), (0,), (0, 0)]
    assert fig.data[5].y == (50, 50, 0) and fig.data[5].marker.line.width == (3, 0, 0)
    assert len(fig.data[6].text) == 2 and fig.data[11].type == "heatmap"
    assert [t.name for t in fig.data[7:11]] == [
        "both right: 2", "only the teacher: 3", "only the student: 1", "both wrong: 2"]
    assert len(gap_figure(numbers).data) == 11


def test_gap_with_a_thousand_classes_shows_the_largest():
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(1000), 2)
    teacher, student = 5 * np.eye(1000)[y], rng.normal(size=(2000, 1000))
    student[100:] = teacher[100:]
    many = gap_numbers(teacher, student, y)
    classes = gap_classes(many)
    assert classes == sorted(classes) and max(classes) < 50 and len(classes) == 20
    assert len(gap_figure(many).data[5].y) == 20


def test_gap_sentence_counts(numbers):
    assert gap_sentence(numbers) == (
        "Of 8 examples the teacher has 62.5% right and the student 37.5%; they disagree on 5. Shown: all 8.")
    assert gap_sentence(numbers, GROUPS[1], 0, [1, 5], ["cat", "dog", "cow"]).endswith(
        "Shown: 1 of the 2 picked by hand of class cat, only the teacher right.")


def test_gap_refuses_what_does_not_fit():
    z = np.zeros((4, 3))
    for call, message in [
        ((z, z[:2], [0] * 4), r"got \(4, 3\) and \(2, 3\)"),
        ((z, z, None), "labels must hold the true class"),
        ((z, z * np.nan, [0] * 4), "student_logits hold NaN or infinity in 4 of 4 rows, the first is row 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            gap_numbers(*call)


def test_figures_are_plain_json(numbers):
    "Numpy scalars and NaN would break the page, the saved state, or the comparison of two figures."
    for fig in (temperature_lens(ROW, image=np.eye(3)), gap_figure(numbers, images=np.random.rand(8, 4, 4))):
        text = json.dumps({k: fig.to_plotly_json()[k] for k in ("data", "layout")}, allow_nan=False,
                          default=lambda o: o.to_plotly_json())
        assert "bdata" not in text


def test_page_holds_its_states_and_loads_nothing(tmp_path):
    draw = lambda T: temperature_lens(ROW, T)
    states = {str(i): (draw(T), f"text {T:g}") for i, T in enumerate((1.0, 2.0))}
    args = dict(title="A <title>", text="text 1", caption="why", controls=[kit.slider("T", "Temperature", [1.0, 2.0])],
                values={"T": 1.0}, states=states)
    html = kit.page(draw(1.0), bundle="file", **args)
    assert '<html lang="en">' in html and "<title>A &lt;title&gt;</title>" in html and "<figcaption>why" in html
    assert "http" not in html
    blob = json.loads(re.search(r'id="kd-data">(.*?)</script>', html, re.S)[1])
    assert blob["states"]["0"]["data"] == {} and blob["states"]["1"]["text"] == "text 2"
    assert np.allclose(blob["states"]["1"]["data"]["0"]["y"], kit.softmax(ROW, 2))
    kit.write_page(tmp_path / "deep" / "a.html", html)
    assert (tmp_path / "deep" / "plotly.min.js").stat().st_size > 1e6
    alone = kit.page(draw(1.0), **args)
    assert not re.search(r'<(script|link|img)[^>]+(src|href)=', alone) and "@import" not in alone.split("<script>")[0]
