"""nsa-verify: property-based verification of native-sparse-attention metadata kernels.

``import nsa_verify`` imports no torch; ``verify`` does when it is called.
"""

from nsa_verify.core import oracle
from nsa_verify.core.case import Case, CtxLens, Layout, Mode, Replay, Request, Setup, SlotKind
from nsa_verify.core.findings import Code, Finding, Outcome, Verdict
from nsa_verify.core.implementation import (
    Extent,
    Implementation,
    MetadataBuffers,
    Refresh,
    ReplayInputs,
    fallback,
    fallbacks,
    implementation,
)

__version__ = "0.1.0"


def verify(
    case: Case, implementation: Implementation | Refresh | str, executor: str = "eager", device: str = "auto"
) -> Verdict:
    """Run ``case`` through one implementation and judge every byte it leaves.

    ``implementation`` is an ``Implementation``, a function decorated with ``@implementation``, or a registered name.
    ``executor`` is ``eager``, ``graph`` (CUDA) or ``simulated-graph`` (CPU); ``device`` is ``auto``, ``cpu`` or
    ``cuda``. Raises ``nsa_verify.device.select.DeviceError`` if the device cannot be had, ``ImplementationError`` (of
    ``nsa_verify.core.registry``) for what nobody registered, ``ValueError`` for an executor that is unknown or not of
    that device.
    """
    from nsa_verify.device.judge import verify as judge

    return judge(case, implementation, executor, device)


__all__ = [
    "Case",
    "Code",
    "CtxLens",
    "Extent",
    "Finding",
    "Implementation",
    "Layout",
    "MetadataBuffers",
    "Mode",
    "Outcome",
    "Replay",
    "ReplayInputs",
    "Request",
    "Setup",
    "SlotKind",
    "Verdict",
    "__version__",
    "fallback",
    "fallbacks",
    "implementation",
    "oracle",
    "verify",
]
