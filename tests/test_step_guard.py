"""Bad numbers: skipped within a budget, without a trace in the weights, and explained past it."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from gskd import trainer
from gskd.data.scenes import Scenes
from gskd.losses.cross_image import MemoryBank
from gskd.step_guard import StepGuard, explain
from helpers import STEPS, gskd, gskd_ok, records, steps


def poison(patched, at, value=float("inf")):
    """Gives the images of the ``at``-th steps (from 1) a pixel that no network survives."""
    work, calls = trainer._normalised, []

    def poisoned(*arguments):
        images, other = work(*arguments)
        calls.append(1)
        if len(calls) in at:
            images[0, 0, 3, 4] = value
        return images, other

    patched.setattr(trainer, "_normalised", poisoned)


def test_a_bad_step_is_skipped_named_and_leaves_no_trace(tiny, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        poison(patched, {2})
        said = gskd_ok("distill", tiny.recipe, f"output={run}")
    assert "step 2 is skipped: its gradient is not finite; samples " in said.out
    skipped = [record for record in records(run) if "skipped" in record]
    assert [record["step"] for record in skipped] == [2]
    assert len(skipped[0]["skipped"]) == 4
    assert [record["step"] for record in steps(run)] == [1, 3, 4]
    for file in (run / "student.safetensors", *run.glob("checkpoints/*/model.safetensors")):
        for name, tensor in load_file(file).items():
            assert not tensor.is_floating_point() or tensor.isfinite().all(), name
    manifest = json.loads((run / f"checkpoints/step-{STEPS:08d}/manifest.json").read_text())
    assert manifest["state"]["skipped"] == 1


def test_past_the_budget_it_says_where_from(tiny, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        poison(patched, {2})
        stopped = gskd("distill", tiny.recipe, f"output={tmp_path / 'run'}", "train.max_skipped=0")
    assert stopped.code == 2
    assert stopped.err.count("\n") == 1
    assert "step 2: the gradient is not finite, 1 times so far (train.max_skipped); not finite: task" in stopped.err
    assert "first in layer 'encoder." in stopped.err
    names = {Scenes("train", size=(32, 48), length=4).name(index) for index in range(4)}
    assert sum(name in stopped.err for name in names) >= 1


def test_three_in_a_row_are_no_accident(tiny, tmp_path):
    stopped = gskd("distill", tiny.recipe, f"output={tmp_path / 'run'}", "train.lr=1e30")
    assert (stopped.code, "step 4: the gradient is not finite, 3 times so far" in stopped.err) == (2, True), stopped.err
    assert "a lower train.lr" in stopped.err


def test_a_resumed_run_remembers_what_was_skipped(tiny, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        poison(patched, {2})
        gskd_ok("distill", tiny.recipe, f"output={run}", "train.max_skipped=1")
    (run / "result.json").unlink()
    manifest = run / "checkpoints/step-00000004"
    for file in manifest.iterdir():
        file.unlink()
    manifest.rmdir()
    with monkeypatch.context() as patched:
        poison(patched, {2})
        stopped = gskd("distill", tiny.recipe, f"output={run}", "train.max_skipped=1", "--resume")
    assert "step 4: the gradient is not finite, 2 times so far" in stopped.err


def test_the_guard_puts_statistics_back():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    guard = StepGuard(model, budget=2)
    guard.before_forward()
    model(torch.full((2, 3, 4, 4), float("nan"))).sum().backward()
    assert not guard.gradient_is_finite()
    guard.undo_forward()
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name])
    assert [guard.count(), guard.count(), guard.count()] == [False, False, True]


def test_terms_are_named_by_their_share():
    student = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    terms = {"task": {"raw": 1.0, "weighted": 1.0}, "gskd": {"raw": 9.0, "weighted": 99.0}}
    text = str(explain(terms, student, torch.zeros(1, 3, 4, 4), ["a", "b"], 3))
    assert "shares of the loss: gskd 99 %, task 1 %" in text
    assert "no layer of the student" in text
    student[2].weight.data[0, 0] = np.nan
    assert "first in layer '2' of the student" in str(explain(terms, student, torch.zeros(1, 3, 4, 4), ["a"], 3))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_banks_take_nothing_that_is_not_finite(bad):
    bank = MemoryBank(2, 3, 2)
    bank.add(torch.tensor([[1.0, 0.0], [bad, 0.0], [0.0, 1.0]]), torch.tensor([0, 0, 0]))
    assert bank.vectors[0].tolist() == [[1, 0], [0, 1], [0, 0]]
    assert bank.filled()[0].tolist() == [True, True, False]
