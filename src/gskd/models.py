"""Networks by name, and their weights (views -> models -> taps).

A model is any ``nn.Module`` that takes images (B, 3, H, W) and whose output holds logits (B, K, h, w), see
`gskd.outputs.logits_of`.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from gskd.errors import GSKDError, few, near_names
from gskd.outputs import logits_of
from gskd.taps import eval_mode

IMPORTS_ALLOWED = "GSKD_ALLOW_IMPORTS"
"""The environment variable that lets recipes name code; the command line's --allow-imports sets it."""


def require_trusted(name: str, where: str) -> None:
    """Refuses an import path that a recipe names, unless whoever runs it has allowed that.

    Args:
        name: of the model, see `build_model`.
        where: its place in the recipe, for the error.

    Raises:
        GSKDError: it is an import path, and ``GSKD_ALLOW_IMPORTS`` is not set.
    """
    if not name.startswith("smp:") and ":" in name and os.environ.get(IMPORTS_ALLOWED, "") in ("", "0"):
        raise GSKDError(
            f"{where}.name: {name} is Python code that would be run; if you trust it say --allow-imports, or set"
            f" {IMPORTS_ALLOWED}=1"
        )


def build_model(name: str, args: Mapping[str, Any] | None = None, num_classes: int | None = None) -> nn.Module:
    """Makes a network.

    Args:
        name: ``smp:Architecture`` (any architecture of segmentation-models-pytorch, for example ``smp:DeepLabV3Plus``)
            or an import path ``package.module:callable`` that returns an ``nn.Module``.
        args: arguments of the architecture or callable, for example ``{"encoder_name": "resnet34"}``. smp's own
            defaults hold, so ``encoder_weights`` is ``"imagenet"``, which smp downloads, unless it is given as
            ``None``.
        num_classes: K. smp models are built with it; an import path gets it only where ``args`` does not fix the number
            of classes and the callable has a parameter called ``num_classes``.

    Raises:
        GSKDError: unknown source, architecture, encoder, module or callable, or arguments that it refuses.
    """
    arguments = dict(args or {})
    source, colon, target = name.partition(":")
    if not colon or not source or not target:
        raise GSKDError(f"model {name!r}: expected smp:Architecture or package.module:callable")
    if source == "smp":
        return _build_smp(target, arguments, num_classes)
    import gskd._torchvision  # noqa: F401 (the module may import torchvision)

    try:
        module = importlib.import_module(source)
    except Exception as error:  # a foreign module may raise anything while it is imported
        raise GSKDError(f"model {name!r}: cannot import {source}: {_described(error)}") from error
    if not hasattr(module, target):
        known = [key for key in vars(module) if not key.startswith("_")]
        raise GSKDError(f"model {name!r}: {source} has no {target}{near_names(target, known)}")
    factory = getattr(module, target)
    if num_classes is not None and "num_classes" not in arguments and _takes(factory, "num_classes"):
        arguments["num_classes"] = num_classes
    model = _call(name, factory, arguments)
    if not isinstance(model, nn.Module):
        raise GSKDError(f"model {name!r}: expected an nn.Module, {target} returned {type(model).__name__}")
    return model


def _build_smp(architecture: str, arguments: dict[str, Any], num_classes: int | None) -> nn.Module:
    import gskd._torchvision  # noqa: F401 (must come before smp, which imports torchvision)

    # smp is imported here since it takes seconds, which the command line's help should not.
    import segmentation_models_pytorch as smp  # isort: skip

    architectures = {model.__name__: model for model in smp.MODEL_ARCHITECTURES_MAPPING.values()}
    if architecture not in architectures:
        raise GSKDError(f"model 'smp:{architecture}': unknown architecture{near_names(architecture, architectures)}")
    encoder = arguments.get("encoder_name", "resnet34")
    encoders = _smp_encoders()
    # timm names may end in the tag of their weights (tu-resnet18.a1_in1k), and hf-hub names are not listed anywhere.
    if isinstance(encoder, str) and encoder.partition(".")[0] not in encoders and not encoder.startswith("tu-hf"):
        raise GSKDError(f"model 'smp:{architecture}': unknown encoder {encoder!r}{near_names(encoder, encoders)}")
    known = inspect.signature(architectures[architecture]).parameters
    for argument in arguments:
        # smp hands what it does not know to timm's encoders, and without a word drops it for its own.
        if argument not in known and not str(encoder).startswith("tu-"):
            raise GSKDError(f"model 'smp:{architecture}': unknown argument {argument!r}{near_names(argument, known)}")
    if num_classes is not None:
        if arguments.get("classes", num_classes) != num_classes:
            raise GSKDError(
                f"model 'smp:{architecture}': args.classes is {arguments['classes']}, the data has {num_classes}"
            )
        arguments["classes"] = num_classes
    model: nn.Module = _call(f"smp:{architecture}", architectures[architecture], arguments)
    return model


def _smp_encoders() -> list[str]:
    import segmentation_models_pytorch as smp
    import timm

    return [*smp.encoders.get_encoder_names(), *(f"tu-{name}" for name in timm.list_models())]


def _takes(factory: Any, parameter: str) -> bool:
    try:
        return parameter in inspect.signature(factory).parameters
    except (TypeError, ValueError):
        return False


def _call(name: str, factory: Any, arguments: dict[str, Any]) -> Any:
    try:
        return factory(**arguments)
    except Exception as error:  # whatever a foreign constructor raises, the cause is what the recipe asked of it
        raise GSKDError(f"model {name!r}: cannot be built with {arguments}: {_described(error)}") from error


def _described(error: Exception) -> str:
    """What foreign code raised, on one line and not endless."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]


def count_parameters(model: nn.Module) -> int:
    """How many numbers the model's parameters hold."""
    return sum(p.numel() for p in model.parameters())


def freeze(model: nn.Module) -> nn.Module:
    """Puts a teacher beyond the reach of training: eval mode, no gradients. Returns the same module."""
    return model.eval().requires_grad_(False)


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(B, 3, H, W) uint8 RGB -> float32, scaled to 0..1, less ``mean``, over ``std``, channel by channel."""
    scale, shift = _scale_and_shift(tuple(mean), tuple(std), images.device)
    return torch.addcmul(shift, images.float(), scale)


@lru_cache(maxsize=16)  # made on the host: a copy to the device at each step would wait for the step before
def _scale_and_shift(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
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
        raise GSKDError(f"{name}: cannot run on an image of {tuple(image.shape)}: {_described(error)}") from error
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
    """``key: shape in the file, shape in the model``."""

    @property
    def ok(self) -> bool:
        """Whether file and model agree."""
        return not (self.missing or self.unexpected or self.misshapen)

    def __str__(self) -> str:
        parts = []
        for title, keys in {
            "missing": self.missing,
            "unexpected": self.unexpected,
            "of another shape": self.misshapen,
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
    misshapen = {key for key in own.keys() & found.keys() if own[key].shape != found[key].shape}
    report = WeightsReport(
        missing=tuple(key for key in own if key not in found),
        unexpected=tuple(key for key in found if key not in own),
        misshapen=tuple(
            f"{key}: {tuple(found[key].shape)} in the file, {tuple(own[key].shape)} in the model"
            for key in own
            if key in misshapen
        ),
    )
    if strict and not report.ok:
        raise GSKDError(f"weights {path}: do not fit {type(model).__name__}: {report}")
    model.load_state_dict({k: v for k, v in found.items() if k in own and k not in misshapen}, strict=False)
    return report


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
        with contextlib.suppress(OSError):  # nothing was begun where the folder itself is missing or a file
            partial.unlink()
        raise GSKDError(f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}") from None
