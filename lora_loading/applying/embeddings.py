"""Trigger words with vectors of their own, which an adapter brings along (textual inversion, pivotal tuning).

At load, reserved tokens (`<lora-word-N>`) are added to each tokenizer. While an adapter with such words is active,
the text encoder's embedding table is replaced by a longer one that holds their vectors, and `expand` replaces the words
in the prompt by reserved tokens. A request changes neither the tokenizer nor the original table.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import AddedToken
from torch import nn

from lora_loading.applying.slots import copy_with, slot_of
from lora_loading.reading.adapter import MAX_EMBEDDING_TOKENS, BundledEmbedding

TOKENS = 6 * MAX_EMBEDDING_TOKENS
"""How many vectors the adapters of a stack can bring along: a main one, four extra ones and the operator's."""
RESERVED = re.compile(r"<lora-word-\d+>")


class BundledEmbeddings:
    """Owns the reserved tokens of one tokenizer and the embedding table of its text encoder."""

    def __init__(self, encoder: nn.Module, tokenizer: Any) -> None:  # noqa: ANN401 - transformers ships few types
        """Add the reserved tokens; the encoder carries no adapter."""
        texts = [f"<lora-word-{index}>" for index in range(TOKENS)]
        tokenizer.add_tokens([AddedToken(text, lstrip=True, normalized=False, special=False) for text in texts])
        self._first: int = tokenizer.convert_tokens_to_ids(texts[0])
        self._places = [slot_of(encoder, name) for name in _tables(encoder)]
        self._tokens: dict[str, str] = {}
        _find_end_by_token(encoder, tokenizer)

    def activate(self, embeddings: Sequence[BundledEmbedding]) -> None:
        """Make exactly these words active; of two with the same text the later counts."""
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
        """The prompt with each active word (case-insensitive) replaced by its reserved tokens.

        Reserved tokens that the user typed are removed.
        """
        prompt = RESERVED.sub("", prompt)
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
    """The names of all modules with the embedding table: T5 has two that share one weight."""
    weight = encoder.get_input_embeddings().weight
    modules = encoder.named_modules()
    return [name for name, module in modules if isinstance(module, nn.Embedding) and module.weight is weight]


def _find_end_by_token(encoder: Any, tokenizer: Any) -> None:  # noqa: ANN401
    """Make CLIP find the end of the prompt by its end token, not by the greatest id, which a reserved token has.

    transformers' modeling_clip.py takes the greatest id if `eos_token_id` is 2, as in the configs of OpenAI's models
    and of FLUX.1. Without reserved tokens both ways find the same position.
    """
    for module in encoder.modules():
        if getattr(module, "eos_token_id", None) == 2:
            module.eos_token_id = tokenizer.eos_token_id
