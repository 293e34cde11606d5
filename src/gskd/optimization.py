"""Optimisers and learning-rate schedules by name (recipe -> trainer)."""

from __future__ import annotations

import math

import torch
from torch import nn

from gskd.errors import GSKDError
from gskd.recipe import OptimizerName, ScheduleName, TrainRecipe


def learning_rate_factor(step: int, recipe: TrainRecipe) -> float:
    """The share of the peak learning rate at a step, counted from 0.

    ``onecycle`` (Smith and Topin 2018, arXiv 1708.07120, cosine form): from 1/25 up to 1 over the warm-up, then down to
    1/250000. ``poly``: up from 1/1000 over the warm-up, then (1 - t) ** 0.9. ``constant``: up, then 1.
    """
    warmup = round(recipe.warmup * recipe.steps)
    start = {ScheduleName.onecycle: 1 / 25, ScheduleName.poly: 1e-3, ScheduleName.constant: 1e-3}[recipe.schedule]
    if step < warmup:
        t = step / warmup
        rise = (1 - math.cos(math.pi * t)) / 2 if recipe.schedule == ScheduleName.onecycle else t
        return start + (1 - start) * rise
    t = (step - warmup) / max(1, recipe.steps - warmup)
    if recipe.schedule == ScheduleName.onecycle:
        end = 1 / 250_000
        return end + (1 - end) * (1 + math.cos(math.pi * t)) / 2
    return (1 - t) ** 0.9 if recipe.schedule == ScheduleName.poly else 1.0


def build_optimizer(model: nn.Module, recipe: TrainRecipe) -> torch.optim.Optimizer:
    """AdamW or SGD with Nesterov momentum; no weight decay on biases and normalisation (1-D parameters).

    Fused, which is one pass over all parameters instead of a dozen small ones for each: with a small student on a CPU
    that is a twentieth of a step.
    """
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise GSKDError("model: has no parameter that can be trained")
    if recipe.optimizer == OptimizerName.adamw:
        return torch.optim.AdamW(groups, lr=recipe.lr, fused=True)
    nesterov = recipe.momentum > 0
    return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=nesterov, fused=True)
