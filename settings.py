"""The operator's settings, read once from environment variables. No other module reads the environment."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from errors import SettingsError

PROFILES = ("auto", "full", "tiny")
LOG_FORMATS = ("text", "json")
METADATA = ("off", "mark", "settings", "prompt")
COMPILE = ("auto", "on", "off")
YES, NO = ("1", "true", "yes", "on"), ("0", "false", "no", "off")
GIGABYTE = 10**9

_SCALE = re.compile(r"-?(10|\d(\.\d+)?|\.\d+)")


@dataclass(frozen=True)
class Settings:
    """The settings, constant after setup. Tokens are excluded from `repr`."""

    profile: str = "auto"
    """`full`, `tiny`, or `auto`: full with a CUDA device, else tiny."""
    dev: str = "black-forest-labs/FLUX.1-dev"
    """FLUX.1 [dev]: a Hub repository or a local folder in diffusers layout."""
    schnell: str = "black-forest-labs/FLUX.1-schnell"
    """FLUX.1 [schnell], likewise; only its transformer and scheduler are loaded, the other components are dev's."""
    cache_dir: Path = Path("~/.cache/flux-predictor")
    """Where downloaded LoRA files are kept; may begin with `~`."""
    graphs_dir: Path | None = None
    """Where compiled graphs are kept; None for a folder in `cache_dir`. May begin with `~`."""
    cache_min_free_bytes: int = 10 * GIGABYTE
    cache_max_bytes: int | None = None
    max_download_bytes: int = 2 * GIGABYTE
    """Size limit of a LoRA file."""
    default_lora: str | None = None
    """The LoRA of requests without `replicate_weights`."""
    base_lora: tuple[str, float] | None = None
    """A LoRA that is part of every image, and its scale, which `go_fast_lora_gain` does not change."""
    go_fast_lora_gain: float = 1.5
    """The factor on LoRA scales under go_fast."""
    compile: str = "auto"
    """`on`, `off`, or `auto`: whether the transformers are compiled; on with a CUDA device."""
    safety: str = "auto"
    """`reference`, `embedded`, `strict`, or `auto`: reference with the full profile, else embedded."""
    safety_required: bool = False
    """Whether requests with `disable_safety_checker` are refused."""
    safety_folder: str | None = None
    """Folder with the weights of `reference` and `strict` as `<owner>/<name>/model.safetensors`; None fetches them from
    the Hub."""
    metadata: str = "settings"
    """What output files carry: `off`, `mark` (that they are generated), `settings`, `prompt` (settings and prompt)."""
    log_format: str = "text"
    """`text` or `json`."""
    metrics: tuple[str, int] | None = None
    """Host and port at which Prometheus finds the metrics; None serves none."""
    trusted_hosts: frozenset[str] = frozenset()
    """Hosts ("host" or "host:port") that may use plain http and private addresses."""
    share_operator_tokens: bool = False
    """Whether callers' LoRAs are fetched with the operator's tokens when the caller gives none."""
    hugging_face_endpoint: str | None = None
    civitai_endpoint: str | None = None
    replicate_endpoint: str | None = None
    hugging_face_token: str | None = field(default=None, repr=False)
    civitai_token: str | None = field(default=None, repr=False)
    replicate_token: str | None = field(default=None, repr=False)

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> Settings:
        """Read the settings from environment variables; empty optional ones count as unset.

        Raises:
            SettingsError: a variable has an invalid value.
        """
        return cls(
            profile=_choice(environ, "FLUX_PROFILE", PROFILES, cls.profile),
            dev=_filled(environ, "FLUX_DEV", cls.dev),
            schnell=_filled(environ, "FLUX_SCHNELL", cls.schnell),
            cache_dir=_cache_dir(environ),
            graphs_dir=_folder(environ, "FLUX_GRAPHS_DIR"),
            cache_min_free_bytes=_gigabytes(environ, "FLUX_CACHE_MIN_FREE_GB", cls.cache_min_free_bytes),
            cache_max_bytes=_gigabytes(environ, "FLUX_CACHE_MAX_GB", 0) or None,
            max_download_bytes=_gigabytes(environ, "FLUX_MAX_DOWNLOAD_GB", cls.max_download_bytes),
            default_lora=_optional(environ, "FLUX_DEFAULT_LORA"),
            base_lora=_with_scale(environ, "FLUX_BASE_LORA"),
            go_fast_lora_gain=_gain(environ, "FLUX_GO_FAST_LORA_GAIN", cls.go_fast_lora_gain),
            compile=_choice(environ, "FLUX_COMPILE", COMPILE, cls.compile),
            safety=environ.get("FLUX_SAFETY", cls.safety),
            safety_required=_switch(environ, "FLUX_SAFETY_REQUIRED", cls.safety_required),
            safety_folder=_optional(environ, "FLUX_SAFETY_FOLDER"),
            metadata=_choice(environ, "FLUX_METADATA", METADATA, cls.metadata),
            log_format=_choice(environ, "FLUX_LOG_FORMAT", LOG_FORMATS, cls.log_format),
            metrics=_listening(environ, "FLUX_METRICS_PORT"),
            trusted_hosts=frozenset(_listed(environ, "FLUX_TRUSTED_HOSTS")),
            share_operator_tokens=_switch(environ, "FLUX_SHARE_OPERATOR_TOKENS", cls.share_operator_tokens),
            hugging_face_endpoint=_endpoint(environ, "HF_ENDPOINT"),
            civitai_endpoint=_endpoint(environ, "CIVITAI_ENDPOINT"),
            replicate_endpoint=_endpoint(environ, "REPLICATE_ENDPOINT"),
            hugging_face_token=_optional(environ, "HF_TOKEN"),
            civitai_token=_optional(environ, "CIVITAI_API_TOKEN"),
            replicate_token=_optional(environ, "REPLICATE_API_TOKEN"),
        )


def _optional(environ: Mapping[str, str], name: str) -> str | None:
    return environ.get(name, "").strip() or None


def _choice(environ: Mapping[str, str], name: str, choices: tuple[str, ...], default: str) -> str:
    value = environ.get(name, default)
    if value not in choices:
        raise SettingsError(f'{name} is "{value}". Set it to one of {", ".join(choices)}.')
    return value


def _filled(environ: Mapping[str, str], name: str, default: str) -> str:
    value = environ.get(name, default).strip()
    if not value:
        raise SettingsError(f"{name} is empty. Set it to a Hub repository or a local folder, or unset it.")
    return value


def _folder(environ: Mapping[str, str], name: str) -> Path | None:
    named = _optional(environ, name)
    return None if named is None else Path(named)


def _cache_dir(environ: Mapping[str, str]) -> Path:
    named = _optional(environ, "FLUX_CACHE_DIR")
    if named is not None:
        return Path(named)
    caches = _optional(environ, "XDG_CACHE_HOME")
    return Path(caches) / "flux-predictor" if caches else Settings.cache_dir


def _gigabytes(environ: Mapping[str, str], name: str, default_bytes: int) -> int:
    value = _number(environ, name, 1e6, "a number of gigabytes, such as 10 or 0.5")
    return default_bytes if value is None else int(value * GIGABYTE)


def _gain(environ: Mapping[str, str], name: str, default: float) -> float:
    value = _number(environ, name, 10, "a factor from 0 to 10, such as 1.5")
    return default if value is None else value


def _with_scale(environ: Mapping[str, str], name: str) -> tuple[str, float] | None:
    """A LoRA reference and the scale behind it, 1 where there is none."""
    text = _optional(environ, name)
    if text is None:
        return None
    reference, *scale = text.split()
    if len(scale) > 1 or (scale and not _SCALE.fullmatch(scale[0])):
        wanted = "a LoRA reference, and perhaps a scale from -10 to 10 behind a blank, such as owner/name 0.125"
        raise SettingsError(f'{name} has "{" ".join(scale)}" behind the reference. Set it to {wanted}.')
    return reference, float(scale[0]) if scale else 1.0


def _number(environ: Mapping[str, str], name: str, below: float, wanted: str) -> float | None:
    text = _optional(environ, name)
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < below:
        raise SettingsError(f'{name} is "{text}". Set it to {wanted}.')
    return value


def _switch(environ: Mapping[str, str], name: str, default: bool) -> bool:
    text = environ.get(name, "").strip().lower()
    if text and text not in (*YES, *NO):
        raise SettingsError(f'{name} is "{text}". Set it to 1 or 0.')
    return text in YES if text else default


def _listed(environ: Mapping[str, str], name: str) -> list[str]:
    hosts = [host.strip().lower() for host in environ.get(name, "").split(",") if host.strip()]
    for host in hosts:
        if "/" in host or "@" in host:
            raise SettingsError(f'{name} holds "{host}". Set it to host or host:port, separated by commas.')
    return hosts


def _listening(environ: Mapping[str, str], name: str) -> tuple[str, int] | None:
    """`port` or `host:port`; without a host all interfaces, as Cog's server listens in an image."""
    text = _optional(environ, name)
    if text is None:
        return None
    host, _, port = text.rpartition(":")
    if not port.isdecimal() or not 0 < int(port) < 2**16:
        raise SettingsError(f'{name} is "{text}". Set it to a port, such as 9400, or to host:port.')
    return host.strip("[]") or "0.0.0.0", int(port)  # noqa: S104 - see above


def _endpoint(environ: Mapping[str, str], name: str) -> str | None:
    value = _optional(environ, name)
    if value is not None and not value.startswith(("https://", "http://")):
        raise SettingsError(f'{name} is "{value}". Set it to an address that begins with https://.')
    return None if value is None else value.rstrip("/")
