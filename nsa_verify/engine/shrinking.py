"""What a searcher does with what it saw: make its case smaller, see how often it disagrees, draw its buffers."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from msgspec import Struct

from nsa_verify.core.case import Case, Mode, size_of
from nsa_verify.core.findings import Code, Finding, Picture, Signature, Verdict, symptom_of
from nsa_verify.engine.drawing import shrink_round
from nsa_verify.engine.events import Reliability
from nsa_verify.engine.isolation import Inside, Keeper
from nsa_verify.engine.messages import Task
from nsa_verify.engine.plan import EAGER, Plan
from nsa_verify.engine.searcher import DEATHS, Seen, keeper_of, stopping
from nsa_verify.engine.simplifying import simplified
from nsa_verify.engine.transferring import transferred

RELIABILITY_RUNS = 5
SIMPLIFYING_PROBES = 200
"""How many cases are tried after Hypothesis's shrink."""
PICTURE_RUNS = 3
"""How often a case is run to have its buffers, if it does not disagree every time."""
SEQUENCE_PROBES = 60
"""How often a sequence of cases is run to make it shorter."""
UNSETTLED = (*DEATHS, Code.NOT_DETERMINISTIC)
"""What a single run does not tell."""


class ShrinkResult(Struct):
    """The smallest case of a signature.

    ``stable`` is False if probes contradicted each other, ``stopped`` says that the shrink was cut short.
    """

    case: Case
    finding: Finding
    probes: int
    stable: bool
    reliability: Reliability
    stopped: bool = False
    replaced: int = 0
    before: list[Case] = []
    """Cases to run first, for a death that does not come alone."""
    symptoms: list[str] = []
    """Everything that the case shows, in detail also which of that in other modes, ``Finding.symptom`` of each."""
    pictures: tuple[Picture, ...] = ()
    """Empty if the plan does not ask for them."""


def shrink(plan: Plan, index: int, seen: Seen, hints: Sequence[Case] = ()) -> ShrinkResult | None:
    """The smallest case found that shows what was ``seen``, starting from round ``index``, which showed it; for a death
    that does not come alone, the shortest sequence that ends in it.

    Only the accused implementation is run, each probe in a worker that is alive and well. None if the round, run again,
    did not show it. ``hints`` are minimal cases of what may be the same bug, under another executor or moved from
    another mode: the first that shows it here is the minimal case here.
    """
    if seen.before:
        return _shorten(plan, seen)
    keeper, signature = keeper_of(plan), seen.signature
    keeper.hello()
    pair, replaced, probes = (signature.implementation, signature.executor), keeper.replaced, 0
    # Whether it disagrees every time is asked of the minimal case alone; and of all, if that shows something else then.
    for rerun in (False, True) if signature.code not in UNSETTLED else (True,):
        tried = _Probes(plan, signature, rerun)
        tried.shrink(index, hints)
        probes += tried.count
        if not tried.shown or tried.stopped or rerun:
            break
        verdict = keeper.judge_whatever(tried.minimal[0], pair, False)
        if tried.is_it(verdict):
            tried.shown[:] = [(tried.minimal[0], verdict)]
            break
    if not tried.shown:
        return None
    case, verdict = tried.minimal
    finding = plan.named(verdict)
    assert finding is not None
    reliability = _reliability(plan, case, finding)
    drawn = pictures_of(plan, case, signature) if plan.pictures and not tried.stopped else ()
    symptoms = [it.symptom for it in plan.news(verdict)]
    if plan.detail and not tried.stopped:
        symptoms += _symptoms_elsewhere(plan, keeper, case, finding, symptoms)
    return ShrinkResult(
        case=case,
        finding=finding,
        probes=probes,
        stable=tried.stable,
        reliability=reliability,
        stopped=tried.stopped,
        replaced=keeper.replaced - replaced,
        symptoms=symptoms,
        pictures=drawn,
    )


class _Probes:
    """The cases tried to make one smaller that shows ``signature``; with ``rerun`` each that disagrees is run again."""

    def __init__(self, plan: Plan, signature: Signature, rerun: bool) -> None:
        self._plan, self._signature, self._rerun = plan, signature, rerun
        self.shown: list[tuple[Case, Verdict]] = []
        """The smallest that showed it so far by our measure, and the last."""
        self.count = 0
        self.stable, self.stopped = True, False

    @property
    def minimal(self) -> tuple[Case, Verdict]:
        """The last that showed it, which is what a person would have written; a shrink that was cut short, or went
        astray, ends anywhere, and gives the smallest."""
        return self.shown[-1] if self.stable and not self.stopped else self.shown[0]

    def shrink(self, index: int, hints: Sequence[Case]) -> None:
        """Start from round ``index``, unless one of ``hints`` shows it."""
        try:
            if not any(self.shows(hint) for hint in hints):
                self.stable = shrink_round(self._plan, keeper_of(self._plan).hello().device, index, self.shows)
                # What kills or hangs takes its time with every probe.
                if self.stable and self.shown and self._signature.code not in DEATHS:
                    simplified(self.shown[-1][0], self.shows, SIMPLIFYING_PROBES)
        except KeyboardInterrupt:
            self.stopped = True

    def shows(self, case: Case) -> bool:
        """Whether ``case`` shows it."""
        self.count += 1
        verdict = _verdict_of(keeper_of(self._plan), case, self._signature, self._rerun)
        if not self.is_it(verdict):
            return False
        smallest = self.shown[0] if self.shown and size_of(self.shown[0][0]) < size_of(case) else (case, verdict)
        self.shown[:] = [smallest, (case, verdict)]
        return True

    def is_it(self, verdict: Verdict) -> bool:
        """Whether it is about what is looked for."""
        return _is_about(self._plan, verdict, self._signature)


def _is_about(plan: Plan, verdict: Verdict, signature: Signature) -> bool:
    finding = plan.named(verdict)
    return finding is not None and finding.signature_in(plan.detail) == signature


def _symptoms_elsewhere(
    plan: Plan, keeper: Keeper | Inside, case: Case, finding: Finding, symptoms: Collection[str]
) -> list[str]:
    """Which of its ``symptoms``, that of ``finding`` among them, the ``case`` shows in other modes too; what else it
    shows there is another bug. A mode that cannot be captured is called eagerly, if that is how the ``case`` shows it
    as well, and if the plan has that executor."""
    name, is_deadly = finding.implementation, finding.code in DEATHS
    found: list[str] = []
    uncaptured: list[Case] = []
    for mode in Mode:
        for moved in transferred(case, finding.mode, mode) if mode is not finding.mode else ():
            if stopping():
                return found
            verdict = keeper.judge_whatever(moved, (name, finding.executor), is_deadly)
            found += _shown_of(verdict, finding.mode, symptoms)
            if not verdict.findings and mode not in verdict.modes:
                uncaptured.append(moved)
    if not uncaptured or finding.executor == EAGER or EAGER not in (*keeper.hello().executors, *plan.besides):
        return found
    known = {it.symptom for it in keeper.judge_whatever(case, (name, EAGER), is_deadly).findings} & {*symptoms}
    for moved in uncaptured if finding.symptom in known else ():
        if stopping():
            break
        found += _shown_of(keeper.judge_whatever(moved, (name, EAGER), is_deadly), finding.mode, known)
    return found


def _shown_of(verdict: Verdict, mode: Mode, symptoms: Collection[str]) -> list[str]:
    """What ``verdict`` shows, of what would be one of ``symptoms`` in ``mode``."""
    return [it.symptom for it in verdict.findings if symptom_of(it.code, mode, it.place) in symptoms]


def pictures_of(plan: Plan, case: Case, signature: Signature) -> tuple[Picture, ...]:
    """The buffers of the replay of ``case`` that shows ``signature``; none if it does not, or kills."""
    keeper, pair = keeper_of(plan), (signature.implementation, signature.executor)
    for _ in range(PICTURE_RUNS if signature.code not in DEATHS else 0):
        verdict = keeper.pictured(case, pair)
        if _is_about(plan, verdict, signature):
            return verdict.pictures
    return ()


def _shorten(plan: Plan, seen: Seen) -> ShrinkResult:
    """The fewest cases found that must be run before ``seen.case`` for its death to come again.

    The case itself stays as it was drawn. If the death does not come again at all, ``stable`` is False and every case
    before is kept.
    """
    keeper = keeper_of(plan)
    assert isinstance(keeper, Keeper)
    keeper.hello()
    pair = (seen.signature.implementation, seen.signature.executor)
    probes, replaced = 0, keeper.replaced

    def dies(before: Sequence[Case]) -> bool:
        nonlocal probes
        probes += 1
        return keeper.dies_of([Task(it, (pair,)) for it in (*before, seen.case)]) is seen.signature.code

    before, stable = seen.before, True
    try:
        stable = dies(before)
        size = len(before) // 2
        while stable and size and probes < SEQUENCE_PROBES and not stopping():
            for start in range(0, len(before), size):
                fewer = before[:start] + before[start + size :]
                if probes < SEQUENCE_PROBES and dies(fewer):
                    before = fewer
                    break
            else:
                size //= 2
        disagreed = sum(dies(before) for _ in range(RELIABILITY_RUNS)) if stable else 0
        reliability = Reliability(disagreed, RELIABILITY_RUNS if stable else 1)
        stable = disagreed > 0
    except KeyboardInterrupt:
        reliability = Reliability(0, 0)
    died = keeper.replaced - replaced
    return ShrinkResult(seen.case, seen.finding, probes, stable, reliability, stopping(), died, before)


def _verdict_of(keeper: Keeper | Inside, case: Case, signature: Signature, rerun: bool) -> Verdict:
    pair = (signature.implementation, signature.executor)
    verdict = keeper.judge_alone(case, pair, signature.code in DEATHS, rerun)
    if stopping() or verdict is None:
        raise KeyboardInterrupt
    return verdict


def _reliability(plan: Plan, case: Case, finding: Finding) -> Reliability:
    """How often the case disagrees, from a worker on in which nothing was run before; what is accepted does not count
    for what is not."""
    keeper, disagreed, pair = keeper_of(plan), 0, (finding.implementation, finding.executor)
    for run in range(RELIABILITY_RUNS):
        if run == 0 or keeper.hello().device == "cpu":  # a CUDA context takes seconds
            keeper.renew()
        found = plan.named(keeper.judge_whatever(case, pair, finding.code in DEATHS))
        if found is not None and plan.accepts(found) == plan.accepts(finding):
            disagreed += finding.code not in DEATHS or found.code is finding.code
    return Reliability(disagreed, RELIABILITY_RUNS)
