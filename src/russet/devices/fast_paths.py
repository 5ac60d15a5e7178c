"""Which ways of computing the same with less work are worth it on a device: each decision with its reason."""

from __future__ import annotations

from russet.devices.choices import TEXT, Request
from russet.devices.decisions import Decision, Decisions, gigabytes, settled
from russet.devices.facts import Facts
from russet.devices.sizes import Sizes

X86 = ("x86_64", "AMD64")  # what Pythons call it on Linux and Windows
LAUNCH_BOUND = 8 * 512 * 512
"""Pixels times rows of a UNet call up to which launching its kernels one by one takes longer than running them.

On an H200 two rows of 512×512 run in a quarter of the time that their launches take.
"""


def fast_paths(facts: Facts, sizes: Sizes, request: Request, found: Decisions) -> list[Decision]:
    """Fused steps, fewer and joined products, kept text, recorded calls; ``found`` is what is decided already."""
    user = request.user
    return [
        settled(user, "elementwise", *elementwise(facts)),
        settled(user, "gated_products", *gated_products(facts, found)),
        settled(user, "convolutions", *convolutions(facts, found)),
        settled(user, "linear_layers", *linear_layers(facts)),
        settled(user, "joined_products", *joined_products(facts, found)),
        settled(user, "text_keys", *text_keys(facts, sizes, found)),
        settled(user, "graphs", *graphs(facts, sizes, found)),
    ]


def elementwise(facts: Facts) -> tuple[str, str]:
    if facts.triton:
        return "fused", "each of these steps is limited by memory, and one kernel reads and writes it once"
    return (
        "plain",
        "there are no kernels of ours for this device"
        if facts.device != "cuda"
        else "Triton is not there, or no C compiler for it",
    )


def gated_products(facts: Facts, found: Decisions) -> tuple[bool, str]:
    if not facts.triton:
        return False, "there are no kernels of ours here"
    if found.offload == "sequential":
        return False, "layers come to the device one by one"
    if facts.capability < (9, 0):
        return False, "the GPU does not copy whole tiles by itself, which makes the kernel quick"
    if found.width("unet") > 2:
        return False, "the kernel is for half precision"
    return True, "half of what the product would write, and read again, is never written"


def convolutions(facts: Facts, found: Decisions) -> tuple[str, str]:
    if facts.device != "cpu":
        return "direct", "a GPU multiplies faster than it would bring maps to and fro"
    if "float32" not in (found.dtype("unet"), found.dtype("vae")):
        return "direct", "in half precision more than the last digits would change"
    return "winograd", "a quarter of the multiplications; only the last digits of float32 change"


def linear_layers(facts: Facts) -> tuple[str, str]:
    if facts.device == "cpu" and facts.onednn and facts.machine in X86:
        return "onednn", "its float32 products are the fastest here"
    return "native", "PyTorch's choice is the best known here"


def joined_products(facts: Facts, found: Decisions) -> tuple[bool, str]:
    if found.offload == "sequential":
        return False, "layers come to the device one by one"
    if facts.device == "cpu":
        return False, "a CPU has no launches to save"
    return True, "one large product keeps the device busier than three small ones"


def text_keys(facts: Facts, sizes: Sizes, found: Decisions) -> tuple[str, str]:
    size = text_key_bytes(sizes, found)
    if found.offload == "sequential":
        return "each call", "layers come to the device one by one"
    if size > facts.budget // 50:
        return "each call", f"{gigabytes(size)} for all prompts are too much to keep"
    return "kept", f"the text is the same in all steps, and {gigabytes(size)} keep what is made of it"


def text_key_bytes(sizes: Sizes, found: Decisions) -> int:
    """What the keys and values of all prompts take, in all layers."""
    return sizes.images * sizes.rows * TEXT * 2 * sizes.unet.attended * found.width("unet")


def graphs(facts: Facts, sizes: Sizes, found: Decisions) -> tuple[bool, str]:
    if facts.device != "cuda":
        return False, "only CUDA has them"
    if found.offload is not None:
        return False, "weights move between calls"
    rows = sizes.rows * min(found.micro_batch, sizes.images)
    if rows * sizes.width * sizes.height > LAUNCH_BOUND:
        return False, "calls of this size keep the GPU busy for longer than it takes to launch their kernels"
    return True, "launching the kernels one by one would take longer than running them"
