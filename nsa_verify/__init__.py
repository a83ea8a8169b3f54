"""nsa-verify: property-based verification of native-sparse-attention metadata kernels.

``import nsa_verify`` imports no torch; ``verify`` does when it is called.
"""

from nsa_verify.core.case import Case, CtxLens, Layout, Mode, Replay, Request, Setup, SlotKind
from nsa_verify.core.findings import Code, Finding, Outcome, Verdict
from nsa_verify.core.implementation import Extent, Implementation, MetadataBuffers, ReplayInputs, implementation

__version__ = "0.1.0"


def verify(case: Case, implementation: Implementation | str, executor: str = "eager", device: str = "auto") -> Verdict:
    """Run ``case`` through one implementation and judge every byte it leaves.

    ``implementation`` is a registered ``Implementation`` or its name (built in, or given to ``@implementation``).
    ``executor`` is ``eager``; ``device`` is ``auto``, ``cpu`` or ``cuda``. Raises ``nsa_verify.device.DeviceError`` if
    the device cannot be had, ``KeyError`` for a name that nobody registered.
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
    "implementation",
    "verify",
]
