"""Image and label columns of a Hugging Face dataset (tables -> data). Needs the extra ``datasets``."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
from pathlib import Path
from typing import Any

from gskd.data import Sample
from gskd.data.files import Stored, read_colour, read_index, read_rgb
from gskd.data.legend import Legend
from gskd.errors import GSKDError, described, few, near_names


class HubDataset:
    """Rows of a table, of which one column holds images and another one masks.

    Args:
        table: a ``datasets.Dataset`` whose columns hold images (``datasets.Image``).
        image: the column of photographs; any colour mode, they come out as RGB.
        label: the column of masks: one channel of class values, or colours where the legend says so.
        legend: what masks hold.
        where: names the table in errors.

    Raises:
        GSKDError: a column is not there or holds no images; when a row is read: it cannot be decoded, the mask has
            another size, or a value that is neither a class nor ignored.
    """

    def __init__(self, table: Any, image: str, label: str, legend: Legend, where: str) -> None:
        kind: Any = importlib.import_module("datasets").Image
        for column in (image, label):
            if column not in table.column_names:
                raise GSKDError(f"{where}: no column {column!r}{near_names(column, table.column_names)}")
            if not isinstance(table.features[column], kind):
                raise GSKDError(f"{where}: column {column!r} holds {table.features[column]}, expected images")
        self._rows = table.select_columns([image, label]).cast_column(image, kind(decode=False))
        self._rows = self._rows.cast_column(label, kind(decode=False))
        self._image, self._label, self._where = image, label, where
        self.legend, self.classes, self.palette = legend, legend.classes, legend.palette

    def __len__(self) -> int:
        return len(self._rows)

    def name(self, index: int) -> str:
        """The number of the row; tables have no other name for one."""
        return f"row-{index:06d}"

    def __getitem__(self, index: int) -> Sample:
        row, name = self._rows[index], self.name(index)
        where = f"{self._where}: {name}"
        image = read_rgb(_stored(row[self._image], f"{where}: {self._image}"))
        mask = _stored(row[self._label], f"{where}: {self._label}")
        codes = read_index(mask) if self.legend.mask_kind == "index" else read_colour(mask)
        if codes.shape != image.shape[:2]:
            (height, width), (mask_height, mask_width) = image.shape[:2], codes.shape
            raise GSKDError(f"{where}: the mask is {mask_width} x {mask_height}, its image {width} x {height}")
        return Sample(image=image, label=self.legend.label(codes, Path(where)), name=name)

    def stamp(self) -> str:
        """Of the bytes of all images and masks, and of what values mean."""
        digest = hashlib.sha256(self.legend.table.tobytes())
        for row in self._rows:
            for column in (self._image, self._label):
                digest.update(hashlib.sha256(_content(row[column])).digest())
        return digest.hexdigest()


def open_table(place: str, split: str) -> Any:
    """One split of a dataset: a folder that ``save_to_disk`` made, or a name on the hub.

    A single table in a folder is the split that it says it is, train where it says none, and no other.

    Raises:
        GSKDError: the package is missing, there is no such dataset here or on the hub, or no such split.
    """
    if importlib.util.find_spec("datasets") is None:
        raise GSKDError("dataset 'hub': needs datasets, pip install 'gskd[datasets]'")
    library: Any = importlib.import_module("datasets")
    try:
        found = library.load_from_disk(place) if Path(place).is_dir() else library.load_dataset(place, split=split)
    except Exception as error:  # of files, of the network, of the table's format
        raise GSKDError(f"dataset 'hub': {place} cannot be opened: {described(error)}") from None
    if isinstance(found, library.DatasetDict):
        if split not in found:
            raise GSKDError(f"dataset 'hub': {place} has no split {split!r}, it has {few(list(found))}")
        return found[split]
    if Path(place).is_dir() and split != (held := str(found.split or "train")):
        raise GSKDError(
            f"dataset 'hub': {place} has no split {split!r}, it is a table on its own, {held}; save a DatasetDict with"
            " a table for each split"
        )
    return found


def _content(value: Any) -> bytes:
    if value is None:
        return b""
    if value["bytes"] is not None:
        return bytes(value["bytes"])
    try:
        return Path(value["path"]).read_bytes()
    except OSError as error:
        raise GSKDError(f"{value['path']}: cannot be read: {error.strerror or error}") from None


def _stored(value: Any, where: str) -> Stored:
    if value is None:
        raise GSKDError(f"{where}: is empty, expected an image")
    return Stored(_content(value), where)
