"""Our forward on a native checkpoint, against transformers' own native class (5.3 or later) with the same weights.

    .venv/bin/python tests/native/compare.py [--work runs/native]

Makes an environment of its own in WORK/env on the first run (our transformers is 4.46, which has no such class), builds
a small random model there, loads what it saved with our loader, and compares the logits of every position and the
gradient of every parameter. Exit code 1 where a difference is above 1e-5. Not part of `make test`: it downloads.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import numpy as np
import torch
from higgs_tune.preprocess.checkpoints.checkpoint import load_tokenizer, read_config, special_ids
from higgs_tune.preprocess.checkpoints.native import boson_weight_name
from higgs_tune.shards.errors import UserError
from higgs_tune.shards.format import Sample
from higgs_tune.shards.sequence import expand
from higgs_tune.train.data.batch import Batch, collate
from higgs_tune.train.model.forward import hidden_states
from higgs_tune.train.model.load import load_model
from higgs_tune.train.toy import make_tokenizer, texts_of
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
REQUIREMENTS = (f"torch=={torch.__version__.partition('+')[0]}", "transformers>=5.3", "numpy", "peft", "jinja2")
LIMIT = 1e-5


def make_environment(folder: Path, requirements: tuple[str, ...] = REQUIREMENTS) -> Path:
    """The Python of an environment with some packages, made if it is not there."""
    python = folder / "bin" / "python"
    if not (folder / "installed").exists():
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *requirements], check=True)
        (folder / "installed").touch()
    return python


def make_samples(audio_in: int, audio_out: int) -> list[Sample]:
    """Random texts with one to three segments each."""
    rng, samples = np.random.default_rng(0), []
    for number in range(4):
        frames = rng.integers(2, 20, 1 + number % 3).tolist()
        parts = [rng.integers(5, 400, rng.integers(3, 12)) for _ in range(len(frames) + 1)]
        places = [audio_in] * (len(frames) - 1) + [audio_out]
        tokens = np.concatenate([parts[0], *(np.r_[p, part] for p, part in zip(places, parts[1:], strict=True))])
        meta = {"segments": [{"role": "", "frames": count} for count in frames]}
        codes_KT = rng.integers(0, 1024, (8, sum(frames))).astype(np.uint16)
        labels = np.full_like(tokens, -100)
        samples.append(Sample(f"s{number}", meta, np.stack([tokens, labels]).astype(np.int32), codes_KT))
    return samples


def native_inputs(samples: list[Sample], folder: Path, sizes: dict[str, object]) -> dict[str, np.ndarray]:
    """Padded arguments of the native forward: a placeholder for every audio position, and the delayed codes."""
    ids = special_ids(read_config(folder), folder)
    parts = [expand([sample], ids) for sample in samples]
    length, audio = max(p.length for p in parts), max(len(p.audio_at) for p in parts)
    shape = (len(parts), length)
    input_ids, real = np.full(shape, sizes["pad_token_id"], np.int64), np.zeros(shape, bool)
    codes, mask = np.zeros((len(parts), audio, 8), np.int64), np.zeros((len(parts), audio), bool)
    for row, part in enumerate(parts):
        input_ids[row, part.text_at] = part.text_ids
        input_ids[row, part.audio_at] = ids.audio_out
        real[row, : part.length] = True
        codes[row, : len(part.audio_at)] = part.codes_KA.T
        mask[row, : len(part.audio_at)] = True
    width = int(str(sizes["vocab_size"])) + 8 * 1026
    weights = np.random.default_rng(1).standard_normal((int(real.sum()), width)).astype(np.float32) / width
    inputs = {"input_ids": input_ids, "attention_mask": real.astype(np.int64), "audio_input_ids": codes}
    return inputs | {"audio_input_ids_mask": mask, "real": real, "weights": weights}


def packed_logits(folder: Path, batch: Batch) -> tuple[torch.nn.Module, torch.Tensor]:
    """The loaded model, trainable in full, and its logits in sequence order."""
    model = load_model(folder, device=torch.device("cpu"), dtype=torch.float32).model.requires_grad_(True)
    hidden = model.norm(hidden_states(model, batch))[batch["to_sequence"].long()]
    heads = model.audio_decoder_proj
    return model, torch.cat([heads.text_lm_head(hidden), heads.audio_lm_head(hidden)], dim=1)


def compare(work: Path) -> dict[str, float]:
    """Largest differences: of logits, absolute; of gradients, relative to each parameter's largest."""
    python = make_environment(work / "env")
    folder = work / "model"
    shutil.rmtree(folder, ignore_errors=True)
    tokenizer = make_tokenizer(texts_of(ROOT / "examples" / "arabic" / "chatml.json"))
    for name in ("checkpoint", "headless"):
        tokenizer.save_pretrained(folder / name)
    token = tokenizer.convert_tokens_to_ids
    sizes: dict[str, object] = {"vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 96}
    sizes |= {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    sizes |= {"codebook_size": 1026, "audio_token_id": token("<|AUDIO_OUT|>"), "pad_token_id": tokenizer.pad_token_id}
    sizes |= {"audio_delay_token_id": token("<|reserved_special_token_6|>"), "attn_implementation": "eager"}
    sizes |= {"audio_bos_token_id": token("<|audio_out_bos|>")}
    (folder / "sizes.json").write_text(json.dumps(sizes))
    samples = make_samples(int(token("<|AUDIO|>")), int(token("<|AUDIO_OUT|>")))  # pyright: ignore[reportArgumentType]
    config = {"model_type": "higgs_audio_v2", **sizes, "num_codebooks": 8, "rope_parameters": {"rope_type": "default"}}
    (folder / "checkpoint" / "config.json").write_text(json.dumps(config))  # until the native one is there
    np.savez(folder / "inputs.npz", **native_inputs(samples, folder / "checkpoint", sizes))  # pyright: ignore
    subprocess.run([python, Path(__file__).with_name("native_model.py"), folder], check=True)

    checkpoint = folder / "checkpoint"
    ids = special_ids(read_config(checkpoint), checkpoint)
    load_tokenizer(checkpoint, ids)
    model, logits = packed_logits(checkpoint, collate(samples, 0.0, ids))
    results = load_file(folder / "results.safetensors")
    (logits * torch.from_numpy(np.load(folder / "inputs.npz")["weights"])).sum().backward()
    worst, own = 0.0, dict(model.named_parameters())
    compared = 0
    for name, wanted in results.items():
        if name.startswith("gradient/"):
            got = own[boson_weight_name(name.removeprefix("gradient/"))].grad
            assert got is not None, name
            worst = max(worst, float((got - wanted).abs().max() / wanted.abs().max()))
            compared += 1
    assert compared == len(own), f"{compared} gradients for {len(own)} parameters"
    check_headless(folder / "headless")
    return {"logits": float((logits.detach() - results["logits"]).abs().max()), "gradients": worst}


def check_headless(folder: Path) -> None:
    """A checkpoint without a text head loads and says so."""
    loaded = load_model(folder, device=torch.device("cpu"), dtype=torch.float32)
    if loaded.has_text_head:
        raise UserError("a text head where the checkpoint has none", where=folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "native")
    worst = compare(parser.parse_args().work)
    print(f"largest difference of logits {worst['logits']:.1e}, of gradients {worst['gradients']:.1e} (relative)")
    sys.exit(max(worst.values()) > LIMIT)


if __name__ == "__main__":
    main()
