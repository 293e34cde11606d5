"""Losses: what the student should learn from the teacher (taps -> losses -> distiller).

A loss is an ``nn.Module`` called as ``term(student, teacher, pixels)`` with maps (B, C, h, w), or sequences of maps
where it compares several layers, and a ``Pixels`` record. It returns a scalar: a mean over what counts, over all
processes. Its class attribute ``inputs`` says which maps it takes by default: "features", "logits" or "levels". Its
maths is also a pure function beside it.
"""

from __future__ import annotations

from torch import nn

from gskd.losses._pixels import Pixels
from gskd.losses.adversarial import AdversarialLoss
from gskd.losses.cross_image import CIRKDLoss, CIRKDMemoryLoss, cross_image_loss, memory_loss
from gskd.losses.features import ATLoss, AttnFDLoss, CWDLoss, MSELoss, at_loss, attnfd_loss, cwd_loss, mse_loss
from gskd.losses.generative import AFDCDLoss, MGDLoss, omni_contrast
from gskd.losses.gskd import GSKDLoss, gskd_loss
from gskd.losses.gskd_logits import LogitGSKDLoss
from gskd.losses.logits import BPKDLoss, DISTLoss, KDLoss, bpkd_loss, dist_loss, kd_loss
from gskd.losses.relations import (
    CSDLoss,
    IFVDLoss,
    PSDLoss,
    SKDLoss,
    csd_loss,
    ifvd_loss,
    pairwise_loss,
    psd_loss,
)
from gskd.losses.top_classes import TopKDLoss, top_kd_loss

LOSSES: dict[str, type[nn.Module]] = {
    "gskd": GSKDLoss,
    "gskd_logits": LogitGSKDLoss,
    "kd": KDLoss,
    "kd_top": TopKDLoss,
    "mse": MSELoss,
    "at": ATLoss,
    "skd": SKDLoss,
    "adversarial": AdversarialLoss,
    "ifvd": IFVDLoss,
    "cwd": CWDLoss,
    "psd": PSDLoss,
    "csd": CSDLoss,
    "cirkd": CIRKDLoss,
    "cirkd_memory": CIRKDMemoryLoss,
    "dist": DISTLoss,
    "mgd": MGDLoss,
    "afdcd": AFDCDLoss,
    "bpkd": BPKDLoss,
    "attnfd": AttnFDLoss,
}
"""Name in a recipe -> class. Add a loss by adding a line."""

__all__ = [
    "LOSSES",
    "AFDCDLoss",
    "ATLoss",
    "AdversarialLoss",
    "AttnFDLoss",
    "BPKDLoss",
    "CIRKDLoss",
    "CIRKDMemoryLoss",
    "CSDLoss",
    "CWDLoss",
    "DISTLoss",
    "GSKDLoss",
    "IFVDLoss",
    "KDLoss",
    "LogitGSKDLoss",
    "MGDLoss",
    "MSELoss",
    "PSDLoss",
    "Pixels",
    "SKDLoss",
    "TopKDLoss",
    "at_loss",
    "attnfd_loss",
    "bpkd_loss",
    "cross_image_loss",
    "csd_loss",
    "cwd_loss",
    "dist_loss",
    "gskd_loss",
    "ifvd_loss",
    "kd_loss",
    "memory_loss",
    "mse_loss",
    "omni_contrast",
    "pairwise_loss",
    "psd_loss",
    "top_kd_loss",
]
