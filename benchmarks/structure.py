"""How well students keep the structure that their teacher sees: the error of their similarity maps, beside their mIoU.

    python benchmarks/structure.py TEACHER_RUN STUDENT_RUN [STUDENT_RUN ...] [data.root=...] [--of probabilities]

For every image points are drawn evenly from its classes, the same ones for all networks, and read at the layer "auto".
The error is the mean absolute difference of the cosines of all pairs of points between student and teacher: of pairs of
one class and of two classes apart. "contrast" is the mean cosine within classes less that across them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from gskd import auto_tap
from gskd.assembly import open_split
from gskd.losses.gskd_logits import class_probabilities
from gskd.run import Run, inference_of
from gskd.structure import StructureReader, label_tensor, sample_points, similarity_map, structure_error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="a teacher's run, students' runs, and key=value of their recipes")
    parser.add_argument("--split", default="val")
    parser.add_argument("--of", choices=("features", "probabilities"), default="features", help="default features")
    parser.add_argument("--samples-per-class", type=int, default=8)
    parser.add_argument("--images", type=int, default=101, help="at most so many of the split")
    options = parser.parse_args()
    overrides = tuple(text for text in options.runs if "=" in text)
    runs = [Run(Path(text)) for text in options.runs if "=" not in text]
    recipes = [run.load_recipe(overrides) for run in runs]
    data = open_split(recipes[0], options.split)
    readers = []
    for run, recipe in zip(runs, recipes, strict=True):
        model = run.load_model()
        if options.of == "features":
            reader = StructureReader(model, str(auto_tap(model, "features")), inference_of(recipe))
        else:
            layer = str(auto_tap(model, "logits"))
            reader = StructureReader(model, layer, inference_of(recipe), class_probabilities)
        readers.append(reader)
    found: list[list[tuple[float, float, float]]] = [[] for _ in runs]
    for index in range(min(options.images, len(data))):
        sample = data[index]
        image = torch.from_numpy(sample.image).permute(2, 0, 1)
        label = label_tensor(torch.from_numpy(sample.label), len(data.classes))
        points = sample_points(label, len(data.classes), options.samples_per_class, seed=index)
        maps = [similarity_map(reader.features(image, points)[0]) for reader in readers]
        same = points.label[:, None] == points.label[None, :]
        pairs = ~torch.eye(len(same), dtype=torch.bool)
        for rows, one in zip(found, maps, strict=True):
            contrast = one[same & pairs].mean() - one[~same].mean()
            rows.append((*structure_error(one, maps[0], points.label), contrast.item()))
    print(f"{'run':48s} {'one class':>10s} {'two':>10s} {'contrast':>10s} {'mIoU':>7s}")
    for run, rows in zip(runs, found, strict=True):
        within, across, contrast = np.nanmean(rows, axis=0)
        scores = run.read_result()["best"].get(options.split) if run.result.is_file() else None
        miou = float("nan") if scores is None else scores["miou"]
        print(f"{str(run.path)[-48:]:48s} {within:10.4f} {across:10.4f} {contrast:10.4f} {100 * miou:7.2f}")


if __name__ == "__main__":
    main()
