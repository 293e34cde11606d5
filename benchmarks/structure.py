"""How well students keep the structure that their teacher sees: the error of their similarity maps, beside their mIoU.

    python benchmarks/structure.py TEACHER_RUN STUDENT_RUN [STUDENT_RUN ...] [data.root=...] [--split val]

For every image points are drawn evenly from its classes, the same ones for all networks, and read at the layer "auto".
The error is the mean absolute difference of the cosines of all pairs of points between student and teacher: of pairs of
one class and of two classes apart. "contrast" is the mean cosine within classes less that across them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from gskd import Taps, auto_tap, class_balanced_sample, structural_similarity_map
from gskd.assembly import open_split
from gskd.evaluation import DIVISOR, Inference
from gskd.losses.gskd import read_points
from gskd.models import normalise
from gskd.run import Run, inference_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="a teacher's run, students' runs, and key=value of their recipes")
    parser.add_argument("--split", default="val")
    parser.add_argument("--samples-per-class", type=int, default=8)
    parser.add_argument("--images", type=int, default=101, help="at most so many of the split")
    options = parser.parse_args()
    overrides = tuple(text for text in options.runs if "=" in text)
    runs = [Run(Path(text)) for text in options.runs if "=" not in text]
    recipes = [run.load_recipe(overrides) for run in runs]
    data = open_split(recipes[0], options.split)
    models = [run.load_model() for run in runs]
    taps = [Taps(model, [auto_tap(model, "features")]) for model in models]
    totals = [torch.zeros(3, dtype=torch.float64) for _ in runs]
    images = range(min(options.images, len(data)))
    for index in images:
        sample = data[index]
        labels = torch.from_numpy(sample.label).long()[None]
        points = class_balanced_sample(
            labels, len(data.classes), options.samples_per_class, generator=torch.Generator().manual_seed(index)
        )
        pixels = torch.from_numpy(sample.image).permute(2, 0, 1)[None]
        maps = []
        for model, tap, recipe in zip(models, taps, recipes, strict=True):
            with torch.no_grad(), tap:
                model(prepared(pixels, inference_of(recipe)))
            features = next(tap[name] for name in tap.names)
            size = (labels.shape[1], labels.shape[2])
            maps.append(structural_similarity_map(read_points(features, points.index, size), points.valid)[0])
        valid, label = points.valid[0], points.label[0]
        pairs = valid[:, None] & valid[None, :] & ~torch.eye(len(valid), dtype=torch.bool)
        same = pairs & (label[:, None] == label[None, :])
        for total, one in zip(totals, maps, strict=True):
            error = (one - maps[0]).abs()
            contrast = one[same].mean() - one[pairs & ~same].mean()
            total += torch.stack([error[same].mean(), error[pairs & ~same].mean(), contrast]).double()
    print(f"{'run':48s} {'one class':>10s} {'two':>10s} {'contrast':>10s} {'mIoU':>7s}")
    for run, total in zip(runs, totals, strict=True):
        within, across, contrast = (total / len(images)).tolist()
        miou = run.read_result()["best"][options.split]["miou"] if run.result.is_file() else float("nan")
        print(f"{str(run.path)[-48:]:48s} {within:10.4f} {across:10.4f} {contrast:10.4f} {100 * miou:7.2f}")


def prepared(pixels: Tensor, inference: Inference) -> Tensor:
    """As evaluation gives it to the network: scaled, normalised, padded to the network's stride."""
    images = normalise(pixels, inference.mean, inference.std)
    size = [round(side * inference.scales[0]) for side in images.shape[-2:]]
    images = torch.nn.functional.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)
    height, width = images.shape[-2:]
    return torch.nn.functional.pad(images, (0, -width % DIVISOR, 0, -height % DIVISOR))


if __name__ == "__main__":
    main()
