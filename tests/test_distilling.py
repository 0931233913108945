"""kd.distill: the teacher stays, the run repeats, and nothing that was finished is lost, whatever stops it."""
import copy
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kdlab as kd
from kdlab.checkpoints import _datasets, owners
from kdlab.distilling import fingerprint
from small import data, loader, net, taught


@pytest.fixture(scope="module")
def teacher(): return taught()


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


def test_stop_is_asked_before_every_step(teacher):
    asked = []
    run = distill(net(), teacher, epochs=5, stop=lambda: asked.append(1) or len(asked) == 7)
    assert run.status == "interrupted" and run.epoch == 1 and len(asked) == 7 # four steps an epoch: the third of epoch 2
    assert distill(net(), teacher, stop=lambda: False).finished


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
        writes += "history" in state # of run.pt: at the start, and after each epoch
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
    killed = child(tmp_path, slow_from=4)
    assert killed.stdout.readline() == "half written\n" # two epochs are on disk, the third is half written
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    with pytest.raises(ValueError, match="unfinished.*2 of 4"): kd.load(tmp_path, net())
    out, _ = child(tmp_path, slow_from=0).communicate(timeout=60)
    assert out == f"finished {fingerprint(whole.student)}\n"


class Chancy(torch.utils.data.Dataset):
    "Draws from numpy, torch, Python and a generator of its own."
    def __init__(self): self.data, self.rng = data(), np.random.default_rng()
    def __len__(self): return len(self.data)
    def __getitem__(self, i):
        x, y = self.data[i]
        return x + .1 * torch.randn(()) + .1 * np.random.randn() + .1 * random.random() + .1 * self.rng.standard_normal(), y


def rich_run(**kwargs):
    "A run with all that a checkpoint must hold: dropout, batch norm, momentum, a schedule, a projector, moving numbers, a bank."
    losses = [(lambda t: 1 - t) * kd.CrossEntropy(), kd.SoftKL(T=lambda t: 4 - t), kd.Hint(project="auto").on("3"),
              0.1 * kd.CRD(size=64, width=4, others=8).on("0")]
    train = DataLoader(kd.cache.Numbered(Chancy()), 16, shuffle=True, generator=torch.Generator())
    return distill(net(), net(9, 32), epochs=4, losses=losses, train=train, patience=3, **kwargs,
                   optimizer=lambda p: torch.optim.SGD(p, 0.05, momentum=0.9),
                   scheduler=lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, total_steps=16))


def killed_at(out, step):
    "The run in a process of its own, which kills itself before that step; its exit code."
    asked = iter(range(1000))
    stop = lambda: next(asked) == step and os.kill(os.getpid(), signal.SIGKILL)
    child = multiprocessing.get_context("fork").Process(target=lambda: rich_run(out=out, resume=True, stop=stop))
    child.start()
    child.join(60)
    return child.exitcode


def test_chance_is_found_in_data_sets_inside_data_sets():
    chancy = Chancy()
    both = torch.utils.data.ConcatDataset([torch.utils.data.Subset(kd.cache.Numbered(chancy), range(8)), torch.utils.data.Subset(chancy, range(8))])
    found = owners(DataLoader(torch.utils.data.Subset(both.datasets[1], range(4)), 2))
    assert chancy in found and chancy in owners(DataLoader(both.datasets[0], 2)) and chancy in _datasets(DataLoader(both, 2)) and not _datasets([1])


@pytest.mark.parametrize("seed", range(3))
def test_a_run_killed_at_any_step_and_resumed_is_the_run_never_killed(tmp_path, seed):
    whole, chance, kills = rich_run(out=tmp_path / "whole"), random.Random(seed), []
    while (code := killed_at(tmp_path / "cut", step := chance.randrange(9))) == -signal.SIGKILL: kills.append(step)
    assert code == 0 and kills, "the last child came to the end"
    cut = rich_run(out=tmp_path / "cut", resume=True)
    assert cut.finished and fingerprint(cut.student) == fingerprint(whole.student) and fingerprint(cut.objective) == fingerprint(whole.objective)
    plain = lambda run: [{k: v for k, v in h.items() if k != "seconds"} for h in run.history]
    assert plain(cut) == plain(whole) and cut.best == whole.best and cut.notes == whole.notes
    best = [kd.load(tmp_path / name, net(5), best=True).student for name in ("cut", "whole")]
    assert fingerprint(best[0]) == fingerprint(best[1])


def test_a_killed_process_leaves_no_half_files_behind(tmp_path):
    for name in ("run.pt.123.tmp", "best.pt.123.tmp"): (tmp_path / name).write_bytes(b"half")
    assert distill(net(), net(9, 32), epochs=1, out=tmp_path).finished
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.pt", "run.json", "run.pt"]


def test_a_folder_of_somebody_else_is_left_alone(teacher, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds other files \(thesis.tex\) and no run"): distill(net(), teacher, out=tmp_path, resume=True)
    with pytest.raises(ValueError, match="is a file: out= takes a folder"): distill(net(), teacher, out=tmp_path / "thesis.tex")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_the_folder_is_a_run_before_the_first_step(teacher, tmp_path):
    class Stop(Exception): pass

    def stop(): raise Stop

    with pytest.raises(Stop): distill(net(), teacher, out=tmp_path, stop=stop)
    with pytest.raises(ValueError, match="unfinished .running, 0 of 3"): kd.load(tmp_path, net())
    assert fingerprint(distill(net(), teacher, out=tmp_path, resume=True).student) == fingerprint(distill(net(), teacher).student)


def test_what_was_saved_in_the_middle_of_an_epoch_is_not_continued(teacher, tmp_path):
    asked = []
    cut = distill(net(), teacher, stop=lambda: asked.append(1) or len(asked) == 7)
    cut.save(tmp_path)
    with pytest.raises(ValueError, match="saved in the middle of an epoch and cannot be continued exactly"): distill(net(), teacher, out=tmp_path, resume=True)
    assert fingerprint(kd.load(tmp_path, net(5), unfinished=True).student) == fingerprint(cut.student)


SECRET = np.random.default_rng()


class Secretive(Chancy):
    "Draws from a generator that nobody can find."
    def __getitem__(self, i): return self.data[i][0] + SECRET.standard_normal(), self.data[i][1]


def test_a_loader_that_cannot_be_replayed_is_refused_with_the_way_out(teacher, tmp_path):
    with pytest.raises(ValueError, match="begins with two different batches.*generator as an attribute.*set_epoch.*leave out= away"):
        distill(net(), teacher, train=DataLoader(Secretive(), 16), out=tmp_path)
    assert not any(tmp_path.iterdir())
    stream = lambda: iter(list(loader()))
    with pytest.raises(ValueError, match=r"read only once, and there are 2 epochs.*list\(train\)"): distill(net(), teacher, train=stream(), epochs=2)
    with pytest.raises(ValueError, match="read only once, and a run that is to be continued"): distill(net(), teacher, train=stream(), epochs=1, out=tmp_path)
    assert distill(net(), teacher, train=DataLoader(Secretive(), 16), epochs=1).finished


def test_other_data_are_not_taken_for_the_same_run(teacher, tmp_path):
    stop = lambda run: (_ for _ in ()).throw(KeyboardInterrupt) if run.epoch == 1 else None
    distill(net(), teacher, out=tmp_path, callbacks=[stop])
    for other in (loader(seed=3), DataLoader(data(), 8, shuffle=True)):
        with pytest.raises(ValueError, match="train does not begin as it did"): distill(net(), teacher, out=tmp_path, resume=True, train=other)
    for kwargs, words in ((dict(lr=1.), "optimizer: Adam.*lr=0.003.*saved, Adam.*lr=1.0"), (dict(scheduler=None), "scheduler: CosineAnnealingLR saved, None now")):
        with pytest.raises(ValueError, match=words): distill(net(), teacher, out=tmp_path, resume=True, **kwargs)
    assert distill(net(), teacher, out=tmp_path, resume=True).finished


def test_a_state_that_cannot_be_stored_is_refused_before_the_first_step(teacher, tmp_path):
    class Odd(torch.optim.lr_scheduler.ConstantLR):
        def state_dict(self): return super().state_dict() | {"odd": net()}

    with pytest.raises(ValueError, match="state of the optimizer or the scheduler cannot be stored"):
        distill(net(), teacher, out=tmp_path, scheduler=Odd)
    assert not any(tmp_path.iterdir())


def test_set_epoch_is_told_the_epoch(teacher):
    class Sampler(torch.utils.data.RandomSampler):
        told = []
        def set_epoch(self, epoch): self.told.append(epoch)

    distill(net(), teacher, train=DataLoader(data(), 16, sampler=Sampler(data())), epochs=3)
    assert Sampler.told == [0, 1, 2]


def test_the_best_and_the_last_epoch_can_both_be_had(teacher, tmp_path):
    def spoil(run):
        if run.epoch >= 2 and not run.finished: nn.init.zeros_(run.student[-1].weight)

    run = distill(net(), teacher, epochs=6, lr=0.05, callbacks=[spoil], out=tmp_path / "run")
    accuracy = lambda run: (kd.predict(run.student, DataLoader(data(seed=2), 64))[0].argmax(-1) == data(seed=2).tensors[1]).float().mean().item()
    assert run.best["epoch"] < 6 and accuracy(kd.load(tmp_path / "run", net())) == pytest.approx(run.history[-1]["valid_accuracy"])
    kd.load(tmp_path / "run", net()).save(tmp_path / "copy")
    for folder in ("run", "copy"): assert accuracy(kd.load(tmp_path / folder, net(), best=True)) == pytest.approx(run.best["value"])
    last = fingerprint(run.student)
    assert accuracy(run.take_best()) == pytest.approx(run.best["value"]) and fingerprint(run.student) != last
    with pytest.raises(ValueError, match="no epoch is the best"): distill(net(), teacher, valid=None, epochs=1).take_best()


# losses on layers

def feature_losses():
    return [0.2 * kd.CrossEntropy(), 0.8 * kd.SoftKL(T=2), 2 * kd.Hint(project="auto").on(student="3", teacher="3"), 10 * kd.RKD().on("4.input")]


def twin_of_run(student, teacher, train, objective, epochs, lr):
    "The same run as a loop by hand, for nets and loaders without chance."
    optimizer = torch.optim.Adam([*student.parameters(), *objective.parameters()], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(train))
    student.train()
    for _ in range(epochs):
        for x, y in train:
            with kd.Taps(student, ["3", "4.input"]) as fs, kd.Taps(teacher, ["3", "4.input"]) as ft:
                zs, zt = student(x), kd.frozen(teacher)(x)
                ce, kl, hint, rkd = objective.losses
                loss = (0.2 * ce + 0.8 * kl)(zs, zt, y) + 2 * hint(fs["3"], ft["3"]) + 10 * rkd(fs["4.input"], ft["4.input"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return loss.item()


def plain_net(seed, width):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, width, bias=False), nn.BatchNorm1d(width), nn.Identity(), nn.ReLU(inplace=True), nn.Linear(width, 3))


def test_a_run_with_features_is_the_loop_by_hand():
    teacher, train = plain_net(9, 32), DataLoader(data(), 64)
    objective = kd.build(sum(feature_losses()), plain_net(0, 8), teacher, data().tensors[0])
    student, by_hand, own = plain_net(0, 8), plain_net(0, 8), kd.build(sum(feature_losses()), plain_net(0, 8), teacher, data().tensors[0])
    own.load_state_dict(objective.state_dict())
    run = kd.distill(student, teacher, train, losses=objective, epochs=5, lr=0.02, progress=False)
    last = twin_of_run(by_hand, teacher, train, own, 5, 0.02)
    assert run.history[-1]["train_loss"] == pytest.approx(last, rel=1e-5)
    for a, b in ((student, by_hand), (run.objective, own)):
        for p, q in zip(a.state_dict().values(), b.state_dict().values()): torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
    assert not torch.equal(own.losses[2].project.layer.weight, kd.build(sum(feature_losses()), student, teacher, data().tensors[0]).losses[2].project.layer.weight)


def test_features_are_learnt(teacher):
    run = distill(net(), teacher, train=loader(n=256, seed=1), losses=feature_losses(), epochs=15, lr=0.02)
    first, last = run.history[0]["terms"], run.history[-1]["terms"]
    assert list(first) == ["CrossEntropy", "SoftKL", "Hint 3", "RKD 4.input"]
    assert last["Hint 3"] < 0.7 * first["Hint 3"] and last["RKD 4.input"] < 0.7 * first["RKD 4.input"]
    assert run.history[-1]["valid_accuracy"] > 0.7 and "terms    CrossEntropy" in repr(run)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in (*run.student.modules(), *teacher.modules()))


def test_the_history_shows_each_term_and_they_add_up(teacher):
    run = distill(net(), teacher, losses=feature_losses(), epochs=2)
    for entry in run.history:
        weighted = sum(w * value for w, value in zip((0.2, 0.8, 2, 10), entry["terms"].values()))
        assert weighted == pytest.approx(entry["train_loss"], rel=1e-5)
    assert "terms" not in distill(net(), teacher, losses=kd.SoftKL(), epochs=1).history[0]
    twice = distill(net(), teacher, losses=[kd.SoftKL(), kd.SoftKL(T=1), kd.CKA().on(student="0", teacher="3")], epochs=1)
    assert list(twice.history[0]["terms"]) == ["SoftKL", "SoftKL#2", "CKA 0/3"]


def test_terms_without_labels_are_those_of_the_samples_that_have_some(teacher):
    x, y = data(n=32).tensors
    y = torch.where(torch.arange(32) < 16, y, torch.full_like(y, -100))
    run = distill(net(), teacher, train=DataLoader(TensorDataset(x, y), 16), losses=feature_losses(), epochs=1)
    alone = distill(net(), teacher, train=DataLoader(TensorDataset(x[:16], y[:16]), 16), losses=feature_losses(), epochs=1)
    assert run.history[0]["terms"]["CrossEntropy"] == pytest.approx(alone.history[0]["terms"]["CrossEntropy"])
    assert any("1 batches had samples without labels" in note for note in run.notes)


def test_losses_can_be_used_for_several_runs(teacher):
    losses = feature_losses()
    prints = [fingerprint(distill(net(), teacher, losses=losses, epochs=2).student) for _ in range(2)]
    assert prints[0] == prints[1] and losses[2].losses[0].pending()
    assert fingerprint(distill(net(), teacher, losses=losses, epochs=2, seed=1).student) != prints[0]


def test_a_resumed_run_with_projectors_is_exact(teacher, tmp_path):
    options = dict(epochs=4, losses=feature_losses())
    whole = distill(net(), teacher, **options)

    def stop(run):
        if run.epoch == 2: raise KeyboardInterrupt

    cut = distill(net(), teacher, out=tmp_path, callbacks=[stop], **options)
    assert fingerprint(cut.objective) != fingerprint(whole.objective)
    resumed = distill(net(), teacher, out=tmp_path, resume=True, **options)
    assert fingerprint(resumed.student) == fingerprint(whole.student) and fingerprint(resumed.objective) == fingerprint(whole.objective)
    plain = lambda run: [{k: v for k, v in h.items() if k != "seconds"} for h in run.history]
    assert plain(resumed) == plain(whole)
    with pytest.raises(ValueError, match=r"objective: .*\[3, s projected\].* saved, .* now"):
        distill(net(), teacher, out=tmp_path, resume=True, epochs=4, losses=[0.2 * kd.CrossEntropy(), 0.8 * kd.SoftKL(T=2)])


def test_projectors_are_saved_and_loaded(teacher, tmp_path):
    run = distill(net(), teacher, losses=feature_losses(), epochs=1, out=tmp_path / "run")
    kd.load(tmp_path / "run", net()).save(tmp_path / "copy") # a run that was loaded without its losses keeps their weights
    objective = kd.build(sum(feature_losses()), net(), teacher, data().tensors[0])
    back = kd.load(tmp_path / "copy", net(), teacher, losses=objective)
    assert fingerprint(back.objective) == fingerprint(run.objective) and back.history == run.history
    with pytest.raises(ValueError, match=r"losses= are not those of the run, .*\[3, s projected\]"): kd.load(tmp_path / "run", net(), losses=kd.Hint(project=nn.Linear(2, 2)).on("3"))


def test_a_teachers_adapter_trains(teacher):
    adapter = nn.Linear(32, 8)
    before = adapter.weight.detach().clone()
    distill(net(), teacher, losses=kd.SoftKL() + kd.Hint(project_teacher=adapter).on("3"), epochs=1)
    assert not torch.equal(adapter.weight, before) and all(p.grad is None for p in teacher.parameters())


def test_losses_on_logits_need_no_layers(teacher):
    run = distill(net(), teacher, losses=kd.DIST() + 0.1 * kd.CrossEntropy(), epochs=2)
    assert set(run.history[0]["terms"]) == {"DIST", "CrossEntropy"}
    assert distill(net(), teacher, train=loader(labels=False), losses=kd.DIST(), epochs=1).finished


def test_an_early_exit_learns_from_labels_and_from_the_head(teacher):
    class Exits(nn.Module):
        def __init__(self): super().__init__(); torch.manual_seed(0); self.body, self.exit, self.head = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 3)

        def forward(self, x): h = self.body(x).relu(); return {"logits": self.head(h), "early": self.exit(h)}

    early = 0.5 * kd.CrossEntropy().on("exit") + kd.SoftKL().on(student="exit", teacher="4")
    run = distill(Exits(), teacher, train=loader(n=256, seed=1), losses=[kd.CrossEntropy(), early], epochs=10, lr=0.02)
    assert list(run.history[0]["terms"]) == ["CrossEntropy", "CrossEntropy exit", "SoftKL exit/4"]
    assert run.history[-1]["terms"]["CrossEntropy exit"] < 0.8 * run.history[0]["terms"]["CrossEntropy exit"]
    alone = distill(Exits(), None, losses=[kd.CrossEntropy(), 0.5 * kd.CrossEntropy().on("exit")], epochs=1)
    assert set(alone.history[0]["terms"]) == {"CrossEntropy", "CrossEntropy exit"}


def test_callbacks_may_use_the_models(teacher):
    seen = []

    def look(run):
        seen.append(kd.predict(run.student, loader())[0].shape)
        twin = copy.deepcopy(run.student)
        for _ in range(2): twin(torch.zeros(2, 6)), run.student(torch.zeros(2, 6)), kd.frozen(run.teacher)(torch.zeros(2, 6))

    one, other = (distill(net(), teacher, losses=feature_losses(), epochs=2, callbacks=c) for c in ([look], []))
    assert len(seen) == 2 and fingerprint(one.student) == fingerprint(other.student)


def test_random_states_of_the_caller_with_projectors(teacher):
    train, student = loader(), net()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    distill(student, teacher, train=train, losses=feature_losses(), epochs=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_optimizer_must_hold_the_projectors(teacher):
    student = net()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="optimizer= does not hold the parameters of the losses.*kd.build"):
        distill(student, teacher, losses=feature_losses(), optimizer=optimizer)
    objective = kd.build(sum(feature_losses()), student, teacher, data().tensors[0])
    optimizer.add_param_group({"params": list(objective.parameters())})
    before = fingerprint(objective)
    distill(student, teacher, losses=objective, optimizer=optimizer, scheduler=None, epochs=1)
    assert fingerprint(objective) != before


def test_a_stream_of_batches_needs_projectors_that_are_made(teacher):
    stream = lambda: iter(list(loader()))
    with pytest.raises(ValueError, match="train can be read only once.*kd.build"): distill(net(), teacher, train=stream(), losses=feature_losses(), epochs=1)
    objective = kd.build(sum(feature_losses()), net(), teacher, data().tensors[0])
    assert distill(net(), teacher, train=stream(), losses=objective, epochs=1).finished


def test_layers_are_released_when_a_run_fails(teacher):
    student, before = net(), fingerprint(teacher)
    with pytest.raises(ValueError, match=r"on\(student='0', teacher='3'\): hint needs features of the same shape|Hint.*on.*hint needs"):
        distill(student, teacher, losses=kd.Hint().on(student="0", teacher="3"), epochs=1)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in (*student.modules(), *teacher.modules())) and fingerprint(teacher) == before


def test_a_compiled_student_and_teacher(teacher):
    compiled = lambda model: torch.compile(model, backend="eager")
    one = distill(compiled(net()), compiled(teacher), losses=feature_losses(), epochs=2)
    other = distill(net(), teacher, losses=feature_losses(), epochs=2)
    for a, b in zip(one.student.state_dict().values(), other.student.state_dict().values()): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# models and batches of any kind

class Output:
    "As the output objects of Hugging Face."
    def __init__(self, logits, hidden): self.logits, self.hidden_states = logits, (hidden,)


class Foreign(nn.Module):
    "Somebody's model: keyword arguments in, something with logits out."
    def __init__(self, model, kind): super().__init__(); self.model, self.kind = model, kind

    def forward(self, pixels, scale):
        z = self.model(pixels * scale)
        return {"tuple": (z,), "dict": {"hidden": pixels, "logits": z}, "object": Output(z, pixels), "tensor": z}[self.kind]


class AsDicts(torch.utils.data.Dataset):
    def __init__(self, label): self.data, self.label = data(), label
    def __len__(self): return len(self.data)
    def __getitem__(self, i): return {"pixels": self.data[i][0], "scale": torch.ones(1), self.label: self.data[i][1], "id": i}


@pytest.mark.parametrize("kind, label", [("tensor", "labels"), ("tuple", "label"), ("dict", "y"), ("object", "target")])
def test_models_and_batches_of_any_kind(teacher, kind, label):
    pick = lambda names: [l if l.bound is None else l.on(student=f"model.{l.bound.student}", teacher=names + l.bound.teacher)
                          for l in (kd.SoftKL(), kd.Hint(project="auto").on("3"))]
    train = DataLoader(AsDicts(label), 16, shuffle=True)
    run = distill(Foreign(net(), kind), Foreign(teacher, "dict"), train=train, valid=train, losses=[kd.CrossEntropy(), *pick("model.")], epochs=2)
    plain = distill(net(), teacher, valid=loader(), losses=[kd.CrossEntropy(), kd.SoftKL(), kd.Hint(project="auto").on("3")], epochs=2)
    assert fingerprint(run.student.model) == fingerprint(plain.student)
    assert run.history[-1]["valid_accuracy"] == pytest.approx(plain.history[-1]["valid_accuracy"]) and "inputs" not in run.outputs
    logits, labels = kd.predict(run.student, DataLoader(AsDicts(label), 16))
    torch.testing.assert_close(logits, kd.predict(plain.student, DataLoader(data(), 16))[0])
    assert torch.equal(labels, data().tensors[1])


def test_forward_says_how_to_call_a_model(teacher):
    class Features(nn.Module):
        def __init__(self, model): super().__init__(); self.model = model
        def forward(self, x): h = self.model[:4](x); return h, self.model[4](h)

    forward, rows = lambda model, x: model(x)[1], DataLoader(data(seed=2), 16)
    run = kd.distill(Features(net()), Features(teacher), loader(), loader(seed=2), epochs=2, forward=forward, progress=False)
    plain = distill(net(), teacher, epochs=2)
    assert fingerprint(run.student.model) == fingerprint(plain.student) and run.history[-1]["valid_loss"] == plain.history[-1]["valid_loss"]
    assert torch.equal(kd.predict(run.student, rows, forward=forward)[0], kd.predict(plain.student, rows)[0])
    with pytest.raises(TypeError, match="Features returned a tuple"): kd.predict(run.student, loader())


def test_padding_does_not_count_in_losses_on_tokens():
    class Tokens(nn.Module):
        def __init__(self, seed): super().__init__(); torch.manual_seed(seed); self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        def forward(self, x, attention_mask): return self.head((self.body(x) * attention_mask[..., None]).sum(1))

    def batch(padding):
        gen = torch.Generator().manual_seed(0)
        x, mask = torch.randn(8, 5, 6, generator=gen), (torch.arange(5) < torch.tensor([[5], [3]] * 4)).long()
        return [{"x": {"x": torch.where(mask[..., None] > 0, x, padding), "attention_mask": mask}, "y": torch.arange(8) % 3}]

    losses = [kd.SoftKL(), kd.Hint().on("body"), kd.Cosine().on("body"), kd.RKD().on("head"), kd.TokenRelation().on("body")]
    prints = [fingerprint(kd.distill(Tokens(0), Tokens(1), batch(p), losses=losses, epochs=3, progress=False).student) for p in (torch.tensor(0.), torch.tensor(9.))]
    assert prints[0] == prints[1]


def test_padding_does_not_count_in_losses_on_attention():
    class Attends(nn.Module):
        def __init__(self, seed):
            super().__init__()
            torch.manual_seed(seed)
            self.q, self.k, self.attention, self.head = nn.Linear(6, 8), nn.Linear(6, 8), nn.Identity(), nn.Linear(6, 3)

        def forward(self, x, attention_mask):
            heads = lambda z: z.view(*z.shape[:2], 2, 4).transpose(1, 2)
            scores = self.attention(heads(self.q(x)) @ heads(self.k(x)).transpose(2, 3))
            weights = scores.masked_fill(attention_mask[:, None, None] == 0, -torch.inf).softmax(-1).mean(1)
            return self.head((attention_mask[..., None] * (weights @ x)).sum(1))

    def batch(padding):
        gen = torch.Generator().manual_seed(0)
        x, mask = torch.randn(8, 5, 6, generator=gen), (torch.arange(5) < torch.tensor([[5], [3]] * 4)).long()
        return [{"x": {"x": torch.where(mask[..., None] > 0, x, padding), "attention_mask": mask}, "y": torch.arange(8) % 3}]

    losses = [kd.CrossEntropy(), kd.AttentionMap(scores=True).on("attention")]
    fit = lambda p: kd.distill(Attends(0), Attends(1), batch(torch.tensor(p)), losses=losses, epochs=3, progress=False)
    runs = [fit(0.), fit(9.)]
    assert fingerprint(runs[0].student) == fingerprint(runs[1].student)
    mask, seen = batch(torch.tensor(0.))[0]["x"]["attention_mask"].bool(), []
    for model in (Attends(0), Attends(1)):
        with kd.Taps(model, "attention") as taps: model(**batch(torch.tensor(0.))[0]["x"]); seen.append(taps["attention"])
    want = kd.AttentionMap(scores=True)(*seen, mask=mask).item()
    assert runs[0].history[0]["terms"]["AttentionMap attention"] == pytest.approx(want, rel=1e-5)
    assert abs(kd.AttentionMap(scores=True)(*seen).item() - want) > 1e-3 * want


# bad input

@pytest.mark.parametrize("kwargs, error, words", [
    (dict(train=DataLoader([], 4)), ValueError, "train has no batches"),
    (dict(valid=DataLoader([], 4)), ValueError, "valid has no batches"),
    (dict(epochs=0), ValueError, "epochs must be"),
    (dict(losses=[]), ValueError, "losses= is empty"),
    (dict(losses=[nn.MSELoss()]), TypeError, "kdlab losses"),
    (dict(losses=kd.SoftKL() + kd.Hint()), ValueError, r"Hint\(\) compares features: say of which layers.*kd.pair"),
    (dict(losses=kd.CKA().on("layer3")), ValueError, "Sequential has no layer 'layer3'; the nearest names are"),
    (dict(train=DataLoader([], 4), losses=kd.Hint(project="auto").on("3")), ValueError, "train has no batches"),
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

    with pytest.raises(TypeError, match=r"Tuple returned a tuple.*output\[0\] \(16, 3\).*forward="): distill(net(), Tuple())
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
