"""Scoring a model on a split: whole image or windows, scales and flips averaged, always at label resolution."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gskd.data import SegmentationDataset
from gskd.distributed import rank, world_size
from gskd.errors import GSKDError, described
from gskd.metrics import ConfusionMatrix, Score
from gskd.models import normalise
from gskd.outputs import logits_of
from gskd.stops import Stopped, StopRequest
from gskd.taps import eval_mode

DIVISOR = 32
"""Images are padded to a multiple of this, the deepest stride of the usual encoders, and logits cropped back."""

_SAMPLES_BETWEEN_STOPS = 8


@dataclass(frozen=True)
class Inference:
    """How logits are made for one image.

    Attributes:
        mode: the whole image at once, or ``"slide"`` over it with windows.
        window: (height, width) of the windows, in pixels of the scaled image.
        overlap: least share of a window that its neighbour covers again; overlapping logits are averaged.
        scales: factors the image is scaled by; softmax probabilities are averaged over them, and over flips.
        flip: average with the mirrored image.
        mean, std: of the model, see `gskd.models.normalise`.
        dtype: of autocast; float32 runs without.
    """

    mode: Literal["whole", "slide"] = "whole"
    window: tuple[int, int] = (512, 512)
    overlap: float = 0.33
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    mean: Sequence[float] = (0.485, 0.456, 0.406)
    std: Sequence[float] = (0.229, 0.224, 0.225)
    dtype: torch.dtype = torch.float32

    @property
    def averages(self) -> bool:
        """Whether several results are averaged, and so are probabilities and not logits."""
        return len(self.scales) > 1 or self.flip


def scaled(images: Tensor, scale: float) -> Tensor:
    """(B, C, H, W) floating point images resized by a factor, bilinear, antialiased where they become smaller."""
    if scale == 1.0:
        return images
    size = [max(1, round(side * scale)) for side in images.shape[-2:]]
    return F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=scale < 1)


def padded(images: Tensor) -> Tensor:
    """(B, C, H, W) normalised images with zeros, the mean colour, below and right, up to multiples of `DIVISOR`."""
    height, width = images.shape[-2:]
    return F.pad(images, (0, -width % DIVISOR, 0, -height % DIVISOR))


@torch.no_grad()
def predict(model: nn.Module, image: Tensor, inference: Inference) -> Tensor:
    """Class scores of one image.

    Args:
        model: in eval mode.
        image: (3, H, W) uint8 RGB on the model's device.
        inference: how.

    Returns:
        (K, H, W) float32: logits for one scale without flip, else mean probabilities (``inference.averages``). Only
        their order is the same thing.
    """
    images = normalise(image[None], inference.mean, inference.std)
    size = (image.shape[1], image.shape[2])
    total: Tensor | None = None
    for scale in inference.scales:
        resized = scaled(images, scale)
        for flipped in (False, True) if inference.flip else (False,):
            logits = _logits(model, resized.flip(-1) if flipped else resized, inference)
            logits = logits.flip(-1) if flipped else logits
            if logits.shape[-2:] != size:
                logits = F.interpolate(logits, size, mode="bilinear", align_corners=False)
            if not inference.averages:
                return logits[0]
            total = logits.softmax(1) if total is None else total + logits.softmax(1)
    assert total is not None
    return total[0] / (len(inference.scales) * (1 + inference.flip))


def _logits(model: nn.Module, images: Tensor, inference: Inference) -> Tensor:
    if inference.mode == "whole":
        return _padded_logits(model, images, inference.dtype)
    height, width = images.shape[-2:]
    window = (min(inference.window[0], height), min(inference.window[1], width))
    total: Tensor | None = None
    count = torch.zeros(1, 1, height, width, device=images.device)
    for top in _starts(height, window[0], inference.overlap):
        for left in _starts(width, window[1], inference.overlap):
            part = (..., slice(top, top + window[0]), slice(left, left + window[1]))
            logits = _padded_logits(model, images[part], inference.dtype)
            if total is None:
                total = logits.new_zeros(1, logits.shape[1], height, width)
            total[part] += logits
            count[part] += 1
    assert total is not None
    return total / count


def _starts(length: int, window: int, overlap: float) -> list[int]:
    """Evenly spaced window starts that reach both borders and overlap by at least the share asked."""
    if length <= window:
        return [0]
    # A whole number of pixels at most, else rounding the starts could leave a pixel less overlap than was asked.
    stride = max(1, math.floor(window * (1 - overlap) + 1e-6))
    count = math.ceil((length - window) / stride) + 1
    return [round(i * (length - window) / (count - 1)) for i in range(count)]


def _padded_logits(model: nn.Module, images: Tensor, dtype: torch.dtype) -> Tensor:
    height, width = images.shape[-2:]
    images = padded(images)
    with torch.autocast(
        images.device.type, dtype=torch.bfloat16 if dtype == torch.float32 else dtype, enabled=dtype != torch.float32
    ):
        try:
            output = model(images)
        except Exception as error:  # whatever a foreign forward raises
            size = f"{images.shape[-2]} x {images.shape[-1]} pixels"
            raise GSKDError(
                f"{type(model).__name__}: cannot run on {size}, as it is scored: {described(error)};"
                " eval.mode: slide scores windows of eval.window"
            ) from error
        logits = logits_of(output).float()
    if logits.shape[-2:] != images.shape[-2:]:
        logits = F.interpolate(logits, images.shape[-2:], mode="bilinear", align_corners=False)
    return logits[..., :height, :width]


def evaluate(
    model: nn.Module,
    dataset: SegmentationDataset,
    inference: Inference | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    stop: StopRequest | None = None,
) -> Score:
    """Scores a model on a whole dataset; several processes share the samples and all get the same score.

    The model is left in the mode it was in.

    Args:
        model: gives logits for the dataset's classes.
        dataset: see `gskd.data.SegmentationDataset`.
        inference: how logits are made; by default the whole image once.
        on_progress: called as ``on_progress(done, total)`` after each sample of this process.
        stop: looked at between samples.

    Raises:
        GSKDError: the model cannot run on an image, or gives another number of classes than the dataset has.
        Stopped: ``stop`` was requested, on any process.
    """
    inference = inference or Inference()
    device = next(model.parameters(), torch.zeros(())).device
    confusion = ConfusionMatrix(len(dataset.classes), device)
    mine = range(rank(), len(dataset), world_size())
    found = predictions(model, dataset, inference, mine)
    # Several processes ask each other, which waits for all: not at each sample, and all equally often.
    often = 1 if world_size() == 1 else _SAMPLES_BETWEEN_STOPS
    for turn in range(-(-len(dataset) // world_size())):
        if stop is not None and turn % often == 0 and stop.agreed():
            found.close()
            raise Stopped
        if turn < len(mine):
            confusion.update(*next(found))
            if on_progress is not None:
                on_progress(turn + 1, len(mine))
    found.close()
    return confusion.score()


def predictions(
    model: nn.Module, dataset: SegmentationDataset, inference: Inference, indices: Iterable[int]
) -> Generator[tuple[Tensor, Tensor]]:
    """Predicted and true classes, (H, W) integers each, sample by sample.

    The model is in eval mode while this runs and left in the mode it was in.

    Raises:
        GSKDError: the model cannot run on an image, or gives another number of classes than the dataset has.
    """
    device = next(model.parameters(), torch.zeros(())).device
    with eval_mode(model):
        for index in indices:
            sample = dataset[index]
            scores = predict(model, torch.from_numpy(sample.image).to(device).permute(2, 0, 1), inference)
            if len(scores) != len(dataset.classes):
                raise GSKDError(
                    f"{type(model).__name__}: gives {len(scores)} classes; expected the data's {len(dataset.classes)}"
                )
            yield scores.argmax(0), torch.from_numpy(sample.label).to(device)
