"""What a comparison found, from its run folders: a table for people, CSV and JSON, and a figure (run folders -> files).

::

    results.json    everything: seeds, splits, classes, intervals, hardware
    results.csv     one line per variant and round
    results.md      the tables, to paste
    results.png     test mIoU against seconds of training
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gskd.assembly import open_split
from gskd.checkpoint import write_text
from gskd.comparison.grid import Cell, equal_seconds_cell, equal_steps_cell, seconds_budget
from gskd.comparison.recipe import Comparison
from gskd.comparison.statistics import Difference, class_iou, image_counts, mean_iou, paired_difference
from gskd.errors import GSKDError
from gskd.metrics import RARE_SHARE
from gskd.progress import Progress
from gskd.run import Run, device_of, inference_of


def write_tables(comparison: Comparison, console: Console) -> dict[str, Any]:
    """Prints the table of what is finished, and writes ``results.json``, ``results.csv``, ``results.md`` and ``.png``.

    Differences to the baseline are on the recipe's test split, on val where none is named or it has no labels; see
    `paired_difference`. Where images or labels of that split have changed between runs, all are scored again on it.

    Returns:
        The content of ``results.json``.

    Raises:
        GSKDError: no run is finished, or a run folder cannot be read.
    """
    rows = []
    rounds = {"steps": equal_steps_cell, "seconds": equal_seconds_cell}
    with Progress(console) as progress:
        for round_, cell_of in rounds.items():
            cells = {
                variant.name: {
                    seed: cell
                    for seed in variant.seeds
                    if (cell := cell_of(comparison, variant, seed)) is not None and cell.finished
                }
                for variant in comparison.variants
            }
            counts = _counts_alike([cell for mine in cells.values() for cell in mine.values()], progress)
            rows += [
                _row(name, round_, mine, cells[comparison.baseline], counts) for name, mine in cells.items() if mine
            ]
    if not rows:
        raise GSKDError(f"output {comparison.output}: holds no finished run yet")
    first = next(
        cell
        for variant in comparison.variants
        for seed in variant.seeds
        if (cell := equal_steps_cell(comparison, variant, seed)).finished
    )
    results = {
        "baseline": comparison.baseline,
        "compared_on": _compared(first),
        "rare_below_share": RARE_SHARE,
        "seconds_budget": seconds_budget(comparison),
        "teacher": _teacher(comparison),
        "environment": first.run.info()["environment"],
        "rows": rows,
    }
    write_text(comparison.output / "results.json", json.dumps(results, indent=1))
    write_text(comparison.output / "results.csv", _csv(rows))
    _figure(rows, comparison.output / "results.png")
    write_text(comparison.output / "results.md", _markdown(results))
    _print(results, console)
    for file in ("results.json", "results.csv", "results.md", "results.png"):
        console.print(str(comparison.output / file), markup=False, soft_wrap=True)
    return results


def _compared(cell: Cell) -> str:
    data = cell.recipe.data
    if data.test and cell.run.read_result()["best"].get(data.test, {}).get("miou") is not None:
        return data.test
    return data.val


def _counts_alike(cells: Sequence[Cell], progress: Progress) -> dict[Path, np.ndarray]:
    """`_counts` by run folder. Where what is kept is not of the same images and labels, all runs are scored again."""
    counts = {cell.run.path: _counts(cell, progress) for cell in cells}
    labelled = [one[:, 1] for one in counts.values()]
    if any(not np.array_equal(one, labelled[0]) for one in labelled[1:]):
        split = _compared(cells[0])
        progress.say(
            f"images or labels of {split} have changed since some runs were scored: all are scored again on it"
        )
        counts = {cell.run.path: _counts(cell, progress, anew=True) for cell in cells}
    return counts


def _counts(cell: Cell, progress: Progress, anew: bool = False) -> np.ndarray:
    """Per image and class, of the run's best weights on the split that is compared; kept in the run folder."""
    split = _compared(cell)
    settings = json.dumps(asdict(cell.recipe.eval), sort_keys=True, default=str)
    kept = cell.run.path / f"counts_{split}_{hashlib.sha256(settings.encode()).hexdigest()[:8]}.npy"
    if not anew and kept.is_file() and kept.stat().st_mtime >= cell.run.result.stat().st_mtime:
        with contextlib.suppress(ValueError, OSError):  # a damaged file is made again
            loaded: np.ndarray = np.load(kept, allow_pickle=False)
            return loaded
    data = open_split(cell.recipe, split)
    model = cell.run.load_model(cell.recipe).to(device_of(cell.recipe))
    progress.say(f"scoring {cell.title} image by image on {split}")
    counts = image_counts(model, data, inference_of(cell.recipe))
    partial = kept.with_suffix(".partial")
    with open(partial, "wb") as file:
        np.save(file, counts)
    partial.replace(kept)
    return counts


def _row(
    name: str, round_: str, cells: dict[int, Cell], baseline: dict[int, Cell], counts_of: dict[Path, np.ndarray]
) -> dict[str, Any]:
    results = {seed: cell.run.read_result() for seed, cell in cells.items()}
    any_cell = next(iter(cells.values()))
    split, classes = _compared(any_cell), any_cell.run.info()["classes"]
    counts = {seed: counts_of[cell.run.path] for seed, cell in cells.items()}
    labelled = next(iter(counts.values()))[:, 1].sum(axis=0)
    rare = labelled < RARE_SHARE * labelled.sum()
    shared = [seed for seed in cells if seed in baseline]
    differences: dict[str, Difference] | None = None
    if shared and baseline[shared[0]].run.path != cells[shared[0]].run.path:
        mine = np.stack([counts[seed] for seed in shared])
        theirs = np.stack([counts_of[baseline[seed].run.path] for seed in shared])
        differences = {"all": paired_difference(mine, theirs)}
        if rare.any() and not rare.all():
            differences["rare"] = paired_difference(mine, theirs, rare)
            differences["common"] = paired_difference(mine, theirs, ~rare)
    sums = {seed: count.sum(axis=0) for seed, count in counts.items()}
    iou = np.stack([class_iou(total) for total in sums.values()])
    return {
        "variant": name,
        "round": round_,
        "seeds": list(cells),
        "terms": {term: asdict(spec) for term, spec in any_cell.recipe.terms.items()},
        "steps": any_cell.recipe.train.steps,
        "seconds": statistics.mean(result["seconds"] for result in results.values()),
        "seconds_per_step": statistics.mean(
            result["seconds"] / cells[seed].recipe.train.steps for seed, result in results.items()
        ),
        "peak_memory_gib": _highest(result.get("peak_memory_gib") for result in results.values()),
        "miou": {
            **{
                other: {str(seed): result["best"][other]["miou"] for seed, result in results.items()}
                for other in results[next(iter(results))]["best"]
                if other != split
            },
            split: {str(seed): _known(mean_iou(total)) for seed, total in sums.items()},
        },
        "last_quarter_gain": _last_quarter_gain(cells),
        "iou": {
            label: None if np.isnan(values).all() else float(np.nanmean(values))
            for label, values in zip(classes, iou.T, strict=True)
        },
        "rare": [label for label, is_rare in zip(classes, rare, strict=True) if is_rare],
        "difference": differences and {part: asdict(value) for part, value in differences.items()},
        "difference_seeds": shared if differences else [],
    }


def _last_quarter_gain(cells: dict[int, Cell]) -> float | None:
    """By how much val mIoU rose in the last quarter of the schedule, mean over seeds; None where it was not scored."""
    gains = []
    for cell in cells.values():
        scores = {line["step"]: line["miou"] for line in cell.run.read_metrics() if "miou" in line}
        steps = cell.recipe.train.steps
        early = [step for step in scores if step <= 0.75 * steps]
        if early and steps in scores and None not in (scores[steps], scores[max(early)]):
            gains.append(scores[steps] - scores[max(early)])
    return statistics.mean(gains) if gains else None


def _known(value: Any) -> float | None:
    return None if np.isnan(value) else float(value)


def _highest(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return max(known) if known else None


def _teacher(comparison: Comparison) -> dict[str, Any] | None:
    own = Run(comparison.output / "teacher")
    if comparison.teacher is not None and own.result.is_file():
        return {split: score["miou"] for split, score in own.read_result()["best"].items()}
    for variant in comparison.variants:
        for seed in variant.seeds:
            cell = equal_steps_cell(comparison, variant, seed)
            if cell.finished and (score := cell.run.read_result().get("teacher")):
                return {split: value["miou"] for split, value in score.items()}
    return None


def _points(value: float | None) -> str:
    return "-" if value is None or value != value else f"{100 * value:.2f}"


def _spread(scores: dict[str, float | None]) -> str:
    values = [value for value in scores.values() if value is not None]
    text = _points(statistics.mean(values)) if values else "-"
    return text + (f" ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else "")


def _interval(difference: dict[str, float] | None, seeds: str = "") -> str:
    if not difference:
        return "-"
    return f"{100 * difference['mean']:+.2f} [{100 * difference['low']:+.2f}, {100 * difference['high']:+.2f}]{seeds}"


def _cells(row: dict[str, Any], split: str) -> dict[str, str]:
    """A row of the tables as text, by column."""
    difference = row["difference"] or {}
    other = [name for name in row["miou"] if name != split]
    shared = len(row["difference_seeds"])
    fewer = f" of {shared}" if 0 < shared < len(row["seeds"]) else ""
    return {
        "variant": row["variant"],
        "n": str(len(row["seeds"])),
        "steps": str(row["steps"]),
        **{name: _spread(row["miou"][name]) for name in other},
        split: _spread(row["miou"][split]),
        "difference [95 %]": _interval(difference.get("all"), fewer),
        "s/step": f"{row['seconds_per_step']:.3f}",
        "GiB": "-" if row["peak_memory_gib"] is None else f"{row['peak_memory_gib']:.1f}",
        "rare classes": _interval(difference.get("rare")),
        "common classes": _interval(difference.get("common")),
    }


_ROUNDS = {"steps": "equal steps", "seconds": "equal seconds"}
_BY_FREQUENCY = ("rare classes", "common classes")


def _tables(results: dict[str, Any]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Title, columns and rows of each table: scores, and differences by how frequent a class is, for each round."""
    split, baseline = results["compared_on"], results["baseline"]
    for round_, title in _ROUNDS.items():
        rows = [row for row in results["rows"] if row["round"] == round_]
        if not rows:
            continue
        texts = [_cells(row, split) for row in rows]
        columns = [column for column in texts[0] if column not in _BY_FREQUENCY]
        yield (
            f"{title}: mIoU, and difference to {baseline} on {split}",
            columns,
            [[text[column] for column in columns] for text in texts],
        )
        if any(row["difference"] and "rare" in row["difference"] for row in rows):
            rare = ", ".join(rows[0]["rare"])
            yield (
                f"{title}: difference to {baseline} by frequency; rare are {rare}",
                ["variant", *_BY_FREQUENCY],
                [[text[column] for column in ("variant", *_BY_FREQUENCY)] for text in texts],
            )


def _caption(results: dict[str, Any]) -> str:
    text = "points; best weights by val mIoU; n seeds, ± one standard deviation; intervals over shared seeds and images"
    if results["teacher"]:
        text += "; teacher " + ", ".join(f"{name} {_points(value)}" for name, value in results["teacher"].items())
    return text


def _print(results: dict[str, Any], console: Console) -> None:
    for title, columns, rows in _tables(results):
        table = Table(title=escape(title), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left")
        for column in columns:
            table.add_column(column, justify="left" if column == "variant" else "right", overflow="fold")
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(table)
    console.print(_caption(results), markup=False)


def _markdown(results: dict[str, Any]) -> str:
    parts = []
    for title, columns, rows in _tables(results):
        lines = [columns, ["---"] * len(columns), *rows]
        parts.append("\n".join([f"**{title}**", "", *(f"| {' | '.join(line)} |" for line in lines)]))
    return "\n\n".join([*parts, _caption(results)]) + "\n"


def _csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    lines = []
    for row in rows:
        line = {
            key: row[key] for key in ("variant", "round", "steps", "seconds", "seconds_per_step", "peak_memory_gib")
        }
        line |= {"seeds": len(row["seeds"]), "difference_seeds": len(row["difference_seeds"])}
        for split, scores in row["miou"].items():
            known = [value for value in scores.values() if value is not None]
            line[f"{split}_miou"] = statistics.mean(known) if known else None
            line[f"{split}_miou_sd"] = statistics.stdev(known) if len(known) > 1 else None
        for part in ("all", "rare", "common"):
            found = (row["difference"] or {}).get(part) or {}
            line |= {
                f"difference_{part}{suffix}": found.get(key)
                for suffix, key in (("", "mean"), ("_low", "low"), ("_high", "high"))
            }
        line |= {f"iou_{name}": value for name, value in row["iou"].items()}
        lines.append(line)
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n", extrasaction="ignore", restval="")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _figure(rows: list[dict[str, Any]], path: Path) -> None:
    """Score against seconds: equal steps filled, equal seconds hollow; bars are one standard deviation over seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    names = list(dict.fromkeys(row["variant"] for row in rows))
    split = list(rows[0]["miou"])[-1]
    markers = "osD^v<>pPX*h"
    own_steps = {row["variant"]: row["steps"] for row in rows if row["round"] == "steps"}
    for row in rows:
        if row["round"] == "seconds" and row["steps"] == own_steps.get(row["variant"]):
            continue  # the same runs
        scores = [100 * value for value in row["miou"][split].values() if value is not None]
        if not scores:
            continue
        place = names.index(row["variant"])
        axes.errorbar(
            row["seconds"] / 60,
            statistics.mean(scores),
            yerr=statistics.stdev(scores) if len(scores) > 1 else None,
            marker=markers[place % len(markers)],
            color=f"C{place % 10}",
            markerfacecolor=None if row["round"] == "steps" else "white",
            linestyle="none",
            capsize=3,
            label=row["variant"] + ("" if row["round"] == "steps" else ", equal seconds"),
        )
    axes.set_xlabel("minutes of training")
    axes.set_ylabel(f"{split} mIoU, points")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    partial = path.with_suffix(".partial.png")
    try:
        figure.savefig(partial, dpi=120)
        partial.replace(path)
    except OSError as error:
        raise GSKDError(f"{path}: cannot be written: {error.strerror or error}") from None
