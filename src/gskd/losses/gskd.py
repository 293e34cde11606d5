"""Global structural knowledge distillation: the student keeps the similarities between far-apart pixels of all classes.

Park, Ahn, Choi, Min, "Global Structural Knowledge Distillation for Semantic Segmentation", IEEE Access 2025,
DOI 10.1109/ACCESS.2025.3575066. A few pixels of every class (class-balanced sampling, CBS) give one M x M map of
cosines for the teacher and one for the student (global structural similarity map, GSSM). A random partition of the
entries (sub-image descriptors, SID) turns each map into distributions, which are compared by KL divergence.

Shape suffixes: B images, N points per class, M points, C channels, G groups, S columns per group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from gskd.distributed import mean_over_processes
from gskd.errors import GSKDError, near_names
from gskd.losses._match import PointProjector, require_count, require_flag, require_positive
from gskd.losses._pixels import Pixels, Size, promote, require_maps, require_pair
from gskd.losses._sampling import (
    POLICIES,
    Policy,
    SampledPoints,
    class_balanced_sample,
    read_points,
    uniform_sample,
)

__all__ = [
    "ColumnGroups",
    "GSKDLoss",
    "SampledPoints",
    "StructuralTarget",
    "class_balanced_sample",
    "group_columns",
    "gskd_loss",
    "random_row_permutation",
    "read_points",
    "structural_similarity_map",
    "sub_image_descriptors",
    "uniform_sample",
]

_PADDING = -1e30  # finite, so that a group of padding alone gives a uniform distribution and not NaN
_BYTES_PER_ENTRY = 45  # of a similarity map, at the peak of forward and backward as benchmarks/loss_cost.py measures it
_MOST_ENTRIES = 2**28  # of all maps of a batch: 11 GiB
_TIE_BITS = 16  # two columns of a row draw the same key with probability 2**-16 at most; the lower one then goes first


class ColumnGroups(NamedTuple):
    """Which entries of the similarity map form which descriptor; the same for teacher and student."""

    entry: Tensor
    """(B, G, M, S) int64 positions in the flattened (M * M) map."""
    mask: Tensor
    """(B, G, M, S) bool; the others are padding."""
    weight: Tensor
    """(B, G) float32, the group's share of the image's entries: sums to 1, or to 0 for an image without points."""


@dataclass(frozen=True)
class StructuralTarget:
    """All that GSKD needs of the teacher: which pixels were sampled, and how similar the teacher finds them."""

    index: Tensor
    """(B, M) int64 positions in the flattened (h * w) map of the teacher."""
    valid: Tensor
    """(B, M) bool; the others are padding."""
    class_count: Tensor
    """(B,) int64, the number of classes sampled."""
    similarity: Tensor
    """(B, M, M) the teacher's cosines."""
    size: Size
    """(h, w) that ``index`` refers to."""


def structural_similarity_map(points: Tensor, valid: Tensor | None = None) -> Tensor:
    """Cosines between all pairs of points.

    Args:
        points: (B, M, C).
        valid: (B, M) bool; the others read as zero vectors. All by default.

    Returns:
        (B, M, M), float32 or wider. A zero vector has cosine 0 with every point, and gets zero gradient.
    """
    with torch.autocast(points.device.type, enabled=False):
        points = promote(points)
        squares = points.square().sum(dim=2, keepdim=True)
        real = squares != 0  # not > 0: what is not a number must stay one, not read as a zero vector
        if valid is not None:
            real = real & valid.unsqueeze(2)
        scale = torch.where(real, squares, 1.0).rsqrt()
        unit = torch.where(real, points * scale, 0.0)
        return unit @ unit.mT


def random_row_permutation(valid: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """A random permutation of the columns for every row of the similarity map, valid columns first.

    Args:
        valid: (B, M) bool.
        generator: source of randomness on the device of ``valid``; the global one by default.

    Returns:
        (B, M, M) int64; row i holds the columns of row i in shuffled order.
    """
    batch, points = valid.shape
    shape, device = (batch, points, points), valid.device
    last = (~valid).unsqueeze(1)
    bits = 30 - (batch * points).bit_length()
    if bits < _TIE_BITS:
        return (torch.rand(shape, device=device, generator=generator) + last).argsort(dim=2)
    # One flat int32 sort by (row, invalid, random) takes the radix path on CPU: half the time of sorting row by row.
    row = torch.arange(batch * points, device=device, dtype=torch.int32).view(batch, points, 1)
    key = torch.randint(1 << bits, shape, dtype=torch.int32, device=device, generator=generator)
    key = key + ((row << (bits + 1)) + (last.int() << bits))
    return key.flatten().argsort().view(shape) - row * points


def group_columns(
    order: Tensor, valid: Tensor, group_size: int | Tensor, shape: tuple[int, int] | None = None
) -> ColumnGroups:
    """Cuts the shuffled columns of every row into groups of S; the last group takes what remains.

    Args:
        order: (B, M, M) int64, a permutation of the columns per row, valid columns first.
        valid: (B, M) bool.
        group_size: S for all images, or (B,) int64 with one S each.
        shape: (G, largest S) of the result; needed where ``group_size`` is a tensor, as its values stay on the device.

    Returns:
        The groups, padded where an image has fewer points, groups or columns per group.
    """
    batch, points = valid.shape
    if isinstance(group_size, int):
        width = min(group_size, points)
        groups = -(-points // width)
        size = torch.full((1, 1, 1), width, dtype=torch.int64, device=order.device)
    else:
        assert shape is not None, "a tensor of group sizes needs the static shape"
        groups, width = shape
        size = group_size.view(-1, 1, 1)
    slot = torch.arange(width, device=order.device)
    rank = torch.arange(groups, device=order.device).unsqueeze(1) * size + slot
    count = valid.sum(dim=1).view(-1, 1, 1)
    real = (slot < size) & (rank < count)  # (B, G, S)
    rank = rank.clamp(max=points - 1).expand(batch, -1, -1).flatten(1)
    column = order.gather(2, rank.unsqueeze(1).expand(-1, points, -1))
    row = torch.arange(points, device=order.device).unsqueeze(1)
    entry = (column + row * points).view(batch, points, groups, width).transpose(1, 2).contiguous()
    mask = real.unsqueeze(2) & valid.view(batch, 1, points, 1)
    weight = real.sum(dim=2) / count.squeeze(2).clamp(min=1)
    return ColumnGroups(entry, mask, weight)


def sub_image_descriptors(similarity: Tensor, groups: ColumnGroups, temperature: float = 1.0) -> Tensor:
    """The map's entries, group by group, as one log-distribution each.

    Args:
        similarity: (B, M, M) cosines.
        groups: from ``group_columns``.
        temperature: tau, divides the cosines; > 0.

    Returns:
        (B, G, M * S) log-probabilities, dtype of ``similarity``. Padding has probability 0, and gets zero gradient.
    """
    batch, count = groups.entry.shape[:2]
    entries = similarity.flatten(1).gather(1, groups.entry.flatten(1)).view(batch, count, -1)
    if temperature != 1.0:
        entries = entries / temperature
    return entries.masked_fill(~groups.mask.flatten(2), _PADDING).log_softmax(dim=2)


def gskd_loss(
    student: Tensor, teacher: Tensor, valid: Tensor, groups: ColumnGroups, temperature: float = 1.0
) -> Tensor:
    """The GSKD loss of sampled points and a given partition.

    ``tau^2 * KL(teacher || student)``, summed over a descriptor's entries, averaged over the groups (by their share of
    the entries) and over the images of all processes that have points.

    Args:
        student: (B, M, Cs) features at the points.
        teacher: (B, M, Ct) features at the same points; no gradient flows to it.
        valid: (B, M) bool, the others are padding.
        groups: from ``group_columns``.
        temperature: tau; > 0.

    Returns:
        Scalar, float32 or wider; zero with zero gradient where no image has points.
    """
    with torch.autocast(student.device.type, enabled=False):
        with torch.no_grad():
            target = structural_similarity_map(teacher, valid)
        return _map_divergence(structural_similarity_map(student, valid), target, valid, groups, temperature)


def _map_divergence(
    student: Tensor, teacher: Tensor, valid: Tensor, groups: ColumnGroups, temperature: float
) -> Tensor:
    """``gskd_loss`` of two similarity maps (B, M, M)."""
    with torch.no_grad():
        target = sub_image_descriptors(teacher, groups, temperature)
        probability = target.exp()
    descriptors = sub_image_descriptors(student, groups, temperature)
    divergence = (probability * (target - descriptors)).sum(dim=2)  # (B, G)
    total = (divergence * groups.weight).sum() * temperature**2
    return mean_over_processes(total, valid.any(dim=1).sum())


class GSKDLoss(nn.Module):
    """Global structural knowledge distillation, see ``gskd_loss``.

    Called as ``term(student, teacher, pixels)`` with features (B, Cs, h', w') and (B, Ct, h, w): neither widths nor
    sizes need to match. Only the sampled points are read. Work and memory grow with M^2 per image, M = N x K whatever
    classes an image holds: about 45 bytes B M^2, 250 MiB for 4 images of 19 classes with 64 points each.

    Args:
        samples_per_class: N; 8 as published.
        group_size: S; "classes" as published (the number of classes found in the image, hence G = N), a fixed number,
            or "all": one descriptor of the whole map, nothing shuffled.
        temperature: tau; 1 as published.
        only_correct: sample only pixels that the teacher classifies correctly; needs ``pixels.teacher_logits``.
        sampling: "classes" as published, or "uniform": as many points from all eligible pixels alike, so that a class
            counts by its share of the image.
        policy: for a class with fewer than N pixels, see ``class_balanced_sample``.
        max_classes: the most classes sampled in one image, at random when there are more; bounds M where K is large.
        projector: pass the student's points through ``PointProjector`` first, as the published recipe does.
        student_channels: Cs, needed with ``projector``.
        teacher_channels: width the projector maps to; Cs by default.
        generator: source of randomness on the features' device; the global one by default. Not for ``torch.compile``.

    Raises:
        GSKDError: an argument is not as above; or, when called, a shape does not match, teacher logits are missing, or
            B M^2 is above 2^28.
    """

    inputs: ClassVar[Literal["features", "logits"]] = "features"

    def __init__(
        self,
        samples_per_class: int = 8,
        group_size: Literal["classes", "all"] | int = "classes",
        temperature: float = 1.0,
        only_correct: bool = True,
        sampling: Literal["classes", "uniform"] = "classes",
        policy: Policy = "repeat",
        max_classes: int | None = None,
        projector: bool = False,
        student_channels: int | None = None,
        teacher_channels: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if group_size not in ("classes", "all"):
            require_count("group_size", group_size, or_else="'classes', 'all' or ")
        require_count("samples_per_class", samples_per_class)
        if max_classes is not None:
            require_count("max_classes", max_classes, or_else="None or ")
        require_flag("only_correct", only_correct)
        require_flag("projector", projector)
        require_positive("temperature", temperature)
        for name, value, known in (("policy", policy, POLICIES), ("sampling", sampling, ("classes", "uniform"))):
            if value not in known:
                raise GSKDError(f"{name}: unknown {value!r}{near_names(str(value), known)}")
        if sampling == "uniform" and max_classes is not None:
            raise GSKDError("max_classes: means nothing with sampling 'uniform'; expected None")
        self.samples_per_class = samples_per_class
        self.group_size = group_size
        self.temperature = temperature
        self.only_correct = only_correct
        self.sampling = sampling
        self.policy: Policy = policy
        self.max_classes = max_classes
        self.generator = generator
        self.projector: PointProjector | None = None
        if projector:
            if student_channels is None:
                raise GSKDError(
                    "gskd: projector=True needs student_channels, the width of the student's features; got None"
                )
            self.projector = PointProjector(student_channels, teacher_channels or student_channels)

    def forward(self, student: Tensor, teacher: Tensor, pixels: Pixels) -> Tensor:
        """Returns the scalar loss: `compare` with the teacher's `target`."""
        require_pair(student, teacher, pixels)
        return self.compare(student, self.target(teacher, pixels), pixels)

    @torch.no_grad()
    def target(
        self, teacher: Tensor, pixels: Pixels, describe: Callable[[Tensor], Tensor] = promote
    ) -> StructuralTarget:
        """Samples the points and reads the teacher there; what does not change when the student does.

        Args:
            teacher: (B, C, h, w).
            pixels: labels and, with ``only_correct``, the teacher's logits.
            describe: makes of what was read (B, M, C) what is compared (B, M, C').
        """
        if pixels.num_classes is None:
            raise GSKDError("gskd: unknown number of classes, expected Pixels(labels, teacher_logits) or num_classes=K")
        require_maps("teacher", teacher, batch=pixels.labels.shape[0])
        self._require_room(teacher.shape[0], pixels.num_classes)
        size = (teacher.shape[2], teacher.shape[3])
        with torch.autocast(teacher.device.type, enabled=False):
            eligible = pixels.teacher_correct_at(size) if self.only_correct else pixels.valid_at(size)
            sample = self._sample(pixels.labels_at(size), eligible, pixels.num_classes)
            similarity = structural_similarity_map(describe(read_points(teacher, sample.index)), sample.valid)
        return StructuralTarget(sample.index, sample.valid, sample.class_count, similarity, size)

    def compare(
        self,
        student: Tensor,
        target: StructuralTarget,
        pixels: Pixels,
        describe: Callable[[Tensor], Tensor] = promote,
    ) -> Tensor:
        """The scalar loss against a target made before with the same ``describe``; descriptors are drawn anew."""
        require_maps("student", student, batch=target.index.shape[0])
        index, valid = target.index, target.valid
        with torch.autocast(student.device.type, enabled=False):
            order = random_row_permutation(valid, self.generator)
            if self.group_size == "classes":
                slots = index.shape[1] // self.samples_per_class
                groups = group_columns(order, valid, target.class_count, (self.samples_per_class, slots))
            else:
                groups = group_columns(order, valid, index.shape[1] if self.group_size == "all" else self.group_size)
            points = describe(read_points(student, index, target.size))
            if self.projector is not None:
                require_maps("gskd: student", student, channels=self.projector.enter.in_features)
                points = self.projector(points, valid)
            similarity = structural_similarity_map(points, valid)
            return _map_divergence(similarity, target.similarity, valid, groups, self.temperature)

    def target_settings(self) -> dict[str, Any]:
        """The arguments that `target` depends on: two losses that agree in them can share stored targets."""
        names = ("samples_per_class", "only_correct", "sampling", "policy", "max_classes")
        return {"kind": "gskd", **{name: getattr(self, name) for name in names}}

    @staticmethod
    def pack(target: StructuralTarget) -> dict[str, Tensor]:
        """The target as few bytes as keep it: the map's upper triangle in fp16; the first dimension is the image."""
        rows, columns = _upper_triangle(target.similarity)
        height, width = target.size
        return {
            "index": target.index.int(),
            "valid": target.valid,
            "class_count": target.class_count.int(),
            "similarity": target.similarity[:, rows, columns].half(),
            # Holds nothing, but its shape: read from values on a GPU, the size would make the host wait for them.
            "grid": target.valid.new_zeros(target.valid.shape[0], 0, height, width),
        }

    @staticmethod
    def unpack(packed: Mapping[str, Tensor]) -> StructuralTarget:
        """The target that was packed, its cosines rounded to fp16."""
        index, half = packed["index"].long(), packed["similarity"].float()
        similarity = half.new_zeros(index.shape[0], index.shape[1], index.shape[1])
        rows, columns = _upper_triangle(similarity)
        similarity[:, rows, columns] = half
        similarity[:, columns, rows] = half
        size = (packed["grid"].shape[2], packed["grid"].shape[3])
        return StructuralTarget(index, packed["valid"], packed["class_count"].long(), similarity, size)

    def _require_room(self, batch: int, num_classes: int) -> None:
        """Refuses before anything is allocated what would exhaust the machine."""
        classes = min(num_classes, self.max_classes or num_classes)
        points = self.samples_per_class * classes
        if batch * points**2 > _MOST_ENTRIES:
            raise GSKDError(
                f"gskd: {self.samples_per_class} samples_per_class x {classes} classes are {points} points; the maps of"
                f" {batch} images would take {_BYTES_PER_ENTRY * batch * points**2 / 2**30:.0f} GiB, expected at most"
                f" {_BYTES_PER_ENTRY * _MOST_ENTRIES / 2**30:.0f}: lower samples_per_class, max_classes or the batch"
            )

    def _sample(self, labels: Tensor, eligible: Tensor, num_classes: int) -> SampledPoints:
        if self.sampling == "uniform":
            return uniform_sample(
                labels, num_classes, self.samples_per_class, eligible=eligible, generator=self.generator
            )
        return class_balanced_sample(
            labels,
            num_classes,
            self.samples_per_class,
            eligible=eligible,
            policy=self.policy,
            max_classes=self.max_classes,
            generator=self.generator,
        )


def _upper_triangle(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of the entries of (B, M, M) on and above the diagonal."""
    points = maps.shape[1]
    rows, columns = torch.triu_indices(points, points, device=maps.device).unbind()
    return rows, columns
