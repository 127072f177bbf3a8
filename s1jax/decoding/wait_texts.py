"""The texts that the requests of an engine may be made to wait with: for the device, and for the host."""

import sys
from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from transformers import PreTrainedTokenizerBase

from s1jax.decoding.budget import ThinkingBudget, build_tables
from s1jax.decoding.forks import WaitTexts
from s1jax.decoding.loop import Shared
from s1jax.decoding.pages import bucket
from s1jax.decoding.profiles import ProfileIds


class TextTables(NamedTuple):
    """All texts so far."""

    shared: Shared
    starts: Mapping[tuple[str, ...], int]
    """Where each list of texts starts among them; that stays when others come."""
    texts: WaitTexts


class TextRegister:
    """Lists of wait texts, each of which is there once, in the order in which they came."""

    def __init__(self, profile: ProfileIds, tokenizer: PreTrainedTokenizerBase):
        self._profile, self._tokenizer = profile, tokenizer
        self._budgets: dict[tuple[str, ...], ThinkingBudget] = {}
        """Of each list one budget that has it."""
        self._made: TextTables | None = None

    def add(self, budget: ThinkingBudget) -> None:
        """Have a budget's list. Raises ValueError for a text that the tokenizer or the profile cannot have."""
        if budget.waits not in self._budgets:
            build_tables(self._profile, [budget], self._tokenizer)
            self._budgets[budget.waits] = budget
            self._made = None

    def tables(self) -> TextTables:
        """Of a size that other texts have room in, mostly: the compiled loop depends on it. Under the mesh."""
        if self._made:
            return self._made
        tables, starts = build_tables(self._profile, list(self._budgets.values()), self._tokenizer)
        texts = WaitTexts(np.asarray(tables.text_ids), np.asarray(tables.text_lengths))
        count, length = (bucket(size, sys.maxsize, least) for size, least in zip(texts.ids.shape, (8, 32), strict=True))
        tables = tables._replace(
            text_ids=jnp.pad(tables.text_ids, [(0, count - len(texts.ids)), (0, length - texts.ids.shape[1])]),
            text_lengths=jnp.pad(tables.text_lengths, (0, count - len(texts.ids))),
        )
        valid, end_tokens = jnp.asarray(self._profile.valid), jnp.asarray(self._profile.end_tokens or (0,), jnp.int32)
        self._made = TextTables(Shared(tables, valid, end_tokens), starts, texts)
        return self._made
