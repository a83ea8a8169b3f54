"""``nsa-verify bench``: what agrees is timed, what does not is named, and the numbers are those that were measured."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from conftest import NO_GPU
from msgspec.structs import replace
from shell.commands import invoke, refused, registry_of_its_own, written

from nsa_verify.core.case import Mode
from nsa_verify.core.registry import find, load
from nsa_verify.device import timing
from nsa_verify.device.answers import WrongResult
from nsa_verify.device.timing import TOP_K
from nsa_verify.engine.events import Cell, CellKey, Matrix, Subject
from nsa_verify.engine.plan import Plan
from nsa_verify.kernels import BACKEND_ROWS
from nsa_verify.shell import timing_tables
from nsa_verify.shell.bench_commands import _refusal
from nsa_verify.shell.expansions import expansions
from nsa_verify.shell.timing_tables import lines, sized, unjudged
from nsa_verify.shell.timings import (
    EXPANSION,
    EXPANSION_ROWS,
    LEAST,
    Ask,
    Judged,
    Rejected,
    Spread,
    Timing,
    Timings,
    _Bench,
    _judged,
    measured,
    with_expansions,
)

ODD = """
from nsa_verify import Mode, fallback, implementation
from nsa_verify.core.registry import find

@implementation("idle-when-wide", modes=[Mode.DECODE], extent="full")
def idle(inputs, steps, setup):
    if setup.table_width != 3989:
        find("vectorized").refresh(inputs, steps, setup)

@implementation("raises-when-wide", modes=[Mode.DECODE], extent="full")
def raises(inputs, steps, setup):
    if setup.table_width == 3989:
        raise RuntimeError("too wide for me\\nor not")
    find("vectorized").refresh(inputs, steps, setup)

@implementation("python-loop-but-mine", modes=[Mode.DECODE], extent="full")
def mine(inputs, steps, setup):
    fallback("no fast path")
    find("vectorized").refresh(inputs, steps, setup)
"""
ONLY = ("--only", "plain", "--only", "vectorized")
SMALL = ("bench", "--size", "2,64,20", "--mode", "decode", "-n", 20, "--repetitions", 3, "-w", 1)


def test_what_agrees_is_timed_beside_python_loop() -> None:
    again = ("--size", "2,64,20,1", "--size", "2,64,20", "--mode", "DECODE")
    done = invoke(*SMALL, *again, "--only", "python-loop", "--only", "vectorized", "--json")
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
    assert loop["live_bytes"] == other["live_bytes"] <= loop["extent_bytes"] < other["extent_bytes"]
    assert (told["unjudged"], told["compilations"], loop["launches"]) == ([], [], None)


def test_what_disagrees_is_not_timed(folder: Path) -> None:
    with registry_of_its_own():
        path = written(folder)
        done = invoke(*SMALL, "--impl", path, "--only", "short-top-k", "--only", "vectorized")
    assert done.exit_code == 1
    assert "short-top-k is not timed: it disagrees with the oracle (short-top-k [eager] NV101)" in done.stderr
    assert "short-top-k" not in done.stdout
    assert "vectorized" in done.stdout


@pytest.mark.slow
def test_the_schedule_is_refreshed_too_by_those_who_write_it(folder: Path) -> None:
    with registry_of_its_own():
        path = written(folder, name="plain", too_low=0)
        every = ("bench", "--size", "2,64,20", *SMALL[5:], "-n", 40)
        done = invoke(*every, "--schedule", "--impl", path, *ONLY, "--json")
        alone = invoke(*SMALL, "--schedule", "--impl", path, "--only", "plain")
    assert done.exit_code == 0
    told = json.loads(done.stdout)["timings"]
    assert told["unscheduled"] == ["plain"]
    size = "B 2 W 64 to 20"
    names = {mode: ["vectorized", *(["plain"] if mode == "decode" else [])] for mode in map(str, Mode)}
    assert [(it["size"], it["mode"], it["implementation"]) for it in told["timings"]] == [
        *((size, mode, name) for mode in names for name in names[mode]),
        *((f"{size} with schedule", mode, "vectorized") for mode in names),
    ]
    live = {(it["size"], it["mode"]): it["live_bytes"] for it in told["timings"]}
    for mode in names:
        more = 4 * (2 * 133 + (2 * 4 if mode == "target-verify" else 0))
        assert live[f"{size} with schedule", mode] == live[size, mode] + more, "of the very same lengths"
    sentence = "not timed with schedule, since they do not write both paged_mqa_schedule and paged_mqa_ctx_lens: plain"
    assert sentence in alone.stdout.splitlines()
    assert alone.stderr.splitlines()[-1] == f"Error: nothing was timed with schedule: {sentence}"
    assert alone.exit_code == 2


def test_what_is_wrong_or_raises_where_it_is_timed_is_named(folder: Path) -> None:
    (folder / "odd.py").write_text(ODD, encoding="utf-8")
    names = ("idle-when-wide", "raises-when-wide", "python-loop-but-mine")
    chosen = [it for name in names for it in ("--only", name)]
    done = invoke(*SMALL, "--size", "1,3989,20", "--impl", "odd.py", *chosen, "--json")
    assert done.exit_code == 1
    idle, raises = (it for it in done.stderr.splitlines() if "is not timed" in it)
    where = "in decode at B 1 W 3989 to 20"
    assert idle.startswith(f"idle-when-wide is not timed: {where}, cache_seqlens[0] must be ")
    assert idle.endswith(" and is -1234567891, which it was before the call")
    assert raises == f"raises-when-wide is not timed {where}: it raised RuntimeError: too wide for me"
    told = json.loads(done.stdout)["timings"]
    assert [(it["implementation"], it["size"]) for it in told["timings"]] == [
        ("raises-when-wide", "B 2 W 64 to 20"),
        ("python-loop-but-mine", "B 2 W 64 to 20"),
        ("python-loop-but-mine", "B 1 W 3989 to 20"),
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


def starve(*_: object) -> NoReturn:
    """Ask for more memory than there is."""
    raise torch.OutOfMemoryError("CUDA out of memory\nmore")


DEVICE = "cpu" if NO_GPU else "cuda"
BOTH = {"eager", "graph"}


def bench_into(told: Timings, device: str = DEVICE) -> _Bench:
    """That measures three repetitions, and says nothing."""
    return _Bench(told, device, 3, lambda _: None)


def test_expansions_are_gated_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"python-loop": {"eager"}, "triton-fused": {"eager"}, "triton-inplace": BOTH, "engine-expansion": BOTH}
    told = Timings()
    bench_into(told).expansions(3, names)
    rows = [it.implementation for it in told.timings]
    assert rows == ["python-loop (stage 0)", "triton-fused (stage 1)", "onepass"], told.rejected
    assert told.timings[0].host_ratio == 1
    monkeypatch.setattr("nsa_verify.kernels.fill_draft_extend_metadata_onepass", lambda *_: None)
    told.timings.append(replace(told.timings[0], implementation="onepass", mode="decode"))
    bench_into(told).expansions(3, names)
    (rejected,) = map(str, told.rejected)
    assert rejected.startswith(f"onepass is not timed: in {EXPANSION} at B 3, expanded[0] must be ")
    assert [it.mode for it in told.timings if it.implementation == "onepass"] == ["decode"]
    assert len(told.timings) == 5


def test_the_expansions_own_rows_are_judged_and_are_not_timed_as_refreshes(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan(references=("mine.py",), modes=(Mode.DRAFT_EXTEND,))
    monkeypatch.setattr("nsa_verify.core.registry.load", lambda _: dict.fromkeys(("vectorized", "mine")))
    asked, added = with_expansions(plan)
    assert added == EXPANSION_ROWS
    assert asked.references == ("mine.py", BACKEND_ROWS)
    assert asked.only == ("vectorized", "mine", *EXPANSION_ROWS)
    monkeypatch.setattr("nsa_verify.core.registry.load", lambda _: dict.fromkeys(("vectorized", *EXPANSION_ROWS)))
    asked, added = with_expansions(plan)
    assert (asked.references, asked.only, added) == (plan.references, ("vectorized", *EXPANSION_ROWS), ())


def test_the_rows_of_the_expansions_are_there() -> None:
    with registry_of_its_own():
        known = load((BACKEND_ROWS,))
    assert set(EXPANSION_ROWS) <= known.keys()
    assert expansions(1, DEVICE).rows.keys() == {"python-loop", "triton-fused", *EXPANSION_ROWS}


@pytest.mark.parametrize("wrong", ["padded", "clamped", "behind", "nobody", "input"])
def test_what_an_expansion_may_get_wrong_is_seen(wrong: str) -> None:
    rows, check, *_ = expansions(1, DEVICE)
    call = rows["python-loop"].call
    expanded, clamped, seq_lens, accept_lens = (
        inspect.getclosurevars(call).nonlocals[name] for name in ("expanded", "clamped", "seq_lens", "accept_lens")
    )
    before = seq_lens.tolist(), accept_lens.tolist()

    def spoil() -> None:
        call()
        accept = int(accept_lens.sum())
        if wrong == "padded":
            expanded[:accept].add_(-4 * (expanded[:accept] == 0).int())
        elif wrong == "clamped":
            clamped[:accept].add_((expanded[:accept] > TOP_K).int())
        elif (wrong == "behind" and 0 < accept < 4) or (wrong == "nobody" and not accept):
            clamped[accept] = 0
        elif wrong == "input":
            accept_lens.neg_()

    check(call)
    with pytest.raises(WrongResult):
        check(spoil)
    assert (seq_lens.tolist(), accept_lens.tolist()) == before, "what is timed is there again"


def test_a_device_time_needs_the_verdict_of_captured_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    captured: list[bool] = []

    def prepared(_name: str, _call: object, capture: bool, *_: object) -> None:
        captured.append(capture)
        raise MemoryError

    monkeypatch.setattr("nsa_verify.device.timing.prepared", prepared)
    told = Timings()
    for executors in ({"eager"}, BOTH):
        bench_into(told).expansions(1, {"engine-expansion": executors})
        bench_into(told).refreshes(sized([(2, 64, 20)], False)[0], Mode.DECODE, {find("vectorized"): executors}, 0)
    assert captured == [False, False, True, True]
    assert told.skipped[0] == f"{EXPANSION}, B 1 is not measured of onepass: MemoryError"


def judged_as(cells: dict[CellKey, int], told: Timings) -> Judged:
    """What follows from a matrix of so many cases."""
    names = ("onepass", "python-loop", "triton-fused")
    subjects = [Subject(name, "", "live", (Mode.DECODE, Mode.TARGET_VERIFY)) for name in names]
    matrix = Matrix({key: Cell(cases=cases, not_applicable=1) for key, cases in cells.items()})
    return _judged([*subjects, Subject("ragged", "", "live", ())], matrix, told)


def test_what_was_not_judged_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Timings()
    cells = {
        ("onepass", "eager", Mode.DECODE): LEAST + 2,
        ("onepass", "graph", Mode.DECODE): LEAST,
        ("onepass", "eager", Mode.TARGET_VERIFY): LEAST + 1,
        ("onepass", "graph", Mode.TARGET_VERIFY): LEAST - 1,
        ("python-loop", "eager", Mode.DECODE): LEAST + 3,
        ("python-loop", "eager", Mode.TARGET_VERIFY): 0,
        ("triton-fused", "eager", Mode.DECODE): LEAST - 1,
        ("triton-fused", "graph", Mode.DECODE): LEAST,
    }
    judged = judged_as(cells, told)
    assert judged == {
        "onepass": {Mode.DECODE: BOTH, Mode.TARGET_VERIFY: {"eager"}},
        "python-loop": {Mode.DECODE: {"eager"}},
    }
    assert told.undeclared == ["ragged"]
    monkeypatch.setattr("nsa_verify.device.timing.floor", starve)
    measured(Ask(plan=Plan(), sizes=(), expansions=(), repetitions=3), judged, told, "cuda", lambda _: None)
    assert list(unjudged(told)) == [
        f"{timing_tables.UNJUDGED}: python-loop in target-verify (0); triton-fused in decode (4), target-verify (0)",
        f"{timing_tables.UNCAPTURED}: onepass in target-verify (4)",
    ]
    assert f"{timing_tables.AGREED}: onepass 5, python-loop 8, triton-fused 5" in lines(told, "cuda")


def test_what_was_asked_for_and_not_judged_is_no_success() -> None:
    arguments = ("bench", "--size", "1,64,8", "-n", 10, "--repetitions", 3, "-w", 1, "--only", "python-loop")
    done = invoke(*arguments)
    missing = f"{timing_tables.UNJUDGED}: python-loop in "
    modes = next(it for it in done.stdout.splitlines() if it.startswith(missing)).removeprefix(missing)
    timed = {it.partition(",")[0] for it in done.stdout.splitlines() if ", B 1 W 64 to 8" in it}
    cases = {mode: int(count) for mode, count in re.findall(r"([a-z0-9-]+) \((\d+)\)", modes)}
    assert timed
    assert all(it < LEAST for it in cases.values())
    assert not timed & cases.keys()
    assert timed | cases.keys() == set(Mode)
    assert (done.exit_code, done.stderr.splitlines()[-1]) == (2, f"Error: {missing}{modes}")
    told = json.loads(invoke(*arguments, "--json").stdout)["timings"]
    assert {it["mode"]: it["cases"] for it in told["unjudged"]} == cases
    counts = {mode: it["eager"] for mode, it in told["judged"]["python-loop"].items() if it}
    assert {mode for mode, count in counts.items() if count >= LEAST} == timed
    assert f"{timing_tables.AGREED}: python-loop {min(counts[it] for it in timed)}" in done.stdout.splitlines()


def test_want_of_memory_for_the_floor_or_the_expansions_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Timings()
    monkeypatch.setattr("nsa_verify.device.timing.floor", starve)
    ask = Ask(plan=Plan(), sizes=(), expansions=(3,), repetitions=3)
    measured(ask, {}, told, "cuda", lambda _: None)
    monkeypatch.setattr("nsa_verify.shell.expansions.expansions", starve)
    bench_into(told).expansions(3, {})
    assert told.skipped == [
        "nothing is measured: OutOfMemoryError: CUDA out of memory",
        f"{EXPANSION}, B 3 is not measured: OutOfMemoryError: CUDA out of memory",
    ]
    assert list(lines(told, "cuda"))[2:] == told.skipped


def test_options_that_would_be_lost_are_refused() -> None:
    done = invoke("bench", "--json", "--size", "1,64,8", "-n", 3, "search", "--max-time", "1s")
    options = "--size, --max-examples, --json"
    assert refused(done) == f"{options} in front of search would be lost: give search its options behind its name"


@pytest.mark.parametrize("command", [("bench",), ("bench", "search")])
def test_a_seed_has_64_bits(command: tuple[str, ...]) -> None:
    assert "--seed" in (sentence := refused(invoke(*command, "--seed", 2**64)))
    assert "0<=x<=18446744073709551615" in sentence


@pytest.mark.parametrize("numbers", timing_tables.SIZES)
def test_sizes_that_are_measured_may_be_asked_for(numbers: tuple[int, ...]) -> None:
    (size,) = sized([numbers], False)
    found = (size.batch_size, size.table_width, size.longest, size.num_steps, size.rest)
    assert found == (*numbers, *(1, 0)[len(numbers) - 3 :])
    assert _refusal(*found) is None


@pytest.mark.skipif(not NO_GPU, reason="a GPU compiles them")
def test_without_a_gpu_kernels_are_not_timed() -> None:
    few = (*SMALL, "-n", 8)
    done = invoke(*few, "--only", "onepass", "--only", "vectorized")
    assert "and of Triton kernels none, since the interpreter runs them (left out: onepass)" in done.stdout
    assert refused(invoke(*few, "--only", "onepass")) == f"nothing was timed: {timing_tables.NO_GPU}"


@pytest.mark.parametrize(
    ("size", "sentence"),
    [
        ("32,131080", "'32,131080' is not B,W,LONGEST[,S[,REST]], as 32,131080,4000"),
        ("0,10,5", "'0,10,5' is not B,W,LONGEST[,S[,REST]], as 32,131080,4000"),
        ("2,64,20,1,5,1", "'2,64,20,1,5,1' is not B,W,LONGEST[,S[,REST]], as 32,131080,4000"),
        ("2,64,20,1,3", "'2,64,20,1,3': REST = 3 must be between 4 and 20"),
        ("2,64,20,1,21", "'2,64,20,1,21': REST = 21 must be between 4 and 20"),
        ("1,64,20,1,5", "REST = 5 is of all requests but the first, and B = 1 has no other; leave it out"),
        ("40000,60000,60000,1,60000", "sums of 39999 lengths of 60000 exceed int32; ask for fewer requests or shorter"),
        ("4,100,101", "'4,100,101': a KV length of 101 is wider than the table"),
        ("1,4096,2", "'1,4096,2': LONGEST = 2 must be between 4 and 4096"),
        ("1,4,4", "'1,4,4': W = 4 must be between 5 and 1048576"),
        ("1,4096,100,9", "'1,4096,100,9': S = 9 must be between 1 and 8"),
        ("70000,64,20", "'70000,64,20': B = 70000 must be between 1 and 65536"),
        ("1,2000000,1000", "'1,2000000,1000': W = 2000000 must be between 5 and 1048576"),
        ("40000,60000,60000", "sums of 40000 lengths of 60000 exceed int32; ask for fewer requests or shorter ones"),
        ("1," + "9" * 5000 + ",3", "is not B,W,LONGEST[,S[,REST]], as 32,131080,4000"),
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
        extent_bytes=6_000_000,
        floor_us=1.5,
        host_ratio=10.0,
    )
    told = Timings(device="H", cases=7, repetitions=3, empty_node_us=0.5, bytes_per_us=4e6)
    told.timings = [timing, replace(timing, implementation="python-loop", node=None, launches=None)]
    told.rejected = [Rejected("mine", "disagrees")]
    head, _, machine, launches, blank, title, names, row, other = lines(told, "cuda")
    assert launches == "launches are the nodes of a captured graph: where a call is not captured, nobody counts them"
    assert other.split("  ")[-1] == "0"
    assert [it.strip() for it in other.split("  ") if it.strip()][3:] == ["not captured", "-", "6.00", "-", "0", "0"]
    assert (head, blank) == ("nsa-verify 0.1.0 on H", "")
    assert machine == "an empty node takes 0.50 us, a copy through DRAM moves 4.00 TB/s"
    assert title == "decode, B 32 W 131080 to 4000, 4.00 MB live"
    assert names.split("  ")[0] == "implementation"
    cells = row.split("  ")
    assert [it.strip() for it in cells if it.strip()] == [
        *("onepass", "20.00 (19.00-22.00)", "10.0", "3.00 (2.50-3.25)", "2.00", "6.00", "1", "0", "0")
    ]


def test_compilations_are_counted_over_all_sizes_of_as_many_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, forms = object(), [object() for _ in range(3)]
    launched: list[int] = []

    def prepared(name: str, *_: object) -> timing.Subject:
        form = forms[launched.pop()]
        return timing.Subject(name, lambda: None, compiled={id(form): (kernel, form)})

    monkeypatch.setattr("nsa_verify.device.timing.prepared", prepared)
    told = Timings()
    bench = bench_into(told, "cpu")
    for form, mode, numbers in (
        *((0, Mode.DECODE, (2, 64, 20)), (0, Mode.DECODE, (3, 64, 20)), (2, Mode.DECODE, (2, 64, 9))),
        *((1, Mode.TARGET_VERIFY, (2, 64, 20)), (1, Mode.TARGET_VERIFY, (3, 64, 20))),
        *((1, Mode.DECODE, (2, 64, 20, 2)), (2, Mode.TARGET_VERIFY, (2, 64, 20, 2))),
    ):
        launched.append(form)
        bench.refreshes(sized([numbers], False)[0], mode, {find("vectorized"): BOTH}, 0)
    told.compilations = bench.compilations()
    found = {(it.mode, it.steps): (it.sizes, it.kernels, it.compilations) for it in told.compilations}
    assert found == {
        ("decode", 1): (3, 1, 2),
        ("target-verify", 1): (2, 1, 1),
        ("decode", 2): (1, 1, 1),
        ("target-verify", 2): (1, 1, 1),
    }
    *_, title, names, row, _, other, _, _ = lines(told, "cpu")
    assert (title, other) == ("compiled by Triton over all sizes, S 1", "compiled by Triton over all sizes, S 2")
    assert names.split() == ["implementation", "decode", "target-verify"]
    assert [it.strip() for it in row.split("  ") if it.strip()] == [
        *("vectorized", "2 of 1 kernel, 3 sizes", "1 of 1 kernel, 2 sizes")
    ]
    told.timings = [it for it in told.timings if it.mode == "decode"]
    assert {it.mode for it in bench.compilations()} == {"decode"}
