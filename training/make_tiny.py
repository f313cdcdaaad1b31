"""Make the embedded checkpoints from nothing: `python -m training.make_tiny`, behind `script/make-tiny`.

Every stage writes its result into the work folder and is skipped when that is there already, so that an interrupted
run goes on. The last stage writes `engine/tiny/` and `tests/data/loras/`.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from training.data import Bucket, Pool, batches, make_pool
from training.distil import SCHNELL_GUIDANCE, Loss, few_step_loss, fold_guidance, guidance_loss, plain_loss
from training.loras import train_lora
from training.position import WEIGHT as POSITION_WEIGHT
from training.position import PositionTask
from training.text import TextEncoders, train_text_encoders
from training.train import Schedule, new_transformer, train
from training.vae import train_vae

logger = logging.getLogger("make-tiny")

PROJECT = Path(__file__).parent.parent
TINY = PROJECT / "engine" / "tiny"
BEGINNING = "beginning"
SEED = 0
FIRST_SCHEDULE = Schedule(steps=10000, peak=1.2e-3, warmup=200, decay=0.3, muon=True)
GUIDED_SCHEDULE = Schedule(steps=400, peak=6e-4, warmup=20, decay=0.8)
SCHNELL_SCHEDULE = Schedule(steps=400, peak=5e-4, warmup=20, decay=0.8)

IMAGES = {
    (128, 128): 8000, (256, 256): 10000, (448, 256): 600, (256, 448): 600, (512, 512): 8000, (1024, 1024): 1000,
    (1344, 768): 1000, (768, 1344): 1000,
}  # fmt: skip
"""How many images of each size are drawn and encoded: with 500 of 512x512, the loss on held-out scenes there was
twice that on the trained ones after 6,000 steps, and rising."""


def _buckets(*rows: tuple[tuple[int, int], float, int | None]) -> list[Bucket]:
    return [Bucket(size, share, IMAGES[size], keep) for size, share, keep in rows]


FIRST_BUCKETS = _buckets(
    ((128, 128), 0.06, None),
    ((256, 256), 0.30, 64),
    ((448, 256), 0.01, 64),
    ((256, 448), 0.01, 64),
    ((512, 512), 0.36, 64),
    ((1024, 1024), 0.08, 64),
    ((1344, 768), 0.09, 64),
    ((768, 1344), 0.09, 64),
)
"""Composition is learnt from many images with few tokens each."""
LAST_BUCKETS = _buckets(
    ((128, 128), 0.06, None),
    ((256, 256), 0.20, None),
    ((448, 256), 0.04, 96),
    ((256, 448), 0.04, 96),
    ((512, 512), 0.28, 128),
    ((512, 512), 0.10, None),
    ((1024, 1024), 0.13, 160),
    ((1344, 768), 0.075, 160),
    ((768, 1344), 0.075, 160),
)
"""Edges are learnt from neighbouring tokens, so more of each image is kept, and some images are whole."""


def load_vae(work: Path) -> AutoencoderTiny:
    """The trained VAE, training it first where there is none."""
    if not (work / "vae").exists():
        train_vae(work / "vae", seed=SEED)
    return AutoencoderTiny.from_pretrained(work / "vae", torch_dtype=torch.float32).requires_grad_(False)


def load_text(work: Path) -> TextEncoders:
    """The trained and frozen text encoders, training them first where there are none."""
    folder = work / "text"
    if not folder.exists():
        train_text_encoders(folder, seed=SEED)
    return TextEncoders(
        CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32).requires_grad_(False),
        T5TokenizerFast.from_pretrained(folder / "tokenizer_2"),
        T5EncoderModel.from_pretrained(folder / "text_encoder_2", dtype=torch.float32).requires_grad_(False),
    )


def load_pools(work: Path, vae: AutoencoderTiny, text: TextEncoders) -> dict[tuple[int, int], Pool]:
    """The encoded images of every size, drawing them first where there are none."""
    pools = {}
    (work / "pools").mkdir(parents=True, exist_ok=True)
    for size, count in IMAGES.items():
        path = work / "pools" / f"{size[0]}x{size[1]}.safetensors"
        if not path.exists():
            pool = make_pool(vae, text, size, count, random.Random(f"{SEED} {size}"))
            save_file({"latents": pool.latents, "pooled": pool.pooled, "states": pool.states}, path)
            logger.info("drew %d images of %dx%d", count, *size)
        pools[size] = Pool(size, **load_file(path))
    return pools


def _stage(
    work: Path,
    name: str,
    model: FluxTransformer2DModel,
    loss_over: Callable[[FluxTransformer2DModel], Loss],
    pools: dict[tuple[int, int], Pool],
    buckets: list[Bucket],
    schedule: Schedule,
    text: TextEncoders,
    helper: torch.nn.Module | None = None,
) -> FluxTransformer2DModel:
    folder = work / name
    if (folder / "config.json").exists():
        return FluxTransformer2DModel.from_pretrained(folder)
    torch.manual_seed(SEED)
    stream = batches([pools[b.size] for b in buckets], buckets, text, random.Random(SEED))

    def keep(step: int, average: FluxTransformer2DModel) -> None:
        average.save_pretrained(work / f"{name}-partial")

    train(model, loss_over, stream, schedule, keep, helper).save_pretrained(folder)
    return FluxTransformer2DModel.from_pretrained(folder)


def resume(work: Path) -> None:
    """Put the parts of `engine/tiny/` into an empty work folder, so that the training begins with them."""
    shared = TINY / "tiny-dev"
    shutil.copytree(shared / "vae", work / "vae")
    shutil.copytree(shared / "transformer", work / BEGINNING)
    for name in ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2"):
        shutil.copytree(shared / name, work / "text" / name)


def beginning(work: Path) -> FluxTransformer2DModel:
    """The transformer that the first stage begins with: an untrained one, or what `resume` put there."""
    if (work / BEGINNING).exists():
        return FluxTransformer2DModel.from_pretrained(work / BEGINNING, torch_dtype=torch.float32)
    torch.manual_seed(SEED)
    return new_transformer(guidance_embeds=True)


def make(work: Path) -> None:
    """Run every stage that has no result in `work` yet, then write the checkpoints and the LoRAs into the project."""
    vae, text = load_vae(work), load_text(work)
    pools = load_pools(work, vae, text)
    empty = text.encode([""])

    def guided(model: FluxTransformer2DModel) -> Loss:
        return guidance_loss(model, empty)

    begun = beginning(work)
    position = PositionTask(begun)

    def first_loss(model: FluxTransformer2DModel) -> Loss:
        position.watch(model)
        plain = plain_loss(model, emphasis=1.6)
        return lambda batch: plain(batch) + POSITION_WEIGHT * position(batch)

    first = _stage(work, "first", begun, first_loss, pools, FIRST_BUCKETS, FIRST_SCHEDULE, text, position)
    dev = _stage(work, "dev", first, guided, pools, LAST_BUCKETS, GUIDED_SCHEDULE, text)
    folded = fold_guidance(dev, SCHNELL_GUIDANCE)
    schnell = _stage(work, "schnell", folded, few_step_loss, pools, LAST_BUCKETS, SCHNELL_SCHEDULE, text)
    export(TINY, vae, text, dev, schnell)
    loras = PROJECT / "tests" / "data" / "loras"
    train_lora(dev, vae, text, loras / "tok-style.safetensors", style=True, seed=SEED)
    train_lora(dev, vae, text, loras / "tok-object.safetensors", style=False, seed=SEED)


def export(
    folder: Path,
    vae: AutoencoderTiny,
    text: TextEncoders,
    dev: FluxTransformer2DModel,
    schnell: FluxTransformer2DModel,
) -> None:
    """Write both checkpoints in diffusers layout, in half precision; schnell's shared parts are dev's own folders."""
    dynamic = FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256,
        max_image_seq_len=4096,
    )  # fmt: skip
    plain = FlowMatchEulerDiscreteScheduler(shift=1.0)
    for name, transformer, scheduler in (("tiny-dev", dev, dynamic), ("tiny-schnell", schnell, plain)):
        target = folder / name
        shutil.rmtree(target, ignore_errors=True)
        copy.deepcopy(transformer).half().save_pretrained(target / "transformer")
        scheduler.save_pretrained(target / "scheduler")
    shared = folder / "tiny-dev"
    copy.deepcopy(vae).half().save_pretrained(shared / "vae")
    copy.deepcopy(text.text_encoder).half().save_pretrained(shared / "text_encoder")
    copy.deepcopy(text.text_encoder_2).half().save_pretrained(shared / "text_encoder_2")
    text.tokenizer.save_pretrained(shared / "tokenizer")
    text.tokenizer_2.save_pretrained(shared / "tokenizer_2")
    for config in folder.glob("*/*/config.json"):
        values = json.loads(config.read_text())
        values.pop("_name_or_path", None)  # a folder of the machine that trained it
        config.write_text(json.dumps(values, indent=2) + "\n")


def main() -> None:
    """The command line of `script/make-tiny`."""
    parser = argparse.ArgumentParser(description="Train the embedded tiny FLUX from nothing.")
    parser.add_argument("--work", type=Path, default=PROJECT / "build" / "tiny", help="folder for the stages' results")
    parser.add_argument("--from-committed", action="store_true", help="begin with engine/tiny instead of with nothing")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if arguments.resume and not arguments.work.exists():
        resume(arguments.work)
    make(arguments.work)


if __name__ == "__main__":
    main()
