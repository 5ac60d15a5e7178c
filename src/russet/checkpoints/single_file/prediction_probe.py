"""What a UNet predicts, asked of the UNet itself."""

from __future__ import annotations

from typing import Any

import torch

from russet.checkpoints.single_file.prediction import Meaning

LAST_TIMESTEP = 999
SIDE = 8  # latents per side: enough numbers to tell a likeness of 0 from one of 1, few enough to take seconds


@torch.no_grad()
def tried(unet: Any) -> Meaning | None:
    """Shows the UNet almost pure noise at the last timestep, x = alpha x0 + sigma eps with alpha = 0.07, and looks at
    what comes back. A network that predicts noise returns nearly its input; one that predicts velocity,
    v = alpha eps - sigma x0, returns nearly the opposite of a picture, which has little to do with it.

    None if the answer is neither, or the machine cannot compute in the network's precision.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, unet.config.in_channels, SIDE, SIDE, generator=generator, device="cpu").to(unet.dtype)
    context = torch.zeros(1, 1, unet.config.cross_attention_dim, dtype=unet.dtype, device="cpu")
    try:
        answer = unet(noise, LAST_TIMESTEP, context).sample
    except RuntimeError:  # older torch lacks half precision on the CPU
        return None
    likeness = float(torch.nn.functional.cosine_similarity(answer.flatten().float(), noise.flatten().float(), dim=0))
    return "epsilon" if likeness > 0.7 else "v_prediction" if abs(likeness) < 0.3 else None
