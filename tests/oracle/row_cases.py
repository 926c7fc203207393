"""The remaining rows of the table: settings, wrong versions, and calls of `first_gradient`."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from row_losses import Material, RowOracle
from torch import Tensor
from worlds import PAIRS, PROMPTS, REWARDS, SFT_ROWS, TIED, World, gradient, load, write_rows

from preftune import first_gradient

LABELLED = [
    row | {"label": label} for row, label in zip(SFT_ROWS, [True, False, False, True], strict=True)
]
CONTROLS = {True: "[good]\n", False: "[bad]\n"}
"""Tokenised by itself behind the prompt's ids; neither paper nor contract gives the text."""
ONE_SAMPLE = [[0.2], [1.5], [-2.0]]
SCORE = """
def score(prompts, completions, **columns):
    return [len(c) / 10 - len(p) / 20 for p, c in zip(prompts, completions, strict=True)]
"""


@dataclass(frozen=True)
class Row:
    """What is particular to a row of the table."""

    flaws: tuple[str, ...]
    """Wrong versions of its loss."""
    settings: Mapping[str, float] = field(default_factory=dict)
    """Of the printed row, as far as the oracle needs them."""
    changed: Mapping[str, float] = field(default_factory=dict)
    """A second configuration; the wrong versions are seen under it."""
    rewards: Sequence[Sequence[float]] = ()
    """Of the given samples; none where the row trains on data."""
    rows: Sequence[Mapping] = tuple(PAIRS)
    far: str = "other"
    """The reference where it is not the policy itself."""
    seen_in: str = "gpt2-bos"
    """World of the wrong versions; KTO's need one whose KL estimate is positive."""


ON_PROMPTS = tuple({"prompt": prompt} for prompt in PROMPTS)
DPO = {"beta": 0.1}
ROWS = {
    "binary_feedme": Row(("bad_kept", "dropped_counted", "end_left_out", "prompt_counted")),
    "binary_reward_conditioning": Row(
        ("control_left_out", "controls_swapped", "control_in_front", "prompt_counted")
    ),
    "rwr": Row(
        ("not_clipped", "beta_left_out", "normalised", "mean_over_tokens", "end_left_out"),
        {"beta": 1.0, "max_weight": 20.0},
        {"beta": 0.25},
        REWARDS[2],
        ON_PROMPTS,
    ),
    "offline_rwr": Row(
        ("not_clipped", "beta_left_out", "normalised", "mean_over_tokens"),
        {"beta": 1.0, "max_weight": 20.0},
        {"beta": 0.5, "max_weight": 7.0},
    ),
    "reinforce": Row(
        ("baseline_of_this_round", "kl_left_out", "kl_sign", "mean_over_tokens"),
        {"kl": 0.0},
        {"kl": 0.1},
        ONE_SAMPLE,
        ON_PROMPTS,
    ),
    "rloo": Row(
        ("baseline_includes_itself", "baseline_without_kl", "kl_sign", "mean_over_tokens"),
        {"kl": 0.0},
        {"kl": 0.1},
        REWARDS[3],
        ON_PROMPTS,
    ),
    "ppo": Row(
        (
            "not_whitened",
            "not_centred",
            "unbiased_variance",
            "whitened_a_sample",
            "kl_sign",
            "reward_on_every_token",
            "lambda_one",
            "mean_over_tokens",
            "mean_over_all_tokens",
            "end_left_out",
        ),
        {"kl": 0.05},
        {"kl": 0.3},
        REWARDS[2],
        ON_PROMPTS,
    ),
    "grpo": Row(
        (
            "unbiased_variance",
            "not_scaled",
            "advantage_of_the_round",
            "mean_of_means",
            "summed_over_tokens",
            "k2",
            "kl_sign",
            "end_left_out",
        ),
        rewards=REWARDS[3],
        rows=ON_PROMPTS,
    ),
    "on_policy_ipo": Row(
        ("swapped", "tied_pair_counted", "mean_over_tokens"),
        {"tau": 0.1},
        {"tau": 0.7},
        TIED,
        ON_PROMPTS,
    ),
    "half_and_half": Row(
        ("not_halved", "one_mean", "swapped", "tied_pair_counted"), DPO, {"beta": 0.37}, TIED
    ),
    "auto": Row(
        ("not_halved", "swapped", "tied_pair_counted", "not_steered", "kl_left_out"),
        {"beta": 0.1, "target_kl": 10.0},
        {"beta": 0.37, "target_kl": 0.5},
        TIED,
    ),
    "chosen_vs_own": Row(
        ("swapped", "rejected_of_the_data", "samples_in_given_order", "end_left_out"),
        DPO,
        {"beta": 0.37},
        [[0.0]] * len(PAIRS),
    ),
    "cdpo": Row(
        ("not_smoothed", "robust", "swapped"),
        {"beta": 0.1, "label_smoothing": 0.1},
        {"beta": 0.37, "label_smoothing": 0.3},
    ),
    "robust_dpo": Row(
        ("conservative", "not_rescaled", "swapped"),
        {"beta": 0.1, "label_smoothing": 0.1},
        {"beta": 0.37, "label_smoothing": 0.3},
    ),
    "ln_dpo": Row(("summed", "lengths_without_end", "end_left_out"), {"beta": 2.0}, {"beta": 0.9}),
    "dpo_nll": Row(("summed", "mean_of_means", "rejected_imitated"), DPO, {"beta": 0.37}),
    "dpop": Row(
        ("penalty_left_out", "penalty_on_rejected", "penalty_not_clamped"),
        {"beta": 0.1, "penalty": 5.0},
        {"beta": 0.02},
    ),
    "wpo": Row(
        ("weights_not_stopped", "not_aligned", "weights_summed", "end_left_out"),
        DPO,
        {"beta": 0.37},
    ),
    "chi_po": Row(
        ("not_clipped", "no_chi_square", "no_kl", "end_left_out"),
        {"beta": 0.05, "clip": 10.0},
        {"beta": 8.0},
        far="near",
    ),
    "simpo": Row(
        ("summed", "gamma_added", "gamma_scaled", "end_left_out"),
        {"beta": 2.0, "gamma": 1.0},
        {"beta": 1.3},
    ),
    "orpo": Row(
        ("summed", "probabilities_for_odds", "odds_left_out", "end_left_out"),
        {"odds_weight": 0.1},
    ),
    "cpo": Row(
        ("nll_left_out", "nll_a_token", "mean_over_tokens"),
        {"beta": 0.1, "nll_weight": 1.0},
        {"beta": 0.37},
    ),
    "kto": Row(
        ("mean_a_label", "own_response", "row_before", "kl_not_stopped", "end_left_out"),
        DPO,
        {"beta": 0.03},
        seen_in="llama",
    ),
}


@dataclass
class Case:
    """One call of `first_gradient` and what the oracle needs to answer the same question."""

    world: World
    method: str
    folder: Path
    reference: Path | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    rows: Sequence[Mapping] | None = None
    template: str = "none"
    policy: Path | None = None
    rewards: Sequence[Sequence[float]] = ()

    @property
    def row(self) -> Row:
        return ROWS[self.method]

    @property
    def data(self) -> Sequence[Mapping]:
        return self.row.rows if self.rows is None else self.rows

    @property
    def samples(self) -> list[dict[str, Any]]:
        rewards = self.rewards or self.row.rewards
        if not rewards:
            return []
        prompts = [row["prompt"] for row in PAIRS[: len(rewards)]]
        return self.world.samples(rewards, self.template, prompts)[::-1]

    def full_config(self) -> dict[str, Any]:
        config: dict[str, Any] = {
            "method": self.method,
            "model": str(self.policy or self.world.policy),
            "data": write_rows(self.folder / "data.jsonl", self.data),
            "batch_size": 64,
            "template": self.template,
            "seed": 0,
        }
        if self.row.rewards:
            config |= {"max_new_tokens": 8}
            if len(self.row.rewards[0]) > 1:
                config["samples_per_prompt"] = len(self.row.rewards[0])
            if self.method != "chosen_vs_own":
                config["reward"] = "length:min"
        if self.method == "offline_rwr" and "score_chosen" not in self.data[0]:
            (self.folder / "score.py").write_text(SCORE)
            config["reward"] = f"{self.folder / 'score.py'}:score"
        if self.reference is not None:
            config["reference"] = str(self.reference)
        return config | self.config

    def actual(self, **overrides: Any) -> dict[str, Tensor]:
        samples = copy.deepcopy(self.samples) or None
        return first_gradient(self.full_config() | overrides, samples=samples)

    def material(self) -> Material:
        world, rows, rewards = self.world, [], []
        for row in self.data if self.row.rows is not ON_PROMPTS else ():
            names = [name for name in ("chosen", "rejected", "completion") if name in row]
            labels = [row.get("label", True)] if names == ["completion"] else [True, False]
            finished = [row.get(f"{name}_finished", True) for name in names]
            responses = [
                world.response(row["prompt"], row[name], end, self.template)
                for name, end in zip(names, finished, strict=True)
            ]
            rows.append(list(zip(responses, labels, strict=False)))
            scores: dict[str, Any] = {}
            exec(SCORE, scores)
            texts = [row[name] for name in names]
            of_function = scores["score"]([row["prompt"]] * len(names), texts)
            rewards.append(
                [row.get(f"score_{n}", r) for n, r in zip(names, of_function, strict=True)]
            )
        controls = {label: world.ids(text) for label, text in CONTROLS.items()}
        return Material(rows, rewards, self.samples, controls)

    def oracle(self, flaw: str | None = None) -> RowOracle:
        settings = dict(self.row.settings)
        settings |= {name: value for name, value in self.config.items() if name in settings}
        policy = self.policy or self.world.policy
        oracle = RowOracle(
            load(policy), load(self.reference or policy), self.world.end, flaw, settings=settings
        )
        oracle.beta = settings.get("beta", oracle.beta)
        return oracle

    def expected(
        self, flaw: str | None = None, minibatch: tuple[int, ...] | None = None
    ) -> dict[str, Tensor]:
        oracle = self.oracle(flaw)
        material = replace(self.material(), minibatch=minibatch)
        return gradient(oracle.policy, getattr(oracle, self.method)(material))


def far(world: World, method: str) -> Path:
    return getattr(world, ROWS[method].far)
