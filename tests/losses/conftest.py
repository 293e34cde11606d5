import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))  # for the oracles, under importlib mode


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def golden():
    return load_file(Path(__file__).parents[1] / "golden" / "kd_losses.safetensors")
