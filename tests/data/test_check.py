import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from gskd.data import IGNORE, Sample
from gskd.data.check import check_dataset, shared_images
from gskd.data.datasets import Cached, open_dataset
from gskd.data.layouts import folder_pairs
from gskd.data.legend import make_legend

CAMVID_TRAIN_SHARES = (0.168, 0.233, 0.010, 0.317, 0.045, 0.097, 0.012, 0.011, 0.059, 0.006, 0.003)


@pytest.fixture
def broken(tmp_path):
    """Seven pairs: c is truncated, d has a foreign value, e another size; g is wholly ignored. One mask is alone."""
    images, masks = tmp_path / "images", tmp_path / "masks"
    images.mkdir()
    masks.mkdir()
    label = np.array([[0, 0, 0, 1], [0, 255, 255, 1]], np.uint8)
    for stem in "abcdefg":
        Image.fromarray(np.zeros((2, 4, 3), np.uint8)).save(images / f"{stem}.png")
        Image.fromarray(label).save(masks / f"{stem}.png")
    (images / "c.png").write_bytes((images / "c.png").read_bytes()[:45])
    Image.fromarray(np.full((2, 4), 7, np.uint8)).save(masks / "d.png")
    Image.fromarray(np.zeros((2, 5), np.uint8)).save(masks / "e.png")
    Image.fromarray(np.zeros((4, 2, 3), np.uint8)).save(images / "f.png")
    Image.fromarray(np.zeros((4, 2), np.uint8)).save(masks / "f.png")
    Image.fromarray(np.full((2, 4), 255, np.uint8)).save(masks / "g.png")
    Image.fromarray(label).save(masks / "z.png")
    return folder_pairs(images, masks, make_legend(("road", "sky", "car")))


def test_every_problem_is_collected_in_order(broken):
    report = check_dataset(broken)
    assert not report.ok
    assert report.samples == 7
    assert len(report.problems) == 3
    for line, parts in zip(
        report.problems, (["c.png", "readable"], ["d.png", "7 in 8"], ["e.png", "5 x 2"]), strict=True
    ):
        assert "\n" not in line
        assert all(part in line for part in parts)


def test_counts_cover_the_readable_samples(broken):
    report = check_dataset(broken)
    road, sky, car = report.classes
    assert (road.name, road.pixels, road.images) == ("road", 2 * 4 + 8, 3)
    assert (sky.pixels, sky.images) == (4, 2)
    assert (car.pixels, car.share, car.images) == (0, 0.0, 0)
    assert report.void_pixels == 2 * 2 + 8
    assert road.share == 16 / 32
    assert report.void_share == 12 / 32
    assert report.sizes == {(2, 4): 3, (4, 2): 1}
    assert next(iter(report.sizes)) == (2, 4)
    assert report.absent == ("car",)


def test_notes_name_lone_masks_and_samples_without_labels(broken):
    for dataset in (broken, Cached(broken)):
        lone, unlabelled, absent = check_dataset(dataset).notes
        assert "z.png" in lone
        assert unlabelled.endswith(": g")
    assert absent.startswith("classes without a pixel (")
    assert absent.endswith("% is ignored")


def test_images_that_viewers_turn_are_noted(tmp_path):
    """Of the same size turned by half, nothing else would tell that a mask was drawn on what a viewer shows."""
    for kind, mode in (("images", "RGB"), ("masks", "L")):
        (tmp_path / kind).mkdir()
        for stem, orientation in (("a", None), ("b", 3), ("c", 1)):
            exif = Image.Exif()
            if orientation is not None and kind == "images":
                exif[0x0112] = orientation
            suffix = "jpg" if kind == "images" else "png"
            Image.new(mode, (8, 8)).save(tmp_path / kind / f"{stem}.{suffix}", exif=exif)
    report = check_dataset(folder_pairs(tmp_path / "images", tmp_path / "masks", make_legend(("road", "sky"))))
    assert report.ok
    assert [note for note in report.notes if "EXIF orientation (1): b.jpg;" in note]


def test_a_split_without_any_label_is_a_problem(broken):
    class Unlabelled(Cached):
        def __getitem__(self, index):
            sample = super().__getitem__(index)
            return replace(sample, label=np.full_like(sample.label, IGNORE))

    report = check_dataset(Unlabelled(broken))
    assert report.problems[-1].startswith("no sample has a labelled pixel: ")
    assert not any("without a labelled pixel" in note for note in report.notes)


def test_images_in_two_splits_are_found_by_what_they_show(tmp_path):
    """Copied, renamed and in another format: a network that is scored on what it has learned looks too good."""
    random = np.random.default_rng(0)
    pictures = [random.integers(0, 256, (4, 6, 3), np.uint8) for _ in range(3)]
    reports = {}
    for split, shown in {"train": pictures[:2], "val": pictures[1:], "test": pictures[2:]}.items():
        for index, picture in enumerate(shown):
            for kind, pixels in (("images", picture), ("masks", np.zeros((4, 6), np.uint8))):
                (tmp_path / split / kind).mkdir(parents=True, exist_ok=True)
                suffix = "bmp" if (split, kind) == ("val", "images") else "png"
                Image.fromarray(pixels).save(tmp_path / split / kind / f"{split}{index}.{suffix}")
        data = folder_pairs(tmp_path / split / "images", tmp_path / split / "masks", make_legend(("road", "sky")))
        reports[split] = check_dataset(data)
    assert shared_images(reports["train"], reports["val"]) == ("val0",)
    assert shared_images(reports["val"], reports["test"]) == ("test0",)
    assert shared_images(reports["train"], reports["test"]) == ()


def test_progress_counts_every_sample(broken):
    seen = []
    check_dataset(broken, lambda done, total: seen.append((done, total)))
    assert seen == [(k, 7) for k in range(1, 8)]


def test_report_as_json(broken):
    found = json.loads(json.dumps(check_dataset(broken).to_dict()))
    assert found["ok"] is False
    assert found["sizes"][0] == {"height": 2, "width": 4, "images": 3}
    assert found["classes"][0] == {"name": "road", "pixels": 16, "share": 0.5, "images": 3}
    assert found["absent"] == ["car"]
    assert len(found["problems"]) == 3


class Own:
    """A user's own dataset that breaks the contract in every way but one."""

    classes = ("a", "b")
    palette = np.zeros((2, 3), np.uint8)
    image = np.zeros((2, 3, 3), np.uint8)
    label = np.array([[0, 1, IGNORE]] * 2, np.uint8)

    def __len__(self):
        return 6

    def name(self, index):
        return f"s{index}"

    def __getitem__(self, index):
        image, label = (
            (self.image, self.label),
            (self.image.astype(np.float32), self.label),
            (self.image.transpose(2, 0, 1), self.label),
            (self.image, self.label.astype(np.int64)),
            (self.image, self.label.T),
            (self.image, self.label + 1),  # IGNORE wraps to 0, and 1 becomes 2
        )[index]
        return Sample(image, label, self.name(index))


def test_contract_of_a_users_own_dataset():
    report = check_dataset(Own())
    assert [line.split(":")[0] for line in report.problems] == ["s1", "s2", "s3", "s4", "s5"]
    assert report.classes[1].pixels == 2


def test_an_error_that_is_not_the_users_propagates():
    class Buggy(Own):
        def __getitem__(self, index):
            raise KeyError(index)

    with pytest.raises(KeyError):
        check_dataset(Buggy())


def test_scenes_are_sound():
    report = check_dataset(open_dataset("scenes", None, "train", {"length": 2, "size": (24, 32)}))
    assert report.ok
    assert report.sizes == {(24, 32): 2}


def test_real_camvid_train_shares(camvid_root):
    report = check_dataset(open_dataset("camvid", str(camvid_root), "train", {}))
    assert report.ok
    assert report.notes == ()
    assert report.sizes == {(360, 480): 367}
    assert [c.share for c in report.classes] == pytest.approx(CAMVID_TRAIN_SHARES, abs=0.002)
    assert report.void_share == pytest.approx(0.039, abs=0.002)
