"""The structure that networks see in one image, to be measured and looked at: points, and how similar they are.

Shape suffixes: M points, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gskd.data import IGNORE
from gskd.errors import GSKDError
from gskd.evaluation import Inference, padded, scaled
from gskd.losses._pixels import promote
from gskd.losses._sampling import class_balanced_sample, read_points
from gskd.losses.gskd import structural_similarity_map
from gskd.models import normalise
from gskd.taps import Taps, eval_mode


@dataclass(frozen=True)
class Points:
    """Pixels of one image, as many of every class."""

    index: Tensor
    """(M,) int64 positions in the flattened label map."""
    label: Tensor
    """(M,) int64 their classes, ascending."""
    size: tuple[int, int]
    """(H, W) of the label map."""

    def places(self) -> Tensor:
        """(M, 2) x and y of the pixels' centres, as a share of width and height."""
        rows, columns = self.index // self.size[1], self.index % self.size[1]
        return torch.stack([(columns + 0.5) / self.size[1], (rows + 0.5) / self.size[0]], dim=1)


def sample_points(label: Tensor, classes: int, samples_per_class: int = 8, seed: int = 0) -> Points:
    """Pixels drawn evenly from the classes of a label map, the same for every network.

    Args:
        label: (H, W) int64, `IGNORE` where nothing counts.
        classes: K.
        samples_per_class: of every class that is there, fewer where it has fewer.
        seed: of the draw.
    """
    found = class_balanced_sample(
        label[None], classes, samples_per_class, policy="mask", generator=torch.Generator().manual_seed(seed)
    )
    real = found.valid[0]
    order = found.label[0][real].argsort(stable=True)
    return Points(found.index[0][real][order], found.label[0][real][order], (label.shape[0], label.shape[1]))


class StructureReader:
    """Reads one layer of a network at points of an image, as the network is scored: scaled, normalised, padded.

    Args:
        model: in eval mode while it is read.
        layer: see `gskd.taps.Taps`.
        inference: scale, mean and std are used.
        describe: makes of what was read (..., C) what is returned (..., C'), as `GSKDLoss.compare` takes it: a softmax
            for `LogitGSKDLoss`; nothing but float32 by default.
    """

    def __init__(
        self,
        model: nn.Module,
        layer: str,
        inference: Inference,
        describe: Callable[[Tensor], Tensor] = promote,
    ) -> None:
        self.model, self.layer, self.inference, self.describe = model, layer, inference, describe
        self.taps = Taps(model, [layer])

    @torch.no_grad()
    def features(self, image: Tensor, points: Points) -> tuple[Tensor, Tensor]:
        """The layer at the points, and everywhere.

        Args:
            image: (3, H, W) uint8.
            points: of the same image.

        Returns:
            (M, C') and (C', h, w), the latter without what was padded.

        Raises:
            GSKDError: the layer gives no map.
        """
        device = next(self.model.parameters()).device
        images = normalise(image[None].to(device), self.inference.mean, self.inference.std)
        images = scaled(images, self.inference.scales[0])
        size = images.shape[-2:]
        images = padded(images)
        covered = images.shape[-2:]
        with eval_mode(self.model), self.taps as taps:
            self.model(images)
        maps = taps[self.layer].float().cpu()
        if maps.dim() != 4:
            raise GSKDError(f"layer {self.layer!r}: gives {tuple(maps.shape)}, no map; expected (B, C, h, w)")
        # The points as positions in the padded image, which is what the map covers.
        height, width = (round(points.size[axis] * covered[axis] / size[axis]) for axis in (0, 1))
        rows, columns = points.index // points.size[1], points.index % points.size[1]
        read = read_points(maps, (rows * width + columns)[None], (height, width))[0]
        h, w = (max(1, round(maps.shape[2 + axis] * size[axis] / covered[axis])) for axis in (0, 1))
        return self.describe(read), self.describe(maps[0, :, :h, :w].movedim(0, 2)).movedim(2, 0)


def similarity_map(read: Tensor) -> Tensor:
    """(M, C) -> (M, M) cosines."""
    return structural_similarity_map(read[None])[0]


def similarity_everywhere(read: Tensor, maps: Tensor) -> Tensor:
    """(M, C) and (C, h, w) -> (M, h, w): the cosine of every point with every place of the map."""
    places = F.normalize(maps.flatten(1), dim=0)
    return (F.normalize(read, dim=1) @ places).view(len(read), *maps.shape[1:])


def structure_error(student: Tensor, teacher: Tensor, label: Tensor) -> tuple[float, float]:
    """Mean difference of two similarity maps (M, M), of pairs of one class and of two; NaN where there are none."""
    apart = (student - teacher).abs()
    same = label[:, None] == label[None, :]
    pairs = ~torch.eye(len(label), dtype=torch.bool)
    return apart[same & pairs].mean().item(), apart[~same].mean().item()


def label_tensor(label: Tensor, classes: int) -> Tensor:
    """(H, W) int64, with `IGNORE` for whatever is no class."""
    label = label.long()
    return torch.where((label >= 0) & (label < classes), label, IGNORE)
