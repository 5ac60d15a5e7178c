from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from russet.hardware.facts import Facts, mac
from russet.hardware.known_bugs import BUGS, affected, known


def on(torch="2.13.0", macos="15.0", chip="M1"):
    return mac(chip, memory_gib=16, torch=torch, macos=macos)


@pytest.mark.parametrize(
    ("bug", "first_with", "last_with", "first_without"),
    [
        ("empty-baddbmm", "1.13.1", "2.13.0", "2.14.0"),
        ("no-sdpa", "1.13.1", "1.13.1", "2.0.0"),
        ("no-flash", "2.0.0", "2.12.1", "2.13.0"),
        ("causal-leak", "2.0.0", "2.12.1", "2.13.0"),
        ("slow-group-norm", "2.1.0", "2.12.1", "2.13.0"),
        ("first-pass", "1.13.1", "1.13.1", "2.0.0"),
        ("no-bf16", "1.13.1", "2.2.2", "2.3.0"),
        ("half-layer-norm", "2.0.0", "2.0.1", "2.1.0"),
        ("long-matrix", "2.7.0", "2.13.0", "2.14.0"),
        ("strided-convolution", "1.13.1", "2.13.0", "2.14.0"),
        ("scalar-views", "1.13.1", "2.13.0", "2.14.0"),
        ("no-nonzero", "1.13.1", "1.13.1", "2.0.0"),
    ],
)
def test_a_bug_holds_for_its_torch_versions_alone(bug, first_with, last_with, first_without):
    assert affected(on(torch=first_with), bug)
    assert affected(on(torch=last_with), bug)
    assert not affected(on(torch=first_without), bug)


@pytest.mark.parametrize(
    ("bug", "macos_with", "macos_without"),
    [
        ("half-scores", "14.5", "14.4"),
        ("macos-13.2", "13.2.1", "13.3"),
        ("upsample-half", "12.6", "13.0"),
        ("strided-convolution", "15.0", "14.6"),
        ("mixed-operands", "14.6", "15.0"),
    ],
)
def test_a_bug_holds_for_its_macos_versions_alone(bug, macos_with, macos_without):
    assert affected(on(macos=macos_with), bug)
    assert not affected(on(macos=macos_without), bug)


def test_long_products_are_wrong_on_m1_and_m2_of_every_make():
    assert affected(on(chip="M1"), "long-contraction")
    assert affected(on(chip="M2 Ultra"), "long-contraction")
    assert not affected(on(chip="M3 Max"), "long-contraction")


@pytest.mark.parametrize("torch", ["2.12.1", "2.13.0", "2.14.0", "2.15.0"])
def test_long_products_of_two_matrices_are_repaired_in_2_14_and_those_of_batches_are_not(torch):
    assert affected(on(torch=torch, macos="26.0", chip="M2"), "long-contraction")
    assert bool(affected(on(torch=torch, macos="26.0", chip="M2"), "long-matrix")) is (torch < "2.14")


def test_a_part_of_the_channels_is_misread_on_m5_from_macos_26_2_and_torch_2_9_on():
    assert affected(on(torch="2.9.0", macos="26.2", chip="M5 Pro"), "sliced-channels")
    assert affected(on(torch="2.15.0", macos="27.0", chip="M5"), "sliced-channels")
    for other in ({"torch": "2.8.0"}, {"macos": "26.1"}, {"chip": "M4"}):
        assert not affected(on(**{"torch": "2.9.0", "macos": "26.2", "chip": "M5", **other}), "sliced-channels")


def test_a_mac_whose_macos_is_unknown_is_taken_to_have_the_bug():
    assert affected(dataclasses.replace(on(), macos=()), "half-scores")


def test_other_devices_have_the_bugs_of_mps_not():
    assert known(Facts(device="cuda", chip="GPU", memory=1, available=1, torch=(2, 5))) == ()
    assert known(Facts(device="cpu", chip="Apple M1", memory=1, available=1, torch=(2, 1), macos=(14, 5))) == ()


@pytest.mark.parametrize(
    ("device", "torch_version", "bug"),
    [("cuda", (1, 13, 1), "no-sdpa"), ("cpu", (1, 13, 1), "no-sdpa"), ("cpu", (2, 0, 1), "no-cpu-flash")],
)
def test_old_torch_lacks_fused_attention_elsewhere_too(device, torch_version, bug):
    facts = Facts(device=device, chip="chip", memory=1, available=1, torch=torch_version)
    assert [found.id for found in known(facts)] == [bug]


def test_known_lists_exactly_the_bugs_that_hold():
    facts = on(torch="2.5.1")
    assert [bug.id for bug in known(facts)] == [bug.id for bug in BUGS if affected(facts, bug.id)]


def test_every_row_says_everything_once():
    assert len({bug.id for bug in BUGS}) == len(BUGS)
    for bug in BUGS:
        assert bug.what
        assert bug.consequence
        assert bug.remedy
        assert bug.link.startswith("https://")
        for first, fixed in (bug.torch, bug.macos):
            assert not fixed or first < fixed


def test_an_id_without_a_row_is_our_mistake():
    with pytest.raises(KeyError):
        affected(on(), "no-such-bug")


@pytest.mark.parametrize("language", ["en", "ko"])
def test_every_row_stands_on_the_page_in_the_tables_order(language):
    page = (Path(__file__).parents[2] / "docs" / language / "devices.md").read_text(encoding="utf-8")
    table = page[page.rindex("|---|") :]
    assert re.findall(r"\]\((https://[^)]+)\)", table) == [bug.link for bug in BUGS]
    if language == "en":
        for bug in BUGS:
            assert f"[{bug.what}]" in table
            assert f"| {bug.remedy} |" in table
