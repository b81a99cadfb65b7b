"""Which sockets listen for which service, and how they are replaced at a reload."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import structlog

from sapin.core.dataplane.flows import Counters
from sapin.core.dataplane.listeners import Listener, ListenError, addresses
from sapin.core.model import IPAddress, VirtualService

log = structlog.get_logger("sapin.dataplane")


class Binder:
    """Makes listeners.

    Args:
        buffer: answers how many bytes of receive buffer a listener asks for.
        floating: services are at addresses that the node need not have.
    """

    def __init__(self, buffer: Callable[[], int], floating: bool) -> None:
        self.counters: dict[str, dict[str, Counters]] = {}
        """What has passed, by service and server."""
        self._buffer = buffer
        self._floating = floating

    def bind(self, service: VirtualService, *, share: bool = False) -> list[Listener]:
        """The listeners that a service has first.

        Raises:
            ListenError: one cannot be bound; none is then.
        """
        self.counters.setdefault(service.name, defaultdict(Counters))
        bound: list[Listener] = []
        try:
            bound.extend(self._listener(service, at, share) for at in addresses(service))
        except ListenError:
            for listener in bound:
                listener.close()
            raise
        wanted = self._buffer()
        if bound and bound[0].buffer < wanted:
            log.warning(
                "receive buffer is smaller than asked for: bursts may be lost",
                service=service.name,
                asked=wanted,
                given=bound[0].buffer,
                remedy=f"sysctl net.core.rmem_max={wanted}, or give the daemon CAP_NET_ADMIN",
            )
        return bound

    def bind_local(self, service: VirtualService, local: IPAddress) -> Listener:
        """The listener of a wildcard service for a local address that it was reached at.

        Raises:
            ListenError: it cannot be bound.
        """
        return self._listener(service, local, False)

    @contextmanager
    def bound(
        self, services: Iterable[VirtualService], leaving: Sequence[Listener]
    ) -> Iterator[Sequence[Listener]]:
        """Bind listeners, also where those that leave still are; if the context fails, all is as it was."""
        ports = {listener.service.port for listener in leaving}
        fresh: list[Listener] = []
        with ExitStack() as undo:
            for listener in leaving:
                undo.callback(listener.share, False)
                listener.share(True)
            for service in services:
                for listener in self.bind(service, share=service.port in ports):
                    undo.callback(listener.close)
                    fresh.append(listener)
            yield fresh
            undo.pop_all()

    def _listener(self, service: VirtualService, at: IPAddress, share: bool) -> Listener:
        counters = self.counters[service.name]
        return Listener(service, at, self._buffer(), counters, share=share, floating=self._floating)
