"""What a test may ask of the machine, and what happens where the machine lacks it.

Such a test carries a marker. Where the requirement is missing the test is skipped, and the summary gives
the reason; where the environment variable CI is set it fails, because everything was installed there,
and a skipped test would go unnoticed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
from hypothesis import settings

# The bits of include/uapi/linux/capability.h.
CAPABILITIES = {"CAP_NET_ADMIN": 12, "CAP_SYS_ADMIN": 21}

# Debian keeps daemons and network tools where the PATH of a plain user does not look.
PROGRAM_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"])

# A shared machine stalls now and then: the time that one example took says nothing about the code.
settings.register_profile("sapin", deadline=None, print_blob=True)
settings.load_profile("sapin")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    reason = "; ".join(missing_requirements(item))
    if not reason:
        return
    if os.environ.get("CI"):
        pytest.fail(f"CI lacks what this test needs: {reason}", pytrace=False)
    pytest.skip(reason)


def missing_requirements(item: pytest.Item) -> Iterator[str]:
    """Says what the test's markers ask for and the machine lacks."""
    lacking = missing_capabilities()
    for mark in item.iter_markers("root"):
        if lacking:
            yield f"needs root with {' and '.join(lacking)}, for {mark.args[0]}"
    for mark in item.iter_markers("programs"):
        for name in mark.args:
            if shutil.which(name, path=PROGRAM_PATH) is None:
                yield f"needs the program {name}, see deploy/apt-packages.txt"


def missing_capabilities() -> list[str]:
    """Those of CAPABILITIES that this process does not have."""
    status = Path("/proc/self/status")
    if not status.exists():
        return list(CAPABILITIES)
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    effective = int(lines["CapEff"], 16)
    return [name for name, bit in CAPABILITIES.items() if not effective >> bit & 1]


@pytest.fixture(autouse=True)
def logging_as_at_the_start() -> Iterator[None]:
    """A test that sets up logging, on a stream that ends with it, leaves no trace of that."""
    yield
    structlog.reset_defaults()
