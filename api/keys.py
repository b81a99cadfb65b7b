"""Keys of pins as text, and back. Plugins of others may have kinds of their own: those are shown in hexadecimal."""

from __future__ import annotations

from ipaddress import ip_address

from sapin.core.contracts import Key

_ADDRESS = {"src", "client"}


def show_key(key: Key) -> str:
    """A key for people: ``src:192.0.2.1``, ``spi:0123456789abcdef``, ``tuple:192.0.2.1/1024/4500``."""
    kind, value = _split(key)
    if kind in _ADDRESS and len(value) in (4, 16):
        return f"{kind}:{ip_address(value)}"
    if kind == "tuple" and len(value) in (8, 20):
        port, service = int.from_bytes(value[-4:-2]), int.from_bytes(value[-2:])
        return f"{kind}:{ip_address(value[:-4])}/{port}/{service}"
    return f"{kind}:{value.hex()}"


def parse_key(text: str) -> Key:
    """The key that :func:`show_key` shows so.

    Raises:
        ValueError: the text shows no key.
    """
    kind, colon, value = text.partition(":")
    try:
        if not colon:
            raise ValueError
        if kind in _ADDRESS and ("." in value or ":" in value):
            raw = ip_address(value).packed
        elif kind == "tuple" and "/" in value:
            address, port, service = value.split("/")
            raw = ip_address(address).packed + int(port).to_bytes(2) + int(service).to_bytes(2)
        else:
            raw = bytes.fromhex(value)
        return kind.encode() + b":" + raw
    except (ValueError, OverflowError):
        raise ValueError(f"{text!r} is not a key, as in src:192.0.2.1 or spi:0123456789abcdef") from None


def client_of(key: Key) -> str | None:
    """The client's address in a key that has one."""
    kind, value = _split(key)
    if kind in _ADDRESS and len(value) in (4, 16):
        return str(ip_address(value))
    if kind == "tuple" and len(value) in (8, 20):
        return str(ip_address(value[:-4]))
    return None


def _split(key: Key) -> tuple[str, bytes]:
    kind, _, value = key.partition(b":")
    return kind.decode("ascii", "backslashreplace"), value
