"""Pages: HTML files that need nothing else, neither scripts nor a network, made from a template."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from nsa_verify.shell.options import Unable


def need(asked: str, *modules: str) -> None:
    """Raises ``Unable`` if one of ``modules``, which come with the extra ``report``, is not there for ``asked``."""
    for module in modules:
        try:
            import_module(module)
        except ImportError as error:
            missing = error.name or module
            raise Unable(f"{asked}: needs {missing}, which is missing; pip install 'nsa-verify[report]'") from error


def rendered(template: str, context: dict[str, object], finalize: Callable[[object], object] | None = None) -> str:
    """The page that ``template``, a file of ``templates/``, makes of ``context``; ``finalize`` gets every value."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("nsa_verify.shell"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=finalize,
    )
    return environment.get_template(template).render(context)
