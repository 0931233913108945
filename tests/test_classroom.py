"""Solutions pass, each usual slip is named, nothing of the solution shows, and hints open one at a time."""
import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import kdlab as kd
from kdlab.classroom import EXERCISES, check


def soften(logits, T):
    return (logits / T).softmax(-1)


def soft_loss(zs, zt, T):
    log_ps, log_pt = (zs / T).log_softmax(-1), (zt / T).log_softmax(-1)
    return T**2 * (log_pt.exp() * (log_pt - log_ps)).sum(-1).mean()


def in_place(logits, T):
    logits /= T
    return logits.softmax(-1)


mean_kl = partial(F.kl_div, reduction="batchmean")


def in_two_steps(zs, zt, T):
    ps, pt = (zs / T).softmax(-1), (zt / T).softmax(-1)
    return T**2 * (pt * (pt.log() - ps.log())).sum(-1).mean()


def by_powers(logits, T):
    p = logits.softmax(-1) ** (1 / T)  # another way to the same probabilities
    return p / p.sum(-1, keepdim=True)


SOLUTIONS = {
    "soften": [soften, by_powers, lambda z, T: torch.exp((z / T) - torch.logsumexp(z / T, -1, keepdim=True))],
    "soft_loss": [soft_loss, lambda zs, zt, T: kd.SoftKL(T=T)(zs, zt),
                  lambda zs, zt, T: T * T * mean_kl((zs / T).log_softmax(1), (zt / T).softmax(1))],
}

SLIPS = {
    "soften": [
        (lambda z, T: None, "returns nothing yet"),
        (lambda z, T: ..., "returns nothing yet"),
        (lambda z, T: 0.5, "returns float"),
        (lambda z, T: z[0], "should have shape (5, 3), but has (3,)"),
        (lambda z, T: (z / T).softmax(0), "your columns sum to 1"),
        (lambda z, T: z / T, "the first row sums to"),
        (lambda z, T: z.softmax(-1) / T, "the first row sums to 0.500"),
        (lambda z, T: z.softmax(-1), "T = 4 gives the same as T = 1"),
        (lambda z, T: (z * T).softmax(-1), "the largest probability grew"),
        (lambda z, T: (z / T**2).softmax(-1), "for logits 2 and 0 at T = 4 it is 0.125"),
        (lambda z, T: (z / T).exp() / (z / T).exp().sum(-1, keepdim=True), "NaN"),
        (in_place, "the logits that it was given are others"),
        (lambda z, T: undefined(z), "raised NameError: name 'undefined' is not defined"),  # noqa: F821
        (lambda z: z, "raised TypeError"),
    ],
    "soft_loss": [
        (lambda zs, zt, T: None, "returns nothing yet"),
        (lambda zs, zt, T: soft_loss(zs, zt, T).item(), "returns float"),
        (lambda zs, zt, T: kd.functional.forward_kl(zs, zt, T=T, reduction="none"), "should have shape ()"),
        (lambda zs, zt, T: mean_kl((zs / T).softmax(-1), (zt / T).softmax(-1)), "where its logarithm should be"),
        (lambda zs, zt, T: soft_loss(zt, zs, T), "changed places"),
        (lambda zs, zt, T: soft_loss(zs, zt, T) / zs.shape[-1], "there are three classes"),
        (lambda zs, zt, T: F.cross_entropy(zs / T, (zt / T).softmax(-1)), "instead of 0.2231"),
        (lambda zs, zt, T: soft_loss(zs, zt, T) * len(zs), "twice double it"),
        (lambda zs, zt, T: soft_loss(zs, T * zt, T), "the teacher's are not"),
        (lambda zs, zt, T: soft_loss(T * zs, zt, T), "the student's are not"),
        (lambda zs, zt, T: soft_loss(zs, zt, 1), "nothing is divided by T"),
        (lambda zs, zt, T: soft_loss(zs.detach(), zt, T), "cut the gradient off"),
        (lambda zs, zt, T: soft_loss(zs, zt, T) / T**2, "it became 0.25 times as large"),
        (lambda zs, zt, T: soft_loss(zs, zt, T) / T, "it became 0.50 times as large"),
        (in_two_steps, "it is infinite"),
    ],
}


@pytest.mark.parametrize(("name", "answer"), [(n, a) for n, all_ in SOLUTIONS.items() for a in all_])
def test_a_solution_passes(name, answer):
    feedback = check(name, answer)
    assert feedback.passed, feedback
    assert len(feedback.held) == len(EXERCISES[name].checks) and "solved" in repr(feedback)
    assert "details" not in feedback._repr_html_()


@pytest.mark.parametrize(("name", "answer", "says"), [(n, *s) for n, all_ in SLIPS.items() for s in all_])
def test_a_slip_is_named(name, answer, says):
    feedback = check(name, answer)
    assert not feedback.passed and says in feedback.why, feedback


def test_the_lines_of_the_learner_are_named_and_no_other(tmp_path):
    space, cell = {}, tmp_path / "cell.py"
    cell.write_text("def soften(logits, T):\n    scaled = logits / T\n    return scaled.softmax(dim=T)\n")
    exec(compile(cell.read_text(), str(cell), "exec"), space)
    feedback = check("soften", space["soften"])
    assert feedback.why.startswith("your function raised TypeError: ")
    assert feedback.why.endswith(", in line 3 of your cell: return scaled.softmax(dim=T)")
    assert "kdlab" not in feedback.why and "Traceback" not in feedback.why


@pytest.mark.parametrize("name", EXERCISES)
def test_feedback_gives_no_solution_away(name):
    for answer, _ in SLIPS[name]:
        feedback = check(name, answer)
        for text in (repr(feedback), feedback.why, *feedback.held, feedback.failed):
            assert not re.search(r"log_softmax|softmax\(|/ ?T\b|T\*\*2|T²", text), text


@pytest.mark.parametrize("name", EXERCISES)
def test_hints_open_one_at_a_time(name):
    feedback = check(name, lambda *args: None)
    hints = EXERCISES[name].hints
    assert [feedback.hint(i) for i in range(1, len(hints) + 1)] == list(hints)
    with pytest.raises(ValueError, match=f"has hints 1 to {len(hints)}, got 9"):
        feedback.hint(9)
    html = feedback._repr_html_()
    above = [html[:m.start()] for m in re.finditer("<summary>", html)]
    depth = [text.count("<details>") - text.count("</details>") for text in above]
    assert depth == list(range(1, len(hints) + 1))  # each inside the one before
    assert not any(hint in repr(feedback) for hint in hints)


def test_feedback_is_escaped():
    def answer(*args): raise ValueError("<script>")
    assert "<script>" not in check("soften", answer)._repr_html_()


def test_an_answer_cannot_change_what_the_next_check_sees():
    def greedy(logits, T):
        result = (logits / T).softmax(-1)
        logits.zero_()
        return result
    assert [check("soften", greedy).failed for _ in range(2)] == ["it leaves its input alone"] * 2
    assert check("soften", soften).passed


def test_an_unknown_exercise():
    with pytest.raises(ValueError, match="no exercise 'softn'; did you mean 'soften'?"):
        check("softn", soften)
    with pytest.raises(ValueError, match="there are soften, soft_loss"):
        check("?", soften)
