"""The process of `marnet-serve`: uvicorn, with time limits for slow clients, and a clean end."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import time
from types import FrameType

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from marnet_sdk.server.app import create_app
from marnet_sdk.server.gate import AccessLog
from marnet_sdk.server.listener import SharedListener
from marnet_sdk.server.service import ServerLimits, Service

_LAST_SECONDS = 5  # that connections have to close once all requests are answered
_TIMED_OUT = b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


def serve(service: Service, sockets: list[socket.socket], log: AccessLog) -> None:
    """Answer requests until SIGTERM or Ctrl-C, or until the bundle cannot be opened.

    SIGHUP opens the bundle again.

    Raises:
        MarnetError: why it cannot.
    """
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it tells of bad uploads
    server = make_server(service, log)
    if service.shared is not None:
        sockets = [SharedListener(fileno=listener.detach()) for listener in sockets]
    before = signal.signal(signal.SIGHUP, lambda *_: service.reloads.ask())
    try:
        server.run(sockets)
    finally:
        signal.signal(signal.SIGHUP, before)
    log.close()
    if service.failure is not None:
        raise service.failure


def make_server(service: Service, log: AccessLog) -> DrainingServer:
    """Build the server around its application."""
    limits = service.limits
    config = uvicorn.Config(
        create_app(service, log),
        http=_protocol(limits),
        loop="asyncio",  # not uvloop where some other package brought it: its transports differ
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="error",  # every request has its line in the access log
        access_log=False,
        server_header=False,
        workers=1,
        backlog=2048 if service.shared is None else 1,  # `SharedListener` says why
        timeout_keep_alive=limits.keep_alive_seconds,
        timeout_graceful_shutdown=_LAST_SECONDS,
    )
    server = DrainingServer(config, service)
    service.connections = lambda: len(server.server_state.connections)
    return server


class DrainingServer(uvicorn.Server):
    """A server that answers what it has accepted before it ends, and refuses the rest meanwhile."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service, self._deadline = service, 0.0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain; a second Ctrl-C ends the process at once."""
        if self._service.draining:
            if sig == signal.SIGINT:
                self.should_exit = True
                super().handle_exit(sig, frame)
            return
        self._service.draining = True
        self._deadline = time.monotonic() + self._service.limits.drain_seconds

    async def on_tick(self, counter: int) -> bool:
        """End once all is answered, or the time for that is over. Ten times a second."""
        service = self._service
        drained = service.in_flight == 0 or time.monotonic() > self._deadline
        if service.failure is not None or (service.draining and drained):
            self.should_exit = True
        return await super().on_tick(counter)


def _protocol(limits: ServerLimits) -> type[H11Protocol]:
    """HTTP/1.1 of uvicorn that waits for no client without end.

    uvicorn has a limit for connections that idle between requests, and none for the header of a
    request, for what is left of a body that was refused, or for a client that takes no answer.
    """

    class PatientProtocol(H11Protocol):
        _timer: asyncio.TimerHandle | None = None
        _stalled: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > 2 * limits.connections:
                transport.abort()  # up to there they are told; see `Gate`
            self._wait(limits.header_seconds)

        def connection_lost(self, exc: Exception | None) -> None:
            self._cancel()
            self.resume_writing()
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._stalled = self.loop.call_later(limits.body_seconds, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._stalled is not None:
                self._stalled.cancel()

        def handle_events(self) -> None:
            super().handle_events()
            if self.cycle is not None and not self.cycle.response_complete:
                self._cancel()  # the application waits for the body

        def send_400_response(self, msg: str) -> None:
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                super().send_400_response(msg)
            else:  # it was answered before its body went wrong
                self.transport.close()

        def on_response_complete(self) -> None:
            self._wait(limits.keep_alive_seconds + limits.header_seconds)
            super().on_response_complete()

        def _wait(self, seconds: float) -> None:
            self._cancel()
            self._timer = self.loop.call_later(seconds, self._give_up)

        def _cancel(self) -> None:
            if self._timer is not None:
                self._timer.cancel()

        def _give_up(self) -> None:
            if self.transport.is_closing():  # and what is left to be sent is not taken
                self.transport.abort()
                return
            received, _ = self.conn.trailing_data
            if received and self.conn.our_state is h11.IDLE:
                self.transport.write(_TIMED_OUT)
            self.transport.close()
            self._wait(limits.header_seconds)

    return PatientProtocol
