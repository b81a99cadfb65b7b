"""Gateways that answer on loopback, and daemons that end with their test."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator, Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from tests.dataplane.farm import Daemon, Document, Farm, gateways

GATEWAYS = {f"gw{number}": f"127.9.1.{number}" for number in (1, 2, 3)}


@pytest.fixture
async def farm(tmp_path: Path) -> AsyncIterator[Farm]:
    """Three gateways that run."""
    async with gateways(tmp_path / "state", GATEWAYS) as farm:
        yield farm


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Callable[..., Daemon]]:
    """Makes daemons."""
    made: list[Daemon] = []

    def make(document: Document, **options: Any) -> Daemon:
        made.append(Daemon(document, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture(autouse=True)
def logs() -> Iterator[list[MutableMapping[str, Any]]]:
    """What was logged, unrendered."""
    with capture_logs() as entries:
        yield entries


@pytest.fixture(scope="session", autouse=True)
def _frozen() -> Iterator[None]:
    """What pytest has in memory is left out of the garbage collection that each start of a dataplane begins with."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _not_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dataplanes end with their test here, and are garbage then."""
    monkeypatch.setattr(gc, "freeze", lambda: None)
