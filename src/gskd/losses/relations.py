"""Distillation of relations within an image: between pixels, to class centres, between layers and between classes.

No map of pixel pairs, (h * w) x (h * w), is ever made. Shape suffixes: B images, C channels, K classes, P pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gskd.errors import GSKDError
from gskd.losses._match import match_logits, require_count, require_positive
from gskd.losses._pixels import Pixels, match_size, promote, require_pair
from gskd.losses._reduce import (
    masked_max_pool,
    masked_mean_pool,
    mean_over_images,
    mean_over_pixels,
    spatial_log_softmax,
    unit_length,
)
from gskd.losses.features import attention_map


def pairwise_loss(student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
    """Squared difference of cosines, mean over all ordered pairs of an image's pixels.

    Liu et al., "Structured Knowledge Distillation for Semantic Segmentation", CVPR 2019, arXiv 1903.04197, equation 2.
    Where an image has more pixels than channels, the sum over pairs is taken from C x C products, which is the same
    number: work O(P C^2) and memory O(C^2), not O(P^2). It is then a difference of sums: with matrix products in TF32
    (``torch.set_float32_matmul_precision("high")``) a value below 1e-3 is noise.

    Args:
        student: (B, Cs, P) vectors; the widths may differ.
        teacher: (B, Ct, P); no gradient flows to it.
        valid: (B, P) bool, the pixels that count.

    Returns:
        Scalar, float32 or wider, mean over the images of all processes; zero with zero gradient where no pixel counts.
    """
    with torch.autocast(student.device.type, enabled=False):
        counted = valid.unsqueeze(1)
        s, t = (torch.where(counted, unit_length(promote(maps), dim=1), 0.0) for maps in (student, teacher.detach()))
        if s.shape[2] <= max(s.shape[1], t.shape[1]):
            squares = (s.mT @ s - t.mT @ t).square().sum(dim=(1, 2))
        else:
            squares = _energy(s, s) + _energy(t, t) - 2 * _energy(s, t)
        count = valid.sum(dim=1).clamp(min=1).to(squares.dtype)
        return mean_over_images(squares / count.square(), valid.any(dim=1))


def _energy(a: Tensor, b: Tensor) -> Tensor:
    """(B,) sum over pixel pairs of (a_i . a_j)(b_i . b_j), which is the squared norm of sum_i a_i b_i^T."""
    return (a @ b.mT).square().sum(dim=(1, 2))


class SKDLoss(nn.Module):
    """Pairwise part of structured distillation, see ``pairwise_loss``. Published weight: 10.

    Called as ``term(student, teacher, pixels)`` with maps (B, Cs, h', w') and (B, Ct, h, w); the student's map is
    resized bilinearly to the teacher's size where they differ. Widths need not match. The holistic part is the term
    ``adversarial``.

    Args:
        pool: side of the windows that are max-pooled to one node each, 2 as published; or "half", the windows of half
            the map's height and width, so that an image has 4 nodes.

    Raises:
        GSKDError: an argument is not as above; or, when called, a shape does not match.
    """

    inputs: ClassVar[Literal["features", "logits"]] = "features"

    def __init__(self, pool: int | Literal["half"] = 2) -> None:
        super().__init__()
        if pool != "half":
            require_count("pool", pool)
        self.pool = pool

    def forward(self, student: Tensor, teacher: Tensor, pixels: Pixels) -> Tensor:
        """Returns the scalar loss."""
        require_pair(student, teacher, pixels)
        size = (teacher.shape[2], teacher.shape[3])
        window = (-(-size[0] // 2), -(-size[1] // 2)) if self.pool == "half" else (self.pool, self.pool)
        valid = pixels.valid_at(size)
        with torch.autocast(student.device.type, enabled=False):
            s, there = masked_max_pool(match_size(student, size), valid, window)
            t, _ = masked_max_pool(teacher.detach(), valid, window)
            return pairwise_loss(s.flatten(2), t.flatten(2), there.flatten(1))


def centre_similarity(features: Tensor, labels: Tensor, valid: Tensor, num_classes: int) -> Tensor:
    """Cosine of every pixel's feature and the mean feature of its class in its image.

    Args:
        features: (B, C, h, w).
        labels: (B, h, w) int64.
        valid: (B, h, w) bool; the others belong to no class.
        num_classes: K.

    Returns:
        (B, h * w), float32 or wider; 0 at ignored pixels.
    """
    maps = promote(features).flatten(2)
    own = torch.where(valid, labels, num_classes).flatten(1)
    member = F.one_hot(own, num_classes + 1)[:, :, :num_classes].to(maps.dtype)  # (B, P, K)
    # The mean's direction is that of the sum: counting is not needed, and a class that is absent stays zero.
    centres = unit_length(maps @ member, dim=1)  # (B, C, K)
    similarity = centres.mT @ unit_length(maps, dim=1)  # (B, K, P)
    return (similarity * member.mT).sum(dim=1)


def ifvd_loss(student: Tensor, teacher: Tensor, labels: Tensor, valid: Tensor, num_classes: int) -> Tensor:
    """Squared difference of the pixels' cosines to their class centre, mean over the valid pixels of all processes.

    Wang et al., "Intra-class Feature Variation Distillation for Semantic Segmentation", ECCV 2020, equations 2 and 3.
    Public code counts the ignored pixels in the mean (with a difference of 0); here they do not count.

    Args:
        student: (B, Cs, h, w); the widths may differ.
        teacher: (B, Ct, h, w); no gradient flows to it.
        labels: (B, h, w) int64.
        valid: (B, h, w) bool, the pixels that count.
        num_classes: K.

    Returns:
        Scalar, float32 or wider; zero with zero gradient where no pixel counts.
    """
    with torch.autocast(student.device.type, enabled=False):
        difference = centre_similarity(student, labels, valid, num_classes) - centre_similarity(
            teacher.detach(), labels, valid, num_classes
        )
        return mean_over_pixels(difference.square(), valid.flatten(1))


class IFVDLoss(nn.Module):
    """Intra-class feature variation distillation, see ``ifvd_loss``. Published weights: 20 to 200.

    Called as ``term(student, teacher, pixels)`` with maps (B, Cs, h', w') and (B, Ct, h, w); the student's map is
    resized bilinearly to the teacher's size where they differ. Widths need not match.

    Raises:
        GSKDError: when called, a shape does not match or the number of classes is unknown.
    """

    inputs: ClassVar[Literal["features", "logits"]] = "features"

    def forward(self, student: Tensor, teacher: Tensor, pixels: Pixels) -> Tensor:
        """Returns the scalar loss."""
        require_pair(student, teacher, pixels)
        if pixels.num_classes is None:
            raise GSKDError("ifvd: unknown number of classes, expected Pixels(labels, teacher_logits) or num_classes=K")
        size = (teacher.shape[2], teacher.shape[3])
        labels, valid = pixels.labels_at(size), pixels.valid_at(size)
        return ifvd_loss(match_size(student, size), teacher, labels, valid, pixels.num_classes)


def psd_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], valid: Tensor) -> Tensor:
    """Squared distance of what changes in attention from layer to layer, mean over the pairs of layers.

    Feng et al., "Double Similarity Distillation for Semantic Image Segmentation", IEEE TIP 2021, pixel-wise similarity:
    the difference of two layers' attention maps, scaled to length 1. The distances are summed over pixels, so that the
    value does not depend on the map's size; public code takes the mean over the P pixels: its weight w is w / P here.

    Args:
        student: at least two maps (B, Cs, h, w), from the first layer to the last; widths may differ.
        teacher: as many maps (B, Ct, h, w); no gradient flows to them.
        valid: (B, h, w) bool, the pixels that count.

    Returns:
        Scalar, float32 or wider, mean over the images of all processes; zero with zero gradient where no pixel counts.
    """
    with torch.autocast(valid.device.type, enabled=False):
        s = [attention_map(maps, valid) for maps in student]
        t = [attention_map(maps.detach(), valid) for maps in teacher]
        pairs = [(i, j) for j in range(len(s)) for i in range(j)]
        distances = [
            (unit_length(s[j] - s[i], dim=1) - unit_length(t[j] - t[i], dim=1)).square().sum(dim=1) for i, j in pairs
        ]
        return mean_over_images(torch.stack(distances).mean(dim=0), valid.flatten(1).any(dim=1))


class PSDLoss(nn.Module):
    """Pixel-wise part of double similarity distillation (DSD), see ``psd_loss``; ``CSDLoss`` is the other.

    Published weight: 1000 on a mean over 64 x 128 pixels, which is 0.12 here. Called as
    ``term(student, teacher, pixels)`` with two or more maps of each network, (B, C, h, w) of any width and size: name
    several layers, from the first to the last. All are resized bilinearly to the size of the teacher's last.

    Raises:
        GSKDError: when called, fewer than two maps, different numbers of them, or a shape that does not match.
    """

    inputs: ClassVar[Literal["levels"]] = "levels"

    def forward(self, student: Sequence[Tensor] | Tensor, teacher: Sequence[Tensor] | Tensor, pixels: Pixels) -> Tensor:
        """Returns the scalar loss."""
        for side, maps in (("student", student), ("teacher", teacher)):
            if isinstance(maps, Tensor):
                raise GSKDError(f"psd: {side}: expected the maps of two or more layers, got one")
        if len(student) != len(teacher) or len(student) < 2:
            raise GSKDError(
                f"psd: expected the maps of as many layers from both, two or more, got {len(student)} of the student"
                f" and {len(teacher)} of the teacher"
            )
        for one, other in zip(student, teacher, strict=True):
            require_pair(one, other, pixels)
        size = (teacher[-1].shape[2], teacher[-1].shape[3])
        s, t = ([match_size(maps, size) for maps in side] for side in (student, teacher))
        return psd_loss(s, t, pixels.valid_at(size))


def csd_loss(student: Tensor, teacher: Tensor, valid: Tensor, temperature: float = 4.0) -> Tensor:
    """Squared difference of the overlap of classes, mean over the class pairs and the images of all processes.

    Feng et al., "Double Similarity Distillation for Semantic Image Segmentation", IEEE TIP 2021, category-wise
    similarity: each class is a distribution over the P places of an image, and two classes overlap by the sum of their
    products. The overlap is multiplied by P here (1 for uniform distributions), so that it does not depend on the map's
    size: a published weight w is w / P^2 here.

    Args:
        student: (B, K, P) logits.
        teacher: (B, K, P) logits; no gradient flows to it.
        valid: (B, P) bool, the places that count.
        temperature: tau, divides the logits; > 0.

    Returns:
        Scalar, float32 or wider; zero with zero gradient where no place counts.
    """
    with torch.autocast(student.device.type, enabled=False):
        count = valid.sum(dim=1).view(-1, 1, 1)
        overlaps = []
        for logits in (student, teacher.detach()):
            share = spatial_log_softmax(promote(logits) / temperature, valid).exp()
            overlaps.append(share @ share.mT * count)
        difference = (overlaps[0] - overlaps[1]).square().mean(dim=(1, 2))
        return mean_over_images(difference, valid.any(dim=1))


class CSDLoss(nn.Module):
    """Category-wise part of double similarity distillation (DSD), see ``csd_loss``; ``PSDLoss`` is the other.

    Published weight: 10 on 32 x 64 pooled places, which is 2.4e-6 here: as published, the term is next to nothing. On
    this scale, where 1 is the overlap of uniform distributions, begin with a weight near 0.01.

    Called as ``term(student, teacher, pixels)`` with logits (B, K, h, w); the student's are resized bilinearly to the
    teacher's size where they differ.

    Args:
        temperature: tau, 4 as published.
        pool: side of the windows that are mean-pooled to one place each; 2 as published.

    Raises:
        GSKDError: an argument is not as above; or, when called, a shape or the class counts do not match.
    """

    inputs: ClassVar[Literal["features", "logits"]] = "logits"

    def __init__(self, temperature: float = 4.0, pool: int = 2) -> None:
        super().__init__()
        require_positive("temperature", temperature)
        require_count("pool", pool)
        self.temperature = temperature
        self.pool = pool

    def forward(self, student: Tensor, teacher: Tensor, pixels: Pixels) -> Tensor:
        """Returns the scalar loss."""
        student, valid = match_logits("csd", student, teacher, pixels)
        with torch.autocast(student.device.type, enabled=False):
            s, there = masked_mean_pool(student, valid, self.pool)
            t, _ = masked_mean_pool(teacher.detach(), valid, self.pool)
            return csd_loss(s.flatten(2), t.flatten(2), there.flatten(1), self.temperature)
