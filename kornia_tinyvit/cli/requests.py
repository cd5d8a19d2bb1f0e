"""Commands whose options are the fields of a dataclass."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, get_type_hints

import typer

__all__ = ["command"]


def command(run: Callable[..., None]) -> Callable[..., None]:
    """Return what typer takes as a command: a function whose parameters are the fields of a request.

    Args:
        run: takes typer's context and an instance of a dataclass, whose fields are keywords, annotated as typer's
            parameters.
    """
    request = get_type_hints(run)["asked"]
    hints = get_type_hints(request, include_extras=True)
    parameters = [inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)]
    for name, parameter in inspect.signature(request).parameters.items():
        parameters.append(parameter.replace(annotation=hints[name]))

    def call(context: typer.Context, **options: Any) -> None:
        run(context, request(**options))

    call.__name__, call.__doc__ = run.__name__, run.__doc__
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return call
