"""Whether a Ray cluster answers, and what keeps Ray quiet meanwhile: this module does without Ray."""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Final

from nsa_verify.engine.process import EngineError

ANSWER_S: Final = 5.0
LAST: Final = 2000
HTTP2_SETTINGS: Final = b"\x04"
HTTP2_HELLO: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0" + HTTP2_SETTINGS + b"\0\0\0\0\0"
"""What a client of gRPC says first, and the kind of the frame that it is answered with."""
QUESTION: Final = {
    ":method": "POST",
    ":scheme": "http",
    ":path": "/ray.rpc.NodeInfoGcsService/CheckAlive",
    ":authority": "ray",
    "content-type": "application/grpc",
    "te": "trailers",
}
NO_TOKEN: Final = b"InvalidAuthToken"


def answers(host: str, port: int) -> bool:
    """Whether a process listens there."""
    try:
        socket.create_connection((host, port), ANSWER_S / 5).close()
    except OSError:
        return False
    return True


def _frame(kind: int, flags: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3) + bytes([kind, flags]) + (1).to_bytes(4) + payload


def _question() -> bytes:
    pairs = (it.encode() for pair in QUESTION.items() for it in pair)
    lengths = [bytes([len(it)]) + it for it in pairs]
    headers = b"".join(b"\0" + name + value for name, value in zip(lengths[::2], lengths[1::2], strict=True))
    return _frame(1, 4, headers) + _frame(0, 1, bytes(5))


def ask_for_answer(address: str, named: str) -> bool:
    """Whether the cluster there wants a token. Raises ``EngineError`` if no cluster answers.

    Ray would try for long, and tell of it in many lines. ``named`` is the option or the variable that gave ``address``.
    """
    if "://" in address:
        raise EngineError(
            f"{named}: a Ray client cannot be used for this; run it on a node of the cluster, with the HOST:PORT that"
            " `ray start --head` printed"
        )
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), ANSWER_S) as there:
            there.sendall(HTTP2_HELLO + _question())
            answer = there.recv(4096)
            with suppress(TimeoutError):
                while answer[3:4] == HTTP2_SETTINGS and b"grpc-status" not in answer and (more := there.recv(4096)):
                    answer += more
    except (ValueError, OverflowError):
        raise EngineError(f"{named}: must be HOST:PORT, as in 10.0.0.1:6379, or auto, or local") from None
    except OSError as error:
        raise EngineError(
            f"{named}: nothing answers there ({error.strerror or error}); give the address that `ray start --head`"
            " printed, or start a cluster with it"
        ) from error
    if answer[3:4] != HTTP2_SETTINGS and os.environ.get("RAY_USE_TLS", "0") == "0":
        raise EngineError(
            f"{named}: what answers there is no Ray cluster; give the address that `ray start --head` printed"
        )
    return NO_TOKEN in answer


def line(error: BaseException) -> str:
    """What Ray says in many lines, as part of a sentence."""
    text = " ".join(str(error).split()).rstrip(".;: ")
    return text if len(text) <= 400 else f"{text[:397]}..."


def refusal(address: str, named: str, error: Exception, said: str) -> EngineError:
    """Why the cluster that ``named`` names cannot be used: Ray raised ``error``, and wrote ``said``."""
    if "token" in f"{error} {said}".lower():
        return EngineError(
            f"{named}: the Ray cluster there asks for a token that it is not given from here; have the"
            " ~/.ray/auth_token of its head here (or in RAY_AUTH_TOKEN), and RAY_AUTH_MODE=token, on every node"
        )
    if not isinstance(error, ConnectionError):
        remedy = "this machine must be a node of the cluster, with its versions of Ray and Python"
        return EngineError(f"{named}: cannot connect to the Ray cluster: {line(error)}; {remedy}")
    sentence = f"{named}: no Ray cluster runs on this machine"
    if address != "auto":
        sentence = f"{named}: the Ray cluster there cannot be used from here: {line(error)}"
    return EngineError(
        f"{sentence}; start one with `ray start --head`, or join one with `ray start --address=HOST:6379`"
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Ray warns of what is to change in it, says what it counts, and takes SIGTERM for itself."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    is_main = threading.current_thread() is threading.main_thread()
    handlers = {it: signal.getsignal(it) for it in (signal.SIGTERM, signal.SIGINT) if is_main}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextmanager
def apart() -> Iterator[Callable[[], str]]:
    """What is written to standard error, not by Python alone, is kept from it, and the end of it can be had."""
    sys.stderr.flush()
    before = os.dup(2)
    try:
        with tempfile.TemporaryFile() as file:
            os.dup2(file.fileno(), 2)
            yield lambda: os.pread(file.fileno(), LAST, max(0, os.fstat(2).st_size - LAST)).decode(errors="replace")
            sys.stderr.flush()
    finally:
        os.dup2(before, 2)
        os.close(before)
