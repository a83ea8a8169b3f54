"""``nsa-verify bench``: what agrees is timed, what does not is named, and the numbers are those that were measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import NO_GPU
from msgspec.structs import replace
from shell.commands import invoke, refused, registry_of_its_own, written

from nsa_verify.shell.timing_tables import lines
from nsa_verify.shell.timings import EXPANSION, Rejected, Spread, Timing, Timings, _Bench

ODD = """
from nsa_verify import Mode, fallback, implementation
from nsa_verify.core.registry import find

@implementation("idle-when-wide", modes=[Mode.DECODE], extent="full")
def idle(inputs, steps, setup):
    if setup.table_width < 2000:
        find("vectorized").refresh(inputs, steps, setup)

@implementation("raises-when-wide", modes=[Mode.DECODE], extent="full")
def raises(inputs, steps, setup):
    if setup.table_width >= 2000:
        raise RuntimeError("too wide for me\\nor not")
    find("vectorized").refresh(inputs, steps, setup)

@implementation("python-loop-but-mine", modes=[Mode.DECODE], extent="full")
def mine(inputs, steps, setup):
    fallback("no fast path")
    find("vectorized").refresh(inputs, steps, setup)
"""
SMALL = ("bench", "--size", "2,64,20", "--mode", "decode", "-n", 20, "--repetitions", 3, "-w", 1)


def test_what_agrees_is_timed_beside_python_loop() -> None:
    done = invoke(*SMALL, "--only", "python-loop", "--only", "vectorized", "--json")
    assert done.exit_code == 0
    told = json.loads(done.stdout)["timings"]
    assert (told["cases"], told["repetitions"], told["rejected"]) == (20, 3, [])
    names = [(it["implementation"], it["mode"], it["size"]) for it in told["timings"]]
    assert names == [("python-loop", "decode", "B 2 W 64 to 20"), ("vectorized", "decode", "B 2 W 64 to 20")]
    for it in told["timings"]:
        assert 0 < it["host"]["least"] <= it["host"]["median"] <= it["host"]["most"]
    loop, other = told["timings"]
    assert loop["host_ratio"] == 1
    assert other["host_ratio"] == pytest.approx(loop["host"]["median"] / other["host"]["median"])
    assert loop["live_bytes"] == other["live_bytes"] <= loop["moved_bytes"] < other["moved_bytes"]


def test_what_disagrees_is_not_timed(folder: Path) -> None:
    with registry_of_its_own():
        path = written(folder)
        done = invoke(*SMALL, "--impl", path, "--only", "short-top-k", "--only", "vectorized")
    assert done.exit_code == 1
    assert "short-top-k is not timed: it disagrees with the oracle (short-top-k [eager] NV101)" in done.stderr
    assert "short-top-k" not in done.stdout
    assert "vectorized" in done.stdout


def test_the_schedule_is_refreshed_by_those_who_write_it(folder: Path) -> None:
    with registry_of_its_own():
        path = written(folder, name="plain", too_low=0)
        done = invoke(*SMALL, "--schedule", "--impl", path, "--only", "plain", "--only", "vectorized")
        alone = invoke(*SMALL, "--schedule", "--impl", path, "--only", "plain")
    sentence = "left out, since they do not write both paged_mqa_schedule and paged_mqa_ctx_lens: plain"
    assert done.exit_code == 0
    title, _, row = done.stdout.splitlines()[-3:]
    assert title.startswith("decode, B 2 W 64 to 20 with schedule")
    assert row.startswith("vectorized ")
    assert sentence in done.stdout.splitlines()
    assert refused(alone) == f"nothing was timed: {sentence}"


def test_what_is_wrong_or_raises_where_it_is_timed_is_named(folder: Path) -> None:
    (folder / "odd.py").write_text(ODD, encoding="utf-8")
    names = ("idle-when-wide", "raises-when-wide", "python-loop-but-mine")
    chosen = [it for name in names for it in ("--only", name)]
    done = invoke(*SMALL, "--size", "1,4000,20", "--impl", "odd.py", *chosen, "--json")
    assert done.exit_code == 1
    idle, raises = (it for it in done.stderr.splitlines() if "is not timed" in it)
    where = "in decode at B 1 W 4000 to 20"
    assert idle.startswith(f"idle-when-wide is not timed: {where}, cache_seqlens[0] must be ")
    assert idle.endswith(" and is -1234567891, which it was before the call")
    assert raises == f"raises-when-wide is not timed {where}: it raised RuntimeError: too wide for me"
    told = json.loads(done.stdout)["timings"]
    assert [(it["implementation"], it["size"]) for it in told["timings"]] == [
        ("raises-when-wide", "B 2 W 64 to 20"),
        ("python-loop-but-mine", "B 2 W 64 to 20"),
        ("python-loop-but-mine", "B 1 W 4000 to 20"),
    ]
    assert [it["host_ratio"] for it in told["timings"]] == [None] * 3, "only python-loop itself is the baseline"


def test_fallbacks_are_shown(folder: Path) -> None:
    (folder / "odd.py").write_text(ODD, encoding="utf-8")
    arguments = (*SMALL, "--impl", "odd.py", "--only", "python-loop-but-mine")
    done = invoke(*arguments, "--html", "page.html")
    sentence = next(it for it in done.stdout.splitlines() if it.startswith("fallbacks: "))
    assert sentence.startswith("fallbacks: python-loop-but-mine: no fast path x ")
    assert done.stdout.splitlines()[-1].startswith("python-loop-but-mine (fell back)  ")
    page = (folder / "page.html").read_text(encoding="utf-8")
    assert sentence in page
    assert "python-loop-but-mine (fell back)" in page
    told = json.loads(invoke(*arguments, "--json").stdout)["timings"]
    assert list(told["fallbacks"]["python-loop-but-mine"]) == ["no fast path"]
    assert told["timings"][0]["fallbacks"] == ["no fast path"]


def test_what_memory_can_never_hold_is_skipped(folder: Path) -> None:
    done = invoke("bench", "--size", "65536,1048576,4", *SMALL[1:], "--only", "vectorized")
    assert done.exit_code == 2
    assert "decode, B 65536 W 1048576 to 4 is not measured: MemoryError: it needs " in done.stderr
    assert "decode, B 2 W 64 to 20" in done.stdout


def test_expansions_are_gated_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("python-loop", "triton-fused", "onepass")
    told, device = Timings(), "cpu" if NO_GPU else "cuda"
    _Bench(told, device, None, 3, lambda _: None).expansions(3, names)
    rows = [it.implementation for it in told.timings]
    assert rows == ["python-loop (stage 0)", "triton-fused (stage 1)", "onepass"]
    assert told.timings[0].host_ratio == 1
    monkeypatch.setattr("nsa_verify.kernels.fill_draft_extend_metadata_onepass", lambda *_: None)
    told.timings.append(replace(told.timings[0], implementation="onepass", mode="decode"))
    _Bench(told, device, None, 3, lambda _: None).expansions(3, names)
    (rejected,) = map(str, told.rejected)
    assert rejected.startswith(f"onepass is not timed: in {EXPANSION} at B 3, expanded[0] must be ")
    assert [it.mode for it in told.timings if it.implementation == "onepass"] == ["decode"]
    assert len(told.timings) == 5


@pytest.mark.skipif(not NO_GPU, reason="a GPU compiles them")
def test_without_a_gpu_kernels_are_not_timed() -> None:
    done = invoke(*SMALL, "--only", "onepass", "--only", "vectorized")
    assert "and of Triton kernels none, since the interpreter runs them (left out: onepass)" in done.stdout
    assert refused(invoke(*SMALL, "--only", "onepass")).startswith("nothing was timed")


@pytest.mark.parametrize(
    ("size", "sentence"),
    [
        ("32,131080", "'32,131080' is not B,W,LONGEST[,S], as 32,131080,4000"),
        ("0,10,5", "'0,10,5' is not B,W,LONGEST[,S], as 32,131080,4000"),
        ("4,100,101", "'4,100,101': a KV length of 101 is wider than the table"),
        ("1,4096,2", "'1,4096,2': LONGEST = 2 must be between 4 and 4096"),
        ("1,4,4", "'1,4,4': W = 4 must be between 5 and 1048576"),
        ("1,4096,100,9", "'1,4096,100,9': S = 9 must be between 1 and 8"),
        ("70000,64,20", "'70000,64,20': B = 70000 must be between 1 and 65536"),
        ("1,2000000,1000", "'1,2000000,1000': W = 2000000 must be between 5 and 1048576"),
        ("40000,60000,60000", "sums of 40000 lengths of 60000 exceed int32; ask for fewer requests or shorter ones"),
        ("1," + "9" * 5000 + ",3", "is not B,W,LONGEST[,S], as 32,131080,4000"),
    ],
)
def test_one_sentence(size: str, sentence: str) -> None:
    assert sentence in refused(invoke("bench", "--size", size))


def test_the_table_of_a_gpu() -> None:
    timing = Timing(
        implementation="onepass",
        mode="decode",
        size="B 32 W 131080 to 4000",
        host=Spread(20.0, 19.0, 22.0),
        node=Spread(3.0, 2.5, 3.25),
        launches=1,
        live_bytes=4_000_000,
        moved_bytes=6_000_000,
        floor_us=1.5,
        host_ratio=10.0,
    )
    told = Timings(device="H", cases=7, repetitions=3, empty_node_us=0.5, bytes_per_us=4e6, timings=[timing])
    told.rejected = [Rejected("mine", "disagrees")]
    head, _, machine, blank, title, names, row = lines(told, "cuda")
    assert (head, blank) == ("nsa-verify 0.1.0 on H", "")
    assert machine == "an empty node takes 0.50 us, a copy through DRAM moves 4.00 TB/s"
    assert title == "decode, B 32 W 131080 to 4000, 4.00 MB live"
    assert names.split("  ")[0] == "implementation"
    cells = row.split("  ")
    assert [it.strip() for it in cells if it.strip()] == [
        *("onepass", "20.00 (19.00-22.00)", "10.0", "3.00 (2.50-3.25)", "2.00", "6.00", "1", "0", "0")
    ]
