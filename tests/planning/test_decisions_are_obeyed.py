"""Every decision of a plan is read by the code that carries plans out, and real networks take what is decided."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

import russet
from russet import passes
from russet.hardware.facts import GIB, Facts, mac
from russet.models.autoencoder import Autoencoder
from russet.models.unet import UNet2DConditionModel
from russet.models.vae import AutoencoderKL
from russet.passes.base import Pass
from russet.planning.plan import MEANING, Request, plan
from russet.planning.plan_types import Decisions
from russet.planning.workload import Workload

from ..families import FAMILIES, VAE, carried_out, conditions

SOURCE = Path(russet.__file__).parent
NOT_APPLIED = Pass.__dataclass_fields__["apply"].default  # to a network; obeyed elsewhere
METHODS = {"dtype", "attention", "width", "precise_attention"}  # of one component each


def reads(tree: ast.AST) -> set[str]:
    """The decisions that code reads: ``plan["x"]``, ``plan.x``, ``plan.dtype("unet")``, ``self.plan["x"]``."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and named_plan(node.value) and isinstance(node.slice, ast.Constant):
            found.add(str(node.slice.value))
        elif isinstance(node, ast.Attribute) and named_plan(node.value):
            found.add(node.attr)
    return found


def named_plan(node: ast.AST) -> bool:
    name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
    return name in ("plan", "choices")  # those of a plan that passes are given


def test_every_decision_is_read_outside_of_planning():
    read: set[str] = set()
    for path in SOURCE.rglob("*.py"):
        if path.relative_to(SOURCE).parts[0] not in ("planning", "diagnostics", "cli"):
            read |= reads(ast.parse(path.read_text(encoding="utf-8")))
    read |= {"dtype", "attention"} if METHODS & read else set()
    read |= {one.name for one in passes.PASSES if one.apply is not NOT_APPLIED}
    unread = {name for name in MEANING if name.partition(".")[0] not in read}
    assert not unread, f"decisions that nothing obeys: {sorted(unread)}"


def test_every_decision_that_is_read_is_made():
    properties = {name for name, member in vars(Decisions).items() if isinstance(member, property)}
    assert properties <= set(MEANING)
    assert set(passes.OFF) <= set(MEANING)


# --- families ---


def devices() -> dict[str, Facts]:
    memory = {"memory": 64 * GIB, "available": 48 * GIB}
    cpu = Facts(device="cpu", chip="CPU", torch=(2, 13, 0), machine="x86_64", **memory)
    return {
        "mps with flash kernels": mac("M1", memory_gib=64),
        "mps before them": mac("M1", memory_gib=64, torch="2.12.1", macos="14.6"),
        "mps in chunks and float32": mac("M2", memory_gib=64, torch="1.13.1", macos="12.6"),
        "cpu": cpu,
        "cuda without Triton": Facts(device="cuda", chip="GPU", torch=(2, 13, 0), bf16=True, **memory),
    }


def built(config: dict[str, object]) -> tuple[UNet2DConditionModel, Autoencoder]:
    torch.manual_seed(0)
    return UNet2DConditionModel(config).requires_grad_(False), AutoencoderKL(VAE).requires_grad_(False)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("device", devices())
def test_the_network_of_every_family_takes_what_is_decided_for_it(family, device):
    (unet, _), facts = built(FAMILIES[family]), devices()[device]
    workload = Workload.of(unet=unet.config, vae=VAE, width=18, height=22)  # of odd sizes in latents
    height, width = workload.latents
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(2, unet.config.in_channels, height, width, generator=generator)
    context = torch.randn(2, 7, 16, generator=generator)
    with torch.no_grad():
        expected = unet(sample, 500.0, context, **conditions(unet, 2)).sample
    for asked in ({}, {"fast_paths": False}, {"attention_slicing": "max"}):
        found = plan(facts, workload, Request(dtype="float32", **asked))
        made = carried_out(found, unet, sample, context)
        torch.testing.assert_close(made, expected, rtol=2e-3, atol=2e-4)
    half = plan(facts, workload)  # what half precision alone decides, carried out in float32
    torch.testing.assert_close(carried_out(half, unet, sample, context), expected, rtol=2e-3, atol=2e-4)
