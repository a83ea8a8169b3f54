"""Create the project's environment, or find that it is up to date.

``python3 tools/bootstrap.py [--venv DIR] [--extra test|dev]`` needs the standard library only. Exit code 0 when the
environment is ready, 2 with one sentence when it cannot be made, 130 when interrupted.

Where the interpreter that runs this already has torch and Triton in range, as a GPU machine has, they are reused: a
``.pth`` file puts that interpreter's packages behind the environment's own (which works from inside a virtual
environment too, unlike ``--system-site-packages``), and what it satisfies is neither pinned nor installed again.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import re
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHARED = ("torch", "triton")
INPUTS = ("pyproject.toml", "constraints.txt", "tools/bootstrap.py")
UNUSED = r"/(pyarrow|networkx|rllib|_inductor|torch/testing|torch/onnx)/"
"""Large parts of packages that nothing of the project imports: left to Python, which compiles what it imports."""
STEPS = re.compile(r"(Collecting|Building|Installing) ")


class BootstrapError(Exception):
    """The environment cannot be made; the message is the sentence to show."""


def main() -> int:
    """Parse the command line and make the environment; return the exit code."""
    parser = argparse.ArgumentParser(description="Create the project's environment, or find that it is up to date.")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv", help="its folder (.venv)")
    parser.add_argument("--extra", choices=("test", "dev"), default="test", help="dev adds what `make lint` needs")
    options = parser.parse_args()
    venv = options.venv.absolute()
    try:
        if sys.version_info < (3, 11):  # noqa: UP036 - this script is what tells an older Python so
            raise BootstrapError(f"Python 3.11 or newer is needed, not {sys.version.split()[0]}; try PYTHON=python3.12")
        venv.mkdir(parents=True, exist_ok=True)
        with (venv / ".bootstrap-lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            ensure(venv, options.extra)
    except (BootstrapError, OSError, subprocess.SubprocessError) as error:
        print(f"bootstrap: no environment in {venv}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bootstrap: interrupted; the next run goes on from here", file=sys.stderr)
        return 130
    return 0


def ensure(venv: Path, extra: str) -> None:
    """Create and install into ``venv`` unless its stamp says that nothing has changed since the last time."""
    began = time.monotonic()
    key = fingerprint(parent := parent_paths())
    stamps = [venv / f".installed-{name}" for name in ("dev", "test")[: 1 if extra == "dev" else 2]]
    done = [stamp.read_text(encoding="utf-8") for stamp in stamps if stamp.is_file()]
    if key in done and (venv / "bin" / "python").exists():
        return
    python = create(venv, parent)
    print("bootstrap: installing the project and its dependencies; the first time takes about a minute", flush=True)
    (venv / "constraints.txt").write_text(pins(parent), encoding="utf-8")
    build = ["-c", str(venv / "constraints.txt")]
    if parent and has("setuptools"):
        # The environment's own older copy would hide the one that can build the project without a network.
        run([python, "-m", "pip", "uninstall", "--yes", "setuptools"], "removing the old setuptools failed")
        build.append("--no-build-isolation")
    hint = "pip could not install the project; is there a network, or PIP_FIND_LINKS with the wheels?"
    run([python, "-m", "pip", "install", "--no-compile", *build, "-e", f"{ROOT}[{extra}]"], hint)
    compile_all(python)
    stamps[-1].write_text(key, encoding="utf-8")
    print(f"bootstrap: {venv} is ready after {time.monotonic() - began:.0f} s", flush=True)


def compile_all(python: str) -> None:
    """Write the bytecode of its packages and of the project with all cores, for which pip takes one; a file that is for
    another Python, as some packages have, is left as it is."""
    show = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    folder = subprocess.run(show, capture_output=True, text=True, check=True).stdout.strip()
    own = [str(ROOT / name) for name in ("nsa_verify", "kernels")]
    command = [python, "-m", "compileall", "-q", "-j", "0", "-x", UNUSED, folder, *own]
    subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=False)


def create(venv: Path, parent: list[str]) -> str:
    """Make ``venv`` with pip in it, anew if it is for another Python or broken, and return its interpreter."""
    python = str(venv / "bin" / "python")
    probe = [python, "-c", "import pip, sys, sysconfig; print(sysconfig.get_path('purelib'), sys.version)"]
    try:
        found = subprocess.run(probe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        found = ""
    if not found.endswith(sys.version):
        print(f"bootstrap: creating {venv} with Python {sys.version.split()[0]}", flush=True)
        hint = "python3 -m venv failed; does this Python have its venv module (the package python3-venv)?"
        run([sys.executable, "-m", "venv", "--clear", str(venv)], hint)
        found = subprocess.run(probe, capture_output=True, text=True, check=True).stdout.strip()
    if parent:
        versions = " and ".join(f"{name} {metadata.version(name)}" for name in SHARED)
        print(f"bootstrap: using {versions} of {sys.executable}", flush=True)
    folder = Path(found[: -len(sys.version)].strip())
    (folder / "nsa_verify_parent.pth").write_text("".join(f"{path}\n" for path in parent), encoding="utf-8")
    return python


def parent_paths() -> list[str]:
    """The package folders of this interpreter if it has torch and Triton in range, else nothing."""
    if not all(has(name) for name in SHARED):
        return []
    return [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]


def pins(parent: list[str]) -> str:
    """constraints.txt, less the packages that a reused interpreter has in range."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines(keepends=True)
    return "".join(line for line in lines if not (parent and has(line.partition("==")[0])))


def has(name: str) -> bool:
    """Whether this interpreter has the package, in pyproject.toml's range if that names one."""
    try:
        version = metadata.version(name)
    except (metadata.PackageNotFoundError, ValueError):
        return False
    least = re.search(rf'"{re.escape(name)}>=([\d.]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return least is None or release(version) >= release(least.group(1))


def release(version: str) -> list[int]:
    """Numbers to compare by: four places, then -1 for a pre-release, which comes before its release."""
    found = re.match(r"(\d+(?:\.\d+)*)([-_.]?(?:a|b|c|rc|dev))?", version)
    numbers = [int(part) for part in found.group(1).split(".")] if found else []
    return [*[*numbers, 0, 0, 0, 0][:4], -1 if found and found.group(2) else 0]


def fingerprint(parent: list[str]) -> str:
    """What the environment depends on: project, pins, this script, the Python, its torch, where the project lies."""
    inputs = [(ROOT / name).read_bytes() for name in INPUTS]
    versions = [metadata.version(name) for name in SHARED if parent]
    return hashlib.sha256(repr((inputs, sys.version, sys.prefix, parent, versions, str(ROOT))).encode()).hexdigest()


def run(command: list[str], hint: str) -> None:
    """Run ``command`` with its steps shown; if it fails, show its last lines and raise ``BootstrapError(hint)``."""
    tail, pipe, nothing = [""], subprocess.PIPE, subprocess.DEVNULL
    with subprocess.Popen(command, stdin=nothing, stdout=pipe, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout or ():
            tail = [*tail[-19:], line]
            if STEPS.match(line):
                print(f"bootstrap: {line.strip():.110}", flush=True)
    if process.returncode:
        sys.stderr.write("".join(tail))
        raise BootstrapError(hint)


if __name__ == "__main__":
    sys.exit(main())
