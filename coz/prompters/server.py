"""Prompts from a vision-language model behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

from torch import Tensor

from coz.models.chat import ChatRequest, Context, Layout
from coz.models.decoding import Sampling
from coz.models.served import ChatServer, ServerError
from coz.prompters.asking import Asking
from coz.prompters.base import Prompt
from coz.prompters.cleaning import Cleaning


class ServedPrompter:
    """Asks the questions of `VlmPrompter` over HTTP; see `ChatServer` for address, key, tries and time-outs."""

    def __init__(
        self,
        *,
        base_url: str,
        model: str,
        identity: str | None = None,
        context: Context = "pair",
        layout: Layout = "system",
        question: str | None = None,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        repetition_penalty: float | None = None,
        cleaning: Cleaning = "none",
        cache_dir: str | None = None,
        api_key_env: str = "OPENAI_API_KEY",
        concurrency: int = 16,
        timeout_s: float = 120.0,
        retries: int = 4,
        backoff_s: float = 1.0,
    ) -> None:
        """Args:
        identity: names the weights behind the address. With it, cached prompts and a half-done run stay good when the
            same model moves to another address; without, address and model name are the identity.

        The rest is `VlmPrompter`'s and `ChatServer`'s.
        """
        self._server = ChatServer(
            base_url=base_url,
            model=model,
            api_key_env=api_key_env,
            concurrency=concurrency,
            timeout_s=timeout_s,
            retries=retries,
            backoff_s=backoff_s,
        )
        sampling = Sampling(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            repetition_penalty=repetition_penalty,
        )
        self._asking = Asking(context, layout, question, sampling, cleaning, cache_dir)
        self._identity = {"name": "server", "weights": identity or f"{model} at {base_url.rstrip('/')}"}
        self._checked = False

    @functools.cached_property
    def fingerprint(self) -> Mapping[str, object]:
        """The served model, question, layout, sampling and cleaning."""
        return self._asking.fingerprint(self._identity)

    def load(self) -> None:
        """See that the server answers and knows the model; done once.

        Raises:
            ServerError: it does not.
        """
        if not self._checked:
            self._server.check()
            self._checked = True

    def __call__(self, current: Tensor, context: Tensor | None, *, seeds: Sequence[int] | None = None) -> list[Prompt]:
        """One prompt per image, see `Prompter`.

        Raises:
            ServerError: an image could not be described after all tries. What was said of the others is in the cache.
        """

        def answer(requests: Sequence[ChatRequest], seeds: Sequence[int]) -> list[str | ServerError]:
            replies = self._server.ask(requests, sampling=self._asking.sampling, seeds=seeds)
            return [reply if isinstance(reply, ServerError) else reply.text for reply in replies]

        return self._asking.prompts(current, context, seeds=seeds, model=self._identity, answer=answer)
