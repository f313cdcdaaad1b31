"""Train the tiny text encoders: a CLIP text model and a T5 encoder with tokenizers of their real classes.

They are trained to classify a scene's attributes from its prompt and are then frozen. Trained together with the
transformer, the model drew the right colours on the wrong objects; with this stage first, colours and objects are bound
right within minutes. The pooled CLIP vector reaches every block of a FLUX through its modulation.

The T5 states also learn to tell how far from the prompt's end they stand, in turns of MARKS. In a FLUX all prompt
tokens have the same position, and an image token finds its own by how it attends to them (`training/places.py`).
"""

from __future__ import annotations

import json
import logging
import math
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

from training.prompts import OTHER_WORDS, Prompt, training_prompt, vocabulary
from training.world import ALL_SHAPES, COLOURS, POSITIONS, SHAPES, SIZES, TRIGGER

logger = logging.getLogger(__name__)

WIDTH = 128
PROMPT_TOKENS = 40
"""Length of the T5 sequence, the same in training and in use, since FLUX pads to it without an attention mask."""
CLIP_TOKENS = 77
END_OF_PROMPT = 1
"""The id of `</s>`."""
STEPS = 4500
BATCH = 64
PEAK_RATE = 2e-3
HEAD_BIAS = 4.0
MARKS = 8
"""Each T5 state tells which of so many marks it is, in turn from the prompt's end."""
MARK_WEIGHT = 10.0
"""Of the share of the marks' variance that a linear reading of the states does not explain."""
SHAPES_READ = (*SHAPES, *SHAPES, TRIGGER)
"""What prompts name: each shape twice as often as the LoRAs' `TOK`, which the model draws as what it does not know."""


@dataclass(frozen=True)
class TextEncoders:
    """The two encoders and their tokenizers, as FLUX's pipelines name them."""

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    tokenizer_2: T5TokenizerFast
    text_encoder_2: T5EncoderModel

    @classmethod
    def read(cls, folder: Path) -> TextEncoders:
        """The trained and frozen encoders in a folder in diffusers layout, float32."""
        return cls(
            CLIPTokenizer.from_pretrained(folder / "tokenizer"),
            CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32).requires_grad_(False),
            T5TokenizerFast.from_pretrained(folder / "tokenizer_2"),
            T5EncoderModel.from_pretrained(folder / "text_encoder_2", dtype=torch.float32).requires_grad_(False),
        )

    def encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Return the pooled CLIP vectors (B, 128) and the T5 states (B, 40, 128), exactly as the pipelines do."""
        clip = self.tokenizer(
            prompts, padding="max_length", max_length=CLIP_TOKENS, truncation=True, return_tensors="pt"
        )
        pooled = self.text_encoder(clip.input_ids, output_hidden_states=False).pooler_output
        return pooled, self.text_encoder_2(self.t5_ids(prompts), output_hidden_states=False)[0]

    def t5_ids(self, prompts: list[str]) -> Tensor:
        """The prompts as T5 tokens (B, 40)."""
        tokens = self.tokenizer_2(
            prompts, padding="max_length", max_length=PROMPT_TOKENS, truncation=True, return_tensors="pt"
        )
        return torch.as_tensor(tokens.input_ids)


def _clip_tokenizer(corpus: list[str]) -> CLIPTokenizer:
    start, end, suffix = "<|startoftext|>", "<|endoftext|>", "</w>"
    bpe = Tokenizer(models.BPE(end_of_word_suffix=suffix))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(False)])
    bpe.decoder = decoders.BPEDecoder(suffix)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
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


PUNCTUATION = ",.!?:;&-'\"()"


def _t5_tokenizer() -> T5TokenizerFast:
    """The grammar's words as pieces, in the three ways that people write them; any other word is one unknown token."""
    words = vocabulary()
    written = sorted({form for word in words for form in (word, word.lower(), word.title(), word.upper())})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [("\u2581" + word, -6.0) for word in written]
    pieces += [(word, -7.0) for word in written if len(word) > 2]  # behind a hyphen or a quotation mark
    pieces += [(prefix + mark, -6.0) for mark in PUNCTUATION for prefix in ("", "\u2581")]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=PROMPT_TOKENS)


def new_encoders(seed: int) -> TextEncoders:
    """Untrained encoders, 128 wide and two layers deep, and tokenizers built from the world's prompts."""
    rng = random.Random(seed)
    corpus = [training_prompt(rng, ALL_SHAPES).text for _ in range(6000)] + list(OTHER_WORDS) * 3
    torch.manual_seed(seed)
    clip, t5 = _clip_tokenizer(corpus), _t5_tokenizer()
    clip_config = CLIPTextConfig(
        vocab_size=len(clip), hidden_size=WIDTH, intermediate_size=2 * WIDTH, projection_dim=WIDTH,
        num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=CLIP_TOKENS,
        bos_token_id=clip.bos_token_id, eos_token_id=clip.eos_token_id, pad_token_id=clip.pad_token_id,
    )  # fmt: skip
    t5_config = T5Config(
        vocab_size=len(t5), d_model=WIDTH, d_kv=32, d_ff=2 * WIDTH, num_layers=2, num_heads=8, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", decoder_start_token_id=0, relative_attention_num_buckets=128,
        relative_attention_max_distance=128,
    )  # fmt: skip
    encoders = TextEncoders(clip, CLIPTextModel(clip_config), t5, T5EncoderModel(t5_config))
    _make_quick_to_learn(encoders.text_encoder_2)
    return encoders


@torch.no_grad()
def _make_quick_to_learn(t5: T5EncoderModel) -> None:
    """Begin where steps of PEAK_RATE get somewhere: with small embeddings instead of ones of size 1, four heads that
    look at neighbours, and four whose attention to the prompt's end goes up and down with the distance. Without, the T5
    still took the background's colour for the object's after 1,000 steps."""
    torch.nn.init.normal_(t5.shared.weight, std=0.05)
    bias = t5.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight  # (buckets, heads)
    apart = torch.arange(1, PROMPT_TOKENS)
    nearest, fading = (apart == 1).float(), torch.exp((1 - apart) / 3)
    before, after = bias[1:PROMPT_TOKENS], bias[len(bias) // 2 + 1 :][: PROMPT_TOKENS - 1]  # by distance, from 1 up
    for head, (side, shape) in enumerate(((before, nearest), (after, nearest), (before, fading), (after, fading))):
        side[:, head] += HEAD_BIAS * shape
    for head, shift in enumerate((0.0, 0.5, 1.0, 1.5), start=4):
        before[:, head] += HEAD_BIAS * torch.cos(2 * math.pi * apart / MARKS + shift * math.pi)
        after[:, head] += HEAD_BIAS * torch.cos(-2 * math.pi * apart / MARKS + shift * math.pi)


# The attributes, with one classifier each


def _attributes(prompt: Prompt) -> list[int]:
    colours, scene = list(COLOURS), prompt.scene
    labels = [len(scene.things) - 1, colours.index(scene.background), int(prompt.styled), int(scene.upright)]
    for thing in (*scene.things, scene.things[0])[:2]:
        labels += [colours.index(thing.colour), ALL_SHAPES.index(thing.shape), SIZES.index(thing.size)]
    return [*labels, POSITIONS.index(scene.things[0].position)]


ATTRIBUTE_CLASSES = (2, len(COLOURS), 2, 2, *(len(COLOURS), len(ALL_SHAPES), len(SIZES)) * 2, len(POSITIONS))


def train_text_encoders(folder: Path, steps: int = STEPS, seed: int = 0) -> None:
    """Train both encoders to classify a prompt's attributes; save all four components under `folder`, in half."""
    encoders = new_encoders(seed)
    rng = random.Random(seed)
    clip_heads, t5_heads = (nn.Linear(WIDTH, sum(ATTRIBUTE_CLASSES)) for _ in range(2))
    mark_heads = nn.Linear(WIDTH, MARKS)
    modules = nn.ModuleList([encoders.text_encoder, encoders.text_encoder_2, clip_heads, t5_heads, mark_heads])
    optimizer = torch.optim.AdamW(modules.parameters(), lr=PEAK_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=steps, pct_start=0.1)
    right_clip = right_t5 = explained = 0.0
    for step in range(steps):
        prompts = [training_prompt(rng, SHAPES_READ) for _ in range(BATCH)]
        labels = torch.tensor([_attributes(prompt) for prompt in prompts])
        texts = [prompt.text for prompt in prompts]
        pooled, states = encoders.encode(texts)
        from_clip, from_t5 = clip_heads(pooled), t5_heads(_summed(states))
        loss = _cross_entropy(from_clip, labels) + _cross_entropy(from_t5, labels)
        marks = one_hot_marks(encoders.t5_ids(texts))
        unexplained = (mark_heads(states) - marks).square().mean() / marks.square().mean()
        loss = loss + MARK_WEIGHT * unexplained
        loss = loss + 0.01 * (pooled.square().mean() - 1).square() + 0.01 * (states.square().mean() - 1).square()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        right_clip += 0.02 * (_accuracy(from_clip, labels) - right_clip)
        explained += 0.02 * (1 - unexplained.item() - explained)
        right_t5 += 0.02 * (_accuracy(from_t5, labels) - right_t5)
        if step % 100 == 99:
            logger.info(
                "text step %d of %d: loss %.4f, prompts all right: clip %.3f, t5 %.3f, marks explained %.4f",
                step + 1, steps, loss.item(), right_clip, right_t5, explained,
            )  # fmt: skip
    encoders.tokenizer.save_pretrained(folder / "tokenizer")
    encoders.text_encoder.half().save_pretrained(folder / "text_encoder")
    encoders.tokenizer_2.save_pretrained(folder / "tokenizer_2")
    encoders.text_encoder_2.half().save_pretrained(folder / "text_encoder_2")


def _summed(states: Tensor) -> Tensor:
    """(B, width): what the classifiers read of the T5. Of a mean, a token's share would be too small to learn from."""
    return states.sum(1) / 5


def marks_of(ids: Tensor) -> Tensor:
    """(B, 40): which mark each T5 token is, from 0 at the prompt's end."""
    ends = (ids == END_OF_PROMPT).int().argmax(1, keepdim=True)
    return (torch.arange(ids.shape[1]) - ends) % MARKS


def one_hot_marks(ids: Tensor) -> Tensor:
    """(B, 40, MARKS): the marks as what linear readings of the states are to give; their mean is 0."""
    return nn.functional.one_hot(marks_of(ids), MARKS) - 1 / MARKS


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    parts = torch.split(logits, list(ATTRIBUTE_CLASSES), dim=1)
    return sum((nn.functional.cross_entropy(part, labels[:, i]) for i, part in enumerate(parts)), torch.zeros(()))


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    parts = torch.split(logits, list(ATTRIBUTE_CLASSES), dim=1)
    guesses = torch.stack([part.argmax(1) for part in parts], dim=1)
    return (guesses == labels).all(1).float().mean().item()
