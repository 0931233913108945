"""What the losses on maps, on tokens, between samples and behind small networks are worth, written a second time: numpy, float64, no kdlab and no torch.

`python tests/goldens/zoo.py` writes zoo.json beside it. Gradients are complex steps: with no difference of near numbers
they are exact to rounding, and they need nothing but the formula of the value.
"""
import json
from math import ceil, erf, exp, pi, sqrt
from pathlib import Path

import numpy as np

RNG = np.random.default_rng(3)
B = 3
MASK = np.array([True, False, True])


def new(*shape): return np.round(RNG.standard_normal(shape) + 0.2, 2)


S, Z = new(B, 2, 5, 4), new(B, 2, 5, 4)  # maps of the student and of the teacher, same shape
WIDE = new(B, 3, 3, 4)  # of a wider teacher, another size
S2, Z2 = new(B, 3, 3, 4), new(B, 3, 3, 4)  # maps of a later layer
GAMMA, BETA = np.array([1.5, 0.5]), np.array([0.3, -0.4])  # of a batch norm
WHERE = np.round(RNG.random((B, 5, 4)), 2) * (RNG.random((B, 5, 4)) < 0.7)
V, U = new(6, 4), new(6, 7)  # vectors of the student and of a wider teacher
SAMPLES = np.array([True, True, False, True, True, True])
H, G, Q = new(B, 4, 6), new(B, 4, 6), new(B, 4, 8)  # hidden states of the student, the teacher, a wider teacher
PLANES, BIAS = new(9, 6), new(9)
A, R = new(B, 2, 4, 4), 2 * new(B, 2, 4, 4)  # attention scores
TOKENS = np.array([[True] * 4, [True, True, True, False], [False] * 4])

VARIANCE = np.array([0.7, 2.5])
HEAD = 2 * new(4, 3)  # a classifier
APART, QUERY, KEY = new(4, 2, 3)**2, new(4, 2, 5), new(4, 3, 5)  # of layers: 2 of the student, 3 of the teacher
PAIR, OTHERS, LOG_MEAN = 3 * new(4), 3 * new(4, 6), 0.4
X = new(6, 4)  # vectors of a teacher as wide as the student

# tools that let complex numbers through

def absolute(x): return x * np.sign(x.real)
def flat(x): return x.reshape(*x.shape[:2], -1)
def unit(x): return x / np.sqrt((x * x).sum(-1, keepdims=True))
def mean(x): return x.reshape(len(x), -1).mean(1)
def gram(x): return flat(x) @ flat(x).transpose(0, 2, 1)


def pool(x, size):
    "Adaptive average pooling: overlapping windows where sizes do not divide."
    for axis, n in zip((2, 3), size):
        m = x.shape[axis]
        windows = [x.take(range(i * m // n, ceil((i + 1) * m / n)), axis).mean(axis) for i in range(n)]
        x = np.stack(windows, axis)
    return x


def meet(a, b):
    size = [min(n) for n in zip(a.shape[2:], b.shape[2:])]
    return pool(a, size), pool(b, size)


# the losses: (student, teacher) -> a value a sample

def nst(s, t, normalise=unit):
    s, t = (normalise(flat(x)) for x in meet(s, t))
    k = lambda a, b: ((a @ b.transpose(0, 2, 1))**2).mean((1, 2))
    return k(s, s) + k(t, t) - 2 * k(s, t)


def ickd(s, t): return mean((unit(gram(s)) - unit(gram(t)))**2)


def flow(a, b):
    a, b = map(flat, meet(a, b))
    return a @ b.transpose(0, 2, 1) / a.shape[2]


def fsp(s, t): return mean((flow(s, S2) - flow(t, Z2))**2)


def factor(x): return unit((x * x).mean(1).reshape(len(x), -1))


def factor_transfer(s, t):
    s, t = meet(s, t)
    return mean(absolute(factor(s) - factor(t)))


def activation_boundary(s, t, margin=1.0):
    return mean(np.where(t > 0, (margin - s) * (s.real < margin), (margin + s) * (s.real > -margin))**2)


def margins():
    "E[x | x < 0] for normal x."
    density = lambda z: exp(-z * z / 2) / sqrt(2 * pi)
    below = lambda z: (1 + erf(z / sqrt(2))) / 2
    return np.array([b - g * density(b / g) / below(-b / g) for b, g in zip(BETA, GAMMA)])


def overhaul(s, t, margin=None):
    margin = margins() if margin is None else margin
    t = np.maximum(t, margin[:, None, None])
    return mean((s - t)**2 * ~((s.real <= t) & (t <= 0)))


def hierarchical_context(s, t, weights=(1, 1 / 2, 1 / 4, 1 / 8)):
    values = [mean((s - t)**2), *(mean((pool(s, (n, n)) - pool(t, (n, n)))**2) for n in (4, 2, 1))]
    return sum(w * v for w, v in zip(weights, values)) / sum(weights)


def attention(t, softness=0.5):
    strength = np.exp(np.abs(t).mean(1) / softness)
    return strength / strength.mean((1, 2), keepdims=True)


def amplitude(x):
    "|F x|, from sums of cosines and sines."
    h, w = x.shape[2:]
    rows, columns = np.meshgrid(np.arange(h), np.arange(w), indexing="ij")
    angle = 2 * pi * (np.multiply.outer(np.arange(h), rows)[:, None] / h + np.multiply.outer(np.arange(w), columns)[None] / w)
    parts = (np.einsum("bchw,uvhw->bcuv", x, f(angle)) for f in (np.cos, np.sin))
    return np.sqrt(sum(p * p for p in parts) / (h * w))


def fourier(s, t): return mean((amplitude(s) - amplitude(t))**2)


# the losses between samples: (student, teacher, mask) -> one value

def cosines(x): return unit(x) @ unit(x).T


def correlation_congruence(gamma=0.4, order=2):
    def value(s, t, mask=SAMPLES):
        factorial = np.cumprod([1, *range(1, order + 1)])
        kernel = lambda x: exp(-2 * gamma) * sum((2 * gamma)**p / factorial[p] * cosines(x[mask])**p for p in range(order + 1))
        return ((kernel(s) - kernel(t))**2).mean()
    return value


def similarity_kl(tau=0.04, others=True):
    def value(s, t, mask=SAMPLES):
        n = mask.sum()
        keep = ~np.eye(n, dtype=bool) if others else np.ones((n, n), bool)
        def log_chances(x):
            z = cosines(x[mask])[keep].reshape(n, -1) / tau
            z = z - z.real.max(1, keepdims=True)
            return z - np.log(np.exp(z).sum(1, keepdims=True))
        p, q = log_chances(t), log_chances(s)
        return (np.exp(p) * (p - q)).sum() / n
    return value


# the losses on tokens: (student, teacher, mask of tokens) -> one value

def lsh(s, t, mask=TOKENS, bias=BIAS):
    z, h = s @ PLANES.T + bias, t @ PLANES.T + bias > 0
    return np.log(1 + np.exp(np.where(h, -z, z))).mean(-1)[mask].mean()


def softmax(z, keys):
    p = np.exp(z - z.real.max(-1, keepdims=True)) * keys
    return p / p.sum(-1, keepdims=True)


def rows_kl(s, t, mask):
    "KL between rows of scores (B, heads, queries, keys), over the tokens that count."
    some = mask.any(1)
    s, t, mask = s[some], t[some], mask[some]
    keys = mask[:, None, None, :]
    p, q = softmax(t, keys), softmax(s, keys)
    terms = np.where(keys, p * (np.log(np.where(keys, p, 1)) - np.log(np.where(keys, q, 1))), 0)
    return terms.sum(-1).mean(1)[mask].mean()


def attention_map(s, t, mask=TOKENS): return rows_kl(s, t, mask)


def token_relation(heads=2, scale=True):
    def value(s, t, mask=TOKENS):
        def scores(x):
            x = x.reshape(B, 4, heads, -1).transpose(0, 2, 1, 3)
            return x @ x.transpose(0, 1, 3, 2) / (sqrt(x.shape[-1]) if scale else 1)
        return rows_kl(scores(s), scores(t), mask)
    return value


# behind small networks: what is computed from what they gave

def vid(s, t): return mean(((t - s)**2 / VARIANCE[:, None, None] + np.log(VARIANCE[:, None, None])) / 2)
def free_softmax(x): return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


def srrl(by, beta=2.0):
    def value(s, t, mask=None):
        z = s @ HEAD
        w = t @ HEAD
        if by == "logits": regression = ((z - w)**2).mean(1)
        else: regression = -(free_softmax(w) * np.log(free_softmax(z))).sum(1)
        return (((s - t)**2).mean(1) + beta * regression).mean()
    return value


def semckd(apart, keys):
    attention = free_softmax(unit(QUERY) @ unit(keys).transpose(0, 2, 1))
    return (attention * apart).sum((1, 2)).mean() / 2


def factors(s, t):
    one = lambda x: unit(x.reshape(len(x), -1))
    return mean(absolute(one(s) - one(t)))


def contrast(pair, others, noise=6.0):
    "h = e^a / (e^a + K · mean), right for the pair and wrong for the others."
    noise = noise * np.exp(LOG_MEAN)
    h, g = (np.exp(x) / (np.exp(x) + noise) for x in (pair, others))
    return (-np.log(h) - np.log(1 - g).sum(1)).mean()


# reductions

def over_samples(rows, mask=MASK): return rows[mask].mean()


def imitation(where, pixels=lambda d: (d * d).mean(1)):
    def value(s, t, mask=MASK):
        w = where(t)
        return (pixels(s - t) * w)[mask].sum() / w[mask].sum()
    return value


def gradient(f, s, h=1e-30):
    "d f / d s by complex steps."
    out = np.zeros(s.shape)
    for at in np.ndindex(*s.shape):
        x = s.astype(complex)
        x[at] += 1j * h
        out[at] = f(x).imag / h
    return out


def entry(f, s=S, t=Z, symmetric=False, whole=False, tokens=False, masks=True, entries=None, **wrong):
    "Value, gradient, and the values of the usual mistakes."
    value = f if whole else lambda a, b, mask=MASK: over_samples(f(a, b), mask)
    mistakes = {"no mask": value(s, t, np.ones(TOKENS.shape if tokens else len(s), bool))} | wrong if masks else wrong
    if not symmetric and s.shape == t.shape: mistakes["arguments swapped"] = value(t, s)
    if entries: mistakes["sum over entries"] = entries * value(s, t)
    out = {"value": value(s, t), "gradient": gradient(lambda x: value(x, t), s), "wrong": mistakes}
    if not whole: out["rows"] = np.where(MASK, f(s, t), 0)
    return out


def goldens():
    at_transfer = over_samples(mean((factor(meet(S, WIDE)[0]) - factor(meet(S, WIDE)[1]))**2))
    squares = over_samples(mean((S - Z)**2))
    losses = {
        "nst": entry(nst, t=WIDE, linear=over_samples(nst(S, WIDE, lambda x: x)),
                     **{"normalised over channels": over_samples(nst(S, WIDE, lambda x: unit(x.transpose(0, 2, 1)).transpose(0, 2, 1)))}),
        "ickd": entry(ickd, symmetric=True, entries=2, **{
            "rows not normalised": over_samples(mean((gram(S) - gram(Z))**2)),
            "one length for the matrix": over_samples(mean((gram(S) / np.sqrt((gram(S)**2).sum((1, 2), keepdims=True))
                                                            - gram(Z) / np.sqrt((gram(Z)**2).sum((1, 2), keepdims=True)))**2))}),
        "fsp": entry(fsp, entries=6, **{"not divided by pixels": 144 * over_samples(fsp(S, Z))}),
        "factor_transfer": entry(factor_transfer, t=WIDE, entries=12, **{"squares": at_transfer}),
        "activation_boundary": entry(activation_boundary, entries=40, **{
            "no margin": over_samples(activation_boundary(S, Z, 0.0)), "hint": squares}),
        "activation_boundary wide": entry(lambda s, t: activation_boundary(s, t, 2.5)),
        "overhaul": entry(overhaul, entries=40, **{
            "plain ReLU": over_samples(overhaul(S, Z, np.zeros(2))), "hint": squares,
            "not partial": over_samples(mean((S - np.maximum(Z, margins()[:, None, None]))**2))}),
        "hierarchical_context": entry(hierarchical_context, symmetric=True, **{
            "weights not divided": 15 / 8 * over_samples(hierarchical_context(S, Z)), "hint": squares,
            "equal weights": over_samples(hierarchical_context(S, Z, (1, 1, 1, 1)))}),
        "imitation": entry(imitation(attention), whole=True, hint=squares),
        "imitation where": entry(imitation(lambda t: WHERE), whole=True, symmetric=True, hint=squares, **{
            "sum over channels": imitation(lambda t: WHERE, lambda d: (d * d).sum(1))(S, Z)}),
        "fourier": entry(fourier, symmetric=True, hint=squares, **{
            "not scaled": 20 * over_samples(fourier(S, Z)),
            "phases kept": over_samples(mean(np.abs(np.fft.fft2(S - Z, norm="ortho"))**2))}),
    }
    losses |= {
        "correlation_congruence": entry(correlation_congruence(), V, U, whole=True, entries=25, **{
            "similarity": (((unit(V[SAMPLES] @ V[SAMPLES].T) - unit(U[SAMPLES] @ U[SAMPLES].T))**2).mean()),
            "the whole kernel": correlation_congruence(order=20)(V, U), "gamma 1": correlation_congruence(1.0)(V, U)}),
        "correlation_congruence wide": entry(correlation_congruence(2.0, 5), V, U, whole=True, usual=correlation_congruence()(V, U)),
        "similarity_kl": entry(similarity_kl(), V, U, whole=True, **{
            "arguments turned": similarity_kl()(U, V), "own similarity kept": similarity_kl(others=False)(V, U),
            "summed over rows": 5 * similarity_kl()(V, U)}),
        "similarity_kl soft": entry(similarity_kl(0.5), V, U, whole=True, **{"times tau squared": similarity_kl(0.5)(V, U) / 4}),
    }
    losses |= {
        "lsh": entry(lsh, H, G, whole=True, tokens=True, entries=9, **{
            "planes through the origin": lsh(H, G, bias=0), "hint": ((H - G)[TOKENS]**2).mean()}),
        "attention_map": entry(attention_map, A, R, whole=True, tokens=True, entries=2, **{
            "over queries": rows_kl(A.transpose(0, 1, 3, 2), R.transpose(0, 1, 3, 2), TOKENS)}),
        "token_relation": entry(token_relation(), H, Q, whole=True, tokens=True, entries=2, **{
            "not scaled": token_relation(scale=False)(H, Q), "one head": token_relation(1)(H, Q)}),
    }
    two = srrl("logits")(V, X)
    losses |= {
        "vid": entry(vid, symmetric=True, entries=40, **{"deviation in place of variance": over_samples(mean(
            ((Z - S)**2 / VARIANCE[:, None, None]**2 + 2 * np.log(VARIANCE[:, None, None])) / 2)), "hint": squares}),
        "srrl": entry(srrl("logits"), V, X, whole=True, symmetric=True, masks=False, **{
            "beta 1": srrl("logits", 1.0)(V, X), "softmax": srrl("softmax")(V, X)}),
        "srrl softmax": entry(srrl("softmax"), V, X, whole=True, masks=False, logits=two),
        "semckd": entry(lambda s, t, mask=None: semckd(s, t), APART, KEY, whole=True, masks=False, **{
            "mean over pairs": APART.mean(), "softmax over student layers": (np.exp(unit(QUERY) @ unit(KEY).transpose(0, 2, 1))
            / np.exp(unit(QUERY) @ unit(KEY).transpose(0, 2, 1)).sum(1, keepdims=True) * APART).sum((1, 2)).mean() / 2}),
        "factors": entry(factors, symmetric=True, entries=40, **{
            "squares": over_samples(mean((unit(S.reshape(B, -1)) - unit(Z.reshape(B, -1)))**2)),
            "each channel of length 1": over_samples(mean(absolute(unit(flat(S)) - unit(flat(Z)))))}),
        "contrast": entry(lambda s, t, mask=None: contrast(s, t), PAIR, OTHERS, whole=True, masks=False, **{
            "no constant": contrast(PAIR, OTHERS, 1.0), "mean over the others": (
                contrast(PAIR, OTHERS) - contrast(PAIR, OTHERS[:, :0])) / 6 + contrast(PAIR, OTHERS[:, :0])}),
    }
    inputs = dict(student=S, teacher=Z, wide=WIDE, student2=S2, teacher2=Z2, gamma=GAMMA, beta=BETA, where=WHERE, mask=MASK, vectors=V, wider=U, samples=SAMPLES, hidden=H, hidden_teacher=G, hidden_wider=Q,
                  variance=VARIANCE, head=HEAD,
                  apart=APART, query=QUERY, key=KEY, equal=X, pair=PAIR, others=OTHERS, log_mean=LOG_MEAN, planes=PLANES, bias=BIAS, scores=A, scores_teacher=R, tokens=TOKENS,
                  margins=margins())
    return {"inputs": inputs, "losses": losses}


def plain(x):
    "Arrays and numpy numbers as lists and floats."
    if isinstance(x, dict): return {k: plain(v) for k, v in x.items()}
    if isinstance(x, np.ndarray): return x.tolist()
    return x.item() if isinstance(x, np.generic) else x


def text():
    return json.dumps(plain(goldens()), ensure_ascii=False, indent=None, separators=(",", ":")).replace('},"', '},\n"') + "\n"


if __name__ == "__main__":
    Path(__file__).with_suffix(".json").write_text(text(), encoding="utf-8")
