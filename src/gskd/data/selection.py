"""Samples of a split without those that cannot be read (data -> pipeline)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import torch

from gskd.data import Sample, SegmentationDataset
from gskd.distributed import rank, sum_over_processes, world_size
from gskd.errors import GSKDError


def spread(length: int, count: int) -> list[int]:
    """At most ``count`` indices of ``length``, evenly over the whole, ascending."""
    return sorted(set(np.linspace(0, length - 1, min(count, length)).round().astype(int).tolist()))


class Selection:
    """Some samples of a dataset, in its order.

    Args:
        dataset: the samples.
        indices: which of them.
    """

    def __init__(self, dataset: SegmentationDataset, indices: Sequence[int]) -> None:
        self.dataset, self.indices = dataset, list(indices)
        self.classes, self.palette = dataset.classes, dataset.palette

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        """That of the sample in the dataset."""
        return self.dataset.name(self.indices[index])

    def __getitem__(self, index: int) -> Sample:
        return self.dataset[self.indices[index]]

    def stamp(self) -> str:
        """Of the dataset and of the choice."""
        chosen = np.asarray(self.indices, np.int64).tobytes()
        return hashlib.sha256(self.dataset.stamp().encode() + chosen).hexdigest()


def find_unreadable(
    dataset: SegmentationDataset, device: torch.device, on_progress: Callable[[int, int], None] | None = None
) -> dict[int, str]:
    """Reads every sample once, the processes sharing the work.

    Args:
        dataset: the samples.
        device: where processes talk to each other.
        on_progress: called with the number read by this process and its share.

    Returns:
        Why, by index, for each sample that cannot be read; the reason is known where it was read, else it is empty.
    """
    mine = range(rank(), len(dataset), world_size())
    bad = torch.zeros(len(dataset), dtype=torch.int32, device=device)
    reasons = {}
    for done, index in enumerate(mine):
        try:
            dataset[index]
        except GSKDError as error:
            bad[index], reasons[index] = 1, str(error)
        if on_progress is not None:
            on_progress(done + 1, len(mine))
    found = sum_over_processes(bad).nonzero().flatten().tolist()
    return {index: reasons.get(index, "") for index in found}


def without(dataset: SegmentationDataset, names: Sequence[str]) -> SegmentationDataset:
    """The dataset without the samples of these names.

    Raises:
        GSKDError: nothing is left.
    """
    if not names:
        return dataset
    left_out = set(names)
    kept = [index for index in range(len(dataset)) if dataset.name(index) not in left_out]
    if not kept:
        raise GSKDError(f"data.unreadable: none of the {len(dataset)} samples can be read")
    return Selection(dataset, kept)
