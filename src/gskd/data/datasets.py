"""Datasets by name, and decoded samples kept in memory (files -> data)."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gskd.data import Sample, SegmentationDataset, layouts
from gskd.data.hub import HubDataset, open_table
from gskd.data.legend import listed, make_legend, read_legend
from gskd.data.scenes import Scenes
from gskd.errors import GSKDError, near_names


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
        name: ``"camvid"``, ``"cityscapes"``, ``"voc"``, ``"ade20k"``, ``"coco_stuff"`` (see `gskd.data.layouts` for
            their files and splits), ``"folder"``, ``"hub"`` or ``"scenes"``.
        root: The dataset's folder; ``None`` for ``"scenes"``, which is drawn and not read. Of ``"hub"`` a folder made
            by ``save_to_disk``, or a name on the Hugging Face hub.
        split: For example ``"train"``.
        options: Of scenes: ``length``, ``size``, ``seed`` (see `Scenes`). Of folder: ``classes`` (required), names, or
            a CSV file below ``root`` (see `read_legend`); ``mask_kind``; beside names also ``palette``,
            ``ignore_values``, ``ignore_colours`` (see `make_legend`); and ``images`` and ``masks``, folders relative to
            ``root`` in which ``{split}`` stands for the split, default ``images/{split}`` and ``masks/{split}``.
            Of hub: ``classes`` (required), ``palette``, ``mask_kind``, ``ignore_values``, ``ignore_colours`` as of
            folder, and ``image`` and ``label``, names of columns. The others have none.

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


def _open_folder(root: Path, split: str, options: Mapping[str, Any]) -> SegmentationDataset:
    rest = dict(options)
    images = _below(root, str(rest.pop("images", "images/{split}")).replace("{split}", split), "images")
    masks = _below(root, str(rest.pop("masks", "masks/{split}")).replace("{split}", split), "masks")
    classes = rest.pop("classes", None)
    if classes is None:
        raise GSKDError(
            "dataset 'folder' needs the option 'classes': the class names in the order of their index, or a CSV file"
        )
    if isinstance(classes, str):
        if twice := [option for option in rest if option != "mask_kind"]:
            raise GSKDError(f"dataset 'folder': {', '.join(twice)}: is told by the file of classes, {classes}")
        file = _below(root, classes, "classes", "file")
        return layouts.folder_pairs(images, masks, read_legend(file, rest.get("mask_kind", "index")))
    return layouts.folder_pairs(images, masks, make_legend(classes, **rest))


def _below(root: Path, relative: str, what: str, kind: str = "folder") -> Path:
    """A recipe of somebody else must not read what is not data. Links inside the root are its owner's and followed."""
    path = Path(os.path.normpath(root / relative))
    if not path.is_relative_to(os.path.normpath(root)):
        raise GSKDError(f"{what} {kind} {relative}: expected a {kind} below the dataset's root, {root}")
    return path


def _open_hub(root: Path, split: str, options: Mapping[str, Any]) -> SegmentationDataset:
    rest = dict(options)
    image, label, classes = str(rest.pop("image", "image")), str(rest.pop("label", "label")), rest.pop("classes", None)
    if classes is None:
        raise GSKDError("dataset 'hub' needs the option 'classes': the class names in the order of their index")
    legend = make_legend(classes, **rest)
    return HubDataset(open_table(str(root), split), image, label, legend, f"dataset {root}, {split}")


def _open_scenes(root: Path, split: str, options: Mapping[str, Any]) -> SegmentationDataset:
    rest = dict(options)
    if "size" in rest:
        rest["size"] = tuple(listed(rest["size"], "size"))
    for option, value in rest.items():
        for number in value if option == "size" else (value,):
            if not isinstance(number, int) and not (option == "length" and number is None):
                raise GSKDError(f"dataset 'scenes': {option} has {number!r}, expected a whole number")
    return Scenes(split, **rest)


def _without_options(layout: Callable[[Path, str], SegmentationDataset]) -> _Opener:
    return lambda root, split, options: layout(root, split)


_Opener = Callable[[Path, str, Mapping[str, Any]], SegmentationDataset]

_OPENERS: dict[str, tuple[_Opener, tuple[str, ...]]] = {
    "camvid": (_without_options(layouts.camvid), ()),
    "cityscapes": (_without_options(layouts.cityscapes), ()),
    "voc": (_without_options(layouts.voc), ()),
    "ade20k": (_without_options(layouts.ade20k), ()),
    "coco_stuff": (_without_options(layouts.coco_stuff), ()),
    "folder": (
        _open_folder,
        ("images", "masks", "classes", "palette", "mask_kind", "ignore_values", "ignore_colours"),
    ),
    "hub": (
        _open_hub,
        ("image", "label", "classes", "palette", "mask_kind", "ignore_values", "ignore_colours"),
    ),
    "scenes": (_open_scenes, ("length", "size", "seed")),
}
