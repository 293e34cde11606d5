"""Features by layer name: the stretch of the pixel's path between models and losses (models -> taps -> losses).

A tap is a dotted name as in ``model.named_modules()``, read through a forward hook: no model has to be changed::

    with Taps(model, ["decoder", "encoder[4]", "logits"]) as taps:
        output = model(images)
    taps["decoder"]  # (B, C, h, w), with its graph

Every way in which a hook can quietly give the wrong tensor is an error here: a layer that does not exist, never runs,
runs twice, gives something that is no feature map, or whose output a later in-place activation overwrites.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

import torch
from torch import Tensor, nn

from gskd.errors import GSKDError, described, near_names
from gskd.outputs import feature_map, feature_maps, logits_of, read_logits, require_floating

LOGITS = "logits"
"""The tap that means the model's own output, read by ``logits_of``. Reserved: it hides a submodule of that name."""

# Attributes under which a wrapper holds the module it wraps: torch.compile, checkpoint_wrapper, FSDP.
_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


class Taps:
    """Reads the outputs of named layers during the forward passes made inside its ``with`` block.

    Names are those of the unwrapped model: no ``module.`` (DistributedDataParallel), no ``_orig_mod.`` (torch.compile).
    A layer that returns several tensors takes selectors: ``encoder[3]``, ``encoder[-1]`` (tuple or list),
    ``backbone[out]`` (mapping key or attribute), ``encoder[hidden_states][2]``. Without one, its only 4-D tensor is
    taken. ``logits`` is the model's own output through ``logits_of``; ``logits[aux]`` is that item of it.

    Hooks exist only inside the block, so recomputation by (non-reentrant) activation checkpointing in a later backward
    does not reach them. Entering again starts afresh. Layers are looked up once, here; entering only registers hooks.
    Compiled code does not look for new hooks, so while a tap lies *inside* a torch.compile region, everything in the
    block runs eagerly. ``logits`` of a compiled model is read outside the region and costs nothing.

    Args:
        model: any module, wrapped or not. It must run exactly once per block.
        names: taps, each given once.

    Raises:
        GSKDError: here, for a layer that does not exist or a name given twice; during the forward, for an output that
            is no floating 4-D tensor or a selector that finds nothing; on leaving the block normally, for a layer that
            never ran, ran more than once, or whose output was overwritten in place.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self._model_name = type(_unwrap(model)).__name__
        known: dict[str, nn.Module] | None = None
        self._hooked: dict[str, tuple[nn.Module, Callable[[object], Tensor]]] = {}
        for name in names:
            if name in self._hooked:
                raise GSKDError(f"{self._model_name}: layer {name!r} is given twice; name each tap once")
            layer, selectors = _parse(name, self._model_name)
            if layer == LOGITS:
                module = model
            else:
                known = _named(model) if known is None else known
                if layer not in known:
                    near = near_names(layer, (k for k in known if k))
                    raise GSKDError(f"{self._model_name}: layer {layer!r} does not exist{near}")
                module = known[layer]
            self._hooked[name] = (module, self._reader(name, layer, selectors))
        self._eager = _inside_compiled(model, [module for module, _ in self._hooked.values()])
        self._scope: ExitStack | None = None
        self._features: dict[str, Tensor] = {}
        self._versions: dict[str, int] = {}
        self._fired: Counter[str] = Counter()

    @property
    def names(self) -> tuple[str, ...]:
        """The taps, in the order given."""
        return tuple(self._hooked)

    def __enter__(self) -> Self:
        if self._scope is not None:
            raise GSKDError(
                f"{self._model_name}: these taps are already in use; leave the with block before entering again"
            )
        self.clear()
        with ExitStack() as scope:
            if self._eager:
                scope.enter_context(torch.compiler.set_stance("force_eager"))
            for name, (module, read) in self._hooked.items():
                scope.callback(module.register_forward_hook(self._hook(name, read)).remove)
            self._scope = scope.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        assert self._scope is not None
        self._scope.close()
        self._scope = None
        if error is not None:
            self.clear()
            return
        try:
            for name in self._hooked:
                self._check(name)
        except GSKDError:
            self.clear()
            raise

    def __getitem__(self, name: str) -> Tensor:
        """The feature map (B, C, h, w) read at ``name`` in the last block, floating, with its graph.

        Raises:
            GSKDError: not a tap of this object, or nothing was read (yet).
        """
        if name not in self._hooked:
            raise GSKDError(f"{self._model_name}: layer {name!r} is not tapped{near_names(name, self._hooked)}")
        if self._scope is not None:
            self._check(name)
        elif name not in self._features:
            raise GSKDError(
                f"{self._model_name}: layer {name!r} holds nothing; run the model inside the with block first"
            )
        return self._features[name]

    def clear(self) -> None:
        """Releases the features, and with them the graph they keep alive."""
        self._features.clear()
        self._versions.clear()
        self._fired.clear()

    def _reader(self, name: str, layer: str, selectors: list[str]) -> Callable[[object], Tensor]:
        where = f"{self._model_name}: layer {name!r}"
        if layer == LOGITS and not selectors:
            return lambda output: require_floating(read_logits(output, where), where)
        return lambda output: feature_map(output, selectors, where)

    def _hook(self, name: str, read: Callable[[object], Tensor]) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, args: object, output: object) -> None:
            self._fired[name] += 1
            if self._fired[name] == 1:  # a second run is an error, raised with the full count by _check
                feature = self._features[name] = read(output)
                if not feature.is_inference():  # inference tensors count no versions
                    self._versions[name] = feature._version

        return hook

    def _check(self, name: str) -> None:
        where, fired = f"{self._model_name}: layer {name!r}", self._fired[name]
        if fired == 0:
            if not self._fired:
                raise GSKDError(f"{where} never fired: no tapped layer ran; was another model called, or none?")
            raise GSKDError(f"{where} never fired: the model's forward does not call it; tap a layer that runs")
        if fired > 1:
            raise GSKDError(
                f"{where} fired {fired} times, expected once: it is a shared layer used {fired} times per forward, "
                "or the model (or a checkpointed backward) ran more than once while it was tapped"
            )
        if name in self._versions and self._features[name]._version != self._versions[name]:
            raise GSKDError(
                f"{where}: its output was overwritten in place after it was read (an inplace activation?); "
                "tap the layer that overwrites it"
            )


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
        for name, module in _named(model).items():
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
        layer, selectors = _parse(name, type(model).__name__)
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
    root = _unwrap(model)
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
    root = _unwrap(model)
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
    return found if found is not None and {*found, LOGITS} <= {*_named(root), LOGITS} else None


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
    return stages if set(stages) <= _named(root).keys() else None


def _auto_features(root: nn.Module, family: set[str], children: dict[str, nn.Module]) -> str | None:
    if _SMP in family and "decoder" in children:
        return "decoder"
    if "torchvision.LRASPP" in family and "classifier.cbr" in _named(root):
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
        for name, module in _named(root).items()
        if name
        and not isinstance(module, (nn.Conv2d, nn.ModuleList, nn.ModuleDict))
        and any(isinstance(inner, nn.Conv2d) for inner in module.modules())
    ]
    return sorted(named, key=lambda name: name.count("."))


def _parse(name: str, model_name: str) -> tuple[str, list[str]]:
    match = re.fullmatch(r"([^\[\]]+)((?:\[[^\[\]]+\])*)", name)
    if match is None:
        raise GSKDError(f"{model_name}: layer {name!r} is not a layer name; expected 'a.b', 'a.b[3]' or 'a.b[key]'")
    return match[1], re.findall(r"\[([^\[\]]+)\]", match[2])


def _unwrap(model: nn.Module) -> nn.Module:
    while True:
        children = dict(model.named_children())
        attribute = "module" if isinstance(model, nn.parallel.DistributedDataParallel) else None
        attribute = attribute or next((a for a in _WRAPPED if a in children), None)
        if attribute is None:
            return model
        model = children[attribute]


def _named(model: nn.Module) -> dict[str, nn.Module]:
    """Modules by their name in the unwrapped model, aliases included; of a wrapper and what it wraps, the wrapper."""
    named: dict[str, nn.Module] = {}
    for path, module in _unwrap(model).named_modules(remove_duplicate=False):
        # The wrapper comes first. Its hooks run outside the compiled region and outside the checkpoint.
        named.setdefault(".".join(part for part in path.split(".") if part not in _WRAPPED), module)
    return named


def _inside_compiled(model: nn.Module, modules: Sequence[nn.Module]) -> bool:
    """Whether the hooks of one of these modules would run inside a torch.compile region."""
    wanted = {id(module) for module in modules}
    for module in model.modules():
        wrapped = dict(module.named_children()).get("_orig_mod")
        if wrapped is None and getattr(module, "_compiled_call_impl", None) is not None:
            wrapped = module  # module.compile(): its own hooks are inside as well
        if wrapped is not None and any(id(inner) in wanted for inner in wrapped.modules()):
            return True
    return False


def _probe(model: nn.Module, example: Tensor) -> object:
    """One forward that leaves no trace, through the unwrapped model."""
    root = _unwrap(model)
    parameter = next((p for p in root.parameters() if p.is_floating_point()), example)
    on_cuda = [parameter.device] if parameter.device.type == "cuda" else []
    with ExitStack() as scope:
        scope.enter_context(torch.random.fork_rng(devices=on_cuda))
        scope.enter_context(torch.no_grad())
        scope.enter_context(eval_mode(root))
        if _inside_compiled(root, list(root.modules())):
            scope.enter_context(torch.compiler.set_stance("force_eager"))
        return root(example.to(parameter.device, parameter.dtype))


@contextmanager
def eval_mode(root: nn.Module) -> Iterator[None]:
    """Puts every submodule in eval mode inside the block, and each back into its own mode after it."""
    # The flags are set one by one: train() may be overridden to do more than that, and one call cannot restore a mix.
    modes = [(module, module.training) for module in root.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode
