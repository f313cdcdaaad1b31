"""Words of a prompt that stand for vectors which an adapter brings along, not for what the text encoder has learnt.

A tokenizer gets some tokens of ours once, with texts that no one writes. While an adapter's words are carried, the
table of embeddings gives its place to a longer one with their vectors, and `expand` writes our tokens for the words.
Neither the tokenizer nor the table of the plain model is changed by a request.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import AddedToken
from torch import nn

from lora_loading.applying.slots import copy_with, slot_of
from lora_loading.reading.adapter import BundledEmbedding

TOKENS = 128
"""How many vectors a stack can bring along."""
OURS = re.compile(r"<lora-word-\d+>")


class BundledEmbeddings:
    """Owns the tokens of ours in one tokenizer, and the table of embeddings of its text encoder."""

    def __init__(self, encoder: nn.Module, tokenizer: Any) -> None:  # noqa: ANN401 - transformers ships few types
        """Add the tokens; the encoder is a plain one."""
        texts = [f"<lora-word-{index}>" for index in range(TOKENS)]
        tokenizer.add_tokens([AddedToken(text, lstrip=True, normalized=False, special=False) for text in texts])
        self._first: int = tokenizer.convert_tokens_to_ids(texts[0])
        self._places = [slot_of(encoder, name) for name in _tables(encoder)]
        self._tokens: dict[str, str] = {}
        _find_the_end_by_its_token(encoder, tokenizer)

    def activate(self, embeddings: Sequence[BundledEmbedding]) -> None:
        """Know exactly these words; of two that are the same the later counts."""
        vectors = {embedding.word: embedding.vectors for embedding in embeddings}
        self._tokens = {}
        count = sum(len(rows) for rows in vectors.values())
        if count > TOKENS:
            raise ValueError(f"the adapters bring {count} vectors, more than {TOKENS}")
        for place in self._places:
            place.put(self._longer(place.plain, tuple(vectors.values())) if vectors else place.plain)
        start = 0
        for word, rows in vectors.items():
            self._tokens[word] = " ".join(f"<lora-word-{index}>" for index in range(start, start + len(rows)))
            start += len(rows)

    def expand(self, prompt: str) -> str:
        """The prompt with our tokens in the place of the carried words, in either case; ours are no one else's."""
        prompt = OURS.sub("", prompt)
        if not self._tokens:
            return prompt
        words = {word.lower(): tokens for word, tokens in self._tokens.items()}
        longest_first = sorted(words, key=len, reverse=True)
        pattern = rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)"
        return re.sub(pattern, lambda found: words[found[0].lower()], prompt, flags=re.IGNORECASE)

    def _longer(self, table: Any, vectors: tuple[torch.Tensor, ...]) -> nn.Module:  # noqa: ANN401 - nn.Embedding's kin
        weight = table.weight
        added = torch.cat([rows.to(weight.device, weight.dtype) for rows in vectors])
        longer = weight.new_zeros(max(weight.shape[0], self._first + added.shape[0]), weight.shape[1])
        longer[: weight.shape[0]] = weight
        longer[self._first : self._first + added.shape[0]] = added
        return copy_with(table, nn.Parameter(longer, requires_grad=False), None)


def _tables(encoder: Any) -> list[str]:  # noqa: ANN401
    """The names of all modules that look up the embeddings of tokens: T5 has two over one weight."""
    weight = encoder.get_input_embeddings().weight
    modules = encoder.named_modules()
    return [name for name, module in modules if isinstance(module, nn.Embedding) and module.weight is weight]


def _find_the_end_by_its_token(encoder: Any, tokenizer: Any) -> None:  # noqa: ANN401
    """Have CLIP look for its end token instead of the greatest id, which would be one of ours.

    That is what its code does unless `eos_token_id` is 2, as in the configs of OpenAI's models, FLUX.1's among them
    (transformers, modeling_clip.py). The end token's id being the greatest but for ours, nothing else changes.
    """
    for module in encoder.modules():
        if getattr(module, "eos_token_id", None) == 2:
            module.eos_token_id = tokenizer.eos_token_id
