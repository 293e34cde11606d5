import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def camvid_root() -> Path:
    """CamVid's folder: ``GSKD_CAMVID``, else ``data/camvid`` in the repository or ``shared/data/camvid`` beside it."""
    repository = Path(__file__).resolve().parents[1]
    asked = os.environ.get("GSKD_CAMVID")
    usual = [repository / "data" / "camvid", repository.parent / "shared" / "data" / "camvid"]
    places = [Path(asked)] if asked else usual
    for place in places:
        if (place / "train").is_dir():
            return place
    pytest.skip(
        f"no CamVid in {', '.join(map(str, places))}: set GSKD_CAMVID to the folder that holds train/, trainannot/"
    )
