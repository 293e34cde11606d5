"""Plain feature distillation: the student's map should be the teacher's.

Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015, arXiv 1412.6550, equation 3, as a mean.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from gskd.distributed import mean_over_processes
from gskd.errors import GSKDError
from gskd.losses._pixels import Pixels, match_size, promote, require_maps, require_pair


def mse_loss(student: Tensor, teacher: Tensor, valid: Tensor, normalise: bool = False) -> Tensor:
    """Squared difference of features, mean over channels and over the valid pixels of all processes.

    Args:
        student: (B, C, h, w).
        teacher: (B, C, h, w); no gradient flows to it.
        valid: (B, h, w) bool, the pixels that count.
        normalise: divide each pixel's feature by its L2 norm first; a zero feature stays zero, with zero gradient.

    Returns:
        Scalar, float32 or wider; zero with zero gradient where no pixel counts.
    """
    with torch.autocast(student.device.type, enabled=False):
        student, teacher = promote(student), promote(teacher.detach())
        if normalise:
            student, teacher = unit_length(student, dim=1), unit_length(teacher, dim=1)
        squares = (student - teacher).square().mean(dim=1)
        return mean_over_processes(torch.where(valid, squares, 0.0).sum(), valid.sum())


def unit_length(vectors: Tensor, dim: int) -> Tensor:
    """``vectors`` divided by their L2 norm along ``dim``; a zero vector stays zero, with zero gradient (not 1e12)."""
    squares = vectors.square().sum(dim=dim, keepdim=True)
    nonzero = squares > 0
    return torch.where(nonzero, vectors * torch.where(nonzero, squares, 1.0).rsqrt(), 0.0)


class MSELoss(nn.Module):
    """Feature distillation, see ``mse_loss``.

    Called as ``term(student, teacher, pixels)`` with maps (B, Cs, h', w') and (B, Ct, h, w); the student's map is
    resized bilinearly to the teacher's size where they differ.

    Args:
        student_channels: Cs. Needed, with ``teacher_channels``, where the widths differ: a 1x1 convolution then maps
            the student to the teacher's width. It is part of this module's parameters.
        teacher_channels: Ct.
        normalise: compare directions, not lengths.

    Raises:
        GSKDError: only one width is given; or, when called, shapes or widths do not match.
    """

    inputs: ClassVar[Literal["features", "logits"]] = "features"

    def __init__(
        self, student_channels: int | None = None, teacher_channels: int | None = None, normalise: bool = False
    ) -> None:
        super().__init__()
        if not isinstance(normalise, bool):
            raise GSKDError(f"normalise: expected true or false, got {normalise!r}")
        self.normalise = normalise
        self.projector: nn.Conv2d | None = None
        if student_channels is None or teacher_channels is None:
            if student_channels is not teacher_channels:
                raise GSKDError(
                    "mse: expected both student_channels and teacher_channels or neither, got "
                    f"student_channels={student_channels}, teacher_channels={teacher_channels}"
                )
        elif student_channels != teacher_channels:
            self.projector = nn.Conv2d(student_channels, teacher_channels, kernel_size=1)

    def forward(self, student: Tensor, teacher: Tensor, pixels: Pixels) -> Tensor:
        """Returns the scalar loss."""
        require_pair(student, teacher, pixels)
        if self.projector is not None:
            require_maps("mse: student", student, channels=self.projector.in_channels)
            # Before the resize: the two commute (bilinear weights sum to one), and the student's map is mostly the
            # smaller.
            student = self.projector(student)
        if student.shape[1] != teacher.shape[1]:
            raise GSKDError(
                f"mse: student has {student.shape[1]} channels, teacher {teacher.shape[1]}; expected the same, or "
                f"student_channels={student.shape[1]}, teacher_channels={teacher.shape[1]} for a learned projector"
            )
        size = (teacher.shape[2], teacher.shape[3])
        return mse_loss(match_size(student, size), teacher, pixels.valid_at(size), self.normalise)
