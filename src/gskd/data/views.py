"""Replayable augmentation: a view is a crop whose parameters are a pure function of (seed, sample, view).

Parameters are drawn first into a small record and only then applied to image and label, so nothing depends on worker
count, process count or time, and the same view can be made again later. The order of samples is a pure function of
(seed, position).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

import gskd._torchvision  # noqa: F401 (must come before torchvision)

# isort: split
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from gskd.data import IGNORE, SegmentationDataset
from gskd.errors import GSKDError

PAD_COLOUR = (124, 116, 104)
"""What fills a crop that is larger than the scaled image: ImageNet's mean colour, near zero once normalised."""


@dataclass(frozen=True)
class Augmentation:
    """The ranges that views are drawn from.

    Attributes:
        crop: (height, width) of the view in pixels.
        scale: the image is scaled by a factor drawn uniformly from this range before it is cropped.
        flip: probability of a horizontal flip.
        brightness, contrast, saturation: each factor is drawn uniformly from [1 - x, 1 + x]; 0 leaves the image alone.
        hue: the hue is turned by a share of the colour circle drawn from [-x, x], x at most 0.5.
    """

    crop: tuple[int, int]
    scale: tuple[float, float] = (0.5, 2.0)
    flip: float = 0.5
    brightness: float = 0.25
    contrast: float = 0.25
    saturation: float = 0.25
    hue: float = 0.0

    def __post_init__(self) -> None:
        if min(self.crop) < 1:
            raise GSKDError(f"augment.crop: expected two positive sizes, got {list(self.crop)}")
        if not 0 < self.scale[0] <= self.scale[1]:
            raise GSKDError(f"augment.scale: expected 0 < low <= high, got {list(self.scale)}")
        for name, most in {"flip": 1.0, "brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.5}.items():
            if not 0 <= getattr(self, name) <= most:
                raise GSKDError(f"augment.{name}: expected a number from 0 to {most}, got {getattr(self, name)}")


@dataclass(frozen=True)
class View:
    """One augmented crop, in full: apply it to the image again and the same pixels come out."""

    size: tuple[int, int]
    """(height, width) the whole image is scaled to."""
    box: tuple[int, int, int, int]
    """top, left, height, width of the crop in the scaled image; it may reach past the lower right border."""
    flip: bool
    brightness: float
    contrast: float
    saturation: float
    hue: float


def _uniforms(seed: int, sample: int, view: int, count: int) -> list[float]:
    # A hash and not a library's generator: the streams of those may change from one version to the next.
    digest = hashlib.blake2b(f"{seed}/{sample}/{view}".encode(), digest_size=8 * count).digest()
    return [int.from_bytes(digest[8 * i : 8 * i + 8], "little") / 2**64 for i in range(count)]


def draw_view(seed: int, sample: int, view: int, image_size: tuple[int, int], augmentation: Augmentation) -> View:
    """Draws the parameters of one view; the same arguments always give the same view.

    Args:
        seed: the run's seed.
        sample: index of the sample in its dataset.
        view: which view of that sample, for example the epoch.
        image_size: (height, width) of the image as stored.
        augmentation: the ranges to draw from.
    """
    u = _uniforms(seed, sample, view, 8)
    low, high = augmentation.scale
    factor = low + u[0] * (high - low)
    height, width = (max(1, round(side * factor)) for side in image_size)
    crop_height, crop_width = augmentation.crop
    top = math.floor(u[1] * (max(0, height - crop_height) + 1))
    left = math.floor(u[2] * (max(0, width - crop_width) + 1))

    def jitter(x: float, reach: float) -> float:
        return 1.0 + reach * (2 * x - 1)

    return View(
        size=(height, width),
        box=(top, left, crop_height, crop_width),
        flip=u[3] < augmentation.flip,
        brightness=jitter(u[4], augmentation.brightness),
        contrast=jitter(u[5], augmentation.contrast),
        saturation=jitter(u[6], augmentation.saturation),
        hue=augmentation.hue * (2 * u[7] - 1),
    )


def apply_view(view: View, image: np.ndarray, label: np.ndarray) -> tuple[Tensor, Tensor]:
    """Makes the view's pixels.

    Args:
        view: from `draw_view`.
        image: (H, W, 3) uint8.
        label: (H, W) uint8.

    Returns:
        (3, h, w) uint8 image, bilinear with antialiasing, and (h, w) int64 labels, nearest. What lies outside the image
        is `PAD_COLOUR` and `IGNORE`.
    """
    x = torch.from_numpy(image).permute(2, 0, 1)
    y = torch.from_numpy(label)[None]
    if view.size != tuple(y.shape[1:]):
        x = F.resize(x, list(view.size), InterpolationMode.BILINEAR, antialias=True)
        y = F.resize(y, list(view.size), InterpolationMode.NEAREST_EXACT)
    top, left, height, width = view.box
    x, y = x[:, top : top + height, left : left + width], y[:, top : top + height, left : left + width]
    if view.flip:
        x, y = x.flip(-1), y.flip(-1)
    if view.brightness != 1.0:
        x = F.adjust_brightness(x, view.brightness)
    if view.contrast != 1.0:
        x = F.adjust_contrast(x, view.contrast)
    if view.saturation != 1.0:
        x = F.adjust_saturation(x, view.saturation)
    if view.hue != 0.0:
        x = F.adjust_hue(x, view.hue)
    missing = [0, 0, width - x.shape[2], height - x.shape[1]]  # left, top, right, bottom
    if any(missing):
        x = F.pad(x, missing, fill=list(PAD_COLOUR))
        y = F.pad(y, missing, fill=IGNORE)
    return x.contiguous(), y[0].long()


@lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, length: int) -> np.ndarray:
    # The raw stream of a bit generator is guaranteed stable across numpy versions; Generator.permutation is not.
    keys = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(length)
    order: np.ndarray = np.argsort(keys, kind="stable")
    return order


def sample_at(seed: int, position: int, length: int) -> tuple[int, int]:
    """Which sample stands at a position of the endless training order, and in which epoch.

    Every epoch is its own permutation of all samples. A pure function, so resuming needs a step number and nothing
    else.

    Returns:
        (sample index, epoch).
    """
    epoch, offset = divmod(position, length)
    return int(_epoch_order(seed, epoch, length)[offset]), epoch


def make_view(
    dataset: SegmentationDataset, sample: int, seed: int, view: int, augmentation: Augmentation
) -> tuple[Tensor, Tensor]:
    """One view of one sample: (3, h, w) uint8 image, (h, w) int64 labels."""
    found = dataset[sample]
    height, width = found.label.shape
    return apply_view(draw_view(seed, sample, view, (height, width), augmentation), found.image, found.label)


FIXED_VIEWS_SEED = 0
"""Fixed views are the same in all runs, whatever their seed."""


class FixedViews(Dataset[tuple[Tensor, Tensor]]):
    """All views that samples with a fixed number of views have; item i is view i % views of sample i // views."""

    def __init__(self, dataset: SegmentationDataset, augmentation: Augmentation, views: int) -> None:
        self.dataset, self.augmentation, self.views = dataset, augmentation, views

    def __len__(self) -> int:
        return len(self.dataset) * self.views

    def __getitem__(self, item: int) -> tuple[Tensor, Tensor]:
        sample, view = divmod(item, self.views)
        return make_view(self.dataset, sample, FIXED_VIEWS_SEED, view, self.augmentation)


class TrainingViews(Dataset[tuple[Any, ...]]):
    """Maps a position in the endless training order to one view: (3, h, w) uint8 image, (h, w) int64 labels.

    Args:
        dataset: the samples.
        augmentation: what views are drawn from.
        seed: of the order, and of the views unless they are fixed.
        views: None gives a sample a new view in every epoch; a number gives it so many fixed ones, in turn, the same
            for every seed.
        targets: called as ``targets(sample, view)``, where views are fixed: what it gives becomes a third value.
    """

    def __init__(
        self,
        dataset: SegmentationDataset,
        augmentation: Augmentation,
        seed: int,
        views: int | None = None,
        targets: Callable[[int, int], Any] | None = None,
    ) -> None:
        assert targets is None or views is not None
        self.dataset, self.augmentation, self.seed, self.views, self.targets = (
            dataset,
            augmentation,
            seed,
            views,
            targets,
        )

    def __getitem__(self, position: int) -> tuple[Any, ...]:
        sample, epoch = sample_at(self.seed, position, len(self.dataset))
        if self.views is None:
            return make_view(self.dataset, sample, self.seed, epoch, self.augmentation)
        view = (epoch + self.seed) % self.views
        pixels = make_view(self.dataset, sample, FIXED_VIEWS_SEED, view, self.augmentation)
        return pixels if self.targets is None else (*pixels, self.targets(sample, view))


class PositionSampler(Sampler[int]):
    """The positions that one process reads: its own part of every batch from ``first_step`` up to ``steps``.

    Args:
        batch: images per optimiser step over all processes and accumulation rounds.
        first_step: the step to begin with, counted from 0.
        steps: the step to stop before.
        rank, processes: this process among all. Each must divide the batch evenly.
    """

    def __init__(self, batch: int, first_step: int, steps: int, rank: int = 0, processes: int = 1) -> None:
        assert batch % processes == 0
        self.batch, self.first_step, self.steps, self.rank, self.processes = batch, first_step, steps, rank, processes

    def __len__(self) -> int:
        return max(0, self.steps - self.first_step) * (self.batch // self.processes)

    def __iter__(self) -> Iterator[int]:
        share = self.batch // self.processes
        for step in range(self.first_step, self.steps):
            start = step * self.batch + self.rank * share
            yield from range(start, start + share)
