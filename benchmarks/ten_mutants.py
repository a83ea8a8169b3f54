"""A campaign over ten planted bugs: is each found, as one group with one case, and is all quiet once they are mended?

``python -P benchmarks/ten_mutants.py`` plants ten mutants of different kinds, runs ``nsa-verify fuzz`` on them over a
fresh corpus, plants correct copies in their places, runs ``corpus promote`` and then a second, short campaign. It says
a line for each step beside what the commands say. Exit code 0 if all is as it should be, 1 if something is not, 2 if a
command could not do its job. ``--max-time`` is that of the first campaign; ``--corpus DIR`` keeps the corpus.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from nsa_verify.engine.corpus import CorpusError, Kind, load, scan
from nsa_verify.mutants import CATALOGUE, Mutant, MutantError, Size

NAMES: Final = (
    "one-past-the-prefix-sum",
    "page-size-forgotten",
    "input-behind-the-batch-zeroed",
    "padding-left-out-of-the-sum",
    "host-lengths-assumed",
    "tail-never-runs-backwards",
    "tolist-in-verify",
    "repeats-of-v2",
    "rows-past-the-total-copied",
    "only-step-0",
)
MUTANTS: Final = tuple(CATALOGUE[name] for name in NAMES)
SECOND_TIME: Final = "60s"


class UnableError(Exception):
    """Something could not be done; the message is the sentence to show."""


def main() -> int:
    """Take the steps; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-time", default="10m")
    parser.add_argument("-w", "--workers", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--corpus", type=Path, help="a folder that is not there yet (a temporary one)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    asked = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory(prefix="nsa-verify-") as name:
            return _steps(Path(name), asked)
    except (UnableError, CorpusError, MutantError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _steps(folder: Path, asked: argparse.Namespace) -> int:
    corpus = asked.corpus or folder / "corpus"
    if corpus.exists():
        raise UnableError(f"--corpus {corpus}: is there already; name a folder that is not")
    where = ["-w", asked.workers, "--device", asked.device, "--corpus", str(corpus)]
    common = [*_planted(folder, changed=True), *where]
    fuzz = ["fuzz", "--seed", str(asked.seed), *common]

    code, told = _campaign(folder / "first.json", [*fuzz, "--max-time", asked.max_time])
    wrong = [*([] if code == 1 else [f"exit code {code} and not 1"]), *_of_groups(told, corpus)]
    found = _cases(corpus, Kind.CRASHING)
    good = _say(f"{told['cases']} cases, {len(told['findings'])} groups, {len(found)} files", wrong)

    _planted(folder, changed=False)
    code = _command(["corpus", "promote", *common])
    left, mended = _cases(corpus, Kind.CRASHING), _cases(corpus, Kind.REGRESSION)
    wrong = [] if code == 0 else [f"exit code {code} and not 0"]
    wrong += [f"{path.name} was not promoted" for path in left]
    good &= _say(f"correct copies: {len(mended)} of {len(found)} cases promoted", wrong)

    code, told = _campaign(folder / "second.json", [*fuzz, "--max-time", SECOND_TIME])
    fixed = [it for it in told["replayed"] if it["status"] == "FIXED"]
    wrong = [] if code == 0 else [f"exit code {code} and not 0"]
    wrong += [f"{it['path']} is {it['status']}" for it in told["replayed"] if it not in fixed]
    wrong += [_group(it) for it in told["findings"]]
    good &= _say(f"second campaign: {told['cases']} cases, {len(fixed)} saved cases agree", wrong)
    return int(not good)


def _planted(folder: Path, changed: bool) -> list[str]:
    """Plant all of them, and return the options that give them."""
    words = []
    for it in MUTANTS:
        words += ["--impl", str(it.plant(folder / "mine", changed)), "--only", it.copy_name]
    return words


def _command(words: Sequence[str]) -> int:
    """Run ``nsa-verify``, which says what it does; its exit code, if that is about what it found."""
    code = subprocess.run([sys.executable, "-P", "-m", "nsa_verify.shell", *words], check=False).returncode
    if code == 130:
        raise KeyboardInterrupt
    if code not in (0, 1):
        raise UnableError(f"nsa-verify {words[0]} ended with exit code {code}, see above")
    return code


def _campaign(report: Path, words: Sequence[str]) -> tuple[int, dict[str, Any]]:
    code = _command([*words, "--report", f"json={report}"])
    told: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    return code, told


def _cases(corpus: Path, kind: Kind) -> list[Path]:
    return list(scan(corpus / kind)) if (corpus / kind).is_dir() else []


def _of_groups(told: dict[str, Any], corpus: Path) -> Iterator[str]:
    """What is wrong with the groups of the first campaign and with their files."""
    groups = told["findings"]
    by_name = Counter(it["implementation"] for it in groups)
    for mutant in MUTANTS:
        if by_name[mutant.copy_name] != 1:
            yield f"{mutant.copy_name} has {by_name[mutant.copy_name]} groups"
    for it in groups:
        yield from _of_group(it, CATALOGUE.get(it["implementation"].removeprefix("mutant-")))
    files = Counter(str(path) for path in _cases(corpus, Kind.CRASHING))
    named = Counter(it["path"] for it in groups)
    yield from (f"{path} is the case of {named[path]} groups" for path in files | named if named[path] != files[path])


def _of_group(told: dict[str, Any], mutant: Mutant | None) -> Iterator[str]:
    if mutant is None or told["code"] not in mutant.codes:
        yield f"{_group(told)} is no sight of a mutant"
    entry = load(Path(told["path"]))
    if entry.provenance.attempts is None:
        yield f"{_group(told)} was not shrunk"
    elif mutant is not None and not Size.of(entry.case).fits(mutant.size):
        yield f"{_group(told)} has a case of {Size.of(entry.case)}, and {mutant.size} would do"


def _group(told: dict[str, Any]) -> str:
    return " ".join(filter(None, (told["implementation"], told["code"], told["mode"], told["place"])))


def _say(step: str, wrong: Sequence[str]) -> bool:
    """A line for a step; whether nothing is wrong."""
    print(f"{'WRONG' if wrong else 'ok'}: {'; '.join([step, *wrong])}", flush=True)
    return not wrong


if __name__ == "__main__":
    sys.exit(main())
