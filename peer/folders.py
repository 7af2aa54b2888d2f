"""Folders and files that appear whole or not at all, and the file in each that says what is in it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from swarm.errors import DataInvalid

M = TypeVar("M", bound=BaseModel)


@contextmanager
def appearing(to: Path) -> Iterator[Path]:
    """An empty folder to write into, which takes the place of `to`, new or empty, at the end; nothing is left after an error."""
    with tempfile.TemporaryDirectory(prefix=f".{to.name}-", dir=to.parent) as temporary:
        unfinished = Path(temporary) / to.name
        unfinished.mkdir()
        yield unfinished
        if to.exists():
            to.rmdir()
        unfinished.rename(to)


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside the place, fsync, rename."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def describe(path: Path, value: BaseModel) -> None:
    """Write a value as YAML."""
    path.write_text(yaml.safe_dump(value.model_dump(mode="json"), sort_keys=False))


def described(kind: type[M], path: Path, made_by: str, again: str) -> M:
    """The value that `describe` has written. Raises `DataInvalid`: how the file is made, or made `again` where it is damaged."""
    try:
        return kind.model_validate(yaml.safe_load(path.read_text()))
    except FileNotFoundError as error:
        raise DataInvalid(f"{path.parent} has no {path.name}", made_by) from error
    except (OSError, yaml.YAMLError, ValidationError, UnicodeDecodeError) as error:
        raise DataInvalid(f"{path} is damaged: {error}", again) from error
