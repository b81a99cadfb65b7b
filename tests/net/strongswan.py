"""strongSwan in a namespace: its IKE daemon, how it is told things, and what it says of its SAs.

ESP is done by the daemon itself (its plugin kernel-libipsec), in UDP and through a TUN device, so that the kernel
needs to know nothing of IPsec.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.net.namespaces import Daemon, LabError, Namespace, run, until

Settings = Mapping[str, "str | int | Settings"]
"""A section of a configuration file, with sections in it."""

RETRANSMISSION: Settings = {"retransmit_timeout": "1.0", "retransmit_base": "1.5", "retransmit_tries": 3}
"""A peer is given up after 1 + 1.5 + 1.5² + 1.5³ = 8.1 s."""


@dataclass(frozen=True)
class ChildSa:
    """A CHILD_SA in use, as one of its ends sees it."""

    id: int
    spi_in: str
    spi_out: str


@dataclass(frozen=True)
class IkeSa:
    """An IKE_SA, as one of its ends sees it; SPIs are in hexadecimal."""

    id: int
    established: bool
    spi_i: str
    spi_r: str
    peer: str
    """The address of the other end."""
    inner: tuple[str, ...]
    """The client's addresses in the tunnel."""
    children: tuple[ChildSa, ...]

    @property
    def spis(self) -> tuple[str, str]:
        """What both ends, and nobody else, know this SA by."""
        return self.spi_i, self.spi_r


class Charon:
    """An IKE daemon in a namespace, with a folder and a control socket of its own."""

    def __init__(self, namespace: Namespace, folder: Path, settings: Settings) -> None:
        self._name = folder.name
        self._socket = folder / "vici"
        self._log = folder / "charon.log"
        (folder / "strongswan.conf").write_text(render(_daemon_settings(folder)))
        (folder / "swanctl.conf").write_text(render(settings))
        self._env = {"STRONGSWAN_CONF": f"{folder}/strongswan.conf", "SWANCTL_DIR": str(folder)}
        self._daemon = Daemon(namespace, ["charon-systemd"], folder / "output.log", self._env)

    @property
    def running(self) -> bool:
        """Whether the daemon runs."""
        return self._daemon.running

    @property
    def log(self) -> str:
        """What the daemon logged so far."""
        return self._log.read_text(errors="replace")

    def start(self) -> None:
        """Start the daemon; :meth:`load` has to follow."""
        self._socket.unlink(missing_ok=True)
        self._daemon.start()

    def kill(self) -> None:
        """End the daemon as a crash would."""
        self._daemon.kill()

    async def load(self) -> None:
        """Wait until the daemon listens, and give it its credentials, pools and connections."""
        await until(self._listens, f"{self._name} listens")
        await self.control("--load-all", "--noprompt")

    async def control(self, *arguments: str, check: bool = True, patience: float = 20) -> str:
        """Give the daemon a command of ``swanctl``, and return what it printed.

        Raises:
            LabError: it failed, unless ``check`` is false; or it took longer than ``patience`` seconds.
        """
        argv = ["swanctl", *arguments, "--uri", f"unix://{self._socket}"]
        done = await run(*argv, patience=patience, env=self._env)
        if check and done.returncode:
            raise LabError(f"{self._name}: {' '.join(argv)}: {done.stdout}")
        return done.stdout

    async def sas(self) -> list[IkeSa]:
        """All IKE_SAs, half-open ones too; none when the daemon is down."""
        if not self.running:
            return []
        events = parse_raw(await self.control("--list-sas", "--raw"), "list-sa event")
        return [_ike_sa(fields) for event in events for fields in event.values()]

    async def counter(self, name: str) -> int:
        """One of the daemon's counts of IKE messages, such as ``ike-init-out-req``."""
        (reply,) = parse_raw(await self.control("--counters", "--raw"), "counters reply")
        return int(reply["counters"][""][name])

    async def terminate(self) -> None:
        """Forget all IKE_SAs at once, without waiting for the peers."""
        for sa in await self.sas():
            await self.control("--terminate", "--ike-id", str(sa.id), "--force", check=False)

    async def _listens(self) -> bool:
        if not self.running:
            raise LabError(f"{self._name} ended at its start: {self.log}")
        with suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
            probe.connect(str(self._socket))
            return True
        return False


def _daemon_settings(folder: Path) -> Settings:
    daemon: Settings = {
        # kernel-libipsec before kernel-netlink: the first that can do ESP does it. Without it there is no start.
        "load": "random nonce openssl pem pkcs1 pkcs8 pubkey x509 constraints hmac kdf gcm aes sha2"
        " kernel-libipsec! kernel-netlink socket-default vici counters",
        # With 8 the control socket accepts and never answers.
        "threads": 16,
        # Where the balancer translates sources, all clients are one address to a gateway: it asks them for
        # cookies, as it would in life, but must not drop what they send.
        "block_threshold": 100,
        "filelog": {"file": {"path": f"{folder}/charon.log", "default": 1, "flush_line": "yes"}},
        "plugins": {"vici": {"socket": f"unix://{folder}/vici"}},
        **RETRANSMISSION,
    }
    return {"charon-systemd": daemon, "swanctl": {"load": "random openssl pem pkcs1 pkcs8 x509 pubkey"}}


def render(settings: Settings) -> str:
    """The text of a configuration file."""
    lines = (
        f"{name} = {value}" if isinstance(value, str | int) else f"{name} {{\n{render(value)}\n}}"
        for name, value in settings.items()
    )
    return "\n".join(lines)


def parse_raw(printed: str, heading: str) -> Iterator[dict[str, Any]]:
    """The messages of that heading in what ``swanctl --raw`` printed.

    A value is a string, a list of strings, or a section with values of its own. Strings with blanks in them are
    not understood.
    """
    for line in printed.splitlines():
        if line.startswith(heading):
            _, *tokens = re.findall(r"[{}\[\]]|[^\s{}\[\]]+", line.removeprefix(heading))
            yield _section(iter(tokens))


def _section(tokens: Iterator[str]) -> dict[str, Any]:
    section: dict[str, Any] = {}
    name = ""
    for token in tokens:
        if token == "}":
            break
        if token == "{":
            section[name] = _section(tokens)
        elif token == "[":
            section[name] = list(iter(lambda: next(tokens), "]"))
        else:
            name, _, value = token.partition("=")
            section[name] = value
    return section


def _ike_sa(fields: dict[str, Any]) -> IkeSa:
    return IkeSa(
        id=int(fields["uniqueid"]),
        established=fields["state"] == "ESTABLISHED",
        spi_i=fields["initiator-spi"],
        spi_r=fields["responder-spi"],
        peer=fields["remote-host"],
        inner=tuple(fields.get("local-vips", fields.get("remote-vips", ()))),
        children=tuple(
            ChildSa(int(child["uniqueid"]), child["spi-in"], child["spi-out"])
            for child in fields.get("child-sas", {}).values()
            if child["state"] == "INSTALLED"
        ),
    )
