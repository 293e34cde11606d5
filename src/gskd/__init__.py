"""gskd: small semantic-segmentation networks that keep the global structure a large teacher sees.

The public API, re-exports only. In a training loop of your own::

    distiller = Distiller(student, teacher, {"gskd": Term(GSKDLoss(), weight=10)})
"""

import gskd._torchvision  # noqa: F401 (before anyone imports torchvision, timm or smp)

# isort: split
from gskd.architectures import build_model
from gskd.data import IGNORE, Sample, SegmentationDataset
from gskd.distiller import Distillation, Distiller, Term, TermValue
from gskd.errors import GSKDError
from gskd.evaluation import Inference, evaluate, predict
from gskd.layers import auto_tap
from gskd.losses import LOSSES, GSKDLoss, KDLoss, LogitGSKDLoss, MSELoss, Pixels, gskd_loss, kd_loss, mse_loss
from gskd.losses.gskd import class_balanced_sample, structural_similarity_map, sub_image_descriptors
from gskd.metrics import ConfusionMatrix, Score
from gskd.models import load_weights, save_weights
from gskd.outputs import logits_of
from gskd.recipe import Recipe, load_recipe
from gskd.taps import Taps

__version__ = "0.1.0"

__all__ = [
    "IGNORE",
    "LOSSES",
    "ConfusionMatrix",
    "Distillation",
    "Distiller",
    "GSKDError",
    "GSKDLoss",
    "Inference",
    "KDLoss",
    "LogitGSKDLoss",
    "MSELoss",
    "Pixels",
    "Recipe",
    "Sample",
    "Score",
    "SegmentationDataset",
    "Taps",
    "Term",
    "TermValue",
    "auto_tap",
    "build_model",
    "class_balanced_sample",
    "evaluate",
    "gskd_loss",
    "kd_loss",
    "load_recipe",
    "load_weights",
    "logits_of",
    "mse_loss",
    "predict",
    "save_weights",
    "structural_similarity_map",
    "sub_image_descriptors",
]
