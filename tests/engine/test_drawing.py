"""Cases depend on the seed alone: not on what else is loaded, on the process, or on the environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from nsa_verify import Case
from nsa_verify.engine.drawing import draw_round, shrink_round
from nsa_verify.engine.plan import Plan

PLAN = Plan(seed=5, max_examples=45)
PROGRAM = """
import json, sys
from pathlib import Path
sys.path.insert(0, ".")
{imports}
from nsa_verify.engine.drawing import draw_round, shrink_round
from nsa_verify.engine.plan import Plan

plan = Plan(seed=5, max_examples=45)
drawn, probed = [], []
for index in range(plan.rounds):
    draw_round(plan, "cpu", index, lambda case: drawn.append(repr(case)))

def shows(case):
    probed.append(repr(case))
    return sum(request.seq_len for replay in case.replays for request in replay.requests) > 20

stable = shrink_round(plan, "cpu", 1, shows)
print(json.dumps([drawn, probed, stable]))
"""


def _elsewhere(folder: Path, imports: str = "", **environment: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM.format(imports=imports)],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    assert not (folder / ".hypothesis").exists()
    return json.loads(done.stdout)


def _long(case: Case) -> bool:
    return sum(request.seq_len for replay in case.replays for request in replay.requests) > 20


def test_the_same_cases_and_the_same_shrink_in_every_process(tmp_path: Path) -> None:
    constants = "\n".join(f"x{number} = {number}" for number in range(2, 60))
    (tmp_path / "of_the_user.py").write_text(constants)
    drawn: list[str] = []
    for index in range(PLAN.rounds):
        draw_round(PLAN, "cpu", index, lambda case: drawn.append(repr(case)))
    probed: list[str] = []

    def shows(case: Case) -> bool:
        probed.append(repr(case))
        return _long(case)

    here = [drawn, probed, shrink_round(PLAN, "cpu", 1, shows)]
    assert len(drawn) == PLAN.max_examples
    assert here == _elsewhere(tmp_path)
    assert here == _elsewhere(tmp_path, "import of_the_user", CI="1", PYTHONHASHSEED="7")


def test_a_round_is_drawn_alone() -> None:
    first: list[Case] = []
    draw_round(PLAN, "cpu", 2, first.append)
    again: list[Case] = []
    draw_round(PLAN, "cpu", 0, lambda _: None)
    draw_round(PLAN, "cpu", 2, again.append)
    assert first == again
    assert len(first) == PLAN.round_cases(2)


def test_a_shrink_that_meets_contradictions_says_so() -> None:
    calls = 0

    def now_and_then(_: Case) -> bool:
        nonlocal calls
        calls += 1
        return calls == 3

    assert shrink_round(PLAN, "cpu", 0, now_and_then) is False


def test_a_shrink_that_finds_nothing_says_so() -> None:
    assert shrink_round(PLAN, "cpu", 0, lambda _: False) is False


def test_a_gpu_gets_larger_cases() -> None:
    largest: dict[str, int] = {}
    for device in ("cpu", "cuda"):
        drawn: list[Case] = []
        for index in range(PLAN.rounds):
            draw_round(PLAN, device, index, drawn.append)
        largest[device] = max(case.setup.buckets[-1] for case in drawn)
    assert largest["cuda"] > largest["cpu"]


def test_what_a_gpu_found_is_shrunk_among_its_own_cases() -> None:
    drawn: list[Case] = []
    draw_round(PLAN, "cuda", 0, drawn.append)
    wide = max(drawn, key=lambda case: case.setup.buckets[-1]).setup.buckets[-1]
    assert shrink_round(PLAN, "cuda", 0, lambda case: case.setup.buckets[-1] >= wide)
