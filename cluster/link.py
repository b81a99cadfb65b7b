"""The cluster's link: one monogamous Pair1 over mutual TLS, driven by its descriptors, on trio.

The node whose name sorts first listens on all of its links; the other dials them, one after another, until one answers.
A connection counts only if the certificate is of the cluster's CA, is valid, and names the other member; whoever else
comes is refused and counted. What arrives and what becomes of the connection come out of one queue in the order in which
they happened, :meth:`Link.receive`: no message of a connection precedes its :class:`Connected` or follows its
:class:`Disconnected`, although pipe callbacks arrive on threads of the library.

Messages are bounded by :data:`MAX_MESSAGE`, and the library's queues by :data:`QUEUE`; what does not fit is pushed back
to the sender. That something was sent never means that it arrived.
"""

from __future__ import annotations

import os
import select
import threading
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import cycle
from typing import Any, NamedTuple

import pynng  # type: ignore[import-untyped]
import structlog
import trio

from sapin.cluster.membership import Credentials, Member
from sapin.cluster.strangers import Strangers
from sapin.cluster.wire import MAX_MESSAGE

QUEUE = 64
"""Messages that the library holds in each direction; without such a queue each message costs a switch of threads."""
SILENCE = 2.0
"""Seconds after which a connection over which nothing came is made anew: the library overlooks the end of a connection
that ends while its queue is full."""
RECONNECT = 50, 100
"""Milliseconds between two attempts on one link: at first, and at most."""
ATTEMPT = 1.0
"""Seconds that one of the peer's links is dialled before the next one is."""
LISTEN_AGAIN = 1.0
"""Seconds until a link address that could not be listened on is tried again."""
LOG_EVERY = 60.0
"""Seconds between two log lines about those who were refused."""
_POLL = 0.05
_REMEMBERED = 64
"""Connections that ended and are remembered, so that what comes late from them is told from something new."""

log = structlog.get_logger("sapin.cluster.link")
_lib, _ffi = pynng.lib, pynng.ffi


class Connected(NamedTuple):
    """The peer is there."""

    peer: str
    link: str
    """The peer's address."""


class Disconnected(NamedTuple):
    """The connection ended, whoever ended it."""

    peer: str


class _Pipe(NamedTuple):
    number: int
    link: str


Received = Connected | Disconnected | bytes


class LinkError(Exception):
    """The link cannot be used; the text says why."""


class Link:
    """The connection to the peer, made anew whenever it ends. Open from the start; :meth:`run` keeps it up and closes it.

    Args:
        own: this node.
        peer: the other one.
        credentials: what this node shows, and checks the other by.
        silence: seconds, longer than any pause between two messages of a peer that is well.

    Raises:
        LinkError: the certificates are not accepted.
    """

    def __init__(self, own: Member, peer: Member, credentials: Credentials, silence: float = SILENCE) -> None:
        self._own, self._peer = own, peer
        self._listens = own.name < peer.name
        self._silence = silence
        self._heard = False
        self._connection = trio.Event()
        self._lock = threading.Lock()
        self._closed = False
        self._told: deque[tuple[bool, _Pipe]] = deque()
        """Pipes that came (true) and went, by the library's threads."""
        self._signalled = False
        self._live: pynng.Pipe | None = None
        """The pipe in the only slot, as the library's threads see it."""
        self._current: _Pipe | None = None
        """The pipe that the reader of this object was told of."""
        self._ended: deque[int] = deque(maxlen=_REMEMBERED)
        self._ready: deque[Received] = deque()
        self._refused: Counter[str] = Counter()
        self._passed: Counter[str] = Counter()
        """What listeners that are closed by now had refused."""
        self._slot = _ffi.new("nng_msg **")
        self._socket = pynng.Pair1(
            recv_max_size=MAX_MESSAGE,
            recv_buffer_size=QUEUE,
            send_buffer_size=QUEUE,
            reconnect_time_min=RECONNECT[0],
            reconnect_time_max=RECONNECT[1],
        )
        try:
            self._present(credentials)
        except pynng.NNGException as error:
            self._socket.close()
            raise LinkError(f"the link does not accept this node's certificate, key or CA: {error}") from None
        self._socket.add_pre_pipe_connect_cb(self._admit)
        self._socket.add_post_pipe_connect_cb(self._came)
        self._socket.add_post_pipe_remove_cb(self._went)
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll = select.epoll()
        for descriptor in (self._socket.recv_fd, self._event):
            self._epoll.register(descriptor, select.EPOLLIN)
        self._send_fd: int = self._socket.send_fd
        self._strangers = Strangers(own.port)
        self._listening: dict[str, Any] = {}
        self._deaf: set[str] = set()
        """Link addresses that could not be listened on, told once."""
        self._renewals = 0

    # what a node does with it

    @property
    def fd(self) -> int:
        """A descriptor that is readable when :meth:`receive` has something."""
        return self._epoll.fileno()

    @property
    def link(self) -> str | None:
        """The peer's address in use, if it is connected."""
        return self._current.link if self._current else None

    @property
    def refused(self) -> Mapping[str, int]:
        """Connections that were refused, by cause, since the start.

        ``handshake``: no TLS, an unknown CA, an expired or missing certificate; ``not-a-member``: a certificate of the
        CA for a node that is not the peer; ``second``: the peer, while a connection of it stood; ``half-open``: silent
        before the handshake ended; ``closed``: left before that; ``silent``: the peer, after nothing
        was heard of it for long.
        """
        counts = self._refused + self._passed + self._counted()
        counts["half-open"] = self._strangers.ended
        return {cause: count for cause, count in sorted(counts.items()) if count}

    def receive(self) -> Received | None:
        """What comes next: a message, or what became of the connection; None if there is nothing. Does not block."""
        if self._ready:
            return self._ready.popleft()
        while (message := self._take()) is not None:
            self._heard = True
            number, data = message
            if self._current is not None and number == self._current.number:
                return data
            if number not in self._ended:
                self._become(_Pipe(number, self._remote()))
                self._ready.append(data)
                return self._ready.popleft()
        self._hear()
        return self._ready.popleft() if self._ready else None

    async def readable(self) -> None:
        """Wait until :meth:`receive` may have something."""
        if self._ready:
            await trio.lowlevel.checkpoint()
            return
        await trio.lowlevel.wait_readable(self.fd)

    def send(self, data: bytes) -> bool:
        """Hand a message over; false if the peer is not there or does not keep up, and it is to be sent later.

        Raises:
            LinkError: the library refuses it for another reason.
        """
        live, current = self._live, self._current
        if live is None or current is None or live.id != current.number:
            return False  # whatever is queued now would go to the next connection
        error = _lib.nng_send(self._socket.socket, data, len(data), _lib.NNG_FLAG_NONBLOCK)
        if error in (_lib.NNG_EAGAIN, _lib.NNG_ECLOSED):
            return False
        if error:
            raise LinkError(f"the link does not send: {_ffi.string(_lib.nng_strerror(error)).decode()}")
        return True

    async def writable(self) -> None:
        """Wait until :meth:`send` may take something; not before :meth:`receive` told of a connection."""
        await self._connection.wait()
        await trio.lowlevel.wait_readable(self._send_fd)

    def close_pipe(self) -> None:
        """End the connection, which frees the only place for the next: for a peer that hangs or talks nonsense."""
        pipe = self._live
        if pipe is not None:
            with suppress(pynng.NNGException):
                pipe.close()

    def renew(self, credentials: Credentials) -> None:
        """Show another certificate from now on; the connection is made anew, the descriptors stay.

        Raises:
            LinkError: the certificate is not accepted.
        """
        try:
            self._present(credentials)
        except pynng.NNGException as error:
            raise LinkError(f"the link does not accept the new certificate: {error}") from None
        self._stop_listening()
        self.close_pipe()
        self._renewals += 1

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep the link up until cancelled, then close it."""
        try:
            async with trio.open_nursery() as nursery:
                if self._listens:
                    self._listen()
                    nursery.start_soon(self._keep_listening)
                    nursery.start_soon(self._strangers.watch, self._known)
                else:
                    nursery.start_soon(self._dial)
                nursery.start_soon(self._report)
                nursery.start_soon(self._end_silence)
                task_status.started()
        finally:
            self.close()

    def close(self) -> None:
        """Close everything; harmless if it is closed."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._socket.close()
        self._epoll.close()
        os.close(self._event)

    # making connections

    def _present(self, credentials: Credentials) -> None:
        tls = pynng.TLSConfig
        self._socket.tls_config = tls(
            tls.MODE_SERVER if self._listens else tls.MODE_CLIENT,
            ca_string=credentials.ca.decode(),
            own_cert_string=credentials.certificate.decode(),
            own_key_string=credentials.key.decode(),
            server_name=None if self._listens else self._peer.name,
            auth_mode=tls.AUTH_MODE_REQUIRED,
        )

    def _listen(self) -> None:
        for address in map(str, self._own.links):
            if address in self._listening:
                continue
            url = _url(address, self._own.port)
            try:
                self._listening[address] = self._socket.listen(url)
            except pynng.NNGException as error:
                if address not in self._deaf:
                    log.warning(
                        "cannot listen on a link; tried again each second", link=url, reason=str(error)
                    )
                self._deaf.add(address)
            else:
                if address in self._deaf:
                    log.info("listening on a link", link=url)
                self._deaf.discard(address)

    async def _keep_listening(self) -> None:
        while True:
            await trio.sleep(LISTEN_AGAIN)
            self._listen()

    def _stop_listening(self) -> None:
        self._passed += self._counted()
        for listener in self._listening.values():
            with suppress(pynng.NNGException):
                listener.close()
        self._listening.clear()
        if self._listens:
            self._listen()

    async def _dial(self) -> None:
        """One link after the other; a connection that stands is left alone."""
        for address in cycle(map(str, self._peer.links)):
            dialer = self._socket.dial(_url(address, self._peer.port), block=False)
            renewals = self._renewals
            try:
                until = trio.current_time() + ATTEMPT
                while renewals == self._renewals and trio.current_time() < until:
                    await trio.sleep(_POLL)
                    if self._live is not None:
                        until = trio.current_time() + ATTEMPT
            finally:
                with suppress(pynng.NNGException):
                    dialer.close()

    async def _end_silence(self) -> None:
        while True:
            self._heard, pipe, began = False, self._live, trio.current_time()
            await trio.sleep(self._silence)
            if trio.current_time() - began > 1.5 * self._silence:
                continue  # this node was paused: it was deaf, which is not the peer's silence
            if pipe is not None and self._live is pipe and not self._heard:
                self._refused["silent"] += 1
                self.close_pipe()

    # on the library's threads, which hold a lock of it: nothing here may wait

    def _admit(self, pipe: pynng.Pipe) -> None:
        """Only the other member gets in; a new connection of it means that the one which stands is dead."""
        if _name(pipe) != self._peer.name:
            self._refused["not-a-member"] += 1
            pipe.close()
        elif self._listens and self._live is not None:
            self._refused["second"] += 1
            self.close_pipe()
        self._forget_queue()

    def _came(self, pipe: pynng.Pipe) -> None:
        self._live = pipe
        self._tell(True, _Pipe(pipe.id, _address(pipe)))

    def _went(self, pipe: pynng.Pipe) -> None:
        if self._live is not None and self._live.id == pipe.id:
            self._live = None
            self._forget_queue()
        self._tell(False, _Pipe(pipe.id, ""))

    def _forget_queue(self) -> None:
        """What was to go to a connection that ended must not go to the next: a queue that shrinks drops its rest."""
        with suppress(pynng.NNGException):
            self._socket.send_buffer_size = 0
            self._socket.send_buffer_size = QUEUE

    def _tell(self, came: bool, pipe: _Pipe) -> None:
        with self._lock:
            if not self._closed:
                self._told.append((came, pipe))
                self._signalled = True
                os.eventfd_write(self._event, 1)

    # one queue of messages and connections

    def _take(self) -> tuple[int, bytes] | None:
        if _lib.nng_recvmsg(self._socket.socket, self._slot, _lib.NNG_FLAG_NONBLOCK):
            return None
        message = self._slot[0]
        try:
            number = _lib.nng_pipe_id(_lib.nng_msg_get_pipe(message))
            return number, bytes(_ffi.buffer(_lib.nng_msg_body(message), _lib.nng_msg_len(message)))
        finally:
            _lib.nng_msg_free(message)

    def _hear(self) -> None:
        """What the library's threads told, once all messages that came before are out."""
        if not self._signalled:
            return
        self._signalled = False  # before looking: what is told from now on signals again
        with suppress(BlockingIOError):
            os.eventfd_read(self._event)
        while self._told:
            came, pipe = self._told.popleft()
            if came and pipe.number not in self._ended:
                self._become(pipe)
            elif not came:
                if self._current is not None and self._current.number == pipe.number:
                    self._become(None)
                self._ended.append(pipe.number)

    def _become(self, pipe: _Pipe | None) -> None:
        former, self._current = self._current, pipe
        if former is not None and pipe is not None and former.number == pipe.number:
            return
        if former is not None:
            self._connection = trio.Event()
            self._ended.append(former.number)
            self._ready.append(Disconnected(self._peer.name))
        if pipe is not None:
            self._connection.set()
            self._ready.append(Connected(self._peer.name, pipe.link))

    def _remote(self) -> str:
        pipe = self._live
        return _address(pipe) if pipe is not None else ""

    # who was refused

    def _counted(self) -> Counter[str]:
        if not self._listening:
            return Counter()
        return Counter(dict(_listener_counts(self._socket.socket)))

    def _known(self) -> str | None:
        pipe = self._live
        return _address(pipe, port=True) if pipe is not None else None

    async def _report(self) -> None:
        """Says who was refused, at most once a minute."""
        before: Mapping[str, int] = {}
        while True:
            await trio.sleep(1.0)
            now = self.refused
            if now != before:
                grown = {cause: count - before.get(cause, 0) for cause, count in now.items()}
                log.warning(
                    "connections to the cluster's link were refused",
                    port=self._own.port,
                    **{cause.replace("-", "_"): count for cause, count in grown.items() if count},
                )
                before = now
                await trio.sleep(LOG_EVERY - 1.0)


_CAUSES: Mapping[str, str] = {
    "auth": "handshake",
    "timeout": "closed",
    "other": "closed",
    "disconnect": "closed",
    "proto": "protocol",
}
"""Our causes, by the library's statistics of a listener."""


def _listener_counts(sock: Any) -> Iterator[tuple[str, int]]:
    """The library's own counts over all listeners of a socket."""
    snapshot = _ffi.new("nng_stat **")
    if _lib.nng_stats_get(snapshot):
        return
    try:
        sums: Counter[str] = Counter()
        for listener in _children(snapshot[0]):
            if _text(listener) != "listener":
                continue
            values = {_text(each): int(_lib.nng_stat_value(each)) for each in _children(listener)}
            if values.get("socket") == _lib.nng_socket_id(sock):
                for statistic, cause in _CAUSES.items():
                    sums[cause] += values.get(statistic, 0)
        yield from sums.items()
    finally:
        _lib.nng_stats_free(snapshot[0])


def _children(statistic: Any) -> Iterator[Any]:
    child = _lib.nng_stat_child(statistic)
    while child != _ffi.NULL:
        yield child
        child = _lib.nng_stat_next(child)


def _text(statistic: Any) -> str:
    return str(_ffi.string(_lib.nng_stat_name(statistic)).decode())


def _name(pipe: pynng.Pipe) -> str | None:
    """Whom the certificate of the other end names."""
    got = _ffi.new("char **")
    if _lib.nng_pipe_get_string(pipe.pipe, b"tls-peer-cn", got):
        return None
    try:
        return str(_ffi.string(got[0]).decode("utf-8", "replace"))
    finally:
        _lib.nng_strfree(got[0])


def _address(pipe: pynng.Pipe, *, port: bool = False) -> str:
    """The other end of a pipe, as ``192.0.2.1`` or ``192.0.2.1:4510``."""
    try:
        text = str(pipe.remote_address)
    except (pynng.NNGException, ValueError):
        return ""
    host, _, number = text.rpartition(":")
    return f"{host}:{number}" if port else host.strip("[]")


def _url(address: str, port: int) -> str:
    return f"tls+tcp://[{address}]:{port}" if ":" in address else f"tls+tcp://{address}:{port}"
