"""A model's folder on a hub, through `huggingface_hub`, which keeps the token; it is never read or logged here.

Only what an export writes is sent: weights, settings, tokenizer and card.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError

from peer.export import CARD
from swarm.errors import SwarmError, UsageError

SUFFIXES = frozenset({".json", ".jinja", ".md", ".safetensors"})
WEIGHTS = ".safetensors"
SETTINGS = ("config.json", "adapter_config.json")
MESSAGE = "A model trained with swarm"


@dataclass(frozen=True)
class Parcel:
    """What would be sent: files by name with their bytes, and the names of others that stay."""

    folder: Path
    files: dict[str, int]
    left_out: tuple[str, ...]

    @classmethod
    def of(cls, folder: Path) -> Parcel:
        """What is in an export's folder. Raises `UsageError` for any other."""
        paths = sorted(folder.iterdir()) if folder.is_dir() else []
        sent = [path for path in paths if _is_part_of_a_model(path)]
        missing = [what for what, there in _needed({path.name for path in sent}).items() if not there]
        if missing:
            problem = f"{folder} is no exported model: it has no {', no '.join(missing)}"
            raise UsageError(problem, "make one: swarm export --to ./model")
        left_out = tuple(path.name for path in paths if path not in sent)
        return cls(folder, {path.name: path.stat().st_size for path in sent}, left_out)


def _is_part_of_a_model(path: Path) -> bool:
    return path.suffix in SUFFIXES and not path.name.startswith(".") and path.is_file() and not path.is_symlink()


def _needed(names: set[str]) -> dict[str, bool]:
    return {
        "weights": any(name.endswith(WEIGHTS) for name in names),
        " or ".join(SETTINGS): any(name in names for name in SETTINGS),
        CARD: CARD in names,
    }


def publish(parcel: Parcel, name: str, *, public: bool = False, endpoint: str | None = None) -> str:
    """Send it to a repository, made private unless it is to be `public`; the commit's address.

    Raises `UsageError` without a token, for a bad name, and for one that is public already although it isn't to be; `SwarmError`
    where the hub refuses or doesn't answer.
    """
    if get_token() is None:
        raise UsageError("there is no token for the hub", "log in with: hf auth login, or set HF_TOKEN")
    hub = HfApi(endpoint=endpoint)
    with _explained(name):
        if not public and _is_public(hub, name):
            raise UsageError(f"{name} exists and is public", "choose another name, or say --public")
        hub.create_repo(name, private=not public, exist_ok=True)
        files = [CommitOperationAdd(file, parcel.folder / file) for file in parcel.files]
        done = hub.create_commit(name, files, commit_message=MESSAGE)
    return str(done.commit_url)


def _is_public(hub: HfApi, name: str) -> bool:
    try:
        return not hub.model_info(name).private
    except RepositoryNotFoundError:
        return False


@contextmanager
def _explained(name: str) -> Iterator[None]:
    try:
        yield
    except SwarmError:
        raise
    except HFValidationError as error:
        raise UsageError(f"{name} is no name of a repository", "names are like owner/name") from error
    except HfHubHTTPError as error:
        said = error.server_message or f"status {error.response.status_code}"
        raise SwarmError(f"the hub refuses {name}: {said}", "the token needs the right to write there") from error
    except Exception as error:  # what the transport raises has no common base
        problem = " ".join(str(error).split())[:200] or type(error).__name__
        raise SwarmError(
            f"no hub answers about {name}: {problem}", "check the connection, and HF_ENDPOINT if it is set"
        ) from error
