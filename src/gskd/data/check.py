"""Reads a whole split before a training run does: what is broken, and what the labels hold. Beside the pixel's path."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from gskd.data import IGNORE, Sample, SegmentationDataset
from gskd.data.pairs import Pairs
from gskd.errors import GSKDError, few


@dataclass(frozen=True)
class ClassCount:
    """How much of one class the readable samples hold."""

    name: str
    """The class's name."""
    pixels: int
    """Pixels with this label."""
    share: float
    """``pixels`` over all pixels, ignored ones included; 0 to 1."""
    images: int
    """Samples with at least one such pixel."""


@dataclass(frozen=True)
class DatasetReport:
    """What ``check_dataset`` found. Counts cover the samples without a problem."""

    samples: int
    """Samples in the split, readable or not."""
    problems: tuple[str, ...]
    """One line per sample that cannot be used as it is; and one where no sample holds a labelled pixel."""
    notes: tuple[str, ...]
    """One line per oddity that does not stop training: masks without an image, samples without a labelled pixel."""
    sizes: dict[tuple[int, int], int]
    """(height, width) in pixels -> number of images, the most frequent first."""
    classes: tuple[ClassCount, ...]
    """One per class, in the order of the label index."""
    void_pixels: int
    """Ignored pixels."""
    void_share: float
    """``void_pixels`` over all pixels; 0 to 1."""
    digests: dict[bytes, str]
    """A digest of each image's pixels -> the name of the first sample that shows it."""

    @property
    def ok(self) -> bool:
        """Whether every sample can be used."""
        return not self.problems

    @property
    def absent(self) -> tuple[str, ...]:
        """Classes with no pixel at all."""
        return tuple(c.name for c in self.classes if c.pixels == 0)

    def to_dict(self) -> dict[str, Any]:
        """Plain types that JSON can hold, without the digests; sizes become a list of ``{height, width, images}``."""
        return {
            "ok": self.ok,
            "samples": self.samples,
            "problems": list(self.problems),
            "notes": list(self.notes),
            "sizes": [{"height": h, "width": w, "images": n} for (h, w), n in self.sizes.items()],
            "classes": [dict(vars(c)) for c in self.classes],
            "absent": list(self.absent),
            "void_pixels": self.void_pixels,
            "void_share": self.void_share,
        }


def check_dataset(dataset: SegmentationDataset, on_progress: Callable[[int, int], None] | None = None) -> DatasetReport:
    """Reads every sample of a split and never stops at the first problem.

    A problem is a sample whose reading raises ``GSKDError`` (a damaged file, a mask of another size, a stored value
    that is no class) or which breaks the contract of ``Sample``. Any other exception is a bug of the dataset and
    propagates.

    Args:
        dataset: Any dataset; a list of names in ``unused_masks``, where it has one, becomes a note.
        on_progress: Called after each sample with the number done and the number in all.

    Returns:
        The report; ``report.ok`` says whether every sample can be used.
    """
    problems: list[str] = []
    unlabelled: list[str] = []
    sizes: Counter[tuple[int, int]] = Counter()
    pixels = np.zeros(256, np.int64)
    images = np.zeros(256, np.int64)
    shown: dict[bytes, str] = {}
    total = len(dataset)
    for index in range(total):
        try:
            sample = dataset[index]
            _check_sample(sample, len(dataset.classes))
        except GSKDError as error:
            problems.append(str(error))
        else:
            counts = np.bincount(sample.label.ravel(), minlength=256)
            pixels += counts
            images += counts > 0
            height, width = sample.label.shape
            sizes[height, width] += 1
            shown.setdefault(hashlib.blake2b(sample.image.tobytes(), digest_size=16).digest(), sample.name)
            if counts[IGNORE] == sample.label.size:
                unlabelled.append(sample.name)
        if on_progress is not None:
            on_progress(index + 1, total)

    if len(unlabelled) == total - len(problems) > 0:
        problems.append(f"no sample has a labelled pixel: {few(unlabelled)}")
        unlabelled = []
    notes = []
    unused = tuple(getattr(dataset, "unused_masks", ()))
    if unused:
        notes.append(f"masks without an image ({len(unused)}): {few(unused)}")
    if isinstance(dataset, Pairs) and (turned := dataset.turned()):
        notes.append(
            f"images with an EXIF orientation ({len(turned)}): {few(turned)}; it is not applied, their masks must be of"
            " the pixels as they are stored"
        )
    if unlabelled:
        notes.append(f"samples without a labelled pixel ({len(unlabelled)}): {few(unlabelled)}")
    shares = pixels / max(int(pixels.sum()), 1)
    if lacking := [name for k, name in enumerate(dataset.classes) if not pixels[k]]:
        notes.append(f"classes without a pixel ({len(lacking)}): {few(lacking)}; {shares[IGNORE]:.0%} is ignored")
    return DatasetReport(
        samples=total,
        problems=tuple(problems),
        notes=tuple(notes),
        sizes=dict(sizes.most_common()),
        classes=tuple(
            ClassCount(name, int(pixels[k]), float(shares[k]), int(images[k])) for k, name in enumerate(dataset.classes)
        ),
        void_pixels=int(pixels[IGNORE]),
        void_share=float(shares[IGNORE]),
        digests=shown,
    )


def shared_images(first: DatasetReport, second: DatasetReport) -> tuple[str, ...]:
    """Names of the second split's samples whose image, pixel by pixel, is in the first split too.

    A network that learns from one of the two and is scored on the other looks better than it is.
    """
    return tuple(name for digest, name in second.digests.items() if digest in first.digests)


def _check_sample(sample: Sample, classes: int) -> None:
    """Raises GSKDError where a sample is not what ``Sample`` promises, as a user's own dataset may make it."""
    image, label, name = sample.image, sample.label, sample.name
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise GSKDError(f"{name}: the image is {image.shape} {image.dtype}, expected (H, W, 3) uint8")
    if label.dtype != np.uint8 or label.shape != image.shape[:2]:
        raise GSKDError(f"{name}: the label is {label.shape} {label.dtype}, expected {image.shape[:2]} uint8")
    outside = np.unique(label[(label >= classes) & (label != IGNORE)])
    if len(outside):
        raise GSKDError(f"{name}: label values outside the {classes} classes: {few(str(v) for v in outside)}")
