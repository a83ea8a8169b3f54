"""How a campaign shares its time."""

from __future__ import annotations

from collections import Counter

from nsa_verify import Code, Mode
from nsa_verify.core.findings import Signature
from nsa_verify.engine.sharing import ALL_EVERY, PAIRS_OF_A_FINDING, Choice, Shares, choose

MODES, NAMES, EXECUTORS = tuple(Mode), ("a", "b", "c", "d", "e"), ("eager", "graph")


HAS = dict.fromkeys(NAMES, MODES)


def chosen(shares: Shares, slices: int, seed: int = 0) -> list[Choice]:
    """What the slices are over that do not have everything."""
    numbers = (number for number in range(slices) if number % ALL_EVERY)
    return [choose(shares, number, seed, MODES, NAMES, EXECUTORS, HAS) for number in numbers]


def test_the_first_slice_and_every_third_have_everything() -> None:
    for number in (0, ALL_EVERY, 7 * ALL_EVERY):
        assert choose(Shares(), number, 1, MODES, NAMES, EXECUTORS, HAS) == Choice(MODES, (), EXECUTORS)


def test_before_anything_ran_there_are_no_names_to_choose_from() -> None:
    assert choose(Shares(), 1, 1, MODES, (), EXECUTORS, {}) == Choice(MODES, (), EXECUTORS)


def test_modes_that_nobody_has_get_no_time() -> None:
    has = {"a": (Mode.DECODE,), "b": (Mode.DECODE, Mode.TARGET_VERIFY)}
    choices = [choose(Shares(), number, 1, MODES, ("a", "b"), EXECUTORS, has) for number in range(60)]
    assert {choice.modes for choice in choices if not choice.implementations} == {(Mode.DECODE, Mode.TARGET_VERIFY)}
    assert {choice.modes for choice in choices if choice.implementations == ("a",)} == {(Mode.DECODE,)}
    alone = choose(Shares(), 1, 1, (Mode.TARGET_VERIFY,), ("a",), EXECUTORS, has)
    assert alone.modes == (Mode.TARGET_VERIFY,)  # what was asked for is told to be not applicable


def test_the_others_have_half_of_it_in_order() -> None:
    for choice in chosen(Shares(), 60):
        assert len(choice.modes) == 2
        assert len(choice.implementations) == 3
        assert list(choice.modes) == [mode for mode in MODES if mode in choice.modes]
        assert list(choice.implementations) == sorted(choice.implementations)
        assert choice.executors in (EXECUTORS, ("eager",), ("graph",))


def test_one_in_four_has_a_single_executor() -> None:
    single = sum(len(choice.executors) == 1 for choice in chosen(Shares(), 600))
    assert 60 < single < 140


def test_it_is_a_function_of_its_arguments_and_differs_from_slice_to_slice() -> None:
    assert chosen(Shares(), 30, seed=4) == chosen(Shares(), 30, seed=4)
    assert chosen(Shares(), 30, seed=4) != chosen(Shares(), 30, seed=5)
    assert len(set(chosen(Shares(), 60))) > 10


def test_what_is_behind_gets_more() -> None:
    shares = Shares()
    for name in NAMES:
        shares.count("implementations", name, cases=10 if name == "b" else 1000, news=0.0)
    times = Counter(name for choice in chosen(shares, 300) for name in choice.implementations)
    assert times["b"] > 0.9 * 200
    assert all(times[name] > 60 for name in NAMES)


def test_what_finds_new_things_gets_more_for_a_while() -> None:
    shares = Shares()
    for name in NAMES:
        shares.count("implementations", name, cases=100, news=20.0 if name == "d" else 0.0)
    assert sum("d" in choice.implementations for choice in chosen(shares, 300)) > 180
    for _ in range(40):
        for name in NAMES:
            shares.count("implementations", name, cases=100, news=0.0)
    assert 90 < sum("d" in choice.implementations for choice in chosen(shares, 300)) < 150


def test_news_are_of_the_mode_the_executor_and_the_implementation_that_showed_them() -> None:
    shares = Shares()
    found = [Signature("b", "graph", Code.STALE, "x inside", mode) for mode in (Mode.DECODE, Mode.TARGET_VERIFY)]
    pairs = [(f"mode:{Mode.DECODE}", f"rows:{it}") for it in range(PAIRS_OF_A_FINDING)] + [("rows:1", "steps:1")]
    shares.count_in(Choice(MODES, NAMES, EXECUTORS), 100, pairs, found)
    assert {name: it.news for name, it in shares.modes.items()} == {
        Mode.DECODE: 2.0,
        Mode.TARGET_VERIFY: 1.0,
        Mode.DRAFT_EXTEND: 0.0,
        Mode.DRAFT_EXTEND_V2: 0.0,
    }
    assert {name: it.news for name, it in shares.executors.items()} == {"eager": 0.0, "graph": 1.0}
    assert {name: it.news for name, it in shares.implementations.items()} == {**dict.fromkeys(NAMES, 0.0), "b": 1.0}
    assert {it.cases for kind in (shares.modes, shares.implementations, shares.executors) for it in kind.values()} == {
        100
    }
