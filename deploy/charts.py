"""The Helm chart, checked by Helm's own library: `python -m deploy.charts` lints and renders it with the values in `ci/`.

What it renders is validated against the schemas of Kubernetes, strictly; nothing is installed and no cluster is asked.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import helm_python
import kubernetes_validate
import yaml

CHART = Path(__file__).resolve().parent / "helm" / "swarm"
CASES = sorted((CHART / "ci").glob("*.yaml"))
RELEASE, NAMESPACE = "demo", "ml"
OPERATOR = "monitoring.coreos.com/"  # a custom resource; Kubernetes has no schema for it
KUBERNETES = ("1.27", kubernetes_validate.latest_version())

Values = dict[str, Any]
Document = dict[str, Any]


def values_of(case: Path) -> Values:
    """The values in a file."""
    found: Values = yaml.safe_load(case.read_text())
    return found


@cache
def _chart() -> helm_python.Chart:
    return helm_python.Chart.load(CHART)


def rendered(values: Values) -> list[Document]:
    """The documents that a release with these values consists of. Raises `HelmError` where the chart refuses them."""
    chart = _chart()
    chart.validate_schema(values)
    texts = chart.render(values, name=RELEASE, namespace=NAMESPACE)
    manifests = [text for name, text in texts.items() if name.endswith(".yaml")]
    return [document for text in manifests for document in yaml.safe_load_all(text) if document]


def problems(values: Values) -> Iterator[str]:
    """What Helm's strict linter or a version of Kubernetes has against the chart with these values."""
    report = helm_python.lint(CHART, values, strict=True)
    yield from (str(message) for message in report["messages"])
    yield from map(str, report["errors"])
    for document in rendered(values):
        yield from invalid(document)


def invalid(document: Document) -> Iterator[str]:
    """What a version of Kubernetes has against a document."""
    if document["apiVersion"].startswith(OPERATOR):
        return
    for version in KUBERNETES:
        try:
            kubernetes_validate.validate(document, version, strict=True)
        except (kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError) as error:
            yield f"{document['kind']} {document['metadata']['name']}, Kubernetes {version}: {error}"


def main() -> int:
    """Print every problem of every case."""
    found = [f"{case.name}: {problem}\n" for case in CASES for problem in problems(values_of(case))]
    sys.stdout.writelines(found)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
