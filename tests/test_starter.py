"""From a folder of images and masks to recipes that run."""

import re
import shlex

import numpy as np
import pytest
import yaml
from PIL import Image

from gskd.recipe import load_recipe
from helpers import assert_refused, gskd, gskd_ok, snapshot

PATTERNS = {
    "images/train": ("images/{}", "masks/{}", "train", "val"),
    "train/images": ("{}/images", "{}/labels", "train", "valid"),
    "training": ("img/{}", "annotations/{}", "training", "validation"),
}


def folder(root, pattern="images/train", values=(0, 1, 2, 255)):
    images, masks, *splits = PATTERNS[pattern]
    random = np.random.default_rng(0)
    for split in splits:
        for kind in (images, masks):
            (root / kind.format(split)).mkdir(parents=True)
        for index in range(4):
            pixels = random.integers(0, 256, (70, 100, 3), np.uint8)
            Image.fromarray(pixels).save(root / images.format(split) / f"{index}.jpg")
            mask = random.choice(np.array(values, np.uint8), (70, 100))
            Image.fromarray(mask).save(root / masks.format(split) / f"{index}.png")
    return root


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_folder_of_images_becomes_two_recipes_that_run(tmp_path, pattern):
    root, out = folder(tmp_path / "data", pattern), tmp_path / "mine"
    said = gskd_ok("init", root, "-o", out)
    assert "masks hold 0, 1, 2, 255; 4 were opened" in said.out
    recipe = load_recipe(out / "student.yaml")
    assert recipe.data.options["classes"] == ["class_0", "class_1", "class_2"]
    assert recipe.augment.crop == [64, 96]
    gskd_ok("data", "check", out / "student.yaml")
    if pattern == "images/train":
        small = ["train.steps=2", "train.batch=2", "augment.crop=[64,64]", "train.tensorboard=false"]
        light = "model.args={encoder_name: tu-mobilenetv3_small_050, encoder_weights: null, decoder_channels: 16}"
        gskd_ok("train", out / "teacher.yaml", *small, light)
        gskd_ok("distill", out / "student.yaml", *small, light)
        assert (out / "student" / "result.json").is_file()


def test_a_file_of_classes_is_used(tmp_path):
    root = folder(tmp_path / "data", values=(7, 9))
    (root / "classes.csv").write_text("name,value\nroad,7\ncar,9\n")
    gskd_ok("init", root, "-o", tmp_path / "mine")
    recipe = load_recipe(tmp_path / "mine" / "teacher.yaml")
    assert recipe.data.options["classes"] == "classes.csv"
    gskd_ok("data", "check", tmp_path / "mine" / "teacher.yaml")


def test_masks_of_0_and_255_are_two_classes_where_a_file_says_so(tmp_path):
    """As the refusal of them says."""
    folder(tmp_path / "data", values=(0, 255))
    (tmp_path / "data" / "classes.csv").write_text("name,value\nbackground,0\nforeground,255\n")
    gskd_ok("init", tmp_path / "data", "-o", tmp_path / "mine")
    said = gskd_ok("data", "check", tmp_path / "mine" / "student.yaml").out
    assert "foreground" in said
    assert "without a pixel" not in said


def test_what_is_offered_in_comments_can_be_taken(tmp_path):
    gskd_ok("init", folder(tmp_path / "data"), "-o", tmp_path / "mine")
    taken = 0
    for name in ("teacher", "student"):
        text = (tmp_path / "mine" / f"{name}.yaml").read_text()
        for line in re.findall(r"^ +# \w+: \S.*$", text, re.MULTILINE):
            changed = tmp_path / f"changed_{taken}.yaml"
            changed.write_text(text.replace(line, line.replace("# ", "", 1)))
            assert load_recipe(changed) != load_recipe(tmp_path / "mine" / f"{name}.yaml"), line
            taken += 1
    assert taken >= 2


@pytest.mark.parametrize("name", ["my #1", "x: y", "{z}", "*st", "a b", "it's"])
def test_the_folder_may_have_any_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    said = gskd_ok("init", folder(tmp_path / "data"), "-o", name).out
    teacher, student = (load_recipe(tmp_path / name / f"{kind}.yaml") for kind in ("teacher", "student"))
    assert (teacher.output, student.output) == (f"{name}/teacher", f"{name}/student")
    assert student.teacher.run == teacher.output
    commands = [shlex.split(line) for line in said.splitlines() if line.startswith("  gskd ")]
    assert [words[-1] for words in commands] == [f"{name}/teacher.yaml", f"{name}/teacher.yaml", f"{name}/student.yaml"]


def test_a_public_layout_is_recognised(tmp_path):
    for split in ("train", "val"):
        for kind in (split, f"{split}annot"):
            (tmp_path / "data" / kind).mkdir(parents=True)
            Image.new("RGB" if kind == split else "L", (96, 64)).save(tmp_path / "data" / kind / "a.png")
    assert "the layout of camvid" in gskd_ok("init", tmp_path / "data", "-o", tmp_path / "mine").out
    assert yaml.safe_load((tmp_path / "mine" / "student.yaml").read_text())["data"]["dataset"] == "camvid"


def test_a_folder_of_other_labels_is_passed_over(tmp_path):
    """Boxes in text beside masks: the first name that fits is not the one that holds PNGs."""
    root = folder(tmp_path / "data")
    for split in ("train", "val"):
        (root / "masks" / split).rename(root / "masks" / f"old_{split}")
        (root / "labels" / split).mkdir(parents=True)
        (root / "labels" / split / "0.txt").write_text("0 0.5 0.5 1 1")
    (root / "masks").rename(root / "annotations")
    for split in ("train", "val"):
        (root / "annotations" / f"old_{split}").rename(root / "annotations" / split)
    gskd_ok("init", root, "-o", tmp_path / "mine")
    assert load_recipe(tmp_path / "mine" / "student.yaml").data.options["masks"] == "annotations/{split}"


def test_own_data_in_the_folders_of_camvid_is_your_own(tmp_path):
    """With more values than CamVid has classes."""
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind in (split, f"{split}annot"):
            (tmp_path / "data" / kind).mkdir(parents=True)
        Image.fromarray(random.integers(0, 256, (64, 96, 3), np.uint8)).save(tmp_path / "data" / split / "a.png")
        mask = random.integers(0, 14, (64, 96)).astype(np.uint8)
        Image.fromarray(mask).save(tmp_path / "data" / f"{split}annot" / "a.png")
    assert "masks hold 0, 1" in gskd_ok("init", tmp_path / "data", "-o", tmp_path / "mine").out
    data = load_recipe(tmp_path / "mine" / "student.yaml").data
    assert (data.dataset, data.options["masks"], len(data.options["classes"])) == ("folder", "{split}annot", 14)
    gskd_ok("data", "check", tmp_path / "mine" / "student.yaml")


@pytest.mark.parametrize("above", ["VOC2012", "VOCdevkit/VOC2012"])
def test_the_folder_above_a_public_layout_is_recognised(tmp_path, above):
    base = tmp_path / "data" / above
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (base / name).mkdir(parents=True)
    Image.new("RGB", (96, 64)).save(base / "JPEGImages" / "a.jpg")
    Image.new("L", (96, 64)).save(base / "SegmentationClass" / "a.png")
    for split in ("train", "val"):
        (base / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("a\n")
    assert "the layout of voc" in gskd_ok("init", tmp_path / "data", "-o", tmp_path / "mine").out
    gskd_ok("data", "check", tmp_path / "mine" / "student.yaml")


def test_data_whose_place_no_recipe_can_name_leaves_nothing(tmp_path):
    root = folder(tmp_path / "${x}")
    before = snapshot(tmp_path)
    assert gskd("init", root, "-o", tmp_path / "mine").code == 2
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("case", ["empty", "no folder", "scattered", "colours", "exists", "one class", "nothing"])
def test_refused(tmp_path, case):
    root, out = tmp_path / "data", tmp_path / "mine"
    part = {
        "empty": "holds nothing; expected a public layout, or images/train",
        "no folder": "is no folder",
        "scattered": "too scattered to be class indices; write classes.csv there",
        "colours": "the mask is RGB",
        "exists": "mine: exists already",
        "nothing": "masks hold 255 alone, and 255 counts nowhere",
        "one class": "masks hold 0 and 255, and 255 counts nowhere unless it is named as a class",
    }[case]
    if case == "empty":
        root.mkdir()
    elif case != "no folder":
        folder(root, values={"scattered": (0, 40, 250), "one class": (0, 255), "nothing": (255,)}.get(case, (0, 1)))
    if case == "colours":
        Image.new("RGB", (100, 70)).save(root / "masks" / "train" / "0.png")
    if case == "exists":
        out.mkdir()
    before = snapshot(tmp_path)
    assert_refused(gskd("init", root, "-o", out), part)
    assert snapshot(tmp_path) == before
