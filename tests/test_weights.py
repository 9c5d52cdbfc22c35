"""Weight files of a checkpoint: those that count are read, and damage is named by the first command that sees it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import EXAMPLES, preprocess
from helpers.tiny import run_train
from higgs_tune.preprocess.audio.whisper import tower_sha256
from higgs_tune.preprocess.checkpoints.weights import INDEX, SINGLE, all_finite, weight_files
from higgs_tune.preprocess.codec.checkpoint import load_codec
from higgs_tune.preprocess.codec.weights import codec_weight_files
from higgs_tune.preprocess.filetype import file_kind
from higgs_tune.shards.errors import UserError
from higgs_tune.shards.reader import ShardSet
from higgs_tune.train.model.load import load_model
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 11531234567\n"
TENSORS = {name: np.full(3, i, np.float32) for i, name in enumerate("abcdef")}


def write_numbered(folder: Path, count: int = 3, *, index: bool = True, value: float = 0.0) -> dict[str, str]:
    """Write TENSORS in numbered files; returns the file of each."""
    folder.mkdir(exist_ok=True)
    file_of = {name: f"model-{i % count + 1:05d}-of-{count:05d}.safetensors" for i, name in enumerate(TENSORS)}
    for file in set(file_of.values()):
        save_arrays({name: TENSORS[name] + value for name in TENSORS if file_of[name] == file}, folder / file)
    if index:
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": file_of}))
    return file_of


def names(folder: Path) -> list[str]:
    return [file.name for file in weight_files(folder)]


@pytest.mark.fast
def test_what_the_index_names_is_read(tmp_path: Path) -> None:
    """Older shards, a single file, other formats and adapters beside it do not count."""
    file_of = write_numbered(tmp_path)
    write_numbered(tmp_path, 4, index=False, value=9.0)
    save_arrays(TENSORS, tmp_path / SINGLE)
    save_arrays(TENSORS, tmp_path / "adapter_model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    assert names(tmp_path) == sorted(set(file_of.values()))


@pytest.mark.fast
def test_without_an_index_one_file_or_a_whole_set_is_read(tmp_path: Path) -> None:
    write_numbered(tmp_path, 3, index=False)
    assert names(tmp_path) == [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    save_arrays(TENSORS, tmp_path / SINGLE)
    assert names(tmp_path) == [SINGLE]
    (tmp_path / "other").mkdir()
    save_arrays(TENSORS, tmp_path / "other" / "weights.safetensors")
    assert names(tmp_path / "other") == ["weights.safetensors"]


def partial(folder: Path) -> None:
    (folder / SINGLE).unlink()
    place = folder / ".cache" / "huggingface" / "download"
    place.mkdir(parents=True)
    (place / "abc.incomplete").write_bytes(b"half")


def cached_partial(folder: Path) -> None:
    """A snapshot in the Hub's cache, whose blob never came."""
    (folder / SINGLE).unlink()
    (folder / SINGLE).symlink_to("../../blobs/abc")


def two_sets(folder: Path) -> None:
    (folder / SINGLE).unlink()
    write_numbered(folder, 2, index=False)
    write_numbered(folder, 3, index=False)


def twice(folder: Path) -> None:
    (folder / SINGLE).unlink()
    for i in (1, 2):
        save_arrays({"a": TENSORS["a"]}, folder / f"model-{i:05d}-of-00002.safetensors")


def twice_by_index(folder: Path) -> None:
    file_of = write_numbered(folder)
    save_arrays({name: TENSORS[name] for name in "abd"}, folder / file_of["a"])


def disagree(folder: Path) -> None:
    file_of = write_numbered(folder)
    save_arrays({"a": TENSORS["a"]}, folder / file_of["a"])


def shard_missing(folder: Path) -> None:
    (folder / write_numbered(folder)["b"]).unlink()


def cut(folder: Path, keep: int) -> None:
    (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[:keep])


def only_pickled(folder: Path) -> None:
    (folder / SINGLE).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "training_args.bin").write_bytes(b"pickle")


def index_of(folder: Path, weight_map: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (lambda folder: (folder / SINGLE).unlink(), rf"has no weights .*expected {SINGLE}, or several"),
    "bin": (only_pickled, r"has no weights .*got pytorch_model\.bin\. Pickled weights are not read. Convert them"),
    "pointer": (lambda folder: (folder / SINGLE).write_text(POINTER), r"Git LFS pointer.*git lfs pull"),
    "index is a pointer": (lambda folder: (folder / INDEX).write_text(POINTER), r"index .* Git LFS pointer"),
    "page": (lambda folder: (folder / SINGLE).write_text("<!DOCTYPE html>"), "got an HTML page"),
    "empty": (lambda folder: cut(folder, 0), "got an empty file"),
    "head": (lambda folder: cut(folder, 20), "not a whole safetensors file"),
    "tail": (lambda folder: cut(folder, -5), r"not whole .*bytes, got .*Download the checkpoint again"),
    "grown": (lambda folder: (folder / SINGLE).open("ab").write(b"more"), "the file is not whole"),
    "shard missing": (shard_missing, r"weight files are missing .*expected model-00002-of-00003\.safetensors"),
    "partial": (partial, r"got a download that was not finished: abc\.incomplete"),
    "cached partial": (cached_partial, rf"got a link to a missing file: {SINGLE}"),
    "two sets": (two_sets, f"no index says which are meant .*expected {INDEX}"),
    "twice": (twice, r"a tensor stands in two weight files: a .*got model-00001-of-00002\.safetensors and"),
    "twice by index": (twice_by_index, r"a tensor stands in two weight files: b"),
    "disagree": (disagree, r"index and weight files disagree .*got d not in model-00001-of-00003"),
    "index of bins": (lambda folder: index_of(folder, {"a": "pytorch_model-1.bin"}), "names another kind of file"),
    "index elsewhere": (lambda folder: index_of(folder, {"a": "../x.safetensors"}), "in the same folder"),
    "index of nothing": (lambda folder: index_of(folder, None), "names no files"),
}


@pytest.mark.fast
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_folders_are_named(tmp_path: Path, damage: str) -> None:
    make, message = DAMAGE[damage]
    save_arrays(TENSORS, tmp_path / SINGLE)
    make(tmp_path)
    with pytest.raises(UserError, match=message):
        weight_files(tmp_path)


@pytest.mark.fast
def test_finite_values() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        good = torch.tensor([1.0, -2.0], dtype=dtype)
        assert all_finite(good)
        assert not any(all_finite(torch.cat([good, torch.tensor([bad], dtype=dtype)])) for bad in (np.nan, np.inf))
    assert all_finite(torch.zeros(0))
    assert all_finite(torch.arange(3))


@pytest.mark.fast
def test_kinds_of_files() -> None:
    for head, kind in (
        (b"", "an empty file"),
        (POINTER.encode(), "Git LFS pointer"),
        (b"\0\0\0\x1cftypM4A ", "MPEG-4"),
        (b"\xff\xf1\x50\x80", "AAC"),
        (b"  <HTML>", "HTML"),
        (b'{"error": 403}', "JSON"),
        (b"<?xml version='1.0'?><Error>", "XML"),
        ("كلام".encode() * 99, "plain text"),
        (bytes(99), "zero bytes"),
        (bytes(range(128, 200)), ""),
    ):
        assert kind in file_kind(head[:64])
        assert bool(kind) == bool(file_kind(head[:64]))


@pytest.fixture
def base(toy: Path, tmp_path: Path) -> Path:
    """A copy of the toy model."""
    return shutil.copytree(toy / "model", tmp_path / "base")


def load_whole(file: Path) -> dict[str, torch.Tensor]:
    """Weights that do not change with the file, which is mapped."""
    return {name: value.clone() for name, value in load_file(file).items()}


def split(base: Path, count: int = 3) -> dict[str, torch.Tensor]:
    """Store a checkpoint in numbered files with an index; returns its weights."""
    weights, index = load_whole(base / SINGLE), {}
    (base / SINGLE).unlink()
    for i in range(count):
        file = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        part = {name: value for at, (name, value) in enumerate(weights.items()) if at % count == i}
        save_file(part, base / file)
        index |= dict.fromkeys(part, file)
    (base / INDEX).write_text(json.dumps({"weight_map": index}))
    return weights


def test_the_trainers_model_is_the_one_that_the_index_names(base: Path) -> None:
    """Zeros of an older download, with a name that sorts last, change nothing."""
    weights = split(base)
    for i in (1, 2):
        save_file({name: torch.zeros_like(v) for name, v in weights.items()}, base / f"model-{i}-of-9.safetensors")
    loaded = load_model(base, device=torch.device("cpu"), dtype=torch.float32).model.state_dict()
    assert all(torch.equal(loaded[name], value.float()) for name, value in weights.items())
    save_file({f"model.{name}": value for name, value in weights.items()}, base / "model-00004.safetensors")
    index = json.loads((base / INDEX).read_text())
    index["weight_map"] |= {f"model.{name}": "model-00004.safetensors" for name in weights}
    (base / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"model\.embed_tokens\.weight is a second embed_tokens\.weight"):
        load_model(base, device=torch.device("cpu"), dtype=torch.float32)


def refusal(capsys: pytest.CaptureFixture[str], base: Path, data: ShardSet, out: Path) -> str:
    """The trainer's message; nothing is written."""
    with pytest.raises(SystemExit) as end:
        run_train("single", base, Path(data.location), out)
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said


def test_the_trainer_refuses_before_it_writes(
    base: Path, shards: ShardSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, out = load_whole(base / SINGLE), tmp_path / "out"
    (base / SINGLE).write_text(POINTER)
    assert "Git LFS pointer" in refusal(capsys, base, shards, out)
    assert not out.exists()
    name = next(name for name in weights if "layers.1.mlp.up_proj" in name)
    weights[name][0, 0] = torch.nan
    save_file(weights, base / SINGLE)
    assert f"{name} holds NaN or infinite values" in refusal(capsys, base, shards, out)


def test_tokens_beyond_the_embedding_are_named_first(
    toy: Path, base: Path, shards: ShardSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By preprocessing, before it encodes, and by the trainer, before it loads; not where the embedding has room."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<dialect>", "<accent>"], special_tokens=True)
    tokenizer.save_pretrained(base)
    size = len(tokenizer)
    expected = rf"expected ids below {size - 2}, got 2 tokens beyond it: <dialect> \({size - 2}\), <accent>"
    with pytest.raises(UserError, match=expected):
        preprocess(toy, EXAMPLES, tmp_path / "set", model_path=base)
    assert not (tmp_path / "set").exists()
    provenance = tmp_path / "data" / "manifest.json"
    shutil.copytree(shards.location, provenance.parent)
    manifest = json.loads(provenance.read_text())
    manifest["provenance"]["model"]["tokenizer_sha256"] = hashlib.sha256(
        (base / "tokenizer.json").read_bytes()
    ).hexdigest()
    provenance.write_text(json.dumps(manifest))
    assert "tokens beyond it: <dialect>" in refusal(capsys, base, ShardSet(provenance.parent), tmp_path / "out")
    config = json.loads((base / "config.json").read_text())
    config["text_config"]["vocab_size"] = size
    (base / "config.json").write_text(json.dumps(config))
    assert preprocess(toy, EXAMPLES, tmp_path / "set", model_path=base)["samples"] == 40


def test_pointers_in_place_of_config_and_tokenizer(toy: Path, base: Path, tmp_path: Path) -> None:
    for file in ("tokenizer.json", "config.json"):
        (base / file).write_text(POINTER)
        with pytest.raises(UserError, match=rf"is a Git LFS pointer.*{file}.*git lfs pull"):
            preprocess(toy, EXAMPLES, tmp_path / "set", model_path=base)


def test_the_codecs_weights(toy: Path, tmp_path: Path) -> None:
    """model.pth of the original layout alone; damage is named."""
    folder = shutil.copytree(toy / "codec", tmp_path / "codec")
    save_arrays(TENSORS, folder / SINGLE)
    assert [file.name for file in codec_weight_files(folder)] == ["model.pth"]
    weights = torch.load(folder / "model.pth", weights_only=True)
    weights["fc_prior.bias"][0] = torch.inf
    torch.save(weights, folder / "model.pth")
    with pytest.raises(UserError, match=r"NaN or infinite .*fc_prior\.bias"):
        load_codec(folder)
    (folder / "model.pth").write_text(POINTER)
    with pytest.raises(UserError, match="Git LFS pointer"):
        load_codec(folder)
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "higgs_audio_v2_tokenizer"}
    (folder / "config.json").write_text(json.dumps(config))
    assert [file.name for file in codec_weight_files(folder)] == [SINGLE]


@pytest.mark.fast
def test_the_towers_weights_are_those_that_the_index_names(tmp_path: Path) -> None:
    """Of two copies in other precisions, and of stray files, the named one counts."""
    weights = {"model.encoder.conv1.weight": torch.ones(2), "model.decoder.x": torch.ones(3)}
    save_file(weights, tmp_path / SINGLE)
    before = tower_sha256(tmp_path)
    save_file({name: value + 1 for name, value in weights.items()}, tmp_path / "model.fp32-00001-of-00002.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, tmp_path / "zz.safetensors")
    assert tower_sha256(tmp_path) == before
