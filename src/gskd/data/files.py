"""Finding image and mask files that belong together, and decoding them: what the datasets on disk are made of.

Pictures are decoded with Pillow, videos with PyAV, as stored: an EXIF orientation is never applied, because masks carry
none and the pair would come apart.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from difflib import get_close_matches
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image

from gskd.errors import GSKDError, count, few, near_names

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
MASK_SUFFIXES = (".png",)
_LOSSY = ("JPEG", "MPO", "JPEG2000", "WEBP", "AVIF")
VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")

# What Pillow's decoders let through for damaged files, beyond OSError.
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


# Finding files


def match_pairs(images: Path, masks: Path) -> tuple[list[Path], list[Path], tuple[str, ...]]:
    """Image paths, their mask paths in the same order, and the names of masks that no image has."""
    image_of = _by_stem(images, IMAGE_SUFFIXES, "image")
    mask_of = _by_stem(masks, MASK_SUFFIXES, "mask")
    bare = [path.name for stem, path in image_of.items() if stem not in mask_of]
    if bare:
        raise GSKDError(
            f"{images}: {len(bare)} of {count(len(image_of), 'image')} without a mask in {masks}: {few(bare)}"
        )
    unused = tuple(path.name for stem, path in mask_of.items() if stem not in image_of)
    return list(image_of.values()), [mask_of[stem] for stem in image_of], unused


def _by_stem(folder: Path, suffixes: tuple[str, ...], what: str) -> dict[str, Path]:
    """The folder's files with one of the suffixes, by stem in sorted order."""
    if not folder.is_dir():
        raise GSKDError(_missing_folder(folder, what))
    found: dict[str, Path] = {}
    for path in list_files(folder, suffixes):
        other = found.setdefault(path.stem, path)
        if other is not path:
            raise GSKDError(
                f"{folder}: {other.name} and {path.name} share the stem {path.stem!r}, so {what}s are ambiguous"
            )
    if not found:
        raise GSKDError(_empty_folder(folder, suffixes, what))
    return dict(sorted(found.items()))


def list_files(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The files directly in a folder with one of the endings, sorted, hidden ones left out.

    A link that leads nowhere is one too: reading it names it, where leaving it out would make a smaller dataset.
    """
    found = (p for p in folder.iterdir() if p.suffix.lower() in suffixes and not p.name.startswith("."))
    return sorted(p for p in found if p.is_file() or not p.exists())


def _missing_folder(folder: Path, what: str) -> str:
    missing = folder
    while not missing.parent.is_dir() and missing.parent != missing:
        missing = missing.parent
    siblings = sorted(p.name for p in missing.parent.iterdir() if p.is_dir()) if missing.parent.is_dir() else []
    place = "it" if missing == folder else str(missing)
    reason = "is not a folder" if missing.exists() else "does not exist"
    return f"{what} folder {folder}: {place} {reason}{near_names(missing.name, siblings)}"


def _empty_folder(folder: Path, suffixes: tuple[str, ...], what: str) -> str:
    message = f"{what} folder {folder} holds no {what} ({', '.join(suffixes)})"
    if other := [path.name for path in list_files(folder, IMAGE_SUFFIXES)]:
        return f"{message} but {few(other)}: lossy formats change labels, masks are read from PNG only"
    full = [p.name for p in sorted(folder.parent.iterdir()) if p.is_dir() and p != folder and list_files(p, suffixes)]
    lower = {name.lower(): name for name in full}
    own = folder.name.lower()
    near = [n for low, n in lower.items() if own in low or low in own]
    near += [lower[low] for low in get_close_matches(own, lower, cutoff=0.5) if lower[low] not in near]
    if near:
        return f"{message}; beside it {few(near)} {'does' if len(near) == 1 else 'do'}"
    inner = [p.name for p in sorted(folder.iterdir()) if p.is_dir() and list_files(p, suffixes)]
    if inner:
        return f"{message} itself, but its subfolders do ({few(inner)}); subfolders are not read"
    return message


# Reading files


class Stored(NamedTuple):
    """A picture that is no file of its own, but part of one."""

    content: bytes
    where: str

    def __str__(self) -> str:
        return self.where


def _open(source: Path | Stored) -> Image.Image:
    return Image.open(BytesIO(source.content) if isinstance(source, Stored) else source)


def read_rgb(path: Path | Stored) -> np.ndarray:
    """(H, W, 3) uint8, writable, from any colour mode; transparency is dropped."""
    try:
        with _open(path) as image:
            return _rgb(image)
    except _DECODE_ERRORS as error:
        raise GSKDError(f"{path}: not a readable image: {_one_line(error)}") from error


def _rgb(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):  # 16-bit greyscale, which Pillow's own conversion would clip at 255
        grey = (np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    # From a palette straight to RGB, Pillow warns about transparency.
    return np.array((image.convert("RGBA") if image.mode == "P" else image).convert("RGB"))


def has_orientation(path: Path) -> bool:
    """Whether a viewer would turn or mirror the image (EXIF), which we do not."""
    try:
        with Image.open(path) as image:
            return image.getexif().get(ExifTags.Base.Orientation, 1) not in (0, 1)
    except _DECODE_ERRORS:
        return False  # reading it says why


def read_frames(path: Path) -> Iterator[np.ndarray]:
    """The frames of a video in order, (H, W, 3) uint8 each, as stored: a rotation for display is not applied.

    Raises:
        GSKDError: PyAV is missing, or the file is no video; when it is damaged further on, after the frames before.
    """
    try:
        av: Any = import_module("av")
    except ImportError:
        raise GSKDError(f"{path}: reading a video needs PyAV, pip install 'gskd[video]'") from None
    number = 0
    try:
        with av.open(str(path)) as container:
            pictures = container.streams.video  # none where it holds sound alone
            for frame in container.decode(pictures[0]) if pictures else ():
                yield frame.to_ndarray(format="rgb24")
                number += 1
    except av.FFmpegError as error:
        what = "not a readable video" if not number else f"not readable after {count(number, 'frame')}"
        raise GSKDError(f"{path}: {what}: {_one_line(error)}") from None
    if not number:
        raise GSKDError(f"{path}: not a readable video: it holds no pictures")


def read_index(path: Path | Stored) -> np.ndarray:
    """(H, W) stored values of a single-channel mask, uint8 to int32; a palette PNG gives its indices."""
    try:
        with _open(path) as image:
            _refuse_lossy(image, path)
            if image.mode not in ("1", "L", "P", "I", "I;16", "I;16B"):
                raise GSKDError(
                    f"{path}: the mask is {image.mode}, expected one channel of class indices; "
                    "for colours set mask_kind to 'colour', in a dataset of your own (folder)"
                )
            values = np.array(image).astype(np.uint8) if image.mode == "1" else np.array(image)
            # Pillow stretches 2 and 4-bit greyscale to 0..255. Byte 24 of a PNG is its bit depth.
            depth = _png_bit_depth(path) if image.mode == "L" and image.format == "PNG" else 8
    except GSKDError:
        raise
    except _DECODE_ERRORS as error:
        raise GSKDError(f"{path}: not a readable mask: {_one_line(error)}") from error
    return values // (255 // (2**depth - 1)) if depth < 8 else values


def _refuse_lossy(image: Image.Image, path: Path | Stored) -> None:
    """By the content: a name tells nothing of a file that was renamed, and tables have none."""
    if image.format in _LOSSY:
        raise GSKDError(f"{path}: the mask is {image.format}, expected PNG: lossy formats change labels")


def _png_bit_depth(path: Path | Stored) -> int:
    if isinstance(path, Stored):
        return path.content[24]
    with path.open("rb") as file:
        return file.read(25)[24]


def read_colour(path: Path | Stored) -> np.ndarray:
    """(H, W) uint32 colours, 0xRRGGBB."""
    try:
        with _open(path) as image:
            _refuse_lossy(image, path)
            rgb = _rgb(image).astype(np.uint32)
    except GSKDError:
        raise
    except _DECODE_ERRORS as error:
        raise GSKDError(f"{path}: not a readable mask: {_one_line(error)}") from error
    return rgb[:, :, 0] << 16 | rgb[:, :, 1] << 8 | rgb[:, :, 2]


# Words for messages


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
