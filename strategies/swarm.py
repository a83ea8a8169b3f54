"""Which features of a case a round may use: whole groups are switched off, so that the others meet undisturbed."""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import StrEnum
from typing import Final


class Feature(StrEnum):
    """A group of choices that is on or off as a whole. Off means: the plain value, without a draw."""

    PADDING = "padding"
    """Fewer requests than the bucket holds (b0 < B)."""
    EMPTY_BATCHES = "empty batches"
    """No request at all (b0 = 0); needs ``PADDING`` as well, since every row is then a padded one."""
    ZERO_ACCEPTS = "zero accepts"
    UNIFORM_ACCEPTS = "uniform accepts"
    """Accept lengths that are all equal, or equal but for one; off, each is drawn on its own."""
    BOUNDARY_LENGTHS = "boundary lengths"
    """At least half of the lengths at a boundary; off, they are there by chance only."""
    CONTEXT_WALL = "context wall"
    """KV lengths beyond the page table's width; off, every KV length fits it."""
    LENGTH_SWINGS = "length swings"
    """Batches in which every request is as short, or as long, as may be."""
    LONG_CONTEXT = "long context"
    """Lengths and sums that do not fit 15 or 16 bits; rare, and needs ``CONTEXT_WALL``, since the table is narrow."""
    SEVERAL_REPLAYS = "several replays"
    LONG_SEQUENCES = "long sequences"
    """Up to eight replays, rarely; needs ``SEVERAL_REPLAYS``."""
    MODE_SWITCHES = "mode switches"
    MODE_CYCLES = "mode cycles"
    """Modes in the order in which engines go through them: verify, draft-extend, decode; needs ``MODE_SWITCHES``."""
    BUCKET_SWITCHES = "bucket switches"
    """More than one bucket, and replays in different ones."""
    REPETITION = "repetition"
    """A replay of the requests of the one before, none of them longer."""
    CONTINUATION = "continuation"
    """A replay of all the requests of the one before, grown by what was accepted."""
    DEPARTURES = "departures"
    """Some of the requests before are gone, the others go on in order."""
    ARRIVALS = "arrivals"
    """The requests before go on, with others behind them; with ``DEPARTURES``, on the pool rows of those that left."""
    SEVERAL_STEPS = "several steps"
    SEQ_LENS_LAYOUT = "seq_lens layout"
    """``seq_lens`` with an element stride or a storage offset."""
    INTEGER_WIDTHS = "integer widths"
    """int64 ``seq_lens`` and int32 ``req_pool_indices`` beside the usual widths."""
    ROW_STRIDES = "row strides"
    """Row strides beyond the row's width, odd ones too, and different ones from step to step."""
    INPUT_TAIL = "input tail"
    ALIASED_SEQ_LENS = "aliased seq_lens"
    NO_HOST_LENGTHS = "no host lengths"
    OPTIONAL_OUTPUTS = "optional outputs"
    """``paged_mqa_ctx_lens`` and ``paged_mqa_schedule``."""
    SLOT_KINDS = "slot kinds"
    """``req_to_token`` with scattered pages or scattered slots."""
    POOL_SEEDS = "pool seeds"
    """``req_to_token`` changing from replay to replay."""
    POOL_ROWS = "pool rows"
    """Any row of ``req_to_token`` for any request: the same one twice, stale ones for padded rows."""
    FILL_ZERO = "fill zero"
    MANY_ROWS = "many rows"
    """31, 32, 33, 64, 128 expanded rows and more than 128; rare, since the Triton interpreter is slow on them."""
    LARGE_TOP_K = "large top-k"
    """``index_topk`` of 2048, and sometimes tables wide enough to reach it."""


SETUP_FEATURES: Final = frozenset(
    {
        *(Feature.CONTEXT_WALL, Feature.LONG_CONTEXT, Feature.BUCKET_SWITCHES, Feature.SEVERAL_STEPS),
        *(Feature.SEQ_LENS_LAYOUT, Feature.INTEGER_WIDTHS, Feature.ROW_STRIDES, Feature.INPUT_TAIL),
        *(Feature.ALIASED_SEQ_LENS, Feature.NO_HOST_LENGTHS, Feature.OPTIONAL_OUTPUTS, Feature.POOL_ROWS),
        *(Feature.FILL_ZERO, Feature.MANY_ROWS, Feature.LARGE_TOP_K),
    }
)
"""Those that a Setup is drawn by, some of them beside other things."""

ON_PROBABILITY: Final = 0.75


@dataclass(frozen=True, slots=True)
class Swarm:
    """The features that are on, asked with ``in``."""

    features: frozenset[Feature]

    @classmethod
    def everything(cls) -> Swarm:
        """Every feature on."""
        return cls(frozenset(Feature))

    @classmethod
    def for_round(cls, seed: int, round: int, season: int | None = None) -> Swarm:  # noqa: A002  # the word that users see
        """What is on in ``round`` of a run with ``seed``: a function of these, the same in every process.

        Everything in round 0; later each feature with probability ``ON_PROBABILITY``. What a Setup may have is decided
        by ``season``, another round, if the round's cases share their Setup with the cases of that one.
        """
        if round == 0:
            return cls.everything()
        chance = random.Random(f"swarm {seed} {round}")  # a string is hashed alike in every process and version
        found = frozenset(feature for feature in Feature if chance.random() < ON_PROBABILITY)
        if season in (None, round):
            return cls(found)
        return cls(found - SETUP_FEATURES | cls.for_round(seed, season).features & SETUP_FEATURES)

    def without(self, *features: Feature) -> Swarm:
        """This swarm with ``features`` switched off."""
        return Swarm(self.features.difference(features))

    def __contains__(self, feature: object) -> bool:
        return feature in self.features

    def __str__(self) -> str:
        off = [str(feature) for feature in Feature if feature not in self.features]
        if not off:
            return "everything"
        if len(off) == len(Feature):
            return "nothing"
        if 2 * len(off) > len(Feature):
            return "only " + ", ".join(str(feature) for feature in Feature if feature in self.features)
        return "everything but " + ", ".join(off)
