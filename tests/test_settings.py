"""Settings read from environment variables, and errors that name the variable."""

from __future__ import annotations

import pytest

from engine.profiles import choose_profile, model_profiles
from errors import SettingsError
from settings import Settings


def test_an_empty_environment_gives_the_defaults() -> None:
    assert Settings.from_env({}) == Settings()


@pytest.mark.parametrize("value", ["big", "", "TINY"])
def test_a_wrong_profile_names_the_variable(value: str) -> None:
    with pytest.raises(SettingsError, match=f'FLUX_PROFILE is "{value}". Set it to one of auto, full, tiny'):
        Settings.from_env({"FLUX_PROFILE": value})


@pytest.mark.parametrize("name", ["FLUX_DEV", "FLUX_SCHNELL"])
def test_an_empty_model_source_names_the_variable(name: str) -> None:
    with pytest.raises(SettingsError, match=name):
        Settings.from_env({name: " "})


@pytest.mark.parametrize(
    ("profile", "cuda", "chosen"),
    [("auto", True, "full"), ("auto", False, "tiny"), ("tiny", True, "tiny"), ("full", False, "full")],
)
def test_the_profile_follows_the_setting_then_the_device(profile: str, cuda: bool, chosen: str) -> None:
    assert choose_profile(Settings(profile=profile), cuda)[0] == chosen


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("9400", ("0.0.0.0", 9400)),
        ("127.0.0.1:9400", ("127.0.0.1", 9400)),
        ("[::1]:9400", ("::1", 9400)),
        ("::1:9400", ("::1", 9400)),
    ],
)
def test_metrics_listen_where_they_are_told(text: str, address: tuple[str, int]) -> None:
    assert Settings.from_env({"FLUX_METRICS_PORT": text}).metrics == address


@pytest.mark.parametrize("text", ["0", "-1", "65536", "http", "localhost:", "²"])
def test_a_port_that_is_none_names_the_variable(text: str) -> None:
    with pytest.raises(SettingsError, match="FLUX_METRICS_PORT is"):
        Settings.from_env({"FLUX_METRICS_PORT": text})


@pytest.mark.parametrize(
    ("text", "lora"),
    [("a/b", ("a/b", 1.0)), (" a/b  0.125 ", ("a/b", 0.125)), ("a/b -10", ("a/b", -10.0)), (" ", None)],
)
def test_a_base_lora_has_a_scale_behind_it(text: str, lora: tuple[str, float] | None) -> None:
    assert Settings.from_env({"FLUX_BASE_LORA": text}).base_lora == lora


@pytest.mark.parametrize("text", ["a/b 11", "a/b strong", "a/b nan", "a/b 1 2"])
def test_a_base_lora_with_another_scale_names_the_variable(text: str) -> None:
    with pytest.raises(SettingsError, match="FLUX_BASE_LORA has"):
        Settings.from_env({"FLUX_BASE_LORA": text})


def test_the_full_profile_takes_its_sources_from_the_settings() -> None:
    settings = Settings.from_env({"FLUX_PROFILE": "full", "FLUX_DEV": "/models/dev", "FLUX_SCHNELL": "/models/schnell"})
    dev, schnell = model_profiles("full", settings)
    assert (dev.source, dev.shared_source, dev.max_prompt_tokens) == ("/models/dev", "/models/dev", 512)
    assert (schnell.source, schnell.shared_source, schnell.max_prompt_tokens) == ("/models/schnell", "/models/dev", 256)
