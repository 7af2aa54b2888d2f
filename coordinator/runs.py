"""Several runs in one coordinator: every call goes to the run that its metadata name, and metrics say which run they are of.

The runs share an address, a TLS certificate and the guard with its limits; each has a key, a database, a ledger and a journal of
its own. A call that names no run is for the first one, as peers of earlier versions name none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

from google.protobuf.descriptor import ServiceDescriptor
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.registry import Collector

from coordinator.guard import metadata_of
from swarm.errors import Rejected
from swarm.rpc.client import RUN_KEY

RUN_LABEL = "run"


def by_run(described: ServiceDescriptor, services: Mapping[str, Any]) -> Any:
    """A service whose calls are answered by the service of the run that they name, in hexadecimal."""
    if len(services) == 1:
        return next(iter(services.values()))
    return SimpleNamespace(**{method.name: _passing_on(method.name, services) for method in described.methods})


def _passing_on(method: str, services: Mapping[str, Any]) -> Callable[[Any, Any], Any]:
    calls = {run: getattr(service, method) for run, service in services.items()}
    first = next(iter(calls.values()))

    def call(request: Any, context: Any) -> Any:
        run = metadata_of(context, RUN_KEY)
        if run and run not in calls:
            raise Rejected("unknown_run", run[:16])
        return calls[run](request, context) if run else first(request, context)

    return call


class ByRun(Collector):
    """The metrics of several registries as one, each sample with the run's name as a label."""

    def __init__(self, registries: Mapping[str, CollectorRegistry]) -> None:
        self._registries = dict(registries)

    def collect(self) -> Iterator[Metric]:
        """All families, each once."""
        merged: dict[str, Metric] = {}
        for run, registry in self._registries.items():
            for family in registry.collect():
                into = merged.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                into.samples += [sample._replace(labels={**sample.labels, RUN_LABEL: run}) for sample in family.samples]
        yield from merged.values()
