"""A case moved to another mode: one bug mostly shows in several modes, and two bugs of one place in a case of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from msgspec.structs import replace

from nsa_verify.core.case import Case, Mode, Replay, Request, Setup, longest, shortest


def transferred(case: Case, was: Mode, mode: Mode) -> Iterator[Case]:
    """``case`` with its replays of ``was`` in ``mode`` instead, and as many rows for each request as ``mode`` allows.

    First with the same KV lengths, then, if that is another case, with the same ``seq_len``. Lengths that ``mode`` does
    not allow become the nearest that it does; a case that it does not allow at all is left out.
    """
    setup = case.setup
    added = _added(setup, was) - _added(setup, mode)
    tried: list[Case] = []
    for more in (added, 0):
        try:
            moved = replace(case, replays=tuple(_moved(it, setup, was, mode, more) for it in case.replays))
        except ValueError:  # sums of lengths may exceed int32 in the other mode
            continue
        if moved not in tried:
            tried.append(moved)
            yield moved


def _added(setup: Setup, mode: Mode) -> int:
    """What the KV length has and ``seq_len`` has not."""
    return setup.num_draft_tokens if mode is Mode.TARGET_VERIFY else 0


def _moved(replay: Replay, setup: Setup, was: Mode, mode: Mode, more: int) -> Replay:
    if replay.mode is not was:
        return replay
    rows = _rows(setup, was)
    requests = tuple(_moved_request(it, setup, mode, rows(it.accept_len), more) for it in replay.requests)
    return replace(replay, mode=mode, requests=requests, padded_accept_len=rows(replay.padded_accept_len))


def _moved_request(request: Request, setup: Setup, mode: Mode, accept_len: int, more: int) -> Request:
    least, most = shortest(setup, mode, accept_len), longest(setup, mode)
    return replace(request, seq_len=min(max(request.seq_len + more, least), most), accept_len=accept_len)


def _rows(setup: Setup, was: Mode) -> Callable[[int], int]:
    """The rows of a request that has this ``accept_len`` in ``was``."""
    if was is Mode.DRAFT_EXTEND:
        return lambda accept_len: accept_len
    return lambda _: 1 if was is Mode.DECODE else setup.num_draft_tokens
