"""`first_gradient` of `xpo`: a given sample of the policy against the reference's own sample.

`samples` fixes the policy's responses alone. With `top_k: 1` the reference's are its most likely
continuations, found here by plain forwards.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from losses import Oracle
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from worlds import (
    BETA,
    PROMPTS,
    VISIBLE,
    Response,
    World,
    assert_same,
    exact_norm,
    gradient,
    ids_of,
    largest_difference,
    load,
    mean,
    most_likely,
    write_rows,
)

from preftune import first_gradient

LIMIT = 5
"""Tokens of a sample at most."""
REWARDS = [[0.5], [-9.5], [-float(LIMIT)]]
"""Of the policy's samples: better than the reference's, worse, and as good (no pair)."""


@pytest.fixture(autouse=True)
def only_losses_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama's norm in float64 on both sides."""
    monkeypatch.setattr(LlamaRMSNorm, "forward", exact_norm)


class Pool:
    """The configuration, and what the reference answers to each prompt."""

    def __init__(self, world: World, folder: Path, template: str = "none") -> None:
        self.world, self.folder, self.template = world, folder, template
        self.prompts = [world.prompt_ids(prompt, template) for prompt in PROMPTS]
        self.reference = self.build_reference()
        model = load(self.reference)
        self.answers: list[Response] = [
            (prompt, most_likely(model, prompt, world.end, LIMIT)) for prompt in self.prompts
        ]
        self.samples = world.samples(REWARDS, template)

    def build_reference(self) -> Path:
        """The other model, changed so that its answer to the second prompt ends after one token."""
        model = AutoModelForCausalLM.from_pretrained(self.world.other)
        with torch.no_grad():
            prompt = self.prompts[1]
            prompt = prompt + most_likely(model, prompt, self.world.end, 1)
            hidden = model.base_model(input_ids=torch.tensor([prompt])).last_hidden_state[0, -1]
            head = model.get_output_embeddings().weight
            head[self.world.end] = 1.05 * (head @ hidden).max() * hidden / hidden.norm() ** 2
        path = self.folder / "reference"
        model.save_pretrained(path)
        return path

    def config(self) -> dict[str, Any]:
        return {
            "method": "xpo",
            "model": str(self.world.policy),
            "reference": str(self.reference),
            "data": write_rows(self.folder / "data.jsonl", ({"prompt": p} for p in PROMPTS)),
            "reward": "length:min",
            "batch_size": 64,
            "max_new_tokens": LIMIT,
            "top_k": 1,
            "template": self.template,
            "seed": 0,
        }

    def actual(self, **changes: Any) -> dict[str, Tensor]:
        return first_gradient(self.config() | changes, samples=self.samples)

    def spelled_out(self, beta: float, weight: float) -> dict[str, Tensor]:
        """The row's terms as `preftune methods xpo` prints them, with other settings."""
        members = [
            {"name": "on_policy", "samples_per_prompt": 1, "passes": 1},
            {"name": "reference", "samples_per_prompt": 1},
        ]
        source = {"name": "pool", "members": members}
        contrast = {"labeller": {"name": "best_worst"}, "objective": "dpo"}
        explore = {"labeller": {"name": "member", "place": 1}, "objective": "nll"}
        terms = [
            {"source": source, "settings": {"beta": beta}} | contrast,
            {"source": source, "weight": weight} | explore,
        ]
        return self.actual(terms=terms)

    def expected(
        self, beta: float = BETA, weight: float = -1e-5, flaw: str | None = None
    ) -> dict[str, Tensor]:
        """Mean of -log sigma(beta margin) over ranked pairs, plus alpha log pi(reference's)."""
        oracle = Oracle(load(self.world.policy), load(self.reference), self.world.end, flaw)
        pairs = []
        for sample, answer in zip(self.samples, self.answers, strict=True):
            ended = answer[1][-1] == self.world.end
            reward = -float(len(answer[1]) - ended)
            if sample["reward"] != reward:
                pair = [ids_of(sample), answer]
                turned = (reward > sample["reward"]) != (flaw == "swapped")
                pairs.append(tuple(pair[::-1] if turned else pair))
        assert len(pairs) == 2
        losses = [
            -logsigmoid(beta * (oracle.log_ratio(chosen) - oracle.log_ratio(rejected)))
            for chosen, rejected in pairs
        ]
        explored = self.answers if flaw != "own_sample_explored" else map(ids_of, self.samples)
        log_probs = mean([oracle.log_prob(oracle.policy, response) for response in explored])
        sign = -1 if flaw == "towards_the_reference" else 1
        count = len(self.samples) if flaw == "tied_pair_counted" else len(pairs)
        loss = torch.stack(losses).sum() / count - sign * weight * log_probs
        return gradient(oracle.policy, loss)


@pytest.mark.parametrize("template", ["none", "auto"])
def test_gradient_of_xpo(worlds: dict[str, World], template: str, tmp_path: Path) -> None:
    pool = Pool(worlds["gpt2-bos"], tmp_path, template)
    ended = [tokens[-1] == pool.world.end for _, tokens in pool.answers]
    assert any(ended) and not all(ended)
    assert_same(pool.actual(), pool.expected())
    assert_same(pool.actual(micro_batch_tokens=24), pool.expected())


@pytest.mark.parametrize("name", ["llama", "llama-tied-bos", "gpt2"])
def test_changed_settings(worlds: dict[str, World], name: str, tmp_path: Path) -> None:
    pool = Pool(worlds[name], tmp_path)
    assert_same(pool.actual(beta=0.37), pool.expected(0.37))
    assert_same(pool.spelled_out(0.37, -0.2), pool.expected(0.37, -0.2))


FLAWS = [
    "swapped",
    "own_sample_explored",
    "towards_the_reference",
    "tied_pair_counted",
    "end_left_out",
]


def test_wrong_oracle_differs(either: World, tmp_path: Path) -> None:
    pool = Pool(either, tmp_path)
    actual = pool.spelled_out(BETA, -0.2)
    assert_same(actual, pool.expected(weight=-0.2))
    for flaw in FLAWS:
        expected = pool.expected(weight=-0.2, flaw=flaw)
        assert largest_difference(actual, expected) > VISIBLE, flaw
