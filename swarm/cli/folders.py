"""Folders that commands write and read."""

from __future__ import annotations

from pathlib import Path

from swarm.errors import UsageError


def new_folder(to: Path) -> Path:
    """Where to write a folder, whose parents are made. Raises `UsageError` unless it is new or empty."""
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UsageError(f"{to} exists already", "choose another folder with --to, or empty it")
    to = to.absolute()
    to.parent.mkdir(parents=True, exist_ok=True)
    return to


def require_model(folder: Path) -> None:
    """Raise `UsageError` for a folder that holds no model."""
    if not (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file():
        raise UsageError(f"{folder} holds no model", "write one with: swarm export --to DIR")
