"""The weight files of a checkpoint: one list for the trainer, the codec, the Whisper tower and exports.

In: a checkpoint folder. Out: its safetensors files. Files that the index does not name are not read, as with
transformers. Only headers are read here, and no torch is imported.
Guarantees (tests/test_weights.py): every listed file is whole, and no tensor stands in two of them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from higgs_tune.preprocess.filetype import HEAD_BYTES, LFS_HINT, LFS_POINTER, file_kind, is_lfs_pointer
from higgs_tune.shards import durable
from higgs_tune.shards.errors import UserError, few

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DOWNLOAD_AGAIN = "Download the checkpoint again."
_SHARD = re.compile(r"model-(\d+)-of-(\d+)\.safetensors")
_PICKLED, _WEIGHT_NAMES = (".bin", ".pt", ".pth", ".ckpt", ".pkl"), ("pytorch_model", "model", "consolidated")
_CONVERT = (
    'Pickled weights are not read. Convert them: python -c "import torch; from safetensors.torch import save_file; '
    "save_file({k: v.contiguous() for k, v in torch.load('IN', weights_only=True).items()}, 'model.safetensors')\""
)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold a checkpoint's weights.

    These are the files that `model.safetensors.index.json` names; without an index `model.safetensors`; without that
    a complete set of numbered files, or the only safetensors file there is.

    Raises:
        UserError: none, several that no index tells apart, a missing or damaged file, or a tensor in two files.
    """
    index = folder / INDEX
    named = _read_index(index) if index.is_file() else {}
    files = [folder / name for name in sorted(set(named.values()))] if named else _files_without_index(folder)
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise _missing(folder, missing)
    file_of: dict[str, Path] = {}
    for file in files:
        for name in read_header(file):
            if name in file_of:
                got = f"{file_of[name].name} and {file.name}"
                raise UserError(f"a tensor stands in two weight files: {name}", where=folder, got=got)
            file_of[name] = file
    lacking = [name for name, file in named.items() if file_of.get(name, folder).name != file]
    if lacking:
        got = f"{few(lacking)} not in {named[lacking[0]]}"
        raise UserError("index and weight files disagree", where=index, got=got, hint=DOWNLOAD_AGAIN)
    return files


def read_header(file: Path) -> dict[str, Any]:
    """The tensors of a safetensors file by name: `dtype`, `shape`, `data_offsets`.

    Raises:
        UserError: it is not a safetensors file, or is shorter than its header states.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(HEAD_BYTES)
        if is_lfs_pointer(head):
            raise UserError(f"the weight file is {LFS_POINTER}", where=file, hint=LFS_HINT)
        length = int.from_bytes(head[:8], "little")
        if length > size - 8 or size < 8:
            got = file_kind(head) or f"{size} bytes"
            raise UserError(
                "cannot read weights: not a whole safetensors file", where=file, got=got, hint=DOWNLOAD_AGAIN
            )
        stream.seek(8)
        header = durable.from_json(stream.read(length), "the header of the weights", file)
    header.pop("__metadata__", None)
    try:
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (TypeError, KeyError, IndexError) as error:
        raise UserError("cannot read weights: the header of the safetensors file is damaged", where=file) from error
    if size != end:
        raise UserError("cannot read weights: the file is not whole", where=file, expected=f"{end:,} bytes",
                        got=f"{size:,}", hint=DOWNLOAD_AGAIN)  # fmt: skip
    return header


def _read_index(index: Path) -> dict[str, str]:
    """The name of the file that holds each tensor."""
    data = index.read_bytes()
    if is_lfs_pointer(data):
        raise UserError(f"the index of the weights is {LFS_POINTER}", where=index, hint=LFS_HINT)
    named = durable.from_json(data, "the index of the weights", index).get("weight_map")
    if not isinstance(named, dict) or not named:
        raise UserError("the index of the weights names no files", where=index, expected="weight_map: {tensor: file}")
    for file in named.values():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise UserError("the index of the weights names another kind of file", where=index,
                            expected="safetensors files in the same folder", got=f"{file!r:.80}")  # fmt: skip
    return named


def _files_without_index(folder: Path) -> list[Path]:
    if (folder / SINGLE).exists() or (folder / SINGLE).is_symlink():
        return [folder / SINGLE]
    numbered = [match for file in folder.glob("model-*.safetensors") if (match := _SHARD.fullmatch(file.name))]
    totals = {match[2] for match in numbered}
    if len(totals) == 1:
        total = totals.pop()
        return [folder / f"model-{i:0{len(total)}d}-of-{total}.safetensors" for i in range(1, int(total) + 1)]
    single = sorted(file for file in folder.glob("*.safetensors") if not file.name.startswith("adapter_"))
    if len(single) == 1:
        return single
    if single:
        raise UserError("several files of weights, and no index says which are meant", where=folder, expected=INDEX,
                        got=few([file.name for file in single]), hint="Remove those that do not belong.")  # fmt: skip
    raise _missing(folder, [SINGLE])


def _missing(folder: Path, missing: list[str]) -> UserError:
    """The error that says what a folder holds in place of the weights."""
    what, expected, got, hint = "weight files are missing", few(missing), None, DOWNLOAD_AGAIN
    if missing == [SINGLE]:
        what, expected, hint = "the checkpoint has no weights", f"{SINGLE}, or several files and {INDEX}", ""
    names = sorted(file.name for file in folder.iterdir())
    pickled = [name for name in names if name.endswith(_PICKLED) and name.startswith(_WEIGHT_NAMES)]
    links = [name for name in missing if (folder / name).is_symlink()]
    if partial := partial_downloads(folder):
        got, hint = f"a download that was not finished: {few(partial)}", DOWNLOAD_AGAIN
    elif links:
        got, hint = f"a link to a missing file: {few(links)}", DOWNLOAD_AGAIN
    elif (folder / SINGLE).is_file():
        hint = f"The index names them. If {SINGLE} holds the weights, remove the index."
    elif pickled:
        got, hint = few(pickled), _CONVERT.replace("IN", pickled[0])
    return UserError(what, where=folder, expected=expected, got=got, hint=hint)


def partial_downloads(folder: Path) -> list[str]:
    """Names of unfinished downloads that belong to a folder, also in the Hub's cache."""
    places = [folder, folder / ".cache" / "huggingface" / "download"]
    if folder.parent.name == "snapshots":
        places.append(folder.parent.parent / "blobs")
    suffixes = ("incomplete", "part", "crdownload", "aria2")
    return sorted(file.name for place in places for suffix in suffixes for file in place.glob(f"*.{suffix}"))


def all_finite(tensor: Any) -> bool:
    """Whether a tensor holds neither NaN nor infinite values; needs no second copy of it."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if bool(tensor.sum().isfinite()):  # half the time; NaN and infinities stay in a sum
        return True
    low, high = tensor.aminmax()
    return bool(low.isfinite() and high.isfinite())
