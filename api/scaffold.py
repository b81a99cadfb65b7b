"""A new plugin's package: the smallest one that is found, configured and tested.

Three files: ``pyproject.toml`` with the entry point, one module with a plugin that works, and a test that runs the
conformance suite on it. The author changes what the plugin decides.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template

from sapin.core.contracts import KINDS

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_MAX_NAME = 40


def new(kind: str, name: str, directory: Path) -> Sequence[Path]:
    """Write the package of a new plugin, and return the files written.

    Args:
        kind: one of :data:`~sapin.core.contracts.KINDS`.
        name: what the configuration will call it: lower case words joined by hyphens.
        directory: where the package goes; made if it is not there.

    Raises:
        ValueError: there is no such kind, or the name is of another form.
        FileExistsError: the directory is not empty.
        OSError: it cannot be written.
    """
    if kind not in KINDS:
        raise ValueError(f"there is no plugin kind {kind!r}, only {', '.join(KINDS)}")
    if not _NAME.fullmatch(name) or len(name) > _MAX_NAME:
        raise ValueError(
            f"a plugin's name is lower case words joined by hyphens, such as first-fit, not {name!r}"
        )
    if directory.exists() and any(directory.iterdir()):
        raise FileExistsError(f"{directory} is not empty")
    written = []
    for path, text in _files(kind, name).items():
        target = directory / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
        written.append(target)
    return written


def _files(kind: str, name: str) -> Mapping[str, str]:
    """The text of each file, by its path in the package."""
    module = "sapin_" + name.replace("-", "_")
    words = {
        "kind": kind,
        "name": name,
        "group": KINDS[kind],
        "module": module,
        "cls": "".join(word.capitalize() for word in name.split("-")),
    }
    texts = {"pyproject.toml": _PYPROJECT, f"{module}.py": _PLUGINS[kind], f"tests/test_{module}.py": _TEST}
    return {path: Template(text).substitute(words) for path, text in texts.items()}


_PYPROJECT = """\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "sapin-$name"
version = "0.1.0"
description = "The $kind plugin $name for Sapin"
requires-python = ">=3.11"
dependencies = ["sapin>=0.1"]

[project.optional-dependencies]
test = ["pytest"]

[project.entry-points."$group"]
$name = "$module:$cls"

[tool.setuptools]
py-modules = ["$module"]
"""

_TEST = '''\
"""Does $cls keep its contract?"""

from __future__ import annotations

import pytest
from sapin.core.conformance import Case, cases

from $module import $cls


@pytest.mark.parametrize("case", cases("$kind", $cls), ids=str)
def test_contract(case: Case) -> None:
    """Each demand of the contract is a test of its own."""
    case()
'''

_SCHEDULER = '''\
"""$cls: of a few candidates drawn at random, the one with the fewest clients."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel, Field
from sapin.core.contracts import Candidate, Request


class $cls:
    """Draws ``choices`` candidates, and takes the one with the fewest clients."""

    class Config(BaseModel, extra="forbid"):
        """Options of the scheduler."""

        choices: int = Field(default=2, ge=1, le=10)
        """How many candidates are drawn."""

    def __init__(self, config: Config) -> None:
        self._choices = config.choices

    def pick(self, request: Request, candidates: Sequence[Candidate]) -> Candidate:
        """One of the candidates."""
        drawn = [request.random.choice(candidates) for _ in range(self._choices)]
        return min(drawn, key=lambda candidate: candidate.pinned)
'''

_PERSISTENCE = '''\
"""$cls: a client is who sends from the same address, and if asked to, from the same port."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel
from sapin.core.contracts import Datagram, Key, key


class $cls:
    """Recognises a client by its address."""

    class Config(BaseModel, extra="forbid"):
        """Options of the persistence."""

        port: bool = False
        """Whether each port of an address is a client of its own."""

    def __init__(self, config: Config) -> None:
        self._port = config.port

    def keys(self, datagram: Datagram) -> Sequence[Key]:
        """The keys of the client, the strongest first."""
        address, port = datagram.client
        return (key("$name", address + port.to_bytes(2) if self._port else address),)
'''

_FOLLOWING = '''\
"""$cls: real servers serve a follower on its port, or on one that the configuration names."""

from __future__ import annotations

from pydantic import BaseModel, Field
from sapin.core.model import Endpoint, RealServer, VirtualService


class $cls:
    """The same host, another port."""

    class Config(BaseModel, extra="forbid"):
        """Options of the following."""

        port: int | None = Field(default=None, ge=1, le=65_535)
        """The real servers' port; the follower's own if there is none."""

    def __init__(self, config: Config) -> None:
        self._port = config.port

    def endpoint(self, server: RealServer, leader: VirtualService, follower: VirtualService) -> Endpoint:
        """The server's endpoint for the follower."""
        return Endpoint(server.address, self._port or follower.port)
'''

_CHECK = '''\
"""$cls: can a TCP connection be made?"""

from __future__ import annotations

import trio
from pydantic import BaseModel, Field
from sapin.core.contracts import CheckResult, Target


class $cls:
    """Healthy: the connection was made."""

    class Config(BaseModel, extra="forbid"):
        """Options of the check."""

        port: int | None = Field(default=None, ge=1, le=65_535)
        """The port to connect to; the service's own if there is none."""

    def __init__(self, config: Config) -> None:
        self._port = config.port

    async def check(self, target: Target) -> CheckResult:
        """Connect, and close at once; an OSError or running over the timeout is a failure of the server."""
        host, port = str(target.endpoint.address), self._port or target.endpoint.port
        started = trio.current_time()
        stream = await trio.open_tcp_stream(host, port)
        await stream.aclose()
        return CheckResult(True, "accepts connections", trio.current_time() - started)
'''

_PLUGINS: Mapping[str, str] = {
    "scheduler": _SCHEDULER,
    "persistence": _PERSISTENCE,
    "following": _FOLLOWING,
    "check": _CHECK,
}
