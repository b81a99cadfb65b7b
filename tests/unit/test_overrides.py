"""Admin states over a restart: what was saved is read, and a file that is not ours is told, not guessed at."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sapin.core.dataplane.overrides import load_overrides, save_overrides
from sapin.core.model import AdminState

FILE = "admin-states.json"
SAVED = {"ike": {"gw1": AdminState.DRAINING, "gw2": AdminState.ENABLED}, "other": {}}

NAMES = st.text("abcXYZ019._-", min_size=1, max_size=8)
OVERRIDES = st.dictionaries(
    NAMES, st.dictionaries(NAMES, st.sampled_from(AdminState), max_size=3), max_size=3
)


def test_without_a_file_there_are_none(tmp_path: Path) -> None:
    assert load_overrides(tmp_path) == {}


@given(OVERRIDES)
def test_what_is_saved_is_loaded(
    tmp_path_factory: pytest.TempPathFactory, overrides: dict[str, dict[str, AdminState]]
) -> None:
    directory = tmp_path_factory.mktemp("state")
    save_overrides(directory, overrides)
    assert load_overrides(directory) == overrides


def test_the_last_one_counts_and_nothing_else_is_left(tmp_path: Path) -> None:
    save_overrides(tmp_path, SAVED)
    save_overrides(tmp_path, {"ike": {"gw1": AdminState.DISABLED}})
    assert load_overrides(tmp_path) == {"ike": {"gw1": AdminState.DISABLED}}
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_the_file_is_for_its_owner(tmp_path: Path) -> None:
    save_overrides(tmp_path, SAVED)
    assert (tmp_path / FILE).stat().st_mode & 0o777 == 0o600


def test_a_write_that_was_cut_short_leaves_the_one_before(tmp_path: Path) -> None:
    save_overrides(tmp_path, SAVED)
    (tmp_path / FILE).with_suffix(".tmp").write_text('{"ike": {"gw1": "dis')
    assert load_overrides(tmp_path) == SAVED
    save_overrides(tmp_path, {})
    assert load_overrides(tmp_path) == {}


def test_a_directory_that_cannot_be_written_is_told_and_nothing_lost(tmp_path: Path) -> None:
    save_overrides(tmp_path, SAVED)
    (tmp_path / FILE).with_suffix(".tmp").mkdir()
    with pytest.raises(OSError, match="Is a directory"):
        save_overrides(tmp_path, {})
    assert load_overrides(tmp_path) == SAVED


GARBAGE = {
    "empty": b"",
    "torn": json.dumps(SAVED).encode()[:-5],
    "bytes": bytes(range(256)),
    "zeros": bytes(64),
    "a list": b"[]",
    "a number": b"1",
    "nothing": b"null",
    "servers in a list": b'{"ike": ["gw1"]}',
    "one state for all": b'{"ike": "draining"}',
    "an unknown state": b'{"ike": {"gw1": "drained"}}',
    "no state": b'{"ike": {"gw1": null}}',
    "a table for a state": b'{"ike": {"gw1": {}}}',
    "very deep": b"[" * 100_000,
}


@pytest.mark.parametrize("content", GARBAGE.values(), ids=GARBAGE)
def test_what_is_not_ours_is_told_with_the_remedy(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(ValueError, match="remove it to go by the configuration") as caught:
        load_overrides(tmp_path)
    assert str(tmp_path / FILE) in str(caught.value)
    assert len(str(caught.value)) < 1_000


@given(
    st.binary(max_size=100)
    | st.builds(lambda o, n: json.dumps(o).encode()[:n], OVERRIDES, st.integers(0, 80))
)
def test_any_content_is_loaded_or_told(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    directory = tmp_path_factory.mktemp("state")
    (directory / FILE).write_bytes(content)
    try:
        loaded = load_overrides(directory)
    except ValueError:
        return
    assert loaded == json.loads(content)


def test_a_directory_in_its_place_is_told(tmp_path: Path) -> None:
    (tmp_path / FILE).mkdir()
    with pytest.raises(ValueError, match="Is a directory"):
        load_overrides(tmp_path)
