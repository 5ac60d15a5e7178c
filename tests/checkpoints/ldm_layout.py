"""The tensors of the original files, derived from their published YAML configs as the original code builds its
modules: blocks appended one by one to flat lists. An account of the layout that shares nothing with ``ldm_keys``.
"""

from __future__ import annotations

from dataclasses import dataclass

Shapes = dict[str, tuple[int, ...]]


def linear(name: str, width: int, out: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (out, width)} | ({f"{name}.bias": (out,)} if bias else {})


def conv(name: str, channels: int, out: int, kernel: int = 3) -> Shapes:
    return {f"{name}.weight": (out, channels, kernel, kernel), f"{name}.bias": (out,)}


def norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


@dataclass(frozen=True)
class UNetParams:
    """``unet_config.params`` (``network_config.params``) of the YAML files."""

    in_channels: int = 4
    out_channels: int = 4
    model_channels: int = 320
    attention_resolutions: tuple[int, ...] = (4, 2, 1)
    num_res_blocks: int = 2
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    context_dim: int = 768
    transformer_depth: tuple[int, ...] = (1, 1, 1, 1)
    use_linear_in_transformer: bool = False
    adm_in_channels: int = 0


SD1 = UNetParams()
SD2 = UNetParams(context_dim=1024, use_linear_in_transformer=True)
SDXL = UNetParams(
    channel_mult=(1, 2, 4),
    attention_resolutions=(4, 2),
    transformer_depth=(1, 2, 10),
    context_dim=2048,
    use_linear_in_transformer=True,
    adm_in_channels=2816,
)
REFINER = UNetParams(
    model_channels=384,
    attention_resolutions=(4, 2),
    transformer_depth=(4, 4, 4, 4),
    context_dim=1280,
    use_linear_in_transformer=True,
    adm_in_channels=2560,
)


class UNet:
    """Walks the construction of openaimodel.UNetModel and notes each tensor."""

    def __init__(self, params: UNetParams) -> None:
        self.p, self.shapes = params, {}
        self.time = 4 * params.model_channels
        self.build()

    def add(self, *parts: Shapes) -> None:
        for part in parts:
            assert not self.shapes.keys() & part.keys()
            self.shapes |= part

    def resnet(self, name: str, channels: int, out: int) -> None:
        self.add(
            norm(f"{name}.in_layers.0", channels),
            conv(f"{name}.in_layers.2", channels, out),
            linear(f"{name}.emb_layers.1", self.time, out),
            norm(f"{name}.out_layers.0", out),
            conv(f"{name}.out_layers.3", out, out),
            conv(f"{name}.skip_connection", channels, out, 1) if channels != out else {},
        )

    def transformer(self, name: str, width: int, depth: int) -> None:
        self.add(norm(f"{name}.norm", width))
        for end in ("proj_in", "proj_out"):
            make = linear if self.p.use_linear_in_transformer else lambda n, a, b: conv(n, a, b, 1)
            self.add(make(f"{name}.{end}", width, width))
        for i in range(depth):
            block = f"{name}.transformer_blocks.{i}"
            for attn, context in (("attn1", width), ("attn2", self.p.context_dim)):
                self.add(
                    linear(f"{block}.{attn}.to_q", width, width, bias=False),
                    linear(f"{block}.{attn}.to_k", context, width, bias=False),
                    linear(f"{block}.{attn}.to_v", context, width, bias=False),
                    linear(f"{block}.{attn}.to_out.0", width, width),
                )
            self.add(linear(f"{block}.ff.net.0.proj", width, 8 * width), linear(f"{block}.ff.net.2", 4 * width, width))
            self.add(*(norm(f"{block}.norm{j}", width) for j in (1, 2, 3)))

    def build(self) -> None:
        p, base = self.p, self.p.model_channels
        self.add(linear("time_embed.0", base, self.time), linear("time_embed.2", self.time, self.time))
        if p.adm_in_channels:
            self.add(
                linear("label_emb.0.0", p.adm_in_channels, self.time), linear("label_emb.0.2", self.time, self.time)
            )
        self.add(conv("input_blocks.0.0", p.in_channels, base))
        channels, scale, count, skips = base, 1, 1, [base]
        for level, mult in enumerate(p.channel_mult):
            for _ in range(p.num_res_blocks):
                self.resnet(f"input_blocks.{count}.0", channels, mult * base)
                channels = mult * base
                if scale in p.attention_resolutions:
                    self.transformer(f"input_blocks.{count}.1", channels, p.transformer_depth[level])
                count += 1
                skips.append(channels)
            if level != len(p.channel_mult) - 1:
                self.add(conv(f"input_blocks.{count}.0.op", channels, channels))
                count, scale = count + 1, scale * 2
                skips.append(channels)
        self.resnet("middle_block.0", channels, channels)
        self.transformer("middle_block.1", channels, p.transformer_depth[-1])
        self.resnet("middle_block.2", channels, channels)
        count = 0
        for level, mult in reversed(list(enumerate(p.channel_mult))):
            for i in range(p.num_res_blocks + 1):
                self.resnet(f"output_blocks.{count}.0", channels + skips.pop(), mult * base)
                channels, slot = mult * base, 1
                if scale in p.attention_resolutions:
                    self.transformer(f"output_blocks.{count}.1", channels, p.transformer_depth[level])
                    slot = 2
                if level and i == p.num_res_blocks:
                    self.add(conv(f"output_blocks.{count}.{slot}.conv", channels, channels))
                    scale //= 2
                count += 1
        self.add(norm("out.0", channels), conv("out.2", channels, p.out_channels))


def vae(ch: int = 128, ch_mult: tuple[int, ...] = (1, 2, 4, 4), num_res_blocks: int = 2, z_channels: int = 4) -> Shapes:
    """``first_stage_config``: the tensors of AutoencoderKL."""
    shapes: Shapes = {}

    def resnet(name: str, channels: int, out: int) -> None:
        shapes.update(norm(f"{name}.norm1", channels) | conv(f"{name}.conv1", channels, out))
        shapes.update(norm(f"{name}.norm2", out) | conv(f"{name}.conv2", out, out))
        shapes.update(conv(f"{name}.nin_shortcut", channels, out, 1) if channels != out else {})

    def middle(name: str, width: int) -> None:
        resnet(f"{name}.block_1", width, width)
        shapes.update(norm(f"{name}.attn_1.norm", width))
        for part in ("q", "k", "v", "proj_out"):
            shapes.update(conv(f"{name}.attn_1.{part}", width, width, 1))
        resnet(f"{name}.block_2", width, width)

    top, last = ch * ch_mult[-1], len(ch_mult) - 1
    shapes.update(conv("encoder.conv_in", 3, ch))
    channels = ch
    for level, mult in enumerate(ch_mult):
        for i in range(num_res_blocks):
            resnet(f"encoder.down.{level}.block.{i}", channels, ch * mult)
            channels = ch * mult
        if level != last:
            shapes.update(conv(f"encoder.down.{level}.downsample.conv", channels, channels))
    middle("encoder.mid", top)
    shapes.update(norm("encoder.norm_out", top) | conv("encoder.conv_out", top, 2 * z_channels))
    shapes.update(conv("decoder.conv_in", z_channels, top))
    middle("decoder.mid", top)
    channels = top
    for level, mult in reversed(list(enumerate(ch_mult))):
        for i in range(num_res_blocks + 1):
            resnet(f"decoder.up.{level}.block.{i}", channels, ch * mult)
            channels = ch * mult
        if level:
            shapes.update(conv(f"decoder.up.{level}.upsample.conv", channels, channels))
    shapes.update(norm("decoder.norm_out", ch) | conv("decoder.conv_out", ch, 3))
    shapes.update(
        conv("quant_conv", 2 * z_channels, 2 * z_channels, 1) | conv("post_quant_conv", z_channels, z_channels, 1)
    )
    return shapes


def clip(width: int = 768, layers: int = 12, vocab: int = 49408, counter: bool = True) -> Shapes:
    """The tensors of transformers' CLIPTextModel as LDM saves them, with the position counter as it used to be."""
    root = "text_model"
    shapes: Shapes = {f"{root}.embeddings.position_ids": (1, 77)} if counter else {}
    shapes[f"{root}.embeddings.token_embedding.weight"] = (vocab, width)
    shapes[f"{root}.embeddings.position_embedding.weight"] = (77, width)
    for i in range(layers):
        layer = f"{root}.encoder.layers.{i}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= linear(f"{layer}.self_attn.{part}", width, width)
        shapes |= norm(f"{layer}.layer_norm1", width) | norm(f"{layer}.layer_norm2", width)
        shapes |= linear(f"{layer}.mlp.fc1", width, 4 * width) | linear(f"{layer}.mlp.fc2", 4 * width, width)
    return shapes | norm(f"{root}.final_layer_norm", width)


def openclip(width: int, layers: int, vocab: int = 49408, projection: int | None = None) -> Shapes:
    """The tensors of OpenCLIP's text tower; ``layers`` counts the last one, which SD2 keeps and does not use."""
    shapes: Shapes = {
        "positional_embedding": (77, width),
        "text_projection": (width, projection or width),
        "logit_scale": (),
        "token_embedding.weight": (vocab, width),
    }
    for i in range(layers):
        block = f"transformer.resblocks.{i}"
        shapes |= norm(f"{block}.ln_1", width) | norm(f"{block}.ln_2", width)
        shapes |= {f"{block}.attn.in_proj_weight": (3 * width, width), f"{block}.attn.in_proj_bias": (3 * width,)}
        shapes |= linear(f"{block}.attn.out_proj", width, width)
        shapes |= linear(f"{block}.mlp.c_fc", width, 4 * width) | linear(f"{block}.mlp.c_proj", 4 * width, width)
    return shapes | norm("ln_final", width)


def under(prefix: str, shapes: Shapes) -> Shapes:
    return {prefix + name: shape for name, shape in shapes.items()}


def unet_file(params: UNetParams, *, ema: bool = False) -> Shapes:
    tensors = UNet(params).shapes
    shapes = under("model.diffusion_model.", tensors)
    if ema:
        shapes |= {"model_ema.diffusion_model" + name.replace(".", ""): shape for name, shape in tensors.items()}
        shapes |= {"model_ema.decay": (), "model_ema.num_updates": ()}
    return shapes


SCHEDULE = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
)


def sd1(params: UNetParams = SD1, *, ema: bool = False) -> Shapes:
    return (
        dict.fromkeys(SCHEDULE, (1000,))
        | unet_file(params, ema=ema)
        | under("first_stage_model.", vae())
        | under("cond_stage_model.transformer.", clip())
    )


def sd2(params: UNetParams = SD2) -> Shapes:
    return (
        dict.fromkeys(SCHEDULE, (1000,))
        | unet_file(params)
        | under("first_stage_model.", vae())
        | under("cond_stage_model.model.", openclip(1024, 24))
    )


def sdxl(params: UNetParams = SDXL) -> Shapes:
    return (
        unet_file(params)
        | under("first_stage_model.", vae())
        | under("conditioner.embedders.0.transformer.", clip())
        | under("conditioner.embedders.1.model.", openclip(1280, 32))
    )


def refiner() -> Shapes:
    return (
        unet_file(REFINER)
        | under("first_stage_model.", vae())
        | under("conditioner.embedders.0.model.", openclip(1280, 32))
    )
