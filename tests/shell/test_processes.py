"""``nsa-verify`` as a process: Ctrl-C, workers that die, terminals and pipes."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from shell.commands import PROGRAM, invoke, saved, written

from nsa_verify import Mode
from nsa_verify.engine.corpus import load, scan
from nsa_verify.engine.events import Cell, Matrix, Subject
from nsa_verify.shell.render import matrix_rows
from nsa_verify.shell.reporter import print_matrix

PROMPT_S = 10.0
"""At most this long after Ctrl-C, also on a machine that is busy; an idle one takes less than 3 seconds."""
EAGER = ("--executor", "eager")
SHORT = ("run", "--impl", "mine.py", "--only", "short-top-k", "--only", "vectorized", "--seed", "7", *EAGER)
LONG = (*SHORT, "-n", "5000")

DEADLY = """
import os
from nsa_verify import implementation
from nsa_verify.kernels.vectorized import refresh as right

calls = 0

@implementation("deadly", modes=["decode"], extent="full")
def refresh(inputs, steps, setup):
    global calls
    calls += 1
    if calls > 60:
        os._exit(11)
    right(inputs, steps, setup)
    steps[0].cache_seqlens.add_(1)
"""


class Running:
    """A command in a process group of its own, so that it hears Ctrl-C together with its workers."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [PROGRAM, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        self.said = ""

    def until(self, start: str) -> None:
        """Read lines until one begins with ``start``."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said += line
            if line.startswith(start):
                return
        pytest.fail(f"it ended before it said {start!r}: {self.said} {self.process.communicate()[1]}")

    def interrupt(self) -> tuple[int, str, str, float]:
        """Press Ctrl-C; exit code, all that was said, standard error, and how long it took."""
        began = time.monotonic()
        os.killpg(self.process.pid, signal.SIGINT)
        rest, errors = self.process.communicate(timeout=60)
        return self.process.returncode, self.said + rest, errors, time.monotonic() - began

    def survivors(self) -> list[int]:
        """The processes of the session that are still there after a moment; the unburied do not count."""
        for _ in range(40):
            found = []
            for stat in Path("/proc").glob("[0-9]*/stat"):
                try:
                    state, _, _, group = stat.read_text().rpartition(")")[2].split()[:4]
                except OSError:  # it ended between the two looks
                    continue
                if int(group) == self.process.pid and state != "Z":
                    found.append(int(stat.parent.name))
            if not found:
                return []
            time.sleep(0.05)
        return found

    def close(self) -> None:
        """Leave nothing behind."""
        for survivor in self.survivors():
            os.kill(survivor, signal.SIGKILL)
        self.process.communicate()


@pytest.fixture(name="start")
def _start(folder: Path) -> Iterator[type[Running]]:
    started: list[Running] = []

    class Started(Running):
        def __init__(self, *arguments: str) -> None:
            super().__init__(*arguments)
            started.append(self)

    yield Started
    for running in started:
        running.close()


def _check_interrupted(running: Running, ended: tuple[int, str, str, float]) -> None:
    code, said, errors, seconds = ended
    assert (code, errors) == (130, "")
    assert "Traceback" not in said
    assert re.search(r"^\d+ cases? in .*, interrupted; digest ", said, flags=re.MULTILINE)
    assert re.search(r"^short-top-k +decode +.*\d+ DISAGREE", said, flags=re.MULTILINE)
    assert seconds < PROMPT_S
    assert not running.survivors()
    (entry,) = [load(path) for path in scan(Path("corpus"))]
    assert entry.finding is not None
    assert entry.finding.implementation == "short-top-k"


@pytest.mark.parametrize("workers", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_ctrl_c_while_cases_are_drawn(folder: Path, start: type[Running], workers: str) -> None:
    written(folder)
    running = start(*LONG, "-w", workers)
    running.until("seen short-top-k [eager] NV101")
    ended = running.interrupt()
    _check_interrupted(running, ended)
    assert "  case as it was drawn; interrupted before it was shrunk\n" in ended[1]


def test_ctrl_c_while_a_case_is_shrunk(folder: Path, start: type[Running]) -> None:
    mine, calls = written(folder), folder / "calls"
    slow = mine.read_text().replace("import torch", "import time, torch")
    told = "    time.sleep(0.01)\n    open('calls', 'a').write('.')\n"
    mine.write_text(slow.replace("    for step", f"{told}    for step"))
    running = start(*SHORT, "--mode", "decode", "-n", "11", "-w", "2")
    running.until("shrinking short-top-k [eager] NV101")
    before, deadline = calls.stat().st_size, time.monotonic() + 60
    while calls.stat().st_size < before + 10:
        assert time.monotonic() < deadline, "nothing is probed"
        time.sleep(0.01)
    ended = running.interrupt()
    _check_interrupted(running, ended)
    assert "; the shrink was interrupted\n" in ended[1]


@pytest.mark.slow
def test_a_death_that_needs_the_cases_before_it(folder: Path) -> None:
    """It is kept with them, and they make it come again."""
    (folder / "deadly.py").write_text(DEADLY)
    only = ("--impl", "deadly.py", "--only", "deadly", *EAGER)
    done = invoke("run", *only, "--mode", "decode", "-n", 40, "--seed", 7, "-w", 2)
    assert done.exit_code == 1
    assert "the worker" not in done.stderr
    (path,) = (it for it in scan(folder / "corpus") if it.name.startswith("nv401"))
    entry = load(path)
    assert entry.finding is not None
    assert "exit code 11; not again when the case was run alone" in entry.finding.message
    assert 0 < len(entry.before) < 40
    replayed = invoke("replay", path, *only)
    assert (replayed.exit_code, "NV401" in replayed.stdout) == (1, True), replayed.output


def test_the_number_of_workers_changes_nothing(folder: Path) -> None:
    written(folder)
    run = ("run", "--impl", "mine.py", "--only", "short-top-k", "--seed", "7", "-n", 20, "--json")
    one, two = (json.loads(invoke(*run, "-w", workers).stdout) for workers in (1, 2))
    assert (one["options"].pop("workers"), two["options"].pop("workers")) == ("1", "2")
    for told in (one, two):
        for measured in ("seconds", "cases_per_s", "workers"):
            del told[measured]
    assert len(one["findings"]) == 2
    assert one == two


def _on_a_terminal(*arguments: str, columns: int = 80) -> tuple[int, str]:
    """Exit code and output of a command whose standard streams are a terminal."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": str(columns)}
    for name in ("NO_COLOR", "FORCE_COLOR", "CI"):
        environment.pop(name, None)
    process = subprocess.Popen([PROGRAM, *arguments], stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    said = b""
    while True:
        try:
            read = os.read(ours, 65536)
        except OSError:  # what Linux says when the other side of a terminal is closed
            break
        if not read:
            break
        said += read
    os.close(ours)
    return process.wait(), said.decode().replace("\r\n", "\n")


def test_a_terminal_gets_colour_and_a_pipe_gets_none(folder: Path) -> None:
    name = "sho[red]rt[/]"
    written(folder, name=name)
    only = ("--only", name, "--only", "vectorized", *EAGER)
    code, said = _on_a_terminal("run", "--impl", "mine.py", *only, "-n", "20", "--seed", "7", "-w", "1")
    assert code == 1
    assert f"\x1b[1;31m{name} [eager] NV101 wrong value in the live region\x1b[0m\n" in said
    assert "20/20" in said
    assert said.rindex("\x1b[?25h") > said.rindex("\x1b[?25l"), "the cursor was left hidden"
    matrix = said[said.rindex("implementation") :]
    assert re.search(rf"^{re.escape(name)} +decode +\x1b\[31m\d+ ", matrix, flags=re.MULTILINE), matrix
    assert f"n/a  {name}  mode not declared (" in matrix


def test_what_is_not_captured_is_dim_on_a_terminal() -> None:
    matrix, loop = Matrix(), Subject("python-loop", "here", "full", (Mode.DECODE,))
    matrix.cell("python-loop", "eager", Mode.DECODE).add(Cell(cases=5))
    matrix.cell("python-loop", "graph", Mode.DECODE).add(Cell(not_applicable=5, not_capturable=5))
    said = StringIO()
    out = Console(file=said, force_terminal=True, color_system="standard", width=80)
    print_matrix(out, matrix_rows(matrix, [loop], ("eager", "graph"), (Mode.DECODE,)))
    assert re.search(r"^python-loop +decode +5 agree +\x1b\[2mnot capturable", said.getvalue(), flags=re.MULTILINE)


def test_no_color_is_obeyed_on_a_terminal(folder: Path) -> None:
    saved(folder)
    code, said = _on_a_terminal("corpus", "list", "--no-color")
    assert code == 0
    assert "\x1b" not in said
    assert said.endswith("1 case\n")


def test_a_reader_that_goes_away_changes_no_exit_code(folder: Path) -> None:
    for number in range(40):
        saved(folder, 8 + number)
    process = subprocess.Popen(
        [PROGRAM, "corpus", "list"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert (process.wait(), errors) == (0, b"")
