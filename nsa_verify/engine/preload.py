"""What the process that others are forked from imports once, so that a worker is up in a fraction of a second."""

from __future__ import annotations

from contextlib import suppress


def _import_all() -> None:
    from nsa_verify.device.select import import_for_forks

    import_for_forks()
    import nsa_verify.device.batch
    import nsa_verify.engine.searcher  # noqa: F401


# Whatever fails here fails again in the worker, where there is somebody to tell.
with suppress(Exception):
    _import_all()
