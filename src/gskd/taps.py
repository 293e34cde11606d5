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
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn

from gskd.errors import GSKDError, near_names
from gskd.outputs import feature_map, read_logits, require_floating

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
        self._model_name = type(unwrapped(model)).__name__
        known: dict[str, nn.Module] | None = None
        self._hooked: dict[str, tuple[nn.Module, Callable[[object], Tensor]]] = {}
        for name in names:
            if name in self._hooked:
                raise GSKDError(f"{self._model_name}: layer {name!r} is given twice; name each tap once")
            layer, selectors = parse_tap(name, self._model_name)
            if layer == LOGITS:
                module = model
            else:
                known = named_layers(model) if known is None else known
                if layer not in known:
                    near = near_names(layer, (k for k in known if k))
                    raise GSKDError(f"{self._model_name}: layer {layer!r} does not exist{near}")
                module = known[layer]
            self._hooked[name] = (module, self._reader(name, layer, selectors))
        self._eager = inside_compiled(model, [module for module, _ in self._hooked.values()])
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


def parse_tap(name: str, model_name: str) -> tuple[str, list[str]]:
    """A tap's layer and its selectors; ``model_name`` begins the message of the `GSKDError`."""
    match = re.fullmatch(r"([^\[\]]+)((?:\[[^\[\]]+\])*)", name)
    if match is None:
        raise GSKDError(f"{model_name}: layer {name!r} is not a layer name; expected 'a.b', 'a.b[3]' or 'a.b[key]'")
    return match[1], re.findall(r"\[([^\[\]]+)\]", match[2])


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside DistributedDataParallel, torch.compile and the like."""
    while True:
        children = dict(model.named_children())
        attribute = "module" if isinstance(model, nn.parallel.DistributedDataParallel) else None
        attribute = attribute or next((a for a in _WRAPPED if a in children), None)
        if attribute is None:
            return model
        model = children[attribute]


def named_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Modules by their name in the unwrapped model, aliases included; of a wrapper and what it wraps, the wrapper."""
    named: dict[str, nn.Module] = {}
    for path, module in unwrapped(model).named_modules(remove_duplicate=False):
        # The wrapper comes first. Its hooks run outside the compiled region and outside the checkpoint.
        named.setdefault(".".join(part for part in path.split(".") if part not in _WRAPPED), module)
    return named


def inside_compiled(model: nn.Module, modules: Sequence[nn.Module]) -> bool:
    """Whether the hooks of one of these modules would run inside a torch.compile region."""
    wanted = {id(module) for module in modules}
    for module in model.modules():
        wrapped = dict(module.named_children()).get("_orig_mod")
        if wrapped is None and getattr(module, "_compiled_call_impl", None) is not None:
            wrapped = module  # module.compile(): its own hooks are inside as well
        if wrapped is not None and any(id(inner) in wanted for inner in wrapped.modules()):
            return True
    return False


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
