"""Make the embedded checkpoints from nothing: `python -m training.make_tiny`, behind `script/make-tiny`.

Every stage writes its result into the work folder, in half precision as it is kept in the end, and is skipped when that
is there already; within a stage, a checkpoint every 500 steps holds all that the rest depends on. So an interrupted run
goes on, and to the same weights.
The last stage writes `engine/tiny/` and `tests/data/loras/`.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

from training.data import PLAIN, Batch, Pool, draw_batch, make_pool
from training.distil import SCHNELL_GUIDANCE, Loss, few_step_loss, flow_loss, fold_guidance
from training.loras import train_loras
from training.places import begin_with_places
from training.position import WEIGHT as POSITION_WEIGHT
from training.position import PositionTask
from training.prompts import vocabulary
from training.text import TextEncoders, train_text_encoders
from training.train import Schedule, new_transformer, train
from training.vae import train_vae
from training.world import COLOURS, SHAPES

logger = logging.getLogger("make-tiny")

PROJECT = Path(__file__).parent.parent
TINY = PROJECT / "engine" / "tiny"
SEED = 0
PROMPTS = 60_000
IMAGES, SQUARES = 16, 7
"""Of a step: how many images, and how many squares of neighbours of each. Many steps are worth more than large ones."""
EMPHASIS = 1.8
DEV_SCHEDULE = Schedule(steps=50_000, peak=1.2e-3, warmup=200, decay=0.4, muon=True)
SCHNELL_SCHEDULE = Schedule(steps=1000, peak=5e-4, warmup=20, decay=0.8)


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
    return TextEncoders.read(folder)


def train_dev(work: Path, text: TextEncoders, pool: Callable[[], Pool]) -> FluxTransformer2DModel:
    """tiny-dev's transformer: flow matching with guidance as an input, and the auxiliary loss of positions."""
    torch.manual_seed(SEED)
    model = new_transformer(guidance_embeds=True)
    begin_with_places(model, text)
    position = PositionTask(model)
    position.watch(model)
    flow = flow_loss(model, EMPHASIS)

    def loss(batch: Batch) -> torch.Tensor:
        return torch.as_tensor(flow(batch) + POSITION_WEIGHT * position(batch))

    return _stage(work, "dev", model, loss, pool, DEV_SCHEDULE, position)


def train_schnell(work: Path, dev: FluxTransformer2DModel, pool: Callable[[], Pool]) -> FluxTransformer2DModel:
    """tiny-schnell's transformer: dev without its guidance input, taught to take a quarter of the way in a step."""
    model = fold_guidance(dev, SCHNELL_GUIDANCE)
    return _stage(work, "schnell", model, few_step_loss(model), pool, SCHNELL_SCHEDULE)


def _stage(
    work: Path,
    name: str,
    model: FluxTransformer2DModel,
    loss: Loss,
    pool: Callable[[], Pool],
    schedule: Schedule,
    helper: torch.nn.Module | None = None,
) -> FluxTransformer2DModel:
    """Train the model unless its result is there; the result is what the checkpoints hold, without hooks."""
    folder = work / name
    if not (folder / "config.json").exists():
        model.compile_repeated_blocks(dynamic=False)

        def batch_at(step: int) -> Batch:
            return draw_batch(pool(), IMAGES, SQUARES, PLAIN, f"{name} {SEED} {step}")

        checkpoint = work / f"{name}.safetensors"
        train(model, loss, batch_at, schedule, checkpoint, helper, SEED).half().save_pretrained(folder)
    return FluxTransformer2DModel.from_pretrained(folder, torch_dtype=torch.float32)


def make(work: Path) -> None:
    """Run every stage that has no result in `work` yet, then write the checkpoints and the LoRAs into the project."""
    work.mkdir(parents=True, exist_ok=True)
    vae, text = load_vae(work), load_text(work)

    @cache
    def pool() -> Pool:
        return make_pool(text, PROMPTS, PLAIN, f"prompts {SEED}")

    dev = train_dev(work, text, pool)
    schnell = train_schnell(work, dev, pool)
    export(TINY, vae, text, dev, schnell)
    train_loras(dev, text, work, PROJECT / "tests" / "data" / "loras", SEED)


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
    write_vocabulary(folder / "vocabulary.json")
    for config in folder.glob("*/*/config.json"):
        values = json.loads(config.read_text())
        values.pop("_name_or_path", None)  # a folder of the machine that trained it
        config.write_text(json.dumps(values, indent=2) + "\n")


def write_vocabulary(path: Path) -> None:
    """The words that the models know, and what they draw, for the log's line about words that they do not know."""
    draws = (
        f"one or two shapes ({', '.join(SHAPES)}) in {', '.join(list(COLOURS)[:-1])} or {list(COLOURS)[-1]} on a plain "
        "background, such as: a small blue star at the top on a yellow background"
    )
    path.write_text(json.dumps({"draws": draws, "words": vocabulary()}, indent=1) + "\n")


def main() -> None:
    """The command line of `script/make-tiny`."""
    parser = argparse.ArgumentParser(description="Train the embedded tiny FLUX from nothing.")
    parser.add_argument("--work", type=Path, default=PROJECT / "build" / "tiny", help="folder for the stages' results")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    make(arguments.work)


if __name__ == "__main__":
    main()
