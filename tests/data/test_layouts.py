"""The public datasets, in trees of a few files with the names and encodings of the downloads."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gskd import IGNORE, GSKDError
from gskd.data.check import check_dataset
from gskd.data.datasets import open_dataset
from gskd.data.legend import read_legend, shipped_legend

SIZE = (4, 6)


def image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*SIZE, 3), 90, np.uint8)).save(path)


def mask(path: Path, *values: int, palette: bool = False) -> None:
    """One row of pixels for each value, the last one to the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = np.array([values[min(row, len(values) - 1)] for row in range(SIZE[0])], np.uint8)
    picture = Image.fromarray(np.repeat(stored[:, None], SIZE[1], axis=1))
    if palette:
        picture = picture.convert("P")
        picture.putpalette(list(range(256)) * 3)
    picture.save(path)


def rows(dataset, index=0) -> list[int]:
    return dataset[index].label[:, 0].tolist()


def cityscapes(root: Path, kind: str = "labelIds", values: tuple[int, ...] = (7, 33, 0, 10)) -> None:
    for city, frame in (("aachen", "aachen_000000_000019"), ("zurich", "zurich_000001_000019")):
        image(root / "leftImg8bit" / "train" / city / f"{frame}_leftImg8bit.png")
        mask(root / "gtFine" / "train" / city / f"{frame}_gtFine_{kind}.png", *values)
        mask(root / "gtFine" / "train" / city / f"{frame}_gtFine_instanceIds.png", 26)


def voc(root: Path) -> None:
    for name in ("2007_000032", "2007_000039", "2008_000002"):
        image(root / "JPEGImages" / f"{name}.jpg")
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("2007_000032\n2007_000039\n")
    (lists / "trainaug.txt").write_text(
        "/JPEGImages/2007_000032.jpg /SegmentationClassAug/2007_000032.png\n2008_000002\n\n"
    )
    mask(root / "SegmentationClass" / "2007_000032.png", 0, 20, 255, palette=True)
    mask(root / "SegmentationClass" / "2007_000039.png", 1, palette=True)
    for name in ("2007_000032", "2008_000002"):
        mask(root / "SegmentationClassAug" / f"{name}.png", 0, 20, 255)


def ade20k(root: Path) -> None:
    for split, name in (("training", "ADE_train_00000001"), ("validation", "ADE_val_00000001")):
        image(root / "images" / split / f"{name}.jpg")
        mask(root / "annotations" / split / f"{name}.png", 0, 1, 150)


def coco_stuff(root: Path, images: str = "images/") -> None:
    for split, name in (("train2017", "000000000009"), ("val2017", "000000000139")):
        image(root / f"{images}{split}" / f"{name}.jpg")
        mask(root / "stuffthingmaps" / split / f"{name}.png", 0, 181, 255, 10)


@pytest.mark.parametrize(("kind", "values"), [("labelIds", (7, 33, 0, 10)), ("labelTrainIds", (0, 18, 255, 255))])
def test_cityscapes(tmp_path, kind, values):
    cityscapes(tmp_path, kind, values)
    dataset = open_dataset("cityscapes", str(tmp_path), "train", {})
    assert [dataset.name(i) for i in range(len(dataset))] == ["aachen_000000_000019", "zurich_000001_000019"]
    assert rows(dataset) == [0, 18, IGNORE, IGNORE]
    assert (dataset.classes[0], dataset.classes[18], len(dataset.classes)) == ("road", "bicycle", 19)
    assert dataset.palette[[0, 18]].tolist() == [[128, 64, 128], [119, 11, 32]]
    assert check_dataset(dataset).ok


def test_every_label_of_cityscapes_is_known():
    """0 to 33, and 255, which is what the licence plate's -1 becomes in 8 bits."""
    table = shipped_legend("cityscapes").table
    assert sorted(value for value in table[[*range(34), 255]] if value != IGNORE) == list(range(19))
    assert [int(table[value]) for value in (8, 11, 17, 19, 24, 26, 28, 31)] == [1, 2, 5, 6, 11, 13, 15, 16]


def test_voc_and_its_augmented_list(tmp_path):
    voc(tmp_path / "VOCdevkit" / "VOC2012")
    for root in (tmp_path, tmp_path / "VOCdevkit", tmp_path / "VOCdevkit" / "VOC2012"):
        train = open_dataset("voc", str(root), "train", {})
        assert (len(train), rows(train), rows(train, 1)) == (2, [0, 20, IGNORE, IGNORE], [1, 1, 1, 1])
    augmented = open_dataset("voc", str(tmp_path), "trainaug", {})
    assert [augmented.name(i) for i in range(2)] == ["2007_000032", "2008_000002"]
    assert rows(augmented, 1) == [0, 20, IGNORE, IGNORE]
    assert (train.classes[0], train.classes[20], len(train.classes)) == ("background", "tvmonitor", 21)
    assert train.palette[20].tolist() == [0, 64, 128]


@pytest.mark.parametrize("below", ["", "ADEChallengeData2016"])
def test_ade20k_counts_from_one(tmp_path, below):
    ade20k(tmp_path / below)
    for split in ("train", "val"):
        dataset = open_dataset("ade20k", str(tmp_path), split, {})
        assert rows(dataset) == [IGNORE, 0, 149, 149]
    assert (dataset.classes[0], dataset.classes[149], len(dataset.classes)) == ("wall", "flag", 150)


@pytest.mark.parametrize("images", ["images/", ""])
def test_coco_stuff_closes_its_gaps(tmp_path, images):
    coco_stuff(tmp_path, images)
    dataset = open_dataset("coco_stuff", str(tmp_path), "val", {})
    assert rows(dataset) == [0, 170, IGNORE, 10]
    assert (dataset.classes[0], dataset.classes[10], dataset.classes[11], dataset.classes[170]) == (
        "person",
        "fire hydrant",
        "stop sign",
        "wood",
    )
    mask(tmp_path / "stuffthingmaps" / "val2017" / "000000000139.png", 11)  # a street sign, which never occurs
    with pytest.raises(GSKDError, match="11 in 24 pixels"):
        dataset[0]


MAKERS = {"cityscapes": cityscapes, "voc": voc, "ade20k": ade20k, "coco_stuff": coco_stuff}
SOURCES = {
    "cityscapes": "cityscapes-dataset.com",
    "voc": "VOCtrainval_11-May-2012.tar",
    "ade20k": "ADEChallengeData2016.zip",
    "coco_stuff": "stuffthingmaps_trainval2017.zip",
}


@pytest.mark.parametrize("name", MAKERS)
def test_what_is_missing_is_named_with_where_to_get_it(tmp_path, name):
    def refused(split: str = "train") -> str:
        with pytest.raises(GSKDError) as caught:
            open_dataset(name, str(tmp_path), split, {})
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert SOURCES[name] in refused()
    MAKERS[name](tmp_path)
    open_dataset(name, str(tmp_path), "train", {})
    assert "has no split 'trian'" in refused("trian")
    victim = next(
        path for path in sorted(tmp_path.rglob("*.png")) if "instance" not in path.name and "left" not in path.name
    )
    victim.unlink()
    said = refused("val" if "val" in victim.parent.name else "train")
    assert victim.stem.split("_gtFine")[0] in said or "holds no mask" in said


def test_names_in_a_list_stay_below_the_root(tmp_path):
    voc(tmp_path)
    (tmp_path / "ImageSets" / "Segmentation" / "train.txt").write_text("../../../etc/2007_000032\n")
    assert open_dataset("voc", str(tmp_path), "train", {}).name(0) == "2007_000032"


# Legends in files


def legend(folder: Path, text: str, mask_kind: str = "index"):
    (folder / "classes.csv").write_text(text)
    return read_legend(folder / "classes.csv", mask_kind)


def test_a_file_of_classes(tmp_path):
    for split in ("train", "val"):
        image(tmp_path / "images" / split / "a.jpg")
        mask(tmp_path / "masks" / split / "a.png", 3, 10, 0, 255)
    text = "name,value,red,green,blue\nroad,10,1,2,3\ncar,3,4,5,6\n,0,0,0,0\n,255,0,0,0\n"
    (tmp_path / "classes.csv").write_text(text)
    dataset = open_dataset("folder", str(tmp_path), "train", {"classes": "classes.csv"})
    assert rows(dataset) == [1, 0, IGNORE, IGNORE]
    assert dataset.classes == ("road", "car")
    assert dataset.palette.tolist() == [[1, 2, 3], [4, 5, 6]]
    mask(tmp_path / "masks" / "train" / "a.png", 4)
    with pytest.raises(GSKDError, match=r"outside the 2 classes \(3, 10\) and not ignored: 4 in 24 pixels"):
        dataset[0]
    with pytest.raises(GSKDError, match=r"palette: is told by the file of classes, classes\.csv"):
        open_dataset("folder", str(tmp_path), "train", {"classes": "classes.csv", "palette": []})
    with pytest.raises(GSKDError, match="expected a file below the dataset's root"):
        open_dataset("folder", str(tmp_path), "train", {"classes": "../classes.csv"})


def test_names_alone_are_enough(tmp_path):
    read = legend(tmp_path, "name\nroad\ncar\n")
    assert (read.classes, read.table[[0, 1, 255]].tolist()) == (("road", "car"), [0, 1, IGNORE])
    assert read.palette.tolist() == [[0, 0, 0], [128, 0, 0]]


def test_colours_tell_the_class(tmp_path):
    text = "name,red,green,blue\nroad,1,2,3\ncar,4,5,6\n,7,8,9\n"
    table = legend(tmp_path, text, "colour").table
    assert table[[0x010203, 0x040506, 0x070809]].tolist() == [0, 1, IGNORE]


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "expected columns name,value,red,green,blue, found no rows"),
        ("class,id\nroad,1\n", "found class,id"),
        ("name,value\nroad,1\ncar,x\n", "line 3: value: expected a whole number from 0 to 65535, found 'x'"),
        ("name,value\nroad,1\ncar,1\n", "value 1 stands for more than one class"),
        ("name,value\nroad,1\nroad,2\n", "names road more than once"),
        ("name,red,green,blue\nroad,1,2,300\ncar,1,1,1\n", "line 2: blue: expected a whole number from 0 to 255"),
        ("name,value\nroad,1\ncar,2\n,2\n", "value 2 stands for car and is ignored too"),
        ("name,value\nroad\ncar,2\n", "line 2: value: expected a whole number"),
        ("name\nroad\n", "found 1, expected 2 to 254"),
    ],
)
def test_a_broken_file_of_classes_says_where(tmp_path, text, part):
    with pytest.raises(GSKDError) as caught:
        legend(tmp_path, text)
    assert part in str(caught.value)
    assert "classes.csv" in str(caught.value)


def test_a_colour_is_a_class_or_ignored_and_not_both(tmp_path):
    """What is ignored won without a word, and a class was learned by nobody."""
    with pytest.raises(GSKDError, match=r"classes\.csv: colour \(4, 5, 6\) stands for car and is ignored too"):
        legend(tmp_path, "name,red,green,blue\nroad,1,2,3\ncar,4,5,6\n,4,5,6\n", "colour")
