"""The report as one HTML file that needs nothing else: no network, no other file (content -> page)."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from PIL import Image
from torch import Tensor

from gskd.checkpoint import require_new_file, write_text
from gskd.report.content import BEFORE, TEACHER, Content

_POINTS_OF_A_CURVE = 300
_LINES = ("-", "--", "-.", ":")  # so that curves can be told apart without colour


def write_page(content: Content, output: Path) -> None:
    """Writes the report.

    Args:
        content: from `gskd.report.gather`.
        output: a new file.

    Raises:
        GSKDError: the file is there already, or cannot be written.
    """
    require_new_file(output)
    here = files("gskd.report")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False}  # networks stay in their order
    environment.filters |= {"share": _share, "points": _points, "count": _count, "seconds": _seconds}
    page = environment.from_string((here / "page.html").read_text(encoding="utf-8")).render(
        content=content,
        version=version("gskd"),
        style=Markup((here / "page.css").read_text(encoding="utf-8")),
        script=Markup((here / "page.js").read_text(encoding="utf-8")),
        data=_data(content),
        curves=[(title, Markup(svg)) for title, svg in _curves(content)],
        baseline=_baseline(content),
    )
    write_text(output, page)


def _baseline(content: Content) -> str | None:
    """Whose score the others are compared with: the run without terms, of the size of one that has some."""
    runs = [row for row in content.rows if row["name"] in content.curves]
    terms = {
        row["name"]: set(next((line["terms"] for line in content.curves[row["name"]] if "terms" in line), ()))
        for row in runs
    }
    distilled = {row["parameters"] for row in runs if terms[row["name"]] - {"task"}}
    plain = [row for row in runs if terms[row["name"]] == {"task"}]
    same = [row for row in plain if row["parameters"] in distilled] or ([] if distilled else plain)
    return str(same[0]["name"]) if same and len(runs) > 1 else None


def _data(content: Content) -> dict[str, Any]:
    """What the page's script draws."""
    return {
        "classes": content.classes,
        "palette": content.palette,
        "teacher": TEACHER,
        "before": BEFORE,
        "networks": [row["name"] for row in content.rows],
        "colours": (np.array(mpl.colormaps["cividis"].colors) * 255).round().astype(int).tolist(),  # type: ignore[attr-defined]
        "pictures": [
            {
                "name": picture.name,
                "image": _uri(picture.image, "JPEG"),
                "labels": {name: _uri(label, "PNG") for name, label in picture.labels.items()},
            }
            for picture in content.pictures
        ],
        "structures": [
            {
                "picture": one.picture,
                "places": [[round(x, 5), round(y, 5)] for x, y in one.points.places().tolist()],
                "label": one.points.label.tolist(),
                "similarity": {name: _uri(_bytes(values), "PNG") for name, values in one.similarity.items()},
                "everywhere": {
                    name: _uri(_bytes(values).reshape(-1, values.shape[2]), "PNG")
                    for name, values in one.everywhere.items()
                },
                "tile": list(next(iter(one.everywhere.values())).shape[1:]) if one.everywhere else [0, 0],
            }
            for one in content.structures
            if len(one.points.index)
        ],
    }


def _bytes(cosines: Tensor) -> np.ndarray:
    """-1..1 as 0..254, so that 0 is a number of its own."""
    scaled: np.ndarray = ((cosines.clamp(-1, 1) + 1) * 127).round().byte().numpy()
    return scaled


def _uri(pixels: np.ndarray, kind: str) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **({"quality": 85} if kind == "JPEG" else {"optimize": True}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def _curves(content: Content) -> list[tuple[str, str]]:
    """Titles and SVG: mIoU of all runs, then each run's terms as they enter its loss."""
    figures = []
    scored = {
        name: [(line["step"], 100 * line["miou"]) for line in lines if "split" in line and line.get("miou") is not None]
        for name, lines in content.curves.items()
    }
    if any(len(points) > 1 for points in scored.values()):
        figures.append((f"mIoU on {content.split} while training", _svg("miou", scored, "mIoU (points)", log=False)))
    for name, lines in content.curves.items():
        terms: dict[str, list[tuple[float, float]]] = {}
        for line in lines:
            for term, value in line.get("terms", {}).items():
                terms.setdefault(term, []).append((line["step"], value["weighted"]))
        if terms:
            figures.append((f"terms of the loss of {name}, weighted", _svg(name, terms, "in the loss", log=True)))
    return figures


def _svg(salt: str, curves: dict[str, list[tuple[float, float]]], axis: str, log: bool) -> str:
    from matplotlib.figure import Figure

    # Text stays text, so that it can be read out; the salt tells the names inside one picture from those of another.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt, "font.family": "sans-serif"}):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.subplots()
        for number, (name, points) in enumerate(curves.items()):
            if not points:
                continue
            xs, ys = _smoothed(points)
            label = " " + name.replace("$", r"\$")  # else it is read as mathematics, or left out for its first letter
            marker = "o" if len(xs) == 1 else None
            axes.plot(
                xs, ys, _LINES[number % len(_LINES)], label=label, color=f"C{number}", linewidth=1.5, marker=marker
            )
        if log and all(y > 0 for points in curves.values() for _, y in points):
            axes.set_yscale("log")
        axes.set_xlabel("step")
        axes.set_ylabel(axis)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def _smoothed(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Means of neighbours where there are more than a picture shows."""
    found = np.array(points, dtype=np.float64)
    parts = np.array_split(found, min(len(found), _POINTS_OF_A_CURVE))
    means = np.array([part.mean(axis=0) for part in parts])
    return means[:, 0].tolist(), means[:, 1].tolist()


def _points(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def _share(share: float) -> str:
    return f"{100 * share:.1f} %" if share >= 0.01 else f"{100 * share:.2f} %"


def _count(number: float) -> str:
    """1234567 -> 1.23 M."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.2f} {name}"
    return f"{number:.0f}"


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds / 60:.1f} min" if seconds >= 120 else f"{seconds:.0f} s"
