"""The shared part of a configuration file: taken apart and put together without losing a comment or a meaning."""

from __future__ import annotations

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sapin.cluster.revision import Agreed, SplitError, Verdict, digest, join, judge, next_revision, split
from sapin.cluster.wire import Revision

A = """\
# The first node.

# Who it is.
[node]
name = "lb-a"          # as in DNS
state_dir = "/var/lib/sapin"
# max_pins = 1

# The pair.
[cluster]
links = ["198.19.0.1"]

[[cluster.virtual_addresses]]
address = "198.18.0.1/24"
device = "eth0"

# The VPN.
[[virtual_services]]
name = "ike"   # [node]
text = \"\"\"
[cluster]
\"\"\"
list = [
  [1],
]

[[virtual_services.real_servers]]
name = "one"
"""
B = """\
[cluster]
links = ["198.19.0.2"]

[[virtual_services]]
name = "old"

[node]
name = "lb-b"
"""


def test_a_file_is_its_node_s_part_and_the_shared_one() -> None:
    own, shared = split(A)
    assert set(tomllib.loads(own)) == {"node", "cluster"}
    assert set(tomllib.loads(shared)) == {"virtual_services"}
    assert shared.startswith("# The VPN.\n[[virtual_services]]")
    assert "# The first node." in own
    assert "# The pair.\n[cluster]" in own
    assert "# max_pins = 1" in own


def test_the_peer_s_shared_part_replaces_this_node_s_and_nothing_else() -> None:
    shared = split(A).shared
    joined = join(B, shared)
    found = tomllib.loads(joined)
    assert found["node"] == {"name": "lb-b"}
    assert found["cluster"] == {"links": ["198.19.0.2"]}
    assert found["virtual_services"] == tomllib.loads(A)["virtual_services"]
    assert "# The VPN." in joined
    assert split(joined).shared == shared
    assert join(joined, shared) == joined


def test_keys_before_the_first_table_are_shared_and_stay_in_front() -> None:
    text = 'virtual_services = []\n[node]\nname = "x"\n'
    assert split(text).shared == "virtual_services = []\n"
    assert tomllib.loads(join(B, split(text).shared))["virtual_services"] == []


def test_a_comment_before_everything_stays_with_its_file() -> None:
    assert join(A, split(B).shared).startswith("# The first node.\n")


@pytest.mark.parametrize(
    "text", ['node.name = "x"\n', 'node = {name = "x"}\n[[virtual_services]]\nname="y"\n']
)
def test_a_node_that_is_no_table_is_refused_with_what_to_do(text: str) -> None:
    with pytest.raises(SplitError, match=r"write \[node\] and"):
        split(text)


def test_what_is_no_toml_is_refused() -> None:
    with pytest.raises(SplitError, match="no TOML"):
        split("[")
    with pytest.raises(SplitError, match="no TOML"):
        join(A, "[")


def test_a_shared_part_with_a_node_in_it_is_refused() -> None:
    with pytest.raises(SplitError, match="belong to one node"):
        join(A, B)


def test_line_ends_of_other_systems_change_nothing() -> None:
    assert split(A.replace("\n", "\r\n")).shared == split(A).shared


def test_quoted_headers_are_headers() -> None:
    assert split('["node"]\nname = "x"\n[ \'other\' ]\na = 1\n').shared == "[ 'other' ]\na = 1\n"


_PIECES = st.sampled_from(
    [
        "# a comment\n",
        "\n",
        '[node]\nname = "a"\n',
        "[cluster]\nlinks = [\n'[node]', # ]\n]\n",
        "[[cluster.virtual_addresses]]\naddress = 'x'\n",
        "[[virtual_services]]\nname = '''\n[node]\n'''\n",
        "[[virtual_services.real_servers]]\nweight = 1\n",
        'top = "[node]"\n',
        "other = { a = [ 1, 2 ] }\n",
    ]
)


@given(st.lists(_PIECES, max_size=8).map("".join), st.lists(_PIECES, max_size=8).map("".join))
def test_whatever_can_be_taken_apart_fits_into_any_other_file(one: str, other: str) -> None:
    try:
        tomllib.loads(one), tomllib.loads(other)
    except tomllib.TOMLDecodeError:
        return
    if not {"node", "cluster"} & tomllib.loads(other).keys():
        other += '[node]\nname = "b"\n'  # as every node of a pair has
    own, shared = split(one)
    assert sorted((*_comments(own), *_comments(shared))) == sorted(_comments(one))
    joined = join(other, shared)
    assert split(joined).shared == shared
    assert tomllib.loads(split(joined).own) == tomllib.loads(split(other).own)


def _comments(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("# a comment")]


# whose counts


def _revision(epoch: int, number: int, text: str) -> Revision:
    return Revision(epoch, number, digest(text), text)


def test_a_new_text_is_a_new_revision_and_the_same_text_is_none() -> None:
    first = next_revision(Agreed(), 3, "a = 1\n")
    assert (first.epoch, first.number) == (3, 1)
    agreed = Agreed(first.epoch, first.number, first.digest)
    assert next_revision(agreed, 4, "a = 1\n") == first
    assert next_revision(agreed, 4, "a = 2\n")[:2] == (4, 2)


def test_the_active_node_s_revision_is_taken() -> None:
    agreed = Agreed(1, 1, digest("a = 1\n"))
    assert judge(agreed, "a = 1\n", _revision(1, 2, "a = 2\n")) is Verdict.TAKE
    assert judge(agreed, "a = 1\n", _revision(1, 1, "a = 1\n")) is Verdict.SAME
    assert judge(Agreed(), "", _revision(1, 1, "a = 2\n")) is Verdict.TAKE


def test_a_file_that_was_edited_meanwhile_is_a_conflict() -> None:
    agreed = Agreed(1, 1, digest("a = 1\n"))
    assert judge(agreed, "a = 3\n", _revision(1, 2, "a = 2\n")) is Verdict.CONFLICT
    assert judge(agreed, "a = 3\n", _revision(1, 1, "a = 1\n")) is Verdict.CONFLICT
    assert judge(agreed, "a = 2\n", _revision(1, 2, "a = 2\n")) is Verdict.SAME
    assert judge(Agreed(), "a = 1\n", _revision(1, 1, "a = 2\n")) is Verdict.CONFLICT


def test_an_older_revision_is_not_taken() -> None:
    agreed = Agreed(5, 7, digest("a = 1\n"))
    assert judge(agreed, "a = 1\n", _revision(4, 9, "a = 2\n")) is Verdict.KEEP
    assert judge(agreed, "a = 1\n", _revision(5, 6, "a = 2\n")) is Verdict.KEEP
