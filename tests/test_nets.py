"The small nets: shapes, names, seeds, and specs that rebuild them."
import json

import pytest
import torch

from kdlab import nets, tasks


@pytest.mark.parametrize("name", nets.NETS)
def test_a_net_gives_one_logit_a_class(name):
    net = nets.get(name, classes=7, in_shape=(1, 12, 10))
    assert net(torch.randn(3, 1, 12, 10)).shape == (3, 7)
    assert list(dict(net.named_children()))[-1] == "head"


@pytest.mark.parametrize("name", nets.NETS)
def test_a_spec_goes_through_json_and_rebuilds_the_net(name):
    net, x = nets.get(name, classes=4, in_shape=(2, 8, 8), seed=3), torch.randn(5, 2, 8, 8)
    twin = nets.build(json.loads(json.dumps(net.spec)), seed=9)
    assert twin.spec == net.spec and str(twin) == str(net)
    assert not torch.equal(twin(x), net(x))
    twin.load_state_dict(net.state_dict())
    assert torch.equal(twin(x), net(x))


def test_nets_fit_every_task():
    for name in ("digits", "moons", "spirals", "rings", "blobs"):
        task = tasks.get(name)
        logits = nets.teacher_mlp(len(task.classes), task.in_shape)(task.test.x[:3])
        assert logits.shape == (3, len(task.classes))


def test_a_seed_fixes_the_weights_and_leaves_the_global_stream_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, again, other = (nets.student_mlp(seed=s) for s in (1, 1, 2))
    assert torch.equal(first.fc1.weight, again.fc1.weight) and not torch.equal(first.fc1.weight, other.fc1.weight)
    assert torch.equal(torch.get_rng_state(), before)
    nets.student_mlp(seed=None)
    assert not torch.equal(torch.get_rng_state(), before)


def test_layers_have_names_and_their_sizes():
    teacher = nets.teacher_cnn()
    assert [n for n, _ in teacher.named_children()] == [
        "conv1", "relu1", "conv2", "relu2", "pool", "flat", "fc", "relu", "head"]
    assert teacher.conv2.weight.shape == (32, 16, 3, 3) and teacher.fc.weight.shape == (64, 32 * 4 * 4)
    assert teacher.spec == {"net": "cnn", "channels": [16, 32], "hidden": 64, "classes": 10, "in_shape": [1, 8, 8]}
    assert [n for n, _ in nets.mlp((5, 4)).named_children()] == ["flat", "fc1", "relu1", "fc2", "relu2", "head"]


def test_parameters_are_counted_by_hand():
    assert nets.count_parameters(nets.student_mlp()) == 64 * 256 + 256 + 256 * 10 + 10
    conv = (9 * 16 + 16) + (9 * 16 * 32 + 32)
    teacher = nets.teacher_cnn()
    assert nets.count_parameters(teacher) == conv + 512 * 64 + 64 + 64 * 10 + 10
    teacher.requires_grad_(False)
    assert nets.count_parameters(teacher) == 0


def test_errors_name_the_argument_and_the_way_out():
    with pytest.raises(ValueError, match="no net 'student_mpl'; did you mean 'student_mlp'"):
        nets.get("student_mpl")
    with pytest.raises(ValueError, match="no architecture 'resnet'; architectures: mlp, cnn"):
        nets.build({"net": "resnet"})
    with pytest.raises(ValueError, match="no architecture None"):
        nets.build({"hidden": 3})
    with pytest.raises(ValueError, match="sides of 2 or more, got .1, 1, 8."):
        nets.cnn(in_shape=(1, 1, 8))
    with pytest.raises(ValueError, match="for other inputs use mlp"):
        nets.teacher_cnn(2, in_shape=(2,))
