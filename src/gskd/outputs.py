"""Reading what a network or a layer returns: tensors, tuples, mappings, transformers' output objects.

Where a container holds several things, the errors list them as the user would select them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import Tensor

from gskd.errors import GSKDError


def logits_of(output: object) -> Tensor:
    """The segmentation logits (B, K, h, w) in whatever a model returned.

    Args:
        output: a tensor; a mapping with ``out`` (torchvision) or ``logits`` (transformers); an object with ``.logits``;
            a tuple or list that starts with a 4-D tensor (segmentation_models_pytorch with a classification head); an
            object with ``.class_queries_logits`` and ``.masks_queries_logits`` (Mask2Former, MaskFormer, OneFormer,
            EoMT of transformers): the logarithm of their semantic map, whose softmax is that map with sum 1.

    Raises:
        GSKDError: none of these, or not 4-D.
    """
    return read_logits(output, f"model output {type(output).__name__}")


def _items(output: object) -> dict[str, object]:
    """What a container holds, by selector as the user would write it."""
    if isinstance(output, Mapping):
        return {f"[{key}]": value for key, value in output.items()}
    if isinstance(output, (tuple, list)):
        return {f"[{index}]": value for index, value in enumerate(output)}
    return {f"[{key}]": value for key, value in getattr(output, "__dict__", {}).items()}


def feature_maps(output: object) -> dict[str, Tensor]:
    """Floating 4-D tensors by selector; ``""`` where the output is one itself."""
    items = {"": output} if isinstance(output, Tensor) else _items(output)
    return {k: v for k, v in items.items() if isinstance(v, Tensor) and v.ndim == 4 and v.is_floating_point()}


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return str(tuple(value.shape))
    return f"{type(value).__name__} of {len(value)}" if isinstance(value, (tuple, list, dict)) else type(value).__name__


def _choices(output: object) -> str:
    items = _items(output)
    return ", ".join(f"{key}: {_describe(value)}" for key, value in items.items()) or f"nothing in {_describe(output)}"


def feature_map(output: object, selectors: Sequence[str], where: str) -> Tensor:
    """The one floating 4-D tensor that the selectors lead to; ``where`` begins the message of the `GSKDError`."""
    for selector in selectors:
        output = _pick(output, selector, where)
    if not isinstance(output, Tensor):
        maps = {key: value for key, value in _items(output).items() if isinstance(value, Tensor) and value.ndim == 4}
        if len(maps) != 1:
            raise GSKDError(
                f"{where} gives {type(output).__name__} with {len(maps)} 4-D tensors, expected one; "
                f"add a selector, choices: {_choices(output)}"
            )
        output = next(iter(maps.values()))
    return require_floating(_image_like(output, where), where)


def _pick(output: object, selector: str, where: str) -> object:
    if isinstance(output, (tuple, list)) and re.fullmatch(r"-?\d+", selector):
        if -len(output) <= int(selector) < len(output):
            return output[int(selector)]
    elif isinstance(output, Mapping):
        for key in output:
            if str(key) == selector:
                return output[key]
    elif isinstance(output, Tensor):
        raise GSKDError(f"{where} gives one tensor {tuple(output.shape)}; expected no selector [{selector}]")
    elif hasattr(output, selector):
        return getattr(output, selector)
    raise GSKDError(f"{where} gives {type(output).__name__} without [{selector}]; choices: {_choices(output)}")


def read_logits(output: object, where: str) -> Tensor:
    """As `logits_of`; ``where`` begins the message of the error."""
    found = output
    if getattr(output, "masks_queries_logits", None) is not None:
        found = _semantic_map(output.class_queries_logits, output.masks_queries_logits)  # type: ignore[attr-defined]
    elif isinstance(output, Mapping):
        found = next((output[key] for key in ("out", "logits") if key in output), None)
    elif isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor) and output[0].ndim == 4:
        found = output[0]
    elif not isinstance(output, Tensor):
        found = getattr(output, "logits", None)
    if not isinstance(found, Tensor):
        raise GSKDError(
            f"{where} holds no logits: found {_choices(output)}; expected a tensor, a mapping with 'out' or 'logits', "
            "an object with .logits, or a sequence that starts with a 4-D tensor"
        )
    return _image_like(found, where)


def _semantic_map(class_queries: Tensor, mask_queries: Tensor) -> Tensor:
    """(B, Q, K + 1) and (B, Q, h, w) -> (B, K, h, w): every query's classes, where its mask is; the last is "none".

    Cheng et al., "Masked-attention mask transformer for universal image segmentation", CVPR 2022, semantic inference.
    """
    classes, masks = class_queries.float().softmax(dim=-1)[..., :-1], mask_queries.float().sigmoid()
    batch, _, height, width = masks.shape
    return (classes.mT @ masks.flatten(2)).reshape(batch, -1, height, width).clamp_min(1e-6).log()


def _image_like(tensor: Tensor, where: str) -> Tensor:
    if tensor.ndim != 4:
        hint = " (tokens (B, N, C)? tap the layer that turns them back into a map)" if tensor.ndim == 3 else ""
        raise GSKDError(f"{where} has shape {tuple(tensor.shape)}, expected 4-D (B, C, h, w){hint}")
    return tensor


def require_floating(tensor: Tensor, where: str) -> Tensor:
    """The tensor itself, or a `GSKDError` where it holds integers."""
    if not tensor.is_floating_point():
        raise GSKDError(f"{where} has dtype {tensor.dtype}, expected a floating one")
    return tensor
