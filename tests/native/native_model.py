"""Runs in the environment that compare.py makes: a random native model, its logits and its gradients.

    python native_model.py FOLDER

In: FOLDER/inputs.npz, FOLDER/sizes.json. Out: FOLDER/checkpoint (with text head) and FOLDER/headless (without
one), as transformers saves them; FOLDER/results.safetensors: text and audio logits of every real position,
and the gradient of their sum under random weights for every parameter, by its native name.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file


def main(folder: Path) -> None:
    native: Any = transformers  # this environment's is 5.3 or later
    sizes, inputs = json.loads((folder / "sizes.json").read_text()), np.load(folder / "inputs.npz")
    torch.manual_seed(0)
    config = native.HiggsAudioV2Config(**sizes)
    model = native.HiggsAudioV2ForConditionalGeneration(config, use_text_head=True).eval()
    for parameter in model.parameters():
        with torch.no_grad():
            if parameter.ndim > 1:
                parameter.normal_(std=0.05)
            else:  # norms that are not all alike
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder / "checkpoint")
    text_head, model.text_lm_head = model.text_lm_head, None
    model.save_pretrained(folder / "headless")
    model.text_lm_head = text_head
    arrays = {name: torch.from_numpy(inputs[name]) for name in inputs.files}
    real, weights = arrays.pop("real"), arrays.pop("weights")
    hidden = model.model(**arrays).last_hidden_state[real]
    logits = torch.cat([model.text_lm_head(hidden), model.audio_lm_head(hidden)], dim=1)
    (logits * weights).sum().backward()
    results = {f"gradient/{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    save_file({"logits": logits.detach().contiguous(), **results}, folder / "results.safetensors")
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
