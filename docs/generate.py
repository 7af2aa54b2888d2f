"""The reference pages, written from the code: `python docs/generate.py [--check] [PAGE...]` writes `docs/reference/*.md`."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import typer
from prometheus_client import CollectorRegistry

from swarm import config, errors
from swarm.cli.main import INTERRUPTED, app
from swarm.manifest import Manifest
from swarm.reasons import TABLE

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "docs" / "reference"
NOTE = "<!-- Written by `make docs` from the code; changes here are lost. -->\n"
CONSTRAINTS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "more than {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "less than {}",
    "minLength": "at least {} characters",
    "maxLength": "at most {} characters",
    "minItems": "at least {} items",
    "maxItems": "at most {} items",
    "pattern": "matches `{}`",
}
SERIES = {"counter": "{}_total", "info": "{}_info"}


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    names = list(header)
    lines = [names, ["---"] * len(names), *(list(row) for row in rows)]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def page(title: str, *sections: str) -> str:
    """A whole page."""
    return "\n".join([NOTE.rstrip(), "", f"# {title}", "", *(section.rstrip() + "\n" for section in sections)])


def first_line(thing: object) -> str:
    """The first sentence of a docstring."""
    return (inspect.getdoc(thing) or "").split("\n\n")[0].replace("\n", " ")


def exit_codes() -> str:
    """What the exit code of `swarm` says."""
    classes = [value for value in vars(errors).values() if isinstance(value, type)]
    known = [cls for cls in classes if issubclass(cls, errors.SwarmError) and "exit_code" in vars(cls)]
    rows = [(cls.exit_code, f"`{cls.__name__}`", first_line(cls)) for cls in known]
    rows[0] = (rows[0][0], "`SwarmError`", "Anything unexpected.")
    rows += [(0, "", "Done."), (INTERRUPTED, "", "Interrupted by Ctrl-C before it was done.")]
    return page(
        "Exit codes",
        "Every failure prints one line `error: ...`, mostly a line `hint: ...`, and ends with one of these codes. "
        "Ranges: 10 to 19 joining, 20 to 29 input, 30 to 39 this machine, 40 to 49 stored state, 50 to 59 the daemon.",
        table(("code", "error", "meaning"), [(str(code), name, text) for code, name, text in sorted(rows)]),
    )


def errors_page() -> str:
    """The tree of errors, and the reasons for which messages are rejected."""
    outline = inspect.getdoc(errors) or ""
    reasons: dict[str, set[str]] = defaultdict(set)
    for package in ("swarm", "peer", "coordinator"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for reason in rejections(ast.parse(path.read_text())):
                reasons[reason].add(str(path.relative_to(ROOT)))
    tree = "\n".join(line for line in outline.splitlines() if line.startswith("    "))
    return page(
        "Errors",
        "## What a user can meet\n\n" + "```\n" + inspect.cleandoc(tree) + "\n```\n\nCodes: [exit-codes.md](exit-codes.md).",
        "## Why messages from the network are rejected\n\n"
        "`Rejected` never ends a process. The message is dropped, its sender is named in the log, and the reason is counted in "
        "`swarm_peer_rejected_messages_total` or `swarm_coordinator_rejected_messages_total`.",
        table(
            ("reason", "raised in"),
            [(f"`{reason}`", ", ".join(f"`{path}`" for path in sorted(paths))) for reason, paths in sorted(reasons.items())],
        ),
    )


def rejections(tree: ast.AST) -> Iterator[str]:
    """The constant reasons of every `Rejected(...)` in a module."""
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Rejected" and node.args):
            continue
        first = node.args[0]
        if isinstance(first, ast.Constant) and isinstance(first.value, str):
            yield first.value


def manifest() -> str:
    """Every field of a manifest."""
    schema = Manifest.model_json_schema()
    sections = [model_section("Manifest", schema)]
    sections += [model_section(name, part) for name, part in schema["$defs"].items() if "properties" in part]
    return page(
        "Manifest",
        "One YAML file describes a run. `swarm run validate` lists every problem at once; unknown fields are problems. The run "
        "id is the BLAKE2b-256 hash of the canonical form: JSON with sorted keys, no spaces, and every default written out.",
        *sections,
    )


def model_section(name: str, schema: dict[str, Any]) -> str:
    """One model as a table of fields."""
    required = set(schema.get("required", ()))
    rows = [
        (
            f"`{field}`",
            type_name(value),
            "required" if field in required else default_text(value),
            ", ".join(filter(None, [value.get("description", ""), *constraints(value)])),
        )
        for field, value in schema["properties"].items()
    ]
    text = schema.get("description", "").replace("\n", " ")
    return f"## {name}\n\n{text}\n\n" + table(("field", "type", "default", "meaning and limits"), rows)


def type_name(value: dict[str, Any]) -> str:
    """The type of a JSON schema's property, with links to other sections."""
    if "$ref" in value:
        name = value["$ref"].rsplit("/", 1)[-1]
        return f"[{name}](#{name.lower()})"
    if choices := value.get("anyOf") or value.get("oneOf") or value.get("allOf"):
        return " or ".join(type_name(choice) for choice in choices)
    if "const" in value:
        return f"`{json.dumps(value['const'])}`"
    if "enum" in value:
        return " or ".join(f"`{json.dumps(choice)}`" for choice in value["enum"])
    if value.get("type") == "array":
        return f"list of {type_name(value.get('items') or {})}"
    return "path" if value.get("format") == "path" else str(value.get("type", "any"))


def default_text(value: dict[str, Any]) -> str:
    """A default as JSON; defaults of whole sections are told by those sections."""
    default = value.get("default")
    return "" if isinstance(default, dict) else f"`{json.dumps(default)}`"


def constraints(value: dict[str, Any]) -> list[str]:
    """Limits in words."""
    return [text.format(value[key]) for key, text in CONSTRAINTS.items() if key in value]


def metrics() -> str:
    """Every metric of coordinator and peers."""
    sections = []
    for title, module, name in (
        ("Coordinator", "coordinator.metrics", "Metrics"),
        ("Peer", "peer.metrics", "PeerMetrics"),
    ):
        registry = CollectorRegistry()
        getattr(importlib.import_module(module), name)(registry)
        sections.append(f"## {title}\n\n" + table(("series", "type", "labels", "meaning"), metric_rows(registry)))
    return page(
        "Metrics",
        "Base units, by Prometheus' conventions. Histograms come as `_bucket`, `_sum` and `_count`.",
        *sections,
    )


def metric_rows(registry: Any) -> list[tuple[str, str, str, str]]:
    """Name, type, labels and help of every metric in a registry."""
    labels: dict[str, str] = {}
    for collector, names in registry._collector_to_names.items():
        for name in names:
            labels[name] = ", ".join(f"`{label}`" for label in getattr(collector, "_labelnames", ()))
    return sorted(
        (
            f"`{SERIES.get(family.type, '{}').format(family.name)}`",
            family.type,
            labels.get(family.name, "") or info_labels(family),
            family.documentation,
        )
        for family in registry.collect()
    )


def info_labels(family: Any) -> str:
    """The labels of an info metric, which has no names for them before it is set."""
    found = {label for sample in family.samples for label in sample.labels} if family.type == "info" else set()
    return ", ".join(f"`{label}`" for label in sorted(found))


def commands() -> str:
    """Every command with its arguments and options."""
    root = typer.main.get_command(app)
    return page(
        "Commands", f"{root.help}\n\nErrors and their codes: [exit-codes.md](exit-codes.md).", *command_sections(root, "swarm")
    )


def command_sections(command: Any, path: str, depth: int = 2) -> Iterator[str]:
    """The sections of a command and of those below it."""
    context = command.context_class(command, info_name=path)
    if depth > 2:
        heading = f"{'#' * min(depth - 1, 4)} `{path}`"
        yield f"{heading}\n\n{inspect.cleandoc(command.help or '')}\n\n{parameter_table(command, context)}"
    if hasattr(command, "list_commands"):
        for name in command.list_commands(context):
            yield from command_sections(command.get_command(context, name), f"{path} {name}", depth + 1)


def parameter_table(command: Any, context: Any) -> str:
    """Arguments and options."""
    rows = []
    for parameter in command.params:
        if parameter.name == "help" or getattr(parameter, "hidden", False):
            continue
        argument = parameter.param_type_name == "argument"
        spelling = f"{parameter.name.upper()}" if argument else ", ".join([*parameter.opts, *parameter.secondary_opts])
        kind = "" if getattr(parameter, "is_flag", False) else str(parameter.bare_type())
        rows.append((f"`{spelling}`", kind, shown_default(parameter), parameter_help(parameter, context)))
    return table(("parameter", "type", "default", "meaning"), rows) if rows else ""


def shown_default(parameter: Any) -> str:
    """The default, unless there is none or it depends on the machine."""
    if parameter.required:
        return "required"
    default = parameter.default
    plain = isinstance(default, str | int | float) and not isinstance(default, bool)
    return f"`{default}`" if plain and default != "" else ""


def parameter_help(parameter: Any, context: Any) -> str:
    """What a parameter means, and the variable that sets it."""
    variable = getattr(parameter, "envvar", None)
    variables = [variable] if isinstance(variable, str) else list(variable or ())
    note = " Variable: " + ", ".join(f"`{name}`" for name in variables) + "." if variables else ""
    return (getattr(parameter, "help", None) or "").replace("\n", " ") + note


def configuration() -> str:
    """Every setting, by component."""
    return page(
        "Configuration",
        "A flag counts before a `SWARM_*` variable, a variable before the configuration file, the file before the default. "
        "`swarm config show` tells where each value comes from. The file is TOML with one table per component; "
        f"`{config.CONFIG_VARIABLE}` names another one than the default, `config.toml` in the user's configuration folder.",
        *(configuration_section(model) for model in config.COMPONENTS),
    )


def configuration_section(model: type[config.Settings]) -> str:
    """One component's settings."""
    prefix = str(model.model_config.get("env_prefix") or "SWARM_")
    schema = model.model_json_schema()
    properties = schema.get("properties", {})
    rows = [
        (
            f"`{name}`",
            f"`{prefix}{name.upper()}`",
            type_name(properties.get(name, {})),
            "required" if field.is_required() else portable(field.default),
            ", ".join(filter(None, [field.description or "", *constraints(properties.get(name, {}))])),
        )
        for name, field in model.model_fields.items()
    ]
    section = f"## [{model.table}]\n\n{first_line(model)}\n\n" + table(
        ("setting", "variable", "type", "default", "meaning and limits"), rows
    )
    parts = [model_section(name, part) for name, part in schema.get("$defs", {}).items()]
    return "\n\n".join([section, *parts])


def portable(default: Any) -> str:
    """A default that reads the same on every machine."""
    if default is None or not isinstance(default, str | int | float | bool | tuple):
        return ""
    return f"`{json.dumps(default)}`"


def reasons() -> str:
    """Every state of a peer, and what ends it."""
    rows = [
        (
            f"`{code}`",
            "yes" if reason.earning else "no",
            reason.explanation,
            "by itself" if reason.by_itself else "what you do",
            reason.hint,
        )
        for code, reason in TABLE.items()
    ]
    return page(
        "Reasons",
        "What a peer is doing, and why it doesn't earn when it doesn't. `swarm status` shows the code as `state`, with `--json` "
        "also `explanation`, `detail` and `hint`; the log as `state reason=...`, and the metric `swarm_peer_state` is 1 for it.",
        table(("code", "earns", "meaning", "ends", "hint"), rows),
    )


PAGES: dict[str, Callable[[], str]] = {
    "commands": commands,
    "configuration": configuration,
    "errors": errors_page,
    "exit-codes": exit_codes,
    "manifest": manifest,
    "metrics": metrics,
    "reasons": reasons,
}


def main(arguments: list[str]) -> int:
    """Write the pages, or with `--check` fail when one is stale."""
    names = [name for name in arguments if not name.startswith("-")] or list(PAGES)
    stale = []
    for name in names:
        path, text = TARGET / f"{name}.md", PAGES[name]()
        if "--check" not in arguments:
            TARGET.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        elif not path.exists() or path.read_text() != text:
            stale.append(path.relative_to(ROOT))
    sys.stdout.writelines(f"stale: {path} (run: make docs)\n" for path in stale)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
