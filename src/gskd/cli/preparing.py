"""Commands before training: recipes, data, layers, weights, the teacher's cache."""

from __future__ import annotations

import itertools
import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from gskd.cli.options import AllowImports, Overrides, RecipeName, console
from gskd.errors import GSKDError, count, few


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
    teacher, student = (shlex.quote(str(file)) for file in files)
    for command in (f"data check {teacher}", f"train {teacher}", f"distill {student}"):
        console.print(f"  gskd {command}", markup=False, soft_wrap=True)


def check_data(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Read every sample of a recipe's splits: sizes, unreadable files, labels out of range, class shares.

    Exits 2 if there is a problem, after naming all of them.
    """
    from gskd.assembly import open_split
    from gskd.data.check import check_dataset, shared_images
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
    if loaded.data.train == loaded.data.val:
        console.print(
            f"data.train and data.val are both {loaded.data.val}: scores are of what was learned", markup=False
        )
    for (one, first), (other, second) in itertools.combinations(reports.items(), 2):
        if shared := shared_images(first, second):
            line = f"{other}: {count(len(shared), 'image')} also in {one}: {few(shared)}"
            console.print(line, markup=False, soft_wrap=True)
    problems = sum(len(report.problems) for report in reports.values())
    if problems:
        raise GSKDError(
            f"data: {count(problems, 'problem')} in {sum(r.samples for r in reports.values())} samples, listed above"
        )


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
            table.add_column(column, justify="left" if column in ("layer", "auto") else "right", overflow="fold")
        for row in describe_layers(network, size, depth):
            table.add_row(*map(escape, row))
        console.print(table)


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

    made = convert_weights(weights, output, key, strip)
    console.print(f"{output}: {count(made.tensors, 'tensor')}", markup=False, soft_wrap=True)
    if made.left_out:
        line = f"left out: {few(made.left_out)}; --key takes one of them instead"
        console.print(line, markup=False, soft_wrap=True)


def cache_build(recipe: RecipeName, overrides: Overrides = None, allow_imports: AllowImports = False) -> None:
    """Run the teacher on all fixed views of a recipe that names teacher.cache and augment.views.

    gskd distill does the same where something is missing. What is there and whole is not made again.
    """
    from gskd.pipeline import build_cache
    from gskd.progress import Progress
    from gskd.recipe import load_recipe

    cache = build_cache(load_recipe(recipe, overrides or []), Progress(console))
    console.print(f"{cache.root}: whole, {cache.size() / 2**30:.2f} GiB", markup=False, soft_wrap=True)


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
