"""kd.distill: the teacher stays, the run repeats, and nothing that was finished is lost, whatever stops it."""
import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kdlab as kd
from kdlab.distilling import fingerprint


def data(n=64, seed=0, labels=True):
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=gen)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    return TensorDataset(x, y) if labels else TensorDataset(x)


def loader(**kwargs):
    return DataLoader(data(**kwargs), 16, shuffle=True)


def net(seed=0, width=8):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width), nn.Dropout(0.2), nn.ReLU(), nn.Linear(width, 3))


@pytest.fixture(scope="module")
def teacher():
    model = net(9, 32)
    kd.distill(model, None, loader(n=256, seed=1), epochs=8, lr=0.02, progress=False)
    return model


def distill(student, teacher, **kwargs):
    options = dict(epochs=3, progress=False) | kwargs
    return kd.distill(student, teacher, options.pop("train", loader()), options.pop("valid", loader(seed=2)), **options)


# what a run does

def test_the_student_learns_and_the_history_says_so(teacher):
    run = distill(net(), teacher, train=loader(n=256, seed=1), epochs=15, lr=0.02)
    first, last = run.history[0], run.history[-1]
    assert run.status == "finished" and len(run.history) == 15 and [h["epoch"] for h in run.history] == list(range(1, 16))
    assert last["train_loss"] < first["train_loss"] and last["valid_accuracy"] > 0.7 > 0.6 > first["valid_accuracy"]
    logits, labels = kd.predict(run.student, DataLoader(data(seed=2), 64))
    assert last["valid_accuracy"] == pytest.approx((logits.argmax(-1) == labels).float().mean().item())
    assert not run.student.training


def test_the_history_has_the_loss_that_was_asked_for(teacher):
    objective = 0.3 * kd.CrossEntropy() + 0.7 * kd.SoftKL(T=2)
    run = distill(net(), teacher, losses=objective, epochs=1)
    x, y = data(seed=2).tensors
    want = objective(kd.frozen(run.student)(x), kd.frozen(teacher)(x), y)
    assert run.history[-1]["valid_loss"] == pytest.approx(want.item(), rel=1e-5)


def test_the_teacher_is_in_eval_mode_frozen_and_unchanged(teacher):
    teacher.train()
    before, seen = fingerprint(teacher), []
    hook = teacher.register_forward_hook(lambda m, i, o: seen.append((m.training, o.requires_grad)))
    distill(net(), teacher, epochs=1)
    hook.remove()
    assert set(seen) == {(False, False)} and fingerprint(teacher) == before and teacher.training
    assert all(p.requires_grad and p.grad is None for p in teacher.parameters())


def test_a_teacher_that_changes_stops_the_run(teacher):
    shared = nn.Sequential(nn.Linear(6, 3))
    with pytest.raises(RuntimeError, match="the teacher changed in epoch 1"):
        distill(shared, nn.Sequential(shared[0]), epochs=1)


def test_the_default_objective_is_hintons(teacher):
    assert distill(net(), teacher, epochs=1).plan["objective"] == (0.1 * kd.CrossEntropy() + 0.9 * kd.SoftKL(T=4)).equation()


def test_repr_prints_the_objective_as_an_equation(teacher):
    text = repr(distill(net(), teacher, losses=[0.5 * kd.CrossEntropy(), 2 * kd.SoftKL(T=3)], epochs=1))
    assert "0.5·CE(labels, student) + 2·3²·KL(softmax(teacher/3) ‖ softmax(student/3))" in text and "1 of 1 epochs" in text


# labels that are missing

def test_unlabelled_batches_drop_cross_entropy_and_say_so(teacher):
    run = distill(net(), teacher, train=loader(labels=False), epochs=2)
    pure = distill(net(), teacher, train=loader(labels=False), losses=0.9 * kd.SoftKL(T=4), epochs=2)
    assert fingerprint(run.student) == fingerprint(pure.student)
    assert any("without labels" in note for note in run.notes) and not any("without" in note for note in pure.notes)


def test_unlabelled_batches_without_a_soft_term_raise(teacher):
    with pytest.raises(ValueError, match="no soft term"): distill(net(), teacher, train=loader(labels=False), losses=kd.CrossEntropy())


def test_batches_may_be_dicts(teacher):
    samples = kd.tasks.Samples(*data().tensors, torch.arange(64))
    one, other = (distill(net(), teacher, train=kd.tasks.loader(samples, 16, ids=ids), epochs=2) for ids in (False, True))
    assert fingerprint(one.student) == fingerprint(other.student)


# chance

def test_the_same_seed_gives_the_same_run_and_another_seed_another(teacher):
    train = DataLoader(data(), 16, shuffle=True, generator=torch.Generator())
    prints = [fingerprint(distill(net(), teacher, train=train, seed=seed).student) for seed in (0, 0, 1)]
    assert prints[0] == prints[1] != prints[2]


def test_the_callers_random_state_is_left_alone(teacher):
    train, valid = loader(), loader(seed=2)
    torch.manual_seed(5)
    student, state = net(), torch.get_rng_state()
    distill(student, teacher, train=train, valid=valid)
    assert torch.equal(torch.get_rng_state(), state)


# stopping

def test_early_stop_keeps_the_best_weights(teacher):
    def spoil(run): # after epoch 2 every epoch is a bad one
        if run.epoch >= 2 and not run.finished: nn.init.zeros_(run.student[-1].weight)

    run = distill(net(), teacher, epochs=20, patience=3, lr=0.05, callbacks=[spoil])
    assert run.status == "stopped early" and run.epoch == run.best["epoch"] + 3
    logits, labels = kd.predict(run.student, DataLoader(data(seed=2), 64))
    assert (logits.argmax(-1) == labels).float().mean().item() == pytest.approx(run.best["value"])


def test_ctrl_c_leaves_a_usable_run(teacher, tmp_path):
    def press(run):
        if run.epoch == 2: raise KeyboardInterrupt

    run = distill(net(), teacher, epochs=5, callbacks=[press], out=tmp_path / "run")
    assert run.status == "interrupted" and run.epoch == 2 and not run.student.training
    assert kd.predict(run.student, DataLoader(data(), 16))[0].shape == (64, 3)
    run.save(tmp_path / "copy")
    with pytest.raises(ValueError, match="unfinished.*2 of 5.*resume=True"): kd.load(tmp_path / "copy", net())


@pytest.mark.parametrize("where", ["callback", "step"])
def test_a_resumed_run_is_the_run_that_was_never_stopped(teacher, tmp_path, where):
    whole = distill(net(), teacher, epochs=4, valid=loader(seed=2))

    class Stop(Exception): pass

    class Tripwire(nn.Module): # raises in the middle of epoch 3
        def __init__(self, model): super().__init__(); self.model, self.calls = model, 0

        def forward(self, x):
            self.calls += self.training
            if where == "step" and self.calls == 10: raise Stop
            return self.model(x)

    def stop(run):
        if where == "callback" and run.epoch == 2: raise Stop

    options = dict(epochs=4, out=tmp_path / "run")
    with pytest.raises(Stop): distill(Tripwire(net()), teacher, callbacks=[stop], **options)
    with pytest.raises(FileExistsError, match="resume=True"): distill(Tripwire(net()), teacher, **options)
    where = "done"
    resumed = distill(Tripwire(net()), teacher, resume=True, **options)
    assert fingerprint(resumed.student.model) == fingerprint(whole.student)
    plain = lambda run: [{k: v for k, v in h.items() if k != "seconds"} for h in run.history]
    assert plain(resumed) == plain(whole)
    again = distill(Tripwire(net()), teacher, resume=True, **options) # finished: loaded, not trained
    assert again.status == "finished" and fingerprint(again.student.model) == fingerprint(whole.student)


def test_a_folder_with_another_run_is_refused(teacher, tmp_path):
    distill(net(), teacher, out=tmp_path)
    with pytest.raises(ValueError, match="seed: 0 saved, 7 now"): distill(net(), teacher, out=tmp_path, resume=True, seed=7)
    with pytest.raises(ValueError, match="not the one asked for"): distill(net(1), teacher, out=tmp_path, resume=True)


# saving

def test_save_and_load(teacher, tmp_path):
    run = distill(net(), teacher)
    run.save(tmp_path / "run")
    back = kd.load(tmp_path / "run", student=net(5), teacher=teacher)
    assert fingerprint(back.student) == fingerprint(run.student) and back.teacher is teacher
    with pytest.raises(ValueError, match="not the model that taught"): kd.load(tmp_path / "run", net(), net(6, 32))
    back.save(tmp_path / "again")
    assert fingerprint(kd.load(tmp_path / "again", net(5)).student) == fingerprint(run.student)
    assert back.history == run.history and repr(back) == repr(run)
    assert torch.equal(back.outputs["student"], run.outputs["student"])
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "finished"


def test_kdlabs_own_nets_need_no_code_to_load(tmp_path):
    loaders = kd.tasks.moons().loaders(64)
    teacher, student = (kd.nets.mlp((w,), classes=2, in_shape=(2,)) for w in (16, 4))
    run = kd.distill(student, teacher, loaders.train, loaders.valid, epochs=1, progress=False, out=tmp_path)
    assert fingerprint(kd.load(tmp_path).student) == fingerprint(run.student)


def test_load_says_what_is_wrong(teacher, tmp_path):
    run = distill(net(), teacher, epochs=1)
    with pytest.raises(FileNotFoundError, match="does not exist"): kd.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="is empty"): kd.load(tmp_path)
    run.save(tmp_path)
    with pytest.raises(ValueError, match="pass student="): kd.load(tmp_path)
    with pytest.raises(ValueError, match="student= does not fit"): kd.load(tmp_path, net(width=9))
    (tmp_path / "run.pt").write_bytes((tmp_path / "run.pt").read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be read as a run"): kd.load(tmp_path, net())


def test_load_never_executes_what_it_reads(tmp_path):
    class Trap:
        def __reduce__(self): return os.mkdir, (str(tmp_path / "sprung"),)

    torch.save({"format": "kdlab run 1", "student": Trap()}, tmp_path / "run.pt")
    with pytest.raises(ValueError, match="cannot be read as a run"): kd.load(tmp_path)
    assert not (tmp_path / "sprung").exists()


CHILD = textwrap.dedent("""
    import sys, time, torch
    torch.set_num_threads(1)
    sys.path.insert(0, {tests!r})
    import test_distilling as t
    import kdlab as kd
    teacher = t.net(9, 32)
    writes, real = 0, torch.save

    def slow_save(state, file): # writes a third, then waits to be killed
        global writes
        writes += 1
        if writes < {slow_from}: return real(state, file)
        file.write(open({out!r} + "/run.pt", "rb").read()[:1000])
        file.flush()
        print("half written", flush=True)
        time.sleep(60)

    if {slow_from}: torch.save = slow_save
    run = t.distill(t.net(), teacher, epochs=4, out={out!r}, resume=True)
    print("finished", t.fingerprint(run.student), flush=True)
""")


def child(out, slow_from):
    code = CHILD.format(tests=os.path.dirname(__file__), out=str(out), slow_from=slow_from)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_a_kill_in_the_middle_of_a_save_loses_nothing(tmp_path):
    whole = distill(net(), net(9, 32), epochs=4)
    killed = child(tmp_path, slow_from=3)
    assert killed.stdout.readline() == "half written\n" # two epochs are on disk, the third is half written
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    with pytest.raises(ValueError, match="unfinished.*2 of 4"): kd.load(tmp_path, net())
    out, _ = child(tmp_path, slow_from=0).communicate(timeout=60)
    assert out == f"finished {fingerprint(whole.student)}\n"


# bad input

@pytest.mark.parametrize("kwargs, error, words", [
    (dict(train=DataLoader([], 4)), ValueError, "train has no batches"),
    (dict(valid=DataLoader([], 4)), ValueError, "valid has no batches"),
    (dict(epochs=0), ValueError, "epochs must be"),
    (dict(losses=[]), ValueError, "losses= is empty"),
    (dict(losses=[nn.MSELoss()]), TypeError, "kdlab losses"),
    (dict(losses=kd.SoftKL() + kd.Hint()), ValueError, "features"),
    (dict(valid=None, patience=2), ValueError, "patience"),
    (dict(scheduler="step"), ValueError, "scheduler must be"),
    (dict(train=[("a", "b")]), TypeError, "a batch must be"),
])
def test_bad_arguments_are_named(teacher, kwargs, error, words):
    with pytest.raises(error, match=words): distill(net(), teacher, **kwargs)


def test_student_and_teacher_must_be_two(teacher):
    with pytest.raises(ValueError, match="one module"): distill(teacher, teacher)
    with pytest.raises(ValueError, match="needs a teacher"): distill(net(), None, losses=kd.SoftKL())


def test_a_teacher_that_returns_a_tuple(teacher):
    class Tuple(nn.Module):
        def __init__(self): super().__init__(); self.model = teacher

        def forward(self, x): return self.model(x), x

    with pytest.raises(TypeError, match=r"Tuple returned.*output\[0\] \(16, 3\).*forward="): distill(net(), Tuple())
    pick = lambda model, x: model(x)[0] if isinstance(model, Tuple) else model(x)
    one, other = distill(net(), Tuple(), forward=pick), distill(net(), teacher)
    assert fingerprint(one.student) == fingerprint(other.student)


def test_nan_in_training_stops_before_it_spreads(teacher):
    x, y = data().tensors
    x = x.clone()
    x[40] = float("nan")
    student = nn.Linear(6, 3)
    with pytest.raises(FloatingPointError, match="nan in epoch 1, step 3.*student's logits and teacher's logits"):
        distill(student, teacher, train=DataLoader(TensorDataset(x, y), 16))
    assert all(p.isfinite().all() for p in student.parameters())
