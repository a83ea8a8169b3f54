"""Whole cases."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st
from hypothesis.internal.conjecture.data import ConjectureData

from nsa_verify.core.case import Case, Mode, Setup
from nsa_verify.strategies.choice import composed
from nsa_verify.strategies.limits import Limits
from nsa_verify.strategies.replays import draw_replays
from nsa_verify.strategies.setups import setups
from nsa_verify.strategies.swarm import Swarm


def cases(
    modes: Sequence[Mode] = tuple(Mode), swarm: Swarm | None = None, limits: Limits | None = None
) -> st.SearchStrategy[Case]:
    """Cases in ``modes``, with the features of ``swarm`` (default: everything), no larger than ``limits`` (small).

    Every draw is a legal case; none is thrown away. The simplest is one request of length 1 in one replay of the first
    mode. Raises ``ValueError`` for no modes.
    """
    if not modes:
        raise ValueError("modes = (): name at least one mode")
    swarm, limits = swarm or Swarm.everything(), limits or Limits.small()
    return _cases(setups(swarm, limits), tuple(modes), swarm, limits)


@composed
def _cases(
    data: ConjectureData, setups_: st.SearchStrategy[Setup], modes: tuple[Mode, ...], swarm: Swarm, limits: Limits
) -> Case:
    setup = data.draw(setups_)
    return Case(setup, draw_replays(data, setup, modes, swarm, limits))
