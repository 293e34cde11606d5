"""Samples from files: the first stretch of the pixel's path (files -> data -> models).

A dataset is any object with ``classes``, ``palette``, ``__len__``, ``name(i)``, ``__getitem__(i) -> Sample`` and
``stamp()``. Labels
use ``IGNORE`` for pixels that count nowhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

IGNORE = 255
"""The label of a pixel that counts nowhere: not in a loss, not in a score."""


@dataclass(frozen=True)
class Sample:
    """One image with its labels, as read: nothing augmented, nothing normalised."""

    image: np.ndarray
    """(H, W, 3) uint8, RGB."""
    label: np.ndarray
    """(H, W) uint8, class index or ``IGNORE``."""
    name: str
    """Stable identity within the split, for example the file's stem."""


class SegmentationDataset(Protocol):
    """What the rest of the package asks of a dataset."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; their order is the label index."""

    @property
    def palette(self) -> np.ndarray:
        """(K, 3) uint8 RGB, one colour per class, for pictures."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """The sample's name without reading its pixels."""

    def __getitem__(self, index: int) -> Sample: ...

    def stamp(self) -> str:
        """A short text that is another one whenever samples have changed, and the same while they have not."""
