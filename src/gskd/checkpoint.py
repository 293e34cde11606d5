"""Checkpoints that can be trusted: written atomically, hashed, and read without running code.

``checkpoints/step-00000500/`` holds the distiller's weights (student and projectors), the optimiser's state and a manifest
with the SHA-256 of both. No random state is kept: order, views and the randomness of a step are functions of (seed, step).
"""

from __future__ import annotations

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

MANIFEST = "manifest.json"


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
    name = f"step-{step:08d}"
    partial, final = folder / f"{name}.partial", folder / name
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write_tensors(model.state_dict(), partial / "model.safetensors")
        tensors, groups = _optimizer_to_tensors(optimizer)
        write_tensors(tensors, partial / "optimizer.safetensors")
        manifest = {
            "step": step,
            "state": state,
            "optimizer": groups,
            "sha256": {file.name: _sha256(file) for file in sorted(partial.glob("*.safetensors"))},
        }
        write_text(partial / MANIFEST, json.dumps(manifest, indent=1))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
    except OSError as error:
        raise GSKDError(f"checkpoint {final}: cannot be written: {error.strerror or error}") from None
    for old in _folders(folder)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def latest_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest valid checkpoint, and a line for each newer one that is damaged."""
    damaged = []
    for path in _folders(folder):
        try:
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            for file, digest in manifest["sha256"].items():
                if _sha256(path / file) != digest:
                    raise ValueError(f"{file} does not match its hash")
            return Checkpoint(path, int(manifest["step"]), manifest["state"]), damaged
        except (OSError, ValueError, KeyError, TypeError) as error:
            damaged.append(f"checkpoint {path} is damaged and skipped: {getattr(error, 'strerror', None) or error}")
    return None, damaged


def restore(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Loads a checkpoint into model and optimiser.

    Raises:
        GSKDError: it was made by another model or optimiser.
    """
    own = model.state_dict()
    found = read_tensors(checkpoint.path / "model.safetensors")
    if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in found.items()}:
        odd = sorted(
            key
            for key in own.keys() | found.keys()
            if key not in own or key not in found or own[key].shape != found[key].shape
        )
        raise GSKDError(
            f"checkpoint {checkpoint.path}: was made by another model; {len(odd)} keys differ, first {odd[:3]}"
        )
    model.load_state_dict(found)
    groups = json.loads((checkpoint.path / MANIFEST).read_text(encoding="utf-8"))["optimizer"]
    tensors = read_tensors(checkpoint.path / "optimizer.safetensors")
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = tensor
    try:
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    except ValueError as error:
        raise GSKDError(f"checkpoint {checkpoint.path}: was made by another optimiser: {error}") from None


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
        partial.unlink(missing_ok=True)
        raise GSKDError(f"{path}: cannot be written: {error.strerror or error}") from None


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


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
