"""Whatever stands in a file of somebody else, reading it ends soon, in a value or in one error of ours."""

import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import gskd
from gskd import GSKDError
from gskd.checkpoint import latest_checkpoint, restore, save_checkpoint
from gskd.models import read_metadata, read_tensors, write_tensors
from gskd.recipe import Recipe, dump_recipe, load_recipe
from gskd.run import Run

SHIPPED = [path.read_text() for path in sorted((Path(gskd.__file__).parent / "recipes").glob("[!c]*.yaml"))]
fuzzed = settings(
    max_examples=40, deadline=5000, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@st.composite
def damaged(draw, content):
    """Bytes with some of them changed, taken out, repeated or put in."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, len(data)))
        kind = draw(st.sampled_from(["change", "cut", "insert", "repeat", "end"]))
        if kind == "change" and at < len(data):
            data[at] ^= draw(st.integers(1, 255))
        elif kind == "cut":
            del data[at : at + draw(st.integers(1, 40))]
        elif kind == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=12) | st.sampled_from(list(WORDS)))
        elif kind == "repeat":
            data[at:at] = data[at : at + draw(st.integers(1, 60))]
        elif kind == "end":
            del data[at:]
    return bytes(data)


WORDS = (
    *(b"*a", b"&a ", b"!!python/object:os.system ", b"${", b"<<: ", b"\n- ", b"{", b"]", b": ", b"? ", b"\t"),
    *(b"1e999", b".nan", b"\xff"),
)


def attempt(read):
    """What reading gives, and what our error says; any other error is the test's."""
    try:
        return read(), ""
    except GSKDError as error:
        return None, str(error)


@fuzzed
@given(st.sampled_from(SHIPPED).flatmap(lambda text: damaged(text.encode())))
@example(b"")
@example(b"\xff\xfe\x00")
@example(b"seed: 1\nseed: 2")
@example(b"train: {steps: 1e400}")
def test_recipes(tmp_path, content):
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    recipe, said = attempt(lambda: load_recipe(path))
    if recipe is None:
        assert said.startswith("recipe ")
    else:
        assert isinstance(recipe, Recipe)
        path.write_text(dump_recipe(recipe), encoding="utf-8")
        assert load_recipe(path) == recipe


@fuzzed
@given(st.lists(st.text(max_size=30) | st.from_regex(r"[a-z._]{1,20}=.{0,20}", fullmatch=True), max_size=3))
def test_overrides(overrides):
    recipe, said = attempt(lambda: load_recipe("scenes", overrides))
    assert isinstance(recipe, Recipe) or said.startswith("recipe scenes: ")


@fuzzed
@given(st.binary(max_size=200))
@example((8).to_bytes(8, "little") + b'{"a":{}}')
@example((2).to_bytes(8, "little") + b"{}")
@example((2).to_bytes(8, "little") + b"[]")
def test_weights_of_any_bytes(tmp_path, content):
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    for read in (read_tensors, read_metadata):
        found, said = attempt(lambda read=read: read(path))
        assert isinstance(found, dict) or "w.safetensors" in said


@fuzzed
@given(st.data())
def test_damaged_weights(tmp_path, data):
    path = tmp_path / "w.safetensors"
    write_tensors({"a": torch.ones(3, 2), "b": torch.zeros(4)}, path, {"step": "3"})
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    found, said = attempt(lambda: read_tensors(path))
    assert "w.safetensors" in said or all(isinstance(tensor, torch.Tensor) for tensor in found.values())


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Two checkpoints of a small model."""
    folder = tmp_path_factory.mktemp("checkpoints")
    model = torch.nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    for step in (1, 2):
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        save_checkpoint(folder, step, model, optimizer, {"best": 0.5})
    return folder


@fuzzed
@given(st.data())
def test_damaged_checkpoints(checkpoints, tmp_path, data):
    """The damaged one is never taken for a whole one: what is used is the one before, or the same bytes."""
    folder = tmp_path / "c"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(checkpoints, folder)
    name = data.draw(st.sampled_from(["manifest.json", "model.safetensors", "optimizer.safetensors"]))
    victim = folder / "step-00000002" / name
    content = data.draw(damaged(victim.read_bytes()))
    same = content == victim.read_bytes()
    victim.write_bytes(content)
    found, lines = latest_checkpoint(folder)
    assert found is not None
    if name == "manifest.json" and found.step == 2:  # white space is no damage
        assert found.state == {"best": 0.5}
    else:
        assert (found.step, len(lines)) == ((2, 0) if same else (1, 1))
    model = torch.nn.Linear(2, 3)
    restore(found, model, torch.optim.AdamW(model.parameters()))


@fuzzed
@given(st.data())
def test_damaged_run_folders(tiny, tmp_path, data):
    folder = tmp_path / "run"
    folder.mkdir(exist_ok=True)
    for name in ("recipe.yaml", "run.json", "result.json", "metrics.jsonl"):
        shutil.copy(tiny.plain / name, folder / name)
    victim = folder / data.draw(st.sampled_from(["run.json", "result.json", "recipe.yaml", "metrics.jsonl"]))
    victim.write_bytes(data.draw(damaged(victim.read_bytes())))
    run = Run(folder)
    for read in (run.load_recipe, run.info, run.read_result, run.read_metrics, lambda: run.drop_metrics_after(2)):
        found, said = attempt(read)
        assert found is None or not said
        assert not said or str(folder) in said
