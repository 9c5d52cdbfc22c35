"""Fixtures that many tests share: toy checkpoints and a small shard set, made once a session in a temporary folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from higgs_tune.preprocess.config import PreprocessConfig
from higgs_tune.preprocess.pipeline import build
from higgs_tune.shards.reader import ShardSet
from higgs_tune.shards.sequence import SpecialIds
from higgs_tune.train.toy import ToyConfig, make_toy
from transformers import PreTrainedTokenizerBase

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples" / "arabic" / "chatml.json"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """The tensors are tiny; threads that wait for each other cost more than they bring."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with `model` and `codec`."""
    folder = tmp_path_factory.mktemp("toy")
    make_toy(ToyConfig(out=folder, chatml=EXAMPLES))
    return folder


@pytest.fixture(scope="session")
def toy_ids(toy: Path) -> SpecialIds:
    from higgs_tune.preprocess.checkpoint import read_config, special_ids

    return special_ids(read_config(toy / "model"), toy)


@pytest.fixture(scope="session")
def toy_tokenizer(toy: Path, toy_ids: SpecialIds) -> PreTrainedTokenizerBase:
    from higgs_tune.preprocess.checkpoint import load_tokenizer

    return load_tokenizer(toy / "model", toy_ids)


def preprocess(toy: Path, data: Path, out: Path, **options: object) -> dict[str, object]:
    """Run higgs-preprocess in this process on the toy checkpoints."""
    config = PreprocessConfig(
        data=data,
        out=out,
        model_path=toy / "model",
        audio_tokenizer_path=toy / "codec",
        **options,  # pyright: ignore[reportArgumentType]
    )
    return build(config)


@pytest.fixture(scope="session")
def shards(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """The Arabic example as a shard set, a tenth of it for validation."""
    out = tmp_path_factory.mktemp("shards")
    preprocess(toy, EXAMPLES, out, val_fraction=0.1, samples_per_shard=16)
    return ShardSet(out)
