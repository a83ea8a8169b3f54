"""A server of Redis that tests start, stop and start again."""

from __future__ import annotations

import threading
from typing import Any

import pytest

fakeredis = pytest.importorskip("fakeredis", reason="needs fakeredis: pip install 'nsa-verify[dev]'")


class Server:
    """It listens at ``url``, and has what was saved in it whenever it is started again."""

    def __init__(self) -> None:
        self._port = 0
        self._data: Any = None
        self._server: Any = None
        self._thread = threading.Thread()
        self.start()

    @property
    def url(self) -> str:
        """For ``--database``."""
        return f"redis://127.0.0.1:{self._port}/0"

    def require(self, password: str) -> None:
        """Refuse whoever does not say ``password``."""
        self._data.config[b"requirepass"] = password.encode()

    def start(self) -> None:
        """Listen, at the same port as before."""
        self._server = fakeredis.TcpFakeServer(("127.0.0.1", self._port))
        self._port = self._server.server_address[1]
        if self._data is not None:
            self._server.fake_server = self._data
        self._data = self._server.fake_server
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def stop(self) -> None:
        """End every connection, and listen no more."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
            self._server = None
