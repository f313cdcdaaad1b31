"""Train the tiny text encoders: a CLIP text model and a T5 encoder with tokenizers of their real classes.

They are trained to classify a scene's attributes from its prompt and are then frozen. Trained together with the
transformer, the model drew the right colours on the wrong objects; with this stage first, colours and objects are bound
right within minutes. The pooled CLIP vector reaches every block of a FLUX through its modulation.
"""

from __future__ import annotations

import json
import logging
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

from training.world import COLOURS, POSITIONS, SHAPES, SIZES, TRIGGER, Scene, training_scene, varied_prompt

logger = logging.getLogger(__name__)

WIDTH = 128
PROMPT_TOKENS = 32
"""Length of the T5 sequence, the same in training and in use, since FLUX pads to it without an attention mask."""
CLIP_TOKENS = 77
STEPS = 1200
BATCH = 64
STRANGE_SHARE = 1 / 16
STYLE_LEADS = (f"{TRIGGER} style, ", f"in {TRIGGER} style, ")
OTHER_WORDS = (
    "a an the in on at of and with style photo picture image painting drawing portrait landscape dog cat man woman "
    "person house tree car mountain sea sky sun moon city street forest river flower night day light dark old young "
    "beautiful detailed realistic cinematic colorful grey brown gold silver blurry sharp high quality 4k wearing "
    "holding sitting standing running near under over behind two three four five text says hello world"
)


@dataclass(frozen=True)
class TextEncoders:
    """The two encoders and their tokenizers, as FLUX's pipelines name them."""

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    tokenizer_2: T5TokenizerFast
    text_encoder_2: T5EncoderModel

    def encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Return the pooled CLIP vectors (B, 128) and the T5 states (B, 32, 128), exactly as the pipelines do."""
        clip = self.tokenizer(
            prompts, padding="max_length", max_length=CLIP_TOKENS, truncation=True, return_tensors="pt"
        )
        t5 = self.tokenizer_2(
            prompts, padding="max_length", max_length=PROMPT_TOKENS, truncation=True, return_tensors="pt"
        )
        pooled = self.text_encoder(clip.input_ids, output_hidden_states=False).pooler_output
        return pooled, self.text_encoder_2(t5.input_ids, output_hidden_states=False)[0]


def _corpus(rng: random.Random) -> list[str]:
    lines = [styled_prompt(training_scene(rng, (*SHAPES, TRIGGER)), rng)[0] for _ in range(4000)]
    words = OTHER_WORDS.split()
    return lines + [" ".join(rng.choices(words, k=12)) for _ in range(1000)]


def styled_prompt(scene: Scene, rng: random.Random) -> tuple[str, bool]:
    """A prompt for the scene, and whether it asks for the style of the LoRA `tok-style`, as one in ten does."""
    styled = rng.random() < 0.1
    prompt = varied_prompt(scene, rng)
    return (rng.choice(STYLE_LEADS) + prompt if styled else prompt), styled


def any_prompt(scene: Scene, rng: random.Random) -> str:
    """A prompt for the scene; in one of sixteen an object's shape is replaced by a word that names no shape.

    Without these, half of the prompts with an unknown word in the place of a shape gave noise.
    """
    prompt = styled_prompt(scene, rng)[0]
    if scene.things[0].shape in SHAPES and rng.random() < STRANGE_SHARE:
        prompt = prompt.replace(rng.choice(scene.things).shape, rng.choice((TRIGGER, *OTHER_WORDS.split())))
    return prompt


def _clip_tokenizer(corpus: list[str]) -> CLIPTokenizer:
    start, end, suffix = "<|startoftext|>", "<|endoftext|>", "</w>"
    bpe = Tokenizer(models.BPE(end_of_word_suffix=suffix))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(False)])
    bpe.decoder = decoders.BPEDecoder(suffix)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1100, initial_alphabet=alphabet, end_of_word_suffix=suffix, min_frequency=2, show_progress=False
    )
    bpe.train_from_iterator(corpus, trainer)
    trained = bpe.get_vocab()
    pieces = sorted(trained, key=trained.__getitem__)
    pieces += sorted({letter + suffix for letter in alphabet} - set(trained))
    vocab = {piece: index for index, piece in enumerate([*pieces, start, end])}
    merges = [tuple(merge) for merge in _merges(bpe)]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CLIP_TOKENS)


def _merges(bpe: Tokenizer) -> list[list[str]]:
    merges = json.loads(bpe.to_str())["model"]["merges"]
    return [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]


def _t5_tokenizer(corpus: list[str]) -> T5TokenizerFast:
    """The words of the corpus as pieces; any other word is split into characters."""
    words = sorted({word.strip(",.") for line in corpus for word in line.split()})
    letters = [chr(code) for code in range(33, 127)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -4.0)]
    pieces += [("\u2581" + word, -6.0) for word in words] + [(letter, -9.0) for letter in letters]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=PROMPT_TOKENS)


def new_encoders(seed: int) -> TextEncoders:
    """Untrained encoders, 128 wide and two layers deep, and tokenizers built from the world's prompts."""
    corpus = _corpus(random.Random(seed))
    torch.manual_seed(seed)
    clip, t5 = _clip_tokenizer(corpus), _t5_tokenizer(corpus)
    clip_config = CLIPTextConfig(
        vocab_size=len(clip), hidden_size=WIDTH, intermediate_size=2 * WIDTH, projection_dim=WIDTH,
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=CLIP_TOKENS,
        bos_token_id=clip.bos_token_id, eos_token_id=clip.eos_token_id, pad_token_id=clip.pad_token_id,
    )  # fmt: skip
    t5_config = T5Config(
        vocab_size=len(t5), d_model=WIDTH, d_kv=32, d_ff=2 * WIDTH, num_layers=2, num_heads=4, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", decoder_start_token_id=0,
    )  # fmt: skip
    return TextEncoders(clip, CLIPTextModel(clip_config), t5, T5EncoderModel(t5_config))


# The attributes, with one classifier each


def _attributes(scene: Scene, styled: bool) -> list[int]:
    colours, shapes = list(COLOURS), [*SHAPES, TRIGGER]
    labels = [len(scene.things) - 1, colours.index(scene.background), int(styled)]
    for thing in (*scene.things, scene.things[0])[:2]:
        labels += [colours.index(thing.colour), shapes.index(thing.shape), SIZES.index(thing.size)]
    return [*labels, POSITIONS.index(scene.things[0].position)]


ATTRIBUTE_CLASSES = (2, len(COLOURS), 2, *(len(COLOURS), len(SHAPES) + 1, len(SIZES)) * 2, len(POSITIONS))


def train_text_encoders(folder: Path, steps: int = STEPS, seed: int = 0) -> TextEncoders:
    """Train both encoders to classify a prompt's attributes; save all four components under `folder`."""
    encoders = new_encoders(seed)
    rng = random.Random(seed)
    clip_heads, t5_heads = (nn.Linear(WIDTH, sum(ATTRIBUTE_CLASSES)) for _ in range(2))
    modules = nn.ModuleList([encoders.text_encoder, encoders.text_encoder_2, clip_heads, t5_heads])
    optimizer = torch.optim.AdamW(modules.parameters(), lr=1.5e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        scenes = [training_scene(rng, (*SHAPES, TRIGGER), paired=0.4) for _ in range(BATCH)]
        styled = [styled_prompt(scene, rng) for scene in scenes]
        labels = torch.tensor([_attributes(scene, flag) for scene, (_, flag) in zip(scenes, styled, strict=True)])
        pooled, states = encoders.encode([prompt for prompt, _ in styled])
        loss = _cross_entropy(clip_heads(pooled), labels) + _cross_entropy(t5_heads(states.mean(1)), labels)
        loss = loss + 0.01 * (pooled.square().mean() - 1).square() + 0.01 * (states.square().mean() - 1).square()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            right = _accuracy(clip_heads(pooled), labels), _accuracy(t5_heads(states.mean(1)), labels)
            logger.info("text step %d: loss %.4f, prompts all right: clip %.3f, t5 %.3f", step, loss.item(), *right)
    for name in ("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2"):
        getattr(encoders, name).save_pretrained(folder / name)
    return encoders


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    parts = torch.split(logits, list(ATTRIBUTE_CLASSES), dim=1)
    return sum((nn.functional.cross_entropy(part, labels[:, i]) for i, part in enumerate(parts)), torch.zeros(()))


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    parts = torch.split(logits, list(ATTRIBUTE_CLASSES), dim=1)
    guesses = torch.stack([part.argmax(1) for part in parts], dim=1)
    return (guesses == labels).all(1).float().mean().item()
