"""`higgs-speak serve`: a small page that speaks, the base beside the tuned model.

In: a model folder. Out: a page on 127.0.0.1: model, text, reference (a file or the microphone), seed, players. Needs
Gradio, which the extra `ui` brings. Guarantees (test_speak_page.py): what the page plays is what the command speaks.
"""

from __future__ import annotations

import importlib
import os
import socket
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from higgs_tune.evaluate.speak.config import ServeConfig, VoiceConfig
from higgs_tune.evaluate.speak.engine import SpeechEngine, Task
from higgs_tune.evaluate.speak.plan import MAX_CHARS
from higgs_tune.evaluate.speak.sentences import split_text
from higgs_tune.evaluate.speak.settings import resolve_settings
from higgs_tune.preprocess.input.chatml import usable_text
from higgs_tune.preprocess.reject import Reject
from higgs_tune.preprocess.text_normalization import TextOptions
from higgs_tune.shards.errors import UserError
from higgs_tune.train.checkpoint.folder import checkpoint_step

LOCAL = ("127.0.0.1", "localhost", "::1")
Sound = tuple[int, np.ndarray]  # rate in Hz, and int16 [S]


class Studio:
    """The models of the page; one is loaded at a time, and speaks one text at a time."""

    def __init__(self, config: VoiceConfig) -> None:
        self.config, self._lock = config, Lock()
        self._engine: SpeechEngine | None = None
        self._loaded = ""

    def models(self) -> list[str]:
        """The given model, and the checkpoints of its run, the newest first."""
        given = self.config.model_path
        inner = [path for name in ("checkpoint-*", "best-*") for path in given.glob(name)] if given.is_dir() else []
        usable = [path for path in inner if _is_model(path)]
        newest = sorted(usable, key=checkpoint_step, reverse=True)
        own = [given] if not usable or _is_model(given) else []
        return [str(path) for path in (*own, *newest)]

    def load(self, model: str) -> SpeechEngine:
        """The engine of one of `models`.

        Raises:
            UserError: it cannot be loaded, or is not one of them.
        """
        if self._engine is None or self._loaded != model:
            if model not in self.models():
                raise UserError("no model of this page", got=model)
            self._engine = None  # its memory first
            settings = resolve_settings(replace(self.config, model_path=Path(model)))
            self._engine = SpeechEngine(settings, device=self.config.device, batch_size=self.config.batch_size)
            self._loaded = model
        return self._engine

    def speak(
        self, model: str, text: str, reference: str | None, said: str, seed: float, *, compare: bool
    ) -> tuple[Sound, Sound | None, str]:
        """Speak a text: by the model, by its base where that is asked for and there is an adapter, and a note.

        Args:
            reference: path of the recording; None for none. said: what it says.

        Raises:
            Reject: text or reference cannot be used, or nothing was said.
            UserError: the model cannot be loaded.
        """
        with self._lock:
            engine = self.load(model)
            texts = TextOptions(MAX_CHARS, engine.settings.normalization)
            pieces = split_text(usable_text(text, "text", texts), self.config.max_chars)
            known = usable_text(said, "reference text", texts).strip() if said.strip() else ""
            voices = (engine.voice(reference, known),) if reference else ()
            has_base = compare and engine.settings.adapter is not None
            sounds = [
                self._sound(engine, Task(pieces, voices, int(seed)), base=base)
                for base in ((False, True) if has_base else (False,))
            ]
        note = f"layout {engine.settings.layout}, {len(pieces)} pieces"
        return sounds[0], sounds[1] if has_base else None, note

    @staticmethod
    def _sound(engine: SpeechEngine, task: Task, *, base: bool) -> Sound:
        with engine.base_only() if base else nullcontext():
            list(engine.speak([task]))
        if not all(codes_KT.size for codes_KT in task.codes):
            raise Reject("nothing_said", "the model ended before it said anything; try another seed")
        wave_S = np.clip(engine.sound(task.codes), -1, 1)
        return engine.sample_rate_hz, np.round(wave_S * 32767).astype(np.int16)


def _is_model(folder: Path) -> bool:
    """Whether a folder of a run holds an adapter or a whole model."""
    return any((folder / name).is_file() for name in ("adapter_config.json", "config.json"))


def build_page(studio: Studio) -> Any:
    """The page, as Gradio's blocks.

    Raises:
        UserError: Gradio is not installed.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        gr: Any = importlib.import_module("gradio")
    except ImportError as error:
        raise UserError("the page needs Gradio", hint="pip install 'higgs-tune[ui]'") from error
    models = studio.models()

    def speak(
        model: str, text: str, reference: str | None, said: str, seed: float, compare: bool
    ) -> tuple[Sound, Sound | None, str]:
        try:
            return studio.speak(model, text, reference, said, seed, compare=compare)
        except Reject as reject:
            raise gr.Error(reject.detail) from reject
        except UserError as error:
            raise gr.Error(str(error)) from error

    with gr.Blocks(title="higgs-speak", analytics_enabled=False) as page:
        gr.Markdown("# higgs-speak")
        with gr.Row():
            with gr.Column():
                model = gr.Dropdown(models, value=models[0], label="Model", elem_id="model")
                text = gr.Textbox(label="Text", lines=4, elem_id="text")
                reference = gr.Audio(
                    sources=["upload", "microphone"], type="filepath", label="Reference voice", elem_id="reference"
                )
                said = gr.Textbox(label="What the reference says", lines=2, elem_id="said")
                seed = gr.Number(studio.config.seed, label="Seed", precision=0, minimum=0, elem_id="seed")
                compare = gr.Checkbox(True, label="Compare with the base", elem_id="compare")
                button = gr.Button("Speak", variant="primary", elem_id="speak")
            with gr.Column():
                with gr.Row():
                    tuned = gr.Audio(label="The model", interactive=False, elem_id="tuned")
                    base = gr.Audio(label="Its base", interactive=False, elem_id="base")
                note = gr.Markdown(elem_id="note")
        button.click(speak, [model, text, reference, said, seed, compare], [tuned, base, note], api_name="speak")
    return page


def serve(config: ServeConfig) -> None:
    """Serve the page until Ctrl-C.

    Raises:
        UserError: the model cannot be loaded, Gradio is not installed, or the address cannot be listened on.
    """
    studio = Studio(config)
    page = build_page(studio)
    studio.load(studio.models()[0])
    if config.host not in LOCAL:
        print(f"warning: everyone who reaches {config.host} can use this page", file=sys.stderr, flush=True)
    gr: Any = importlib.import_module("gradio")
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["monospace"]}  # none from the network
    try:
        _, url, _ = page.queue().launch(
            server_name=config.host,
            server_port=config.port or free_port(config.host),
            theme=gr.themes.Default(**fonts),
            footer_links=[],
            quiet=True,
            prevent_thread_lock=True,
        )
    except OSError as error:
        raise UserError(f"cannot listen: {error}", where=f"{config.host}:{config.port}") from error
    print(f"serving on {url}", flush=True)
    page.block_thread()


def free_port(host: str) -> int:
    """A port that nobody listens on."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
