import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import gskd._torchvision  # noqa: F401 (before any test imports torchvision, timm or smp)

sys.path.insert(0, str(Path(__file__).parent))  # for helpers, under importlib mode

import helpers

if "PYTEST_XDIST_WORKER" in os.environ:  # one core each, for processes that tests start as well
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def camvid_root() -> Path:
    """CamVid's folder: ``GSKD_CAMVID``, else ``data/camvid`` in the repository or ``shared/data/camvid`` beside it."""
    repository = Path(__file__).resolve().parents[1]
    asked = os.environ.get("GSKD_CAMVID")
    usual = [repository / "data" / "camvid", repository.parent / "shared" / "data" / "camvid"]
    places = [Path(asked)] if asked else usual
    for place in places:
        if (place / "train").is_dir():
            return place
    pytest.skip(
        f"no CamVid in {', '.join(map(str, places))}: set GSKD_CAMVID to the folder that holds train/, trainannot/"
    )


@dataclass(frozen=True)
class TinyRuns:
    """Runs that tests read and copy, and never change."""

    folder: Path
    recipe: Path
    """Of the distilled student; teacher and terms named."""
    teacher: Path
    plain: Path
    distilled: Path
    said: dict[str, helpers.Outcome]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRuns:
    """A teacher, a student of it and the plain student, each trained for a few steps through the command line."""
    folder = tmp_path_factory.mktemp("tiny")
    teacher, plain, distilled = folder / "teacher", folder / "plain", folder / "distilled"
    teacher_recipe = helpers.write_recipe(folder / "teacher.yaml", teacher, model=helpers.TEACHER_UNET, seed=1)
    recipe = helpers.write_recipe(
        folder / "student.yaml", distilled, teacher={"run": str(teacher)}, terms=helpers.TERMS
    )
    said = {
        "teacher": helpers.gskd_ok("train", teacher_recipe),
        "plain": helpers.gskd_ok("train", recipe, f"output={plain}", "train.tensorboard=true"),
        "distilled": helpers.gskd_ok("distill", recipe, "data.test=test"),
    }
    return TinyRuns(folder, recipe, teacher, plain, distilled, said)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The table that ``make faults`` prints: each fault, exit code, and what is said of it."""
    if "GSKD_FAULTS_TABLE" in os.environ:
        for report in terminalreporter.stats.get("passed", []) + terminalreporter.stats.get("failed", []):
            for fault, code, line in (value for key, value in report.user_properties if key == "fault"):
                passed = "" if report.passed else "FAILED "
                terminalreporter.write_line(f"{passed}{fault:36s} exit {code:3d}  {' '.join(line.split()) or '-'}")
