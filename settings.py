"""The operator's settings, read once from the environment. No other module reads the environment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from errors import SettingsError

PROFILES = ("auto", "full", "tiny")


@dataclass(frozen=True)
class Settings:
    """What the operator decided; fixed after setup."""

    profile: str = "auto"
    """`full`, `tiny`, or `auto`: full with a CUDA device, else tiny."""
    dev: str = "black-forest-labs/FLUX.1-dev"
    """FLUX.1 [dev]: a Hub repository or a local folder in diffusers layout."""
    schnell: str = "black-forest-labs/FLUX.1-schnell"
    """FLUX.1 [schnell], likewise; only its transformer and scheduler are read, the rest is dev's."""

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> Settings:
        """Read the settings.

        Raises:
            SettingsError: a variable holds a value that cannot be.
        """
        profile = environ.get("FLUX_PROFILE", cls.profile)
        if profile not in PROFILES:
            raise SettingsError(f'FLUX_PROFILE is "{profile}". Set it to one of {", ".join(PROFILES)}.')
        return cls(
            profile=profile,
            dev=_filled(environ, "FLUX_DEV", cls.dev),
            schnell=_filled(environ, "FLUX_SCHNELL", cls.schnell),
        )


def _filled(environ: Mapping[str, str], name: str, default: str) -> str:
    value = environ.get(name, default).strip()
    if not value:
        raise SettingsError(f"{name} is empty. Set it to a Hub repository or a local folder, or unset it.")
    return value
