"""Requests: dataclasses whose fields are the options of a command."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, get_type_hints

import typer
from typer.models import OptionInfo

from kornia_tinyvit.cli.options import PANELS, Json, Quiet

__all__ = ["Interrupted", "Request", "command"]


class Interrupted(Exception):
    """A command was interrupted by Ctrl-C."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """The options of every command, and the messages that they control."""

    context: typer.Context
    as_json: Json = False
    quiet: Quiet = False

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

    def note_run(self, images: Any, device: object, weights: str) -> None:
        """Note what a training or an evaluation runs on: images, objects, classes, ignored ids, device and weights."""
        counts = {"images": len(images), "objects": getattr(images, "num_objects", 0), "classes": images.num_classes}
        parts = [f"{count} {name}" for name, count in counts.items() if count]
        if ignored := getattr(images, "ignored", ()):
            parts.append(f"ignored ids {', '.join(map(str, ignored))}")
        self.note(f"{', '.join(parts)}; device {device}; weights {weights}")

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

    Options are listed by panel, in the order of :data:`~kornia_tinyvit.cli.options.PANELS`.

    Args:
        run: takes a subclass of :class:`Request`, whose fields are annotated as parameters of typer.
    """
    request = get_type_hints(run)["request"]
    hints = get_type_hints(request, include_extras=True)

    def position(parameter: inspect.Parameter) -> int:
        (info,) = getattr(parameter.annotation, "__metadata__", (None,))
        return PANELS.index(info.rich_help_panel) if isinstance(info, OptionInfo) else -1

    fields = inspect.signature(request).parameters.items()
    parameters = sorted((field.replace(annotation=hints[name]) for name, field in fields), key=position)

    def call(**options: Any) -> None:
        try:
            run(request(**options))
        except KeyboardInterrupt:  # typer would exit without a message
            raise Interrupted from None

    call.__name__, call.__doc__ = run.__name__, run.__doc__
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return call
