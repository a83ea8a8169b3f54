"""What compute-sanitizer wrote down: each record under its code and with its line, whatever the elements are called."""

from __future__ import annotations

from pathlib import Path

import pytest

from nsa_verify import Code
from nsa_verify.core.sanitizers import Sanitizer
from nsa_verify.engine.records import Damaged, Record, records_in

MEMCHECK = Sanitizer.MEMCHECK

NESTED = """
<record>
  <kind>Invalid</kind>
  <what>
    <text>Invalid __global__ read of size 4 bytes</text>
    <accessType>Read</accessType>
    <size>4</size>
  </what>
  <where><func>_gather_pages</func><path>/a/b/kernel.py</path><line>303</line><pc>0x1230</pc></where>
  <who><threadId><x>31</x><y>0</y><z>0</z></threadId><blockId><x>0</x></blockId></who>
  <address>0x7f00</address>
  <hostStack><frame><func>cuLaunchKernelEx_write</func><file>driver.c</file><line>7</line></frame></hostStack>
</record>
"""
FRAMES = """
<record>
  <kind>MemoryAccess</kind>
  <text>Invalid __global__ write of size 4 bytes</text>
  <deviceStack>
    <frame><func>minimum</func><file>/x/triton/language/standard.py</file><line>12</line></frame>
    <frame><function>_copy(int*, int*)</function><filename>mine.py</filename><lineno>8</lineno></frame>
  </deviceStack>
</record>
"""
ATTRIBUTES = """
<r:record xmlns:r="urn:x">
  <r:message>Invalid __global__ atomic of size 4 bytes</r:message>
  <r:location function="_count" file="mine.py" line="9"/>
</r:record>
"""
TORCH = """
<record>
  <what><text>Invalid __global__ read of size 8 bytes</text></what>
  <where>
    <func>void at::native::index_elementwise_kernel&lt;128, 4&gt;(long, int)</func><file></file><line>0</line>
  </where>
</record>
"""
AS_TEXT = """
<record>
  <text>Invalid __global__ read of size 4 bytes
    at _tail+0x80 in /a/mine.py:41
    by thread (1,0,0) in block (0,0,0)
    Access at 0x7f5 is out of bounds</text>
</record>
"""
SHORT_TYPES = "<record><kind>InvalidAccess</kind><accessType>Write</accessType><func>_copy</func></record>"


def _records(folder: Path, *texts: str, sanitizer: Sanitizer = MEMCHECK) -> list[Record]:
    path = folder / "records.xml"
    path.write_text(f'<?xml version="1.0"?><ComputeSanitizerOutput>{"".join(texts)}</ComputeSanitizerOutput>')
    return list(records_in(path, sanitizer))


READ = "Invalid __global__ read of size 4 bytes"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (NESTED, Record(Code.OUT_OF_BOUNDS, READ, "kernel.py:303 in _gather_pages")),
        (FRAMES, Record(Code.GUARD_WRITTEN, "Invalid __global__ write of size 4 bytes", "mine.py:8 in _copy")),
        (ATTRIBUTES, Record(Code.GUARD_WRITTEN, "Invalid __global__ atomic of size 4 bytes", "mine.py:9 in _count")),
        (SHORT_TYPES, Record(Code.GUARD_WRITTEN, "InvalidAccess Write _copy", "_copy")),
    ],
)
def test_an_access_out_of_bounds(tmp_path: Path, text: str, expected: Record) -> None:
    assert _records(tmp_path, text) == [expected]


def test_without_a_line_the_kernel_is_named(tmp_path: Path) -> None:
    (record,) = _records(tmp_path, TORCH)
    assert record.code is Code.OUT_OF_BOUNDS
    assert record.place == "void at::native::index_elementwise_kernel<128, 4>"


def test_the_line_may_stand_in_the_text_alone(tmp_path: Path) -> None:
    (record,) = _records(tmp_path, AS_TEXT)
    assert (record.code, record.place) == (Code.OUT_OF_BOUNDS, "mine.py:41 in _tail")
    assert record.words.startswith(READ)


@pytest.mark.parametrize(
    ("sanitizer", "text", "code"),
    [
        (Sanitizer.INITCHECK, "Uninitialized __global__ memory read of size 4 bytes", Code.POISON),
        (Sanitizer.INITCHECK, "Unused memory in allocation 0x7f00", None),
        (Sanitizer.RACECHECK, "Race reported between Write access and Read access", Code.NOT_DETERMINISTIC),
        (Sanitizer.RACECHECK, "Potential WAW hazard detected at __shared__ 0x0", Code.NOT_DETERMINISTIC),
        (Sanitizer.SYNCCHECK, "Barrier error detected. Divergent thread(s) in warp", Code.NOT_DETERMINISTIC),
        (MEMCHECK, "Invalid __shared__ write of size 4 bytes", Code.GUARD_WRITTEN),
        (MEMCHECK, "Invalid __global__ read of size 4 bytes, address is misaligned", Code.DEATH),
        (MEMCHECK, "Illegal instruction", Code.DEATH),
        (MEMCHECK, "The moon is full, said thread (0,0,0)", None),
        (Sanitizer.RACECHECK, "The moon is full", None),
        (Sanitizer.SYNCCHECK, "The moon is full", None),
    ],
)
def test_codes(tmp_path: Path, sanitizer: Sanitizer, text: str, code: Code | None) -> None:
    (record,) = _records(tmp_path, f"<record><what><text>{text}</text></what></record>", sanitizer=sanitizer)
    assert record.code is code


def test_what_is_not_understood_is_kept_whole(tmp_path: Path) -> None:
    (record,) = _records(tmp_path, "<record><kind>Moon</kind><what><text>It is  full</text></what><n>7</n></record>")
    assert (record.code, record.words) == (None, "Moon It is full 7")


def test_information_is_told_apart(tmp_path: Path) -> None:
    hazard = "<record><severity>{}</severity><text>Potential WAW hazard</text></record>"
    found = _records(tmp_path, hazard.format("INFO"), hazard.format("Warning"), sanitizer=Sanitizer.RACECHECK)
    assert [it.is_information for it in found] == [True, False]


def test_an_empty_document_has_no_records(tmp_path: Path) -> None:
    assert _records(tmp_path) == []
    assert _records(tmp_path, "<summary><errors>0</errors></summary>") == []


@pytest.mark.parametrize("text", ["", "<ComputeSanitizerOutput><record><kind>Inv", "no XML"])
def test_a_damaged_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "records.xml"
    path.write_text(text)
    with pytest.raises(Damaged):
        list(records_in(path, MEMCHECK))
    with pytest.raises(Damaged):
        list(records_in(tmp_path / "missing.xml", MEMCHECK))
