"""``russet doctor`` on this machine, and its words for Macs that are not here."""

from __future__ import annotations

import json

import russet
from russet.cli.app import run
from russet.cli.doctor import lines, plan_lines
from russet.diagnostics.doctor import doctor
from russet.hardware.facts import GIB, mac
from russet.hardware.host_environment import HostEnvironment


def test_this_machine_is_judged_in_words(capsys):
    assert run(["doctor", "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    for text in ("PyTorch", "memory", "Stable Diffusion 1.5 at 512×512 takes at most", "\nThis machine is ready."):
        assert text in shown
    assert "attention.unet" not in shown


def test_a_good_mac_is_told_so_in_eight_lines():
    good = HostEnvironment(cache="/cache", disk_free=100 * GIB, logged_in=True, variables={})
    *shown, verdict = lines(doctor(mac("M2 Pro", memory_gib=32, macos="15.1"), good))
    assert len(shown) <= 8
    assert all(line.startswith("ok ") for line in shown)
    assert verdict == "\nThis machine is ready."


def test_what_is_wrong_is_shown_beside_the_eight_lines():
    bad = HostEnvironment(cache="/cache", disk_free=10**9, logged_in=True, variables={"PYTORCH_MPS_FAST_MATH": "1"})
    shown = "\n".join(lines(doctor(mac("M1", memory_gib=8), bad)))
    assert "problem  disk" in shown
    assert "warning  PYTORCH_MPS_FAST_MATH" in shown
    assert shown.endswith("This machine is not ready: see the problems above.")


def test_the_plan_is_there_for_who_asks(capsys):
    assert run(["doctor", "--device", "cpu", "--plan"]) == 0
    assert "attention.unet: " in capsys.readouterr().out


def test_this_machine_is_judged_in_json(capsys):
    run(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["russet"] == russet.__version__
    assert {"verdict", "facts", "checks", "bugs", "forecasts"} <= set(report)


def test_the_self_test_is_shown_line_by_line(capsys):
    assert run(["doctor", "--device", "cpu", "--self-test"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("\n  ok ") > 10
    assert "  all results are right" in shown


def test_the_self_test_goes_into_the_json_and_fails_where_it_is_wrong(capsys, monkeypatch):
    from russet.diagnostics import self_test

    wrong = self_test.Line("addition", "float32", "wrong", difference=float("nan"), tolerance=1e-3)
    monkeypatch.setattr(self_test, "self_test", lambda device: iter([wrong]))
    assert run(["doctor", "--device", "cpu", "--self-test", "--json"]) == 1
    (line,) = json.loads(capsys.readouterr().out)["self_test"]
    assert (line["name"], line["verdict"], line["difference"]) == ("addition", "wrong", None)


def test_a_mac_is_told_its_known_defects_and_what_is_done_about_them():
    report = doctor(mac("M1", memory_gib=8, macos="14.5", torch="2.4.1"))
    shown = "\n".join([*lines(report), *plan_lines(report)])
    assert "Known defects here" in shown
    assert "https://" in shown
    assert "Apple M1 (mps)" in shown


def test_a_problem_ends_with_1(capsys, monkeypatch):
    from russet.hardware import facts

    old = mac("M1", memory_gib=8, macos="11.0", torch="1.12.1")
    monkeypatch.setattr(facts, "read_facts", lambda device: old)
    assert run(["doctor"]) == 1
    assert "problem  " in capsys.readouterr().out
