"""`first_gradient` of the two papers' main rows against losses written here from the papers.

The expected gradient comes from plain Hugging Face forwards in float64, one prompt with one
response at a time, without padding, packing or dropout (`worlds.py`).

Deliberately wrong oracles must differ from `first_gradient`: the comparison is able to fail.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from losses import Oracle
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from worlds import (
    BETA,
    CUT_PAIRS,
    PAIRS,
    PROMPTS,
    REWARDS,
    SFT_ROWS,
    TIED,
    VISIBLE,
    World,
    assert_same,
    exact_norm,
    gradient,
    largest_difference,
    load,
    most_likely,
    write_rows,
)

from preftune import first_gradient

# --- a case: the configuration beside its expected gradient -------------------------------------


ON_POLICY = {"on_policy_dpo", "on_policy_best_of_n"}
METHODS = ["sft", "pref_ft", "dpo", "ipo", "on_policy_dpo", "on_policy_best_of_n", "hypo"]
"""Rows whose first gradient is a function of data and given samples (best_of_n draws its own)."""


@dataclass
class Case:
    """One call of `first_gradient` and what the oracle needs to answer the same question."""

    world: World
    method: str
    folder: Path
    rows: Sequence[Mapping] | None = None
    rewards: Sequence[Sequence[float]] = field(default_factory=lambda: REWARDS[2])
    reference: Path | None = None
    template: str = "none"
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def samples(self) -> list[dict[str, Any]]:
        if self.method in ON_POLICY or self.method == "hypo":
            return self.world.samples(self.rewards, self.template)
        return []

    @property
    def data(self) -> Sequence[Mapping]:
        if self.rows is not None:
            return self.rows
        if self.method in ON_POLICY:
            return [{"prompt": prompt} for prompt in PROMPTS]
        return SFT_ROWS if self.method == "sft" else PAIRS

    def full_config(self) -> dict[str, Any]:
        config: dict[str, Any] = {
            "method": self.method,
            "model": str(self.world.policy),
            "data": write_rows(self.folder / "data.jsonl", self.data),
            "batch_size": len(self.data),
            "template": self.template,
            "seed": 0,
        }
        if self.method == "ipo":
            config["tau"] = BETA
        if self.method in ON_POLICY:
            config["reward"] = "length:min"
        if self.samples:
            config["max_new_tokens"] = 8
            config["samples_per_prompt"] = len(self.rewards[0])
        if self.reference is not None:
            config["reference"] = str(self.reference)
        return config | self.config

    def actual(self, **overrides: Any) -> dict[str, Tensor]:
        samples = copy.deepcopy(self.samples) or None
        return first_gradient(self.full_config() | overrides, samples=samples)

    def oracle(self, flaw: str | None = None) -> Oracle:
        config = self.full_config()
        settings = {
            name: config[name] for name in ("tau", "label_smoothing", "weight") if name in config
        }
        return Oracle(
            policy=load(self.world.policy),
            reference=load(self.reference or self.world.policy),
            end=self.world.end,
            flaw=flaw,
            beta=config.get("beta", BETA),
            settings=settings,
        )

    def expected(self, flaw: str | None = None) -> dict[str, Tensor]:
        oracle = self.oracle(flaw)
        data: Any = None
        if self.method == "sft":
            data = self.world.completions(self.data, self.template)
        elif self.method not in ON_POLICY:
            data = self.world.pairs(self.data, self.template)
        return gradient(oracle.policy, oracle.loss(self.method, data, self.samples))


# --- every row ----------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", ["own", "other"])
@pytest.mark.parametrize("method", METHODS)
def test_gradient_of_every_row(world: World, method: str, reference: str, tmp_path: Path) -> None:
    """Default settings; a reference with other weights makes signs, beta and KL visible."""
    folder = world.other if reference == "other" else None
    case = Case(world, method, tmp_path, reference=folder)
    assert_same(case.actual(), case.expected())


@pytest.mark.parametrize("method", METHODS)
def test_gradient_in_exact_float64(
    worlds: dict[str, World], method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As above on Llama, whose norm in transformers computes in float32 whatever the weights."""
    monkeypatch.setattr(LlamaRMSNorm, "forward", exact_norm)
    world = worlds["llama"]
    case = Case(world, method, tmp_path, reference=world.other)
    assert_same(case.actual(), case.expected())


@pytest.mark.parametrize("method", METHODS)
def test_gradient_under_the_chat_template(
    worlds: dict[str, World], method: str, tmp_path: Path
) -> None:
    """Plain text becomes one user and one assistant turn; one BOS; the end token is trained."""
    world = worlds["gpt2-bos"]
    case = Case(world, method, tmp_path, reference=world.other, template="auto")
    assert_same(case.actual(), case.expected())


CHANGED = {
    "dpo-beta": ("dpo", {"beta": 0.37}),
    "dpo-smoothing": ("dpo", {"beta": 0.37, "label_smoothing": 0.1}),
    "ipo-tau": ("ipo", {"tau": 0.7}),
    "on_policy_dpo-beta": ("on_policy_dpo", {"beta": 0.37}),
    "hypo-weight": ("hypo", {"weight": 0.5}),
    "hypo-weight-follows-beta": ("hypo", {"beta": 0.37}),
    "hypo-both": ("hypo", {"beta": 0.37, "weight": 0.5}),
}


@pytest.mark.parametrize("name", CHANGED)
def test_changed_settings(either: World, name: str, tmp_path: Path) -> None:
    method, config = CHANGED[name]
    case = Case(either, method, tmp_path, reference=either.other, config=config)
    assert_same(case.actual(), case.expected())


@pytest.mark.parametrize("method", METHODS)
def test_round_smaller_than_the_batch(either: World, method: str, tmp_path: Path) -> None:
    """One short minibatch: the mean is over the items that there are."""
    case = Case(either, method, tmp_path, reference=either.other, config={"batch_size": 16})
    assert_same(case.actual(), case.expected())


@pytest.mark.parametrize("method", METHODS)
def test_micro_batches_change_nothing(either: World, method: str, tmp_path: Path) -> None:
    case = Case(either, method, tmp_path, reference=either.other)
    split = case.actual(micro_batch_tokens=24)
    assert_same(split, case.expected())
    assert_same(split, case.actual())


@pytest.mark.parametrize("share_prefix", [True, False])
@pytest.mark.parametrize("method", ["dpo", "on_policy_dpo", "hypo"])
def test_sharing_the_prompt_changes_nothing(
    worlds: dict[str, World], method: str, share_prefix: bool, tmp_path: Path
) -> None:
    """On GPT-2, whose norms keep float64, so that the order of sums is all that can differ."""
    world = worlds["gpt2-bos"]
    case = Case(
        world, method, tmp_path, reference=world.other, config={"share_prefix": share_prefix}
    )
    assert_same(case.actual(), case.expected())


@pytest.mark.parametrize("method", ["on_policy_dpo", "on_policy_best_of_n", "hypo"])
def test_three_samples_a_prompt(either: World, method: str, tmp_path: Path) -> None:
    """Best against worst leaves the middle one out; the baseline is the mean of two others."""
    config = {"weight": 0.5} if method == "hypo" else {}
    case = Case(either, method, tmp_path, rewards=REWARDS[3], reference=either.other, config=config)
    assert_same(case.actual(), case.expected())


def test_tied_pair_is_left_out_of_the_mean(either: World, tmp_path: Path) -> None:
    case = Case(either, "on_policy_dpo", tmp_path, rewards=TIED, reference=either.other)
    assert_same(case.actual(), case.expected())
    assert_same(case.actual(micro_batch_tokens=24), case.expected())


@pytest.mark.parametrize("template", ["none", "auto"])
@pytest.mark.parametrize("method", ["pref_ft", "dpo", "ipo", "hypo"])
def test_cut_responses_get_no_end_token(
    worlds: dict[str, World], method: str, template: str, tmp_path: Path
) -> None:
    world = worlds["gpt2-bos"]
    case = Case(world, method, tmp_path, rows=CUT_PAIRS, reference=world.other, template=template)
    assert_same(case.actual(), case.expected())


def test_hypo_ignores_rewards(either: World, tmp_path: Path) -> None:
    """Its on-policy samples carry no label: any reward gives the same gradient."""
    case = Case(either, "hypo", tmp_path, reference=either.other, config={"weight": 0.5})
    turned = Case(
        either,
        "hypo",
        tmp_path,
        reference=either.other,
        config={"weight": 0.5},
        rewards=[[-reward for reward in group] for group in REWARDS[2]],
    )
    assert_same(turned.actual(), case.expected())


def test_model_given_as_an_object(either: World, tmp_path: Path) -> None:
    """It replaces the folder's weights, is its own reference, and keeps its values."""
    case = Case(either, "dpo", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(either.other)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    actual = first_gradient(case.full_config(), model=model)
    for name, value in model.named_parameters():
        assert torch.equal(value.detach().to(before[name].dtype), before[name]), name
    policy = load(either.other)
    oracle = Oracle(policy, load(either.other), either.end)
    assert_same(actual, gradient(policy, oracle.dpo(either.pairs(PAIRS))))


# --- best_of_n draws from the reference ---------------------------------------------------------


def best_of_n_config(world: World, folder: Path, **config: Any) -> dict[str, Any]:
    return {
        "method": "best_of_n",
        "model": str(world.policy),
        "data": write_rows(folder / "prompts.jsonl", ({"prompt": prompt} for prompt in PROMPTS)),
        "reward": "length:min",
        "batch_size": len(PROMPTS),
        "samples_per_prompt": 3,
        "max_new_tokens": 5,
        "temperature": 1.0,
        "template": "none",
        "seed": 0,
    } | config


def test_best_of_n_moves_every_parameter(world: World, tmp_path: Path) -> None:
    config = best_of_n_config(world, tmp_path)
    actual = first_gradient(config)
    assert set(actual) == {name for name, _ in load(world.policy).named_parameters()}
    for name, value in actual.items():
        assert value.dtype == torch.float64, name
        assert torch.isfinite(value).all(), name
        assert value.abs().max() > 0, name
    assert largest_difference(first_gradient(config), actual) == 0.0


def test_best_of_n_trains_on_samples_of_the_reference(
    worlds: dict[str, World], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reference whose next token is certain leaves nothing to chance: its greedy responses.

    One of them ends by itself and its end token is trained; the others are cut and get none.
    """
    monkeypatch.setattr(LlamaRMSNorm, "forward", exact_norm)  # its own computes in float32
    world = worlds["llama"]
    certain = AutoModelForCausalLM.from_pretrained(world.other)
    head = certain.lm_head.weight
    with torch.no_grad():
        head.mul_(1000)
        prompt = world.prompt_ids(PROMPTS[1])
        prompt = prompt + most_likely(certain, prompt, world.end, 1, certain=True)
        hidden = certain.model(input_ids=torch.tensor([prompt])).last_hidden_state[0, -1]
        head[world.end] = hidden / hidden.norm() * 1.5 * head.norm(dim=-1).max()
    certain.save_pretrained(tmp_path / "certain")
    responses = [
        (ids, most_likely(certain, ids, world.end, 5, certain=True))
        for ids in map(world.prompt_ids, PROMPTS)
    ]
    ended = [tokens[-1] == world.end for _, tokens in responses]
    assert any(ended) and not all(ended)

    config = best_of_n_config(world, tmp_path, reference=str(tmp_path / "certain"))
    policy = load(world.policy)
    oracle = Oracle(policy, policy, world.end)
    assert_same(first_gradient(config), gradient(policy, oracle.nll(responses)))


# --- the comparison is able to fail -------------------------------------------------------------


FLAWS = {
    "end_left_out": METHODS,
    "first_token_left_out": METHODS,
    "unshifted": METHODS,
    "mean_over_tokens": METHODS,
    # in a difference of log-ratios of one prompt, the prompt cancels
    "prompt_counted": ["sft", "pref_ft", "on_policy_best_of_n"],
    "swapped": ["pref_ft", "dpo", "ipo", "on_policy_dpo", "on_policy_best_of_n", "hypo"],
    "tied_pair_counted": ["on_policy_dpo"],
    "baseline_includes_itself": ["hypo"],
    "no_baseline": ["hypo"],
    "gradient_not_stopped": ["hypo"],
}


@pytest.fixture(scope="module")
def actual_of() -> dict[tuple[Path, str, bool], dict[str, Tensor]]:
    """Gradients that several flaws are compared with, by policy, row and whether a pair is tied."""
    return {}


@pytest.mark.parametrize(
    ("flaw", "method"), [(flaw, method) for flaw, methods in FLAWS.items() for method in methods]
)
def test_wrong_oracle_differs(
    either: World,
    flaw: str,
    method: str,
    tmp_path: Path,
    actual_of: dict[tuple[Path, str, bool], dict[str, Tensor]],
) -> None:
    tied = flaw == "tied_pair_counted"
    rewards = TIED if tied else REWARDS[3]
    case = Case(either, method, tmp_path, rewards=rewards, reference=either.other)
    key = (either.policy, method, tied)
    if key not in actual_of:
        actual_of[key] = case.actual()
    assert largest_difference(actual_of[key], case.expected(flaw)) > VISIBLE


# --- the oracle itself --------------------------------------------------------------------------


def finite_difference(
    case: Case, loss: Callable[[Oracle], Tensor], direction: dict[str, Tensor], step: float
) -> float:
    values = []
    for sign in (1, -1):
        oracle = case.oracle()
        oracle.policy = copy.deepcopy(oracle.policy)
        with torch.no_grad():
            for name, parameter in oracle.policy.named_parameters():
                parameter.add_(sign * step * direction[name])
            values.append(float(loss(oracle)))
    return (values[0] - values[1]) / (2 * step)


@pytest.mark.parametrize("method", ["sft", "pref_ft", "dpo", "ipo", "on_policy_dpo"])
def test_oracle_agrees_with_finite_differences(
    worlds: dict[str, World], method: str, tmp_path: Path
) -> None:
    world = worlds["gpt2"]
    case = Case(world, method, tmp_path, reference=world.other)
    data = world.completions(SFT_ROWS) if method == "sft" else world.pairs(PAIRS)
    expected = case.expected()
    generator = torch.Generator().manual_seed(3)
    direction = {
        name: torch.randn(value.shape, generator=generator, dtype=value.dtype)
        for name, value in expected.items()
    }
    slope = sum(float((expected[name] * direction[name]).sum()) for name in expected)
    measured = finite_difference(
        case, lambda oracle: oracle.loss(method, data, case.samples), direction, 1e-5
    )
    assert measured == pytest.approx(slope, rel=1e-5)


def test_oracle_log_prob_is_that_of_the_labels_loss(worlds: dict[str, World]) -> None:
    """transformers' own shifted cross-entropy over the response, times its tokens."""
    world = worlds["llama"]
    model = load(world.policy)
    prompt, tokens = world.response(PAIRS[0]["prompt"], PAIRS[0]["chosen"])
    labels = torch.tensor([[-100] * len(prompt) + tokens])
    with torch.no_grad():
        loss = model(input_ids=torch.tensor([prompt + tokens]), labels=labels).loss
        log_prob = Oracle(model, model, world.end).log_prob(model, (prompt, tokens))
    assert float(-loss * len(tokens)) == pytest.approx(float(log_prob), rel=1e-6)


def test_rows_are_ragged_and_split_at_the_boundary(worlds: dict[str, World]) -> None:
    """No token spans prompt and response, and the saved tokenizer agrees with the expected ids."""
    for world in worlds.values():
        saved = PreTrainedTokenizerFast.from_pretrained(world.policy)
        lengths = set()
        for row in PAIRS:
            for name in ("chosen", "rejected"):
                prompt, tokens = world.response(row["prompt"], row[name])
                assert saved(row["prompt"] + row[name]).input_ids == [*prompt, *tokens[:-1]]
                assert len(prompt) + len(tokens) <= 24
                lengths.add((len(prompt), len(tokens)))
        assert len(lengths) == 2 * len(PAIRS)
        if not world.with_bos:
            continue
        assert saved.pad_token_id == saved.eos_token_id
        prompt, tokens = world.response("say hello", " hello", template="auto")
        turns = [
            {"role": "user", "content": "say hello"},
            {"role": "assistant", "content": " hello"},
        ]
        text = saved.apply_chat_template(turns, tokenize=False)
        assert saved(text, add_special_tokens=False).input_ids == prompt + tokens
