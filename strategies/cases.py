"""Whole cases."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st

from nsa_verify.core.case import Case, Mode
from nsa_verify.strategies.limits import Limits
from nsa_verify.strategies.replays import draw_replays
from nsa_verify.strategies.setups import draw_setup
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
    return _cases(tuple(modes), swarm or Swarm.everything(), limits or Limits.small())


@st.composite
def _cases(draw: st.DrawFn, modes: tuple[Mode, ...], swarm: Swarm, limits: Limits) -> Case:
    setup = draw_setup(draw, swarm, limits)
    return Case(setup, draw_replays(draw, setup, modes, swarm, limits))
