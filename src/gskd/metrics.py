"""Scores of a whole dataset from one confusion matrix (logits and labels -> numbers in a table)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gskd.distributed import sum_over_processes

RARE_SHARE = 0.01
"""A class is rare with less than this share of the labelled pixels of what is scored."""


class ConfusionMatrix:
    """Counts pixels by (true class, predicted class) over a dataset; ignored pixels are left out.

    Args:
        num_classes: K. Labels outside 0..K-1 are ignored.
        device: where the K x K int64 counts live.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu") -> None:
        self.num_classes = num_classes
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def update(self, prediction: Tensor, label: Tensor) -> None:
        """Adds predicted and true classes: integer tensors of one shape, predictions in 0..K-1."""
        assert prediction.shape == label.shape, (prediction.shape, label.shape)
        valid = (label >= 0) & (label < self.num_classes)
        pairs = label[valid].long() * self.num_classes + prediction[valid].long()
        self.counts += torch.bincount(pairs, minlength=self.num_classes**2).view_as(self.counts)

    def score(self) -> Score:
        """The score so far, over all processes."""
        counts = sum_over_processes(self.counts).double().cpu()
        hit, true, predicted = counts.diag(), counts.sum(1), counts.sum(0)
        union = true + predicted - hit
        iou = torch.where(union > 0, hit / union.clamp(min=1), torch.nan)
        seen = ~iou.isnan()
        return Score(
            miou=float(iou[seen].mean()) if seen.any() else float("nan"),
            iou=tuple(iou.tolist()),
            pixel_accuracy=float(hit.sum() / true.sum()) if true.sum() > 0 else float("nan"),
            pixels=int(counts.sum()),
        )


@dataclass(frozen=True)
class Score:
    """The score of one model on one split.

    Attributes:
        miou: mean of the classes' IoU, each from the counts of the whole dataset, 0 to 1. A class that neither the
            labels nor the predictions contain has no IoU and is left out; NaN where no pixel counted.
        iou: per class, NaN for such a class.
        pixel_accuracy: share of labelled pixels predicted correctly.
        pixels: how many labelled pixels were scored.
    """

    miou: float
    iou: tuple[float, ...]
    pixel_accuracy: float
    pixels: int

    def to_dict(self, classes: tuple[str, ...]) -> dict[str, Any]:
        """JSON-ready, IoU keyed by class name, None where there is none."""
        return {
            "miou": None if self.miou != self.miou else self.miou,
            "pixel_accuracy": None if self.pixel_accuracy != self.pixel_accuracy else self.pixel_accuracy,
            "iou": {name: (None if x != x else x) for name, x in zip(classes, self.iou, strict=True)},
            "pixels": self.pixels,
        }
