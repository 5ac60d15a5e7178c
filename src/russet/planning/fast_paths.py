"""Which ways of computing the same with less work are worth it on a device: each decision with its reason."""

from __future__ import annotations

from russet.hardware.facts import Facts
from russet.hardware.known_bugs import affected
from russet.planning.calls import unet_rows
from russet.planning.decisions import Decision, Decisions, gigabytes, settled
from russet.planning.plan_types import Request
from russet.planning.prepared import absorbed_bytes, copied_bytes, text_key_bytes
from russet.planning.workload import Sizes

X86 = ("x86_64", "AMD64")  # what Pythons call it on Linux and Windows

ABSORBED = 2**26
"""Bytes that texts in the weights may take: as much again as a UNet call of one 512×512 picture needs, at the most."""

LAUNCH_BOUND = 16 * 512 * 512
"""Pixels times rows of a UNet call up to which launching its kernels one by one takes longer than running them.

On an H200 two rows of 512×512 run in a quarter of the time that their launches take. Unrecorded, sixteen rows took 56
ms a step, and thirty-two, twice the work, 55: launches take so long where the processor is slow.
"""


def fast_paths(facts: Facts, sizes: Sizes, request: Request, found: Decisions) -> list[Decision]:
    """Fused steps, fewer and joined products, kept text, recorded calls; ``found`` is what is decided already."""
    user = request.user
    return [
        settled(user, "elementwise", *elementwise(facts)),
        settled(user, "gated_products", *gated_products(facts, found)),
        settled(user, "convolutions", *convolutions(facts, found)),
        settled(user, "doubling", *doubling(facts, found)),
        settled(user, "linear_layers", *linear_layers(facts)),
        settled(user, "freed_memory", *freed_memory(facts)),
        settled(user, "joined_products", *joined_products(facts, found)),
        settled(user, "residual_sums", *residual_sums(facts, sizes, found)),
        settled(user, "times", *times(facts, found)),
        settled(user, "text_keys", *text_keys(facts, sizes, request, found)),
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


def doubling(facts: Facts, found: Decisions) -> tuple[str, str]:
    if not facts.triton:
        return "repeated", "there are no kernels of ours here, which would make the weights"
    if found.offload == "sequential":
        return "repeated", "layers come to the device one by one"
    if max(found.width("unet"), found.width("vae")) > 2:  # for 256 channels of 256×256 it takes 1.4 times as long
        return "repeated", "in float32 cuDNN is not always quicker with a transposed convolution, and takes more memory"
    return "transposed", "four ninths of the multiplications, and the doubled map is never made"


def linear_layers(facts: Facts) -> tuple[str, str]:
    if facts.device == "cpu" and facts.onednn and facts.machine in X86:
        return "onednn", "its float32 products are the fastest here"
    return "native", "PyTorch's choice is the best known here"


def freed_memory(facts: Facts) -> tuple[str, str]:
    if facts.device != "cpu":
        return "returned", "the device's memory has an allocator of its own"
    if facts.glibc:
        return "kept", "glibc would give each map back, and the system clear the next one's pages, at every operation"
    return "returned", "only glibc, by its own rules, is known to gain from keeping it"


def joined_products(facts: Facts, found: Decisions) -> tuple[bool, str]:
    if found.offload == "sequential":
        return False, "layers come to the device one by one"
    if facts.device == "cpu":
        return False, "a CPU has no launches to save"
    return True, "one large product keeps the device busier than three small ones"


def residual_sums(facts: Facts, sizes: Sizes, found: Decisions) -> tuple[str, str]:
    if facts.device != "mps":
        return "apart", "there are no launches to save" if facts.device == "cpu" else "norms take the sums in"
    if found.offload == "sequential":
        return "apart", "layers come to the device one by one"
    if bug := affected(facts, "gathered-operands"):
        return "apart", f"on this macOS {bug.what}"
    size = copied_bytes(sizes, found, unet_rows(sizes, found))
    if found.width("unet") > 2:
        return "in products", f"one operation for two; in float32 {gigabytes(size)} for copies of weights are too much"
    if size > facts.budget // 50:
        return "in products", f"one operation for two; {gigabytes(size)} for copies of weights are too much to keep"
    return "in products, with copies", f"one operation for two, some of them by copies of weights: {gigabytes(size)}"


def times(facts: Facts, found: Decisions) -> tuple[str, str]:
    if facts.device != "mps":
        return "each call", "to launch so little more takes no time here"
    if found.offload == "sequential":
        return "each call", "layers come to the device one by one"
    return "ahead", "what the UNet makes of a time is the same for every picture and text"


def text_keys(facts: Facts, sizes: Sizes, request: Request, found: Decisions) -> tuple[str, str]:
    size, absorbed = text_key_bytes(sizes, found), absorbed_bytes(sizes, found)
    if found.offload == "sequential":
        return "each call", "layers come to the device one by one"
    if size > facts.budget // 50:
        return "each call", f"{gigabytes(size)} for all prompts are too much to keep"
    kept = f"the text is the same in all steps, and {gigabytes(size)} keep what is made of it"
    if facts.device == "cuda":
        return "kept together", kept
    if facts.device != "mps" or affected(facts, "no-sdpa") or affected(facts, "no-flash"):
        return "kept", kept
    if sizes.unet.upcast:
        return "kept", f"{kept}; this network's scores are computed in float32, apart from its weights"
    if request.attention_slicing not in (None, "off"):
        return "kept", f"{kept}; attention in slices was asked for"
    if found.width("unet") > 2 or absorbed > min(ABSORBED, facts.budget // 40):
        return "kept", f"{kept}; {gigabytes(absorbed)} for the text in all weights would be too much"
    return (
        "absorbed",
        f"the text is the same in all steps, and {gigabytes(absorbed)} hold it multiplied into the weights",
    )


def graphs(facts: Facts, sizes: Sizes, found: Decisions) -> tuple[bool, str]:
    if facts.device != "cuda":
        return False, "only CUDA has them"
    if found.offload is not None:
        return False, "weights move between calls"
    rows = sizes.rows * min(found.micro_batch, sizes.images)
    if rows * sizes.width * sizes.height > LAUNCH_BOUND:
        return False, "calls of this size keep the GPU busy for longer than it takes to launch their kernels"
    return True, "launching the kernels one by one would take longer than running them"
