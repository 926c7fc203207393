"""What is told of responses by their tokens: other limits than the data's, and ties."""

from dataclasses import replace

import torch

from preftune.diagnosis import measure, reading
from preftune.diagnosis.measure import Surveyed


def lengths(*each: tuple[int, bool]) -> measure.Surveyed:
    """Responses of so many tokens, with an end or without."""
    mask = torch.arange(80) < torch.tensor([n for n, _ in each])[:, None, None]
    nothing = torch.zeros(mask.shape)
    return measure.Surveyed(
        row=torch.arange(len(each)), tokens=nothing.long(), mask=mask,
        finished=torch.tensor([[end] for _, end in each]), ref_logp=nothing, entropy=nothing,
        variance=nothing, hidden=torch.zeros(len(each), 1, 2), reward=None,
    )  # fmt: skip


def with_tokens(*each: list[list[int]]) -> Surveyed:
    """Responses to prompts, of these tokens."""
    width = max(len(r) for prompt in each for r in prompt)
    padded = [[r + [0] * (width - len(r)) for r in prompt] for prompt in each]
    length = torch.tensor([[len(r) for r in prompt] for prompt in each])
    found = lengths(*((1, True) for _ in each))
    return replace(found, tokens=torch.tensor(padded), mask=torch.arange(width) < length[..., None])


def test_same_tokens_whatever_the_padding() -> None:
    data = with_tokens([[5, 1], [7, 8, 1]], [[5, 6], [0, 0]])
    drawn = with_tokens([[5, 1], [5, 1, 0, 0], [7, 8, 1]], [[5, 6, 1], [0], [0, 0]])
    assert reading._same_tokens(data, 0, drawn).tolist() == [[True] + [False] * 2, [False] * 3]
    assert reading._same_tokens(data, 1, drawn).tolist() == [[False, False, True]] * 2


def test_a_sample_that_is_the_response_ties_with_it() -> None:
    """Every sample is the response, with a log-prob that is a little higher by rounding: then the
    response is one of nine alike, not stranger than all."""
    data = with_tokens(*([[5, 1], [7, 1]] for _ in range(300)))
    drawn = with_tokens(*([[5, 1]] * 8 for _ in range(300)))
    data = replace(data, ref_logp=-2.0 * data.mask, hidden=torch.randn(300, 2, 2))
    drawn = replace(drawn, ref_logp=-1.9999995 * drawn.mask, hidden=torch.randn(300, 8, 2))
    found = reading._against_samples(data, drawn, 0)
    for name in ("rank_low_chosen", "rank_high_chosen", "rank_low_matched_chosen"):
        low, high = found[name].low, found[name].high
        assert low is not None and high is not None, name
        assert low < (0.2 if "matched" in name else 1 / 9) < high, name


def test_another_limit_than_the_datas_is_said() -> None:
    """Cut at 48 and answered up to 64; longer than 32; and of the same limit, nothing."""
    data = lengths((48, False), (48, False), (20, True), (30, True))
    assert "have 48 tokens at most, answers up to 64" in str(measure.other_limit(data, 64))
    assert "50% of the data's responses are longer" in str(measure.other_limit(data, 32))
    assert measure.other_limit(data, 48) is None
    assert measure.other_limit(lengths((20, True), (30, True)), 64) is None
