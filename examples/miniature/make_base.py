"""The base before it is trained: Higgs Audio v2's architecture at small sizes, random weights, its own tokenizer.

    python examples/miniature/make_base.py --audio_tokenizer_path runs/miniature/codec/native \
        --out runs/miniature/base-untrained

Embeddings and head of the audio codes start from the codec's own vectors, so that codes that sound alike are alike from
the first step; all other weights are random.
The tokenizer is a byte-level BPE of the miniature's own sentences in both languages; a number's word is one token.
Prints the number of parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
import tyro
from higgs_tune.preprocess.codec.checkpoint import load_codec
from higgs_tune.preprocess.codec.codec import HiggsCodec
from higgs_tune.preprocess.input.layout import INSTRUCTION, PLAIN_INSTRUCTION, SYSTEM
from higgs_tune.train.model.load import HiggsAudioConfig
from higgs_tune.train.toy import make_model, make_tokenizer, model_config
from sentences import KINDS, ONES, TENS, arabic_words, make_sentence, without_marks
from torch import nn

VECTOR_STD = 0.05
VOCABULARY = 1600
# parts of the hidden state: a constant, who a token is, who the token before it is, who the token is that follows where
# the text last said this one
CONSTANT, OWN, BEFORE, NEXT = 0, slice(1, 29), slice(29, 57), slice(57, 85)
IDENTITY_STD, CONSTANT_SIZE = 0.1, 0.35

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
    "audio_ffn_intermediate_size": 256,
    "audio_dual_ffn_layers": list(range(5)),
}


@dataclass(frozen=True)
class BaseSizes:
    """Make the untrained base."""

    audio_tokenizer_path: Path
    """Codec whose vectors the audio embeddings and the audio head start from."""
    out: Path
    """Folder that receives the checkpoint, in Boson's layout."""
    seed: int = 0
    """Seed of the weights."""


def texts(rng: Random) -> Iterator[str]:
    """What the tokenizer is made for: sentences of every kind, and the fixed texts of a conversation."""
    words = [word for text in (*ONES, *TENS, "hundred", "and") for word in (text, f" {text}")]
    bare = [word for text in map(without_marks, arabic_words()) for word in (text, f" {text}")]
    for _ in range(400):
        yield from ("system", "user", "assistant", SYSTEM, INSTRUCTION, PLAIN_INSTRUCTION, *words, *bare)
        for language, kinds in KINDS.items():
            yield from (make_sentence(language, (kind,), rng) for kind in kinds)


def base_config() -> tuple[HiggsAudioConfig, object]:
    """The config, and its tokenizer."""
    tokenizer = make_tokenizer(texts(Random(0)), VOCABULARY)
    fields = model_config(tokenizer, **AUDIO_SIZES).to_dict()
    text = fields.pop("text_config") | TEXT_SIZES
    return HiggsAudioConfig(text_config=text, **fields), tokenizer


@torch.no_grad()
def start_from_codec(model: Any, codec: HiggsCodec) -> None:
    """Put the codec's vectors, turned at random for each codebook, in the audio embeddings and the audio head."""
    codes_1N, rows = torch.arange(codec.config.codebook_size)[None], model.audio_codebook_size
    for k in range(codec.config.codebooks):
        quantizer: Any = codec.quantizers[k]
        vectors_NC = quantizer.lookup(codes_1N)[0].T
        vectors_NC = (vectors_NC - vectors_NC.mean(0)) / vectors_NC.std()
        turn_HH = nn.init.orthogonal_(torch.empty(TEXT_SIZES["hidden_size"], TEXT_SIZES["hidden_size"]))
        turned_NH = VECTOR_STD * vectors_NC @ turn_HH[: vectors_NC.shape[1]]
        for weight in (model.audio_codebook_embeddings.weight, model.audio_decoder_proj.audio_lm_head.weight):
            weight[k * rows : k * rows + len(turned_NH)] *= 0.3
            weight[k * rows : k * rows + len(turned_NH)] += turned_NH


@torch.no_grad()
def start_with_induction(model: Any, tokenizer: Any) -> None:
    """Give the first layers the two heads by which models follow a text they have before them.

    They are those of Olsson et al. (arXiv 2209.11895): the first head of layer 0 looks at the token before and notes
    it, that of layer 1 looks for the place where the token before is the current one, and copies what stands there. A
    model this small finds them by itself, but slowly; how a word's sound says which word it is, it learns in minutes.
    """
    config = model.config.text_config
    size, half = config.head_dim, config.head_dim // 2
    embeddings, head = model.embed_tokens.weight, model.audio_decoder_proj.text_lm_head.weight
    embeddings[:, CONSTANT] = CONSTANT_SIZE
    embeddings[:, OWN] = IDENTITY_STD * torch.randn_like(embeddings[:, OWN])
    embeddings[:, BEFORE.start : NEXT.stop] = 0
    numbers = tokenizer.get_vocab()
    for token, number in numbers.items():  # a word is the same with and without a space before it
        if token.startswith("Ġ") and token[1:] in numbers:
            embeddings[number, OWN] = embeddings[numbers[token[1:]], OWN]
    embeddings[:, 1:] *= 0.7 / embeddings[:, 1:].norm(dim=1, keepdim=True)  # heads look at all tokens alike
    head[:, NEXT] = 4 * embeddings[:, OWN]
    model.audio_codebook_embeddings.weight[:, CONSTANT] = CONSTANT_SIZE / model.config.audio_num_codebooks
    for layer in model.layers:  # nothing else writes there at the start, and little elsewhere
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj, layer.audio_mlp.down_proj):
            linear.weight[: NEXT.stop] = 0
            linear.weight *= 0.25
    first, second = (model.layers[i].self_attn for i in range(2))
    for attention in (first, second):
        attention.q_proj.weight[:size] = 0
        attention.k_proj.weight[:size] = 0
        attention.v_proj.weight[:size] = 0
        attention.v_proj.weight[range(28), range(OWN.start, OWN.stop)] = 1
        attention.o_proj.weight[:, :size] = 0
    fast, slow = torch.arange(4), torch.arange(10, half)  # turns of the rotary embedding
    turn = 1 / config.rope_theta ** (fast / half)
    first.k_proj.weight[fast, CONSTANT] = 1.5
    first.q_proj.weight[fast, CONSTANT] = 1.5 * turn.cos()
    first.q_proj.weight[fast + half, CONSTANT] = -1.5 * turn.sin()
    first.o_proj.weight[range(BEFORE.start, BEFORE.stop), range(28)] = 0.06
    places = torch.cat([slow, slow + half])
    second.q_proj.weight[places, range(OWN.start, OWN.stop)] = 1.5
    second.k_proj.weight[places, range(BEFORE.start, BEFORE.stop)] = 1.5
    second.o_proj.weight[range(NEXT.start, NEXT.stop), range(28)] = 0.06


def main() -> None:
    options = tyro.cli(BaseSizes)
    config, tokenizer = base_config()
    model = make_model(config, options.seed)
    start_from_codec(model, load_codec(options.audio_tokenizer_path))
    start_with_induction(model, tokenizer)
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)  # pyright: ignore[reportAttributeAccessIssue]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters / 1e6:.2f} M parameters in {options.out}")


if __name__ == "__main__":
    main()
