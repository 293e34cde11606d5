"""What the values of a mask mean: class names, colours, and which value or colour is which class (files -> data)."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from gskd.data import IGNORE
from gskd.errors import SHOWN, GSKDError, count, few, near_names

MASK_KINDS = ("index", "colour")
MAX_CLASSES = 254

_UNKNOWN = 254  # in a lookup table: neither a class nor ignored; free because class indices stop at MAX_CLASSES - 1
_COLOURS = ("red", "green", "blue")


@dataclass(frozen=True)
class Legend:
    """Names and colours of K classes, and what a stored value or a colour of a mask stands for."""

    classes: tuple[str, ...]
    """Names; their order is the label index."""
    palette: np.ndarray
    """(K, 3) uint8 RGB."""
    mask_kind: str
    """``"index"``: a mask holds one value a pixel; ``"colour"``: its RGB colour tells the class."""
    table: np.ndarray
    """uint8: of each stored value, or of each colour 0xRRGGBB, the class index, `IGNORE`, or that it is neither."""

    def label(self, codes: np.ndarray, path: Path) -> np.ndarray:
        """Stored values, or colours 0xRRGGBB, as a label.

        Args:
            codes: (H, W) integers. Those of a PNG are within the table, 16 bits a channel; other files may hold more.
            path: the mask's, for the error.

        Returns:
            (H, W) uint8, class index or `IGNORE`.

        Raises:
            GSKDError: a value is neither a class nor ignored; the most frequent ones are named and counted.
        """
        if codes.dtype.itemsize > 2 and (codes.min(initial=0) < 0 or codes.max(initial=0) >= len(self.table)):
            outside = (codes < 0) | (codes >= len(self.table))
            raise GSKDError(self._unknown(path, codes[outside]))
        label: np.ndarray = self.table[codes]
        unknown = label == _UNKNOWN
        if unknown.any():
            raise GSKDError(self._unknown(path, codes[unknown]))
        return label

    def _unknown(self, path: Path, codes: np.ndarray) -> str:
        values, counts = np.unique(codes, return_counts=True)
        found = []
        for k in np.argsort(-counts, kind="stable")[:SHOWN]:
            value = int(values[k])
            colour = f"({value >> 16}, {value >> 8 & 255}, {value & 255})"
            found.append(f"{value if self.mask_kind == 'index' else colour} in {count(int(counts[k]), 'pixel')}")
        more = f" and {len(values) - SHOWN} more" if len(values) > SHOWN else ""
        if self.mask_kind == "index":
            classes = len(self.classes)
            known = np.flatnonzero(self.table < MAX_CLASSES).tolist()
            plain = f"0 to {classes - 1}" if known == list(range(classes)) else few(map(str, known))
            what = f"label values outside the {classes} classes ({plain}) and not ignored"
        else:
            what = "colours that are neither in the palette nor ignored"
        return f"{path}: {what}: {', '.join(found)}{more}"


def make_legend(
    classes: Sequence[str],
    palette: Sequence[Sequence[int]] | np.ndarray | None = None,
    mask_kind: str = "index",
    ignore_values: Sequence[int] = (IGNORE,),
    ignore_colours: Sequence[Sequence[int]] = (),
) -> Legend:
    """The legend of masks whose stored value is the class index, or whose colour is that of the palette.

    Args:
        classes: Class names; their order is the label index. 2 to 254.
        palette: K RGB colours, 0 to 255. Default: the PASCAL VOC colour map. Required for colour masks.
        mask_kind: ``"index"``: the stored value (palette index in a palette PNG; 1 to 16 bits) is the class index.
            ``"colour"``: the RGB colour is the palette's colour of the class.
        ignore_values: Stored values of an index mask that become ``IGNORE``, also where they name a class.
        ignore_colours: RGB colours of a colour mask that become ``IGNORE``.

    Raises:
        GSKDError: classes, palette and what is ignored do not fit together.
    """
    if mask_kind not in MASK_KINDS:
        raise GSKDError(f"mask_kind {mask_kind!r} is unknown{near_names(mask_kind, MASK_KINDS)}")
    if mask_kind == "colour" and palette is None:
        raise GSKDError("mask_kind 'colour' needs a palette: one RGB colour per class")
    if mask_kind == "index" and len(ignore_colours):
        raise GSKDError("ignore_colours is for mask_kind 'colour'; for index masks set ignore_values")
    names = _checked_classes(classes)
    colours = _colour_map(len(names)) if palette is None else _checked_colours(palette, "palette")
    if len(colours) != len(names):
        raise GSKDError(f"palette has {len(colours)} colours for {len(names)} classes")
    if mask_kind == "index":
        table = _index_table([(index, index) for index in range(len(names))], ignore_values)
    else:
        table = _colour_table(colours, _checked_colours(ignore_colours, "ignore_colours"))
    return Legend(names, colours, mask_kind, table)


def read_legend(path: Path, mask_kind: str = "index") -> Legend:
    """A legend from a CSV file, one row for each class in the order of the label index.

    Columns, named in the first line: ``name``; ``value``, the stored value in the masks, by default the row's number
    from 0; ``red``, ``green``, ``blue``, by default those of the PASCAL VOC colour map. What a row without a name
    stands for is ignored; where there is no such row, 255 is. With ``mask_kind`` "colour" masks hold the colours.

    Raises:
        GSKDError: the file cannot be read, or a row does not fit; it is named by its line.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise GSKDError(f"classes {path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    columns = list(rows[0]) if rows else []
    if "name" not in columns or not set(columns) <= {"name", "value", *_COLOURS}:
        found = ",".join(map(str, columns)) or "no rows"
        raise GSKDError(f"classes {path}: expected columns name,value,red,green,blue, found {found}")
    own_colours = set(_COLOURS) <= set(columns)
    if mask_kind == "colour" and not own_colours:
        raise GSKDError(f"classes {path}: masks of colours need the columns red, green and blue")
    names, values, ignored = list[str](), list[tuple[int, int]](), list[int]()
    colours, ignored_colours = list[list[int]](), list[list[int]]()
    for number, row in enumerate(rows):
        line = f"classes {path}: line {number + 2}"
        value = _whole(row.get("value", number), f"{line}: value", 2**16 - 1)
        colour = [_whole(row[channel], f"{line}: {channel}", 255) for channel in _COLOURS] if own_colours else []
        if name := (row["name"] or "").strip():
            values.append((value, len(names)))
            names.append(name)
            colours.append(colour)
        else:
            ignored.append(value)
            ignored_colours.append(colour)
    try:
        classes = _checked_classes(names)
        palette = _checked_colours(colours, "palette") if own_colours else _colour_map(len(classes))
        if mask_kind == "colour":
            for colour in ignored_colours:
                if colour in colours:
                    raise GSKDError(
                        f"colour {tuple(colour)} stands for {classes[colours.index(colour)]} and is ignored too"
                    )
            table = _colour_table(palette, _checked_colours(ignored_colours, "ignored"))
        else:
            known = [value for value, _ in values]
            if both := [value for value in ignored if value in known]:
                raise GSKDError(f"value {both[0]} stands for {classes[known.index(both[0])]} and is ignored too")
            if twice := [str(value) for value in known if known.count(value) > 1]:
                raise GSKDError(f"value {twice[0]} stands for more than one class")
            table = _index_table(values, ignored or [value for value in (IGNORE,) if value not in known])
    except GSKDError as error:
        raise GSKDError(f"classes {path}: {error}") from None
    return Legend(classes, palette, mask_kind, table)


@lru_cache
def shipped_legend(name: str) -> Legend:
    """That of a public dataset: camvid, cityscapes, voc, ade20k, coco_stuff."""
    legend = read_legend(Path(__file__).parent / "legends" / f"{name}.csv")
    legend.palette.setflags(write=False)
    legend.table.setflags(write=False)
    return legend


def _whole(text: Any, where: str, most: int) -> int:
    try:
        value = int(text)
    except (TypeError, ValueError):
        value = -1
    if not 0 <= value <= most:
        raise GSKDError(f"{where}: expected a whole number from 0 to {most}, found {text!r}")
    return value


def _index_table(values: Sequence[tuple[int, int]], ignored: Sequence[int]) -> np.ndarray:
    """(65536,) uint8: stored value -> class index, ``IGNORE`` or ``_UNKNOWN``."""
    table = np.full(2**16, _UNKNOWN, np.uint8)
    for value, index in values:
        table[value] = index
    for value in listed(ignored, "ignore_values"):
        if not isinstance(value, int | np.integer) or not 0 <= value < 2**16:
            raise GSKDError(f"ignore_values has {value!r}, expected values that a PNG can hold, 0 to 65535")
        table[value] = IGNORE
    return table


def _colour_table(palette: np.ndarray, ignored: np.ndarray) -> np.ndarray:
    """(2**24,) uint8: colour 0xRRGGBB -> class index, ``IGNORE`` or ``_UNKNOWN``. 16 MiB for one gather per mask."""
    table = np.full(2**24, _UNKNOWN, np.uint8)
    for index, (r, g, b) in enumerate(palette.tolist()):
        code = r << 16 | g << 8 | b
        if table[code] != _UNKNOWN:
            raise GSKDError(f"palette gives classes {int(table[code])} and {index} the same colour ({r}, {g}, {b})")
        table[code] = index
    for r, g, b in ignored.tolist():
        table[r << 16 | g << 8 | b] = IGNORE
    return table


def _colour_map(classes: int) -> np.ndarray:
    """(K, 3) uint8: the PASCAL VOC colour map, from the bits of the index (``VOClabelcolormap`` of its devkit)."""
    index = np.arange(classes)
    colours = np.zeros((classes, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= ((index >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
    return colours


def _checked_classes(classes: Sequence[str]) -> tuple[str, ...]:
    given = listed(classes, "classes")
    if read := [name for name in given if name is None or isinstance(name, bool)]:
        raise GSKDError(f"classes has {read[0]}, which YAML made of a word such as no or null: put the name in quotes")
    names = tuple(str(name) for name in given)
    if not 2 <= len(names) <= MAX_CLASSES:
        hint = "give the background a class of its own" if len(names) == 1 else "a label is one byte and 255 is ignored"
        raise GSKDError(f"classes: found {len(names)}, expected 2 to {MAX_CLASSES}: {hint}")
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice:
        raise GSKDError(f"classes names {few(twice)} more than once")
    return names


def _checked_colours(colours: Sequence[Sequence[int]] | np.ndarray, what: str) -> np.ndarray:
    """(N, 3) uint8."""
    rows = [listed(colour, f"a colour of {what}") for colour in listed(colours, what)]
    for row in rows:
        if len(row) != 3 or not all(isinstance(v, int | np.integer) and 0 <= v <= 255 for v in row):
            raise GSKDError(f"{what} has {row}, expected red, green and blue from 0 to 255")
    return np.array(rows, np.uint8).reshape(-1, 3)


def listed(values: object, what: str) -> list[Any]:
    """A list from a recipe, which may hold anything."""
    if not isinstance(values, Sequence | np.ndarray) or isinstance(values, str):
        raise GSKDError(f"{what} is {values!r}, expected a list")
    return list(values)
