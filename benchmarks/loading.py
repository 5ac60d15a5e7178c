"""Loading a full-size Stable Diffusion 1.5 folder: Russet beside Diffusers and beside a plain read of the same bytes.

    python benchmarks/loading.py [--rounds 3] [--folder /somewhere/with/room]

The folder has random weights in half precision (2.1 GB) and is made in a temporary place, or kept in --folder; it is
loaded as a plain folder, as huggingface_hub keeps it in its cache, and as one file. Every load runs in a process of its
own, with the libraries imported and the files in the page cache; contestants take turns, so that whatever else the
machine does meets them alike. "Opened" is the time until from_pretrained or from_single_file returns, "touched" until
every page of every weight has been looked at once: weights that are mapped from a file, or that wait for their first
use, count as loaded before they are in memory. Processor seconds are the process's own until then, and the ratio to the
plain read is theirs. Peak memory is what the process grew by until then, as the kernel counts it (VmHWM); for mapped
weights that includes the page cache's own pages, which are not a copy.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PLAIN = "plain read"


# -- the folder


def make_folder(folder: Path) -> None:
    """Writes Stable Diffusion 1.5 with random weights; the tokenizer is the embedded model's."""
    import torch

    from russet.checkpoints import save
    from russet.checkpoints.arguments import MINI
    from russet.checkpoints.load_state_dict import build, load_state_dict
    from russet.models.clip_text import CLIPTextModel
    from russet.models.unet import UNet2DConditionModel
    from russet.models.vae import AutoencoderKL
    from russet.schedulers.named import PNDMScheduler
    from russet.text.tokenizer import CLIPTokenizer

    @dataclasses.dataclass
    class Random:
        shape: tuple[int, ...]
        torch_dtype = torch.float16

        def read(self, *, brief: bool = False) -> torch.Tensor:
            return torch.empty(self.shape, dtype=self.torch_dtype).uniform_(-1, 1)

    text = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    vae = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 512}
    vae |= {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    models = {
        "unet": build(UNet2DConditionModel, {"sample_size": 64, "cross_attention_dim": 768}),
        "vae": build(AutoencoderKL, vae),
        "text_encoder": build(CLIPTextModel, text),
    }
    for part, model in models.items():
        load_state_dict(model, {name: Random(tuple(value.shape)) for name, value in model.state_dict().items()}, part)
    others = {"tokenizer": CLIPTokenizer.from_files(MINI / "tokenizer"), "scheduler": PNDMScheduler()}
    absent = {"safety_checker": None, "feature_extractor": None, "image_encoder": None}
    save.pipeline(folder, "StableDiffusionPipeline", {**models, **others, **absent}, {"requires_safety_checker": False})


def as_cached(folder: Path) -> Path:
    """The same files once more (as links) in the layout of huggingface_hub's cache; the snapshot's folder."""
    base = folder.with_name(folder.name + "-cache") / "models--someone--sd15"
    snapshot = base / "snapshots" / "main"
    if not base.exists():
        (base / "blobs").mkdir(parents=True)
        for number, path in enumerate(path for path in folder.rglob("*") if path.is_file()):
            os.link(path, base / "blobs" / str(number))
            link = snapshot / path.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(base / "blobs" / str(number))
    return snapshot


def as_one_file(folder: Path) -> Path:
    """The same weights in one file."""
    path = folder.with_name(folder.name + ".safetensors")
    if not path.exists():
        from russet import StableDiffusionPipeline

        StableDiffusionPipeline.from_pretrained(folder, torch_dtype="float16").save_single_file(path)
    return path


# -- the contestants; each is prepared first, timed then, and gives a pipeline


def plain_read(folder: Path) -> Callable[[], Any]:
    """Every weight file into fresh memory of its size, as ``open(path, "rb").read()`` does."""
    import torch  # noqa: F401

    return lambda: {str(path): path.read_bytes() for path in folder.rglob("*.safetensors")}


def russet(folder: Path, dtype: str, *, single: bool = False) -> Callable[[], Any]:
    import psutil  # noqa: F401

    import russet.checkpoints.single_file.load
    import russet.schedulers.named
    import russet.text.tokenizer  # noqa: F401
    from russet import StableDiffusionPipeline

    logging.disable(logging.WARNING)
    if single:
        path = as_one_file(folder)
        return lambda: StableDiffusionPipeline.from_single_file(path, config=folder, torch_dtype=dtype)
    return lambda: StableDiffusionPipeline.from_pretrained(folder, torch_dtype=dtype)


def diffusers(folder: Path, dtype: str, *, single: bool = False) -> Callable[[], Any]:
    import diffusers
    import torch
    import transformers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    pipeline, precision = diffusers.StableDiffusionPipeline, getattr(torch, dtype)
    if single:
        path, options = str(as_one_file(folder)), {"config": str(folder), "local_files_only": True}
        return lambda: pipeline.from_single_file(path, torch_dtype=precision, **options)
    return lambda: pipeline.from_pretrained(folder, torch_dtype=precision)


CONTESTANTS: dict[str, Callable[[Path], Callable[[], Any]]] = {
    PLAIN: plain_read,
    "Russet, as stored (float16)": lambda folder: russet(folder, "float16"),
    "Diffusers, as stored (float16)": lambda folder: diffusers(folder, "float16"),
    "Russet, as stored, from the Hub's cache": lambda folder: russet(as_cached(folder), "float16"),
    "Diffusers, as stored, from the Hub's cache": lambda folder: diffusers(as_cached(folder), "float16"),
    "Russet, as stored, from one file": lambda folder: russet(folder, "float16", single=True),
    "Diffusers, as stored, from one file": lambda folder: diffusers(folder, "float16", single=True),
    "Russet, to float32": lambda folder: russet(folder, "float32"),
    "Diffusers, to float32": lambda folder: diffusers(folder, "float32"),
}


def status(field: str) -> int:
    """A size that the kernel keeps for this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(field + ":")))


def measure_here(name: str, folder: Path) -> dict[str, float]:
    """Runs one contestant in this process: seconds, and bytes by which it grew at its peak."""
    load = CONTESTANTS[name](folder)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = status("VmRSS")
    start, begun = time.perf_counter(), time.process_time()
    made = load()
    opened = time.perf_counter() - start
    if name != PLAIN:
        touch(made)
    seconds, processor = time.perf_counter() - start, time.process_time() - begun
    return {"opened": opened, "seconds": seconds, "processor": processor, "peak": status("VmHWM") - before}


def touch(pipe: Any) -> None:
    """Looks at one byte of every page of every weight."""
    import torch

    for part in pipe.components.values():
        for value in part.state_dict().values() if isinstance(part, torch.nn.Module) else ():
            if value.numel():
                value.reshape(-1).view(torch.uint8)[::4096].max()


def measure(folder: Path, rounds: int) -> dict[str, list[dict[str, float]]]:
    results: dict[str, list[dict[str, float]]] = {name: [] for name in CONTESTANTS}
    for _ in range(rounds):
        for name, found in results.items():
            for path in [*folder.rglob("*.safetensors"), as_one_file(folder)]:
                with open(path, "rb", buffering=0) as file:  # into the page cache
                    while file.read(1 << 24):
                        pass
            command = [sys.executable, __file__, "--measure", name, "--folder", str(folder)]
            answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found.append(json.loads(answer.splitlines()[-1]))
    return results


def table(results: dict[str, list[dict[str, float]]], size: int) -> str:
    """Medians, spreads, and ratios to the plain read and to the weights, in Markdown."""
    base = statistics.median(result["processor"] for result in results[PLAIN])
    rows = [
        "| load | opened s | touched s (min–max) | processor s (min–max) | × plain read | peak GB | × weights |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in results.items():
        opened, seconds, processor, peaks = (
            [result[key] for result in found] for key in ("opened", "seconds", "processor", "peak")
        )
        peak = statistics.median(peaks)
        weights = 2 * size if name.endswith("float32") else size
        rows.append(
            f"| {name} | {statistics.median(opened):.2f} | {spread(seconds)} | {spread(processor)} "
            f"| {statistics.median(processor) / base:.2f} | {peak / 1e9:.2f} | {peak / weights:.2f} |"
        )
    return "\n".join(rows)


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}–{max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="made there if it does not exist, and kept")
    parser.add_argument("--measure", choices=list(CONTESTANTS), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure_here(given.measure, given.folder)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary) / "sd15"
        if not (folder / "model_index.json").is_file():
            make_folder(folder)
        size = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
        print(f"{size / 1e9:.2f} GB in {folder}, {given.rounds} rounds\n")
        print(table(measure(folder, given.rounds), size))


if __name__ == "__main__":
    main()
