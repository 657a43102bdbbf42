"""Paraphrasers: whom to ask for other words, an endpoint or a model on this machine."""

import hashlib
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Literal

import numpy as np
import urllib3
from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict
from urllib3.exceptions import HTTPError, LocationParseError

from llm4es.errors import ConfigError, SourceUnavailable
from llm4es.schema import FrozenModel

__all__ = [
    "API_KEY_VARIABLE",
    "Answer",
    "Ask",
    "Endpoint",
    "EndpointSecrets",
    "Sampling",
    "open_local_model",
]

logger = logging.getLogger(__name__)

API_KEY_VARIABLE = "LLM4ES_API_KEY"
_LONGEST_WAIT_S = 60.0
_CONNECT_S = 10.0
_CHARACTERS_PER_TOKEN = 4  # where an endpoint does not count
_OK, _REDIRECT, _BAD_REQUEST, _SERVER_ERROR = 200, 300, 400, 500
_BAD_KEY = {401, 403}
_TRY_AGAIN = {408, 409, 425, 429}


class Sampling(FrozenModel):
    """How an answer is drawn; part of what an answer is cached by."""

    temperature: float = Field(default=0.6, ge=0, le=2)
    top_p: float = Field(default=0.9, gt=0, le=1)
    max_answer_tokens: int = Field(default=2048, ge=1)
    seed: int = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a model said, and what it cost.

    `ending` tells whether it had finished, ran into its limit, or did not take the prompt.
    """

    text: str
    ending: Literal["stop", "length", "refused"]
    prompt_tokens: int
    answer_tokens: int


Ask = Callable[[str], Answer]  # a prompt's answer; raises ConfigError, SourceUnavailable


class EndpointSecrets(BaseSettings):
    """The key, from LLM4ES_API_KEY alone: another program's key goes to no endpoint of ours."""

    model_config = SettingsConfigDict(env_prefix="LLM4ES_", frozen=True, env_ignore_empty=True)

    api_key: SecretStr | None = None


class Endpoint:
    """Asks an OpenAI-compatible server: POST {url}/chat/completions. Safe to share by threads.

    What passes (busy, slow, a broken answer) is tried again `attempts` times in all, waiting
    longer each time or as long as the server says. Raises ConfigError for what does not pass
    (URL, key, model) and SourceUnavailable when it gives up.
    """

    def __init__(
        self,
        url: str,
        model: str,
        sampling: Sampling,
        *,
        key: SecretStr | None = None,
        timeout_s: float = 120.0,
        attempts: int = 6,
        parallel: int = 1,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._url = f"{_checked(url).rstrip('/')}/chat/completions"
        self._model = model
        self._sampling = sampling
        self._key = key
        self._attempts = attempts
        self._sleep = sleep
        self._pool = urllib3.PoolManager(
            maxsize=parallel,
            retries=False,  # ours know which answers are worth another try
            timeout=urllib3.Timeout(connect=_CONNECT_S, read=timeout_s),
        )

    def __call__(self, prompt: str) -> Answer:
        """Ask for one answer."""
        sampling = self._sampling
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_answer_tokens,
            "seed": sampling.seed,
        }
        problem = ""
        for attempt in range(self._attempts):
            wait_s = min(_LONGEST_WAIT_S, 2.0**attempt)
            try:
                response = self._post(body)
            except HTTPError as error:
                problem = type(error).__name__
            else:
                self._refuse_what_stays(response)
                if response.status == _OK:
                    answer = _read_answer(response.data, prompt)
                    if answer is not None:
                        return answer
                    problem = "its answer is no chat completion"
                elif response.status in _TRY_AGAIN or response.status >= _SERVER_ERROR:
                    problem = f"it answers {response.status}"
                    wait_s = _retry_after(response, wait_s)
                else:
                    self._report(response)
                    return Answer(text="", ending="refused", prompt_tokens=0, answer_tokens=0)
            if attempt < self._attempts - 1:
                self._sleep(wait_s)
        raise SourceUnavailable(
            f"{self._url} gives no answer after {self._attempts} attempts ({problem}); "
            "what it has answered is kept, start again later"
        )

    def _post(self, body: dict[str, Any]) -> urllib3.BaseHTTPResponse:
        headers = {"Content-Type": "application/json"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key.get_secret_value()}"
        return self._pool.request(
            "POST", self._url, body=json.dumps(body).encode(), headers=headers, redirect=False
        )

    def _refuse_what_stays(self, response: urllib3.BaseHTTPResponse) -> None:
        """Raise ConfigError for what no other try and no other prompt will change."""
        status = response.status
        if status in _BAD_KEY:
            raise ConfigError(
                API_KEY_VARIABLE, f"{self._url} answers {status}", "set a key that it takes"
            )
        if _REDIRECT <= status < _BAD_REQUEST:
            # The key must not follow to wherever it points.
            raise ConfigError(
                "endpoint", f"{self._url} redirects ({status})", "name where it leads to"
            )
        if status in {404, 405}:
            raise ConfigError(
                "endpoint",
                f"{self._url} answers {status}: no such path, or no model {self._model!r}",
                "name the URL up to and with /v1, and a model that it serves",
            )

    def _report(self, response: urllib3.BaseHTTPResponse) -> None:
        said = " ".join(response.data[:300].decode(errors="replace").split())
        if self._key is not None:
            said = said.replace(self._key.get_secret_value(), "***")
        logger.warning("a chapter was refused (%d): %s", response.status, said)


def open_local_model(source: str, sampling: Sampling) -> tuple[str, Ask]:
    """Load a causal language model as `export.models` does; its name, and how to ask it.

    The name holds a hash of the weights: a model trained further answers anew. One prompt at a
    time; the draw depends on the seed and the prompt, not on what was asked before. Raises
    ConfigError where there is no such model.
    """
    import torch  # noqa: PLC0415 - heavy, and an endpoint needs none of it

    from export.models import load_pretrained  # noqa: PLC0415

    found = load_pretrained(source)
    model, tokenizer = found.model.eval(), found.tokenizer
    ends = model.generation_config.eos_token_id or tokenizer.eos_token_id

    def ask(prompt: str) -> Answer:
        if tokenizer.chat_template:
            messages = [{"role": "user", "content": prompt}]
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        else:
            ids = tokenizer.encode(prompt + "\n", add_special_tokens=True)
        room = sampling.max_answer_tokens
        if found.positions is not None:
            room = min(room, found.positions - len(ids))
        if room < 1:
            return Answer(text="", ending="refused", prompt_tokens=0, answer_tokens=0)
        torch.manual_seed(_draw(sampling.seed, prompt))
        drawn = (
            {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p}
            if sampling.temperature
            else {"do_sample": False}
        )
        inputs = torch.tensor([ids])
        with torch.inference_mode():
            made = model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=room,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=ends,
                **drawn,
            )[0, len(ids) :]
        return Answer(
            text=tokenizer.decode(made, skip_special_tokens=True),
            ending="stop" if int(made[-1]) in np.atleast_1d(ends) else "length",
            prompt_tokens=len(ids),
            answer_tokens=len(made),
        )

    digest = hashlib.sha256()
    for weights in model.state_dict().values():
        digest.update(weights.contiguous().view(torch.uint8).numpy())
    return f"{found.name}@{digest.hexdigest()[:12]}", ask


def _draw(seed: int, prompt: str) -> int:
    digest = blake2b(f"{seed}:{prompt}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big")


def _checked(url: str) -> str:
    try:
        parsed = urllib3.util.parse_url(url)
    except LocationParseError as error:
        raise ConfigError("endpoint", f"{url} is no URL", "name one, http://host/v1") from error
    if parsed.scheme not in {"http", "https"} or not parsed.host:
        raise ConfigError("endpoint", f"{url} is no http URL", "name one, http://host/v1")
    return url


def _read_answer(data: bytes, prompt: str) -> Answer | None:
    """Read a chat completion; None for anything else."""
    try:
        document = json.loads(data)
        choice = document["choices"][0]
        text = choice["message"]["content"] or ""
        usage = document.get("usage") or {}
        return Answer(
            text=str(text),
            ending="length" if choice.get("finish_reason") == "length" else "stop",
            prompt_tokens=int(usage.get("prompt_tokens", len(prompt) // _CHARACTERS_PER_TOKEN)),
            answer_tokens=int(usage.get("completion_tokens", len(text) // _CHARACTERS_PER_TOKEN)),
        )
    except (ValueError, LookupError, TypeError, AttributeError):
        return None


def _retry_after(response: urllib3.BaseHTTPResponse, otherwise_s: float) -> float:
    try:
        return min(_LONGEST_WAIT_S, max(0.0, float(response.headers.get("Retry-After", ""))))
    except ValueError:
        return otherwise_s
