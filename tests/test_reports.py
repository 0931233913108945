"Table and page of an experiment, from results that are made up."
import json
import re

import numpy as np
import pytest
from plotly.offline import get_plotlyjs

from kdlab import reports
from kdlab.figures import kit


def make(alone, distilled, difference=None, saw="40 labelled", **settings):
    "Results with these accuracies, one a seed."
    curve = [20., 60., 80., 82.]
    arm = lambda accuracy: {"accuracy": accuracy, "agreement": accuracy + 1, "curve": curve, "seconds": 2.}
    d = None if difference is None else dict(zip(("mean", "low", "high", "wins", "seeds", "verdict"), difference))
    return {
        "settings": {"task": "digits <few>", "T": 4., "alpha": 0.1, "epochs": 4} | settings,
        "objective": "0.1·CE + 0.9·KL",
        "seeds": [{"teacher": arm(97.), "alone": arm(a), "distilled": arm(b)} for a, b in zip(alone, distilled)],
        "difference": d, "saw": {"teacher": "1000 labelled", "alone": saw, "distilled": f"{saw}, teacher"},
        "parameters": dict(teacher=38282, alone=19210, distilled=19210), "versions": {"torch": "2.13.0"},
        "command": "kdlab distill --out 'a&b'"}


WINS = make([80., 84.], [90., 92.], (9.0, 1.0, 17.0, 2, 2, "wins"))
EQUAL = make([80., 84.], [82., 81.], (-0.5, -32.3, 31.3, 1, 2, "no difference here"))
LOSES = make([90., 92.], [80., 84.], (-9.0, -17.0, -1.0, 0, 2, "loses"))
ONE = make([80.], [90.])


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (40, 10))
    return {"teacher": logits, "distilled": logits + rng.normal(0, 2, logits.shape), "labels": logits.argmax(1),
            "inputs": rng.random((40, 1, 8, 8)), "classes": tuple("0123456789")}


def states(page):
    "The data of all figures of a page."
    return [json.loads(blob) for blob in re.findall(r'<script type="application/json">(.*?)</script>', page, re.S)]


def test_mean_and_sample_deviation():
    assert reports.mean_sd([80., 84.]) == "82.0 ± 2.8" and reports.mean_sd([80.]) == "80.0"


@pytest.mark.parametrize("results, words, headline", [
    (WINS, "+9.0 points [+1.0, +17.0], better at 2 of 2 seeds: distillation wins", "Distillation wins by 9.0 points"),
    (EQUAL, "-0.5 points [-32.3, +31.3], better at 1 of 2 seeds: no difference here (fewer than 5 seeds say little)",
     "No difference here"),
    (LOSES, "-9.0 points [-17.0, -1.0], better at 0 of 2 seeds: distillation loses", "Distillation loses by 9.0 points"),
    (ONE, "+10.0 points at one seed, which leaves chance open: no verdict",
     "One seed: +10.0 points, and no verdict")])
def test_says_what_the_interval_says(results, words, headline, arrays):
    assert reports.verdict(results) == words and words in reports.table(results)
    page = reports.experiment_page(results, arrays)
    assert f"<h1>{headline}</h1>" in page and words in page


def test_the_difference_is_distilled_minus_alone():
    assert reports.differences(WINS) == [10., 8.] and reports.differences(LOSES) == [-10., -8.]


def test_table_is_aligned():
    lines = reports.table(WINS).splitlines()
    head, rows = lines[2], lines[3:6]
    assert [row.split("   ")[0].strip() for row in rows] == list(reports.ARMS.values())
    end = head.index("test accuracy %") + len("test accuracy %")
    assert all(row[:end].endswith("±" + row[:end].split("±")[1]) and row[end] == " " for row in rows)
    assert "82.0 ± 2.8" in rows[1] and "83.0 ± 2.8" in rows[1] and "19,210" in rows[1]


def test_seeds_figure_pairs_the_students():
    pairs, _, alone, distilled, dots, whole = reports.seeds_figure(WINS).data
    assert pairs.x == (80., 90., None, 84., 92., None) and alone.x == (80., 84.) and distilled.x == (90., 92.)
    assert dots.x == (10., 8.) and whole.x == (9.,) and whole.y == (2,)
    assert whole.error_x.array == (8.,) and whole.error_x.arrayminus == (8.,)
    assert len(reports.seeds_figure(ONE).data) == 5


def test_curves_are_means_in_a_band_of_one_deviation():
    results = make([80., 84.], [90., 92.])
    results["seeds"][0]["alone"]["curve"] = [10., 50., 70., 72.]
    band, line = reports.curves_figure(results).data[2:4]
    assert list(line.y) == [15., 55., 75., 77.]
    assert band.y[0] == pytest.approx(15 + 50**.5) and band.y[-1] == pytest.approx(15 - 50**.5)


def test_every_arm_has_a_second_channel_beside_colour():
    looks = reports._LOOK.values()
    for channel in ("color", "dash", "symbol"): assert len({look[channel] for look in looks}) == 3


def test_equation_leaves_out_what_has_no_weight():
    both, soft, hard = (reports.equation(alpha, 4.) for alpha in (.1, 0., 1.))
    assert "CE" in both and "KL" in both and "<mn>0.9</mn>" in both and "<msup><mn>4</mn><mn>2</mn></msup>" in both
    assert "CE" not in soft and "KL" not in hard


def test_reading_tells_equal_data_from_less_data():
    assert "40 labelled" in reports.reading(WINS) and "another experiment" in reports.reading(WINS)
    assert "no lack of labels" in reports.reading(make([80.], [90.], saw="1000 labelled"))


def test_page_is_one_file(arrays):
    page = reports.experiment_page(WINS, arrays)
    bundle = get_plotlyjs()
    assert page.count(bundle) == 1
    rest = page.replace(bundle, "")
    assert not re.search(r"https?:|//cdn|<link|<iframe|<img|@import|url\(|\bsrc=", rest)
    assert "digits &lt;few&gt;" in rest and "'a&amp;b'" in rest.replace("&#x27;", "'") and "<few>" not in rest
    assert 'lang="en"' in rest and "prefers-color-scheme: dark" in rest and rest.count('role="img"') == 4


def test_page_holds_every_state(arrays):
    seeds, curves, gap, lens = states(reports.experiment_page(WINS, arrays))
    assert list(seeds["states"]) == list(curves["states"]) == [""]
    assert len(gap["states"]) == len(gap["controls"][0]["values"]) == 6
    T, example = lens["controls"]
    assert len(lens["states"]) == len(T["values"]) * len(example["values"]) and lens["values"]["T"] == 4.
    for one in (gap, lens):
        for state in one["states"].values(): assert state["text"]
    at = f"{T['values'].index(8.)},0"
    heights = lens["states"][at]["data"]["0"]["y"]
    assert heights == pytest.approx(kit.softmax(arrays["teacher"][example["values"][0]], 8.).tolist())


def test_lens_has_the_temperature_of_the_experiment(arrays):
    *_, lens = states(reports.experiment_page(make([80.], [90.], T=5.5), arrays))
    assert 5.5 in lens["controls"][0]["values"] and lens["values"]["T"] == 5.5


def test_lens_examples_go_from_unsure_to_sure():
    logits = np.diag([5., 1., 3.])
    assert reports.lens_examples(logits, 3) == [1, 2, 0] or reports.lens_examples(logits, 3) == [1, 0]
    assert len(reports.lens_examples(np.eye(2), 6)) == 2


def test_points_have_no_pictures(arrays):
    flat = arrays | {"inputs": np.zeros((40, 2))}
    *_, gap, lens = states(reports.experiment_page(WINS, flat))
    assert all(trace["type"] != "heatmap" for one in (gap, lens) for trace in one["fig"]["data"])
