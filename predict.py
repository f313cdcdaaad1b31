"""The Cog interface: the inputs of the contract and the steps of one prediction. Rules about inputs are in request.py.

Cog generates the schema by parsing this file, not by running it: every argument of `Input` is a literal, and every
description is one plain string. `tests/test_predict_syntax.py` checks that.
"""

import atexit
import gc
import logging
import os
import pathlib
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any, Dict, Iterator, List, MutableMapping, Optional, Tuple

from cog import BasePredictor, Input, Path, Secret

from errors import DiskError, InputError, PredictionError, UnsafeOutputError
from fetching.files import remove_folder, temporary_name
from image_metadata import xmp_packet
from images import encode
from logs import Event, configure_logging, log_stage
from lora_loading.finding.tokens import Tokens
from request import GenerationRequest, build_request
from safety.gate import Gate
from settings import Settings
from uploads import Uploads, defer_downloads

if TYPE_CHECKING:
    from PIL.Image import Image

    from lora_loading.reading.adapter import LoraAdapter
    from weights import CachedFile

logger = logging.getLogger("predict")
LEAST_OUTPUT_BYTES = 64 * 2**20
ADAPTER_CACHE_BYTES = 4 * 10**9
"""Limit of parsed LoRAs kept in host memory: about twenty of the usual size."""

ALLOCATION = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""torch's own variables, new and old."""


class Predictor(BasePredictor):
    """FLUX.1 [dev] and [schnell]: text to image, image to image and inpainting."""

    def setup(self) -> None:
        """Load the models of the profile that the settings choose."""
        with without_garbage_collection():
            self._setup()

    def _setup(self) -> None:
        started = time.monotonic()
        settings = Settings.from_env(os.environ)
        configure_logging(settings.log_format)
        if settings.metrics is not None:
            publish_metrics(settings.metrics)
        let_memory_grow(os.environ)
        # imported here: torch takes seconds, and what is above must run first
        from engine.compilation import torch_folder
        from engine.device import choose_device
        from engine.model_folders import fetch_profiles
        from engine.profiles import choose_profile, model_profiles
        from engine.start import start_engine
        from engine.timeline import Timeline
        from fetching.hub import Hub
        from fetching.hub_cache import HubCache
        from fetching.network import Client
        from lora_loading.base_lora import load_base_lora
        from lora_loading.finding.store import open_store
        from lora_loading.reading.adapter_cache import AdapterCache
        from safety.load import choose_checker, load_checker
        from safety.manifest import Weights

        timeline = Timeline()
        device = choose_device(settings.profile)
        profile, reason = choose_profile(settings, device.type == "cuda")
        logger.info("profile %s on %s: %s", profile, device, reason)
        checker, reason = choose_checker(settings.safety, profile)
        logger.info("safety checker %s: %s", checker, reason)
        models = HubCache(Hub(settings.hugging_face_endpoint, settings.hugging_face_token))
        weights = Weights(settings.safety_folder, models)
        with timeline.part("safety checker"):  # first: it fails within seconds
            self.checker = load_checker(checker, weights, device)
        self.safety_required = settings.safety_required
        self.metadata = settings.metadata
        self.loras = open_store(settings)
        defer_downloads()
        self.uploads = Uploads(Client(settings.trusted_hosts, plain_http=True))
        self.plain_http_hosts = settings.trusted_hosts
        self.adapters = AdapterCache(ADAPTER_CACHE_BYTES)
        torch_cache = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(torch_folder(torch_cache, settings.cache_dir))
        profiles = model_profiles(profile, settings)
        with timeline.part("files of the models"):
            profiles = fetch_profiles(profiles, models)
        self.engine = start_engine(profiles, settings, device, timeline)
        shapes = {name: self.engine.shapes(name) for name in self.engine.models}
        self.base_lora = load_base_lora(self.loras, shapes)
        self.outputs = OutputFolder()
        logger.info("ready in %.1f s", time.monotonic() - started)

    def healthcheck(self) -> bool:
        """Tell Cog's server that predictions can be made.

        Raises:
            ModelError: the device does not compute any more; only a new process helps.
            DiskError: there is no room for the images.
        """
        self.engine.require_working_device()
        self.outputs.require_room()
        return True

    def predict(
        self,
        prompt: str = Input(
            description="Prompt for generated image. If you include the `trigger_word` used in the training process you are more likely to activate the trained object, style, or concept in the resulting image.",
        ),
        image: Optional[Path] = Input(
            description="Input image for image to image or inpainting mode. If provided, aspect_ratio, width, and height inputs are ignored.",
        ),
        mask: Optional[Path] = Input(
            description="Image mask for image inpainting mode. If provided, aspect_ratio, width, and height inputs are ignored.",
        ),
        aspect_ratio: str = Input(
            default="1:1",
            choices=["1:1", "16:9", "21:9", "3:2", "2:3", "4:5", "5:4", "3:4", "4:3", "9:16", "9:21", "custom"],
            description="Aspect ratio for the generated image. If custom is selected, uses height and width below & will run in bf16 mode",
        ),
        height: Optional[int] = Input(
            ge=256,
            le=1440,
            description="Height of generated image. Only works if `aspect_ratio` is set to custom. Will be rounded to nearest multiple of 16. Incompatible with fast generation",
        ),
        width: Optional[int] = Input(
            ge=256,
            le=1440,
            description="Width of generated image. Only works if `aspect_ratio` is set to custom. Will be rounded to nearest multiple of 16. Incompatible with fast generation",
        ),
        prompt_strength: float = Input(
            default=0.8,
            ge=0,
            le=1,
            description="Prompt strength when using img2img. 1.0 corresponds to full destruction of information in image",
        ),
        model: str = Input(
            default="dev",
            choices=["dev", "schnell"],
            description="Which model to run inference with. The dev model performs best with around 28 inference steps but the schnell model only needs 4 steps.",
        ),
        num_outputs: int = Input(
            default=1,
            ge=1,
            le=4,
            description="Number of outputs to generate",
        ),
        num_inference_steps: int = Input(
            default=28,
            ge=1,
            le=50,
            description="Number of denoising steps. More steps can give more detailed images, but take longer.",
        ),
        guidance_scale: float = Input(
            default=3,
            ge=0,
            le=10,
            description="Guidance scale for the diffusion process. Lower values can give more realistic images. Good values to try are 2, 2.5, 3 and 3.5",
        ),
        seed: Optional[int] = Input(
            description="Random seed. Set for reproducible generation",
        ),
        output_format: str = Input(
            default="webp",
            choices=["webp", "jpg", "png"],
            description="Format of the output images",
        ),
        output_quality: int = Input(
            default=80,
            ge=0,
            le=100,
            description="Quality when saving the output images, from 0 to 100. 100 is best quality, 0 is lowest quality. Not relevant for .png outputs",
        ),
        disable_safety_checker: bool = Input(
            default=False,
            description="Disable safety checker for generated images.",
        ),
        go_fast: bool = Input(
            default=False,
            description="Run faster predictions with model optimized for speed (currently fp8 quantized); disable to run in original bf16",
        ),
        megapixels: str = Input(
            default="1",
            choices=["1", "0.25"],
            description="Approximate number of megapixels for generated image",
        ),
        replicate_weights: Optional[str] = Input(
            description="Load LoRA weights. Supports Replicate models in the format <owner>/<username> or <owner>/<username>/<version>, HuggingFace URLs in the format huggingface.co/<owner>/<model-name>, CivitAI URLs in the format civitai.com/models/<id>[/<model-name>], or arbitrary .safetensors URLs from the Internet. For example, 'fofr/flux-pixar-cars'",
        ),
        lora_scale: float = Input(
            default=1,
            ge=-1,
            le=3,
            description="Determines how strongly the main LoRA should be applied. Sane results between 0 and 1 for base inference. For go_fast we apply a 1.5x multiplier to this value; we've generally seen good performance when scaling the base value by that amount. You may still need to experiment to find the best value for your particular lora.",
        ),
        extra_lora: Optional[str] = Input(
            description="Load LoRA weights. Supports Replicate models in the format <owner>/<username> or <owner>/<username>/<version>, HuggingFace URLs in the format huggingface.co/<owner>/<model-name>, CivitAI URLs in the format civitai.com/models/<id>[/<model-name>], or arbitrary .safetensors URLs from the Internet. For example, 'fofr/flux-pixar-cars'",
        ),
        extra_lora_scale: float = Input(
            default=1,
            ge=-1,
            le=3,
            description="Determines how strongly the extra LoRA should be applied. Sane results between 0 and 1 for base inference. For go_fast we apply a 1.5x multiplier to this value; we've generally seen good performance when scaling the base value by that amount. You may still need to experiment to find the best value for your particular lora.",
        ),
        hf_api_token: Optional[Secret] = Input(
            description="Hugging Face API token. Needed when a LoRA comes from a gated or private repository.",
        ),
        civitai_api_token: Optional[Secret] = Input(
            description="CivitAI API token. Needed when a LoRA's download asks for a login.",
        ),
    ) -> List[Path]:
        """Return the image files, in order; they are removed when the next prediction starts."""
        started = time.monotonic()
        try:
            refuse_unchecked(disable_safety_checker, self.safety_required)
            with self.uploads.fetched(image, mask) as (image_file, mask_file):
                request = build_request(
                    prompt=prompt,
                    image=image_file,
                    mask=mask_file,
                    aspect_ratio=aspect_ratio,
                    height=height,
                    width=width,
                    prompt_strength=prompt_strength,
                    model=model,
                    num_outputs=num_outputs,
                    num_inference_steps=num_inference_steps,
                    guidance_scale=guidance_scale,
                    seed=seed,
                    output_format=output_format,
                    output_quality=output_quality,
                    go_fast=go_fast,
                    megapixels=megapixels,
                    replicate_weights=replicate_weights,
                    lora_scale=lora_scale,
                    extra_lora=extra_lora,
                    extra_lora_scale=extra_lora_scale,
                    default_lora=self.loras.default_lora,
                    plain_http_hosts=self.plain_http_hosts,
                )
                size_bytes = sum(file.stat().st_size for file in (image_file, mask_file) if file is not None)
            self._announce(request, Event("inputs", time.monotonic() - started, size_bytes))
            stack = self._adapters(request, hf_api_token, civitai_api_token)
            folder = self.outputs.fresh()
            gate = Gate(self.checker)
            made = self.engine.generate(request, stack, self._base(request.model))
            # an image is encoded while the next one is made
            with closing(made) as images, ThreadPoolExecutor(max_workers=1) as encoder:
                passing = enumerate(images) if disable_safety_checker else gate.passing(images)
                written = [
                    encoder.submit(write, folder, index, output, request, self._xmp(request, index, stack))
                    for index, output in passing
                ]
            files = [Path(file.result()) for file in written]
            self._report(gate)
            gate.require_one()
            event = Event("prediction", time.monotonic() - started, outcome="succeeded", images=len(files))
            log_stage(logger, event, f"images made: {len(files)}, in {event.seconds:.1f} s")
            return files
        except BaseException as error:  # a cancellation is a BaseException
            self.outputs.clear()
            log_failure(error, time.monotonic() - started)
            raise

    def _announce(self, request: GenerationRequest, read: Event) -> None:
        for note in request.notes:
            logger.info("%s", note)
        logger.info("Using seed: %d", request.seed)  # clients of other FLUX predictors match this line
        what = f"{request.model} {request.mode.value}, {request.size.width}x{request.size.height}"
        log_stage(logger, read, f"{what}, {request.num_inference_steps} steps; inputs read in {read.seconds:.2f} s")
        self.record_metric("seed", request.seed)

    def _adapters(
        self, request: GenerationRequest, hf_api_token: Optional[Secret], civitai_api_token: Optional[Secret]
    ) -> "List[Tuple[LoraAdapter, float]]":
        """Fetch every LoRA of the request and check it against the model; return the adapters and their scales."""
        tokens = Tokens(revealed(hf_api_token), revealed(civitai_api_token))
        shapes = self.engine.shapes(request.model)
        stack, facts = [], []
        for reference, scale in request.loras:
            with self.loras.open(reference, tokens) as file:
                started = time.monotonic()
                config = file.fact("adapter_config.json")
                adapter = self.adapters.get(file.path, shapes, file.sha256, reference.label, config)
            event = Event("read_lora", time.monotonic() - started, file.size_bytes)
            found = f"scale {scale:g}, {adapter.summary}, read in {event.seconds:.2f} s"
            log_stage(logger, event, f"LoRA {reference.label}: {found}")
            stack.append((adapter, scale))
            facts.append(lora_facts(adapter, file))
        if facts:
            self.record_metric("loras", facts)
        return stack

    def _base(self, model: str) -> "List[Tuple[LoraAdapter, float]]":
        """The operator's base LoRA and its scale, if there is one."""
        return [] if self.base_lora is None else [(self.base_lora.adapters[model], self.base_lora.scale)]

    def _xmp(self, request: GenerationRequest, index: int, stack: "List[Tuple[LoraAdapter, float]]") -> Optional[bytes]:
        base = None if self.base_lora is None else self.base_lora.facts
        return xmp_packet(self.metadata, request, index, [adapter.digest for adapter, _ in stack], base)

    def _report(self, gate: Gate) -> None:
        if gate.checked:
            event = Event("check", gate.seconds, images=gate.checked, withheld=gate.withheld)
            found = f"{gate.checked} checked, {gate.withheld} withheld"
            log_stage(logger, event, f"safety: {found}, in {gate.seconds:.2f} s")
        else:
            logger.info("safety: not checked, as disable_safety_checker asks")
        self.record_metric("safety_checked", gate.checked)
        self.record_metric("safety_withheld", gate.withheld)
        self.record_metric("safety_seconds", round(gate.seconds, 3))


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Pause Python's cycle collector, and exempt from it for good what is alive afterwards.

    Importing torch and diffusers makes half a million objects that stay to the end. Looking through them again and again
    took a quarter of the setup's time, and makes each later collection slower.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


class OutputFolder:
    """The temporary folder of the current prediction's files; removed at the next prediction and at exit."""

    def __init__(self) -> None:
        self._current: Optional[pathlib.Path] = None
        atexit.register(self.clear)

    def fresh(self) -> pathlib.Path:
        """Remove the current folder and return a new, empty one with a unique name."""
        self.clear()
        self._current = temporary_name("flux-")
        self._current.mkdir(mode=0o700)
        return self._current

    def require_room(self) -> None:
        """Make sure that the folder of temporary files has room for a prediction's images.

        Raises:
            DiskError: it has less than 64 MiB left.
        """
        folder = temporary_name("").parent
        free_bytes = shutil.disk_usage(folder).free
        if free_bytes < LEAST_OUTPUT_BYTES:
            raise DiskError(f"The disk of {folder} has {free_bytes >> 20} MiB left for images. Make room there.")

    def clear(self) -> None:
        """Remove the current folder with its files. After a cancellation a thread may still write its image there: what
        it adds while the folder is emptied is removed in the next round, and without the folder it ends with an error."""
        if self._current is not None:
            remove_folder(self._current)
        self._current = None


def write(
    folder: pathlib.Path, index: int, image: "Image", request: GenerationRequest, xmp: Optional[bytes]
) -> pathlib.Path:
    """Encode an image with its XMP packet into a new file in `folder` and return its path."""
    started = time.monotonic()
    file = folder / f"{folder.name}-{index}.{request.output_format}"
    content = encode(image, request.output_format, request.output_quality, xmp)
    file.write_bytes(content)
    event = Event("write", time.monotonic() - started, len(content))
    log_stage(logger, event, f"image {index}: {len(content) / 1e3:.0f} kB written in {event.seconds:.2f} s")
    return file


def log_failure(error: BaseException, seconds: float) -> None:
    """Log why a prediction failed: user errors by their message, unexpected ones with a traceback, a cancellation briefly."""
    kind = type(error).__name__
    if isinstance(error, PredictionError):
        outcome = "withheld" if isinstance(error, UnsafeOutputError) else "failed"
        logger.error("%s: %s", kind, error, extra=ended(outcome, seconds, kind))
    elif isinstance(error, Exception):
        logger.error("the prediction failed", exc_info=error, extra=ended("failed", seconds, kind))
    else:
        logger.info("prediction cancelled: %s", kind, extra=ended("cancelled", seconds))


def ended(outcome: str, seconds: float, error: Optional[str] = None) -> Dict[str, Event]:
    """What a log record carries about a prediction without images."""
    return {"event": Event("prediction", seconds, outcome=outcome, error=error)}


def let_memory_grow(environment: MutableMapping[str, str]) -> None:
    """Have torch grow its blocks of CUDA memory in place, unless the operator says how it allocates; before CUDA starts.

    Requests of many sizes, and weights that come and go on smaller cards, otherwise leave gaps between blocks of fixed
    sizes: memory that is free, and of no use.
    """
    if not any(name in environment for name in ALLOCATION):
        environment[ALLOCATION[0]] = "expandable_segments:True"


def publish_metrics(address: Tuple[str, int]) -> None:
    """Count what is logged from now on, and serve the counts to Prometheus.

    Raises:
        SettingsError: the address cannot be listened on.
    """
    from metrics import Metrics, serve_metrics

    metrics = Metrics()
    serve_metrics(metrics, address)
    logging.getLogger().addHandler(metrics)
    logger.info("metrics on http://%s:%d/metrics", *address)


def lora_facts(adapter: "LoraAdapter", file: "CachedFile") -> Dict[str, Any]:
    """A LoRA's entry in the metrics: format, size, trigger words, cache outcome and seconds to fetch it."""
    return {
        "format": adapter.format,
        "rank": max(adapter.ranks),
        "layers": sum(adapter.count(component) for component in adapter.components),
        "megabytes": round(file.size_bytes / 1e6, 1),
        "trigger_words": ", ".join([*adapter.trigger_words, *filter(None, [file.fact("trigger words")])]),
        "cache": file.outcome,
        "seconds": round(file.seconds, 3),
    }


def refuse_unchecked(disabled: bool, required: bool) -> None:
    """Refuse `disable_safety_checker` where the operator requires the checker.

    Raises:
        InputError: the request disables a required checker.
    """
    if disabled and required:
        raise InputError(
            "disable_safety_checker is set, but this server checks every image. Leave disable_safety_checker false."
        )


def revealed(secret: Optional[Secret]) -> Optional[str]:
    """The value of a secret input; None when absent or blank."""
    text = None if secret is None else secret.get_secret_value()
    return (text or "").strip() or None
