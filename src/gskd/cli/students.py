"""Commands about finished runs: scores, pictures, and what to do with a student."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from gskd.cli.options import AllowImports, Overrides, RunFolder, console
from gskd.errors import GSKDError, count
from gskd.prediction import PICTURES, Kind, find_images, predict_images
from gskd.progress import Progress
from gskd.schema import Recipe


def evaluate_run(
    run: RunFolder,
    overrides: Overrides = None,
    split: Annotated[str, typer.Option(help="The split to score.")] = "val",
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the score to this new file.")] = None,
    allow_imports: AllowImports = False,
) -> None:
    """Score a run's best weights: dataset mIoU, per-class IoU, pixel accuracy.

    Sliding windows, flips and scales by overrides, for example eval.flip=true eval.scales=[0.75,1,1.25].
    """
    import json

    from gskd.assembly import open_split
    from gskd.checkpoint import require_new_file, write_text
    from gskd.evaluation import evaluate
    from gskd.run import Run, device_of, inference_of

    folder = Run(run)
    recipe = folder.load_recipe(tuple(overrides or ()))
    if json_file is not None:
        require_new_file(json_file, "--json")
    data = open_split(recipe, split)
    folder.check_classes(data)
    model = folder.load_model(recipe).to(device_of(recipe))
    with Progress(console) as progress:
        _say_if_slow(recipe, progress)
        score = evaluate(model, data, inference_of(recipe), progress.counter(f"scoring {split}"))
    if json_file is not None:
        write_text(json_file, json.dumps(score.to_dict(data.classes), indent=1))
    console.print(_score_table(f"{run} on {split}, {len(data)} images", score.to_dict(data.classes)))


def predict_run(
    run: RunFolder,
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGES...", help="Images, videos, folders of them, or patterns.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="A new folder for the label maps.")],
    write: Annotated[
        list[Kind] | None, typer.Option(help="What to write; repeat it for more. All but probability by default.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change the run's recipe, e.g. eval.flip=true."),
    ] = None,
    allow_imports: AllowImports = False,
) -> None:
    """Segment images and frames of videos: index and colour PNGs, overlays, probabilities, each of its image's size.

    Large images: --set eval.mode=slide, in overlapping windows. What cannot be read is left out and named at the end,
    with exit code 2.
    """
    from gskd.run import Run

    kinds = tuple(dict.fromkeys(write or PICTURES))
    found = find_images(images)
    recipe = Run(run).load_recipe(tuple(overrides or ()))
    with Progress(console) as progress:
        _say_if_slow(recipe, progress)
        counter = progress.counter("predicting")
        predicted, unreadable = predict_images(Run(run), found, output, recipe, counter, kinds)
    folders = ", ".join(str(output / kind.value) for kind in kinds)
    console.print(f"{count(predicted, 'image')}: {folders}", markup=False, soft_wrap=True)
    if unreadable:
        raise GSKDError(f"predict: {len(unreadable)} of {count(len(found), 'file')} left out: " + "; ".join(unreadable))


def report(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...",
            help="Finished run folders, or the one folder of a comparison; and KEY=VALUE of their recipes, for example"
            " data.root=data/camvid.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="A new file.")] = Path("report.html"),
    images: Annotated[int, typer.Option(min=1, max=50, help="Pictures of the val split.")] = 6,
    explored: Annotated[int, typer.Option(min=0, max=20, help="Of these, how many with similarity maps.")] = 3,
    allow_imports: AllowImports = False,
) -> None:
    """Write one HTML page about runs: scores, costs, curves, pictures, and the structure that teacher and students see.

    It needs no network and no other file. Beside runs of gskd distill name one of gskd train: differences are to it.
    """
    from gskd.checkpoint import require_new_file
    from gskd.report import gather, write_page

    require_new_file(output)
    overrides = [run for run in runs if "=" in run and not Path(run).exists()]
    folders = [Path(run) for run in runs if run not in overrides]
    if not folders:
        raise GSKDError("report: names no run folder")
    with Progress(console) as progress:
        found = gather(folders, overrides, images, explored, progress.say)
        write_page(found, output)
    console.print(f"{output}: {output.stat().st_size / 2**20:.1f} MiB", markup=False, soft_wrap=True)


def bench(
    run: RunFolder,
    output: Annotated[Path, typer.Option("--output", "-o", help="A new folder for the files.")],
    overrides: Overrides = None,
    images: Annotated[int, typer.Option(min=1, help="Images of the val split to score.")] = 100,
    threads: Annotated[list[int] | None, typer.Option(min=1, help="CPU threads; may be given several times.")] = None,
    allow_imports: AllowImports = False,
) -> None:
    """Measure and score a run's student in the forms that can ship: PyTorch, ONNX, ONNX of 8-bit integers.

    Latency and memory are of one image on the CPU, in a process of its own for each.
    """
    from gskd.bench import bench_run, write_rows
    from gskd.run import Run

    folder = Run(run)
    recipe = folder.load_recipe(tuple(overrides or ()))
    with Progress(console) as progress:
        rows = bench_run(folder, output, recipe, images, threads or [1], on_progress=progress.say)
    write_rows(rows, output)
    table = Table(title=f"{run}: one image on the CPU")
    for column in ("form", "threads", "median ms", "p95 ms", "memory MiB", "file MiB", "mIoU", "same %"):
        table.add_column(column, justify="left" if column == "form" else "right", no_wrap=True)
    for row in rows:
        numbers = (1e3 * row.latency.median, 1e3 * row.latency.p95, row.memory, row.size, 100 * row.miou)
        cells = (f"{number:.1f}" if number == number else "-" for number in numbers)
        table.add_row(row.name, str(row.threads), *cells, f"{100 * row.agreement:.2f}")
    console.print(table)
    console.print(f"{output}: student.onnx, student-int8.onnx, bench.json", markup=False, soft_wrap=True)


def export(
    run: RunFolder,
    output: Annotated[Path, typer.Option("--output", "-o", help="A new file, .onnx or .pt2 (torch.export).")],
    size: Annotated[
        tuple[int, int] | None,
        typer.Option(help="Height and width to trace with; the crop of training by default."),
    ] = None,
    fixed: Annotated[bool, typer.Option("--fixed", help="Fix height and width.")] = False,
    allow_imports: AllowImports = False,
) -> None:
    """Write a run's best student alone, for other programs: pixels in, logits of the image's size out.

    Normalisation, padding and enlarging are inside; ONNX metadata hold the classes. It is compared with the original
    on other batches and sizes than it was traced with, and refused where the two do not agree.
    """
    from gskd.export import export_run
    from gskd.run import Run

    made = export_run(Run(run), output, size, fixed)
    for check in made.checks:
        shape = " x ".join(map(str, check.shape))
        console.print(
            f"{shape}: {100 * check.agreement:.3f} % of pixels agree, logits off by at most {check.error:.1e}"
        )
    sizes = "any height and width" if made.fixed is None else f"height {made.fixed[0]}, width {made.fixed[1]} only"
    console.print(
        f"{output}: {output.stat().st_size / 2**20:.1f} MiB, any batch, {sizes}", markup=False, soft_wrap=True
    )
    if made.note:
        console.print(f"the size is fixed, since the network {made.note}", markup=False, soft_wrap=True)


def share(
    run: RunFolder,
    output: Annotated[Path, typer.Option("--output", "-o", help="A new folder.")],
    licence: Annotated[str | None, typer.Option("--license", help="For the model card, e.g. apache-2.0.")] = None,
    push: Annotated[
        str | None, typer.Option(metavar="ORGANISATION/NAME", help="Also upload it to the Hugging Face hub.")
    ] = None,
    allow_imports: AllowImports = False,
) -> None:
    """Write a run's best student as a folder for from_pretrained: weights, configuration, model card."""
    from gskd.run import Run
    from gskd.sharing import share_run

    share_run(Run(run), output, licence, push)
    console.print(f"{output}: model.safetensors, config.json, README.md", markup=False, soft_wrap=True)


def _score_table(title: str, score: dict[str, Any]) -> Table:
    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.2f}"

    table = Table(title=escape(title))
    table.add_column("")
    table.add_column("%", justify="right")
    table.add_row("mIoU", percent(score["miou"]), style="bold")
    table.add_row("pixel accuracy", percent(score["pixel_accuracy"]))
    table.add_section()
    for name, value in score["iou"].items():
        table.add_row(f"IoU {escape(name)}", percent(value))
    return table


def _say_if_slow(recipe: Recipe, progress: Progress) -> None:
    from gskd.run import device_of
    from gskd.speed import slow_precision

    # A student that was trained in half precision on a GPU is scored in it, unless the recipe says otherwise.
    if line := slow_precision(device_of(recipe), {"eval.precision": recipe.eval.precision or recipe.train.precision}):
        progress.say(line)
