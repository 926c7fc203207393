"""Measured figures against hand numbers, and policies compared on the same random numbers."""

from typing import Any

import pytest
import torch
from torch import Tensor

import tiny_models as tiny
from preftune.evaluate import Answers, answer, figures, interval
from preftune.policies.categorical import Categorical
from preftune.policies.transformer import Transformer
from preftune.samples import Samples
from preftune.sampling.decoding import Decoding


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


class Prompts:
    """Held-out prompts of ragged lengths."""

    def __init__(self, s: Samples) -> None:
        self.s = s

    def __len__(self) -> int:
        return len(self.s.prompt)

    def prompts_only(self, index: Tensor) -> tuple[Tensor, Tensor]:
        mask = self.s.prompt_mask[index]
        keep = mask.any(0)  # as padded as these prompts need
        return self.s.prompt[index][:, keep], mask[:, keep]

    def samples(self, index: Tensor, *, responses: list[int] | None = None) -> Samples:
        raise NotImplementedError


def short(s: Samples) -> Tensor:
    return -s.lengths().double()


def policy(seed: int = 0) -> Transformer:
    settings = Decoding(max_new_tokens=6)
    return tiny.policy("llama", seed=seed, end_ids=range(40), decoding=settings)


def asked(one: Any, other: Any = None, **options: Any) -> Answers:
    settings = {"samples_per_prompt": 3, "seed": 0} | options
    return answer(one, other, Prompts(tiny.ragged()), {"short": short}, **settings)


def made(lengths: list[list[int]], finished: list[list[bool]], rewards: Any) -> Answers:
    s = tiny.samples([[5]] * len(lengths), [[[7] * n for n in group] for group in lengths])
    object.__setattr__(s, "finished", torch.tensor(finished))
    rewards = {k: torch.tensor(v, dtype=torch.float64) for k, v in rewards.items()}
    return Answers(samples=s, rewards=rewards, kl=torch.tensor([[1.0, 3.0], [2.0, 6.0]]))


def test_figures_of_hand_numbers() -> None:
    mine = made(
        [[3, 1], [2, 6]], [[True, True], [True, False]],
        {"a": [[1.0, 2.0], [3.0, 6.0]], "b": [[0.0, 0.0], [1.0, 1.0]]},
    )  # fmt: skip
    other = made([[1, 1], [1, 1]], [[True] * 2] * 2, {"a": [[1.0, 3.0], [2.0, 5.0]]})
    found = {name: figure["value"] for name, figure in figures(mine, other).items()}
    assert found == {
        "reward": 3.0,
        "reward:b": 0.5,
        "kl": 3.0,
        "win_rate": (0.5 + 0 + 1 + 1) / 4,
        "length": (2 + 0 + 1 + 6) / 4,  # the end token is not counted
        "no_end": 0.25,
    }
    assert "win_rate" not in figures(mine)


def test_intervals_are_over_prompts() -> None:
    g = torch.Generator().manual_seed(0)
    by_prompt = torch.randn(64, 1, generator=g, dtype=torch.float64)
    found = interval(by_prompt)
    assert found == interval(by_prompt)
    assert found["low"] is not None and found["high"] is not None and found["value"] is not None
    assert found["low"] < found["value"] < found["high"]
    half = 1.96 * float(by_prompt.std(unbiased=False)) / 8
    assert (found["high"] - found["low"]) / 2 == pytest.approx(half, rel=0.1)
    # the same answers ten times over are no new evidence
    assert interval(by_prompt.expand(-1, 10))["low"] == pytest.approx(found["low"])
    assert interval(torch.full((5, 2), 2.5)) == {"value": 2.5, "low": 2.5, "high": 2.5}
    assert interval(torch.tensor([[1.0, 2.0]])) == {"value": 1.5, "low": None, "high": None}


def test_a_policy_against_itself() -> None:
    """Common random numbers: the same answers, and no distance."""
    one, twin = policy(), policy().frozen_copy()
    mine, theirs = asked(one, twin), asked(twin)
    assert torch.equal(mine.samples.tokens, theirs.samples.tokens) and theirs.kl is None
    found = figures(mine, theirs)
    assert found["win_rate"] == {"value": 0.5, "low": 0.5, "high": 0.5}
    assert found["kl"] == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_kl_sums_the_exact_steps() -> None:
    one, other = policy(), policy(1)
    answers = asked(one, other, micro_batch_tokens=30)
    assert answers.kl is not None
    s = answers.samples
    for i, k, prompt, response in tiny.unpadded(s):
        p = tiny.next_log_probs(one.model, prompt, response)
        q = tiny.next_log_probs(other.model, prompt, response)
        direct = float((p.exp() * (p - q)).sum())
        assert float(answers.kl[i, k]) == pytest.approx(direct, abs=1e-9)
    assert torch.equal(answers.rewards["short"], -s.lengths().double())
    assert s.row.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("batch", [1, 3, 48])
def test_answers_do_not_depend_on_the_batch(batch: int) -> None:
    one = policy()
    told: list[tuple[int, int]] = []
    whole = asked(one).samples
    found = asked(
        one, batch_prompts=batch, progress=lambda done, total: told.append((done, total))
    ).samples
    assert tiny.unpadded(found) == tiny.unpadded(whole)
    assert told[-1] == (4, 4) and len(told) == -(-4 // batch)


def test_more_samples_or_fewer_prompts_keep_the_answers() -> None:
    one = policy()
    whole = {(i, k): response for i, k, _, response in tiny.unpadded(asked(one).samples)}
    for settings in ({"samples_per_prompt": 2}, {"samples_per_prompt": 5}, {"num_prompts": 2}):
        for i, k, _, response in tiny.unpadded(asked(one, **settings).samples):
            assert k >= 3 or response == whole[i, k]
    assert len(asked(one, num_prompts=2).samples.row) == 2
    other = {(i, k): r for i, k, _, r in tiny.unpadded(asked(one, seed=1).samples)}
    assert other != whole


def test_a_categorical_is_measured_too() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    one, other = Categorical(logits), Categorical(torch.zeros_like(logits))
    prompts = Prompts(tiny.samples([[0], [1]], [[[0]], [[0]]]))
    answers = answer(one, other, prompts, {}, samples_per_prompt=4, seed=0)
    logp = logits.log_softmax(-1)
    exact = (logp.exp() * (logp + torch.tensor(3.0).log())).sum(-1)
    assert answers.kl is not None
    torch.testing.assert_close(answers.kl, exact[:, None].expand(2, 4), rtol=0, atol=1e-6)
    assert set(figures(answers)) == {"kl", "length", "no_end"}
