"""Settings: read once, refused with one line per wrong variable."""

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import Field, ValidationError

from gpumesh_runtime.config import CommaList, ConfigError, Settings, settings_config


class ShopSettings(Settings):
    """A settings class as a service declares it."""

    model_config = settings_config("GPUMESH_SHOP_")

    port: int = Field(8080, ge=1, le=65535)
    routers: CommaList = ()
    secret: str = Field(default="", max_length=3)
    required_url: str


@pytest.fixture
def env(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setenv("GPUMESH_SHOP_REQUIRED_URL", "x")
    return monkeypatch


def test_values_come_from_prefixed_variables_and_are_frozen(env: pytest.MonkeyPatch) -> None:
    env.setenv("GPUMESH_SHOP_PORT", "9")
    env.setenv("GPUMESH_SHOP_ROUTERS", "a:1, b:2,")
    settings = ShopSettings.read()
    assert (settings.port, settings.routers, settings.trace_ratio) == (9, ("a:1", "b:2"), 0.01)
    with pytest.raises(ValidationError):
        settings.port = 3


def test_each_wrong_variable_is_one_line_that_names_it_and_not_its_value(env: pytest.MonkeyPatch) -> None:
    env.setenv("GPUMESH_SHOP_PORT", "many")
    env.setenv("GPUMESH_SHOP_SECRET", "hunter2")
    env.setenv("GPUMESH_SHOP_ROUTER", "a:1")
    env.delenv("GPUMESH_SHOP_REQUIRED_URL")
    with pytest.raises(ConfigError) as caught:
        ShopSettings.read()
    lines = caught.value.lines
    assert lines[0] == "GPUMESH_SHOP_ROUTER: is not a setting of this process; did you mean GPUMESH_SHOP_ROUTERS?"
    assert any(line.startswith("GPUMESH_SHOP_PORT: ") and "integer" in line for line in lines)
    assert "GPUMESH_SHOP_REQUIRED_URL: is not set; it is required" in lines
    assert len(lines) == 4
    assert "hunter2" not in str(caught.value)


def test_an_unknown_variable_alone_is_an_error(env: pytest.MonkeyPatch) -> None:
    env.setenv("GPUMESH_SHOP_ZZZ", "1")
    with pytest.raises(ConfigError, match="GPUMESH_SHOP_ZZZ"):
        ShopSettings.read()


def test_metrics_are_for_loopback(env: pytest.MonkeyPatch) -> None:
    env.setenv("GPUMESH_SHOP_METRICS_ADDRESS", "192.0.2.1:9")
    with pytest.raises(ConfigError, match="METRICS_ADDRESS"):
        ShopSettings.read()


def test_missing_certificates_are_named(env: pytest.MonkeyPatch, tmp_path: Path) -> None:
    env.setenv("GPUMESH_SHOP_TLS_CA", "/nowhere/ca.crt")
    with pytest.raises(ConfigError) as caught:
        ShopSettings.read().tls()
    assert [line.partition(":")[0] for line in caught.value.lines] == ["GPUMESH_SHOP_TLS_CERT", "GPUMESH_SHOP_TLS_KEY"]
    (tmp_path / "c").write_text("")
    settings = ShopSettings.read(tls_cert=tmp_path / "c", tls_key=tmp_path / "c")
    with pytest.raises(ConfigError, match=r"cannot read /nowhere/ca\.crt"):
        settings.tls()


def test_a_wrong_environment_ends_the_process_with_78_and_no_traceback() -> None:
    code = "from gpumesh_runtime.config import Settings; Settings.load()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"GPUMESH_LOG_LEVEL": "loud"},
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert done.returncode == 78
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("configuration: GPUMESH_LOG_LEVEL: ")
