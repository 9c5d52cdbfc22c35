"""The output folder: never an input, one run at a time, cleared only on request and late."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers.samples import random_sample
from helpers.tiny import ids_of, metrics_of, run_train, train_flags, write_checkpoint, write_set
from higgs_tune.shards.errors import UserError
from higgs_tune.shards.lock import locked
from higgs_tune.train.checkpoint.folder import list_checkpoints
from higgs_tune.train.checkpoint.output_folder import check_apart, remove_files
from transformers import PreTrainedTokenizerBase

FLAG = "--overwrite_output_dir"


class Trained:
    """A model, its set, and stage 1 trained on both: two steps, a checkpoint after each."""

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.out = folder / "model", folder / "stage1"
        write_checkpoint(self.model, tokenizer)
        samples = [random_sample("s", np.random.default_rng(0), tokenizer, ids_of(self.model))]
        self.data = write_set(folder / "data", samples, self.model)
        run_train("stage1", self.model, self.data, self.out, max_steps=2, save_steps=1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, toy_tokenizer: PreTrainedTokenizerBase) -> Trained:
    return Trained(tmp_path_factory.mktemp("trained"), toy_tokenizer)


@pytest.fixture
def again(trained: Trained, tmp_path: Path) -> Path:
    """A copy of stage 1's output."""
    return Path(shutil.copytree(trained.out, tmp_path / "again"))


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusal(capsys: pytest.CaptureFixture[str], *args: object, **options: object) -> str:
    with pytest.raises(SystemExit) as exit_info:
        run_train(*args, **options)  # pyright: ignore[reportArgumentType]
    assert exit_info.value.code == 2
    return capsys.readouterr().err


# ways to name a folder other than by its path
def as_link(folder: Path, tmp: Path) -> Path:
    (tmp / "link").symlink_to(folder)
    return tmp / "link"


def as_link_above(folder: Path, tmp: Path) -> Path:
    (tmp / "above").symlink_to(folder.parent)
    return tmp / "above" / folder.name


def as_dots(folder: Path, tmp: Path) -> Path:
    return folder.parent / "." / folder.name / ".." / folder.name


def as_relative(folder: Path, tmp: Path) -> Path:
    return Path(os.path.relpath(folder))


def as_bind(folder: Path, tmp: Path) -> Path:
    (tmp / "bind").mkdir()
    if subprocess.run(["mount", "--bind", folder, tmp / "bind"], check=False, capture_output=True).returncode:
        pytest.skip("no folder can be bound here")
    return tmp / "bind"


@pytest.fixture
def unbound(tmp_path: Path) -> Iterator[None]:
    yield
    subprocess.run(["umount", tmp_path / "bind"], check=False, capture_output=True)


@pytest.mark.fast
@pytest.mark.usefixtures("unbound")
@pytest.mark.parametrize("spelled", [as_link, as_link_above, as_dots, as_relative, as_bind])
def test_an_input_is_known_under_every_name(spelled: Callable[[Path, Path], Path], tmp_path: Path) -> None:
    read = tmp_path / "runs" / "model"
    read.mkdir(parents=True)
    name = spelled(read, tmp_path)
    for folder, relation in ((name, "is"), (name / "new", "lies in"), (name / "new" / "deep", "lies in")):
        with pytest.raises(UserError, match=f"--output_dir {relation} the model .*Choose another --output_dir"):
            check_apart(folder, {"the model": read})
    with pytest.raises(UserError, match="--output_dir is the model"):
        check_apart(read, {"the model": name})
    for folder in (read.parent, tmp_path):
        with pytest.raises(UserError, match="--output_dir contains the model"):
            check_apart(folder, {"the model": name if name.resolve() == read else read})
    check_apart(tmp_path / "runs" / "out", {"the model": name})
    check_apart(tmp_path / "runs" / "model2", {"the model": read, "the codec": tmp_path / "nothing here"})


@pytest.mark.parametrize("flags", [{}, {"overwrite_output_dir": True}, {"resume_from_checkpoint": "auto"}])
@pytest.mark.parametrize("where", ["{out}", "{out}/", "{out}/new", "{out}/..", "{model}", "{data}", "{data}/run"])
def test_output_on_top_of_input_is_refused_and_changes_nothing(
    trained: Trained, capsys: pytest.CaptureFixture[str], where: str, flags: dict[str, object]
) -> None:
    """The adapter that is continued, its base, the data: with every flag that might have removed them."""
    before = {folder: content(folder) for folder in (trained.out, trained.model, trained.data)}
    given = vars(trained)
    output = Path(where.format(**given))
    said = refusal(capsys, "stage2", trained.out, trained.data, output, **flags)
    assert "error: --output_dir " in said
    assert FLAG not in said
    assert {folder: content(folder) for folder in before} == before
    assert not (trained.out / "new").exists()
    assert not (trained.data / "run").exists()


@pytest.mark.fast
def test_nothing_that_a_link_leads_to_is_removed(tmp_path: Path) -> None:
    """An earlier run's name that is a link goes, its target stays; a hard link of an input is refused."""
    model, out = tmp_path / "model", tmp_path / "out"
    model.mkdir()
    out.mkdir()
    (model / "model.safetensors").write_text("weights")
    (out / "samples").symlink_to(model)
    (out / "config.json").symlink_to(model / "model.safetensors")
    remove_files([out / "samples", out / "config.json"], {"the model": model})
    assert not list(out.iterdir())
    assert (model / "model.safetensors").read_text() == "weights"
    (out / "checkpoint-1").mkdir()
    (out / "metrics.jsonl").touch()
    os.link(model / "model.safetensors", out / "checkpoint-1" / "model.safetensors")
    (model / "more").symlink_to(out / "checkpoint-1")
    with pytest.raises(UserError, match="the output folder holds a file of the model"):
        remove_files([out / "metrics.jsonl", out / "checkpoint-1"], {"the model": model})
    assert (out / "metrics.jsonl").exists()


def test_an_earlier_run_goes_only_when_the_new_one_has_read_everything(
    trained: Trained, again: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(again)
    said = refusal(capsys, "stage1", trained.model, trained.data, again)
    assert "the output folder holds a run already" in said
    assert FLAG in said
    broken = Path(shutil.copytree(trained.model, tmp_path / "broken"))
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(SystemExit):
        run_train("stage1", broken, trained.data, again, overwrite_output_dir=True)
    elsewhere = trained.out / "checkpoint-2"
    refusal(capsys, "single", trained.model, trained.data, again, overwrite_output_dir=True,
            resume_from_checkpoint=elsewhere)  # fmt: skip
    assert content(again) == before
    run_train("stage1", trained.model, trained.data, again, overwrite_output_dir=True)
    assert [line["step"] for line in metrics_of(again)] == [1]
    assert [path.name for path in list_checkpoints(again)] == ["checkpoint-1"]


@pytest.mark.parametrize("name", ["model.safetensors", "checkpoint-500/optimizer.pt", "samples/mine.wav"])
def test_files_of_no_run_are_never_removed(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    file = tmp_path / "out" / name
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    (tmp_path / "out" / "config.yaml").write_text("model: another tool's")
    for flags in ({}, {"overwrite_output_dir": True}, {"resume_from_checkpoint": "auto"}):
        said = refusal(capsys, "stage1", trained.model, trained.data, tmp_path / "out", **flags)
        assert "the output folder holds other files" in said
        assert FLAG not in said
    assert file.read_text() == "mine"


def test_two_runs_in_one_folder(trained: Trained, tmp_path: Path) -> None:
    """The same job twice at once: one trains, the other is refused and names it."""
    out = tmp_path / "out"
    flags = train_flags("stage1", trained.model, trained.data, out, max_steps=3000, save_steps=1)
    first = subprocess.Popen([sys.executable, "-m", "higgs_tune.train", *flags], stderr=subprocess.DEVNULL)
    while not list_checkpoints(out):
        assert first.poll() is None
    second = subprocess.run(
        [sys.executable, "-m", "higgs_tune.train", *flags, "--resume_from_checkpoint", "auto"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert second.returncode == 2
    assert f"error: another run is writing here ({out}), got process {first.pid} on " in second.stderr
    first.kill()
    first.wait()
    with locked(out / ".lock", "run", out):
        pass
