"""Options that several commands share, spelt and explained once."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import Any, Final, TypeVar

import click

from nsa_verify.core.case import Mode

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
    help="Worker processes; auto is one per core on the CPU, and one on CUDA. [default: auto]",
)
CORPUS = click.option(
    "--corpus",
    default="corpus",
    envvar="NSA_VERIFY_CORPUS",
    metavar="DIR",
    help="The folder of saved cases. [default: corpus]",
)
JSON = click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output instead of text.")
NO_COLOR = click.option("--no-color", is_flag=True, help="No colour, also on a terminal.")
NO_ISOLATION = click.option(
    "--no-isolation", is_flag=True, help="Run everything in this process (for a debugger); same as --workers 1."
)


def together(*options: Callable[[F], F]) -> Callable[[F], F]:
    """One decorator of several options, in this order."""

    def decorate(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def worker_count(text: str, device: str, no_isolation: bool, most: int) -> int:
    """How many workers ``--workers`` means; never more than ``most``, the number of pieces of work."""
    if no_isolation:
        return 1
    if text == "auto":
        return max(1, min(len(os.sched_getaffinity(0)), most)) if not _has_cuda(device) else 1
    if not text.isdigit() or not 1 <= int(text) <= 256:
        raise Unable(f"--workers {text}: must be a number from 1 to 256, or auto")
    return max(1, min(int(text), most))


def _has_cuda(device: str) -> bool:
    """Whether the run will be on CUDA; asked of the driver library, so that no context is created."""
    if device == "cpu":
        return False
    import pynvml

    try:
        pynvml.nvmlInit()
        return bool(pynvml.nvmlDeviceGetCount() > 0)
    except pynvml.NVMLError:
        return False
