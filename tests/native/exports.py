"""Exports in the native layout, loaded by transformers' own classes and plain PEFT (transformers 5.3 or later).

    .venv/bin/python tests/native/exports.py [--work runs/native]

Checks that `AutoProcessor` and `HiggsAudioV2ForConditionalGeneration` load a merged export with its text head; that
logits of the merged model and of adapters (LoRA, DoRA, modules in full) are ours to 1e-5 in float32; that greedy
`generate` gives our codes, and the processor our `serve` prompt; that vllm-omni's own code builds that prompt, too, but
for two tokens that it says twice; that an adapter trained on the native class is ours.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compare import LIMIT, ROOT, make_environment, make_samples, native_inputs
from higgs_tune.preprocess.checkpoints.checkpoint import load_tokenizer, read_config, special_ids
from higgs_tune.preprocess.input.chatml import parse_entry, tokenize
from higgs_tune.preprocess.input.layout import Reference, build_conversation
from higgs_tune.shards.format import Sample
from higgs_tune.shards.sequence import expand, undelay
from higgs_tune.train.checkpoint.output import adapter_tensors, save_adapter
from higgs_tune.train.data.batch import collate
from higgs_tune.train.export.merge import ExportConfig, export, load_adapter
from higgs_tune.train.model.decoding import generate_batch
from higgs_tune.train.model.forward import hidden_states
from higgs_tune.train.model.load import load_model
from higgs_tune.train.model.lora import TrainableOptions, add_lora, trainable
from higgs_tune.train.model.sampling import Sampling, request_of
from higgs_tune.train.toy import ToyConfig, make_toy
from safetensors.torch import load_file

CPU = torch.device("cpu")
MAX_FRAMES = 24
OMNI = "vllm-omni==0.30.0"
OMNI_FOLDER = Path("vllm_omni", "model_executor", "models", "higgs_audio_v2")
TEXT, REF_TEXT = "مرحبا بالعالم، hello.", "صباح الخير."
ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"preset": "comprehensive"},
    "dora": {"dora": True, "heads": True, "audio_embeddings": True, "norms": True},
    "rslora": {"rslora": True, "preset": "attention_only", "text_head": True},
}


def make_adapter(base: Path, folder: Path, options: dict[str, Any]) -> None:
    """An adapter of this trainer with random values."""
    torch.manual_seed(0)
    model = load_model(base, device=CPU, dtype=torch.float32).model
    peft_model = add_lora(model, TrainableOptions(r=4, alpha=8, **options), "single", base, None)
    parameters = trainable(peft_model)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    folder.mkdir(parents=True)
    save_adapter(peft_model, None, adapter_tensors(peft_model, parameters), folder)


@torch.no_grad()
def our_logits(folder: Path, samples: list[Sample], base: Path) -> torch.Tensor:
    """Text and audio logits of our forward, in sequence order; of an adapter or of a checkpoint."""
    has_adapter = (folder / "adapter_config.json").is_file()
    model: Any = (
        load_adapter(folder, device=CPU, dtype=torch.float32, base=base).get_base_model()
        if has_adapter
        else load_model(folder, device=CPU, dtype=torch.float32).model
    )
    batch = collate(samples, 0.0, special_ids(read_config(base), base))
    hidden = model.norm(hidden_states(model, batch))[batch["to_sequence"].long()]
    heads = model.audio_decoder_proj
    return torch.cat([heads.text_lm_head(hidden), heads.audio_lm_head(hidden)], dim=1)


def compare(work: Path) -> dict[str, float]:
    """Largest differences of logits, by export. Everything else is asserted."""
    python = make_environment(work / "env")
    folder = work / "exports"
    shutil.rmtree(folder, ignore_errors=True)
    make_toy(ToyConfig(out=folder / "toy", chatml=ROOT / "examples" / "arabic" / "chatml.json"))
    base, codec = folder / "toy" / "model", str((folder / "codec").resolve())
    ids = special_ids(read_config(base), base)
    samples = make_samples(ids.audio_in, ids.audio_out)
    export(ExportConfig(base, out=folder / "base", layout="native", audio_tokenizer_path=codec))
    for name, options in ADAPTERS.items():
        make_adapter(base, folder / name, options)
        export(ExportConfig(folder / name, out=folder / f"{name}-native", layout="native", adapter_only=True))
    export(ExportConfig(folder / "dora", out=folder / "merged", layout="native", dtype="float32",
                        audio_tokenizer_path=codec))  # fmt: skip
    sizes: dict[str, object] = json.loads((folder / "base" / "config.json").read_text())
    np.savez(folder / "inputs.npz", **native_inputs(samples, folder / "base", sizes))  # pyright: ignore
    (folder / "said.json").write_text(json.dumps({"text": TEXT, "ref_text": REF_TEXT, "max_frames": MAX_FRAMES}))
    path = os.pathsep.join([str(Path(__file__).with_name("stand_ins")), os.environ.get("PYTHONPATH", "")])
    command = [python, Path(__file__).with_name("native_exports.py"), folder, *ADAPTERS]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": path})
    results = load_file(folder / "results.safetensors")
    worst = {
        name: float((our_logits(folder / source, samples, base) - results[name]).abs().max())
        for name, source in {"merged": "dora", "trained": "trained", **{name: name for name in ADAPTERS}}.items()
    }
    check_speech(folder, base, results)
    check_omni(folder, base, python, results)
    return worst


def check_omni(folder: Path, base: Path, python: Path, results: dict[str, torch.Tensor]) -> None:
    """vllm-omni's prompts, by its own code: ours without a reference; with one, the marks around it stand twice."""
    package = folder.parent / "vllm-omni"
    if not (package / OMNI_FOLDER).is_dir():
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--target", package, OMNI], check=True)
    stand_ins = os.pathsep.join([str(Path(__file__).with_name("stand_ins")), os.environ.get("PYTHONPATH", "")])
    (file,) = (path for path in (package / OMNI_FOLDER).iterdir() if path.stem.endswith("_tokenizer"))
    command = [python, Path(__file__).with_name("omni_prompt.py"), folder, file]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": stand_ins})
    omni = json.loads((folder / "omni.json").read_text())
    ids = special_ids(read_config(base), base)
    tokenizer: Any = load_tokenizer(folder / "merged", ids)
    plain = parse_entry(build_conversation("serve", TEXT, {"type": "audio", "audio_url": "x"}), 0)
    tokens = tokenize(plain, tokenizer, ids)[0].tolist()
    assert tokens[: len(omni["plain"]) + 1] == [*omni["plain"], ids.audio_out]
    begin, end = (tokenizer.convert_tokens_to_ids(token) for token in ("<|audio_out_bos|>", "<|audio_eos|>"))
    cloned = [
        token
        for before, token in zip([None, *omni["cloned"]], omni["cloned"], strict=False)
        if not (token in (begin, end) and token == before)
    ]
    assert cloned == results["prompt_ids"].tolist()
    assert omni["codes"] == results["prompt_codes"].tolist()
    assert len(omni["cloned"]) == len(cloned) + 2, "vllm-omni says the reference's marks once: mend the docs"


def check_speech(folder: Path, base: Path, results: dict[str, torch.Tensor]) -> None:
    """The processor's prompt is our serve layout, and greedy `generate` gives our codes."""
    ids = special_ids(read_config(base), base)
    tokenizer = load_tokenizer(folder / "merged", ids)
    reference = undelay(results["prompt_codes"].T.numpy())
    part = {"type": "audio", "audio_url": "x"}
    chat = parse_entry(build_conversation("serve", TEXT, part, [Reference(part, REF_TEXT)]), 0)
    segments = [{"role": role, "frames": n} for role, n in zip(chat.roles, (reference.shape[1], 1), strict=True)]
    codes = np.concatenate([reference, np.zeros((8, 1))], axis=1).astype(np.uint16)
    sample = Sample("s", {"segments": segments}, tokenize(chat, tokenizer, ids), codes)
    request = request_of(sample, ids, speak=True, max_frames=MAX_FRAMES)
    parts = expand([request.prompt], ids)
    tokens = np.full(parts.length, -1)
    tokens[parts.text_at] = parts.text_ids
    theirs = results["prompt_ids"].numpy().copy()
    config = json.loads((folder / "merged" / "config.json").read_text())
    theirs[np.isin(theirs, (config["audio_token_id"], config["audio_delay_token_id"]))] = -1
    np.testing.assert_array_equal(tokens, theirs)
    np.testing.assert_array_equal(parts.codes_KA.T, results["prompt_codes"].numpy())
    model: Any = load_adapter(folder / "dora", device=CPU, dtype=torch.float32, base=base).get_base_model()
    greedy = Sampling(temperature=0.0, top_k=None, top_p=1.0)
    said = dict(generate_batch(model, [request], ids, greedy))[0]
    assert said.codes_KT is not None
    spoken = results["generated"].T.numpy()  # [8, W] delayed, from the column of BOS on
    frames = min(said.codes_KT.shape[1], spoken.shape[1] - 8)
    assert frames > 8, f"only {frames} frames"
    for k in range(8):
        np.testing.assert_array_equal(said.codes_KT[k, :frames], spoken[k, 1 + k : 1 + k + frames])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "native")
    worst = compare(parser.parse_args().work)
    for name, value in worst.items():
        print(f"{name}: largest difference of logits {value:.1e}")
    print(f"prompt and greedy codes are equal; {OMNI} sends that prompt with the reference's marks twice")
    sys.exit(max(worst.values()) > LIMIT)


if __name__ == "__main__":
    main()
