"""Weights of other programs made safe: what torch.save wrote, as safetensors (beside models)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gskd.errors import GSKDError, near_names
from gskd.models import write_tensors

_USUAL_KEYS = ("state_dict", "model_state_dict", "model", "net", "network", "weights")
_WRAPPERS = ("module.", "_orig_mod.")
"""What DistributedDataParallel and torch.compile put before every key."""


class Converted(NamedTuple):
    """What became of a file."""

    tensors: int
    """How many were written."""
    left_out: tuple[str, ...]
    """Where in the file other tensors stand, dotted, as ``key`` takes it."""


def convert_weights(source: str | Path, target: str | Path, key: str | None = None, strip: str = "") -> Converted:
    """Writes the tensors of a file made by ``torch.save`` as safetensors.

    The file is read with ``weights_only``: one that would need more than tensors and plain values is refused, not run.
    What DistributedDataParallel and torch.compile put before every key is taken off.

    Args:
        source: a ``.pt``, ``.pth`` or ``.bin`` file.
        target: a new ``.safetensors`` file.
        key: where in the file the weights are, dotted; by default the file itself, or the one of the usual keys
            (``state_dict``, ``model``, ...) that it has.
        strip: text before every key that is taken off, outside those wrappers or inside; keys without it are left out.

    Returns:
        How many tensors were written, and where others stand.

    Raises:
        GSKDError: the file cannot be read safely or holds no weights there, one is quantised, sparse or of a type that
            safetensors does not hold, or ``target`` exists.
    """
    target = Path(target)
    if target.exists():
        raise GSKDError(f"output {target}: exists already; expected a new file")
    content = _chosen(Path(source), _read(Path(source)), key)
    tensors = _tensors(Path(source), content)
    left_out = tuple(place for name, value in content.items() for place in _tensors_within(str(name), value))
    if strip and any(name.startswith(strip) for name in tensors):
        tensors, strip = _stripped(tensors, strip), ""
    for wrapper in _WRAPPERS * 2:  # one may stand within the other
        if all(name.startswith(wrapper) for name in tensors):
            tensors = _stripped(tensors, wrapper)
    stripped = _stripped(tensors, strip)
    if not stripped:
        raise GSKDError(f"weights {source}: no key begins with {strip!r}; the first is {next(iter(tensors))!r}")
    write_tensors(stripped, target)
    return Converted(len(stripped), left_out)


def _stripped(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _read(source: Path) -> Any:
    if not source.is_file():
        raise GSKDError(f"weights {source}: no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle's version
            return torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle may raise anything
        lines = str(error).splitlines() or [type(error).__name__]
        if "weights_only" in str(error).lower():
            raise GSKDError(
                f"weights {source}: holds more than tensors and plain values, and reading that could run code; save its"
                " state_dict where you trust it"
            ) from None
        raise GSKDError(f"weights {source}: torch.load cannot read it: {lines[0][:200]}") from None


def _chosen(source: Path, content: Any, key: str | None) -> Mapping[Any, Any]:
    """What stands at ``key``, by default the file itself or what it has under a usual key."""
    where = key.split(".") if key else []
    for part in where:
        if not isinstance(content, Mapping) or part not in content:
            known = [str(name) for name in content] if isinstance(content, Mapping) else []
            raise GSKDError(f"weights {source}: no key {part!r} in it{near_names(part, known)}")
        content = content[part]
    if isinstance(content, Mapping) and not key:
        usual = [name for name in _USUAL_KEYS if isinstance(content.get(name), Mapping)]
        content = content[usual[0]] if usual else content
    if not isinstance(content, Mapping):
        raise GSKDError(f"weights {source}: holds no tensors by name, found a {type(content).__name__}")
    return content


def _tensors(source: Path, content: Mapping[Any, Any]) -> dict[str, Tensor]:
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        inner = ", ".join(repr(name) for name in list(content)[:8])
        raise GSKDError(f"weights {source}: no tensor at the top; say where with --key, known: {inner}")
    for name, tensor in tensors.items():
        if reason := _unwritable(tensor):
            raise GSKDError(f"weights {source}: {name} is {reason}, which safetensors does not hold")
    return tensors


def _tensors_within(place: str, value: Any) -> list[str]:
    """Places below a value that hold tensors by name."""
    if not isinstance(value, Mapping):
        return []
    if any(isinstance(one, Tensor) for one in value.values()):
        return [place]
    return [deeper for name, one in value.items() for deeper in _tensors_within(f"{place}.{name}", one)]


def _unwritable(tensor: Tensor) -> str:
    if tensor.is_meta:
        return "a tensor without its values (meta)"
    if tensor.is_quantized:
        return "quantised"
    if tensor.layout != torch.strided:
        return "sparse"
    return "complex128" if tensor.dtype == torch.complex128 else ""
