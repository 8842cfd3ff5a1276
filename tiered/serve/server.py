"""The server process: listens, and when asked to end, finishes what it has begun."""

from __future__ import annotations

import socket
import threading
from typing import Any

import uvicorn
from starlette.applications import Starlette

from tiered.serve.service import Service


class Server:
    """`run` serves until SIGTERM or SIGINT, or `stop`; then it accepts nothing more, lets requests
    end for `drain_seconds`, and returns. A second signal ends it at once."""

    def __init__(
        self,
        app: Starlette,
        host: str,
        port: int,
        *,
        service: Service,
        drain_seconds: int = 30,
        log_level: str = "warning",
    ) -> None:
        self.service = service
        self.ready = threading.Event()
        self.host = host
        self._socket = listen(host, port)
        self.port: int = self._socket.getsockname()[1]
        config = uvicorn.Config(
            app,
            log_level=log_level,
            lifespan="off",
            timeout_graceful_shutdown=drain_seconds,
            timeout_keep_alive=75,
            server_header=False,
            h11_max_incomplete_event_size=64 << 10,
        )
        self._server = _Uvicorn(config, self)

    def run(self) -> None:
        try:
            self._server.run(sockets=[self._socket])
        finally:
            self._socket.close()

    def stop(self) -> None:
        """Ask it to end; from any thread."""
        self.service.draining = True
        self._server.should_exit = True


class _Uvicorn(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, owner: Server) -> None:
        super().__init__(config)
        self._owner = owner

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._owner.ready.set()

    def handle_exit(self, sig: int, frame: Any) -> None:
        """In place of uvicorn's, which raises the signal again at the end: we have to tidy up."""
        self._owner.service.draining = True  # ends the live pictures, which have no end
        self.force_exit = self.should_exit
        self.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; OSError says what to do if the port is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(1024)
    except OSError as error:
        listening.close()
        raise OSError(
            f"cannot listen on {host} port {port}: {error.strerror}; take another --port"
        ) from None
    return listening
