"""The built-in street scenes: the same everywhere, labelled where they are painted, as uneven as CamVid."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import numpy as np
import pytest

from gskd.data import IGNORE
from gskd.data.legend import shipped_legend
from gskd.data.scenes import Scenes
from gskd.errors import GSKDError

CAMVID = shipped_legend("camvid")
CAMVID_SHARES = (0.168, 0.233, 0.010, 0.317, 0.045, 0.097, 0.012, 0.011, 0.059, 0.006, 0.003)
SKY, BUILDING, POLE, ROAD, PAVEMENT, TREE = range(6)


def digest(scenes: Scenes, index: int) -> str:
    sample = scenes[index]
    return hashlib.sha256(sample.image.tobytes() + sample.label.tobytes() + sample.name.encode()).hexdigest()


@pytest.fixture(scope="module")
def hundred() -> tuple[np.ndarray, np.ndarray]:
    samples = [Scenes("train")[i] for i in range(100)]
    return np.stack([s.image for s in samples]), np.stack([s.label for s in samples])


def test_a_sample_depends_on_nothing_but_its_key() -> None:
    scenes = Scenes("val", seed=3)
    first = digest(scenes, 5)
    digest(scenes, 6)
    assert digest(scenes, 5) == first
    assert digest(Scenes("val", length=9, seed=3), 5) == first


def test_another_process_draws_the_same_scene() -> None:
    code = (
        "import hashlib; from gskd.data.scenes import Scenes; s = Scenes('test', size=(48, 64))[7];"
        "print(hashlib.sha256(s.image.tobytes() + s.label.tobytes() + s.name.encode()).hexdigest())"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == digest(Scenes("test", size=(48, 64)), 7)


def test_index_split_and_seed_each_change_the_scene() -> None:
    drawn = [
        Scenes(split, seed=seed)[index] for split in ("train", "val", "test") for seed in (0, 1) for index in range(6)
    ]
    assert len({s.image.tobytes() for s in drawn}) == len(drawn)
    assert len({s.label.tobytes() for s in drawn}) == len(drawn)


def test_samples_have_the_promised_form() -> None:
    scenes = Scenes("val")
    sample = scenes[4]
    assert sample.image.shape == (96, 128, 3)
    assert sample.label.shape == (96, 128)
    assert sample.image.dtype == sample.label.dtype == np.uint8
    assert sample.name == scenes.name(4) == "val_00004"
    assert (len(Scenes()), len(scenes), len(Scenes("test")), len(Scenes(length=7))) == (400, 80, 80, 7)
    assert scenes.classes == CAMVID.classes
    assert scenes.palette is CAMVID.palette
    assert len({tuple(c) for c in CAMVID.palette.tolist()}) == len(CAMVID.classes) == 11


def test_arrays_belong_to_the_caller() -> None:
    scenes = Scenes()
    sample = scenes[0]
    kept = digest(scenes, 0)
    sample.image[:] = 0
    sample.label[:] = 0
    assert digest(scenes, 0) == kept


def test_labels_are_classes_or_void(hundred: tuple[np.ndarray, np.ndarray]) -> None:
    assert set(np.unique(hundred[1]).tolist()) == {*range(11), IGNORE}


@pytest.mark.parametrize("split", ["val", "test"])
def test_every_class_is_in_every_split(split: str) -> None:
    seen = {int(v) for i in range(20) for v in np.unique(Scenes(split)[i].label)}
    assert set(range(11)) <= seen


def test_shares_are_as_uneven_as_camvid(hundred: tuple[np.ndarray, np.ndarray]) -> None:
    shares = np.bincount(hundred[1].ravel(), minlength=256) / hundred[1].size
    ratio = shares[:11] / np.array(CAMVID_SHARES)
    assert ratio.min() > 1 / 2.5, dict(zip(CAMVID.classes, ratio.round(2), strict=True))
    assert ratio.max() < 2.5, dict(zip(CAMVID.classes, ratio.round(2), strict=True))
    assert 0.02 < shares[IGNORE] < 0.08


def test_streets_stand_upright(hundred: tuple[np.ndarray, np.ndarray]) -> None:
    labels = hundred[1]
    rows = np.broadcast_to(np.arange(96)[None, :, None], labels.shape)
    middle = {c: rows[labels == c].mean() for c in (SKY, BUILDING, ROAD, PAVEMENT)}
    assert middle[SKY] < middle[BUILDING] < middle[PAVEMENT] < middle[ROAD]
    assert not (labels[:, 60:] == SKY).any()
    assert not (labels[:, :30] == ROAD).any()


def test_label_edges_lie_on_image_edges(hundred: tuple[np.ndarray, np.ndarray]) -> None:
    # Shifting labels against images by two pixels must weaken the contrast found across the outlines.
    images, labels = hundred[0].astype(np.float32).mean(-1), hundred[1]
    step = np.abs(images[:, :, 1:] - images[:, :, :-1])

    def contrast(shift: int) -> float:
        moved = np.roll(labels, shift, axis=2)
        edge = moved[:, :, 1:] != moved[:, :, :-1]
        edge[:, :, :6] = edge[:, :, -6:] = False
        return float(step[edge].mean())

    aligned = contrast(0)
    assert aligned > 1.15 * contrast(2)
    assert aligned > 1.15 * contrast(-2)


def test_local_colour_does_not_decide_the_class(hundred: tuple[np.ndarray, np.ndarray]) -> None:
    # The best class per colour (16 bins a channel, told the answers) must stay far from solving the scenes.
    images, labels = hundred
    valid = labels != IGNORE
    colour = (images[valid] // 16).astype(np.int64) @ np.array([256, 16, 1])
    table = np.bincount(colour * 11 + labels[valid], minlength=4096 * 11).reshape(4096, 11)
    assert table.max(axis=1).sum() / valid.sum() < 0.65


@pytest.mark.parametrize("size", [(1, 1), (16, 24), (33, 47), (192, 256)])
def test_size_is_honoured(size: tuple[int, int]) -> None:
    sample = Scenes(size=size)[1]
    assert sample.image.shape == (*size, 3)
    assert sample.label.shape == size


def test_a_larger_size_shows_the_same_street() -> None:
    agree = []
    for i in range(8):
        small, large = Scenes()[i].label, Scenes(size=(192, 256))[i].label[1::2, 1::2]
        valid = (small != IGNORE) & (large != IGNORE)
        agree.append((small == large)[valid].mean())
    assert np.mean(agree) > 0.95


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "trian"}, "'trian'.*did you mean 'train'"),
        ({"length": 0}, "length is 0"),
        ({"length": -3}, "length is -3"),
        ({"size": (0, 64)}, r"size is \(0, 64\)"),
        ({"size": (64,)}, r"size is \(64,\)"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(GSKDError, match=message):
        Scenes(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("index", [-1, 5, 80])
def test_an_index_outside_is_an_index_error(index: int) -> None:
    scenes = Scenes(length=5)
    with pytest.raises(IndexError, match=f"index {index}"):
        scenes[index]
    with pytest.raises(IndexError, match=f"index {index}"):
        scenes.name(index)


def test_iteration_ends() -> None:
    assert [s.name for s in Scenes("val", length=2, size=(8, 8))] == ["val_00000", "val_00001"]  # type: ignore[attr-defined]
