"""Results as Markdown tables, in English and Korean, and the regions of the pages that they are written into."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from . import plots
from .results import Table, median
from .words import WORDS, label

MISSING = "–"
STEPS_OF_PNDM = 1  # calls of the model that the sampler makes beyond its number of steps


def markdown(table: Table, language: str = "en", plots_at: str | None = None) -> str:
    """All tables of one run. ``plots_at`` is where the page finds the plots; None leaves them out."""
    say = WORDS[language]
    sections = [
        machine(table, say),
        *(make(table, say, language) for make in (speed, starts, likeness, calls, growing)),
    ]
    if plots_at is not None:
        sections += [f"![{say[name]}]({plots_at}/{name}-{table.about['device']}.svg)" for name in plots.drawn(table)]
    if table.dropped:
        what = ", ".join(dict.fromkeys(f"{one['case']} ({one['why']})" for one in table.dropped))
        sections.append(f"{say['not run']}: {what}.")
    return "\n\n".join(filter(None, sections))


def machine(table: Table, say: dict[str, str]) -> str:
    """One paragraph on what it was measured on, and the floor by arithmetic."""
    about = table.about
    threads = f", {about['threads']} {say['threads']}" if about["device"] == "cpu" else ""
    packages = ", ".join(f"{name} {version}" for name, version in about["packages"].items())
    if about.get("cuda"):
        cuda, cudnn = about["cuda"].split()
        packages += f", CUDA {cuda}, cuDNN {cudnn}"
    lines = [
        f"{say['machine']}: {about['name']}, {about['cores']} {say['cores']}{threads}, "
        f"{about['memory'] / 2**30:.0f} GiB RAM; "
        f"Python {about['python']}, {packages}; {about['when']}."
    ]
    if (rate := next(table.of("rates"), None)) is not None:
        lines.append(say["rates"].format(flops=rate["flops"] / 1e12, bytes=rate["bytes"] / 1e12))
    if (least := floor(table)) is not None:
        seconds, operations = least
        lines.append(say["floor"].format(tera=operations / 1e12, seconds=seconds, steps=about["options"]["steps"]))
    return "\n".join(lines)


def floor(table: Table) -> tuple[float, float] | None:
    """Seconds and floating-point operations of one picture at the rate that the machine reaches in a matrix product."""
    rates, counts = next(table.of("rates"), None), next(table.of("operations"), None)
    if rates is None or counts is None:
        return None
    operations = (table.about["options"]["steps"] + STEPS_OF_PNDM) * counts["unet"] + counts["decode"]
    return operations / rates["flops"], float(operations)


def speed(table: Table, say: dict[str, str], language: str) -> str:
    """Seconds a picture and memory, for each number of pictures in a call."""
    batches = sorted({int(row["case"].split()[1]) for row in table.rows if re.fullmatch(r"batch \d+", row["case"])})
    blocks = []
    for batch in batches:
        case = f"batch {batch}"
        base = median(table.values(case, "seconds", contestant="diffusers"))
        rows = []
        for name in table.contestants(case):
            seconds = [value / batch for value in table.values(case, "seconds", contestant=name)]
            if not seconds:
                continue
            middle = statistics.median(seconds)
            rows.append(
                (
                    label(name, language),
                    f"{middle:.3f}",
                    f"{min(seconds):.3f}–{max(seconds):.3f}",
                    ratio(middle, None if base is None else base / batch),
                    gibibytes(table.values(case, "peak", contestant=name)),
                    gibibytes(table.values(case, "reserved", contestant=name)),
                )
            )
        if rows:
            head = [
                say[name] for name in ("contestant", "seconds a picture", "spread", "to diffusers", "peak", "reserved")
            ]
            blocks.append(f"{say['at once'].format(batch=batch)}\n\n{grid(head, rows)}")
    return "\n\n".join(blocks)


def starts(table: Table, say: dict[str, str], language: str) -> str:
    """Loading, the first picture after it, the same with kernels kept, and whole programs."""
    rows = []
    for name in table.contestants("cold start"):
        cached = table.values("cached start", "seconds", contestant=name)
        library = {"diffusers": "diffusers", "russet": "russet"}.get(name, "")
        whole = table.values("start to disk", "seconds", contestant=library)
        rows.append(
            (
                label(name, language),
                number(median(table.values("cold start", "load", contestant=name))),
                number(median(table.values("cold start", "seconds", contestant=name))),
                number(median(cached)),
                number(median(whole)) + (f" ({min(whole):.2f}–{max(whole):.2f})" if whole else ""),
            )
        )
    if not rows:
        return ""
    head = [say[name] for name in ("contestant", "load", "first picture", "cached first", "start to disk")]
    return f"{say['starts']}\n\n{grid(head, rows)}"


def likeness(table: Table, say: dict[str, str], language: str) -> str:
    rows = [
        (label(row["contestant"], language), decibels(row, "to_reference"), decibels(row, "to_plain"))
        for row in table.of("quality")
    ]
    head = [say["contestant"], say["to reference"], say["to plain"]]
    return f"{say['quality']}\n\n{grid(head, rows)}" if rows else ""


def calls(table: Table, say: dict[str, str], language: str) -> str:
    """Steps, and pictures in processes of their own: what is timed on a CPU."""
    blocks = []
    for case in ("step alone", "fresh picture"):
        rows, base = [], {}
        for name in table.contestants(case):
            found = {key: median(table.values(case, key, contestant=name)) for key in ("seconds", "processor", "peak")}
            base = base or found
            spread = table.values(case, "seconds", contestant=name)
            if found["seconds"] is None:
                continue
            cells = [
                label(name, language),
                f"{found['seconds']:.2f} ({min(spread):.2f}–{max(spread):.2f})",
                ratio(found["seconds"], base["seconds"]),
                number(found["processor"]),
                ratio(found["processor"], base["processor"]),
            ]
            if case == "fresh picture":
                cells += [gibibytes([found["peak"] or 0]), ratio(found["peak"], base["peak"])]
            rows.append(tuple(cells))
        head = [say[key] for key in ("contestant", "seconds", "to diffusers", "processor", "to diffusers")]
        head += [say["peak"], say["to diffusers"]] if case == "fresh picture" else []
        if rows:
            blocks.append(f"{say[case]}\n\n{grid(head, rows)}")
    return "\n\n".join(blocks)


def growing(table: Table, say: dict[str, str], language: str) -> str:
    """Growth against pixels and against the number of pictures."""
    blocks = []
    for of in ("side", "batch"):
        case = f"growth by {of}"
        names = table.contestants(case)
        values = list(dict.fromkeys(row[of] for row in table.of(case)))
        if not values:
            continue
        head = [say[of]]
        for name in names:
            head += [f"{label(name, language)}, {say[what]}" for what in ("step", "whole call", "peak")]
        rows = []
        for value in values:
            cells = [f"{value}×{value}" if of == "side" else str(value)]
            for name in names:
                row = next(table.of(case, contestant=name, **{of: value}), {})
                if "failed" in row:
                    cells += [say["failed"], MISSING, MISSING]
                else:
                    cells += [
                        number(row["step"] * 1000 if "step" in row else None, 1),
                        number(row.get("seconds")),
                        gibibytes([row["peak"]] if row else []),
                    ]
            rows.append(tuple(cells))
        steps = next(table.of(case))["steps"]
        blocks.append(f"{say[f'growth {of}'].format(steps=steps)}\n\n{grid(head, rows)}")
    return "\n\n".join(blocks)


# -- cells


def grid(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def number(value: float | None, places: int = 2) -> str:
    return MISSING if value is None else f"{value:.{places}f}"


def ratio(value: float | None, base: float | None) -> str:
    return MISSING if value is None or not base else f"{value / base:.2f}"


def gibibytes(values: Sequence[float]) -> str:
    return f"{max(values) / 2**30:.2f}" if values else MISSING


def decibels(row: dict[str, Any], key: str) -> str:
    if key not in row:
        return MISSING
    return "∞" if row[key] is None else f"{row[key]:.1f}"


# -- pages


def mark(name: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- {name}: begin[^\n]*-->\n).*?(<!-- {name}: end -->)", re.DOTALL)


def write_page(page: Path, tables: Iterable[Table]) -> None:
    """Writes the region of each run anew, and touches nothing else on the page. Which language, its folder says."""
    language = page.resolve().parent.name
    text = page.read_text(encoding="utf-8")
    for table in tables:
        name = f"harness {table.about['options']['list']}"
        body = markdown(table, language, plots_at="../assets")
        text, times = mark(name).subn(lambda found, body=body: f"{found[1]}\n{body}\n\n{found[2]}", text)
        if times != 1:
            raise SystemExit(f"{page} must have one region '<!-- {name}: begin -->' … '<!-- {name}: end -->'")
    page.write_text(text, encoding="utf-8")


def write_counts(page: Path, printed: str) -> None:
    """Puts the table that mps_counts.py printed into its region."""
    language = page.resolve().parent.name
    rows = [line for line in printed.splitlines() if line.startswith("|")]
    table = "\n".join([WORDS[language]["counts"], *rows[1:]])
    text = page.read_text(encoding="utf-8")
    page.write_text(mark("mps counts").sub(lambda found: f"{found[1]}\n{table}\n\n{found[2]}", text), encoding="utf-8")


def write_plots(folder: Path, tables: Iterable[Table]) -> None:
    for table in tables:
        for name, svg in plots.drawn(table).items():
            (folder / f"{name}-{table.about['device']}.svg").write_text(svg, encoding="utf-8")
