"""Built-in procedural street scenes, the first stretch of the pixel's path with nothing to download (scenes -> data).

A street is laid out in metres, projected through one pinhole camera and painted far to near, so that position, scale
and occlusion agree. Surfaces borrow each other's colours and textures on purpose: what stands where decides the class
more than local colour does.
"""

from __future__ import annotations

import operator

import numpy as np
from PIL import Image, ImageFilter

from gskd.data import IGNORE, Sample
from gskd.data._scene_canvas import BICYCLIST, PAVEMENT, PEDESTRIAN, POLE, ROAD, SIGN, Dice, Street
from gskd.data._scene_layout import paint
from gskd.data.legend import shipped_legend
from gskd.errors import GSKDError, near_names

_VERSION = 1
"""Counts changes of what is painted."""

_LENGTHS = {"train": 400, "val": 80, "test": 80}
_TO_LABEL = np.array([*range(11), *[IGNORE] * 5], dtype=np.uint8)

_TEXTURE = np.array([(0.05, 0.05, 0.06), (0.13, 0.11, 0.12), (0.34, 0.55, 0.25), (0.02, 0.03, 0.3), (0.1, 0.28, 0.2)])
_TEXTURE = _TEXTURE.astype(np.float32)  # contrast of fine, middle and coarse noise per material


def _noise(generator: np.random.Generator, size: tuple[int, int], cells: int) -> np.ndarray:
    """(H, W) float32 in about [-1, 1], smooth over a ``cells``-th of the height."""
    height, width = size
    grid = generator.random((cells, max(1, cells * width // height)), np.float32) * 2 - 1
    return np.asarray(Image.fromarray(grid).resize((width, height), Image.Resampling.BILINEAR))


def _develop(street: Street, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Adds texture, shadow, light, blur and sensor noise to a painted street."""
    dice, size = street.dice, (street.height, street.width)
    code = np.asarray(street.image.getchannel("A"))[1::2, 1::2]
    label = _TO_LABEL[code & 15]
    image = np.asarray(street.image.convert("RGB").reduce(2), np.float32)

    fine, middle, coarse = (_noise(generator, size, cells) for cells in (96, 36, 7))
    grain = _TEXTURE[code >> 4]
    light = 1 + grain[..., 0] * fine + grain[..., 1] * middle + grain[..., 2] * coarse
    shade = street.shade.filter(ImageFilter.BoxBlur(street.height / 160))
    depth = dice(0.2, 1.0) if dice.chance(0.7) else 0.0
    ground = (label == ROAD) | (label == PAVEMENT)
    light *= np.where(ground, 1 - depth * (1 - np.asarray(shade, np.float32) / 255), 1)
    warmth, tint = dice(-0.14, 0.14), dice(-0.05, 0.05)
    exposure = dice(0.45, 0.75) if dice.chance(0.2) else dice(0.75, 1.2)
    image = image * light[..., None] * (np.array([1 + warmth, 1 + tint, 1 - warmth], np.float32) * exposure)
    blur = dice(0, 0.9) * street.height / 96
    picture = Image.fromarray(np.clip(image, 0, 255).astype(np.uint8))
    image = np.asarray(picture.filter(ImageFilter.GaussianBlur(blur)), np.float32)
    image = image + (generator.random((*size, 3), np.float32) - 0.5) * dice(6, 34)

    # Annotators leave gaps along outlines; thin classes would vanish in them.
    border = np.zeros(size, bool)
    border[:, 1:] |= label[:, 1:] != label[:, :-1]
    border[1:] |= label[1:] != label[:-1]
    thick = ~np.isin(label, (POLE, SIGN, PEDESTRIAN, BICYCLIST))
    label[border & thick & (coarse > 0.15)] = IGNORE
    return np.clip(image, 0, 255).astype(np.uint8), label


class Scenes:
    """Procedural street scenes with CamVid's 11 classes, about CamVid's class shares and about 4 % unlabelled pixels.

    A stand-in dataset for trying the whole job with nothing downloaded; scores on it say nothing about real streets.
    Sample ``i`` is a pure function of ``(seed, split, i, size)``; another ``size`` of the same aspect shows the same
    street.

    Args:
        split: ``"train"``, ``"val"`` or ``"test"``; their streams of scenes are disjoint.
        length: Number of scenes; default 400 for train, 80 for val and test.
        size: Height and width in pixels.
        seed: Non-negative; another seed is another dataset.

    Raises:
        GSKDError: Unknown ``split``; ``length`` or ``size`` not positive; ``seed`` negative.
    """

    classes: tuple[str, ...] = shipped_legend("camvid").classes
    palette: np.ndarray = shipped_legend("camvid").palette

    def __init__(
        self, split: str = "train", length: int | None = None, size: tuple[int, int] = (96, 128), seed: int = 0
    ) -> None:
        if split not in _LENGTHS:
            raise GSKDError(f"scenes: unknown split {split!r}{near_names(split, _LENGTHS)}")
        if length is not None and length < 1:
            raise GSKDError(f"scenes: length is {length}, expected at least 1")
        if len(size) != 2 or min(size) < 1:
            raise GSKDError(f"scenes: size is {tuple(size)}, expected (height, width), both at least 1")
        if seed < 0:
            raise GSKDError(f"scenes: seed is {seed}, expected at least 0")
        self.split = split
        self.size = (int(size[0]), int(size[1]))
        self.seed = seed
        self._length = _LENGTHS[split] if length is None else length

    def __len__(self) -> int:
        return self._length

    def name(self, index: int) -> str:
        """The scene's name, ``"train_00007"``.

        Raises:
            IndexError: ``index`` outside ``0 .. len - 1``.
        """
        return f"{self.split}_{self._checked(index):05d}"

    def __getitem__(self, index: int) -> Sample:
        """Scene ``index``: image (H, W, 3) uint8 RGB, label (H, W) uint8 in 0..10 or ``IGNORE``.

        Raises:
            IndexError: ``index`` outside ``0 .. len - 1``.
        """
        key = [self.seed, list(_LENGTHS).index(self.split), self._checked(index)]
        # Two streams: the layout must not shift when the size changes how many noise values are drawn.
        layout, pixels = (np.random.Generator(np.random.PCG64(np.random.SeedSequence([*key, k]))) for k in (0, 1))
        street = Street(Dice(layout), self.size)
        paint(street)
        image, label = _develop(street, pixels)
        return Sample(image, label, self.name(index))

    def stamp(self) -> str:
        """Of the arguments and of the version of the painter."""
        return f"scenes {_VERSION}: {self.split} {self._length} {self.size} {self.seed}"

    def _checked(self, index: int) -> int:
        index = operator.index(index)
        if not 0 <= index < self._length:
            raise IndexError(f"scenes {self.split}: index {index}, expected 0 .. {self._length - 1}")
        return index
