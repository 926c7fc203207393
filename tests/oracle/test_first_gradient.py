"""`first_gradient` of every row against losses written here from the papers.

The expected gradient comes from plain Hugging Face forwards in float64, one prompt with one
response at a time, without padding, packing or dropout. Two architectures (Llama with grouped-query
attention and rotary positions, GPT-2 with absolute positions and a dropout of 0.1 in its
configuration) meet two byte-level tokenizers: one without BOS and pad token, one that adds BOS, has
a chat template and uses the end token as its pad token.

Deliberately wrong oracles must differ from `first_gradient`: the comparison is able to fail.
"""

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from preftune import first_gradient

TOLERANCE = 1e-8
"""Largest allowed difference in any element of any parameter's gradient."""
VISIBLE = 1e-6
"""A wrong oracle must differ by more than this in some element."""
BETA = 0.1
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PAIRS: list[dict[str, Any]] = [
    {
        "prompt": "name a quiet place",
        "chosen": " the old bridge near the sea",
        "rejected": " the sea",
    },
    {"prompt": "say hello", "chosen": " hello", "rejected": " the tall captain sleeps near a fox"},
    {
        "prompt": "why do small birds sing over the old sea",
        "chosen": " a red fox runs over the bridge",
        "rejected": " the captain and the small red birds sing a quiet name",
    },
    {"prompt": "why", "chosen": " small birds sing and", "rejected": " the fox sleeps"},
]
CUT_PAIRS = [
    PAIRS[0] | {"chosen_finished": False, "rejected_finished": True},
    PAIRS[1] | {"chosen_finished": True, "rejected_finished": False},
    PAIRS[2] | {"chosen_finished": False, "rejected_finished": False},
    PAIRS[3] | {"chosen_finished": True, "rejected_finished": True},
]
SFT_ROWS = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS]
PROMPTS = [row["prompt"] for row in PAIRS[:3]]
REWARDS = {2: [[0.2, 0.9], [1.5, -0.5], [-2.0, -1.0]]} | {
    3: [[0.2, 0.9, 0.5], [1.5, -0.5, 1.0], [-2.0, -1.0, -3.0]]
}
TIED = [[0.2, 0.9, 0.5], [1.5, 1.5, 1.5], [-2.0, -1.0, -3.0]]

Ids = list[int]
Response = tuple[Ids, Ids]
"""Token ids of a prompt and of one response to it."""
Pair = tuple[Response, Response]
"""Chosen and rejected response."""


# --- models, tokenizers, data -------------------------------------------------------------------


def train_tokenizer(special_tokens: list[str]) -> Tokenizer:
    """A byte-level BPE that knows each word of the rows, with its leading space, as one token."""
    texts = [text for row in PAIRS for text in (row["prompt"] + row["chosen"] + row["rejected"],)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts * 4, trainer)
    return tokenizer


def build_tokenizer(with_bos: bool) -> tuple[Tokenizer, PreTrainedTokenizerFast]:
    """The raw tokenizer (for the expected ids) and what is saved beside the model."""
    if not with_bos:
        raw = train_tokenizer(["<|end|>"])
        return raw, PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>")
    raw = train_tokenizer(["<s>", "<|end|>", "<|user|>", "<|assistant|>"])
    with_post_processor = Tokenizer.from_str(raw.to_str())
    with_post_processor.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", raw.token_to_id("<s>"))]
    )
    saved = PreTrainedTokenizerFast(
        tokenizer_object=with_post_processor,
        bos_token="<s>",
        eos_token="<|end|>",
        pad_token="<|end|>",
        chat_template=CHAT_TEMPLATE,
    )
    return raw, saved


def build_model(architecture: str, raw: Tokenizer, tied: bool, seed: int) -> torch.nn.Module:
    """Two random layers; biases and norms are moved from their defaults too."""
    torch.manual_seed(seed)
    special = {
        "bos_token_id": raw.token_to_id("<s>"),
        "eos_token_id": raw.token_to_id("<|end|>"),
        "tie_word_embeddings": tied,
    }
    if architecture == "llama":
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=raw.get_vocab_size(),
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=128,
                initializer_range=0.2,
                **special,
            )
        )
    else:
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=raw.get_vocab_size(),
                n_embd=32,
                n_layer=2,
                n_head=4,
                n_positions=128,
                initializer_range=0.2,
                **special,
            )
        )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@dataclass(frozen=True)
class World:
    """One architecture with one tokenizer: a policy folder and another one for the reference."""

    architecture: str
    raw: Tokenizer
    policy: Path
    other: Path
    with_bos: bool

    def ids(self, text: str) -> Ids:
        return self.raw.encode(text, add_special_tokens=False).ids

    def token(self, text: str) -> int:
        return self.raw.token_to_id(text)

    @property
    def end(self) -> int:
        return self.token("<|end|>")

    def prompt_ids(self, prompt: str, template: str = "none") -> Ids:
        bos = [self.token("<s>")] if self.with_bos else []
        if template == "none":
            return bos + self.ids(prompt)
        return [*bos, self.token("<|user|>"), *self.ids(prompt), self.token("<|assistant|>")]

    def response(
        self, prompt: str, response: str, finished: bool = True, template: str = "none"
    ) -> Response:
        end = [self.end] if finished else []
        return self.prompt_ids(prompt, template), self.ids(response) + end

    def completions(self, rows: Sequence[Mapping], template: str = "none") -> list[Response]:
        return [self.response(row["prompt"], row["completion"], template=template) for row in rows]

    def pairs(self, rows: Sequence[Mapping], template: str = "none") -> list[Pair]:
        def role(row: Mapping, name: str) -> Response:
            return self.response(
                row["prompt"], row[name], row.get(f"{name}_finished", True), template
            )

        return [(role(row, "chosen"), role(row, "rejected")) for row in rows]

    def samples(
        self, rewards: Sequence[Sequence[float]], template: str = "none"
    ) -> list[dict[str, Any]]:
        """Random responses of unequal length, the prompts interleaved; the very last is cut.

        The ids need not be what the tokenizer would make of their text, so a round trip through
        text would show.
        """
        generator = torch.Generator().manual_seed(11)
        special = 4 if self.with_bos else 1
        samples: list[dict[str, Any]] = []
        for k in range(len(rewards[0])):
            for n, prompt in enumerate(PROMPTS):
                length = int(torch.randint(1, 7, (), generator=generator))
                tokens = torch.randint(
                    special, self.raw.get_vocab_size(), (length,), generator=generator
                ).tolist()
                samples.append(
                    {
                        "prompt_ids": self.prompt_ids(prompt, template),
                        "response_ids": [*tokens, self.end],
                        "reward": rewards[n][k],
                    }
                )
        samples[-1]["response_ids"].pop()
        return samples


WORLDS = {
    "llama": ("llama", False, False),
    "llama-tied-bos": ("llama", True, True),
    "gpt2": ("gpt2", True, False),
    "gpt2-bos": ("gpt2", True, True),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small only lose time to a second thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, World]:
    built = {}
    for number, (name, (architecture, tied, with_bos)) in enumerate(WORLDS.items()):
        raw, saved = build_tokenizer(with_bos)
        folder = tmp_path_factory.mktemp(name)
        for role, seed in (("policy", 2 * number), ("other", 2 * number + 1)):
            build_model(architecture, raw, tied, seed).save_pretrained(folder / role)
            saved.save_pretrained(folder / role)
        built[name] = World(architecture, raw, folder / "policy", folder / "other", with_bos)
    return built


@pytest.fixture(params=list(WORLDS))
def world(request: pytest.FixtureRequest, worlds: dict[str, World]) -> World:
    return worlds[request.param]


@pytest.fixture(params=["llama", "gpt2-bos"])
def either(request: pytest.FixtureRequest, worlds: dict[str, World]) -> World:
    """One world of each architecture, where all four would only cost time."""
    return worlds[request.param]


@cache
def load(folder: Path) -> torch.nn.Module:
    """The float32 values of the folder in float64, dropout off; shared, so never changed."""
    return AutoModelForCausalLM.from_pretrained(folder).double().eval()


# --- the oracle: log-probs and losses -----------------------------------------------------------


@dataclass
class Oracle:
    """Policy, reference and, for the tests that must fail, one deliberate flaw."""

    policy: torch.nn.Module
    reference: torch.nn.Module
    end: int
    flaw: str | None = None
    beta: float = BETA
    settings: dict[str, float] = field(default_factory=dict)

    def log_prob(self, model: torch.nn.Module, response: Response) -> Tensor:
        """log pi(y | x): sum over the response's tokens, each predicted by the position before."""
        prompt, tokens = response
        if self.flaw == "end_left_out" and tokens[-1] == self.end:
            tokens = tokens[:-1]
        ids = torch.tensor(prompt + tokens)
        all_log_probs = model(input_ids=ids[None]).logits[0].log_softmax(dim=-1)
        first = len(prompt)
        if self.flaw == "prompt_counted":
            first = 1
        if self.flaw == "first_token_left_out":
            first = len(prompt) + 1
        if self.flaw == "unshifted":
            return all_log_probs[torch.arange(first, len(ids)), ids[first:]].sum()
        of_tokens = all_log_probs[torch.arange(first - 1, len(ids) - 1), ids[first:]]
        return of_tokens.mean() if self.flaw == "mean_over_tokens" else of_tokens.sum()

    def log_ratio(self, response: Response) -> Tensor:
        with torch.no_grad():
            of_reference = self.log_prob(self.reference, response)
        return self.log_prob(self.policy, response) - of_reference

    def margin(self, pair: Pair) -> Tensor:
        chosen, rejected = pair[::-1] if self.flaw == "swapped" else pair
        return self.log_ratio(chosen) - self.log_ratio(rejected)

    def nll(self, responses: Sequence[Response]) -> Tensor:
        return mean([-self.log_prob(self.policy, response) for response in responses])

    def dpo(self, pairs: Sequence[Pair], count: int | None = None) -> Tensor:
        smoothing = self.settings.get("label_smoothing", 0.0)
        losses = []
        for pair in pairs:
            h = self.beta * self.margin(pair)
            losses.append(-(1 - smoothing) * logsigmoid(h) - smoothing * logsigmoid(-h))
        return torch.stack(losses).sum() / (count or len(pairs))

    def ipo(self, pairs: Sequence[Pair]) -> Tensor:
        target = 1 / (2 * self.settings["tau"])
        return mean([(self.margin(pair) - target) ** 2 for pair in pairs])

    def reverse_kl(self, groups: Sequence[Sequence[Response]]) -> Tensor:
        """Score-function gradient of KL(policy || reference), leave-one-out baseline."""
        of_prompts = []
        for group in groups:
            ratios = [self.log_ratio(response) for response in group]
            if self.flaw != "gradient_not_stopped":
                ratios = [ratio.detach() for ratio in ratios]
            terms = []
            for j, response in enumerate(group):
                others = [ratio for i, ratio in enumerate(ratios) if i != j]
                baseline = mean(ratios if self.flaw == "baseline_includes_itself" else others)
                if self.flaw == "no_baseline":
                    baseline = torch.zeros(())
                terms.append((ratios[j] - baseline) * self.log_prob(self.policy, response))
            of_prompts.append(mean(terms))
        return mean(of_prompts)

    def rank(self, samples: Sequence[Mapping]) -> list[Pair]:
        """Best against worst of each prompt; a prompt whose rewards are all equal has no pair."""
        pairs = []
        for group in grouped(samples):
            best = max(group, key=lambda sample: sample["reward"])
            worst = min(group, key=lambda sample: sample["reward"])
            if best["reward"] > worst["reward"]:
                pairs.append((ids_of(best), ids_of(worst)))
        return pairs

    def loss(self, method: str, data: Any, samples: Sequence[Mapping]) -> Tensor:
        """The loss of one row; `data` are responses (sft), pairs, or unused (on-policy rows)."""
        if method == "sft":
            return self.nll(data)
        if method == "pref_ft":
            return self.nll([pair[self.flaw == "swapped"] for pair in data])
        if method == "dpo":
            return self.dpo(data)
        if method == "ipo":
            return self.ipo(data)
        if method == "on_policy_dpo":
            pairs = self.rank(samples)
            wrong_count = len(grouped(samples)) if self.flaw == "tied_pair_counted" else None
            return self.dpo(pairs, wrong_count)
        if method == "on_policy_best_of_n":
            pick = min if self.flaw == "swapped" else max
            groups = grouped(samples)
            return self.nll([ids_of(pick(g, key=lambda s: s["reward"])) for g in groups])
        assert method == "hypo"
        weight = self.settings.get("weight", 0.05 * self.beta)
        groups = [[ids_of(sample) for sample in group] for group in grouped(samples)]
        return self.dpo(data) + weight * self.reverse_kl(groups)


def mean(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(values)).mean()


def ids_of(sample: Mapping) -> Response:
    return sample["prompt_ids"], sample["response_ids"]


def grouped(samples: Sequence[Mapping]) -> list[list[Mapping]]:
    """Samples of equal prompts together, prompts in the order of their first appearance."""
    groups: dict[tuple[int, ...], list[Mapping]] = {}
    for sample in samples:
        groups.setdefault(tuple(sample["prompt_ids"]), []).append(sample)
    return list(groups.values())


def gradient(policy: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*policy.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


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
        path = self.folder / "data.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in self.data))
        config: dict[str, Any] = {
            "method": self.method,
            "model": str(self.world.policy),
            "data": str(path),
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


def largest_difference(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    return max(float((actual[name] - expected[name]).abs().max()) for name in expected)


def assert_same(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert set(actual) == set(expected)
    for name, value in expected.items():
        assert actual[name].dtype == torch.float64, name
        assert actual[name].shape == value.shape, name
        assert torch.isfinite(actual[name]).all(), name
    differences = {
        name: float((actual[name] - value).abs().max()) for name, value in expected.items()
    }
    worst = max(differences, key=differences.__getitem__)
    largest = max(float(value.abs().max()) for value in expected.values())
    assert largest > 1e-3, f"the expected gradient is all but zero: {largest:.3g}"
    assert differences[worst] <= TOLERANCE, (
        f"{worst} differs by {differences[worst]:.3g}; largest expected element {largest:.3g}"
    )


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
    """As above on Llama, whose norm in transformers computes in float32 whatever the weights are.

    With the norm in float64 on both sides nothing is left but the loss: a difference here is never
    rounding.
    """

    def forward(self: LlamaRMSNorm, hidden_states: Tensor) -> Tensor:
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        return self.weight * (hidden_states * torch.rsqrt(variance + self.variance_epsilon))

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)
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
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    return {
        "method": "best_of_n",
        "model": str(world.policy),
        "data": str(path),
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
    worlds: dict[str, World], tmp_path: Path
) -> None:
    """A reference whose next token is certain leaves nothing to chance: its greedy responses.

    One of them ends by itself and its end token is trained; the others are cut and get none.
    """
    world = worlds["llama"]
    certain = AutoModelForCausalLM.from_pretrained(world.other)
    head = certain.lm_head.weight
    with torch.no_grad():
        head.mul_(1000)
        prompt = world.prompt_ids(PROMPTS[1])
        prompt = prompt + greedy(certain, prompt, world.end, 1)
        hidden = certain.model(input_ids=torch.tensor([prompt])).last_hidden_state[0, -1]
        head[world.end] = hidden / hidden.norm() * 1.5 * head.norm(dim=-1).max()
    certain.save_pretrained(tmp_path / "certain")
    responses = [
        (ids, greedy(certain, ids, world.end, 5)) for ids in map(world.prompt_ids, PROMPTS)
    ]
    ended = [tokens[-1] == world.end for _, tokens in responses]
    assert any(ended) and not all(ended)

    config = best_of_n_config(world, tmp_path, reference=str(tmp_path / "certain"))
    policy = load(world.policy)
    oracle = Oracle(policy, policy, world.end)
    assert_same(first_gradient(config), gradient(policy, oracle.nll(responses)))


def greedy(model: torch.nn.Module, prompt: Ids, end: int, limit: int) -> Ids:
    """The most likely continuation; it must be all but certain at each token."""
    tokens: Ids = []
    with torch.no_grad():
        while len(tokens) < limit and (not tokens or tokens[-1] != end):
            logits = model(input_ids=torch.tensor([prompt + tokens])).logits[0, -1]
            log_probs = logits.log_softmax(dim=-1)
            assert log_probs.max() > -1e-9
            tokens.append(int(log_probs.argmax()))
    return tokens


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
