"""How the next token is chosen, so that an image's answer does not depend on the images beside it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from coz.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How an answer is decoded.

    Attributes:
        max_new_tokens: the answer's longest length; 128 as in the released code.
        min_new_tokens: the end is forbidden before; only benchmarks want it.
        temperature: 0 takes the most probable token; above, tokens are drawn.
        top_p: draw from the fewest tokens that hold this share of the probability.
        top_k: draw from this many tokens; 0 for all.
        repetition_penalty: None for what the model's own generation config says (1.05 for Qwen2.5-VL, as released).
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise UserError(f"min_new_tokens={self.min_new_tokens} must lie between 0 and max_new_tokens={self.max_new_tokens}")
        if self.temperature < 0:
            raise UserError(f"temperature={self.temperature} must not be negative; 0 takes the most probable token")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p} must lie above 0 and not above 1")
        if self.top_k < 0:
            raise UserError(f"top_k={self.top_k} must not be negative; 0 draws from all tokens")
        if self.repetition_penalty is not None and self.repetition_penalty <= 0:
            raise UserError(f"repetition_penalty={self.repetition_penalty} must be above 0; 1 means none")

    @property
    def draws(self) -> bool:
        """Whether seeds matter."""
        return self.temperature > 0


class RowChooser:
    """A logits processor that leaves one token per row, for a greedy `generate`.

    `generate` itself draws all rows from one generator and counts padding as text when it penalizes repetition; both make
    an answer depend on the batch. Here every row draws from its own seed, one uniform number a step, looked up in the
    cumulated probabilities; and padding is no text.
    """

    def __init__(
        self, *, sampling: Sampling, penalty: float, seeds: Sequence[int], attention_mask: Tensor, vocabulary: int
    ) -> None:
        """`attention_mask` is the prompt's, (B, T); tokens from `vocabulary` on have no text and are never chosen."""
        self._sampling = sampling
        self._penalty = penalty
        self._mask = attention_mask.bool()
        self._vocabulary = vocabulary
        draws = [torch.rand(sampling.max_new_tokens, generator=_generator(s), dtype=torch.float64) for s in seeds]
        self._uniform = torch.stack(draws).to(attention_mask.device) if sampling.draws else None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(B, T + step) ids and (B, V) scores → (B, V) scores whose largest is the token to take."""
        scores = scores.clone()
        scores[:, self._vocabulary :] = -torch.inf
        step = input_ids.shape[1] - self._mask.shape[1]
        if self._penalty != 1:
            scores = self._penalize(input_ids, scores, step)
        if self._uniform is None:
            return scores
        chosen = draw(scores, self._uniform[:, step], sampling=self._sampling)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)

    def _penalize(self, input_ids: Tensor, scores: Tensor, step: int) -> Tensor:
        real = torch.cat([self._mask, self._mask.new_ones(len(input_ids), step)], dim=1)
        seen = torch.zeros_like(scores, dtype=torch.int32).scatter_add_(1, input_ids, real.int()) > 0
        return torch.where(seen, torch.where(scores < 0, scores * self._penalty, scores / self._penalty), scores)


def draw(scores: Tensor, uniform: Tensor, *, sampling: Sampling) -> Tensor:
    """Draw a token per row: (B, V) scores and (B,) numbers in [0, 1) → (B,) ids."""
    probabilities, ids = (scores.double() / sampling.temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    if sampling.top_k:
        probabilities[:, sampling.top_k :] = 0
    if sampling.top_p < 1:
        before = probabilities.cumsum(-1) - probabilities
        probabilities[before >= sampling.top_p * probabilities.sum(-1, keepdim=True)] = 0
    cumulated = probabilities.cumsum(-1)
    at = torch.searchsorted(cumulated, (uniform[:, None] * cumulated[:, -1:]), right=True)
    last = (probabilities > 0).sum(-1, keepdim=True) - 1
    return ids.gather(1, torch.minimum(at, last))[:, 0]


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed % 2**63)


# ---------------------------------------------------------------------------------------------------------------------
# numbers


def number_distribution(
    model: nn.Module, inputs: Mapping[str, Tensor], numbers: Sequence[tuple[int, ...]]
) -> tuple[Tensor, Tensor]:
    """How probable a model finds each of several numbers as the next thing it says.

    A number of several tokens has the product of their probabilities; one that begins another (8 begins 85) is also
    multiplied by the probability that none of the other's tokens follows. The prompt is read once; tokens that begin
    numbers are then tried one after another on its cache, which for digits are eleven steps of one token.

    Args:
        model: a transformers model with a cache.
        inputs: the processor's tensors, left-padded.
        numbers: the token ids of each number.

    Returns:
        (B, N) probabilities of the numbers among themselves, and (B,) the probability of all of them together.
    """
    following: dict[tuple[int, ...], set[int]] = {}
    for number in numbers:
        for end in range(len(number)):
            following.setdefault(number[:end], set()).add(number[end])
    logs = _next_token_logs(model, inputs, following)
    columns = []
    for number in numbers:
        log = sum(logs[number[:end]][:, token] for end, token in enumerate(number))
        if number in following:
            further = logs[number][:, sorted(following[number])].exp().sum(1)
            log = log + torch.log1p(-further.clamp(max=1 - 1e-7))
        columns.append(log)
    joint = torch.stack(columns, dim=1)
    return joint.softmax(1), joint.exp().sum(1)


def _next_token_logs(
    model: nn.Module, inputs: Mapping[str, Tensor], following: Mapping[tuple[int, ...], set[int]]
) -> dict[tuple[int, ...], Tensor]:
    """Log-probabilities (B, V) of the token after the prompt and each beginning in `following`."""
    mask = inputs["attention_mask"]
    positions = _positions(model, inputs)
    cache_name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    output = model(**inputs, position_ids=positions, use_cache=True, logits_to_keep=1)
    cache = getattr(output, cache_name)
    logs: dict[tuple[int, ...], Tensor] = {(): output.logits[:, -1].float().log_softmax(-1)}

    def visit(prefix: tuple[int, ...]) -> None:
        for token in sorted(following[prefix]):
            longer = (*prefix, token)
            if longer not in following:
                continue
            step = model(
                input_ids=mask.new_full((len(mask), 1), token),
                attention_mask=torch.cat([mask, mask.new_ones(len(mask), len(longer))], dim=1),
                position_ids=positions[..., -1:] + len(longer),
                **{cache_name: cache},
                use_cache=True,
                logits_to_keep=1,
            )
            logs[longer] = step.logits[:, -1].float().log_softmax(-1)
            visit(longer)
            cache.crop(-1)

    visit(())
    return logs


def _positions(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Position ids of the prompt, as the model's own `generate` makes them: (B, T), or with leading axes for Qwen's."""
    prepare = getattr(model, "_prepare_position_ids_for_generation", None)
    if prepare is not None:
        return prepare(inputs["input_ids"], dict(inputs))
    mask = inputs["attention_mask"]
    return (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0)
