"""Images and masks in files, read one pair at a time (files -> data)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from gskd.data import Sample
from gskd.data.files import has_orientation, read_colour, read_index, read_rgb
from gskd.data.legend import Legend
from gskd.errors import GSKDError


class Pair(NamedTuple):
    """The files of one sample."""

    name: str
    image: Path
    mask: Path


class Pairs:
    """A dataset of image and mask files.

    Images may be jpg, jpeg, png, bmp or webp in any colour mode and come out as RGB; masks are PNG.

    Args:
        pairs: name, image and mask of each sample, in order; names are unique.
        legend: what the masks hold.
        unused_masks: names of masks without an image, for the report of `gskd data check`.

    Raises:
        GSKDError: when a sample is read: a damaged file, a mask of another size, a stored value or colour that is
            neither a class nor ignored.
    """

    def __init__(self, pairs: Sequence[Pair], legend: Legend, unused_masks: tuple[str, ...] = ()) -> None:
        self._pairs = list(pairs)
        self.legend = legend
        self.classes = legend.classes
        self.palette = legend.palette
        self.unused_masks = unused_masks

    def __len__(self) -> int:
        return len(self._pairs)

    def name(self, index: int) -> str:
        """The sample's, mostly the stem of its file."""
        return self._pairs[index].name

    def __getitem__(self, index: int) -> Sample:
        name, image_path, mask_path = self._pairs[index]
        image = read_rgb(image_path)
        codes = read_index(mask_path) if self.legend.mask_kind == "index" else read_colour(mask_path)
        if codes.shape != image.shape[:2]:
            raise GSKDError(_size_mismatch(image_path, image.shape, mask_path, codes.shape))
        return Sample(image=image, label=self.legend.label(codes, mask_path), name=name)

    def turned(self) -> list[str]:
        """Names of the images that a viewer shows turned or mirrored, where a mask drawn on what is seen is wrong."""
        return [pair.image.name for pair in self._pairs if has_orientation(pair.image)]

    def stamp(self) -> str:
        """Of the names and bytes of all files, and of what their values mean.

        Reads every file once. Times of change would be cheaper, but data is copied to a local disk before many a run:
        the same data would have another stamp, and what was edited may keep its time.
        """
        digest = hashlib.sha256(self.legend.table.tobytes())
        for path in (*(pair.image for pair in self._pairs), *(pair.mask for pair in self._pairs)):
            try:
                with path.open("rb") as file:
                    content = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                raise GSKDError(f"{path}: cannot be read: {error.strerror or error}") from None
            digest.update(f"{path.name}/{content}\n".encode())
        return digest.hexdigest()


def _size_mismatch(image: Path, image_shape: tuple[int, ...], mask: Path, mask_shape: tuple[int, ...]) -> str:
    (h, w), (mask_h, mask_w) = image_shape[:2], mask_shape
    turned = " (they fit when turned: an EXIF orientation is not applied)" if (h, w) == (mask_w, mask_h) else ""
    return f"{mask}: the mask is {mask_w} x {mask_h}, its image {image} is {w} x {h}{turned}"
