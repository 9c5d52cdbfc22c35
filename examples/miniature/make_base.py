"""The base before it is trained: Higgs Audio v2's architecture at small sizes, random weights, its own tokenizer.

    python examples/miniature/make_base.py --out runs/miniature/base-untrained

The tokenizer is a byte-level BPE of the miniature's own sentences in both languages, so that a word is a few tokens.
Prints the number of parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import tyro
from higgs_tune.preprocess.input.layout import INSTRUCTION, PLAIN_INSTRUCTION, SYSTEM
from higgs_tune.train.model.load import HiggsAudioConfig
from higgs_tune.train.toy import make_model, make_tokenizer, model_config
from sentences import KINDS, make_sentence

TEXT_SIZES = {
    "hidden_size": 192,
    "intermediate_size": 256,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 48,
}
AUDIO_SIZES = {
    "audio_ffn_hidden_size": 192,
    "audio_ffn_intermediate_size": 512,
    "audio_dual_ffn_layers": list(range(5)),
}


@dataclass(frozen=True)
class BaseSizes:
    """Make the untrained base."""

    out: Path
    """Folder that receives the checkpoint, in Boson's layout."""
    seed: int = 0
    """Seed of the weights."""


def texts(rng: Random) -> Iterator[str]:
    """What the tokenizer is made for: sentences of every kind, and the fixed texts of a conversation."""
    for _ in range(400):
        yield from ("system", "user", "assistant", SYSTEM, INSTRUCTION, PLAIN_INSTRUCTION)
        for language, kinds in KINDS.items():
            yield from (make_sentence(language, (kind,), rng) for kind in kinds)


def base_config() -> tuple[HiggsAudioConfig, object]:
    """The config, and its tokenizer."""
    tokenizer = make_tokenizer(texts(Random(0)), 640)
    fields = model_config(tokenizer, **AUDIO_SIZES).to_dict()
    text = fields.pop("text_config") | TEXT_SIZES
    return HiggsAudioConfig(text_config=text, **fields), tokenizer


def main() -> None:
    options = tyro.cli(BaseSizes)
    config, tokenizer = base_config()
    model = make_model(config, options.seed)
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)  # pyright: ignore[reportAttributeAccessIssue]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters / 1e6:.2f} M parameters in {options.out}")


if __name__ == "__main__":
    main()
