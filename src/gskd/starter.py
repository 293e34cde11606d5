"""Two recipes for somebody's data, after a look at it: a teacher's and its student's (files -> recipes)."""

from __future__ import annotations

import shlex
import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gskd.checkpoint import write_text
from gskd.data import IGNORE, SegmentationDataset
from gskd.data.datasets import open_dataset
from gskd.data.files import MASK_SUFFIXES, list_files, read_index
from gskd.errors import GSKDError, few
from gskd.recipe import load_recipe

LOOKED_AT = 40
"""How many masks and images of the training split are opened."""

_PUBLIC = {
    "camvid": ("train", "trainannot"),
    "cityscapes": ("leftImg8bit", "gtFine"),
    "ade20k": ("images/training", "annotations/training", "objectInfo150.txt"),
    "coco_stuff": ("stuffthingmaps",),
    "voc": ("JPEGImages", "ImageSets/Segmentation"),
}
_ABOVE = {"ade20k": ("", "ADEChallengeData2016"), "voc": ("", "VOC2012", "VOCdevkit/VOC2012")}
"""Where below the root a layout may stand, as its reader takes it too."""
_IMAGES = ("images", "image", "imgs", "img", "JPEGImages", "rgb")
_MASKS = ("masks", "mask", "labels", "label", "annotations", "annotation", "gt", "SegmentationClass")
_SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation")}


@dataclass(frozen=True)
class Found:
    """What was seen of a dataset."""

    dataset: str
    options: dict[str, str | list[str]]
    splits: dict[str, str]
    """The recipe's train and val, and what they are called here."""
    notes: tuple[str, ...]
    """For the person, one line each."""


def write_recipes(root: Path, output: Path) -> tuple[Found, list[Path]]:
    """Looks at a folder of images and masks and writes ``teacher.yaml`` and ``student.yaml`` for it.

    Known are the public layouts (`gskd.data.layouts`), and folders of images and of masks with the same file names in
    either order, ``images/train`` or ``train/images``, under their usual names.

    Args:
        root: the dataset's folder.
        output: a new folder for the two files.

    Returns:
        What was found, and the files.

    Raises:
        GSKDError: no layout is recognised, masks are of colours, or the output exists.
    """
    if output.exists():
        raise GSKDError(f"init {output}: exists already; expected a new folder")
    found = look_at(root)
    train = open_dataset(found.dataset, str(root), found.splits["train"], found.options)
    open_dataset(found.dataset, str(root), found.splits["val"], found.options)
    crop, scale = _crop(train)
    data = _data_section(root, found)
    files = {"teacher.yaml": _TEACHER, "student.yaml": _STUDENT}
    try:
        output.mkdir(parents=True)
    except OSError as error:
        raise GSKDError(f"init {output}: cannot be made: {error.strerror or error}") from None
    try:
        return found, [
            _write(output, name, template, data, crop, scale, len(train)) for name, template in files.items()
        ]
    except GSKDError:  # of a place that no recipe can name
        shutil.rmtree(output)
        raise


def _write(output: Path, name: str, template: str, data: str, crop: list[int], scale: list[float], images: int) -> Path:
    here = output.as_posix()
    text = template.format(
        data=data,
        crop=crop,
        scale=scale,
        images=images,
        teacher=_quoted(f"{here}/teacher"),
        student=_quoted(f"{here}/student"),
        teacher_file=shlex.quote(f"{here}/teacher.yaml"),
        student_file=shlex.quote(f"{here}/student.yaml"),
        student_run=shlex.quote(f"{here}/student"),
        plain_run=shlex.quote(f"{here}/plain"),
    )
    write_text(output / name, text)
    load_recipe(output / name)  # what is written can be read
    return output / name


def look_at(root: Path) -> Found:
    """Which dataset a folder holds.

    Raises:
        GSKDError: nothing that is known.
    """
    if not root.is_dir():
        raise GSKDError(f"init {root}: is no folder")
    for dataset, marks in _PUBLIC.items():
        if any(all((root / base / mark).exists() for mark in marks) for base in _ABOVE.get(dataset, ("",))):
            splits = {"train": "train", "val": "val"}
            if dataset == "camvid" and not _fits(dataset, root):  # a usual way to name one's own folders, too
                return _folder(root, ["{split}", "{split}annot"], splits)
            return Found(dataset, {}, splits, (f"the layout of {dataset}, and its classes",))
    found: list[tuple[list[str], dict[str, str]]] = []
    for images in _IMAGES:
        for masks in _MASKS:
            for pair in ((f"{images}/{{}}", f"{masks}/{{}}"), (f"{{}}/{images}", f"{{}}/{masks}")):
                names_of = {
                    split: next((n for n in names if all((root / p.format(n)).is_dir() for p in pair)), None)
                    for split, names in _SPLITS.items()
                }
                train, val = names_of["train"], names_of["val"]
                if train is not None and val is not None:
                    found.append(([p.format("{split}") for p in pair], {"train": train, "val": val}))
    if found:  # labels of another kind, boxes in text, may stand beside the masks
        return _folder(root, *next((one for one in found if _masks(root, *one)), found[0]))
    inside = few(sorted(path.name for path in root.iterdir())) or "nothing"
    raise GSKDError(
        f"init {root}: holds {inside}; expected a public layout, or images/train, masks/train, images/val and masks/val"
        " (or train/images and so on) with PNG masks of the images' names"
    )


def _fits(dataset: str, root: Path) -> bool:
    try:
        train = open_dataset(dataset, str(root), "train", {})
        for index in range(min(len(train), LOOKED_AT)):
            train[index]
    except GSKDError:
        return False
    return True


def _masks(root: Path, patterns: list[str], splits: dict[str, str]) -> list[Path]:
    return list_files(root / patterns[1].replace("{split}", splits["train"]), MASK_SUFFIXES)[:LOOKED_AT]


def _folder(root: Path, patterns: list[str], splits: dict[str, str]) -> Found:
    masks = _masks(root, patterns, splits)
    if not masks:
        raise GSKDError(f"init {root}: no PNG mask in {patterns[1].replace('{split}', splits['train'])}")
    options: dict[str, str | list[str]] = {"images": patterns[0], "masks": patterns[1]}
    if (root / "classes.csv").is_file():
        return Found("folder", {"classes": "classes.csv", **options}, splits, ("classes of classes.csv",))
    values = sorted({int(value) for mask in masks for value in np.unique(read_index(mask))})
    classes = [value for value in values if value != IGNORE]
    if not classes:
        raise GSKDError(f"init {root}: masks hold {IGNORE} alone, and {IGNORE} counts nowhere")
    if len(classes) == 1 and IGNORE in values:
        raise GSKDError(
            f"init {root}: masks hold {classes[0]} and {IGNORE}, and {IGNORE} counts nowhere unless it is named as a"
            f" class; if it is one, write classes.csv there: name,value and below it background,{classes[0]} and"
            f" foreground,{IGNORE}"
        )
    notes = [f"masks hold {few(map(str, values))}; {len(masks)} were opened"]
    count = max(classes) + 1
    if count > 3 * len(classes) + 10:
        raise GSKDError(
            f"init {root}: masks hold {few(map(str, values))}, too scattered to be class indices; write classes.csv"
            " there: a line name,value and one for each class"
        )
    if absent := sorted(set(range(count)) - set(classes)):
        notes.append(f"values {few(map(str, absent))} were not seen, and are classes too")
    names = [f"class_{value}" for value in range(max(count, 2))]
    return Found("folder", {"classes": names, **options}, splits, tuple(notes))


def _crop(data: SegmentationDataset) -> tuple[list[int], list[float]]:
    """A crop of at most 512 that a deep network takes, and scales at which most of it lies inside the image."""
    sizes = [data[index].label.shape for index in range(min(len(data), LOOKED_AT))]
    smallest = [int(statistics.median(side)) for side in zip(*sizes, strict=True)]
    return [max(32, min(512, side) // 32 * 32) for side in smallest], [0.5, 2.0]


def _data_section(root: Path, found: Found) -> str:
    lines = [f"dataset: {found.dataset}", f"root: {_quoted(str(root))}"]
    lines += [f"{split}: {name}" for split, name in found.splits.items() if split != name]
    if found.options:
        lines.append("options:")
        for key, value in found.options.items():
            if isinstance(value, str):
                lines.append(f"  {key}: {_quoted(value)}")
            else:
                lines.append(f"  {key}: [{', '.join(value)}]  # name them in this order, in both files")
    return "\n".join(f"  {line}" for line in lines)


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


_TEACHER = """# The teacher: large, trained on labels alone. Leave it out if you have one, see student.yaml.
#   gskd train {teacher_file}
output: {teacher}
data:
{data}
augment:
  crop: {crop}          # multiples of 32; larger sees more, and costs more
  scale: {scale}
model:
  name: smp:DeepLabV3Plus
  args: {{encoder_name: resnet50, encoder_weights: imagenet}}   # null: do not download, start from nothing
train:
  steps: 10000         # {images} training images
  batch: 8
  lr: 1e-3
  # precision: bf16    # on a GPU, or on a CPU with AMX
  # class_balance: 1   # for rare classes, at the cost of common ones
eval:
  every: 1000
"""

_STUDENT = """# The student: small, trained on labels and against the teacher.
#   gskd distill {student_file}
#   gskd train {student_file} output={plain_run}       the same without the teacher, to compare
#   gskd export {student_run} -o student.onnx
output: {student}
data:
{data}
augment:
  crop: {crop}
  scale: {scale}
model:
  name: smp:DeepLabV3Plus
  args: {{encoder_name: tu-mobilenetv3_small_100, encoder_weights: null, decoder_channels: 64}}
teacher:
  run: {teacher}
  precision: auto      # what is fastest here and gives the same as fp32
  # Where the disk allows, cache (here) and augment.views make a step nearly as cheap as one without a teacher.
  # Or one that you have, with weights made by gskd convert:
  # model:
  #   name: smp:DeepLabV3Plus
  #   args: {{encoder_name: resnet101, encoder_weights: null}}
  #   weights: teacher.safetensors
terms:
  dist: {{weight: 1}}
  gskd_logits: {{weight: 10}}
train:
  steps: 10000
  batch: 8
  lr: 1e-3
  # class_balance: 1   # for rare classes, at the cost of common ones
eval:
  every: 1000
"""
