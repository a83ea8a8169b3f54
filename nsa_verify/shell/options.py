"""Options that several commands share, spelt and explained once."""

from __future__ import annotations

import shlex
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import Any, Final, TypeVar

import click
from click.core import ParameterSource

from nsa_verify.core.case import Mode
from nsa_verify.core.sanitizers import Sanitizer
from nsa_verify.engine.exchange import shown
from nsa_verify.shell import gpus

F = TypeVar("F", bound=Callable[..., Any])


class ExitCode(IntEnum):
    """What the process says when it ends."""

    AGREE = 0
    DISAGREE = 1
    UNABLE = 2
    """Could not do its job; having tested nothing counts."""
    INTERRUPTED = 130


class Unable(click.ClickException):
    """Ends the command with one sentence and exit code 2."""

    exit_code = ExitCode.UNABLE


def command_line() -> str:
    """The command as it was given, but for what is secret in a URL."""
    return shlex.join(["nsa-verify", *map(shown, sys.argv[1:])])


class Group(click.Group):
    """The program: whatever stops it is one sentence on standard error and a documented exit code."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """As click's."""
        with _sentences():
            return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        """As click's."""
        with _sentences():
            return super().invoke(ctx)


@contextmanager
def _sentences() -> Iterator[None]:
    try:
        yield
    except click.exceptions.NoArgsIsHelpError:
        raise
    except click.UsageError as error:
        # With a context click prints the usage and a hint as well; the sentence alone is easier to find.
        hint = f" (see {error.ctx.command_path} --help)" if error.ctx is not None else ""
        raise Unable(error.format_message().rstrip(".") + hint) from error
    except KeyboardInterrupt:
        click.echo("interrupted", err=True)
        raise SystemExit(ExitCode.INTERRUPTED) from None
    except (click.ClickException, click.exceptions.Exit, click.Abort):
        raise
    except Exception as error:
        # Python's own exit code for an exception is 1, which says here that an implementation disagrees.
        traceback.print_exc()
        raise Unable(f"nsa-verify itself failed ({type(error).__name__}); please report the lines above") from error


IMPL = click.option(
    "--impl",
    "references",
    multiple=True,
    metavar="FILE|MODULE[:NAME]",
    help="An implementation of your own beside the built-in ones; may be repeated.",
)
ONLY = click.option("--only", multiple=True, metavar="NAME", help="Run this implementation only; may be repeated.")


def not_empty(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """Refuse ``--option ""``, which an unset variable of a shell becomes, and which would pass for no option at all."""
    if value == "" and context.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE:
        raise click.BadParameter("is empty; leave it out, or give it a value", param=parameter)
    return value


def _modes(_: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> tuple[Mode, ...]:
    """Modes however they are spelt: ``draft-extend``, ``DRAFT_EXTEND``."""
    try:
        return tuple(Mode(value.lower().replace("_", "-")) for value in values)
    except ValueError as error:
        raise click.BadParameter(f"{error}; there are {', '.join(Mode)}", param=parameter) from error


MODE = click.option(
    "--mode",
    "modes",
    multiple=True,
    callback=_modes,
    metavar="MODE",
    help=f"Draw this mode only ({', '.join(Mode)}); may be repeated.",
)
EXECUTORS: Final = ("eager", "graph", "simulated-graph")
"""The names of ``nsa_verify.device.executors``, for those who must not import torch."""
EXECUTOR = click.option(
    "--executor",
    "executors",
    multiple=True,
    type=click.Choice(EXECUTORS),
    help="How implementations are driven: called (eager), or captured in a CUDA graph and replayed (graph on CUDA, "
    "simulated-graph on the CPU); may be repeated. [default: all that the device has]",
)
SEEDS: Final = click.IntRange(0, 2**64 - 1)
"""What ``--seed`` may be: plans travel between processes, and tensors are drawn, with 64 bits."""
DEVICE = click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    envvar="NSA_VERIFY_DEVICE",
    help="Where to run; auto takes CUDA if there is any. [default: auto]",
)
WORKERS = click.option(
    "-w",
    "--workers",
    default="auto",
    metavar="N|auto",
    help="Worker processes; auto is one per core on the CPU, and on CUDA as many as cores and free memory of the GPUs "
    "allow. [default: auto]",
)
ENGINE = click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    help="Where workers are: on this machine, or on the nodes of a Ray cluster (nsa-verify[ray]). [default: local]",
)
RAY_ADDRESS = click.option(
    "--ray-address",
    default="",
    callback=not_empty,
    metavar="HOST:PORT",
    help="The Ray cluster; auto is the one that runs on this machine, local one for this run alone."
    " [default: RAY_ADDRESS, else auto]",
)
SANITIZER = click.option(
    "--sanitizer",
    type=click.Choice([it.value for it in Sanitizer]),
    help="Look at memory and not at values: memcheck, initcheck, racecheck or synccheck of compute-sanitizer on CUDA;"
    " oob looks, by means of triton-viz, at the address of every load and store on the CPU. Implementations are called"
    " (--executor eager).",
)
CORPUS = click.option(
    "--corpus",
    default="corpus",
    envvar="NSA_VERIFY_CORPUS",
    callback=not_empty,
    metavar="DIR",
    help="The folder of saved cases. [default: corpus]",
)
JSON = click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output instead of text.")
REPORT = click.option(
    "--report",
    "reports",
    multiple=True,
    metavar="KIND[=PATH]",
    help="Write a report: junit, ndjson, json, github, html or observability; may be repeated.",
)
NO_COLOR = click.option("--no-color", is_flag=True, help="No colour, also on a terminal.")
NO_ISOLATION = click.option(
    "--no-isolation",
    is_flag=True,
    help="Run implementations in this very process (for a debugger): a crash or a hang takes it down.",
)
DEADLINE = click.option(
    "--deadline",
    default="0",
    metavar="TIME",
    help="How long a call may be silent before it counts as hung (NV402). [default: adapts to what calls take]",
)
MAX_MEMORY = click.option(
    "--max-memory",
    default="0",
    metavar="SIZE",
    help="How much host memory an implementation may take, such as 900M or 4G, before its worker is ended (NV401)."
    " [default: a worker's share of half of what is free]",
)


def seconds(option: str, text: str) -> float:
    """``90``, ``90s``, ``15m`` or ``6h`` in seconds. Raises ``Unable`` for anything else, naming ``option``."""
    value = _scaled(text, {"s": 1.0, "m": 60.0, "h": 3600.0})
    if not 0 <= value < 1e9:
        raise Unable(f"{option} {text}: must be a time such as 90, 90s, 15m or 6h")
    return value


def size(option: str, text: str) -> int:
    """``900M``, ``4G`` or a number of bytes, in bytes. Raises ``Unable`` for anything else, naming ``option``."""
    value = _scaled(text, {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30})
    if not 0 <= value < 1 << 60:
        raise Unable(f"{option} {text}: must be a size such as 900M or 4G")
    return int(value)


def _scaled(text: str, units: dict[str, float]) -> float:
    number, unit = (text[:-1], units[text[-1]]) if text[-1:] in units else (text, 1.0)
    try:
        return float(number) * unit
    except ValueError:
        return -1.0


def together(*options: Callable[[F], F]) -> Callable[[F], F]:
    """One decorator of several options, in this order."""

    def decorate(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def worker_count(text: str, device: str, no_isolation: bool, most: int) -> int:
    """How many workers ``--workers`` means; never more than ``most``, the number of pieces of work.

    On the CPU ``auto`` is one per core, on CUDA ``gpus.worker_budget``; which of them it will be is asked of the driver
    library, so that no CUDA context is created. Raises ``Unable`` for what is neither a number nor ``auto``.
    """
    if no_isolation:
        return 1
    try:
        wanted = gpus.workers_wanted(text)
    except ValueError as error:
        raise Unable(f"--workers {text}: {error}") from error
    if wanted is None:
        found = gpus.gpus_for(device)
        wanted = gpus.worker_budget(found) if found else gpus.cores()
    return max(1, min(wanted, most))
