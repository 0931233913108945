"""kd.gap: every number against hand-made cases and a numpy float64 reading, the right ids, and models that do not fit."""
import json
import random
import re
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import kdlab as kd
from kdlab import costs, measures
from kdlab.gaps import Gap
from kdlab.terms import Source


class Table(nn.Module):
    "A model that looks its logits up: x holds row numbers."
    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(torch.as_tensor(logits))

    def forward(self, x): return self.logits[x]


def batches(n, y=None, size=4):
    return [(torch.arange(n)[i:i + size], *(() if y is None else (torch.as_tensor(y)[i:i + size],))) for i in range(0, n, size)]


def softmax(z, T=1.):
    e = np.exp((z - z.max(-1, keepdims=True)) / T)
    return e / e.sum(-1, keepdims=True)


def entropy(p): return -(p * np.log(p)).sum(-1)


@pytest.fixture
def pair():
    "Logits (40, 5) of student and teacher, and labels."
    rng = np.random.default_rng(0)
    y = np.arange(40) % 5
    return rng.normal(size=(40, 5)) + 1.5 * np.eye(5)[y], rng.normal(size=(40, 5)) + 3 * np.eye(5)[y], y


def measure(zs, zt, y=None, loader=None, **options):
    options = dict(latency=False, layers=None) | options
    return kd.gap(Table(zs), Table(zt), batches(len(zt), y) if loader is None else loader, **options)


# the numbers

def test_by_hand():
    zs, zt = np.log([[[0.5, 0.25, 0.25], [0.2, 0.6, 0.2]], [[0.8, 0.1, 0.1], [0.6, 0.2, 0.2]]])
    g = measure(zs, zt, [0, 1], dark_T=1., bins=2)
    assert g.teacher.prediction.tolist() == [0, 0] and g.student.prediction.tolist() == [0, 1]
    np.testing.assert_allclose(g.kl, [.8 * np.log(.8 / .5) + .2 * np.log(.1 / .25), .6 * np.log(3) + .2 * np.log(1 / 3)])
    np.testing.assert_allclose(g.teacher.nll, -np.log([.8, .2]))
    np.testing.assert_allclose(g.student.brier, [.25 + .125, .16 + .08])
    np.testing.assert_allclose(g.student.dark_entropy, np.log([2, 2]))
    s = g.summary()
    assert s["accuracy"]["teacher"][0] == .5 and s["accuracy"]["student"][0] == 1 and s["accuracy"]["between"][0] == .5
    assert s["agreement"]["between"][0] == .5
    assert s["calibration_error"]["student"][0] == pytest.approx((.5 + .4) / 2) # bins: 0.5 | 0.6
    assert g.where("disagree").tolist() == [1] == g.where("only the student right").tolist()


@pytest.mark.parametrize("T, dark_T", [(1., 4.), (3., 1.)])
def test_every_row_against_numpy(pair, T, dark_T):
    zs, zt, y = pair
    g = measure(zs, zt, y, T=T, dark_T=dark_T)
    for side, z in ((g.student, zs), (g.teacher, zt)):
        p, soft, hot = softmax(z), softmax(z, dark_T), np.eye(5)[y]
        np.testing.assert_allclose(side.confidence, p.max(-1))
        np.testing.assert_allclose(side.true, p[np.arange(40), y])
        np.testing.assert_allclose(side.nll, -np.log(side.true))
        np.testing.assert_allclose(side.brier, ((p - hot)**2).sum(-1))
        np.testing.assert_allclose(side.entropy, entropy(soft))
        rest = soft[hot == 0].reshape(40, 4)
        np.testing.assert_allclose(side.dark_entropy, entropy(rest / rest.sum(-1, keepdims=True)))
        np.testing.assert_allclose(side.similarity, [soft[y == c].mean(0) for c in range(5)])
        np.testing.assert_array_equal(side.logits, z.astype(np.float32))
    a, b = softmax(zt, T), softmax(zs, T)
    np.testing.assert_allclose(g.kl, (a * np.log(a / b)).sum(-1))
    np.testing.assert_allclose(g.reverse_kl, (b * np.log(b / a)).sum(-1))
    assert not np.allclose(g.kl, g.reverse_kl)


def test_classes_and_groups(pair):
    zs, zt, y = pair
    g = measure(zs, zt, y)
    t, s = zt.argmax(-1) == y, zs.argmax(-1) == y
    parts = g.per_class()
    for c in range(5):
        own = y == c
        assert parts["count"][c] == 8 and parts["teacher"][c] == t[own].mean() and parts["student"][c] == s[own].mean()
        assert parts["difference"][c] == pytest.approx(s[own].mean() - t[own].mean())
        assert parts["low"][c] < parts["difference"][c] < parts["high"][c]
    for name, keep in (("only the teacher right", t & ~s), ("both wrong", ~t & ~s), ("all", t | True)):
        rows = g.where(name)
        assert sorted(rows) == np.flatnonzero(keep).tolist() and (np.diff(g.kl[rows]) <= 0).all()
    with pytest.raises(ValueError, match="which must be one of all, disagree"): g.where("wrong")


def test_the_same_model_twice_has_no_gap(pair):
    _, zt, y = pair
    s = measure(zt, zt, y).summary()
    assert s["agreement"]["between"][0] == 1 and s["kl"]["between"][0] == 0 == s["accuracy"]["between"][0]
    assert s["accuracy"]["between"][1] < 0 < s["accuracy"]["between"][2] # 40 samples do not prove equality
    assert s["similarity"]["between"][0] == pytest.approx(1)


def test_excluded_classes():
    "A class at -inf on both sides is absent; one that only the student excludes makes the divergence infinite."
    zt = np.array([[0., 1, -np.inf], [0, 1, -np.inf]])
    zs = np.array([[1., 1, -np.inf], [-np.inf, 0, -np.inf]])
    g = measure(zs, zt, [0, 1], dark_T=1.)
    assert np.isfinite(g.kl[0]) and g.kl[1] == np.inf and np.isfinite(g.reverse_kl[1])
    assert g.teacher.dark_entropy.tolist() == [0, 0] # one wrong class is left
    assert np.isfinite(g.student.entropy).all()


def test_chunks_of_rows_make_no_difference(pair):
    zs, zt, y = pair
    whole = measure(zs, zt, y, batches(40, y, 40))
    wide = np.tile(zt, (1, 2**19)) # 2.6 million classes: one row a chunk
    g = measure(wide[:2], wide[:2], [0, 1])
    assert g.student.similarity is None and "more than 1000 classes" in g.notes[0] and g.kl.tolist() == [0, 0]
    assert g.student.logits is None
    np.testing.assert_array_equal(whole.kl, measure(zs, zt, y, batches(40, y, 7)).kl)


# intervals and calibration

def test_calibration_by_hand():
    confidence, right = np.array([.95, .85, .85, .15, .35, 1., 0.]), np.array([1, 1, 0, 0, 1, 1, 0], bool)
    r = measures.reliability(confidence, right, 10)
    assert r["count"].tolist() == [1, 1, 0, 1, 0, 0, 0, 0, 2, 2] # 1 belongs to the last bin, 0 to the first
    assert r["accuracy"][8] == .5 and r["confidence"][9] == .975 and np.isnan(r["accuracy"][2])
    by_hand = (0 + .15 + .65 + 2 * abs(.5 - .85) + 2 * abs(1 - .975)) / 7
    assert measures.calibration_error(confidence, right, 10) == pytest.approx(by_hand)
    assert measures.bin_of([0.1, 0.10001, 0.2], 10).tolist() == [0, 1, 1]


def test_calibration_interval_covers():
    "A calibrated model is taken for a bad one in about 5% of the cases; a bad one is found, and its error is in the interval."
    rng, false_alarms, found, inside = np.random.default_rng(0), 0, 0, 0
    for seed in range(100):
        p = rng.uniform(.3, 1, 300)
        honest, vain = rng.random(300) < p, rng.random(300) < p - .15
        false_alarms += measures.calibration_error(p, honest, 10) > measures.calibration_interval(p, honest, 10, 200, seed)[2]
        low, high, chance = measures.calibration_interval(p, vain, 10, 200, seed)
        found, inside = found + (measures.calibration_error(p, vain, 10) > chance), inside + (low < .15 < high)
    assert false_alarms <= 12 and found >= 95 and inside >= 85


def test_the_calibration_interval_has_a_seed():
    p, right = np.linspace(.5, 1, 50), np.arange(50) % 3 > 0
    assert measures.calibration_interval(p, right) == measures.calibration_interval(p, right)
    assert measures.calibration_interval(p, right) != measures.calibration_interval(p, right, seed=1)


def test_wilson_by_hand():
    n, k, z = 50, 10, 1.959963984540054
    middle, half = (k + z * z / 2) / (n + z * z), z / (n + z * z) * np.sqrt(k * (n - k) / n + z * z / 4)
    np.testing.assert_allclose(measures.wilson(k, n), [middle - half, middle + half])
    assert np.isnan(measures.wilson(0, 0)).all()


def test_paired_intervals_cover():
    "In 95% of experiments, give or take, the interval holds the true difference; pairing makes it narrower."
    rng, inside = np.random.default_rng(1), 0
    for _ in range(2000):
        hard = rng.random(200)
        a, b = hard < .8, hard + .1 * rng.normal(size=200) < .75
        d, low, high = measures.paired_difference(a, b)
        truth = .8 - .75 # b's share stays close to .75: the noise moves as many in as out
        inside += low <= truth <= high
    assert 1870 <= inside <= 1930
    unpaired = np.sqrt(a.var() / 200 + b.var() / 200) * 2 * measures.Z
    assert high - low < .7 * unpaired
    d, low, high = measures.paired_difference([1, 1, 0, 1], [0, 1, 1, 0])
    assert d == .25 and low == pytest.approx(1 / 6 - measures.Z * np.sqrt((4 / 6 - 1 / 36) / 6))
    assert np.isnan(measures.paired_difference([], [])).all()


# layers

def grams(*features): return np.stack([f @ f.T for f in features])


def test_hsic_against_its_definition():
    "The sum over all choices of different samples, which the closed form abbreviates."
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(6, 3)), rng.normal(size=(6, 4))
    k, l, n = x @ x.T, y @ y.T, 6
    two = [k[i, j] * l[i, j] for i in range(n) for j in range(n) if i != j]
    three = [k[i, j] * l[i, q] for i in range(n) for j in range(n) for q in range(n) if len({i, j, q}) == 3]
    four = [k[i, j] * l[p, q] for i in range(n) for j in range(n) for p in range(n) for q in range(n) if len({i, j, p, q}) == 4]
    truth = np.mean(two) - 2 * np.mean(three) + np.mean(four)
    np.testing.assert_allclose(measures.hsic(k[None], l[None])[0, 0], truth)
    with pytest.raises(ValueError, match="at least 4 samples, got 3"): measures.hsic(k[None, :3, :3], l[None, :3, :3])


@pytest.mark.parametrize("size", [5, 20, 60])
def test_cka_does_not_depend_on_the_batch_size_and_knows_its_invariances(size):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 12))
    turn = np.linalg.qr(rng.normal(size=(12, 12)))[0]
    noise, wide = rng.normal(size=(60, 12)), x @ rng.normal(size=(12, 400))
    cka = measures.StreamingCKA()
    for rows in np.split(np.arange(60), 60 // size): cka.add(grams(x[rows]), grams((7 * x @ turn + 3)[rows], noise[rows], wide[rows], 0 * x[rows]))
    same, other, alike, constant = cka.value[0]
    assert same == pytest.approx(1) and abs(other) < .25 and alike > .8 and np.isnan(constant) and cka.samples == 60
    cka.add(grams(x[:3]), grams(*[x[:3]] * 4)) # too few
    assert cka.samples == 60


def test_cka_of_one_batch_agrees_with_the_biased_one_on_many_samples():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 6))
    y = np.tanh(x @ rng.normal(size=(6, 5)))
    cka = measures.StreamingCKA()
    cka.add(grams(x), grams(y))
    biased = 1 - float(kd.functional.cka(torch.tensor(x), torch.tensor(y)))
    assert cka.value[0, 0] == pytest.approx(biased, abs=.02)


class Conv(nn.Module):
    "Layers as torchvision has them; activations write over what they get; returns a tuple."
    def __init__(self, width=4):
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(nn.Conv2d(width, width, 3, stride=2), nn.ReLU(inplace=True))
        self.layer2 = nn.Sequential(nn.Conv2d(width, 2 * width, 3, stride=2), nn.ReLU(inplace=True))
        self.fc = nn.Linear(2 * width, 3)

    def forward(self, x):
        x = self.layer2(self.layer1(self.relu(self.bn1(self.conv1(x)))))
        return self.fc(x.mean((2, 3))), x


class Encoder(nn.Module):
    "A torch.nn transformer that returns a dict, with a mask."
    def __init__(self, width=8, depth=2):
        super().__init__()
        self.embed = nn.Embedding(20, width)
        layer = nn.TransformerEncoderLayer(width, 2, 2 * width, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False), nn.Linear(width, 3)

    def forward(self, input_ids, attention_mask):
        h = self.encoder(self.embed(input_ids), src_key_padding_mask=attention_mask == 0)
        return {"hidden": h, "logits": self.head(h[:, 0])}


@dataclass
class Output:
    loss: object = None
    logits: object = None
    hidden_states: tuple = ()


class Tagger(Encoder):
    "Logits for every token in an output object, as in transformers."
    def forward(self, input_ids, attention_mask):
        h = self.encoder(self.embed(input_ids), src_key_padding_mask=attention_mask == 0)
        return Output(logits=self.head(h), hidden_states=(h,))


def images(n=24, size=8, **options):
    g = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(torch.randn(n, 1, 13, 13, generator=g), torch.arange(n) % 3), size, **options)


def sentences(labels=lambda ids: ids[:, 0] % 3, n=12, size=6):
    g = torch.Generator().manual_seed(0)
    ids, mask = torch.randint(20, (n, 5), generator=g), torch.ones(n, 5, dtype=torch.long)
    mask[::2, 3:] = 0
    y = labels(ids)
    return [{"input_ids": ids[i:i + size], "attention_mask": mask[i:i + size], **({} if y is None else {"labels": y[i:i + size]}),
             "id": [f"s{k}" for k in range(i, i + size)]} for i in range(0, n, size)]


FIRST = dict(forward=lambda model, x: model(x)[0])


def test_layers_of_a_cnn():
    torch.manual_seed(0)
    student, teacher = Conv(4), Conv(8)
    g = kd.gap(student, teacher, images(), latency=False, **FIRST)
    assert {"relu", "layer1", "layer2"} == set(g.student.layers) and g.cka.shape == (len(g.student.layers), len(g.teacher.layers))
    g = kd.gap(teacher, teacher, images(), layers=["layer*", "conv1"], latency=False, **FIRST)
    assert g.student.layers == ["layer1", "layer2", "conv1"]
    np.testing.assert_allclose(np.diag(g.cka), 1, rtol=1e-5)


def test_layers_against_the_definition():
    torch.manual_seed(0)
    student, teacher = Conv(4).eval(), Conv(8).eval()
    g = kd.gap(student, teacher, images(), layers={"student": "bn1", "teacher": ["layer1"]}, latency=False, **FIRST)
    cka = measures.StreamingCKA()
    with torch.no_grad():
        for x, _ in images():
            a = student.bn1(student.conv1(x)).flatten(1).double() # before the ReLU that writes over it
            b = teacher.layer1(teacher.relu(teacher.bn1(teacher.conv1(x)))).flatten(1).double()
            cka.add(grams(a.numpy()), grams(b.numpy()))
    np.testing.assert_allclose(g.cka, cka.value, rtol=1e-5)


def test_layers_that_cannot_be_compared():
    torch.manual_seed(0)
    net = Conv()
    with pytest.raises(ValueError, match="no layer 'layer3'; the nearest names are"):
        kd.gap(net, net, images(), layers="layer3", latency=False, **FIRST)

    class Wide(Conv):
        def __init__(self):
            super().__init__()
            self.position = nn.Identity()

        def forward(self, x):
            self.position(x[:1])
            return super().forward(x)

    with pytest.raises(ValueError, match=r"layer 'position' does not return floating-point features \(B, ...\) of the 8 samples"):
        kd.gap(Wide(), net, images(), layers={"student": "position", "teacher": "fc"}, latency=False, **FIRST)
    g = kd.gap(Wide(), net, images(), layers={"student": "*", "teacher": "fc"}, latency=False, **FIRST)
    assert "position" not in g.student.layers and "fc" in g.student.layers and any("position" in note for note in g.notes)
    g = kd.gap(net, net, images(size=3), latency=False, **FIRST)
    assert g.cka is None and any("4 samples or more" in note for note in g.notes)
    assert not [m for m in net.modules() if m._forward_hooks or m._forward_pre_hooks]


# models and batches of every kind

def test_a_transformer_with_dicts():
    torch.manual_seed(0)
    student, teacher = Encoder(8, 1), Encoder(16, 3)
    g = kd.gap(student, teacher, sentences())
    assert g.ids.tolist() == [f"s{i}" for i in range(12)] and g.cka is not None and len(g.teacher.layers) >= 3
    assert g.teacher.cost["operations"] > g.student.cost["operations"] > 0
    first = sentences()[0]
    with torch.no_grad(): z = teacher.eval()(first["input_ids"], first["attention_mask"])["logits"]
    np.testing.assert_allclose(g.teacher.logits[:6], z, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("labels, rows", [
    (lambda ids: torch.where(ids > 9, ids % 3, -100), None), (lambda ids: None, "mask")], ids=["labelled", "masked"])
def test_a_row_for_each_token(labels, rows):
    torch.manual_seed(0)
    g = kd.gap(Tagger(8, 1), Tagger(16, 1), sentences(labels), latency=False)
    ids = torch.cat([b["input_ids"] for b in sentences()])
    keep = ids > 9 if rows is None else torch.cat([b["attention_mask"] for b in sentences()]).bool()
    assert g.ids.tolist() == [f"s{i}:{j}" for i, j in keep.nonzero().tolist()]
    assert (g.labels is None) == (rows == "mask") and g.n == int(keep.sum())


def test_named_tuples_and_lists():
    Batch = namedtuple("Batch", "x y")
    g = kd.gap(Table(np.eye(3)), Table(np.eye(3)), [Batch(torch.arange(3), torch.tensor([0, 1, 1]))], latency=False)
    assert g.summary()["accuracy"]["teacher"][0] == pytest.approx(2 / 3)


def test_a_model_of_transformers():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install 'kdlab[models]'")
    torch.manual_seed(0)
    make = lambda width, depth: transformers.BertForSequenceClassification(transformers.BertConfig(
        vocab_size=30, hidden_size=width, num_hidden_layers=depth, num_attention_heads=2, intermediate_size=2 * width, num_labels=3,
        max_position_embeddings=16))
    student, teacher = make(8, 1), make(16, 2)
    g = kd.gap(student, teacher, sentences(), layers={"student": "bert.encoder.layer.*", "teacher": "bert.encoder.layer.*"}, latency=False)
    assert g.cka.shape == (1, 2) and g.ids[0] == "s0" and g.teacher.cost["operations"] > g.student.cost["operations"]
    assert kd.gap(student, teacher, sentences(), latency=False).cka is not None


def test_a_model_of_timm():
    timm = pytest.importorskip("timm", reason="timm is not installed: pip install 'kdlab[models]'")
    torch.manual_seed(0)
    student, teacher = (timm.create_model(name, num_classes=3, in_chans=1, pretrained=False) for name in ("resnet10t", "resnet18"))
    loader = DataLoader(TensorDataset(torch.randn(8, 1, 64, 64), torch.arange(8) % 3), 8)
    g = kd.gap(student, teacher, loader, layers="layer*", latency=False)
    assert g.cka.shape == (4, 4) and g.teacher.cost["parameters"] > g.student.cost["parameters"]


def test_the_guide_distils_from_foreign_code_in_under_15_lines():
    guide = json.loads((Path(__file__).parents[1] / "nbs/guides/02_foreign_models.ipynb").read_text(encoding="utf-8"))
    start, end, lines = "## What is in there?", "The history has every term", []
    cells = [("".join(c["source"]), c["cell_type"]) for c in guide["cells"]]
    first, last = (next(i for i, (text, _) in enumerate(cells) if text.startswith(mark)) for mark in (start, end))
    for text, kind in cells[first:last]:
        if kind == "code": lines += [line for line in text.splitlines() if line.strip()]
    whole = "\n".join(lines)
    assert 5 < len(lines) < 15 and all(re.search(word, whole) for word in (r"kd\.pair", r"kd\.Hint\(project", r"kd\.distill"))


# which sample is which

@pytest.mark.parametrize("workers", [0, 1])
def test_ids_are_positions_in_the_data_set_under_shuffling(pair, workers):
    zs, zt, y = pair
    data = TensorDataset(torch.arange(40), torch.as_tensor(y))
    loader = DataLoader(data, 7, shuffle=True, num_workers=workers, generator=torch.Generator().manual_seed(3))
    g = measure(zs, zt, loader=loader)
    assert sorted(g.ids) == list(range(40)) != g.ids.tolist()
    np.testing.assert_array_equal(g.labels, y[g.ids])
    np.testing.assert_allclose(g.teacher.confidence, softmax(zt)[g.ids].max(-1))
    np.testing.assert_array_equal(np.sort(g.where()), np.flatnonzero(zs.argmax(-1) != zt.argmax(-1)))


def test_ids_of_other_loaders(pair):
    zs, zt, y = pair
    rows = [{"x": i, "y": int(y[i]), "index": 100 + i} for i in range(40)]
    assert sorted(measure(zs, zt, loader=DataLoader(rows, 8, shuffle=True)).ids) == list(range(100, 140))
    assert measure(zs, zt, loader=(b for b in batches(40, y))).ids.tolist() == list(range(40))

    class Stream(IterableDataset):
        def __iter__(self): return iter(torch.arange(40))

    assert measure(zs, zt, loader=DataLoader(Stream(), 8)).ids.tolist() == list(range(40))
    assert measure(zs, zt, loader=DataLoader(TensorDataset(torch.arange(40)), 16, drop_last=True)).n == 32


def test_ids_must_fit(pair):
    with pytest.raises(ValueError, match="a batch of 4 samples came with 3 ids"):
        measure(*pair, loader=[{"x": torch.arange(4), "ids": ["a", "b", "c"]}])


def test_nothing_is_disturbed():
    torch.manual_seed(0)
    student, teacher = Conv(), Conv()
    student.train()
    student.bn1.eval()
    before = {k: v.clone() for k, v in student.state_dict().items()}
    loader = images(shuffle=True, generator=torch.Generator().manual_seed(1))
    random.seed(0), np.random.seed(0)
    expected = torch.rand(3), random.random(), np.random.rand(), loader.generator.get_state()
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    Conv(), Conv()
    kd.gap(student, teacher, loader, **FIRST)
    assert torch.equal(torch.rand(3), expected[0]) and random.random() == expected[1] and np.random.rand() == expected[2]
    assert torch.equal(loader.generator.get_state(), expected[3])
    assert student.training and not student.bn1.training and student.relu.training and teacher.training
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())
    assert all(p.grad is None for p in student.parameters()) and torch.is_grad_enabled()


def test_the_same_twice_is_the_same(pair):
    zs, zt, y = pair
    assert measure(zs, zt, y).summary() == measure(zs, zt, y).summary()


# without labels, and what does not fit

def test_without_labels(pair):
    zs, zt, y = pair
    g = measure(zs, zt)
    assert g.labels is None and "no labels" in g.notes[0] and not {"accuracy", "nll", "calibration_error"} & set(g.summary())
    assert "accuracy" not in repr(g.table()) and np.isnan(g.student.nll).all()
    full = measure(zs, zt, y)
    np.testing.assert_array_equal(g.kl, full.kl)
    for call in (g.per_class, lambda: g.calibration("student"), lambda: g.where("both wrong")):
        with pytest.raises(ValueError, match="needs labels"): call()


def test_with_some_labels(pair):
    zs, zt, y = pair
    some = np.where(np.arange(40) < 30, y, -100)
    g, part = measure(zs, zt, some), measure(zs[:30], zt[:30], y[:30])
    assert "30 of 40 samples have a label" in g.notes[0]
    for name in ("accuracy", "nll", "brier", "calibration_error"): assert g.summary()[name] == part.summary()[name]
    assert g.summary()["agreement"]["between"][0] == (zs.argmax(-1) == zt.argmax(-1)).mean()
    assert g.per_class()["count"].sum() == 30


def test_one_class(pair):
    zs, zt, _ = pair
    g = measure(zs, zt, np.full(40, 2))
    assert "all labels are class 2" in g.notes[0] and np.isnan(g.student.similarity[0]).all()
    assert np.isnan(g.per_class()["teacher"][0]) and "Gap: " in repr(g)


BAD = {
    "empty": (lambda z, y: measure(z, z, loader=[]), "the loader has no batches"),
    "classes": (lambda z, y: measure(z[:, :3], z, y), r"different classes: logits \(4, 3\) and \(4, 5\).*\[\.\.\., :3\]"),
    "one logit": (lambda z, y: measure(z[:, :1], z, y), r"student gave logits \(4, 1\).*a softmax needs two classes"),
    "rows": (lambda z, y: kd.gap(Table(z), Table(z), batches(40, y), forward=lambda m, x: m(x)[0]), r"a row for each of the 4 samples.*got \(5,\)"),
    "nan": (lambda z, y: measure(z, np.where(np.arange(40)[:, None] == 9, np.nan, z), y), "teacher's logits hold NaN.*1 of 4.*id 9"),
    "inf": (lambda z, y: measure(z + np.inf, z, y), "student's logits hold NaN or infinity"),
    "excluded": (lambda z, y: measure(z - np.inf, z, y), "student's logits hold NaN or infinity"),
    "label range": (lambda z, y: measure(z, z, y + 1), r"labels must lie in 0\.\.4 for 5 classes.*got 1\.\.5"),
    "negative": (lambda z, y: measure(z, z, y - 1), r"or be -100 for none; got -1\.\."),
    "soft labels": (lambda z, y: measure(z, z, np.eye(5)[y]), "labels must be whole numbers of shape"),
    "names": (lambda z, y: measure(z, z, y, class_names=["a"]), "class_names must hold 5 names"),
    "T": (lambda z, y: measure(z, z, y, T=0), "T must be > 0"),
    "dark_T": (lambda z, y: measure(z, z, y, dark_T=-1), "dark_T must be > 0"),
    "bins": (lambda z, y: measure(z, z, y, bins=0), "bins must be"),
    "layers": (lambda z, y: measure(z, z, y, layers={"left": "a"}), "a dict with student and teacher"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_says_so(pair, case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message): call(pair[1], pair[2])


def test_models_and_logits_of_wrong_types():
    with pytest.raises(TypeError, match="takes two modules, got Linear, NoneType"): kd.gap(nn.Linear(2, 2), None, [])
    with pytest.raises(TypeError, match="say which are the logits"): kd.gap(Conv(), Conv(), images(), latency=False)
    with pytest.raises(TypeError, match="must be floating-point"): measure(np.eye(3), np.eye(3), forward=lambda m, x: m(x).long())


def test_dense_logits_with_classes_first():
    net = nn.Conv2d(1, 3, 1)
    x, y = torch.randn(4, 1, 5, 6), torch.randint(3, (4, 5, 6))
    with pytest.raises(ValueError, match=r"movedim\(1, -1\)"): kd.gap(net, net, [(x, y)], latency=False)
    g = kd.gap(net, net, [(x, y)], latency=False, forward=lambda model, x: model(x).movedim(1, -1))
    assert g.n == 120 and g.summary()["accuracy"]["teacher"][0] == pytest.approx(float((net(x).argmax(1) == y).double().mean()))


def test_teachers_that_are_no_single_module(tmp_path):
    "Several teachers and stored answers, as kd.distill takes them."
    from kdlab.schemes.teachers import Teachers
    torch.manual_seed(0)
    student, one, two = Conv(4), Conv(8), Conv(8)
    several = Teachers([one, two], T=1., **FIRST)
    g = kd.gap(student, several, images(shuffle=True), **FIRST)
    with torch.no_grad():
        x = images().dataset.tensors[0]
        p = sum(net.eval()(x)[0].double().softmax(-1) for net in (one, two)) / 2
    np.testing.assert_allclose(g.teacher.confidence, p.max(-1).values[g.ids], rtol=1e-5)
    assert g.cka is None and any("no single module" in note for note in g.notes) and "parameters" not in g.summary()
    assert g.teacher.name == several.about and "Gap: Conv against" in repr(g)

    class Few(Source):
        def answer(self, batch, x, y): return torch.zeros(len(x), 2), torch.zeros(len(x), 2, dtype=torch.long)

    with pytest.raises(ValueError, match="stores its top classes only"): kd.gap(student, Few(), images(), **FIRST)


# costs

def test_size_counts_shared_weights_once():
    net = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7, bias=False))
    assert costs.size(net) == {"parameters": 56, "bytes": 224}
    net[1].weight = net[0].weight
    assert costs.size(net) == {"parameters": 28, "bytes": 112}


def test_operations_of_a_transformer_do_not_depend_on_the_fused_path():
    torch.manual_seed(0)
    net, x = Encoder(), sentences()[0]
    inputs = {k: x[k] for k in ("input_ids", "attention_mask")}
    fused = torch.backends.mha.get_fastpath_enabled()
    found = costs.operations(net, inputs)
    assert found > 2 * 5 * 8 * 3 * 8 * 2 # at least the projections of q, k and v in two layers
    assert costs.operations(net, {k: v[:1] for k, v in inputs.items()}) == found
    assert torch.backends.mha.get_fastpath_enabled() == fused and net.training


def test_operations_that_cannot_be_counted_are_a_note(pair, monkeypatch):
    def fail(*args, **kwargs): raise NotImplementedError("no formula")
    monkeypatch.setattr(costs, "operations", fail)
    g = measure(*pair)
    assert "operations" not in g.summary() and any("could not be counted: NotImplementedError" in note for note in g.notes)


# the result as a thing

def test_table_and_html(pair):
    g = measure(*pair, class_names=["a<b", *"cdef"], latency=True)
    shown = g.table()
    assert shown.columns[1:3] == ("teacher", "student") and "KL(teacher ‖ student) at T = 1, nats" in repr(shown)
    assert "latency, ms, batch of 4" in repr(g) and "<table>" in g._repr_html_() and g.classes[0] == "a<b"
    accuracy = next(row for row in shown if row[0] == "accuracy %")
    assert accuracy[1].startswith(f"{100 * g.summary()['accuracy']['teacher'][0]:.1f} [")


def test_summary_is_json(pair):
    assert json.loads(json.dumps(measure(*pair, latency=True).summary()))["agreement"]["between"][0] > 0


def test_saved_and_loaded(pair, tmp_path):
    zs, zt, y = pair
    for g in (measure(zs, zt, y), measure(zs, zt), kd.gap(Conv(), Conv(), images(), **FIRST)):
        again = Gap.load(g.save(tmp_path / "deep" / "gap.npz"))
        np.testing.assert_equal(again.summary(), g.summary())
        assert (again.classes, again.notes, again.T, again.student.layers) == (g.classes, g.notes, g.T, g.student.layers)
        for name in ("cka", "inputs", "labels", "ids"): np.testing.assert_array_equal(getattr(again, name), getattr(g, name))
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["gap.npz"]


def test_what_is_no_gap_is_refused(pair, tmp_path):
    with pytest.raises(FileNotFoundError): Gap.load(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("hello")
    np.savez(tmp_path / "other.npz", x=np.zeros(2), plain=np.array('{"format": "other"}'))
    np.savez(tmp_path / "pickle.npz", plain=np.array([object()], dtype=object))
    for name in ("text", "other", "pickle"):
        with pytest.raises(ValueError, match="gap"): Gap.load(tmp_path / f"{name}.npz")
    good = measure(*pair).save(tmp_path / "good.npz").read_bytes()
    fields = dict(np.load(tmp_path / "good.npz"))
    np.savez(tmp_path / "less.npz", **{k: v for k, v in fields.items() if k != "kl"})
    with pytest.raises(ValueError, match="less.npz is not whole.*kl"): Gap.load(tmp_path / "less.npz")
    (tmp_path / "half.npz").write_bytes(good[:len(good) // 2])
    with pytest.raises(ValueError, match="cannot be read as a gap"): Gap.load(tmp_path / "half.npz")


def test_what_is_kept(pair):
    zs, zt, y = pair
    assert measure(zs, zt, y, keep=100).student.logits is None
    g = measure(zs, zt, y)
    assert g.inputs.tolist() == list(range(40)) and g.student.logits.dtype == np.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_models_on_two_devices():
    torch.manual_seed(0)
    student, teacher = Conv(4), Conv(8)
    here = kd.gap(student, teacher, images(), latency=False, **FIRST)
    there = kd.gap(student.cuda(), teacher, images(), **FIRST)
    np.testing.assert_allclose(there.kl, here.kl, rtol=1e-3, atol=1e-6)
    assert there.student.cost["latency"]["device"].startswith("cuda")
