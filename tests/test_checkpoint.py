import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gskd import checkpoint as module
from gskd.checkpoint import Checkpoint, _digest, latest_checkpoint, restore, save_checkpoint, write_text
from gskd.errors import GSKDError


def network(width: int = 4) -> nn.Module:
    return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 2))


def optimizer_of(model: nn.Module, kind: str) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if kind == "adamw":
        return torch.optim.AdamW(groups, lr=0.1)
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9 if kind == "sgd" else 0.0, nesterov=kind == "sgd")


def train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def save(folder: Path, step: int, keep: int = 9, state: dict[str, Any] | None = None) -> Path:
    torch.manual_seed(step)
    model = network()
    optimizer = optimizer_of(model, "adamw")
    train(model, optimizer, 0, 1)
    return save_checkpoint(folder, step, model, optimizer, state or {"best": step / 7}, keep)


def newest(folder: Path) -> Checkpoint:
    found, damaged = latest_checkpoint(folder)
    assert found is not None
    assert damaged == []
    return found


@pytest.mark.parametrize("kind", ["adamw", "sgd", "plain"])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    model = network()
    optimizer = optimizer_of(model, kind)
    train(model, optimizer, 0, 3)
    save_checkpoint(tmp_path, 3, model, optimizer, {"best": 0.1 + 0.2, "scaler": None})
    train(model, optimizer, 3, 6)

    torch.manual_seed(99)
    other = network()
    fresh = optimizer_of(other, kind)
    found = newest(tmp_path)
    assert (found.step, found.state) == (3, {"best": 0.1 + 0.2, "scaler": None})
    restore(found, other, fresh)
    shutil.rmtree(found.path)  # what was restored must not hang on the files
    train(other, fresh, 3, 6)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    ours, theirs = optimizer.state_dict()["state"], fresh.state_dict()["state"]
    assert ours.keys() == theirs.keys()
    for index, state in ours.items():
        for name, value in state.items():
            assert value is theirs[index].get(name) is None or torch.equal(value, theirs[index][name])


def test_before_the_first_step(tmp_path: Path) -> None:
    model = network()
    save_checkpoint(tmp_path, 0, model, optimizer_of(model, "adamw"), {})
    restore(newest(tmp_path), network(), optimizer_of(network(), "adamw"))


def test_keeps_the_newest(tmp_path: Path) -> None:
    for step in (5, 100, 20):
        save(tmp_path / "a", step)
    assert newest(tmp_path / "a").step == 20  # later ones were damaged, or the run would not have come back to 20
    for step in (5, 20, 100):
        save(tmp_path / "b", step, keep=2)
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == ["step-00000020", "step-00000100"]


def test_a_damaged_later_checkpoint_does_not_push_out_the_whole_one(tmp_path: Path) -> None:
    save(tmp_path, 5)
    (save(tmp_path, 10) / "model.safetensors").unlink()
    save(tmp_path, 8, keep=1)
    assert newest(tmp_path).step == 8


def test_the_same_step_can_be_written_again(tmp_path: Path) -> None:
    save(tmp_path, 5)
    save(tmp_path, 5, state={"best": 1.0})
    assert newest(tmp_path).state == {"best": 1.0}


def test_nothing_there(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "none") == (None, [])
    (tmp_path / "step-00000007.partial").mkdir()
    (tmp_path / "step-00000008").write_text("a file")
    assert latest_checkpoint(tmp_path) == (None, [])


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def edit(sign: bool = True, **changes: Any) -> Any:
    """Changes fields of a manifest; signed, its own hash is right again and only its content is wrong."""

    def change(path: Path) -> None:
        manifest = {k: v for k, v in {**json.loads(path.read_text()), **changes}.items() if v is not ...}
        if sign:
            manifest["digest"] = _digest({k: v for k, v in manifest.items() if k != "digest"})
        path.write_text(json.dumps(manifest))

    return change


DAMAGE = {
    "truncated weights": ("model.safetensors", truncate),
    "flipped byte in the weights": ("model.safetensors", flip_last_byte),
    "flipped byte in the optimiser": ("optimizer.safetensors", flip_last_byte),
    "no weights": ("model.safetensors", Path.unlink),
    "no optimiser": ("optimizer.safetensors", Path.unlink),
    "empty optimiser": ("optimizer.safetensors", lambda path: path.write_bytes(b"")),
    "no manifest": ("manifest.json", Path.unlink),
    "truncated manifest": ("manifest.json", truncate),
    "binary manifest": ("manifest.json", lambda path: path.write_bytes(b"\xff\x00")),
    "manifest is a list": ("manifest.json", lambda path: path.write_text("[]")),
    "manifest is a number": ("manifest.json", lambda path: path.write_text("5")),
    "no hashes": ("manifest.json", edit(sha256=...)),
    "empty hashes": ("manifest.json", edit(sha256={})),
    "odd hashes": ("manifest.json", edit(sha256=[])),
    "no optimiser groups": ("manifest.json", edit(optimizer=...)),
    "another step": ("manifest.json", edit(step=3)),
    "odd step": ("manifest.json", edit(step="x")),
    "no step": ("manifest.json", edit(step=...)),
    "odd state": ("manifest.json", edit(state=None)),
    "another best": ("manifest.json", edit(sign=False, state={"best": 0.9, "seconds": 0.0})),
    "no digest": ("manifest.json", edit(sign=False, digest=...)),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path: Path, kind: str) -> None:
    save(tmp_path, 5)
    path = save(tmp_path, 10)
    file, damage = DAMAGE[kind]
    damage(path / file)
    found, damaged = latest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 5
    assert len(damaged) == 1
    assert str(path) in damaged[0]
    assert "\n" not in damaged[0]


def test_all_damaged(tmp_path: Path) -> None:
    for step in (5, 10):
        truncate(save(tmp_path, step) / "model.safetensors")
    found, damaged = latest_checkpoint(tmp_path)
    assert found is None
    assert [line.count("step-") for line in damaged] == [1, 1]


@pytest.mark.parametrize("failing", ["write_tensors", "write_text", "os.replace"])
def test_full_disk_leaves_the_older_checkpoints_and_nothing_half_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    save(tmp_path, 5, keep=1)

    def full(*args: Any, **kwargs: Any) -> None:
        if failing == "os.replace":
            raise OSError(errno.ENOSPC, "No space left on device")
        raise GSKDError("x: cannot be written: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(f"gskd.checkpoint.{failing}", full)
        with pytest.raises(GSKDError, match="cannot be written: No space left"):
            save(tmp_path, 10, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000005"]
    assert newest(tmp_path).step == 5


def test_a_kill_while_writing_leaves_the_older_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 5)

    class Killed(BaseException):
        pass

    def kill(*args: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_text", kill)
        with pytest.raises(Killed):
            save(tmp_path, 10)
    assert newest(tmp_path).step == 5
    save(tmp_path, 10)
    assert newest(tmp_path).step == 10


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(GSKDError, match="cannot be written"):
        save(tmp_path / "file", 1)
    with pytest.raises(GSKDError, match="cannot be written"):
        write_text(tmp_path / "file" / "a.txt", "x")


def test_write_text_keeps_the_old_text_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(GSKDError, match="No space left"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_another_model_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 5)
    for other in (network(5), nn.Sequential(network()), nn.Linear(3, 2)):
        before = [p.clone() for p in other.parameters()]
        with pytest.raises(GSKDError, match="another model"):
            restore(newest(tmp_path), other, optimizer_of(other, "adamw"))
        assert all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))


@pytest.mark.parametrize(("saved", "own"), [("adamw", "sgd"), ("sgd", "adamw")])
def test_another_optimiser_is_refused_and_the_model_left_alone(tmp_path: Path, saved: str, own: str) -> None:
    model = network()
    optimizer = optimizer_of(model, saved)
    train(model, optimizer, 0, 1)
    save_checkpoint(tmp_path, 1, model, optimizer, {})
    other = network()
    before = [p.clone() for p in other.parameters()]
    with pytest.raises(GSKDError, match="another optimiser"):
        restore(newest(tmp_path), other, optimizer_of(other, own))
    with pytest.raises(GSKDError, match="another optimiser"):
        restore(newest(tmp_path), other, type(optimizer)(other.parameters(), lr=0.1))
    assert all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))


def test_the_state_of_the_optimiser_keeps_the_layout_of_its_parameters(tmp_path: Path) -> None:
    """Files hold contiguous tensors; a state laid out otherwise than its parameter takes the slow path on CUDA."""
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = optimizer_of(model, "adamw")
    model(torch.randn(1, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    save_checkpoint(tmp_path, 2, model, optimizer, {})
    restore(newest(tmp_path), model, optimizer)
    states = [(parameter, state["exp_avg"]) for parameter, state in optimizer.state.items()]
    assert any(not parameter.is_contiguous() for parameter, _ in states)
    assert all(state.stride() == parameter.stride() for parameter, state in states)
