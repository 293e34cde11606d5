"""The CamVid table of the README: one teacher, then the student plain, with KD, with GSKD and with both, over seeds.

    python benchmarks/camvid.py path/to/camvid

Every cell is one call of the ``gskd`` command, printed before it runs; its output goes to a log beside its run folder.
Runs that are finished are not done again, and one that was interrupted continues, so the script can be stopped at any
time. On a CPU, two students at a time on one thread each get more done than one after the other on two.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

VARIANTS = {
    "plain": ["train", "camvid_gskd"],
    "KD": ["distill", "camvid_gskd", "terms.gskd=null"],
    "GSKD": ["distill", "camvid_gskd", "terms.kd=null"],
    "KD + GSKD": ["distill", "camvid_gskd"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="CamVid: the folder that holds train, trainannot, val, ...")
    parser.add_argument("--output", type=Path, default=Path("runs/camvid"), help="folder for the run folders")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--parallel", type=int, default=2, help="students trained at a time, one CPU thread each")
    parser.add_argument("--table", action="store_true", help="only print the table of what is finished")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes of all recipes")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    shared = [f"data.root={options.root}", *options.overrides]
    teacher = options.output / "teacher"
    if not options.table:
        finish(teacher, ["train", "camvid_teacher", *shared], threads=None)
        shared += [f"teacher.run={teacher}", "train.threads=1"]
        with ThreadPoolExecutor(options.parallel) as pool:
            jobs = []
            for seed in options.seeds:
                for name, arguments in VARIANTS.items():
                    run = folder(options.output, name, seed)
                    jobs.append(pool.submit(finish, run, [*arguments, *shared, f"seed={seed}"], threads=1))
            for job in jobs:
                job.result()
    table(options.output, options.seeds)


def folder(output: Path, name: str, seed: int) -> Path:
    return output / f"{name.lower().replace(' + ', '_')}_{seed}"


def finish(run: Path, arguments: list[str], threads: int | None) -> None:
    """Runs the command until its result is there."""
    if (run / "result.json").is_file():
        return
    command = [sys.executable, "-m", "gskd.cli", *arguments, f"output={run}", "--resume"]
    print("gskd", shlex.join(command[3:]), flush=True)
    environment = dict(os.environ) if threads is None else {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with open(run.with_suffix(".log"), "a") as log:
        subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=True, env=environment)


def table(output: Path, seeds: list[int]) -> None:
    """Prints mean and range over seeds of the best weights, in points, and seconds per step."""
    print("| | seeds | val mIoU | test mIoU | s per step |\n|---|---|---|---|---|")
    rows = {"teacher": [output / "teacher"]}
    rows |= {name: [folder(output, name, seed) for seed in seeds] for name in VARIANTS}
    for name, runs in rows.items():
        done = [run for run in runs if (run / "result.json").is_file()]
        if not done:
            continue
        results = [json.loads((run / "result.json").read_text()) for run in done]
        cells = []
        for split in ("val", "test"):
            scores = [100 * result["best"][split]["miou"] for result in results]
            listed = ", ".join(f"{score:.2f}" for score in scores)
            cells.append(f"{statistics.mean(scores):.2f}" + (f" ({listed})" if len(scores) > 1 else ""))
        pace = statistics.mean(last_pace(run) for run in done)
        print(f"| {name} | {len(done)} | {cells[0]} | {cells[1]} | {pace:.2f} |")


def last_pace(run: Path) -> float:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return next(line["seconds_per_step"] for line in reversed(lines) if "seconds_per_step" in line)


if __name__ == "__main__":
    main()
