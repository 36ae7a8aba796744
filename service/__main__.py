"""`python -m service`: serve the API until SIGTERM or SIGINT.

Prints one line to standard output, `nanomoe listening on http://HOST:PORT`, once connections are accepted; logs go to
standard error.
"""

import argparse
import asyncio
import gc
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

from nanomoe.logs import configure_logging
from service.app import create_app
from service.errors import ServiceError, StartRefused
from service.settings import Settings, read_settings

SHUTDOWN_SECONDS = 4
"""Seconds that running requests get to finish at shutdown; event streams end at once."""


KEEP_ALIVE_SECONDS = 75
"""Seconds that an idle connection stays open: longer than clients keep theirs (httpx 5 s), so that the server never
closes one on which a request is being sent."""


class Server(uvicorn.Server):
    """uvicorn's server, which announces its address, and ends long-polling requests at shutdown."""

    def __init__(self, app: FastAPI, settings: Settings, announce: Callable[[str], None]) -> None:
        """`announce` is called with the address once connections are accepted."""
        config = uvicorn.Config(
            app,
            host=settings.host,
            port=settings.port,
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=SHUTDOWN_SECONDS,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
        )
        super().__init__(config)
        self._app = app
        self._announce = announce

    async def serve_until_stopped(self) -> None:
        """Open the app, serve it, close it. The app is opened here, so that its exceptions are raised and not only
        logged."""
        async with self._app.router.lifespan_context(self._app):
            await self.serve()

    def stop(self) -> None:
        """Shut down: first the streams and long polls, then the server. A second call does not wait for requests."""
        self.force_exit = self.should_exit
        self.should_exit = True
        if self.started:
            self._app.state.context.wakeups.close()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept connections, and announce the address."""
        await super().startup(sockets)
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        self._announce(f"http://{f'[{host}]' if ':' in host else host}:{port}")

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to `serve`: uvicorn would raise them again at the end, and the process would die of the
        signal."""
        yield


async def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT."""
    server = Server(create_app(settings), settings, lambda url: print(f"nanomoe listening on {url}", flush=True))
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, server.stop)
    # What is there now stays: a search of it for what is unreachable would hold up requests by 0.1 s.
    gc.collect()
    gc.freeze()
    await server.serve_until_stopped()


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0 after a clean stop, 2 when the service refuses to start."""
    parser = argparse.ArgumentParser(prog="python -m service", description="Serve the nanomoe API.")
    parser.add_argument("--host", help="address to listen on (NANOMOE_HOST)")
    parser.add_argument("--port", type=int, help="TCP port; 0 takes a free one (NANOMOE_PORT)")
    given = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    try:
        settings = read_settings(**given)
        configure_logging(settings.log_format)
        asyncio.run(serve(settings))
    except (StartRefused, ServiceError) as error:
        print(f"nanomoe does not start: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
