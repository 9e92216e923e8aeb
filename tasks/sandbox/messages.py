"""Messages through pipes: a length, then JSON; and Python values as JSON without losing tuples, sets and keys.

What comes from a program is data and never more: reading it calls nothing that the program chose.
"""

import json
import os
import struct
from typing import Any

MAX_BYTES = 64 * 2**20


class BadMessage(Exception):
    """Error for bytes that are not a message."""


class Opaque:
    """Stands for a value that is not plain data: equal to nothing but itself."""

    def __init__(self, text: str):
        self.text = text

    def __repr__(self) -> str:
        return self.text


def framed(message: Any) -> bytes:
    """Encode a message as JSON behind its length, 4 bytes little-endian."""
    data = json.dumps(message).encode()
    return struct.pack("<I", len(data)) + data


def send(fd: int, message: Any) -> None:
    """Write a whole message to a file descriptor."""
    data = framed(message)
    while data:
        data = data[os.write(fd, data) :]


def receive(fd: int) -> Any:
    """The next message; EOFError if the other side is gone, BadMessage if it sends something else."""
    (length,) = struct.unpack("<I", _exactly(fd, 4))
    if length > MAX_BYTES:
        raise BadMessage(f"a message of {length:,} bytes")
    try:
        return json.loads(_exactly(fd, length))
    except (ValueError, RecursionError):
        raise BadMessage("not JSON") from None


def _exactly(fd: int, n: int) -> bytes:
    parts = []
    while n:
        part = os.read(fd, min(n, 2**20))
        if not part:
            raise EOFError("the other side is gone")
        parts.append(part)
        n -= len(part)
    return b"".join(parts)


def pack(value: Any) -> Any:
    """Numbers, text, bytes, None and containers of these as JSON: scalars as they are, the rest as [kind, content]."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, complex):
        return ["complex", [value.real, value.imag]]
    if isinstance(value, bytes | bytearray):
        return ["bytes", bytes(value).hex()]
    if isinstance(value, dict):
        return ["dict", [[pack(k), pack(v)] for k, v in value.items()]]
    if isinstance(value, range):
        return ["range", [value.start, value.stop, value.step]]
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return [kind.__name__, [pack(one) for one in value]]
    return ["opaque", repr(value)[:200]]


def unpack(data: Any) -> Any:
    """The value that `pack` made `data` of; raises BadMessage for anything else."""
    if not isinstance(data, list):
        if isinstance(data, dict):
            raise BadMessage("an object where a value was expected")
        return data
    try:
        kind, content = data
        if kind == "complex":
            return complex(*content)
        if kind == "bytes":
            return bytes.fromhex(content)
        if kind == "dict":
            return {unpack(k): unpack(v) for k, v in content}
        if kind == "opaque":
            return Opaque(str(content))
        if kind == "range":
            return range(*content)
        makers = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
        return makers[kind](unpack(one) for one in content)
    except (TypeError, ValueError, KeyError, RecursionError):
        raise BadMessage("not a packed value") from None
