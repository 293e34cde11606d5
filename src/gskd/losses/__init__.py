"""Losses: what the student should learn from the teacher (taps -> losses -> distiller).

A loss is an ``nn.Module`` called as ``term(student, teacher, pixels)`` with maps (B, C, h, w) and a ``Pixels`` record.
It returns a scalar: a mean over what counts, over all processes. Its class attribute ``inputs`` says which maps it
takes by default, "features" or "logits". Its maths is also a pure function beside it.
"""

from __future__ import annotations

from torch import nn

from gskd.losses._pixels import Pixels
from gskd.losses.features import MSELoss, mse_loss
from gskd.losses.gskd import GSKDLoss, gskd_loss
from gskd.losses.logits import KDLoss, kd_loss

LOSSES: dict[str, type[nn.Module]] = {"gskd": GSKDLoss, "kd": KDLoss, "mse": MSELoss}
"""Name in a recipe -> class. Add a loss by adding a line."""

__all__ = ["LOSSES", "GSKDLoss", "KDLoss", "MSELoss", "Pixels", "gskd_loss", "kd_loss", "mse_loss"]
