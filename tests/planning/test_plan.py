from __future__ import annotations

import dataclasses
import itertools
import re

import pytest

from russet.errors import ArgumentTypeError, DoesNotFit, InputError
from russet.hardware.facts import GIB, Facts, mac
from russet.planning import reference_models
from russet.planning.device_defaults import allocator_environment
from russet.planning.memory import largest_tensors, unet_calls, vae_call
from russet.planning.plan import MEANING, AttentionChoice, Plan, PlanCache, Request, plan

MACS = {
    "M1 8 GB": ("M1", 8),
    "M1 16 GB": ("M1", 16),
    "M2 Pro 32 GB": ("M2 Pro", 32),
    "M3 Max 64 GB": ("M3 Max", 64),
    "M2 Ultra 192 GB": ("M2 Ultra", 192),
}
TORCHES = ("1.13.1", "2.0.1", "2.5.1", "2.12.1", "2.13.0", "2.14.0")
SHAPES = ((512, 512), (768, 768), (1024, 1024), (512, 2048))
BATCHES = (1, 4, 16)


def on(name="M1 8 GB", torch="2.13.0", macos="15.0"):
    chip, memory_gib = MACS[name]
    return mac(chip, memory_gib=memory_gib, torch=torch, macos=macos)


def gpu(gib=24.0, torch="2.13.0"):
    version = tuple(map(int, torch.split(".")))
    memory = int(gib * GIB)
    return Facts(device="cuda", chip="GPU", memory=memory, available=memory, torch=version, bf16=True, ram=64 * GIB)


def cpu(gib=16.0, torch="2.13.0"):
    version = tuple(map(int, torch.split(".")))
    return Facts(device="cpu", chip="CPU", memory=int(gib * GIB), available=int(gib * GIB), torch=version)


@pytest.mark.parametrize("torch_version", TORCHES)
@pytest.mark.parametrize("name", MACS)
def test_every_mac_gets_a_plan_within_its_budget_and_limits(name, torch_version):
    facts = on(name, torch_version)
    for (width, height), images in itertools.product(SHAPES, BATCHES):
        sizes = reference_models.sd15(safety_checker=False, width=width, height=height, images=images)
        made = plan(facts, sizes)
        assert made.peak <= facts.budget, made.explain()
        for numbers, bytes_each in largest_tensors(sizes, made):
            assert numbers < 2**31, made.explain()
            assert numbers * bytes_each < min(2**32, facts.largest_buffer), made.explain()
        assert_readable(made)


def assert_readable(made: Plan):
    assert {decision.name for decision in made.decisions} == set(MEANING)
    for decision in made.decisions:
        assert len(decision.reason) > 7
        assert not re.search(r"[{}]|None|object at", str(decision)), decision


@pytest.mark.parametrize("macos", ["13.6", "15.0"])
@pytest.mark.parametrize("torch_version", TORCHES)
@pytest.mark.parametrize("side", [512, 1024])
def test_sd_15_fits_an_8_gb_mac_beside_a_browser(side, torch_version, macos):
    facts = on("M1 8 GB", torch_version, macos)
    bare = plan(facts, reference_models.sd15(safety_checker=False, width=side, height=side))
    assert bare.peak <= 3.0e9
    checked = plan(facts, reference_models.sd15(width=side, height=side), Request(reloadable=True))
    assert checked.peak <= 3.0e9


def test_flash_kernels_are_used_from_torch_2_13_on_with_heads_padded():
    attention = plan(on(torch="2.13.0"), reference_models.sd15()).attention("unet")
    assert attention == AttentionChoice(kind="fused", pad=(64, 80, 256))  # for heads of 40, 80 and 160
    assert plan(on("M1 16 GB"), reference_models.sdxl()).attention("unet") == AttentionChoice()  # heads of 64 need none


def test_flash_kernels_take_float32_too():
    made = plan(on("M2 Pro 32 GB"), reference_models.sd15(), Request(dtype="float32"))
    assert made.attention("unet") == AttentionChoice(kind="fused", pad=(64, 80, 256))
    weights = made.estimate["denoise"].parameters
    assert made.estimate["denoise"].peak - weights <= 220 * 2**20


@pytest.mark.parametrize("torch_version", ["1.13.1", "2.0.1", "2.5.1", "2.12.1"])
def test_older_torch_attends_in_chunks(torch_version):
    made = plan(on(torch=torch_version), reference_models.sd15())
    assert {made.attention(part).kind for part in ("unet", "vae", "text_encoder")} == {"chunked"}


def test_scores_are_float32_from_macos_14_5_on():
    assert plan(on(torch="2.12.1", macos="14.5"), reference_models.sd15()).attention("unet").upcast
    assert not plan(on(torch="2.12.1", macos="14.4"), reference_models.sd15()).attention("unet").upcast


def test_scores_that_overflow_are_float32_everywhere():
    sizes = reference_models.sd15()
    overflowing = dataclasses.replace(sizes, unet=dataclasses.replace(sizes.unet, upcast_attention=True))
    assert plan(on(torch="2.12.1", macos="14.4"), overflowing).attention("unet").upcast
    assert plan(gpu(torch="1.13.1"), overflowing).attention("unet").upcast


def test_the_vae_has_no_flash_kernel_on_mps():
    made = plan(on("M2 Ultra 192 GB"), reference_models.sd15(width=2048, height=2048))
    assert made.attention("vae").kind == "chunked"


def test_long_rows_of_keys_are_split_on_m1_and_m2_alone():
    sizes = reference_models.sd15(width=2048, height=2048)
    for name, limit in (("M2 Ultra 192 GB", 32766), ("M3 Max 64 GB", 10**9)):
        made = plan(on(name, "2.12.1"), sizes)
        keys = [made.attention("unet").keys or call.keys for call in unet_calls(sizes, made)]
        assert max(keys) <= limit
    assert made.attention("unet").keys is None  # an M3 may take all 65536 at once


def test_a_slice_of_scores_never_takes_more_than_its_share():
    for name in MACS:
        facts, sizes = on(name, "2.12.1"), reference_models.sd15(width=1024, height=1024)
        made = plan(facts, sizes)
        scores = [call.scores(made.attention("unet")) for call in unet_calls(sizes, made)]
        scores.append(vae_call(sizes, made).scores(made.attention("vae")))
        assert max(scores) * 4 <= min(2**28, max(facts.budget // 6, 2**27 // 2))


def test_a_cpu_that_computes_bfloat16_says_so_and_stays_exact_until_asked():
    able = dataclasses.replace(cpu(), bf16=True)
    assert plan(able, reference_models.sd15()).dtype("unet") == "float32"
    assert "bfloat16" in plan(able, reference_models.sd15()).why("dtype.unet").reason
    assert "bfloat16" not in plan(cpu(), reference_models.sd15()).why("dtype.unet").reason
    asked = Request(dtype="bfloat16")
    assert "instructions" in plan(able, reference_models.sd15(), asked).why("dtype.unet").reason
    assert "slow" in plan(cpu(), reference_models.sd15(), asked).why("dtype.unet").reason
    assert plan(able, reference_models.sd15(), asked).peak < 0.6 * plan(able, reference_models.sd15()).peak


def test_a_cpu_with_matrix_units_works_in_bfloat16_and_float32_is_one_argument_away():
    able = dataclasses.replace(cpu(), bf16=True, amx=True)
    made = plan(able, reference_models.sd15())
    assert {made.dtype(name) for name in ("text_encoder", "unet", "vae", "safety_checker")} == {"bfloat16"}
    assert "AMX" in made.why("dtype.unet").reason
    assert not made["winograd"]
    exact = plan(able, reference_models.sd15(), Request(dtype="float32"))
    assert (exact.dtype("unet"), exact.why("dtype.unet").by) == ("float32", "user")


@pytest.mark.parametrize(
    ("facts", "dtype"), [(on(), "float16"), (gpu(), "float16"), (cpu(), "float32"), (on(macos="12.6"), "float32")]
)
def test_precision_suits_the_device(facts, dtype):
    # without a checker and on a roomier Mac, since float32 needs twice the memory
    facts = dataclasses.replace(facts, memory=64 * GIB, available=48 * GIB, working_set=48 * GIB)
    assert plan(facts, reference_models.sd15()).dtype("unet") == dtype


def test_xl_decodes_in_float32_since_its_autoencoder_overflows():
    made = plan(on("M2 Pro 32 GB"), reference_models.sdxl())
    assert (made.dtype("unet"), made.dtype("vae")) == ("float16", "float32")
    assert "overflows" in made.why("dtype.vae").reason


@pytest.mark.parametrize(
    ("torch_version", "form"),
    [("2.0.1", "native"), ("2.1.0", "composed"), ("2.12.1", "composed"), ("2.13.0", "native")],
)
def test_group_norm_is_composed_where_torch_decomposes_it_slowly(torch_version, form):
    roomy = on("M3 Max 64 GB", torch_version)
    assert plan(roomy, reference_models.sd15())["group_norm"] == form


def test_layer_norm_is_float32_where_half_precision_crashes():
    assert plan(on(torch="2.0.1"), reference_models.sd15(safety_checker=False))["layer_norm"] == "float32"
    assert plan(on(torch="2.1.0"), reference_models.sd15(safety_checker=False))["layer_norm"] == "native"


def test_overflow_is_looked_for_where_nothing_has_to_wait_for_it():
    assert plan(on(torch="2.1.2"), reference_models.sd15(safety_checker=False))["finite_checks"] == "at the end"
    assert plan(on(torch="2.0.1"), reference_models.sd15(safety_checker=False))["finite_checks"] == "immediate"
    assert plan(gpu(), reference_models.sd15())["finite_checks"] == "deferred"
    assert plan(cpu(), reference_models.sd15())["finite_checks"] == "immediate"


def test_priming_is_for_torch_1_13_on_mps_alone():
    assert plan(on(torch="1.13.1"), reference_models.sd15()).warm_up
    assert not plan(on(torch="2.0.1"), reference_models.sd15(safety_checker=False)).warm_up
    assert not plan(cpu(torch="1.13.1"), reference_models.sd15()).warm_up


def test_the_layout_is_safe_on_mps():
    made = plan(on(), reference_models.sd15())
    assert made.memory_format == "contiguous"
    assert plan(cpu(), reference_models.sd15()).memory_format == "channels_last"


def test_the_watermark_is_set_on_mps_alone():
    assert allocator_environment("mps") == {
        "PYTORCH_MPS_HIGH_WATERMARK_RATIO": "1.0",
        "PYTORCH_MPS_LOW_WATERMARK_RATIO": "0.8",
    }
    assert allocator_environment("cpu") == {}


def test_images_go_one_at_a_time_where_more_would_not_fit():
    assert plan(on("M1 8 GB"), reference_models.sd15(images=16)).micro_batch == 1
    assert plan(on("M2 Ultra 192 GB"), reference_models.sd15(images=16)).micro_batch == 4
    assert plan(on("M2 Ultra 192 GB"), reference_models.sd15(images=6)).micro_batch == 3  # parts of one shape
    assert plan(gpu(80), reference_models.sd15(images=64)).micro_batch == 16


def test_memory_grows_with_the_batch_by_the_latents_and_pictures_alone():
    one, sixteen = (plan(on(), reference_models.sd15(safety_checker=False, images=n)).peak for n in (1, 16))
    pictures = 15 * 3 * 512 * 512 * 4
    assert sixteen - one < 2.5 * pictures


def test_large_pictures_are_decoded_in_tiles():
    assert plan(on(), reference_models.sd15(safety_checker=False)).vae_tile is None
    tile = plan(on(), reference_models.sd15(safety_checker=False, width=1024, height=1024)).vae_tile
    assert (tile.size, tile.overlap) == (64, 16)
    assert plan(on("M3 Max 64 GB"), reference_models.sd15(width=1024, height=1024)).vae_tile is None


def test_weights_are_dropped_on_a_small_mac_if_they_can_be_read_again():
    sizes = reference_models.sd15()
    dropped = plan(on(), sizes, Request(reloadable=True))
    assert (dropped.text_encoder, dropped.offload_target) == ("unloaded", "disk")
    kept = plan(on(), sizes)
    assert (kept.text_encoder, kept.offload_target) == ("device", "device")
    assert kept.peak > dropped.peak
    assert "close other programs" in kept.explain()


def test_a_smaller_gpu_first_decodes_one_picture_at_a_time():
    sixteen = reference_models.sd15(safety_checker=False, images=16)
    roomy, tight, small = (plan(gpu(gib), sixteen) for gib in (24, 3.4, 2.2))
    assert (roomy.micro_batch, roomy.vae_batch, roomy.offload) == (16, 4, None)
    assert (tight.micro_batch > 1, tight.vae_batch, tight.offload) == (True, 1, None)
    assert (small.micro_batch, small.vae_batch, small.offload) == (1, 1, "model")
    assert "otherwise" in tight.why("vae_batch").reason


def test_a_small_gpu_keeps_idle_weights_on_the_cpu():
    assert plan(gpu(4), reference_models.sd15()).offload is None
    assert plan(gpu(3), reference_models.sd15()).offload == "model"
    assert plan(gpu(4), reference_models.sdxl()).offload == "sequential"
    assert plan(gpu(7), reference_models.sdxl(), Request(text_encoder="cpu")).offload is None


def test_what_cannot_fit_is_refused_with_the_largest_size_that_can():
    facts = mac("M1", memory_gib=8)
    with pytest.raises(
        DoesNotFit, match=r"need at least .* GB on Apple M1.*largest of this shape that fits is (\d+)×(\d+)"
    ):
        plan(facts, reference_models.sd15(width=8192, height=8192))
    with pytest.raises(DoesNotFit) as caught:
        plan(facts, reference_models.sd15(width=8192, height=4096))
    width, height = map(int, re.search(r"fits is (\d+)×(\d+)", str(caught.value)).groups())
    assert width == pytest.approx(2 * height, abs=64)
    assert plan(facts, reference_models.sd15(width=width, height=height)).peak <= facts.limit
    with pytest.raises(DoesNotFit):
        plan(facts, reference_models.sd15(width=width + 128, height=height + 64))


def test_networks_that_are_too_large_at_any_size_are_said_to_be():
    with pytest.raises(DoesNotFit, match="no size fits"):
        plan(mac("M1", memory_gib=8), reference_models.sdxl())


def test_small_tiles_are_a_last_resort():
    made = plan(gpu(2.42), reference_models.sd15(safety_checker=False), Request(offload="off"))
    assert made.vae_tile.size == 32


# --- what the user decides ---


def test_the_users_choices_win_and_are_listed_as_theirs():
    asked = Request(dtype="float32", memory_format="channels_last", micro_batch=2, offload="model", vae_tiling=True)
    made = plan(on("M3 Max 64 GB"), reference_models.sd15(images=4), asked)
    assert {decision.name for decision in made.decisions if decision.by == "user"} == set(asked.user)
    for name, value in asked.user.items():
        assert made[name] == value
    assert "as requested" in made.explain()


def test_a_dtype_may_be_given_for_one_component():
    made = plan(on("M2 Pro 32 GB"), reference_models.sd15(), Request(dtype={"vae": "float32"}))
    assert (made.dtype("vae"), made.dtype("unet")) == ("float32", "float16")
    assert (made.why("dtype.vae").by, made.why("dtype.unet").by) == ("user", "plan")


def test_channels_last_on_mps_is_obeyed_with_a_warning():
    made = plan(on("M2 Pro 32 GB"), reference_models.sd15(), Request(memory_format="channels_last"))
    assert made.memory_format == "channels_last"
    assert "wrong results" in made.why("memory_format").reason


def test_bfloat16_where_the_device_lacks_it_is_obeyed_with_a_warning():
    made = plan(on("M2 Pro 32 GB", torch="2.2.0"), reference_models.sd15(), Request(dtype="bfloat16"))
    assert "does not support" in made.why("dtype.unet").reason


@pytest.mark.parametrize(("asked", "rows"), [("auto", 4), ("max", 1), (1, 1), (3, 3), (8, 8)])
def test_attention_slicing_means_heads_at_a_time(asked, rows):
    made = plan(on("M2 Pro 32 GB", macos="14.0"), reference_models.sd15(), Request(attention_slicing=asked))
    assert made.attention("unet") == AttentionChoice(kind="sliced", rows=rows)
    assert made.why("attention.unet").by == "user"


def test_automatic_slices_are_half_of_the_heads_where_the_picture_is_largest():
    made = plan(on("M2 Pro 32 GB", macos="14.0"), reference_models.sdxl(), Request(attention_slicing="auto"))
    assert made.attention("unet").rows == 5  # XL attends first with 10 heads


def test_more_heads_than_there_are_cannot_be_sliced():
    with pytest.raises(InputError, match="at most the number of heads, 8, not 9"):
        plan(on("M2 Pro 32 GB"), reference_models.sd15(), Request(attention_slicing=9))


def test_slicing_off_is_the_users_right():
    asked = Request(attention_slicing="off")
    whole = plan(on("M2 Pro 32 GB", torch="2.12.1"), reference_models.sd15(), asked).attention("unet")
    assert (whole.kind, whole.rows) == ("sliced", 16)  # all the matrices of 8 heads and 2 rows
    assert plan(on("M2 Pro 32 GB"), reference_models.sd15(), asked).attention("unet").kind == "fused"


def test_slicing_off_is_refused_where_the_scores_would_abort_the_process():
    with pytest.raises(DoesNotFit, match="largest of this shape"):
        plan(
            on("M2 Ultra 192 GB", torch="2.12.1"),
            reference_models.sd15(width=1024, height=1024),
            Request(attention_slicing="off"),
        )


def test_moving_weights_where_memory_is_shared_is_obeyed_and_counted_truly():
    facts, sizes = on("M2 Pro 32 GB"), reference_models.sd15()
    made = plan(facts, sizes, Request(offload="model"))
    assert (made.offload, made.offload_target) == ("model", "device")
    assert made.peak == plan(facts, sizes).peak
    assert plan(facts, sizes, Request(offload="model", reloadable=True)).peak < made.peak


def test_tiles_that_were_switched_off_stay_off():
    sizes = reference_models.sd15(safety_checker=False, width=1024, height=1024)
    made = plan(on("M1 16 GB"), sizes, Request(vae_tiling=False))
    assert made.vae_tile is None
    assert made.why("vae_tile").by == "user"


@pytest.mark.parametrize(
    ("wrong", "kind"),
    [
        ({"dtype": "float64"}, InputError),
        ({"dtype": {"unet2": "float16"}}, InputError),
        ({"attention_slicing": 0}, InputError),
        ({"attention_slicing": 2.5}, ArgumentTypeError),
        ({"attention_slicing": "half"}, ArgumentTypeError),
        ({"attention_slicing": True}, ArgumentTypeError),
        ({"micro_batch": -1}, InputError),
        ({"offload": "disk"}, InputError),
        ({"text_encoder": "gpu"}, InputError),
        ({"memory_format": "nhwc"}, InputError),
        ({"vae_tiling": "yes"}, ArgumentTypeError),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(wrong, kind):
    with pytest.raises(kind):
        Request(**wrong)


# --- less work on a CPU ---


def test_a_cpu_multiplies_less_in_float32_and_by_the_library_that_is_faster_there():
    server = dataclasses.replace(cpu(), machine="x86_64", onednn=True)
    made = plan(server, reference_models.sd15())
    assert made["winograd"]
    assert made["onednn_linear"]
    assert not plan(server, reference_models.sd15(), Request(dtype="bfloat16"))["winograd"]
    assert not plan(cpu(), reference_models.sd15())["onednn_linear"]
    assert not plan(cpu(), reference_models.sd15())["malloc_tuning"]
    assert plan(dataclasses.replace(cpu(), glibc=True), reference_models.sd15())["malloc_tuning"]
    for facts in (on(), gpu()):
        made = plan(facts, reference_models.sd15())
        assert (made["winograd"], made["onednn_linear"]) == (False, False)


def test_without_fast_paths_a_cpu_uses_pytorchs_operations_alone():
    server = dataclasses.replace(cpu(), machine="x86_64", onednn=True)
    made = plan(server, reference_models.sd15(), Request(fast_paths=False))
    assert (made["winograd"], made["onednn_linear"]) == (False, False)
    assert made.why("winograd").by == "user"


# --- the plan as a value ---


def test_a_plan_is_reused_while_free_memory_is_about_the_same():
    cache, facts, workload = PlanCache(), on("M1 16 GB"), reference_models.sd15()
    first = cache.plan(facts, workload, Request())
    little = dataclasses.replace(facts, available=facts.available - 200 * 2**20, held=10 * 2**20, swap_used=5)
    assert cache.plan(little, workload, Request()) is first
    assert cache.plan(facts, workload, Request(vae_tiling=True)) is not first
    assert cache.plan(facts, reference_models.sd15(images=2), Request()) is not first
    assert cache.plan(on("M1 16 GB", torch="2.12.1"), workload, Request()) is not first
    much = dataclasses.replace(facts, available=facts.available // 2)
    assert cache.plan(much, workload, Request()) == plan(much, workload)


def test_a_plan_that_no_longer_fits_is_made_anew():
    workload, cache = reference_models.sd15(), PlanCache()
    peak = plan(on("M1 16 GB"), workload).peak
    enough = dataclasses.replace(on("M1 16 GB"), available=int(peak / 0.8 * 1.02))
    first = cache.plan(enough, workload, Request(reloadable=True))
    assert first.peak <= enough.budget
    short = dataclasses.replace(enough, available=int(first.peak / 0.8 * 0.98))
    assert cache.plan(short, workload, Request(reloadable=True)).peak <= short.budget


def test_a_plan_is_one_line_for_a_debugger_and_a_table_for_a_notebook():
    made = plan(on("M1 16 GB"), reference_models.sd15(), Request(vae_slicing=True))
    assert len(repr(made)) < 160
    assert "512×512 on Apple M1 (mps), UNet in float16" in repr(made)
    table = made._repr_html_()
    assert table.count("<tr>") == len(made.decisions) + 1
    assert "<td>vae_batch</td><td>1</td><td>as requested; your choice</td>" in table


def test_the_same_facts_give_the_same_plan():
    assert plan(on(), reference_models.sd15()) == plan(on(), reference_models.sd15())


def test_a_plan_explains_itself_in_lines():
    made = plan(on(torch="2.5.1"), reference_models.sd15(safety_checker=False, images=4))
    text = made.explain()
    assert text.startswith("4 × 512×512 on Apple M1 (mps): at most 2.")
    for decision in made.decisions:
        assert f"  {decision.name}: " in text
    assert "instead of 1.08 GB" in text  # 16 matrices of 4096×4096 float32 scores


def test_attention_after_an_overflow_is_float32_and_builds_no_more_than_before():
    for facts in (on(), on(torch="2.12.1"), gpu()):
        made = plan(facts, reference_models.sd15())
        assert made.precise_attention("unet") == dataclasses.replace(made.attention("unet"), upcast=True)


def test_a_decision_that_was_not_made_is_our_mistake():
    with pytest.raises(KeyError):
        plan(on(), reference_models.sd15())["colour"]
