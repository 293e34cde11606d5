"""Weights in and out, and what is done to any network (views -> models -> taps).

A model is any ``nn.Module`` that takes images (B, 3, H, W) and whose output holds logits (B, K, h, w), see
`gskd.outputs.logits_of`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from gskd.errors import GSKDError, described, few
from gskd.outputs import logits_of
from gskd.taps import eval_mode


def count_parameters(model: nn.Module) -> int:
    """How many numbers the model's parameters hold."""
    return sum(p.numel() for p in model.parameters())


def freeze(model: nn.Module) -> nn.Module:
    """Puts a teacher beyond the reach of training: eval mode, no gradients. Returns the same module."""
    return model.eval().requires_grad_(False)


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(B, 3, H, W) uint8 RGB -> float32, scaled to 0..1, less ``mean``, over ``std``, channel by channel."""
    scale, shift = scale_and_shift(tuple(mean), tuple(std), images.device)
    return torch.addcmul(shift, images.float(), scale)


@lru_cache(maxsize=16)  # made on the host: a copy to the device at each step would wait for the step before
def scale_and_shift(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """What `normalise` multiplies uint8 pixels by and adds, (3, 1, 1) each; kept, so not to be changed by a caller."""
    scale = torch.tensor([1 / (255 * s) for s in std], device=device)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=device)
    return scale.view(-1, 1, 1), shift.view(-1, 1, 1)


def check_classes(model: nn.Module, num_classes: int, name: str, size: Sequence[int] = (64, 64)) -> None:
    """Raises `GSKDError` unless the model gives one logit per class: a wrong head is found before training, not after.

    Args:
        model: tried on one blank image; its modes and statistics stay as they are.
        num_classes: K.
        name: how to call the model in the message.
        size: (height, width) of the image, one that the model takes.
    """
    parameter = next(model.parameters(), torch.zeros(()))
    image = torch.zeros(1, 3, *size, device=parameter.device, dtype=parameter.dtype)
    try:
        with torch.no_grad(), eval_mode(model):
            logits = logits_of(model(image))
    except GSKDError as error:
        raise GSKDError(f"{name}: {error}") from None
    except Exception as error:  # whatever a foreign forward raises: the model cannot be used with these images
        raise GSKDError(f"{name}: cannot run on an image of {tuple(image.shape)}: {described(error)}") from error
    if logits.shape[1] != num_classes:
        raise GSKDError(
            f"{name}: gives logits of shape {tuple(logits.shape)};"
            f" expected (B, {num_classes}, h, w) for the data's classes"
        )


@dataclass(frozen=True)
class WeightsReport:
    """What did not match when weights were loaded; all empty where everything did."""

    missing: tuple[str, ...]
    """Keys of the model that the file lacks."""
    unexpected: tuple[str, ...]
    """Keys of the file that the model lacks."""
    misshapen: tuple[str, ...]
    """``key: shape in the file, shape in the model``; or the types, where one holds whole numbers and one does not."""

    @property
    def ok(self) -> bool:
        """Whether file and model agree."""
        return not (self.missing or self.unexpected or self.misshapen)

    def __str__(self) -> str:
        parts = []
        for title, keys in {
            "missing": self.missing,
            "unexpected": self.unexpected,
            "of another shape or kind": self.misshapen,
        }.items():
            if keys:
                parts.append(f"{len(keys)} {title} ({few(keys)})")
        return "; ".join(parts) or "every key matches"


def load_weights(model: nn.Module, path: str | Path, strict: bool = True) -> WeightsReport:
    """Reads weights from a safetensors file into the model.

    Args:
        model: changed in place, and only if everything fits or ``strict`` is off.
        path: a ``.safetensors`` file with the model's ``state_dict`` keys.
        strict: refuse the file unless every key and shape matches; else load what does.

    Returns:
        Every missing, unexpected and misshapen key.

    Raises:
        GSKDError: no such file, not a safetensors file, truncated, or (strict) a mismatch, with counts and first keys.
    """
    found = read_tensors(path)
    own = model.state_dict()
    misshapen = {key: pair for key in own if key in found and (pair := _difference(found[key], own[key])) is not None}
    report = WeightsReport(
        missing=tuple(key for key in own if key not in found),
        unexpected=tuple(key for key in found if key not in own),
        misshapen=tuple(
            f"{key}: {theirs} in the file, {ours} in the model" for key, (theirs, ours) in misshapen.items()
        ),
    )
    if strict and not report.ok:
        raise GSKDError(f"weights {path}: do not fit {type(model).__name__}: {report}")
    model.load_state_dict({k: v for k, v in found.items() if k in own and k not in misshapen}, strict=False)
    return report


def _difference(found: Tensor, own: Tensor) -> tuple[str, str] | None:
    """Why a tensor of a file is not one of the model; halves and doubles are, whole numbers are no weights."""
    if found.shape != own.shape:
        return str(tuple(found.shape)), str(tuple(own.shape))
    if found.is_floating_point() != own.is_floating_point():
        return str(found.dtype).removeprefix("torch."), str(own.dtype).removeprefix("torch.")
    return None


def save_weights(model: nn.Module, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes the model's ``state_dict`` as safetensors, atomically."""
    write_tensors(model.state_dict(), path, metadata)


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; every fault of the file is a `GSKDError` that names it."""
    if not Path(path).is_file():
        raise GSKDError(f"weights {path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise GSKDError(_not_whole(path, error)) from None


def _not_whole(path: str | Path, error: Exception) -> str:
    """Says also what to do where the file is one of ``torch.save``: a zip archive, or a bare pickle."""
    begin = b""
    with contextlib.suppress(OSError), open(path, "rb") as file:  # what may not be read may not be looked at either
        begin = file.read(2)
    hint = "; a file of torch.save becomes one by gskd convert" if begin in (b"PK", b"\x80\x02", b"\x80\x04") else ""
    return f"weights {path}: not a whole safetensors file: {' '.join(str(error).split())[:200]}{hint}"


def read_metadata(path: str | Path) -> dict[str, str]:
    """The strings that were written beside the tensors of a safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise GSKDError(_not_whole(path, error)) from None


def write_tensors(tensors: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Writes tensors as safetensors, atomically. Tensors that share memory are written one by one."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    contiguous = {key: tensor.detach().to("cpu", copy=True).contiguous() for key, tensor in tensors.items()}
    try:
        partial.touch()
        mode = partial.stat().st_mode  # as of any new file here; safetensors would keep it from everybody else
        # None where there is none: no tensors and empty metadata make a file that safetensors itself cannot read.
        save_file(contiguous, partial, metadata=dict(metadata) if metadata else None)
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(partial, mode)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        raise GSKDError(f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}") from None
    finally:
        with contextlib.suppress(OSError):  # replaced, or never begun where the folder is missing or a file
            partial.unlink()
