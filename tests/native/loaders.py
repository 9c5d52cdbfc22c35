"""The loading code of vllm-omni and mlx-audio, on exports of a toy model.

    .venv/bin/python tests/native/loaders.py [--work runs/native]

vllm-omni runs on GPUs alone, so of it run the config class, the loader of weights and the prompts, with stand-ins for
vLLM: every parameter is filled, and the prompts are our `serve` layout (but for two tokens that it sends twice).
mlx-audio runs on a CPU: it loads a merged checkpoint strictly, and under greedy choice says our codes. Both are
installed from PyPI into folders of their own on the first run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import torch
from compare import ROOT, make_environment
from exports import CPU, GREEDY, MAX_FRAMES, REF_TEXT, TEXT, make_adapter, make_request
from higgs_tune.preprocess.checkpoints.checkpoint import read_config, special_ids
from higgs_tune.preprocess.input.layout import Wording
from higgs_tune.shards.sequence import SpecialIds, expand
from higgs_tune.train.export.merge import ExportConfig, export
from higgs_tune.train.model.decoding import generate_batch
from higgs_tune.train.model.load import load_model
from higgs_tune.train.model.sampling import Request
from higgs_tune.train.toy import ToyConfig, make_toy
from safetensors.torch import load_file, save_file

VLLM_OMNI, MLX = "vllm-omni==0.30.0", ("mlx[cpu]", "mlx-audio==0.6.2", "scipy")
FRAMES = 12  # of the reference


def install_vllm_omni(python: Path, folder: Path) -> Path:
    """Its files alone, without vLLM."""
    if not (folder / "vllm_omni").is_dir():
        command = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, VLLM_OMNI]
        subprocess.run(command, check=True)
    return folder


def run(python: Path, program: str, *arguments: Path) -> None:
    stand_ins = str(Path(__file__).with_name("stand_ins"))
    path = os.pathsep.join([stand_ins, os.environ.get("PYTHONPATH", "")])
    command = [python, Path(__file__).with_name(program), *arguments]
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": path})


def tokens_of(request: Request, ids: SpecialIds) -> list[int]:
    """The prompt's tokens, -1 at audio positions."""
    parts = expand([request.prompt], ids)
    tokens = np.full(parts.length, -1)
    tokens[parts.text_at] = parts.text_ids
    return tokens.tolist()


def check_vllm_omni(work: Path, folder: Path, requests: dict[str, Request], ids: SpecialIds) -> None:
    """Loader and prompts; what is compared here is the prompts."""
    python = make_environment(work / "env")
    run(python, "native_vllm.py", folder, install_vllm_omni(python, work / "vllm-omni"))
    sent = json.loads((folder / "vllm.json").read_text())
    config = json.loads((folder / "native" / "config.json").read_text())
    placeholders = (config["audio_token_id"], config["audio_delay_token_id"])
    told = {name: [-1 if t in placeholders else t for t in tokens] for name, tokens in sent.items()}
    assert told["plain"] == tokens_of(requests["plain"], ids)
    cloned, first, last = told["cloned"], told["cloned"].index(-1), len(told["cloned"]) - told["cloned"][::-1].index(-1)
    assert cloned[first - 1] == cloned[first - 2] == config["audio_bos_token_id"]
    assert cloned[last] == cloned[last + 1] == config["audio_eos_token_id"]
    assert cloned[: first - 1] + cloned[first:last] + cloned[last + 1 :] == tokens_of(requests["cloned"], ids)


def check_mlx(work: Path, folder: Path, request: Request, ids: SpecialIds) -> None:
    """It says what we say, without a system turn as it sends it."""
    run(make_environment(work / "mlx-env", MLX), "native_mlx.py", folder)
    model = load_model(folder / "merged", device=CPU, dtype=torch.float32).model
    said = dict(generate_batch(model, [request], ids, GREEDY))[0]
    theirs = load_file(folder / "mlx.safetensors")["codes"].numpy()
    assert said.codes_KT is not None
    frames = min(said.codes_KT.shape[1], theirs.shape[1])
    assert frames > 8, f"only {frames} frames"
    np.testing.assert_array_equal(theirs[:, :frames], np.clip(said.codes_KT[:, :frames], 0, 1023))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "native")
    work = parser.parse_args().work
    folder = work / "loaders"
    shutil.rmtree(folder, ignore_errors=True)
    make_toy(ToyConfig(out=folder / "toy", chatml=ROOT / "examples" / "arabic" / "chatml.json"))
    base = folder / "toy" / "model"
    ids = special_ids(read_config(base), base)
    make_adapter(base, folder / "lora", {"preset": "comprehensive"})
    export(ExportConfig(folder / "lora", out=folder / "merged", dtype="float32"))
    export(ExportConfig(folder / "lora", out=folder / "native", layout="native", dtype="float32"))
    reference = np.random.default_rng(0).integers(0, 1024, (8, FRAMES))
    save_file({"codes": torch.from_numpy(reference)}, folder / "reference.safetensors")
    said = {"text": TEXT, "ref_text": REF_TEXT, "max_frames": MAX_FRAMES}
    (folder / "said.json").write_text(json.dumps(said))
    voice = [(reference, REF_TEXT)]
    requests = {"plain": make_request(base, ids, "serve", TEXT, []),
                "cloned": make_request(base, ids, "serve", TEXT, voice)}  # fmt: skip
    check_vllm_omni(work, folder, requests, ids)
    print(f"{VLLM_OMNI}: every parameter is filled; its prompts are our serve layout, two tokens of a reference twice")
    check_mlx(work, folder, make_request(base, ids, "serve", TEXT, voice, Wording(system="")), ids)
    print(f"{MLX[1]}: loaded strictly; greedy codes are equal")


if __name__ == "__main__":
    main()
