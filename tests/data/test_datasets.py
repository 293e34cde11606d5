import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gskd.data import IGNORE, Sample
from gskd.data.datasets import Cached, open_dataset
from gskd.data.layouts import camvid, folder_pairs
from gskd.data.legend import make_legend
from gskd.data.pairs import Pairs
from gskd.errors import GSKDError
from helpers import write_png

CLASSES = ("road", "sky", "car")
PALETTE = ((128, 64, 128), (70, 130, 180), (0, 0, 142))
LABEL = np.array([[0, 1, 2, 255], [2, 2, 1, 0], [255, 0, 0, 1]], np.uint8)


def save_image(path: Path, shape=(3, 4), value=(10, 200, 30), **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*shape, 3), value, np.uint8)).save(path, **options)


def save_mask(path: Path, values=LABEL) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values)).save(path)


@pytest.fixture
def tree(tmp_path) -> Path:
    for stem in ("b", "a"):
        save_image(tmp_path / "images" / "train" / f"{stem}.jpg")
        save_mask(tmp_path / "masks" / "train" / f"{stem}.png")
    return tmp_path


def pairs(tree: Path, classes=CLASSES, **options) -> Pairs:
    return folder_pairs(tree / "images" / "train", tree / "masks" / "train", make_legend(classes, **options))


def fails(call, *parts: str) -> str:
    """The one-line message of the GSKDError that ``call`` raises, which holds all the parts."""
    with pytest.raises(GSKDError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message
    return message


# Reading


def test_samples_are_sorted_by_stem_and_keep_the_protocol(tree):
    dataset = pairs(tree)
    assert [dataset.name(i) for i in range(len(dataset))] == ["a", "b"]
    sample = dataset[0]
    assert isinstance(sample, Sample)
    assert sample.name == "a"
    assert sample.image.dtype == sample.label.dtype == np.uint8
    assert sample.image.shape == (3, 4, 3)
    np.testing.assert_array_equal(sample.label, LABEL)
    assert dataset.classes == CLASSES
    assert dataset.palette.shape == (3, 3)
    assert dataset.palette.dtype == np.uint8
    with pytest.raises(IndexError):
        dataset[2]


def test_palette_png_gives_its_indices_not_its_colours(tree):
    mask = Image.frombytes("P", (4, 3), LABEL.tobytes())
    mask.putpalette([v for k in range(256) for v in (255 - k, k // 2, 77)])
    mask.save(tree / "masks" / "train" / "a.png")
    np.testing.assert_array_equal(pairs(tree)[0].label, LABEL)


def test_sixteen_bit_mask(tree):
    stored = np.where(LABEL == 255, 65535, LABEL).astype(np.uint16)
    save_mask(tree / "masks" / "train" / "a.png", stored)
    np.testing.assert_array_equal(pairs(tree, ignore_values=(255, 65535))[0].label, LABEL)
    stored[0, 0] = 257  # 1 in its low byte
    save_mask(tree / "masks" / "train" / "a.png", stored)
    fails(lambda: pairs(tree, ignore_values=(65535,))[0], "a.png", "257 in 1 pixel")


def test_one_two_and_four_bit_greyscale_masks_are_not_stretched(tree):
    path = tree / "masks" / "train" / "a.png"
    save_image(tree / "images" / "train" / "a.jpg", (1, 4))
    write_png(path, [bytes([0b00_01_10_01])], 4, depth=2, colour_type=0)
    np.testing.assert_array_equal(pairs(tree)[0].label, [[0, 1, 2, 1]])
    write_png(path, [bytes([0x02, 0x1F])], 4, depth=4, colour_type=0)
    np.testing.assert_array_equal(pairs(tree, ignore_values=(15,))[0].label, [[0, 2, 1, IGNORE]])
    write_png(path, [bytes([0b0110_0000])], 4, depth=1, colour_type=0)
    np.testing.assert_array_equal(pairs(tree)[0].label, [[0, 1, 1, 0]])


def test_two_bit_palette_mask(tree):
    save_image(tree / "images" / "train" / "a.jpg", (1, 4))
    mask = Image.frombytes("P", (4, 1), bytes([0, 1, 2, 1]))
    mask.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255])
    mask.save(tree / "masks" / "train" / "a.png", bits=2)
    np.testing.assert_array_equal(pairs(tree)[0].label, [[0, 1, 2, 1]])


def test_ignore_values_win_over_classes_and_replace_the_default(tree):
    label = pairs(tree, ignore_values=(2, 255))[0].label
    np.testing.assert_array_equal(label, np.where(LABEL == 2, IGNORE, LABEL))
    fails(lambda: pairs(tree, ignore_values=(7,))[0], "255 in 2 pixels")


def test_colour_masks(tree):
    colours = np.array([*PALETTE, (0, 0, 0)], np.uint8)
    save_mask(tree / "masks" / "train" / "a.png", colours[np.where(LABEL == 255, 3, LABEL)])
    options = {"palette": PALETTE, "mask_kind": "colour"}
    np.testing.assert_array_equal(pairs(tree, **options, ignore_colours=[(0, 0, 0)])[0].label, LABEL)
    fails(lambda: pairs(tree, **options)[0], tree / "masks" / "train" / "a.png", "(0, 0, 0) in 2 pixels")


def test_colour_masks_in_palette_and_alpha_png(tree):
    index = np.where(LABEL == 255, 0, LABEL)
    mask = Image.frombytes("P", (4, 3), index.tobytes())
    mask.putpalette([v for colour in PALETTE for v in colour])
    mask.save(tree / "masks" / "train" / "a.png")
    mask.convert("RGBA").save(tree / "masks" / "train" / "b.png")
    dataset = pairs(tree, palette=PALETTE, mask_kind="colour")
    np.testing.assert_array_equal(dataset[0].label, index)
    np.testing.assert_array_equal(dataset[1].label, index)


def test_every_image_mode_becomes_rgb(tree):
    folder = tree / "images" / "train"
    source = np.zeros((3, 4, 3), np.uint8)
    source[:] = (250, 120, 10)
    rgb = Image.fromarray(source)
    rgb.save(folder / "rgb.png")
    rgb.save(folder / "bitmap.BMP")
    rgb.save(folder / "lossless.webp", lossless=True)
    translucent = rgb.convert("RGBA")
    translucent.putalpha(9)
    translucent.save(folder / "rgba.png")
    rgb.quantize(2).save(folder / "palette.png")
    rgb.quantize(2).save(folder / "transparent.png", transparency=bytes([9, 255]))
    for stem in ("rgb", "bitmap", "lossless", "rgba", "palette", "transparent"):
        save_mask(tree / "masks" / "train" / f"{stem}.png")
    dataset = pairs(tree)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i in range(len(dataset)):
            if dataset.name(i) not in ("a", "b"):
                np.testing.assert_array_equal(dataset[i].image, source, dataset.name(i))


def test_grey_cmyk_and_sixteen_bit_images_become_rgb(tree):
    folder = tree / "images" / "train"
    Image.fromarray(np.full((3, 4), 90, np.uint8)).save(folder / "a.jpg")
    Image.new("CMYK", (4, 3), (0, 255, 255, 0)).save(folder / "b.jpg", quality=100)
    Image.fromarray(np.full((3, 4), 90 << 8 | 13, np.uint16)).save(folder / "c.png")
    save_mask(tree / "masks" / "train" / "c.png")
    grey, cmyk, deep = (pairs(tree)[i].image for i in range(3))
    assert grey.shape == cmyk.shape == deep.shape == (3, 4, 3)
    assert np.abs(grey.astype(int) - 90).max() <= 1
    assert np.abs(cmyk.astype(int) - (255, 0, 0)).max() <= 8
    assert (deep == 90).all()


def test_exif_orientation_is_not_applied(tree):
    exif = Image.Exif()
    exif[0x0112] = 6
    save_image(tree / "images" / "train" / "a.jpg", exif=exif)
    assert pairs(tree)[0].image.shape == (3, 4, 3)
    save_mask(tree / "masks" / "train" / "a.png", LABEL.T.copy())
    fails(lambda: pairs(tree)[0], "3 x 4", "4 x 3", "EXIF")


def test_samples_can_be_written_to_and_do_not_share_memory(tree):
    dataset = pairs(tree)
    sample = dataset[0]
    sample.image[:] = 0
    sample.label[:] = 0
    np.testing.assert_array_equal(dataset[0].label, LABEL)


# Errors in files


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".bmp"])
def test_a_file_cut_short_is_an_error_or_all_there(tree, suffix):
    (tree / "images" / "train" / "a.jpg").unlink()
    image = tree / "images" / "train" / f"a{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (3, 4, 3), np.uint8)
    Image.fromarray(noise).save(image)
    whole, pixels = image.read_bytes(), pairs(tree)[0].image
    messages = []
    for cut in range(len(whole)):
        image.write_bytes(whole[:cut])
        try:
            np.testing.assert_array_equal(pairs(tree)[0].image, pixels)
        except GSKDError as error:
            messages.append(str(error))
    assert len(messages) > len(whole) / 2
    assert all(m.startswith(f"{image}: not a readable image: ") and "\n" not in m for m in messages)


def test_a_mask_cut_short_and_files_that_are_no_images(tree):
    image, mask = tree / "images" / "train" / "a.jpg", tree / "masks" / "train" / "a.png"
    whole = mask.read_bytes()
    for cut in (0, 20, 40, 50):
        mask.write_bytes(whole[:cut])
        fails(lambda: pairs(tree)[0], mask, "not a readable mask")
    image.write_text("<html>moved</html>")
    fails(lambda: pairs(tree)[0], image, "not a readable image")
    assert pairs(tree)[1].name == "b"


def test_label_outside_the_classes_names_values_and_file(tree):
    mask = tree / "masks" / "train" / "b.png"
    save_mask(mask, np.array([[0, 3, 3, 9], [0, 0, 0, 0], [254, 1, 2, 255]], np.uint8))
    fails(lambda: pairs(tree)[1], mask, "3 in 2 pixels", "9 in 1 pixel", "254 in 1 pixel", "3 classes (0 to 2)")


def test_many_unknown_values_are_counted(tree):
    save_mask(tree / "masks" / "train" / "a.png", np.arange(20, 32, dtype=np.uint8).reshape(3, 4))
    fails(lambda: pairs(tree)[0], "and 7 more")


def test_mask_of_another_size(tree):
    save_mask(tree / "masks" / "train" / "a.png", np.zeros((3, 5), np.uint8))
    message = fails(lambda: pairs(tree)[0], "a.png", "5 x 3", "a.jpg", "4 x 3")
    assert "EXIF" not in message


def test_rgb_mask_read_as_index(tree):
    save_image(tree / "masks" / "train" / "a.png")
    fails(lambda: pairs(tree)[0], "a.png", "RGB", "mask_kind")


# Errors in folders


def test_masks_in_a_lossy_format(tree):
    for mask in (tree / "masks" / "train").iterdir():
        save_image(mask.with_suffix(".jpg"))
        mask.unlink()
    fails(lambda: pairs(tree), "holds no mask (.png) but a.jpg, b.jpg: lossy formats change labels")


@pytest.mark.parametrize(("kind", "suffix"), [("JPEG", "jpg"), ("WEBP", "webp")])
def test_a_mask_that_was_only_renamed_to_png(tree, kind, suffix):
    path = tree / "masks" / "train" / "a.png"
    Image.fromarray(LABEL).convert("RGB" if kind == "WEBP" else "L").save(path, kind)
    fails(lambda: pairs(tree)[0], path, f"the mask is {kind}", "lossy formats change labels")
    fails(lambda: pairs(tree, palette=PALETTE, mask_kind="colour")[0], path, f"the mask is {kind}")


def test_a_link_that_leads_nowhere_is_an_error_and_no_smaller_dataset(tree):
    (tree / "images" / "train" / "c.jpg").symlink_to(tree / "gone.jpg")
    (tree / "masks" / "train" / "c.png").symlink_to(tree / "gone.png")
    dataset = pairs(tree)
    assert len(dataset) == 3
    fails(lambda: dataset[2], "c.jpg", "not a readable image")


def test_images_without_a_mask_are_found_at_once(tree):
    for k in range(7):
        save_image(tree / "images" / "train" / f"bare{k}.png")
    fails(lambda: pairs(tree), tree / "images" / "train", "7 of 9 images", "bare0.png", "and 2 more")


def test_masks_without_an_image_are_kept_aside(tree):
    save_mask(tree / "masks" / "train" / "lost.png")
    dataset = pairs(tree)
    assert len(dataset) == 2
    assert dataset.unused_masks == ("lost.png",)


def test_two_files_with_one_stem(tree):
    save_image(tree / "images" / "train" / "a.png")
    fails(lambda: pairs(tree), tree / "images" / "train", "a.jpg", "a.png", "'a'")


def test_hidden_files_are_passed_over(tree):
    (tree / "images" / "train" / "._a.jpg").write_bytes(b"\0\5")
    (tree / "masks" / "train" / ".DS_Store").write_bytes(b"\0")
    assert len(pairs(tree)) == 2


def test_missing_root_and_split(tree):
    options = {"classes": CLASSES}
    wrong = tree.parent / (tree.name + "x")
    fails(lambda: open_dataset("folder", str(wrong), "train", options), wrong, "does not exist", f"mean '{tree.name}'")
    fails(lambda: open_dataset("folder", str(tree), "trian", options), tree / "images" / "trian", "mean 'train'")
    (tree / "images" / "val").write_text("")
    fails(lambda: open_dataset("folder", str(tree), "val", options), "is not a folder")


def test_empty_split_names_the_folder_and_its_full_neighbour(tree):
    empty = tree / "images" / "Training"
    empty.mkdir()
    (tree / "images" / "train_empty").mkdir()
    message = fails(
        lambda: open_dataset("folder", str(tree), "Training", {"classes": CLASSES}), empty, "beside it train "
    )
    assert "train_empty" not in message
    far = tree / "images" / "zzz"
    far.mkdir()
    assert "beside" not in fails(lambda: open_dataset("folder", str(tree), "zzz", {"classes": CLASSES}), far)


def test_missing_and_empty_mask_folder(tree):
    for path in (tree / "masks" / "train").iterdir():
        path.rename(path.with_suffix(".gif"))
    fails(lambda: pairs(tree), "mask folder", tree / "masks" / "train", ".png")
    (tree / "masks" / "train").rename(tree / "masks" / "training")
    fails(lambda: pairs(tree), "mask folder", tree / "masks" / "train", "mean 'training'")


def test_nested_images_are_pointed_out(tree):
    save_image(tree / "images" / "val" / "aachen" / "a.jpg")
    fails(lambda: open_dataset("folder", str(tree), "val", {"classes": CLASSES}), "aachen", "subfolders are not read")


# Classes and palettes


def test_class_limits(tree):
    assert pairs(tree, classes=[f"c{k}" for k in range(254)]).classes[-1] == "c253"
    fails(lambda: pairs(tree, classes=[f"c{k}" for k in range(255)]), "found 255", "254")
    fails(lambda: pairs(tree, classes=[]), "found 0")
    fails(lambda: pairs(tree, classes=["lane"]), "found 1", "background")
    fails(lambda: pairs(tree, classes="road"), "expected a list")
    fails(lambda: pairs(tree, classes=("road", "sky", "road")), "road", "more than once")


def test_a_class_called_no_is_asked_to_be_quoted(tree):
    """YAML reads no, off and null as values; a class named "False" is nobody's."""
    fails(lambda: pairs(tree, (False, True)), "classes has False", "put the name in quotes")
    fails(lambda: pairs(tree, ("road", None)), "classes has None", "put the name in quotes")
    assert pairs(tree, (0, 1, 2)).classes == ("0", "1", "2")


def test_highest_class_index_is_not_taken_for_unknown(tree):
    save_mask(tree / "masks" / "train" / "a.png", np.full((3, 4), 253, np.uint8))
    assert (pairs(tree, classes=[f"c{k}" for k in range(254)])[0].label == 253).all()
    save_mask(tree / "masks" / "train" / "a.png", np.full((3, 4), 254, np.uint8))
    fails(lambda: pairs(tree, classes=[f"c{k}" for k in range(254)])[0], "254 in 12 pixels")


def test_palette_errors(tree):
    fails(lambda: pairs(tree, palette=PALETTE[:2]), "2 colours for 3 classes")
    fails(lambda: pairs(tree, palette=[(0, 0, 0), (1, 1, 1), (0, 0, 256)]), "[0, 0, 256]")
    fails(lambda: pairs(tree, palette=[0, 1, 2]), "palette", "expected a list")
    fails(lambda: pairs(tree, mask_kind="colour"), "needs a palette")
    same = [(0, 0, 0), (9, 9, 9), (0, 0, 0)]
    fails(lambda: pairs(tree, palette=same, mask_kind="colour"), "classes 0 and 2", "(0, 0, 0)")
    fails(lambda: pairs(tree, mask_kind="color", palette=PALETTE), "'color'", "mean 'colour'")
    fails(lambda: pairs(tree, ignore_colours=[(0, 0, 0)]), "ignore_values")
    fails(lambda: pairs(tree, ignore_values=(-1,)), "-1")
    fails(lambda: pairs(tree, ignore_values=255), "ignore_values", "expected a list")


def test_default_palette_is_the_voc_colour_map(tree):
    palette = pairs(tree, classes=[f"c{k}" for k in range(254)]).palette
    assert palette[:4].tolist() == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0]]
    assert palette[20].tolist() == [0, 64, 128]  # tvmonitor, the last class of VOC
    assert len(np.unique(palette, axis=0)) == 254


# By name


def test_open_folder_with_its_own_patterns(tree):
    (tree / "images" / "train").rename(tree / "rgb_train")
    (tree / "masks" / "train").rename(tree / "gt_train")
    options = {"classes": list(CLASSES), "images": "rgb_{split}", "masks": "gt_{split}", "ignore_values": [255]}
    dataset = open_dataset("folder", str(tree), "train", options)
    assert len(dataset) == 2
    np.testing.assert_array_equal(dataset[1].label, LABEL)


def test_open_dataset_errors(tree):
    fails(lambda: open_dataset("camvids", str(tree), "train", {}), "'camvids'", "mean 'camvid'")
    fails(lambda: open_dataset("folder", str(tree), "train", {"clases": CLASSES}), "'clases'", "'classes'")
    fails(lambda: open_dataset("folder", str(tree), "train", {}), "'classes'")
    fails(lambda: open_dataset("folder", None, "train", {"classes": CLASSES}), "'folder'", "root")
    fails(lambda: open_dataset("camvid", str(tree), "train", {"size": 3}), "'size'", "takes none")
    fails(lambda: open_dataset("scenes", str(tree), "train", {}), "'scenes'", "root")
    fails(lambda: open_dataset("scenes", None, "train", {"length": "many"}), "length", "'many'")
    fails(lambda: open_dataset("scenes", None, "train", {"size": 64}), "size", "64")


def test_open_scenes():
    dataset = open_dataset("scenes", None, "train", {"length": 2, "size": [24, 32], "seed": 3})
    assert len(dataset) == 2
    assert dataset[1].label.shape == (24, 32)


# CamVid


def test_camvid_layout_and_void(tmp_path):
    save_image(tmp_path / "val" / "x.png")
    save_mask(tmp_path / "valannot" / "x.png", np.array([[0, 10, 11, 11]] * 3, np.uint8))
    dataset = camvid(tmp_path, "val")
    assert dataset[0].label[0].tolist() == [0, 10, IGNORE, IGNORE]
    assert len(dataset.classes) == len(dataset.palette) == 11
    save_mask(tmp_path / "valannot" / "x.png", np.full((3, 4), 12, np.uint8))
    fails(lambda: dataset[0], "12 in 12 pixels")
    fails(lambda: camvid(tmp_path, "valid"), "'valid'", "mean 'val'")
    fails(lambda: camvid(tmp_path, "test"), tmp_path / "test")


@pytest.mark.parametrize(("split", "length"), [("train", 367), ("val", 101), ("test", 233)])
def test_real_camvid_counts(camvid_root, split, length):
    dataset = open_dataset("camvid", str(camvid_root), split, {})
    assert len(dataset) == length
    assert dataset[0].image.shape == (360, 480, 3)


# Cached


class Counting:
    classes = CLASSES
    palette = np.array(PALETTE, np.uint8)

    def __init__(self) -> None:
        self.reads: list[int] = []

    def __len__(self) -> int:
        return 4

    def name(self, index: int) -> str:
        return f"n{index}"

    def __getitem__(self, index: int) -> Sample:
        self.reads.append(index)
        rng = np.random.default_rng(index % 4)
        image, label = rng.integers(0, 256, (16, 16, 3), np.uint8), rng.integers(0, 3, (16, 16), np.uint8)
        return Sample(image, label, self.name(index))


def test_cache_reads_once_within_its_budget_and_through_beyond():
    source = Counting()
    cached = Cached(source, gib=2.5 * 16 * 16 * 4 / 2**30)
    for _ in range(2):
        for index in range(4):
            sample = cached[index]
            np.testing.assert_array_equal(sample.image, Counting()[index].image)
            np.testing.assert_array_equal(sample.label, Counting()[index].label)
    assert source.reads == [0, 1, 2, 3, 2, 3]
    assert (len(cached), cached.name(2), cached.classes) == (4, "n2", CLASSES)


def test_cache_survives_edits_in_place_and_negative_indices():
    source = Counting()
    cached = Cached(source)
    for _ in range(2):
        cached[3].image[:] = 0
        cached[3].label[:] = 0
    np.testing.assert_array_equal(cached[-1].image, Counting()[3].image)
    np.testing.assert_array_equal(cached[-1].label, Counting()[3].label)
    assert source.reads == [3]


def test_cache_of_no_budget_and_of_a_negative_one():
    source = Counting()
    cached = Cached(source, gib=0)
    _ = cached[0], cached[0]
    assert source.reads == [0, 0]
    fails(lambda: Cached(source, gib=-1), "-1")


def test_datasets_travel_to_worker_processes(tree):
    dataset = pickle.loads(pickle.dumps(Cached(pairs(tree))))
    np.testing.assert_array_equal(dataset[0].label, LABEL)
