"""Datasets on disk, CamVid and any pair of image and mask folders: the start of the pixel's path (files -> data).

Files are found and matched once, when a dataset is made; pixels are read one sample at a time.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gskd.data import IGNORE, Sample, SegmentationDataset
from gskd.data.files import match_pairs, read_colour, read_index, read_rgb
from gskd.data.palettes import CAMVID_CLASSES, CAMVID_PALETTE
from gskd.data.scenes import Scenes
from gskd.errors import SHOWN, GSKDError, count, few, near_names

MASK_KINDS = ("index", "colour")
CAMVID_SPLITS = ("train", "val", "test")
CAMVID_VOID = 11
MAX_CLASSES = 254

_UNKNOWN = 254  # in a lookup table: neither a class nor ignored; free because class indices stop at MAX_CLASSES - 1


class FolderPairs:
    """A folder of images and a folder of masks, matched by file stem and sorted by it.

    Images may be jpg, jpeg, png, bmp or webp in any colour mode and come out as RGB; masks are PNG. Hidden files and
    subfolders are passed over.

    Args:
        images: Folder of the images.
        masks: Folder of the masks. Masks without an image are kept in ``unused_masks`` and otherwise ignored.
        classes: Class names; their order is the label index. 1 to 254.
        palette: K RGB colours, 0 to 255. Default: the PASCAL VOC colour map. Required for colour masks.
        mask_kind: ``"index"``: the stored value (palette index in a palette PNG; 1 to 16 bits) is the class index.
            ``"colour"``: the RGB colour is the palette's colour of the class.
        ignore_values: Stored values of an index mask that become ``IGNORE``, also where they name a class.
        ignore_colours: RGB colours of a colour mask that become ``IGNORE``.

    Raises:
        GSKDError: A folder is missing or holds no image, two files share a stem, an image has no mask, or the classes
            or the palette do not fit together. Reading a sample raises it for a damaged file, a mask of another size
            and a stored value or colour that is neither a class nor ignored.
    """

    def __init__(
        self,
        images: str | Path,
        masks: str | Path,
        classes: Sequence[str],
        palette: Sequence[Sequence[int]] | np.ndarray | None = None,
        mask_kind: str = "index",
        ignore_values: Sequence[int] = (IGNORE,),
        ignore_colours: Sequence[Sequence[int]] = (),
    ) -> None:
        if mask_kind not in MASK_KINDS:
            raise GSKDError(f"mask_kind {mask_kind!r} is unknown{near_names(mask_kind, MASK_KINDS)}")
        if mask_kind == "colour" and palette is None:
            raise GSKDError("mask_kind 'colour' needs a palette: one RGB colour per class")
        if mask_kind == "index" and len(ignore_colours):
            raise GSKDError("ignore_colours is for mask_kind 'colour'; for index masks set ignore_values")
        self.classes = _checked_classes(classes)
        self.palette = _colour_map(len(self.classes)) if palette is None else _checked_colours(palette, "palette")
        if len(self.palette) != len(self.classes):
            raise GSKDError(f"palette has {len(self.palette)} colours for {len(self.classes)} classes")
        self.mask_kind = mask_kind
        self._known = f"the {len(self.classes)} classes (0 to {len(self.classes) - 1})"
        if mask_kind == "index":
            self._table = _index_table(len(self.classes), ignore_values)
        else:
            self._table = _colour_table(self.palette, _checked_colours(ignore_colours, "ignore_colours"))
        self._images, self._masks, self.unused_masks = match_pairs(Path(images), Path(masks))

    def __len__(self) -> int:
        return len(self._images)

    def name(self, index: int) -> str:
        """The file's stem."""
        return self._images[index].stem

    def __getitem__(self, index: int) -> Sample:
        image_path, mask_path = self._images[index], self._masks[index]
        image = read_rgb(image_path)
        codes = read_index(mask_path) if self.mask_kind == "index" else read_colour(mask_path)
        if codes.shape != image.shape[:2]:
            raise GSKDError(_size_mismatch(image_path, image.shape, mask_path, codes.shape))
        # A PNG holds at most 16 bits per channel, also where Pillow widens them: no code is out of the table's reach.
        label = self._table[codes]
        unknown = label == _UNKNOWN
        if unknown.any():
            raise GSKDError(self._unknown_message(mask_path, codes[unknown]))
        return Sample(image=image, label=label, name=image_path.stem)

    def stamp(self) -> str:
        """Of the names and bytes of all files, and of what their values mean.

        Reads every file once. Times of change would be cheaper, but data is copied to a local disk before many a run:
        the same data would have another stamp, and what was edited may keep its time.
        """
        digest = hashlib.sha256(self._table.tobytes())
        for path in (*self._images, *self._masks):
            try:
                with path.open("rb") as file:
                    content = hashlib.file_digest(file, "sha256").hexdigest()
            except OSError as error:
                raise GSKDError(f"{path}: cannot be read: {error.strerror or error}") from None
            digest.update(f"{path.name}/{content}\n".encode())
        return digest.hexdigest()

    def _unknown_message(self, path: Path, codes: np.ndarray) -> str:
        values, counts = np.unique(codes, return_counts=True)
        found = []
        for k in np.argsort(-counts, kind="stable")[:SHOWN]:
            value = int(values[k])
            shown = str(value) if self.mask_kind == "index" else f"({value >> 16}, {value >> 8 & 255}, {value & 255})"
            found.append(f"{shown} in {count(int(counts[k]), 'pixel')}")
        more = f" and {len(values) - SHOWN} more" if len(values) > SHOWN else ""
        if self.mask_kind == "index":
            return f"{path}: label values outside {self._known} and not ignored: {', '.join(found)}{more}"
        return f"{path}: colours that are neither in the palette nor ignored: {', '.join(found)}{more}"


class CamVid:
    """CamVid with 11 classes in its public layout: ``root/train``, ``root/trainannot``, and so for val and test.

    Brostow, Fauqueur, Cipolla, "Semantic object classes in video: a high-definition ground truth database", Pattern
    Recognition Letters 2009; the edition of Badrinarayanan et al., SegNet, with 367/101/233 images of 480 x 360. Stored
    value 11 (void) becomes ``IGNORE``.

    Args:
        root: The folder that holds the six.
        split: ``"train"``, ``"val"`` or ``"test"``.

    Raises:
        GSKDError: As ``FolderPairs``; also for an unknown split.
    """

    classes: tuple[str, ...] = CAMVID_CLASSES

    def __init__(self, root: str | Path, split: str) -> None:
        if split not in CAMVID_SPLITS:
            raise GSKDError(f"CamVid has no split {split!r}{near_names(split, CAMVID_SPLITS)}")
        self.palette = CAMVID_PALETTE
        images, masks = Path(root) / split, Path(root) / f"{split}annot"
        self._pairs = FolderPairs(images, masks, CAMVID_CLASSES, CAMVID_PALETTE, ignore_values=(CAMVID_VOID,))
        self.unused_masks = self._pairs.unused_masks

    def __len__(self) -> int:
        return len(self._pairs)

    def name(self, index: int) -> str:
        """The file's stem, for example ``0001TP_006690``."""
        return self._pairs.name(index)

    def __getitem__(self, index: int) -> Sample:
        return self._pairs[index]

    def stamp(self) -> str:
        """As ``FolderPairs``."""
        return self._pairs.stamp()


class Cached:
    """Keeps the decoded samples of another dataset in memory up to a budget, and reads the others through.

    Nothing is ever thrown out: in random epochs every sample is as likely as any other, so a fixed set serves as well
    as any order of eviction. Samples come out as copies, so that nobody's edit in place reaches the cache.

    Args:
        dataset: The dataset to read from.
        gib: Budget in GiB (2**30 bytes), per process: each loader worker fills its own. Default 2.0.
    """

    def __init__(self, dataset: SegmentationDataset, gib: float = 2.0) -> None:
        if not gib >= 0:
            raise GSKDError(f"the cache's budget is {gib} GiB, expected 0 or more")
        self.dataset = dataset
        self.classes = dataset.classes
        self.palette = dataset.palette
        self.unused_masks: tuple[str, ...] = getattr(dataset, "unused_masks", ())
        self._free = int(gib * 2**30)
        self._kept: dict[int, Sample] = {}

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, index: int) -> str:
        """The sample's name in the wrapped dataset."""
        return self.dataset.name(index)

    def stamp(self) -> str:
        """The wrapped dataset's."""
        return self.dataset.stamp()

    def __getitem__(self, index: int) -> Sample:
        key = index + len(self) if index < 0 else index
        sample = self._kept.get(key)
        if sample is None:
            sample = self.dataset[index]
            size = sample.image.nbytes + sample.label.nbytes
            if size > self._free:
                return sample
            self._kept[key] = sample
            self._free -= size
        return Sample(sample.image.copy(), sample.label.copy(), sample.name)


def open_dataset(name: str, root: str | None, split: str, options: Mapping[str, Any]) -> SegmentationDataset:
    """Opens one split of a dataset by name.

    Args:
        name: ``"camvid"``, ``"folder"`` or ``"scenes"``.
        root: The dataset's folder; ``None`` for ``"scenes"``, which is drawn and not read.
        split: For example ``"train"``.
        options: By dataset. camvid: none. scenes: ``length``, ``size``, ``seed`` (see ``Scenes``). folder: ``classes``
            (required), ``palette``, ``mask_kind``, ``ignore_values``, ``ignore_colours`` (see ``FolderPairs``), and
            ``images`` and ``masks``, folders relative to ``root`` in which ``{split}`` stands for the split; default
            ``images/{split}`` and ``masks/{split}``.

    Returns:
        The dataset. Labels are uint8 with ``IGNORE``.

    Raises:
        GSKDError: For an unknown name or option, a missing root or required option, and whatever the dataset raises.
    """
    if name not in _OPENERS:
        raise GSKDError(f"dataset {name!r} is unknown{near_names(name, _OPENERS)}")
    opener, known = _OPENERS[name]
    for option in options:
        if option not in known:
            hint = near_names(str(option), known) if known else "; it takes none"
            raise GSKDError(f"dataset {name!r} has no option {option!r}{hint}")
    if name == "scenes" and root is not None:
        raise GSKDError(f"dataset 'scenes' is drawn, not read: root is {root!r}, expected none")
    if name != "scenes" and root is None:
        raise GSKDError(f"dataset {name!r} needs a root: the folder that holds its files")
    return opener(Path(root or ".").expanduser(), split, options)


def _open_camvid(root: Path, split: str, options: Mapping[str, Any]) -> SegmentationDataset:
    return CamVid(root, split)


def _open_folder(root: Path, split: str, options: Mapping[str, Any]) -> SegmentationDataset:
    rest = dict(options)
    images = _below(root, str(rest.pop("images", "images/{split}")).replace("{split}", split), "images")
    masks = _below(root, str(rest.pop("masks", "masks/{split}")).replace("{split}", split), "masks")
    if "classes" not in rest:
        raise GSKDError("dataset 'folder' needs the option 'classes': the class names in the order of their index")
    return FolderPairs(images, masks, **rest)


def _below(root: Path, relative: str, what: str) -> Path:
    """A recipe of somebody else must not read what is not data. Links inside the root are its owner's and followed."""
    path = Path(os.path.normpath(root / relative))
    if not path.is_relative_to(os.path.normpath(root)):
        raise GSKDError(f"{what} folder {relative}: expected a folder below the dataset's root, {root}")
    return path


def _open_scenes(root: Path, split: str, options: Mapping[str, Any]) -> SegmentationDataset:
    rest = dict(options)
    if "size" in rest:
        rest["size"] = tuple(_listed(rest["size"], "size"))
    for option, value in rest.items():
        for number in value if option == "size" else (value,):
            if not isinstance(number, int) and not (option == "length" and number is None):
                raise GSKDError(f"dataset 'scenes': {option} has {number!r}, expected a whole number")
    return Scenes(split, **rest)


_OPENERS: dict[str, tuple[Callable[[Path, str, Mapping[str, Any]], SegmentationDataset], tuple[str, ...]]] = {
    "camvid": (_open_camvid, ()),
    "folder": (
        _open_folder,
        ("images", "masks", "classes", "palette", "mask_kind", "ignore_values", "ignore_colours"),
    ),
    "scenes": (_open_scenes, ("length", "size", "seed")),
}


# Tables and checks


def _index_table(classes: int, ignored: Sequence[int]) -> np.ndarray:
    """(65536,) uint8: stored value -> class index, ``IGNORE`` or ``_UNKNOWN``."""
    table = np.full(2**16, _UNKNOWN, np.uint8)
    table[:classes] = np.arange(classes)
    for value in _listed(ignored, "ignore_values"):
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
    names = tuple(str(name) for name in _listed(classes, "classes"))
    if not 2 <= len(names) <= MAX_CLASSES:
        hint = "give the background a class of its own" if len(names) == 1 else "a label is one byte and 255 is ignored"
        raise GSKDError(f"classes: found {len(names)}, expected 2 to {MAX_CLASSES}: {hint}")
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice:
        raise GSKDError(f"classes names {few(twice)} more than once")
    return names


def _checked_colours(colours: Sequence[Sequence[int]] | np.ndarray, what: str) -> np.ndarray:
    """(N, 3) uint8."""
    rows = [_listed(colour, f"a colour of {what}") for colour in _listed(colours, what)]
    for row in rows:
        if len(row) != 3 or not all(isinstance(v, int | np.integer) and 0 <= v <= 255 for v in row):
            raise GSKDError(f"{what} has {row}, expected red, green and blue from 0 to 255")
    return np.array(rows, np.uint8).reshape(-1, 3)


def _listed(values: object, what: str) -> list[Any]:
    """A list from a recipe, which may hold anything."""
    if not isinstance(values, Sequence | np.ndarray) or isinstance(values, str):
        raise GSKDError(f"{what} is {values!r}, expected a list")
    return list(values)


def _size_mismatch(image: Path, image_shape: tuple[int, ...], mask: Path, mask_shape: tuple[int, ...]) -> str:
    (h, w), (mask_h, mask_w) = image_shape[:2], mask_shape
    turned = " (they fit when turned: an EXIF orientation is not applied)" if (h, w) == (mask_w, mask_h) else ""
    return f"{mask}: the mask is {mask_w} x {mask_h}, its image {image} is {w} x {h}{turned}"
