"""``--report ndjson``: a line of JSON per event as it happens, so that a run that is killed leaves what it saw."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final, TextIO

import msgspec

from nsa_verify.engine.events import Event, RoundFinished
from nsa_verify.shell.reports.plain import plain

LEFT_OUT: Final = ("pictures", "observed")
"""What events have for other reports' sake."""
ROUNDS: Final = 10_000
"""So many rounds have a line each; of later ones, of which a night has millions, one a second has."""


class Ndjson:
    """Each line has the ``type`` of the event, as ``nsa_verify.engine.events`` calls it, and a UTC ``time``.

    The last is of type ``End``, with the exit code and the sentence that says what stopped the run; a run that was
    killed has none.
    """

    def __init__(self, file: TextIO, command: str, environment: Mapping[str, str]) -> None:
        self._file = file
        self._rounds, self._round_s = 0, 0.0
        self._write("Begin", {"command": command, "environment": environment})

    def handle(self, event: Event) -> None:
        """Write its line."""
        if isinstance(event, RoundFinished) and self._is_crowded():
            return
        self._write(type(event).__name__, plain(event, LEFT_OUT))

    def close(self, code: int, problem: str) -> None:
        """Write the last line."""
        self._write("End", {"exit_code": int(code), "error": problem})

    def _is_crowded(self) -> bool:
        self._rounds += 1
        now = time.monotonic()
        if self._rounds > ROUNDS and now - self._round_s < 1.0:
            return True
        self._round_s = now
        return False

    def _write(self, kind: str, fields: dict[str, Any]) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._file.write(msgspec.json.encode({"type": kind, "time": now} | fields).decode() + "\n")
        self._file.flush()
