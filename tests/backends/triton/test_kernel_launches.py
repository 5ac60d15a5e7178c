"""What is compiled ahead is what pictures launch; without the interpreter that conftest.py asks for, so elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton has wheels for Linux only")

HERE = Path(__file__).parents[2]
PICTURES = """
import importlib, itertools, sys
import torch
from torch.nn import functional as F
from russet import passes
from russet.backends.triton import layers, ops, warmup
from kernel_launches import recorded
from russet.models.unet import UNet2DConditionModel
from russet.models.vae import AutoencoderKL
from russet.passes.base import Choices

def key(launch):  # all that Triton compiles another kernel for
    kernel = getattr(importlib.import_module(launch["module"]), launch["kernel"])
    def part(parameter, value):
        if isinstance(value, dict):
            return value["dtype"], tuple(value.get("block", ()))
        fixed = parameter.do_not_specialize or isinstance(value, float)
        return "any" if fixed else 1 if value == 1 else value % 16 == 0
    return (launch["kernel"], *map(part, kernel.params, launch["arguments"]), *launch["constants"].items())

runs = warmup.runs(torch.device("cpu"), torch.float16, True, True)
with torch.no_grad(), recorded(*warmup.KERNELS) as launches:
    for run in runs:
        run()
ahead = {key(launch) for launch in launches}
assert len(ahead) == len(runs)

ops.computes = layers.computes = lambda x: x.numel() < 2**31  # meta tensors as well
for name in ("conv2d", "conv_transpose2d"):  # which a GPU leaves channels-last
    def convolve(*given, conv=getattr(F, name), **named):
        return conv(*given, **named).contiguous(memory_format=torch.channels_last)
    setattr(F, name, convolve)
wanted = dict(buffer_donation=True, ops="triton", fused_geglu=True, upsample_fusion=True, offload=None)
choices = Choices({**passes.OFF, **wanted}, rows=2)
vae = dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2, norm_num_groups=32,
           down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
with torch.device("meta"), torch.no_grad():
    networks = UNet2DConditionModel(cross_attention_dim=768).half(), AutoencoderKL(**vae).half()
    for name, network in zip(("unet", "vae"), networks):
        passes.apply(network.to(memory_format=torch.channels_last), name, choices)
    met = set()
    for rows, (height, width) in itertools.product((1, 2, 32), ((64, 64), (72, 64), (96, 64))):
        latents = torch.empty(rows, 4, height, width, dtype=torch.half).to(memory_format=torch.channels_last)
        with recorded(*warmup.KERNELS) as launches:
            networks[0](latents, torch.tensor(1.0), torch.empty(rows, 77, 768, dtype=torch.half))
            networks[1].decode(latents[:4])
        found = {key(launch) for launch in launches}
        assert not found - ahead, (rows, height, width, found - ahead)
        met |= found
assert met == ahead, ahead - met
"""


def run(program: str, cache: Path) -> None:
    settings = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    settings |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    done = subprocess.run([sys.executable, "-c", program], env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_pictures_launch_what_is_compiled_ahead_and_all_of_it(tmp_path):
    run(PICTURES, tmp_path)
