"""GSKD on class probabilities: the student resembles the teacher in which pixels it takes for the same classes.

Not in the paper, which compares features: there what is moved is a layer that the classifier may or may not read, here
it is the prediction. The points are the paper's, as many of a rare class as of the road, and that is what helped most
where it was measured (docs/results.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from gskd.losses._match import require_logits
from gskd.losses._pixels import Pixels, promote, require_maps
from gskd.losses._sampling import Policy
from gskd.losses.gskd import GSKDLoss, StructuralTarget


def class_probabilities(logits: Tensor) -> Tensor:
    """Of points (..., K), in at least float32."""
    return promote(logits).softmax(dim=-1)


class LogitGSKDLoss(nn.Module):
    """Global structural knowledge distillation of class probabilities; weight to start with: 10.

    `GSKDLoss` on other vectors: called as ``term(student, teacher, pixels)`` with logits (B, K, h', w') and
    (B, K, h, w), it compares the cosines between the points' probabilities, in fp32. Logits are read at the sampled
    points alone, the student's bilinearly where sizes differ, and only there is a softmax taken. Tap logits before they
    are enlarged.

    Args:
        samples_per_class, group_size, temperature, only_correct, sampling, policy, max_classes, generator: as of
            `GSKDLoss`, with the same defaults.

    Raises:
        GSKDError: as `GSKDLoss`; or the networks differ in their number of classes.
    """

    inputs: ClassVar[Literal["features", "logits"]] = "logits"

    def __init__(
        self,
        samples_per_class: int = 8,
        group_size: Literal["classes", "all"] | int = "classes",
        temperature: float = 1.0,
        only_correct: bool = True,
        sampling: Literal["classes", "uniform"] = "classes",
        policy: Policy = "repeat",
        max_classes: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.structure = GSKDLoss(
            samples_per_class=samples_per_class,
            group_size=group_size,
            temperature=temperature,
            only_correct=only_correct,
            sampling=sampling,
            policy=policy,
            max_classes=max_classes,
            generator=generator,
        )

    def forward(self, student: Tensor, teacher: Tensor, pixels: Pixels) -> Tensor:
        """Returns the scalar loss: `compare` with the teacher's `target`."""
        require_logits("gskd_logits", student, teacher, pixels)
        return self.compare(student, self.target(teacher, pixels), pixels)

    def target(self, teacher: Tensor, pixels: Pixels) -> StructuralTarget:
        """Samples the points and reads the teacher there; what does not change when the student does."""
        return self.structure.target(teacher, pixels, class_probabilities)

    def compare(self, student: Tensor, target: StructuralTarget, pixels: Pixels) -> Tensor:
        """The scalar loss against a target made before; the descriptors are drawn anew in every call."""
        require_maps("gskd_logits: student logits", student, channels=pixels.num_classes)
        return self.structure.compare(student, target, pixels, class_probabilities)

    def target_settings(self) -> dict[str, Any]:
        """The arguments that `target` depends on: two losses that agree in them can share stored targets."""
        return {**self.structure.target_settings(), "kind": "gskd_logits"}

    @staticmethod
    def pack(target: StructuralTarget) -> dict[str, Tensor]:
        """The target as few bytes as keep it, as of `GSKDLoss`."""
        return GSKDLoss.pack(target)

    @staticmethod
    def unpack(packed: Mapping[str, Tensor]) -> StructuralTarget:
        """The target that was packed, its cosines rounded to fp16."""
        return GSKDLoss.unpack(packed)
