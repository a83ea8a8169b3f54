"""Where the workers of a campaign are: ``--engine``, and how many fit there."""

from __future__ import annotations

from msgspec.structs import replace

from nsa_verify.engine import cluster
from nsa_verify.engine.plan import Plan
from nsa_verify.engine.process import EngineError
from nsa_verify.shell import gpus
from nsa_verify.shell import options as opt
from nsa_verify.shell.options import Unable

MOST_PIECES = 1000
"""A campaign's work has no end; so many workers always have something to do."""


def placed(plan: Plan, engine: str, address: str, workers: str) -> Plan:
    """``plan`` with the workers, and the GPUs that they have, of this machine or of the Ray cluster at ``address``.

    Raises ``Unable`` for options that contradict each other, and where there is no cluster to be used.
    """
    if engine != cluster.RAY:
        if address:
            raise Unable(f"--ray-address {address}: only --engine ray has a cluster; give both or neither")
        count = opt.worker_count(workers, plan.device, not plan.isolate, MOST_PIECES)
        return replace(plan, workers=count, gpus=gpus.placement(gpus.gpus_for(plan.device)))
    if not plan.isolate:
        raise Unable("--engine ray: workers on other machines are processes; leave out --no-isolation")
    try:
        wanted = gpus.workers_wanted(workers)
    except ValueError as error:
        raise Unable(f"--workers {workers}: {error}") from error
    try:
        return cluster.settled(replace(plan, engine=cluster.RAY, address=address), wanted)
    except EngineError as error:
        raise Unable(str(error)) from error
