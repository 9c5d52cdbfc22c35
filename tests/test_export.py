"""higgs-export: both layouts, merged or the adapter alone, whole or absent."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from boson_multimodal.data_types import AudioContent, ChatMLSample, Message
from boson_multimodal.dataset.chatml_dataset import prepare_chatml_sample
from helpers.samples import random_sample
from helpers.tiny import ids_of, run_train, write_checkpoint, write_set
from higgs_tune.preprocess.checkpoints.checkpoint import load_tokenizer
from higgs_tune.preprocess.checkpoints.native import native_weight_name
from higgs_tune.shards.errors import UserError
from higgs_tune.train.export import folder as folder_module
from higgs_tune.train.export import tensors as tensors_module
from higgs_tune.train.export.folder import write_weights
from higgs_tune.train.export.merge import ExportConfig, export
from higgs_tune.train.export.native import TEMPLATE
from higgs_tune.train.export.tensors import Held, stored_tensors, write_tensors
from higgs_tune.train.model.adapter import adapter_state, apply_adapter, read_adapter
from higgs_tune.train.model.load import load_model
from safetensors.torch import load_file, save_file
from test_adapters import foreign, fresh
from test_native import write_native
from transformers import PreTrainedTokenizerBase

CPU = torch.device("cpu")
Tensors = dict[str, torch.Tensor]
ATTENTION = r"layers\.\d+\.self_attn\.[qkvo]_proj"
VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True, "target_modules": ATTENTION + r"|layers\.\d+\.audio_mlp\.up_proj"},
    "ranks": {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "in full": {
        "modules_to_save": [
            "audio_decoder_proj.text_lm_head", "audio_codebook_embeddings", "embed_tokens", ".audio_input_layernorm",
        ]
    },
    "heads and embeddings": {"target_modules": ["text_lm_head", "audio_lm_head", "embed_tokens", "q_proj"]},
}  # fmt: skip


def write_base(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A base in Boson's layout, with licence files."""
    write_checkpoint(folder, tokenizer)
    (folder / "LICENSE").write_text("the licence")
    (folder / "NOTICE.txt").write_text("the notice")
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: boson-community\nlanguage: en\n---\n# Base\n")
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, toy_tokenizer: PreTrainedTokenizerBase) -> Path:
    return write_base(tmp_path_factory.mktemp("export") / "base", toy_tokenizer)


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest, base: Path, tmp_path: Path) -> tuple[Path, Tensors]:
    """An adapter of one kind, and the weights of PEFT's own merge."""
    return tmp_path / "adapter", foreign(base, tmp_path / "adapter", **VARIANTS[request.param])


def assert_close(got: Tensors, expected: Tensors) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, atol=1e-6, rtol=0, msg=name)


def test_merged_weights_are_those_of_peft(variant: tuple[Path, Tensors], tmp_path: Path) -> None:
    """In both layouts; and from the native base with the native adapter, too."""
    adapter, expected = variant
    export(ExportConfig(adapter, out=tmp_path / "original", dtype="float32"))
    assert_close(load_file(tmp_path / "original" / "model.safetensors"), expected)
    export(ExportConfig(adapter, out=tmp_path / "native", layout="native", dtype="float32"))
    in_native = {native_weight_name(name): value for name, value in expected.items()}
    assert_close(load_file(tmp_path / "native" / "model.safetensors"), in_native)
    export(ExportConfig(adapter, out=tmp_path / "alone", layout="native", adapter_only=True))
    export(ExportConfig(tmp_path / "alone", out=tmp_path / "again", dtype="float32"))
    assert_close(load_file(tmp_path / "again" / "model.safetensors"), expected)


def test_native_adapters_continue_and_go_back(variant: tuple[Path, Tensors], base: Path, tmp_path: Path) -> None:
    """The adapter in native names is the same model for the trainer, and in boson's names the same file again."""
    adapter, expected = variant
    export(ExportConfig(adapter, out=tmp_path / "native", layout="native", adapter_only=True))
    export(ExportConfig(tmp_path / "native", out=tmp_path / "original", adapter_only=True))
    names = {
        name.removeprefix("base_model.model.") for name in load_file(tmp_path / "native" / "adapter_model.safetensors")
    }
    assert all(name.startswith(("model.", "text_lm_head.", "audio_lm_head.")) for name in names)
    read = apply_adapter(fresh(base), read_adapter(tmp_path / "native"))
    assert_close(read.merge_and_unload().state_dict(), expected)  # pyright: ignore[reportCallIssue]
    before, after = (load_file(f / "adapter_model.safetensors") for f in (adapter, tmp_path / "original"))
    assert_close(after, adapter_state(apply_adapter(fresh(base), read_adapter(adapter))))
    assert len(before) == len(after)


@pytest.mark.fast
def test_layouts_convert_without_loss(base: Path, tmp_path: Path) -> None:
    """native → original → native and the other way round: every tensor, every file that says what the model is."""
    native = write_native(tmp_path / "n0", base)
    export(ExportConfig(native, out=tmp_path / "o1"))
    export(ExportConfig(tmp_path / "o1", out=tmp_path / "n2", layout="native"))
    export(ExportConfig(base, out=tmp_path / "n1", layout="native"))
    export(ExportConfig(tmp_path / "n1", out=tmp_path / "o2"))
    for before, after in ((native, tmp_path / "n2"), (base, tmp_path / "o2")):
        tensors = load_file(after / "model.safetensors")
        for name, value in load_file(before / "model.safetensors").items():
            assert torch.equal(tensors.pop(name), value), name
        assert not tensors
        for name in ("tokenizer.json", "tokenizer_config.json"):
            assert json.loads((before / name).read_text()) == json.loads((after / name).read_text())
    configs = [load_model(f, device=CPU, dtype=torch.float32).model.config for f in (base, tmp_path / "o2")]
    texts = [config.text_config.to_dict() for config in configs]
    assert {k: v for k, v in texts[0].items() if texts[1].get(k) != v} == {"eos_token_id": texts[0]["eos_token_id"]}
    for name in ("audio_out_token_idx", "audio_codebook_size", "pad_token_id", "audio_dual_ffn_layers"):
        assert getattr(configs[0], name) == getattr(configs[1], name), name


@pytest.mark.fast
def test_tokenizers_that_transformers_5_wrote_are_read(base: Path, tmp_path: Path) -> None:
    """They name a class that older transformers do not know; exports name one that all know."""
    native = write_native(tmp_path / "native", base)
    file = native / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": "TokenizersBackend"}))
    read, expected = (load_tokenizer(folder, ids_of(folder)) for folder in (native, base))
    assert read.get_vocab() == expected.get_vocab()
    assert read.encode("مرحبا <|audio_out_bos|>") == expected.encode("مرحبا <|audio_out_bos|>")
    export(ExportConfig(native, out=tmp_path / "original"))
    told = json.loads((tmp_path / "original" / "tokenizer_config.json").read_text())
    assert told["tokenizer_class"] == "PreTrainedTokenizerFast"


@pytest.mark.fast
def test_files_are_those_of_safetensors(tmp_path: Path) -> None:
    """Of mixed dtypes and any shape, whatever the number of rows at once; several files have an index."""
    made: Tensors = {
        "half": torch.randn(5, 3).half(), "brain": torch.randn(7, 2, 3).bfloat16(), "whole": torch.tensor(3.5),
        "row": torch.randn(11), "none": torch.zeros(0, 4), "numbers": torch.arange(6), "wide": torch.randn(3, 1000),
    }  # fmt: skip
    write_tensors(tmp_path / "ours.safetensors", {name: Held(value) for name, value in made.items()})
    save_file(made, tmp_path / "theirs.safetensors")
    ours, theirs = (load_file(tmp_path / f"{name}.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    (tmp_path / "split").mkdir()
    stored = stored_tensors(tmp_path / "theirs.safetensors")
    write_weights(tmp_path / "split", stored, shard_bytes=200)
    index = json.loads((tmp_path / "split" / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 1
    for name, file in index.items():
        assert torch.equal(load_file(tmp_path / "split" / file)[name], made[name])


def test_chunks_change_no_byte(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign(base, tmp_path / "adapter", use_dora=True, target_modules=["q_proj", "text_lm_head"])
    files = []
    for chunk in (tensors_module.CHUNK_BYTES, 1024):
        monkeypatch.setattr(tensors_module, "CHUNK_BYTES", chunk)
        export(ExportConfig(tmp_path / "adapter", out=tmp_path / str(chunk)))
        files.append((tmp_path / str(chunk) / "model.safetensors").read_bytes())
    assert files[0] == files[1]


def test_what_native_cannot_hold_is_named(base: Path, tmp_path: Path, toy_tokenizer: PreTrainedTokenizerBase) -> None:
    tower = {"num_mel_bins": 8, "d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 1, "encoder_ffn_dim": 24}
    changes: dict[str, tuple[dict[str, Any], str]] = {
        "tower": ({"skip_audio_tower": False, "audio_encoder_config": tower}, "audio_tower, audio_encoder_proj"),
        "attention": ({"use_audio_out_self_attention": True}, "audio_attn"),
        "projector": ({"use_audio_out_embed_projector": True}, "audio_out_embed_projector"),
        "layers": ({"audio_dual_ffn_layers": [1]}, "audio_dual_ffn_layers"),
        "sizes": ({"audio_ffn_intermediate_size": 32}, "audio FFN of other sizes"),
    }
    for name, (change, message) in changes.items():
        write_checkpoint(tmp_path / name, toy_tokenizer, **change)
        with pytest.raises(UserError, match=message):
            export(ExportConfig(tmp_path / name, out=tmp_path / "out", layout="native"))
    foreign(tmp_path / "attention", tmp_path / "adapter", modules_to_save=["audio_attn"])
    with pytest.raises(UserError, match=r"layers.0.audio_attn"):
        export(ExportConfig(tmp_path / "adapter", out=tmp_path / "out", layout="native", adapter_only=True))
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".tmp-*"))


@pytest.mark.fast
def test_mistakes_are_named(base: Path, tmp_path: Path) -> None:
    def refused(match: str, **options: Any) -> None:
        with pytest.raises(UserError, match=match):
            export(ExportConfig(**{"adapter": base, "out": tmp_path / "out", **options}))

    refused("the checkpoint is in the original layout already")
    refused("no adapter here", adapter_only=True, layout="native")
    refused("exists already", out=base)
    refused("no evaluation here", layout="native", eval_dir=tmp_path)
    refused("--push_to_hub needs", layout="native", push_to_hub="a name")
    bad = tmp_path / "bad"
    bad.mkdir()
    for file in base.iterdir():
        (bad / file.name).write_bytes(file.read_bytes())
    weights = load_file(base / "model.safetensors")
    weights["norm.weight"][3] = float("nan")
    save_file(weights, bad / "model.safetensors")
    refused("norm.weight holds NaN", adapter=bad, layout="native")
    assert not (tmp_path / "out").exists()


def test_a_damaged_write_is_noticed(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bit that the disk turned: no folder under the final name."""

    def write_and_turn(file: Path, tensors: Any) -> dict[str, str]:
        checksums = write_tensors(file, tensors)
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        return checksums

    monkeypatch.setattr(folder_module, "write_tensors", write_and_turn)
    with pytest.raises(UserError, match="weights on disk differ"):
        export(ExportConfig(base, out=tmp_path / "out", layout="native"))
    assert not list(tmp_path.iterdir())


def test_killed_at_any_moment_nothing_has_the_final_name(base: Path, tmp_path: Path) -> None:
    """SIGKILL at random moments of the export; the next one cleans up and ends as an undisturbed one."""
    foreign(base, tmp_path / "adapter")
    config = ExportConfig(tmp_path / "adapter", out=tmp_path / "out", layout="native")
    context, rng = multiprocessing.get_context("fork"), random.Random(0)

    def started() -> Any:
        child = context.Process(target=export, args=(config,))
        child.start()
        return child

    def content() -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in config.out.iterdir()}

    begun, child = time.monotonic(), started()
    child.join()
    took, whole, killed = time.monotonic() - begun, content(), 0
    for _ in range(12):
        shutil.rmtree(config.out, ignore_errors=True)
        child = started()
        time.sleep(lived := rng.uniform(0, took))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        if config.out.exists():  # it had ended: the first run was a slow one
            assert content() == whole
            took = lived
        else:
            killed += 1
    assert killed >= 3
    shutil.rmtree(config.out, ignore_errors=True)
    export(config)
    assert content() == whole
    assert not list(tmp_path.glob(".tmp-out*"))


@pytest.mark.fast
def test_template_renders_what_the_engine_sends(toy_tokenizer: PreTrainedTokenizerBase) -> None:
    """Boson's own preparation of the same conversation, token for token; with parts of lists, and plain texts."""
    audio = {"type": "audio"}
    said: list[dict[str, Any]] = [
        {"role": "system", "content": "Generate audio following instruction."},
        {"role": "user", "content": "أهلا"},
    ]
    said += [{"role": "assistant", "content": [audio]}, {"role": "user", "content": "مرحبا، hello."}]
    parts = [
        m | {"content": [{"type": "text", "text": m["content"]}]} if isinstance(m["content"], str) else m for m in said
    ]
    sample = ChatMLSample(
        messages=[
            Message(role=m["role"], content=AudioContent(audio_url="x") if m["content"] == [audio] else m["content"])
            for m in said
        ]
    )
    tokens, _, _, _ = prepare_chatml_sample(sample, toy_tokenizer)
    assert tokens is not None
    answer = "<|start_header_id|>assistant<|end_header_id|>\n\n<|audio_out_bos|>"
    tokens += toy_tokenizer.encode(answer, add_special_tokens=False)
    render: Any = partial(toy_tokenizer.apply_chat_template, chat_template=TEMPLATE, tokenize=False)
    for conversation in (said, parts):
        text = render(conversation, add_generation_prompt=True)
        assert toy_tokenizer.encode(text, add_special_tokens=False) == tokens
    with pytest.raises(Exception, match="the first message must be of the system"):
        render(said[1:])


def test_a_run_goes_on_from_a_native_adapter(
    base: Path, tmp_path: Path, toy_tokenizer: PreTrainedTokenizerBase
) -> None:
    """As --model_path: the first loss of the further run is that of the same adapter in boson's names."""
    rng, ids = np.random.default_rng(0), ids_of(base)
    samples = [random_sample(f"s{i}", rng, toy_tokenizer, ids, frames=(3, 12)) for i in range(2)]
    data = write_set(tmp_path / "data", samples, base)
    full = {"train_norms": True, "train_heads": True, "train_audio_embeddings": True}
    run_train("single", base, data, tmp_path / "one", max_steps=2, learning_rate=1e-2, **full)
    export(ExportConfig(tmp_path / "one", out=tmp_path / "native", layout="native", adapter_only=True))
    told = json.loads((tmp_path / "native" / "adapter_config.json").read_text())
    assert told["auto_mapping"]["base_model_class"] == "HiggsAudioV2ForConditionalGeneration"
    assert {"norm", "embed_audio_tokens.embed_audio_tokens"} <= set(told["modules_to_save"])
    losses = [
        run_train("stage2", tmp_path / name, data, tmp_path / f"more-{name}", learning_rate=1e-30)[0]["loss"]
        for name in ("one", "native")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
