"""Asking a model behind an OpenAI-compatible endpoint (vLLM, LMDeploy, llama.cpp, …), many questions at a time."""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import io
import json
import logging
import os
import random
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx
from PIL import Image

from coz.errors import UserError
from coz.models.chat import ChatRequest
from coz.models.decoding import Sampling

log = logging.getLogger(__name__)

T = TypeVar("T")

_WORTH_ANOTHER_TRY = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
_LONGEST_WAIT_S = 60.0


class ServerError(UserError):
    """A server that cannot be reached, refuses, or answers nonsense, after all tries. `status` is HTTP's, if it refused."""

    def __init__(self, message: str, *, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class _Passing(Exception):
    """A failure that another try may mend, in words."""

    def __init__(self, reason: str, *, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


@dataclass(frozen=True)
class Reply:
    """What a server said.

    Attributes:
        text: the answer.
        top: for each token of the answer, the likeliest tokens there and their log-probabilities; empty if not asked for.
    """

    text: str
    top: Sequence[Mapping[str, float]] = ()


@dataclass(frozen=True, kw_only=True)
class ChatServer:
    """A client that holds an address and no connection, nor a key: it can be pickled, printed and written to a config.

    Attributes:
        base_url: up to and with `/v1`, such as `http://localhost:8000/v1`.
        model: the name that the server gives the model.
        api_key_env: the environment variable that holds the key, read at each call; unset means no key.
        concurrency: questions under way at a time.
        timeout_s: for one try.
        retries: tries after the first.
        backoff_s: wait before the second try; doubled for each further one, with a jitter.
    """

    base_url: str
    model: str
    api_key_env: str = "OPENAI_API_KEY"
    concurrency: int = 16
    timeout_s: float = 120.0
    retries: int = 4
    backoff_s: float = 1.0

    def __post_init__(self) -> None:
        try:
            url = httpx.URL(self.base_url)
        except httpx.InvalidURL as error:
            raise UserError(f"base_url is not a URL ({error}); give one such as http://localhost:8000/v1") from error
        if url.userinfo or url.query:
            raise UserError(
                f"base_url must not hold a password or a query (host {url.host}); put the key into the environment "
                f"variable {self.api_key_env}"
            )
        if url.scheme not in ("http", "https") or not url.host:
            raise UserError(f"base_url={self.base_url} is not a URL; give one such as http://localhost:8000/v1")
        if not self.model:
            raise UserError("model is empty; give the name under which the server knows the model")
        if self.concurrency < 1 or self.retries < 0 or self.timeout_s <= 0 or self.backoff_s < 0:
            raise UserError(
                f"concurrency={self.concurrency} must be at least 1, retries={self.retries} and backoff_s={self.backoff_s} "
                f"not negative, timeout_s={self.timeout_s} above 0"
            )

    def check(self) -> None:
        """Ask the server for its models, so that a wrong address or name shows before the work begins.

        Raises:
            ServerError: it cannot be reached, refuses the key, or does not know the model.
        """
        run_async(self._check())

    def ask(
        self,
        requests: Sequence[ChatRequest],
        *,
        sampling: Sampling,
        seeds: Sequence[int] | None = None,
        top_logprobs: int = 0,
    ) -> list[Reply | ServerError]:
        """Ask all, some at a time; a reply or what went wrong, one per request."""
        return run_async(self.ask_async(requests, sampling=sampling, seeds=seeds, top_logprobs=top_logprobs))

    async def ask_async(
        self,
        requests: Sequence[ChatRequest],
        *,
        sampling: Sampling,
        seeds: Sequence[int] | None = None,
        top_logprobs: int = 0,
    ) -> list[Reply | ServerError]:
        """`ask` for a caller that has an event loop."""
        seeds = [0] * len(requests) if seeds is None else seeds
        gate = asyncio.Semaphore(self.concurrency)
        gone = asyncio.Event()  # once the server is found dead, the rest need not try for minutes each

        async def one(client: httpx.AsyncClient, request: ChatRequest, seed: int) -> Reply | ServerError:
            async with gate:
                if gone.is_set():
                    return ServerError(f"{self._url('chat/completions')} was given up; see the error before")
                body = self._body(request, sampling=sampling, seed=seed, top_logprobs=top_logprobs)
                try:
                    return await self._try("POST", client, "chat/completions", body, _read_reply)
                except ServerError as error:
                    gone.set()
                    return error

        async with self._client() as client:
            return list(await asyncio.gather(*(one(client, r, s) for r, s in zip(requests, seeds, strict=True))))

    # -----------------------------------------------------------------------------------------------------------------

    async def _check(self) -> None:
        try:
            async with self._client() as client:
                names = await self._try("GET", client, "models", None, _read_models)
        except ServerError as error:
            if error.status in (404, 405):  # a server without that list
                return
            raise
        if names and self.model not in names:
            raise ServerError(f"{self.base_url} does not serve model={self.model}; it serves {', '.join(sorted(names)[:5])}")

    def _client(self) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=self.concurrency)
        return httpx.AsyncClient(timeout=self.timeout_s, headers=self._headers(), limits=limits)

    def _headers(self) -> dict[str, str]:
        key = self._key()
        return {"Authorization": f"Bearer {key}"} if key else {}

    def _key(self) -> str:
        return os.environ.get(self.api_key_env, "").strip()

    def _url(self, path: str) -> str:
        return f"{self.base_url.rstrip('/')}/{path}"

    def _body(self, request: ChatRequest, *, sampling: Sampling, seed: int, top_logprobs: int) -> dict[str, object]:
        body: dict[str, object] = {
            "model": self.model,
            "messages": with_pictures(request),
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
        }
        if sampling.draws:
            body |= {"top_p": sampling.top_p, "seed": seed % 2**31}
            if sampling.top_k:  # not OpenAI's own; vLLM, LMDeploy and llama.cpp read it
                body["top_k"] = sampling.top_k
        if sampling.repetition_penalty is not None:
            body["repetition_penalty"] = sampling.repetition_penalty
        if top_logprobs:
            body |= {"logprobs": True, "top_logprobs": top_logprobs}
        return body

    async def _try(
        self,
        method: str,
        client: httpx.AsyncClient,
        path: str,
        body: Mapping[str, object] | None,
        read: Callable[[Any], T],
    ) -> T:
        """One request with its tries. Raises `ServerError` with the URL and the last reason."""
        reason = ""
        for attempt in range(self.retries + 1):
            try:
                return await self._once(method, client, path, body, read)
            except _Passing as failure:
                reason = str(failure)
                if attempt < self.retries:
                    wait_s = failure.wait_s if failure.wait_s is not None else self.backoff_s * 2**attempt
                    wait_s = min(wait_s, _LONGEST_WAIT_S) * random.uniform(0.75, 1.25)
                    log.warning("%s: %s; trying again in %.1f s", self._url(path), reason, wait_s)
                    await asyncio.sleep(wait_s)
        raise ServerError(
            f"{self._url(path)} failed {self.retries + 1} times, last because {reason}; "
            "see that the server runs, or raise timeout_s or retries"
        )

    async def _once(
        self,
        method: str,
        client: httpx.AsyncClient,
        path: str,
        body: Mapping[str, object] | None,
        read: Callable[[Any], T],
    ) -> T:
        url = self._url(path)
        try:
            response = await asyncio.wait_for(client.request(method, url, json=body), self.timeout_s)
        except (httpx.TimeoutException, TimeoutError) as error:
            raise _Passing(f"it did not answer within timeout_s={self.timeout_s:g}") from error
        except httpx.TransportError as error:
            raise _Passing(f"the connection failed ({self._redact(str(error) or type(error).__name__)})") from error
        if response.status_code in _WORTH_ANOTHER_TRY:
            raise _Passing(f"it answered {self._said(response)}", wait_s=_retry_after(response))
        if response.status_code >= 400:
            remedy = f"; the key is read from {self.api_key_env}" if response.status_code in (401, 403) else ""
            raise ServerError(f"{url} refused: {self._said(response)}{remedy}", status=response.status_code)
        try:
            return read(response.json())
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise _Passing(f"its answer is no chat completion: {self._said(response)}") from error

    def _said(self, response: httpx.Response) -> str:
        text = " ".join(response.text.split())
        return self._redact(f"{response.status_code} {text[:200]}".strip())

    def _redact(self, text: str) -> str:
        key = self._key()
        return text.replace(key, "***") if key else text


# ---------------------------------------------------------------------------------------------------------------------


def with_pictures(request: ChatRequest) -> list[dict[str, object]]:
    """The request's messages as the endpoint wants them: pictures in their places as PNG data URLs."""
    pictures = iter(request.images)
    messages = []
    for message in request.messages:
        parts = [
            {"type": "image_url", "image_url": {"url": data_url(next(pictures))}} if part["type"] == "image" else dict(part)
            for part in message["content"]
        ]
        only_text = len(parts) == 1 and parts[0]["type"] == "text"  # servers may take a system message only as a string
        messages.append({"role": message["role"], "content": parts[0]["text"] if only_text else parts})
    return messages


def data_url(image: Image.Image) -> str:
    """A picture inside a URL, without loss."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def run_async(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end, also where an event loop runs already (a notebook, a web page)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()


def _read_reply(answer: Mapping[str, Any]) -> Reply:
    choice = answer["choices"][0]
    text = choice["message"]["content"]
    if not isinstance(text, str):
        raise TypeError("content is no text")
    tokens = ((choice.get("logprobs") or {}).get("content")) or ()
    top = [{entry["token"]: float(entry["logprob"]) for entry in token["top_logprobs"]} for token in tokens]
    return Reply(text, tuple(top))


def _read_models(answer: Mapping[str, Any]) -> set[str]:
    return {str(model["id"]) for model in answer["data"]}


def _retry_after(response: httpx.Response) -> float | None:
    value = response.headers.get("retry-after", "")
    return float(value) if value.replace(".", "", 1).isdigit() else None
