"""Run mypy over the package, the tests and the tools.

Setuptools' ``package-dir`` makes ``kernels/`` and ``strategies/`` parts of the package ``nsa_verify``,
which mypy does not know; so it is shown a throw-away tree of links, ``.typing/nsa_verify``, that looks
like the installed package. Paths in its output are put back. Exit code: mypy's.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TREE = ROOT / ".typing"


def main() -> int:
    """Build the tree, run mypy, return its exit code."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        folders: dict[str, str] = tomllib.load(file)["tool"]["setuptools"]["package-dir"]
    shutil.rmtree(TREE, ignore_errors=True)
    package = TREE / "nsa_verify"
    package.mkdir(parents=True)
    for child in (ROOT / folders.pop("nsa_verify")).iterdir():
        if child.name != "__pycache__":
            (package / child.name).symlink_to(child)
    for name, folder in folders.items():
        (package / name.rpartition(".")[2]).symlink_to(ROOT / folder)
    command = [sys.executable, "-m", "mypy", str(package.relative_to(ROOT)), "tests", "tools", *sys.argv[1:]]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    text = done.stdout
    for name, folder in folders.items():
        text = text.replace(f".typing/{name.replace('.', '/')}/", f"{folder}/")
    sys.stdout.write(text.replace(".typing/", ""))
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
