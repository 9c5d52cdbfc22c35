"""`--resume_from_checkpoint`: which checkpoint a run resumes from, and the LoRA options that it keeps.

In: `auto`, `True` (or another word for the newest), a run's folder, or a checkpoint. Out: a checkpoint whose files are
verified.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from higgs_tune.shards.errors import UserError
from higgs_tune.train.checkpoint.folder import (
    CHECKSUMS,
    STATE,
    list_checkpoints,
    newest_valid,
    verify_checkpoint,
)
from higgs_tune.train.config import TrainConfig
from higgs_tune.train.dist.context import DistContext

NEWEST = ("true", "yes", "1", "latest", "last", "newest")
NOTHING = ("false", "no", "0", "none", "null", "")
_TARGETS = ("lora_preset", "lora_target_modules")  # one or the other
_KEPT = ("lora_r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "lora_extra", *_TARGETS)


def find_checkpoint(config: TrainConfig, context: DistContext) -> Path | None:
    """The checkpoint to resume from; None for a fresh start. Rank 0 finds and verifies it.

    Raises:
        UserError: there is none where the user expects one, it is damaged, or a rank does not see it.
    """
    wanted = config.checkpoints.resume_from_checkpoint
    if wanted is None:
        return None
    own = _find(wanted, config.output_dir) if context.is_main else None
    found = context.text_of_main(str(own.absolute()) if own else "")
    if found and not (Path(found) / STATE).is_file():
        expected = "a folder that all nodes share"
        raise UserError("this rank does not see the checkpoint", where=found, expected=expected)
    return Path(found) if found else None


def _find(wanted: str, output_dir: Path) -> Path | None:
    if wanted == "auto":
        return _newest(output_dir)
    folder = Path(wanted)
    if wanted.lower() in (*NEWEST, *NOTHING) and not folder.is_dir():
        return _newest_or_refuse(output_dir) if wanted.lower() in NEWEST else None
    if not folder.is_dir():
        hint = "auto resumes from the newest checkpoint of --output_dir, if there is one."
        raise UserError("--resume_from_checkpoint: no such folder", where=folder, expected="a checkpoint", hint=hint)
    if (folder / CHECKSUMS).exists() or (folder / STATE).exists():
        if "identity" not in verify_checkpoint(folder):
            hint = "It holds the best weights alone; --model_path starts a run from them."
            raise UserError("not a checkpoint to resume from", where=folder, expected="checkpoint-STEP", hint=hint)
        return folder
    if (folder / "trainer_state.json").exists():
        hint = "Its adapter can be continued: give the folder as --model_path."
        raise UserError("a checkpoint of another trainer", where=folder, expected=CHECKSUMS, hint=hint)
    return _newest_or_refuse(folder)


def _newest(folder: Path) -> Path | None:
    checkpoint, problems = newest_valid(folder)
    for problem in problems:
        print(f"warning: {problem}; an older checkpoint is tried", flush=True)
    return checkpoint


def _newest_or_refuse(folder: Path) -> Path:
    if checkpoint := _newest(folder):
        return checkpoint
    got = "damaged ones" if list_checkpoints(folder) else "none"
    raise UserError("no checkpoint to resume from", where=folder, expected="a folder checkpoint-STEP", got=got)


def keep_lora_options(config: TrainConfig, checkpoint: Path) -> TrainConfig:
    """Options of LoRA that are not given are those of the checkpoint's run.

    A given option that differs is refused when the run is restored, see `identity`.
    """
    saved: dict[str, Any] = json.loads((checkpoint / STATE).read_bytes())["options"]
    given = {name for name in _KEPT if _is_given(getattr(config.lora, name))}
    given |= set(_TARGETS if given & set(_TARGETS) else ())
    kept = {name: saved[name] for name in _KEPT if name not in given and _is_given(saved.get(name))}
    if kept.get("lora_extra"):
        kept["lora_extra"] = tuple(kept["lora_extra"])
    if kept.get("lora_target_modules"):
        targets = kept["lora_target_modules"]  # one pattern in older checkpoints
        kept["lora_target_modules"] = (targets,) if isinstance(targets, str) else tuple(targets)
    return config if config.lora.full_finetune else replace(config, lora=replace(config.lora, **kept))


def _is_given(value: object) -> bool:
    return value is not None and value is not False and value not in ((), [])
