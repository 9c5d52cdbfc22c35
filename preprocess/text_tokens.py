"""Length of texts in tokens of the checkpoint's tokenizer: `--max_text_tokens`.

In: a text after its normalization. Out: the text is short enough, or a `Reject`. Guarantees (test_text_tokens.py): the
count is that of the tokenizer, without the template's tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from higgs_tune.preprocess.checkpoints.checkpoint import load_tokenizer, read_config, special_ids
from higgs_tune.preprocess.reject import Reject
from higgs_tune.shards.sequence import SpecialIds

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TokenLimit:
    """The longest single text that is taken.

    Attributes:
        model: the checkpoint whose tokenizer counts. most: tokens.
    """

    model: Path
    most: int

    def check(self, text: str, where: str) -> None:
        """Refuse a longer text.

        Args:
            where: the text's place in the sample, for the message.

        Raises:
            Reject: it has more tokens.
        """
        if len(text.encode()) <= self.most:  # a token of a byte-level tokenizer takes at least one byte
            return
        tokens = count_tokens(text, cached_tokenizer(self.model, _ids_of(self.model)))
        if tokens > self.most:
            raise Reject("text_too_long", f"{where}: expected at most {self.most} tokens, got {tokens}")


@lru_cache(maxsize=1)
def _ids_of(model: Path) -> SpecialIds:
    return special_ids(read_config(model), model)


@lru_cache(maxsize=1)
def cached_tokenizer(path: Path, ids: SpecialIds) -> PreTrainedTokenizerBase:
    """This process's tokenizer."""
    return load_tokenizer(path, ids)


def count_tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of a text alone."""
    return len(tokenizer.encode(text, add_special_tokens=False))
