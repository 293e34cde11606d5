"""The command line as a person uses it, in this process, on runs small enough for a second of CPU."""

import contextlib
import hashlib
import io
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from gskd.cli import main
from gskd.run import Run

TINY_UNET: dict[str, Any] = {
    "name": "smp:Unet",
    "args": {
        "encoder_name": "tu-mobilenetv3_small_050",
        "encoder_weights": None,
        "decoder_channels": [16, 16, 8, 8, 8],
    },
}
TEACHER_UNET: dict[str, Any] = {
    "name": "smp:Unet",
    "args": {**TINY_UNET["args"], "decoder_channels": [16, 16, 8, 8, 12]},
}
TERMS: dict[str, Any] = {
    "gskd": {"weight": 5, "args": {"samples_per_class": 4}},
    "kd": {"weight": 0.5},
    "mse": {"weight": 2},
    "memory": {
        "loss": "cirkd_memory",
        "weight": 0.1,
        "args": {"pixel_bank": 8, "region_bank": 5, "samples_per_class": 3, "pixel_contrast": 44},
    },
}
STEPS = 4


def recipe_tree(output: Path, train: Mapping[str, Any] | None = None, **sections: Any) -> dict[str, Any]:
    """A recipe that takes seconds. Of ``train`` what is given replaces what stands here, all other sections whole."""
    tree: dict[str, Any] = {
        "output": str(output),
        "data": {"dataset": "scenes", "options": {"size": [32, 48], "length": 4}},
        "augment": {"crop": [32, 32]},
        "model": TINY_UNET,
        "train": {
            "steps": STEPS,
            "batch": 4,
            "log_every": 1,
            "checkpoint_every": 2,
            "tensorboard": False,
            "threads": 1,
            **(train or {}),
        },
        "eval": {"every": 2},
    }
    return {**tree, **sections}


def write_recipe(path: Path, output: Path, **sections: Any) -> Path:
    path.write_text(json.dumps(recipe_tree(output, **sections)), encoding="utf-8")  # JSON is YAML
    return path


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


def gskd(*arguments: object) -> Outcome:
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as stopped:
            code = stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
    return Outcome(code, out.getvalue(), err.getvalue())


def gskd_ok(*arguments: object) -> Outcome:
    outcome = gskd(*arguments)
    assert outcome.code == 0, outcome
    return outcome


def assert_refused(outcome: Outcome, *parts: str) -> None:
    """Exit code 2 and one line that holds all the parts."""
    assert outcome.code == 2, outcome
    lines = outcome.err.splitlines()
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith("gskd: "), outcome.err
    assert [part for part in parts if part not in lines[0]] == [], outcome.err
    assert "Traceback" not in outcome.err + outcome.out


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}


def spawn(*arguments: object, launcher: tuple[str, ...] = ("-m", "gskd.cli"), cwd: Path | None = None) -> Any:
    """The command line in a process of its own."""
    return subprocess.Popen(
        [sys.executable, *launcher, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        cwd=cwd,
        preexec_fn=_hear_interrupts if os.name == "posix" else None,
    )


def _hear_interrupts() -> None:
    """What a shell starts in the background ignores Ctrl-C, and so would all that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def spawn_two(*arguments: object) -> Any:
    """The command line as two processes under torchrun."""
    launcher = ("-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}", "-m", "gskd.cli")
    return spawn(*arguments, launcher=launcher)


def wait_until(condition: Callable[[], bool], process: Any, seconds: float = 240) -> None:
    """Waits for something that a process does before it ends."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def snapshot(folder: Path) -> dict[str, str]:
    """Every file below a folder with a hash of its bytes, and every folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
    }


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def count_records(run: Path) -> int:
    """Whole lines of the metrics, also while they are written."""
    metrics = run / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.is_file() else 0


def steps(run: Path) -> list[dict[str, Any]]:
    return [record for record in records(run) if "loss" in record]


def scores(run: Path) -> list[dict[str, Any]]:
    return [record for record in records(run) if "split" in record]


def assert_same_tensors(a: Path, b: Path) -> None:
    """Two safetensors files hold the same keys and the same bits."""
    first, second = load_file(a), load_file(b)
    assert first.keys() == second.keys()
    different = [key for key in first if first[key].shape != second[key].shape or not first[key].equal(second[key])]
    assert not different, f"{len(different)} of {len(first)} differ: {different[:3]}"


def assert_same_run(a: Path, b: Path) -> None:
    """Same best weights, same last weights, same state of the optimiser, same losses and scores."""
    assert_same_tensors(a / "student.safetensors", b / "student.safetensors")
    last = max(path.name for path in (a / "checkpoints").iterdir())
    for file in ("model.safetensors", "optimizer.safetensors"):
        assert_same_tensors(a / "checkpoints" / last / file, b / "checkpoints" / last / file)
    assert [(r["step"], r["loss"], r["terms"]) for r in steps(a)] == [
        (r["step"], r["loss"], r["terms"]) for r in steps(b)
    ]
    assert scores(a) == scores(b)


def trained(model):
    """Statistics and scales as training leaves them: of a new network the folding would change nothing."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.track_running_stats:
            nn.init.normal_(module.running_mean, std=0.5)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias, std=0.5)
    return model.eval()


class Killed(BaseException):
    """Passes every handler, as a kill does."""


def kill_at(step, monkeypatch, *arguments):
    """Ends the run as soon as a step is in the metrics, before anything that follows it is written."""
    add = Run.add_metrics

    def add_and_die(self, record):
        add(self, record)
        if record["step"] == step and "loss" in record:
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(Run, "add_metrics", add_and_die)
        with pytest.raises(Killed):
            gskd(*arguments)


def write_png(path: Path, rows: list[bytes], width: int, depth: int, colour_type: int) -> None:
    """A PNG written by hand, for the encodings that Pillow does not write."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, len(rows), depth, colour_type, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b""))
