"""The pages: their programs run, their Korean twins have the same code and shape, their links lead somewhere."""

from __future__ import annotations

import inspect
import logging
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from russet import StableDiffusionPipeline
from russet.cli import app as cli
from russet.cli.app import run
from russet.planning.plan_types import MEANING

ROOT = Path(__file__).parent.parent
ENGLISH = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs" / "en").glob("*.md"))]
KOREAN = [ROOT / "README.ko.md", *sorted((ROOT / "docs" / "ko").glob("*.md"))]
PAGES = ENGLISH + KOREAN
FENCE = re.compile(r"^```(?P<language>\w*)(?P<marks>[^\n]*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\((?P<target>[^)\s]+)\)")
HUB_ID = "stable-diffusion-v1-5/stable-diffusion-v1-5"


class Block(NamedTuple):
    language: str
    marks: str
    code: str
    line: int


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(found["language"], found["marks"].strip(), found["code"], text.count("\n", 0, found.start()) + 1)
        for found in FENCE.finditer(text)
    ]


def programs(page: Path) -> list[Block]:
    return [block for block in blocks(page) if block.language == "python"]


def named(pages: list[Path]) -> dict[str, object]:
    return {"argvalues": pages, "ids": [str(page.relative_to(ROOT)) for page in pages]}


def twin(page: Path) -> Path:
    """The Korean page of an English one."""
    return ROOT / "README.ko.md" if page.name == "README.md" else ROOT / "docs" / "ko" / page.name


@pytest.fixture(autouse=True)
def the_loggers_level_stays() -> Iterator[None]:
    """A page may show how to silence Russet; the other tests still want to hear it."""
    level = logging.getLogger("russet").level
    yield
    logging.getLogger("russet").setLevel(level)


@pytest.mark.parametrize("page", **named([page for page in ENGLISH if any(not b.marks for b in programs(page))]))
def test_the_programs_of_a_page_run_from_top_to_bottom(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for block in programs(page):
        if "no-run" not in block.marks:
            source = "\n" * block.line + quick(block.code)  # so that a traceback names the line of the page
            exec(compile(source, str(page), "exec"), names)


def quick(code: str) -> str:
    """A program with 2 steps for each picture."""
    return re.sub(r"(num_inference_steps=)\d+", r"\g<1>2", code)


def test_the_program_of_the_guide_runs_with_the_embedded_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (program,) = [block.code for block in programs(ROOT / "README.md") if "no-run" in block.marks]
    assert HUB_ID in program
    assert 'to("mps")' in program
    few = (
        program.replace(HUB_ID, "mini")
        .replace("mps", "cpu")
        .replace("pipe(prompt)", "pipe(prompt, num_inference_steps=2)")
    )
    exec(few, {})
    assert Image.open("astronaut.png").size == (256, 256)


def test_the_picture_of_the_readme_is_what_its_command_draws(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (command,) = re.findall(r"`russet (.*--seed.*)`", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert run([*shlex.split(command), "-o", "drawn.png", "--device", "cpu", "-q"]) == 0
    drawn, shown = (
        np.asarray(Image.open(path), dtype=np.float64) for path in ("drawn.png", ROOT / "docs/assets/astronaut.png")
    )
    assert drawn.shape == shown.shape
    assert np.square(drawn - shown).mean() < 6.5  # 40 dB: another CPU's sums, and nothing else


@pytest.mark.parametrize("page", **named([page for page in ENGLISH if page.name != "CONTRIBUTING.md"]))
def test_a_page_and_its_korean_twin_have_the_same_code_and_shape(page):
    other = twin(page)
    assert other.is_file()
    assert [block[:3] for block in blocks(page)] == [block[:3] for block in blocks(other)]
    assert shape(page) == shape(other)


def test_the_guide_lists_every_argument_of_a_call():
    arguments = set(inspect.signature(StableDiffusionPipeline.__call__).parameters) - {"self", "others"}
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs/en/guide.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == arguments


def test_the_page_on_devices_lists_every_decision_of_a_plan():
    text = (ROOT / "docs/en/devices.md").read_text(encoding="utf-8")
    table = text.partition("## Decisions")[2].partition("\n## ")[0]
    first_cells = re.findall(r"^\| (`[^|]*) \|", table, re.MULTILINE)
    assert {name for cell in first_cells for name in re.findall(r"`([^`]+)`", cell)} == {
        re.sub(r"\..*", ".…", name) for name in MEANING
    }


def test_every_korean_page_has_an_english_one():
    assert {twin(page) for page in ENGLISH} >= set(KOREAN)


def shape(page: Path) -> list[str]:
    """What a page is built of, in order: headings by level, pictures, and tables by their columns."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    found = re.findall(r"^(?:(#+) |(!)\[|(\|(?:[-: ]+\|)+)$)", text, re.MULTILINE)
    rows = len(re.findall(r"^\|", text, re.MULTILINE))
    return ["".join(part for part in parts) for parts in found] + [f"{rows} rows"]


@pytest.mark.parametrize("page", **named(PAGES))
def test_links_lead_somewhere(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for found in LINK.finditer(text):
        path, _, anchor = found["target"].partition("#")
        if "://" in path:
            continue
        where = (page.parent / path).resolve() if path else page
        assert where.exists(), f"{page.name}: {found['target']}"
        assert where.is_relative_to(ROOT)
        assert not anchor or anchor in anchors(where), f"{page.name}: {found['target']}"


def anchors(page: Path) -> set[str]:
    """The names that a page's headings have as link targets, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_files_and_folders_that_contributing_names_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named_paths = re.findall(r"`((?:src|tests|docs|benchmarks|\.ci)/[\w./]*)`", text)
    assert len(named_paths) > 15
    assert [path for path in named_paths if not (ROOT / path).exists()] == []


def test_the_layout_in_contributing_is_complete():
    """Each has a line of its own, or is named in that of what it belongs to."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    lines = re.findall(r"^ {6}(\w+(?:\.py|/)) (.*)", text, re.MULTILINE)
    own, within = (
        {name for name, _ in lines},
        {name for _, words in lines for name in re.findall(r"\w+\.py", words)} | {"__main__.py"},
    )
    source = ROOT / "src" / "russet"
    there = {path.name if path.is_file() else f"{path.name}/" for path in source.iterdir()}
    aside = {"__init__.py", "__pycache__/", "py.typed"}
    assert own <= there
    assert there - aside <= own | within


def test_the_test_command_is_the_one_that_the_checks_run():
    install, _, test = next(b.code for b in blocks(ROOT / "README.md") if "pytest" in b.code).strip().partition(" && ")
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert install.replace("pip install", "pip install -q") in script
    assert f"step {test}\n" in script
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_the_page_of_commands_shows_the_help_of_each(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    shown = [block.code for block in blocks(ROOT / "docs" / "en" / "commands.md") if block.language == "text"]
    for block in shown:
        command, _, text = block.partition("\n")
        assert run(shlex.split(command.removeprefix("$ russet "))) == 0
        assert capsys.readouterr().out == text, f"{command} says something else now"
    assert len(shown) == 1 + len(cli.app.commands)


@pytest.mark.parametrize("page", **named(PAGES))
def test_commands_of_a_page_are_commands(page, capsys):
    """Each ``russet …`` line in a shell block is read by the command line; nothing is carried out."""
    lines = [line for block in blocks(page) if block.language == "bash" for line in block.code.splitlines()]
    for line in lines:
        for part in line.split(" && "):
            words = shlex.split(part)
            if words[:1] == ["russet"]:
                assert run([*words[1:], "--help"]) == 0
                assert "Usage: russet" in capsys.readouterr().out
