"""Plain logit distillation, pixel by pixel: the baseline to beat.

Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv 1503.02531, applied to every pixel.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from gskd.distributed import mean_over_processes
from gskd.errors import GSKDError
from gskd.losses._pixels import Pixels, match_size, promote, require_pair


def kd_loss(student: Tensor, teacher: Tensor, valid: Tensor, temperature: float = 1.0) -> Tensor:
    """``T^2 * KL(teacher || student)`` over classes, mean over the valid pixels of all processes.

    Args:
        student: (B, K, h, w) logits.
        teacher: (B, K, h, w) logits; no gradient flows to it.
        valid: (B, h, w) bool, the pixels that count.
        temperature: T, divides both logits; > 0.

    Returns:
        Scalar, float32 or wider; zero with zero gradient where no pixel counts.
    """
    with torch.autocast(student.device.type, enabled=False):
        student, teacher = promote(student), promote(teacher.detach())
        if temperature != 1.0:
            student, teacher = student / temperature, teacher / temperature
        log_teacher = teacher.log_softmax(dim=1)
        divergence = (log_teacher.exp() * (log_teacher - student.log_softmax(dim=1))).sum(dim=1)
        total = torch.where(valid, divergence, 0.0).sum() * temperature**2
        return mean_over_processes(total, valid.sum())


class KDLoss(nn.Module):
    """Per-pixel logit distillation, see ``kd_loss``.

    Called as ``term(student, teacher, pixels)`` with logits (B, K, h, w); the student's are resized bilinearly to the
    teacher's size where they differ.

    Args:
        temperature: T, 1 by default.

    Raises:
        GSKDError: T is not positive; or, when called, a shape or the class counts do not match.
    """

    inputs: ClassVar[Literal["features", "logits"]] = "logits"

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        if not temperature > 0:
            raise GSKDError(f"temperature: expected a number > 0, got {temperature}")
        self.temperature = temperature

    def forward(self, student: Tensor, teacher: Tensor, pixels: Pixels) -> Tensor:
        """Returns the scalar loss."""
        require_pair(student, teacher, pixels)
        if student.shape[1] != teacher.shape[1]:
            raise GSKDError(
                f"kd: student logits have {student.shape[1]} classes, teacher logits {teacher.shape[1]}; "
                "expected the same number"
            )
        size = (teacher.shape[2], teacher.shape[3])
        return kd_loss(match_size(student, size), teacher, pixels.valid_at(size), self.temperature)
