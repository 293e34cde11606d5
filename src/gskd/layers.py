"""Which layers a network has, and which of them a loss reads unless it is told otherwise (models -> taps)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from gskd.errors import GSKDError, described
from gskd.outputs import feature_maps, logits_of
from gskd.taps import LOGITS, Taps, eval_mode, inside_compiled, named_layers, parse_tap, unwrapped

Layers = str | tuple[str, ...]
"""One tap, or several where a loss compares layers."""


@dataclass(frozen=True)
class LayerInfo:
    """A layer that can be tapped."""

    name: str
    """As ``Taps`` takes it, with a selector where the layer returns several feature maps."""
    shape: tuple[int, ...]
    """(B, C, h, w) on the example."""


def layers(model: nn.Module, example: Tensor) -> list[LayerInfo]:
    """Every layer that can be tapped, in ``named_modules`` order, with its shape; ``logits`` last.

    Layers that run more than once per forward are left out: a tap on them is an error.

    Args:
        model: any module; its modes, statistics and the random state are left as found (see ``channels``).
        example: (B, 3, H, W) normalised images; moved to the model's device and dtype.
    """
    found: dict[str, list[LayerInfo]] = {}
    fired: Counter[str] = Counter()
    names: dict[int, str] = {}

    def hook_for(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, args: object, output: object) -> None:
            fired[name] += 1
            maps = feature_maps(output)
            only = len(maps) == 1
            found[name] = [LayerInfo(name if only else f"{name}{key}", tuple(t.shape)) for key, t in maps.items()]

        return hook

    with ExitStack() as scope:
        for name, module in named_layers(model).items():
            if name and name != LOGITS and id(module) not in names:
                names[id(module)] = name
                scope.callback(module.register_forward_hook(hook_for(name)).remove)
        output = _probe(model, example)
    listed = [info for name in names.values() if fired[name] == 1 for info in found[name]]
    try:
        listed.append(LayerInfo(LOGITS, tuple(logits_of(output).shape)))
    except GSKDError:
        listed += [LayerInfo(f"{LOGITS}{key}", tuple(t.shape)) for key, t in feature_maps(output).items()]
    return listed


def describe_layers(model: nn.Module, size: int, depth: int) -> list[tuple[str, str, str, str, str]]:
    """Rows for people: layer, channels, height x width, stride, and which losses read it by default.

    Args:
        model: any module.
        size: height and width of the image that is tried.
        depth: layers below this level of nesting are left out, unless a loss reads one by default.

    Raises:
        GSKDError: the model cannot take an image of this size.
    """
    automatic: dict[str, list[str]] = {}
    for kind in ("features", "logits", "levels"):
        with suppress(GSKDError):  # no automatic choice: nothing to mark
            names = auto_tap(model, kind)
            for name in (names,) if isinstance(names, str) else names:
                automatic.setdefault(name, []).append(kind)
    try:
        listed = layers(model, torch.zeros(1, 3, size, size))
    except Exception as error:  # whatever a foreign forward raises: the model cannot be used with this image
        raise GSKDError(f"{type(model).__name__}: cannot run on {size} x {size} pixels: {described(error)}") from error
    for name in list(automatic):  # encoder[-1] is listed as encoder[5]
        layer, selectors = parse_tap(name, type(model).__name__)
        if selectors and selectors[-1].startswith("-"):
            count = sum(info.name.startswith(f"{layer}[") for info in listed)
            automatic[f"{layer}[{count + int(selectors[-1])}]"] = automatic.pop(name)
    rows = []
    for info in listed:
        if info.name.count(".") < depth or info.name in automatic:
            height, width = info.shape[2:]
            stride = f"{size / height:.3g}"
            marks = ", ".join(automatic.get(info.name, ()))
            rows.append((info.name, str(info.shape[1]), f"{height} x {width}", stride, marks))
    return rows


def channels(model: nn.Module, names: Sequence[str], example: Tensor) -> dict[str, tuple[int, ...]]:
    """The shapes (B, C, h, w) that taps will have, by one forward in eval mode without gradient.

    The train/eval mode of every submodule is put back as it was; BatchNorm statistics and torch's random state are
    untouched. A distributed wrapper is bypassed: no communication.

    Args:
        model: any module.
        names: taps as ``Taps`` takes them.
        example: (B, 3, H, W) normalised images; moved to the model's device and dtype.

    Raises:
        GSKDError: as ``Taps``.
    """
    root = unwrapped(model)
    with Taps(root, names) as taps:
        _probe(root, example)
    shapes = {name: tuple(taps[name].shape) for name in taps.names}
    taps.clear()
    return shapes


def auto_tap(model: nn.Module, kind: Literal["features", "logits", "levels"]) -> str | tuple[str, ...]:
    """What the tap "auto" stands for: the last features before the classifier, or the logits as small as they come.

    "levels" are several stages of the encoder, from the first to the last: the last three of
    segmentation_models_pytorch, ``backbone.layer2`` to ``layer4`` of torchvision's ResNets.

    In torchvision and transformers heads the features are taken before the dropout that precedes the classifier: in
    training it would be noise that no teacher has. A decoder of segmentation_models_pytorch is taken whole.

    ========================================  =============================================  =======================
    model                                     features                                       logits
    ========================================  =============================================  =======================
    segmentation_models_pytorch               ``decoder``                                    ``segmentation_head.0``
    torchvision DeepLabV3, FCN                ``classifier.3``, ``classifier.2``             ``logits``
    torchvision LRASPP                        ``classifier.cbr``                             ``logits``
    transformers SegFormer                    ``decode_head.activation``                     ``logits``
    transformers UPerNet, BEiT, Data2Vec      ``decode_head.fpn_bottleneck``                 ``decode_head.classifier``
    transformers DPT                          ``head.head.2``                                ``head.head.4``
    transformers MobileViT, MobileViTV2       ``segmentation_head.aspp.project``             ``logits``
    transformers MobileNetV2                  ``segmentation_head.conv_projection``          ``logits``
    any other                                 error: name a layer                            ``logits``
    ========================================  =============================================  =======================

    Raises:
        GSKDError: features or levels of a model that is not known here.
    """
    root = unwrapped(model)
    family = {f"{base.__module__.partition('.')[0]}.{base.__name__}" for base in type(root).__mro__}
    children = dict(root.named_children())
    find = {"features": _auto_features, "logits": _auto_logits, "levels": _auto_levels}[kind]
    found = find(root, family, children)
    if found is not None:
        return found
    likely = ", ".join(repr(name) for name in _candidates(root)[:6])
    raise GSKDError(
        f"{type(root).__name__}: no automatic {kind} layer is known for this model, expected a layer name"
        + (f", for example {likely}" if likely else "")
    )


_SMP = "segmentation_models_pytorch.SegmentationModel"


# transformers' heads by the class of the model: the last features before the dropout and the classifier, and the logits
# before they are enlarged.
_HEADS = {
    "SegformerForSemanticSegmentation": ("decode_head.activation", LOGITS),
    "UperNetForSemanticSegmentation": ("decode_head.fpn_bottleneck", "decode_head.classifier"),
    "BeitForSemanticSegmentation": ("decode_head.fpn_bottleneck", "decode_head.classifier"),
    "Data2VecVisionForSemanticSegmentation": ("decode_head.fpn_bottleneck", "decode_head.classifier"),
    "DPTForSemanticSegmentation": ("head.head.2", "head.head.4"),
    "MobileViTForSemanticSegmentation": ("segmentation_head.aspp.project", LOGITS),
    "MobileViTV2ForSemanticSegmentation": ("segmentation_head.aspp.project", LOGITS),
    "MobileNetV2ForSemanticSegmentation": ("segmentation_head.conv_projection", LOGITS),
}


def _head(root: nn.Module, family: set[str]) -> tuple[str, str] | None:
    """Of a transformers model that is known, where its layers are called as they are here."""
    found = next((layers for name, layers in _HEADS.items() if f"transformers.{name}" in family), None)
    return found if found is not None and {*found, LOGITS} <= {*named_layers(root), LOGITS} else None


def _auto_logits(root: nn.Module, family: set[str], children: dict[str, nn.Module]) -> str:
    head = children.get("segmentation_head")
    if _SMP in family and isinstance(head, nn.Sequential) and isinstance(next(iter(head), None), nn.Conv2d):
        return "segmentation_head.0"
    layers = _head(root, family)
    return LOGITS if layers is None else layers[1]


def _auto_levels(root: nn.Module, family: set[str], children: dict[str, nn.Module]) -> tuple[str, ...] | None:
    if _SMP in family and "encoder" in children:
        return "encoder[-3]", "encoder[-2]", "encoder[-1]"
    stages = tuple(f"backbone.layer{stage}" for stage in (2, 3, 4))
    return stages if set(stages) <= named_layers(root).keys() else None


def _auto_features(root: nn.Module, family: set[str], children: dict[str, nn.Module]) -> str | None:
    if _SMP in family and "decoder" in children:
        return "decoder"
    if "torchvision.LRASPP" in family and "classifier.cbr" in named_layers(root):
        return "classifier.cbr"
    if family & {"torchvision.DeepLabV3", "torchvision.FCN"} and "classifier" in children:
        last = _before_classifier(children["classifier"])
        return None if last is None else f"classifier.{last}"
    layers = _head(root, family)
    return None if layers is None else layers[0]


def _before_classifier(head: nn.Module) -> str | None:
    """The child that feeds the head's last convolution, dropout skipped. These heads register their layers in order."""
    stages = list(head.named_children())
    while stages and not isinstance(stages[-1][1], nn.Conv2d):
        stages.pop()
    stages = [stage for stage in stages[:-1] if not isinstance(stage[1], (nn.Dropout, nn.Dropout2d))]
    return stages[-1][0] if stages else None


def _candidates(root: nn.Module) -> list[str]:
    """Composite layers with a convolution in them, shallow ones first: likely feature maps, the model not run."""
    named = [
        name
        for name, module in named_layers(root).items()
        if name
        and not isinstance(module, (nn.Conv2d, nn.ModuleList, nn.ModuleDict))
        and any(isinstance(inner, nn.Conv2d) for inner in module.modules())
    ]
    return sorted(named, key=lambda name: name.count("."))


def _probe(model: nn.Module, example: Tensor) -> object:
    """One forward that leaves no trace, through the unwrapped model."""
    root = unwrapped(model)
    parameter = next((p for p in root.parameters() if p.is_floating_point()), example)
    on_cuda = [parameter.device] if parameter.device.type == "cuda" else []
    with ExitStack() as scope:
        scope.enter_context(torch.random.fork_rng(devices=on_cuda))
        scope.enter_context(torch.no_grad())
        scope.enter_context(eval_mode(root))
        if inside_compiled(root, list(root.modules())):
            scope.enter_context(torch.compiler.set_stance("force_eager"))
        return root(example.to(parameter.device, parameter.dtype))


def resolve_layers(model: nn.Module, names: str | Sequence[str], loss: nn.Module | type[nn.Module]) -> Layers:
    """What a term's layers stand for: ``"auto"`` is chosen by what the loss takes, names stay.

    Raises:
        GSKDError: there is no automatic choice for this model, or it is no name and no sequence of names.
    """
    if names == "auto":
        return auto_tap(model, getattr(loss, "inputs", "features"))
    if isinstance(names, str):
        return names
    if isinstance(names, Sequence) and names and all(isinstance(name, str) for name in names):
        if getattr(loss, "inputs", "levels") != "levels":
            kind = loss if isinstance(loss, type) else type(loss)
            raise GSKDError(f"layers: {kind.__name__} compares one layer of each network, got {list(names)}")
        return tuple(names)
    raise GSKDError(f"layers: expected a name or a list of names, got {names!r}")


def tap_names(layers: Iterable[Layers]) -> list[str]:
    """All taps of several terms, each once."""
    return list(dict.fromkeys(name for one in layers for name in ((one,) if isinstance(one, str) else one)))
