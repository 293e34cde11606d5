"""Tables of Hugging Face datasets, as their library writes them."""

import io

import numpy as np
import pytest
from PIL import Image

from gskd import GSKDError
from gskd.data.datasets import open_dataset
from helpers import gskd_ok, write_png, write_recipe

datasets = pytest.importorskip("datasets", reason="needs the extra datasets")
CLASSES = {"classes": ["road", "sky", "car"]}


def picture(pixels, mode=None):
    file = io.BytesIO()
    Image.fromarray(pixels, mode).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def rows(count=4, size=(40, 48)):
    generator = np.random.default_rng(0)
    images = [generator.integers(0, 256, (*size, 3), dtype=np.uint8) for _ in range(count)]
    masks = [generator.integers(0, 3, size, dtype=np.uint8) for _ in range(count)]
    for mask in masks:
        mask[:5] = 255
    return images, masks


def save(folder, images, masks, split="train", **names):
    columns = {
        "pixel_values": [picture(one) for one in images],
        "label": [picture(one) for one in masks],
        "id": [0] * len(images),
    }
    features = datasets.Features(
        {"pixel_values": datasets.Image(), "label": datasets.Image(), "id": datasets.Value("int32")}
    )
    table = datasets.Dataset.from_dict(columns, features)
    datasets.DatasetDict({split: table, "val": table}).save_to_disk(str(folder))
    return str(folder)


def test_rows_are_what_was_saved(tmp_path):
    images, masks = rows()
    data = open_dataset("hub", save(tmp_path / "d", images, masks), "train", {**CLASSES, "image": "pixel_values"})
    assert len(data) == 4
    assert data.classes == ("road", "sky", "car")
    for index, (image, mask) in enumerate(zip(images, masks, strict=True)):
        assert np.array_equal(data[index].image, image)
        assert np.array_equal(data[index].label, mask)
        assert data[index].name == data.name(index) == f"row-{index:06d}"


def test_the_stamp_is_of_the_content(tmp_path):
    images, masks = rows()
    options = {**CLASSES, "image": "pixel_values"}
    first = open_dataset("hub", save(tmp_path / "a", images, masks), "train", options)
    again = open_dataset("hub", save(tmp_path / "b", images, masks), "train", options)
    masks[2][10, 10] = (masks[2][10, 10] + 1) % 3
    other = open_dataset("hub", save(tmp_path / "c", images, masks), "train", options)
    assert first.stamp() == again.stamp() != other.stamp()
    assert (
        first.stamp()
        != open_dataset("hub", str(tmp_path / "a"), "train", {**options, "ignore_values": [2, 255]}).stamp()
    )


def test_colours(tmp_path):
    images, masks = rows()
    palette = np.array([[128, 64, 128], [0, 0, 255], [9, 9, 9]], np.uint8)
    coloured = [np.where((mask == 255)[..., None], 0, palette[mask % 255 % 3]).astype(np.uint8) for mask in masks]
    options = {
        "classes": CLASSES["classes"],
        "image": "pixel_values",
        "mask_kind": "colour",
        "palette": palette.tolist(),
        "ignore_colours": [[0, 0, 0]],
    }
    data = open_dataset("hub", save(tmp_path / "d", images, coloured), "train", options)
    assert np.array_equal(data[1].label, masks[1])


@pytest.mark.parametrize(
    ("split", "options", "words"),
    [
        ("train", {"image": "pixel_values"}, "needs the option 'classes'"),
        ("train", CLASSES, "no column 'image'"),
        ("train", {**CLASSES, "image": "id"}, "column 'id' holds"),
        ("test", {**CLASSES, "image": "pixel_values"}, "no split 'test', it has train, val"),
        ("train", {**CLASSES, "picture": "pixel_values"}, "no option 'picture'"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, split, options, words):
    root = save(tmp_path / "d", *rows())
    with pytest.raises(GSKDError, match=words):
        open_dataset("hub", root, split, options)


def test_what_is_no_dataset_is_named(tmp_path, monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "empty", "nobody/nothing"):
        with pytest.raises(GSKDError, match="cannot be opened"):
            open_dataset("hub", str(place), "train", CLASSES)


def test_rows_that_cannot_be_used_are_named(tmp_path):
    images, masks = rows()
    masks[0][20, 20] = 7
    masks[1] = masks[1][:30]
    masks[2] = np.repeat(masks[2][..., None], 3, axis=2)
    data = open_dataset("hub", save(tmp_path / "d", images, masks), "train", {**CLASSES, "image": "pixel_values"})
    for index, words in enumerate(["7", "48 x 30, its image 48 x 40", "the mask is RGB"]):
        with pytest.raises(GSKDError, match=f"row-{index:06d}.*{words}"):
            data[index]
    assert data[3].label.shape == (40, 48)


def test_a_recipe_trains_on_one(tmp_path):
    root = save(tmp_path / "d", *rows(4, (64, 64)))
    data = {"dataset": "hub", "root": root, "options": {**CLASSES, "image": "pixel_values"}}
    recipe = write_recipe(tmp_path / "r.yaml", tmp_path / "run", data=data)
    assert "mIoU" in gskd_ok("train", recipe, "train.steps=2").out
    gskd_ok("data", "check", recipe)


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"<html>moved</html>", "not a readable mask"), (None, "is empty, expected an image")],
)
def test_a_mask_that_is_none_is_named(tmp_path, content, words):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Image()})
    label = None if content is None else {"bytes": content, "path": None}
    table = datasets.Dataset.from_dict({"image": [picture(rows(1)[0][0])], "label": [label]}, features)
    table.save_to_disk(str(tmp_path / "d"))
    data = open_dataset("hub", str(tmp_path / "d"), "train", CLASSES)
    with pytest.raises(GSKDError, match=f"row-000000: label: .*{words}|row-000000: label: {words}"):
        data[0]


def test_masks_of_few_bits_are_read_as_stored(tmp_path):
    """Pillow stretches 2 bits to 0..255: the same reader as for files puts that right."""
    write_png(tmp_path / "mask.png", [bytes([0b00_01_10_01])], 4, depth=2, colour_type=0)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Image()})
    columns = {
        "image": [picture(np.zeros((1, 4, 3), np.uint8))],
        "label": [{"bytes": (tmp_path / "mask.png").read_bytes(), "path": None}],
    }
    datasets.Dataset.from_dict(columns, features).save_to_disk(str(tmp_path / "d"))
    data = open_dataset("hub", str(tmp_path / "d"), "train", CLASSES)
    assert data[0].label.tolist() == [[0, 1, 2, 1]]


def single(folder, split):
    """A table on its own, as `load_dataset(..., split="train").save_to_disk` leaves it."""
    images, masks = rows(2)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Image()})
    columns = {"image": [picture(one) for one in images], "label": [picture(one) for one in masks]}
    datasets.Dataset.from_dict(columns, features, split=split).save_to_disk(str(folder))
    return str(folder)


def test_a_table_on_its_own_is_one_split_and_not_all(tmp_path):
    """Else a network is scored on what it was trained on."""
    known, unknown = single(tmp_path / "a", datasets.Split.VALIDATION), single(tmp_path / "b", None)
    assert len(open_dataset("hub", known, "validation", CLASSES)) == 2
    assert len(open_dataset("hub", unknown, "train", CLASSES)) == 2
    for root, held in ((known, "validation"), (unknown, "train")):
        with pytest.raises(GSKDError, match=f"has no split 'val', it is a table on its own, {held}.*DatasetDict"):
            open_dataset("hub", root, "val", CLASSES)


@pytest.mark.parametrize("kind", ["index", "colour"])
def test_a_lossy_mask_is_refused(tmp_path, kind):
    file = io.BytesIO()
    Image.fromarray(rows(1)[1][0]).save(file, "JPEG")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Image()})
    columns = {"image": [picture(rows(1)[0][0])], "label": [{"bytes": file.getvalue(), "path": None}]}
    datasets.Dataset.from_dict(columns, features).save_to_disk(str(tmp_path / "d"))
    options = {**CLASSES, "mask_kind": kind, "palette": [[0, 0, 0], [1, 1, 1], [2, 2, 2]]}
    data = open_dataset("hub", str(tmp_path / "d"), "train", options)
    with pytest.raises(GSKDError, match=r"row-000000: label: the mask is JPEG.*change labels"):
        data[0]


def test_values_beyond_sixteen_bits_are_named(tmp_path):
    mask = np.array([[0, 70000], [1, 2]], np.int32)
    file = io.BytesIO()
    Image.fromarray(mask).save(file, "TIFF")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Image()})
    columns = {
        "image": [picture(np.zeros((2, 2, 3), np.uint8))],
        "label": [{"bytes": file.getvalue(), "path": None}],
    }
    datasets.Dataset.from_dict(columns, features).save_to_disk(str(tmp_path / "d"))
    data = open_dataset("hub", str(tmp_path / "d"), "train", CLASSES)
    with pytest.raises(GSKDError, match=r"row-000000: label values outside the 3 classes .* 70000 in 1 pixel"):
        data[0]
