"""From options to objects: this rank's place and device, the checkpoint and adapter, what trains, what is loaded.

Each function checks that what it is given fits together, and says what does not, before anything expensive starts.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from ..preprocess.checkpoint import describe_checkpoint
from ..preprocess.hub import MODEL_FILES, WEIGHT_FILES, local_checkpoint
from ..shards.errors import UserError
from ..shards.memory import keep_memory
from ..shards.reader import ShardSet
from .config import TrainConfig
from .data import LoaderOptions
from .lora import DEFAULT_PRESET, TrainableOptions, has_audio_attention, read_adapter_config
from .loss import LossOptions
from .meeting import meet
from .model import HiggsAudioConfig, Loaded
from .schedule import World

DIST_TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class Place:
    """Where this process runs. control: a process group for small host messages; None with one rank."""

    world: World
    device: torch.device
    control: dist.ProcessGroup | None

    @property
    def is_main(self) -> bool:
        """Rank 0, the one that speaks and writes."""
        return self.world.rank == 0

    @property
    def queues(self) -> bool:
        """Whether the device works behind the host, as a GPU does."""
        return self.device.type == "cuda"

    def agree(self, values: list[float]) -> list[float]:
        """The sum over all ranks of each value; a meeting of the ranks on the host, without touching the device."""
        if self.control is None:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.control)
        return total.tolist()

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """A copy of a host tensor of every rank, as [ranks, ...]; all have the same shape."""
        if self.control is None:
            return values[None].clone()
        found = [torch.empty_like(values) for _ in range(self.world.size)]
        dist.all_gather(found, values, group=self.control)
        return torch.stack(found)


def join_world() -> Place:
    """This process's place, from torchrun's environment, and its device."""
    names = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
    rank, size, local_rank, local_size = (int(os.environ.get(name, default)) for name, default in names)
    world = World(rank, size, local_rank, local_size)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    elif local_size > 1:  # torchrun sets one thread a process; the cores are ours
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_size))
    if device.type == "cpu":
        keep_memory()
    control: dist.ProcessGroup | None = None
    if size > 1:
        backend, store = "nccl" if device.type == "cuda" else "gloo", meet(rank, size, DIST_TIMEOUT)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=DIST_TIMEOUT)
        made = dist.new_group(backend="gloo", timeout=DIST_TIMEOUT)
        control = made if isinstance(made, dist.ProcessGroup) else None
    return Place(world, device, control)


def resolve_model(path: Path) -> tuple[Path, Path | None]:
    """The base checkpoint of `--model_path`, and the adapter in it, if it is the output folder of a stage.

    Args:
        path: a folder, or `owner/name[@revision]` of the Hub.

    Raises:
        UserError: there is no such checkpoint, or the adapter's base checkpoint is not there.
    """
    files = (*MODEL_FILES, *WEIGHT_FILES)
    adapter = read_adapter_config(path)
    if adapter is None:
        return local_checkpoint(path, files), None
    base = Path(adapter.get("base_model_name_or_path") or "")
    try:
        return local_checkpoint(base, files), path
    except UserError as error:
        where = path / "adapter_config.json"
        raise UserError("the adapter's base checkpoint is not there", where=where, got=base) from error


def open_sets(config: TrainConfig, base: Path) -> list[ShardSet]:
    """The shard sets to train on.

    Raises:
        UserError: a set was made for another tokenizer or other special ids.
    """
    sets, have = [ShardSet(location, config.cache()) for location in config.train_data_dir], describe_checkpoint(base)
    for shards in sets:
        made_for = shards.provenance["model"]
        for name in ("special_ids", "codebook_size", "tokenizer_sha256"):
            if made_for[name] != have[name]:
                raise UserError(
                    f"the shard set was made for another checkpoint: {name} differs",
                    where=shards.location,
                    expected=have[name],
                    got=made_for[name],
                )
    return sets


def whisper_features(config: TrainConfig, model: HiggsAudioConfig, sets: list[ShardSet]) -> str:
    """Whisper features that the model takes from the sets: `none`, `mel` or `encoder`.

    Raises:
        UserError: the model has a tower and a set has no features, or features are insisted on without a tower.
    """
    if model.skip_audio_tower:
        if config.encode_whisper_embed:
            hint = "It takes a Whisper tower and a trained audio_encoder_proj, as a checkpoint with both has them."
            raise UserError("--encode_whisper_embed: the checkpoint has no Whisper tower", hint=hint)
        return "none"
    kinds = {shards.features for shards in sets}
    if len(kinds) > 1 or "none" in kinds:
        hint = "Make the sets with --whisper_features mel or encoder."
        raise UserError("the checkpoint has a Whisper tower, and the sets do not all have its features",
                        expected="mel or encoder", got=", ".join(sorted(kinds)), hint=hint)  # fmt: skip
    kind = kinds.pop()
    if kind == "encoder" and (config.train_audio_tower or config.forward == "reference"):
        flag = "--train_audio_tower" if config.train_audio_tower else "--forward reference"
        raise UserError(f"{flag} needs the tower's input", expected="--whisper_features mel", got=kind)
    return kind


def wants_audio_attention(config: TrainConfig, adapter: Path | None) -> bool:
    """Whether the model has audio self-attention beyond what its checkpoint holds."""
    if config.use_audio_out_self_attention:
        return True
    return adapter is not None and has_audio_attention(adapter)


def trainable_options(config: TrainConfig, adapter: Path | None) -> TrainableOptions:
    """What trains; what is not given is taken from the adapter that is continued, or from the defaults.

    Raises:
        UserError: an option of LoRA differs from the adapter's.
    """
    r, alpha = config.lora_r, config.lora_alpha
    rslora, dora = config.use_rslora, config.use_dora
    earlier = read_adapter_config(adapter) if adapter else None
    if earlier:
        given = {"lora_r": (r, earlier["r"]), "lora_alpha": (alpha, earlier["lora_alpha"])}
        given |= {"use_rslora": (rslora or None, earlier.get("use_rslora", False))}
        given |= {"use_dora": (dora or None, earlier.get("use_dora", False))}
        for name, (wanted, had) in given.items():
            if wanted is not None and wanted != had:
                raise UserError(f"--{name} differs from the adapter's", where=adapter, expected=had, got=wanted)
        r, alpha = earlier["r"], earlier["lora_alpha"]
        rslora, dora = earlier.get("use_rslora", False), earlier.get("use_dora", False)
    r = r or 16
    return TrainableOptions(
        r=r,
        alpha=alpha or 2.0 * r,
        dropout=config.lora_dropout,
        preset=config.lora_preset or DEFAULT_PRESET[config.training_stage],
        pattern=config.lora_target_modules,
        rslora=rslora,
        dora=dora,
        heads=config.train_heads,
        audio_embeddings=config.train_audio_embeddings,
        audio_attention=config.use_audio_out_self_attention,
        audio_tower=config.train_audio_tower,
        audio_encoder_proj=config.train_audio_encoder_proj,
    )


def loss_options(config: TrainConfig, loaded: Loaded) -> LossOptions:
    """The loss of the stage.

    Raises:
        UserError: text is to be trained, and the checkpoint has no text head; or every loss has weight 0.
    """
    codebooks = loaded.model.config.audio_num_codebooks
    if config.codebook_loss_weights and len(config.codebook_loss_weights) != codebooks:
        got = len(config.codebook_loss_weights)
        raise UserError("--codebook_loss_weights has a wrong length", expected=codebooks, got=got)
    with_text = config.text_loss_weight > 0
    if not with_text and not (config.with_audio and (config.audio_loss_weight or config.contrastive_loss_weight)):
        raise UserError(f"every loss of {config.training_stage} has weight 0", expected="one that trains")
    if with_text and not loaded.has_text_head:
        hint = "Train audio alone with --training_stage single --text_loss_weight 0, or use Boson's original layout."
        raise UserError("the checkpoint has no text head, so text cannot be trained", hint=hint)
    return LossOptions(
        text=config.text_loss_weight,
        audio=config.audio_loss_weight,
        contrastive=config.contrastive_loss_weight if config.with_audio else 0.0,
        codebooks=config.codebook_loss_weights,
        smoothing=config.label_smoothing,
        with_text=with_text,
        with_audio=config.with_audio,
    )


def loader_options(config: TrainConfig, place: Place, features: str, pad_token_id: int) -> LoaderOptions:
    """How batches are made."""
    return LoaderOptions(
        workers=config.loader_workers(place.world.local_size),
        start_method=config.dataloader_start_method,
        pin_memory=place.device.type == "cuda",
        on_bad_sample=config.on_bad_sample,
        max_bad_samples=config.max_bad_samples,
        features=features,
        train_inputs=config.train_on_reference,
        contrastive=config.contrastive_loss_weight > 0 and config.with_audio,
        reference_pad=pad_token_id if config.forward == "reference" else None,
    )
