"""The frontend's end of the socket: who connects, and what comes in. No torch here."""

import asyncio
import os
import socket
import struct

from infer.serve.link import HEADER, Attach, FromEngine, LinkError, decode_from_engine, frame_length

ATTACH_S = 10.0  # an engine says who it is within so long


async def read_message(reader: asyncio.StreamReader) -> FromEngine:
    """Raises LinkError, IncompleteReadError at the end, OSError."""
    header = await reader.readexactly(HEADER.size)
    return decode_from_engine(await reader.readexactly(frame_length(header)))


async def read_attach(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Attach | None:
    """Who has connected; None where it is another user, or says something else or nothing."""
    if not _is_same_user(writer):
        return None
    try:
        async with asyncio.timeout(ATTACH_S):
            message = await read_message(reader)
    except (TimeoutError, asyncio.IncompleteReadError, OSError, LinkError):
        return None
    return message if isinstance(message, Attach) else None


def _is_same_user(writer: asyncio.StreamWriter) -> bool:
    """The socket's directory keeps other users out already; this holds where it has been opened up."""
    connection = writer.get_extra_info("socket")
    if connection is None or not hasattr(socket, "SO_PEERCRED"):
        return True
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, uid, _ = struct.unpack("3i", credentials)
    return uid == os.getuid()
