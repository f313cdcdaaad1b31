"""The models of each profile, as rows of a table. Loads no model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engine.vocabulary import Vocabulary, read_vocabulary
from settings import Settings

TINY = Path(__file__).parent / "tiny"


@dataclass(frozen=True)
class ModelProfile:
    """Where one model's components come from. A source is a Hub repository or a local folder in diffusers layout."""

    name: str
    source: str
    """Holds the transformer and the scheduler."""
    shared_source: str
    """Holds the text encoders, the tokenizers and the VAE, loaded once for all models that name the same."""
    max_prompt_tokens: int
    """The length that T5 prompts are padded or cut to, as in the model's training."""
    vocabulary: Vocabulary | None = None
    """Of a model that knows few words; the log names the others."""


def choose_profile(settings: Settings, cuda: bool) -> tuple[str, str]:
    """The profile to serve, "full" or "tiny", and the reason in words."""
    if settings.profile != "auto":
        return settings.profile, "FLUX_PROFILE says so"
    if cuda:
        return "full", "FLUX_PROFILE is auto and there is a CUDA device"
    return "tiny", "FLUX_PROFILE is auto and there is no CUDA device"


def model_profiles(profile: str, settings: Settings) -> tuple[ModelProfile, ...]:
    """The models of a profile; a model's name is a choice of the `model` input in predict.py.

    All models of a profile must have blocks of the same widths: go_fast's working copy is shared by them.
    """
    tiny_dev, tiny_schnell = str(TINY / "tiny-dev"), str(TINY / "tiny-schnell")
    vocabulary = read_vocabulary(TINY / "vocabulary.json")
    rows = {
        "full": (
            ModelProfile("dev", settings.dev, settings.dev, 512),
            ModelProfile("schnell", settings.schnell, settings.dev, 256),
        ),
        "tiny": (
            ModelProfile("dev", tiny_dev, tiny_dev, 40, vocabulary),
            ModelProfile("schnell", tiny_schnell, tiny_dev, 40, vocabulary),
        ),
    }
    return rows[profile]
