"""Tasks of the LM Evaluation Harness on an exported model, and their scores in its card.

Gao et al., "The Language Model Evaluation Harness", 2024. The harness is an optional dependency and takes seconds to import.
"""

from __future__ import annotations

import difflib
import functools
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard

from peer.export import CARD
from peer.outcome import load_exported, require_chats
from swarm.errors import SwarmError, UsageError

BATCH_ON_CPU = 8
HEADING = "## Benchmarks"
LARGEST_GIVEN = 300


@dataclass(frozen=True)
class Score:
    """What a model reaches in a task: one of the task's metrics.

    `stderr` is the standard error of `value`, None where the harness can't say; `of` is how many samples the task has, of which
    the first `samples` were asked, with `shots` worked examples before each.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    higher_is_better: bool
    samples: int
    of: int
    shots: int
    version: str


class Harness:
    """The harness and the tasks that it knows: its own, and those of a folder.

    A task of a folder may name Python functions beside it, which the harness runs: only give it what you trust.
    Raises `UsageError` where the harness isn't installed, and for a folder that isn't there.
    """

    def __init__(self, include: Path | None = None) -> None:
        if include is not None and not include.is_dir():
            raise UsageError(f"{include} is no folder", "name the one that holds the tasks' YAML files")
        try:
            import lm_eval  # noqa: F401, PLC0415 - an option
            from lm_eval.tasks import TaskManager  # noqa: PLC0415
        except ModuleNotFoundError as error:
            raise UsageError(f"benchmarks need lm-eval: {error}", "pip install 'swarm-train[evaluation]'") from error
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        self._find_tasks = functools.partial(TaskManager, include_path=None if include is None else str(include))
        self._own = None if include is None else self._find_tasks(include_defaults=False)
        self.version = version("lm-eval")

    @functools.cached_property
    def _all(self) -> Any:
        """Thousands of tasks, which take ten seconds to find."""
        return self._find_tasks()

    def _manager(self, tasks: Sequence[str]) -> Any:
        """Of the folder alone where it holds all of these; a group in it may hold the harness's own tasks."""
        return self._own if self._own is not None and set(tasks) <= set(self._own.all_subtasks) else self._all

    @property
    def names(self) -> list[str]:
        """Of all tasks and groups of tasks."""
        return sorted(self._all.all_tasks)

    def require(self, tasks: Sequence[str]) -> None:
        """Raise `UsageError` for a name that no task has."""
        if not tasks:
            raise UsageError("no task named", "list them with: swarm evaluate --list")
        known = set(self._manager(tasks).all_tasks)
        for task in tasks:
            if task not in known:
                near = ", ".join(difflib.get_close_matches(task, known, 3))
                raise UsageError(
                    f"no task is called {task}", f"near: {near}" if near else "list them with: swarm evaluate --list"
                )

    def measure(
        self,
        model: Path,
        tasks: Sequence[str],
        device: torch.device,
        *,
        base: Path | None = None,
        limit: int | None = None,
        shots: int | None = None,
        chat: bool = False,
    ) -> list[Score]:
        """Every metric of the tasks, and of those that a group holds.

        `limit` takes the first samples alone, `shots` replaces the task's own number of worked examples, `chat` puts what is
        asked into the model's chat template. Raises `UsageError` for an unknown task and for what is no model, `SwarmError` for a
        task that can't be run, such as one whose data can't be fetched.
        """
        self.require(tasks)
        loaded, tokenizer = load_exported(model, base)
        if chat:
            require_chats(tokenizer)
        from lm_eval import simple_evaluate  # noqa: PLC0415
        from lm_eval.models.huggingface import HFLM  # noqa: PLC0415

        size: int | str = BATCH_ON_CPU if device.type == "cpu" else "auto"
        runner = HFLM(pretrained=loaded.to(device).eval(), tokenizer=tokenizer, batch_size=size)
        try:
            found = simple_evaluate(
                runner,
                tasks=list(tasks),
                task_manager=self._manager(tasks),
                limit=limit,
                num_fewshot=shots,
                apply_chat_template=chat,
                log_samples=False,
            )
        except Exception as error:  # whatever: tasks fetch data and run code of many authors
            told = " ".join(str(error).split())[:LARGEST_GIVEN] or type(error).__name__
            raise SwarmError(
                f"{', '.join(tasks)} can't be run: {told}",
                "a task's data come from a hub the first time, or lie in a folder that a task of yours names (--include)",
            ) from error
        return [] if found is None else _scores(found)


def _scores(found: Mapping[str, Any]) -> list[Score]:
    """From the harness's results, whose metrics are called `name,filter` and their errors `name_stderr,filter`."""
    scores: list[Score] = []
    for task, values in sorted(found["results"].items()):
        asked = found["n-samples"].get(task, {})
        for key, value in sorted(values.items()):
            name, _, chosen = key.partition(",")
            if not chosen or name.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{name}_stderr,{chosen}")
            scores.append(
                Score(
                    task=task,
                    metric=name if chosen == "none" else f"{name} ({chosen})",
                    value=float(value),
                    stderr=float(error) if isinstance(error, int | float) else None,
                    higher_is_better=bool(found["higher_is_better"].get(task, {}).get(name, True)),
                    samples=int(asked.get("effective", 0)),
                    of=int(asked.get("original", 0)),
                    shots=int(found["n-shot"].get(task, 0)),
                    version=str(found["versions"].get(task, "")),
                )
            )
    return scores


def card_of(model: Path) -> Path:
    """Where a model's card is. Raises `UsageError` where there is none."""
    path = model / CARD
    if not path.is_file():
        raise UsageError(f"{model} has no model card", "export the model with: swarm export --to DIR")
    return path


def write_in_card(path: Path, scores: Sequence[Score], harness: str) -> None:
    """Put the scores into a card, for readers and, in its metadata, for hubs; earlier ones make room.

    `harness` is the version that measured them.
    """
    card = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True)
    data: Any = card.data
    data.model_name = data.model_name or path.resolve().parent.name
    data.eval_results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=score.task,
            dataset_name=score.task,
            metric_type=score.metric,
            metric_value=score.value,
            source_name=f"lm-eval {harness}",
            source_url="https://github.com/EleutherAI/lm-evaluation-harness",
        )
        for score in scores
    ]
    card.text = _with_section(card.text, _section(scores, harness))
    path.write_text(str(card), encoding="utf-8")


def _with_section(text: str, section: str) -> str:
    """The card's text with the section in the place of an earlier one, or at its end."""
    without = re.sub(rf"^{HEADING}\n.*?(?=^## |\Z)", "", text, flags=re.DOTALL | re.MULTILINE)
    return f"{without.rstrip()}\n\n{section}"


def _section(scores: Sequence[Score], harness: str) -> str:
    rows = [
        f"| {one.task} | {one.metric}{'' if one.higher_is_better else ', less is better'} | {one.value:.4f} | "
        f"{'' if one.stderr is None else f'{one.stderr:.4f}'} | {one.samples} of {one.of} | {one.shots} |"
        for one in scores
    ]
    return (
        f"{HEADING}\n\nMeasured by whoever wrote this card, with lm-eval {harness}.\n\n"
        "| task | metric | value | standard error | samples | worked examples |\n| --- | --- | --- | --- | --- | --- |\n"
        + "\n".join(rows)
        + "\n"
    )
