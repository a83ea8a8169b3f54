"""A searcher on a node of a Ray cluster: the class that ``nsa_verify.engine.cluster`` has Ray start there.

It keeps one worker, as every searcher does. This module knows nothing of Ray, and Ray imports it on the node.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from nsa_verify import __version__
from nsa_verify.core.registry import ImplementationError
from nsa_verify.engine import searcher

LOOK_EVERY_S: Final = 1.0


class Up(NamedTuple):
    """What a searcher says of itself once its process is there."""

    host: str
    pid: int
    version: str


def _follow(node: int) -> None:
    """A node that is killed leaves no searchers behind; Ray takes a process for alive that nobody has buried yet."""
    while os.getppid() == node:
        time.sleep(LOOK_EVERY_S)
    os._exit(1)


class Searcher:
    """Does what it is handed, one piece after the other; ``stop`` is heard meanwhile.

    It works in the folder ``cwd`` if its node has it, and imports from what of ``path`` its node has behind its own.
    """

    def __init__(self, cwd: str, path: Sequence[str]) -> None:
        self._where = f" (on {socket.gethostname()})"
        if os.path.isdir(cwd):
            os.chdir(cwd)
        else:
            self._where = f" (on {socket.gethostname()}, which has no folder {cwd}: nodes need the same files there)"
        # Ray puts the driver's folder in front, where it hides what is installed.
        own = [it for it in sys.path if it != cwd or it in path]
        sys.path[:] = [*own, *(it for it in path if it not in own)]
        # Workers are forked; each of them would run Ray's own program first.
        vars(sys.modules["__main__"]).pop("__file__", None)
        threading.Thread(target=_follow, args=(os.getppid(),), daemon=True).start()

    def up(self) -> Up:
        """Where this is, and what is installed here."""
        return Up(socket.gethostname(), os.getpid(), __version__)

    def do(
        self, work: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[Any, BaseException | None]:
        """What ``work`` gave, or what it raised."""
        try:
            return work(*args, **kwargs), None
        except ImplementationError as error:
            return None, ImplementationError(f"{error}{self._where}")
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - it reaches whoever asked for the work
            error.add_note(f"on {socket.gethostname()}:\n{traceback.format_exc()}")
            return None, error

    def stop(self, stopping: bool = True) -> None:
        """Ask what runs here to end with what it has; False takes it back."""
        searcher.stop(stopping)
