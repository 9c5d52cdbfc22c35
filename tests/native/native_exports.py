"""Runs in the environment that compare.py makes: exports, loaded by transformers and PEFT as their users load them.

    python native_exports.py FOLDER ADAPTER…

In: what exports.py wrote to FOLDER. Out: FOLDER/results.safetensors: logits of each export, the processor's prompt, the
codes of greedy `generate`; FOLDER/trained, an adapter that PEFT trained on the native class; FOLDER/saved, the merged
model as transformers saves it.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from safetensors.torch import load_file, save_file

NATIVE: Any = transformers  # this environment's is 5.3 or later


def load(folder: Path) -> Any:
    model, problems = NATIVE.HiggsAudioV2ForConditionalGeneration.from_pretrained(
        folder, use_text_head=True, dtype=torch.float32, output_loading_info=True
    )
    assert not any(problems[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), problems
    return model.eval()


def logits_of(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Text and audio logits of every real position."""
    arrays = {name: value for name, value in inputs.items() if name not in ("real", "weights")}
    inner: Any = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    hidden = inner.model(**arrays).last_hidden_state[inputs["real"]]
    return torch.cat([inner.text_lm_head(hidden), inner.audio_lm_head(hidden)], dim=1)


@torch.no_grad()
def speak(folder: Path, said: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The prompt and the codes of a sentence with a reference."""
    processor, model = NATIVE.AutoProcessor.from_pretrained(folder / "merged"), load(folder / "merged")
    conversation = [
        {"role": "system", "content": [{"type": "text", "text": "Generate audio following instruction."}]},
        {"role": "user", "content": [{"type": "text", "text": said["ref_text"]}]},
        {"role": "assistant", "content": [{"type": "audio"}]},
        {"role": "user", "content": [{"type": "text", "text": said["text"]}]},
    ]
    text = processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
    wave = np.sin(np.arange(24_000) * 0.05).astype(np.float32)
    inputs = processor(text=[text], audio=[wave], return_tensors="pt", add_special_tokens=False)
    generated = model.generate(**inputs, max_new_tokens=said["max_frames"] + 9, do_sample=False, ras_win_len=None)
    return {
        "wave": torch.from_numpy(wave),
        "prompt_ids": inputs["input_ids"][0],
        "prompt_codes": inputs["audio_input_ids"][0].contiguous(),
        "generated": generated[0, inputs["audio_input_ids"].shape[1] :].contiguous(),
    }


@torch.no_grad()
def say_prompts(model: Any, prompts: dict[str, torch.Tensor], max_frames: int) -> dict[str, torch.Tensor]:
    """Greedy codes for prompts as the class takes them, one at a time; without the prompt's."""
    said: dict[str, torch.Tensor] = {}
    for number in range(sum(name.endswith(".tokens") for name in prompts)):
        tokens, codes = prompts[f"{number}.tokens"][None], prompts.get(f"{number}.codes")
        inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        if codes is not None:
            mask = torch.ones(1, len(codes), dtype=torch.bool)
            inputs |= {"audio_input_ids": codes[None], "audio_input_ids_mask": mask}
        made = model.generate(**inputs, max_new_tokens=max_frames + 9, do_sample=False, ras_win_len=None)
        said[f"said.{number}"] = made[0, 0 if codes is None else len(codes) :].contiguous()
    return said


def train(base: Path, folder: Path, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """An adapter trained by PEFT on the native class, as its users write the config; gives its logits."""
    torch.manual_seed(0)
    ranks = {"model.layers.1.self_attn.q_proj": 2}
    full = ["text_lm_head", "embed_audio_tokens", "audio_input_layernorm"]
    targets = ["q_proj", "v_proj", "audio_mlp.up_proj"]
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, rank_pattern=ranks, modules_to_save=full)
    model: Any = peft.get_peft_model(load(base), config)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        logits_of(model, inputs).square().mean().backward()
        optimizer.step()
    model.eval().save_pretrained(folder)
    with torch.no_grad():
        return logits_of(model, inputs)


def main(folder: Path, adapters: list[str]) -> None:
    arrays = np.load(folder / "inputs.npz")
    inputs = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    told = json.loads((folder / "said.json").read_text())
    results = speak(folder, told)
    merged = load(folder / "merged")
    results |= say_prompts(merged, load_file(folder / "prompts.safetensors"), told["max_frames"])
    merged.save_pretrained(folder / "saved")
    for file in (folder / "merged").glob("tokenizer*"):
        shutil.copy(file, folder / "saved")
    with torch.no_grad():
        results["merged"] = logits_of(merged, inputs)
        for name in adapters:
            model = peft.PeftModel.from_pretrained(load(folder / "base"), folder / f"{name}-native").eval()
            results[name] = logits_of(model, inputs)
    results["trained"] = train(folder / "base", folder / "trained", inputs)
    save_file(results, folder / "results.safetensors")
    print(f"transformers {transformers.__version__}, peft {peft.__version__}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
