"""Methods that must be one another: on the table through the loop, and on a tiny transformer."""

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import tables
import tiny_models as tiny
from preftune import config, train
from preftune import objectives as o
from preftune.huggingface import load_tokenizer
from preftune.labellers import Advantage, Best, BestWorst, Demonstration, RewardWeights, Unlabelled
from preftune.loop import OF_TIME
from preftune.method import Method
from preftune.parts import Parts
from preftune.parts import make_world as world_of
from preftune.preparing import prepare
from preftune.rounds import World, group_terms, refill
from preftune.samples import Samples
from preftune.sources import Offline, OnPolicy
from preftune.terms import Term
from tables import Table, make_world, row_of


def rows(*terms: Term) -> Method:
    return Method(name="x", terms=terms)


def gradient(row: Method, world: World, given: Samples | None = None) -> dict[str, Tensor]:
    """Of one update, by parameter, and the loss."""
    for parameter in world.policy.parameters():
        parameter.grad = None
    loss, _ = tables.gradient(group_terms(row), world, 0, given)
    found = {n: p.grad for n, p in world.policy.named_parameters() if p.grad is not None}
    return {"loss": loss} | {n: g.clone() for n, g in found.items()}


def agree(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 0.0) -> None:
    assert a.keys() == b.keys() and len(a) > 1
    assert max(float(g.abs().max()) for n, g in a.items() if n != "loss") > 1e-3
    for name in a:
        size = max(1.0, float(a[name].abs().max()))
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=tolerance * size)


# --- on the table


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_clipped_policy_gradient_at_ratio_one_is_reinforce(level):
    actor = replace(row_of("ppo", kl=0.0).terms[0], level=level)
    labeller = Advantage(baseline="leave_one_out")
    source = OnPolicy(samples_per_prompt=4)
    clipped = replace(actor, source=source, labeller=labeller, max_ratio=None)
    plain = replace(clipped, objective=o.reinforce, settings={})
    a, b = gradient(rows(clipped), make_world()), gradient(rows(plain), make_world())
    torch.testing.assert_close(a["logits"], b["logits"], rtol=0, atol=1e-15)
    assert a["logits"].abs().max() > 0.01


def test_the_best_of_one_is_imitation_of_the_sample():
    """`check` refuses Best of one sample, so the loop is called with the term itself."""
    source = OnPolicy(samples_per_prompt=1)
    best = Term(source=source, labeller=Best(), objective=o.nll)
    plain = Term(source=source, labeller=Unlabelled(baseline="none"), objective=o.nll)
    agree(gradient(rows(best), make_world()), gradient(rows(plain), make_world()))


def test_the_best_of_equals_is_imitation_of_the_first():
    """As far as the reward sees: where all are alike, the first sample of each prompt."""
    same = make_world(reward=lambda s: torch.ones(s.finished.shape, dtype=torch.float64))
    best = row_of("best_of_n").terms[0]
    first = replace(best, labeller=Demonstration())
    agree(gradient(rows(best), same), gradient(rows(first), same))


def test_reward_weights_at_infinite_temperature_are_imitation_of_all_samples():
    source = OnPolicy(samples_per_prompt=3)
    weighed = Term(source=source, labeller=RewardWeights(beta=math.inf), objective=o.weighted_nll)
    plain = Term(source=source, labeller=Unlabelled(baseline="none"), objective=o.nll)
    agree(gradient(rows(weighed), make_world()), gradient(rows(plain), make_world()))


def test_on_pairs_the_good_ones_are_the_chosen():
    runs = [tables.run(row_of(n), make_world(n), 8) for n in ("binary_feedme", "pref_ft", "sft")]
    first = runs[0][0].world.policy.logits
    assert all(torch.equal(first, state.world.policy.logits) for state, _ in runs)
    assert len({tuple(m["loss"] for m in logged) for _, logged in runs}) == 1


def test_the_best_of_pairs_by_an_agreeing_reward_is_pref_ft():
    """Over a file of pairs; a reward that prefers the rejected imitates those."""
    best = Term(source=Offline(), labeller=Best(), objective=o.nll)
    for sign, responses in ((1.0, [0]), (-1.0, [1])):

        def reward(samples: Samples, sign: float = sign) -> Tensor:
            place = torch.arange(samples.tokens.shape[-2])
            return sign * (place == 0).double().expand(samples.finished.shape)

        kept = Table(rows=tuple((r[responses[0]],) for r in Table().rows))
        agree(
            gradient(rows(best), make_world(reward=reward)),
            gradient(row_of("pref_ft"), make_world("pref_ft", table=kept)),
        )


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("dpo", {"beta": 0.3}),
        ("ipo", {"tau": 0.4}),
        ("cdpo", {"label_smoothing": 0.2}),
        ("reward", {}),
    ],
)
def test_swapping_every_pair_turns_the_sign_of_the_margin(name, settings):
    """The loss of the swapped data, from the margins h of the data as they are."""
    row = row_of(name, **settings)
    swapped = Table(rows=tuple(r[::-1] for r in Table().rows))
    losses, h = [], None
    for table in (Table(), swapped):
        world = make_world(name, table=table, batch_size=6)
        if name == "reward":
            with torch.no_grad():
                world.policy.scores.copy_(tables.logits(3, *world.policy.scores.shape))
            score = world.policy.scores.detach()
        else:
            score = world.policy.logits.log_softmax(-1) - world.reference.logits.log_softmax(-1)
            score = score.detach()
        losses.append(float(gradient(row, world)["loss"]))
        h = [float(score[s, a] - score[s, b]) for s, (a, b) in enumerate(Table().rows)]

    def by_hand(x: float) -> float:
        if name == "ipo":
            return (x - 1 / (2 * 0.4)) ** 2
        beta, e = {"dpo": (0.3, 0.0), "cdpo": (0.1, 0.2), "reward": (1.0, 0.0)}[name]
        return (1 - e) * math.log1p(math.exp(-beta * x)) + e * math.log1p(math.exp(beta * x))

    assert losses[0] == pytest.approx(sum(by_hand(x) for x in h) / 6, abs=1e-12)
    assert losses[1] == pytest.approx(sum(by_hand(-x) for x in h) / 6, abs=1e-12)
    assert abs(losses[0] - losses[1]) > 1e-3


@pytest.mark.parametrize("name", ["hypo", "ppo", "rwr", "half_and_half", "chosen_vs_own", "kto"])
def test_a_method_differs_from_itself_by_nothing(name):
    """Two runs of a seed bit for bit, and another seed's differs."""
    runs = [tables.run(row_of(name), make_world(name, seed=3), 6) for _ in range(2)]
    a, b = (state.world.policy.logits for state, _ in runs)
    assert torch.equal(a, b)
    metrics = [
        [{k: v for k, v in m.items() if not k.startswith(("seconds", *OF_TIME))} for m in logged]
        for _, logged in runs
    ]
    assert metrics[0] == metrics[1]
    other = make_world(name, seed=3)
    state, _ = tables.run(row_of(name), replace(other, seed=4), 6)  # the same tables
    assert not torch.equal(a, state.world.policy.logits)


@pytest.mark.parametrize("name", ["on_policy_dpo", "rwr", "on_policy_best_of_n", "ppo"])
def test_the_order_within_a_pass_changes_nothing_of_its_sum(name):
    """At fixed weights: the gradients of three minibatches of two prompts, in the order of either
    pass, add up to the same."""
    row = row_of(name, prompts_per_round=6, passes=2)
    if name == "on_policy_dpo":  # ties that are dropped would change what a mean is over
        row = replace(row, terms=(replace(row.terms[0], labeller=BestWorst(ties="keep")),))
    world, sums = make_world(name, batch_size=2), []
    groups = group_terms(row)
    for _ in range(2):
        world.policy.logits.grad = None
        taken = []
        for _ in range(3):
            tables.gradient(groups, world, 0)
            taken.append(groups[0].round.minibatches[groups[0].round.taken - 1].tolist())
        sums.append((world.policy.logits.grad.clone(), taken))
    assert sums[0][1] != sums[1][1] and groups[0].round.spent and groups[0].cursor.drawn == 6
    torch.testing.assert_close(sums[0][0], sums[1][0], rtol=0, atol=1e-14)


# --- on a tiny transformer

PAIRS = [
    {"prompt": "Say " + "so " * (n % 4) + f"{n}.", "chosen": f"{n}" * (1 + n % 5),
     "rejected": "I " + "would " * (n % 3) + f"say {n}"}
    for n in range(12)
]  # fmt: skip


@pytest.fixture(scope="module")
def ragged_pairs(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("ragged") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    return str(path)


def parts_of(model: str, data: str, method: str, dtype: str, **more) -> Parts:
    """A GPT-2, which unlike a Llama normalises in its own type: in float64 nothing is rounded more
    than that; the tokenizer is the tiny Llama's."""
    settings = {"model": model, "data": data, "method": method, "dtype": dtype, "batch_size": 8,
                "max_new_tokens": 8, "reward": "length:min", "threads": 1} | more  # fmt: skip
    network = tiny.make(
        "gpt2", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, initializer_range=0.1
    )
    return prepare(
        config.load(settings), model=network, tokenizer=load_tokenizer(model), trains=False
    )


def ragged_round(num_responses: int, prompts: int = 6) -> Samples:
    """Own samples of 1 to 8 tokens to prompts of 1 to 8, with rewards."""
    g = torch.Generator().manual_seed(1)

    def ids(low: int, high: int) -> list[int]:
        size = int(torch.randint(low, high, (1,), generator=g))
        return torch.randint(5, tiny.VOCAB, (size,), generator=g).tolist()

    s = tiny.samples(
        [ids(1, 9) for _ in range(prompts)],
        [[[*ids(0, 8), tiny.END] for _ in range(num_responses)] for _ in range(prompts)],
    )
    reward = torch.randn(prompts, num_responses, generator=g, dtype=torch.float64)
    return replace(s, origin=torch.zeros_like(s.origin), reward=reward)


def given_of(row: Method) -> Samples | None:
    fresh = [t.source.num_responses for t in row.terms if t.source.on_policy]
    return ragged_round(fresh[0]) if fresh else None


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "method", ["dpo", "ppo", "grpo", "kto", "orpo", "dpo_nll", "hypo", "wpo", "binary_feedme"]
)
def test_micro_batches_of_any_size_give_one_gradient(method, dtype, tiny_model, ragged_pairs):
    """One prompt at a time, a few, and all at once, on responses of unequal lengths."""
    parts = parts_of(tiny_model, ragged_pairs, method, dtype)
    if parts.policy.value_head is not None:
        torch.nn.init.normal_(
            parts.policy.value_head.weight, std=0.1, generator=torch.Generator().manual_seed(2)
        )
    world, found = world_of(parts), []
    for budget in (100_000, 40, 1):
        limited = replace(world, micro_batch_tokens=budget)
        found.append(gradient(parts.method, limited, given_of(parts.method)))
    for other in found[1:]:
        agree(found[0], other, 1e-6 if dtype == "float32" else 1e-12)


def test_minibatches_narrower_than_their_round_can_be_trained(tiny_model, ragged_pairs):
    """Advantages a token have the width of the round; a minibatch of short responses is narrower.
    Without micro-batches: the sum over a pass is the gradient of the whole round."""
    parts = parts_of(tiny_model, ragged_pairs, "ppo", "float64", batch_size=1, passes=1)
    world, given = world_of(parts), ragged_round(1)
    (group,) = groups = group_terms(parts.method)
    refill(group, world, 0, given)
    for _ in range(6):
        tables.gradient(groups, world, 0)
    assert group.round.spent
    pieces = {n: p.grad / 6 for n, p in world.policy.named_parameters()}
    whole = gradient(parts.method, replace(world, batch_size=6), given)
    for name, piece in pieces.items():
        torch.testing.assert_close(piece, whole[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("num_responses", [1, 3])
def test_at_ratio_one_ppos_actor_is_reinforce_token_by_token(
    num_responses, tiny_model, ragged_pairs
):
    parts = parts_of(tiny_model, ragged_pairs, "ppo", "float64", kl=0.0)
    actor = replace(parts.method.terms[0], source=OnPolicy(samples_per_prompt=num_responses))
    plain = replace(actor, objective=o.reinforce, settings={}, max_ratio=None)
    world, given = world_of(parts), ragged_round(num_responses)
    found = [gradient(rows(t), world, given) for t in (actor, plain)]
    for each in found:
        del each["loss"]  # of which only the gradient has a meaning
    agree(*({"loss": torch.zeros(())} | f for f in found), 1e-12)


@pytest.mark.parametrize("budget", [1, 60, 100_000])
def test_binary_feedme_on_pairs_is_pref_ft_bit_for_bit(budget, tiny_model, ragged_pairs, tmp_path):
    """Weights and losses of whole runs."""
    runs = []
    for method in ("binary_feedme", "pref_ft"):
        runs.append(train({
            "model": tiny_model, "data": ragged_pairs, "output": str(tmp_path / method),
            "method": method, "batch_size": 5, "max_steps": 4, "learning_rate": 1e-2, "threads": 1,
            "micro_batch_tokens": budget,
        }))  # fmt: skip
    a, b = (load_file(r.folder / "model" / "model.safetensors") for r in runs)
    start = load_file(f"{tiny_model}/model.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert any(not torch.equal(a[k], start[k]) for k in a)
    losses = [[m["loss"] for m in r.metrics] for r in runs]
    assert losses[0] == losses[1] and len(losses[0]) == 4
