"""Where implementations come from: the built-in ones, files and modules given by the user, entry points.

Nothing about the built-in ones is special: they register with the same decorator.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterable
from importlib.machinery import ModuleSpec
from importlib.metadata import entry_points
from pathlib import Path
from typing import Final, TypeVar

from nsa_verify.core.implementation import Implementation, Refresh, registered

T = TypeVar("T")

ENTRY_POINT_GROUP: Final = "nsa_verify.implementations"


class ImplementationError(Exception):
    """An implementation cannot be had; the message is one sentence that names it and the remedy."""


def load(references: Iterable[str] = ()) -> dict[str, Implementation]:
    """Every implementation of this process by name: built in, from entry points, and from ``references``.

    A reference is the path of a Python file, or ``module`` or ``module:name``. Raises ``ImplementationError`` for a
    reference that is missing, raises on import, or registers nothing.
    """
    load_builtin()
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        _import(f"entry point {entry.name!r}", entry.load)
    for reference in references:
        load_reference(reference)
    return _in_order(registered())


def _in_order(known: dict[str, Implementation]) -> dict[str, Implementation]:
    """The built-in ones first and in their own order, whichever of their modules was imported first."""
    modules = importlib.import_module("nsa_verify.kernels").BUILTIN_MODULES
    places = {module: place for place, module in enumerate(modules)}
    ranked = sorted(known.items(), key=lambda item: places.get(_module_of(item[1]), len(places)))
    return dict(ranked)


def _module_of(implementation: Implementation) -> str:
    return str(getattr(implementation.refresh, "__module__", ""))


def find(wanted: Refresh | str) -> Implementation:
    """The implementation of a name, or of a decorated function. Raises ``ImplementationError`` if there is none."""
    known = registered()
    if isinstance(wanted, str):
        known = known if wanted in known else load()
        if wanted not in known:
            raise ImplementationError(f"{wanted}: no such implementation; there are {', '.join(sorted(known))}")
        return known[wanted]
    for it in known.values():
        if it.refresh is wanted:
            return it
    raise ImplementationError(f"{wanted!r} is no implementation; decorate it with @nsa_verify.implementation(name)")


def load_builtin() -> None:
    """Import the modules of ``nsa_verify.kernels``, which register themselves."""
    kernels = importlib.import_module("nsa_verify.kernels")
    for module in kernels.BUILTIN_MODULES:
        importlib.import_module(module)


def load_reference(reference: str) -> tuple[str, ...]:
    """Import what ``--impl`` names and return the names of the implementations it registered."""
    before = registered()
    module, _, name = reference.partition(":")
    if module.endswith(".py") or "/" in reference or Path(reference).is_file():
        origin = _import_file(reference)
    else:
        origin = module
        if not module or _import(reference, lambda: _find_spec(module)) is None:
            raise ImplementationError(
                f"--impl {reference}: there is no module {module!r}; give a file or an importable module"
            )
        loaded = _import(reference, lambda: importlib.import_module(module))
        origin = str(getattr(loaded, "__file__", module))
    new = tuple(found for found in registered() if found not in before)
    known = new or tuple(it.name for it in registered().values() if it.source.rpartition(":")[0] == origin)
    if not known:
        raise ImplementationError(
            f"--impl {reference}: registers no implementation; decorate its refresh function with"
            ' @nsa_verify.implementation("name")'
        )
    if name and name not in known and not hasattr(sys.modules.get(module), name):
        raise ImplementationError(f"--impl {reference}: {module} registers {', '.join(known)}, not {name!r}")
    return known


def _find_spec(module: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(module)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module}.".startswith(f"{error.name}."):
            return None
        raise


def _import_file(reference: str) -> str:
    path = Path(reference)
    if path.is_dir():
        raise ImplementationError(f"--impl {reference}: is a folder; give the Python file in it")
    if not path.is_file():
        raise ImplementationError(f"--impl {reference}: there is no such file")
    path = path.resolve()
    name = f"nsa_verify_impl_{path.stem}_{abs(hash(str(path))):x}"
    if name in sys.modules:
        return str(path)
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImplementationError(f"--impl {reference}: not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    loader = spec.loader
    try:
        _import(reference, lambda: loader.exec_module(module), str(path))
    except ImplementationError:
        del sys.modules[name]
        raise
    return str(path)


def _blamed(frames: list[traceback.FrameSummary], origin: str) -> traceback.FrameSummary:
    """The innermost line of the file ``origin``; failing that, of anything but the import system and this package."""
    own = [it for it in frames if it.filename == origin]
    machinery = ("<frozen importlib", importlib.__file__, str(Path(__file__).parent))
    return [frames[-1], *(it for it in frames if not it.filename.startswith(machinery)), *own][-1]


def _import(reference: str, load_it: Callable[[], T], origin: str = "") -> T:
    """Call ``load_it``; whatever it raises becomes one sentence with the line to blame, in ``origin`` if it can be."""
    try:
        return load_it()
    except ImplementationError:
        raise
    except (Exception, SystemExit) as error:
        frame = _blamed(list(traceback.extract_tb(error.__traceback__)), origin)
        at, what = (frame.filename, frame.lineno), str(error)
        if isinstance(error, SyntaxError):
            at, what = (error.filename or "?", error.lineno), error.msg
        sentence = f"{type(error).__name__}: {(what.splitlines() or [''])[0]} ({Path(at[0]).name}:{at[1]})"
        raise ImplementationError(f"--impl {reference}: importing it raised {sentence}; mend that line") from error
