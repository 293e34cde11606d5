"""Lets torchvision be imported beside a torch build it was not linked against.

The torchvision wheel on PyPI is linked against CUDA torch. Beside a CPU-only torch its compiled operators do not load,
and ``import torchvision`` stops with "operator torchvision::nms does not exist", because it registers fakes for
operators that are not there. Declaring their schemas first is enough for everything this package uses
(``transforms.v2``, and through it timm and segmentation-models-pytorch). Import this module before any of those; it
does nothing where torchvision is healthy.
"""

from __future__ import annotations

import sys

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library: torch.library.Library | None = None  # kept alive: the schemas go when it is collected


def _declare_missing_operators() -> None:
    global _library
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name in [m for m in sys.modules if m == "torchvision" or m.startswith("torchvision.")]:
            del sys.modules[name]  # half-imported: must start afresh
        _library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        for schema in _SCHEMAS:
            _library.define(schema)  # type: ignore[no-untyped-call]
        import torchvision  # noqa: F401


_declare_missing_operators()
