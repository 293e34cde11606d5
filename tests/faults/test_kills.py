"""Kills at random moments, one after another: the run that is left ends as one that was never disturbed."""

import random
import time

import psutil
import pytest

from helpers import TERMS, assert_same_run, count_records, gskd_ok, records, spawn, spawn_two, wait_until, write_recipe

KILLS = 20


@pytest.fixture(scope="module")
def recipe(tiny, tmp_path_factory):
    """Short enough to be repeated, with a checkpoint or a score in nearly every step."""
    folder = tmp_path_factory.mktemp("kills")
    return write_recipe(
        folder / "r.yaml",
        folder / "whole",
        teacher={"run": str(tiny.teacher)},
        terms=TERMS,
        train={"steps": 120},
        eval={"every": 5},
    )


@pytest.fixture(scope="module")
def whole(recipe):
    gskd_ok("distill", recipe)
    return recipe.parent / "whole"


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_twenty_kills(recipe, whole, tmp_path, workers):
    """At moments from a seeded list: while it starts, steps, scores or writes a checkpoint."""
    run, chance = tmp_path / "run", random.Random(workers)
    done = 0
    for _ in range(KILLS):
        process = spawn("distill", recipe, f"output={run}", f"data.workers={workers}", "--resume")
        try:
            if chance.random() < 0.8:
                # The last ones run to their end.
                enough = count_records(run) + chance.randrange(1, 10)
                wait_until(lambda n=enough, p=process: count_records(run) >= n or p.poll() is not None, process)
            time.sleep(chance.uniform(0, 0.2))
        finally:
            for child in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []:
                child.kill()
            process.kill()
            out, err = process.communicate()
        assert process.returncode in (-9, 0), (out, err)
        done += process.returncode == -9
    assert done >= KILLS * 3 // 4
    gskd_ok("distill", recipe, f"output={run}", "--resume")
    assert_same_run(run, whole)
    assert [record["step"] for record in records(run) if "loss" in record] == list(range(1, 121))


def two(recipe, run):
    return spawn_two("distill", recipe, f"output={run}", "train.steps=40", "--resume")


@pytest.mark.slow
def test_one_of_two_processes_is_killed_ten_times(recipe, tmp_path):
    """The other one stops, says so in one line, and soon; the run goes on from the last checkpoint."""
    run, chance = tmp_path / "run", random.Random(0)
    for kill in range(10):
        process = two(recipe, run)
        try:
            enough = count_records(run) + chance.randrange(2, 5)
            wait_until(lambda n=enough: count_records(run) >= n, process)
            workers, rank = psutil.Process(process.pid).children(), str(chance.randrange(2))
            victim = next(worker for worker in workers if worker.environ().get("RANK") == rank)
            victim.kill()
            begun = time.monotonic()
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode not in (0, None), out
        assert time.monotonic() - begun < 45
        said = [line for line in err.splitlines() if line.startswith("gskd: ")]
        assert any("another process of this run" in line for line in said), (kill, err)
        assert not [worker for worker in workers if worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE]
    final = two(recipe, run)
    _, err = final.communicate(timeout=300)
    assert final.returncode == 0, err
    undisturbed = two(recipe, tmp_path / "whole")
    _, err = undisturbed.communicate(timeout=300)
    assert undisturbed.returncode == 0, err
    assert_same_run(run, tmp_path / "whole")
