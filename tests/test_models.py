import errno
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import safe_open
from torch import Tensor, nn

from gskd import models
from gskd.architectures import build_model
from gskd.errors import GSKDError
from gskd.models import (
    check_classes,
    count_parameters,
    freeze,
    load_weights,
    normalise,
    read_tensors,
    save_weights,
    write_tensors,
)

MODULE = """
from torch import nn

class Head(nn.Conv2d):
    def __init__(self, num_classes, width=3):
        super().__init__(width, num_classes, 1)

def fixed():
    return nn.Conv2d(3, 7, 1)

def flexible(**kwargs):
    return nn.Conv2d(3, len(kwargs), 1)

def no_module():
    return 5

number = 5
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "made_up_networks.py").write_text(MODULE)
    (tmp_path / "made_up_broken.py").write_text("{}.missing\n")
    monkeypatch.syspath_prepend(tmp_path)
    return "made_up_networks"


# --- building ---


def test_import_path_gets_the_number_of_classes(package: str) -> None:
    assert build_model(f"{package}:Head", {}, 5).out_channels == 5
    assert build_model(f"{package}:Head", {"num_classes": 6}, 5).out_channels == 6
    assert build_model(f"{package}:fixed", {}, 5).out_channels == 7
    assert build_model(f"{package}:flexible", {"a": 1}, 5).out_channels == 1
    assert build_model(f"{package}:Head", {"num_classes": 2}).out_channels == 2


def test_arguments_are_not_changed(package: str) -> None:
    args: dict[str, Any] = {}
    build_model(f"{package}:Head", args, 5)
    assert args == {}


@pytest.mark.parametrize(
    ("name", "args", "part"),
    [
        ("Unet", {}, "expected smp:Architecture or package.module:callable"),
        (":Unet", {}, "expected smp:Architecture"),
        ("smp:", {}, "expected smp:Architecture"),
        ("no_such_package.networks:Net", {}, "cannot import no_such_package.networks"),
        (".relative:Net", {}, "cannot import .relative"),
        ("made_up_broken:Net", {}, "cannot import made_up_broken: AttributeError"),
        ("made_up_networks:Haed", {}, "has no Haed; did you mean 'Head'"),
        ("made_up_networks:number", {}, "cannot be built"),
        ("made_up_networks:no_module", {}, "expected an nn.Module, no_module returned int"),
        ("made_up_networks:Head", {"widht": 4}, "unexpected keyword argument 'widht'"),
        ("made_up_networks:Head", {"width": -1}, "cannot be built with"),
    ],
)
def test_what_cannot_be_built(package: str, name: str, args: dict[str, Any], part: str) -> None:
    with pytest.raises(GSKDError) as caught:
        build_model(name, args, 5)
    assert part in str(caught.value)
    assert repr(name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_smp() -> None:
    args = {"encoder_name": "resnet18", "encoder_weights": None}
    assert build_model("smp:Unet", args, 4).segmentation_head[0].out_channels == 4
    tagged = {"encoder_name": "tu-resnet18.a1_in1k", "encoder_weights": None, "classes": 4}
    check_classes(build_model("smp:FPN", tagged, 4), 4, "model")
    for name, extra, part in [
        ("smp:DeepLabV3plus", {}, "unknown architecture; did you mean 'DeepLabV3Plus'"),
        ("smp:Unet", {"encoder_name": "resnet19"}, "unknown encoder 'resnet19'; did you mean"),
        ("smp:Unet", {"encoder_name": "tu-mobilenetv3_smal_050"}, "did you mean 'tu-mobilenetv3_small_050'"),
        ("smp:Unet", {"classes": 3}, "args.classes is 3, the data has 4"),
        ("smp:Unet", {"encoder_depht": 3}, "unknown argument 'encoder_depht'; did you mean 'encoder_depth'"),
    ]:
        with pytest.raises(GSKDError) as caught:
            build_model(name, {**args, **extra}, 4)
        assert part in str(caught.value)


# --- small things ---


def test_count_and_freeze() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).train()
    assert count_parameters(model) == 3 * 4 + 4 + 4 + 4
    assert freeze(model) is model
    assert not any(m.training for m in model.modules())
    assert not any(p.requires_grad for p in model.parameters())


def test_normalise_is_the_usual_formula() -> None:
    images = torch.arange(2 * 3 * 4 * 5, dtype=torch.uint8).view(2, 3, 4, 5) * 2
    mean, std = [0.4, 0.5, 0.1], [0.2, 0.3, 1.0]
    expected = (images.double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    result = normalise(images, mean, std)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), expected, atol=1e-6, rtol=1e-6)
    with pytest.raises(ValueError, match="zip"):
        normalise(images, mean, [1.0])


class Head(nn.Module):
    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self.norm, self.other = shape, nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.other.eval()

    def forward(self, x: Tensor) -> Tensor:
        if not self.shape:
            raise RuntimeError("broken")
        return self.norm(x).sum() + torch.zeros(self.shape)


def test_check_classes_leaves_the_model_as_it_was() -> None:
    reasons = {
        (1, 4, 8, 8): None,
        (1, 5, 8, 8): r"logits of shape \(1, 5, 8, 8\); expected \(B, 4",
        (): "broken",
        (1, 4): r"output Tensor has shape \(1, 4\), expected 4-D",
    }
    for shape, reason in reasons.items():
        model = Head(shape)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        if reason is None:
            check_classes(model, 4, "model 'x'")
        else:
            with pytest.raises(GSKDError, match=reason):
                check_classes(model, 4, "model 'x'")
        assert (model.training, model.norm.training, model.other.training) == (True, True, False)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_check_classes_names_both_numbers() -> None:
    with pytest.raises(GSKDError, match=r"model 'x': gives logits of shape \(1, 5, 64, 64\); expected \(B, 4, h, w\)"):
        check_classes(nn.Conv2d(3, 5, 1), 4, "model 'x'")
    check_classes(nn.Conv2d(3, 4, 1).double(), 4, "model")


# --- weights ---


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))


def test_round_trip(tmp_path: Path) -> None:
    model, other = net().to(memory_format=torch.channels_last), net()
    save_weights(model, tmp_path / "a.safetensors", {"step": "7"})
    report = load_weights(other, tmp_path / "a.safetensors")
    assert report.ok
    assert str(report) == "every key matches"
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"step": "7"}
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_tied_expanded_and_empty_tensors(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    save_weights(model, tmp_path / "a.safetensors")
    other = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    other[1].weight = other[0].weight
    load_weights(other, tmp_path / "a.safetensors")
    assert torch.equal(other[0].weight, model[0].weight)
    assert other[1].weight is other[0].weight
    base = torch.arange(6.0).view(2, 3)
    tensors = {"wide": torch.ones(1).expand(4), "turned": base.T, "part": base[:, 1:], "none": torch.zeros(0)}
    write_tensors(tensors, tmp_path / "b.safetensors")
    found = read_tensors(tmp_path / "b.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)
    write_tensors({}, tmp_path / "c.safetensors")
    assert read_tensors(tmp_path / "c.safetensors") == {}


def misfit(path: Path) -> None:
    tensors = {key: value + 1 for key, value in net().state_dict().items()}
    del tensors["0.bias"], tensors["1.running_var"]
    tensors["0.weight"] = torch.zeros(4, 3, 3, 3)
    write_tensors({**tensors, "2.extra": torch.zeros(1)}, path)


def test_misfit_is_refused_in_full_and_changes_nothing(tmp_path: Path) -> None:
    misfit(tmp_path / "a.safetensors")
    model = net()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(GSKDError) as caught:
        load_weights(model, tmp_path / "a.safetensors")
    for part in (
        "a.safetensors",
        "2 missing (0.bias, 1.running_var)",
        "1 unexpected (2.extra)",
        "1 of another shape or kind (0.weight: (4, 3, 3, 3) in the file, (4, 3, 1, 1) in the model)",
    ):
        assert part in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_weights_of_another_network_are_counted_and_not_all_listed(tmp_path: Path) -> None:
    write_tensors({f"layer{k}.weight": torch.zeros(1) for k in range(300)}, tmp_path / "other.safetensors")
    with pytest.raises(GSKDError, match=r"300 unexpected \(layer0.weight, .* and 295 more\)") as caught:
        load_weights(net(), tmp_path / "other.safetensors")
    assert len(str(caught.value)) < 500


def test_weights_may_be_read_by_whom_other_new_files_may(tmp_path: Path) -> None:
    save_weights(net(), tmp_path / "a.safetensors")
    (tmp_path / "other").touch()
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_whole_numbers_are_no_weights(tmp_path: Path) -> None:
    """Of a quantised network: cast to float they fit, and mean nothing without their scales."""
    tensors = {**net().state_dict(), "0.weight": torch.ones(4, 3, 1, 1, dtype=torch.int8)}
    write_tensors(tensors, tmp_path / "a.safetensors")
    with pytest.raises(GSKDError, match=r"1 of another shape or kind \(0.weight: int8 in the file, float32"):
        load_weights(net(), tmp_path / "a.safetensors")
    write_tensors({k: v.half() if v.is_floating_point() else v for k, v in net().state_dict().items()}, tmp_path / "h")
    assert load_weights(net(), tmp_path / "h").ok


def test_what_fits_is_loaded_where_asked(tmp_path: Path) -> None:
    misfit(tmp_path / "a.safetensors")
    model = net()
    weight = model[0].weight.clone()
    report = load_weights(model, tmp_path / "a.safetensors", strict=False)
    assert not report.ok
    assert (report.missing, report.unexpected) == (("0.bias", "1.running_var"), ("2.extra",))
    assert report.misshapen[0].startswith("0.weight: ")
    assert torch.equal(model[1].weight, torch.full((4,), 2.0))
    assert torch.equal(model[0].weight, weight)


def test_files_that_hold_no_weights(tmp_path: Path) -> None:
    good = tmp_path / "good.safetensors"
    save_weights(net(), good)
    data = good.read_bytes()
    pickled = tmp_path / "pickled.pt"
    torch.save(net().state_dict(), pickled)
    bad = {
        "empty": b"",
        "truncated": data[:-1],
        "headless": data[:4],
        "huge header": struct.pack("<Q", 2**62) + data[8:],
        "not json": struct.pack("<Q", 4) + b"abcd",
        "longer": data + b"x",
        "pickle": pickled.read_bytes(),
    }
    for name, content in bad.items():
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(content)
        with pytest.raises(GSKDError, match=f"{name}.safetensors: not a whole safetensors file"):
            load_weights(net(), path)
    for path in (tmp_path, tmp_path / "none.safetensors", good / "below"):
        with pytest.raises(GSKDError, match="no such file"):
            load_weights(net(), path)


@pytest.mark.parametrize("failing", ["save_file", "os.fsync", "os.replace"])
def test_a_failing_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    path = tmp_path / "a.safetensors"
    model = net()
    save_weights(model, path)
    old = path.read_bytes()

    def full(*args: Any, **kwargs: Any) -> None:
        if failing == "save_file":
            Path(args[1]).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(f"gskd.models.{failing}", full)
        with pytest.raises(GSKDError, match=r"a\.safetensors: cannot be written: No space left on device"):
            save_weights(net(), path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_not_there_or_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for parent in ("none", "file"):
        with pytest.raises(GSKDError, match="cannot be written"):
            save_weights(net(), tmp_path / parent / "a.safetensors")


def test_reports_are_plain() -> None:
    report = models.WeightsReport(("a",), (), ("b: (1,) in the file, (2,) in the model",))
    assert str(report) == "1 missing (a); 1 of another shape or kind (b: (1,) in the file, (2,) in the model)"
    assert json.dumps(report.missing)


def test_weights_that_may_not_be_read_are_one_error(tmp_path, monkeypatch):
    """What is wrong with them cannot be looked at either."""
    path = tmp_path / "w.safetensors"
    path.write_bytes(b"of somebody else")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(GSKDError, match=r"w\.safetensors: not a whole safetensors file"):
        load_weights(torch.nn.Linear(2, 2), path)
