"""Files of others cannot run code, reach out of their folder or hang the machine."""

import json
import os
import pickle
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file

from gskd import GSKDError
from gskd.architectures import build_model
from gskd.conversion import convert_weights
from gskd.models import load_weights
from gskd.recipe import load_recipe
from helpers import TINY_UNET, assert_refused, gskd, gskd_ok, snapshot, spawn, write_recipe

MODULE = """
import pathlib, torch
pathlib.Path({trace!r}).write_text("imported")

def network(num_classes, width=4):
    return torch.nn.Sequential(torch.nn.Conv2d(3, width, 3, padding=1), torch.nn.Conv2d(width, num_classes, 1))
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module that leaves a trace when it is imported, and its name."""
    name, trace = f"networks_{tmp_path.name.replace('-', '_')}", tmp_path / "trace"
    (tmp_path / f"{name}.py").write_text(MODULE.format(trace=str(trace)))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("GSKD_ALLOW_IMPORTS", raising=False)
    return name, trace


@pytest.mark.parametrize("command", ["train", "distill"])
def test_a_recipe_imports_nothing_unless_it_is_allowed(tiny, module, tmp_path, command):
    name, trace = module
    model = {"name": f"{name}:network"}
    recipe = write_recipe(
        tmp_path / "r.yaml", tmp_path / "run", model=model, teacher={"run": str(tiny.teacher)}, terms={"kd": {}}
    )
    assert_refused(gskd(command, recipe), f"model.name: {name}:network", "--allow-imports")
    assert not trace.exists()
    assert not (tmp_path / "run").exists()
    gskd_ok(command, recipe, "train.steps=2", "--allow-imports")
    assert trace.exists()
    assert "GSKD_ALLOW_IMPORTS" not in os.environ


def test_the_environment_can_allow_it(tiny, module, tmp_path, monkeypatch):
    monkeypatch.setenv("GSKD_ALLOW_IMPORTS", "1")
    recipe = write_recipe(tmp_path / "r.yaml", tmp_path / "run", model={"name": f"{module[0]}:network"})
    gskd_ok("train", recipe, "train.steps=1")


def test_a_run_of_somebody_else_imports_nothing_either(tiny, module, tmp_path):
    name, trace = module
    run = tmp_path / "run"
    recipe = write_recipe(tmp_path / "r.yaml", run, model={"name": f"{name}:network"})
    gskd_ok("train", recipe, "train.steps=1", "--allow-imports")
    trace.unlink()
    assert_refused(gskd("eval", run), "model.name", "--allow-imports")
    assert_refused(gskd("predict", run, tmp_path, "-o", tmp_path / "out"))
    student = write_recipe(tmp_path / "s.yaml", tmp_path / "student", teacher={"run": str(run)}, terms={"kd": {}})
    assert_refused(gskd("distill", student), "--allow-imports")
    named = {"model": {"name": f"{name}:network", "weights": str(run)}}
    student = write_recipe(tmp_path / "t.yaml", tmp_path / "student", teacher=named, terms={"kd": {}})
    assert_refused(gskd("distill", student), "teacher.model.name", "--allow-imports")
    assert not trace.exists()
    gskd_ok("eval", run, "--allow-imports")


def test_python_code_may_build_what_it_names(module):
    assert isinstance(build_model(f"{module[0]}:network", num_classes=3), torch.nn.Module)


class Code:
    """Runs when it is unpickled."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return (open, (self.trace, "w"))


@pytest.mark.parametrize("suffix", ["pth", "safetensors", "bin"])
def test_a_pickle_is_not_loaded(tiny, tmp_path, suffix):
    weights, trace = tmp_path / f"w.{suffix}", tmp_path / "trace"
    weights.write_bytes(pickle.dumps(Code(trace)))
    recipe = write_recipe(tmp_path / "r.yaml", tmp_path / "run", model={**TINY_UNET, "weights": str(weights)})
    assert_refused(gskd("train", recipe), f"w.{suffix}: not a whole safetensors file", "gskd convert")
    reason = "cannot read it" if suffix == "safetensors" else "more than tensors"
    assert_refused(gskd("convert", weights, "-o", tmp_path / "o.safetensors"), f"w.{suffix}", reason)
    torch.save({"state_dict": Code(trace)}, weights)
    assert_refused(gskd("convert", weights, "-o", tmp_path / "o.safetensors"), f"w.{suffix}", reason)
    assert not trace.exists()
    assert not (tmp_path / "o.safetensors").exists()


@pytest.mark.parametrize(
    ("wrap", "options"),
    [
        (lambda state: state, []),
        (lambda state: {"state_dict": state, "epoch": 3}, []),
        (lambda state: {"model": {f"module.{key}": value for key, value in state.items()}, "args": [1]}, []),
        (lambda state: {f"_orig_mod.{key}": value for key, value in state.items()}, []),
        (
            lambda state: {"nets": {"ema": {f"net.{k}": v for k, v in state.items()}}},
            ["--key=nets.ema", "--strip=net."],
        ),
        (lambda state: {"teacher": state, "student": {}}, ["--key=teacher"]),
        # As the documentation says it, although that prefix comes off by itself.
        (lambda state: {f"module.{key}": value for key, value in state.items()}, ["--strip=module."]),
        (lambda state: {f"module.net.{key}": value for key, value in state.items()}, ["--strip=net."]),
        (lambda state: {f"net.module.{key}": value for key, value in state.items()}, ["--strip=net."]),
    ],
)
def test_weights_of_torch_save_become_safetensors(tmp_path, wrap, options):
    state = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1), torch.nn.BatchNorm2d(2)).state_dict()
    torch.save(wrap(state), tmp_path / "w.pth")
    said = gskd_ok("convert", tmp_path / "w.pth", "-o", tmp_path / "w.safetensors", *options)
    assert "7 tensors" in said.out
    found = load_file(tmp_path / "w.safetensors")
    assert found.keys() == state.keys()
    assert all(found[key].equal(state[key]) for key in state)
    before = (tmp_path / "w.safetensors").read_bytes()
    assert_refused(gskd("convert", tmp_path / "w.pth", "-o", tmp_path / "w.safetensors", *options), "exists already")
    assert (tmp_path / "w.safetensors").read_bytes() == before


def test_tensors_that_stand_deeper_are_named_where_they_are_left_out(tmp_path):
    content = {"w": torch.ones(1), "ema": {"decay": 0.9, "shadow": {"w": torch.ones(1)}}, "step": 3}
    torch.save(content, tmp_path / "w.pth")
    said = gskd_ok("convert", tmp_path / "w.pth", "-o", tmp_path / "w.safetensors").out
    assert "1 tensor" in said
    assert "left out: ema.shadow" in said
    assert list(load_file(tmp_path / "w.safetensors")) == ["w"]


@pytest.mark.parametrize(
    ("tensor", "what"),
    [
        (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "quantised"),
        (lambda: torch.eye(2).to_sparse(), "sparse"),
        (lambda: torch.ones(2, device="meta"), "without its values"),
        (lambda: torch.ones(2, dtype=torch.complex128), "complex128"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor")
def test_a_tensor_that_safetensors_cannot_hold_is_named(tmp_path, tensor, what):
    torch.save({"a": torch.ones(1), "layer.weight": tensor()}, tmp_path / "w.pth")
    before = snapshot(tmp_path)
    refused = gskd("convert", tmp_path / "w.pth", "-o", tmp_path / "w.safetensors")
    assert_refused(refused, "w.pth: layer.weight", what)
    assert snapshot(tmp_path) == before


def test_what_cannot_be_converted_says_why(tmp_path):
    torch.save({"a": {"w": torch.ones(1)}, "b": {"w": torch.ones(1)}}, tmp_path / "two.pth")
    with pytest.raises(GSKDError, match=r"two.pth: .*--key.*'a', 'b'"):
        convert_weights(tmp_path / "two.pth", tmp_path / "o.safetensors")
    with pytest.raises(GSKDError, match=r"no key 'c'.*known: 'a', 'b'"):
        convert_weights(tmp_path / "two.pth", tmp_path / "o.safetensors", key="c")
    with pytest.raises(GSKDError, match=r"no key begins with 'x\.'"):
        convert_weights(tmp_path / "two.pth", tmp_path / "o.safetensors", key="a", strip="x.")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(GSKDError, match=r"list.pth: holds no tensors by name, found a list"):
        convert_weights(tmp_path / "list.pth", tmp_path / "o.safetensors")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(GSKDError, match=r"text.pth"):
        convert_weights(tmp_path / "text.pth", tmp_path / "o.safetensors")
    with pytest.raises(GSKDError, match=r"none.pth: no such file"):
        convert_weights(tmp_path / "none.pth", tmp_path / "o.safetensors")
    assert not (tmp_path / "o.safetensors").exists()


def header(length, text):
    return length.to_bytes(8, "little") + text.encode()


TENSOR = '"dtype":"F32","shape":[2],"data_offsets":[0,8]'


@pytest.mark.parametrize(
    "content",
    [
        header(2**62, "{}"),
        header(2**31, "{}"),
        header(100, "{}"),
        header(0, ""),
        header(len(TENSOR) + 10, f'{{"w":{{{TENSOR}}}}}') + b"\0" * 3,
        header(73, '{"w":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}'),
        header(66, '{"w":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}' + " " * 11) + b"\0" * 8,
        header(56, '{"w":{"dtype":"F32","shape":[2,-1],"data_offsets":[0,8]}}') + b"\0" * 8,
        header(4, "[[[["),
        b"",
    ],
)
def test_a_lying_safetensors_header(tmp_path, content):
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    with pytest.raises(GSKDError, match=r"w\.safetensors: not a whole safetensors file"):
        load_weights(torch.nn.Linear(2, 2), path)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("data.options.images", "../../elsewhere"),
        ("data.options.masks", "/etc"),
        ("data.options.masks", "masks/../../x"),
        ("data.train", "../../elsewhere"),
    ],
)
def test_a_dataset_stays_below_its_root(tmp_path, where, value):
    recipe = write_recipe(
        tmp_path / "r.yaml",
        tmp_path / "run",
        data={"dataset": "folder", "root": str(tmp_path), "options": {"classes": ["a", "b"]}},
    )
    assert_refused(gskd("train", recipe, f"{where}={value}"), value, "below the dataset's root")


def test_a_checkpoint_cannot_name_other_files(tiny, tmp_path):
    """The manifest is looked up by the names of the two files, whatever else it lists."""
    run = tmp_path / "run"
    shutil.copytree(tiny.plain, run)
    (run / "result.json").unlink()
    for manifest in run.glob("checkpoints/*/manifest.json"):
        content = json.loads(manifest.read_text())
        content["sha256"] = {"../../../secret": "0" * 64}
        manifest.write_text(json.dumps(content))
    said = gskd_ok("train", tiny.recipe, f"output={run}", "train.tensorboard=true", "--resume")
    assert "resumed at step 0" in said.out
    assert said.out.count("is damaged and skipped") == 2


def bomb(levels):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    "text",
    [
        bomb(12),
        "model:\n  args:\n" + "\n".join(f"    {line}" for line in bomb(12).splitlines()),
        "&a [*a]",
        "a: &a {b: *a}",
        "model: &a {args: *a}",
        "{" * 5000,
        "[" * 100_000,
        "a: " + "9" * 10_000,
        "? " * 20_000,
        "!!python/object/apply:os.system ['true']",
        "!!python/name:os.system",
        "model: !!python/object/new:os.system [x]",
        "<<: &x {<<: *x}",
    ],
    ids=range(13),
)
def test_a_recipe_cannot_hang_the_machine_or_make_objects(tmp_path, text):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    begun = time.monotonic()
    with pytest.raises(GSKDError) as error:
        load_recipe(path)
    assert time.monotonic() - begun < 5
    assert len(str(error.value)) < 2000


def test_a_file_in_the_working_folder_hides_no_package(tiny, tmp_path):
    """The folder is searched for a recipe's module, last, and only where imports are allowed."""
    (tmp_path / "json.py").write_text("raise SystemExit(99)")
    (tmp_path / "torch.py").write_text("raise SystemExit(99)")
    process = spawn("train", tmp_path / "none.yaml", launcher=("-P", "-m", "gskd.cli"), cwd=tmp_path)
    _, err = process.communicate(timeout=120)
    assert (process.returncode, "none.yaml: no such file" in err) == (2, True), err
