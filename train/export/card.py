"""The model card of an export, and the files that travel with it.

In: the run's folder, the base, an evaluation. Out: README.md for the Hub: base, data, training, figures, licence, and
how to load the folder. Nothing is told that no file says.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from higgs_tune.preprocess.checkpoints.training_record import RECORD, TrainingRecord, read_record
from higgs_tune.shards import durable
from higgs_tune.shards.errors import UserError
from higgs_tune.train.model.adapter import read_adapter_config
from higgs_tune.train.model.base import base_reference

CARD = "README.md"
_OPTIONS = (
    *("lora_r", "lora_alpha", "lora_dropout", "lora_preset", "lora_target_modules", "use_rslora", "use_dora"),
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "num_train_epochs", "max_steps", "tokens_per_pack"),
    *("gradient_accumulation_steps", "weight_decay", "text_loss_weight", "audio_loss_weight", "ema_decay", "seed"),
)
_LOSSES = ("loss", "text_loss", "audio_loss", "text_accuracy", "audio_accuracy")
_FIGURES = ("wer", "cer", "sim", "quality", "run_on_rate")
_LANGUAGE_ALIASES = {"arabic": "ar", "english": "en"}


@dataclass(frozen=True)
class CardFacts:
    """What is known of a model.

    Attributes:
        base_name, base_revision: of the base checkpoint.
        licence: fields of the base's model card that state its licence.
        record: what the model was trained on. options: of its last run. losses: of its last validations, by set.
        figures: the content of higgs-eval's eval.json.
        carried: files that are copied as they are.
    """

    base_name: str
    base_revision: str | None
    licence: dict[str, Any]
    record: TrainingRecord | None = None
    options: dict[str, Any] = field(default_factory=dict)
    losses: dict[str, dict[str, Any]] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    carried: dict[str, bytes] = field(default_factory=dict)

    @classmethod
    def read(cls, base: Path, adapter: Path | None, eval_dir: Path | None) -> CardFacts:
        """Read the facts from the files of the base, the run and the evaluation.

        Raises:
            UserError: a file is damaged, or there is no evaluation in `eval_dir`.
        """
        source = adapter or base
        record = read_record(source)
        name, revision = base_reference(base, base)
        inside = source.name.startswith(("checkpoint-", "best-"))
        folder = next((f for f in ((source, source.parent)[: 1 + inside]) if (f / "config.yaml").is_file()), None)
        return cls(
            base_name=name if revision else (record.base_name if record else "") or base.resolve().name,
            base_revision=revision or (record.base_revision if record else None),
            licence=_licence(base),
            record=record,
            options=(_options(folder / "config.yaml") if folder else {}) | (_lora_options(adapter) if adapter else {}),
            losses=_losses(folder / "metrics.jsonl") if folder else {},
            figures=_figures(eval_dir) if eval_dir else {},
            carried={RECORD: record.to_bytes()} if record else {},
        )

    @property
    def languages(self) -> list[str]:
        """Codes of the training data's languages."""
        return sorted(
            {_LANGUAGE_ALIASES.get(name.lower(), name) for name in (self.record.languages if self.record else ())}
        )


def _licence(base: Path) -> dict[str, Any]:
    """The licence that the base's own card states; of a base without one, nothing."""
    file = base / CARD
    text = file.read_text("utf-8", errors="replace") if file.is_file() else ""
    if not text.startswith("---"):
        return {}
    try:
        front = yaml.safe_load(text.split("---")[1])
    except yaml.YAMLError:
        return {}
    names = ("license", "license_name", "license_link")
    return {name: front[name] for name in names if isinstance(front, dict) and front.get(name)}


def _options(file: Path) -> dict[str, Any]:
    """The options of a run that say how it trained, as far as they are set."""
    try:
        content = yaml.safe_load(file.read_text())
        options = content["options"] | {k: v for k, v in content.get("resolved", {}).items() if k in _OPTIONS}
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise UserError(f"the run's config is damaged: {error}", where=file) from error
    return {name: options[name] for name in _OPTIONS if options.get(name) not in (None, False, 0.0, -1)}


def _lora_options(adapter: Path) -> dict[str, Any]:
    """LoRA's options, of which a stage takes over those that are not given."""
    config = read_adapter_config(adapter) or {}
    names = {"r": "lora_r", "lora_alpha": "lora_alpha", "use_rslora": "use_rslora", "use_dora": "use_dora"}
    return {told: config[name] for name, told in names.items() if config.get(name)}


def _losses(file: Path) -> dict[str, dict[str, Any]]:
    """The last validation of each set, by its name."""
    last: dict[str, dict[str, Any]] = {}
    for line in file.read_text().splitlines() if file.is_file() else ():
        try:
            entry = json.loads(line)
        except ValueError:  # the last line of a killed run
            continue
        if entry.get("kind") == "eval":
            last[str(entry.get("set") or "validation")] = entry
    return last


def _figures(folder: Path) -> dict[str, Any]:
    file = folder / "eval.json"
    if not file.is_file():
        raise UserError("no evaluation here", where=folder, expected="eval.json, written by higgs-eval")
    return durable.from_json(file.read_bytes(), "the evaluation", file)


def model_card(
    facts: CardFacts, layout: Literal["original", "native"], kind: str, legal: Sequence[str], repository: str | None
) -> bytes:
    """README.md.

    Args:
        kind: what the folder holds. legal: names of the licence files in it. repository: its name on the Hub.
    """
    front: dict[str, Any] = dict(facts.licence)
    if not front and legal:
        front = {"license": "other", "license_name": "see-license-file", "license_link": legal[0]}
    front |= {
        "base_model": facts.base_name,
        "base_model_relation": "adapter" if kind == "adapter" else "finetune",
        "language": facts.languages or None,
        "library_name": "peft" if kind == "adapter" else "transformers",
        "pipeline_tag": "text-to-speech",
        "tags": ["higgs-audio-v2", "text-to-speech", "voice-cloning", *(["lora"] if kind == "adapter" else [])],
    }
    head = yaml.safe_dump({k: v for k, v in front.items() if v}, sort_keys=False, allow_unicode=True)
    name = repository or "this folder"
    sections = [
        f"---\n{head}---\n\n# {(repository or facts.base_name).rpartition('/')[2]}\n",
        f"{'An' if kind == 'adapter' else 'A'} {kind} of Higgs Audio v2, fine-tuned with higgs-tune.\n",
        f"Layout: {_LAYOUTS[layout]}.\n",
        _base_section(facts, legal),
        _data_section(facts),
        _training_section(facts),
        _figure_section(facts),
        _loading_section(layout, kind, name, facts),
    ]
    return "\n".join(section for section in sections if section).encode()


_LAYOUTS = {"original": "original (boson-multimodal)", "native": "transformers-native"}


def _base_section(facts: CardFacts, legal: Sequence[str]) -> str:
    at = f", revision `{facts.base_revision}`" if facts.base_revision else ""
    licence = ", ".join(str(value) for value in facts.licence.values()) or "see the base"
    files = (
        f"; {', '.join(f'`{name}`' for name in legal)} of the base {'is' if len(legal) == 1 else 'are'} here"
        if legal
        else ""
    )
    told = f"Licence of the base: {licence}{files}. It holds for this model too."
    return f"## Base and licence\n\n`{facts.base_name}`{at}. {told}\n"


def _data_section(facts: CardFacts) -> str:
    record = facts.record
    if record is None:
        return ""
    rows = {
        "samples": f"{record.samples:,}",
        "hours": f"{record.hours:.2f}",
        "languages": ", ".join(facts.languages) or "not named by the data",
        "speakers": f"{record.speakers:,}",
        "prompt layouts": _counted(record.layouts),
        "text normalization": _counted(record.text_normalizations),
    }
    return "## Training data\n\n" + _table(("", ""), rows.items())


def _training_section(facts: CardFacts) -> str:
    stages = " → ".join(facts.record.stages) if facts.record else ""
    lines = f"Stages: {stages}.\n\n" if stages else ""
    if facts.options:
        lines += "Options of the last stage:\n\n" + _table(("option", "value"), facts.options.items())
    return f"## Training\n\n{lines}" if lines else ""


def _figure_section(facts: CardFacts) -> str:
    parts: list[str] = []
    if facts.losses:
        names = [name for name in _LOSSES if any(isinstance(e.get(name), int | float) for e in facts.losses.values())]
        rows = [
            (f"{which}, step {entry.get('step')}", *(_number(entry.get(name)) for name in names))
            for which, entry in facts.losses.items()
        ]
        parts.append("## Validation\n\n" + _table(("set", *names), rows))
    systems = {name: v for name, v in facts.figures.items() if isinstance(v, dict) and _FIGURES[0] in v}
    if systems:
        names = [name for name in _FIGURES if any(v.get(name) for v in systems.values())]
        rows = [(system, *(_interval(v.get(name)) for name in names)) for system, v in systems.items()]
        about = facts.figures.get("about") or {}
        told = f"{about.get('lines', '?')} lines, normaliser {(about.get('normaliser') or {}).get('name', '?')}"
        note = f"\nMean and interval of `higgs-eval`: {told}.\n"
        parts.append("## Evaluation\n\n" + _table(("", *names), rows) + note)
    return "\n".join(parts)


def _loading_section(layout: str, kind: str, name: str, facts: CardFacts) -> str:
    if kind == "adapter" and layout == "native":
        code = (
            "from peft import PeftModel\nfrom transformers import HiggsAudioV2ForConditionalGeneration\n\n"
            f'model = HiggsAudioV2ForConditionalGeneration.from_pretrained("{facts.base_name}", use_text_head=True)\n'
            f'model = PeftModel.from_pretrained(model, "{name}")'
        )
    elif kind == "adapter":
        code = (
            "import torch.distributed.tensor  # peft uses it without importing it\n"
            "from boson_multimodal.model.higgs_audio import HiggsAudioModel\nfrom peft import PeftModel\n\n"
            f'model = HiggsAudioModel.from_pretrained("{facts.base_name}"'
            f"{f', revision={facts.base_revision!r}' if facts.base_revision else ''})\n"
            f'model = PeftModel.from_pretrained(model, "{name}")'
        )
    elif layout == "native":
        code = (
            "from transformers import AutoProcessor, HiggsAudioV2ForConditionalGeneration\n\n"
            f'processor = AutoProcessor.from_pretrained("{name}")\n'
            f'model = HiggsAudioV2ForConditionalGeneration.from_pretrained("{name}")'
        )
    else:
        code = (
            "from boson_multimodal.model.higgs_audio import HiggsAudioModel\n\n"
            f'model = HiggsAudioModel.from_pretrained("{name}")'
        )
    return f"## Loading\n\n```python\n{code}\n```\n"


def _table(names: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [names, ["---"] * len(names), *rows]
    return "".join(f"| {' | '.join(str(cell).replace('|', '&#124;') for cell in line)} |\n" for line in lines)


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items() if count) or "not known"


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else "–"


def _interval(figure: Any) -> str:
    if not isinstance(figure, dict) or not isinstance(figure.get("mean"), int | float):
        return "–"
    return f"{figure['mean']:.4f} [{figure.get('low', 0):.4f}, {figure.get('high', 0):.4f}]"
