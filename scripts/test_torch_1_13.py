#!/usr/bin/env python3
"""The core of the tests on the oldest PyTorch that Russet supports: 1.13.1, with Python 3.10 and numpy 1.

    scripts/test_torch_1_13.py [--core] [arguments of pytest]
    scripts/test_torch_1_13.py --prepare

Needs Python 3.10 somewhere: as ``python3.10``, from pyenv, Homebrew, python.org, or GitHub's tool cache. Its own
environment (3.5 GB on Linux, about a minute to install) is kept in ``$XDG_CACHE_HOME/russet-torch-1.13``
(``~/.cache`` by default) and used again for as long as scripts/torch_1_13.txt, which pins all of it, is the same.

Without arguments all tests run; ``--core`` leaves out those that take long and ask little of torch. What needs
Diffusers is skipped, since none supports this torch. ``--prepare`` makes the environment and runs nothing; a run that
is begun meanwhile waits for it. Ends with pytest's exit code, or with 77 without a Python 3.10.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PINS = ROOT / "scripts" / "torch_1_13.txt"
LONG = {
    "devices/test_on_virtual_mac.py": (
        "test_no_step_waits_for_the_device_but_now_and_then_to_look_for_overflow",
        "test_a_list_of_prompts_gives_the_pictures_of_single_ones",
        "test_noise_never_comes_from_the_device",
        "test_a_picture_waits_for_the_device_in_one_step_until_one_was_drawn_well",
        "test_a_text_that_overflows_in_the_weights_is_read_apart_from_them",
        "test_before_torch_has_events_every_fifth_step_waits_to_look_for_overflow",
        "test_leaving_work_out_gives_the_cpus_picture_with_fewer_kernels_and_no_more_waits",
        "test_the_end_tells_of_an_overflow_and_the_last_good_latents_go_on",
        "test_the_host_stays_one_step_ahead_of_the_device",
    ),
    "pipelines/test_on_cpu.py": ("test_fast_paths_and_plain_operations_draw_the_same_picture",),
    "pipelines/test_preview.py": ("test_a_preview_has_the_colours_of_the_picture_and_a_pixel_for_each_latent",),
    "test_mini.py": (
        "test_the_background_has_the_colour_that_the_prompt_asks_for",
        "test_english_and_korean_ask_for_the_same_scene",
        "test_a_batch_of_four_equals_four_single_runs",
        "test_a_picture_in_bfloat16_is_nearly_that_in_float32",
    ),
}
ASIDE = (
    "properties/*",
    "parity/*",
    "cli/*",
    "test_docs.py",
    "test_benchmarks.py",
    "test_heap.py",
    "test_metadata.py",
    "test_random_streams.py",
    "test_samplers.py",
    "test_smallfiles.py",
    "test_tokenizer.py",
    "checkpoints/test_hub.py",
    "checkpoints/test_inspect*.py",
    "checkpoints/test_single_file_*.py",
    "devices/test_plan.py",
    "devices/test_virtual_mps*.py",
    "pipelines/test_less_work.py",
)
CORE = (
    *(f"--ignore-glob=*tests/{part}" for part in ASIDE),
    *(f"--deselect=tests/{file}::{name}" for file, names in LONG.items() for name in names),
)
NO_PYTHON = 77


def candidates() -> Iterator[Path]:
    """Where a Python 3.10 may be."""
    if found := shutil.which("python3.10"):
        yield Path(found)
    folders = {
        Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser() / "versions": "3.10*/bin/python3",
        Path(os.environ.get("RUNNER_TOOL_CACHE", "/opt/hostedtoolcache")) / "Python": "3.10*/*/bin/python3",
        Path("/opt/homebrew/bin"): "python3.10",
        Path("/Library/Frameworks/Python.framework/Versions/3.10/bin"): "python3.10",
        Path("/usr/local/bin"): "python3.10",
    }
    for folder, pattern in folders.items():
        yield from sorted(folder.glob(pattern), reverse=True)


def python_3_10() -> Path | None:
    """One that runs and is 3.10 (pyenv's ``python3.10`` is there even where it is switched off)."""
    ask = "import sys, venv; print(*sys.version_info[:2])"
    for candidate in candidates():
        with contextlib.suppress(OSError):
            found = subprocess.run([candidate, "-c", ask], capture_output=True, text=True, check=False)
            if found.stdout.strip() == "3 10":
                return candidate
    return None


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Holds a lock beside the folder, so that two runs do not install into it at once."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def environment(python: Path) -> Path:
    """The Python of the kept environment, made anew where the pins or the machine are not those it was made for."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    folder = cache / "russet-torch-1.13"
    stamp = folder / "made-for"
    wanted = hashlib.sha256(f"{PINS.read_text()}{platform.platform()}{python}".encode()).hexdigest()
    with alone(folder):
        if not stamp.exists() or stamp.read_text() != wanted:
            print(f"installing torch 1.13.1 into {folder}", flush=True)
            shutil.rmtree(folder, ignore_errors=True)
            subprocess.run([python, "-m", "venv", folder], check=True)
            pip = [folder / "bin" / "python", "-m", "pip", "install", "-q", "--disable-pip-version-check"]
            subprocess.run([*pip, "-r", PINS], check=True)
            stamp.write_text(wanted)
    return folder / "bin" / "python"


def main(arguments: list[str]) -> int:
    python = python_3_10()
    if python is None:
        print("there is no Python 3.10 here, so nothing was tested on torch 1.13")
        return NO_PYTHON
    tested = environment(python)
    if arguments == ["--prepare"]:
        return 0
    if arguments[:1] == ["--core"]:
        arguments = [*CORE, *arguments[1:]]
    variables = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [tested, "-m", "pytest", "-p", "no:cacheprovider", *arguments], cwd=ROOT, env=variables, check=False
    ).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
