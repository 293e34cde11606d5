"""Faults of the machine while the real command line runs: one line, an exit code, nothing lost, and the run goes on.

``make faults`` prints the table.
"""

import json
import shutil
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from gskd.stops import EXIT_STOPPED
from helpers import TERMS, assert_same_run, gskd, gskd_ok, spawn, write_recipe

INJECT = str(Path(__file__).with_name("inject.py"))
SPACE, READONLY = "cannot be written: No space left on device", "Read-only file system"


@dataclass(frozen=True)
class Fault:
    """What fails in which command, what is said of it, and what the same command without the fault must give."""

    inject: str
    says: tuple[str, ...]
    code: int = 2
    command: str = "distill @/r.yaml output=@/run"
    goes_on: str | None = "distill @/r.yaml output=@/run --resume"
    whole: bool = True
    """What goes on ends as the undisturbed run."""
    fast: bool = False


FAULTS = {
    "disk full: weights of a checkpoint": Fault(
        "full step-00000004.partial/model", ("step-00000004", SPACE), fast=True
    ),
    "disk full: optimiser of a checkpoint": Fault("full step-00000004.partial/optimizer", ("step-00000004", SPACE)),
    "disk full: manifest of a checkpoint": Fault("full step-00000004.partial/manifest", ("step-00000004", SPACE)),
    "disk full: metrics": Fault("full metrics.jsonl", ("metrics.jsonl", SPACE)),
    "disk full: best weights": Fault("full student.safetensors", ("student.safetensors", SPACE)),
    "disk full: result": Fault("full result.json", ("result.json", SPACE)),
    "disk full: a new run": Fault("full run.json", ("run.json", SPACE)),
    "disk full: its recipe": Fault("full recipe.yaml", ("recipe.yaml", SPACE)),
    "disk full: teacher cache": Fault(
        "full cache",
        ("cache", "No space left on device"),
        command="cache build @/r.yaml teacher.cache=@/cache augment.views=2",
        goes_on="cache build @/r.yaml teacher.cache=@/cache augment.views=2",
        whole=False,
    ),
    "disk full: score": Fault(
        "full s.json",
        ("s.json", SPACE),
        command="eval @/teacher --json @/s.json",
        goes_on="eval @/teacher --json @/s.json",
        whole=False,
    ),
    "disk full: predictions": Fault(
        "full overlay",
        ("/out", SPACE),
        command="predict @/teacher @/image.png -o @/out",
        goes_on=None,
        whole=False,
    ),
    "disk full: converted weights": Fault(
        "full o.safetensors",
        ("o.safetensors", SPACE),
        command="convert @/w.pth -o @/o.safetensors",
        goes_on="convert @/w.pth -o @/o.safetensors",
        whole=False,
    ),
    "a limit on file sizes": Fault("limit 20000", ("cannot be written: ",)),
    "read-only: output": Fault("readonly run", ("/run", READONLY), goes_on="distill @/r.yaml output=@/run"),
    "read-only: checkpoints": Fault("readonly checkpoints", ("step-00000002", READONLY)),
    "a loader process killed": Fault(
        "worker",
        ("data.workers: a process that loads samples was killed",),
        command="distill @/r.yaml output=@/run data.workers=1",
        goes_on="distill @/r.yaml output=@/run data.workers=1 --resume",
        fast=True,
    ),
    "power cut": Fault(f"signal {int(signal.SIGKILL)} 3", (), code=-signal.SIGKILL, fast=True),
    "SIGTERM": Fault(f"signal {int(signal.SIGTERM)} 3", ("stopped at step 3 of 6, saved",), code=EXIT_STOPPED),
    "Ctrl-C": Fault(f"signal {int(signal.SIGINT)} 3", ("stopped at step 3 of 6, saved",), code=EXIT_STOPPED),
}


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    """A recipe with a teacher, and what its run gives where nothing fails."""
    folder = tmp_path_factory.mktemp("machine")
    shutil.copytree(tiny.teacher, folder / "teacher")
    path = write_recipe(
        folder / "r.yaml",
        folder / "whole",
        teacher={"run": str(folder / "teacher")},
        terms=TERMS,
        train={"steps": 6, "checkpoint_every": 2},
        eval={"every": 3},
    )
    gskd_ok("distill", path)
    torch.save(torch.nn.Linear(2, 2).state_dict(), folder / "w.pth")
    Image.new("RGB", (40, 30)).save(folder / "image.png")
    return folder


def run_fault(fault: Fault, folder: Path) -> tuple[int, str, str]:
    """Exit code, output and errors of the command line with a fault injected."""
    words = [word.replace("@", str(folder)) for word in fault.command.split()]
    process = spawn(*words, launcher=(INJECT, *fault.inject.split(), "--"))
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


CASES = [pytest.param(name, marks=() if fault.fast else pytest.mark.slow) for name, fault in FAULTS.items()]


@pytest.mark.skipif(sys.platform == "win32", reason="signals and limits of POSIX")
@pytest.mark.parametrize("name", CASES)
def test_a_fault_costs_nothing(folder, tmp_path, name, record_property):
    fault = FAULTS[name]
    for item in folder.iterdir():
        if item.name != "whole":
            (tmp_path / item.name).symlink_to(item)
    code, out, err = run_fault(fault, tmp_path)
    record_property("fault", (name, code, err.strip().replace(str(tmp_path), "")))
    assert code == fault.code, (out, err)
    said = [line for line in err.splitlines() if line.startswith("gskd: ")]
    assert [part for part in fault.says if part not in " ".join(said)] == [], err
    assert "Traceback" not in out + err
    if fault.code == 2:
        assert len(err.splitlines()) == 1, err
    assert not [path for path in tmp_path.rglob("*.partial") if code != -signal.SIGKILL]
    for weights in tmp_path.rglob("*.safetensors"):
        load_file(weights)
    if fault.goes_on is not None:
        again = gskd(*(word.replace("@", str(tmp_path)) for word in fault.goes_on.split()))
        assert again.code == 0, again
    if fault.whole:
        assert_same_run(tmp_path / "run", folder / "whole")
        assert (
            json.loads((tmp_path / "run" / "result.json").read_text())["best"]
            == (json.loads((folder / "whole" / "result.json").read_text())["best"])
        )
