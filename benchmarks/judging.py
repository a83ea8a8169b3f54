"""What the judgement of a case costs, and how much of that is the implementations' own: no arguments are needed.

Prints, for each executor and implementation, milliseconds a case as judged in batches, the same calls made without the
judgement, and how often each waited for the device. Cases are small and of one to three replays; setups are shared,
as in a run. The first table is of the first cases of each setup, where graphs are captured, the second of later ones.
"""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from nsa_verify.core.case import Case
from nsa_verify.core.findings import Outcome
from nsa_verify.core.implementation import Implementation
from nsa_verify.core.registry import load
from nsa_verify.device import judge, screening
from nsa_verify.device.batch import Job, judge_batch
from nsa_verify.device.driving import Executor, captures
from nsa_verify.device.executors import executors_for
from nsa_verify.device.rig import close_rigs, rig_for
from nsa_verify.device.select import describe, resolve, single_thread
from nsa_verify.strategies import Limits, cases, replays

SETUPS = 3
CASES = {"cuda": 40, "cpu": 12}
"""Of each setup, after as many to warm up."""
AT_A_TIME = 16
REPEAT_EVERY, DELAY_EVERY, FRESH_EVERY = 2, 10, 8
Pair = tuple[Implementation, Executor]
Totals = Counter[tuple[str, str]]


def drawn(count: int, seeded: int, strategy: st.SearchStrategy[Case]) -> list[Case]:
    """``count`` cases of at most three replays."""
    found: list[Case] = []

    @seed(seeded)
    @settings(
        max_examples=3 * count,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(strategy)
    def go(case: Case) -> None:
        if len(case.replays) <= 3:
            found.append(case)

    go()
    return found[:count]


def drawn_by_setup(count: int) -> list[list[Case]]:
    """``count`` cases of each of ``SETUPS`` setups."""
    setups = [case.setup for case in drawn(10, 1, cases(limits=Limits.small()))[1 : SETUPS + 1]]
    return [
        drawn(count, 9 + number, replays(setup, limits=Limits.small()).map(lambda it, setup=setup: Case(setup, it)))
        for number, setup in enumerate(setups)
    ]


def jobs_of(given_cases: Sequence[Case], pairs: Sequence[Pair]) -> list[Job]:
    """The jobs of a run: some cases are repeated, delayed, captured afresh."""
    return [
        Job(
            case,
            pairs,
            repeat=number % REPEAT_EVERY == 0,
            delay=number % DELAY_EVERY == DELAY_EVERY // 2,
            fresh=number % FRESH_EVERY == FRESH_EVERY - 1,
        )
        for number, case in enumerate(given_cases)
    ]


@contextmanager
def waits_counted(counts: list[int]) -> Iterator[None]:
    """Append to ``counts`` how often the host waited for the device inside the block."""
    waited = 0

    def counting(original: object) -> object:
        def wait(*args: object, **kwargs: object) -> object:
            nonlocal waited
            waited += 1
            return original(*args, **kwargs)  # type: ignore[operator]

        return wait

    kept = torch.cuda.synchronize, torch.cuda.Stream.synchronize
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("warn")
            torch.cuda.synchronize, torch.cuda.Stream.synchronize = map(counting, kept)
        try:
            yield
        finally:
            if torch.cuda.is_available():
                torch.cuda.synchronize, torch.cuda.Stream.synchronize = kept
                torch.cuda.set_sync_debug_mode("default")
    counts.append(waited + sum("called a synchronizing" in str(it.message) for it in seen))


@contextmanager
def timed(totals: Totals) -> Iterator[None]:
    """Add to ``totals`` the seconds that each pair takes to be screened, or judged, inside the block."""

    def timing(original: object) -> object:
        def run(self: object, *args: object) -> object:
            implementation, executor = [it for it in args if hasattr(it, "name")][:2]
            started = time.perf_counter()
            try:
                return original(self, *args)  # type: ignore[operator]
            finally:
                totals[executor.name, implementation.name] += time.perf_counter() - started

        return run

    kept = screening.Screen.run, judge.Judge.judge
    screening.Screen.run, judge.Judge.judge = map(timing, kept)  # type: ignore[assignment]
    try:
        yield
    finally:
        screening.Screen.run, judge.Judge.judge = kept  # type: ignore[method-assign]


def own_seconds(case: Case, pair: Pair, device: str, repeat: bool) -> float:
    """What the calls of ``pair`` for ``case`` take on the host without the judgement; graphs are there already."""
    implementation, executor = pair
    it, rig = judge.Judge(case, device), rig_for(case.setup, device)
    served = it.applicable(implementation, executor)[1]
    if not served:
        return 0.0
    session = judge.open_session(rig, executor, implementation, it.keys(served), afresh=False).session
    values, writes, total = it.image(implementation).values, implementation.writes(case.setup), 0.0
    rig.reset()
    for number, replay in enumerate([*served, *served[-1:]] if repeat else served):
        if number < len(served):
            rig.load(case, replay, values[replay])
        inputs, steps = rig.inputs(*it.key(replay)), rig.steps(*it.key(replay), writes)
        started = time.perf_counter()
        if captures(executor):
            session.replay(*it.key(replay))
        else:
            implementation.refresh(inputs, steps, case.setup)
        total += time.perf_counter() - started
    return total


def judge_all(jobs: Sequence[Job], device: str) -> None:
    """Judge ``jobs`` a batch at a time; what does not agree is printed."""
    for at in range(0, len(jobs), AT_A_TIME):
        for _, _, verdict in judge_batch(jobs[at : at + AT_A_TIME], device):
            if verdict.outcome in (Outcome.DISAGREE, Outcome.UNKNOWN):
                print(verdict)


def table(name: str, groups: Sequence[Sequence[Case]], pairs: Sequence[Pair], device: str) -> None:
    """Judge ``groups`` of cases, and print what each pair cost."""
    judged: Totals = Counter()
    own: Totals = Counter()
    count, seconds = sum(map(len, groups)), 0.0
    waits: list[int] = []
    own_waits: list[int] = []
    for group in groups:
        jobs = jobs_of(group, pairs)
        with timed(judged):
            started = time.perf_counter()
            judge_all(jobs, device)
            seconds += time.perf_counter() - started
        for job in jobs:
            for pair in pairs:
                own[pair[1].name, pair[0].name] += own_seconds(job.case, pair, device, job.repeat)
        with waits_counted(waits):  # apart, for counting takes time; what was captured is there now
            judge_all(jobs, device)
        with waits_counted(own_waits):
            for job in jobs:
                for pair in pairs:
                    own_seconds(job.case, pair, device, job.repeat)
    inside, alone = sum(judged.values()), sum(own.values())
    print(f"{name}: {count} cases, {1e3 * seconds / count:.2f} ms a case, {count / seconds:.1f} cases a second")
    print(f"  {1e3 * (seconds - inside) / count:.2f} ms of it for the oracle, its images and the flags")
    print(f"  {1e3 * alone / count:.2f} ms for the calls and replays alone, without the judgement")
    print(f"  waits for the device a case: {sum(waits) / count:.2f}, in the calls alone {sum(own_waits) / count:.2f}")
    print(f"  {'ms a case':<50}{'judged':>9}{'alone':>9}{'harness':>9}")
    for key in sorted(judged):
        mine, bare = 1e3 * judged[key] / count, 1e3 * own[key] / count
        print(f"  {' '.join(key):<50}{mine:>9.3f}{bare:>9.3f}{mine - bare:>9.3f}")


def main() -> None:
    """Judge cases on the device that is here."""
    device = resolve("auto")
    single_thread()
    print(describe(device))
    pairs = [(it, executor) for executor in executors_for(device) for it in load(()).values()]
    groups = drawn_by_setup(2 * CASES[device])
    table("first cases of a setup", [group[: CASES[device]] for group in groups], pairs, device)
    table("later cases of a setup", [group[CASES[device] :] for group in groups], pairs, device)
    close_rigs()


if __name__ == "__main__":
    main()
