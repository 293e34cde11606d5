"""The loops of other people in docs/loops.md, as they stand there."""

import re
from pathlib import Path

import pytest
import torch

PAGE = (Path(__file__).parents[1] / "docs" / "loops.md").read_text(encoding="utf-8")
SETUP = re.search(r"```python setup\n(.*?)```", PAGE, re.DOTALL)[1]
LOOPS = dict(re.findall(r"^## (.*?)\n+```python\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE))


def test_all_are_found():
    assert list(LOOPS) == ["PyTorch", "Accelerate", "Lightning", "transformers", "Without the distiller"]


@pytest.mark.filterwarnings("ignore")  # of the frameworks, about loaders without processes
@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_trains_the_student_and_leaves_the_teacher(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {}
    exec(SETUP, names)
    student, teacher = names["student"], names["teacher"]
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    weights = [p.detach().clone() for p in student.parameters()]
    exec(LOOPS[name], names)
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    if name == "Without the distiller":
        assert any(p.grad is not None and p.grad.any() for p in student.parameters())
    else:
        assert any(not torch.equal(p, old) for p, old in zip(student.parameters(), weights, strict=True))
        assert not any(p.requires_grad for p in teacher.parameters())
