"""Taps against real architectures with random weights and tiny inputs, and one plain module for every error."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gskd._torchvision  # noqa: F401
from gskd.errors import GSKDError
from gskd.layers import LayerInfo, auto_tap, channels, layers
from gskd.outputs import logits_of
from gskd.taps import Taps

IMAGES = torch.zeros(2, 3, 64, 64)


class Plain(nn.Module):
    """stem -> body -> head, with a layer that never runs, a shared one and token, integer and container outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.body = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.shared = nn.Conv2d(6, 6, 1)
        self.tokens = nn.Flatten(2)
        self.labels = Lambda(lambda x: x.argmax(1, keepdim=True))
        self.several = Lambda(lambda x: [x, x[:, :2], x.mean()])
        self.single = Lambda(lambda x: {"map": x, "score": x.mean()})
        self.record = Lambda(lambda x: SimpleNamespace(inner=(x, x[:, :3])))
        self.head = nn.Conv2d(6, 5, 1)
        self.unused = nn.Conv2d(6, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.stem(x))
        x = self.shared(self.shared(x))
        for layer in (self.tokens, self.labels, self.several, self.single, self.record):
            layer(x)
        return self.head(x)


class Lambda(nn.Module):
    def __init__(self, function: object) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> object:
        return self.function(x)  # type: ignore[operator]


def hooks_on(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def one_line_error(caught: pytest.ExceptionInfo[GSKDError], *parts: str) -> None:
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


# --- reading -------------------------------------------------------------------------------------------------------


def test_reads_the_tensor_the_layer_gave_with_its_graph() -> None:
    model = Plain()
    with Taps(model, ["body", "stem", "logits"]) as taps:
        output = model(IMAGES + 1)
    assert taps.names == ("body", "stem", "logits")
    assert taps["logits"] is output
    assert torch.equal(taps["body"], model.body(taps["stem"]))
    taps["body"].square().mean().backward()
    assert model.stem.weight.grad is not None
    assert model.stem.weight.grad.abs().sum() > 0
    assert model.head.weight.grad is None


@pytest.mark.parametrize(
    ("name", "width"),
    [
        ("several[0]", 6),
        ("several[1]", 2),
        ("several[-2]", 2),
        ("single", 6),
        ("single[map]", 6),
        ("record[inner][1]", 3),
    ],
)
def test_selectors(name: str, width: int) -> None:
    model = Plain()
    with Taps(model, [name]) as taps:
        model(IMAGES)
    assert taps[name].shape == (2, width, 16, 16)


def test_hooks_exist_only_inside_the_block_and_entering_starts_afresh() -> None:
    model = Plain()
    taps = Taps(model, ["body", "logits"])
    assert hooks_on(model) == 0
    with taps:
        assert hooks_on(model) == 2
        model(IMAGES)
        first = taps["body"]
    assert hooks_on(model) == 0
    model(IMAGES + 1)
    assert taps["body"] is first
    with taps:
        model(IMAGES + 1)
    assert not torch.equal(taps["body"], first)
    taps.clear()
    with pytest.raises(GSKDError, match="holds nothing"):
        taps["body"]


def test_an_exception_in_the_block_passes_unchanged_and_leaves_no_hook() -> None:
    model = Plain()
    taps = Taps(model, ["body", "unused"])
    handle = model.head.register_forward_pre_hook(lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError), taps:
        model(IMAGES)
    handle.remove()
    assert hooks_on(model) == 0
    with pytest.raises(GSKDError, match="holds nothing"):
        taps["body"]
    with pytest.raises(GSKDError, match="unused"), taps:  # and the object still works
        model(IMAGES)
    assert hooks_on(model) == 0


def test_two_taps_objects_may_overlap_but_one_may_not_be_nested_in_itself() -> None:
    model = Plain()
    outer, inner = Taps(model, ["body"]), Taps(model, ["body"])
    with outer:
        with inner:
            model(IMAGES)
        assert outer["body"] is inner["body"]
        with pytest.raises(GSKDError, match="already in use"), outer:
            pass
    assert hooks_on(model) == 0


def test_a_layer_known_by_two_names_is_found_by_either() -> None:
    conv = nn.Conv2d(3, 4, 1)
    model = nn.Sequential(OrderedDict(first=conv, act=nn.ReLU()))
    model.act.register_module("alias", conv)
    with Taps(model, ["first", "act.alias"]) as taps:
        model(IMAGES)
    assert taps["first"] is taps["act.alias"]


def test_inference_mode_is_fine() -> None:
    model = Plain()
    with torch.inference_mode(), Taps(model, ["body"]) as taps:
        model(IMAGES)
    assert taps["body"].shape == (2, 6, 16, 16)


# --- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (["bodi"], ["Plain", "'bodi' does not exist", "'body'"]),
        (["body.7"], ["Plain", "'body.7' does not exist"]),
        (["body", "stem", "body"], ["Plain", "'body'", "twice"]),
        (["body[0"], ["Plain", "'body[0'", "expected"]),
        ([""], ["Plain", "''", "expected"]),
    ],
)
def test_errors_before_the_forward(names: list[str], parts: list[str]) -> None:
    with pytest.raises(GSKDError) as caught:
        Taps(Plain(), names)
    one_line_error(caught, *parts)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("unused", ["never fired", "does not call it"]),
        ("shared", ["fired 2 times", "shared"]),
        ("tokens", ["(2, 6, 256)", "4-D", "tokens (B, N, C)"]),
        ("labels", ["torch.int64", "floating"]),
        ("several", ["list", "2 4-D tensors", "[0]: (2, 6, 16, 16)", "[1]: (2, 2, 16, 16)"]),
        ("several[2]", ["()", "4-D"]),
        ("several[3]", ["[3]", "choices", "[1]: (2, 2, 16, 16)"]),
        ("several[-4]", ["[-4]", "choices"]),
        ("several[map]", ["[map]", "choices"]),
        ("single[out]", ["[out]", "[map]: (2, 6, 16, 16)"]),
        ("record[outer]", ["[outer]", "[inner]: tuple of 2"]),
        ("body[1]", ["one tensor (2, 6, 16, 16)", "no selector"]),
        ("body.1", ["'body.1'"]),
    ],
)
def test_errors_during_or_after_the_forward(name: str, parts: list[str]) -> None:
    model = Plain()
    model.body[2] = nn.ReLU(inplace=True)  # overwrites what body.1 gave
    with pytest.raises(GSKDError) as caught, Taps(model, ["stem", name]):
        model(IMAGES)
    one_line_error(caught, "Plain", repr(name), *parts)
    assert hooks_on(model) == 0


def test_an_output_overwritten_in_place_is_an_error_but_an_inplace_layer_itself_is_not() -> None:
    model = Plain()
    model.body[2] = nn.ReLU(inplace=True)
    with Taps(model, ["body.2", "body"]) as taps:
        model(IMAGES)
    assert taps["body"] is taps["body.2"]
    with pytest.raises(GSKDError, match="overwritten in place"), Taps(model, ["body.1"]):
        model(IMAGES)


def test_a_block_without_or_with_two_forwards_is_an_error() -> None:
    model = Plain()
    with pytest.raises(GSKDError, match="was another model called, or none"), Taps(model, ["body"]):
        pass
    with pytest.raises(GSKDError, match="fired 3 times"), Taps(model, ["logits"]):
        [model(IMAGES) for _ in range(3)]


def test_asking_for_what_is_not_tapped_or_not_yet_there() -> None:
    model = Plain()
    with Taps(model, ["body"]) as taps:
        with pytest.raises(GSKDError, match="never fired"):
            taps["body"]
        model(IMAGES)
        with pytest.raises(GSKDError, match="'stem' is not tapped"):
            taps["stem"]


# --- logits --------------------------------------------------------------------------------------------------------


def test_logits_of_takes_every_known_form() -> None:
    logits, aux = torch.zeros(1, 4, 8, 8), torch.ones(1, 4, 8, 8)
    for output in (
        logits,
        OrderedDict(aux=aux, out=logits),
        {"logits": logits, "loss": aux.mean()},
        SimpleNamespace(logits=logits),
        (logits, torch.zeros(1, 3)),
        [logits, aux],
    ):
        assert logits_of(output) is logits
    for wrong in (torch.zeros(1, 4), {"masks": logits}, (torch.zeros(1), logits), (), None, SimpleNamespace(logits=3)):
        with pytest.raises(GSKDError, match="expected") as caught:
            logits_of(wrong)
        one_line_error(caught)


def test_logits_is_reserved_for_the_model_output() -> None:
    model = nn.Sequential(OrderedDict(logits=nn.Conv2d(3, 4, 1), up=nn.Upsample(scale_factor=2)))
    with Taps(model, ["logits"]) as taps:
        model(IMAGES)
    assert taps["logits"].shape == (2, 4, 128, 128)
    assert [info.name for info in layers(model, IMAGES)] == ["up", "logits"]


# --- wrappers ------------------------------------------------------------------------------------------------------


def test_torch_compile_also_when_it_was_compiled_before_the_hooks() -> None:
    model = nn.Sequential(OrderedDict(stem=nn.Conv2d(3, 4, 1), body=nn.Sequential(nn.ReLU(), nn.Conv2d(4, 5, 1))))
    compiled = torch.compile(model, backend="eager")
    compiled(IMAGES)  # from here on compiled code runs, which knows of no hook
    taps = Taps(compiled, ["stem", "logits"])
    for shift in (0.0, 1.0):
        with taps:
            output = compiled(IMAGES + shift)
        assert torch.equal(taps["stem"], model.stem(IMAGES + shift))
        assert taps["logits"] is output
    assert auto_tap(compiled, "logits") == "logits"
    assert channels(compiled, ["body.1"], IMAGES) == {"body.1": (2, 5, 64, 64)}


def test_logits_of_a_compiled_model_stay_compiled() -> None:
    runs: list[bool] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        def run(*inputs: Tensor) -> object:
            runs.append(True)
            return graph(*inputs)

        return run

    compiled = torch.compile(nn.Sequential(nn.Conv2d(3, 4, 1)), backend=backend)
    with Taps(compiled, ["logits"]):
        compiled(IMAGES)
    assert runs == [True]
    with Taps(compiled, ["0"]):  # inside the region: eager
        compiled(IMAGES)
    assert runs == [True]
    compiled(IMAGES)
    assert runs == [True, True]


@pytest.mark.parametrize("name", ["body", "body.1"])
def test_compiled_in_place_or_compiled_submodule(name: str) -> None:
    inner = nn.Sequential(nn.ReLU(), nn.Conv2d(4, 5, 1))
    inner.compile(backend="eager")
    inner(torch.zeros(1, 4, 4, 4))
    for body in (inner, torch.compile(nn.Sequential(nn.ReLU(), nn.Conv2d(4, 5, 1)), backend="eager")):
        model = nn.Sequential(OrderedDict(stem=nn.Conv2d(3, 4, 1), body=body))
        model(IMAGES)
        with Taps(model, [name]) as taps:
            model(IMAGES)
        assert taps[name].shape == (2, 5, 64, 64)


def test_distributed_data_parallel(tmp_path: object) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.Sequential(OrderedDict(stem=nn.Conv2d(3, 4, 1), module=nn.Conv2d(4, 5, 1)))
        wrapped = nn.parallel.DistributedDataParallel(model)
        with Taps(wrapped, ["stem", "module", "logits"]) as taps:  # a layer really called "module" keeps its name
            wrapped(IMAGES)
        assert [taps[name].shape[1] for name in taps.names] == [4, 5, 5]
        with pytest.raises(GSKDError, match=r"Sequential: layer 'sten'.*'stem'"):
            Taps(wrapped, ["sten"])
    finally:
        torch.distributed.destroy_process_group()


def test_activation_checkpointing_fires_once() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 1)
            self.block = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Tanh(), nn.Conv2d(4, 4, 1))

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.block, self.stem(x), use_reentrant=False)

    model = Checkpointed()
    runs: list[int] = []
    model.block[0].register_forward_hook(lambda *_: runs.append(1))
    with Taps(model, ["block.0", "block"]) as taps:
        model(IMAGES + 1)
    inside = taps["block.0"]
    (taps["block"].sum() + inside.sum()).backward()
    assert len(runs) == 2  # the recomputation did happen
    assert taps["block.0"] is inside
    assert model.stem.weight.grad is not None


# --- probing -------------------------------------------------------------------------------------------------------


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.norm(self.conv(x)))
        return x + torch.rand_like(x)

    def train(self, mode: bool = True) -> Noisy:
        raise AssertionError("a probe must not run what a model does on train() or eval()")


def test_probes_leave_no_trace() -> None:
    model = nn.Sequential(OrderedDict(net=Noisy(), frozen=nn.BatchNorm2d(4)))
    model.frozen.training = False
    modes = [module.training for module in model.modules()]
    example = torch.randn(2, 3, 8, 8)
    state, random = pickle.dumps(model.state_dict()), torch.get_rng_state()
    shapes = channels(model, ["net.norm", "logits"], example)
    assert shapes == {"net.norm": (2, 4, 8, 8), "logits": (2, 4, 8, 8)}
    assert len(layers(model, example)) == 6
    with pytest.raises(RuntimeError):
        channels(model, ["net.norm"], torch.ones(2, 7, 8, 8))
    assert torch.equal(torch.get_rng_state(), random)
    assert pickle.dumps(model.state_dict()) == state
    assert [module.training for module in model.modules()] == modes
    assert hooks_on(model) == 0


def test_layers_lists_what_can_be_tapped_and_all_of_it_can() -> None:
    model = Plain()
    found = layers(model, IMAGES)
    names = [info.name for info in found]
    assert names == [
        "stem", "body", "body.0", "body.1", "body.2", "several[0]", "several[1]", "single", "head", "logits",
    ]  # fmt: skip
    assert found[5] == LayerInfo("several[0]", (2, 6, 16, 16))
    assert channels(model, names, IMAGES) == {info.name: info.shape for info in found}


# --- real architectures --------------------------------------------------------------------------------------------


def test_segmentation_models_pytorch() -> None:
    import segmentation_models_pytorch as smp

    model = smp.DeepLabV3Plus("resnet18", encoder_weights=None, classes=5)
    assert (auto_tap(model, "features"), auto_tap(model, "logits")) == ("decoder", "segmentation_head.0")
    assert channels(model, ["encoder[-1]", "decoder", "segmentation_head.0", "logits"], IMAGES) == {
        "encoder[-1]": (2, 512, 4, 4),
        "decoder": (2, 256, 16, 16),
        "segmentation_head.0": (2, 5, 16, 16),
        "logits": (2, 5, 64, 64),
    }
    with pytest.raises(GSKDError, match=r"'encoder'.*6 4-D tensors.*\[5\]: \(2, 512, 4, 4\)"):
        channels(model, ["encoder"], IMAGES)


def test_torchvision() -> None:
    from torchvision.models import segmentation

    model = segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=5, aux_loss=True)
    assert (auto_tap(model, "features"), auto_tap(model, "logits")) == ("classifier.3", "logits")
    names = ["backbone[out]", "classifier.3", "logits", "logits[aux]"]
    with Taps(model.eval(), names) as taps, torch.no_grad():
        output = model(IMAGES)
    assert [taps[name].shape[1] for name in names] == [2048, 256, 5, 5]
    assert taps["logits"] is output["out"]
    assert taps["logits[aux]"] is output["aux"]
    with torch.device("meta"):
        fcn = segmentation.fcn_resnet50(weights=None, weights_backbone=None)
        lraspp = segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None)
    assert (auto_tap(fcn, "features"), auto_tap(lraspp, "features")) == ("classifier.2", "classifier.cbr")


def test_timm_features() -> None:
    import timm

    model = timm.create_model("resnet18", features_only=True, pretrained=False)
    with pytest.raises(GSKDError) as caught:
        auto_tap(model, "features")
    one_line_error(caught, "FeatureListNet", "layer name", "'layer1'")
    assert channels(model, ["logits[4]", "layer2"], IMAGES) == {"logits[4]": (2, 512, 2, 2), "layer2": (2, 128, 8, 8)}
    assert "logits[1]" not in [info.name for info in layers(model, IMAGES)]  # "logits" is its first map


def test_transformers_segformer() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.SegformerConfig(
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 1, 2, 2],
        decoder_hidden_size=24,
        num_labels=5,
    )
    model = transformers.SegformerForSemanticSegmentation(config)
    assert (auto_tap(model, "features"), auto_tap(model, "logits")) == ("decode_head.activation", "logits")
    encoder = next(name for name, module in model.named_modules() if type(module).__name__ == "SegformerModel")
    names = [f"{encoder}[hidden_states][1]", f"{encoder}[last_hidden_state]", "decode_head.activation", "logits"]
    assert [shape[1:] for shape in channels(model, names, IMAGES).values()] == [
        (8, 8, 8), (16, 2, 2), (24, 16, 16), (5, 16, 16),
    ]  # fmt: skip
    with pytest.raises(GSKDError, match=r"\(2, 256, 8\).*tokens"):
        channels(model, [next(n for n, m in model.named_modules() if isinstance(m, nn.LayerNorm))], IMAGES)


def test_levels_are_stages_of_the_encoder():
    import segmentation_models_pytorch as smp
    import torchvision

    model = smp.Unet("resnet18", encoder_weights=None, classes=3)
    names = auto_tap(model, "levels")
    shapes = channels(model, list(names), torch.zeros(1, 3, 64, 64))
    assert [shapes[name][1:] for name in names] == [(128, 8, 8), (256, 4, 4), (512, 2, 2)]
    assert auto_tap(torchvision.models.segmentation.fcn_resnet50(weights=None, weights_backbone=None), "levels") == (
        "backbone.layer2",
        "backbone.layer3",
        "backbone.layer4",
    )
