"""Messages between the server and its workers: a length of four bytes, then a pickled tuple.

The two ends are one program's own processes on a socket pair that nobody else can reach.
"""

import pickle
import socket
import struct
from asyncio import IncompleteReadError, StreamReader
from typing import Any

_LENGTH = struct.Struct("!I")


def pack(message: tuple) -> bytes:
    """Return a message as bytes for the wire."""
    body = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return _LENGTH.pack(len(body)) + body


async def read(reader: StreamReader) -> Any:
    """Return the next message; None where the other end has gone."""
    try:
        (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
        return pickle.loads(await reader.readexactly(length))
    except (IncompleteReadError, ConnectionError):
        return None


def receive(connection: socket.socket) -> Any:
    """Wait for the next message and return it; None where the other end has gone."""
    head = _exactly(connection, _LENGTH.size)
    body = None if head is None else _exactly(connection, _LENGTH.unpack(head)[0])
    return None if body is None else pickle.loads(body)


def _exactly(connection: socket.socket, n: int) -> bytes | None:
    pieces = []
    while n:
        try:
            piece = connection.recv(min(n, 1 << 20))
        except OSError:
            return None
        if not piece:
            return None
        pieces.append(piece)
        n -= len(piece)
    return b"".join(pieces)
