"""Known defects of PyTorch, most of them on mps, as rows: where they are, what they do, and how Russet avoids them.

The plan asks for rows by id (``affected``). A new defect is a new row here and one place that reads it, never a
comparison of versions elsewhere. Sources are public threads and the PyPI wheels, never a guess from a version number.
"""

from __future__ import annotations

from dataclasses import dataclass

from russet.hardware.facts import Facts, Version

PYTORCH = "https://github.com/pytorch/pytorch/issues/"
ANY: Version = ()


@dataclass(frozen=True)
class Bug:
    """One defect. A range is (first version with it, first without); ``()`` leaves that end open."""

    id: str
    what: str
    consequence: str
    remedy: str
    link: str
    torch: tuple[Version, Version] = (ANY, ANY)
    macos: tuple[Version, Version] = (ANY, ANY)
    chips: frozenset[str] = frozenset()  # empty: all
    devices: frozenset[str] = frozenset({"mps"})

    def holds(self, facts: Facts) -> bool:
        """Whether a machine has the defect; an unknown macOS is assumed to have it."""
        versions = [(facts.torch, self.torch), *([(facts.macos, self.macos)] if facts.macos else [])]
        return (
            facts.device in self.devices
            and all(version >= first and (not fixed or version < fixed) for version, (first, fixed) in versions)
            and (not self.chips or facts.chip_family in self.chips)
        )


def known(facts: Facts) -> tuple[Bug, ...]:
    """The defects that hold on a machine, in the table's order."""
    return tuple(bug for bug in BUGS if bug.holds(facts))


def affected(facts: Facts, bug_id: str) -> Bug | None:
    """The row of an id if the machine has the defect, else None. An unknown id raises KeyError."""
    return bug if (bug := BY_ID[bug_id]).holds(facts) else None


BUGS: tuple[Bug, ...] = (
    Bug(
        "empty-baddbmm",
        "baddbmm with beta=0 reads its uninitialised first operand",
        "sliced attention turns NaN: black pictures",
        "scores are bmm(q · scale, kᵀ), everywhere",
        PYTORCH + "187521",
        torch=(ANY, (2, 14)),
    ),
    Bug(
        "no-sdpa",
        "there is no scaled_dot_product_attention",
        "there is no fused attention",
        "attention in chunks of queries",
        "https://pytorch.org/docs/2.0/generated/torch.nn.functional.scaled_dot_product_attention.html",
        torch=(ANY, (2, 0)),
        devices=frozenset({"mps", "cuda", "cpu"}),
    ),
    Bug(
        "no-cpu-flash",
        "fused attention builds the whole score matrix on the CPU",
        "8 GiB for one layer of SD 1.5 at 1024×1024",
        "attention in chunks of queries",
        "https://github.com/pytorch/pytorch/pull/103826",
        torch=((2, 0), (2, 1)),
        devices=frozenset({"cpu"}),
    ),
    Bug(
        "no-flash",
        "fused attention builds the whole score matrix for more than 8 queries",
        "8 GiB for one layer of SD 1.5 at 1024×1024",
        "attention in chunks of queries",
        PYTORCH + "139389",
        torch=((2, 0), (2, 13)),
    ),
    Bug(
        "flash-head-sizes",
        "flash kernels exist for heads of 32, 64, 72, 80, 96, 128 and 256",
        "other head sizes build the whole score matrix",
        "heads are padded with zeros to the next size, with their own scale; larger ones go in chunks",
        "https://github.com/pytorch/pytorch/pull/181575",
        torch=((2, 13), ANY),
    ),
    Bug(
        "half-scores",
        "float16 attention scores overflow",
        "black or noisy pictures",
        "scores and softmax in float32, where the scores are ours to compute",
        "https://github.com/comfyanonymous/ComfyUI/issues/3521",
        macos=((14, 5), ANY),
    ),
    Bug(
        "half-overflow",
        "float16 scores overflow before the softmax",
        "NaN in long attention rows",
        "queries are scaled before the product; softmax statistics are float32",
        PYTORCH + "165961",
    ),
    Bug(
        "causal-leak",
        "is_causal=True in half precision lets a token see up to three later ones",
        "prompts are understood wrongly",
        "the text encoder gets an explicit float mask",
        PYTORCH + "195910",
        torch=(ANY, (2, 13)),
    ),
    Bug(
        "slow-group-norm",
        "GroupNorm is decomposed in Python instead of one kernel",
        "about seven times slower than a composite of plain operations",
        "each group is normalised as a layer is, in float32; a large map in steps that need less room",
        PYTORCH + "182805",
        torch=((2, 1), (2, 13)),
    ),
    Bug(
        "long-contraction",
        "batched matrix products over 32767 or more terms are silently wrong",
        "large pictures turn to noise",
        "keys go in chunks of fewer",
        PYTORCH + "195163",
        chips=frozenset({"M1", "M2"}),
    ),
    Bug(
        "long-matrix",
        "products of two matrices over more than 32768 terms are silently wrong",
        "noise instead of pictures",
        "none of the networks has such a product",
        PYTORCH + "193487",
        torch=((2, 7), (2, 14)),
        chips=frozenset({"M1", "M2"}),
    ),
    Bug(
        "tensor-bytes",
        "a tensor of more than 2³² bytes or 2³¹ elements aborts the process",
        "Python dies without an error",
        "no score tensor, activation or tile is planned that large",
        PYTORCH + "149325",
    ),
    Bug(
        "big-scores",
        "score tensors of more than 2³² elements are silently wrong",
        "large pictures turn to noise",
        "no score tensor is planned that large",
        PYTORCH + "179592",
    ),
    Bug(
        "strided-attention",
        "attention misreads operands that are not contiguous",
        "wrong pictures, or crashes",
        "queries, keys and values are made contiguous first",
        PYTORCH + "163597",
        torch=(ANY, (2, 9)),
    ),
    Bug(
        "short-queries",
        "the kernels for at most 8 queries ignore strides",
        "wrong values for tiny pictures",
        "short queries are made contiguous first",
        PYTORCH + "181133",
        torch=((2, 8), ANY),
    ),
    Bug(
        "strided-linear",
        "linear layers misread weights that are not contiguous",
        "wrong pictures",
        "weights are contiguous",
        PYTORCH + "162779",
        torch=((2, 8), (2, 9)),
    ),
    Bug(
        "strided-convolution",
        "convolutions misread weights that are not contiguous",
        "wrong pictures",
        "weights of convolutions that come to mps are made contiguous",
        PYTORCH + "192212",
        torch=(ANY, (2, 14)),
        macos=((15,), ANY),
    ),
    Bug(
        "sliced-channels",
        "a convolution of some channels of a larger tensor is right for the first row alone",
        "all pictures of a batch but the first are wrong",
        "what enters a network is made contiguous first",
        PYTORCH + "169342",
        torch=((2, 9), ANY),
        macos=((26, 2), ANY),
        chips=frozenset({"M5"}),
    ),
    Bug(
        "scalar-views",
        "an element of a CPU tensor, multiplied with a tensor on mps, counts as the first element",
        "loops that multiply latents with scheduler.sigmas[i] draw noise",
        "schedulers compute with Python's numbers, and hand out their own as copies",
        PYTORCH + "193057",
        torch=(ANY, (2, 14)),
    ),
    Bug(
        "batched-linear",
        "linear layers with a bias are wrong for the tokens of several rows",
        "noise instead of pictures",
        "the tokens of all rows go through linear layers as one matrix",
        PYTORCH + "192934",
        torch=(ANY, (2, 14)),
        macos=((26,), (27,)),
        chips=frozenset({"M1"}),
    ),
    Bug(
        "batched-linear-m5",
        "in half precision, results of linear layers change from call to call for the tokens of several rows",
        "noise instead of pictures",
        "the tokens of all rows go through linear layers as one matrix",
        PYTORCH + "180776",
        torch=(ANY, (2, 13)),
        chips=frozenset({"M5"}),
    ),
    Bug(
        "dropped-bias",
        "a linear layer drops its bias for a single row",
        "the time is embedded wrongly: noise instead of pictures",
        "single vectors go through linear layers as two rows",
        PYTORCH + "188438",
        torch=(ANY, (2, 14)),
        macos=((26,), (27,)),
        chips=frozenset({"M1"}),
    ),
    Bug(
        "gathered-operands",
        "operands of a matrix product that are not contiguous are copied before each product",
        "weights that are read transposed would be copied in each call",
        "residual sums are not fused into products, as those would read weights transposed",
        "https://github.com/pytorch/pytorch/pull/128393",
        macos=(ANY, (15,)),
    ),
    Bug(
        "expanded-operands",
        "batched products of operands that are expanded with a stride of 0 are wrong",
        "most rows are zeros",
        "such operands are copied for each product, or multiplied in another way",
        PYTORCH + "180201",
        macos=((15,), ANY),
    ),
    Bug(
        "bool-mask",
        "a mask of booleans crashes attention",
        "Python dies without an error",
        "masks are floats that are added to the scores",
        "https://github.com/invoke-ai/InvokeAI/issues/4965",
    ),
    Bug(
        "channels-last",
        "operations on channels_last tensors give wrong results",
        "wrong pictures",
        "networks stay in the contiguous layout",
        PYTORCH + "180984",
    ),
    Bug(
        "non-blocking",
        "copies with non_blocking=True read memory before it is written",
        "corrupted weights or latents",
        "every copy blocks",
        PYTORCH + "139550",
    ),
    Bug(
        "watchdog",
        "one very long command is ended by the GPU's watchdog",
        "an error in the middle of a picture",
        "at most 256 MiB of scores at a time, however much memory there is",
        "https://github.com/jundot/omlx/issues/1387",
    ),
    Bug(
        "watermark",
        "the allocator's default high watermark is 1.7 times Metal's working set, which is more than the memory",
        "the Mac swaps and crawls instead of reporting that memory is out",
        "the watermark is set to the working set itself before mps is first used",
        "https://github.com/lllyasviel/Fooocus/issues/1341",
    ),
    Bug(
        "graph-cache",
        "each new tensor shape adds a compiled graph that is never freed",
        "memory grows with every new picture size",
        "default sizes are rounded to a few; tiles and chunks keep one shape",
        PYTORCH + "132596",
    ),
    Bug(
        "first-pass",
        "the first pass after loading differs from all later ones",
        "the first picture of a seed cannot be repeated",
        "one step of the first call is run and discarded",
        "https://github.com/huggingface/diffusers/issues/355",
        torch=(ANY, (2, 0)),
    ),
    Bug(
        "device-noise",
        "random numbers drawn on the device differ from those of other devices",
        "a seed means another picture on each device",
        "noise is drawn on the CPU and moved",
        PYTORCH + "84288",
    ),
    Bug(
        "no-float64",
        "float64 is not supported",
        "an error",
        "schedules are Python's own floats, tensors are float32",
        "https://github.com/huggingface/diffusers/issues/358",
    ),
    Bug(
        "int64-reductions",
        "reductions of int64 need a newer macOS",
        "an error in the text encoder",
        "the end of a prompt is found in int32",
        PYTORCH + "94515",
        macos=(ANY, (13, 3)),
    ),
    Bug(
        "no-bf16",
        "bfloat16 is not supported",
        "an error at the first operation",
        "half precision is float16",
        "https://github.com/pytorch/pytorch/pull/119641",
        torch=(ANY, (2, 3)),
    ),
    Bug(
        "half-layer-norm",
        "LayerNorm in float16 crashes",
        "an error, or Python dies",
        "LayerNorm is computed in float32",
        PYTORCH + "96113",
        torch=((2, 0), (2, 1)),
    ),
    Bug(
        "half-gelu",
        "GELU in float16 ends the process",
        "Python dies without an error",
        "GELU is computed in float32",
        "https://github.com/pytorch/pytorch/pull/86218",
        torch=(ANY, (2, 0)),
    ),
    Bug(
        "mixed-norms",
        "a norm whose weights have another precision than its input reads them wrongly",
        "garbage",
        "weights and inputs of a norm have one precision",
        PYTORCH + "190054",
    ),
    Bug(
        "mixed-operands",
        "an operation on tensors of two precisions aborts the process",
        "Python dies without an error",
        "latents, texts, conditions and a ControlNet's maps take the network's precision first",
        PYTORCH + "121025",
        macos=(ANY, (15,)),
    ),
    Bug(
        "no-nonzero",
        "nonzero has no kernel, or runs on the CPU",
        "an error, or a wait for the device",
        "tokens are looked for on the CPU, the end of a prompt by argmax",
        PYTORCH + "77764",
        torch=(ANY, (2, 0)),
    ),
    Bug(
        "upsample-half",
        "nearest-neighbour upsampling runs on the CPU and refuses float16",
        "an error in every UNet and VAE",
        "networks run in float32; macOS 13 or newer is asked for",
        "https://github.com/comfyanonymous/ComfyUI/issues/4127",
        macos=(ANY, (13,)),
    ),
    Bug(
        "macos-13.2",
        "linear layers give unreliable results",
        "noise instead of pictures",
        "doctor asks for an update of macOS",
        "https://github.com/AUTOMATIC1111/stable-diffusion-webui/issues/8866",
        macos=((13, 2), (13, 3)),
    ),
    Bug(
        "macos-27-sdxl",
        "SDXL pictures are corrupt",
        "noise instead of pictures",
        "doctor asks for torch 2.13 or newer",
        PYTORCH + "187280",
        torch=(ANY, (2, 13)),
        macos=((27,), ANY),
    ),
    Bug(
        "macos-27-bf16",
        "a bfloat16 linear layer with a transposed weight aborts the process",
        "Python dies without an error",
        "half precision is float16",
        PYTORCH + "197796",
        torch=((2, 13), (2, 14)),
        macos=((27,), ANY),
    ),
    Bug(
        "memory-growth-2.5",
        "fused attention needs more memory and time than in 2.4",
        "slower pictures",
        "attention in chunks of queries; doctor suggests a newer torch",
        PYTORCH + "139389",
        torch=((2, 5), (2, 6)),
    ),
)

BY_ID = {bug.id: bug for bug in BUGS}
