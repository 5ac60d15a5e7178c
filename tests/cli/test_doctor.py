"""``russet doctor`` on this machine, and its words for Macs that are not here."""

from __future__ import annotations

import json

import russet
from russet.cli.app import run
from russet.cli.doctor import lines
from russet.diagnostics.doctor import doctor
from russet.hardware.facts import mac


def test_this_machine_is_judged_in_words(capsys):
    assert run(["doctor", "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    for text in ("PyTorch", "memory", "Stable Diffusion 1.5 at 512×512:", "attention.unet: "):
        assert text in shown


def test_this_machine_is_judged_in_json(capsys):
    run(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report["russet"] == russet.__version__
    assert {"verdict", "facts", "checks", "bugs", "forecasts"} <= set(report)


def test_the_self_test_is_shown_line_by_line(capsys):
    assert run(["doctor", "--device", "cpu", "--self-test"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("\n  ok ") > 10
    assert "  all as it should be" in shown


def test_the_self_test_goes_into_the_json_and_fails_where_it_is_wrong(capsys, monkeypatch):
    from russet.diagnostics import self_test

    wrong = self_test.Line("addition", "float32", "wrong", difference=float("nan"), tolerance=1e-3)
    monkeypatch.setattr(self_test, "self_test", lambda device: iter([wrong]))
    assert run(["doctor", "--device", "cpu", "--self-test", "--json"]) == 1
    (line,) = json.loads(capsys.readouterr().out)["self_test"]
    assert (line["name"], line["verdict"], line["difference"]) == ("addition", "wrong", None)


def test_a_mac_is_told_its_known_defects_and_what_is_done_about_them():
    shown = "\n".join(lines(doctor(mac("M1", memory_gib=8, macos="14.5", torch="2.4.1"))))
    assert "Known defects here" in shown
    assert "https://" in shown
    assert "Apple M1 (mps)" in shown


def test_a_problem_ends_with_1(capsys, monkeypatch):
    from russet.hardware import facts

    old = mac("M1", memory_gib=8, macos="11.0", torch="1.12.1")
    monkeypatch.setattr(facts, "read_facts", lambda device: old)
    assert run(["doctor"]) == 1
    assert "problem  " in capsys.readouterr().out
