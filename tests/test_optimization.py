import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gskd.errors import GSKDError
from gskd.optimization import build_optimizer, learning_rate_factor
from gskd.recipe import OptimizerName, ScheduleName, TrainRecipe
from gskd.trainer import seed_step


def factors(schedule: ScheduleName, steps: int, warmup: float) -> list[float]:
    recipe = TrainRecipe(steps=steps, schedule=schedule, warmup=warmup)
    return [learning_rate_factor(step, recipe) for step in range(steps)]


@settings(max_examples=100, deadline=None)
@given(schedule=st.sampled_from(ScheduleName), steps=st.integers(1, 300), warmup=st.floats(0, 0.999))
def test_rises_to_the_peak_then_never_rises_again(schedule: ScheduleName, steps: int, warmup: float) -> None:
    values = factors(schedule, steps, warmup)
    peak = round(warmup * steps)
    assert all(isinstance(value, float) and 0 < value <= 1 for value in values)
    assert all(a < b for a, b in itertools.pairwise(values[: peak + 1]))
    assert all(a >= b for a, b in itertools.pairwise(values[peak:]))
    if peak < steps:
        assert values[peak] == 1.0


@pytest.mark.parametrize("schedule", ScheduleName)
def test_without_warmup_the_first_step_has_the_full_rate(schedule: ScheduleName) -> None:
    assert factors(schedule, 10, 0.0)[0] == 1.0
    assert factors(schedule, 1, 0.1) == [1.0]


def test_ends() -> None:
    assert factors(ScheduleName.onecycle, 100, 0.1)[0] == pytest.approx(1 / 25)
    assert factors(ScheduleName.poly, 100, 0.1)[0] == pytest.approx(1e-3)
    assert factors(ScheduleName.constant, 100, 0.1)[-1] == 1.0
    assert factors(ScheduleName.poly, 100, 0.0)[-1] == pytest.approx(0.01**0.9)
    end = learning_rate_factor(100, TrainRecipe(steps=100, schedule=ScheduleName.onecycle))
    assert end == pytest.approx(1 / 250_000)


def test_onecycle_is_that_of_torch() -> None:
    steps, warmup = 50, 10
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    # torch puts its peak at pct_start * total_steps - 1 and its end at total_steps - 1: one step earlier than here.
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1.0, total_steps=steps + 1, pct_start=(warmup + 1) / (steps + 1), cycle_momentum=False
    )
    for ours in factors(ScheduleName.onecycle, steps, warmup / steps):
        assert ours == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1, bias=False))


def test_every_trainable_parameter_once_and_no_decay_on_vectors() -> None:
    model = network()
    model[2].requires_grad_(False)
    optimizer = build_optimizer(model, TrainRecipe(weight_decay=0.3, lr=0.5))
    assert isinstance(optimizer, torch.optim.AdamW)
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert decay == {
        id(model[0].weight): 0.3,
        id(model[0].bias): 0.0,
        id(model[1].weight): 0.0,
        id(model[1].bias): 0.0,
    }
    assert {g["lr"] for g in optimizer.param_groups} == {0.5}


def test_shared_parameters_are_updated_once() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    optimizer = build_optimizer(model, TrainRecipe())
    assert sum(len(g["params"]) for g in optimizer.param_groups) == 3


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd(momentum: float) -> None:
    optimizer = build_optimizer(network(), TrainRecipe(optimizer=OptimizerName.sgd, momentum=momentum))
    assert isinstance(optimizer, torch.optim.SGD)
    assert {(g["momentum"], g["nesterov"]) for g in optimizer.param_groups} == {(momentum, momentum > 0)}


def test_groups_without_parameters_are_left_out() -> None:
    assert len(build_optimizer(nn.Conv2d(1, 1, 1, bias=False), TrainRecipe()).param_groups) == 1
    assert len(build_optimizer(nn.BatchNorm2d(3), TrainRecipe()).param_groups) == 1
    with pytest.raises(GSKDError, match="no parameter"):
        build_optimizer(network().requires_grad_(False), TrainRecipe())


def test_each_step_has_its_own_randomness() -> None:
    def draw(*key: int) -> tuple[float, ...]:
        seed_step(*key)
        return tuple(torch.rand(4).tolist())

    keys = [(seed, step, rank) for seed in (0, 1, 2**63 - 1) for step in (0, 1, 2) for rank in (0, 1)]
    drawn = {draw(*key) for key in keys}
    assert len(drawn) == len(keys)
    assert draw(1, 2) == draw(1, 2, 0)
