"""--max_text_tokens: texts are counted by the checkpoint's tokenizer, in a build, in --check, and in a manifest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from conftest import EXAMPLES, preprocess
from higgs_tune.preprocess.check import check_data
from higgs_tune.preprocess.config import PreprocessConfig
from higgs_tune.preprocess.input.chatml import key_of
from higgs_tune.preprocess.reject import Reject
from higgs_tune.preprocess.text_tokens import TokenLimit
from higgs_tune.shards.errors import UserError
from higgs_tune.shards.reader import ShardSet
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="module")
def counts(toy: Path) -> dict[str, int]:
    """Tokens of the longest text of each sample of the example, by transformers alone."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(toy / "model" / "tokenizer.json"))
    most: dict[str, int] = {}
    for place, entry in enumerate(json.loads(EXAMPLES.read_text())):
        texts = [
            part["text"] if isinstance(part, dict) else part
            for message in entry["messages"]
            for part in (message["content"] if isinstance(message["content"], list) else [message["content"]])
            if isinstance(part, str) or part["type"] == "text"
        ]
        most[key_of(entry, place)] = max(len(tokenizer.encode(text, add_special_tokens=False)) for text in texts)
    return most


@pytest.mark.fast
def test_the_limit_is_the_tokenizers(toy: Path) -> None:
    """At the limit a text is taken, one token beyond it is not. Bytes are an upper bound, so short ones pass."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(toy / "model" / "tokenizer.json"))
    for text in ("سَلَامٌ عَلَيْكُمْ", "hello", "日本", "🙂", "e\u0301"):
        tokens = len(tokenizer.encode(text, add_special_tokens=False))
        assert tokens <= len(text.encode())
        TokenLimit(toy / "model", tokens).check(text, "row")
        if tokens > 1:
            with pytest.raises(Reject, match=f"row: expected at most {tokens - 1} tokens, got {tokens}"):
                TokenLimit(toy / "model", tokens - 1).check(text, "row")


def test_a_build_and_its_check_leave_out_the_same(toy: Path, tmp_path: Path, counts: dict[str, int]) -> None:
    limit = int(np.median(list(counts.values())))
    wanted = {key for key, count in counts.items() if count > limit}
    assert 0 < len(wanted) < len(counts)
    preprocess(toy, EXAMPLES, tmp_path / "set", max_text_tokens=limit)
    shards = ShardSet(tmp_path / "set")
    rejects = [json.loads(line) for line in (tmp_path / "set" / "rejects.jsonl").read_text().splitlines()]
    assert {line["id"] for line in rejects} == wanted
    assert {line["reason"] for line in rejects} == {"text_too_long"}
    assert all(f"expected at most {limit} tokens, got " in line["detail"] for line in rejects)
    assert len(shards) == len(counts) - len(wanted)
    report = check_data(PreprocessConfig(EXAMPLES, toy / "model", check=True, max_text_tokens=limit, num_processes=1))
    assert report["rejects"] == {"text_too_long": len(wanted)}
    assert report["text_tokens"]["percentiles"]["100"] <= limit


def test_rows_of_a_manifest_and_normalized_texts(toy: Path, tmp_path: Path) -> None:
    """The text is counted as it will be tokenized: tatweel is gone with --text_normalization arabic."""
    for name in "abcd":
        soundfile.write(
            tmp_path / f"{name}.wav", 0.1 * np.random.default_rng(ord(name)).standard_normal(24_000), 24_000
        )
    stretched = "س" + "ـ" * 300 + "لام"
    rows = f"audio,text,speaker\na.wav,hello,s\nb.wav,{stretched},s\nc.wav,{'x1y2 ' * 60},s\nd.wav,good,s\n"
    (tmp_path / "data.csv").write_text(rows)

    def rejects(out: str, **options: Any) -> set[str]:
        preprocess(toy, tmp_path / "data.csv", tmp_path / out, max_text_tokens=60, val_fraction=0.0, **options)
        lines = (tmp_path / out / "rejects.jsonl").read_text().splitlines()
        assert all(json.loads(line)["reason"] == "text_too_long" for line in lines)
        return {json.loads(line)["id"] for line in lines}

    plain, normalized = rejects("plain"), rejects("arabic", text_normalization="arabic")
    assert len(plain) == 2
    assert len(normalized) == 1
    assert normalized < plain


@pytest.mark.fast
def test_a_limit_of_none_is_refused(toy: Path) -> None:
    with pytest.raises(UserError, match="--max_text_tokens"):
        PreprocessConfig(EXAMPLES, toy / "model", check=True, max_text_tokens=0)
