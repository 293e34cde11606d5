"""Widths and sizes matched: what every loss does that subtracts the student's map from the teacher's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gskd.distributed import sum_over_processes, sum_with_grad
from gskd.errors import GSKDError
from gskd.losses._pixels import Pixels, match_size, require_maps, require_pair


def width_projector(name: str, student_channels: int | None, teacher_channels: int | None) -> nn.Conv2d | None:
    """A 1x1 convolution from the student's width to the teacher's; None where they are the same or not declared.

    Args:
        name: the loss, for the error.
        student_channels, teacher_channels: both or neither.

    Raises:
        GSKDError: only one is given.
    """
    if student_channels is None or teacher_channels is None:
        if student_channels is not teacher_channels:
            raise GSKDError(
                f"{name}: expected both student_channels and teacher_channels or neither, got "
                f"student_channels={student_channels}, teacher_channels={teacher_channels}"
            )
        return None
    return None if student_channels == teacher_channels else nn.Conv2d(student_channels, teacher_channels, 1)


class PointProjector(nn.Module):
    """Linear, batch norm, ReLU, linear on points: conv1x1-BN-ReLU-conv1x1 where only the sampled pixels are needed.

    Batch statistics are those of the valid points of all processes. They differ from the convolution's, which would
    see every pixel: here every class weighs the same.

    Args:
        in_channels: C of the points.
        out_channels: hidden and output width.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.enter = nn.Linear(in_channels, out_channels, bias=False)
        self.weight = nn.Parameter(torch.ones(out_channels))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.leave = nn.Linear(out_channels, out_channels)
        self.eps, self.momentum = 1e-5, 0.1
        self.register_buffer("running_mean", torch.zeros(out_channels))
        self.register_buffer("running_var", torch.ones(out_channels))

    def forward(self, points: Tensor, valid: Tensor) -> Tensor:
        """Points (B, M, C) with ``valid`` (B, M) bool -> (B, M, out_channels)."""
        hidden = self.enter(points.to(self.enter.weight.dtype))
        mean, variance = self._statistics(hidden, valid) if self.training else (self.running_mean, self.running_var)
        hidden = (hidden - mean) * (variance + self.eps).rsqrt() * self.weight + self.bias
        projected: Tensor = self.leave(F.relu(hidden))
        return projected

    def _statistics(self, hidden: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        chosen = valid.unsqueeze(2).to(hidden.dtype)
        count = sum_over_processes(chosen.sum())
        mean = sum_with_grad((hidden * chosen).sum(dim=(0, 1))) / count.clamp(min=1)
        variance = sum_with_grad(((hidden - mean).square() * chosen).sum(dim=(0, 1))) / count.clamp(min=1)
        with torch.no_grad():
            share = self.momentum * (count > 0)  # a batch without points leaves no trace
            self.running_mean.lerp_(mean, share)
            self.running_var.lerp_(variance * count / (count - 1).clamp(min=1), share)
        return mean, variance


def match_maps(
    name: str, student: Tensor, teacher: Tensor, pixels: Pixels, projector: nn.Conv2d | None = None
) -> tuple[Tensor, Tensor]:
    """The student's map with the teacher's width and size, and the valid pixels at that size.

    Args:
        name: the loss, for errors.
        student: (B, Cs, h', w').
        teacher: (B, Ct, h, w).
        pixels: the batch's labels.
        projector: from ``width_projector``. It runs before the resize: the two commute (bilinear weights sum to one),
            and the student's map is mostly the smaller.

    Returns:
        (B, Ct, h, w) student map, and (B, h, w) bool.

    Raises:
        GSKDError: shapes or widths do not match.
    """
    require_pair(student, teacher, pixels)
    if projector is not None:
        require_maps(f"{name}: student", student, channels=projector.in_channels)
        require_maps(f"{name}: teacher", teacher, channels=projector.out_channels)
        with torch.autocast(student.device.type, enabled=False):
            student = projector(student.to(projector.weight.dtype))
    if student.shape[1] != teacher.shape[1]:
        raise GSKDError(
            f"{name}: student has {student.shape[1]} channels, teacher {teacher.shape[1]}; expected the same, or "
            f"student_channels={student.shape[1]}, teacher_channels={teacher.shape[1]} for a learned projector"
        )
    size = (teacher.shape[2], teacher.shape[3])
    return match_size(student, size), pixels.valid_at(size)


def match_logits(name: str, student: Tensor, teacher: Tensor, pixels: Pixels) -> tuple[Tensor, Tensor]:
    """As ``match_maps``, for logits: nothing can stand in for a class that one of the two does not know."""
    require_logits(name, student, teacher, pixels)
    size = (teacher.shape[2], teacher.shape[3])
    return match_size(student, size), pixels.valid_at(size)


def require_logits(name: str, student: Tensor, teacher: Tensor, pixels: Pixels) -> None:
    """Checks that student and teacher are maps of the same images, with a channel for each class.

    Raises:
        GSKDError: they are not.
    """
    require_pair(student, teacher, pixels)
    if student.shape[1] != teacher.shape[1]:
        raise GSKDError(
            f"{name}: student logits have {student.shape[1]} classes, teacher logits {teacher.shape[1]}; "
            "expected the same number"
        )
    if pixels.num_classes not in (None, student.shape[1]):
        raise GSKDError(
            f"{name}: reads maps of {student.shape[1]} channels where there are {pixels.num_classes} classes; expected"
            " logits"
        )


def require_positive(name: str, value: float) -> None:
    """Checks that an argument is a number > 0.

    Raises:
        GSKDError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise GSKDError(f"{name}: expected a number > 0, got {value!r}")


def require_number(name: str, value: object) -> None:
    """Checks that an argument is a finite number >= 0.

    Raises:
        GSKDError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise GSKDError(f"{name}: expected a number >= 0, got {value!r}")


def require_count(name: str, value: object, least: int = 1, or_else: str = "") -> None:
    """Checks that an argument is an integer >= ``least``; ``or_else`` names in the error what else would do.

    Raises:
        GSKDError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise GSKDError(f"{name}: expected {or_else}an integer >= {least}, got {value!r}")


def require_flag(name: str, value: object) -> None:
    """Checks that an argument is true or false.

    Raises:
        GSKDError: it is not.
    """
    if not isinstance(value, bool):
        raise GSKDError(f"{name}: expected true or false, got {value!r}")
