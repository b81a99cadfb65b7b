"""The cluster's CA, its nodes' certificates, their renewal, and the files."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from sapin.cluster import certificates as c
from sapin.cluster.certificates import CertificateError
from sapin.cluster.membership import Folder, Membership, MembershipError, parse_member
from sapin.cluster.tokens import found

NOW = 1_800_000_000.0
YEAR = 365 * c.DAY


def random(size: int) -> bytes:
    return bytes(range(size))


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    folder = Folder(tmp_path / "state")
    found(folder, parse_member("lb-a", ["198.19.0.1"], 4510), NOW, random)
    return folder


def test_a_certificate_is_valid_for_a_year_from_a_day_before(folder: Folder) -> None:
    own = folder.credentials()
    for moment in (NOW - c.DAY, NOW, NOW + YEAR - 1):
        c.check(own.certificate, own.ca, moment)
    for moment in (NOW - c.DAY - 1, NOW + YEAR):
        with pytest.raises(CertificateError, match="is the clock right"):
            c.check(own.certificate, own.ca, moment)
    assert c.expires(own.ca) == NOW + 10 * YEAR
    assert c.common_name(own.certificate) == "lb-a"


def test_another_ca_did_not_issue_it(folder: Folder) -> None:
    other, _ = c.new_authority("0" * 32, NOW)
    with pytest.raises(CertificateError, match="not one of this cluster's CA"):
        c.check(folder.credentials().certificate, other, NOW)


def test_a_certificate_is_renewed_after_two_thirds_of_its_life(folder: Folder) -> None:
    before = folder.credentials()
    assert c.renew(folder, NOW + YEAR * 2 / 3 - 1) is None
    assert folder.credentials() == before
    renewed = c.renew(folder, NOW + YEAR * 2 / 3)
    assert renewed == folder.credentials()
    assert renewed is not None
    assert renewed.key != before.key
    assert c.expires(renewed.certificate) == int(NOW + YEAR * 5 / 3)
    c.check(renewed.certificate, before.ca, NOW + YEAR)


def test_it_is_renewed_at_once_if_it_is_asked_for(folder: Folder) -> None:
    assert c.renew(folder, NOW, force=True) == folder.credentials()


def test_the_end_of_the_ca_is_told(folder: Folder) -> None:
    with pytest.raises(CertificateError, match="CA has ended"):
        c.renew(folder, NOW + 10 * YEAR)


@pytest.mark.parametrize("written", [0, 1, 2, 3])
def test_a_crash_during_a_renewal_is_mended(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    write, left = Folder.write, [written]

    def crash(self: Folder, name: str, data: bytes) -> None:
        if not left[0]:
            raise MembershipError("the power is gone")
        left[0] -= 1
        write(self, name, data)

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "write", crash)
        try:
            c.renew(folder, NOW, force=True)
        except MembershipError:
            assert written < 3
    c.repair(folder)
    assert not c.repair(folder)
    own = folder.credentials()
    assert c.request("lb-a", own.key)
    assert not (folder.path / "next.key").exists()
    assert c._belongs(own.certificate, own.key)


def test_a_foreign_key_is_told_and_a_renewal_mends_it(folder: Folder) -> None:
    folder.write("node.key", c.new_key())
    with pytest.raises(CertificateError, match="rotate-certificates"):
        c.repair(folder)
    c.renew(folder, NOW, force=True)
    assert not c.repair(folder)


@pytest.mark.parametrize("asked", [b"", b"rubbish", b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n"])
def test_a_request_that_is_none(folder: Folder, asked: bytes) -> None:
    with pytest.raises(CertificateError, match="cannot be read"):
        c.sign(asked, "lb-b", folder.read("ca.crt"), folder.read("ca.key"), NOW)


def test_only_the_key_is_taken_from_a_request(folder: Folder) -> None:
    asked = c.request("lb-a", c.new_key())
    made = c.sign(asked, "lb-b", folder.read("ca.crt"), folder.read("ca.key"), NOW)
    assert c.common_name(made) == "lb-b"


def test_every_file_is_its_owners_alone(folder: Folder) -> None:
    files = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.path.iterdir()}
    assert files == dict.fromkeys(
        ("members.json", "ca.crt", "ca.key", "node.crt", "node.key", "secret"), 0o600
    )
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700


def test_credentials_show_nothing_of_themselves(folder: Folder) -> None:
    assert "PRIVATE" not in repr(folder.credentials())


def test_a_file_that_cannot_be_written_leaves_the_old_one(folder: Folder) -> None:
    (folder.path / ".secret.new").mkdir()
    with pytest.raises(MembershipError, match="cannot be written"):
        folder.write("secret", bytes(32))
    assert folder.secret() == random(32)


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[]", '{"cluster": "x", "node": "lb-a", "members": []}', "\x00" * 100, "{" * 10_000],
)
def test_a_damaged_list_of_members_is_told(folder: Folder, text: str) -> None:
    folder.write("members.json", text.encode())
    with pytest.raises(MembershipError, match="makes no sense"):
        folder.membership()


def test_a_list_that_is_no_pair_is_refused() -> None:
    a, b = (parse_member(name, ["198.19.0.1"], 4510) for name in ("lb-a", "LB-A"))
    for members, node in (((a, b), "lb-a"), ((a,), "lb-c"), ((a, a), "lb-a")):
        with pytest.raises(ValueError, match="at most one other"):
            Membership(cluster="0" * 32, node=node, members=members)


@pytest.mark.parametrize(
    ("name", "links", "port"),
    [
        ("", ["198.19.0.1"], 1),
        ("a b", ["198.19.0.1"], 1),
        ("-a", ["198.19.0.1"], 1),
        ("a" * 64, ["198.19.0.1"], 1),
        ("lb", [], 1),
        ("lb", ["nowhere"], 1),
        ("lb", ["198.19.0.1"] * 9, 1),
        ("lb", ["198.19.0.1"], 65_535),
    ],
)
def test_what_no_node_is(name: str, links: list[str], port: int) -> None:
    with pytest.raises(ValueError, match=r"name|links|port"):
        parse_member(name, links, port)
