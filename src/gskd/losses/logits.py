"""Distillation of the output, pixel by pixel: what the teacher holds of every class.

Shape suffixes: B images, K classes, P pixels.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gskd.distributed import sum_over_processes, sum_with_grad
from gskd.losses._match import match_logits, require_count, require_flag, require_number, require_positive
from gskd.losses._pixels import Pixels, promote
from gskd.losses._reduce import mean_over_images, mean_over_pixels, spatial_log_softmax


def standardise_logits(logits: Tensor) -> Tensor:
    """Logits with mean 0 and standard deviation 1 over the classes of each pixel.

    Sun et al., "Logit Standardization in Knowledge Distillation", CVPR 2024, arXiv 2403.01427, equation 13. A pixel
    whose logits are all equal stays zero, with zero gradient.

    Args:
        logits: (B, K, ...).
    """
    centred = logits - logits.mean(dim=1, keepdim=True)
    variance = centred.square().mean(dim=1, keepdim=True)
    varied = variance > _rounding(logits.dtype) * logits.square().mean(dim=1, keepdim=True)
    return torch.where(varied, centred * torch.where(varied, variance, 1.0).rsqrt(), 0.0)


def _rounding(dtype: torch.dtype) -> float:
    """Share of a mean square that its variance may be by rounding alone. Less is no variation: divided by its root, it
    would give a gradient of 1e5."""
    return (16 * torch.finfo(dtype).eps) ** 2


def _pixel_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """(B, h, w) ``T^2 * KL(teacher || student)`` over classes."""
    if temperature != 1.0:
        student, teacher = student / temperature, teacher / temperature
    log_teacher = teacher.log_softmax(dim=1)
    return (log_teacher.exp() * (log_teacher - student.log_softmax(dim=1))).sum(dim=1) * temperature**2


def kd_loss(
    student: Tensor, teacher: Tensor, valid: Tensor, temperature: float = 1.0, standardise: bool = False
) -> Tensor:
    """``T^2 * KL(teacher || student)`` over classes, mean over the valid pixels of all processes.

    Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv 1503.02531, at every pixel.

    Args:
        student: (B, K, h, w) logits.
        teacher: (B, K, h, w) logits; no gradient flows to it.
        valid: (B, h, w) bool, the pixels that count.
        temperature: T, divides both logits; > 0.
        standardise: both logits through ``standardise_logits`` first.

    Returns:
        Scalar, float32 or wider; zero with zero gradient where no pixel counts.
    """
    with torch.autocast(student.device.type, enabled=False):
        student, teacher = promote(student), promote(teacher.detach())
        if standardise:
            student, teacher = standardise_logits(student), standardise_logits(teacher)
        return mean_over_pixels(_pixel_divergence(student, teacher, temperature), valid)


class KDLoss(nn.Module):
    """Per-pixel logit distillation, see ``kd_loss``. Published weight: 1.

    Called as ``term(student, teacher, pixels)`` with logits (B, K, h, w); the student's are resized bilinearly to the
    teacher's size where they differ.

    Args:
        temperature: T, 1 by default.
        standardise: standardise the logits first; published with T 2 and weight 9, for image classification.

    Raises:
        GSKDError: T is not positive; or, when called, a shape or the class counts do not match.
    """

    inputs: ClassVar[Literal["features", "logits"]] = "logits"

    def __init__(self, temperature: float = 1.0, standardise: bool = False) -> None:
        super().__init__()
        require_positive("temperature", temperature)
        require_flag("standardise", standardise)
        self.temperature = temperature
        self.standardise = standardise

    def forward(self, student: Tensor, teacher: Tensor, pixels: Pixels) -> Tensor:
        """Returns the scalar loss."""
        student, valid = match_logits("kd", student, teacher, pixels)
        return kd_loss(student, teacher, valid, self.temperature, self.standardise)


def dist_loss(
    student: Tensor,
    teacher: Tensor,
    valid: Tensor,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    """Correlation instead of equality: 1 - Pearson over the classes of a pixel, and over the pixels of a class.

    Huang et al., "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022, arXiv 2205.10536, equations 5 to 9.
    The intra-class part correlates over all valid pixels of the batch, on all processes, so that it means the same for
    any batch size (some public code correlates over the images alone, which is undefined for one image).

    Args:
        student: (B, K, h, w) logits.
        teacher: (B, K, h, w) logits; no gradient flows to it.
        valid: (B, h, w) bool, the pixels that count.
        beta: weight of the inter-class part, a mean over pixels.
        gamma: weight of the intra-class part, a mean over classes.
        temperature: T, divides both logits; the loss is multiplied by T^2.

    Returns:
        Scalar, float32 or wider; zero with zero gradient where no pixel counts. A pixel or class over which the teacher
        does not vary has no correlation and does not count.
    """
    with torch.autocast(student.device.type, enabled=False):
        student = (promote(student) / temperature).softmax(dim=1)
        teacher = (promote(teacher.detach()) / temperature).softmax(dim=1)
        s, t = (p - p.mean(dim=1, keepdim=True) for p in (student, teacher))
        least = _rounding(s.dtype) / s.shape[1]  # the mean over classes is 1 / K
        inter = _one_minus_pearson((s * t).sum(1), s.square().sum(1), t.square().sum(1), least, least)
        varied = (t.square().sum(1) > least) & valid
        total = beta * mean_over_pixels(inter, varied)

        mask = valid.unsqueeze(1).to(student.dtype)
        count = sum_over_processes(mask.sum()).clamp(min=1)
        # The means carry no gradient: the sums below do not change with them to first order, as deviations sum to zero.
        means = [sum_over_processes((p.detach() * mask).sum(dim=(0, 2, 3))) / count for p in (student, teacher)]
        s, t = ((p - m.view(1, -1, 1, 1)) * mask for p, m in zip((student, teacher), means, strict=True))
        moments = torch.stack(
            [(s * t).sum(dim=(0, 2, 3)), s.square().sum(dim=(0, 2, 3)), t.square().sum(dim=(0, 2, 3))]
        )
        moments = sum_with_grad(moments)
        # What a class that the student never predicts varies by is tiny, and real; below this its square is not exact.
        least = torch.finfo(s.dtype).tiny ** 0.75 + _rounding(s.dtype) * count * means[0].square()
        # Of a teacher's, what is less than the rounding of a probability of 1 says nothing.
        known = moments[2] > count * torch.finfo(t.dtype).eps ** 2
        intra = _one_minus_pearson(moments[0], moments[1], moments[2], least, 0.0)
        # Every process has the whole batch's value here: a plain mean, not one over processes.
        intra = torch.where(known, intra, 0.0).sum() / known.sum().clamp(min=1)
        return (total + gamma * intra) * temperature**2


def _one_minus_pearson(
    product: Tensor, student: Tensor, teacher: Tensor, least_student: Tensor | float, least_teacher: Tensor | float
) -> Tensor:
    """From sums of centred products and squares; 1 with zero gradient where either is not above its least."""
    varied = (student > least_student) & (teacher > least_teacher)
    # Not by rsqrt, in whose gradient is the cube: infinite for a class that the student never predicts.
    length = torch.where(varied, student, 1.0).sqrt() * torch.where(varied, teacher, 1.0).sqrt()
    return 1 - torch.where(varied, product / length, 0.0)


class DISTLoss(nn.Module):
    """Distillation by correlation, see ``dist_loss``. Published weight: 1, with beta and gamma 1.

    Called as ``term(student, teacher, pixels)`` with logits (B, K, h, w); the student's are resized bilinearly to the
    teacher's size where they differ.

    Args:
        beta, gamma: weights of the inter- and the intra-class part.
        temperature: T, 1 as published.

    Raises:
        GSKDError: T is not positive; or, when called, a shape or the class counts do not match.
    """

    inputs: ClassVar[Literal["features", "logits"]] = "logits"

    def __init__(self, beta: float = 1.0, gamma: float = 1.0, temperature: float = 1.0) -> None:
        super().__init__()
        require_positive("temperature", temperature)
        require_number("beta", beta)
        require_number("gamma", gamma)
        self.beta = beta
        self.gamma = gamma
        self.temperature = temperature

    def forward(self, student: Tensor, teacher: Tensor, pixels: Pixels) -> Tensor:
        """Returns the scalar loss."""
        student, valid = match_logits("dist", student, teacher, pixels)
        return dist_loss(student, teacher, valid, self.beta, self.gamma, self.temperature)


def boundary_pixels(labels: Tensor, valid: Tensor, radius: int = 1) -> Tensor:
    """The pixels with another class within ``radius``.

    Args:
        labels: (B, h, w) int64.
        valid: (B, h, w) bool; the others are no boundary, and make none.
        radius: in pixels of this map; the neighbourhood is a square of side 2 * radius + 1.

    Returns:
        (B, h, w) bool.
    """

    def largest(values: Tensor) -> Tensor:
        grown = F.max_pool2d(values.unsqueeze(1), 2 * radius + 1, stride=1, padding=radius)
        return grown.squeeze(1)

    classes = labels.float()  # exact up to 2**24
    highest = largest(classes.masked_fill(~valid, -torch.inf))
    lowest = -largest((-classes).masked_fill(~valid, -torch.inf))
    return valid & (highest != lowest)


def bpkd_loss(
    student: Tensor,
    teacher: Tensor,
    boundary: Tensor,
    body: Tensor,
    boundary_weight: float = 50.0,
    body_weight: float = 20.0,
    temperature: float = 1.0,
) -> Tensor:
    """Boundaries and bodies apart: per-pixel KL over classes on boundaries, per-class KL over pixels within bodies.

    Liu et al., "BPKD: Boundary Privileged Knowledge Distillation For Semantic Segmentation", WACV 2024,
    arXiv 2306.08075. The logits are masked before the softmax, so that neither part sees the other's pixels. Written
    from the paper's description; boundaries are taken from the labels at the logits' resolution.

    Args:
        student: (B, K, h, w) logits.
        teacher: (B, K, h, w) logits; no gradient flows to it.
        boundary: (B, h, w) bool; its part is a mean over these pixels.
        body: (B, h, w) bool; its part is a mean over classes and over the images that have such pixels.
        boundary_weight, body_weight: factors of the two parts.
        temperature: T, divides both logits; the loss is multiplied by T^2.

    Returns:
        Scalar, float32 or wider; zero with zero gradient where no pixel counts.
    """
    with torch.autocast(student.device.type, enabled=False):
        student, teacher = promote(student), promote(teacher.detach())
        edge = mean_over_pixels(_pixel_divergence(student, teacher, temperature), boundary)
        inside = body.flatten(1)
        log_teacher = spatial_log_softmax(teacher.flatten(2) / temperature, inside)
        log_student = spatial_log_softmax(student.flatten(2) / temperature, inside)
        divergence = (log_teacher.exp() * (log_teacher - log_student)).sum(dim=2).mean(dim=1) * temperature**2
        return boundary_weight * edge + body_weight * mean_over_images(divergence, inside.any(dim=1))


class BPKDLoss(nn.Module):
    """Boundary and body distilled apart, see ``bpkd_loss``. Published weight: 1, with the parts' weights 50 and 20.

    Called as ``term(student, teacher, pixels)`` with logits (B, K, h, w); the student's are resized bilinearly to the
    teacher's size where they differ.

    Args:
        boundary_weight, body_weight: factors of the two parts.
        temperature: T.
        radius: a pixel is boundary with another class within this many pixels, at the teacher's resolution.

    Raises:
        GSKDError: an argument is not as above; or, when called, a shape or the class counts do not match.
    """

    inputs: ClassVar[Literal["features", "logits"]] = "logits"

    def __init__(
        self, boundary_weight: float = 50.0, body_weight: float = 20.0, temperature: float = 1.0, radius: int = 1
    ) -> None:
        super().__init__()
        require_positive("temperature", temperature)
        require_count("radius", radius)
        require_number("boundary_weight", boundary_weight)
        require_number("body_weight", body_weight)
        self.boundary_weight = boundary_weight
        self.body_weight = body_weight
        self.temperature = temperature
        self.radius = radius

    def forward(self, student: Tensor, teacher: Tensor, pixels: Pixels) -> Tensor:
        """Returns the scalar loss."""
        student, valid = match_logits("bpkd", student, teacher, pixels)
        boundary = boundary_pixels(pixels.labels_at((teacher.shape[2], teacher.shape[3])), valid, self.radius)
        return bpkd_loss(
            student, teacher, boundary, valid & ~boundary, self.boundary_weight, self.body_weight, self.temperature
        )
