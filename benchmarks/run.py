"""The benchmarks: runs a list of cases, and turns what was measured into tables and plots.

    python benchmarks/run.py gpu --out DIR [--budget 500]      one NVIDIA GPU, Russet beside Diffusers
    python benchmarks/run.py growth --out DIR [--budget 500]   the same GPU: from small to large, from one to many
    python benchmarks/run.py cpu --out DIR [--budget 3600]     a CPU
    python benchmarks/run.py report DIR/*.json [--pages docs/en/benchmarks.md docs/ko/benchmarks.md]

Contestants take turns (A B A B), each in a process of its own, so that whatever else the machine does meets them alike.
Results are written after every measurement; a run that is out of time drops the cases that are left, the least
important ones, and says so. ``--tiny`` runs every case on a model of a few thousand weights, in seconds, on any device.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from pathlib import Path

BENCHMARKS = Path(__file__).parent
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS.parent / "src")]

import torch  # noqa: E402

from harness import cases, report  # noqa: E402
from harness.contestants import CONTESTANTS  # noqa: E402
from harness.results import Results, Table, about  # noqa: E402
from harness.run import Run  # noqa: E402

BUDGETS = {"gpu": 500.0, "growth": 500.0, "cpu": 3600.0}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or ""), formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in cases.LISTS:
        command = commands.add_parser(name)
        command.add_argument("--out", type=Path, required=True, help="folder for the results")
        command.add_argument("--work", type=Path, help="folder for the model, caches and logs; kept, if given")
        command.add_argument("--budget", type=float, default=BUDGETS[name], help="seconds")
        command.add_argument("--steps", type=int, default=50, help="of each picture where time is measured")
        command.add_argument("--cases", nargs="+", metavar="NAME", help="only cases whose names begin so")
        command.add_argument("--contestants", nargs="+", metavar="NAME", choices=CONTESTANTS, help="only these")
        command.add_argument("--tiny", action="store_true", help="a tiny model, to try the harness")
        command.add_argument("--device", default="cpu" if name == "cpu" else "cuda")
        command.add_argument("--list", action="store_true", help="print the cases and contestants, and stop")
    tables = commands.add_parser("report")
    tables.add_argument("results", nargs="*", type=Path)
    tables.add_argument("--pages", nargs="*", type=Path, default=[], help="pages whose marked regions are written anew")
    tables.add_argument("--counts", type=Path, help="what mps_counts.py --full printed, for the pages")
    tables.add_argument("--plots", type=Path, help="folder for the plots")
    return parser.parse_args()


def measure(options: argparse.Namespace) -> None:
    if options.device == "cuda" and not torch.cuda.is_available():
        print("torch sees no NVIDIA GPU here: the cases for a CPU are run instead", file=sys.stderr)
        options.command = options.device = "cpu"
    chosen = [
        case
        for case in cases.LISTS[options.command](tiny=options.tiny)
        if not options.cases or case.name.startswith(tuple(options.cases))
    ]
    if options.list:
        print("cases:", *dict.fromkeys(case.name for case in chosen), sep="\n  ")
        print("contestants:", *(f"{name}: {one.label}" for name, one in CONTESTANTS.items()), sep="\n  ")
        return
    asked = {"list": options.command, "budget": options.budget, "tiny": options.tiny}
    asked["steps"] = 2 if options.tiny else options.steps
    results = Results(options.out / f"{options.command}.json", about(options.device, asked))
    try:
        with contextlib.nullcontext(options.work) if options.work else tempfile.TemporaryDirectory() as work:
            run = Run(
                device=options.device,
                geometry="tiny" if options.tiny else "sd15",
                work=Path(work).resolve(),
                results=results,
                budget=options.budget,
                only=tuple(options.contestants or CONTESTANTS),
                steps=asked["steps"],
            )
            run.carry_out(chosen)
    finally:
        print(report.markdown(Table(results.data)))


def main() -> None:
    options = arguments()
    if options.command != "report":
        measure(options)
        return
    tables = [Table.read(path) for path in options.results]
    if not options.pages:
        print("\n\n".join(report.markdown(table) for table in tables))
    for page in options.pages:
        report.write_page(page, tables)
        if options.counts:
            report.write_counts(page, options.counts.read_text(encoding="utf-8"))
    if options.plots:
        report.write_plots(options.plots, tables)


if __name__ == "__main__":
    main()
