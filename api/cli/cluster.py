"""``sapin cluster``: making a pair, looking at it, stepping down."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sapin.api import client
from sapin.api.cli.common import (
    HELP_OPTIONS,
    AsJson,
    ConfigFile,
    ExitCode,
    StateDir,
    ask,
    fail,
    print_json,
    show,
    where,
)

if TYPE_CHECKING:
    from sapin.cluster.membership import Folder, Member

DEFAULT_PORT = 4510
MAX_TOKEN = 16 * 1024
"""Characters of a token that is read."""

app = typer.Typer(
    name="cluster",
    no_args_is_help=True,
    context_settings=HELP_OPTIONS,
    help="The high-availability pair.",
)

_SETUP, _RUN = "Setting up", "A running pair"

NodeName = Annotated[str, typer.Option(help="What this node is called.", show_default=False)]
Links = Annotated[
    list[str],
    typer.Option(help="This node's address on a cluster link; once for each link.", show_default=False),
]
LinkPort = Annotated[
    int, typer.Option(min=1, max=65_534, help="TCP port of the link; enrolment takes the next one.")
]


@app.command(rich_help_panel=_SETUP)
def init(
    node: NodeName,
    link: Links,
    port: LinkPort = DEFAULT_PORT,
    wait: Annotated[bool, typer.Option("--wait", help="Wait here until the second node has joined.")] = False,
    state_dir: StateDir = None,
    config: ConfigFile = None,
) -> None:
    """Make a cluster of this node, and a token for the second one."""
    from sapin.cluster.tokens import found, issue_token

    with _faults():
        folder = _folder(state_dir, config)
        found(folder, _member(node, link, port), time.time(), os.urandom)
        _hand_out(folder, issue_token(folder, time.time(), os.urandom), wait)


@app.command(rich_help_panel=_SETUP)
def token(
    wait: Annotated[bool, typer.Option("--wait", help="Wait here until the second node has joined.")] = False,
    state_dir: StateDir = None,
    config: ConfigFile = None,
) -> None:
    """Make another token for the second node; a former one is void."""
    from sapin.cluster.tokens import issue_token

    with _faults():
        folder = _folder(state_dir, config)
        _hand_out(folder, issue_token(folder, time.time(), os.urandom), wait)


@app.command(rich_help_panel=_SETUP)
def join(
    node: NodeName,
    link: Links,
    given: Annotated[
        str,
        typer.Option(
            "--token", help="The token, or a file that has it, or - for standard input.", show_default=False
        ),
    ],
    port: LinkPort = DEFAULT_PORT,
    state_dir: StateDir = None,
    config: ConfigFile = None,
) -> None:
    """Come to a cluster as its second node.

    Other users of the machine see what a command is given: prefer a file or standard input for the token.
    """
    import trio

    from sapin.cluster.enrolment import join as come
    from sapin.cluster.tokens import Token

    with _faults():
        folder = _folder(state_dir, config)
        membership = trio.run(come, folder, _member(node, link, port), Token.decode(_token(given)), time.time)
    peer = membership.peer
    assert peer is not None
    typer.echo(f"{node} and {peer.name} are a cluster. Next: `sapin run` on both, with a [cluster] table.")


@app.command(rich_help_panel=_SETUP)
def leave(
    force: Annotated[
        bool, typer.Option("--force", help="Even if the daemon runs, or the other node does not answer.")
    ] = False,
    state_dir: StateDir = None,
    config: ConfigFile = None,
) -> None:
    """Leave the cluster: the other node goes on alone, and this one forgets certificates and secrets.

    Stop the daemon first, so that the other node takes over in an orderly way.
    """
    import trio

    from sapin.cluster.enrolment import say_goodbye
    from sapin.cluster.tokens import EnrolmentError

    place = where(state_dir, config)
    if not force and _runs(place):
        fail("the daemon runs: stop it, so that the other node takes over, or give --force")
    with _faults():
        folder = _folder(state_dir, config)
        membership = folder.membership()
        peer = membership.peer
        try:
            trio.run(say_goodbye, folder, time.time)
        except EnrolmentError as error:
            if not force:
                fail(f"{error}; --force leaves all the same")
            assert peer is not None
            typer.echo(
                f"{error}. Run `sapin cluster forget {membership.node}` on {peer.name}.",
                err=True,
            )
        folder.remove()
    typer.echo(f"{membership.node} has left the cluster.")


@app.command(rich_help_panel=_SETUP)
def forget(
    node: Annotated[str, typer.Argument(help="The other node's name.", show_default=False)],
    state_dir: StateDir = None,
    config: ConfigFile = None,
) -> None:
    """Take the other node off the list: one that is gone for good, or was not reachable when it left."""
    from sapin.cluster.tokens import forget as strike

    with _faults():
        strike(_folder(state_dir, config), node)
    typer.echo(
        f"{node} is no member any more, and is refused from now on; `sapin cluster token` lets another node in."
    )


@app.command("rotate-certificates", rich_help_panel=_SETUP)
def rotate_certificates(state_dir: StateDir = None, config: ConfigFile = None) -> None:
    """Renew this node's certificate and key now; the daemon does it by itself after two thirds of a year."""
    from sapin.cluster import certificates

    folder = _folder(state_dir, config)
    with _faults():
        made = certificates.renew(folder, time.time(), force=True)
        assert made is not None
        until = time.strftime("%Y-%m-%d", time.localtime(certificates.expires(made.certificate)))
    typer.echo(f"The new certificate is valid until {until}. A daemon that runs shows it from now on.")


@app.command(rich_help_panel=_RUN)
def status(as_json: AsJson = False, state_dir: StateDir = None, config: ConfigFile = None) -> None:
    """Show roles, replication, the last failover and alarms.

    Ends with 1 while an alarm stands.
    """
    answer = ask(where(state_dir, config), "cluster-status")
    if as_json:
        print_json(answer)
    else:
        from sapin.api.cli.pair import status as table

        show(table(answer, time.time()))
    if answer.get("alarms"):
        raise typer.Exit(ExitCode.REFUSED)


@app.command("step-down", rich_help_panel=_RUN)
def step_down(
    force: Annotated[
        bool, typer.Option("--force", help="Even if the standby is not in sync: clients may be lost.")
    ] = False,
    as_json: AsJson = False,
    state_dir: StateDir = None,
    config: ConfigFile = None,
) -> None:
    """Hand the virtual addresses over to the standby; asked of the active."""
    answer = ask(where(state_dir, config), "cluster-step-down", force=force)
    if as_json:
        print_json(answer)
    else:
        typer.echo("Stepping down: the standby takes over. `sapin cluster status` shows how it went.")


@app.command(rich_help_panel=_RUN)
def events(
    limit: Annotated[int, typer.Option(min=1, max=1_000, help="How many, the newest.")] = 20,
    as_json: AsJson = False,
    state_dir: StateDir = None,
    config: ConfigFile = None,
) -> None:
    """Show what happened to the pair, the newest last."""
    answer = ask(where(state_dir, config), "cluster-events", limit=limit)
    if as_json:
        print_json(answer)
        return
    from sapin.api.cli.pair import events as table

    show(table(answer, time.time()))


# what the commands share


@contextmanager
def _faults() -> Iterator[None]:
    """Ends the command with the sentence of what went wrong."""
    from sapin.cluster.certificates import CertificateError
    from sapin.cluster.membership import MembershipError
    from sapin.cluster.tokens import EnrolmentError

    try:
        yield
    except (EnrolmentError, MembershipError, CertificateError) as error:
        fail(str(error))


def _folder(state_dir: Path | None, config: Path | None) -> Folder:
    from sapin.cluster.membership import Folder

    return Folder(where(state_dir, config))


def _member(node: str, links: list[str], port: int) -> Member:
    from sapin.cluster.membership import parse_member

    try:
        return parse_member(node, links, port)
    except ValueError as error:
        fail(f"{error}; a node is called like a host, and links are its own addresses", ExitCode.USAGE)


def _token(given: str) -> str:
    """The token itself, from wherever it stands."""
    if given == "-":
        return sys.stdin.read(MAX_TOKEN)
    try:
        path = Path(given)
        if len(given) < 256 and path.is_file():
            with path.open(encoding="ascii", errors="replace") as file:
                return file.read(MAX_TOKEN)
    except OSError as error:
        fail(f"{given} cannot be read: {error.strerror}")
    return given


def _hand_out(folder: Folder, text: str, wait: bool) -> None:
    own = folder.membership().own
    typer.echo(f"This node is {own.name}. On the second node, within an hour:\n", err=True)
    typer.echo("    sapin cluster join --node NAME --link ADDRESS --token -\n", err=True)
    typer.echo("and give it this token:\n", err=True)
    typer.echo(text)
    if wait:
        _wait(folder)
    else:
        typer.echo(
            "\nThe token is answered while `sapin run` runs here, or `sapin cluster token --wait`.", err=True
        )


def _wait(folder: Folder) -> None:
    """Answer until the second node is there, or the token ends."""
    import trio

    from sapin.cluster.enrolment import serve_enrolment
    from sapin.cluster.tokens import token_expires

    async def answer() -> str | None:
        joined: list[str] = []
        async with trio.open_nursery() as nursery:

            def changed(membership: Any) -> None:
                if membership.peer is not None:
                    joined.append(membership.peer.name)

            await nursery.start(serve_enrolment, folder, time.time, changed)
            while not joined and (token_expires(folder) or 0.0) > time.time():  # noqa: ASYNC110  # a clock's time
                await trio.sleep(0.2)
            await trio.sleep(0.5)  # the answer is on its way
            nursery.cancel_scope.cancel()
        return joined[0] if joined else None

    typer.echo("\nWaiting for the second node…", err=True)
    try:
        name = trio.run(answer)
    except* OSError as group:
        fail(f"the port after the link's cannot be listened on: {group.exceptions[0]}; does the daemon run?")
    if name is None:
        fail("nobody came before the token ended; make another with `sapin cluster token`")
    typer.echo(f"{name} has joined. Next: `sapin run` on both, with a [cluster] table.", err=True)


def _runs(place: Path) -> bool:
    """Whether a daemon runs there."""
    try:
        client.call(place, "cluster-status")
    except client.ControlError as error:
        return error.kind not in ("down", "denied")
    return True
