"""The benchmark harness on a tiny model: every case runs, and what it writes can be read."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from harness import cases, plots, report  # noqa: E402
from harness.contestants import CONTESTANTS  # noqa: E402
from harness.fleet import Lost, Process  # noqa: E402
from harness.geometry import SD15, TINY, operations  # noqa: E402
from harness.results import Results, Table, about  # noqa: E402
from harness.run import Run  # noqa: E402
from harness.words import LABELS_KO, WORDS  # noqa: E402
from russet.diagnostics import bench  # noqa: E402

WITHOUT_COMPILER = tuple(name for name in CONTESTANTS if name != "diffusers-best")
PAGES = [ROOT / "docs" / language / "benchmarks.md" for language in ("en", "ko")]


def new_run(folder: Path, name: str, **options: Any) -> Run:
    asked = {"list": name, "budget": 600, "steps": 2, "tiny": True}
    results = Results(folder / f"{name}.json", about("cpu", asked))
    wanted = {"budget": 600.0, "only": WITHOUT_COMPILER, "inline": True, **options}
    return Run(device="cpu", geometry="tiny", work=folder / "work", results=results, steps=2, **wanted)


@pytest.fixture(scope="module", params=cases.LISTS)
def table(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Table:
    """A whole run of each list, in this process but for the programs that are timed from their start."""
    run = new_run(tmp_path_factory.mktemp(request.param), request.param)
    run.carry_out(cases.LISTS[request.param](tiny=True))
    return Table.read(run.results.path)


def test_every_case_is_measured_for_every_contestant(table):
    assert table.dropped == []
    listed = cases.LISTS[table.about["options"]["list"]](tiny=True)
    for case in listed:
        data = getattr(case.measure, "keywords", {})
        wanted = {*data.get("contestants", ())} & {*WITHOUT_COMPILER}
        measured = {row["contestant"] for row in table.rows if case.name.startswith(row["case"])}
        assert wanted <= measured, case.name
    assert all("failed" not in row for row in table.rows)


def test_russet_draws_what_diffusers_draws(table):
    for row in table.of("quality"):
        if row["contestant"] != "russet-deep":
            assert row["to_reference"] is None or row["to_reference"] > 50, row  # dB, all in float32


@pytest.mark.parametrize("language", WORDS)
def test_the_tables_are_complete_markdown(table, language):
    text = report.markdown(table, language, plots_at="../assets")
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if line.startswith("|---"):
            columns = line.count("|")
            assert lines[number - 1].count("|") == columns
            assert lines[number + 1].count("|") == columns
    assert "{" not in text
    assert text.count("![") == len(plots.drawn(table))


def test_the_plots_are_pictures_with_a_line_for_each_contestant(table):
    rows = [  # a step is the difference of two times, which noise can turn negative for so small a model
        {**row, "step": abs(row["step"]) or 1e-3} if "step" in row else row for row in table.rows
    ]
    drawn = plots.drawn(Table({"about": table.about, "measured": rows, "dropped": table.dropped}))
    assert bool(drawn) == any(row["case"].startswith("growth") for row in rows)
    for svg in drawn.values():
        root = ElementTree.fromstring(svg)
        assert len(root.findall("{http://www.w3.org/2000/svg}polyline")) == len(cases.GROWING)


def test_a_run_without_time_drops_its_cases_and_says_so(tmp_path):
    run = new_run(tmp_path, "gpu", budget=0.0)
    run.prepare = lambda: None
    run.carry_out(cases.gpu_cases(tiny=True))
    table = Table.read(run.results.path)
    assert table.rows == []
    assert {row["case"] for row in table.dropped} == {case.name for case in cases.gpu_cases(tiny=True)}
    assert "Not run: " in report.markdown(table)


def test_a_contestant_whose_process_ends_is_left_out_and_the_run_goes_on(tmp_path):
    run = new_run(tmp_path, "gpu")
    with run.part("batch 1", "russet"):
        raise Lost("killed")
    assert run.wanted(["diffusers", "russet"]) == ["diffusers"]
    assert run.results.data["dropped"] == [{"case": "batch 1: russet", "why": "killed"}]


def test_a_worker_answers_from_a_process_of_its_own_and_its_last_words_are_kept(tmp_path):
    worker = Process(("russet", str(tmp_path / "nowhere"), "cpu", "tiny"), tmp_path / "log")
    assert worker.ask("hello", 300)["threads"] >= 1
    with pytest.raises(Lost, match="nowhere"):
        worker.ask("load", 60)
    worker.close()


def test_the_operations_of_stable_diffusion_are_counted():
    counts = operations(SD15, 512)
    assert counts["unet"] == pytest.approx(1.607e12, rel=0.01)  # 2 rows; by hand from its layers' shapes
    assert counts["decode"] == pytest.approx(2.515e12, rel=0.01)
    assert operations(TINY, 64)["unet"] > operations(TINY, 32)["unet"] * 4  # attention grows faster than pixels


def test_both_languages_have_the_same_words():
    assert WORDS["en"].keys() == WORDS["ko"].keys()
    assert LABELS_KO.keys() == CONTESTANTS.keys()


def test_the_region_of_a_page_is_written_anew_and_nothing_else(table, tmp_path):
    (tmp_path / "en").mkdir()
    page, name = tmp_path / "en" / "benchmarks.md", table.about["options"]["list"]
    page.write_text(
        f"before\n\n<!-- harness {name}: begin (written by a program) -->\nold\n<!-- harness {name}: end -->\n\nafter\n"
    )
    for _ in range(2):
        report.write_page(page, [table])
        text = page.read_text(encoding="utf-8")
        assert text.startswith("before\n\n<!--")
        assert text.endswith("-->\n\nafter\n")
        assert "old" not in text
        assert text.count("Diffusers, as it ships") == report.markdown(table).count("Diffusers, as it ships")


@pytest.mark.parametrize("list_name", cases.LISTS)
def test_the_pages_show_the_same_measurements(list_name):
    """The numbers of the region are the same in both languages, since one program wrote both."""
    found = []
    for page in PAGES:
        region = report.mark(f"harness {list_name}").search(page.read_text(encoding="utf-8"))
        assert region is not None, page
        rows = [line.split("|")[2:-1] for line in region[0].splitlines() if line.startswith("| ")]
        found.append([[cell for cell in row if any(c.isdigit() for c in cell)] for row in rows])
    assert found[0] == found[1]


def test_the_page_has_the_columns_that_the_command_prints():
    for page in PAGES:
        assert bench.header() in page.read_text(encoding="utf-8")


def test_the_counts_of_kernels_go_into_their_region(tmp_path):
    for language, first in (("en", "kernels"), ("ko", "커널")):
        (tmp_path / language).mkdir()
        page = tmp_path / language / "benchmarks.md"
        page.write_text("<!-- mps counts: begin -->\n<!-- mps counts: end -->\n")
        printed = f"Apple M1, …\n\n{mps_counts_header()}\n| Diffusers | 7 |\n"
        report.write_counts(page, printed)
        assert "| Diffusers | 7 |" in page.read_text(encoding="utf-8")
        assert first in page.read_text(encoding="utf-8")
    assert WORDS["en"]["counts"] == mps_counts_header().splitlines()[0]


def mps_counts_header() -> str:
    """The head of the table that mps_counts.py prints, read from its source: to import it needs the virtual device."""
    source = (ROOT / "benchmarks" / "mps_counts.py").read_text(encoding="utf-8")
    return source.partition('HEADER = """\\\n')[2].partition('"""')[0]


def test_results_survive_a_run_that_is_cut_short(tmp_path):
    results = Results(tmp_path / "deep" / "gpu.json", {"device": "cpu"})
    results.add("batch 1", "russet", seconds=1.0)
    assert json.loads(results.path.read_text())["measured"] == [
        {"case": "batch 1", "contestant": "russet", "seconds": 1.0}
    ]
