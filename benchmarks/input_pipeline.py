"""Training views a second, beside a loader as research scripts have it, on files of Cityscapes' size made here.

    python benchmarks/input_pipeline.py [--images 24] [--views 120] [--height 1024 --width 2048] [--crop 512 1024]

Both read PNG images and masks, scale by 0.5 to 2, crop, flip and jitter brightness, contrast and saturation, in one
process with one thread. The other loader decodes and scales whole images, as float where it normalises, with PIL, numpy
and torchvision. "first epoch" decodes, "later epochs" find decoded samples in memory as far as data.cache_gib allows.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import gskd._torchvision  # noqa: F401 (must come before torchvision)

# isort: split
from torchvision.transforms import ColorJitter

from gskd.data.datasets import Cached
from gskd.data.layouts import folder_pairs
from gskd.data.legend import make_legend
from gskd.data.scenes import Scenes
from gskd.data.views import Augmentation, TrainingViews
from gskd.environment import commit, processor
from gskd.models import normalise

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--views", type=int, default=120)
    parser.add_argument("--height", type=int, default=1024)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--crop", type=int, nargs=2, default=(512, 1024))
    args = parser.parse_args()
    torch.set_num_threads(1)
    crop = (args.crop[0], args.crop[1])
    with tempfile.TemporaryDirectory() as folder:
        images, masks = Path(folder) / "images", Path(folder) / "masks"
        write(images, masks, args.images, (args.height, args.width))
        data = folder_pairs(images, masks, make_legend(Scenes().classes))
        views = TrainingViews(Cached(data, gib=8), Augmentation(crop), seed=0)
        files = [(image, masks / image.name) for image in sorted(images.iterdir())]
        figures = {
            "other loader": rate(lambda k: script(*files[k % len(files)], crop), args.views),
            "gskd, first epoch": rate(lambda k: prepared(views[k]), args.images),
            "gskd, later epochs": rate(lambda k: prepared(views[args.images + k]), args.views),
        }
    print(
        f"{processor()}, 1 thread; commit {commit()}; {args.images} PNGs of {args.height} x {args.width}, crop {crop}"
    )
    for name, found in figures.items():
        print(f"{name:20s} {found:7.2f} images/s  x {found / figures['other loader']:.2f}")


def write(images: Path, masks: Path, count: int, size: tuple[int, int]) -> None:
    """Street scenes enlarged, with the grain of a sensor, so that they cost a decoder what photographs cost."""
    images.mkdir()
    masks.mkdir()
    scenes, generator = Scenes(size=(256, 512)), np.random.default_rng(0)
    for index in range(count):
        sample = scenes[index]
        large = Image.fromarray(sample.image).resize((size[1], size[0]), Image.Resampling.BICUBIC)
        grain = generator.normal(0, 4, (*size, 3))
        pixels = np.clip(np.asarray(large) + grain, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(images / f"{index:03d}.png")
        label = Image.fromarray(sample.label).resize((size[1], size[0]), Image.Resampling.NEAREST)
        label.save(masks / f"{index:03d}.png")


def prepared(view: tuple[Any, ...]) -> torch.Tensor:
    """As the trainer does on the device."""
    return normalise(view[0][None], MEAN, STD)


def script(image_file: Path, mask_file: Path, crop: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The usual way: everything on the whole image, then the crop."""
    image, mask = Image.open(image_file).convert("RGB"), Image.open(mask_file)
    image = ColorJitter(0.25, 0.25, 0.25)(image)
    factor = random.uniform(0.5, 2.0)
    size = (round(image.width * factor), round(image.height * factor))
    image = image.resize(size, Image.Resampling.BILINEAR)
    mask = mask.resize(size, Image.Resampling.NEAREST)
    pixels = (np.asarray(image, np.float32) / 255 - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    labels = np.asarray(mask, np.int64)
    below, right = max(0, crop[0] - pixels.shape[0]), max(0, crop[1] - pixels.shape[1])
    pixels = np.pad(pixels, ((0, below), (0, right), (0, 0)))
    labels = np.pad(labels, ((0, below), (0, right)), constant_values=255)
    top, left = random.randint(0, pixels.shape[0] - crop[0]), random.randint(0, pixels.shape[1] - crop[1])
    pixels, labels = (
        pixels[top : top + crop[0], left : left + crop[1]],
        labels[top : top + crop[0], left : left + crop[1]],
    )
    if random.random() < 0.5:
        pixels, labels = pixels[:, ::-1], labels[:, ::-1]
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy()), torch.from_numpy(labels.copy())


def rate(make: Callable[[int], Any], count: int) -> float:
    begun = time.perf_counter()
    for k in range(count):
        make(k)
    return count / (time.perf_counter() - begun)


if __name__ == "__main__":
    main()
