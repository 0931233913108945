"""Taps: the right tensor under every name, an error where it would be the wrong one, and nothing left behind."""
import copy
import gc
import io
import weakref
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import kdlab as kd
from kdlab.taps import Pair, module_names


class Block(nn.Module):
    "A block that runs its activation twice."
    def __init__(self, before, after):
        super().__init__()
        self.fc1, self.fc2, self.act = nn.Linear(before, after), nn.Linear(after, after), nn.Tanh()

    def forward(self, x): return self.act(self.fc2(self.act(self.fc1(x))))


class Net(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.layer1, self.layer2 = Block(4, width), Block(width, width)
        self.head = nn.Linear(width, 3)

    def forward(self, x): return self.head(self.layer2(self.layer1(x)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def x():
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(1))


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# the right tensor

def test_reads_the_outputs_of_the_last_forward(net, x):
    with kd.Taps(net, ["layer1", "layer2.fc1"]) as taps:
        for inputs in (x, x + 1): # forward, read, forward, read
            z = net(inputs)
            torch.testing.assert_close(taps["layer1"], net.layer1.act(net.layer1.fc2(net.layer1.act(net.layer1.fc1(inputs)))))
            assert taps["layer1"].grad_fn is not None and taps["layer1"] is taps["layer1"]
    torch.testing.assert_close(z, net(x + 1))


def test_gradients_of_a_tapped_output_reach_the_layers_before_it_only(net, x):
    with kd.Taps(net, "layer1") as taps:
        net(x)
        taps["layer1"].square().sum().backward()
    assert net.layer1.fc1.weight.grad.abs().sum() > 0 and net.layer2.fc1.weight.grad is None


@pytest.mark.parametrize("layers, names", [
    ("layer1", ["layer1"]), (["layer2", "layer1"], ["layer2", "layer1"]), ("layer*", ["layer1", "layer2"]), ("layer?.fc1", ["layer1.fc1", "layer2.fc1"]),
    ("layer1.*", ["layer1.fc1", "layer1.fc2", "layer1.act"]), ("**fc2", ["layer1.fc2", "layer2.fc2"]), ("layer2**1", ["layer2.fc1"]),
    ("*", ["layer1", "layer2", "head"]), ("head.input", ["head.input"]), ("*.fc1.input", ["layer1.fc1.input", "layer2.fc1.input"]),
    ("layer?.act#2", ["layer1.act#2", "layer2.act#2"]), ("", [""]),
])
def test_names_and_patterns(net, layers, names):
    with kd.Taps(net, layers) as taps: assert list(taps) == names and len(taps) == len(names) and all(n in taps for n in names)


def test_modules_are_names_too(net, x):
    with kd.Taps(net, [net.layer2, net.head]) as taps:
        z = net(x)
        assert taps[net.head] is z is taps["head"] and taps[net.layer2] is taps["layer2"]
    with pytest.raises(ValueError, match="this Linear is no part of the Net"): kd.Taps(net, nn.Linear(2, 2))


def test_the_input_of_a_layer(net, x):
    class Keyword(nn.Module):
        def __init__(self): super().__init__(); self.net = net

        def forward(self, x): return self.net(x=x)

    with kd.Taps(net, ["head.input", "layer2"]) as taps, kd.Taps(Keyword(), "net.input") as outer:
        outer.model(x)
        assert taps["head.input"] is taps["layer2"] and outer["net.input"] is x


def test_patterns_read_several(net, x):
    with kd.Taps(net, ["layer*", "head"]) as taps:
        net(x)
        assert [id(t) for t in taps.on("layer*")] == [id(taps["layer1"]), id(taps["layer2"])] and taps.on("head")[0] is taps["head"]


def test_a_child_called_input_is_a_layer():
    model = nn.ModuleDict({"input": nn.Linear(2, 3)})
    with kd.Taps(model, "input") as taps:
        z = model["input"](torch.ones(1, 2))
        assert taps["input"] is z


# several tensors

class Many(nn.Module):
    class Output(OrderedDict): # as the output objects of Hugging Face: a dict with attributes
        __getattr__ = OrderedDict.__getitem__

    class Tuple(nn.Module):
        def forward(self, x): return x + 1, (x + 2, x + 3)

    class Dict(nn.Module):
        def forward(self, x): return Many.Output(hidden=x + 4, last=x + 5)

    def __init__(self):
        super().__init__()
        self.pair, self.dict, self.one = self.Tuple(), self.Dict(), nn.Identity()

    def forward(self, x):
        self.pair(x), self.dict(x)
        return {"logits": self.one(x)}


def test_items_of_tuples_and_dicts(x):
    model = Many()
    names = ["pair[0]", "pair[1][0]", "pair[-1][1]", "dict[hidden]", "dict[last]", "one"]
    with kd.Taps(model, names) as taps:
        model(x)
        for add, name in zip((1, 2, 3, 4, 5, 0), names): torch.testing.assert_close(taps[name], x + add)


@pytest.mark.parametrize("pick, add", [(0, 1), (lambda out: out[1][0], 2)])
def test_a_picker_for_all(x, pick, add):
    model = Many()
    with kd.Taps(model, "pair", pick=pick) as taps:
        model(x)
        torch.testing.assert_close(taps["pair"], x + add)


def test_more_than_one_tensor_must_be_picked(x):
    model = Many()
    with kd.Taps(model, "pair"), pytest.raises(TypeError, match=r"pair\[0\] \(5, 4\), pair\[1\]\[0\] \(5, 4\), pair\[1\]\[1\].*pick="): model(x)
    with kd.Taps(model, "dict[nothing]"), pytest.raises(ValueError, match="'nothing' picks nothing out of the Output"): model(x)
    assert hooks(model) == 0
    with kd.Taps(model, "") as taps:
        out = model(x)
        assert taps[""] is out["logits"] # a dict that holds one tensor only


# wrong names

@pytest.mark.parametrize("name, near", [("layer1.fc", "'layer1.fc2', 'layer1.fc1', 'layer2.fc2'"), ("laier2", "'layer2', 'layer1', "),
                                        ("layer9.*", "'layer2', 'layer1'"), ("layer1.input.input", "'layer1"), ("head[0", "'head'")])
def test_wrong_names_raise_with_the_three_nearest(net, name, near):
    with pytest.raises(ValueError) as e: kd.Taps(net, ["layer1", name])
    assert f"Net has no layer {name!r}; the nearest names are " in str(e.value) and near in str(e.value)
    assert str(e.value).split(";")[1].count("'") == 6 and hooks(net) == 0


def test_no_names_and_no_strings(net):
    with pytest.raises(ValueError, match="got none"): kd.Taps(net, [])
    with pytest.raises(TypeError, match="a layer is a name or a module, got int"): kd.Taps(net, [3])
    with kd.Taps(net, "head") as taps, pytest.raises(KeyError, match="'layer1' is not tapped; tapped: head"): taps["layer1"]


# what is left

def test_hooks_go_after_an_exception(net, x):
    with pytest.raises(ZeroDivisionError), kd.Taps(net, ["layer1", "head.input"]):
        assert hooks(net) == 4
        1 / 0
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), kd.Taps(net, "**"): net(x[:, :3])
    assert hooks(net) == 0


def test_close_without_with(net, x):
    taps = kd.Taps(net, "layer1")
    net(x)
    taps["layer1"]
    taps.close()
    assert hooks(net) == 0
    with pytest.raises(RuntimeError, match="taps are closed"): taps["layer1"]


def test_nothing_is_kept_alive(net, x):
    with kd.Taps(net, "layer1") as taps:
        net(x)
        alive = weakref.ref(taps["layer1"])
        assert alive() is not None
    gc.collect()
    assert alive() is None
    with kd.Taps(net, "layer1") as taps:
        net(x)
        alive = weakref.ref(taps["layer1"])
        net(x) # the next forward drops the last one
        gc.collect()
        assert alive() is None
        taps.clear()


def test_a_copy_of_a_tapped_model_has_no_taps(net, x):
    with kd.Taps(net, "layer1") as taps:
        twin = copy.deepcopy(net)
        file = io.BytesIO()
        torch.save(net, file)
        file.seek(0)
        back = torch.load(file, weights_only=False)
        torch.testing.assert_close(twin(x), back(x))
        net(x)
        first = taps["layer1"]
        twin(x), back(x)
        assert taps["layer1"] is first


# forward, read, forward, read

def test_a_second_forward_before_reading_raises(net, x):
    with kd.Taps(net, ["layer1", "layer2"]) as taps:
        net(x)
        with pytest.raises(RuntimeError, match="the Net runs again, and nothing.*taps.clear()"): net(x)
        taps["layer1"] # reading one is enough
        net(x)
        taps.clear()
        with pytest.raises(RuntimeError, match="has not run since"): taps["layer1"]
        net(x)
        assert taps["layer2"].shape == (5, 6)


def test_runs_that_do_not_count(net, x):
    with kd.Taps(net, "layer1") as taps:
        net(x)
        taps.recording = False
        for _ in range(3): net(x + 1)
        taps.recording = True
        first = taps["layer1"].detach().clone()
    torch.testing.assert_close(first, net.layer1(x))


def test_a_forward_that_failed_leaves_nothing_to_read(net, x):
    with kd.Taps(net, "layer1") as taps:
        net.head.register_forward_pre_hook(lambda m, args: 1 / 0 if x is None else None)
        good, x = x, None
        with pytest.raises(ZeroDivisionError): net(good)
        with pytest.raises(RuntimeError, match="stopped before its end"): taps["layer1"]
        x = good
        net(x)
        assert taps["layer1"].shape == (5, 6)


def test_parts_of_a_model_called_by_hand(net, x):
    with kd.Taps(net, "layer1.fc1") as taps:
        net.layer1(x)
        assert taps["layer1.fc1"].shape == (5, 6)
        net.layer1(x)
        with pytest.raises(RuntimeError, match="ran 2 times.*taps.clear()"): taps["layer1.fc1"]
        taps.clear()
        net.layer1(x)
        assert taps["layer1.fc1"].shape == (5, 6)


def test_a_layer_that_runs_twice(net, x):
    with kd.Taps(net, ["layer1.act", "layer1.act#1", "layer1.act#2", "layer1", "layer1.act#3"]) as taps:
        net(x)
        with pytest.raises(RuntimeError, match=r"'layer1.act' ran 2 times in one forward: name a run, layer1.act#1 to #2"): taps["layer1.act"]
        with pytest.raises(RuntimeError, match="'layer1.act#3': the layer ran 2 times"): taps["layer1.act#3"]
        assert taps["layer1.act#2"] is taps["layer1"]
        torch.testing.assert_close(taps["layer1.act#1"], net.layer1.act(net.layer1.fc1(x)))


def test_one_module_under_two_names(x):
    shared = nn.Linear(4, 4)
    model = nn.Sequential(OrderedDict(a=shared, b=nn.ReLU(), c=shared))
    with kd.Taps(model, ["a#1", "c#2"]) as taps:
        z = model(x)
        assert taps["c#2"] is z
        a = taps["a#1"].detach()
    torch.testing.assert_close(a, shared(x))


def test_a_layer_that_does_not_run(net, x):
    net.spare = nn.Linear(2, 2)
    with kd.Taps(net, ["spare", "layer1"]) as taps:
        net(x)
        with pytest.raises(RuntimeError, match="'spare' has not run.*Does the model's forward use it"): taps["spare"]


# values that would be wrong

def test_an_output_that_is_written_over():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))
    x = torch.randn(8, 4)
    with kd.Taps(model, ["0", "1"]) as taps:
        model(x)
        with pytest.raises(RuntimeError, match="output of '0' was written over.*copy=True"): taps["0"]
        assert (taps["1"] >= 0).all()
    with kd.Taps(model, "0", copy=True) as taps:
        model(x)
        first = taps["0"]
    torch.testing.assert_close(first, model[0](x))
    assert (torch.autograd.grad(first.sum(), model[0].bias)[0] == 8).all()
    with torch.inference_mode(), kd.Taps(model, "1") as taps: # torch counts no versions there
        model(x)
        assert taps["1"].shape == (8, 4)


class Checkpointed(Net):
    def __init__(self, reentrant): super().__init__(); self.reentrant = reentrant
    def forward(self, x):
        return self.head(checkpoint(self.layer2, checkpoint(self.layer1, x, use_reentrant=self.reentrant), use_reentrant=self.reentrant))


@pytest.mark.parametrize("mode", [True, False])
def test_checkpointing_records_the_first_run_only(net, x, mode):
    model = Checkpointed(reentrant=False).train(mode)
    model.load_state_dict(net.state_dict())
    grads = []
    for m in (model, net):
        with kd.Taps(m, ["layer1.fc2", "layer2"]) as taps:
            z = m(x)
            (z.sum() + taps["layer1.fc2"].square().sum() + taps["layer2"].sum()).backward()
            first = taps["layer1.fc2"] # still one run, after the recomputation
        grads.append([p.grad.clone() for p in m.parameters()])
    torch.testing.assert_close(*grads)
    assert first.shape == (5, 6)


def test_reentrant_checkpointing_gives_no_gradient_and_says_so(x):
    model = Checkpointed(reentrant=True)
    with kd.Taps(model, "layer1.fc2") as taps:
        model(x.requires_grad_())
        with pytest.raises(RuntimeError, match="ran without gradients.*use_reentrant=False"): taps["layer1.fc2"]
        with torch.no_grad(): assert taps["layer1.fc2"].shape == (5, 6)
        with torch.no_grad(): model(x)
        assert taps["layer1.fc2"].shape == (5, 6) # nobody wanted gradients


def test_a_model_that_switches_gradients_off_itself(net, x):
    class Teacher(Net):
        @torch.no_grad()
        def forward(self, x): return super().forward(x)

    teacher = Teacher()
    with kd.Taps(teacher, "layer1") as taps:
        teacher(x)
        assert not taps["layer1"].requires_grad


# wrappers

def test_names_without_and_with_the_prefix_of_dataparallel(net, x):
    model = nn.DataParallel(net)
    with kd.Taps(model, ["layer1", "module.layer2", "layer*.fc1"]) as taps:
        model(x)
        assert taps["layer1"].shape == (5, 6) and list(taps) == ["layer1", "module.layer2", "layer1.fc1", "layer2.fc1"]
        assert taps["module.layer2"].shape == (5, 6)
    assert list(module_names(model)) == list(module_names(net))


def test_a_child_called_module_keeps_its_name():
    assert list(module_names(nn.ModuleDict({"module": nn.Linear(2, 2)}))) == ["", "module"]


@pytest.mark.parametrize("earlier", [False, True], ids=["compiled afterwards", "compiled and called before"])
def test_compiled_models(net, x, earlier):
    model = torch.compile(net, backend="aot_eager")
    want = net.layer1(x).detach()
    if earlier: model(x)
    with kd.Taps(model, ["layer1", "_orig_mod.layer2.act#2"]) as taps:
        for _ in range(2):
            z = model(x)
            torch.testing.assert_close(taps["layer1"], want)
            torch.testing.assert_close(net.head(taps["_orig_mod.layer2.act#2"]), z)
            grad, = torch.autograd.grad(taps["layer1"].sum(), net.layer1.fc1.weight)
            assert grad.abs().sum() > 0
    model(x)
    assert hooks(net) == 0


def test_a_transformer_in_eval_mode_shows_its_inside():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    with torch.no_grad(), kd.Taps(encoder, ["layers.0.linear1", "layers.1"]) as taps: # the fused path would skip the layers
        z = encoder(torch.randn(2, 3, 8))
        assert taps["layers.0.linear1"].shape == (2, 3, 16) and torch.equal(taps["layers.1"], z)


# layers

def test_layers_lists_what_can_be_tapped(x):
    model = nn.Sequential(OrderedDict(fc=nn.Linear(4, 6), block=Block(6, 6), rnn=nn.GRU(6, 5), spare=nn.Identity()))
    model.forward = lambda x: model.rnn(model.block(model.fc(x)))[0]
    model.train()
    rows = kd.layers(model, x)
    assert [(r.name, r.type, r.shape, r.parameters) for r in rows] == [
        ("fc", "Linear", (5, 6), 30), ("block", "Block", (5, 6), 84), ("block.fc1", "Linear", (5, 6), 42), ("block.fc2", "Linear", (5, 6), 42),
        ("block.act#1", "Tanh", (5, 6), 0), ("block.act#2", "Tanh", (5, 6), 0), ("rnn[0]", "GRU", (5, 5), 195), ("rnn[1]", "GRU", (1, 5), 195),
        ("spare", "Identity", None, 0)]
    assert model.training and hooks(model) == 0
    with kd.Taps(model, [r.name for r in rows if r.shape]) as taps:
        model(x)
        assert [tuple(t.shape) for t in taps.values()] == [r.shape for r in rows if r.shape]
    assert repr(rows).splitlines()[0].split() == ["name", "type", "shape", "parameters"] and "not run" in repr(rows)
    assert rows._repr_html_().count("<tr>") == 10 and "5×6" in rows._repr_html_()


def test_layers_of_foreign_models(x):
    class Foreign(nn.Module):
        def __init__(self): super().__init__(); self.net = Net()

        def forward(self, pixels, scale): return {"a": self.net(pixels * scale), "b": pixels}

    assert kd.layers(Foreign(), {"pixels": x, "scale": 2.0})[0].shape == (5, 3)
    assert kd.layers(Foreign(), (x, 2.0))[0].name == "net"
    assert kd.layers(Foreign(), x, forward=lambda model, x: model(x, 1.0))[0].shape == (5, 3)
    assert kd.layers(torch.compile(Foreign(), backend="aot_eager"), (x, 2.0))[0].name == "net"


def test_layers_takes_its_hooks_out_after_an_error(net, x):
    with pytest.raises(RuntimeError): kd.layers(net, x[:, :2])
    assert hooks(net) == 0 and net.training


# pair

def cnn(*widths, blocks=1):
    def stage(before, after):
        convs = [layer for i in range(blocks) for layer in (nn.Conv2d(after if i else before, after, 3, padding=1), nn.ReLU())]
        return nn.Sequential(*convs, nn.MaxPool2d(2))

    body = OrderedDict((f"stage{i}", stage(before, after)) for i, (before, after) in enumerate(zip((3, *widths), widths), 1))
    return nn.Sequential(OrderedDict(**body, pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), head=nn.Linear(widths[-1], 10)))


def test_maps_are_paired_by_size():
    pairs = kd.pair(cnn(4, 8), cnn(8, 16, 32, blocks=2), torch.randn(2, 3, 32, 32))
    assert pairs[:3] == [
        Pair("stage1.1", "stage1.3", (4, 32, 32), (8, 32, 32), "both end the stage of 32×32; channels differ: project"),
        Pair("stage2.1", "stage2.3", (8, 16, 16), (16, 16, 16), "both end the stage of 16×16; channels differ: project"),
        Pair("stage2", "stage3.3", (8, 8, 8), (32, 8, 8), "both end the stage of 8×8; channels differ: project")]
    assert (pairs[3].student, pairs[3].teacher) == ("flat", "flat") and len(pairs) == 4
    assert pairs.student == ["stage1.1", "stage2.1", "stage2", "flat"] and "why" in repr(pairs)


class InPlace(nn.Module):
    "A residual block as timm writes it: the shortcut runs last, and is added into what the main path returned."
    def __init__(self, before, after):
        super().__init__()
        self.conv, self.bn, self.act = nn.Conv2d(before, after, 3, 2, 1), nn.BatchNorm2d(after), nn.ReLU(inplace=True)
        self.downsample = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(before, after, 1))

    def forward(self, x):
        y = self.bn(self.conv(x))
        y += self.downsample(x)
        return self.act(y)


def test_a_block_that_adds_in_place_ends_its_stage():
    net = lambda width, blocks: nn.Sequential(*(InPlace(1 if i == 0 else width, width) for i in range(blocks)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3))
    pairs = kd.pair(net(4, 2), net(8, 2), torch.randn(2, 1, 16, 16))
    assert pairs.student[:2] == pairs.teacher[:2] == ["0", "1"]


def test_order_is_kept_where_sizes_do_not_agree():
    shrunk = nn.Sequential(nn.AvgPool2d(3, stride=2), cnn(4, 8))
    x, teacher = torch.randn(2, 3, 32, 32), cnn(4, 8, 16)
    pairs = [p for p in kd.pair(shrunk, teacher, x) if len(p.student_shape) == 3]
    assert [(p.student_shape[1:], p.teacher_shape[1:]) for p in pairs] == [((15, 15), (16, 16)), ((7, 7), (8, 8)), ((3, 3), (4, 4))]
    assert pairs[0].why.startswith("nearest sizes, 15×15 and 16×16")


class Transformer(nn.Module):
    def __init__(self, depth, width):
        super().__init__()
        self.embed, self.head = nn.Linear(4, width), nn.Linear(width, 3)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(width, 2, 2 * width, batch_first=True) for _ in range(depth))

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks: x = block(x)
        return self.head(x.mean(1))


def test_blocks_are_paired_by_depth():
    pairs = kd.pair(Transformer(2, 8), Transformer(6, 8), torch.randn(2, 5, 4))
    assert list(zip(pairs.student, pairs.teacher)) == [("blocks.0", "blocks.2"), ("blocks.1", "blocks.5")]
    swapped = kd.pair(Transformer(6, 8), Transformer(2, 8), torch.randn(2, 5, 4))
    assert (swapped.teacher, swapped.student) == (pairs.student, pairs.teacher)


def test_vectors_only():
    student, teacher = kd.nets.mlp((8,)), kd.nets.mlp((32, 16))
    pairs = kd.pair(student, teacher, torch.randn(2, 1, 8, 8))
    assert pairs.student[-1] == "relu1" and pairs.teacher[-1] in ("relu1", "relu2") and "widths differ: project" in pairs[-1].why


def test_a_student_of_one_block_is_paired_by_its_block():
    pairs = kd.pair(Transformer(1, 8), Transformer(6, 8), torch.randn(2, 5, 4))
    assert [p.student for p in pairs if len(p.student_shape) == 2] == ["blocks.0"]


def test_pairs_feed_a_loss():
    student, teacher = cnn(4, 8), cnn(8, 16)
    pairs = kd.pair(student, teacher, torch.randn(2, 3, 16, 16))[:2]
    loss = kd.AttentionTransfer().on(student=[p.student for p in pairs], teacher=[p.teacher for p in pairs])
    assert [l.bound for l in loss.losses] == [(p.student, p.teacher) for p in pairs]
