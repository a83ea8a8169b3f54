"""What a run happens in, for its reports; the device is told by whoever uses it."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version

from nsa_verify import __version__

PACKAGES = ("torch", "triton", "hypothesis", "numpy")


def environment(device: str = "") -> dict[str, str]:
    """The versions of nsa-verify, Python and what matters besides, the platform and, if it is known, the device line.

    Nothing is imported for it.
    """
    told = {"nsa-verify": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            told[package] = version(package)
        except PackageNotFoundError:
            told[package] = "missing"
    told["platform"] = f"{platform.system()} {platform.release()} {platform.machine()}, {sys.implementation.name}"
    return told | ({"device": device} if device else {})
