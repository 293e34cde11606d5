"""The command line: one verb per job. A mistake of the user ends in one line and exit code 2."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gskd.errors import GSKDError, count
from gskd.stops import EXIT_STOPPED, Stopped

app = typer.Typer(
    name="gskd",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
console = Console(highlight=False)

data_app = typer.Typer(help="Look at a dataset before training on it.", no_args_is_help=True)
app.add_typer(data_app, name="data")
cache_app = typer.Typer(
    help="Teacher results on disk: run the teacher once, train many students.", no_args_is_help=True
)
app.add_typer(cache_app, name="cache")

RecipeName = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="A YAML file, or the name of a shipped recipe: scenes, scenes_teacher, camvid_teacher, camvid_student,"
        " camvid_gskd, cityscapes_r101_r18.",
    ),
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder made by train or distill.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...", help="Change fields of the recipe, for example train.steps=500 output=runs/a."
    ),
]
AllowImports = Annotated[
    bool,
    typer.Option(
        "--allow-imports",
        callback=lambda context, allowed: context.with_resource(_imports_allowed()) if allowed else None,
        help="Run the Python code that a recipe's model.name may name; only for recipes and runs that you trust.",
    ),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Continue the run in the output folder; start it if there is none.")
]
AcceptChanges = Annotated[
    bool,
    typer.Option(
        "--accept-changes",
        help="With --resume: go on though the recipe, the teacher or the training samples have changed since.",
    ),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        console.print(f"gskd {version('gskd')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Distil small semantic-segmentation networks that keep the global structure a large teacher sees."""


@app.command()
def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    resume: Resume = False,
    accept_changes: AcceptChanges = False,
    allow_imports: AllowImports = False,
) -> None:
    """Train the recipe's model on labels alone: a teacher, or the plain student as a baseline.

    Teacher and terms of the recipe are left out, so the same recipe gives the baseline of its distillation.
    """
    _train(recipe, overrides, distill=False, resume=resume, accept_changes=accept_changes)


@app.command()
def distill(
    recipe: RecipeName,
    overrides: Overrides = None,
    resume: Resume = False,
    accept_changes: AcceptChanges = False,
    allow_imports: AllowImports = False,
) -> None:
    """Train the recipe's model against its teacher, with the recipe's terms beside the labels.

    The teacher's own score is measured and printed first.
    """
    _train(recipe, overrides, distill=True, resume=resume, accept_changes=accept_changes)


def _train(recipe_name: str, overrides: list[str] | None, *, distill: bool, resume: bool, accept_changes: bool) -> None:
    from gskd.recipe import load_recipe

    recipe = load_recipe(recipe_name, overrides or [])  # before the slow imports: a typing mistake shows at once

    from gskd.pipeline import train_model
    from gskd.run import Run

    run = Run(Path(recipe.output).expanduser())
    train_model(recipe, run, distill=distill, resume=resume, accept_changes=accept_changes)


@app.command("eval")
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
    from gskd.checkpoint import write_text
    from gskd.evaluation import evaluate
    from gskd.progress import Progress
    from gskd.run import Run, device_of, inference_of

    folder = Run(run)
    recipe = folder.load_recipe(tuple(overrides or ()))
    if json_file is not None and json_file.exists():
        raise GSKDError(f"--json {json_file}: exists already; expected a new file")
    if json_file is not None and not json_file.parent.is_dir():
        raise GSKDError(f"--json {json_file}: {json_file.parent} is no folder; expected one that exists")
    data = open_split(recipe, split)
    folder.check_classes(data)
    model = folder.load_model(recipe).to(device_of(recipe))
    with Progress(console) as progress:
        score = evaluate(model, data, inference_of(recipe), progress.counter(f"scoring {split}"))
    if json_file is not None:
        write_text(json_file, json.dumps(score.to_dict(data.classes), indent=1))
    console.print(_score_table(f"{run} on {split}, {len(data)} images", score.to_dict(data.classes)))


@app.command("predict")
def predict_run(
    run: RunFolder,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGES...", help="Image files or folders of images.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A new folder for the label maps.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change the run's recipe, e.g. eval.flip=true."),
    ] = None,
    allow_imports: AllowImports = False,
) -> None:
    """Segment images: index PNGs, colour PNGs and overlays, each of its image's size.

    Images that cannot be read are left out and named at the end, with exit code 2.
    """
    from gskd.prediction import find_images, predict_images
    from gskd.progress import Progress
    from gskd.run import Run

    found = find_images(images)
    recipe = Run(run).load_recipe(tuple(overrides or ()))
    with Progress(console) as progress:
        unreadable = predict_images(Run(run), found, output, recipe, progress.counter("predicting"))
    folders = ", ".join(str(output / kind) for kind in ("index", "colour", "overlay"))
    console.print(f"{len(found) - len(unreadable)} images: {folders}", markup=False, soft_wrap=True)
    if unreadable:
        raise GSKDError(f"predict: {len(unreadable)} of {len(found)} images left out: " + "; ".join(unreadable[:3]))


@app.command()
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
    from gskd.progress import Progress
    from gskd.run import Run

    folder = Run(run)
    recipe = folder.load_recipe(tuple(overrides or ()))
    with Progress(console) as progress:
        rows = bench_run(folder, output, recipe, images, threads or [1], on_progress=progress.say)
    write_rows(rows, output)
    table = Table(title=f"{run}: one image on the CPU")
    for column in ("form", "threads", "median ms", "p95 ms", "memory MiB", "file MiB", "mIoU", "same class"):
        table.add_column(column, justify="left" if column == "form" else "right")
    for row in rows:
        numbers = (1e3 * row.latency.median, 1e3 * row.latency.p95, row.memory, row.size, 100 * row.miou)
        cells = (f"{number:.1f}" if number == number else "-" for number in numbers)
        table.add_row(row.name, str(row.threads), *cells, f"{100 * row.agreement:.2f} %")
    console.print(table)
    console.print(f"{output}: student.onnx, student-int8.onnx, bench.json", markup=False, soft_wrap=True)


@app.command()
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


@app.command()
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
    from gskd.progress import Progress
    from gskd.report import gather, write_page

    if output.exists():
        raise GSKDError(f"output {output}: exists already; expected a new file")
    if not output.parent.is_dir():
        raise GSKDError(f"output {output}: {output.parent} is no folder; expected one that exists")
    overrides = [run for run in runs if "=" in run and not Path(run).exists()]
    folders = [Path(run) for run in runs if run not in overrides]
    if not folders:
        raise GSKDError("report: names no run folder")
    with Progress(console) as progress:
        found = gather(folders, overrides, images, explored, progress.say)
        write_page(found, output)
    console.print(f"{output}: {output.stat().st_size / 2**20:.1f} MiB", markup=False, soft_wrap=True)


@app.command()
def compare(
    comparison: Annotated[
        str,
        typer.Argument(
            metavar="COMPARISON",
            help="A YAML file, or a shipped one: compare_scenes, compare_camvid, compare_camvid_kd,"
            " compare_camvid_gskd.",
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Change the comparison, for example seeds=[0] recipe.data.root=data/camvid recipe.train.steps=500.",
        ),
    ] = None,
    table_only: Annotated[bool, typer.Option("--table", help="Train nothing; table of what is finished.")] = False,
    allow_imports: AllowImports = False,
) -> None:
    """Train variants of a student on paired seeds and say which differences are real.

    A run that is finished is never done again and an interrupted one continues: call it again with the same
    comparison. Variants and seeds can be added later. The table is at equal steps and at equal seconds, with
    differences to the baseline and their 95 % intervals; it is also written as JSON, CSV and figure.
    """
    from gskd.comparison import load_comparison, run_grid, write_tables
    from gskd.progress import Progress

    loaded = load_comparison(comparison, overrides or [])

    failure = None
    if not table_only:
        try:
            run_grid(loaded, Progress(console))
        except GSKDError as error:
            failure = error  # what is finished still makes a table
    if failure is None or any(loaded.output.glob("runs/*/*/result.json")):
        write_tables(loaded, console)
    if failure is not None:
        raise failure


@data_app.command("check")
def check_data(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Read every sample of a recipe's splits: sizes, unreadable files, labels out of range, class shares.

    Exits 2 if there is a problem, after naming all of them.
    """
    from gskd.assembly import open_split
    from gskd.data.check import check_dataset
    from gskd.progress import Progress
    from gskd.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    loaded.data.cache_gib = 0
    reports = {}
    for split in dict.fromkeys([loaded.data.train, loaded.data.val, loaded.data.test]):
        if split is not None:
            with Progress(console) as progress:
                reports[split] = check_dataset(open_split(loaded, split), progress.counter(f"reading {split}"))
    table = Table(title="share of all pixels, and images that hold the class")
    table.add_column("class")
    for split, report in reports.items():
        table.add_column(f"{escape(split)}: {report.samples} images", justify="right")
    for i, row in enumerate(next(iter(reports.values())).classes):
        cells = [report.classes[i] for report in reports.values()]
        table.add_row(escape(row.name), *(f"{100 * cell.share:.2f} %  in {cell.images}" for cell in cells))
    table.add_row("(ignored)", *(f"{100 * report.void_share:.2f} %" for report in reports.values()))
    console.print(table)
    for split, report in reports.items():
        sizes = ", ".join(f"{count} of {height} x {width}" for (height, width), count in report.sizes.items())
        console.print(f"{split}: {sizes}", markup=False, soft_wrap=True)
        for line in [*report.notes, *report.problems]:
            console.print(f"{split}: {line}", markup=False, soft_wrap=True)
    problems = sum(len(report.problems) for report in reports.values())
    if problems:
        raise GSKDError(
            f"data: {count(problems, 'problem')} in {sum(r.samples for r in reports.values())} samples, listed above"
        )


@cache_app.command("build")
def cache_build(recipe: RecipeName, overrides: Overrides = None, allow_imports: AllowImports = False) -> None:
    """Run the teacher on all fixed views of a recipe that names teacher.cache and augment.views.

    gskd distill does the same where something is missing. What is there and whole is not made again.
    """
    from gskd.pipeline import build_cache
    from gskd.progress import Progress
    from gskd.recipe import load_recipe

    cache = build_cache(load_recipe(recipe, overrides or []), Progress(console))
    console.print(f"{cache.root}: whole, {cache.size() / 2**30:.2f} GiB", markup=False, soft_wrap=True)


@cache_app.command("verify")
def cache_verify(recipe: RecipeName, overrides: Overrides = None, allow_imports: AllowImports = False) -> None:
    """Recompute a sample of a recipe's cache with its teacher and show how far the stored values are off.

    Exits 2 if files are missing or damaged, or a value is off by more than 1 % of the largest beside it. To be run on
    the kind of machine that made the cache: on another, GSKD's points are other draws.
    """
    from gskd.cache import TeacherCache, verify_cache
    from gskd.pipeline import cache_source
    from gskd.recipe import load_recipe

    source = cache_source(load_recipe(recipe, overrides or []))
    cache = TeacherCache(source)
    damaged = cache.tidy()
    for line in damaged:
        console.print(line, markup=False, soft_wrap=True)
    cache.require_whole()
    worst = ("", 0.0)
    for where, deviation in verify_cache(cache, source):
        console.print(f"{where}: {deviation:.2g}", markup=False, soft_wrap=True)
        worst = max(worst, (where, deviation), key=lambda found: found[1])
    if worst[1] > 0.01:
        raise GSKDError(f"cache {cache.root}: {worst[0]} is off by {worst[1]:.2g} of its largest value; delete it")


@app.command()
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


@app.command()
def init(
    root: Annotated[Path, typer.Argument(metavar="DATA", help="A folder of images and masks, or a public dataset.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A new folder for teacher.yaml and student.yaml.")],
) -> None:
    """Write commented recipes of a teacher and its student for your data, after a look at it."""
    from gskd.starter import write_recipes

    found, files = write_recipes(root, output)
    for note in found.notes:
        console.print(f"{root}: {note}", markup=False, soft_wrap=True)
    console.print(f"written: {', '.join(map(str, files))}; name the classes there, then", markup=False, soft_wrap=True)
    for command in (f"data check {files[0]}", f"train {files[0]}", f"distill {files[1]}"):
        console.print(f"  gskd {command}", markup=False, soft_wrap=True)


@app.command()
def taps(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="smp:..., torchvision:..., transformers:..., hf:..., package.module:callable, or a recipe.",
        ),
    ],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Of the model (encoder_name=resnet18) or of the recipe."),
    ] = None,
    size: Annotated[int, typer.Option(help="Height and width of the image that is tried.")] = 256,
    depth: Annotated[int, typer.Option(help="Deepest level of layers that is listed.")] = 2,
    allow_imports: AllowImports = False,
) -> None:
    """List the layers that a term can read: names, channels, sizes, strides, and what "auto" stands for.

    Weights are not loaded: nothing here depends on them. Of a recipe, its student and a teacher that it names by model.
    """
    from gskd.assembly import named_models
    from gskd.layers import describe_layers

    for title, network in named_models(model, arguments or []):
        table = Table(title=escape(f"{title}: {type(network).__name__}, image of {size} x {size}"))
        for column in ("layer", "channels", "height x width", "stride", "auto"):
            table.add_column(column, justify="left" if column in ("layer", "auto") else "right", no_wrap=True)
        for row in describe_layers(network, size, depth):
            table.add_row(*map(escape, row))
        console.print(table)


@app.command()
def convert(
    weights: Annotated[Path, typer.Argument(metavar="WEIGHTS", help="A .pt, .pth or .bin file of torch.save.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="A new .safetensors file.")],
    key: Annotated[
        str | None, typer.Option(help="Where in the file the weights are, for example state_dict or ema.model.")
    ] = None,
    strip: Annotated[str, typer.Option(help="Text to take off every key; keys without it are left out.")] = "",
) -> None:
    """Make safetensors of weights that torch.save wrote, for a recipe's model.weights.

    Such files can carry code. They are read without running any, and refused where that is not possible.
    """
    from gskd.conversion import convert_weights

    tensors = convert_weights(weights, output, key, strip)
    console.print(f"{output}: {count(tensors, 'tensor')}", markup=False, soft_wrap=True)


@app.command()
def demo(
    overrides: Overrides = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for runs and picture.")] = Path("runs/demo"),
) -> None:
    """Run the main job on built-in street scenes: teacher, plain student, GSKD student, table and picture.

    A few minutes on two CPU cores. What is finished in the output folder is not done again.
    """
    from gskd.demo import run_demo

    run_demo(output, console, tuple(overrides or ()))


@contextlib.contextmanager
def _imports_allowed() -> Iterator[None]:
    """While a command runs, also for the processes that it starts."""
    from gskd.architectures import IMPORTS_ALLOWED

    before = os.environ.get(IMPORTS_ALLOWED)
    os.environ[IMPORTS_ALLOWED] = "1"
    # A recipe may name a module beside it; python -m finds those, an installed script would not. Last, so that no
    # file in the folder hides an installed package.
    sys.path.append(os.getcwd())
    try:
        yield
    finally:
        del os.environ[IMPORTS_ALLOWED]
        if before is not None:
            os.environ[IMPORTS_ALLOWED] = before


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


def main(arguments: list[str] | None = None) -> Any:
    """Entry point of the ``gskd`` command."""
    try:
        app(args=arguments, standalone_mode=True)
    except GSKDError as error:
        sys.stderr.write(f"gskd: {' '.join(str(error).split())}\n")
        sys.exit(2)
    except Stopped as stopped:
        where = f" at {stopped}" if str(stopped) else " while scoring"
        sys.stderr.write(f"gskd: stopped{where}, saved; the same command goes on, train and distill with --resume\n")
        sys.exit(EXIT_STOPPED)
    except SystemExit as error:
        if error.code == 130:  # what typer makes of Ctrl-C
            sys.stderr.write("gskd: stopped; train and distill go on with --resume, compare and cache by themselves\n")
        raise


if __name__ == "__main__":
    main()
