"""Checks of the shard sets of a run: against each other, against the options, and against the checkpoint's tower."""

from __future__ import annotations

import sys
from collections.abc import Callable

from higgs_tune.shards.errors import UserError, few
from higgs_tune.shards.reader import ShardSet


def require_one_codec(sets: list[ShardSet]) -> None:
    """Refuse sets of different codecs: the same code would mean different sounds.

    Raises:
        UserError: the hashes of the codecs' weights differ.
    """
    hashes = {shards.location: shards.provenance.get("codec", {}).get("weights_sha256") for shards in sets}
    known = {location: digest for location, digest in hashes.items() if digest}
    for location, digest in known.items():
        first, expected = next(iter(known.items()))
        if digest != expected:
            raise UserError("the shard sets were made with different codecs", where=location, got=digest[:16],
                            expected=f"weights_sha256 {expected[:16]}, as {first} has",
                            hint="Make them with the same --audio_tokenizer_path.")  # fmt: skip


def require_tower_of_features(sets: list[ShardSet], sha256: Callable[[], str]) -> None:
    """Refuse `encoder` features that another tower than the model's made.

    Args:
        sha256: of the model's tower; called where a set names its own.

    Raises:
        UserError: the tower's hash is not the one in a set's provenance.
    """
    made_by = {shards.location: shards.provenance.get("features", {}).get("tower_sha256") for shards in sets}
    known = {location: digest for location, digest in made_by.items() if digest}
    have = sha256() if known else ""
    for location, digest in known.items():
        if digest != have:
            hint = (
                "Make the set with --whisper_features encoder and the same tower (this checkpoint's, or the same "
                "--whisper_path), or with --whisper_features mel."
            )
            raise UserError("the set's encoder features were made by another Whisper tower than the model's",
                            where=location, expected=have[:16], got=digest[:16], hint=hint)  # fmt: skip


def require_mel_bins(sets: list[ShardSet], mel_bins: int) -> None:
    """Refuse log-mel features of another size than the tower takes: Whisper large-v3 has 128 bins, the smaller ones 80.

    Raises:
        UserError: names set and sizes.
    """
    for shards in sets:
        made = shards.provenance.get("features", {}).get("extractor", {}).get("feature_size", mel_bins)
        if shards.features == "mel" and made != mel_bins:
            hint = "Make the set with --whisper_features mel and --whisper_path of this tower."
            raise UserError("the set's log-mel features do not fit the Whisper tower", where=shards.location,
                            expected=f"{mel_bins} mel bins", got=made, hint=hint)  # fmt: skip


def say_unused_features(sets: list[ShardSet]) -> None:
    """Name the sets whose stored Whisper features are not used."""
    unused = [shards.location for shards in sets if shards.features != "none"]
    if unused:
        print(f"not used: the Whisper features of {few(unused)}, since the checkpoint has no Whisper tower; "
              "--whisper_path attaches one", flush=True)  # fmt: skip


def say_no_features(sets: list[ShardSet]) -> None:
    """Warn where the model has a Whisper tower, and no sample has audio that it hears."""
    if not any(shards.index["mel_tokens"].any() for shards in sets):
        print("warning: no sample has Whisper features, so tower and projector do nothing: boson's classes give the "
              "tower user audio alone, and in the prompt layout serve the reference is an assistant turn",
              file=sys.stderr, flush=True)  # fmt: skip


def layout_warning(layouts: dict[str, int], stage: str) -> str:
    """A warning where a run that trains audio sees no sample in the layout that serving engines send; else nothing."""
    if stage == "stage1" or layouts.get("serve") or not any(layouts.values()):
        return ""
    return (
        "warning: no training sample has the prompt layout serve (reference audio in an assistant turn, audio alone as "
        "the answer), which Boson's engine, transformers and vllm-omni send: there the tuned model will not keep the "
        "reference voice. higgs-preprocess --prompt_layout serve (or both) makes such samples"
    )


def require_speakers(sets: list[ShardSet]) -> None:
    """Check that the contrastive loss has voices to tell apart.

    Raises:
        UserError: the sets name fewer than two speakers in all, or a set has samples without a name.
    """
    hint = "Name the speakers in the data, or train with --contrastive_loss_weight 0."
    for shards in sets:
        speakers = shards.manifest["speakers"]
        if not all(speakers):
            unnamed = int((shards.index["speaker"] == speakers.index("")).sum())
            raise UserError("--contrastive_loss_weight needs the speaker of every sample", where=shards.location,
                            got=f"{unnamed} of {len(shards)} samples without one", hint=hint)  # fmt: skip
    names = sorted({name for shards in sets for name in shards.manifest["speakers"]})
    if len(names) < 2:
        raise UserError("--contrastive_loss_weight needs several speakers", where=sets[0].location,
                        expected="2 or more", got=", ".join(names) or "none", hint=hint)  # fmt: skip
