"""Which optimisations pay on a device: every decision with its reason."""

from __future__ import annotations

from russet.hardware.facts import Facts
from russet.hardware.known_bugs import affected
from russet.planning.memory import folded_bytes, prompt_kv_bytes, unet_rows, weight_copy_bytes
from russet.planning.plan_types import Decision, Decisions, Request, gigabytes, resolve
from russet.planning.workload import Workload

X86 = ("x86_64", "AMD64")  # what Pythons call it on Linux and Windows

MOST_FOLDED = 2**26
"""Bytes that prompts folded into weights may take: at most what a UNet call of one 512×512 image needs besides."""

LAUNCH_BOUND = 16 * 512 * 512
"""Pixels times rows of a UNet call up to which launching its kernels one by one takes longer than running them.

On an H200 two rows of 512×512 run in a quarter of the time that their launches take. Unrecorded, sixteen rows took 56
ms a step, and thirty-two, twice the work, 55: launches take so long where the processor is slow.
"""

NO_TRITON = "Russet's Triton kernels do not run on this device"
LAYER_BY_LAYER = "with sequential offload, layers are on the device one at a time"


def fast_paths(facts: Facts, workload: Workload, request: Request, found: Decisions) -> list[Decision]:
    """The decisions about optimisations; ``found`` are those that were made before."""
    user = request.user
    return [
        resolve(user, "ops", *ops(facts)),
        resolve(user, "fused_geglu", *fused_geglu(facts, found)),
        resolve(user, "winograd", *winograd(facts, found)),
        resolve(user, "upsample_fusion", *upsample_fusion(facts, found)),
        resolve(user, "onednn_linear", *onednn_linear(facts)),
        resolve(user, "malloc_tuning", *malloc_tuning(facts)),
        resolve(user, "packed_projections", *packed_projections(facts, found)),
        resolve(user, "residual_fusion", *residual_fusion(facts, workload, found)),
        resolve(user, "timestep_embeddings", *timestep_embeddings(facts, workload, found)),
        resolve(user, "prompt_cache", *prompt_cache(facts, workload, request, found)),
        resolve(user, "cuda_graphs", *cuda_graphs(facts, workload, found)),
    ]


def ops(facts: Facts) -> tuple[str, str]:
    if facts.triton:
        return "triton", "memory limits norms and activations, and a fused kernel reads and writes each value once"
    return "eager", NO_TRITON if facts.device != "cuda" else "Triton, or a C compiler for it, is not installed"


def fused_geglu(facts: Facts, found: Decisions) -> tuple[bool, str]:
    if not facts.triton:
        return False, NO_TRITON
    if found.offload == "sequential":
        return False, LAYER_BY_LAYER
    if facts.capability < (9, 0):
        return False, "the kernel is fast only on GPUs that load tiles asynchronously (compute capability 9.0 and up)"
    if found.width("unet") > 2:
        return False, "the kernel is for half precision"
    return True, "half of the matrix product's result is used at once and never written to memory"


def winograd(facts: Facts, found: Decisions) -> tuple[bool, str]:
    if facts.device != "cpu":
        return False, "a GPU multiplies faster than it would transform feature maps"
    if "float32" not in (found.dtype("unet"), found.dtype("vae")):
        return False, "in half precision it would change more than the last digits"
    return True, "it needs a quarter of the multiplications, and changes only the last digits of float32"


def upsample_fusion(facts: Facts, found: Decisions) -> tuple[bool, str]:
    if not facts.triton:
        return False, NO_TRITON
    if found.offload == "sequential":
        return False, LAYER_BY_LAYER
    if max(found.width("unet"), found.width("vae")) > 2:  # for 256 channels of 256×256 it takes 1.4 times as long
        return False, "in float32 a transposed convolution of cuDNN is not always faster, and takes more memory"
    return True, "it needs four ninths of the multiplications, and the upsampled map is never written to memory"


def onednn_linear(facts: Facts) -> tuple[bool, str]:
    if facts.device == "cpu" and facts.onednn and facts.machine in X86:
        return True, "oneDNN's matrix products are the fastest on this CPU"
    return False, "PyTorch chooses the library for linear layers here"


def malloc_tuning(facts: Facts) -> tuple[bool, str]:
    if facts.device != "cpu":
        return False, "the device's memory has an allocator of its own"
    if facts.glibc:
        return True, "glibc would return every feature map to the system, which clears the next one's pages each time"
    return False, "only glibc with its default settings is known to gain from it"


def packed_projections(facts: Facts, found: Decisions) -> tuple[bool, str]:
    if found.offload == "sequential":
        return False, LAYER_BY_LAYER
    if facts.device == "cpu":
        return False, "one large matrix product is no faster than three smaller ones on a CPU"
    return True, "one large matrix product keeps the GPU busier than three smaller ones"


def residual_fusion(facts: Facts, workload: Workload, found: Decisions) -> tuple[str, str]:
    if facts.device != "mps":
        return "off", (
            "a CPU saves nothing with fewer kernels" if facts.device == "cpu" else "the norm kernels compute the sums"
        )
    if found.offload == "sequential":
        return "off", LAYER_BY_LAYER
    if bug := affected(facts, "gathered-operands"):
        return "off", f"on this macOS {bug.what}"
    size = weight_copy_bytes(workload, found, unet_rows(workload, found))
    if found.width("unet") > 2:
        return "on", f"fewer kernels; in float32, {gigabytes(size)} for copies of weights would be too much"
    if size > facts.budget // 50:
        return "on", f"fewer kernels; {gigabytes(size)} for copies of weights would be too much"
    return "with weight copies", f"fewer kernels; copies of some weights take {gigabytes(size)}"


def timestep_embeddings(facts: Facts, workload: Workload, found: Decisions) -> tuple[str, str]:
    if facts.device != "mps":
        return "per call", "a few more small kernels take no time on this device"
    if found.offload == "sequential":
        return "per call", LAYER_BY_LAYER
    if workload.unet.conditioned_per_row:
        return (
            "per call",
            "this network adds conditions of each image (a class, or SDXL's pooled prompt and sizes) to them",
        )
    return "precomputed", "they depend on the timestep alone, and not on the image or the prompt"


def prompt_cache(facts: Facts, workload: Workload, request: Request, found: Decisions) -> tuple[str, str]:
    size, folded = prompt_kv_bytes(workload, found), folded_bytes(workload, found)
    if found.offload == "sequential":
        return "off", LAYER_BY_LAYER
    if size > facts.budget // 50:
        return "off", f"the keys and values of all prompts would take {gigabytes(size)}, which is too much"
    kept = f"the prompt is the same in all steps; its keys and values take {gigabytes(size)}"
    if facts.device == "cuda":
        return "packed keys and values", kept
    if facts.device != "mps" or affected(facts, "no-sdpa") or affected(facts, "no-flash"):
        return "keys and values", kept
    if workload.unet.upcast_attention:
        return "keys and values", f"{kept}; this network needs float32 scores, which folded weights would not give"
    if request.attention_slicing not in (None, "off"):
        return "keys and values", f"{kept}; attention slicing was requested"
    if found.width("unet") > 2 or folded > min(MOST_FOLDED, facts.budget // 40):
        return "keys and values", f"{kept}; folded into the weights they would take {gigabytes(folded)}, too much"
    return (
        "folded into weights",
        f"the prompt is the same in all steps; folded into the weights it takes {gigabytes(folded)}",
    )


def cuda_graphs(facts: Facts, workload: Workload, found: Decisions) -> tuple[bool, str]:
    if facts.device != "cuda":
        return False, "only CUDA has graphs"
    if found.offload is not None:
        return False, "offloading moves weights between calls"
    rows = workload.rows * min(found.micro_batch, workload.images)
    if rows * workload.width * workload.height > LAUNCH_BOUND:
        return False, "kernels of this size run longer than it takes to launch them"
    return True, "launching the kernels one by one would take longer than running them"
