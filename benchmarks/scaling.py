"""The same training on one process and on several: seconds of a step, and whether the losses are the same.

    python benchmarks/scaling.py camvid_gskd data.root=path/to/camvid teacher.run=runs/camvid_teacher [--processes 1 2]

Every row is a run of its own by torchrun, with the same images in every step (``train.batch`` counts those of all
processes), each process on as many threads. Batch normalisation sees the images of its own process alone on a CPU, so
there the losses drift apart.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from gskd.environment import environment
from gskd.run import Run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="with a teacher and terms")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="default 1 2")
    parser.add_argument("--threads", type=int, default=1, help="of each process; default 1")
    parser.add_argument("--steps", type=int, default=20, help="default 20")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = {count: trained(args, count, Path(folder) / str(count)) for count in args.processes}
    seconds = {count: median(passes(run)[3:]) for count, run in runs.items()}
    first = args.processes[0]
    about = {**environment(), "recipe": args.recipe, "threads": args.threads}
    print("; ".join(f"{key} {about[key]}" for key in ("processor", "cuda", "threads", "commit")))
    print(f"{'processes':>9s}{'ms a step':>12s}{'speed-up':>10s}{'loss apart, step 1':>20s}{'at the end':>12s}")
    for count, run in runs.items():
        apart = [abs(one["loss"] - other["loss"]) / other["loss"] for one, other in zip(run, runs[first], strict=True)]
        times = seconds[first] / seconds[count]
        print(f"{count:9d}{1e3 * seconds[count]:12.0f}{times:10.2f}{apart[0]:20.1e}{apart[-1]:12.1e}")
    if args.json is not None:
        args.json.write_text(json.dumps({**about, "seconds": seconds}, indent=1))


def trained(args: argparse.Namespace, processes: int, output: Path) -> list[dict[str, Any]]:
    """The steps of a run, from its metrics."""
    steps = [f"train.steps={args.steps}", f"eval.every={args.steps}", f"train.checkpoint_every={args.steps}"]
    more = ["data.test=null", "train.log_every=1", f"train.threads={args.threads}", "train.tensorboard=false"]
    command = ["distill", args.recipe, *args.overrides, *steps, *more, f"output={output}"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = subprocess.run([*launcher, "-m", "gskd.cli", *command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{processes} processes: {done.stdout}{done.stderr}")
    return [record for record in Run(output).read_metrics() if "loss" in record]


def passes(run: list[dict[str, Any]]) -> list[float]:
    """Seconds of each step: the metrics hold their mean so far."""
    ends = [record["step"] * record["seconds_per_step"] for record in run]
    return [end - begun for begun, end in zip([0.0, *ends], ends, strict=False)]


if __name__ == "__main__":
    main()
