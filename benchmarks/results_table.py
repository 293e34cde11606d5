"""The tables of the documentation, from the results.json files of ``gskd compare`` that are kept beside this script.

    python benchmarks/results_table.py benchmarks/results/camvid.json

Each file is one sitting: a teacher of its own and some seeds, all variants of a seed against the same teacher. Rows
give every seed and the mean; differences to the baseline are paired within a sitting.
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
    columns = [
        "",
        "seeds",
        *(f"{name} mIoU" for name in splits),
        f"difference to {baseline} on {split}",
        "on the rare classes",
    ]
    print("|", " | ".join(columns), "|")
    print("|" + "---|" * len(columns))
    teachers = [sitting["teacher"] for sitting in sittings]
    cells = [listed([teacher[name] for teacher in teachers]) if name in teachers[0] else "-" for name in splits]
    print("|", " | ".join(["teacher", str(len(teachers)), *cells, "", ""]), "|")
    names = list(dict.fromkeys(row["variant"] for sitting in sittings for row in sitting["rows"]))
    for name in names:
        rows = [row for s in sittings for row in s["rows"] if row["variant"] == name and row["round"] == "steps"]
        cells = [listed([score for row in rows for score in row["miou"][each].values()]) for each in splits]
        seeds = sum(len(row["seeds"]) for row in rows)
        differences = ["; ".join(filter(None, (difference(row, part) for row in rows))) for part in ("all", "rare")]
        print("|", " | ".join([titled(name), str(seeds), *cells, *differences]), "|")


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
