"""Validation, generation samples, moving average, full fine-tuning, dry run, configs, trackers."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import yaml
from conftest import EXAMPLES, ROOT, preprocess
from helpers.ranks import ask
from higgs_tune.shards.errors import UserError
from higgs_tune.shards.reader import ShardSet
from higgs_tune.train.arguments import parse_arguments
from higgs_tune.train.checkpoint.folder import list_checkpoints
from higgs_tune.train.config import TrainConfig
from higgs_tune.train.dist.context import init_distributed
from higgs_tune.train.loop import train
from higgs_tune.train.model import pack_model, quantized
from higgs_tune.train.model.load import HiggsAudioModel
from higgs_tune.train.model.loss import pack_loss
from higgs_tune.train.model.reference import boson_inputs
from higgs_tune.train.monitor.samples import silence_ratio
from higgs_tune.train.optim import learning_rates
from higgs_tune.train.options import OptimArgs
from higgs_tune.train.resolve import resolve_inputs
from peft import PeftModel
from safetensors.torch import load_file

Options = dict[str, Any]


@pytest.fixture(scope="module")
def options(shards: ShardSet, toy: Path) -> Options:
    return {
        "training_stage": "single",
        "model_path": toy / "model",
        "train_data_dir": (shards.location,),
        "tokens_per_pack": 1024,
        "learning_rate": 1e-2,
        "max_steps": 4,
        "logging_steps": 1,
        "eval_steps": 2,
        "save_steps": 0,
        "dataloader_num_workers": 0,
        "skip_alignment_check": True,
    }


def run(options: Options, out: Path, **changes: Any) -> Path:
    train(TrainConfig.of(output_dir=out, **(options | changes)))
    return out


def lines(out: Path, kind: str) -> list[dict[str, Any]]:
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in metrics if line["kind"] == kind]


@pytest.fixture(scope="module")
def validated(options: Options, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(options, tmp_path_factory.mktemp("validated") / "out")


def naive_validation(model: Any, shards: ShardSet) -> dict[str, Any]:
    """Boson's own forward over each held-out sample alone, and a plain loop over its labels."""
    sums, counts, right = np.zeros(9), np.zeros(9), np.zeros(9)
    eos_sum = eos_count = 0.0
    eos_id = model.config.audio_stream_eos_id
    for row in shards.rows_of(validation=True):
        inputs = boson_inputs([shards.read(int(row))], shards.special_ids, model.config.pad_token_id)
        with torch.no_grad():
            out = model(**inputs)
        pairs = [(out.logits[0, :-1], out.expanded_labels[0, 1:])]
        pairs += [(out.audio_logits[:-1, k], inputs["label_audio_ids"][k, 1:]) for k in range(8)]
        for i, (logits, labels) in enumerate(pairs):
            kept = labels >= 0
            losses = torch.nn.functional.cross_entropy(logits[kept], labels[kept], reduction="none")
            sums[i] += float(losses.sum())
            counts[i] += int(kept.sum())
            right[i] += int((logits[kept].argmax(-1) == labels[kept]).sum())
            if i:
                eos_sum += float(losses[labels[kept] == eos_id].sum())
                eos_count += int((labels == eos_id).sum())
    return {
        "text_loss": sums[0] / counts[0],
        "audio_loss_per_codebook": list(sums[1:] / counts[1:]),
        "text_accuracy": right[0] / counts[0],
        "audio_accuracy": right[1:].sum() / counts[1:].sum(),
        "eos_loss": eos_sum / eos_count,
        "text_labels": counts[0],
        "audio_labels": counts[1:].sum(),
    }


def test_validation_equals_a_naive_loop(validated: Path, shards: ShardSet, toy: Path) -> None:
    """Of the base model at step 0, and of what has been trained at the last step."""
    base = HiggsAudioModel.from_pretrained(toy / "model").eval()  # pyright: ignore
    evals = lines(validated, "eval")
    assert [line["step"] for line in evals] == [0, 2, 4]
    for line, model in ((evals[0], base), (evals[-1], None)):
        tuned = model or PeftModel.from_pretrained(base, str(validated)).eval()
        expected = naive_validation(tuned, shards)
        for name, value in expected.items():
            assert line[name] == pytest.approx(value, abs=2e-5), name
    assert evals[0]["samples"] == len(shards.rows_of(validation=True)) > 0


def test_validation_is_the_same_on_two_ranks(options: Options, validated: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    packs = {"max_steps": 4, "gradient_accumulation_steps": 1, "output_dir": out}
    answer = ask(options | packs, 2)
    assert answer["codes"] == [0, 0], answer["stderr"]
    base, other = lines(validated, "eval")[0], lines(out, "eval")[0]
    for name in ("loss", "text_loss", "audio_loss", "eos_loss", "text_accuracy"):
        assert other[name] == pytest.approx(base[name], abs=1e-5)
    assert (other["text_labels"], other["samples"]) == (base["text_labels"], base["samples"])


def test_early_stopping_and_the_best(options: Options, tmp_path: Path) -> None:
    """No validation is ever better by 1000 nats than the first."""
    stopping = {"early_stopping_patience": 2, "early_stopping_threshold": 1000.0, "eval_steps": 1, "max_steps": 50}
    out = run(options, tmp_path / "out", **stopping)
    assert [line["step"] for line in lines(out, "train")] == [1, 2, 3]
    assert [path.name for path in out.glob("best-*")] == ["best-1"]
    best = json.loads((out / "best-1" / "state.json").read_bytes())
    assert best["metrics"]["loss"] == lines(out, "eval")[1]["loss"]


def test_a_validation_loss_that_is_not_finite_is_never_the_best(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One bad pack of the split makes its loss NaN: not left out, not the best, counted as no better."""

    def broken(*args: Any, **named: Any) -> Any:
        parts = pack_loss(*args, **named)
        bad = {
            "total": parts.total * torch.nan,
            "sums": replace(parts.sums, cross_entropy=parts.sums.cross_entropy * torch.nan),
        }
        return parts if torch.is_grad_enabled() else parts._replace(**bad)

    monkeypatch.setattr(pack_model, "pack_loss", broken)
    out = run(options, tmp_path / "out", early_stopping_patience=2, eval_steps=1, max_steps=50)
    assert [line["loss"] for line in lines(out, "eval")] == ["nan"] * 3
    assert [line["step"] for line in lines(out, "train")] == [1, 2]
    assert not list(out.glob("best-*"))
    said = capsys.readouterr().err
    assert "the validation loss at step 1 is not finite" in said
    assert "stopped early at step 2: no finite loss" in said


def test_validation_without_a_split(options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused when it is asked for, left out when not."""
    monkeypatch.setattr(ShardSet, "rows_of", lambda self, *, validation: np.arange(0 if validation else len(self)))
    with pytest.raises(UserError, match="--eval_steps: no validation split"):
        run(options, tmp_path / "out")
    out = run(options, tmp_path / "out", eval_steps=None, max_steps=1)
    assert not lines(out, "eval")


@pytest.mark.parametrize("stage", ["single", "stage1"])
def test_generation_samples(options: Options, tmp_path: Path, stage: str) -> None:
    samples = {"sample_steps": 2, "num_samples": 3, "sample_max_seconds": 0.6, "training_stage": stage}
    out = run(options, tmp_path / "out", **samples)
    listed = {path.parent.name: json.loads(path.read_bytes()) for path in (out / "samples").glob("*/samples.json")}
    assert listed.keys() == {"base", "step-000002", "step-000004"}
    keys = [[sample["key"] for sample in folder_samples] for folder_samples in listed.values()]
    assert len(keys[0]) == 3
    assert keys[0] == keys[1] == keys[2]
    for name, folder_samples in listed.items():
        for sample in folder_samples:
            assert sample["target_text"]
            if sample["wav"]:
                wave, rate = soundfile.read(out / "samples" / name / sample["wav"])
                assert (rate, len(wave) / rate) == (24000, pytest.approx(sample["duration_s"]))
                assert sample["duration_ratio"] == pytest.approx(sample["duration_s"] / sample["target_duration_s"])
                target, _ = soundfile.read(out / "samples" / "target" / f"{sample['key']}.target.wav")
                assert len(target) / rate == pytest.approx(sample["target_duration_s"])
    line = lines(out, "samples")[-1]
    assert line["run_on_rate"] == np.mean([not sample["reached_eos"] for sample in listed["step-000004"]])
    assert line["base_run_on_rate"] == np.mean([not sample["reached_eos"] for sample in listed["base"]])
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(out / "tensorboard"), size_guidance={"audio": 0, "images": 0})
    board.Reload()
    tags = board.Tags()
    assert any(tag.endswith("/target") for tag in tags["audio"])
    assert any(tag.endswith("spectrogram") for tag in tags["images"])


def test_samples_are_the_same_again_and_on_two_ranks(options: Options, tmp_path: Path) -> None:
    """Fixed keys and seeds: what the base model says does not depend on the number of ranks."""
    samples = options | {"sample_steps": 4, "num_samples": 3, "sample_max_seconds": 0.6, "eval_steps": 0}
    one = run(samples, tmp_path / "one")
    assert ask(samples | {"output_dir": tmp_path / "two"}, 2)["codes"] == [0, 0]
    wavs = sorted(path.name for path in (one / "samples" / "base").iterdir())
    assert len(wavs) == 4
    for name in wavs:
        other = tmp_path / "two" / "samples" / "base" / name
        assert (one / "samples" / "base" / name).read_bytes() == other.read_bytes()


def test_silence_ratio_counts_quiet_windows() -> None:
    loud, quiet = np.full(24000, 0.1, np.float32), np.full(8000, 1e-3, np.float32)
    assert silence_ratio(np.concatenate([loud, quiet]), 24000) == pytest.approx(0.25, abs=0.02)
    assert silence_ratio(np.zeros(0, np.float32), 24000) == 1.0


def test_the_moving_average_is_what_is_saved(options: Options, tmp_path: Path) -> None:
    """Against a loop over the checkpoints' weights."""
    out = run(options, tmp_path / "out", ema_decay=0.75, save_steps=1, save_total_limit=None, eval_steps=0)
    weights = [load_file(path / "adapter_model.safetensors") for path in reversed(list_checkpoints(out))]
    from higgs_tune.train.model.load import load_model
    from higgs_tune.train.model.lora import add_lora
    from higgs_tune.train.resolve import trainable_options
    from peft import get_peft_model_state_dict

    config = TrainConfig.of(output_dir=out, **options)
    torch.manual_seed(config.optim.seed)
    loaded = load_model(config.model_path, device=torch.device("cpu"), dtype=torch.float32)  # pyright: ignore
    fresh = add_lora(loaded.model, trainable_options(config, None), "single", Path(), None)
    average = {name: value.clone() for name, value in get_peft_model_state_dict(fresh).items()}
    for step in weights:
        average = {name: 0.75 * value + 0.25 * step[name] for name, value in average.items()}
    for name, value in load_file(out / "adapter_model.safetensors").items():
        torch.testing.assert_close(value, average[name], atol=1e-6, rtol=0)


def test_full_fine_tuning_sharded_equals_one_process(options: Options, toy: Path, tmp_path: Path) -> None:
    """FSDP2 on two ranks, done and taken further, against one; the written model is a checkpoint that boson loads."""
    full = options | {"full_finetune": True, "learning_rate": 1e-4, "save_steps": 4, "lr_scheduler_type": "constant"}
    one = run(full, tmp_path / "one", gradient_accumulation_steps=2)
    for changes in ({"max_steps": 2}, {"resume_from_checkpoint": "auto"}):
        answer = ask(full | changes | {"output_dir": tmp_path / "two"}, 2)
        assert answer["codes"] == [0, 0], answer["stderr"]
    for a, b in zip(lines(one, "train"), lines(tmp_path / "two", "train"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-5)
    weights = [load_file(folder / "model.safetensors") for folder in (one, tmp_path / "two")]
    before = load_file(toy / "model" / "model.safetensors")
    assert weights[0].keys() == weights[1].keys() == before.keys()
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], atol=1e-5, rtol=0)
    moved = {name for name, value in before.items() if not torch.equal(value, weights[0][name])}
    assert {name for name in before if "audio_tower" not in name} == moved
    assert HiggsAudioModel.from_pretrained(one)  # pyright: ignore


def test_stage1_full_fine_tuning_leaves_audio_parameters(options: Options, toy: Path, tmp_path: Path) -> None:
    from higgs_tune.train.model.lora import AUDIO_PARAMETER

    out = run(options, tmp_path / "out", full_finetune=True, training_stage="stage1", eval_steps=0, learning_rate=1e-3)
    before, after = (load_file(folder / "model.safetensors") for folder in (toy / "model", out))
    for name, value in before.items():
        assert torch.equal(value, after[name]) == bool(AUDIO_PARAMETER.search(name)), name
    run(options, tmp_path / "stage2", model_path=out, training_stage="stage2", max_steps=1, eval_steps=0)


def test_dry_run_tells_and_leaves_nothing(options: Options, tmp_path: Path, capfd: Any) -> None:
    run(options, tmp_path / "out", dry_run=True, max_steps=-1, num_train_epochs=3)
    said = capfd.readouterr().out
    for part in ("self-test", "dry run: ", " steps of ", " h; ", "GB of memory", "GB of disk", "Nothing was saved"):
        assert part in said
    for part in ("activations that backward keeps", "measured", "largest pack that fits", "tokens/s a process"):
        assert part in said
    assert not (tmp_path / "out").exists()


CONFIGS = sorted((ROOT / "examples" / "configs").glob("*.yaml"))


@pytest.mark.fast
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_example_configs_are_valid(path: Path) -> None:
    rest = ["--model_path", "M", "--train_data_dir", "S", "--output_dir", "O"]
    config = parse_arguments(["--config", str(path), *rest, "--seed", "7"])
    assert config.optim.seed == 7  # the command line wins
    assert config.checkpoints.resume_from_checkpoint == "auto"


@pytest.fixture(scope="module")
def without_split(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few samples of the example, none held out."""
    folder = tmp_path_factory.mktemp("without")
    (folder / "some.json").write_text(json.dumps(json.loads(EXAMPLES.read_text())[:3]))
    preprocess(toy, folder / "some.json", folder / "set", audio_root=EXAMPLES.parent, val_fraction=0.0)
    return folder / "set"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_example_configs_take_sets_with_and_without_a_split(
    path: Path, toy: Path, shards: ShardSet, without_split: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized, "find_spec", lambda _: True)  # bitsandbytes, an optional extra
    for location, every in ((shards.location, 500), (str(without_split), 0)):
        rest = ["--model_path", str(toy / "model"), "--train_data_dir", location, "--output_dir", str(tmp_path / "out")]
        inputs = resolve_inputs(parse_arguments(["--config", str(path), *rest]), init_distributed())
        assert inputs.validation.every == every


@pytest.mark.fast
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("learning_rat: 1", "unknown option learning_rat.*Did you mean --learning_rate?"),
        ("- a", "not a config"),
        ("a: [", "cannot read the config"),
        ("save_steps: -1", "--save_steps is out of range, expected at least 0, got -1"),
        ("ema_decay: 1.5", "--ema_decay is out of range"),
        ("full_finetune: true\nlora_r: 4", "--full_finetune"),
    ],
)
def test_bad_configs_are_refused_before_anything_loads(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "run.yaml").write_text(content)
    rest = ["--training_stage", "single", "--model_path", "M", "--train_data_dir", "S", "--output_dir", "O"]
    with pytest.raises(UserError, match=message):
        parse_arguments(["--config", str(tmp_path / "run.yaml"), *rest])


def test_an_unknown_flag_is_exit_code_2_with_a_near_name() -> None:
    command = [sys.executable, "-m", "higgs_tune.train", "--learning_rat", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "learning" in done.stdout + done.stderr


def test_a_runs_own_config_starts_it_again(validated: Path) -> None:
    config = parse_arguments(["--config", str(validated / "config.yaml"), "--output_dir", "elsewhere"])
    saved = yaml.safe_load((validated / "config.yaml").read_text())["options"]
    assert config.plain() | {"output_dir": saved["output_dir"]} == saved


@pytest.mark.fast
def test_schedules() -> None:
    def rates(kind: str) -> list[float]:
        options = OptimArgs(lr_scheduler_type=kind, warmup_steps=2, lr_decay_fraction=0.4)  # pyright: ignore
        share = learning_rates(options, 10)
        return [share(step) for step in range(10)]

    assert rates("constant") == [0.5, 1.0] + [1.0] * 8
    assert rates("linear")[2:] == pytest.approx([1 - i / 8 for i in range(8)])
    assert rates("cosine")[2:] == pytest.approx([0.5 * (1 + np.cos(np.pi * i / 8)) for i in range(8)])
    assert rates("wsd") == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])


def test_trackers_get_every_number(options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the real packages, which are optional."""
    seen: list[tuple[dict[str, float], int]] = []
    finished: list[bool] = []
    tracker = types.ModuleType("wandb")
    logged = types.SimpleNamespace(
        log=lambda numbers, step: seen.append((numbers, step)), finish=lambda: finished.append(True)
    )
    vars(tracker)["init"] = lambda **given: logged if given["project"] and given["config"]["max_steps"] == 2 else None
    monkeypatch.setitem(sys.modules, "wandb", tracker)
    out = run(options, tmp_path / "out", report_to=("wandb",), max_steps=2)
    assert finished == [True]
    assert [step for _, step in seen] == [0, 1, 2, 2]
    assert seen[1][0]["train/text_loss"] == lines(out, "train")[0]["text_loss"]
    assert "train/audio_loss_per_codebook/7" in seen[1][0]


def test_a_tracker_that_is_not_installed_is_a_clear_error(options: Options, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--report_to trackio is not installed. pip install 'higgs-tune\[trackio\]'"):
        run(options, tmp_path / "out", report_to=("trackio",))


@pytest.mark.parametrize("width", [80, 200])
def test_the_live_display_shows_the_last_numbers(
    options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    """On a terminal: the last metrics with every loss that trains, no cell cut or split, and the bar under them."""
    from higgs_tune.train.monitor import logger as report
    from rich.console import Console

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    consoles: list[Console] = []

    def console(**_: Any) -> Console:
        consoles.append(Console(force_terminal=True, width=width, record=True, file=(tmp_path / "screen").open("w")))
        return consoles[-1]

    monkeypatch.setattr(report, "Console", console)
    run(options, tmp_path / "out", max_steps=2, contrastive_loss_weight=0.1)
    shown = consoles[0].export_text()
    last = shown[shown.rindex("eval 2") :]
    train = lines(tmp_path / "out", "train")[-1]
    losses = [f"{name} {train[f'{name}_loss']:.4f}" for name in ("text", "audio", "contrastive")]
    for part in (*losses, "eos ", " tokens/s", " h/GPU-h", "wait ", " GB", "train 2", "2/2", "elapsed", "left"):
        assert part in last
    assert max(map(len, last.splitlines())) <= width  # a record joins the frames before without a line break
    assert "…" not in last
