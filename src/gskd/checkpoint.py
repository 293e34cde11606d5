"""Checkpoints that can be trusted: written atomically, hashed, and read without running code.

``checkpoints/step-00000500/`` holds the distiller's weights (student, projectors, banks), the optimiser's state and a
manifest with the SHA-256 of both and of itself. No random state is kept: order, views and the randomness of a step are
functions of (seed, step).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gskd.errors import GSKDError
from gskd.models import read_tensors, write_tensors

MANIFEST, MODEL, OPTIMIZER = "manifest.json", "model.safetensors", "optimizer.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A valid checkpoint on disk."""

    path: Path
    step: int
    """Optimiser steps done."""
    state: dict[str, Any]
    """What the trainer added: plain JSON values."""


def save_checkpoint(
    folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], keep: int = 2
) -> Path:
    """Writes the checkpoint of a step and removes all but the newest ``keep``.

    Everything is written into a temporary folder that is renamed last, so a kill at any moment leaves either no new
    checkpoint or a whole one.

    Raises:
        GSKDError: the disk is full or the folder not writable; older checkpoints are then untouched.
    """
    partial, final = folder / f"{_name(step)}.partial", folder / _name(step)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_tensors(model.state_dict(), partial / MODEL)
        tensors, groups = _optimizer_to_tensors(optimizer)
        write_tensors(tensors, partial / OPTIMIZER)
        manifest = {
            "step": step,
            "state": state,
            "optimizer": groups,
            "sha256": {file.name: _sha256(file) for file in (partial / MODEL, partial / OPTIMIZER)},
        }
        write_text(partial / MANIFEST, json.dumps(manifest | {"digest": _digest(manifest)}, indent=1))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        _sync_folder(folder)
    except (OSError, GSKDError) as error:
        shutil.rmtree(partial, ignore_errors=True)  # a full disk needs the room
        if isinstance(error, GSKDError):
            raise
        raise GSKDError(f"checkpoint {final}: cannot be written: {error.strerror or error}") from None
    # Later steps than this one are damaged checkpoints that a resumed run has gone back behind: none may take the place
    # of a whole one among those kept.
    finished = _folders(folder)
    newest = finished.index(final)
    for old in finished[:newest] + finished[newest + keep :]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def latest_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest valid checkpoint, and a line for each newer one that is damaged."""
    damaged: list[str] = []
    for path in _folders(folder):
        try:
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            for file in (MODEL, OPTIMIZER):
                if _sha256(path / file) != manifest["sha256"][file]:
                    raise ValueError(f"{file} does not match its hash")
            if manifest.pop("digest") != _digest(manifest):
                raise ValueError(f"{MANIFEST} does not match its own hash")
            step, state = manifest["step"], manifest["state"]
            if path.name != _name(step) or not isinstance(state, dict) or not isinstance(manifest["optimizer"], list):
                raise ValueError(f"{MANIFEST} does not describe it")
            return Checkpoint(path, step, state), damaged
        except KeyError as error:
            damaged.append(f"checkpoint {path} is damaged and skipped: {MANIFEST} has no {error}")
        except (OSError, ValueError, TypeError) as error:
            damaged.append(f"checkpoint {path} is damaged and skipped: {getattr(error, 'strerror', None) or error}")
    return None, damaged


def restore(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Loads a checkpoint into model and optimiser.

    Raises:
        GSKDError: it was made by another model or optimiser.
    """
    own = model.state_dict()
    found = read_tensors(checkpoint.path / MODEL)
    if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in found.items()}:
        odd = sorted(
            key
            for key in own.keys() | found.keys()
            if key not in own or key not in found or own[key].shape != found[key].shape
        )
        raise GSKDError(
            f"checkpoint {checkpoint.path}: was made by another model; {len(odd)} keys differ, first {odd[:3]}"
        )
    groups = json.loads((checkpoint.path / MANIFEST).read_text(encoding="utf-8"))["optimizer"]
    tensors = read_tensors(checkpoint.path / OPTIMIZER)
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = tensor
    # load_state_dict compares the number of parameters only: SGD would take AdamW's state, and stop in its next step.
    for group, other in zip(optimizer.param_groups, groups, strict=False):
        if lacking := sorted(group.keys() - other.keys()):
            raise GSKDError(
                f"checkpoint {checkpoint.path}: was made by another optimiser, which knows no {', '.join(lacking)}"
            )
    try:
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    except ValueError as error:
        raise GSKDError(f"checkpoint {checkpoint.path}: was made by another optimiser: {error}") from None
    # Files hold contiguous tensors; in the layout of its parameter (channels_last) the state is updated in one kernel.
    for parameter, entry in optimizer.state.items():
        for name, value in entry.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                entry[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
    model.load_state_dict(found)


def require_new_file(path: Path, where: str = "output") -> None:
    """Raises `GSKDError` where a file is there already, or its folder is not; before long work, and again after it."""
    if path.exists():
        raise GSKDError(f"{where} {path}: exists already; expected a new file")
    if not path.parent.is_dir():
        raise GSKDError(f"{where} {path}: {path.parent} is no folder; expected one that exists")


def require_new_folder(path: Path) -> None:
    """Raises `GSKDError` where a folder holds anything, or is none."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise GSKDError(f"output {path}: expected a new or empty folder, found other files")


def write_text(path: Path, text: str) -> None:
    """Writes a file so that a reader sees the old text or the whole new one."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):  # nothing was begun where the folder itself is missing or a file
            partial.unlink()
        raise GSKDError(f"{path}: cannot be written: {error.strerror or error}") from None


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _folders(folder: Path) -> list[Path]:
    """Finished checkpoints, newest first."""
    return sorted((p for p in folder.glob("step-*") if p.is_dir() and p.suffix != ".partial"), reverse=True)


def _optimizer_to_tensors(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    # safetensors and JSON instead of torch.save: neither can carry code. Every optimiser of torch.optim that is offered
    # keeps tensors only (AdamW: step, exp_avg, exp_avg_sq; SGD: momentum_buffer).
    whole = optimizer.state_dict()
    tensors = {
        f"{index}.{name}": value
        for index, state in whole["state"].items()
        for name, value in state.items()
        if value is not None
    }
    assert all(isinstance(value, Tensor) for value in tensors.values()), {k: type(v) for k, v in tensors.items()}
    return tensors, json.loads(json.dumps(whole["param_groups"]))


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sync_folder(folder: Path) -> None:
    """Makes a rename last through a power cut; where folders cannot be opened (Windows) the system sees to it."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
