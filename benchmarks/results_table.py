"""The tables of the documentation, from the results.json files of ``gskd compare`` that are kept beside this script.

    python benchmarks/results_table.py benchmarks/results/camvid.json

Each file is one sitting: a teacher of its own and some seeds, all variants of a seed against the same teacher. Rows
give every seed and the mean; differences to the baseline are paired within a sitting. Runs at equal seconds, where
there are any, follow in a table of their own.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from pathlib import Path
from typing import Any

from gskd.losses import LOSSES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="results.json of each sitting")
    sittings = [json.loads(file.read_text()) for file in parser.parse_args().files]
    split, baseline = sittings[0]["compared_on"], sittings[0]["baseline"]
    splits = list(sittings[0]["rows"][0]["miou"])
    print_scores(sittings, splits, [f"difference to {baseline} on {split}", "on the rare classes"])
    if any(row["round"] == "seconds" for sitting in sittings for row in sitting["rows"]):
        print_scores_at_equal_seconds(sittings, splits, f"difference to {baseline} on {split}")


def print_scores(sittings: list[dict[str, Any]], splits: list[str], differences: list[str]) -> None:
    print_line(["", "seeds", *(f"{name} mIoU" for name in splits), *differences])
    print("|" + "---|" * (2 + len(splits) + len(differences)))
    teachers = [sitting["teacher"] for sitting in sittings]
    cells = [listed([teacher[name] for teacher in teachers]) if name in teachers[0] else "-" for name in splits]
    print_line(["teacher", str(len(teachers)), *cells, *[""] * len(differences)])
    for name, rows in rows_by_name(sittings, "steps").items():
        cells = [listed([score for row in rows for score in row["miou"][each].values()]) for each in splits]
        seeds = sum(len(row["seeds"]) for row in rows)
        found = ["; ".join(filter(None, (difference(row, part) for row in rows))) for part in ("all", "rare")]
        print_line([titled(name), str(seeds), *cells, *found])


def print_scores_at_equal_seconds(sittings: list[dict[str, Any]], splits: list[str], title: str) -> None:
    print()
    print_line(["at equal seconds", "seeds", "steps", "seconds", *(f"{name} mIoU" for name in splits), title])
    print("|" + "---|" * (5 + len(splits)))
    for name, rows in rows_by_name(sittings, "seconds").items():
        cells = [listed([score for row in rows for score in row["miou"][each].values()]) for each in splits]
        numbers = ["; ".join(f"{row[key]:.0f}" for row in rows) for key in ("steps", "seconds")]
        seeds = sum(len(row["seeds"]) for row in rows)
        print_line([titled(name), str(seeds), *numbers, *cells, "; ".join(difference(row, "all") for row in rows)])


def print_line(cells: list[str]) -> None:
    print("|", " | ".join(cells), "|")


def rows_by_name(sittings: list[dict[str, Any]], round_: str) -> dict[str, list[dict[str, Any]]]:
    rows = [row for sitting in sittings for row in sitting["rows"] if row["round"] == round_]
    return {name: [row for row in rows if row["variant"] == name] for name in dict.fromkeys(r["variant"] for r in rows)}


def titled(name: str) -> str:
    """ "kd + gskd_logits" for "kd_gskd_logits", and "weight 10" for "weight_10"."""
    known = "|".join(sorted(LOSSES, key=len, reverse=True))
    terms = re.findall(known, name) if re.fullmatch(f"({known})(_({known}))*", name) else []
    return " + ".join(terms) or name.replace("_", " ")


def listed(scores: list[float]) -> str:
    """Mean in points, and every value where there are several."""
    mean = f"{100 * statistics.mean(scores):.1f}"
    return mean if len(scores) == 1 else f"{mean} ({', '.join(f'{100 * score:.1f}' for score in scores)})"


def difference(row: dict[str, Any], part: str) -> str:
    """With its interval, for one sitting; empty for the baseline."""
    if not row["difference"] or part not in row["difference"]:
        return ""
    found = row["difference"][part]
    return f"{100 * found['mean']:+.1f} [{100 * found['low']:+.1f}, {100 * found['high']:+.1f}]"


if __name__ == "__main__":
    main()
