"""Shard sets: the sequence that they stand for, their bytes, their reader, the plan over them."""

from __future__ import annotations

import doctest
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from boson_multimodal.model.higgs_audio.utils import build_delay_pattern_mask
from helpers.samples import random_sample
from higgs_tune.shards import plan as plan_module
from higgs_tune.shards.errors import ShardError, UserError
from higgs_tune.shards.format import decode_sample, encode_sample
from higgs_tune.shards.plan import GROUP, WINDOW, make_plan
from higgs_tune.shards.reader import ShardSet
from higgs_tune.shards.sequence import SpecialIds, delay, expand, packed_length, undelay
from higgs_tune.train.model.reference import boson_inputs
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

IDS = SpecialIds(audio_in=5, audio_out=6, stream_bos=1024, stream_eos=1025, codebooks=8)


@pytest.mark.fast
@given(st.integers(1, 40), st.integers(0, 99))
def test_delay_pattern_is_bosons(frames: int, seed: int) -> None:
    codes_KT = np.random.default_rng(seed).integers(0, 1024, (8, frames)).astype(np.uint16)
    bos, eos = np.full((8, 1), 1024), np.full((8, 1), 1025)
    framed = torch.from_numpy(np.concatenate([bos, codes_KT.astype(np.int64), eos], axis=1))
    expected, _ = build_delay_pattern_mask(framed[None], bos_token_id=1024, pad_token_id=1025)  # pyright: ignore
    delayed_KW = delay(codes_KT, IDS)
    np.testing.assert_array_equal(delayed_KW, expected[0].numpy())
    np.testing.assert_array_equal(undelay(delayed_KW), codes_KT)


@pytest.mark.fast
def test_expansion_is_bosons(toy_tokenizer: PreTrainedTokenizerBase, toy_ids: SpecialIds) -> None:
    """Codes, audio labels and text labels of boson's collator, shifted by one."""
    rng = np.random.default_rng(3)
    for number in range(20):
        options = {"turns": 1 + number % 3, "start_index": (None, 3, 99)[number % 3] if number % 3 < 2 else None}
        sample = random_sample("s", rng, toy_tokenizer, toy_ids, **options)
        batch = boson_inputs([sample], toy_ids, 0)
        part = expand([sample], toy_ids)
        assert part.length == packed_length(sample.tokens_2L.shape[1], sample.segment_frames, toy_ids.codebooks)
        outputs = [np.arange(start, start + width) for start, width, is_out in part.segments if is_out]
        out_at = np.isin(part.audio_at, np.concatenate(outputs))
        np.testing.assert_array_equal(part.codes_KA[:, out_at], batch["audio_out_ids"])
        np.testing.assert_array_equal(part.codes_KA[:, ~out_at], batch["audio_in_ids"])
        labels = np.full((toy_ids.codebooks, part.length), -100)
        labels[:, part.audio_label_at] = part.audio_labels_KB
        shifted = np.concatenate([batch["label_audio_ids"][:, 1:], np.full((8, 1), -100)], axis=1)  # pyright: ignore
        np.testing.assert_array_equal(labels[:, np.concatenate(outputs)], shifted)
        kept = [int(label) for label in batch["label_ids"][0] if label >= 0]
        assert part.text_labels.tolist() == kept
        assert (part.text_label_at + 1 == part.text_at[np.isin(part.text_at - 1, part.text_label_at)]).all()


def test_encoding_roundtrips(toy_tokenizer: PreTrainedTokenizerBase, toy_ids: SpecialIds) -> None:
    sample = random_sample("k", np.random.default_rng(0), toy_tokenizer, toy_ids)
    block = encode_sample(sample)
    assert encode_sample(sample) == block
    again = decode_sample(block, "here")
    assert (again.key, again.meta) == (sample.key, sample.meta)
    np.testing.assert_array_equal(again.tokens_2L, sample.tokens_2L)
    np.testing.assert_array_equal(again.codes_KT, sample.codes_KT)


def test_plain_tar_reads_a_shard(shards: ShardSet, tmp_path: Path) -> None:
    names = []
    for shard in shards.manifest["shards"]:
        path = shards.folder / shard["name"]
        names += subprocess.run(["tar", "-tf", path], check=True, capture_output=True, text=True).stdout.split()
        subprocess.run(["tar", "-xf", path, "-C", tmp_path], check=True)
    keys = [key.decode() for key in shards.index["key"]]
    assert names == [f"{key}.{suffix}" for key in keys for suffix in ("codes.npy", "json", "tokens.npy")]
    for row, key in enumerate(keys):
        sample = shards.read(row)
        np.testing.assert_array_equal(np.load(tmp_path / f"{key}.codes.npy", allow_pickle=False), sample.codes_KT)
        np.testing.assert_array_equal(np.load(tmp_path / f"{key}.tokens.npy", allow_pickle=False), sample.tokens_2L)
        assert json.loads((tmp_path / f"{key}.json").read_text()) == sample.meta


def test_damage_is_named(shards: ShardSet, tmp_path: Path) -> None:
    for path in shards.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    path = tmp_path / "codes-000001.tar"
    data = bytearray(path.read_bytes())
    copy = ShardSet(tmp_path)
    row = int(np.flatnonzero(copy.index["shard"] == 1)[2])
    offset = int(copy.index["offset"][row])
    data[offset + 700] ^= 1
    path.write_bytes(data)
    key = copy.index["key"][row].decode()
    with pytest.raises(ShardError, match=rf"wrong checksum .*codes-000001\.tar, key {key}, offset {offset}.*expected"):
        copy.read(row)
    copy.read(row - 1)
    path.write_bytes(data[: offset + 100])
    with pytest.raises(ShardError, match="wrong size"):
        ShardSet(tmp_path)
    with pytest.raises(ShardError, match="ends early"):
        copy.read(row)
    path.unlink()
    with pytest.raises(ShardError, match="missing"):
        ShardSet(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(UserError, match="no shard set here"):
        ShardSet(tmp_path)


def naive_best_fit(lengths: list[int], budget: int) -> list[int]:
    """Fill of each pack: from long to short, each into the fullest pack that still holds it."""
    fills: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, fill in enumerate(fills) if fill + length <= budget]
        if fitting:
            best = max(fitting, key=lambda i: fills[i])
            fills[best] += length
        else:
            fills.append(length)
    return fills


@pytest.mark.fast
@given(st.lists(st.integers(1, 50), min_size=1, max_size=120), st.integers(50, 80), st.integers(0, 9))
def test_plan_is_best_fit_and_exactly_once(lengths: list[int], budget: int, epoch: int) -> None:
    sizes = np.array(lengths)
    plan = make_plan(np.arange(len(sizes)), sizes, tokens_per_pack=budget, seed=1, epoch=epoch, set_hash="h")
    fills = [int(sizes[plan.pack(number)].sum()) for number in range(len(plan))]
    assert sorted(plan.rows.tolist()) == list(range(len(sizes)))
    assert sorted(fills) == sorted(naive_best_fit(lengths, budget))
    again = make_plan(np.arange(len(sizes)), sizes, tokens_per_pack=budget, seed=1, epoch=epoch, set_hash="h")
    assert plan.hash == again.hash


def test_best_fit_packs_its_example() -> None:
    ran = doctest.testmod(plan_module)
    assert (ran.attempted, ran.failed) == (3, 0)


@pytest.mark.parametrize("world", [8, 64])
def test_ranks_get_like_work(world: int) -> None:
    """The slowest rank of a step has little more than the mean, against several times as much in a random order; and
    the order is still random: neighbouring steps do not follow from each other."""
    lengths = np.random.default_rng(0).lognormal(6, 0.7, 60_000).clip(50, 4000).astype(int)
    plan = make_plan(np.arange(len(lengths)), lengths, tokens_per_pack=16_384, seed=1, epoch=0, set_hash="h")
    squares = np.add.reduceat(lengths[plan.rows].astype(float) ** 2, plan.bounds[:-1])
    whole = len(plan) // WINDOW * WINDOW

    def spread(work: np.ndarray) -> float:
        steps = work[:whole].reshape(-1, world)
        return float((steps.max(1) / steps.mean(1) - 1).mean())

    assert spread(squares) < spread(np.random.default_rng(1).permutation(squares)) / 4
    groups = squares[:whole].reshape(-1, GROUP).mean(1)
    assert abs(np.corrcoef(groups[:-1], groups[1:])[0, 1]) < 0.4


def test_plan_depends_on_seed_epoch_and_data() -> None:
    lengths = np.random.default_rng(0).integers(50, 500, 1000)
    base = {"tokens_per_pack": 8192, "seed": 1, "epoch": 0, "set_hash": "a"}
    changes = [{}, {"seed": 2}, {"epoch": 1}, {"set_hash": "b"}, {"tokens_per_pack": 8000}]
    hashes = {make_plan(np.arange(1000), lengths, **(base | change)).hash for change in changes}
    assert len(hashes) == len(changes)
