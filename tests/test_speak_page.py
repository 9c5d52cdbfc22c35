"""The page of `higgs-speak serve`: it plays what the command speaks, the base beside the tuned model."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from conftest import EXAMPLES
from helpers.browser import console_errors, open_browser, wait
from helpers.samples import random_sample
from helpers.speaking import speak
from helpers.tiny import ids_of, run_train, write_checkpoint, write_set
from higgs_tune.evaluate.speak.config import ServeConfig
from higgs_tune.evaluate.speak.web import Studio, build_page
from higgs_tune.preprocess.reject import Reject
from higgs_tune.shards.errors import UserError
from selenium.webdriver.common.by import By
from transformers import PreTrainedTokenizerBase

CLIP, SAID, TEXT = EXAMPLES.parent / "clips" / "karim-02.flac", "قال الولد.", "مرحبا بالعالم."
UPLOAD = "#reference input[type=file]"
HAS_GRADIO = importlib.util.find_spec("gradio") is not None
FETCH = """const [url, done] = arguments; fetch(url).then(r => r.arrayBuffer()).then(b =>
    done(Array.from(new Uint8Array(b))), e => done(String(e)))"""


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, toy_tokenizer: PreTrainedTokenizerBase) -> Path:
    """A run's folder: an adapter and a checkpoint."""
    folder, rng = tmp_path_factory.mktemp("run"), np.random.default_rng(0)
    write_checkpoint(folder / "model", toy_tokenizer)
    ids = ids_of(folder / "model")
    samples = [random_sample(f"s{i}", rng, toy_tokenizer, ids) for i in range(4)]
    data = write_set(folder / "set", samples, folder / "model")
    options = {"save_steps": 2, "max_steps": 2, "learning_rate": 0.1, "lr_scheduler_type": "constant"}
    run_train("single", folder / "model", data, folder / "out", **options)
    return folder / "out"


def studio_of(model: Path, toy: Path, **options: Any) -> Studio:
    return Studio(ServeConfig(model_path=model, audio_tokenizer_path=toy / "codec", max_seconds=0.6, **options))


def command(model: Path, toy: Path, path: Path) -> np.ndarray:
    """What the command speaks: int16 [S]."""
    speak(model, toy / "codec", "--text", TEXT, "--ref_audio", CLIP, "--ref_text", SAID, "--seed", 3, "-o", path)
    return soundfile.read(path, dtype="int16")[0]


def assert_alike(one_S: np.ndarray, other_S: np.ndarray) -> None:
    """But for the rounding to 16 bits."""
    assert one_S.shape == other_S.shape
    assert np.abs(one_S.astype(int) - other_S).max() <= 1


@pytest.mark.fast
def test_the_studio_speaks_as_the_command(out: Path, toy: Path, tmp_path: Path) -> None:
    studio = studio_of(out, toy)
    assert studio.models() == [str(out), str(out / "checkpoint-2")]
    assert studio_of(out.parent / "model", toy).models() == [str(out.parent / "model")]
    tuned, base, note = studio.speak(str(out), TEXT, str(CLIP), SAID, 3, compare=True)
    assert base is not None
    assert note == "layout serve, 1 pieces"
    assert_alike(tuned[1], command(out, toy, tmp_path / "tuned.wav"))
    assert_alike(base[1], command(out.parent / "model", toy, tmp_path / "base.wav"))
    assert studio.speak(str(out), TEXT, None, "", 3, compare=False)[1] is None
    with pytest.raises(Reject, match="eot_id"):
        studio.speak(str(out), "<|eot_id|>", None, "", 3, compare=False)
    with pytest.raises(UserError, match="no model of this page"):
        studio.speak("/etc", TEXT, None, "", 3, compare=False)


@pytest.mark.fast
@pytest.mark.skipif(HAS_GRADIO, reason="Gradio is installed")
def test_without_gradio_the_page_says_so(out: Path, toy: Path) -> None:
    with pytest.raises(UserError, match="the page needs Gradio"):
        build_page(studio_of(out, toy))


@pytest.fixture
def page_url(out: Path, toy: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if not HAS_GRADIO:
        pytest.skip("needs Gradio (pip install 'higgs-tune[ui]')")
    page = build_page(studio_of(out, toy, seed=3))
    _, url, _ = page.queue().launch(quiet=True, prevent_thread_lock=True, server_name="127.0.0.1")
    yield url
    page.close()


def test_a_browser_plays_base_and_tuned(page_url: str, out: Path, toy: Path, tmp_path: Path) -> None:
    with open_browser(tmp_path / "profile") as browser:
        browser.get(page_url)
        text = wait(lambda: browser.find_elements(By.CSS_SELECTOR, "#text textarea"), "the page")[0]
        text.send_keys(TEXT)
        wait(lambda: browser.find_elements(By.CSS_SELECTOR, UPLOAD), "the upload field")[0].send_keys(str(CLIP))
        wait(lambda: not browser.find_elements(By.CSS_SELECTOR, UPLOAD), "the upload")
        browser.find_element(By.CSS_SELECTOR, "#said textarea").send_keys(SAID)
        browser.find_element(By.CSS_SELECTOR, "#speak").click()

        def sound(name: str) -> np.ndarray:
            links = f"#{name} a[href*='/file='], #{name} audio[src*='/file=']"
            found = wait(lambda: browser.find_elements(By.CSS_SELECTOR, links), f"the sound of {name}")[0]
            url = found.get_attribute("href") or found.get_attribute("src")
            data = browser.execute_async_script(FETCH, url)
            assert isinstance(data, list), data
            return soundfile.read(io.BytesIO(bytes(data)), dtype="int16")[0]

        assert_alike(sound("tuned"), command(out, toy, tmp_path / "tuned.wav"))
        assert_alike(sound("base"), command(out.parent / "model", toy, tmp_path / "base.wav"))
        text.clear()
        text.send_keys("<|eot_id|>")
        browser.find_element(By.CSS_SELECTOR, "#speak").click()
        wait(lambda: "text holds <|eot_id|>" in browser.find_element(By.TAG_NAME, "body").text, "the error")
        assert not [line for line in console_errors(browser) if "127.0.0.1" in line and "SEVERE" in line]
