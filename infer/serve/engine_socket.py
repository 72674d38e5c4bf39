"""The frontend's end of the socket: who connects, and what comes in. No torch here."""

import asyncio

from infer.launch import is_same_user
from infer.serve.link import HEADER, Attach, FromEngine, LinkError, decode_from_engine, frame_length

ATTACH_S = 10.0  # an engine says who it is within so long


async def read_message(reader: asyncio.StreamReader) -> FromEngine:
    """Raises LinkError, IncompleteReadError at the end, OSError."""
    header = await reader.readexactly(HEADER.size)
    return decode_from_engine(await reader.readexactly(frame_length(header)))


async def read_attach(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Attach | None:
    """Who has connected; None where it is another user, or says something else or nothing."""
    connection = writer.get_extra_info("socket")
    if connection is not None and not is_same_user(connection):
        return None
    try:
        async with asyncio.timeout(ATTACH_S):
            message = await read_message(reader)
    except (TimeoutError, asyncio.IncompleteReadError, OSError, LinkError):
        return None
    return message if isinstance(message, Attach) else None
