"""What distillation adds to a plain training step: with the teacher running, and from the teacher cache, in one run.

    python benchmarks/step_cost.py camvid_gskd data.root=path/to/camvid teacher.run=runs/camvid_teacher [--threads 1]

Each row is a whole step: loading the views (also shown apart), forward, backward, update. The rows take turns, so that
a busy moment hits all alike. The cache is made for a few samples, in a temporary folder; its time is shown apart, for
as many views as a batch has.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from gskd.assembly import build_distiller, build_recipe_model, open_split, ready_teacher
from gskd.cache import CacheSource, TeacherCache, fill_cache
from gskd.data import Sample, SegmentationDataset
from gskd.data.loading import batches, moved
from gskd.data.views import PositionSampler, TrainingViews
from gskd.distiller import Distiller
from gskd.environment import environment
from gskd.models import normalise
from gskd.optimization import build_optimizer
from gskd.progress import Progress
from gskd.recipe import Recipe, TeacherPrecision, load_recipe
from gskd.run import augmentation_of, autocast_dtype, device_of, layout_of


class Few:
    """The first samples of a dataset."""

    def __init__(self, data: SegmentationDataset, length: int) -> None:
        self.data, self.length, self.classes, self.palette = data, min(length, len(data)), data.classes, data.palette

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        return self.data[index]

    def name(self, index: int) -> str:
        return self.data.name(index)

    def stamp(self) -> str:
        return f"{self.length} of {self.data.stamp()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="with a teacher and terms")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--threads", type=int, default=1, help="default 1")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each row; default 20")
    parser.add_argument("--samples", type=int, default=32, help="of the training split; default 32")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_intermixed_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        fixed = [f"teacher.cache={folder}", "augment.views=2"]
        recipe = load_recipe(args.recipe, [*args.overrides, *fixed])
        figures, waits = measure(recipe, args.steps, args.samples)
    about = {
        **environment(),
        "recipe": args.recipe,
        "batch": recipe.train.batch,
        "crop": recipe.augment.crop,
        "terms": {name: term.weight for name, term in recipe.terms.items()},
    }
    print(
        "; ".join(f"{key} {about[key]}" for key in ("processor", "cuda", "threads", "commit", "batch", "crop", "terms"))
    )
    plain = figures["plain"]
    print(f"{'step':36s}{'ms':>8s}{'x plain':>9s}{'waiting for data':>18s}")
    for name, seconds in figures.items():
        wait = f"{100 * waits[name] / seconds:16.1f} %" if name in waits else ""
        print(f"{name:36s}{1e3 * seconds:8.1f}{seconds / plain:9.2f}{wait}")
    if args.json is not None:
        args.json.write_text(json.dumps({**about, "seconds": figures, "waiting": waits}, indent=1))


def measure(recipe: Recipe, steps: int, samples: int) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds by row, and those of them in which the step waits for its images."""
    device = device_of(recipe)
    data = Few(open_split(recipe, recipe.data.train), samples)
    layout = layout_of(recipe)

    def student() -> torch.nn.Module:
        torch.manual_seed(recipe.seed)
        return build_recipe_model(recipe.model, data, "model", recipe.augment.crop)

    def built(precision: TeacherPrecision | None) -> Distiller:
        named = recipe.teacher and replace(recipe.teacher, precision=precision)
        return build_distiller(replace(recipe, teacher=named), student(), data)[0]

    assert recipe.teacher is not None
    cached, teacher_model = build_distiller(recipe, student(), data)
    exact, unfolded = built(None), built(recipe.teacher.precision)
    folded, probed = built(recipe.teacher.precision), built(TeacherPrecision.auto)
    rows: dict[str, Distiller] = {
        "plain": Distiller(student()),
        "teacher in the student's precision": exact,
        "teacher in its own precision": unfolded,
        "and folded": folded,
        "teacher as probed (auto)": probed,
        "teacher cache": cached,
    }
    for distiller in rows.values():
        distiller.to(device, memory_format=layout)
        distiller.train()
    ready_teacher(recipe, folded, teacher_model, data, recipe.train.batch)
    automatic = replace(recipe, teacher=replace(recipe.teacher, precision=TeacherPrecision.auto))
    for trial in ready_teacher(automatic, probed, teacher_model, data, recipe.train.batch):
        print(f"teacher in {trial}")
    print(f"taken: {probed.teacher_path}")
    source = CacheSource(recipe, cached, teacher_model, data)
    cache = TeacherCache(source)
    source.ready(cache)
    begun = time.perf_counter()
    fill_cache(cache, source, Progress(enabled=False))
    building = time.perf_counter() - begun
    dtype = autocast_dtype(recipe.train.precision)
    times: dict[str, list[float]] = {name: [] for name in rows}
    waits: dict[str, list[float]] = {name: [] for name in rows}
    with ExitStack() as stack:
        turns = {}
        for (name, distiller), targets in zip(rows.items(), (*[None] * (len(rows) - 1), cache), strict=True):
            found = stack.enter_context(loaded(recipe, data, steps, targets))
            turns[name] = turn(recipe, distiller, teacher_model, found, dtype)
        for step in range(steps + 3):
            for name, take in turns.items():
                start = time.perf_counter()
                wait = take()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                if step >= 3:
                    times[name].append(time.perf_counter() - start)
                    waits[name].append(wait)
    figures = {name: median(found) for name, found in times.items()}
    figures["teacher as probed, forward alone"] = forward_alone(probed, recipe, steps)
    figures["making the cache, a batch"] = building / (len(data) * 2) * recipe.train.batch
    return figures, {name: median(found) for name, found in waits.items()}


def forward_alone(distiller: Distiller, recipe: Recipe, steps: int) -> float:
    """Seconds of the teacher's pass over a batch."""
    images = torch.randn(recipe.train.batch, 3, *recipe.augment.crop, device=device_of(recipe))
    labels = torch.zeros(len(images), *recipe.augment.crop, dtype=torch.int64, device=images.device)
    found = []
    for _ in range(steps + 3):
        begun = time.perf_counter()
        distiller._teach(images, labels)
        if images.device.type == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - begun)
    return median(found[3:])


def loaded(recipe: Recipe, data: SegmentationDataset, steps: int, targets: TeacherCache | None) -> Any:
    views = TrainingViews(data, augmentation_of(recipe), recipe.seed, recipe.augment.views, targets)
    sampler = PositionSampler(recipe.train.batch, 0, steps + 3)
    return batches(views, recipe.data.workers, batch_size=recipe.train.batch, sampler=sampler)


def turn(
    recipe: Recipe, distiller: Distiller, teacher_model: Any, found: Iterator[Any], dtype: torch.dtype
) -> Callable[[], float]:
    """One training step at each call, which gives the seconds that its images took."""
    device = device_of(recipe)
    layout = layout_of(recipe)
    optimizer = build_optimizer(distiller, recipe.train)
    half = torch.bfloat16 if dtype == torch.float32 else dtype

    def take() -> float:
        begun = time.perf_counter()
        images, labels, *targets = moved(next(found), device)
        waited = time.perf_counter() - begun
        inputs = [
            normalise(images, model.mean, model.std).contiguous(memory_format=layout)
            for model in (recipe.model, teacher_model)
        ]
        with torch.autocast(device.type, half, enabled=dtype == half):
            result = distiller(inputs[0], labels, inputs[1], *targets)
        result.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return waited

    return take


if __name__ == "__main__":
    main()
