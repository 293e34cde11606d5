"""Distillation of feature maps, place by place: the values themselves, their energy, or how a channel spreads.

Shape suffixes: B images, C channels, P pixels.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from gskd.losses._match import match_maps, require_flag, require_positive, width_projector
from gskd.losses._pixels import Pixels, match_size, promote, require_pair
from gskd.losses._reduce import mean_over_images, mean_over_pixels, spatial_log_softmax, unit_length


def mse_loss(student: Tensor, teacher: Tensor, valid: Tensor, normalise: bool = False) -> Tensor:
    """Squared difference of features, mean over channels and over the valid pixels of all processes.

    Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015, arXiv 1412.6550, equation 3, as a mean.

    Args:
        student: (B, C, h, w).
        teacher: (B, C, h, w); no gradient flows to it.
        valid: (B, h, w) bool, the pixels that count.
        normalise: divide each pixel's feature by its L2 norm over the channels first; a zero feature stays zero, with
            zero gradient.

    Returns:
        Scalar, float32 or wider; zero with zero gradient where no pixel counts.
    """
    with torch.autocast(student.device.type, enabled=False):
        student, teacher = promote(student), promote(teacher.detach())
        if normalise:
            student, teacher = unit_length(student, dim=1), unit_length(teacher, dim=1)
        return mean_over_pixels((student - teacher).square().mean(dim=1), valid)


class MSELoss(nn.Module):
    """Feature distillation, see ``mse_loss``. Published weight: 10.

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
        require_flag("normalise", normalise)
        self.normalise = normalise
        self.projector = width_projector("mse", student_channels, teacher_channels)

    def forward(self, student: Tensor, teacher: Tensor, pixels: Pixels) -> Tensor:
        """Returns the scalar loss."""
        student, valid = match_maps("mse", student, teacher, pixels, self.projector)
        return mse_loss(student, teacher, valid, self.normalise)


def attention_map(features: Tensor, valid: Tensor) -> Tensor:
    """Where a layer is active: the mean square over channels, of length 1 over the valid pixels of each image.

    Args:
        features: (B, C, h, w).
        valid: (B, h, w) bool.

    Returns:
        (B, h * w), float32 or wider; zero at ignored pixels.
    """
    energy = torch.where(valid, promote(features).square().mean(dim=1), 0.0).flatten(1)
    # The length does not depend on a factor, but the fourth powers in it leave fp32's range without one.
    largest = energy.detach().amax(dim=1, keepdim=True)
    return unit_length(energy / torch.where(largest > 0, largest, 1.0), dim=1)


def at_loss(student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
    """Squared distance of the two attention maps of an image, mean over the images of all processes.

    Zagoruyko and Komodakis, "Paying More Attention to Attention", ICLR 2017, arXiv 1612.03928, section 3.1. The maps
    have length 1 and are compared by their distance, as in the paper, so the value does not depend on the map's size.
    Public segmentation code takes the mean over the P pixels instead: its weight w is w / P here.

    Args:
        student: (B, Cs, h, w); the widths may differ.
        teacher: (B, Ct, h, w); no gradient flows to it.
        valid: (B, h, w) bool, the pixels that count.

    Returns:
        Scalar, float32 or wider; zero with zero gradient where no pixel counts.
    """
    with torch.autocast(student.device.type, enabled=False):
        difference = attention_map(student, valid) - attention_map(teacher.detach(), valid)
        return mean_over_images(difference.square().sum(dim=1), valid.flatten(1).any(dim=1))


class ATLoss(nn.Module):
    """Attention transfer, see ``at_loss``. Published weight: 1e4 on a mean over 64 x 128 pixels, which is 1.2 here.

    Called as ``term(student, teacher, pixels)`` with maps (B, Cs, h', w') and (B, Ct, h, w); the student's map is
    resized bilinearly to the teacher's size where they differ. Widths need not match.

    Raises:
        GSKDError: when called, a shape does not match.
    """

    inputs: ClassVar[Literal["features", "logits"]] = "features"

    def forward(self, student: Tensor, teacher: Tensor, pixels: Pixels) -> Tensor:
        """Returns the scalar loss."""
        require_pair(student, teacher, pixels)
        size = (teacher.shape[2], teacher.shape[3])
        return at_loss(match_size(student, size), teacher, pixels.valid_at(size))


def cwd_loss(student: Tensor, teacher: Tensor, valid: Tensor, temperature: float = 4.0) -> Tensor:
    """``T^2 * KL(teacher || student)`` of each channel as a distribution over the pixels of an image.

    Shu et al., "Channel-wise Knowledge Distillation for Dense Prediction", ICCV 2021, arXiv 2011.13256, equation 4.
    Summed over the pixels, mean over the channels and over the images of all processes.

    Args:
        student: (B, C, h, w) logits or features.
        teacher: (B, C, h, w); no gradient flows to it.
        valid: (B, h, w) bool, the pixels that count.
        temperature: T, divides both maps; > 0.

    Returns:
        Scalar, float32 or wider; zero with zero gradient where no pixel counts.
    """
    with torch.autocast(student.device.type, enabled=False):
        inside = valid.flatten(1)
        log_teacher = spatial_log_softmax(promote(teacher.detach()).flatten(2) / temperature, inside)
        log_student = spatial_log_softmax(promote(student).flatten(2) / temperature, inside)
        divergence = (log_teacher.exp() * (log_teacher - log_student)).sum(dim=2).mean(dim=1)
        return mean_over_images(divergence, inside.any(dim=1)) * temperature**2


class CWDLoss(nn.Module):
    """Channel-wise distillation, see ``cwd_loss``. Published weights: 3 on logits, 50 on features, both with T 4.

    Called as ``term(student, teacher, pixels)`` with maps (B, Cs, h', w') and (B, Ct, h, w), logits by default; the
    student's map is resized bilinearly to the teacher's size where they differ.

    Args:
        temperature: T, 4 as published.
        student_channels: Cs. Needed, with ``teacher_channels``, where the widths differ: a 1x1 convolution then maps
            the student to the teacher's width. It is part of this module's parameters.
        teacher_channels: Ct.

    Raises:
        GSKDError: T is not positive, only one width is given; or, when called, shapes or widths do not match.
    """

    inputs: ClassVar[Literal["features", "logits"]] = "logits"

    def __init__(
        self, temperature: float = 4.0, student_channels: int | None = None, teacher_channels: int | None = None
    ) -> None:
        super().__init__()
        require_positive("temperature", temperature)
        self.temperature = temperature
        self.projector = width_projector("cwd", student_channels, teacher_channels)

    def forward(self, student: Tensor, teacher: Tensor, pixels: Pixels) -> Tensor:
        """Returns the scalar loss."""
        student, valid = match_maps("cwd", student, teacher, pixels, self.projector)
        return cwd_loss(student, teacher, valid, self.temperature)


def refine_by_attention(features: Tensor, valid: Tensor) -> Tensor:
    """Features scaled by how active their channel and then their place is, each between 0 and 1.

    The order and the pooling (mean plus maximum) are those of CBAM: Woo et al., ECCV 2018, arXiv 1807.06521. It has no
    parameters: the pooled activity is standardised and passed through a sigmoid, where CBAM learns a small network.

    Args:
        features: (B, C, h, w).
        valid: (B, h, w) bool; ignored pixels come out as zero and do not enter the pooling.

    Returns:
        (B, C, h, w), float32 or wider.
    """
    counted = valid.unsqueeze(1)
    features = torch.where(counted, promote(features), 0.0)
    count = counted.sum(dim=(2, 3)).clamp(min=1)
    highest = features.masked_fill(~counted, torch.finfo(features.dtype).min).amax(dim=(2, 3))
    highest = torch.where(counted.any(dim=2).any(dim=2), highest, 0.0)
    channel = features.sum(dim=(2, 3)) / count + highest
    features = features * _squash(channel, torch.ones_like(channel, dtype=torch.bool)).unsqueeze(2).unsqueeze(3)
    place = (features.mean(dim=1) + features.amax(dim=1)).flatten(1)
    return features * _squash(place, valid.flatten(1)).view_as(valid).unsqueeze(1)


def _squash(activity: Tensor, counted: Tensor) -> Tensor:
    """Sigmoid of (B, N) values brought to mean 0 and deviation 1 over those ``counted``."""
    count = counted.sum(dim=1, keepdim=True).clamp(min=1)
    centred = activity - torch.where(counted, activity, 0.0).sum(dim=1, keepdim=True) / count
    variance = torch.where(counted, centred, 0.0).square().sum(dim=1, keepdim=True) / count
    varied = variance > 0
    return (centred * torch.where(varied, variance, 1.0).rsqrt()).sigmoid()


def attnfd_loss(student: Tensor, teacher: Tensor, valid: Tensor) -> Tensor:
    """Squared distance of two maps of length 1, mean over the images of all processes.

    Mansourian et al., "Attention-guided Feature Distillation for Semantic Segmentation", 2024, arXiv 2403.05451, on
    maps that attention has refined. The published code scales by the length of the whole batch and divides by its size:
    its weight w for B images is w / B here.

    Args:
        student: (B, C, h, w), refined.
        teacher: (B, C, h, w), refined; no gradient flows to it.
        valid: (B, h, w) bool, the pixels that count.

    Returns:
        Scalar, float32 or wider; zero with zero gradient where no pixel counts.
    """
    with torch.autocast(student.device.type, enabled=False):
        counted = valid.unsqueeze(1)
        student, teacher = (
            unit_length(torch.where(counted, promote(maps), 0.0).flatten(1), dim=1)
            for maps in (student, teacher.detach())
        )
        return mean_over_images((student - teacher).square().sum(dim=1), valid.flatten(1).any(dim=1))


class AttnFDLoss(nn.Module):
    """Distillation of features refined by attention, see ``refine_by_attention`` and ``attnfd_loss``.

    Published weight: 2 for 6 images, which is about 0.33 here. Deviates from the publication: there both networks carry
    a learned CBAM; here the refinement has no parameters, so that neither side can learn to hide a difference.

    Called as ``term(student, teacher, pixels)`` with maps (B, Cs, h', w') and (B, Ct, h, w); the student's map is
    resized bilinearly to the teacher's size where they differ. Name one term for each layer to distil several.

    Args:
        student_channels: Cs. Needed, with ``teacher_channels``, where the widths differ: a 1x1 convolution then maps
            the student to the teacher's width. It is part of this module's parameters.
        teacher_channels: Ct.

    Raises:
        GSKDError: only one width is given; or, when called, shapes or widths do not match.
    """

    inputs: ClassVar[Literal["features", "logits"]] = "features"

    def __init__(self, student_channels: int | None = None, teacher_channels: int | None = None) -> None:
        super().__init__()
        self.projector = width_projector("attnfd", student_channels, teacher_channels)

    def forward(self, student: Tensor, teacher: Tensor, pixels: Pixels) -> Tensor:
        """Returns the scalar loss."""
        student, valid = match_maps("attnfd", student, teacher, pixels, self.projector)
        with torch.autocast(student.device.type, enabled=False):
            student, teacher = (refine_by_attention(maps, valid) for maps in (student, teacher.detach()))
            return attnfd_loss(student, teacher, valid)
