"""Speech samples during training: fixed texts and voices, metrics beside the base model's.

In: a run and its shard sets. Out: `samples/NAME/samples.json` and wav files, TensorBoard. NAME is `base` or
`step-000500`; `samples/target` holds the recorded targets and the reference voices.
Guarantees: the same samples and seeds every time, on any number of ranks (test_long_runs.py).

Shapes: K codebooks, T frames, S waveform samples.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from higgs_tune.preprocess.audio.levels import quiet_share
from higgs_tune.preprocess.checkpoints.hub import local_checkpoint
from higgs_tune.preprocess.codec.checkpoint import load_codec
from higgs_tune.preprocess.codec.weights import codec_weight_files
from higgs_tune.preprocess.input.spoken_text import spoken_text
from higgs_tune.shards import durable
from higgs_tune.shards.errors import UserError
from higgs_tune.shards.format import FRAME_RATE_HZ, Sample
from higgs_tune.shards.reader import ShardSet
from higgs_tune.train.model.decoding import generate_batch
from higgs_tune.train.model.sampling import Said, Sampling, request_of
from higgs_tune.train.monitor.sample_scores import figures, load_judges
from higgs_tune.train.state import Run
from transformers import PreTrainedTokenizerBase

SILENCE_DB = -45.0  # a window below this level, relative to full scale, is silent
_NUMBERS = ("run_on_rate", "duration_ratio", "silence_ratio")


class SampleGenerator:
    """Generates the same samples at every call; ranks share the work, rank 0 writes.

    Raises:
        UserError: there is no codec.
    """

    def __init__(self, run: Run, tokenizer: PreTrainedTokenizerBase, features: str) -> None:
        self.run, self.tokenizer, self.features = run, tokenizer, features
        self.folder = run.config.output_dir / "samples"
        sets = run.schedule.sets.sets
        self.samples = [
            shards.read(row, mels=features != "none") for shards, row in choose(sets, run.config.validation.num_samples)
        ]
        path = codec_path(run.config.validation.audio_tokenizer_path, sets)
        self.codec = load_codec(path, run.context.device) if run.context.is_main else None
        self.judges = load_judges(run.config.validation, run.context.device) if run.context.is_main else None
        self.target_figures: dict[str, float] = {}

    def begin(self) -> None:
        """Write targets and references, and the base model's samples, unless an earlier start has written them."""
        if self.run.context.is_main and self.codec:
            for sample in self.samples:
                frames = np.split(sample.codes_KT, np.cumsum(sample.segment_frames)[:-1], axis=1)
                self._write_wav(self._target(sample, "target"), frames[-1])
                if len(frames) > 1:
                    self._write_wav(self._target(sample, "reference"), frames[0])
        self._score_targets()
        exists = float((self.folder / "base" / "samples.json").is_file())
        if not self.run.context.all_sum([exists if self.run.context.is_main else 0.0])[0]:
            self.generate("base")

    def _score_targets(self) -> None:
        """What the judges say of the recorded targets: no model can be measured better than that."""
        if self.judges:
            listed = [self._score(sample, self._target(sample, "target")) for sample in self.samples]
            self.target_figures = {f"target_{name}": value for name, value in figures(listed).items()}

    def _target(self, sample: Sample, kind: str) -> Path:
        return self.folder / "target" / f"{sample.key}.{kind}.wav"

    def _score(self, sample: Sample, wav: Path | None) -> dict[str, Any]:
        """Scores of one file; its voice is compared with the reference's, without one with the target's."""
        assert self.judges
        reference, target = self._target(sample, "reference"), self._target(sample, "target")
        voice = reference if reference.is_file() else target
        return self.judges.score(wav, spoken_text(sample), None if voice == wav else voice)

    def _base(self) -> list[dict[str, Any]]:
        """The base model's samples, scored by these judges: an earlier start may have had others, or none."""
        path = self.folder / "base" / "samples.json"
        listed = json.loads(path.read_bytes())
        if self.judges and any(entry.get("judges") != self.judges.about for entry in listed):
            by_key = {sample.key: sample for sample in self.samples}
            wavs = [path.parent / entry["wav"] if entry["wav"] else None for entry in listed]
            listed = [
                entry | (self._score(by_key[entry["key"]], wav) if entry["key"] in by_key else {})
                for entry, wav in zip(listed, wavs, strict=True)
            ]
            durable.write_bytes(path, durable.to_json(listed, indent=1) + b"\n")
        return listed

    def generate(self, name: str) -> dict[str, Any] | None:
        """Generate; returns a line of metrics.jsonl, on rank 0."""
        run, world = self.run, self.run.context.world
        with torch.random.fork_rng(), run.eval_mode(base=name == "base"):
            mine = self._generate(range(world.rank, len(self.samples), world.size))
        outputs = self._gather(mine)
        return self._write(name, outputs) if run.context.is_main else None

    def _generate(self, numbers: Sequence[int]) -> list[Said]:
        """Generate some of the samples, in order."""
        run, ids, speak = self.run, self.run.special_ids, self.run.config.with_audio
        requests = [
            request_of(self.samples[i], ids, speak=speak, max_frames=self._max_frames, seed=run.config.optim.seed + i)
            for i in numbers
        ]
        results = dict(generate_batch(run.model, requests, ids, Sampling(), features=self.features))
        return [results[i] for i in range(len(requests))]

    @property
    def _max_frames(self) -> int:
        return int(self.run.config.validation.sample_max_seconds * FRAME_RATE_HZ)

    def _gather(self, mine: list[Said]) -> list[Said]:
        """Every rank's samples, in order, gathered as tensors of one shape."""
        context, codebooks = self.run.context, self.run.codebooks
        each = -(-len(self.samples) // context.world.size)
        longest = max(len(sample.tokens_2L[0]) for sample in self.samples) + self._max_frames + 64
        codes = torch.full((each, codebooks, longest), -1, dtype=torch.int32)
        tokens = torch.full((each, longest), -1, dtype=torch.int32)
        flags = torch.zeros(each, 2, dtype=torch.int32)
        for i, said in enumerate(mine):
            tokens[i, : len(said.tokens)] = torch.tensor(said.tokens, dtype=torch.int32)
            flags[i] = torch.tensor([said.codes_KT is not None, said.reached_eos])
            if said.codes_KT is not None:
                codes[i, :, : said.codes_KT.shape[1]] = torch.from_numpy(said.codes_KT.astype(np.int32))
        codes, tokens, flags = (context.gather(value).numpy() for value in (codes, tokens, flags))
        outputs = []
        for number in range(len(self.samples)):
            at = number % context.world.size, number // context.world.size
            said_tokens = tokens[at]
            frames = codes[at][:, codes[at][0] >= 0]
            has_codes, ended = flags[at]
            outputs.append(Said(said_tokens[said_tokens >= 0].tolist(), frames if has_codes else None, bool(ended)))
        return outputs

    def _write(self, name: str, outputs: list[Said]) -> dict[str, Any]:
        folder = self.folder / name
        listed = [self._describe(folder, *pair) for pair in zip(self.samples, outputs, strict=True)]
        durable.write_bytes(folder / "samples.json", durable.to_json(listed, indent=1) + b"\n")
        numbers = summary(listed)
        base = numbers if name == "base" else summary(self._base())
        line = {"kind": "samples", "step": self.run.progress.step, **numbers}
        line |= {f"base_{key}": value for key, value in base.items()} | self.target_figures
        return line | ({"judges": self.judges.about} if self.judges else {})

    def _describe(self, folder: Path, sample: Sample, output: Said) -> dict[str, Any]:
        target_KT = sample.codes_KT[:, -sample.segment_frames[-1] :]
        folder.mkdir(parents=True, exist_ok=True)
        wave = np.zeros(0, np.float32)
        if output.codes_KT is not None and output.codes_KT.shape[1]:
            wave = self._write_wav(folder / f"{sample.key}.wav", output.codes_KT)
        assert self.codec is not None
        rate = self.codec.config.sample_rate_hz
        target_s = target_KT.shape[1] / self.codec.config.frame_rate_hz
        labels = [int(label) for label in sample.tokens_2L[1] if label >= 0]
        target_text = self.tokenizer.decode(labels, skip_special_tokens=True).strip()
        text = self.tokenizer.decode(output.tokens, skip_special_tokens=True).strip()
        wav = f"{sample.key}.wav" if len(wave) else None
        scores = self._score(sample, folder / wav if wav else None) if self.judges else {}
        return {
            "key": sample.key,
            "text": target_text if self.run.config.with_audio else text,
            "target_text": target_text,
            "reached_eos": output.reached_eos,
            "duration_s": len(wave) / rate,
            "target_duration_s": target_s,
            "duration_ratio": len(wave) / rate / target_s,
            "silence_ratio": silence_ratio(wave, rate),
            "wav": wav,
            **scores,
        }

    def _write_wav(self, path: Path, codes_KT: np.ndarray) -> np.ndarray:
        assert self.codec is not None
        wave_S = self.codec.decode(np.clip(codes_KT, 0, self.codec.config.codebook_size - 1))
        path.parent.mkdir(parents=True, exist_ok=True)
        with durable.atomic_file(path) as file:
            soundfile.write(file, wave_S, self.codec.config.sample_rate_hz, format="WAV", subtype="PCM_16")
        return wave_S

    def sounds(self, name: str) -> Iterable[tuple[str, np.ndarray, int]]:
        """Name, waveform and sample rate of each sample, its target and its reference, for TensorBoard."""
        for sample in self.samples:
            places = {"generated": self.folder / name / f"{sample.key}.wav"}
            places |= {kind: self._target(sample, kind) for kind in ("target", "reference")}
            for kind, path in places.items():
                if path.is_file():
                    wave_S, rate = soundfile.read(path, dtype="float32")
                    yield f"{sample.key}/{kind}", wave_S, rate


def choose(sets: list[ShardSet], count: int) -> list[tuple[ShardSet, int]]:
    """Rows to generate: held-out ones if there are any, of as many speakers as possible."""
    rows = [(shards, int(row)) for shards in sets for row in shards.rows_of(validation=True)[: 64 * count]]
    rows = rows or [(shards, int(row)) for shards in sets for row in shards.rows_of(validation=False)[: 64 * count]]
    seen: dict[tuple[int, int], int] = {}
    ranked = []
    for place, (shards, row) in enumerate(rows):
        if not shards.index["audio_labels"][row]:
            continue
        speaker = (id(shards), int(shards.index["speaker"][row]))
        seen[speaker] = seen.get(speaker, 0) + 1
        ranked.append((seen[speaker], place))
    return [rows[place] for _, place in sorted(ranked)[:count]]


def codec_path(given: Path | None, sets: list[ShardSet]) -> Path:
    """The folder of the codec that decodes samples, downloaded if `given` names a repository.

    Raises:
        UserError: it does not exist, is not a codec, or its weight files are missing.
    """
    if given is not None:
        folder = local_checkpoint(given)
    else:
        folder = Path(sets[0].provenance.get("paths", {}).get("codec", ""))
        if not (folder / "config.json").is_file():
            hint = "Give --audio_tokenizer_path."
            raise UserError(
                "--sample_steps: the codec that the shards were made with is not there", where=folder, hint=hint
            )
    codec_weight_files(folder)
    return folder


def summary(listed: list[dict[str, Any]]) -> dict[str, float]:
    """Share of samples without an end, the means of duration and silence ratios, and what judges measured."""
    values = (
        [not sample["reached_eos"] for sample in listed],
        [sample["duration_ratio"] for sample in listed],
        [sample["silence_ratio"] for sample in listed],
    )
    return {name: float(np.mean(value)) for name, value in zip(_NUMBERS, values, strict=True)} | figures(listed)


def silence_ratio(wave_S: np.ndarray, sample_rate_hz: int) -> float:
    """Share of 20 ms windows whose level is below -45 dB of full scale; 1 for an empty waveform."""
    return quiet_share(wave_S[:, None], sample_rate_hz, below_dbfs=SILENCE_DB) if len(wave_S) else 1.0
