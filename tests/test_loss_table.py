"""The table of losses in the docs is what the code does, and the index of papers names every loss."""
import copy
import pickle
import sys
from pathlib import Path

import pytest
import torch

import kdlab as kd
from kdlab import ops

DOCS = Path(__file__).parents[1] / "docs"
pytestmark = pytest.mark.skipif(ops._C is None, reason="the compiled core is not built: the column of kernels would be empty")


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(DOCS))
    try: import loss_table
    finally: sys.path.pop(0)
    return loss_table


@pytest.fixture(scope="module")
def written(script): return script.text()


def test_the_page_is_up_to_date(written):
    assert (DOCS / "losses.md").read_text(encoding="utf-8") == written, "run python docs/loss_table.py"


def test_every_public_loss_is_in_the_index(script, written):
    index = written.split("## Paper")[1]
    names = [c.__name__ for c in script.classes()]
    public = [n for n in kd.__all__ if isinstance(getattr(kd, n), type) and issubclass(getattr(kd, n), kd.Loss)]
    assert set(public) - script.BASES <= set(names) and len(names) == len(set(names))
    for name in names: assert f"| `{name}` |" in index, name


def test_what_the_probes_find(script):
    found = {name: script.properties(getattr(kd, name)) for name in (
        "ForwardKL", "LogitMSE", "NKD", "DIST", "CrossEntropy", "TeacherFree", "Standardized", "Cosine", "SoftKL", "RowWeighted")}
    yes = lambda key: {name for name, p in found.items() if p[key]}
    assert yes("shift") == set(found) - {"LogitMSE", "Cosine"} and yes("scale") == {"Standardized", "Cosine"}
    assert yes("couples") == {"DIST"} and yes("none") == set(found) - {"DIST"}
    assert yes("labels") == {"NKD", "CrossEntropy", "TeacherFree"} and yes("teacher") == set(found) - {"CrossEntropy", "TeacherFree"}
    assert yes("zero") == set(found) - {"NKD", "CrossEntropy", "TeacherFree"} and found["SoftKL"]["square"] == "T = 4"
    assert not found["LogitMSE"]["square"] and found["NKD"]["kernel"] and found["ForwardKL"]["kernel"]
    assert not script.properties(kd.SoftSpearman)["kernel"]


def test_papers_and_differences_are_read_from_docstrings(script):
    text = "L = x. Yang et al. 2023 (arXiv:2303.13005), section 2. See GKD (Agarwal et al. 2024, arXiv:2306.13649). The paper sums; we do not."
    assert script.papers(text) == {"2303.13005": "Yang et al. 2023", "2306.13649": "Agarwal et al. 2024"}
    assert script.papers("Hinton, Vinyals, Dean 2015 (arXiv:1503.02531)") == {"1503.02531": "Hinton, Vinyals, Dean 2015"}
    assert script.difference(text) == "The paper sums; we do not."
    assert "authors' code multiplies by it" in script.difference(script.documents(kd.DIST))


def test_every_loss_copies_pickles_moves_and_has_a_state(script):
    tried = 0
    for cls in script.classes():
        try: loss = script.made(cls)
        except TypeError: continue
        fitting = script.fits(loss)
        if fitting is None: continue
        name, s, t = fitting
        loss = script.ready(loss, s, t)
        if cls is kd.RowWeighted: loss.by = None  # a lambda of the script does not pickle
        target = (script.LABELS,) if name == "logits" else ()
        objective = 2 * loss
        for twin in (copy.deepcopy(objective), pickle.loads(pickle.dumps(objective))):
            assert repr(twin) == repr(objective), cls
            twin.load_state_dict(objective.state_dict())
            if cls in (kd.RowWeighted, kd.MGD): continue
            assert torch.equal(twin(s, t, *target), copy.deepcopy(objective)(s, t, *target)), cls
        assert all(x.is_meta for x in [*copy.deepcopy(objective).to("meta").parameters(), *copy.deepcopy(objective).to("meta").buffers()])
        tried += 1
    assert tried > 50
