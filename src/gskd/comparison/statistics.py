"""Which differences are real: scores of resampled images and seeds, paired between variants (counts -> intervals).

Shape suffixes: S seeds, N images, K classes, R resamples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from gskd.data import SegmentationDataset
from gskd.evaluation import Inference, predictions

RESAMPLES = 2000


def image_counts(model: nn.Module, data: SegmentationDataset, inference: Inference) -> np.ndarray:
    """(N, 3, K) int64: by image and class, pixels that are predicted right, that are labelled, that are predicted.

    From sums of these over images follows every class's IoU, so any resample of the images can be scored.
    """
    classes = len(data.classes)
    rows = []
    for predicted, label in predictions(model, data, inference, range(len(data))):
        valid = (label >= 0) & (label < classes)
        truth, guess = label[valid].long(), predicted[valid].long()
        parts = (truth[truth == guess], truth, guess)
        rows.append(torch.stack([torch.bincount(part, minlength=classes) for part in parts]).cpu())
    return torch.stack(rows).numpy()


def class_iou(counts: np.ndarray) -> np.ndarray:
    """(..., 3, K) sums -> (..., K) IoU; NaN where a class is neither labelled nor predicted."""
    right, labelled, predicted = (counts[..., part, :].astype(np.float64) for part in range(3))
    union = labelled + predicted - right
    iou: np.ndarray = np.divide(right, union, out=np.full_like(right, np.nan), where=union > 0)
    return iou


def mean_iou(counts: np.ndarray, chosen: np.ndarray | None = None) -> np.ndarray:
    """(..., 3, K) sums -> (...) mean IoU over the classes (those ``chosen``, (K,) bool) that have one."""
    iou = class_iou(counts)
    iou = iou if chosen is None else iou[..., chosen]
    known = ~np.isnan(iou)
    total = np.where(known, iou, 0.0).sum(axis=-1)
    mean: np.ndarray = np.divide(total, known.sum(axis=-1), out=np.full_like(total, np.nan), where=known.any(axis=-1))
    return mean


@dataclass(frozen=True)
class Difference:
    """A mean difference in mIoU and its 95 % interval, 0 to 1."""

    mean: float
    low: float
    high: float

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0


def paired_difference(
    counts: np.ndarray, baseline: np.ndarray, chosen: np.ndarray | None = None, resamples: int = RESAMPLES
) -> Difference:
    """Difference of mean scores, with a percentile bootstrap interval over images and over seeds.

    Each resample draws N images and S seeds with replacement, the same for both sides: seeds share their initial
    student and their views, and images their difficulty. With one seed only the images are resampled, and the interval
    does not hold what another seed would change. With few seeds it is too narrow: from two seeds, half of all resamples
    draw the same one twice.

    Args:
        counts: (S, N, 3, K) of the variant, from ``image_counts``.
        baseline: (S, N, 3, K) of the baseline, same seeds and images in the same order.
        chosen: (K,) bool, the classes whose mean IoU is compared; all by default.
        resamples: R.
    """
    assert counts.shape == baseline.shape, (counts.shape, baseline.shape)
    seeds, images = counts.shape[:2]
    random = np.random.default_rng(0)
    image_weights = random.multinomial(images, np.full(images, 1 / images), size=resamples)  # (R, N)
    seed_weights = random.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples) / seeds  # (R, S)

    def resampled(side: np.ndarray) -> np.ndarray:
        sums = np.einsum("rn,snk->rsk", image_weights, side.reshape(seeds, images, -1), optimize=True)
        return np.asarray((mean_iou(sums.reshape(resamples, seeds, 3, -1), chosen) * seed_weights).sum(axis=1))

    differences = resampled(counts) - resampled(baseline)
    low, high = np.nanpercentile(differences, [2.5, 97.5])
    whole = mean_iou(counts.sum(axis=1), chosen).mean() - mean_iou(baseline.sum(axis=1), chosen).mean()
    return Difference(float(whole), float(low), float(high))
