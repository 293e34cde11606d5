"""A teacher that costs less: batch normalisation made part of the convolutions before it (models -> distiller).

In eval mode batch normalisation is a fixed scale and shift of each channel, which the convolution can do itself.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from gskd.outputs import logits_of
from gskd.taps import Taps

_AGREEMENT = 0.999
_DEVIATION = 1e-3


@torch.no_grad()
def fold_batch_norm(model: nn.Module, example: Tensor, taps: Sequence[str] = ()) -> tuple[nn.Module, int]:
    """A copy of a network, for inference, whose batch normalisation is part of the convolutions where it can be.

    Which normalisation follows which convolution is seen in one forward pass. Only plain ``Conv2d`` and ``BatchNorm2d``
    are folded that run once and directly after one another. The copy is compared with the original on the example; if
    they differ, because a convolution's output is used elsewhere as well, the original is what is returned.

    Args:
        model: put in eval mode.
        example: (B, 3, H, W) normalised images; moved to the model's device and dtype.
        taps: layers that will be read, see `Taps`; they give the same as before, to rounding.

    Returns:
        The network to run, and how many layers were folded; with 0 it is ``model`` itself.
    """
    model.eval()
    parameter = next(model.parameters(), example)
    example = example.to(parameter.device, parameter.dtype)
    folded = copy.deepcopy(model)
    names = {id(module): name for name, module in folded.named_modules()}
    shared = Counter(id(module) for _, module in folded.named_modules(remove_duplicate=False))
    ran: Counter[str] = Counter()
    outputs: list[tuple[Tensor, str]] = []
    follows: dict[str, str] = {}

    def after_convolution(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            ran[name] += 1
            outputs.append((output, name))

        return hook

    def before_normalisation(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            ran[name] += 1
            for output, conv in outputs:
                if args and args[0] is output:
                    follows[name] = conv

        return hook

    with ExitStack() as scope:
        for module in folded.modules():
            if shared[id(module)] == 1 and type(module) is nn.Conv2d:
                hook = module.register_forward_hook(after_convolution(names[id(module)]))
                scope.callback(hook.remove)
            elif shared[id(module)] == 1 and type(module) is nn.BatchNorm2d and module.track_running_stats:
                scope.callback(module.register_forward_pre_hook(before_normalisation(names[id(module)])).remove)
        folded(example)
    users, read = Counter(follows.values()), {name.partition("[")[0] for name in taps}
    pairs = [
        (conv, norm)
        for norm, conv in follows.items()
        if ran[conv] == ran[norm] == users[conv] == 1 and conv not in read
    ]
    for conv, norm in pairs:
        fused = fuse_conv_bn_eval(folded.get_submodule(conv), folded.get_submodule(norm))  # type: ignore[arg-type,type-var]
        folded.set_submodule(conv, fused)
        folded.set_submodule(norm, nn.Identity())
    if not pairs or not _agree(model, folded, example, taps):
        return model, 0
    return folded.requires_grad_(False), len(pairs)


def _agree(model: nn.Module, folded: nn.Module, example: Tensor, taps: Sequence[str]) -> bool:
    """Same class for (nearly) every pixel, and the same maps to rounding."""
    found = []
    for network in (model, folded):
        with Taps(network, list(taps)) as read:
            logits = logits_of(network(example))
        found.append([logits, *(read[name] for name in taps)])
    same = (found[0][0].argmax(1) == found[1][0].argmax(1)).float().mean().item()
    close = all(
        bool((one - other).abs().max() <= _DEVIATION * one.abs().max()) for one, other in zip(*found, strict=True)
    )
    return same >= _AGREEMENT and close
