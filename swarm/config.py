"""Configuration of the daemon and the coordinator: flag > `SWARM_*` > file > default, as frozen values.

The file is `config.toml` in the user's configuration folder, with one table per component. `load` reads everything when it is
called; `origins` tells where each value came from.
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

import platformdirs
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from swarm.errors import LinkError, UsageError
from swarm.messages import JoinLink
from swarm.units import parse_rate, parse_size

APPLICATION = "swarm"
CONFIG_VARIABLE = "SWARM_CONFIG"
LINK_FILE = "link"
LINK_HELP = "Join link; by default SWARM_LINK, the configuration's, or that of the run joined last."
LINK_VARIABLE = "SWARM_LINK"

Rate = Annotated[int, BeforeValidator(parse_rate), WithJsonSchema({"type": "rate"})]
Size = Annotated[int, BeforeValidator(parse_size), WithJsonSchema({"type": "volume"})]


def config_path() -> Path:
    """The configuration file: `SWARM_CONFIG`, or `config.toml` in the user's configuration folder."""
    named = os.environ.get(CONFIG_VARIABLE)
    return Path(named) if named else platformdirs.user_config_path(APPLICATION) / "config.toml"


def data_path() -> Path:
    """Where keys, checkpoints and databases go by default."""
    return platformdirs.user_data_path(APPLICATION)


class Settings(BaseSettings):
    """A component's configuration; `table` is its part of the file."""

    table: ClassVar[str]

    model_config = SettingsConfigDict(frozen=True, extra="forbid")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags first, then the environment, then the file."""
        return init_settings, env_settings, InitSettingsSource(settings_cls, _file_table(cls.table))


class PeerSettings(Settings):
    """`swarm join`: one peer on this machine."""

    table: ClassVar[str] = "peer"
    model_config = SettingsConfigDict(frozen=True, extra="forbid", env_prefix="SWARM_")

    link: str = Field("", description="join link of the run")
    ticket: str = Field("", description="invitation of the run's owner, where the run asks for one")
    link_file: Path | None = Field(None, description="file that holds the join link, waited for at start")
    files: Path | None = Field(None, description="folder where the run's data files may lie already")
    mirror: str = Field(
        "", description="web folder that has the run's data files under their names; asked before other peers are"
    )
    data: Path | None = Field(None, description="folder with private shards: used where they are, never sent to anybody")
    identity: Path = Field(default_factory=lambda: data_path() / "identity.key", description="the peer's key file")
    data_dir: Path = Field(default_factory=lambda: data_path() / "peer", description="state, blobs and receipts")
    gpu: str = Field("auto", description="device: a GPU's number, several (0,1), auto, or cpu")
    listen: str = Field("0.0.0.0:0", description="address for other peers; port 0 = any free one")
    announce: str = Field("", description="host:port at which others can dial us, where it differs from `listen`")
    inbound: bool = Field(True, description="accept connections; false = only dial out")
    max_upload: Rate = Field(0, description="most that is sent to other peers, such as 10Mbit/s; 0 = no limit")
    max_download: Rate = Field(0, description="most that is received from other peers, such as 50Mbit/s; 0 = no limit")
    monthly_quota: Size = Field(0, description="sent and received per calendar month (UTC), such as 200GB; 0 = no limit")
    keep_history: Size = Field(
        0, description="disk for past rounds, such as 50GB, for swarm export --round; the oldest go first; 0 = keep none"
    )
    plant: bool = Field(False, description="send contributions that are wrong on purpose, to see whether auditors look")
    check_traffic: float = Field(0.02, ge=0, le=100, description="share of a round's traffic for checking others' merges")
    threads: int = Field(0, ge=0, le=1024, description="processor threads for training; 0 = all")
    metrics: str = Field("", description="address for Prometheus; empty = none")
    traces: bool = Field(False, description="send traces to where the OTEL_EXPORTER_OTLP_* variables say; needs the extra `otel`")
    log_level: str = Field("info", description="debug, info, warning or error")


class CoordinatorSettings(Settings):
    """`swarm coordinator`: admission, ledger and credits of one run."""

    table: ClassVar[str] = "coordinator"
    model_config = SettingsConfigDict(frozen=True, extra="forbid", env_prefix="SWARM_COORDINATOR_")

    listen: str = Field("0.0.0.0:4300", description="address for peers; port 0 = any free one")
    advertise: str = Field("", description="host:port in the join link; empty = this machine's address")
    metrics: str = Field("", description="address for the web page, /metrics and /healthz; empty = none")
    db: str = Field("", description="database URL; empty = SQLite in the state folder")
    admin_listen: str = Field("", description="address for `swarm admin`; empty = none")
    admin_keys: str = Field("", description="peer ids of the admins' keys, separated by commas")
    witnesses: str = Field("", description="peer ids of witnesses whose cosignatures are taken, separated by commas")
    replica_address: str = Field("", description="host:port at which other replicas reach this one; empty = as it listens")
    state_dir: Path | None = Field(None, description="keys and database; empty = per run in the user's data folder")
    calls_per_address_per_s: float = Field(2000.0, gt=0, description="calls that one address may make, on average")
    calls_per_key_per_s: float = Field(50.0, gt=0, description="signed messages that one key may send, on average")
    new_keys_per_network_per_hour: int = Field(256, ge=1, description="keys that one network (IPv4 /24, IPv6 /48) may bring anew")
    new_keys_per_account_per_hour: int = Field(256, ge=1, description="machine keys that one account may bring anew")
    max_calls: int = Field(2048, ge=1, description="calls that are answered at a time; more are sent away")
    max_calls_per_address: int = Field(256, ge=1, description="of these, calls of one address")
    slow_call_s: float = Field(30.0, gt=0, description="a peer that takes longer to send a request or take an answer is cut off")
    connection_age_s: float = Field(600.0, ge=1, description="a connection is replaced by a new one after this long")
    traces: bool = Field(False, description="send traces to where the OTEL_EXPORTER_OTLP_* variables say; needs the extra `otel`")
    traces_of: str = Field("", description="peer ids whose traces are gone on with here, separated by commas")
    presence_ttl_s: float = Field(45.0, ge=1, le=3600, description="a peer that is silent this long is gone")
    log_level: str = Field("info", description="debug, info, warning or error")


class Limits(BaseModel):
    """What training may take of the machine; 0 = no limit."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: bool = Field(True, description="train at all")
    temperature_c: float = Field(85.0, ge=0, le=120, description="highest temperature of the GPU")
    power_w: float = Field(0.0, ge=0, le=5000, description="most power that the GPU draws")
    fan_ratio: float = Field(0.0, ge=0, le=1, description="fastest fan, as a share of its full speed")
    memory_ratio: float = Field(0.0, ge=0, le=1, description="share of the GPU's memory, kept from the next start of training on")
    time_share: float = Field(1.0, ge=0.05, le=1, description="share of the time that training may take")
    other_programs: bool = Field(True, description="train while other programs use the GPU")


class GovernorSettings(Settings):
    """`swarm join`: when a peer trains, so that it stays a good neighbour."""

    table: ClassVar[str] = "governor"
    model_config = SettingsConfigDict(frozen=True, extra="forbid", env_prefix="SWARM_GOVERNOR_", env_nested_delimiter="__")

    in_use: Limits = Field(default_factory=Limits, description="while somebody uses the machine")
    idle: Limits = Field(default_factory=Limits, description="while nobody does")
    idle_after_s: float = Field(300.0, ge=1, le=86400, description="without input for this long, nobody uses the machine")
    hours: tuple[str, ...] = Field((), description="when it may train, such as `mon-fri 18:00-08:00`; empty = always")
    on_battery: bool = Field(False, description="train on battery")
    on_metered: bool = Field(False, description="train over a metered link")
    dwell_s: float = Field(60.0, ge=0, le=3600, description="nothing may stand against training for this long before it goes on")
    nice: int = Field(10, ge=0, le=19, description="priority of the training thread; 19 yields to everything")
    disk_idle: bool = Field(True, description="use the disk only when nobody else does")


COMPONENTS: tuple[type[Settings], ...] = (PeerSettings, CoordinatorSettings, GovernorSettings)
S = TypeVar("S", bound=Settings)


def load(model: type[S], flags: dict[str, Any] | None = None) -> S:
    """The component's settings. `flags` set to None count as not given. Raises `UsageError` with every problem."""
    given = {name: value for name, value in (flags or {}).items() if value is not None}
    try:
        return model(**given)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, item['loc']))}: {_plain(item['msg'])}" for item in error.errors())
        raise UsageError(f"configuration: {problems}", "see where each value comes from: swarm config show") from error


def _plain(problem: str) -> str:
    """pydantic's words in the middle of a sentence; units keep their upper and lower case."""
    said = problem.removeprefix("Value error, ")
    return said[:1].lower() + said[1:]


def origins(model: type[Settings], flags: dict[str, Any] | None = None) -> dict[str, str]:
    """Where each field's value comes from: `flag`, the variable, the file, or `default`."""
    table = _file_table(model.table)
    prefix = model.model_config.get("env_prefix", "")
    found = {}
    for name in model.model_fields:
        variable = f"{prefix}{name}".upper()
        if (flags or {}).get(name) is not None:
            found[name] = "flag"
        elif variable in os.environ:
            found[name] = variable
        else:
            found[name] = str(config_path()) if name in table else "default"
    return found


def find_link(argument: str | None) -> JoinLink:
    """The join link: the argument, `SWARM_LINK`, `link` in the file's table `peer`, or that of the run joined last.

    Raises `LinkError`.
    """
    text = argument or os.environ.get(LINK_VARIABLE) or str(_file_table(PeerSettings.table).get("link", ""))
    text = text or remembered_link(load(PeerSettings).data_dir)
    if not text:
        raise LinkError("no join link", f"give one as argument, in {LINK_VARIABLE}, or as `link` in {config_path()}")
    return JoinLink.parse(text)


def remember_link(data_dir: Path, link: JoinLink) -> None:
    """Keep the link of the run that is joined, so that later commands need none."""
    temporary = data_dir / f".{LINK_FILE}.tmp"
    temporary.write_text(str(link))
    temporary.replace(data_dir / LINK_FILE)


def link_of(data_dir: Path) -> JoinLink:
    """The link of the run that was joined last with this folder. Raises `LinkError`."""
    text = remembered_link(data_dir)
    if not text:
        raise LinkError(f"no run was joined with {data_dir}", "name a peer's folder with --dir")
    return JoinLink.parse(text)


def remembered_link(data_dir: Path) -> str:
    """The link of the run that was joined last with this folder; empty if there is none."""
    try:
        return (data_dir / LINK_FILE).read_text()
    except (OSError, UnicodeDecodeError):
        return ""


def _file_table(name: str) -> dict[str, Any]:
    path = config_path()
    try:
        content = tomllib.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"can't read {path}: {error}", "correct or remove the file") from error
    table = content.get(name, {})
    if not isinstance(table, dict):
        raise UsageError(f"{path}: `{name}` is not a table", f"write [{name}] above its values")
    return table
