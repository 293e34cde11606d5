"""Holistic distillation: the student's map of class probabilities should look like one of the teacher's to a critic."""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from gskd.losses._match import match_logits, require_count, require_number
from gskd.losses._pixels import Pixels, promote, require_maps
from gskd.losses._reduce import mean_over_images

_ATTENDED = 32  # the longest side, in pixels, of the map that the critic attends to


class Critic(nn.Module):
    """Maps of class probabilities -> one score per image: strided convolutions, self-attention, mean.

    Args:
        num_classes: K.
        width: channels of the first convolution, doubled by each of the next two.
    """

    def __init__(self, num_classes: int, width: int = 64) -> None:
        super().__init__()
        self.num_classes = num_classes
        widths = [num_classes, width, 2 * width, 4 * width]
        self.convs = nn.ModuleList(
            nn.Conv2d(before, after, 4, stride=2, padding=2) for before, after in pairwise(widths)
        )
        self.query = nn.Conv2d(widths[-1], width // 2, 1)
        self.key = nn.Conv2d(widths[-1], width // 2, 1)
        self.value = nn.Conv2d(widths[-1], widths[-1], 1)
        self.gate = nn.Parameter(torch.zeros(()))
        self.score = nn.Conv2d(widths[-1], 1, 1)

    def forward(self, maps: Tensor) -> Tensor:
        """(B, K, h, w) -> (B,)."""
        for conv in self.convs:
            maps = F.leaky_relu(conv(maps), 0.1)
        # Full-size logits would make a map of all pairs of their pixels: what is attended to is pooled.
        window = -(-max(maps.shape[2:]) // _ATTENDED)
        pooled = F.avg_pool2d(maps, window, ceil_mode=True) if window > 1 else maps
        query, key, value = self.query(maps).flatten(2), self.key(pooled).flatten(2), self.value(pooled).flatten(2)
        # Written out: the fused attention has no second derivative, which the gradient penalty needs.
        attention = (query.mT @ key / query.shape[1] ** 0.5).softmax(dim=2)
        maps = maps + self.gate * (value @ attention.mT).view_as(maps)
        scores: Tensor = self.score(maps).mean(dim=(1, 2, 3))
        return scores


class AdversarialLoss(nn.Module):
    """Holistic part of structured distillation: a Wasserstein critic with gradient penalty. Published weight: 0.1.

    Liu et al., "Structured Knowledge Distillation for Semantic Segmentation", CVPR 2019, arXiv 1903.04197, equations 3
    and 4. The critic is part of this module's parameters and is trained by the same optimiser in the same step: the
    value is the sum of the student's loss, whose gradient reaches the student only, and of the critic's, whose gradient
    reaches the critic only. The term's weight scales both, which makes no difference to the critic under Adam.

    Deviates from the paper: the critic does not see the image, and has three convolutions and one attention where the
    paper has five and two; distances between maps are root mean squares over pixels, so that the scale does not depend
    on the crop. Ignored pixels are zero in both maps.

    Called as ``term(student, teacher, pixels)`` with logits (B, K, h, w); the student's are resized bilinearly to the
    teacher's size where they differ. Not for ``torch.compile``: the penalty differentiates inside the forward pass.

    Args:
        num_classes: K.
        width: of the critic.
        penalty: weight of the gradient penalty; 10 as published.

    Raises:
        GSKDError: an argument is not as above; or, when called, a shape or the class counts do not match.
    """

    inputs: ClassVar[Literal["features", "logits"]] = "logits"

    def __init__(self, num_classes: int, width: int = 64, penalty: float = 10.0) -> None:
        super().__init__()
        require_count("num_classes", num_classes)
        require_count("width", width, least=2)
        require_number("penalty", penalty)
        self.critic = Critic(num_classes, width)
        self.penalty = penalty

    def forward(self, student: Tensor, teacher: Tensor, pixels: Pixels) -> Tensor:
        """Returns the scalar loss."""
        student, valid = match_logits("adversarial", student, teacher, pixels)
        require_maps("adversarial: student logits", student, channels=self.critic.num_classes)
        with torch.autocast(student.device.type, enabled=False):
            weights = {name: promote(parameter) for name, parameter in self.critic.named_parameters()}
            fake, real = (
                torch.where(valid.unsqueeze(1), promote(logits).softmax(dim=1), 0.0).to(weights["gate"].dtype)
                for logits in (student, teacher.detach())
            )
            to_student = -self._scores(fake, {name: weight.detach() for name, weight in weights.items()})
            fake = fake.detach()
            steepness = self._steepness(fake, real, weights)
            to_critic = self._scores(fake, weights) - self._scores(real, weights) + self.penalty * steepness
            return mean_over_images(to_student + to_critic, valid.flatten(1).any(dim=1))

    def _scores(self, maps: Tensor, weights: dict[str, Tensor]) -> Tensor:
        """(B,) scores by a critic of these weights."""
        scores: Tensor = functional_call(self.critic, weights, maps)
        return scores

    def _steepness(self, fake: Tensor, real: Tensor, weights: dict[str, Tensor]) -> Tensor:
        """(B,) squared distance from 1 of the gradient's length at a random place between the two.

        Lengths are over the root mean square of the pixels, not their sum, so that larger maps are no farther apart.
        """
        share = torch.rand(fake.shape[0], 1, 1, 1, device=fake.device, dtype=fake.dtype)
        with torch.inference_mode(False), torch.enable_grad():  # of a validation loss too
            between = (share * real + (1 - share) * fake).requires_grad_()
            (slope,) = torch.autograd.grad(self._scores(between, weights).sum(), between, create_graph=True)
        pixels = slope.shape[2] * slope.shape[3]
        return (slope.flatten(1).square().sum(dim=1) * pixels + 1e-12).sqrt().sub(1).square()
