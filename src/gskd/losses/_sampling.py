"""Class-balanced sampling (CBS): a few pixels of every class, read from feature maps of any resolution.

Shape suffixes: B images, K classes, P = h * w pixels, N points per class, L class slots, M = L * N points, C channels.
No loop over images or classes, no copy to the host: every shape follows from the arguments alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gskd.errors import GSKDError, near_names
from gskd.losses._match import require_count
from gskd.losses._pixels import Size, promote, require_maps

Policy = Literal["repeat", "fill", "mask"]
"""What happens when a class has fewer than N eligible pixels, see ``class_balanced_sample``."""

POLICIES: tuple[Policy, ...] = ("repeat", "fill", "mask")


@dataclass(frozen=True)
class SampledPoints:
    """Points drawn from a batch of label maps. The p-th class found in an image owns points p * N ... p * N + N - 1."""

    index: Tensor
    """(B, M) int64 positions in the flattened (h * w) map; 0 where not valid."""
    valid: Tensor
    """(B, M) bool; the others are padding."""
    label: Tensor
    """(B, M) int64 class of each point; -1 where not valid."""
    class_count: Tensor
    """(B,) int64, the number of classes drawn from."""


def class_balanced_sample(
    labels: Tensor,
    num_classes: int,
    samples_per_class: int = 8,
    *,
    eligible: Tensor | None = None,
    policy: Policy = "repeat",
    max_classes: int | None = None,
    generator: torch.Generator | None = None,
) -> SampledPoints:
    """Draws N pixels uniformly without replacement from every class present, image by image.

    Park et al., "Global Structural Knowledge Distillation for Semantic Segmentation", IEEE Access 2025: class-balanced
    sampling.

    Args:
        labels: (B, h, w) int64. Values outside 0 ... K - 1 (such as the ignore value) are never drawn.
        num_classes: K.
        samples_per_class: N.
        eligible: (B, h, w) bool, the pixels that may be drawn; all by default.
        policy: for a class with n < N eligible pixels. "repeat": each is taken floor(N / n) or ceil(N / n) times, so
            the classes stay balanced. "fill": the empty places go to random eligible pixels of other classes that were
            not drawn, again from the first when they run out, and to repeats when there are none (as the published
            code does). "mask": the empty places stay empty.
        max_classes: L, the most classes drawn from in one image, chosen at random when there are more; K by default.
            Bounds M = L * N where K is large.
        generator: source of randomness on the device of ``labels``; the global one by default.

    Returns:
        The points; M = min(K, max_classes) * N whatever the labels hold.

    Raises:
        GSKDError: an argument is not as above.
    """
    if labels.dim() != 3 or labels.dtype != torch.int64:
        raise GSKDError(f"labels: expected (B, h, w) int64, got {tuple(labels.shape)} {labels.dtype}")
    if eligible is not None and (eligible.shape != labels.shape or eligible.dtype != torch.bool):
        raise GSKDError(f"eligible: expected {tuple(labels.shape)} bool, got {tuple(eligible.shape)} {eligible.dtype}")
    require_count("samples_per_class", samples_per_class)
    if policy not in POLICIES:
        raise GSKDError(f"policy: unknown {policy!r}{near_names(policy, POLICIES)}")
    device = labels.device
    batch, pixels = labels.shape[0], labels.shape[1] * labels.shape[2]
    labels = labels.flatten(1)
    counted = (labels >= 0) & (labels < num_classes)
    if eligible is not None:
        counted &= eligible.flatten(1)
    classes = torch.where(counted, labels, num_classes)  # one more class for what may not be drawn

    # Shuffle all pixels, then sort them by (image, class) keeping that order: every class of every image becomes a
    # segment in uniformly random order. One flat int32 sort takes the radix path on CPU, in half the time of
    # sorting (B, P) composite floats, and unlike those it has no ties.
    shuffle = torch.randperm(batch * pixels, device=device, generator=generator)
    segment = classes + torch.arange(batch, device=device).unsqueeze(1) * (num_classes + 1)
    ordered, place = segment.int().flatten().index_select(0, shuffle).sort(stable=True)
    drawn = shuffle.index_select(0, place).view(batch, pixels) % pixels

    segments = torch.arange(batch * (num_classes + 1) + 1, device=device, dtype=ordered.dtype)
    counts = torch.searchsorted(ordered, segments).diff().view(batch, num_classes + 1)
    starts = counts.cumsum(1) - counts
    present = counts[:, :num_classes] > 0
    slots = num_classes if max_classes is None else min(max_classes, num_classes)
    if slots < num_classes:
        lottery = torch.rand(batch, num_classes, device=device, generator=generator)
        class_of_slot = torch.where(present, lottery, 2.0).argsort(dim=1)[:, :slots]
    else:
        class_of_slot = (~present).byte().argsort(dim=1, stable=True)
    class_count = present.sum(1).clamp(max=slots)
    used = torch.arange(slots, device=device) < class_count.unsqueeze(1)

    turn = torch.arange(samples_per_class, device=device)
    available = counts.gather(1, class_of_slot).unsqueeze(2)
    position = starts.gather(1, class_of_slot).unsqueeze(2) + turn % available.clamp(min=1)
    # A slot without a class may point past the end.
    index = drawn.gather(1, position.flatten(1).clamp(max=pixels - 1))
    valid = used.unsqueeze(2).expand(-1, -1, samples_per_class).flatten(1)
    own = (turn < available).flatten(1) & valid
    if policy == "mask":
        valid = own
    elif policy == "fill":
        chosen = torch.zeros_like(counts, dtype=torch.bool).scatter(1, class_of_slot, used)
        sorted_classes = classes.gather(1, drawn)
        turn_of_pixel = torch.arange(pixels, device=device) - starts.gather(1, sorted_classes)
        spare = (turn_of_pixel >= samples_per_class) | ~chosen.gather(1, sorted_classes)
        spare &= sorted_classes < num_classes
        index = _fill(index, valid & ~own, drawn, spare, generator)
    label = torch.where(valid, labels.gather(1, index), -1)
    return SampledPoints(torch.where(valid, index, 0), valid, label, class_count)


def uniform_sample(
    labels: Tensor,
    num_classes: int,
    samples_per_class: int = 8,
    *,
    eligible: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> SampledPoints:
    """Draws as many points as ``class_balanced_sample`` would, from all eligible pixels of an image alike.

    What class balance is measured against. Arguments and result as there; an image with fewer eligible pixels than
    points repeats them evenly.
    """
    counted = (labels >= 0) & (labels < num_classes)
    if eligible is not None:
        counted &= eligible
    classes = torch.where(counted, labels, num_classes).flatten(1)
    present = torch.zeros(labels.shape[0], num_classes + 1, dtype=torch.bool, device=labels.device)
    class_count = present.scatter(1, classes, True)[:, :num_classes].sum(1)
    points = num_classes * samples_per_class
    drawn = class_balanced_sample(torch.zeros_like(labels), 1, points, eligible=counted, generator=generator)
    turn = torch.arange(points, device=labels.device)
    valid = drawn.valid & (turn < (class_count * samples_per_class).unsqueeze(1))
    index = torch.where(valid, drawn.index, 0)
    return SampledPoints(index, valid, torch.where(valid, labels.flatten(1).gather(1, index), -1), class_count)


def _fill(index: Tensor, empty: Tensor, drawn: Tensor, spare: Tensor, generator: torch.Generator | None) -> Tensor:
    """Puts spare pixels, in random order and over again if too few, into the empty places of ``index`` (B, M)."""
    lottery = torch.rand(spare.shape, device=spare.device, generator=generator)
    limit = min(spare.shape[1], index.shape[1])
    winners = torch.where(spare, lottery, 2.0).topk(limit, dim=1, largest=False).indices
    found = spare.sum(1, keepdim=True).clamp(max=limit)
    ordinal = (empty.cumsum(1) - 1).clamp(min=0) % found.clamp(min=1)
    return torch.where(empty & (found > 0), drawn.gather(1, winners.gather(1, ordinal)), index)


def read_points(features: Tensor, index: Tensor, size: Size | None = None) -> Tensor:
    """Reads feature vectors at pixel positions.

    Args:
        features: (B, C, h', w'), contiguous or channels_last.
        index: (B, M) int64 positions in a flattened map of ``size``.
        size: (h, w) that ``index`` refers to; (h', w') by default. Where they differ, features are read bilinearly at
            the pixels' centres, the same values as ``F.interpolate(features, size, mode="bilinear")`` holds there.

    Returns:
        (B, M, C); dtype of ``features``, or at least float32 when read bilinearly.

    Raises:
        GSKDError: ``features`` is not floating point (B, C, h', w').
    """
    require_maps("features", features, batch=index.shape[0])
    height, width = features.shape[-2:]
    h, w = (height, width) if size is None else size
    if (h, w) == (height, width):
        return _gather_pixels(features, index)
    dtype = torch.promote_types(features.dtype, torch.float32)
    top, bottom, down = _neighbours(index // w, h, height, dtype)
    left, right, across = _neighbours(index % w, w, width, dtype)
    corners = torch.cat([top * width + left, top * width + right, bottom * width + left, bottom * width + right], dim=1)
    weights = torch.cat([(1 - down) * (1 - across), (1 - down) * across, down * (1 - across), down * across], dim=1)
    read = promote(_gather_pixels(features, corners)) * weights.unsqueeze(2)
    return read.view(index.shape[0], 4, index.shape[1], -1).sum(dim=1)


def _neighbours(position: Tensor, cells: int, source_cells: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The two source cells around the centre of ``position`` (0 ... cells - 1), and the weight of the second."""
    centre = ((position.to(dtype) + 0.5) * (source_cells / cells) - 0.5).clamp(0, source_cells - 1)
    first = centre.floor()
    before = first.long()
    return before, (before + 1).clamp(max=source_cells - 1), centre - first


def _gather_pixels(features: Tensor, index: Tensor) -> Tensor:
    """(B, C, h, w) at (B, M) -> (B, M, C), as views: no copy of the map in either memory format."""
    batch, channels, height, width = features.shape
    if features.is_contiguous(memory_format=torch.channels_last) and not features.is_contiguous():
        offset = torch.arange(batch, device=index.device).unsqueeze(1) * (height * width)
        rows = features.permute(0, 2, 3, 1).reshape(-1, channels)
        return rows.index_select(0, (index + offset).flatten()).view(batch, -1, channels)
    return features.flatten(2).gather(2, index.unsqueeze(1).expand(-1, channels, -1)).mT
