"""bf16 on a CPU without instructions for it: said, as nothing else would tell why a run takes days."""

import pytest
import torch

from gskd import speed
from gskd.schema import Precision, TeacherPrecision
from gskd.speed import bf16_slowdown, slow_precision
from helpers import gskd_ok

CPU = torch.device("cpu")
SLOW = "on this CPU bf16 takes 24 times as long as fp32"


@pytest.fixture
def slow(monkeypatch):
    monkeypatch.setattr(speed, "bf16_slowdown", lambda: 24.2)


@pytest.mark.usefixtures("slow")
def test_the_fields_that_ask_for_it_are_named():
    asked = {
        "train.precision": Precision.bf16,
        "teacher.precision": TeacherPrecision.bf16,
        "eval.precision": None,
        "other.precision": Precision.fp32,
    }
    assert slow_precision(CPU, asked) == f"train.precision, teacher.precision: {SLOW}"
    assert slow_precision(CPU, {"teacher.precision": TeacherPrecision.auto, "train.precision": Precision.fp32}) == ""
    assert slow_precision(torch.device("cuda"), asked) == ""


def test_nothing_is_said_where_it_is_not_slow(monkeypatch):
    monkeypatch.setattr(speed, "bf16_slowdown", lambda: 1.3)
    assert slow_precision(CPU, {"train.precision": Precision.bf16}) == ""


def test_the_measurement_leaves_random_numbers_alone():
    before = torch.random.get_rng_state()
    assert 0 < bf16_slowdown.__wrapped__() < float("inf")
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.usefixtures("slow")
def test_training_and_scoring_say_it(tiny, tmp_path):
    run = tmp_path / "run"
    said = gskd_ok("distill", tiny.recipe, f"output={run}", "train.steps=2", "teacher.precision=bf16").out
    assert said.count(SLOW) == 1
    assert f"teacher.precision: {SLOW}" in said
    assert f"eval.precision: {SLOW}" in gskd_ok("eval", run, "eval.precision=bf16").out
    assert SLOW not in gskd_ok("eval", run).out
    cache = [f"teacher.cache={tmp_path / 'cache'}", "augment.views=1", "train.precision=bf16"]
    assert f"teacher.precision: {SLOW}" in gskd_ok("cache", "build", tiny.recipe, *cache).out
