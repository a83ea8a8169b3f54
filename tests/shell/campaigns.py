"""The events of a campaign, made by hand: what reports are told when nothing is run."""

from __future__ import annotations

from pathlib import Path

from msgspec.structs import replace

from nsa_verify.core.case import Case, Mode, Replay, Request, Setup
from nsa_verify.core.findings import Code, Finding, Picture, Signature, Square
from nsa_verify.core.labels import Coverage
from nsa_verify.engine.events import (
    CampaignFinished,
    CampaignStarted,
    CaseReplayed,
    Cell,
    CheckFailed,
    Disagreement,
    DisagreementSeen,
    Event,
    Group,
    Matrix,
    Observed,
    Recovered,
    Reliability,
    RoundFinished,
    RunFinished,
    RunStarted,
    Shrinking,
    SliceFinished,
    SliceStarted,
    StopReason,
    Subject,
    Tally,
    WorkersReady,
)

CASE = Case(Setup(table_width=8, pool_width=8), (Replay(requests=(Request(seq_len=8),)),))
ROOT = Path("corpus")
POISON = -(2**31) + 1


def finding(implementation: str = "mine", code: Code = Code.WRONG_VALUE, mode: Mode = Mode.DECODE) -> Finding:
    """A wrong length."""
    return Finding(
        implementation=implementation,
        executor="eager",
        code=code,
        replay=0,
        mode=mode,
        step=0,
        buffer="nsa_cache_seqlens",
        element=(0,),
        region="live",
        expected=8,
        got=7,
        message="nsa_cache_seqlens[0]: expected 8, got 7",
    )


def picture(buffer: str = "nsa_cache_seqlens", rows: int = 1, columns: int = 6) -> Picture:
    """A buffer with a cell of every region, and in each row a wrong one and one that is wrong and poison."""
    row = [
        Square("live", 8, 7, 0, differs=True),
        Square("live", 9, POISON, POISON, differs=True),
        Square("slack", 3, 3, 3),
        Square("frame", 4, 4, 4),
        Square("input", 5, 5, 5),
    ]
    row += [Square("live", 1000 + it, 1000 + it, 0) for it in range(columns - len(row))]
    row.append(Square("guard", POISON, POISON, POISON))
    return Picture(
        buffer=buffer,
        kind="buffer",
        step=0,
        owner="",
        aliases=(),
        rows=rows,
        columns=columns,
        wrong=2 * rows,
        squares=(tuple(row),) * rows,
    )


def disagreement(told: Finding, case: Case = CASE, **more: object) -> Disagreement:
    """A shrunk one, saved under its code."""
    signature = Signature(told.implementation, told.executor, told.code)
    found = Disagreement(signature, case, told, Reliability(5, 5), shrunk=True, probes=9, path=path_of(told))
    return replace(found, **more)


def path_of(told: Finding) -> Path:
    """Where it is saved."""
    return ROOT / "crashing" / told.mode / f"{told.code}-{told.implementation}.json"


def group(told: Finding, case: Case = CASE, **more: object) -> Group:
    """What a campaign says of it in the end."""
    made = Group(
        implementation=told.implementation,
        code=told.code,
        mode=told.mode,
        place=told.place,
        path=path_of(told),
        case=case,
        finding=told,
        executors=(told.executor, "graph"),
        modes=(told.mode,),
        first_seen="2030-01-02T03:04:05+00:00",
        last_seen="2030-02-03T04:05:06+00:00",
        seen=7,
        reliability=Reliability(4, 5),
    )
    return replace(made, **more)


def run_events(seed: int = 7, cases: int = 20) -> list[Event]:
    """A search of two rounds that finds one thing, and on one case a check that fails."""
    told, matrix = finding(), Matrix()
    matrix.cell("mine", "eager", Mode.DECODE).add(Cell(cases=cases, disagree=2))
    matrix.cell("mine", "graph", Mode.DECODE).add(Cell(not_applicable=cases, reasons={"not | capturable": cases}))
    matrix.cell("good", "eager", Mode.DECODE).add(Cell(cases=cases))
    matrix.cell("good", "graph", Mode.DECODE).add(Cell(cases=cases, unknown=1))
    coverage = Coverage()
    coverage.count(CASE)
    signature = Signature("mine", "eager", told.code)
    observed = (Observed(CASE, (signature,), (), 2), Observed(CASE, (), ("it failed",), 2), Observed(CASE))
    rounds: list[Event] = [
        RoundFinished(it, cases // 2, (it + 1) * cases // 2, "d", {"drawing": 1.0, "worker: judging": 3.0}, observed)
        for it in range(2)
    ]
    subjects = tuple(Subject(name, f"{name}.py", "full", (Mode.DECODE,)) for name in ("good", "mine"))
    return [
        RunStarted(seed, {"cases": str(cases)}, "a device", "1.0", subjects, ("eager", "graph"), cases, 2),
        WorkersReady(0.5),
        Recovered((Path("corpus/crashing/old.json"),), 1, 0, (), ()),
        *rounds,
        DisagreementSeen(signature, told, 3),
        CheckFailed("good", "graph", "the check itself failed: it is <wrong>", CASE),
        Shrinking(signature),
        disagreement(told, pictures=(picture(), picture("page_table_1", 3, 30))),
        RunFinished(matrix, Tally(), cases, 4.0, StopReason.EXAMPLES, (signature,), "dd", coverage=coverage),
    ]


def campaign_events(*groups: Group) -> list[Event]:
    """Two searches; in the end there is one new group, and those that are given."""
    inner = run_events()
    ended = inner[-1]
    assert isinstance(ended, RunFinished)
    matrix = Matrix()
    matrix.add(ended.matrix)
    matrix.add(ended.matrix)
    events: list[Event] = [
        CampaignStarted("1.0", "nsa-verify fuzz", "batch", 5, 60.0, 2, ROOT, 3, {"python": "3.11"}),
        CaseReplayed(ROOT / "regression" / "good.json", "FIXED", "stays good"),
        CaseReplayed(ROOT / "regression" / "bad.json", "FAILED", "was mended once"),
        CaseReplayed(ROOT / "regression" / "odd.json", "ERROR", problem="it cannot be read"),
    ]
    for number in (3, 4):
        events += [SliceStarted(number, 30.0, tuple(Mode), ("good", "mine"), ("eager", "graph")), *inner]
        cases = 20 * (number - 2)
        events.append(SliceFinished(number, 20, 5, cases, 4.0 * (number - 2), 1, 200, 3687, 0))
    finished = CampaignFinished(
        stop=StopReason.TIME,
        cases=40,
        seconds=10.0,
        matrix=matrix,
        tally=Tally(),
        groups=(group(finding()), *groups),
        coverage=ended.coverage,
        replaced=1,
        exit_code=1,
        failing=(CaseReplayed(ROOT / "regression" / "bad.json", "FAILED", "was mended once"),),
        expired=("mine NV102 (later; 2020-01-01)",),
        unmatched=("gone (never)",),
        rates=((2.0, 10), (5.0, 20), (7.0, 35), (10.0, 40)),
    )
    return [*events, finished]
