"""Models of transformers and timm, optional extras, with random weights: a run with features, masks and ids."""
import math

import pytest
import torch

import kdlab as kd


def finite(run): return all(math.isfinite(v) for entry in run.history for v in [entry["train_loss"], *entry["terms"].values()])


def test_a_run_with_models_of_transformers():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install 'kdlab[models]'")
    torch.manual_seed(0)
    make = lambda width, depth: transformers.BertForSequenceClassification(transformers.BertConfig(
        vocab_size=30, hidden_size=width, num_hidden_layers=depth, num_attention_heads=2, intermediate_size=2 * width, num_labels=3,
        max_position_embeddings=16))
    student, teacher = make(8, 1), make(16, 3)
    tokens, mask = torch.randint(30, (16, 7)), (torch.arange(7) < torch.randint(3, 8, (16, 1))).long()
    train = [{"input_ids": tokens[r], "attention_mask": mask[r], "labels": tokens[r, 0] % 3, "id": torch.arange(16)[r]} for r in (slice(0, 8), slice(8, 16))]
    pairs = kd.pair(student, teacher, {k: train[0][k] for k in ("input_ids", "attention_mask")})
    assert (pairs[0].student, pairs[0].teacher) == ("bert.encoder.layer.0", "bert.encoder.layer.2")
    queries = {side: f"bert.encoder.layer.{i}.attention.self.query" for side, i in (("student", 0), ("teacher", 2))}
    losses = [kd.CrossEntropy(), kd.SoftKL(), kd.Hint(project="auto").on(student=pairs.student[0], teacher=pairs.teacher[0]),
              kd.TokenRelation(heads=2).on(**queries), 0.1 * kd.CRD(size=16, width=4).on("bert.pooler")]
    run = kd.distill(student, teacher, train, train, epochs=2, losses=losses, progress=False)
    assert finite(run) and len(run.history[-1]["terms"]) == 5
    assert run.objective.losses[-1].layers["bank"].ids.tolist() == list(range(16))


def test_a_run_with_models_of_timm():
    timm = pytest.importorskip("timm", reason="timm is not installed: pip install 'kdlab[models]'")
    torch.manual_seed(0)
    student, teacher = (timm.create_model(name, num_classes=3, in_chans=1, pretrained=False) for name in ("resnet10t", "resnet18"))
    x, y = torch.randn(8, 1, 64, 64), torch.arange(8) % 3
    pairs = kd.pair(student, teacher, x)
    assert {"layer1", "layer2", "layer3", "layer4"} < set(pairs.student) and pairs.student == pairs.teacher
    losses = [kd.SoftKL(), kd.AttentionTransfer().on("layer3"), kd.Hint(project="auto").on(student=pairs.student, teacher=pairs.teacher)]
    run = kd.distill(student, teacher, [(x, y)], epochs=1, losses=losses, progress=False)
    assert finite(run) and len(run.history[-1]["terms"]) == 2 + len(pairs)
