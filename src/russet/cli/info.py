"""``russet info``: versions and the machine, as one pastes them into a bug report."""

from __future__ import annotations

import json
import platform
from typing import Any

import click

import russet

LIBRARIES = ("torch", "numpy", "pillow", "safetensors", "tokenizers", "huggingface_hub", "diffusers", "transformers")
"""What runs under Russet, and what is often installed beside it."""


@click.command("info")
@click.option("--device", help="The device to describe: mps, cuda, cuda:1 or cpu.  [default: the best one]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(device: str | None, as_json: bool) -> None:
    """Shows versions and what this machine is."""
    facts = gathered(device)
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        click.echo(f"{name:{width}}  {value}")


def gathered(device: str | None) -> dict[str, Any]:
    """Name → value, in the order in which they are shown."""
    from russet.hardware.facts import gigabytes, read_facts

    facts = read_facts(device)
    return {
        "russet": russet.__version__,
        "python": f"{platform.python_version()} ({platform.machine()})",
        "system": platform.platform(),
        **{name: version for name in LIBRARIES if (version := installed(name)) is not None},
        "device": facts.device,
        "chip": facts.chip,
        "memory": f"{gigabytes(facts.memory)}, {gigabytes(facts.available)} available",
    }


def installed(name: str) -> str | None:
    """A library's version; None where it is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return None
