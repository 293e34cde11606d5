"""The forms of a student that can ship: measured, scored, and what is written is what was scored."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from gskd import GSKDError
from gskd.bench import quantise
from gskd.export import Deployed, export_model, open_onnx
from helpers import assert_refused, gskd, gskd_ok


@pytest.fixture(scope="module")
def measured(tiny, tmp_path_factory):
    output = tmp_path_factory.mktemp("bench") / "files"
    said = gskd_ok("bench", tiny.distilled, "-o", output, "--threads", 1).out
    return output, said, json.loads((output / "bench.json").read_text())


@pytest.mark.slow
def test_all_forms_are_measured_and_scored(tiny, measured):
    output, said, written = measured
    rows = {row["name"]: row for row in written["rows"]}
    assert list(rows) == ["torch", "onnx", "onnx int8"]
    for row in rows.values():
        assert 0 < row["latency"]["median"] <= row["latency"]["p95"]
        assert row["memory"] > 0
        assert row["name"] in said
    assert rows["torch"]["agreement"] == 1
    assert rows["onnx"]["agreement"] >= 0.999
    assert rows["onnx"]["miou"] == pytest.approx(rows["torch"]["miou"], abs=1e-3)
    assert written["environment"]["processor"]
    assert rows["onnx"]["size"] == pytest.approx((output / "student.onnx").stat().st_size / 2**20)


@pytest.mark.slow
def test_the_score_is_that_of_evaluation(tiny, measured, tmp_path):
    """Scored at scale 1, on every image."""
    gskd_ok("eval", tiny.distilled, "--json", tmp_path / "score.json")
    assert measured[2]["rows"][0]["miou"] == pytest.approx(
        json.loads((tmp_path / "score.json").read_text())["miou"], abs=2e-3
    )


@pytest.mark.slow
def test_it_says_where_the_run_was_scored_otherwise(tiny, measured, tmp_path):
    said = gskd_ok("bench", tiny.distilled, "-o", tmp_path / "b", "eval.flip=true", "--images", 1).out
    assert "one pass over whole images at scale 1, which the run itself was not" in " ".join(said.split())
    assert "one pass over" not in measured[1]


@pytest.mark.slow
def test_eight_bits_are_eight_bits(measured):
    import onnx

    output, _, written = measured
    kinds = {
        one.data_type
        for one in onnx.load(output / "student-int8.onnx").graph.initializer
        if one.name.endswith("quantized")
    }
    assert onnx.TensorProto.INT8 in kinds
    sizes = {row["name"]: row["size"] for row in written["rows"]}
    assert sizes["onnx int8"] < 0.8 * sizes["onnx"]
    images = torch.randint(0, 256, (1, 3, 32, 48), dtype=torch.uint8)
    exact, small = (open_onnx(output / name)(images) for name in ("student.onnx", "student-int8.onnx"))
    assert not torch.equal(exact, small)
    assert np.corrcoef(exact.flatten(), small.flatten())[0, 1] > 0.9


def test_a_small_network_of_eight_bits(tmp_path):
    torch.manual_seed(0)
    model = Deployed(
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1)), (0.5,) * 3, (0.5,) * 3
    )
    export_model(model.eval(), tmp_path / "exact.onnx", (32, 32))
    images = [torch.randint(0, 256, (1, 3, 40, 48), dtype=torch.uint8) for _ in range(4)]
    quantise(tmp_path / "exact.onnx", tmp_path / "small.onnx", iter(images))
    exact, small = (open_onnx(tmp_path / name)(images[0]) for name in ("exact.onnx", "small.onnx"))
    assert not torch.equal(exact, small)
    assert (exact - small).abs().mean() < 0.05 * exact.abs().mean()


def test_what_stands_there_stays(tiny, tmp_path):
    (tmp_path / "mine").write_text("mine")
    assert_refused(gskd("bench", tiny.distilled, "-o", tmp_path), "expected a new or empty folder")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_file_that_cannot_be_quantised_is_named(tmp_path):
    (tmp_path / "broken.onnx").write_bytes(b"no network")
    with pytest.raises(GSKDError, match=r"broken\.onnx: cannot be quantised"):
        quantise(tmp_path / "broken.onnx", tmp_path / "out.onnx", iter(()))
