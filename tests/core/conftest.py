"""A maker of random legal cases that shares nothing with ``nsa_verify.strategies``."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest

from nsa_verify import Case, CtxLens, Mode, Replay, Request, Setup, SlotKind
from nsa_verify.core.case import PAGE_SIZES, longest, shortest

CaseMaker = Callable[[Random], Case]


def _random_setup(rng: Random) -> Setup:
    draft_tokens = rng.randint(1, 8)
    width = rng.choice([1, 2, 15, 16, 17, 31, 33, 64, 65, 129, rng.randint(1, 140)])
    pool_width = width + draft_tokens + rng.choice([0, 1, 4, 9])
    return Setup(
        num_draft_tokens=draft_tokens,
        index_topk=rng.choice([1, 2, 7, 8, 16, 64, 2048]),
        page_size=rng.choice(PAGE_SIZES),
        table_width=width,
        pool_rows=rng.randint(1, 5),
        pool_width=pool_width,
        buckets=tuple(sorted(rng.sample(range(1, 7), rng.randint(1, 3)))),
        fill_seq_len=rng.randint(0, 1),
        num_sms=rng.randint(1, 9),
        ctx_lens=rng.choice(list(CtxLens)),
        schedule=rng.random() < 0.5,
    )


def _random_request(rng: Random, setup: Setup, mode: Mode) -> Request:
    accept_len = rng.choice([0, 1, setup.num_draft_tokens, rng.randint(0, setup.num_draft_tokens)])
    low, high = shortest(setup, mode, accept_len), longest(setup, mode)
    interesting = [low, low + 1, high, setup.table_width, setup.index_topk, setup.page_size + 1, rng.randint(low, high)]
    seq_len = min(max(rng.choice(interesting), low), high)
    return Request(seq_len, rng.randrange(setup.pool_rows), accept_len)


def _random_replay(rng: Random, setup: Setup) -> Replay:
    mode = rng.choice(list(Mode))
    count = rng.randint(0, setup.buckets[-1])
    return Replay(
        mode=mode,
        requests=tuple(_random_request(rng, setup, mode) for _ in range(count)),
        slots=rng.choice(list(SlotKind)),
        pool_seed=rng.choice([0, 1, 65_535]),
        padded_accept_len=rng.choice([1, setup.num_draft_tokens]),
        padded_pool_row=rng.randrange(setup.pool_rows),
    )


def random_case(rng: Random) -> Case:
    setup = _random_setup(rng)
    return Case(setup, tuple(_random_replay(rng, setup) for _ in range(rng.randint(1, 2))))


@pytest.fixture(name="random_case")
def _random_case() -> CaseMaker:
    return random_case
