"""The main job on the built-in scenes, start to finish: teacher, plain and distilled student, table and picture."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from gskd.assembly import open_split
from gskd.data import SegmentationDataset
from gskd.errors import GSKDError, few
from gskd.evaluation import predict
from gskd.models import count_parameters
from gskd.pictures import colourise, side_by_side
from gskd.pipeline import train_model
from gskd.progress import Progress
from gskd.recipe import Recipe, load_recipe
from gskd.report import gather, write_page
from gskd.run import Run, inference_of
from gskd.speed import latency

TITLES = {"teacher": "teacher", "plain": "plain student", "gskd": "GSKD student"}


def run_demo(output: Path, console: Console, overrides: tuple[str, ...] = ()) -> dict[str, Any]:
    """Trains the three models of the built-in demonstration and compares them.

    Args:
        output: folder for the three run folders, ``demo.png`` and ``report.html``. Runs that are finished there are not
            done again.
        console: where the progress and the table go.
        overrides: ``key=value`` changes of all three recipes, for example ``train.steps=20``.

    Raises:
        GSKDError: the folder holds anything else; or whatever training refuses.

    Returns:
        The results of the three runs by ``"teacher"``, ``"plain"`` and ``"gskd"``.
    """
    picture, page = output / "demo.png", output / "report.html"
    own = {*TITLES, picture.name, page.name}
    if output.is_dir() and (other := sorted(file.name for file in output.iterdir() if file.name not in own)):
        raise GSKDError(f"output {output}: holds {few(other)}; expected a new folder, or one of a demo")
    runs = {kind: Run(output / kind) for kind in TITLES}
    recipes = {
        "teacher": load_recipe("scenes_teacher", [f"output={runs['teacher'].path}", *overrides]),
        "plain": load_recipe("scenes", [f"output={runs['plain'].path}", *overrides]),
        "gskd": load_recipe(
            "scenes", [f"output={runs['gskd'].path}", f"teacher.run={runs['teacher'].path}", *overrides]
        ),
    }
    results = {}
    for kind, recipe in recipes.items():
        console.rule(TITLES[kind])
        results[kind] = train_model(recipe, runs[kind], distill=kind == "gskd", resume=True, progress=Progress(console))
    models = {kind: runs[kind].load_model(recipes[kind]) for kind in TITLES}
    val = open_split(recipes["plain"], recipes["plain"].data.val)
    image = torch.from_numpy(val[0].image).permute(2, 0, 1)
    milliseconds = {}
    for kind in TITLES:  # of one image, from uint8 pixels to logits
        inference = inference_of(recipes[kind])
        milliseconds[kind] = 1000 * latency(partial(predict, models[kind], inference=inference), image).median
    console.print(_table(results, models, milliseconds, val.classes))
    try:
        _picture(models, recipes, val).save(picture)
    except OSError as error:
        raise GSKDError(f"{picture}: cannot be written: {error.strerror or error}") from None
    console.print(f"picture: {picture}", markup=False, soft_wrap=True)
    content = gather([runs["plain"].path, runs["gskd"].path], overrides)
    page.unlink(missing_ok=True)
    write_page(content, page)
    console.print(f"to look into it, open in a browser: {page}", markup=False, soft_wrap=True)
    return results


def _table(
    results: dict[str, Any], models: dict[str, nn.Module], milliseconds: dict[str, float], classes: tuple[str, ...]
) -> Table:
    table = Table(title="best weights on the val scenes; one seed, so differences of a point or two say nothing")
    table.add_column("")
    for title in TITLES.values():
        table.add_column(title, justify="right")

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f}"

    scores = {kind: results[kind]["best"]["val"] for kind in TITLES}
    table.add_row("mIoU", *(percent(scores[kind]["miou"]) for kind in TITLES), style="bold")
    for name in classes:
        table.add_row(name, *(percent(scores[kind]["iou"][name]) for kind in TITLES))
    table.add_section()
    table.add_row("M parameters", *(f"{count_parameters(models[kind]) / 1e6:.2f}" for kind in TITLES))
    table.add_row("ms per image", *(f"{milliseconds[kind]:.1f}" for kind in TITLES))
    table.add_row("s of training", *(f"{results[kind]['seconds']:.0f}" for kind in TITLES))
    return table


def _picture(
    models: dict[str, nn.Module], recipes: dict[str, Recipe], data: SegmentationDataset, count: int = 5
) -> Any:
    rows = []
    for index in range(min(count, len(data))):
        sample = data[index]
        image = torch.from_numpy(sample.image).permute(2, 0, 1)
        row = [sample.image, colourise(sample.label, data.palette)]
        for kind, model in models.items():
            label = predict(model, image, inference_of(recipes[kind])).argmax(0).to(torch.uint8).numpy()
            row.append(colourise(label, data.palette))
        rows.append(row)
    return side_by_side(rows, ["image", "truth", *TITLES.values()])
