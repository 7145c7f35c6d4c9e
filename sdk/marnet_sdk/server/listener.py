"""The socket that a server listens on, alone or together with other processes."""

from __future__ import annotations

import socket

from marnet_sdk.errors import InvalidInput

_BACKLOG = 1024  # connections that wait to be accepted


def listen(host: str, port: int) -> socket.socket:
    """Open the socket of a server; port 0 takes a free one.

    Raises:
        InvalidInput: the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except (OSError, OverflowError) as error:
        raise InvalidInput(
            f"cannot listen on {host} port {port}: {error}; choose others with --host and --port"
        ) from error
    # Connections inherit it. Without it an answer, which is two writes, waits 40 ms for the
    # client's delayed acknowledgement of the first; asyncio sets it for sockets of its own only.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


class SharedListener(socket.socket):
    """A listening socket that several processes accept from.

    asyncio takes as many connections in a row as its backlog has. That has to be 1 here, or one
    process takes all that come at once; the kernel's queue stays as long as `listen` made it.
    """

    def listen(self, backlog: int = 0, /) -> None:
        """Listen on, with the queue that the parent's `listen` has made."""
