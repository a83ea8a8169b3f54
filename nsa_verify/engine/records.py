"""What compute-sanitizer wrote down, read from its XML, and the code under which each record is a finding.

The names of the elements differ between versions of the tool. So they are looked for by name wherever they stand, what
happened is told from the record's own words, and a record that is not understood is kept as it is.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple
from xml.etree.ElementTree import Element

from nsa_verify.core.findings import Code
from nsa_verify.core.sanitizers import Sanitizer


class Record(NamedTuple):
    """One record. ``code`` is None where it is not understood, and then ``words`` are all of its text."""

    code: Code | None
    words: str
    place: str
    """``file.py:12 in kernel``, or the name of the kernel alone, or nothing."""
    is_information: bool = False
    """Whether the tool itself says that it is no fault."""


class Damaged(Exception):
    """The file cannot be read; the message says why."""


def records_in(path: Path, sanitizer: Sanitizer) -> Iterator[Record]:
    """The records of the file. Raises ``Damaged``."""
    try:
        root = ET.fromstring(path.read_bytes())
    except (OSError, ET.ParseError) as error:
        raise Damaged(str(error)) from error
    for element in root.iter():
        if _name(element) == "record":
            yield _record(element, sanitizer)


def _record(element: Element, sanitizer: Sanitizer) -> Record:
    own = list(_own(element))
    text = next((it.text for it in own if _name(it) in _TEXTS and (it.text or "").strip()), None)
    everything = " ".join(" ".join(element.itertext()).split())
    words = " ".join((text or " ".join(it.text or "" for it in own)).split())
    place = _place([element, *own]) or _place_in(everything)
    access = next((str(it.text) for it in own if _name(it) in _ACCESSES and it.text), "")
    code = _code(f"{access} {words}".lower(), sanitizer)
    return Record(code, words if code is not None and words else everything, place, _is_information(element))


_TEXTS: Final = ("text", "message", "description", "summary")
_ACCESSES: Final = ("accesstype", "access")
_FILES: Final = ("path", "file", "filename", "sourcefile", "source")
_LINES: Final = ("line", "lineno", "linenumber", "sourceline")
_FUNCTIONS: Final = ("func", "function", "kernel", "kernelname", "functionname", "name", "fn")
_ELSEWHERE: Final = re.compile("(host|save|alloc|api).*(stack|location|backtrace|frame)")
"""The name of a stack that is not the kernel's."""
_STANDARD: Final = re.compile(r"(^|/)triton/language/")
"""Files of Triton's own library, which kernels are inlined from."""
_PLACE: Final = re.compile(
    r" at (?:0x[0-9a-f]+ in )?(?P<function>[^+]+?)\+0x[0-9a-f]+(?: in (?P<file>\S+):(?P<line>\d+))?"
)
_DEAD: Final = re.compile(r"misaligned|illegal|out-of-range|fatal|exception|launch failure|stack overflow|\btrap\b")
_NAME_COLUMNS: Final = 100


def _code(words: str, sanitizer: Sanitizer) -> Code | None:
    """What a record in these words, of lower case, is a finding of."""
    match sanitizer:
        case Sanitizer.INITCHECK:
            return Code.POISON if "uninit" in words else None
        case Sanitizer.RACECHECK:
            return Code.NOT_DETERMINISTIC if re.search(r"\b(race|hazard)", words) else None
        case Sanitizer.SYNCCHECK:
            return Code.NOT_DETERMINISTIC if re.search(r"barrier|diverge|sync", words) else None
    if _DEAD.search(words):
        return Code.DEATH
    did = re.search(r"\b(read|load|write|store|atomic|reduction)\b", words)
    if did is None:
        return None
    return Code.OUT_OF_BOUNDS if did[1] in ("read", "load") else Code.GUARD_WRITTEN


def _name(element: Element) -> str:
    """The element's name, without its namespace and in lower case."""
    return element.tag.rpartition("}")[2].lower()


def _own(element: Element) -> Iterator[Element]:
    """The elements within, but for the stacks of the host."""
    for child in element:
        if not _ELSEWHERE.search(_name(child)):
            yield child
            yield from _own(child)


def _is_information(element: Element) -> bool:
    levels = [it.text for it in element.iter() if _name(it) in ("severity", "level")]
    return [str(it).strip().lower() for it in levels] == ["info"]


def _fields(element: Element) -> dict[str, str]:
    """The attributes of an element, and the texts of the elements right inside it, by name in lower case."""
    found = {name.lower(): value for name, value in element.attrib.items()}
    return found | {_name(child): child.text.strip() for child in element if child.text}


def _first(fields: dict[str, str], names: tuple[str, ...]) -> str:
    return next((fields[name] for name in names if fields.get(name)), "")


def _place(own: list[Element]) -> str:
    """Where it happened, by the elements that name a function, or a file and a line."""
    frames = [(_first(it, _FUNCTIONS), _first(it, _FILES), _first(it, _LINES)) for it in map(_fields, own)]
    lines = [it for it in frames if it[1] and it[2].isdecimal() and int(it[2])]
    best = [it for it in lines if it[1].endswith(".py") and not _STANDARD.search(it[1])] or lines or frames
    found = next((it for it in best if it[0] or it in lines), None)
    return _said(*found) if found is not None else ""


def _place_in(text: str) -> str:
    """The same, as the tool prints it: ``at kernel+0x12 in file.py:12``."""
    found = _PLACE.search(text)
    return _said(found["function"], found["file"] or "", found["line"] or "") if found is not None else ""


def _said(function: str, file: str, line: str) -> str:
    function = function.partition("(")[0].strip()
    function = f"{function[:_NAME_COLUMNS]}..." if len(function) > _NAME_COLUMNS else function
    if not (file and line):
        return function
    at = f"{Path(file).name}:{line}"
    return f"{at} in {function}" if function else at
