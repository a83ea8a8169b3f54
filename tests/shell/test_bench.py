"""``nsa-verify bench``: what agrees is timed, what does not is named, and the numbers are those that were measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import NO_GPU
from shell.commands import invoke, refused, registry_of_its_own, written

from nsa_verify.shell.timing_tables import lines
from nsa_verify.shell.timings import Rejected, Spread, Timing, Timings

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
    assert machine == "an empty node takes 0.50 us, a copy moves 4.00 TB/s"
    assert title == "decode, B 32 W 131080 to 4000, 4.00 MB live"
    assert names.split("  ")[0] == "implementation"
    cells = row.split("  ")
    assert [it.strip() for it in cells if it.strip()] == [
        *("onepass", "20.00 (19.00-22.00)", "10.0", "3.00 (2.50-3.25)", "2.00", "6.00", "1", "0", "0")
    ]
