"""Where the workers of a campaign are: ``--engine``, and how many fit there."""

from __future__ import annotations

import math
from typing import Final

from msgspec.structs import replace

from nsa_verify.engine import cluster
from nsa_verify.engine.plan import Plan
from nsa_verify.engine.process import EngineError
from nsa_verify.shell import gpus
from nsa_verify.shell import options as opt
from nsa_verify.shell.options import Unable

MOST_PIECES = 1000
"""A campaign's work has no end; so many workers always have something to do."""
ON_A_GPU: Final = 8
"""Searchers on a GPU if nobody says how many there are to be: their workers take 16 GiB of it at most."""
MOST: Final = 256


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
        return settled(replace(plan, engine=cluster.RAY, address=address), wanted)
    except EngineError as error:
        raise Unable(str(error)) from error


def settled(plan: Plan, wanted: int | None) -> Plan:
    """``plan`` with the device, the number of workers (None: what the cluster has) and the share of a GPU that each of
    them has on its cluster.

    More workers than the cluster has room for are asked for all the same: they join when there is room. Raises
    ``EngineError`` as ``cluster.connected`` does, and where the cluster has no GPU, or no CPU at all.
    """
    there = cluster.connected(plan.address)
    cpus, gpus = int(there.total("CPU")), int(there.total("GPU"))
    if plan.device == "cuda" and not gpus:
        raise EngineError(
            "--device cuda: no node of the Ray cluster has a GPU; use --device cpu, or start nodes with"
            " `ray start --num-gpus=N`"
        )
    if not cpus:
        raise EngineError(
            "--engine ray: no node of the Ray cluster has a CPU to offer; start one with"
            " `ray start --address=HOST:6379 --num-cpus=N`"
        )
    if plan.device == "cpu" or not gpus:
        return replace(plan, device="cpu", workers=min(wanted or cpus, MOST))
    workers = min(wanted or min(cpus, gpus * ON_A_GPU), MOST)
    share = math.floor(10_000 / math.ceil(workers / gpus)) / 10_000
    return replace(plan, device="cuda", workers=workers, gpu_share=share)
