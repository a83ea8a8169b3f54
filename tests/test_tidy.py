"""Style is a test: the dependency rule of each folder, the limits, and what must be documented."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Final, NamedTuple

import pytest

ROOT: Final = Path(__file__).resolve().parent.parent
PROJECT: Final = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGE_DIRS: Final[dict[str, str]] = PROJECT["tool"]["setuptools"]["package-dir"]


class Layer(NamedTuple):
    """What the modules under a prefix may import besides the standard library and themselves.

    ``own`` and ``third_party`` hold anywhere; ``lazily`` holds inside functions, where it costs an importer nothing.
    """

    own: frozenset[str]
    third_party: frozenset[str]
    lazily: frozenset[str] = frozenset()


def _layer(own: str, third_party: str, lazily: str = "") -> Layer:
    return Layer(frozenset(own.split()), frozenset(third_party.split()), frozenset(lazily.split()))


LAYERS: Final = {
    "nsa_verify": _layer("nsa_verify.core", "", lazily="nsa_verify.device.judge"),
    "nsa_verify.core": _layer("", "msgspec torch"),
    "nsa_verify.kernels": _layer("nsa_verify nsa_verify.core", "torch triton"),
    "nsa_verify.strategies": _layer("nsa_verify nsa_verify.core", "hypothesis"),
    "nsa_verify.mutants": _layer("nsa_verify nsa_verify.core", ""),
    "nsa_verify.device": _layer("nsa_verify nsa_verify.core", "msgspec torch triton triton_viz numpy"),
    "nsa_verify.engine": _layer(
        "nsa_verify nsa_verify.core nsa_verify.strategies nsa_verify.mutants nsa_verify.engine.worker",
        "msgspec filelock hypothesis ray redis",
    ),
    # Imported by the engine process, run in the worker process: there, and nowhere else, it needs the device side.
    "nsa_verify.engine.worker": _layer(
        "nsa_verify nsa_verify.core nsa_verify.strategies nsa_verify.engine", "msgspec", lazily="nsa_verify.device"
    ),
    # What workers are forked from has everything imported; nothing else imports it.
    "nsa_verify.engine.preload": _layer("nsa_verify nsa_verify.core nsa_verify.engine", "", lazily="nsa_verify.device"),
    "nsa_verify.shell": _layer(
        "nsa_verify nsa_verify.core nsa_verify.strategies nsa_verify.engine nsa_verify.engine.worker"
        " nsa_verify.device nsa_verify.kernels nsa_verify.mutants",
        "click rich pytest xdist msgspec filelock hypothesis pynvml torch triton numpy jinja2 matplotlib",
    ),
}
TYPES_ONLY: Final = {"nsa_verify.core": frozenset({"torch"})}
"""Imported under TYPE_CHECKING only."""


class Module(NamedTuple):
    """A module of the package: its dotted name, its file, whether it is a package's ``__init__``."""

    name: str
    path: Path
    is_package: bool

    @property
    def layer(self) -> str:
        """The longest prefix in ``LAYERS``."""
        return max((prefix for prefix in LAYERS if _within(self.name, prefix)), key=len)


class Import(NamedTuple):
    """One imported name: the dotted target, the line, and the circumstances."""

    target: str
    line: int
    lazy: bool
    types_only: bool


def _within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


@cache
def _files() -> tuple[Path, ...]:
    """The files that git tracks or would track; every file of a copy without git, less what tools generate."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):
        ours = (".ci", ".github")
        generated = {
            "build",
            "__pycache__",
            *(it.name for it in ROOT.glob(".*") if it.is_dir() and it.name not in ours),
        }
        found = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
        listed = [str(path) for path in found if not any(_is_generated(part, generated) for part in path.parts)]
    return tuple(sorted(ROOT / name for name in set(listed) if name and (ROOT / name).is_file()))


def _is_generated(part: str, generated: set[str]) -> bool:
    return part in generated or part.endswith((".egg-info", "_cache"))


def _python_files(*folders: str) -> list[Path]:
    return [it for it in _files() if it.suffix == ".py" and it.relative_to(ROOT).parts[0] in folders]


@cache
def _modules() -> tuple[Module, ...]:
    found = []
    by_depth = sorted(PACKAGE_DIRS.items(), key=lambda item: -item[0].count("."))
    for path in _python_files(*PACKAGE_DIRS.values()):
        relative = path.relative_to(ROOT)
        package, folder = next(it for it in by_depth if relative.is_relative_to(it[1]))
        parts = [package, *relative.relative_to(folder).with_suffix("").parts]
        is_package = parts[-1] == "__init__"
        found.append(Module(".".join(parts[:-1] if is_package else parts), path, is_package))
    return tuple(found)


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def _is_types_only(node: ast.If, child: ast.AST) -> bool:
    return ast.unparse(node.test).endswith("TYPE_CHECKING") and child not in node.orelse


def _imports(module: Module) -> Iterator[Import]:
    names = {it.name for it in _modules()}

    def visit(node: ast.AST, lazy: bool, types_only: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno, lazy, types_only)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.name.split(".")
                kept = parents[: len(parents) - node.level + int(module.is_package)]
                base = ".".join([*kept, *([base] if base else [])])
            for alias in node.names:
                submodule = f"{base}.{alias.name}"
                yield Import(submodule if submodule in names else base, node.lineno, lazy, types_only)
        for child in ast.iter_child_nodes(node):
            in_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            guarded = isinstance(node, ast.If) and _is_types_only(node, child)
            yield from visit(child, lazy or in_function, types_only or guarded)

    return visit(_tree(module.path), lazy=False, types_only=False)


def _allowed(module: Module, it: Import) -> bool:
    layer, top = LAYERS[module.layer], it.target.partition(".")[0]
    if top != "nsa_verify":
        known = top in sys.stdlib_module_names or top in layer.third_party
        return known and (it.types_only or top not in TYPES_ONLY.get(module.layer, ()))
    target_layer = max((prefix for prefix in LAYERS if _within(it.target, prefix)), key=len)
    if target_layer == module.layer or target_layer in layer.own or it.types_only:
        return target_layer != "nsa_verify" or module.layer == "nsa_verify" or "nsa_verify" in layer.own
    return it.lazy and any(_within(it.target, prefix) for prefix in layer.lazily)


def _place(path: Path, line: int = 0) -> str:
    return f"{path.relative_to(ROOT)}:{line}" if line else str(path.relative_to(ROOT))


MODULES: Final = [pytest.param(it, id=it.name) for it in _modules()]
SOURCES: Final = [pytest.param(it, id=_place(it)) for it in _python_files("nsa_verify", "kernels", "strategies")]
SCRIPTS: Final = [pytest.param(it, id=_place(it)) for it in _python_files("tests", "tools", "benchmarks")]


@pytest.mark.parametrize("module", MODULES)
def test_imports_respect_the_layers(module: Module) -> None:
    broken = [
        f"{_place(module.path, it.line)} imports {it.target}" for it in _imports(module) if not _allowed(module, it)
    ]
    layer = LAYERS[module.layer]
    allowed = ", ".join(sorted(layer.own | layer.third_party))
    assert not broken, f"{module.layer} may import the standard library, {allowed}; but " + "; ".join(broken)


@pytest.mark.parametrize("module", ["nsa_verify", "nsa_verify.shell.pytest_plugin"])
def test_import_is_light(module: str) -> None:
    heavy = ("torch", "triton", "hypothesis", "rich", "numpy", "jinja2", "matplotlib")
    program = f"import sys, {module}; print(*[name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr, done.stdout.split()) == (0, "", [])


@pytest.mark.parametrize("path", SOURCES + SCRIPTS)
def test_files_and_functions_are_short(path: Path) -> None:
    in_kernels = path.relative_to(ROOT).parts[0] == "kernels"
    long = []
    lines = path.read_text(encoding="utf-8").count("\n")
    if lines > 500 and not in_kernels:
        long.append(f"{_place(path)}: {lines} lines, at most 500")
    most = 120 if in_kernels else 70
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > most:
                long.append(f"{_place(path, node.lineno)} {node.name}: {length} lines, at most {most}")
    assert not long, "; ".join(long)


@pytest.mark.parametrize("path", SOURCES)
def test_public_names_have_docstrings(path: Path) -> None:
    tree = _tree(path)
    bare = [] if ast.get_docstring(tree) else [f"{_place(path)} (the module)"]
    classes = [it for it in tree.body if isinstance(it, ast.ClassDef) and it.name[0] != "_"]
    for node in [*tree.body, *(member for it in classes for member in it.body)]:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name[0] != "_":
            bare += [] if ast.get_docstring(node) else [f"{_place(path, node.lineno)} {node.name}"]
    assert not bare, "no docstring: " + "; ".join(bare)


def test_no_module_is_an_orphan() -> None:
    used = {it.target for module in _modules() for it in _imports(module) if it.target != module.name}
    for module in _modules():
        for node in ast.walk(_tree(module.path)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                used.add(node.value)
    scripts = [*PROJECT["project"]["scripts"].values(), *PROJECT["project"]["entry-points"]["pytest11"].values()]
    used |= {script.partition(":")[0] for script in scripts}
    orphans = [
        it.name for it in _modules() if not it.is_package and it.name not in used and not it.name.endswith("__main__")
    ]
    assert not orphans, "nobody imports: " + ", ".join(orphans)


@pytest.mark.parametrize("path", SOURCES + SCRIPTS)
def test_nothing_is_left_to_do(path: Path) -> None:
    marks = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|X" + r"XX)\b")
    lines = path.read_text(encoding="utf-8").splitlines()
    found = [f"{_place(path, number)}: {line.strip()}" for number, line in enumerate(lines, 1) if marks.search(line)]
    assert not found, "; ".join(found)


def _strings(path: Path) -> Iterator[tuple[int, str]]:
    docstrings = {id(it.value) for it in ast.walk(_tree(path)) if isinstance(it, ast.Expr)}
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.lineno, node.value


def _documentation() -> str:
    pages = [ROOT / "README.md", *(it for it in _files() if it.suffix == ".md" and it.is_relative_to(ROOT / "docs"))]
    return "\n".join(page.read_text(encoding="utf-8") for page in pages)


@pytest.mark.parametrize("path", SOURCES)
def test_options_and_variables_are_documented(path: Path) -> None:
    documented = set(re.findall(r"--[a-z][a-z-]*|NSA_VERIFY_[A-Z_]+", _documentation()))
    missing = []
    for line, text in _strings(path):
        options = re.fullmatch(r"(-\w/)?--[a-z][a-z-]*(/--[a-z][a-z-]*)?", text)
        names = re.findall(r"--[a-z][a-z-]*", text) if options else re.findall(r"\bNSA_VERIFY_[A-Z][A-Z_]*\b", text)
        missing += [f"{_place(path, line)} {name}" for name in names if name not in documented]
    assert not missing, "neither README.md nor docs/ mentions: " + "; ".join(missing)


def test_architecture_names_the_folders() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    assert text.count("\n") <= 60, "ARCHITECTURE.md has more than 60 lines"
    listed = set(re.findall(r"^\| `([\w./]+)/` \|", text, flags=re.MULTILINE))
    parents = [it.relative_to(ROOT).parts[:-1] for it in _files()]
    actual = {parts[0] for parts in parents if parts} - {"nsa_verify"}
    actual |= {"/".join(parts[:2]) for parts in parents if parts[:1] == ("nsa_verify",) and len(parts) > 1}
    given = {"corpus"}  # its content comes and goes
    assert listed | given == actual | given, (
        f"rows without a folder and folders without a row: {listed ^ actual - given}"
    )


def test_no_path_of_a_machine() -> None:
    paths = re.compile(rb"(?<![\w.])/(work|root|home|Users)/\w")
    here = Path(__file__).resolve()
    found = []
    for path in _files():
        if path != here:
            for number, line in enumerate(path.read_bytes().splitlines(), 1):
                if paths.search(line):
                    found.append(f"{_place(path, number)}: {line.decode(errors='replace').strip()}")
    assert not found, "; ".join(found)


def test_packages_match_the_folders() -> None:
    packages = PROJECT["tool"]["setuptools"]["packages"]
    assert sorted(packages) == sorted(it.name for it in _modules() if it.is_package)


def test_every_dependency_is_pinned() -> None:
    pinned = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()}
    extras = [it for extra in PROJECT["project"]["optional-dependencies"].values() for it in extra]
    stated = {re.split(r"[\[<>=!~ ]", it)[0] for it in PROJECT["project"]["dependencies"] + extras}
    assert stated - {"nsa-verify"} <= pinned, "constraints.txt lacks: " + ", ".join(stated - pinned)


@pytest.mark.parametrize("path", [pytest.param(it, id=it.name) for it in _files() if it.parent.name == "changelog.d"])
def test_changelog_fragment_is_one_sentence(path: Path) -> None:
    kinds = "breaking|feature|change|bugfix|doc|misc"
    assert re.fullmatch(rf"\d+\.({kinds})\.md", path.name), f"{path.name}: call it <id>.<kind>.md, kind one of {kinds}"
    text = path.read_text(encoding="utf-8")
    assert re.fullmatch(r"[A-Z`][^\n]*[^.\n]\.\n", text), f"{path.name}: one line, one sentence, a full stop"
    assert not re.search(r"[.!?] +[A-Z]", text), f"{path.name}: more than one sentence"
