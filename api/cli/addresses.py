"""``sapin cluster release | keepalived | notify``: for what stands around the daemon, rather than for people."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sapin.api.cli.cluster import app
from sapin.api.cli.common import ConfigFile, StateDir, ask, fail, where

if TYPE_CHECKING:
    from sapin.cluster.config import Cluster

__all__ = ["app"]
"""With the commands of this file."""

_AROUND = "For systemd and keepalived"

File = Annotated[Path, typer.Argument(help="The configuration file.", show_default=False)]


@app.command(rich_help_panel=_AROUND)
def release(file: File) -> None:
    """Remove the virtual addresses after a crash; refused while the daemon runs."""
    from sapin.cluster.netlink import AddressError
    from sapin.cluster.takeover import release as remove

    cluster, state_dir = _cluster(file)
    if _locked(state_dir):
        fail(f"the daemon runs and has the addresses, or leaves them alone: stop it first ({state_dir})")
    try:
        remove(cluster)
    except (AddressError, OSError) as error:
        fail(str(error))


@app.command(rich_help_panel=_AROUND)
def keepalived(file: File) -> None:
    """Print a keepalived.conf for this node, for takeover = "keepalived"."""
    from sapin.cluster.keepalived import keepalived_conf
    from sapin.cluster.membership import Folder, MembershipError

    cluster, state_dir = _cluster(file)
    try:
        membership = Folder(state_dir).membership()
    except MembershipError as error:
        fail(str(error))
    if cluster.takeover != "keepalived":
        fail(
            f'{file}: takeover = "{cluster.takeover}": it must be "keepalived", or both would move the addresses'
        )
    command = shutil.which("sapin") or str(Path(sys.argv[0]).resolve())
    options = f"--state-dir {state_dir}"
    typer.echo(keepalived_conf(cluster, membership.node, membership.cluster, command, options), nl=False)


@app.command(rich_help_panel=_AROUND)
def notify(
    state: Annotated[str, typer.Argument(help="active or standby.", show_default=False)],
    state_dir: StateDir = None,
    config: ConfigFile = None,
) -> None:
    """Tell the daemon whether the virtual addresses are here; called by keepalived's hooks."""
    ask(where(state_dir, config), "cluster-notify", state=state)


def _cluster(file: Path) -> tuple[Cluster, Path]:
    from sapin.api.daemon import StartError, load
    from sapin.core.faults import ConfigError
    from sapin.core.registry import Registry

    try:
        config = load(file, Registry())
    except (StartError, ConfigError) as error:
        fail(str(error))
    cluster: Cluster | None = config.sections.get("cluster")
    if cluster is None:
        fail(f"{file} has no [cluster] table")
    return cluster, config.node.state_dir


def _locked(state_dir: Path) -> bool:
    """Whether a daemon has the state directory."""
    import fcntl

    try:
        with (state_dir / "lock").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
