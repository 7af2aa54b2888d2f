"""Spans of what is done for one call or in one round: nothing, and nothing is imported for it, unless a program asks for them.

A span is part of whatever is under way around it. Attributes are numbers, methods and reasons, never keys or addresses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Protocol

from swarm.errors import UsageError

TRACEPARENT = "traceparent"
Attributes = Mapping[str, str | int | float | bool]
NOTHING: Attributes = {}


class Span(Protocol):
    """Something that takes time."""

    def set(self, attributes: Attributes) -> None:
        """Say more about it."""

    def fail(self) -> None:
        """It went wrong by our own fault."""


class Tracer(Protocol):
    """Where spans go."""

    def span(self, name: str, attributes: Attributes, parent: str, started_s_ago: float) -> AbstractContextManager[Span]:
        """A span inside the present one, or inside that which `parent` names."""

    def serve(self, method: str, parent: str, is_followed: Callable[[], bool], attach: bool) -> AbstractContextManager[Span]:
        """The span of a call that somebody else has made.

        `parent` is what the caller says that the call belongs to: believed where it `is_followed`, and otherwise only linked to.
        """

    def traceparent(self) -> str:
        """The present span's name for others (W3C Trace Context); empty where there is none."""


class _Nothing:
    """The span of nobody."""

    def set(self, attributes: Attributes) -> None:
        """Nothing to say."""

    def fail(self) -> None:
        """Nothing to say."""


NO_SPAN: Span = _Nothing()
_active: ContextVar[Tracer | None] = ContextVar("tracer", default=None)


@contextmanager
def exporting(wanted: bool, service: str) -> Iterator[Tracer | None]:
    """A tracer that sends spans until the context is left, if that is wanted. Raises `UsageError`."""
    if not wanted:
        yield None
        return
    try:
        from swarm import otel  # noqa: PLC0415 - an extra, and loaded by nobody who doesn't want it
    except ImportError as error:
        raise UsageError(f"traces need OpenTelemetry: {error}", "pip install 'swarm-train[otel]'") from error
    with otel.exporting(service) as tracer:
        yield tracer


@contextmanager
def started(wanted: bool, service: str) -> Iterator[None]:
    """Trace what this task and those that it starts do meanwhile, if that is wanted. Raises `UsageError`."""
    with exporting(wanted, service) as tracer:
        _active.set(tracer)
        try:
            yield
        finally:
            _active.set(None)


@contextmanager
def under(tracer: Tracer) -> Iterator[None]:
    """Let spans of this task go to `tracer`."""
    token = _active.set(tracer)
    try:
        yield
    finally:
        _active.reset(token)


def span(
    name: str, attributes: Attributes = NOTHING, *, parent: str = "", started_s_ago: float = 0.0
) -> AbstractContextManager[Span]:
    """A span inside the present one or, where it is given, inside `parent`; it may have begun a while ago."""
    tracer = _active.get()
    return nullcontext(NO_SPAN) if tracer is None else tracer.span(name, attributes, parent, started_s_ago)


def traceparent() -> str:
    """The present span's name, to go on with it elsewhere; empty where there is none."""
    tracer = _active.get()
    return "" if tracer is None else tracer.traceparent()


def carried() -> tuple[tuple[str, str], ...]:
    """The metadata with which a call tells what it belongs to; none where there is no span."""
    name = traceparent()
    return ((TRACEPARENT, name),) if name else ()
