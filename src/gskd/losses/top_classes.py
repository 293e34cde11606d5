"""Logit distillation of the teacher's few most likely classes: what it needs of the teacher is small enough to keep.

Shape suffixes: B images, K classes, N of them kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from gskd.losses._match import match_logits, require_count, require_positive
from gskd.losses._pixels import Pixels, match_size, promote, require_maps
from gskd.losses._reduce import mean_over_pixels

_FLOOR = -6e4  # of a log-probability: its exponential is 0, and fp16 can hold it
_LEFT_OUT = -1e30  # finite, so that nothing becomes NaN where no class is left


@dataclass(frozen=True)
class TopClasses:
    """What the teacher holds of each pixel, as far as it is kept."""

    index: Tensor
    """(B, N, h, w) its most likely classes, the first one first; uint8, or int16 for over 256 classes."""
    log_probability: Tensor
    """(B, N + 1, h, w) of these classes, and of all others together."""


def top_classes(teacher: Tensor, top: int, temperature: float = 1.0) -> TopClasses:
    """The teacher's ``top`` most likely classes at every pixel.

    Args:
        teacher: (B, K, h, w) logits.
        top: N; as many as there are but one where K is not larger, which loses nothing.
        temperature: T, divides the logits; > 0.
    """
    logits = promote(teacher) / temperature
    classes = logits.shape[1]
    index = logits.topk(max(1, min(top, classes - 1)), dim=1).indices
    kept = _log_probability(logits, index).clamp(min=_FLOOR)
    return TopClasses(index.to(torch.uint8 if classes <= 256 else torch.int16), kept)


def top_kd_loss(student: Tensor, target: TopClasses, valid: Tensor, temperature: float = 1.0) -> Tensor:
    """``T^2 * KL(teacher || student)`` over N classes and "any other", mean over the valid pixels of all processes.

    Hinton et al. 2015 (arXiv 1503.02531) at every pixel, of a coarser distribution: never more than the divergence over
    all K classes, and equal to it for N = K - 1. To keep few classes is from TinyViT (Wu et al. 2022, arXiv 2207.10666,
    section 3.1), which spreads what is left evenly over the other classes; here it is one event, as the teacher did not
    say how it is spread.

    Args:
        student: (B, K, h, w) logits.
        target: from ``top_classes``, of the same temperature.
        valid: (B, h, w) bool, the pixels that count.
        temperature: T; > 0.

    Returns:
        Scalar, float32 or wider; zero with zero gradient where no pixel counts.
    """
    with torch.autocast(student.device.type, enabled=False):
        student = promote(student) / temperature
        teacher = target.log_probability.to(student.dtype)
        divergence = (teacher.exp() * (teacher - _log_probability(student, target.index.long()))).sum(dim=1)
        return mean_over_pixels(divergence * temperature**2, valid)


def _log_probability(logits: Tensor, index: Tensor) -> Tensor:
    """Of the classes of ``index``, and of all others together: (B, N + 1, h, w)."""
    others = logits.scatter(1, index, _LEFT_OUT).logsumexp(dim=1, keepdim=True)
    return torch.cat([logits.gather(1, index), others], dim=1) - logits.logsumexp(dim=1, keepdim=True)


class TopKDLoss(nn.Module):
    """Per-pixel logit distillation of the teacher's N most likely classes, see ``top_kd_loss``. Weight: 1, as of KD.

    For many classes and a teacher cache: of 150 classes it keeps 26 bytes a pixel with N = 8, where the map has 300.
    Called as ``term(student, teacher, pixels)`` with logits (B, K, h, w); the student's are resized bilinearly to the
    teacher's size where they differ.

    Args:
        top: N, 8 by default.
        temperature: T, 1 by default.

    Raises:
        GSKDError: an argument is not positive; or, when called, a shape or the class counts do not match.
    """

    inputs: ClassVar[Literal["features", "logits"]] = "logits"

    def __init__(self, top: int = 8, temperature: float = 1.0) -> None:
        super().__init__()
        require_count("top", top)
        require_positive("temperature", temperature)
        self.top, self.temperature = top, temperature

    def forward(self, student: Tensor, teacher: Tensor, pixels: Pixels) -> Tensor:
        """Returns the scalar loss: `compare` with the teacher's `target`."""
        student, _ = match_logits("kd_top", student, teacher, pixels)
        return self.compare(student, self.target(teacher, pixels), pixels)

    @torch.no_grad()
    def target(self, teacher: Tensor, pixels: Pixels) -> TopClasses:
        """The teacher's most likely classes; what does not change when the student does."""
        require_maps("teacher", teacher, batch=pixels.labels.shape[0])
        with torch.autocast(teacher.device.type, enabled=False):
            return top_classes(teacher, self.top, self.temperature)

    def compare(self, student: Tensor, target: TopClasses, pixels: Pixels) -> Tensor:
        """The scalar loss against a target made before."""
        require_maps("student", student, batch=target.index.shape[0])
        size = (target.index.shape[2], target.index.shape[3])
        return top_kd_loss(match_size(student, size), target, pixels.valid_at(size), self.temperature)

    def target_settings(self) -> dict[str, Any]:
        """The arguments that `target` depends on: two losses that agree in them can share stored targets."""
        return {"kind": "kd_top", "top": self.top, "temperature": self.temperature}

    @staticmethod
    def pack(target: TopClasses) -> dict[str, Tensor]:
        """The target as it is stored, its log-probabilities in fp16."""
        return {"index": target.index, "log_probability": target.log_probability.half()}

    @staticmethod
    def unpack(packed: Mapping[str, Tensor]) -> TopClasses:
        """The target that was packed, its log-probabilities rounded to fp16."""
        return TopClasses(packed["index"], packed["log_probability"].float())
