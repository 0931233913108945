"""What the losses on logits are worth, written a second time: numpy, float64, no kdlab and no torch.

`python tests/goldens/logits.py` writes logits.json beside it. Gradients are complex steps: with no difference of near
numbers they are exact to rounding, and they need nothing but the formula of the value.
"""
from pathlib import Path

import numpy as np

import writing
from writing import absolute, gradient

C, T = 6, 2.5
RNG = np.random.default_rng(7)
S, Z = (np.round(2.5 * RNG.standard_normal((7, C)), 3) for _ in range(2))  # logits of the student, of the teacher
Y = np.array([0, 3, -100, 5, 1, 2, 3])  # labels; row 2 has none
MASK = np.array([True, True, True, True, False, True, True])  # row 4 is masked
VALID = MASK & (Y != -100)
LABELS = np.where(Y == -100, 0, Y)
WEIGHT = np.array([1.0, 0.5, 2.0, 3.0, 0.0, 1.5])  # class weights
MIXED = 0.7 * np.eye(C)[LABELS] + 0.3 * np.eye(C)[(LABELS + 2) % C]  # what mixup makes of two labels


# tools that let complex numbers through

def log_softmax(x):
    x = x - x.real.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def softmax(x):
    return np.exp(log_softmax(x))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def kl(p, q):
    return (p * np.log(p / q)).sum(-1)


def pick(x, at=LABELS):
    return np.take_along_axis(x, at[:, None], -1)[:, 0]


def others(x):
    "Rows without the label's class."
    return x[np.arange(C) != LABELS[:, None]].reshape(len(x), C - 1)


def one_minus_pearson(a, b, axis):
    a, b = (x - x.mean(axis, keepdims=True) for x in (a, b))
    return 1 - (a * b).sum(axis) / np.sqrt((a * a).sum(axis) * (b * b).sum(axis))


def pool_adjacent_violators(y):
    "The falling sequence nearest to y."
    blocks = []  # sum, size
    for value in y:
        blocks.append([value, 1])
        while len(blocks) > 1 and (blocks[-2][0] / blocks[-2][1]).real <= (blocks[-1][0] / blocks[-1][1]).real:
            total, size = blocks.pop()
            blocks[-1][0] += total
            blocks[-1][1] += size
    return np.concatenate([np.full(n, total / n) for total, n in blocks])


def soft_ranks(x, strength):
    "Ranks from below, projected: Blondel et al. 2020."
    out = np.empty_like(x)
    for i, row in enumerate(x):
        order = np.argsort(-row.real)
        z = row[order] / strength
        out[i, order] = z - pool_adjacent_violators(z - np.arange(C, 0, -1))
    return out


def ranks(x):
    "Ranks from below; equal values share their mean."
    return np.array([[(row < v).sum() + ((row == v).sum() + 1) / 2 for v in row] for row in x])


# rows of the losses: (student, teacher, temperature) -> one value a row, no T² in it

def forward_kl(s, t, T): return kl(softmax(t / T), softmax(s / T))
def reverse_kl(s, t, T): return kl(softmax(s / T), softmax(t / T))
def total_variation(s, t, T): return absolute(softmax(t / T) - softmax(s / T)).sum(-1) / 2
def soft_cross_entropy(s, t, T): return -(softmax(t / T) * log_softmax(s / T)).sum(-1)
def binary_forward_kl(s, t, T): return kl(sigmoid(t / T), sigmoid(s / T)) + kl(1 - sigmoid(t / T), 1 - sigmoid(s / T))
def soft_spearman(s, t, strength): return one_minus_pearson(soft_ranks(s, strength), soft_ranks(t, strength), -1)


def jsd(beta):
    def rows(s, t, T):
        p, q = softmax(t / T), softmax(s / T)
        m = beta * p + (1 - beta) * q
        return beta * kl(p, m) + (1 - beta) * kl(q, m)
    return rows


def skew(alpha, reverse):
    def rows(s, t, T):
        p, q = softmax(t / T), softmax(s / T)
        return kl(q, alpha * q + (1 - alpha) * p) if reverse else kl(p, alpha * p + (1 - alpha) * q)
    return rows


def logit_mse(center):
    def rows(s, t, T):
        d = s - t
        return ((d - d.mean(-1, keepdims=True) * center)**2).sum(-1)
    return rows


def standardized(s, t, T):
    z = lambda x: (x - x.mean(-1, keepdims=True)) / np.sqrt(((x - x.mean(-1, keepdims=True))**2).mean(-1, keepdims=True))
    return forward_kl(z(s), z(t), T)


def teacher_free(correct):
    def rows(s, t, T):
        virtual = np.where(np.arange(C) == LABELS[:, None], correct, (1 - correct) / (C - 1))
        return forward_kl(s, np.log(virtual), T)
    return rows


def nkd(gamma, square):
    def rows(s, t, T):
        label = -pick(softmax(t)) * pick(log_softmax(s))
        rest = -(softmax(others(t) / T) * log_softmax(others(s) / T)).sum(-1)
        return label + gamma * square * rest
    return rows


def dkd(alpha, beta):
    def rows(s, t, T):
        two = lambda x: np.stack([pick(softmax(x / T)), 1 - pick(softmax(x / T))], -1)
        return alpha * kl(two(t), two(s)) + beta * kl(softmax(others(t) / T), softmax(others(s) / T))
    return rows


def cross_entropy(p, weight=1.0, smoothing=0.0):
    def rows(s, t, T): return -(weight * ((1 - smoothing) * p + smoothing / C) * log_softmax(s)).sum(-1)
    return rows


# reductions: over the rows that count, and over all of them

def mean(rows, valid=VALID): return rows[valid].sum() / valid.sum()
def by_class(rows, valid=VALID): return rows[valid].sum() / WEIGHT[LABELS][valid].sum()


def dist(inter, intra):
    def whole(s, t, T, valid=VALID):
        p, q = softmax(t[valid] / T), softmax(s[valid] / T)
        return inter * one_minus_pearson(q, p, 1).mean() + intra * one_minus_pearson(q, p, 0).mean()
    return whole


def entry(rows, T=T, square=None, reduce=mean, symmetric=False, swap=True, whole=False):
    "Value, gradient, and the values of the usual mistakes."
    square = T * T if square is None else square
    if whole: f = lambda s, t, valid=VALID: square * rows(s, t, T, valid)
    else: f = lambda s, t, valid=VALID: square * reduce(rows(s, t, T), valid)
    value = f(S, Z)
    wrong = {"divided by C": value / C, "no mask": f(S, Z, np.ones(len(S), bool))}
    if square != 1: wrong["no T²"] = value / square
    if swap and not symmetric: wrong["arguments swapped"] = f(Z, S)
    out = {"value": value, "gradient": gradient(lambda s: f(s, Z), S), "wrong": wrong}
    if not whole: out["rows"] = np.where(VALID, square * rows(S, Z, T), 0)
    return out


def kendall(a, b):
    tau = []
    for x, y in zip(a, b):
        u, v = (np.sign(z[:, None] - z) for z in (x, y))
        tau.append((u * v).sum() / np.sqrt((u * u).sum() * (v * v).sum()))
    return np.array(tau)


def entropy(x): return -(softmax(x) * log_softmax(x)).sum(-1)


def goldens():
    one_hot = np.eye(C)[LABELS]
    hard = dict(T=1.0, square=1.0, swap=False)
    n = nkd(1.5, T * T)
    plain = nkd(1.5, 1.0)
    losses = {
        "forward_kl": entry(forward_kl), "reverse_kl": entry(reverse_kl), "jsd": entry(jsd(0.3)),
        "skew_kl": entry(skew(0.1, False)), "skew_reverse_kl": entry(skew(0.1, True)),
        "total_variation": entry(total_variation, symmetric=True), "soft_cross_entropy": entry(soft_cross_entropy),
        "logit_mse": entry(logit_mse(False), 1.0, symmetric=True),
        "logit_mse centred": entry(logit_mse(True), 1.0, symmetric=True),
        "standardized": entry(standardized), "binary_forward_kl": entry(binary_forward_kl),
        "soft_spearman": entry(soft_spearman, 1.0, symmetric=True),
        "soft_spearman strength 3": entry(soft_spearman, 3.0, 1.0, symmetric=True),
        "dist": entry(dist(1, 1), whole=True, symmetric=True),
        "dist weighted": entry(dist(2, 0.5), whole=True, symmetric=True),
        "nkd": entry(n, square=1.0), "dkd": entry(dkd(1.0, 8.0)), "teacher_free": entry(teacher_free(0.99), swap=False),
        "cross_entropy": entry(cross_entropy(one_hot), **hard),
        "cross_entropy smoothed": entry(cross_entropy(one_hot, smoothing=0.1), **hard),
        "cross_entropy weighted": entry(cross_entropy(one_hot, WEIGHT), reduce=by_class, **hard),
        # torch smooths a weighted label with the weights of all classes, but divides by those of the labels
        "cross_entropy weighted smoothed": entry(cross_entropy(one_hot, WEIGHT, 0.1), reduce=by_class, **hard),
        "cross_entropy mixed": entry(cross_entropy(MIXED), **hard),
        "cross_entropy mixed weighted smoothed": entry(cross_entropy(MIXED, WEIGHT, 0.1), **hard),
    }
    losses["nkd"]["wrong"] |= {"no T²": mean(plain(S, Z, T)), "label kept among the others": mean(
        n(S, Z, T) + 1.5 * T * T * (soft_cross_entropy(S, Z, T) + (softmax(others(Z) / T) * log_softmax(others(S) / T)).sum(-1)))}
    losses["cross_entropy weighted"]["wrong"]["mean over rows"] = mean(cross_entropy(one_hot, WEIGHT)(S, Z, 1))
    losses["standardized"]["wrong"]["deviation over C - 1"] = entry(lambda s, t, T: standardized(
        s, t, T * np.sqrt(C / (C - 1))))["value"]
    surprise_s, surprise_t = -pick(log_softmax(S)), -pick(log_softmax(Z))
    labelled = Y != -100
    rows = {
        "confidence max": softmax(Z).max(-1), "confidence entropy": 1 - entropy(Z) / np.log(C),
        "confidence label": pick(softmax(Z)) * labelled,
        "difficulty": (1 - np.exp(-surprise_s / surprise_t)) * labelled,
        "entropy": entropy(Z / 3) * (1 + entropy(S / 3) / np.log(C)) / 2,
        "spearman": 1 - one_minus_pearson(ranks(S), ranks(Z), -1), "kendall": kendall(S, Z),
        "soft_rank": soft_ranks(S, 1.0), "virtual teacher": np.where(np.arange(C) == LABELS[:, None], 0.99, 0.01 / (C - 1)),
    }
    inputs = dict(student=S, teacher=Z, target=Y, mask=MASK, weight=WEIGHT, mixed=MIXED, T=T)
    return {"inputs": inputs, "losses": losses, "rows": rows}


def text(): return writing.text(goldens())


if __name__ == "__main__":
    Path(__file__).with_suffix(".json").write_text(text(), encoding="utf-8")
