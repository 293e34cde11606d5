"""Label maps for images that have no labels: what a finished run is for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from gskd.checkpoint import require_new_folder
from gskd.data.files import IMAGE_SUFFIXES, list_files, read_rgb
from gskd.errors import GSKDError
from gskd.evaluation import predict
from gskd.pictures import colourise, overlay
from gskd.recipe import Recipe
from gskd.run import Run, device_of, inference_of


def find_images(sources: Sequence[Path]) -> list[Path]:
    """Image files among files and folders (not their subfolders), sorted within each folder.

    Raises:
        GSKDError: a source does not exist, a folder holds no image, or two images would get the same name.
    """
    found: list[Path] = []
    for source in sources:
        if source.is_dir():
            inside = list_files(source, IMAGE_SUFFIXES)
            if not inside:
                raise GSKDError(f"images {source}: no image in this folder; expected {', '.join(IMAGE_SUFFIXES)}")
            found += inside
        elif source.is_file():
            found.append(source)
        else:
            raise GSKDError(f"images {source}: no such file or folder")
    names: dict[str, Path] = {}
    for path in found:
        if path.stem in names:
            raise GSKDError(f"images: {names[path.stem]} and {path} would both be written as {path.stem}.png")
        names[path.stem] = path
    return found


def predict_images(
    run: Run,
    images: Sequence[Path],
    output: Path,
    recipe: Recipe | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Writes ``index/``, ``colour/`` and ``overlay/`` PNGs, one of each per image and of its size.

    Args:
        run: a finished or running run; its best weights are used.
        images: files; see `find_images`.
        output: a new or empty folder.
        recipe: the run's recipe, where its ``eval`` section should be another.
        on_progress: called as ``on_progress(done, total)``.

    Returns:
        A line for each image that cannot be read; it is left out.

    Raises:
        GSKDError: the output holds anything or cannot be written. Pictures already written stay.
    """
    require_new_folder(output)
    recipe = recipe or run.load_recipe()
    palette = np.array(run.info()["palette"], np.uint8)
    device = device_of(recipe)
    model = run.load_model(recipe).to(device)
    inference = inference_of(recipe)
    unreadable: list[str] = []
    try:
        for kind in ("index", "colour", "overlay"):
            (output / kind).mkdir(parents=True, exist_ok=True)
        for done, path in enumerate(images, 1):
            try:
                image = read_rgb(path)
            except GSKDError as error:
                unreadable.append(str(error))
                continue
            pixels = torch.from_numpy(image).to(device).permute(2, 0, 1)
            label = predict(model, pixels, inference).argmax(0).to(torch.uint8).cpu().numpy()
            Image.fromarray(label).save(output / "index" / f"{path.stem}.png")
            Image.fromarray(colourise(label, palette)).save(output / "colour" / f"{path.stem}.png")
            Image.fromarray(overlay(image, label, palette)).save(output / "overlay" / f"{path.stem}.png")
            if on_progress is not None:
                on_progress(done, len(images))
    except OSError as error:
        raise GSKDError(f"output {output}: cannot be written: {error.strerror or error}") from None
    return unreadable
