"""What somebody has hooked, wrapped, replaced, parametrised or subclassed is left alone, and computed with."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from russet.models.attention import fused
from russet.models.resnet import ResnetBlock2D, ResnetStyle
from russet.models.transformer import Attention

from .cases import CASES, TOGETHER, Ask, Case, near, seeded, unet, vae

ids = lambda case: case.name  # noqa: E731
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
PLACES = {
    "conv_in": "conv_in",
    "the layers of the time": "time_embedding",
    "one layer of the time": "time_embedding.linear_1",
    "the first residual block": "down_blocks.0.resnets.0",
    "its norm": "down_blocks.0.resnets.0.norm1",
    "its convolution": "down_blocks.0.resnets.0.conv1",
    "its time": "down_blocks.0.resnets.0.time_emb_proj",
    "a transformer": "down_blocks.0.attentions.0",
    "a transformer's norm": "down_blocks.0.attentions.0.norm",
    "a transformer's first projection": "down_blocks.0.attentions.0.proj_in",
    "a transformer's last projection": "down_blocks.0.attentions.0.proj_out",
    "a transformer block": BLOCK,
    "norm1": f"{BLOCK}.norm1",
    "norm2": f"{BLOCK}.norm2",
    "norm3": f"{BLOCK}.norm3",
    "attn1": f"{BLOCK}.attn1",
    "attn1's queries": f"{BLOCK}.attn1.to_q",
    "attn1's output": f"{BLOCK}.attn1.to_out.0",
    "attn2": f"{BLOCK}.attn2",
    "attn2's keys": f"{BLOCK}.attn2.to_k",
    "the feed-forward layer": f"{BLOCK}.ff",
    "its list": f"{BLOCK}.ff.net",
    "its gate": f"{BLOCK}.ff.net.0",
    "its gate's product": f"{BLOCK}.ff.net.0.proj",
    "its dropout": f"{BLOCK}.ff.net.1",
    "its last layer": f"{BLOCK}.ff.net.2",
    "a downsampler": "down_blocks.0.downsamplers.0",
    "a downsampler's convolution": "down_blocks.0.downsamplers.0.conv",
    "the middle": "mid_block",
    "a shortcut": "up_blocks.0.resnets.0.conv_shortcut",
    "an upsampler": "up_blocks.0.upsamplers.0",
    "an upsampler's convolution": "up_blocks.0.upsamplers.0.conv",
    "the last residual block": "up_blocks.1.resnets.1",
    "the last norm": "conv_norm_out",
    "conv_out": "conv_out",
    "the whole UNet": "",
}
MODULES = {name: place for name, place in PLACES.items() if place}
SOME = ("one layer of the time", "its convolution", "norm2", "attn2's keys", "its last layer", "the middle",
        "the last norm", "the whole UNet")  # fmt: skip


@pytest.fixture(autouse=True)
def _without_gradients() -> Any:
    with torch.no_grad():
        yield


def put(network: nn.Module, place: str, make: Callable[[Any], nn.Module]) -> None:
    """Puts what ``make`` makes of a module in its place."""
    parent, _, name = place.rpartition(".")
    holder = network.get_submodule(parent)
    setattr(holder, name, make(getattr(holder, name)))


class Seen:
    """The tensors that hooks are shown, as they were then and as they are now."""

    def __init__(self, module: nn.Module) -> None:
        self.then: list[Tensor] = []
        self.now: list[Tensor] = []
        self.handles = [
            module.register_forward_pre_hook(lambda _, given: self.keep(given)),
            module.register_forward_hook(lambda _, given, result: self.keep((*given, result))),
        ]

    def keep(self, values: Any) -> None:
        for value in values:
            for x in value if isinstance(value, tuple) else (value,):
                assert x is None or isinstance(x, (Tensor, float, int)), "a hook is shown plain tensors"
                if isinstance(x, Tensor):
                    self.then.append(x.clone())
                    self.now.append(x)

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def require(self, expected: list[Tensor], name: str) -> None:
        """Requires the tensors of the plain network, and that none was overwritten afterwards."""
        assert len(self.then) == len(expected) > 0, name
        for found, plain in zip(self.then, expected, strict=True):
            near(found, plain)
        assert all(torch.equal(*pair) for pair in zip(self.then, self.now, strict=True)), name


@pytest.fixture
def shared() -> Any:
    """A plain UNet, what it is asked, and what it answers."""
    network = unet()
    ask = Ask.of(network)
    with torch.no_grad():
        return network, ask, ask.answer(network)


@pytest.fixture(scope="module")
def plainly_seen() -> dict[str, list[Tensor]]:
    """What hooks see on the plain UNet."""
    network = unet()
    ask = Ask.of(network)
    seen = {name: Seen(network.get_submodule(place)) for name, place in PLACES.items()}
    with torch.no_grad():
        ask.answer(network)
    for one in seen.values():
        one.remove()
    return {name: one.then for name, one in seen.items()}


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_hooks_see_what_they_see_on_the_plain_unet_and_it_is_not_overwritten(
    case: Case, shared: Any, plainly_seen: Any
) -> None:
    network, ask, answer = shared
    for name in PLACES if case in TOGETHER else SOME:
        seen = Seen(network.get_submodule(PLACES[name]))
        changes = case.apply(network)
        found = ask.answer(network, case)
        changes.undo()
        seen.remove()
        near(found, answer)
        seen.require(plainly_seen[name], name)


@pytest.mark.parametrize("case", TOGETHER, ids=ids)
def test_hooks_everywhere_at_once_see_the_plain_tensors(case: Case, shared: Any, plainly_seen: Any) -> None:
    network, ask, answer = shared
    seen = {name: Seen(network.get_submodule(place)) for name, place in PLACES.items()}
    changes = case.apply(network)
    found = ask.answer(network, case)
    changes.undo()
    near(found, answer)
    for name, one in seen.items():
        one.remove()
        one.require(plainly_seen[name], name)


@pytest.mark.parametrize("case", TOGETHER, ids=ids)
def test_hooks_on_a_text_about_the_second_level_see_all_rows(case: Case) -> None:
    for place in ("down_blocks.0.resnets.0", "down_blocks.0.downsamplers.0", "down_blocks.1.resnets.0", "conv_in"):
        network = unet("text on the second level")
        seen = Seen(network.get_submodule(place))
        ask = Ask.of(network)
        answer = ask.answer(network)
        expected, seen.then, seen.now = seen.then, [], []
        case.apply(network)
        near(ask.answer(network, case), answer)
        assert [x.shape for x in seen.then] == [x.shape for x in expected], place


class Wrapped(nn.Module):
    """Another module, whose result is made larger and kept."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.kept: list[tuple[Tensor, Tensor]] = []

    def forward(self, *given: Any, **named: Any) -> Any:
        result = self.inner(*given, **named) * 1.25
        self.kept.append((result, result.clone()))
        return result


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_what_was_put_in_a_layers_place_is_computed_with(case: Case, shared: Any) -> None:
    network, ask, plain = shared
    for name in MODULES if case in TOGETHER else SOME[:-1]:
        place = MODULES[name]
        if name == "its list":
            continue  # whose parts have to be found
        own = network.get_submodule(place)
        put(network, place, Wrapped)
        expected = ask.answer(network)
        changes = case.apply(network)
        found = ask.answer(network, case)
        changes.undo()
        kept = network.get_submodule(place).kept
        put(network, place, lambda _, own=own: own)
        assert not torch.allclose(expected, plain, atol=1e-6), name
        near(found, expected)
        assert len(kept) == 2, name
        assert all(torch.equal(*pair) for pair in kept), name


@pytest.mark.parametrize("case", TOGETHER, ids=ids)
def test_a_forward_of_an_instances_own_is_called(case: Case, shared: Any) -> None:
    network, ask, plain = shared
    for name, place in MODULES.items():
        module = network.get_submodule(place)
        before = module.forward
        module.forward = lambda *given, before=before, **named: before(*given, **named) * 1.25
        expected = ask.answer(network)
        changes = case.apply(network)
        found = ask.answer(network, case)
        changes.undo()
        del module.forward
        near(found, expected)
        assert not torch.allclose(expected, plain, atol=1e-6), name


def doubled(layer: nn.Module) -> nn.Module:
    class Double(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    return parametrize.register_parametrization(layer, "weight", Double())


def normalised(layer: nn.Module) -> nn.Module:
    torch.nn.utils.weight_norm(layer)
    layer.weight_g.mul_(1.5)
    return layer


def subclassed(layer: nn.Module) -> nn.Module:
    cls = type(layer)
    layer.__class__ = type("Somebodys", (cls,), {"forward": lambda self, *given: cls.forward(self, *given) * 1.25})
    return layer


WEIGHTS = {name: place for name, place in PLACES.items() if name not in ("the whole UNet", "its list", "its dropout")}


@pytest.mark.filterwarnings("ignore:.*weight_norm")
@pytest.mark.parametrize("make", [doubled, normalised, subclassed])
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_layers_that_were_parametrised_or_subclassed_are_computed_with(case: Case, make: Any, shared: Any) -> None:
    network, ask, plain = shared
    for name in WEIGHTS if case in TOGETHER else SOME[:-1]:
        place = PLACES[name]
        own = network.get_submodule(place)
        if make is not subclassed and not isinstance(own, (nn.Linear, nn.Conv2d)):
            continue
        put(network, place, lambda layer: make(copy.deepcopy(layer)))
        expected = ask.answer(network)
        changes = case.apply(network)
        found = ask.answer(network, case)
        changes.undo()
        again = ask.answer(network)
        put(network, place, lambda _, own=own: own)
        assert not torch.allclose(expected, plain, atol=1e-6), name
        near(found, expected)
        assert torch.equal(again, expected)


def with_bias(layer: nn.Linear) -> nn.Linear:
    torch.manual_seed(4)
    made = nn.Linear(layer.in_features, layer.out_features)
    made.weight.data = layer.weight.data
    return made


def without_bias(layer: Any) -> Any:
    layer.bias = None
    return layer


def circular(layer: nn.Conv2d) -> nn.Conv2d:
    layer.padding_mode = "circular"  # as people do for pictures that tile
    return layer


def nothing(layer: nn.Module) -> nn.Module:
    return nn.Identity()


REPLACED = [
    ("queries with a bias", f"{BLOCK}.attn1.to_q", with_bias),
    ("queries of the text with a bias", f"{BLOCK}.attn2.to_q", with_bias),
    ("keys of the text with a bias", f"{BLOCK}.attn2.to_k", with_bias),
    ("an output without a bias", f"{BLOCK}.attn1.to_out.0", without_bias),
    ("an output of the text without a bias", f"{BLOCK}.attn2.to_out.0", without_bias),
    ("a feed-forward layer without a bias", f"{BLOCK}.ff.net.2", without_bias),
    ("a projection without a bias", "down_blocks.0.attentions.0.proj_out", without_bias),
    ("a convolution without a bias", "down_blocks.0.resnets.0.conv1", without_bias),
    ("a time without a bias", "down_blocks.0.resnets.0.time_emb_proj", without_bias),
    ("a shortcut without a bias", "up_blocks.0.resnets.0.conv_shortcut", without_bias),
    ("no output", f"{BLOCK}.attn1.to_out.0", nothing),
    ("no queries", f"{BLOCK}.attn1.to_q", nothing),
    ("no norm", "down_blocks.0.resnets.0.norm1", nothing),
    ("no last norm", "conv_norm_out", nothing),
    ("no norm of tokens", f"{BLOCK}.norm1", nothing),
]


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_plain_layers_of_another_form_are_computed_with(case: Case, shared: Any) -> None:
    network, ask, _ = shared
    for name, place, make in REPLACED:
        own = network.get_submodule(place)
        put(network, place, lambda layer, make=make: make(copy.deepcopy(layer)))
        expected = ask.answer(network)
        changes = case.apply(network)
        found = ask.answer(network, case)
        changes.undo()
        again = ask.answer(network)
        put(network, place, lambda _, own=own: own)
        near(found, expected)
        assert torch.equal(again, expected), name


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_pictures_that_tile_stay_so(case: Case) -> None:
    network, decoder = unet(), vae()
    for module in (*network.modules(), *decoder.modules()):
        if type(module) is nn.Conv2d:
            circular(module)
    ask, z = Ask.of(network), seeded(1, 4, 6, 5)
    expected, picture = ask.answer(network), decoder.decode(z).sample
    assert not torch.allclose(picture, vae().decode(z).sample, atol=1e-3)
    case.apply(network)
    case.apply(decoder, "vae")
    near(ask.answer(network, case), expected)
    near(decoder.decode(z).sample, picture)


class Keeping:
    """An attention function of somebody's, which keeps what it is given."""

    def __init__(self) -> None:
        self.kept: list[tuple[Tensor, Tensor]] = []

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
        self.kept.extend((x, x.clone()) for x in (q, k, v))
        return fused(q, k, v, scale, mask)


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_an_attention_function_of_somebodys_keeps_what_it_was_given(case: Case) -> None:
    network, keeping = unet(), Keeping()
    network.set_attention(keeping)
    ask = Ask.of(network)
    expected = ask.answer(network)
    keeping.kept.clear()
    case.apply(network)
    near(ask.answer(network, case), expected)
    assert len(keeping.kept) == 3 * 2 * 4  # four transformers of one block with two attentions
    assert all(torch.equal(*pair) for pair in keeping.kept)


VAE_PLACES = (
    "", "encoder", "encoder.conv_in", "encoder.down_blocks.0.resnets.0", "encoder.down_blocks.0.downsamplers.0",
    "encoder.mid_block", "encoder.mid_block.attentions.0", "encoder.mid_block.attentions.0.to_v",
    "encoder.mid_block.attentions.0.group_norm", "encoder.conv_norm_out", "encoder.conv_out",
    "decoder", "decoder.conv_in", "decoder.mid_block", "decoder.mid_block.resnets.1", "decoder.up_blocks.0.resnets.1",
    "decoder.up_blocks.0.upsamplers.0", "decoder.up_blocks.0.upsamplers.0.conv", "decoder.conv_norm_out",
    "post_quant_conv",
)  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_hooks_and_wrappers_in_a_vae_see_the_plain_tensors(case: Case) -> None:
    z, x = seeded(1, 4, 5, 7), seeded(1, 3, 11, 14, seed=1)

    def answers(network: Any) -> tuple[Tensor, Tensor]:
        return network.decode(z).sample, network.encode(x).latent_dist.mean

    for place in VAE_PLACES:
        network = vae()
        seen = Seen(network.get_submodule(place)) if place else None
        plain = answers(network)
        expected = seen.then if seen else []
        if seen:
            seen.then, seen.now = [], []
        changes = case.apply(network, "vae")
        for found, answer in zip(answers(network), plain, strict=True):
            near(found, answer)
        if seen:
            assert len(seen.then) == len(expected) > 0, place
            for found, answer in zip(seen.then, expected, strict=True):
                near(found, answer)
            assert all(torch.equal(*pair) for pair in zip(seen.then, seen.now, strict=True)), place
        changes.undo()
        if place and place not in ("encoder", "decoder"):
            network = vae()
            put(network, place, Wrapped)
            plain = answers(network)
            case.apply(network, "vae")
            for found, answer in zip(answers(network), plain, strict=True):
                near(found, answer)
            assert all(torch.equal(*pair) for pair in network.get_submodule(place).kept), place


def test_blocks_beneath_somebodys_are_still_faster() -> None:
    network = unet()
    put(network, "mid_block.resnets.0", Wrapped)
    TOGETHER[1].apply(network)
    assert type(network.mid_block.resnets[0].inner) is not ResnetBlock2D
    assert type(network.mid_block.attentions[0].transformer_blocks[0].attn1) is not Attention
    block = ResnetBlock2D(8, 8, ResnetStyle(4, 1e-5)).requires_grad_(False)
    assert type(block) is ResnetBlock2D
