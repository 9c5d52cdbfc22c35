"""Checks of the shard sets of a run: against each other, against the options, and against the checkpoint's tower."""

from __future__ import annotations

from pathlib import Path

from higgs_tune.preprocess.audio.whisper import tower_sha256
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


def require_tower_of_features(sets: list[ShardSet], base: Path) -> None:
    """Refuse `encoder` features that another tower than the checkpoint's made.

    Raises:
        UserError: the tower's hash is not the one in a set's provenance.
    """
    made_by = {shards.location: shards.provenance.get("features", {}).get("tower_sha256") for shards in sets}
    known = {location: digest for location, digest in made_by.items() if digest}
    have = tower_sha256(base) if known else ""
    for location, digest in known.items():
        if digest != have:
            hint = "Make the set with --whisper_features encoder and this checkpoint, or with --whisper_features mel."
            raise UserError("the set's encoder features were made by another Whisper tower than the checkpoint's",
                            where=location, expected=have[:16], got=digest[:16], hint=hint)  # fmt: skip


def say_unused_features(sets: list[ShardSet]) -> None:
    """Name the sets whose stored Whisper features are not used."""
    unused = [shards.location for shards in sets if shards.features != "none"]
    if unused:
        print(f"not used: the Whisper features of {few(unused)}, since the checkpoint has no Whisper tower", flush=True)


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
