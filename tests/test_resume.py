"""A run that was killed and resumed ends as one that was not: the same bits in weights and optimiser."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
from PIL import Image

from gskd import GSKDError, trainer
from gskd.metrics import ConfusionMatrix
from gskd.recipe import load_recipe
from gskd.run import Run
from gskd.stops import EXIT_STOPPED
from helpers import (
    TERMS,
    Killed,
    assert_refused,
    assert_same_run,
    count_records,
    gskd,
    gskd_ok,
    kill_at,
    records,
    scores,
    snapshot,
    spawn,
    steps,
    wait_until,
    write_recipe,
)

STEPS = 6


@pytest.fixture(scope="module")
def recipe(tiny, tmp_path_factory):
    """GSKD and KD: the points that GSKD draws are random inside the step."""
    folder = tmp_path_factory.mktemp("resume")
    return write_recipe(
        folder / "r.yaml",
        folder / "whole",
        teacher={"run": str(tiny.teacher)},
        terms=TERMS,
        train={"steps": STEPS, "checkpoint_every": 2},
        eval={"every": 3},
    )


@pytest.fixture(scope="module")
def whole(recipe):
    gskd_ok("distill", recipe)
    return recipe.parent / "whole"


@pytest.mark.parametrize("step", [1, 3, 4, pytest.param(5, marks=pytest.mark.slow)])
def test_killed_in_a_step(recipe, whole, tmp_path, monkeypatch, step):
    """Before the first checkpoint, before a score, before a checkpoint is written, after both."""
    run = tmp_path / "run"
    kill_at(step, monkeypatch, "distill", recipe, f"output={run}")
    assert [record["step"] for record in steps(run)] == list(range(1, step + 1))
    assert not (run / "result.json").exists()
    said = gskd_ok("distill", recipe, f"output={run}", "--resume")
    assert f"resumed at step {(step - 1) // 2 * 2} of {STEPS}" in said.out
    assert [record["step"] for record in steps(run)] == list(range(1, STEPS + 1))
    assert_same_run(run, whole)
    assert _scores(run) == _scores(whole)


def _scores(run):
    result = json.loads((run / "result.json").read_text())
    return {key: result[key] for key in ("best", "last", "teacher")}


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.channels_last=true"],
        pytest.param(["train.optimizer=sgd", "train.lr=0.01", "train.precision=bf16"], marks=pytest.mark.slow),
        ["train.accumulate=2", "train.clip=0.5", "train.channels_last=true", "train.optimizer=sgd"],
    ],
    ids=["channels_last", "sgd-bf16", "accumulate-clip"],
)
def test_killed_with_other_settings(recipe, tmp_path, monkeypatch, overrides):
    short = [*overrides, "train.steps=5", "terms.mse=null"]
    gskd_ok("distill", recipe, f"output={tmp_path / 'whole'}", *short)
    kill_at(3, monkeypatch, "distill", recipe, f"output={tmp_path / 'run'}", *short)
    gskd_ok("distill", recipe, f"output={tmp_path / 'run'}", *short, "--resume")
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_killed_while_a_checkpoint_is_written(recipe, whole, tmp_path, monkeypatch):
    from gskd import checkpoint

    write = checkpoint.write_tensors

    def write_and_die(tensors, path, metadata=None):
        if "step-00000004" in str(path) and path.name.startswith("optimizer"):
            path.with_name(path.name + ".partial").write_bytes(b"half")
            raise Killed
        write(tensors, path, metadata)

    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "write_tensors", write_and_die)
        with pytest.raises(Killed):
            gskd("distill", recipe, f"output={run}")
    said = gskd_ok("distill", recipe, f"output={run}", "--resume")
    assert f"resumed at step 2 of {STEPS}" in said.out
    assert_same_run(run, whole)
    assert not list(run.rglob("*.partial"))


def test_a_damaged_checkpoint_is_passed_over_and_named(recipe, whole, tmp_path, monkeypatch):
    run = tmp_path / "run"
    kill_at(5, monkeypatch, "distill", recipe, f"output={run}")
    weights = run / "checkpoints" / "step-00000004" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 5, "lo')  # a line that a kill cut short
    said = gskd_ok("distill", recipe, f"output={run}", "--resume")
    assert "step-00000004 is damaged and skipped: model.safetensors does not match its hash" in said.out
    assert f"resumed at step 2 of {STEPS}" in said.out
    assert_same_run(run, whole)


@pytest.mark.parametrize(
    ("command", "overrides", "part"),
    [
        ("distill", ["train.lr=0.5"], "was begun with another recipe: train.lr was 0.001, is now 0.5"),
        ("distill", ["terms.kd.weight=3"], "was begun with another recipe"),
        ("distill", ["terms.kd=null"], "was begun with another recipe"),
        ("distill", ["train.steps=7"], "was begun with another recipe"),
        ("train", [], "was begun by gskd distill"),
    ],
)
def test_another_job_is_refused(recipe, whole, command, overrides, part):
    before = snapshot(whole)
    refused = gskd(command, recipe, "--resume", *overrides)
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert part in refused.err
    assert snapshot(whole) == before


def test_a_finished_run_is_left_alone(recipe, whole):
    before = snapshot(whole)
    said = gskd_ok("distill", recipe, "--resume", "data.workers=1", "train.log_every=3")
    assert "is finished" in said.out
    assert snapshot(whole) == before


def test_killed_before_the_result_was_written(recipe, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    gskd_ok("distill", recipe, f"output={tmp_path / 'run'}", "--resume")
    assert _scores(tmp_path / "run") == _scores(whole)
    assert_same_run(tmp_path / "run", whole)


def test_resume_moved_and_with_other_ways_of_working(recipe, whole, tmp_path, monkeypatch):
    """Where it stands, how data are loaded and how often it reports may change."""
    kill_at(3, monkeypatch, "distill", recipe, f"output={tmp_path / 'run'}")
    shutil.move(tmp_path / "run", tmp_path / "moved")
    moved = tmp_path / "moved"
    gskd_ok(
        "distill",
        recipe,
        f"output={moved}",
        "--resume",
        "data.workers=1",
        "data.cache_gib=0",
        "train.checkpoint_every=3",
    )
    assert_same_run(moved, whole)
    assert load_recipe(moved / "recipe.yaml").output == str(tmp_path / "run")  # as it was begun


def test_resume_without_a_run_starts_one(recipe, tmp_path):
    (tmp_path / "run").mkdir()
    said = gskd_ok("distill", recipe, f"output={tmp_path / 'run'}", "train.steps=1", "--resume")
    assert "resumed" not in said.out
    assert len(steps(tmp_path / "run")) == len(scores(tmp_path / "run")) == 1


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_sigkill(recipe, tmp_path, workers):
    run, long = tmp_path / "run", ["train.steps=12", f"data.workers={workers}"]
    process = spawn("distill", recipe, f"output={run}", *long)
    try:
        wait_until(lambda: count_records(run) >= 4, process, 400)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (run / "result.json").exists()
    assert 3 <= len(steps(run)) < 12
    gskd_ok("distill", recipe, f"output={run}", *long, "--resume")
    assert [record["step"] for record in steps(run)] == list(range(1, 13))
    gskd_ok("distill", recipe, f"output={tmp_path / 'whole'}", "train.steps=12")  # in one go, without workers
    assert_same_run(run, tmp_path / "whole")


def send(number, patched, owner, name, call):
    """Sends this process a signal in the ``call``-th call of a function, after which the function does its work."""
    work, calls = getattr(owner, name), []

    def signalled(*arguments, **options):
        calls.append(name)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return work(*arguments, **options)

    patched.setattr(owner, name, signalled)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_finishes_the_step_and_saves(recipe, whole, tmp_path, monkeypatch, number):
    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        send(number, patched, trainer, "_forward", 5)
        stopped = gskd("distill", recipe, f"output={run}")
    assert stopped.code == EXIT_STOPPED
    assert "gskd: stopped at step 5 of 6, saved" in stopped.err
    assert "--resume" in stopped.err
    assert [record["step"] for record in steps(run)] == [1, 2, 3, 4, 5]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    said = gskd_ok("distill", recipe, f"output={run}", "--resume")
    assert f"resumed at step 5 of {STEPS}" in said.out
    assert_same_run(run, whole)


@pytest.mark.parametrize(
    ("call", "where"),
    [
        (2, "stopped while scoring"),  # the teacher, before the first step
        (6, "stopped at step 3 of 6"),
        (4 + 4 + 3, "stopped at step 6 of 6"),
        (4 + 4 + 4 + 2, "stopped while scoring"),  # the best weights, at the end
    ],
)
def test_asked_to_stop_while_it_scores(recipe, whole, tmp_path, monkeypatch, call, where):
    """Four images a score; what was being scored is scored from the start when the run goes on, and only once."""
    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        send(signal.SIGTERM, patched, ConfusionMatrix, "update", call)
        stopped = gskd("distill", recipe, f"output={run}", "data.test=test")
    assert (stopped.code, where in stopped.err) == (EXIT_STOPPED, True), stopped
    assert not (run / "result.json").exists()
    gskd_ok("distill", recipe, f"output={run}", "data.test=test", "--resume")
    assert_same_run(run, whole)


def test_asked_to_stop_where_a_step_would_be_scored(recipe, whole, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        send(signal.SIGTERM, patched, trainer, "_forward", 3)
        assert "stopped at step 3" in gskd("distill", recipe, f"output={run}").err
    assert scores(run) == []
    gskd_ok("distill", recipe, f"output={run}", "--resume")
    assert_same_run(run, whole)


@pytest.mark.parametrize("call", [1, 3])
def test_a_score_that_fails_costs_no_step(recipe, whole, tmp_path, monkeypatch, call):
    """The image is damaged, or too large for the machine; put right, the run goes on from that very step."""
    run, work, calls = tmp_path / "run", trainer.evaluate, []

    def failing(*arguments, **options):
        calls.append(1)
        if len(calls) == call:
            raise GSKDError("val image 3: cannot be read")
        return work(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(trainer, "evaluate", failing)
        outcome = gskd("distill", recipe, f"output={run}", "train.checkpoint_every=100", "eval.every=2")
    assert (outcome.code, outcome.err.strip()) == (2, "gskd: val image 3: cannot be read")
    assert len(scores(run)) == call - 1
    said = gskd_ok("distill", recipe, f"output={run}", "train.checkpoint_every=100", "eval.every=2", "--resume").out
    assert f"resumed at step {2 * call} of {STEPS}" in said
    assert len(scores(run)) == 3
    assert [record["loss"] for record in steps(run)] == [record["loss"] for record in steps(whole)]


def test_a_run_that_is_being_trained_is_not_continued_by_another(recipe, tmp_path):
    """Nor does what a kill leaves of it hold the folder."""
    run, long = tmp_path / "run", ["train.steps=200", "data.workers=1", "eval.every=200"]
    process = spawn("distill", recipe, f"output={run}", *long)
    try:
        wait_until(lambda: count_records(run) >= 2, process, 400)
        before = count_records(run)
        assert_refused(gskd("distill", recipe, f"output={run}", *long, "--resume"), str(run), "another process")
        assert process.poll() is None
        assert count_records(run) >= before
    finally:
        process.kill()
        process.communicate()
    assert [record["step"] for record in steps(run)] == list(range(1, len(steps(run)) + 1))
    with Run(run).held():
        pass


def test_what_is_logged_of_a_step_is_the_mean_of_its_rounds(recipe, tmp_path, monkeypatch):
    seen = []
    work = trainer._forward

    def forward(*arguments):
        result = work(*arguments)
        seen.append({"loss": result.loss.item(), **{name: value.raw.item() for name, value in result.terms.items()}})
        return result

    monkeypatch.setattr(trainer, "_forward", forward)
    gskd_ok("distill", recipe, f"output={tmp_path / 'run'}", "train.steps=2", "train.accumulate=2")
    assert len(seen) == 4
    for number, record in enumerate(steps(tmp_path / "run")):
        one, other = seen[2 * number : 2 * number + 2]
        assert one["loss"] != other["loss"]
        found = {"loss": record["loss"], **{name: value["raw"] for name, value in record["terms"].items()}}
        assert found == pytest.approx({name: (one[name] + other[name]) / 2 for name in one}, rel=1e-5)


def test_asked_twice_it_stops_at_once(recipe, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        send(signal.SIGINT, patched, trainer, "_forward", 2)
        send(signal.SIGINT, patched, trainer, "_numbers", 2)
        stopped = gskd("distill", recipe, f"output={tmp_path / 'run'}")
    assert stopped.code == 130


def test_a_mistake_found_in_the_first_step_does_not_block_the_folder(recipe, tmp_path):
    refused = gskd("distill", recipe, f"output={tmp_path / 'run'}", "train.batch=1")
    assert (refused.code, "batch normalisation" in refused.err) == (2, True)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow  # four processes
def test_killed_again_and_again(recipe, tmp_path, monkeypatch):
    """Ten images, four a step: twice within an epoch, in the step that two epochs share, where one ends, in a score."""
    same = ["data.options.length=10", "train.checkpoint_every=1"]
    gskd_ok("distill", recipe, f"output={tmp_path / 'whole'}", *same)
    run = tmp_path / "run"
    for step in (1, 2, 3, 5):
        kill_at(step, monkeypatch, "distill", recipe, f"output={run}", *same, "--resume")
    with monkeypatch.context() as patched:
        patched.setattr(ConfusionMatrix, "update", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            gskd("distill", recipe, f"output={run}", *same, "--resume")
    gskd_ok("distill", recipe, f"output={run}", *same, "--resume")
    assert_same_run(run, tmp_path / "whole")


def test_changes_can_be_accepted(recipe, tmp_path, monkeypatch):
    run = tmp_path / "run"
    kill_at(5, monkeypatch, "distill", recipe, f"output={run}")
    changes = ["train.steps=8", "terms.kd.weight=2", "data.options.length=6"]
    refused = gskd("distill", recipe, f"output={run}", *changes, "--resume")
    assert (refused.code, "was begun with another recipe" in refused.err) == (2, True)
    said = gskd_ok("distill", recipe, f"output={run}", *changes, "--resume", "--accept-changes")
    assert "resumed at step 4 of 8" in said.out
    assert [record["step"] for record in steps(run)] == list(range(1, 9))
    accepted = [record["accepted"] for record in records(run) if "accepted" in record]
    assert [line.split(" was ")[0] for line in accepted[0]] == [
        "data.options.length", "terms.kd.weight", "train.steps"
    ]  # fmt: skip
    assert load_recipe(run / "recipe.yaml").train.steps == 8


def test_a_finished_run_can_be_made_longer(recipe, whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    before = snapshot(run)
    assert "is finished" in gskd_ok("distill", recipe, f"output={run}", "--resume", "--accept-changes").out
    assert snapshot(run) == before
    said = gskd_ok("distill", recipe, f"output={run}", "train.steps=8", "--resume", "--accept-changes")
    assert f"resumed at step {STEPS} of 8" in said.out
    assert [record["step"] for record in steps(run)] == list(range(1, 9))
    assert load_recipe(run / "recipe.yaml").train.steps == 8
    assert (run / "result.json").is_file()


def test_a_run_cannot_be_made_shorter_than_it_is(recipe, whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    before = snapshot(run)
    outcome = gskd("distill", recipe, f"output={run}", "train.steps=2", "--resume", "--accept-changes")
    assert_refused(outcome, "train.steps: 2", f"has done {STEPS}")
    assert snapshot(run) == before


def test_other_training_samples_are_refused(tiny, tmp_path, monkeypatch):
    root, run = tmp_path / "data", tmp_path / "run"
    pictures(root, ["a", "b", "c", "d"])
    recipe = write_recipe(tmp_path / "r.yaml", run, data=folder_of(root))
    kill_at(3, monkeypatch, "train", recipe)
    pictures(root, ["e"])
    before = snapshot(run)
    refused = gskd("train", recipe, "--resume")
    assert (refused.code, "was begun with other training samples" in refused.err) == (2, True), refused
    assert snapshot(run) == before
    gskd_ok("train", recipe, "--resume", "--accept-changes")


def test_unreadable_samples_are_left_out_by_choice(tiny, tmp_path, monkeypatch):
    """By name, the same ones when the run goes on, and the run is that of the data without them."""
    root, run = tmp_path / "data", tmp_path / "run"
    pictures(root, ["a", "b", "c", "d", "e", "f"])
    (root / "images" / "train" / "b.png").write_bytes(b"no image")
    Image.new("L", (8, 8)).save(root / "masks" / "train" / "d.png")
    recipe = write_recipe(tmp_path / "r.yaml", run, data=folder_of(root))
    assert gskd("train", recipe, f"output={tmp_path / 'stops'}").code == 2
    kill_at(3, monkeypatch, "train", recipe, "data.unreadable=skip")
    pictures(root, ["b"])  # put right since: the run stays what it was
    gskd_ok("train", recipe, "data.unreadable=skip", "--resume")
    assert json.loads((run / "run.json").read_text())["left_out"] == ["b", "d"]
    for name in "bd":
        for kind in ("images", "masks"):
            (root / kind / "train" / f"{name}.png").unlink()
    said = gskd_ok("train", recipe, "data.unreadable=skip", f"output={tmp_path / 'whole'}")
    assert "left out" not in said.out
    assert_same_run(run, tmp_path / "whole")


def test_accepted_samples_are_looked_at_again(tiny, tmp_path, monkeypatch):
    root, run = tmp_path / "data", tmp_path / "run"
    pictures(root, ["a", "b", "c", "d"])
    (root / "images" / "train" / "b.png").write_bytes(b"no image")
    recipe = write_recipe(tmp_path / "r.yaml", run, data=folder_of(root))
    kill_at(3, monkeypatch, "train", recipe, "data.unreadable=skip")
    pictures(root, ["b", "e"])
    (root / "images" / "train" / "c.png").write_bytes(b"no image")
    gskd_ok("train", recipe, "data.unreadable=skip", "--resume", "--accept-changes")
    assert json.loads((run / "run.json").read_text())["left_out"] == ["c"]


def test_nothing_to_train_on(tiny, tmp_path):
    pictures(tmp_path / "data", ["a", "b"])
    for image in (tmp_path / "data" / "images" / "train").iterdir():
        image.write_bytes(b"no image")
    recipe = write_recipe(tmp_path / "r.yaml", tmp_path / "run", data=folder_of(tmp_path / "data"))
    refused = gskd("train", recipe, "data.unreadable=skip")
    assert (refused.code, "none of the 2 samples can be read" in refused.err) == (2, True), refused
    assert not (tmp_path / "run").exists()


def folder_of(root):
    return {"dataset": "folder", "root": str(root), "options": {"classes": ["a", "b"]}}


def pictures(root, names):
    """For each split an image and a mask of each name."""
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (root / kind / split).mkdir(parents=True, exist_ok=True)
        for name in names:
            random = np.random.default_rng(ord(name))
            Image.fromarray(random.integers(0, 256, (32, 32, 3), np.uint8)).save(
                root / "images" / split / f"{name}.png"
            )
            Image.fromarray(random.integers(0, 2, (32, 32), np.uint8)).save(root / "masks" / split / f"{name}.png")
