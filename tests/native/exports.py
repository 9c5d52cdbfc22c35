"""Exports in the native layout, loaded by transformers' own classes and plain PEFT (transformers 5.3 or later).

    .venv/bin/python tests/native/exports.py [--work runs/native]

Checks that `AutoProcessor` and `HiggsAudioV2ForConditionalGeneration` load a merged export with its text head; that
logits of the merged model and of adapters (LoRA, DoRA, modules in full) are ours to 1e-5 in float32; that greedy
`generate` gives our codes on prompts of both layouts, and the processor our `serve` prompt; that vllm-omni's own code
builds that prompt, too, but for two tokens that it says twice; that an adapter trained on the native class is ours;
that a checkpoint which transformers saved comes back from Boson's layout tensor by tensor.
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
from higgs_tune.preprocess.codec.checkpoint import load_codec
from higgs_tune.preprocess.input.chatml import parse_entry, tokenize
from higgs_tune.preprocess.input.layout import PromptLayout, Reference, Wording, build_conversation
from higgs_tune.shards.format import Sample
from higgs_tune.shards.sequence import SpecialIds, expand, undelay
from higgs_tune.train.checkpoint.output import adapter_tensors, save_adapter
from higgs_tune.train.data.batch import collate
from higgs_tune.train.export.merge import ExportConfig, export, load_adapter
from higgs_tune.train.model.decoding import generate_batch
from higgs_tune.train.model.forward import hidden_states
from higgs_tune.train.model.load import load_model
from higgs_tune.train.model.lora import TrainableOptions, add_lora, trainable
from higgs_tune.train.model.sampling import Request, Said, Sampling, request_of
from higgs_tune.train.toy import ToyConfig, make_toy
from safetensors.torch import load_file, save_file

CPU = torch.device("cpu")
MAX_FRAMES, PROMPTS = 24, 24
OMNI = "vllm-omni==0.30.0"
OMNI_FOLDER = Path("vllm_omni", "model_executor", "models", "higgs_audio_v2")
GREEDY = Sampling(temperature=0.0, top_k=None, top_p=1.0)
EOS = 1025  # of the first codebook
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
        for name, parameter in parameters.items():
            parameter.add_(torch.randn_like(parameter) * 0.02)
            if "audio_lm_head" in name:
                parameter[EOS] *= 1.2  # so that some speech of a random model ends, and some does not
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
    export(ExportConfig(folder / "toy" / "codec", out=folder / "codec", layout="native"))
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
    requests = mixed_requests(folder / "base", ids)
    save_file(native_prompts(requests, folder / "merged", ids), folder / "prompts.safetensors")
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
    check_prompts(requests, ids, folder, base, results)
    check_round_trip(folder)
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
    reference = undelay(results["prompt_codes"].T.numpy())
    same = load_codec(folder / "toy" / "codec").encode(results["wave"].numpy()) == reference
    assert same.mean() > 0.95, f"{same.mean():.1%} of the codes are alike"  # a sum's last bit may decide between two
    request = make_request(folder / "merged", ids, "serve", TEXT, [(reference, REF_TEXT)])
    parts = expand([request.prompt], ids)
    tokens = np.full(parts.length, -1)
    tokens[parts.text_at] = parts.text_ids
    theirs = results["prompt_ids"].numpy().copy()
    config = json.loads((folder / "merged" / "config.json").read_text())
    theirs[np.isin(theirs, (config["audio_token_id"], config["audio_delay_token_id"]))] = -1
    np.testing.assert_array_equal(tokens, theirs)
    np.testing.assert_array_equal(parts.codes_KA.T, results["prompt_codes"].numpy())
    assert_said(dict(generate_batch(tuned_model(folder, base), [request], ids, GREEDY))[0], results["generated"])


def tuned_model(folder: Path, base: Path) -> Any:
    """The model that the merged export is of."""
    return load_adapter(folder / "dora", device=CPU, dtype=torch.float32, base=base).get_base_model()


def make_request(
    model: Path,
    ids: SpecialIds,
    layout: PromptLayout,
    text: str,
    references: list[tuple[np.ndarray, str]],
    wording: Wording | None = None,
) -> Request:
    """The request that speaks a text, as higgs-speak makes it.

    Args:
        references: codes and text of each.
    """
    part = {"type": "audio", "audio_url": "x"}
    told = [Reference(part, said or None) for _, said in references]
    chat = parse_entry(build_conversation(layout, text, part, told, wording), 0)
    clips = [*(codes for codes, _ in references), np.zeros((8, 1))]
    segments = [{"role": role, "frames": clip.shape[1]} for role, clip in zip(chat.roles, clips, strict=True)]
    tokens_2L, codes_KT = tokenize(chat, load_tokenizer(model, ids), ids), np.concatenate(clips, axis=1)
    sample = Sample("s", {"segments": segments}, tokens_2L, codes_KT.astype(np.uint16))
    return request_of(sample, ids, speak=True, max_frames=MAX_FRAMES)


def mixed_requests(model: Path, ids: SpecialIds) -> list[Request]:
    """Prompts of both layouts, with none to two references, of many lengths."""
    rng, requests = np.random.default_rng(0), []
    words = f"{TEXT} {REF_TEXT}".split()
    for number in range(PROMPTS):
        layout: PromptLayout = "serve" if number % 2 else "chat"
        texts = [" ".join(rng.choice(words, rng.integers(1, 12))) for _ in range(1 + number // 2 % 3)]
        clips = [rng.integers(0, 1024, (8, rng.integers(2, 40))) for _ in texts[1:]]
        requests.append(make_request(model, ids, layout, texts[0], list(zip(clips, texts[1:], strict=True))))
    return requests


def native_prompts(requests: list[Request], model: Path, ids: SpecialIds) -> dict[str, torch.Tensor]:
    """The prompts as arguments of the native class: a placeholder at every audio position, and delayed codes."""
    placeholder = json.loads((model / "config.json").read_text())["audio_token_id"]
    prompts: dict[str, torch.Tensor] = {}
    for number, request in enumerate(requests):
        parts = expand([request.prompt], ids)
        tokens = np.full(parts.length, placeholder)
        tokens[parts.text_at] = parts.text_ids
        prompts[f"{number}.tokens"] = torch.from_numpy(tokens)
        if parts.codes_KA.size:
            prompts[f"{number}.codes"] = torch.from_numpy(parts.codes_KA.T.astype(np.int64)).contiguous()
    return prompts


def assert_said(ours: Said, generated: torch.Tensor) -> None:
    """The same codes, and the same end or none; `generated` [W, 8] is delayed, from the column of BOS on.

    Where codebook k > 0 ends first, boson ends those before it at once, the native class one a step from then on: codes
    are compared up to there. The speech has as many frames as codebook k.
    """
    spoken_KW, codes_KT = generated.T.numpy(), ours.codes_KT
    assert codes_KT is not None
    frames = min(codes_KT.shape[1], MAX_FRAMES)
    ends = np.argwhere(spoken_KW.T == EOS)  # column, codebook
    end, first = ends[0].tolist() if len(ends) else (spoken_KW.shape[1], 0)
    assert (frames == end - 1 - first) if ours.reached_eos else (end > MAX_FRAMES)
    for k in range(8):
        count = min(frames, end - 1 - k) if first else frames
        np.testing.assert_array_equal(codes_KT[k, :count], spoken_KW[k, 1 + k : 1 + k + count])


def check_prompts(
    requests: list[Request], ids: SpecialIds, folder: Path, base: Path, results: dict[str, torch.Tensor]
) -> None:
    """Greedy `generate` of the native class gives our codes on every prompt; some end by themselves."""
    said = dict(generate_batch(tuned_model(folder, base), requests, ids, GREEDY, batch_size=7))
    for number in range(len(requests)):
        assert_said(said[number], results[f"said.{number}"])
    ended = sum(result.reached_eos for result in said.values())
    print(f"{len(requests)} prompts, {ended} of them ended by themselves: greedy codes are equal")
    assert 0 < ended < len(requests)


def check_round_trip(folder: Path) -> None:
    """native → original → native, of weights that transformers itself saved."""
    export(ExportConfig(folder / "saved", out=folder / "there"))
    export(ExportConfig(folder / "there", out=folder / "back", layout="native"))
    before, after = (load_file(folder / name / "model.safetensors") for name in ("saved", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "native")
    worst = compare(parser.parse_args().work)
    for name, value in worst.items():
        print(f"{name}: largest difference of logits {value:.1e}")
    print(f"prompt and greedy codes are equal; {OMNI} sends that prompt with the reference's marks twice")
    print("prompt and greedy codes are equal; native -> original -> native changes no tensor")
    sys.exit(max(worst.values()) > LIMIT)


if __name__ == "__main__":
    main()
