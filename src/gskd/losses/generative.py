"""Distillation by completion: from the part of the student's map that is left, a small network makes the teacher's.

Shape suffixes: B images, C channels, G channel groups, N places of a patch.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gskd.distributed import mean_over_processes
from gskd.errors import GSKDError
from gskd.losses._match import match_maps, require_count, require_number, require_positive, width_projector
from gskd.losses._pixels import Pixels, promote, require_maps
from gskd.losses._reduce import masked_max_pool
from gskd.losses.features import mse_loss


class _Completion(nn.Module):
    """Masks pixels of a map at random and completes it: conv3x3, ReLU, conv3x3.

    Args:
        channels: C.
        mask_ratio: share of the pixels that are masked, 0 <= ratio < 1.
    """

    def __init__(self, channels: int, mask_ratio: float) -> None:
        super().__init__()
        if isinstance(mask_ratio, bool) or not isinstance(mask_ratio, int | float) or not 0 <= mask_ratio < 1:
            raise GSKDError(f"mask_ratio: expected a number with 0 <= ratio < 1, got {mask_ratio!r}")
        self.mask_ratio = mask_ratio
        self.enter = nn.Conv2d(channels, channels, 3, padding=1)
        self.leave = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, maps: Tensor, valid: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w). Ignored pixels are always masked: their neighbours must not see them."""
        kept = valid & (torch.rand(valid.shape, device=valid.device) >= self.mask_ratio)
        with torch.autocast(maps.device.type, enabled=False):
            maps = torch.where(kept.unsqueeze(1), maps.to(self.enter.weight.dtype), 0.0)
            completed: Tensor = self.leave(F.relu(self.enter(maps)))
        return completed


def _channels(name: str, student_channels: int | None, teacher_channels: int | None) -> tuple[int, nn.Conv2d | None]:
    projector = width_projector(name, student_channels, teacher_channels)
    if teacher_channels is None:
        raise GSKDError(f"{name}: needs student_channels and teacher_channels, the widths of the features; got None")
    return teacher_channels, projector


class MGDLoss(nn.Module):
    """Masked generative distillation: mean squared error between the completed map and the teacher's.

    Yang et al., "Masked Generative Distillation", ECCV 2022, arXiv 2205.01529, equations 3 and 4. The published loss
    sums over channels and pixels and divides by the images; this one is a mean over them all, so that it does not
    depend on the crop: a published weight w is w * Ct * h * w here (2e-5 with 2048 channels and 64 x 64 pixels is 168).
    It was published for the last stage of the backbone, where it is cheap: tap ``encoder[-1]`` of
    segmentation_models_pytorch, ``backbone.layer4`` of torchvision.

    Called as ``term(student, teacher, pixels)`` with maps (B, Cs, h', w') and (B, Ct, h, w); the student's map is
    resized bilinearly to the teacher's size where they differ. Costs two 3x3 convolutions of width Ct.

    Args:
        student_channels: Cs; where it differs from Ct, a 1x1 convolution comes first.
        teacher_channels: Ct.
        mask_ratio: share of the student's pixels that are masked; 0.75 as published for segmentation.

    Raises:
        GSKDError: an argument is not as above; or, when called, shapes or widths do not match.
    """

    inputs: ClassVar[Literal["features", "logits"]] = "features"

    def __init__(
        self, student_channels: int | None = None, teacher_channels: int | None = None, mask_ratio: float = 0.75
    ) -> None:
        super().__init__()
        channels, self.projector = _channels("mgd", student_channels, teacher_channels)
        self.completion = _Completion(channels, mask_ratio)

    def forward(self, student: Tensor, teacher: Tensor, pixels: Pixels) -> Tensor:
        """Returns the scalar loss."""
        require_maps("mgd: teacher", teacher, channels=self.completion.enter.in_channels)
        student, valid = match_maps("mgd", student, teacher, pixels, self.projector)
        return mse_loss(self.completion(student, valid), teacher, valid)


class _L1Distances(torch.autograd.Function):
    """``torch.cdist`` with p 1, whose own backward pass on CUDA keeps every difference: 8.6 GB at the usual sizes."""

    @staticmethod
    def forward(ctx: Any, points: Tensor, others: Tensor) -> Tensor:
        ctx.save_for_backward(points, others)
        return torch.cdist(points, others, p=1.0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        points, others = ctx.saved_tensors
        columns = [
            ((points[..., c : c + 1] - others[..., c : c + 1].mT).sign() * gradients[0]).sum(dim=-1)
            for c in range(points.shape[-1])
        ]
        return torch.stack(columns, dim=-1), None


def l1_distances(points: Tensor, others: Tensor) -> Tensor:
    """L1 distances of vectors, (B, N, C) and (B, M, C) -> (B, N, M), with a gradient to ``points`` alone.

    Memory is that of the result, in the backward pass too.
    """
    distances: Tensor = _L1Distances.apply(points, others)  # type: ignore[no-untyped-call]
    return distances


def omni_contrast(
    student: Tensor, teacher: Tensor, valid: Tensor, groups: int = 16, patch: int = 4, temperature: float = 0.07
) -> Tensor:
    """Every place and channel group of the student should be nearest to its own of the teacher, within a patch.

    Fan et al., "Augmentation-free Dense Contrastive Knowledge Distillation for Efficient Semantic Segmentation",
    NeurIPS 2023, omni-contrasting: similarity is the negative L1 distance over tau, the negatives are the other channel
    groups at all places of the patch.

    Args:
        student: (B, C, h, w).
        teacher: (B, C, h, w); no gradient flows to it.
        valid: (B, h, w) bool; the others are neither anchors nor negatives.
        groups: G, divides C; at least 2.
        patch: side of a patch in pixels; at most h and w. What remains at the right and bottom edge is left out.
        temperature: tau; > 0.

    Returns:
        Scalar, float32 or wider: the cross-entropy in nats, mean over anchors of all processes; zero with zero gradient
        where there is none.
    """
    with torch.autocast(student.device.type, enabled=False):
        patch = min(patch, *student.shape[2:])
        rows, columns = (side // patch * patch for side in student.shape[2:])
        places = patch * patch

        def cut(maps: Tensor) -> Tensor:
            """(B, C, h, w) -> (patches, N * G, C / G)."""
            batch, channels = maps.shape[:2]
            maps = maps[:, :, :rows, :columns]
            maps = maps.reshape(batch, groups, channels // groups, rows // patch, patch, columns // patch, patch)
            return maps.permute(0, 3, 5, 4, 6, 1, 2).reshape(-1, places * groups, channels // groups)

        similarity = -l1_distances(cut(promote(student)), cut(promote(teacher.detach()))) / temperature
        flags = valid[:, :rows, :columns].reshape(-1, rows // patch, patch, columns // patch, patch)
        flags = flags.transpose(2, 3).reshape(-1, places).repeat_interleave(groups, dim=1)
        group = torch.arange(groups, device=flags.device).repeat(places)
        own = torch.eye(places * groups, dtype=torch.bool, device=flags.device)
        allowed = ((group.unsqueeze(0) != group.unsqueeze(1)) & flags.unsqueeze(1)) | own
        similarity = similarity.masked_fill(~allowed, -1e30)
        losses = similarity.logsumexp(dim=2) - similarity.diagonal(dim1=1, dim2=2)
        return mean_over_processes(torch.where(flags, losses, 0.0).sum(), flags.sum())


class AFDCDLoss(nn.Module):
    """Augmentation-free dense contrastive distillation: a completed map, by error and by ``omni_contrast``.

    Published weights, on sums: 2e-6 for the error and 0.005 for the contrast on Cityscapes (8e-6 and 0.01 on CamVid).
    Here both parts are means, so that they do not depend on the crop; with C 2048 and 64 x 128 pixels the former are
    ``mimic_weight`` 33.5 and, with 16 groups, ``contrast_weight`` 0.08, the defaults. The term's own weight is then 1.

    Called as ``term(student, teacher, pixels)`` with maps (B, Cs, h', w') and (B, Ct, h, w); the student's map is
    resized bilinearly to the teacher's size where they differ. Costs two 3x3 convolutions of width Ct.

    Args:
        student_channels: Cs; where it differs from Ct, a 1x1 convolution comes first.
        teacher_channels: Ct.
        mask_ratio: share of the student's pixels that are masked.
        groups: channel groups of the contrast; must divide Ct.
        pool: both maps are max-pooled by this factor before the contrast; 1 leaves them.
        patch: side of a patch of the contrast, in pooled pixels.
        temperature: tau.
        mimic_weight, contrast_weight: factors of the two parts.

    Raises:
        GSKDError: an argument is not as above; or, when called, shapes or widths do not match.
    """

    inputs: ClassVar[Literal["features", "logits"]] = "features"

    def __init__(
        self,
        student_channels: int | None = None,
        teacher_channels: int | None = None,
        mask_ratio: float = 0.75,
        groups: int = 16,
        pool: int = 4,
        patch: int = 4,
        temperature: float = 0.07,
        mimic_weight: float = 33.5,
        contrast_weight: float = 0.08,
    ) -> None:
        super().__init__()
        channels, self.projector = _channels("afdcd", student_channels, teacher_channels)
        require_count("groups", groups, least=2)
        require_count("pool", pool)
        require_count("patch", patch)
        require_positive("temperature", temperature)
        require_number("mimic_weight", mimic_weight)
        require_number("contrast_weight", contrast_weight)
        if channels % groups:
            raise GSKDError(f"groups: expected a divisor of the teacher's {channels} channels, got {groups}")
        self.completion = _Completion(channels, mask_ratio)
        self.groups = groups
        self.pool = pool
        self.patch = patch
        self.temperature = temperature
        self.mimic_weight = mimic_weight
        self.contrast_weight = contrast_weight

    def forward(self, student: Tensor, teacher: Tensor, pixels: Pixels) -> Tensor:
        """Returns the scalar loss."""
        require_maps("afdcd: teacher", teacher, channels=self.completion.enter.in_channels)
        student, valid = match_maps("afdcd", student, teacher, pixels, self.projector)
        completed = self.completion(student, valid)
        mimic = mse_loss(completed, teacher, valid)
        with torch.autocast(student.device.type, enabled=False):
            target = teacher.detach().to(promote(completed).dtype)
            pooled = [masked_max_pool(maps, valid, self.pool) for maps in (completed, target)]
            (made, there), (wanted, _) = pooled
            contrast = omni_contrast(made, wanted, there, self.groups, self.patch, self.temperature)
        return self.mimic_weight * mimic + self.contrast_weight * contrast
