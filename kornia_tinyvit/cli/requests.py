"""Requests: dataclasses whose fields are the options of a command."""

from __future__ import annotations

import dataclasses
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, dataclass
from typing import Annotated, Any, get_type_hints

import typer

__all__ = ["Request", "argument", "command", "option"]

#: Groups of options in ``--help``, in their order.
PANELS = (
    "Weights", "Data", "Prompts", "Budget", "Search", "Training", "Teacher", "Semantic segmentation",
    "Promptable segmentation", "Detection", "Metrics", "Graph", "Web demo", "Hardware", "Output",
)  # fmt: skip


def argument(text: str, default: Any = MISSING) -> Any:
    """Return a field of a request that is a positional argument."""
    return dataclasses.field(default=default, metadata={"parameter": typer.Argument(help=text)})


def option(panel: str, text: str, default: Any = MISSING, *names: str, **settings: Any) -> Any:
    """Return a field of a request that is an option.

    Args:
        panel: its group in ``--help``, one of :data:`PANELS`.
        text: its help.
        default: its default; without one it is required.
        *names: its names, by default that of the field.
        **settings: for ``typer.Option``.
    """
    info = typer.Option(help=text, rich_help_panel=panel, **settings)
    info.param_decls = names
    return dataclasses.field(default=default, metadata={"parameter": info})


@dataclass(frozen=True, kw_only=True)
class Request:
    """The options of every command, and the messages that they control."""

    context: typer.Context
    as_json: bool = option("Output", "Print one JSON document.", False, "--json")
    quiet: bool = option("Output", "Print results and errors only, no progress and no notes.", False)

    @property
    def shows_progress(self) -> bool:
        """Whether to show progress."""
        return not (self.as_json or self.quiet)

    def note(self, text: str) -> None:
        """Print a line to stderr unless ``--quiet`` is given; with several processes, in the first one only."""
        if not self.quiet and os.environ.get("RANK", "0") == "0":
            print(text, file=sys.stderr)

    def note_names(self, text: str, names: Sequence[str], most: int = 5) -> None:
        """Print how many names there are and the first of them; nothing if there are none."""
        if names:
            self.note(f"{text}: {len(names)}, e.g. {'; '.join(names[:most])}")

    def note_run(self, images: Any, device: object, weights: str, validation: Any = None) -> None:
        """Note what a command runs on: the summary of the images, device and weights, and the validation images."""
        self.note(f"{images.summary}; device {device}; weights {weights}")
        if validation is not None:
            self.note(f"Validation: {validation.summary}")

    def reject_unused(self, names: Iterable[str], reason: str) -> None:
        """Reject options that were given although they have no effect.

        Args:
            names: fields of the request.
            reason: completes "``--option`` has no effect", e.g. ``"with --task semantic"``.

        Raises:
            ValueError: with the options that were given.
        """
        spelled = {str(parameter.name): parameter.opts[0] for parameter in self.context.command.params}
        sources = {name: self.context.get_parameter_source(name) for name in names}
        given = [spelled[name] for name, source in sources.items() if source and source.name == "COMMANDLINE"]
        if given:
            verb, pronoun = ("has", "it") if len(given) == 1 else ("have", "them")
            raise ValueError(f"{', '.join(given)} {verb} no effect {reason}; leave {pronoun} out.")


def command(run: Callable[..., None]) -> Callable[[], None]:
    """Turn a function of a request into one that typer can register: its parameters are the fields of the request.

    Options are sorted by panel. A flag that is off by default has no negative form.
    """
    request = get_type_hints(run)["request"]
    hints = get_type_hints(request)
    parameters = [inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)]
    for each in sorted(dataclasses.fields(request), key=_position):
        if info := each.metadata.get("parameter"):
            if each.default is False and not info.param_decls:
                info.param_decls = (f"--{each.name.replace('_', '-')}",)
            default = inspect.Parameter.empty if each.default is MISSING else each.default
            annotation: Any = Annotated[hints[each.name], info]
            parameters.append(
                inspect.Parameter(each.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
            )

    def call(**options: Any) -> None:
        run(request(**options))

    call.__name__, call.__doc__ = run.__name__, run.__doc__
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return call


def _position(field: dataclasses.Field[Any]) -> int:
    panel = getattr(field.metadata.get("parameter"), "rich_help_panel", None)
    return PANELS.index(panel) if panel else -1
