"""The model profiles, as rows of a table. Knows settings and folders; loads nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from settings import Settings

TINY = Path(__file__).parent / "tiny"


@dataclass(frozen=True)
class ModelProfile:
    """Where one model's parts come from, each a Hub repository or a folder in diffusers layout."""

    name: str
    source: str
    """Holds the transformer and the scheduler."""
    shared_source: str
    """Holds the text encoders, the tokenizers and the VAE, loaded once for all models that name the same."""
    max_prompt_tokens: int
    """Length that the T5 prompt is padded or cut to; what the model was trained with."""


def choose_profile(settings: Settings, cuda: bool) -> tuple[str, str]:
    """The profile to serve, "full" or "tiny", and the reason in words."""
    if settings.profile != "auto":
        return settings.profile, "FLUX_PROFILE says so"
    if cuda:
        return "full", "FLUX_PROFILE is auto and there is a CUDA device"
    return "tiny", "FLUX_PROFILE is auto and there is no CUDA device"


def model_profiles(profile: str, settings: Settings) -> tuple[ModelProfile, ...]:
    """The models of a profile; their names are the choices of the `model` input."""
    if profile == "full":
        return (
            ModelProfile("dev", settings.dev, settings.dev, 512),
            ModelProfile("schnell", settings.schnell, settings.dev, 256),
        )
    shared = str(TINY / "tiny-dev")
    return (
        ModelProfile("dev", shared, shared, 32),
        ModelProfile("schnell", str(TINY / "tiny-schnell"), shared, 32),
    )
