"""Limits of open files: raised as far as the system allows, never lowered, and reached without losing a connection."""

from __future__ import annotations

import subprocess
import sys

import pytest

resource = pytest.importorskip("resource", reason="this system has no such limits")


def raised(soft: int, hard: int) -> list[int]:
    """What a process that begins with these limits ends with: what it says, and the limits themselves."""
    program = (
        "import resource; from dsla.server.files import file_limits, raise_file_limit;"
        f"resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}));"
        "print(raise_file_limit(), *file_limits())"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return [int(word) for word in found.stdout.split()]


@pytest.mark.parametrize(("soft", "hard"), [(256, 512), (512, 512)])
def test_the_soft_limit_becomes_the_hard_one(soft: int, hard: int) -> None:
    assert raised(soft, hard) == [512, 512, 512]


def test_no_more_than_a_server_needs() -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard <= 70_000:
        pytest.skip("this process may not open so many")
    assert raised(1024, hard)[:2] == [65_536, 65_536]
    assert raised(70_000, hard)[:2] == [70_000, 70_000], "never fewer than before"
