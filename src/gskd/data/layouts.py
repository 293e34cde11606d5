"""Where each dataset keeps its files, as it is handed out: nothing has to be converted or moved (files -> data).

Every function finds and matches the files of one split and returns them as `Pairs`; pixels are read later, one sample
at a time. All of them raise `GSKDError` for an unknown split, and for files that are missing one message that says
which, and where the dataset comes from. Scores are over all labelled pixels of a split, at the size of the masks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from gskd.data.files import match_pairs
from gskd.data.legend import Legend, make_legend, shipped_legend
from gskd.data.pairs import Pair, Pairs
from gskd.errors import GSKDError, count, few, near_names


def folder_pairs(images: str | Path, masks: str | Path, legend: Legend) -> Pairs:
    """A folder of images and a folder of masks, matched by file stem and sorted by it.

    Hidden files and subfolders are passed over.

    Args:
        images: Folder of the images.
        masks: Folder of the masks. Masks without an image are kept in ``unused_masks`` and otherwise ignored.
        legend: What the masks hold, see `make_legend` and `read_legend`.

    Raises:
        GSKDError: A folder is missing or holds no image, two files share a stem, or an image has no mask.
    """
    image_files, mask_files, unused = match_pairs(Path(images), Path(masks))
    pairs = [Pair(image.stem, image, mask) for image, mask in zip(image_files, mask_files, strict=True)]
    return Pairs(pairs, legend, unused)


def camvid(root: Path, split: str) -> Pairs:
    """CamVid with 11 classes: ``root/train``, ``root/trainannot``, and so for val and test.

    Brostow, Fauqueur, Cipolla, "Semantic object classes in video: a high-definition ground truth database", Pattern
    Recognition Letters 2009; the edition of Badrinarayanan et al., SegNet, with 367/101/233 images of 480 x 360. Stored
    value 11 (void) is ignored.
    """
    _require_split("CamVid", split, ("train", "val", "test"))
    return folder_pairs(Path(root) / split, Path(root) / f"{split}annot", shipped_legend("camvid"))


def cityscapes(root: Path, split: str) -> Pairs:
    """Cityscapes with the 19 classes it is scored on: ``root/leftImg8bit/SPLIT/CITY`` and ``root/gtFine/SPLIT/CITY``.

    Cordts et al., "The Cityscapes dataset for semantic urban scene understanding", CVPR 2016; 2975/500/1525 images of
    2048 x 1024, the labels of test are kept back. Masks are the ``_labelIds.png`` of the download; where there is none
    the ``_labelTrainIds.png`` of its scripts.
    """
    _require_split("Cityscapes", split, ("train", "val", "test"))
    source = "leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip of cityscapes-dataset.com"
    images = _folder(root, f"leftImg8bit/{split}", "cityscapes", source)
    masks = _folder(root, f"gtFine/{split}", "cityscapes", source)
    ending = "_leftImg8bit.png"
    files = sorted(path for path in images.glob(f"*/*{ending}") if not path.name.startswith("."))
    keys = [f"{path.parent.name}/{path.name.removesuffix(ending)}" for path in files]
    if not files:
        raise GSKDError(f"cityscapes: {images} holds no CITY/*{ending}; expected {source}")
    fine = "labelIds"
    if not (masks / f"{keys[0]}_gtFine_{fine}.png").is_file():
        fine = "labelTrainIds"
    pairs = [
        Pair(Path(key).name, file, masks / f"{key}_gtFine_{fine}.png") for key, file in zip(keys, files, strict=True)
    ]
    full = shipped_legend("cityscapes")
    legend = full if fine == "labelIds" else make_legend(full.classes, full.palette)
    return Pairs(_whole("cityscapes", pairs, "gtFine masks (labelIds or labelTrainIds)", source), legend)


def voc(root: Path, split: str) -> Pairs:
    """PASCAL VOC 2012 with 21 classes: ``JPEGImages``, ``SegmentationClass``, ``ImageSets/Segmentation/SPLIT.txt``.

    Everingham et al., "The PASCAL visual object classes challenge: a retrospective", IJCV 2015. The splits are the
    lists: train (1464), val (1449), trainval; and trainaug (10582), with the masks of Hariharan et al., "Semantic
    contours from inverse detectors", ICCV 2011, in ``SegmentationClassAug``. ``root`` is VOC2012 or a folder above it.
    The border around objects, 255, is ignored.
    """
    source = "VOCtrainval_11-May-2012.tar of host.robots.ox.ac.uk/pascal/VOC/voc2012"
    base = _base(root, ("", "VOC2012", "VOCdevkit/VOC2012"), "ImageSets/Segmentation")
    lists = _folder(base, "ImageSets/Segmentation", "voc", source)
    _require_split("VOC", split, [path.stem for path in sorted(lists.glob("*.txt"))])
    images = _folder(base, "JPEGImages", "voc", source)
    augmented = "aug" in split
    kind = "SegmentationClassAug" if augmented else "SegmentationClass"
    if augmented:
        source = "the masks and the list trainaug.txt that are made of the SBD of Hariharan et al."
    masks = _folder(base, kind, "voc", source)
    # Some lists of the augmented set name the files of image and mask, with or without their folder.
    lines = (lists / f"{split}.txt").read_text(encoding="utf-8").splitlines()
    names = [Path(line.split()[0]).stem for line in lines if line.strip()]
    pairs = [Pair(name, images / f"{name}.jpg", masks / f"{name}.png") for name in names]
    return Pairs(_whole("voc", pairs, f"files of {split}.txt", source), shipped_legend("voc"))


def ade20k(root: Path, split: str) -> Pairs:
    """ADE20K with the 150 classes of the scene parsing challenge: ``images/training`` and ``annotations/training``.

    Zhou et al., "Scene parsing through ADE20K dataset", CVPR 2017; 20210/2000 images. The splits are train and val,
    their folders training and validation. ``root`` is ADEChallengeData2016 or the folder above it. Stored value 0
    (other objects) is ignored, and class 0 is the value 1.
    """
    folders = {"train": "training", "val": "validation"}
    source = "ADEChallengeData2016.zip of sceneparsing.csail.mit.edu"
    return _two_folders(
        "ade20k", _base(root, ("", "ADEChallengeData2016"), "annotations"), split, folders, "annotations", source
    )


def coco_stuff(root: Path, split: str) -> Pairs:
    """COCO-Stuff 164k with 171 classes: ``images/train2017/*.jpg`` and ``stuffthingmaps/train2017/*.png``.

    Caesar, Uijlings, Ferrari, "COCO-Stuff: thing and stuff classes in context", CVPR 2018; 118287/5000 images. The
    splits are train and val, their folders train2017 and val2017, also without ``images``. Of the 182 labels eleven
    never occur; the others are numbered without gaps. 255 is ignored.
    """
    folders = {"train": "train2017", "val": "val2017"}
    source = "train2017.zip, val2017.zip of cocodataset.org and stuffthingmaps_trainval2017.zip of COCO-Stuff"
    return _two_folders("coco_stuff", Path(root), split, folders, "stuffthingmaps", source)


def _two_folders(dataset: str, root: Path, split: str, folders: Mapping[str, str], masks: str, source: str) -> Pairs:
    _require_split(dataset, split, folders)
    folder = folders[split]
    images = root / folder if (root / folder).is_dir() else _folder(root, f"images/{folder}", dataset, source)
    return folder_pairs(images, _folder(root, f"{masks}/{folder}", dataset, source), shipped_legend(dataset))


def _require_split(dataset: str, split: str, known: Iterable[str]) -> None:
    if split not in known:
        raise GSKDError(f"{dataset} has no split {split!r}{near_names(split, known)}")


def _base(root: Path, below: Sequence[str], mark: str) -> Path:
    """The first of the folders that holds the mark; the root where none does."""
    return next((Path(root) / name for name in below if (Path(root) / name / mark).is_dir()), Path(root))


def _folder(root: Path, name: str, dataset: str, source: str) -> Path:
    root, folder = Path(root), Path(root) / name
    if not folder.is_dir():
        found = sorted(path.name for path in root.iterdir()) if root.is_dir() else []
        there = f"holds {few(found)}" if found else "is empty" if root.is_dir() else "is no folder"
        raise GSKDError(f"{dataset}: no folder {name} below {root}, which {there}; expected what is in {source}")
    return folder


def _whole(dataset: str, pairs: list[Pair], what: str, source: str) -> list[Pair]:
    missing = [path for pair in pairs for path in (pair.image, pair.mask) if not path.is_file()]
    if not pairs or missing:
        names = few(str(path) for path in missing[:1]) or "all"
        raise GSKDError(f"{dataset}: {count(len(missing), 'file')} missing of the {what}, first {names}; see {source}")
    return pairs
