"""One contestant in a process of its own: it reads commands as lines of JSON, and answers each with one."""

from __future__ import annotations

import itertools
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .contestants import CONTESTANTS
from .geometry import GEOMETRIES, make_folder, operations

PROMPT = "a photo of an astronaut riding a horse on mars"
Answer = dict[str, Any]


def processor_seconds() -> float:
    """Processor time of this process so far, all its threads together."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def peak_of_process() -> int:
    """The most memory that this process has had in RAM, in bytes, since it began."""
    if sys.platform != "linux":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM:")))


class Worker:
    """A loaded contestant and what can be asked of it. Every method is a command."""

    def __init__(self, contestant: str, folder: str, device: str, geometry: str) -> None:
        self.contestant, self.folder, self.device = CONTESTANTS[contestant], Path(folder), device
        self.geometry = GEOMETRIES[geometry]
        self.pipe: Any = None

    def hello(self) -> Answer:
        """Imports what loading needs, so that it is not counted as loading."""
        if "diffusers" in self.contestant.load.__name__:
            from diffusers import StableDiffusionPipeline
        else:
            from russet import StableDiffusionPipeline  # noqa: F401
        if self.device == "cuda":
            torch.zeros(1, device="cuda")
        return {"threads": torch.get_num_threads()}

    def load(self) -> Answer:
        began = time.perf_counter()
        self.pipe = self.contestant.loaded(self.folder, self.device)
        self.wait()
        return {"seconds": time.perf_counter() - began}

    def picture(self, batch: int, side: int, steps: int, save: str | None = None) -> Answer:
        """Draws ``batch`` pictures in one call. ``save`` keeps them as numbers, which is not for timing."""
        generators = [torch.Generator().manual_seed(seed) for seed in range(batch)]
        options: dict[str, Any] = {"generator": generators}
        if save:  # the same noise for all: drawn in half precision, as one of them would, it is another
            options = {"output_type": "np", "latents": self.noise(generators, side)}

        def call() -> Any:
            return self.pipe(
                PROMPT,
                height=side,
                width=side,
                num_inference_steps=steps,
                guidance_scale=7.5,
                num_images_per_prompt=batch,
                **options,
            ).images

        answer, images = self.measured(call)
        if save and images is not None:
            import numpy

            numpy.save(save, images)
        return answer

    def noise(self, generators: list[torch.Generator], side: int) -> torch.Tensor:
        """Starting noise [B, C, h, w] in the UNet's precision, rounded alike for all precisions."""
        size = side // self.pipe.vae_scale_factor
        shape = (1, self.pipe.unet.config.in_channels, size, size)
        drawn = torch.cat([torch.randn(shape, generator=generator) for generator in generators])
        return drawn.half().to(self.pipe.unet.dtype)

    def step(self, side: int, steps: int) -> Answer:
        """Seconds and processor seconds from a step's end to the next's: medians over one call."""
        ends: list[tuple[float, float]] = []

        def mark(pipe: Any, index: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            del pipe, index, t
            self.wait()
            ends.append((time.perf_counter(), processor_seconds()))
            return tensors

        with torch.no_grad():
            self.pipe(
                PROMPT,
                height=side,
                width=side,
                num_inference_steps=steps,
                guidance_scale=7.5,
                output_type="latent",
                callback_on_step_end=mark,
            )
        took = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(ends)]
        seconds, processor = (statistics.median(values) for values in zip(*took, strict=True))
        return {"seconds": seconds, "processor": processor}

    def measured(self, call: Callable[[], Any]) -> tuple[Answer, Any]:
        """Seconds, processor seconds and peak bytes of a call; what it gave. Too little memory is an answer too."""
        self.wait()
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        processor, began = processor_seconds(), time.perf_counter()
        try:
            with torch.no_grad():
                result = call()
            self.wait()
        except Exception as error:  # torch's for too little memory and too many numbers are RuntimeErrors, ours is not
            if not isinstance(error, RuntimeError) and type(error).__name__ != "DoesNotFit":
                raise
            self.rest()
            return {"failed": f"{type(error).__name__}: {error}"[:200]}, None
        answer = {"seconds": time.perf_counter() - began, "processor": processor_seconds() - processor}
        if self.device == "cuda":
            answer |= {"peak": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
        else:
            answer |= {"peak": peak_of_process()}
        return answer, result

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def rest(self) -> Answer:
        """Gives back what the allocator keeps, so that others have it."""
        if self.device == "cuda":
            torch.cuda.empty_cache()
        return {}

    def plan(self, batch: int, side: int) -> Answer:
        """What Russet decided, in words; nothing for Diffusers."""
        plan = getattr(self.pipe, "plan", None)
        return {} if plan is None else {"plan": plan(height=side, width=side, num_images=batch).explain()}

    # -- what needs no contestant

    def make(self) -> Answer:
        make_folder(self.folder, self.geometry, self.device)
        return {}

    def operations(self, side: int) -> Answer:
        return dict(operations(self.geometry, side))

    def rates(self, matrix: int, copy: int) -> Answer:
        """What the device reaches: a product of square half-precision matrices (float32 on a CPU), and a copy."""
        dtype = torch.float16 if self.device == "cuda" else torch.float32
        a, b = (torch.randn(matrix, matrix, device=self.device, dtype=dtype) for _ in range(2))
        source = torch.randn(copy // 4, device=self.device)
        target = torch.empty_like(source)
        product, copied = self.best_of(lambda: a @ b), self.best_of(lambda: target.copy_(source))
        return {"flops": 2 * matrix**3 / product, "bytes": 2 * copy / copied}

    def best_of(self, call: Callable[[], Any], times: int = 10) -> float:
        seconds = []
        for _ in range(times + 1):
            self.wait()
            began = time.perf_counter()
            call()
            self.wait()
            seconds.append(time.perf_counter() - began)
        return min(seconds[1:])


def main() -> None:
    """Answers go to what was standard output; whatever else prints goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    worker = Worker(*sys.argv[1:])
    for line in sys.stdin:
        command = json.loads(line)
        answers.write(json.dumps(getattr(worker, command.pop("do"))(**command)) + "\n")


if __name__ == "__main__":
    main()
