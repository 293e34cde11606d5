"""Class names and colours that more than one dataset shares; label index is the position in the tuple."""

from __future__ import annotations

from typing import Final

import numpy as np

CAMVID_CLASSES: Final[tuple[str, ...]] = (
    "sky",
    "building",
    "pole",
    "road",
    "pavement",
    "tree",
    "sign",
    "fence",
    "car",
    "pedestrian",
    "bicyclist",
)
"""The 11 classes CamVid is scored on, in the order of the SegNet release (Badrinarayanan et al., 2017)."""

CAMVID_PALETTE: Final[np.ndarray] = np.array(
    [
        (128, 128, 128),
        (128, 0, 0),
        (192, 192, 128),
        (128, 64, 128),
        (0, 0, 192),
        (128, 128, 0),
        (192, 128, 128),
        (64, 64, 128),
        (64, 0, 128),
        (64, 64, 0),
        (0, 128, 192),
    ],
    dtype=np.uint8,
)
"""(11, 3) uint8 RGB: the colour CamVid itself (Brostow et al., 2009) gives each class's namesake. Read-only."""
CAMVID_PALETTE.setflags(write=False)
