"""Events as JSON has them: objects by the names of their fields, matrices as nested objects; and text that any file may
have."""

from __future__ import annotations

import re
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any, Final

from msgspec import Struct

from nsa_verify.core.labels import Coverage
from nsa_verify.engine.events import Matrix


def matrix_document(matrix: Matrix) -> dict[str, Any]:
    """Implementation, executor, mode: the counts."""
    told: dict[str, Any] = {}
    for (implementation, executor, mode), cell in sorted(matrix.cells.items()):
        told.setdefault(implementation, {}).setdefault(executor, {})[str(mode)] = cell
    return told


_SURROGATE: Final = re.compile("[\ud800-\udfff]")
_CONTROL: Final = re.compile("[^\t\n\r\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def encodable(text: str) -> str:
    """``text`` with what UTF-8 cannot have, as in the names of some files, written out."""
    return _SURROGATE.sub(_written_out, text)


def printable(text: str) -> str:
    """``text`` with what neither XML nor HTML can have in any form, such as control characters, written out."""
    return _CONTROL.sub(_written_out, text)


def _written_out(found: re.Match[str]) -> str:
    return ascii(found[0])[1:-1]


def plain(value: Any, without: tuple[str, ...] = ()) -> Any:
    """``value`` of dicts, lists, strings and numbers; fields of structs called as in ``without`` are left out.

    Pairs of labels are named ``first & second``, and a label alone by itself.
    """
    match value:
        case Matrix():
            return plain(matrix_document(value), without)
        case Coverage():
            return {" & ".join(dict.fromkeys(pair)): count for pair, count in sorted(value.by_pair())}
        case Struct():
            fields = (name for name in value.__struct_fields__ if name not in without)
            return {name: plain(getattr(value, name), without) for name in fields}
        case Mapping():
            return {encodable(str(key)): plain(it, without) for key, it in value.items()}
        case tuple() if hasattr(value, "_asdict"):
            return plain(value._asdict(), without)
        case AbstractSet():
            return [plain(it, without) for it in sorted(value)]
        case list() | tuple():
            return [plain(it, without) for it in value]
        case Path():
            return encodable(str(value))
        case str():
            return encodable(value)
        case _:
            return value
