"""Kernels compiled before a picture needs them: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton has wheels for Linux only")

from russet.backends.triton import warmup

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # where conftest.py asks for the interpreter


def test_all_kernels_compile():
    with torch.no_grad():
        for run in warmup.runs(DEVICE, torch.float16, True, True):
            run()


def test_a_compiler_that_fails_leaves_the_operations_to_pytorch(caplog):
    kernels = warmup.Warmup()
    assert kernels.ready()  # nothing was asked for
    kernels.prepare(torch.device("meta"), torch.float16, fused_geglu=False, upsample_fusion=False)  # nothing runs there
    assert not kernels.ready()
    assert "PyTorch's own are used" in caplog.text
