"""Fixtures that many tests share: toy checkpoints and a small shard set, made once a session in a temporary folder."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from helpers.ranks import shorten_the_selftest
from higgs_tune.preprocess.config import PreprocessConfig
from higgs_tune.preprocess.pipeline import build_shards
from higgs_tune.shards.reader import ShardSet
from higgs_tune.shards.sequence import SpecialIds
from higgs_tune.train.toy import ToyConfig, make_toy
from transformers import PreTrainedTokenizerBase

ROOT = Path(__file__).parents[1]
LONGEST = ("test_miniature_learns.py", "test_faults.py", "test_resume.py", "test_engine.py", "test_lora_paths.py")
LONGEST += ("test_long_runs.py", "test_whisper_path.py", "test_page.py", "test_handover.py", "test_signals.py")
EXAMPLES = ROOT / "examples" / "arabic" / "chatml.json"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the programs that tests start; see _one_thread
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read as triton is imported: test_triton_kernels.py runs on a CPU


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """The tensors are tiny; threads that wait for each other cost more than they bring."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _short_selftest() -> None:
    """Every run begins with one, a third of a short run's time. Files of tests that need no trainer do not load it."""
    if "higgs_tune.train.monitor.selftest" in sys.modules:
        shorten_the_selftest()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: a file is one process's, and none should wait for a long one at the end."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with `model` and `codec`."""
    folder = tmp_path_factory.mktemp("toy")
    make_toy(ToyConfig(out=folder, chatml=EXAMPLES))
    return folder


@pytest.fixture(scope="session")
def toy_ids(toy: Path) -> SpecialIds:
    from higgs_tune.preprocess.checkpoints.checkpoint import read_config, special_ids

    return special_ids(read_config(toy / "model"), toy)


@pytest.fixture(scope="session")
def toy_tokenizer(toy: Path, toy_ids: SpecialIds) -> PreTrainedTokenizerBase:
    from higgs_tune.preprocess.checkpoints.checkpoint import load_tokenizer

    return load_tokenizer(toy / "model", toy_ids)


def preprocess(toy: Path, data: Path, out: Path | str, **options: Any) -> dict[str, Any]:
    """Run higgs-preprocess in this process on the toy checkpoints."""
    given: dict[str, Any] = {"model_path": toy / "model", "audio_tokenizer_path": toy / "codec", "num_processes": 1}
    return build_shards(PreprocessConfig(data=data, out=str(out), **(given | options)))


@pytest.fixture(scope="session")
def shards(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """The Arabic example as a shard set, a tenth of it for validation."""
    out = tmp_path_factory.mktemp("shards")
    preprocess(toy, EXAMPLES, out, val_fraction=0.1, samples_per_shard=16)
    return ShardSet(out)


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """A bucket on a real S3 server on loopback."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "key", "AWS_DEFAULT_REGION": "us-east-1"}
    settings["AWS_ENDPOINT_URL"] = f"http://{host}:{port}"
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    fsspec.filesystem("s3").mkdir("bucket")
    yield "s3://bucket"
    server.stop()
    for name, value in before.items():
        os.environ.pop(name)
        if value is not None:
            os.environ[name] = value
