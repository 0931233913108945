"""Schemes: who teaches whom, and when; each against what its definition says, and exact when it is resumed."""
import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kdlab as kd
from kdlab import schemes
from kdlab.distilling import fingerprint


def data(n=64, seed=0, labels=True):
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=gen)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    return TensorDataset(x, y) if labels else TensorDataset(x)


def loader(**kwargs): return DataLoader(data(**kwargs), 16, shuffle=True)


def net(seed=0, width=8):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width), nn.Dropout(0.2), nn.ReLU(), nn.Linear(width, 3))


@pytest.fixture(scope="module")
def teacher():
    model = net(9, 32)
    kd.distill(model, None, loader(n=256, seed=1), epochs=8, lr=0.02, progress=False)
    return model


OPTIONS = dict(epochs=2, progress=False)


def plain(run): return [{k: v for k, v in h.items() if k != "seconds"} for h in run.history]


# chains

def chain(teacher, **options):
    return schemes.teacher_assistants(net(), teacher, [net(1, 16), net(2, 12)], loader(), loader(seed=2), **OPTIONS | options)


def test_a_chain_is_its_runs_one_after_the_other(teacher):
    runs = chain(teacher, seed=5)
    assert runs.names == ["assistant1", "assistant2", "student"] and runs.finished and "3 of 3 stages" in repr(runs)
    assert [run.teacher for run in runs] == [teacher, runs[0].student, runs[1].student]
    above = teacher
    for i, (run, fresh) in enumerate(zip(runs, (net(1, 16), net(2, 12), net()))):
        alone = kd.distill(fresh, above, loader(), loader(seed=2), seed=5 + i, **OPTIONS)
        assert fingerprint(alone.student) == fingerprint(run.student) and plain(alone) == plain(run)
        above = alone.student
    assert runs.student is runs[2].student and runs.history is runs[2].history
    kd.show(runs)


def test_a_chain_may_have_epochs_of_its_own_for_each_stage(teacher):
    assert [len(run.history) for run in chain(teacher, epochs=[1, 2, 3])] == [1, 2, 3]
    with pytest.raises(ValueError, match="one for each of the 3 stages, got 2"): chain(teacher, epochs=[1, 2])


def again(make_runs, tmp_path):
    "A row that is cut after every epoch and resumed each time is the row that was never cut."
    def stop(run): raise KeyboardInterrupt

    whole = make_runs()
    for stage in range(len(whole)): # of two epochs each
        cut = make_runs(out=tmp_path, resume=True, callbacks=[stop])
        assert len(cut) == stage + 1 and not cut.finished and cut.last.status == "interrupted"
    resumed = make_runs(out=tmp_path, resume=True)
    assert resumed.finished and [fingerprint(r.student) for r in resumed] == [fingerprint(r.student) for r in whole]
    assert [plain(r) for r in resumed] == [plain(r) for r in whole]
    with pytest.raises(FileExistsError, match="resume=True"): make_runs(out=tmp_path)


def test_a_chain_is_resumed_exactly(teacher, tmp_path):
    again(lambda **o: chain(teacher, **o), tmp_path)


def test_a_resumed_chain_with_another_beginning_is_refused(teacher, tmp_path):
    chain(teacher, out=tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1-assistant1", "2-assistant2", "3-student"]
    with pytest.raises(ValueError, match="teacher_fingerprint"): chain(net(7, 32), out=tmp_path, resume=True)


def test_wrong_chains(teacher):
    same = net(1)
    with pytest.raises(ValueError, match="assistants is empty"): schemes.teacher_assistants(net(), teacher, [], loader())
    with pytest.raises(ValueError, match="one of its own"): schemes.teacher_assistants(net(), teacher, [same, same], loader())
    with pytest.raises(ValueError, match="one of its own"): schemes.teacher_assistants(net(), teacher, [teacher], loader())
    with pytest.raises(TypeError, match="function from parameters"): chain(teacher, optimizer=torch.optim.SGD(net().parameters(), 0.1))
    with pytest.raises(TypeError, match="unexpected keyword"): chain(teacher, epoch=3)


@pytest.mark.parametrize("first", ["labels", "teacher"])
def test_born_again_generations(teacher, first, tmp_path):
    ban = lambda **o: schemes.born_again(net, loader(), loader(seed=2), generations=2,
                                         teacher=teacher if first == "teacher" else None, **OPTIONS | o)
    runs = ban()
    assert runs.names == ["generation0", "generation1", "generation2"] and runs[1].teacher is runs[0].student
    paper = (kd.CrossEntropy() + kd.SoftKL(T=1)).equation()
    assert [run.plan["objective"] == paper for run in runs] == [first == "teacher", True, True]
    assert [run.plan["student_start"] for run in runs] == [fingerprint(net(i)) for i in range(3)] # each started anew
    again(ban, tmp_path)
    assert ban(losses=kd.SoftKL(T=2))[1].plan["objective"] == kd.SoftKL(T=2).equation() or first == "labels"


def test_born_again_needs_fresh_networks(teacher):
    one = net()
    with pytest.raises(ValueError, match=r"make\(1\) returned the teacher itself"): schemes.born_again(lambda i: one, loader(), **OPTIONS)
    with pytest.raises(ValueError, match="generations must be"): schemes.born_again(net, loader(), generations=0)


def test_stages_train_one_student(teacher, tmp_path):
    hint = kd.Hint(project="auto").on("3")
    plan = [dict(losses=hint, epochs=2), dict(epochs=2, lr=0.01)]
    make = lambda **o: schemes.stage_wise(net(), teacher, loader(), loader(seed=2), stages=plan, progress=False, **o)
    runs = make()
    assert runs[0].student is runs[1].student and runs[0].plan["objective"] != runs[1].plan["objective"]
    heads = []
    student = net()
    schemes.stage_wise(student, teacher, loader(), stages=plan, progress=False,
                       callbacks=[lambda run: heads.append(copy.deepcopy(student[4].weight))])
    assert torch.equal(heads[0], net()[4].weight) and torch.equal(heads[1], heads[0]) and not torch.equal(heads[2], heads[1])
    again(make, tmp_path)
    for wrong in ([], [hint]):
        with pytest.raises(ValueError, match="stages must be dicts"): schemes.stage_wise(net(), teacher, loader(), stages=wrong)
