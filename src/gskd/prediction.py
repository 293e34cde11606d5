"""Label maps for images and videos that have no labels: what a finished run is for."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator, Sequence
from enum import Enum
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from gskd.checkpoint import require_new_folder
from gskd.data.files import IMAGE_SUFFIXES, VIDEO_SUFFIXES, list_files, read_frames, read_rgb
from gskd.errors import GSKDError
from gskd.evaluation import predict
from gskd.pictures import colourise, overlay
from gskd.recipe import Recipe
from gskd.run import Run, device_of, inference_of


class Kind(Enum):
    """What can be written of a prediction, each into a folder of its own."""

    index = "index"
    """PNG whose values are the class numbers."""
    colour = "colour"
    """PNG in the palette of the dataset."""
    overlay = "overlay"
    """PNG of the image under its colours."""
    probability = "probability"
    """NumPy file (K, H, W) float16, which sums to 1 over the K classes."""


PICTURES = (Kind.index, Kind.colour, Kind.overlay)

_DIGITS = 6  # of a frame's number in its name


def find_images(sources: Sequence[Path]) -> list[Path]:
    """Images and videos among files, folders (not their subfolders) and patterns (``photos/*.jpg``), sorted in each.

    Raises:
        GSKDError: a source does not exist, a folder holds neither, or two files would get the same name.
    """
    found: list[Path] = []
    known = IMAGE_SUFFIXES + VIDEO_SUFFIXES
    for source in sources:
        if source.is_dir():
            inside = list_files(source, known)
            if not inside:
                raise GSKDError(f"images {source}: no image in this folder; expected {', '.join(known)}")
            found += inside
        elif source.is_file():
            found.append(source)
        elif matching := [Path(name) for name in sorted(glob.glob(str(source))) if Path(name).is_file()]:
            found += matching
        else:
            raise GSKDError(f"images {source}: no such file or folder")
    # A pattern may name what its folder holds. Links are files of their own.
    found = list({os.path.abspath(path): path for path in found}.values())
    names: dict[str, Path] = {}
    for path in found:
        if path.stem in names:
            raise GSKDError(f"images: {names[path.stem]} and {path} would both be written as {path.stem}")
        names[path.stem] = path
    for path in found:
        video, _, number = path.stem.rpartition("_")
        if len(number) >= _DIGITS and number.isdecimal() and video in names and _is_video(names[video]):
            raise GSKDError(f"images: a frame of {names[video]} and {path} would both be written as {path.stem}")
    return found


def predict_images(
    run: Run,
    images: Sequence[Path],
    output: Path,
    recipe: Recipe | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    kinds: Sequence[Kind] = PICTURES,
) -> tuple[int, list[str]]:
    """Writes a folder for each kind, with one file per image and of its size.

    The frames of a video ``clip.mp4`` are ``clip_000000`` and so on. One picture is in memory at a time; what a large
    one takes is bounded by ``eval.mode: slide``, whose windows overlap and are averaged.

    Args:
        run: a finished or running run; its best weights are used.
        images: files; see `find_images`.
        output: a new or empty folder.
        recipe: the run's recipe, where its ``eval`` section should be another.
        on_progress: called as ``on_progress(done, total)`` after each file.
        kinds: what to write.

    Returns:
        How many pictures were predicted; and a line for each file that cannot be read, or not to its end.

    Raises:
        GSKDError: the output holds anything or cannot be written. Pictures already written stay.
    """
    require_new_folder(output)
    recipe = recipe or run.load_recipe()
    palette = np.array(run.info()["palette"], np.uint8)
    device = device_of(recipe)
    model = run.load_model(recipe).to(device)
    inference = inference_of(recipe)
    predicted, unreadable = 0, list[str]()
    try:
        for kind in kinds:
            (output / kind.value).mkdir(parents=True, exist_ok=True)
        for done, path in enumerate(images, 1):
            try:
                for name, image in _pictures(path):
                    pixels = torch.from_numpy(image).to(device).permute(2, 0, 1)
                    scores = predict(model, pixels, inference)
                    label = scores.argmax(0).to(torch.uint8).cpu().numpy()
                    for kind in kinds:
                        if kind is Kind.probability:
                            share = scores if inference.averages else scores.softmax(0)
                            np.save(output / kind.value / f"{name}.npy", share.half().cpu().numpy())
                            continue
                        picture = label
                        if kind is Kind.colour:
                            picture = colourise(label, palette)
                        elif kind is Kind.overlay:
                            picture = overlay(image, label, palette)
                        Image.fromarray(picture).save(output / kind.value / f"{name}.png")
                    predicted += 1
            except GSKDError as error:
                unreadable.append(str(error))
            if on_progress is not None:
                on_progress(done, len(images))
    except OSError as error:
        raise GSKDError(f"output {output}: cannot be written: {error.strerror or error}") from None
    return predicted, unreadable


def _pictures(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Names and (H, W, 3) uint8 pictures of an image or a video."""
    if not _is_video(path):
        yield path.stem, read_rgb(path)
        return
    for number, frame in enumerate(read_frames(path)):
        yield f"{path.stem}_{number:0{_DIGITS}d}", frame


def _is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEO_SUFFIXES
