"""Choosing tokens: known answers, and independence from the batch."""

from __future__ import annotations

import pytest
import torch

from coz.errors import UserError
from coz.models.decoding import RowChooser, Sampling, draw


def test_draw_inverts_the_cumulated_probabilities():
    scores = torch.tensor([[0.2, 0.5, 0.3]]).log()
    sampling = Sampling(temperature=1.0)
    picked = [
        draw(scores, torch.tensor([u], dtype=torch.float64), sampling=sampling).item() for u in (0.0, 0.49, 0.51, 0.79, 0.81)
    ]
    assert picked == [1, 1, 2, 2, 0]  # from the likeliest on


def test_draw_has_the_models_distribution():
    scores = torch.randn(1, 7, generator=torch.Generator().manual_seed(0)).expand(20000, 7)
    uniform = torch.rand(20000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    counts = draw(scores, uniform, sampling=Sampling(temperature=0.7)).bincount(minlength=7) / 20000
    torch.testing.assert_close(counts, (scores[0] / 0.7).softmax(-1), atol=0.015, rtol=0)


@pytest.mark.parametrize(
    ("settings", "allowed"),
    [({"top_k": 2}, {1, 2}), ({"top_p": 0.79}, {1, 2}), ({"top_p": 0.81}, {0, 1, 2}), ({"top_k": 1}, {1})],
)
def test_top_k_and_top_p_keep_the_likeliest(settings, allowed):
    scores = torch.tensor([0.2, 0.5, 0.3]).log().expand(500, 3)
    uniform = torch.rand(500, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert set(draw(scores, uniform, sampling=Sampling(temperature=1.0, **settings)).tolist()) == allowed


def _chooser(mask, **settings):
    defaults = {"sampling": Sampling(max_new_tokens=4), "penalty": 1.0, "seeds": [0] * len(mask), "vocabulary": 6}
    return RowChooser(attention_mask=mask, **(defaults | settings))


def test_repetition_penalty_is_transformers_own_but_for_padding():
    from transformers import RepetitionPenaltyLogitsProcessor

    ids = torch.tensor([[0, 3, 4]])
    scores = torch.randn(1, 6, generator=torch.Generator().manual_seed(0))
    theirs = RepetitionPenaltyLogitsProcessor(1.3)(ids, scores.clone())
    assert torch.equal(_chooser(torch.ones(1, 3), penalty=1.3)(ids, scores), theirs)
    padded = _chooser(torch.tensor([[0, 1, 1]]), penalty=1.3)(ids, scores)
    assert padded[0, 0] == scores[0, 0]  # the padding's id, unpenalized
    assert torch.equal(padded[0, 1:], theirs[0, 1:])


def test_tokens_without_a_text_are_never_chosen():
    scores = torch.tensor([[0.0, 1.0, 9.0]])
    assert _chooser(torch.ones(1, 2), vocabulary=2)(torch.zeros(1, 2, dtype=torch.long), scores).argmax() == 1


def test_a_row_draws_from_its_own_seed():
    scores = torch.zeros(3, 6)
    ids = torch.zeros(3, 2, dtype=torch.long)
    drawing = {"sampling": Sampling(max_new_tokens=4, temperature=1.0)}
    together = _chooser(torch.ones(3, 2), seeds=[5, 6, 7], **drawing)(ids, scores).argmax(-1)
    alone = [_chooser(torch.ones(1, 2), seeds=[s], **drawing)(ids[:1], scores[:1]).argmax().item() for s in (5, 6, 7)]
    assert together.tolist() == alone


@pytest.mark.parametrize(
    "settings", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}, {"repetition_penalty": 0.0}]
)
def test_wrong_settings_are_named(settings):
    with pytest.raises(UserError, match=next(iter(settings))):
        Sampling(**settings)
