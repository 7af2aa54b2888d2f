"""A hub's data set as records, through `datasets`: streamed, and without any code that comes with it.

A local folder in a hub's layout is read in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from peer.documents import Record
from swarm.errors import DataInvalid

LOOKUP_S = 20.0
CARD = "README.md"
MOST_LICENSE_CHARACTERS = 200


@dataclass(frozen=True)
class HubData:
    """A split of a data set; `origin` says which, `license` is that of its card or empty, `rows` None where not known."""

    origin: str
    license: str
    rows: int | None
    _stream: Any

    def records(self, limit: int | None = None) -> Iterator[Record]:
        """Its rows, or the first of them. Raises `DataInvalid` where they can't be read."""
        with _explained(self.origin):
            for number, row in enumerate(islice(self._stream, limit), 1):
                yield f"{self.origin}, row {number}", row


def open_data(name: str, config: str | None = None, split: str = "train", endpoint: str | None = None) -> HubData:
    """The split of a data set with this name. Raises `DataInvalid`, with a hint, where there is none or no hub answers."""
    datasets = _library()
    folder = Path(name)
    revision, license_ = (None, _license_in(folder / CARD)) if folder.is_dir() else _looked_up(name, endpoint)
    with _explained(name):
        builder = datasets.load_dataset_builder(str(folder) if folder.is_dir() else name, config, revision=revision)
        stream = builder.as_streaming_dataset(split=split)
    known = (builder.info.splits or {}).get(split)
    which = [name, *([f"configuration {config}"] if config else []), f"split {split}"]
    which += [f"revision {revision}"] if revision else []
    return HubData(", ".join(which), license_, getattr(known, "num_examples", None) or None, stream)


def _library() -> Any:
    try:
        import datasets  # noqa: PLC0415 - large, and only for those who take data from a hub
    except ImportError as error:
        raise DataInvalid("data of a hub need the library datasets", "pip install 'swarm-train[data]'") from error
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    return datasets


def _looked_up(name: str, endpoint: str | None) -> tuple[str | None, str]:
    """A data set's present revision, so that all of it is of one, and its licence."""
    try:
        found = HfApi(endpoint=endpoint).dataset_info(name, timeout=LOOKUP_S)
    except HFValidationError as error:
        raise DataInvalid(f"{name} is neither a hub's data set nor a folder", "names are like owner/name") from error
    except HfHubHTTPError as error:
        hint = "check the name; for one that needs permission: hf auth login"
        raise DataInvalid(f"the hub has no data set {name}, or doesn't show it to you", hint) from error
    except Exception as error:  # what the transport raises has no common base
        hint = "check the connection and HF_ENDPOINT, or give files that are here instead of --hub"
        raise DataInvalid(f"no hub answers about {name}: {_brief(error)}", hint) from error
    return found.sha, _license(getattr(found.card_data, "license", None))


def _license_in(path: Path) -> str:
    if not path.is_file():
        return ""
    with _explained(str(path)):
        return _license(DatasetCard.load(path).data.license)


def _license(said: object) -> str:
    """As one line: cards name one or several."""
    names = said if isinstance(said, list) else [said]
    return ", ".join(str(name) for name in names if name)[:MOST_LICENSE_CHARACTERS]


@contextmanager
def _explained(name: str) -> Iterator[None]:
    try:
        yield
    except DataInvalid:
        raise
    except Exception as error:  # what the library and its readers raise has no common base
        hint = "see --config and --split; code of a data set is never run"
        raise DataInvalid(f"{name} can't be read: {_brief(error)}", hint) from error


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
