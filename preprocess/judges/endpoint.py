"""A recogniser behind HTTP, in the form of OpenAI's transcriptions: POST multipart/form-data, JSON back.

https://platform.openai.com/docs/api-reference/audio/createTranscription; vLLM, speaches and others serve the same form.
"""

from __future__ import annotations

import io
import json
import os
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException, InvalidURL
from urllib.parse import urlsplit

import numpy as np
import soundfile
from higgs_tune.preprocess.judges.interface import SAMPLE_RATE_HZ
from higgs_tune.shards.errors import UserError

PATH = "/audio/transcriptions"
DEFAULT_MODEL = "whisper-1"
KEY_VARIABLE = "OPENAI_API_KEY"
TIMEOUT_S = 120.0
ATTEMPTS = 4
PAUSE_S = 1.0  # before the second attempt; doubled each time
OF_CLIP = (400, 413, 415, 422)  # answers that may be about the clip: too long, too short, not to be decoded
AGAIN = (408, 429, 500, 502, 503, 504)  # answers after which another attempt may succeed


class _Refusal(UserError):
    """A refusal that may be about the clip."""


class EndpointRecogniser:
    """Sends each clip as a WAV file; the clips of a batch at once.

    Args:
        url: `http://HOST/v1#MODEL`, or with the whole path; the key, if one is needed, is $OPENAI_API_KEY.
    """

    def __init__(self, url: str) -> None:
        address, _, model = url.partition("#")
        address = address.rstrip("/")
        self.url = address if address.endswith(PATH) else address + PATH
        self.model = model or DEFAULT_MODEL
        self.name, self.revision = f"{self.model} at {urlsplit(self.url).netloc}", ""

    def transcribe(self, waves_S: Sequence[np.ndarray], language: str) -> list[str]:
        """One transcript a clip; empty for a clip that the endpoint refuses while it takes half a second of noise.

        Raises:
            UserError: the endpoint cannot be reached, refuses every clip, or answers in another form.
        """
        with ThreadPoolExecutor(max(1, len(waves_S))) as pool:
            return list(pool.map(lambda wave_S: self._transcribe_or_refuse(wave_S, language), waves_S))

    def _transcribe_or_refuse(self, wave_S: np.ndarray, language: str) -> str:
        try:
            return self._transcribe(wave_S, language)
        except _Refusal as refusal:
            noise_S = np.random.default_rng(0).normal(0, 0.01, SAMPLE_RATE_HZ // 2).astype(np.float32)
            self._transcribe(noise_S, language)  # refused too: it is not the clip
            seconds = len(wave_S) / SAMPLE_RATE_HZ
            print(f"warning: nothing is heard in a clip of {seconds:.1f} s: {refusal}", file=sys.stderr, flush=True)
            return ""

    def _transcribe(self, wave_S: np.ndarray, language: str) -> str:
        fields = {"model": self.model, "response_format": "json", "temperature": "0"}
        body, kind = _multipart(fields | ({"language": language} if language else {}), _wav(wave_S))
        headers = {"Content-Type": kind}
        if os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {os.environ[KEY_VARIABLE]}"
        answer = self._post(urllib.request.Request(self.url, body, headers))
        try:
            text = json.loads(answer)["text"]
        except (ValueError, KeyError, TypeError):
            text = None
        if not isinstance(text, str):
            got = answer[:80].decode("utf-8", "replace")
            raise UserError("the endpoint answers in another form", where=self.url, expected='{"text": …}', got=got)
        return text

    def _post(self, request: urllib.request.Request) -> bytes:
        fault = ""
        for attempt in range(ATTEMPTS):
            try:
                with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
                    return answer.read()
            except urllib.error.HTTPError as error:
                fault = f"{error.code} {error.reason}: {error.read(200).decode('utf-8', 'replace')}"
                if error.code not in AGAIN:
                    kind = _Refusal if error.code in OF_CLIP else UserError
                    raise kind(f"the endpoint refuses: {fault}", where=self.url) from error
            except InvalidURL as error:
                raise UserError(f"no such address: {error}", where=self.url) from error
            except (OSError, HTTPException) as error:  # no connection, no answer in time, an answer that is not HTTP
                fault = str(getattr(error, "reason", error)) or type(error).__name__
            time.sleep(PAUSE_S * 2**attempt if attempt + 1 < ATTEMPTS else 0)
        hint = "The same command continues when it answers."
        raise UserError(f"the endpoint fails {ATTEMPTS} times: {fault}", where=self.url, hint=hint)


def _wav(wave_S: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, wave_S, SAMPLE_RATE_HZ, format="WAV", subtype="PCM_16")
    return buffer.getvalue()


def _multipart(fields: dict[str, str], wav: bytes) -> tuple[bytes, str]:
    """A body of form fields and the file, and its content type (RFC 7578)."""
    boundary = uuid.uuid4().hex
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
        for name, value in fields.items()
    ]
    head = 'Content-Disposition: form-data; name="file"; filename="clip.wav"\r\nContent-Type: audio/wav'
    parts += [f"--{boundary}\r\n{head}\r\n\r\n".encode(), wav, f"\r\n--{boundary}--\r\n".encode()]
    return b"".join(parts), f"multipart/form-data; boundary={boundary}"
