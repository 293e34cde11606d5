"""What a report shows, from run folders: networks built again, scored costs, pictures, similarity maps."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gskd.assembly import build_recipe_model, build_teacher, open_split
from gskd.data import SegmentationDataset
from gskd.data.selection import spread
from gskd.errors import GSKDError
from gskd.evaluation import Inference, padded, predict, scaled
from gskd.layers import auto_tap
from gskd.losses._pixels import promote
from gskd.losses.gskd_logits import class_probabilities
from gskd.metrics import RARE_SHARE
from gskd.models import count_parameters
from gskd.recipe import Recipe
from gskd.run import Run, device_of, inference_of
from gskd.speed import latency, multiply_adds
from gskd.structure import (
    Points,
    StructureReader,
    label_tensor,
    sample_points,
    similarity_everywhere,
    similarity_map,
    structure_error,
)

_LONGEST = 640  # pixels of a picture's longer side
_TILE = 48  # of a similarity picture's
_COUNTED = 200  # images whose pixels say how common a class is
TEACHER, BEFORE = "teacher", "student before training"


@dataclass(frozen=True)
class Compared:
    """What of the networks is compared: that which the first run with GSKD distilled."""

    kind: Literal["features", "logits"]
    student: str
    """A layer, or ``"auto"``."""
    teacher: str

    @property
    def vectors(self) -> str:
        """For people."""
        return "class probabilities" if self.kind == "logits" else "features"

    @property
    def describe(self) -> Callable[[Tensor], Tensor]:
        """What makes these vectors of what is read."""
        return class_probabilities if self.kind == "logits" else promote


@dataclass(frozen=True)
class Network:
    """One network of the report."""

    name: str
    model: nn.Module
    inference: Inference
    layer: str | None
    """What is read of it for the structure; None where no layer is known."""


@dataclass(frozen=True)
class Picture:
    """One image, and what every network makes of it."""

    name: str
    image: np.ndarray
    """(h, w, 3) uint8."""
    labels: dict[str, np.ndarray]
    """``"truth"`` and networks by name: (h, w) uint8, `IGNORE` where nothing counts."""


@dataclass(frozen=True)
class Structure:
    """The points of one picture, and how similar each network finds them."""

    picture: int
    points: Points
    similarity: dict[str, Tensor]
    """(M, M) by network."""
    everywhere: dict[str, Tensor]
    """(M, h, w) by network: each point with every place of the image."""
    error: dict[str, tuple[float, float]]
    """Difference to the teacher's map, within classes and across, by other networks."""


@dataclass
class Content:
    """All that a report shows."""

    title: str
    split: str
    classes: list[str]
    palette: list[list[int]]
    share: list[float]
    """Of the labelled pixels, by class."""
    rows: list[dict[str, Any]]
    """By network: scores, costs; what is unknown is None."""
    curves: dict[str, list[dict[str, Any]]]
    """``metrics.jsonl`` by run."""
    recipes: dict[str, str]
    environment: dict[str, Any]
    vectors: str
    """Of the points whose similarity is shown: "features" or "class probabilities"."""
    pictures: list[Picture] = field(default_factory=list)
    structures: list[Structure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    comparison: dict[str, Any] | None = None
    """``results.json`` of a comparison."""

    @property
    def rare(self) -> list[bool]:
        """Which classes are rare."""
        return [part < RARE_SHARE for part in self.share]


def gather(
    folders: Sequence[Path],
    overrides: Sequence[str] = (),
    images: int = 6,
    explored: int = 3,
    on_progress: Callable[[str], None] = lambda line: None,
) -> Content:
    """Builds the networks of runs again and looks at them.

    Args:
        folders: finished runs on the same classes; or one folder of a comparison, of which the baseline and up to three
            others are shown in pictures: the best, and the best with GSKD.
        overrides: ``key=value`` of the runs' recipes, for example ``data.root=data/camvid``.
        images: pictures from the split that picked the best weights, spread evenly over it.
        explored: of these, how many with their similarity maps.
        on_progress: called with what is being done.

    Raises:
        GSKDError: a folder holds no finished run, classes differ, or data or teacher cannot be opened.
    """
    comparison, title = None, None
    if len(folders) == 1 and (results := folders[0] / "results.json").is_file() and not Run(folders[0]).exists:
        comparison = _read_json(results)
        title = folders[0].resolve().name
        folders = _shown(folders[0], comparison)
    runs = {name: Run(folder) for name, folder in zip(_names(folders), folders, strict=True)}
    recipes = {name: run.load_recipe(tuple(overrides)) for name, run in runs.items()}
    results_of = {name: _finished(run) for name, run in runs.items()}
    first, run = next(iter(recipes.values())), next(iter(runs.values()))
    data = open_split(first, first.data.val)
    for other in runs.values():
        other.check_classes(data, "report")
    notes = _differing(recipes, first, overrides)
    distilling = {name: recipe for name, recipe in recipes.items() if runs[name].info()["kind"] == "distill"}
    compared = _compared(distilling)
    networks, more = _networks(runs, recipes, distilling, compared, data, on_progress)
    notes += more
    if comparison is not None:
        notes.append(
            f"The table of networks and all below it are of {', '.join(f.parent.name + ' ' + f.name for f in folders)}."
        )
    content = Content(
        title=title or (" and ".join(runs) if len(runs) < 4 else f"{len(runs)} runs"),
        split=first.data.val,
        classes=list(data.classes),
        palette=np.asarray(data.palette).tolist(),
        share=_shares(data),
        rows=[],
        curves={name: one.read_metrics() for name, one in runs.items()},
        recipes={name: one.recipe_file.read_text(encoding="utf-8") for name, one in runs.items()},
        environment=run.info()["environment"],
        vectors=compared.vectors,
        notes=notes,
        comparison=comparison,
    )
    chosen = spread(len(data), images)
    for number, index in enumerate(chosen):
        on_progress(f"picture {number + 1} of {len(chosen)}")
        content.pictures.append(_picture(data, index, networks))
        if number < explored and len([n for n in networks if n.layer]) > 1:
            content.structures.append(_structure(data, index, number, networks, compared))
    content.rows = [_row(network, results_of, data, content, on_progress) for network in networks]
    return content


def _differing(recipes: dict[str, Recipe], first: Recipe, overrides: Sequence[str]) -> list[str]:
    """What a reader must know before comparing these runs.

    Raises:
        GSKDError: they were scored on other data.
    """
    notes = []
    for name, recipe in recipes.items():
        mine, theirs = ((one.data.dataset, one.data.root, one.data.options, one.data.val) for one in (recipe, first))
        if mine != theirs:
            raise GSKDError(f"report: {name} was scored on other data than {next(iter(recipes))}; expected the same")
    if len({repr((one.eval.scales, one.eval.flip, one.eval.mode)) for one in recipes.values()}) > 1:
        notes.append("The runs were scored in different ways (eval): their scores are not of one kind.")
    changed = [text for text in overrides if not text.startswith(("data.root=", "teacher.run=", "train."))]
    if changed:
        notes.append(f"Scores are those of training; pictures, latency and MACs are with {' '.join(changed)}.")
    return notes


def _shown(folder: Path, results: dict[str, Any]) -> list[Path]:
    """The runs of a comparison that are worth a picture: the baseline, the best others, and the best with GSKD."""
    split, steps = results["compared_on"], [row for row in results["rows"] if row["round"] == "steps"]
    ranked = sorted(steps, key=lambda row: -float(np.mean([score or 0.0 for score in row["miou"][split].values()])))
    others = [row["variant"] for row in ranked if row["variant"] != results["baseline"]]
    with_gskd = {
        row["variant"]
        for row in ranked
        if any((term["loss"] or name) in ("gskd", "gskd_logits") for name, term in row["terms"].items())
    }
    structural = [name for name in others if name in with_gskd]
    chosen = others[:3] if not structural or structural[0] in others[:3] else [*others[:2], structural[0]]
    seeds = {row["variant"]: row["seeds"][0] for row in steps}
    names = [results["baseline"], *chosen]
    return [folder / "runs" / name / f"seed-{seeds[name]}" for name in names if name in seeds]


def _names(folders: Sequence[Path]) -> list[str]:
    """Short names that tell runs apart: the part of their paths that differs."""
    paths = [list(folder.resolve().parts) for folder in folders]
    if len({tuple(path) for path in paths}) < len(paths):
        raise GSKDError("report: the same run is named twice")
    while len(paths) > 1 and len({path[-1] for path in paths}) == 1:  # as seed-0 of several variants
        paths = [path[:-1] for path in paths]
    depth = 1
    while len({tuple(path[-depth:]) for path in paths}) < len(paths):
        depth += 1
    names = ["/".join(path[-depth:]) for path in paths]
    return [name if name not in (TEACHER, BEFORE, "truth", "image") else f"{name} (run)" for name in names]


def _finished(run: Run) -> dict[str, Any]:
    if not run.exists:
        raise GSKDError(f"run {run.path}: holds no recipe.yaml; expected a finished run, or a comparison's folder")
    if not run.result.is_file():
        raise GSKDError(f"run {run.path}: is not finished; continue it with --resume")
    return run.read_result()


def _networks(
    runs: dict[str, Run],
    recipes: dict[str, Recipe],
    distilling: dict[str, Recipe],
    compared: Compared,
    data: SegmentationDataset,
    on_progress: Callable[[str], None],
) -> tuple[list[Network], list[str]]:
    """Teacher, the student as it was before training, and the students; and what had to be left out."""
    found: list[Network] = []
    notes: list[str] = []
    distilled = next(iter(distilling), None)
    teachers = {run.info().get("teacher_sha256") for name, run in runs.items() if name in distilling}
    if len(teachers) > 1:
        notes.append(f"The runs have different teachers: what is shown and compared with is that of {distilled}.")
    begun_as = distilled or next(iter(recipes))
    if len({repr((one.model.name, one.model.args)) for one in recipes.values()}) > 1:
        notes.append(f"The runs have different networks: the student before training is that of {begun_as}.")
    if distilled is not None:
        recipe = recipes[distilled]
        assert recipe.teacher is not None
        on_progress("building the teacher")
        try:
            model, spec = build_teacher(recipe.teacher, data, recipe.augment.crop)
            inference = inference_of(replace(recipe, model=spec))
            found.append(_network(TEACHER, model, inference, compared.teacher, compared.kind, recipe))
        except GSKDError as error:
            notes.append(f"The teacher is left out: {error}")
    begun = recipes[begun_as]
    try:
        torch.manual_seed(begun.seed)  # as training begins
        model = build_recipe_model(begun.model, data, "model", begun.augment.crop)
        found.append(_network(BEFORE, model, inference_of(begun), compared.student, compared.kind, begun))
    except GSKDError as error:
        notes.append(f"The student before training is left out: {error}")
    for name, run in runs.items():
        on_progress(f"building {name}")
        recipe = recipes[name]
        model, inference = run.load_model(recipe), inference_of(recipe)
        found.append(_network(name, model, inference, compared.student, compared.kind, recipe))
    return found, notes


def _compared(recipes: dict[str, Recipe]) -> Compared:
    """What GSKD reads in the first run that has it, be it on features or on class probabilities; features without."""
    kinds: dict[str, Literal["features", "logits"]] = {"gskd": "features", "gskd_logits": "logits"}
    for recipe in recipes.values():
        for name, term in recipe.terms.items():
            if kind := kinds.get(term.loss or name):
                return Compared(kind, str(term.student), str(term.teacher))
    return Compared("features", "auto", "auto")


def _network(
    name: str,
    model: nn.Module,
    inference: Inference,
    layer: str,
    kind: Literal["features", "logits"],
    recipe: Recipe,
) -> Network:
    model = model.eval().to(device_of(recipe))
    known: str | None = layer
    if layer == "auto":
        try:
            tap = auto_tap(model, kind)
            known = tap if isinstance(tap, str) else tap[-1]
        except GSKDError:
            known = None
    elif layer not in dict(model.named_modules()) and "[" not in layer and layer != "logits":
        known = None  # a student of another architecture than the one the layer was named for
    return Network(name, model, inference, known)


def _device(network: Network) -> torch.device:
    return next(network.model.parameters()).device


def _picture(data: SegmentationDataset, index: int, networks: Sequence[Network]) -> Picture:
    sample = data[index]
    factor = min(1.0, _LONGEST / max(sample.label.shape))
    size = [max(1, round(side * factor)) for side in sample.label.shape]
    image = torch.from_numpy(sample.image).permute(2, 0, 1)
    labels = {"truth": label_tensor(torch.from_numpy(sample.label), len(data.classes))}
    for network in networks:
        labels[network.name] = predict(network.model, image.to(_device(network)), network.inference).argmax(0).cpu()
    small = F.interpolate(image[None].float(), size, mode="bilinear", antialias=True)[0]
    return Picture(
        data.name(index),
        small.round().clamp(0, 255).byte().permute(1, 2, 0).numpy(),
        {
            name: F.interpolate(label[None, None].float(), size, mode="nearest-exact")[0, 0].byte().numpy()
            for name, label in labels.items()
        },
    )


def _structure(
    data: SegmentationDataset, index: int, number: int, networks: Sequence[Network], compared: Compared
) -> Structure:
    sample = data[index]
    image = torch.from_numpy(sample.image).permute(2, 0, 1)
    label = label_tensor(torch.from_numpy(sample.label), len(data.classes))
    points = sample_points(label, len(data.classes), seed=index)
    factor = _TILE / max(sample.label.shape)
    size = [max(1, round(side * factor)) for side in sample.label.shape]
    maps: dict[str, Tensor] = {}
    everywhere: dict[str, Tensor] = {}
    for network in networks:
        if network.layer is not None and len(points.index):
            reader = StructureReader(network.model, network.layer, network.inference, compared.describe)
            read, features = reader.features(image, points)
            maps[network.name] = similarity_map(read)
            tiles = similarity_everywhere(read, features)
            everywhere[network.name] = F.interpolate(tiles[None], size, mode="bilinear", antialias=True)[0]
    errors = {
        name: structure_error(one, maps[TEACHER], points.label)
        for name, one in maps.items()
        if TEACHER in maps and name != TEACHER
    }
    return Structure(number, points, maps, everywhere, errors)


def _row(
    network: Network,
    results: dict[str, dict[str, Any]],
    data: SegmentationDataset,
    content: Content,
    on_progress: Callable[[str], None],
) -> dict[str, Any]:
    """A network's line of the table."""
    on_progress(f"timing {network.name}")
    height, width = data[0].label.shape
    image = padded(scaled(torch.randn(1, 3, height, width, device=_device(network)), network.inference.scales[0]))
    seconds = latency(network.model, image)
    row: dict[str, Any] = {
        "name": network.name,
        "parameters": count_parameters(network.model),
        "multiply_adds": multiply_adds(network.model, image),
        "size": list(image.shape[-2:]),
        "median": seconds.median,
        "p95": seconds.p95,
        "miou": {},
        "iou": None,
        "seconds": None,
    }
    errors = np.array([one.error[network.name] for one in content.structures if network.name in one.error])
    finite = np.isfinite(errors).all(axis=1) if len(errors) else []  # a picture of one class has no pair of two
    row["structure_error"] = errors[finite].mean(0).tolist() if any(finite) else None
    if network.name in results:
        result = results[network.name]
        row["miou"] = {split: score["miou"] for split, score in result["best"].items()}
        row["iou"] = _ious(result["best"].get(content.split), content.classes)
        row["seconds"] = result["seconds"]
    elif network.name == TEACHER:
        known = next((one["teacher"] for one in results.values() if one.get("teacher")), None) or {}
        row["miou"] = {split: score["miou"] for split, score in known.items()}
        row["iou"] = _ious(known.get(content.split), content.classes)
    return row


def _ious(score: dict[str, Any] | None, classes: Sequence[str]) -> list[float | None] | None:
    return None if score is None else [score["iou"].get(name) for name in classes]


def _shares(data: SegmentationDataset) -> list[float]:
    """How much of the labelled pixels each class has, of the first images."""
    counts = np.zeros(256, np.int64)
    for index in range(min(_COUNTED, len(data))):
        counts += np.bincount(data[index].label.ravel(), minlength=256)[:256]
    labelled = counts[: len(data.classes)]
    shares: list[float] = (labelled / max(1, labelled.sum())).tolist()
    return shares


def _read_json(path: Path) -> dict[str, Any]:
    try:
        read: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return read
    except (OSError, ValueError) as error:
        raise GSKDError(f"{path}: cannot be read: {error}") from None
