"""What every loss asks about pixels: their label, whether they count, whether the teacher is right.

Answers come at any resolution and are kept, so that several losses on taps of one size share the work.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gskd.data import IGNORE
from gskd.errors import GSKDError

Size = tuple[int, int]
"""Height and width in pixels."""


class Pixels:
    """Ground truth and teacher prediction of a batch, at any resolution.

    Args:
        labels: (B, H, W) int64 class indices.
        teacher_logits: (B, K, h, w) floating point, any resolution; detached. None where no teacher prediction is
            known.
        num_classes: K; by default that of ``teacher_logits``.
        ignore_index: the label that counts nowhere, ``gskd.data.IGNORE`` by default.

    Raises:
        GSKDError: a shape or dtype is not as above.
    """

    def __init__(
        self,
        labels: Tensor,
        teacher_logits: Tensor | None = None,
        num_classes: int | None = None,
        ignore_index: int = IGNORE,
    ) -> None:
        if labels.dim() != 3 or labels.dtype != torch.int64:
            raise GSKDError(f"labels: expected (B, H, W) int64, got {tuple(labels.shape)} {labels.dtype}")
        if teacher_logits is not None:
            require_maps("teacher_logits", teacher_logits, batch=labels.shape[0])
            teacher_logits = teacher_logits.detach()
        self.labels = labels
        self.teacher_logits = teacher_logits
        self.num_classes = (
            teacher_logits.shape[1] if num_classes is None and teacher_logits is not None else num_classes
        )
        self.ignore_index = ignore_index
        self._kept: dict[tuple[str, Size], Tensor] = {}

    def labels_at(self, size: Size) -> Tensor:
        """(B, h, w) int64 labels by nearest neighbour: row i reads row floor(i * H / h), as ``F.interpolate`` does."""
        kept = self._kept.get(("labels", size))
        if kept is None:
            kept = self._kept["labels", size] = _nearest(self.labels, size)
        return kept

    def valid_at(self, size: Size) -> Tensor:
        """(B, h, w) bool: the label is a class. The ignore value, negative labels and labels >= num_classes are not."""
        kept = self._kept.get(("valid", size))
        if kept is None:
            labels = self.labels_at(size)
            kept = (labels >= 0) & (labels != self.ignore_index)
            if self.num_classes is not None:
                kept &= labels < self.num_classes
            self._kept["valid", size] = kept
        return kept

    def teacher_prediction_at(self, size: Size) -> Tensor:
        """(B, h, w) int64: the class of the largest teacher logit, nearest neighbour.

        Raises:
            GSKDError: there are no teacher logits.
        """
        kept = self._kept.get(("prediction", size))
        if kept is None:
            # ``max`` with its index is several times faster on CPU than ``argmax`` over a dimension that is not the
            # last.
            kept = self._kept["prediction", size] = self._teacher_logits_at(size).max(dim=1).indices
        return kept

    def teacher_correct_at(self, size: Size) -> Tensor:
        """(B, h, w) bool: the pixel is valid, and no teacher logit exceeds that of its label.

        The same as comparing ``teacher_prediction_at`` with the labels (a tie counts as correct), but much cheaper.

        Raises:
            GSKDError: there are no teacher logits.
        """
        kept = self._kept.get(("correct", size))
        if kept is None:
            logits, valid = self._teacher_logits_at(size), self.valid_at(size)
            classes = self.labels_at(size).clamp(0, logits.shape[1] - 1)
            own = logits.gather(1, classes.unsqueeze(1)).squeeze(1)
            kept = ~(own < logits.amax(dim=1)) & valid  # not >=: what is not a number must show, not be left out
            kept &= self.labels_at(size) < logits.shape[1]
            self._kept["correct", size] = kept
        return kept

    def _teacher_logits_at(self, size: Size) -> Tensor:
        if self.teacher_logits is None:
            raise GSKDError(
                "pixels: no teacher logits; expected Pixels(labels, teacher_logits=...), or only_correct=False"
            )
        return _nearest(self.teacher_logits, size)


def _nearest(maps: Tensor, size: Size) -> Tensor:
    """``maps`` (..., H, W) read at floor(i * H / h), floor(j * W / w), in integers: labels survive untouched."""
    (height, width), (h, w) = maps.shape[-2:], size
    if (height, width) == (h, w):
        return maps
    rows = torch.arange(h, device=maps.device) * height // h
    columns = torch.arange(w, device=maps.device) * width // w
    return maps.index_select(-2, rows).index_select(-1, columns)


def promote(tensor: Tensor) -> Tensor:
    """Half precision to float32; float32 and float64 stay as they are."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def match_size(maps: Tensor, size: Size) -> Tensor:
    """Maps (B, C, H, W) resized bilinearly (``align_corners=False``) to ``size``, in at least float32.

    Returns:
        (B, C, h, w); ``maps`` itself where the size is right already.
    """
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(promote(maps), size=size, mode="bilinear", align_corners=False)


def require_maps(name: str, maps: Tensor, batch: int | None = None, channels: int | None = None) -> None:
    """Checks that ``maps`` is floating point (B, C, h, w), with the given batch and channels where those are known.

    Raises:
        GSKDError: it is not.
    """
    expected = f"({'B' if batch is None else batch}, {'C' if channels is None else channels}, h, w)"
    wrong = maps.dim() != 4 or not maps.is_floating_point()
    wrong = wrong or (batch is not None and maps.shape[0] != batch)
    wrong = wrong or (channels is not None and maps.shape[1] != channels)
    if wrong:
        raise GSKDError(f"{name}: expected {expected} floating point, got {tuple(maps.shape)} {maps.dtype}")


def require_pair(student: Tensor, teacher: Tensor, pixels: Pixels) -> None:
    """Checks that student, teacher and labels are maps of the same images.

    Raises:
        GSKDError: they are not.
    """
    require_maps("student", student)
    require_maps("teacher", teacher, batch=student.shape[0])
    if pixels.labels.shape[0] != student.shape[0]:
        raise GSKDError(f"labels: expected ({student.shape[0]}, H, W), got {tuple(pixels.labels.shape)}")
