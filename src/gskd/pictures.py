"""Label maps as pictures: colours, overlays, and models side by side."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from gskd.data import IGNORE


def colourise(label: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """(H, W) class indices -> (H, W, 3) uint8 RGB; `IGNORE` is black. ``palette`` is (K, 3) uint8."""
    table = np.zeros((IGNORE + 1, 3), np.uint8)
    table[: len(palette)] = palette
    coloured: np.ndarray = table[label]
    return coloured


def overlay(image: np.ndarray, label: np.ndarray, palette: np.ndarray, strength: float = 0.5) -> np.ndarray:
    """The image (H, W, 3) uint8 with the classes' colours laid over it; ignored pixels stay bare."""
    mixed = image + strength * (colourise(label, palette).astype(np.float32) - image)
    blended: np.ndarray = np.where(label[..., None] == IGNORE, image, mixed.round()).astype(np.uint8)
    return blended


def side_by_side(rows: Sequence[Sequence[np.ndarray]], titles: Sequence[str], height: int = 160) -> Image.Image:
    """A sheet of pictures: each row one image, each column titled.

    Args:
        rows: per row one (H, W, 3) uint8 array per column, all of one size within a row.
        titles: one per column.
        height: of a picture on the sheet, in pixels.
    """
    gap, head = 6, 26
    font = ImageFont.load_default(size=15)
    width = round(height * rows[0][0].shape[1] / rows[0][0].shape[0])
    size = (len(titles) * (width + gap) + gap, head + len(rows) * (height + gap))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        x = gap + column * (width + gap)
        draw.text((x + width / 2, head / 2), title, fill="black", font=font, anchor="mm")
        for row, pictures in enumerate(rows):
            # The photograph may be smoothed; a label map's colours may not be mixed.
            how = Image.Resampling.BICUBIC if column == 0 else Image.Resampling.NEAREST
            sheet.paste(
                Image.fromarray(pictures[column]).resize((width, height), how), (x, head + row * (height + gap))
            )
    return sheet
