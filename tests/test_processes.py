"""Two processes: the command line under torchrun, and the distiller under DistributedDataParallel."""

import json
import math
import shutil
import signal
from functools import partial

import psutil
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from gskd.distiller import Distiller, Term
from gskd.losses import LOSSES
from gskd.task_losses import class_balanced_cross_entropy
from helpers import (
    STEPS,
    assert_same_run,
    count_records,
    free_port,
    gskd_ok,
    records,
    scores,
    spawn,
    spawn_two,
    steps,
    wait_until,
    write_recipe,
)

# `accelerate launch` imports torchvision, which beside a CPU torch needs gskd's patch first.
ACCELERATE = ("-c", "import gskd._torchvision; from accelerate.commands.accelerate_cli import main; main()")


def torchrun(*arguments):
    return finished(spawn_two(*arguments))


def finished(process):
    try:
        out, err = process.communicate(timeout=500)
    finally:
        process.kill()
    return process.returncode, out, err


@pytest.fixture(scope="module")
def two(tiny, tmp_path_factory):
    run = tmp_path_factory.mktemp("two") / "run"
    code, out, err = torchrun("distill", tiny.recipe, f"output={run}", "data.test=test", "eval.every=100")
    assert code == 0, err
    return run, out


def test_torchrun_makes_one_run(two, tiny):
    run, out = two
    assert [record["step"] for record in steps(run)] == list(range(1, STEPS + 1))
    assert len(records(run)) == STEPS + 1
    lines = [line for line in out.splitlines() if line.startswith(("step", "teacher", "last", "best"))]
    assert len(lines) == len(set(lines)) == STEPS + 6
    recipe, one = (json.loads((folder / "run.json").read_text()) for folder in (run, tiny.distilled))
    assert (recipe["kind"], recipe["classes"]) == (one["kind"], one["classes"])


@pytest.mark.slow  # several processes, several times
def test_two_processes_fill_one_cache_and_train_from_it(tiny, tmp_path):
    arguments = [tiny.recipe, f"teacher.cache={tmp_path / 'cache'}", "augment.views=12", "data.options.length=24"]
    code, _, err = torchrun("distill", *arguments, f"output={tmp_path / 'two'}", "terms.gskd=null", "terms.memory=null")
    assert code == 0, err
    one = gskd_ok("distill", *arguments, f"output={tmp_path / 'one'}", "terms.gskd=null", "terms.memory=null")
    assert "views to make" not in one.out
    first = [steps(tmp_path / folder)[0]["terms"] for folder in ("one", "two")]
    assert first[0]["task"]["raw"] == pytest.approx(first[1]["task"]["raw"], rel=0.05)  # batch norm's statistics
    assert sorted(path.name[:5] for path in (tmp_path / "cache").glob("*/*.safetensors")) == [
        "00000", "00000", "00001", "00001", "00002", "00002"
    ]  # fmt: skip


def test_processes_share_the_images_of_a_batch_and_of_a_split(two, tiny):
    """The first step has the weights and images of one process: the same task loss but for batch norm's statistics."""
    run, _ = two
    result, one = (json.loads((folder / "result.json").read_text()) for folder in (run, tiny.distilled))
    assert result["teacher"] == one["teacher"]  # each process scored half of the images
    (first, other) = (steps(folder)[0] for folder in (run, tiny.distilled))
    assert first["terms"]["task"]["raw"] == pytest.approx(other["terms"]["task"]["raw"], rel=0.04)
    assert first["loss"] != other["loss"]


def test_the_score_is_that_of_the_weights_that_are_saved(two):
    """Each process has running statistics of its own; the first one's are saved."""
    run, _ = two
    result = json.loads((run / "result.json").read_text())
    assert result["best"] == result["last"]  # scored once in training, and once again from the file
    assert scores(run)[-1]["miou"] == result["last"]["val"]["miou"]
    score = run.parent / "score.json"
    gskd_ok("eval", run, "--json", score)
    assert json.loads(score.read_text()) == result["best"]["val"]


@pytest.mark.slow
def test_torchrun_is_reproducible_and_resumes(two, tiny, tmp_path):
    run, _ = two
    same = ["data.test=test", "eval.every=100"]
    assert torchrun("distill", tiny.recipe, f"output={tmp_path / 'run'}", *same)[0] == 0
    assert_same_run(tmp_path / "run", run)
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "step-00000004" / "manifest.json").unlink()
    (tmp_path / "run" / "result.json").unlink()
    code, out, err = torchrun("distill", tiny.recipe, f"output={tmp_path / 'run'}", *same, "--resume")
    assert (code, "resumed at step 2" in out) == (0, True), err
    assert_same_run(tmp_path / "run", run)


@pytest.mark.slow
def test_torchrun_refuses_in_one_line_each(tiny, tmp_path):
    code, _, err = torchrun("train", tiny.recipe, f"output={tmp_path / 'run'}", "train.batch=3")
    assert code != 0
    assert "gskd: train.batch: 3 images do not divide among 2 processes" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_accelerate_launch(tiny, tmp_path):
    """On CPU it starts one process unless it is given MPI; what it sets up must not disturb the run."""
    run = tmp_path / "run"
    launcher = (
        *ACCELERATE,
        "launch",
        "--cpu",
        "--num_processes=2",
        f"--main_process_port={free_port()}",
        "-m",
        "gskd.cli",
    )
    code, _, err = finished(spawn("train", tiny.recipe, f"output={run}", launcher=launcher))
    assert code == 0, err
    assert_same_run(run, tiny.plain)


@pytest.mark.slow
def test_all_processes_stop_when_one_is_asked_to(two, tiny, tmp_path):
    """And the run that goes on from there ends as one that was never stopped."""
    run, long = tmp_path / "run", ["train.steps=60", "eval.every=100", "train.checkpoint_every=100"]
    process = spawn_two("distill", tiny.recipe, f"output={run}", *long)
    wait_until(lambda: count_records(run) >= 4, process, 200)
    workers = psutil.Process(process.pid).children()
    next(worker for worker in workers if worker.environ().get("RANK") == "1").send_signal(signal.SIGTERM)
    code, _, err = finished(process)
    assert code != 0
    assert err.count("gskd: stopped at step") == 2
    stopped = json.loads(next((run / "checkpoints").glob("step-*/manifest.json")).read_text())["step"]
    assert stopped % 5 == 0
    code, out, err = torchrun("distill", tiny.recipe, f"output={run}", *long, "--resume")
    assert (code, f"resumed at step {stopped}" in out) == (0, True), err
    assert torchrun("distill", tiny.recipe, f"output={tmp_path / 'whole'}", *long)[0] == 0
    assert_same_run(run, tmp_path / "whole")


@pytest.mark.slow
def test_two_machines_make_the_run_of_two_processes(two, tiny, tmp_path):
    """Two launchers that meet at an address, as on two machines; each starts one process."""
    run, meeting = tmp_path / "run", f"127.0.0.1:{free_port()}"
    node = ("--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", f"--rdzv_endpoint={meeting}", "--rdzv_id=gskd")
    launcher = ("-m", "torch.distributed.run", *node, "-m", "gskd.cli")
    arguments = ("distill", tiny.recipe, f"output={run}", "data.test=test", "eval.every=100")
    machines = [spawn(*arguments, launcher=launcher) for _ in range(2)]
    assert [(code, err if code else "") for code, _, err in map(finished, machines)] == [(0, ""), (0, "")]
    assert_same_run(run, two[0])


WITHOUT_BATCH_NORM = """
from torch import nn

def net(num_classes):
    layers = []
    for before, after in ((3, 16), (16, 24), (24, 24)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.GroupNorm(4, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(24, num_classes, 1))
"""


@pytest.mark.slow
def test_one_and_two_processes_follow_one_curve_and_go_on_from_each_other(tiny, tmp_path, monkeypatch):
    """Same images in each step, same schedule: what is left is the order of sums. Batch norm would see half a batch."""
    (tmp_path / "without_batch_norm.py").write_text(WITHOUT_BATCH_NORM)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("GSKD_ALLOW_IMPORTS", "1")
    long = {"steps": 50, "checkpoint_every": 20, "keep": 9, "clip": 1.0}
    recipe = write_recipe(
        tmp_path / "r.yaml",
        tmp_path / "one",
        data={"dataset": "scenes", "options": {"size": [32, 48], "length": 24}},
        model={"name": "without_batch_norm:net", "args": {}},
        teacher={"run": str(tiny.teacher)},
        terms={"kd": {}, "mse": {"student": "6", "weight": 0.1}, "cwd": {}},
        train=long,
        eval={"every": 50},
    )
    code, _, err = finished(spawn("distill", recipe))
    assert code == 0, err
    assert torchrun("distill", recipe, f"output={tmp_path / 'two'}")[0] == 0
    for folder in ("one", "two"):
        shutil.copytree(tmp_path / folder, tmp_path / f"from_{folder}")
        (tmp_path / f"from_{folder}" / "result.json").unlink()
        for step in (40, 50):
            shutil.rmtree(tmp_path / f"from_{folder}" / "checkpoints" / f"step-{step:08d}")
    code, out, err = torchrun("distill", recipe, f"output={tmp_path / 'from_one'}", "--resume")
    assert (code, "resumed at step 20 of 50" in out) == (0, True), err
    code, out, err = finished(spawn("distill", recipe, f"output={tmp_path / 'from_two'}", "--resume"))
    assert (code, "resumed at step 20 of 50" in out) == (0, True), err
    curves = {
        run: [record["loss"] for record in steps(tmp_path / run)] for run in ("one", "two", "from_one", "from_two")
    }
    assert len(curves["one"]) == 50
    assert curves["one"][-1] < 0.9 * curves["one"][0]
    for run in ("two", "from_one", "from_two"):
        assert curves[run] == pytest.approx(curves["one"], rel=1e-4), run


# --- the distiller under DistributedDataParallel ---


def network(widths, seed):
    torch.manual_seed(seed)
    hidden, classes = widths
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, hidden, 3, padding=1), torch.nn.Tanh(), torch.nn.Conv2d(hidden, classes, 1)
    )


def gradients(part):
    """Gradients and averaged values of one step; the images differ in how many pixels count."""
    student, teacher = network((5, 4), 0), network((7, 4), 1)
    # Every pixel of a class is drawn, so that nothing depends on how the draw falls.
    terms = {
        "kd": Term(LOSSES["kd"](), 0.7),
        "mse": Term(LOSSES["mse"](5, 7), 2.0, "0", "0"),
        "gskd": Term(LOSSES["gskd"](samples_per_class=400, group_size=2000, policy="mask"), 3.0, "1", "1"),
    }
    torch.manual_seed(2)
    images, labels = torch.randn(3, 3, 8, 9), torch.randint(0, 4, (3, 8, 9))
    labels[0, 2:] = 255
    labels[2] = 255
    every = math.lcm(*(n for image in labels[:2] for n in image[image != 255].bincount().tolist()))
    task_loss = partial(class_balanced_cross_entropy, weight=0.5, samples_per_class=every)
    torch.nn.init.normal_(terms["mse"].loss.projector.weight)
    distiller = Distiller(student, teacher, terms, task_loss=task_loss)
    model = torch.nn.parallel.DistributedDataParallel(distiller) if dist.is_initialized() else distiller
    result = model(images[part], labels[part])
    result.loss.backward()
    values = torch.stack([result.loss.detach(), *(value.raw for value in result.terms.values())])
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= 2
    return {"values": values, **{name: p.grad for name, p in distiller.named_parameters()}}


def _work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(gradients(slice(0, 1) if rank == 0 else slice(1, 3)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_distiller_has_the_gradient_of_one_process(tmp_path):
    mp.spawn(_work, (str(tmp_path),), nprocs=2)
    expected = gradients(slice(None))
    assert min(value.abs().max() for value in expected.values()) > 1e-5
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(
                found[name], value, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
            )
