"""What the student learns from the labels, beside any teacher (losses -> distiller).

Called as ``task_loss(logits, labels)``; any function of that form can take their place in a `Distiller`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gskd.data import IGNORE
from gskd.distributed import mean_over_processes
from gskd.losses import Pixels
from gskd.losses._match import require_number
from gskd.losses._pixels import match_size, promote
from gskd.losses._sampling import class_balanced_sample, read_points


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Per-pixel cross-entropy, mean over the labelled pixels of all processes, in fp32.

    Args:
        logits: (B, K, h, w), brought to the labels' size (bilinear) where it differs.
        labels: (B, H, W) int64. What is no class, such as `IGNORE`, does not count; a batch without labelled pixels
            gives a differentiable zero.
    """
    with torch.autocast(logits.device.type, enabled=False):
        size = (labels.shape[1], labels.shape[2])
        logits = match_size(logits, size)
        valid = Pixels(labels, num_classes=logits.shape[1]).valid_at(size)
        total = F.cross_entropy(
            promote(logits), labels.masked_fill(~valid, IGNORE), ignore_index=IGNORE, reduction="sum"
        )
        return mean_over_processes(total, valid.sum())


def class_balanced_cross_entropy(
    logits: Tensor, labels: Tensor, weight: float = 1.0, samples_per_class: int = 8
) -> Tensor:
    """`cross_entropy`, and ``weight`` times that on as many random pixels of every class of an image.

    The points are those of GSKD's class-balanced sampling, so that it is what GSKD's balance of classes is worth
    without a teacher: the baseline to hold it against, and a help of its own where rare classes matter more than the
    share of pixels that are right.

    Args:
        logits, labels: as of `cross_entropy`; logits of another size are read bilinearly at the points.
        weight: of the second part, a mean over the points of all images and processes.
        samples_per_class: points of each class in an image; a class with fewer pixels repeats them.

    Raises:
        GSKDError: ``weight`` is negative or not finite, or ``samples_per_class`` no whole number of at least 1.
    """
    require_number("weight", weight)
    with torch.autocast(logits.device.type, enabled=False):
        size, classes = (labels.shape[1], labels.shape[2]), logits.shape[1]
        valid = Pixels(labels, num_classes=classes).valid_at(size)
        points = class_balanced_sample(labels, classes, samples_per_class, eligible=valid)
        read = promote(read_points(logits, points.index, size))
        total = F.cross_entropy(read.flatten(0, 1), points.label.flatten(), ignore_index=-1, reduction="sum")
        balanced = mean_over_processes(total, points.valid.sum())
    return cross_entropy(logits, labels) + weight * balanced
