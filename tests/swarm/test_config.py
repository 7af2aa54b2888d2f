"""Configuration: flag > variable > file > default, and where each value came from."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from swarm.config import CoordinatorSettings, PeerSettings, find_link, load, origins, remember_link
from swarm.errors import LinkError, UsageError
from swarm.messages import JoinLink

LINK = str(JoinLink("host", 1, b"\x01" * 32, b"\x02" * 32))


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty configuration file that is in force, and no variables."""
    for name in ("SWARM_LINK", "SWARM_GPU", "SWARM_COORDINATOR_LISTEN"):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "config.toml"
    monkeypatch.setenv("SWARM_CONFIG", str(path))
    return path


def test_precedence(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each source beats those after it, and `origins` names the winner."""
    assert load(CoordinatorSettings).listen == "0.0.0.0:4300"
    assert origins(CoordinatorSettings)["listen"] == "default"
    file.write_text('[coordinator]\nlisten = "file:1"\n')
    assert load(CoordinatorSettings).listen == "file:1"
    assert origins(CoordinatorSettings)["listen"] == str(file)
    monkeypatch.setenv("SWARM_COORDINATOR_LISTEN", "variable:1")
    assert load(CoordinatorSettings).listen == "variable:1"
    assert origins(CoordinatorSettings)["listen"] == "SWARM_COORDINATOR_LISTEN"
    flags = {"listen": "flag:1", "db": None}
    assert load(CoordinatorSettings, flags).listen == "flag:1"
    assert origins(CoordinatorSettings, flags)["listen"] == "flag"
    assert origins(CoordinatorSettings, flags)["db"] == "default"


def test_caps_come_with_units_from_everywhere(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flag, a variable and the file are read alike, and a mistake in any of them is explained."""
    file.write_text('[peer]\nmax_upload = "10Mbit/s"\nmonthly_quota = "200GB"\n')
    monkeypatch.setenv("SWARM_MAX_DOWNLOAD", "50 Mbit/s")
    settings = load(PeerSettings, {"monthly_quota": "1TiB"})
    assert (settings.max_upload, settings.max_download, settings.monthly_quota) == (1_250_000, 6_250_000, 1 << 40)
    assert load(PeerSettings).monthly_quota == 200 * 10**9
    monkeypatch.setenv("SWARM_MAX_DOWNLOAD", "50")
    with pytest.raises(UsageError, match=r"max_download: .*unit is missing.*Mbit/s"):
        load(PeerSettings)


def test_settings_are_frozen(file: Path) -> None:
    """A loaded configuration can't be changed."""
    with pytest.raises(ValidationError):
        load(PeerSettings).gpu = "1"  # type: ignore[misc]


def test_mistakes_are_named(file: Path) -> None:
    """Unknown names, wrong values and broken files are usage errors that say where."""
    file.write_text('[coordinator]\nlisen = "x"\npresence_ttl_s = -1\n')
    with pytest.raises(UsageError, match=r"(?s)lisen.*|presence_ttl_s.*") as caught:
        load(CoordinatorSettings)
    assert "lisen" in caught.value.message
    assert "presence_ttl_s" in caught.value.message
    file.write_text("not toml")
    with pytest.raises(UsageError, match="can't read"):
        load(CoordinatorSettings)
    file.write_text("coordinator = 3")
    with pytest.raises(UsageError, match="not a table"):
        load(CoordinatorSettings)


def test_link_sources(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The link comes from the argument, the variable, the file, or the last run; without any the hint lists the first three."""
    data = file.parent / "data"
    data.mkdir()
    monkeypatch.setenv("SWARM_DATA_DIR", str(data))
    with pytest.raises(LinkError) as caught:
        find_link(None)
    assert "SWARM_LINK" in caught.value.hint
    remember_link(data, JoinLink.parse(LINK.replace("host", "joined")))
    assert find_link(None).host == "joined"
    file.write_text(f'[peer]\nlink = "{LINK}"\n')
    assert str(find_link(None)) == LINK
    monkeypatch.setenv("SWARM_LINK", LINK.replace("host", "variable"))
    assert find_link(None).host == "variable"
    assert find_link(LINK.replace("host", "argument")).host == "argument"
