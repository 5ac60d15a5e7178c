"""What the plan decides on mps, carried out on the virtual device by a network of every family."""

from __future__ import annotations

import pytest
import torch

from russet.hardware.facts import mac
from russet.models.unet import UNet2DConditionModel
from russet.planning.plan import Request, plan
from russet.planning.workload import Workload

from ..families import FAMILIES, VAE, carried_out, conditions
from .virtual_mps import VirtualMac


@pytest.mark.parametrize("version", ["2.13.0", "2.12.1"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_network_of_every_family_computes_on_mps_what_it_computes_on_the_cpu(family, version):
    torch.manual_seed(0)
    unet = UNet2DConditionModel(FAMILIES[family]).requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(2, unet.config.in_channels, 11, 9, generator=generator)
    context = torch.randn(2, 7, 16, generator=generator)
    with torch.no_grad():
        expected = unet(sample, 500.0, context, **conditions(unet, 2)).sample
    facts = mac("M1", memory_gib=64, torch=version)
    found = plan(facts, Workload.of(unet=unet.config, vae=VAE, width=18, height=22), Request(dtype="float32"))
    with VirtualMac(torch=version):
        unet.to("mps")
        made = carried_out(found, unet, sample.to("mps"), context.to("mps")).cpu()
    torch.testing.assert_close(made, expected, rtol=2e-3, atol=2e-4)
