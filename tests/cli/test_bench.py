"""``russet bench`` with the embedded model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from russet.cli.app import run
from russet.diagnostics.bench import header

QUICK = ["--steps", "1", "--calls", "1", "--device", "cpu", "--width", "64", "--height", "64"]


def test_a_row_of_a_table_is_printed(capsys):
    assert run(["bench", *QUICK]) == 0
    head, rule, row = capsys.readouterr().out.splitlines()
    assert head.count("|") == rule.count("|") == row.count("|")
    assert "64×64" in row
    assert "float32" in row


def test_the_row_as_json(capsys):
    assert run(["bench", *QUICK, "--json"]) == 0
    shown = capsys.readouterr()
    row = json.loads(shown.out)
    assert shown.err == ""
    assert (row["model"], row["width"], row["steps"]) == ("mini", 64, 1)
    assert row["seconds_a_step"] > 0


@pytest.mark.parametrize("language", ["en", "ko"])
def test_the_page_has_a_table_for_the_row_and_the_help_names_it(language, capsys):
    page = Path(__file__).parents[2] / "docs" / language / "benchmarks.md"
    assert f"\n{header()}\n" in page.read_text(encoding="utf-8")
    assert run(["bench", "--help"]) == 0
    assert "docs/en/benchmarks.md" in capsys.readouterr().out
