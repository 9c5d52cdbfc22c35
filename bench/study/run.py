"""The study: what the miniature learns of Arabic digits under one change at a time, over several seeds.

    python bench/study/run.py --out runs/study --seeds 0 1 2

Every run trains the same number of tokens from `examples/miniature/base` and is judged on the same held-out sentences.
Results are lines of `OUT/results.jsonl`; what is there is not run again. `plot.py` draws them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import tyro
from higgs_tune.shards.writer import file_sha256

ROOT = Path(__file__).parents[2]
MINIATURE = ROOT / "examples" / "miniature"
BASE, CODEC = MINIATURE / "base", MINIATURE / "codec" / "native"
ARABIC, ENGLISH = ("amal", "karim"), ("slt", "rms", "awb")
MIXED = (*ARABIC, *ARABIC, *ENGLISH)
STEPS, TEXT_STEPS = 180, 30  # of a run; of them in stage 1, where there are two stages
TRAIN = {
    "tokens_per_pack": "1024",
    "lora_r": "32",
    "lora_alpha": "32",
    "learning_rate": "2e-3",
    "head_learning_rate": "2e-3",
    "lr_scheduler_type": "cosine",
    "warmup_steps": "10",
    "eval_steps": "30",
    "logging_steps": "10",
    "sample_steps": "0",
    "save_steps": "0",
    "dataloader_num_workers": "0",
    "report_to": "none",
}
AUDIO = ("--train_audio_head", "--train_audio_embeddings", "--codebook_loss_weights", *"82111111")
SETS = {  # voices, sentences; a minute is about 20 sentences in Arabic and 15 in English
    "mixed": (MIXED, 4000),
    "arabic": (ARABIC, 4000),
    "minutes-1": (MIXED, 35),
    "minutes-3": (MIXED, 105),
    "minutes-10": (MIXED, 350),
    "validation": (MIXED, 60),
}
FIGURES = ("cer", "sim", "run_on_rate", "duration_ratio", "silence")  # of higgs-eval


@dataclass(frozen=True)
class Arm:
    """One way to train. options: what differs, as flags of both stages. data: of SETS. features: references come with
    those of Whisper's encoder."""

    options: dict[str, str] = field(default_factory=dict[str, str])
    flags: tuple[str, ...] = ()
    data: str = "mixed"
    single: bool = False
    leaked: bool = False
    features: bool = False


ARMS = {
    "two stages": Arm(),
    "one stage": Arm(single=True),
    "leaked labels": Arm(single=True, leaked=True),
    "text loss weight 0.1": Arm({"text_loss_weight": "0.1"}),
    "audio loss weight 2": Arm({"audio_loss_weight": "2"}),
    "dropout 0.1": Arm({"lora_dropout": "0.1"}),
    "rank 8": Arm({"lora_r": "8", "lora_alpha": "8"}),
    "learning rate 5e-4": Arm({"learning_rate": "5e-4", "head_learning_rate": "5e-4"}),
    "learning rate 5e-3": Arm({"learning_rate": "5e-3", "head_learning_rate": "5e-3"}),
    "Arabic only": Arm(data="arabic"),
    "1 minute": Arm(data="minutes-1"),
    "3 minutes": Arm(data="minutes-3"),
    "10 minutes": Arm(data="minutes-10"),
    "audio attention": Arm(flags=("--use_audio_out_self_attention",)),
    "Whisper features": Arm(features=True),
}


@dataclass(frozen=True)
class Study:
    """Run the study."""

    out: Path
    """Folder of sets, runs and results."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of each arm: of the new weights and of the order of samples."""
    arms: tuple[str, ...] = tuple(ARMS)
    """Arms to run."""
    whisper_path: Path | None = None
    """Whisper of the arm "Whisper features", which is left out without it."""
    workers: int = 2
    """Runs at a time, each on one thread."""
    speaker_model: str | None = None
    """Speaker model of higgs-eval, for the similarity to the reference."""
    judges_python: str = sys.executable
    """Python that has the speaker model's package, if another."""


@cache
def miniature_sha256() -> dict[str, str]:
    """What the miniature is made of; results of another one are not those of this one."""
    files = {"base": BASE, "codec": CODEC, "recogniser": MINIATURE / "recogniser"}
    return {name: file_sha256(folder / "model.safetensors")[:12] for name, folder in files.items()}


def call(*command: object, log: Path, python: str = sys.executable) -> int:
    """Run a Python command on one thread; its output goes to `log`. Returns its exit code."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("a") as out:
        return subprocess.run(
            [python, *map(str, command)], stdout=out, stderr=out, env=environment, check=False
        ).returncode


def must(*command: object, log: Path, python: str = sys.executable) -> None:
    """`call` a command that has to succeed."""
    if code := call(*command, log=log, python=python):
        raise SystemExit(f"exit code {code}: {command[0]} {command[1]}; see {log}")


def make_sets(out: Path, names: Collection[str], whisper: Path | None = None) -> None:
    """Encode the words, and compose sets of SETS; with a Whisper, references have its features (`NAME-features`)."""
    ending, heard = ("-features", ("--whisper_path", whisper)) if whisper else ("", ())
    tools = ("--model_path", BASE, "--audio_tokenizer_path", CODEC)
    log, words = out / "sets.log", out / f"words{ending}"
    if not (words / "manifest.json").is_file():
        given = ("--data", MINIATURE / "words" / "manifest.jsonl", "--out", words, "--ref_drop", 1)
        rules = ("--min_seconds", 0.1, "--val_fraction", 0)
        stored = ("--whisper_features", "encoder", "--whisper_roles", "both", *heard) if whisper else ()
        must("-c", "from higgs_tune.preprocess.cli import main; main()", *given, *rules, *stored, *tools, log=log)
    for number, (name, (voices, samples)) in enumerate(SETS.items()):
        folder = out / f"{name}{ending}"
        if name in names and not (folder / "speech.jsonl").is_file():
            said = ("--kinds", "digits", "--layouts", "chat", "--longest", 5, "--samples", samples, "--seed", number)
            judged = ("--held_out_voices", *ARABIC, "nour", *ENGLISH, "--held_out", 8 if name == "mixed" else 0)
            source = ("--words", MINIATURE / "words", "--word_shards", words, "--out", folder, "--voices", *voices)
            must(MINIATURE / "compose.py", *tools, *source, *said, *judged, *heard, log=log)


def train(config: Study, arm: Arm, folder: Path, seed: int) -> int:
    """Train the stages of an arm; returns the exit code of the last."""
    options = TRAIN | arm.options | {"seed": str(seed)}
    ending, heard = ("-features", ("--whisper_path", config.whisper_path)) if arm.features else ("", ())
    given = [part for name, value in options.items() for part in (f"--{name}", value)]
    given += ["--train_data_dir", config.out / f"{arm.data}{ending}" / "shards"]
    given += ["--eval_data_dir", f"held={config.out / f'validation{ending}' / 'shards'}"]
    program = (ROOT / "bench" / "study" / "leaked.py",) if arm.leaked else ("-m", "higgs_tune.train")
    given += ["--overwrite_output_dir"]  # of a run that was stopped: those that ended are not begun again
    given += ["--skip_alignment_check"] * arm.leaked
    stages = [("single", BASE, STEPS)] if arm.single else [
        ("stage1", BASE, TEXT_STEPS), ("stage2", folder / "stage1", STEPS - TEXT_STEPS)
    ]  # fmt: skip
    code = 1
    for stage, model, steps in stages:
        extra = () if stage == "stage1" else (*AUDIO, *arm.flags, *heard)
        where = ("--training_stage", stage, "--model_path", model, "--output_dir", folder / stage)
        code = call(*program, *where, "--max_steps", steps, *given, *extra, log=folder / "log.txt")
        if code:
            break
    return code


def curves(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Losses of an arm's stages, one after the other: of training, and of the validation set of all arms."""
    found: dict[str, list[dict[str, Any]]] = {"train": [], "eval": []}
    before = 0
    for stage in ("stage1", "stage2", "single"):
        path = folder / stage / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
        for line in lines:
            if line["kind"] == "train" or (line["kind"] == "eval" and line["set"] == "held"):
                losses = {
                    name: round(line[name], 4) for name in ("text_loss", "audio_loss") if line.get(name) is not None
                }
                found[line["kind"]].append({"step": before + line["step"], **losses})
        before += max((line["step"] for line in lines if "step" in line), default=0)
    return found


def judge(config: Study, model: Path, folder: Path) -> dict[str, Any]:
    """Figures of higgs-eval on the held-out sentences, by language."""
    options = ("--layout", "chat", "--temperature", 0.3, "--ras_win_len", 0, "--speak_seconds", 8)
    given = ("--model_path", f"model={model}", "--audio_tokenizer_path", CODEC, "--asr", MINIATURE / "recogniser")
    speaker = ("--speaker_model", config.speaker_model) if config.speaker_model else ()
    where = ("--data", config.out / "mixed" / "held_out.jsonl", "--out", folder / "eval", "--ceiling")
    program, log = ("-m", "higgs_tune.evaluate"), folder / "log.txt"
    must(*program, *given, *options, *speaker, *where, log=log, python=config.judges_python)
    groups = json.loads((folder / "eval" / "eval.json").read_text())["groups"]["language"]
    return {
        language: {who: {name: group["figures"][who][name] for name in FIGURES} for who in ("model", "ceiling")}
        for language, group in groups.items()
    }


def run_one(config: Study, name: str, seed: int) -> dict[str, Any]:
    """Train and judge an arm; `base` is judged as it is."""
    arm, folder, began = ARMS.get(name), config.out / f"{name.replace(' ', '-')}-{seed}", time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"arm": name, "seed": seed, "miniature": miniature_sha256()}
    model = BASE
    if arm is not None:
        if arm.leaked:  # what a user sees who does not ask for it
            result["refused"] = refuses(config.out / arm.data / "shards", folder, seed)
        result["exit_code"] = train(config, arm, folder, seed)
        result |= curves(folder)
        model = folder / ("single" if arm.single else "stage2")
    if result.get("exit_code", 0) == 0:
        result["figures"] = judge(config, model, folder)
    return result | {"seconds": round(time.monotonic() - began)}


def refuses(shards: Path, folder: Path, seed: int) -> str:
    """The self-test's answer to leaked labels."""
    log, program = folder / "refused.txt", ROOT / "bench" / "study" / "leaked.py"
    data = ("--train_data_dir", shards, "--output_dir", folder / "refused", "--seed", seed)
    code = call(program, "--training_stage", "single", "--model_path", BASE, *data, "--max_steps", 1,
                "--tokens_per_pack", 4096, log=log)  # fmt: skip
    error = next((line for line in log.read_text().splitlines() if line.startswith("error:")), "")
    return f"exit code {code}: {error}"


def main() -> None:
    config = tyro.cli(Study)
    config.out.mkdir(parents=True, exist_ok=True)
    results = config.out / "results.jsonl"
    done = [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []
    there = {(line["arm"], line["seed"]) for line in done if line.get("miniature") == miniature_sha256()}
    make_sets(config.out, SETS)
    if config.whisper_path:
        make_sets(config.out, ("mixed", "validation"), config.whisper_path)
    arms = [name for name in config.arms if config.whisper_path or not ARMS[name].features]
    wanted = [("base", 0), *((name, seed) for seed in config.seeds for name in arms)]
    with ThreadPoolExecutor(config.workers) as pool:
        runs = [pool.submit(run_one, config, *pair) for pair in wanted if pair not in there]
        for run in runs:
            with results.open("a") as out:
                out.write(json.dumps(run.result(), ensure_ascii=False) + "\n")
            print(run.result()["arm"], run.result()["seed"], run.result()["seconds"], flush=True)


if __name__ == "__main__":
    main()
