"""Feeds damaged checkpoints to the readers: whatever a file holds, only Russet's own errors may come out.

    python scripts/fuzz.py --minutes 60              all targets in turn, with mutations of its own
    python scripts/fuzz.py --target pickle --seed 7  one target, repeatable
    python scripts/fuzz.py --target zip --atheris    guided by coverage, where atheris is installed

A failure (another exception, more than ten seconds of work, more than the allowed memory) is printed and its input kept
in fuzz-failures/, to be given to --replay. The exit status is 1 if there was one.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import logging
import pickle
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import types
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_safetensors

from russet.checkpoints import load
from russet.checkpoints.arguments import MINI
from russet.checkpoints.formats.pickles import unpickle
from russet.checkpoints.formats.torch_files import _ALLOWED
from russet.checkpoints.formats.weight_files import Weights, open_shards, open_weights
from russet.checkpoints.inspect import inspect
from russet.checkpoints.single_file import prediction
from russet.errors import RussetError

SECONDS = 10  # of processor time for one input, so that a busy machine is no failure
STUCK = 120  # seconds by the clock: nobody waits that long for a reader that does nothing
MEMORY = 6 << 30  # bytes of address space beyond what the libraries take
TENSOR_BYTES = 1 << 20  # tensors up to this size are read as well
FAILURES = Path("fuzz-failures")
STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2).half(), "empty": torch.empty(0, 4)}


# -- targets: seeds that are sound, and what is done with a damaged one in an empty folder


def read_all(weights: Weights) -> None:
    for tensor in weights.tensors.values():
        if tensor.nbytes <= TENSOR_BYTES:
            assert tuple(tensor.read().shape) == tensor.shape


def saved(value: Any, *, legacy: bool = False) -> bytes:
    out = io.BytesIO()
    torch.save(value, out, _use_new_zipfile_serialization=not legacy)
    return out.getvalue()


def pickle_of(archive: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        return opened.read(next(name for name in opened.namelist() if name.endswith("data.pkl")))


def weights_seeds() -> list[bytes]:
    plain = save_safetensors(STATE, {"format": "pt"})
    return [plain, save_safetensors({"x": torch.ones(3).bfloat16()}), saved(STATE), saved(STATE, legacy=True)]


def run_weights(data: bytes, folder: Path) -> None:
    (folder / "file").write_bytes(data)
    read_all(open_weights(folder / "file"))


def zip_seeds() -> list[bytes]:
    return [saved(STATE), saved({"state_dict": STATE, "epoch": 3, "nested": {"x": torch.ones(2).t()}})]


def pickle_seeds() -> list[bytes]:
    training = {"state_dict": STATE, "callbacks": {"best": 0.5}, "hparams": [1, (2, None)], "done": True}
    return [pickle_of(saved(STATE)), pickle_of(saved(training)), pickle.dumps(training["hparams"], 4)]


def run_pickle(data: bytes, folder: Path) -> None:
    unpickle(data, 0, _ALLOWED, lambda pid: pid, "file")
    with zipfile.ZipFile(folder / "file", "w") as archive:
        archive.writestr("archive/data.pkl", data)
        for key in range(3):
            archive.writestr(f"archive/data/{key}", bytes(24))
    read_all(open_weights(folder / "file"))


def index_seeds() -> list[bytes]:
    return [json.dumps({"metadata": {}, "weight_map": dict.fromkeys(STATE, "one.safetensors")}).encode()]


def run_index(data: bytes, folder: Path) -> None:
    (folder / "one.safetensors").write_bytes(save_safetensors(STATE))
    (folder / "model.safetensors.index.json").write_bytes(data)
    read_all(open_shards(folder / "model.safetensors.index.json"))


def folder_seeds() -> list[bytes]:
    """Every text file of the embedded model, each prefixed by its name."""
    names = ("model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json")
    names += ("scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json", "tokenizer/special_tokens_map.json")
    names += ("tokenizer/vocab.json", "tokenizer/merges.txt")
    return [name.encode() + b"\0" + (MINI / name).read_bytes() for name in names]


def run_folder(data: bytes, folder: Path) -> None:
    """The embedded model with one text file exchanged; the rest are links."""
    name, _, content = data.partition(b"\0")
    known = {path.relative_to(MINI).as_posix() for path in MINI.rglob("*") if path.is_file()}
    if name.decode("latin-1") not in known:
        return
    for path in known:
        (folder / path).parent.mkdir(exist_ok=True)
        if path == name.decode():
            (folder / path).write_bytes(content)
        else:
            (folder / path).symlink_to(MINI / path)
    load.pipeline(folder)


def inspect_seeds() -> list[bytes]:
    """Files of each kind that is recognised, their tensors without elements: a model, LoRAs, a VAE, new words."""
    model = {
        "input_blocks.0.0.weight": (0, 4, 3, 3),
        "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (0, 768),
    }
    model = {f"model.diffusion_model.{name}": shape for name, shape in model.items()}
    model |= {"cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.bias": (0,), "v_pred": (0,)}
    vae = {"first_stage_model.decoder.mid.block_1.norm1.weight": (0,), "first_stage_model.quant_conv.bias": (0,)}
    layer = "down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    kohya = {f"lora_unet_{layer}.lora_{side}.weight": shape for side, shape in (("down", (0, 768)), ("up", (320, 0)))}
    peft = {
        f"unet.mid_block.attentions.0.proj_in.lora_{side}.weight": shape for side, shape in (("A", (0,)), ("B", (9, 0)))
    }
    words = {"string_to_param": {"*": torch.ones(2, 768)}, "name": "new"}
    metadata = {
        "modelspec.prediction_type": "v",
        "modelspec.architecture": "stable-diffusion-v2-768-v",
        "ss_network_alpha": "4",
    }
    files = [{name: torch.empty(shape) for name, shape in names.items()} for names in (model | vae, vae, kohya, peft)]
    return [*(save_safetensors(file, metadata) for file in files), saved(words)]


def run_inspect(data: bytes, folder: Path) -> None:
    (folder / "v2-1_768.safetensors").write_bytes(data)
    assert str(inspect(folder / "v2-1_768.safetensors"))


def sidecar_seeds() -> list[bytes]:
    ldm = (
        "model:\n  target: ldm.Diffusion\n  params:\n    parameterization: v\n    unet_config: {params: {a: [1, 2]}}\n"
    )
    sgm = "model:\n  params: &p\n    denoiser_config: {params: {scaling_config: {target: a.VScaling}}}\n  more: *p\n"
    return [ldm.encode(), sgm.encode()]


def run_sidecar(data: bytes, folder: Path) -> None:
    (folder / "model.yaml").write_bytes(data)
    prediction.sidecar_meaning(prediction.read_sidecar(folder / "model.yaml"))


Target = tuple[Callable[[], list[bytes]], Callable[[bytes, Path], None]]
TARGETS: dict[str, Target] = {
    "weights": (weights_seeds, run_weights),
    "zip": (zip_seeds, run_weights),
    "pickle": (pickle_seeds, run_pickle),
    "index": (index_seeds, run_index),
    "folder": (folder_seeds, run_folder),
    "inspect": (inspect_seeds, run_inspect),
    "sidecar": (sidecar_seeds, run_sidecar),
}

# -- mutations

PIECES = [
    b"",
    b"\0",
    b"\xff",
    b"-1",
    b"1e999",
    b"null",
    b"[]",
    b"{}",
    b'"',
    b"99999999999999999999",
    b"true",
    b"[[",
    b"(",
]
PIECES += [b"\x80\x02", b"R", b"q\0h\0", b"\x85", b"cos\nsystem\n", b"\xff\xff\xff\xff", b"\0\0\0\x80", b"../", b"NaN"]
PIECES += [(1 << power).to_bytes(8, "little") for power in (0, 7, 31, 32, 62, 63)]


def mutated(data: bytes, chance: random.Random) -> bytes:
    content = bytearray(data)
    for _ in range(chance.choice([1, 1, 2, 3, 8])):
        at, other = sorted((chance.randrange(len(content) + 1), chance.randrange(len(content) + 1)))
        kind = chance.randrange(6)
        if kind == 0 and content:
            content[min(at, len(content) - 1)] = chance.randrange(256)
        elif kind == 1:
            content[at:at] = chance.choice(PIECES)
        elif kind == 2:
            piece = chance.choice(PIECES)
            content[at : at + len(piece)] = piece
        elif kind == 3:
            del content[at : min(other, at + chance.choice([1, 4, 40, len(content)]))]
        elif kind == 4:
            content[at:at] = content[at : min(other, at + 200)] * chance.choice([1, 1, 3, 50])
        else:
            del content[other:]
    return bytes(content)


VALUES = [None, -1, 0, 1, 2**40, 2**63, 1e308, "", "x", [], {}, [[]], True, [1, 2], [-1], "../x", 10**9, 0.5, "F8_E5M2"]


def swapped_json(data: bytes, chance: random.Random) -> bytes:
    """A sound JSON file with one value exchanged: damage that gets past the parser."""
    head, separator, text = data.partition(b"\0")
    with contextlib.suppress(ValueError):
        config = json.loads(text if separator else data)
        for _ in range(chance.choice([1, 1, 2, 4])):
            config[chance.choice([*config, "new"])] = chance.choice(VALUES)
        return head + separator + json.dumps(config).encode() if separator else json.dumps(config).encode()
    return data


def swapped_header(data: bytes, chance: random.Random) -> bytes:
    """A sound safetensors file whose header says something else of one tensor, or has another name for it."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for _ in range(chance.choice([1, 1, 2, 4])):
        name = chance.choice([*header, "new"])
        entry = header.get(name)
        if not isinstance(entry, dict) or chance.random() < 0.2:
            header[name] = copy.deepcopy(chance.choice(VALUES))  # which the next round may change
        elif chance.random() < 0.2:
            header[chance.choice([*header, "../x", "a" * 2000, "position_ids"])] = header.pop(name)
        else:
            entry[chance.choice([*entry, "new"])] = chance.choice(
                [*VALUES, [2**31, 2**31], [0, 2**62], [0] * 99, [0, 24]]
            )
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def inputs(seeds: list[bytes], chance: random.Random) -> Iterator[bytes]:
    while True:
        seed = chance.choice(seeds)
        shrewd = swapped_json if seed.rstrip().endswith(b"}") else swapped_header if seed[8:9] == b"{" else mutated
        yield (shrewd if chance.random() < 0.5 else mutated)(seed, chance)


# -- running


def attempt(name: str, data: bytes) -> str | None:
    """Runs one input; what went wrong, or None."""

    def too_long(*_: Any) -> None:
        raise TimeoutError(f"more than {SECONDS} seconds of work, or {STUCK} in all")

    limits = {signal.ITIMER_PROF: (signal.SIGPROF, SECONDS), signal.ITIMER_REAL: (signal.SIGALRM, STUCK)}
    for timer, (number, seconds) in limits.items():
        signal.signal(number, too_long)
        signal.setitimer(timer, seconds)
    try:
        with tempfile.TemporaryDirectory() as folder:
            TARGETS[name][1](data, Path(folder))
    except RussetError:
        return None
    except Exception:
        return traceback.format_exc()
    finally:
        for timer in limits:
            signal.setitimer(timer, 0)
    return None


def report(name: str, data: bytes, trace: str) -> None:
    FAILURES.mkdir(exist_ok=True)
    path = FAILURES / f"{name}-{abs(hash(data)):x}"
    path.write_bytes(data)
    print(f"FAILED {name}, kept in {path}\n{trace}", flush=True)


def run(names: list[str], minutes: float, seed: int) -> int:
    """Runs the targets in turn; how many inputs failed."""
    chance = random.Random(seed)
    streams = {name: inputs(TARGETS[name][0](), chance) for name in names}
    counts = dict.fromkeys(names, 0)
    failures = 0
    end = time.monotonic() + minutes * 60
    while time.monotonic() < end:
        for name, stream in streams.items():
            until = min(end, time.monotonic() + 5 / len(names))
            while time.monotonic() < until:
                data = next(stream)
                counts[name] += 1
                if trace := attempt(name, data):
                    failures += 1
                    report(name, data, trace)
    print(", ".join(f"{name}: {count} inputs" for name, count in counts.items()), f"— {failures} failed")
    return failures


def readers() -> list[types.FunctionType]:
    """The functions whose coverage guides atheris: those that read checkpoints."""
    modules = [
        module for name, module in sys.modules.items() if name.startswith(("russet.checkpoints", "russet.small"))
    ]
    spaces = [vars(module) for module in modules]
    spaces += [vars(item) for space in spaces for item in space.values() if isinstance(item, type)]
    found = [item for space in spaces for item in space.values() if isinstance(item, types.FunctionType)]
    return [item for item in found if item.__module__ in {module.__name__ for module in modules}]


def run_atheris(name: str, minutes: float) -> None:
    import atheris  # type: ignore[import-not-found]

    def one(data: bytes) -> None:
        if trace := attempt(name, data):
            report(name, data, trace)
            raise RuntimeError("see above")

    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(TARGETS[name][0]()):
            (Path(corpus) / str(number)).write_bytes(seed)
        for function in readers():
            atheris.instrument_func(function)
        atheris.Setup([sys.argv[0], corpus, f"-max_total_time={int(minutes * 60)}", "-max_len=65536"], one)
        atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--target", choices=list(TARGETS))
    parser.add_argument("--seed", type=int, default=None, help="of the mutations; a random one if left out")
    parser.add_argument("--atheris", action="store_true", help="let atheris choose the inputs")
    parser.add_argument("--replay", type=Path, help="a file from fuzz-failures/")
    given = parser.parse_args()
    logging.disable(logging.CRITICAL)
    size = (
        int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() if sys.platform == "linux" else 0
    )
    if size:
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    if given.replay:
        trace = attempt(given.replay.name.partition("-")[0], given.replay.read_bytes())
        print(trace or "no failure")
        sys.exit(trace is not None)
    if given.atheris:
        run_atheris(given.target or "weights", given.minutes)
        return
    seed = random.SystemRandom().randrange(1 << 32) if given.seed is None else given.seed
    print(f"seed {seed}", flush=True)
    sys.exit(run([given.target] if given.target else list(TARGETS), given.minutes, seed) > 0)


if __name__ == "__main__":
    main()
