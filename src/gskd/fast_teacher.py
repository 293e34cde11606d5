"""The fastest way to run a frozen teacher here that gives what the plain one gives (models -> distiller).

Which is fastest cannot be told from the outside: bf16 is twice as fast on one CPU and far slower on the next, and
dilated convolutions may be slower still. So every way is run on a few images, compared with the teacher as it was given
(fp32, nothing folded), and timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gskd.distributed import rank, sum_over_processes
from gskd.folding import fold_batch_norm
from gskd.losses.gskd import structural_similarity_map
from gskd.outputs import logits_of
from gskd.taps import Taps

SAME_CLASS = 0.99
"""Share of pixels that must keep their class."""
STRUCTURE_ERROR = 0.01
"""Largest mean difference of cosines between points of a tapped map."""
_POINTS = 256  # of each image, for the similarity map
_REPEATS = 3
_GAIN = 0.97  # of the time of a more exact way: what is faster by less is not worth a difference
_HOPELESS = 3.0  # times slower than the plain teacher at the first pass: not timed any further

_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


class TeacherPath(NamedTuple):
    """One way to run a teacher."""

    dtype: torch.dtype
    """Of autocast; float32 means none."""
    folded: bool
    """Batch normalisation inside the convolutions, see `gskd.folding`."""
    channels_last: bool
    """Memory layout of network and images."""

    @property
    def layout(self) -> torch.memory_format:
        """That memory layout."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def __str__(self) -> str:
        name = _NAMES[self.dtype]
        return name + ", folded" * self.folded + ", channels_last" * self.channels_last

    def agreed(self, device: torch.device) -> TeacherPath:
        """The first process's path, for all."""
        dtypes = list(_NAMES)
        mine = torch.tensor([dtypes.index(self.dtype), self.folded, self.channels_last], device=device)
        dtype, folded, channels_last = sum_over_processes(mine if rank() == 0 else torch.zeros_like(mine)).tolist()
        return TeacherPath(dtypes[dtype], bool(folded), bool(channels_last))

    def to_json(self) -> list[Any]:
        """As plain values."""
        return [_NAMES[self.dtype], self.folded, self.channels_last]

    @staticmethod
    def from_json(values: list[Any]) -> TeacherPath:
        """The path that gave these values."""
        dtypes = {name: dtype for dtype, name in _NAMES.items()}
        return TeacherPath(dtypes[values[0]], *values[1:])


class Trial(NamedTuple):
    """What came of one way."""

    path: TeacherPath
    seconds: float
    """Median of a forward pass; infinite where it was not timed."""
    same_class: float
    """Share of the pixels with the plain teacher's class."""
    structure_error: float
    """Mean difference of cosines to the plain teacher's, of the worst tap; 0 without taps."""
    problem: str = ""
    """Why it cannot be used, or nothing."""

    def __str__(self) -> str:
        if self.problem:
            return f"{self.path}: {self.problem}"
        return f"{self.path}: {1e3 * self.seconds:.0f} ms, {100 * self.same_class:.2f} % of the classes kept"


def low_precision(device: torch.device) -> tuple[torch.dtype, ...]:
    """The dtypes worth a trial on a device."""
    if device.type == "cuda":
        return (torch.bfloat16, torch.float16) if torch.cuda.is_bf16_supported() else (torch.float16,)
    return (torch.bfloat16,)


@torch.no_grad()
def try_paths(
    teacher: nn.Module, images: Tensor, taps: Sequence[str] = (), dtypes: Sequence[torch.dtype] | None = None
) -> list[Trial]:
    """Runs a teacher in every way, the plain one first.

    Args:
        teacher: on the device where it shall run; put in eval mode, otherwise as it was afterwards.
        images: (B, 3, H, W) float32, normalised, like those it will see: their number and size decide what is fastest.
        taps: layers that will be read.
        dtypes: of autocast, to be tried beside float32; by default `low_precision`.

    Returns:
        A trial for each way; the first is the plain teacher in fp32 in the layout of ``images``.
    """
    taps = list(taps)
    folded, count = fold_batch_norm(teacher, images, taps)
    as_given = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
    layouts = [as_given, True] if not as_given else [True]
    paths = [
        TeacherPath(dtype, fold, layout)
        for dtype in (torch.float32, *(low_precision(images.device) if dtypes is None else dtypes))
        for fold in ([False, True] if count else [False])
        for layout in layouts
    ]
    plain = _read(teacher, images, taps, paths[0])
    trials: list[Trial] = []
    for path in paths:
        network, limit = folded if path.folded else teacher, trials[0].seconds if trials else None
        trials.append(_try(network, images, taps, path, plain, limit))
    teacher.to(memory_format=paths[0].layout)  # type: ignore[call-overload]
    return trials


def best_path(trials: Sequence[Trial]) -> TeacherPath:
    """The fastest way that can be used; among those that are nearly as fast, the one that was tried first."""
    best = trials[0]
    for trial in trials[1:]:
        if not trial.problem and trial.seconds < _GAIN * best.seconds:
            best = trial
    return best.path


def autocast_of(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Autocast to a dtype on a device, or none for float32, whatever is around it."""
    if dtype == torch.float32:
        return torch.autocast(device.type, enabled=False)
    return torch.autocast(device.type, dtype=dtype)


def _read(network: nn.Module, images: Tensor, taps: list[str], path: TeacherPath) -> list[Tensor]:
    """Logits and tapped maps."""
    with autocast_of(images.device, path.dtype), Taps(network, taps) as read:
        logits = logits_of(network(images))
    return [logits.float(), *(read[name].float() for name in taps)]


def _try(
    network: nn.Module, images: Tensor, taps: list[str], path: TeacherPath, plain: list[Tensor], limit: float | None
) -> Trial:
    images = images.contiguous(memory_format=path.layout)
    times: list[float] = []
    try:
        network.to(memory_format=path.layout)  # type: ignore[call-overload]
        _read(network, images[:1], taps, path)  # the first pass of a kind sets up what the others find ready
        begun = time.perf_counter()
        found = _read(network, images, taps, path)
        _wait(images)
        first = time.perf_counter() - begun
        same, error = _same_class(found[0], plain[0]), _structure_error(found[1:], plain[1:])
        if not (same >= SAME_CLASS and error <= STRUCTURE_ERROR):
            problem = f"keeps {100 * same:.1f} % of the classes, and differs in structure by {error:.3f}"
            return Trial(path, float("inf"), same, error, problem)
        if limit is not None and images.device.type == "cpu" and first > _HOPELESS * limit:
            return Trial(path, float("inf"), same, error, f"{first / limit:.0f} times slower")
        for _ in range(_REPEATS):
            begun = time.perf_counter()
            _read(network, images, taps, path)
            _wait(images)
            times.append(time.perf_counter() - begun)
    except RuntimeError as error_raised:  # an operation that this device has not in this dtype
        return Trial(path, float("inf"), 0.0, float("inf"), str(error_raised).splitlines()[0])
    return Trial(path, statistics.median(times), same, error)


def _wait(images: Tensor) -> None:
    if images.device.type == "cuda":
        torch.cuda.synchronize(images.device)


def _same_class(found: Tensor, plain: Tensor) -> float:
    return (found.argmax(1) == plain.argmax(1)).float().mean().item() if found.isfinite().all() else 0.0


def _structure_error(found: Sequence[Tensor], plain: Sequence[Tensor]) -> float:
    """Of the similarity maps of points spread evenly over each image; the worst map's mean."""
    errors = [0.0]
    for one, other in zip(found, plain, strict=True):
        if one.dim() == 4:
            stride = max(1, one.shape[2] * one.shape[3] // _POINTS)
            maps = [structural_similarity_map(x.flatten(2)[:, :, ::stride].mT) for x in (one, other)]
            errors.append((maps[0] - maps[1]).abs().mean().item())
    worst = max(errors)
    return worst if all(error == error for error in errors) else float("inf")
