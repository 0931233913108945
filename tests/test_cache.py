"""Stored teacher outputs: what comes back is what was said, and nothing else is ever taken for it."""
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kdlab as kd
from kdlab import sparse_reference
from kdlab.cache import Cache, Numbered, load, store
from kdlab.distilling import fingerprint

N, C = 50, 7


def samples(n=N, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return kd.tasks.Samples(torch.randn(n, 5, generator=gen), torch.arange(n) % C, 100 + torch.randperm(n, generator=gen))


def loader(data=None, size=8, **options): return kd.tasks.loader(data or samples(), size, ids=True, **options)


class Teacher(nn.Module):
    "Counts how many samples it was asked about; computes in float64, so that a row does not depend on its batch."
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.head, self.asked = nn.Linear(5, C, dtype=torch.float64), 0

    def forward(self, x):
        assert not self.training and not torch.is_grad_enabled()
        self.asked += len(x)
        return 5 * self.head(x.double()).float()


def said(teacher, data=None): return kd.frozen(teacher)((data or samples()).x)


# what comes back

@pytest.mark.parametrize("shard_rows", [1, 20, 1000])
def test_whole_logits_come_back_to_the_last_bit_in_any_order(tmp_path, shard_rows):
    teacher, data = Teacher(), samples()
    cache = store(teacher, loader(shuffle=True), tmp_path, shard_rows=shard_rows)
    assert len(list(tmp_path.glob("*.safetensors"))) == {1: 7, 20: 3, 1000: 1}[shard_rows]
    order = torch.randint(N, (200,))
    assert len(cache) == N and torch.equal(cache[data.ids[order]], said(teacher)[order])
    assert torch.equal(load(tmp_path, teacher)[data.ids], said(teacher)) and cache[data.ids].dtype == torch.float32


@pytest.mark.parametrize("dtype, bits", [("float16", 11), ("bfloat16", 8)])
@pytest.mark.parametrize("shift", [0, 3e4])
def test_half_formats_keep_the_distance_to_the_top(tmp_path, dtype, bits, shift):
    teacher, data = Teacher(), samples()
    nn.init.constant_(teacher.head.bias, shift)
    z = said(teacher)
    back = store(teacher, loader(), tmp_path, dtype=dtype)[data.ids]
    below = z.amax(-1, keepdim=True) - z
    assert ((back - z).abs() <= below * 2.0**-bits + z.abs() * 2.0**-23).all()
    assert shift or not torch.equal(back, z)


@pytest.mark.parametrize("tail", sparse_reference.TAILS)
@pytest.mark.parametrize("k, T", [(3, 1.), (3, 4.), (C, 2.)])
def test_top_k_is_worth_what_the_sparse_definition_says(tmp_path, tail, k, T):
    teacher, data = Teacher(), samples()
    cache = store(teacher, loader(), tmp_path, top_k=k, T=T, tail=tail)
    log_probs, ids = cache[data.ids]
    whole = (said(teacher).double() / T).log_softmax(-1)
    want, where = whole.topk(k, -1)
    assert torch.equal(ids, where) and ids.dtype == torch.int64
    torch.testing.assert_close(log_probs.double(), want, rtol=1e-6, atol=1e-6)
    student = torch.randn(N, C, dtype=torch.float64)
    rows = sparse_reference.forward_kl(student, log_probs.double(), ids, T, tail)
    loss = kd.SparseForwardKL(T=T, tail=tail, reduction="none")
    torch.testing.assert_close(loss(student, (log_probs.double(), ids)), T**2 * rows, rtol=1e-5, atol=1e-6)
    (_, soft), = [t for t in cache.objective().terms() if t[1].role != "hard"]
    assert (soft.T, soft.tail) == (T, tail) and cache.check(cache.objective()) is None


def test_outputs_of_sequences_and_of_models_that_need_forward(tmp_path):
    class Tokens(nn.Module):
        def __init__(self): super().__init__(); self.head = nn.Linear(1, C)

        def forward(self, x): return x, self.head(x.unsqueeze(-1))

    teacher, data = Tokens(), samples()
    cache = store(teacher, loader(), tmp_path, top_k=2, forward=lambda model, x: model(x)[1])
    log_probs, ids = cache[data.ids]
    assert log_probs.shape == ids.shape == (N, 5, 2) and cache.plan["shape"] == [5, C]


def test_any_data_set_can_be_numbered(tmp_path):
    data, teacher = samples(), Teacher()
    whole = TensorDataset(data.x, data.y)
    cache = store(teacher, DataLoader(Numbered(whole), 8), tmp_path)
    assert cache.ids.tolist() == list(range(N)) and torch.equal(cache[torch.arange(N)], said(teacher))
    rows = [Numbered(d, first=3)[1] for d in (whole, [x for x in data.x], [{"x": x, "labels": y} for x, y in whole])]
    assert [sorted(r) for r in rows] == [["id", "x", "y"], ["id", "x"], ["id", "labels", "x"]] and {r["id"] for r in rows} == {4}
    drawn = Numbered(kd.tasks.Augmented(kd.tasks.digits().train))
    before = drawn[0]["x"].clone()
    drawn.set_epoch(1)
    assert not torch.equal(drawn[0]["x"], before)


def test_ids_may_stand_elsewhere(tmp_path):
    data = samples()
    triples = DataLoader(TensorDataset(data.x, data.y, data.ids), 8)
    cache = store(Teacher(), triples, tmp_path, ids=lambda batch: batch[2])
    x, y, ids = next(iter(triples))
    assert torch.equal(cache.answer((x, y, ids), x, y), cache[ids])
    with pytest.raises(ValueError, match="no sample ids.*Numbered"): store(Teacher(), triples, tmp_path / "other")
    with pytest.raises(ValueError, match="one whole number for each of the 8"): store(Teacher(), triples, tmp_path / "x", ids=lambda b: b[0])


def test_several_loaders_share_a_cache(tmp_path):
    data = samples()
    parts = data.take(torch.arange(30)), data.take(torch.arange(30, N))
    assert torch.equal(store(Teacher(), [loader(p) for p in parts], tmp_path)[data.ids], said(Teacher()))


# what is refused

def test_a_stale_cache_is_refused(tmp_path):
    teacher = Teacher()
    store(teacher, loader(), tmp_path)
    with torch.no_grad(): teacher.head.bias[0] += 1e-6
    with pytest.raises(ValueError, match="stale.*another teacher.*earlier state"): load(tmp_path, teacher)
    with pytest.raises(ValueError, match="stale"): store(teacher, loader(), tmp_path)


def test_a_cache_with_other_options_is_not_mixed(tmp_path):
    store(Teacher(), loader(), tmp_path, top_k=3, T=2.)
    with pytest.raises(ValueError, match="T: 2.0 stored, 4.0 now; tail: bucket stored, drop now"):
        store(Teacher(), loader(), tmp_path, top_k=3, T=4., tail="drop")
    with pytest.raises(ValueError, match="top_k: 3 stored, None now"): store(Teacher(), loader(), tmp_path)


def test_foreign_folders_are_refused_and_left_alone(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist.*kd.cache.store"): load(tmp_path / "nowhere")
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(FileNotFoundError, match="holds no cache.json"): load(tmp_path)
    with pytest.raises(FileExistsError, match="not empty"): store(Teacher(), loader(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
    for text in ("{", "[]", '{"format": "other"}'):
        (tmp_path / "cache.json").write_text(text)
        with pytest.raises(ValueError, match="cannot be read as a cache|is not a cache of kdlab"): load(tmp_path)


def spoil(path, how):
    if how == "missing": path.unlink()
    elif how == "cut": path.write_bytes(path.read_bytes()[:-5])
    else: path.write_bytes(path.read_bytes()[:-5] + b"12345")


@pytest.mark.parametrize("how, says", [("missing", "is missing"), ("cut", "bytes instead of"), ("bytes", "other bytes")])
def test_a_damaged_cache_is_refused_and_mended(tmp_path, how, says):
    teacher = Teacher()
    store(teacher, loader(), tmp_path, shard_rows=16)
    spoil(tmp_path / "shard-00001.safetensors", how)
    with pytest.raises(ValueError, match=f"damaged: shard-00001.safetensors .*{says}"): load(tmp_path)
    teacher.asked = 0
    mended = store(teacher, loader(), tmp_path, shard_rows=16)
    assert teacher.asked == 16 and torch.equal(mended[samples().ids], said(teacher))


def test_other_inputs_under_the_same_ids_are_refused(tmp_path):
    data = samples()
    cache = store(Teacher(), loader(), tmp_path)
    moved = kd.tasks.Samples(data.x + 1e-6, data.y, data.ids)
    batch = next(iter(loader(moved)))
    with pytest.raises(ValueError, match=r"inputs of sample \d+ \(and of 7 more in this batch\).*augmented"): cache.answer(batch, batch["x"])
    assert load(tmp_path, check_inputs=False).answer(batch, batch["x"]).shape == (8, C)
    with pytest.raises(ValueError, match="inputs of sample"): store(Teacher(), loader(moved), tmp_path)
    twice = kd.tasks.Samples(data.x, data.y, torch.zeros(N, dtype=torch.long))
    with pytest.raises(ValueError, match="inputs of sample 0"): store(Teacher(), loader(twice), tmp_path / "twice")


def test_samples_that_were_not_stored_are_named(tmp_path):
    cache = store(Teacher(), loader(), tmp_path)
    with pytest.raises(ValueError, match="no outputs for 2 of 3 samples, such as 7"): cache[torch.tensor([101, 7, 9999])]


@pytest.mark.parametrize("options, says", [
    (dict(dtype="int8"), "dtype must be"), (dict(T=2.), "belong to top_k"), (dict(tail="drop"), "belong to top_k"),
    (dict(top_k=3, tail="cut"), "tail must be"), (dict(top_k=0), "top_k must be"), (dict(top_k=3, T=0.), "T must be"),
    (dict(shard_rows=0), "shard_rows must be"), (dict(top_k=C + 1), "k must be a whole number from 0 to the 7"),
])
def test_wrong_arguments_are_named(tmp_path, options, says):
    with pytest.raises(ValueError, match=says): store(Teacher(), loader(), tmp_path / "cache", **options)
    store(Teacher(), loader(), tmp_path / "cache") # and nothing is left that would stand in the way


def test_logits_that_cannot_be_stored(tmp_path):
    teacher = Teacher()
    nn.init.constant_(teacher.head.bias, 0.)
    with torch.no_grad(): teacher.head.bias[0] = 1e5
    with pytest.raises(ValueError, match="too much for torch.float16"): store(teacher, loader(), tmp_path / "half", dtype="float16")
    with torch.no_grad(): teacher.head.bias[0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinity"): store(teacher, loader(), tmp_path / "nan")
    with pytest.raises(ValueError, match="no batches"): store(Teacher(), [], tmp_path / "none")
    lengths = [{"id": torch.tensor([i]), "x": torch.zeros(1, n, 5)} for i, n in enumerate((3, 4))]
    with pytest.raises(ValueError, match="one shape.*pad"): store(Teacher(), lengths, tmp_path / "ragged")


@pytest.mark.parametrize("how, loss, says", [
    ({}, kd.SparseForwardKL(T=4), "whole logits: use kd.SoftKL"),
    ({}, kd.Hint().on("head"), "compares features.*pass the teacher itself"),
    (dict(top_k=3, T=4.), kd.SoftKL(T=4), r"use kd.SparseForwardKL\(T=4, tail='bucket'\)"),
    (dict(top_k=3, T=4.), kd.SparseForwardKL(T=2), "does not fit what is stored, T=4"),
    (dict(top_k=3, T=4.), kd.SparseForwardKL(T=4, tail="drop"), "does not fit"),
])
def test_losses_that_do_not_fit(tmp_path, how, loss, says):
    cache = store(Teacher(), loader(), tmp_path, **how)
    with pytest.raises(ValueError, match=says): cache.check(kd.CrossEntropy() + loss)
    cache.check(kd.CrossEntropy() * 2)


# a writer that is stopped

def test_a_writer_that_stopped_goes_on(tmp_path):
    class Stop(Exception): pass

    class Tired(Teacher):
        def forward(self, x):
            if self.asked >= 24: raise Stop
            return super().forward(x)

    with pytest.raises(Stop): store(Tired(), loader(), tmp_path, shard_rows=10)
    with pytest.raises(ValueError, match="half-written.*16 samples so far.*store again"): load(tmp_path)
    teacher = Teacher()
    cache = store(teacher, loader(shuffle=True), tmp_path, shard_rows=10)
    assert torch.equal(cache[samples().ids], said(teacher))
    teacher.asked = 0
    assert len(store(teacher, loader(), tmp_path)) == N and teacher.asked == 0 # everything is there
    more = kd.tasks.Samples(torch.ones(3, 5), None, torch.arange(3))
    assert len(store(teacher, loader(more), tmp_path)) == N + 3 and teacher.asked == 3


def test_the_temporary_files_of_a_killed_writer_are_swept(tmp_path):
    store(Teacher(), loader(), tmp_path)
    (tmp_path / "shard-00007.safetensors.123.tmp").write_bytes(b"half")
    (tmp_path / "shard-00003.safetensors").write_bytes(b"written, but not yet in the list")
    cache = store(Teacher(), loader(), tmp_path)
    assert not list(tmp_path.glob("*.tmp")) and len(cache) == N


def test_kill_while_writing(tmp_path):
    code = textwrap.dedent("""
        import sys, time, torch, kdlab as kd
        sys.path.insert(0, sys.argv[2])
        from test_cache import Teacher, loader
        class Slow(Teacher):
            def forward(self, x):
                time.sleep(0.02)
                print(self.asked, flush=True)
                return super().forward(x)
        kd.cache.store(Slow(), loader(size=1), sys.argv[1], shard_rows=3)
    """)
    folder, seen, killed = tmp_path / "cache", 0, 0
    command = [sys.executable, "-c", code, str(folder), os.path.dirname(__file__)]
    for after in (1, 8, 11):
        writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        for _ in range(after): writer.stdout.readline()
        writer.send_signal(signal.SIGKILL)
        killed += writer.wait() == -signal.SIGKILL
        writer.stdout.close()
        with pytest.raises(ValueError, match="half-written"): load(folder)
        found = json.loads((folder / "cache.json").read_text())
        rows = sum(s["rows"] for s in found["shards"])
        assert rows >= seen # what was whole stays
        seen = rows
    teacher = Teacher()
    cache = store(teacher, loader(), folder, shard_rows=3)
    assert killed == 3 and seen >= 6 and teacher.asked < N and torch.equal(cache[samples().ids], said(Teacher()))


# students of a file

def student():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, C))


def distill(teacher, **options):
    options = dict(epochs=3, valid=loader(), progress=False) | options
    return kd.distill(student(), teacher, loader(shuffle=True), options.pop("valid"), **options)


def plain(run): return [{k: v for k, v in h.items() if k != "seconds"} for h in run.history]


def test_a_student_of_a_whole_cache_is_the_student_of_the_teacher(tmp_path):
    teacher = Teacher()
    cache = store(teacher, loader(), tmp_path)
    teacher.asked = 0
    by_cache = distill(cache)
    assert teacher.asked == 0 and cache.plan["teacher"] in repr(by_cache)
    by_teacher = distill(teacher)
    assert fingerprint(by_cache.student) == fingerprint(by_teacher.student) and plain(by_cache) == plain(by_teacher)
    assert by_cache.plan == by_teacher.plan and torch.equal(by_cache.outputs["teacher"], by_teacher.outputs["teacher"])
    assert kd.show(by_cache).problem is None


def test_a_run_may_change_from_the_teacher_to_its_cache(tmp_path):
    teacher = Teacher()
    cache = store(teacher, loader(), tmp_path / "cache")

    def stop(run):
        if run.epoch == 1: raise KeyboardInterrupt

    distill(teacher, out=tmp_path / "run", callbacks=[stop])
    resumed = distill(cache, out=tmp_path / "run", resume=True)
    assert fingerprint(resumed.student) == fingerprint(distill(teacher).student)
    other = store(Teacher(1), loader(), tmp_path / "other")
    with pytest.raises(ValueError, match="not the one asked for"): distill(other, out=tmp_path / "run", resume=True)


@pytest.mark.parametrize("tail", sparse_reference.TAILS)
def test_a_student_of_all_classes_at_one_temperature_is_nearly_the_student_of_the_teacher(tmp_path, tail):
    cache = store(Teacher(), loader(), tmp_path, top_k=C, T=4., tail=tail)
    mine, whole = distill(cache), distill(Teacher())
    for a, b in zip(mine.student.parameters(), whole.student.parameters()): torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert [h["valid_agreement"] for h in mine.history] == [h["valid_agreement"] for h in whole.history]


def test_losses_that_do_not_fit_are_refused_before_the_first_step(tmp_path):
    with pytest.raises(ValueError, match="use kd.SparseForwardKL"): distill(store(Teacher(), loader(), tmp_path, top_k=2), losses=kd.SoftKL())


def test_a_loader_without_ids_and_augmented_data_are_refused(tmp_path):
    cache = store(Teacher(), loader(), tmp_path / "a")
    with pytest.raises(ValueError, match="no sample ids"): kd.distill(student(), cache, kd.tasks.loader(samples(), 8), progress=False)
    task, teacher = kd.tasks.digits(), kd.nets.teacher_cnn()
    drawn = DataLoader(Numbered(kd.tasks.Augmented(task.train)), 64)
    cache = store(teacher, drawn, tmp_path / "b")
    assert kd.distill(kd.nets.tiny_mlp(), cache, drawn, epochs=1, progress=False).finished # the views that were stored
    with pytest.raises(ValueError, match="augmented anew"): kd.distill(kd.nets.tiny_mlp(), cache, drawn, epochs=2, progress=False)


# many readers

def test_a_cache_can_be_read_by_many_and_moved(tmp_path):
    teacher, data = Teacher(), samples()
    caches = [store(teacher, loader(), tmp_path / "a"), load(tmp_path / "a"), load(tmp_path / "a", verify=False)]
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert all(torch.equal(c[data.ids], said(teacher)) for c in [*caches, load(tmp_path / "b", teacher)])
    assert isinstance(caches[0], Cache) and "50 samples" in repr(caches[0]) and "Teacher" in repr(caches[0])


def test_the_fingerprint_tells_what_was_left_out(tmp_path):
    how = [{}, dict(dtype="float16"), dict(top_k=3), dict(top_k=3, tail="drop"), dict(top_k=3, T=2.)]
    prints = [store(Teacher(), loader(), tmp_path / str(i), **h).fingerprint for i, h in enumerate(how)]
    assert prints[0] == fingerprint(Teacher()) and len(set(prints)) == len(how)
