"""What becomes of freed memory: each case in a process of its own, since it is the whole process's."""

from __future__ import annotations

import subprocess
import sys

import pytest

from russet.hardware.facts import glibc_decides, read_facts

pytestmark = pytest.mark.skipif(not read_facts("cpu").glibc, reason="glibc by its own rules is not what is here")

COMMON = """
import resource, torch
from russet.backends.cpu import malloc

def faults(times=8, mib=48):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.zeros(mib * 2**18)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def held():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20
"""


def ran(code: str) -> list[float]:
    done = subprocess.run(
        [sys.executable, "-c", COMMON + code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return [float(word) for word in done.stdout.split()]


def test_a_block_is_kept_for_the_next_operation() -> None:
    without, within = ran("a = faults()\nwith malloc.kept():\n    faults(24)\n    b = faults()\nprint(a, b)")
    assert within < without / 20


def test_a_block_is_given_back_at_once_where_memory_is_what_counts() -> None:
    (within,) = ran("with malloc.returned():\n    faults(24)\n    print(faults())")
    assert within > 8 * 48 * 2**20 / 2**16  # were pages 64 KiB


def test_everything_is_given_back_at_the_end() -> None:
    before, within, after = ran(
        """
faults(1)
before = held()
with malloc.kept():
    pieces = [torch.ones(2**22) for _ in range(16)]  # 16 MiB each
    last = torch.ones(10)
    del pieces[::2]
    within = held()
    del pieces
after = held()
print(before, within, after)
"""
    )
    assert within - before > 200
    assert after - before < 20


def test_the_last_of_overlapping_blocks_gives_back() -> None:
    within, after = ran(
        """
with malloc.kept():
    with malloc.kept():
        pass
    faults(24)  # until blocks have found places that fit
    within = faults()
print(within, faults())
"""
    )
    assert within < after / 20


@pytest.mark.parametrize(
    ("name", "value"),
    [("MALLOC_TRIM_THRESHOLD_", "1"), ("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"), ("LD_PRELOAD", "libjemalloc.so")],
)
def test_what_the_user_has_told_glibc_is_left_alone(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    assert not glibc_decides()
