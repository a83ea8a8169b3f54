"""Why a session could not serve a replay. Any other exception out of a session is a fault of the checker."""

from __future__ import annotations

from nsa_verify.core.case import Mode
from nsa_verify.core.findings import Code

GraphKey = tuple[Mode, int]
"""The mode and the bucket that a graph serves."""


def words_of(error: BaseException) -> str:
    """The message of ``error``, as text that can be written down; an exception may refuse to give any."""
    try:
        said = str(error)
    except Exception as refusal:  # noqa: BLE001 - it is the implementation's own code
        said = f"its message cannot be had ({type(refusal).__name__})"
    return said.encode("utf-8", "backslashreplace").decode()


class ImplementationRaised(Exception):
    """The implementation raised ``error``; ``while_capturing`` names the graph that was being made, if one was.

    ``line`` is the line of the implementation where ``error`` itself cannot tell it: a graph was replayed.
    """

    def __init__(self, error: BaseException, while_capturing: GraphKey | None = None, line: str | None = None) -> None:
        super().__init__(words_of(error))
        self.error, self.while_capturing, self.line = error, while_capturing, line


class CaptureRefused(RuntimeError):
    """What the implementation does cannot be captured, or the graph can no longer be replayed.

    ``code`` is one of NV301 to NV305. Raised inside the implementation, where it is an error like CUDA's own.
    """

    def __init__(self, code: Code, sentence: str, while_capturing: GraphKey | None = None) -> None:
        super().__init__(sentence)
        self.code, self.sentence, self.while_capturing = code, sentence, while_capturing


Stop = ImplementationRaised | CaptureRefused
