"""Where every buffer of a ``Setup`` lies in the one int32 arena of an implementation.

Order: for each step the 1-D buffers of every (mode, bucket), then the step's two page-table backings, which all
buckets and modes share (contract, section 4); last the inputs. A guard zone follows everything.
"""

from __future__ import annotations

from bisect import bisect_right
from functools import lru_cache
from typing import Final, NamedTuple

from nsa_verify.core.buffers import TABLES, alias_of, shapes
from nsa_verify.core.case import Layout, Mode, Setup

ALIGNMENT: Final = 32
"""Elements; buffers start on 128-byte boundaries, as separate allocations would."""
GUARD: Final = 64
"""Least elements of a guard zone; behind a table it is at least two rows."""

POISON_SPAN: Final = 1 << 20
POISON_LOW: Final = -(2**31) + 1


def poison(index: int) -> int:
    """The content of arena element ``index`` before anything is written: negative, huge, different from its neighbours.

    No length, prefix sum or slot is negative, so poison is never a right value, and as it depends on the position,
    poison copied from one place to another shows as well.
    """
    return POISON_LOW + (index * 7919) % POISON_SPAN


def is_poison(value: int) -> bool:
    """Whether ``value`` lies in the band that only poison comes from."""
    return value < POISON_LOW + POISON_SPAN


class Place(NamedTuple):
    """A buffer in the arena: element ``(row, column)`` lies at ``offset + row * stride + column``."""

    offset: int
    rows: int
    columns: int
    stride: int


class Zone(NamedTuple):
    """A stretch of the arena with one owner. Page-table backings have neither mode nor bucket; guards carry the name
    of what they follow."""

    start: int
    end: int
    kind: str
    """``buffer``, ``guard`` or ``input``."""
    name: str
    step: int | None = None
    mode: Mode | None = None
    bucket: int | None = None
    columns: int = 0
    stride: int = 0


class InputPlace(NamedTuple):
    """A 1-D input: element i occupies ``words`` int32 words at ``offset + i * words * stride``."""

    offset: int
    words: int
    stride: int
    capacity: int


BufferKey = tuple[int, Mode, int, str]

TWO_DIMENSIONAL: Final = (*TABLES, "paged_mqa_ctx_lens", "paged_mqa_schedule")
"""The buffers whose elements have a row and a column, however few."""


class ArenaLayout:
    """The arena of one setup. ``places`` covers every (step, mode, bucket, buffer), aliases included."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.zones: list[Zone] = []
        self.places: dict[BufferKey, Place] = {}
        self.inputs: dict[str, InputPlace] = {}
        self._end = 0
        self._guard("start", None, GUARD)
        for step in range(setup.num_steps):
            self._add_step(step)
        self.inputs_start = self._end
        self._add_inputs()
        self.size = self._end
        self._starts = [zone.start for zone in self.zones]

    def zone_at(self, index: int) -> Zone:
        """The zone that holds arena element ``index``."""
        return self.zones[bisect_right(self._starts, index) - 1]

    def _add_step(self, step: int) -> None:
        setup = self.setup
        tables = self._table_backings(step)
        for bucket in setup.buckets:
            for mode in Mode:
                for name, shape in shapes(setup, mode, bucket).items():
                    alias = alias_of(setup, mode, name)
                    if alias is not None:
                        place = self.places[step, mode, bucket, alias]
                        place = place if name in TABLES else Place(place.offset, shape.rows, shape.columns, 1)
                    elif name in TABLES:
                        place = tables[name]._replace(rows=shape.rows)
                    else:
                        zone = Zone(0, 0, "buffer", name, step, mode, bucket, shape.columns, shape.columns)
                        offset = self._zone(zone, shape.rows * shape.columns)
                        self._guard(name, step, GUARD)
                        place = Place(offset, shape.rows, shape.columns, shape.columns)
                    self.places[step, mode, bucket, name] = place

    def _table_backings(self, step: int) -> dict[str, Place]:
        setup = self.setup
        rows = setup.buckets[-1] * setup.num_draft_tokens
        padding = setup.table_row_stride - setup.table_width + step * setup.stride_skew
        widths = {"page_table_1": setup.table_width}
        if setup.page_size != 1:
            widths["real_page_table"] = setup.real_table_width
        found = {}
        for name, width in widths.items():
            stride = width + padding
            offset = self._zone(Zone(0, 0, "buffer", name, step, columns=width, stride=stride), rows * stride)
            self._guard(name, step, max(GUARD, 2 * stride))
            found[name] = Place(offset, rows, width, stride)
        return found

    def _add_inputs(self) -> None:
        setup = self.setup
        capacity = setup.buckets[-1] + setup.input_tail
        stride = 3 if setup.layout is Layout.STRIDED else 1
        lead = 5 if setup.layout is Layout.OFFSET else 0
        seq_words = 2 if setup.seq_lens_dtype == "int64" else 1
        row_words = 2 if setup.pool_index_dtype == "int64" else 1
        self._add_input("seq_lens", InputPlace(lead * seq_words, seq_words, stride, capacity))
        self._add_input("req_pool_indices", InputPlace(0, row_words, 1, capacity))
        self._add_input("accept_lens", InputPlace(0, 1, 1, capacity))

    def _add_input(self, name: str, place: InputPlace) -> None:
        offset = self._zone(Zone(0, 0, "input", name), place.offset + place.capacity * place.stride * place.words)
        self.inputs[name] = place._replace(offset=offset + place.offset)
        self._guard(name, None, GUARD)

    def _guard(self, name: str, step: int | None, length: int) -> None:
        end = -(-(self._end + length) // ALIGNMENT) * ALIGNMENT
        self._zone(Zone(0, 0, "guard", name, step), end - self._end)

    def _zone(self, zone: Zone, length: int) -> int:
        start = self._end
        self._end = start + length
        if length:
            self.zones.append(zone._replace(start=start, end=self._end))
        return start


@lru_cache(maxsize=64)
def arena_layout(setup: Setup) -> ArenaLayout:
    """The layout of ``setup``, computed once."""
    return ArenaLayout(setup)
