"""``russet pull``, ``russet models`` and ``russet rm``: the models on this machine."""

from __future__ import annotations

import json

import click


@click.command("pull")
@click.argument("model")
@click.option(
    "--variant", metavar="NAME", help="Take the files of this variant where there are such, fp16 for example."
)
@click.option("--revision", metavar="NAME", help="A branch, tag or commit of the repository.")
def pull(model: str, variant: str | None, revision: str | None) -> None:
    """Downloads MODEL from the Hub, to work offline.

    Only the files that a pipeline needs are fetched, safetensors where there are such. Prints the folder.
    """
    from russet.checkpoints.arguments import Options
    from russet.checkpoints.hub import cache

    click.echo(cache.pull(model, Options(variant=variant, revision=revision)))


@click.command("models")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def models(as_json: bool) -> None:
    """Lists the downloaded models."""
    from russet.checkpoints.hub import cache
    from russet.hardware.facts import gigabytes

    found = cache.cached_models()
    if as_json:
        rows = [
            {"name": one.name, "bytes": one.size, "last_used": one.last_used.isoformat(), "path": str(one.path)}
            for one in found
        ]
        click.echo(json.dumps(rows, indent=2))
        return
    width = max([len(one.name) for one in found], default=0)
    for one in found:
        click.echo(f"{one.name:{width}}  {gigabytes(one.size):>9}  last used {one.last_used:%Y-%m-%d}")
    if not found:
        click.echo(
            "no model is downloaded; `russet pull stable-diffusion-v1-5/stable-diffusion-v1-5` gets one", err=True
        )


@click.command("rm")
@click.argument("model")
def remove(model: str) -> None:
    """Deletes the download of MODEL."""
    from russet.checkpoints.hub import cache
    from russet.hardware.facts import gigabytes

    click.echo(f"freed {gigabytes(cache.remove(model))}")
