"""What the documentation says can be done: commands that exist, recipes that parse, Python that runs, a site without a
dead link."""

import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn
from typer.main import get_command

from gskd.cli import app
from gskd.comparison import load_comparison
from gskd.recipe import load_recipe, parse_recipe

ROOT = Path(__file__).parents[1]
PAGES = sorted([*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md")])
LOOPS = ROOT / "docs" / "loops.md"  # run by test_loops.py
BLOCKS = [
    (page, *block)
    for page in PAGES
    for block in re.findall(r"^```(\w*).*?\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
]
COMMANDS = [
    (page.name, line.split(" #")[0].strip())
    for page, language, text in BLOCKS
    if language in ("", "bash", "sh")
    for line in text.splitlines()
    if re.match(r"\s*gskd ", line)
]
PYTHON = [(page.name, text) for page, language, text in BLOCKS if language == "python" and page != LOOPS]
YAML = [(page.name, text) for page, language, text in BLOCKS if language == "yaml"]
SETTINGS = re.compile(r"[a-z_]+(\.[a-z_0-9]+)*=.*")


def test_there_is_something_of_each_kind():
    assert len(COMMANDS) > 20
    assert len(PYTHON) > 1
    assert len(YAML) > 2


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_a_command_is_one_that_there_is(page, line):
    """Its verb, its options, and every field that it changes."""
    command, words = get_command(app), shlex.split(line)[1:]
    while hasattr(command, "commands"):
        assert words[0] in command.commands, line
        verb, command = words[0], command.commands[words.pop(0)]
    known = {option for parameter in command.params for option in parameter.opts}
    options = [word.split("=")[0] for word in words if word.startswith("-")]
    assert [option for option in options if option not in known] == []
    changes = [word for word in words if SETTINGS.fullmatch(word)]
    named = next((word for word in words if not word.startswith("-")), "")
    if verb in ("train", "distill", "build", "verify", "check") and "/" not in named and named.islower():
        load_recipe(named, changes)
    elif verb == "compare" and named.startswith("compare_"):
        load_comparison(named, changes)


@cache
def output_of(verb, name):
    return str(load_comparison(name).output if verb == "compare" else load_recipe(name).output)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_run_that_is_used_is_one_that_was_made(page):
    """In the commands of a page: what eval, report and the like name is an output of train, distill or compare."""
    made, used = set(), []
    for name, line in COMMANDS:
        words = shlex.split(line)[1:]
        if name == page.name and words[0] in ("train", "distill", "compare"):
            changes = [word for word in words if SETTINGS.fullmatch(word)]
            outputs = [word.removeprefix("output=") for word in changes if word.startswith("output=")]
            if not outputs and "/" not in words[1] and words[1].islower():
                outputs = [output_of(words[0], words[1])]
            made |= set(outputs)
        elif name == page.name:
            used += [word for word in words if word.startswith("runs/")]
    if made:
        assert [run for run in used if run not in made] == []


@pytest.mark.parametrize(("page", "text"), YAML)
def test_a_recipe_is_read_without_complaint(page, text, tmp_path):
    tree = yaml.safe_load(text)
    if "variants" in tree:
        (tmp_path / "comparison.yaml").write_text(text)
        load_comparison(tmp_path / "comparison.yaml")
    else:
        parse_recipe({"output": "runs/x", "model": {"name": "smp:Unet"}, **tree}, source=page)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_terms_inside_a_sentence_are_read(page):
    for text in re.findall(r"`(terms: .*?)`", page.read_text(encoding="utf-8")):
        parse_recipe({"output": "runs/x", "model": {"name": "smp:Unet"}, **yaml.safe_load(text)}, source=page.name)


class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.decoder = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.classifier = nn.Sequential(nn.Identity(), nn.Identity(), nn.Identity(), nn.Conv2d(width, 4, 1))

    def forward(self, images):
        return self.classifier(self.decoder(images))


@pytest.mark.parametrize(("page", "text"), PYTHON)
def test_python_runs(page, text, monkeypatch):
    """With student, teacher and loader as the text has them."""
    from gskd import build_model

    torch.manual_seed(0)
    small = {"encoder_weights": None, "decoder_channels": [8, 8, 8, 8, 8]}
    student, teacher = (build_model("smp:Unet", {"encoder_name": "resnet18", **small}, 4) for _ in range(2))
    if 'teacher="classifier' in text:
        student, teacher = Net(6), Net(8)
    labels = torch.randint(0, 4, (2, 32, 32))
    loader = [(torch.randn(2, 3, 32, 32), labels)] * 2
    before = [parameter.clone() for parameter in student.parameters()]
    exec(text, {"student": student, "teacher": teacher, "loader": loader, "torch": torch})
    stepped = "optimizer.step()" in text
    assert any(p.grad is not None for p in student.parameters()) or stepped
    changed = any(not torch.equal(p, old) for p, old in zip(student.parameters(), before, strict=True))
    assert changed == stepped


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """On the hosting page as well as in the site: to files, and to headings in them."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not re.match(r"https?:|mailto:", target):
            file, _, heading = target.partition("#")
            found = (page.parent / file).resolve() if file else page
            assert found.exists(), f"{page.name}: {target}"
            if heading:
                titles = re.findall(r"^#+ (.*)$", found.read_text(encoding="utf-8"), re.MULTILINE)
                slugs = [re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles]
                assert heading in slugs, f"{page.name}: {target}"


def test_the_site_is_built_without_a_warning(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={"PATH": "", "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT / "src")},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {path.stem for path in (tmp_path / "site").glob("*.html")}
    assert {page.stem for page in (ROOT / "docs").glob("*.md")} <= pages
    api = (tmp_path / "site" / "api.html").read_text(encoding="utf-8")
    for text in ("GSKDLoss", "samples_per_class", "teacher_targets", "TopKDLoss"):
        assert text in api
    losses = (tmp_path / "site" / "losses.html").read_text(encoding="utf-8")
    assert "cirkd_memory" in losses  # taken out of the README
    assert not re.search(r"<(?:script|link)[^>]*(?:src|href)=\"https?://", losses)  # it works without a network
