"""Trees of responses and the nets behind them: exact figures, oracles, runs that stay apart."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from preftune.numerics import normal, sample_index, stream_keys, uniform
from preftune.policies.base import Policy
from preftune.policies.categorical import Categorical
from preftune.policies.nets import LogLinear, Mlp, Net, Table
from preftune.policies.tree import Tree, all_responses, context_features
from preftune.sampling.decoding import Uniform

S, V, DEPTH = 2, 3, 3
NODES = 13  # 1 + 3 + 9
STREAM = torch.arange(1000, 1003)


def keys(runs: int) -> Tensor:
    return stream_keys(range(runs), "tests", "tree")


def draws(keys: Tensor, n: int, k: int) -> Uniform:
    """The draw of a response depends on its run, prompt, number and token alone."""
    rows, columns = torch.arange(n)[:, None], torch.arange(k)
    return lambda t, shape: uniform(keys[..., None, None], STREAM[t], rows, columns).expand(shape)


def table(*shape: int) -> Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def on(states: Tensor) -> tuple[Tensor, Tensor]:
    prompt = states.unsqueeze(-1)
    return prompt, torch.ones_like(prompt, dtype=torch.bool)


def number(state: int, prefix: list[int]) -> int:
    """The context of a prefix, counted out: all shorter ones stand before it."""
    place = sum(V**t for t in range(len(prefix)))
    return state * NODES + place + sum(a * V**i for i, a in enumerate(reversed(prefix)))


class Watched:
    """A net that says whether all its contexts were computed."""

    def __init__(self, net: Net) -> None:
        self.net, self.batch_shape = net, net.batch_shape
        self.num_contexts, self.vocab = net.num_contexts, net.vocab
        self.tensors, self.copy, self.spare = net.tensors, net.copy, 1
        self.asked: list[int | None] = []

    def logits(self, contexts: Tensor | None = None) -> Tensor:
        self.asked.append(None if contexts is None else contexts.shape[-1])
        return self.net.logits(contexts)


# Nets


def oracle(net: Mlp, run: int) -> tuple[nn.Sequential, dict[str, Tensor]]:
    """One run's network of torch's layers and true widths; its weights by the names of `Mlp`."""
    layers: list[nn.Module] = []
    named: dict[str, Tensor] = {}
    for i, (into, out) in enumerate(zip(net.widths[:-1], net.widths[1:], strict=True)):
        layers.append(linear := nn.Linear(into, out, dtype=torch.float64))
        named |= {f"weight_{i}": linear.weight, f"bias_{i}": linear.bias}
        if i == 0 and net.norm_first:
            layers.append(norm := nn.LayerNorm(out, dtype=torch.float64))
            named |= {"norm_weight": norm.weight, "norm_bias": norm.bias}
        if i < len(net.widths) - 2:
            layers.append(nn.ReLU() if net.activation == "relu" else nn.Tanh())
    for name, p in named.items():
        p.data.copy_(true_part(net.weights[name][run], p))
    return nn.Sequential(*layers), named


def true_part(x: Tensor, p: Tensor) -> Tensor:
    """Of a padded tensor of one run, what stands in p, as torch lays it out."""
    return x[: p.shape[1], : p.shape[0]].T if p.ndim == 2 else x[: len(p)]


def padding(net: Mlp) -> dict[str, Tensor]:
    """True where a weight is none of the network's."""
    outside = {n: torch.ones_like(w, dtype=torch.bool) for n, w in net.weights.items()}
    for run in range(len(net.weights["bias_0"])):
        for name, p in oracle(net, run)[1].items():
            true_part(outside[name][run], p).fill_(False)
    return outside


def randomised(net: Mlp) -> Mlp:
    """Its true weights moved, the biases and the norm's too, so that each of them counts."""
    g = torch.Generator().manual_seed(1)
    for name, outside in padding(net).items():
        w = net.weights[name].data
        w += torch.where(outside, 0, 0.3 * torch.randn(w.shape, generator=g, dtype=w.dtype))
    return net


MLPS = {
    "relu and norm": ((50, 20), "relu", True, False),
    "tanh": ((18, 16), "tanh", False, True),
    "one layer": ((), "relu", False, False),
}


def mlp(name: str, runs: int = 3) -> Mlp:
    hidden, activation, norm_first, per_run = MLPS[name]
    return randomised(
        Mlp(
            table(runs, 9, 7) if per_run else table(9, 7), keys(runs), 6, hidden,
            activation=activation, norm_first=norm_first, gain=1.0, offset=table(6),
            dtype=torch.float64,
        )
    )  # fmt: skip


@pytest.mark.parametrize("some", [False, True])
@pytest.mark.parametrize("name", MLPS)
def test_a_network_is_the_plain_one_of_each_run(name: str, some: bool) -> None:
    net = mlp(name)
    contexts = torch.tensor([[4, 0, 4], [8, 1, 2], [3, 3, 3]]) if some else None
    logits = net.logits(contexts)
    weight = table(*logits.shape)
    (logits * weight).sum().backward()
    outside = padding(net)
    for run in range(3):
        stack, named = oracle(net, run)
        features = net.features[run] if net.features.ndim == 3 else net.features
        x = features[:, :7] if contexts is None else features[contexts[run], :7]
        expected = stack(x) + table(6)
        torch.testing.assert_close(logits[run], expected, rtol=0, atol=1e-10)
        (expected * weight[run]).sum().backward()
        assert named.keys() == net.weights.keys()
        assert net.num_weights == sum(p.numel() for p in named.values())
        for n, p in named.items():
            grad = net.weights[n].grad
            assert grad is not None and p.grad is not None and p.grad.any()
            torch.testing.assert_close(true_part(grad[run], p), p.grad, rtol=0, atol=1e-10)
            assert not grad[outside[n]].any()


@pytest.mark.parametrize("name", MLPS)
def test_padding_stays_zero(name: str) -> None:
    net = mlp(name)
    outside, before = padding(net), {n: w.detach().clone() for n, w in net.tensors()}
    optimizer = torch.optim.Adam([w for _, w in net.tensors()], lr=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        (net.logits().log_softmax(-1) * table(3, 9, 6)).sum().backward()
        optimizer.step()
    assert sum(int(o.sum()) for o in outside.values()) > 0
    for n, w in net.tensors():
        assert not w[outside[n]].any()
        assert (w != before[n])[~outside[n]].float().mean() > 0.8  # all but dead units


def test_the_network_of_the_paper() -> None:
    net, seen = bandit_net(keys(3)), []
    assert net.weights["weight_0"].shape == (3, 112, 64)  # multiples of 16
    assert net.num_weights == 109_698
    assert sum(p.numel() for p in oracle(net, 0)[0].parameters()) == 109_698
    for i, (into, out) in enumerate(((100, 50), (50, 256), (256, 256), (256, 100))):
        scaled = net.weights[f"weight_{i}"][:, :into, :out] / (0.01 * (6 / (into + out)) ** 0.5)
        torch.testing.assert_close(scaled.amax((1, 2)), torch.ones(3), rtol=0, atol=0.01)
        torch.testing.assert_close(scaled.amin((1, 2)), -torch.ones(3), rtol=0, atol=0.01)
        torch.testing.assert_close(scaled.mean((1, 2)), torch.zeros(3), rtol=0, atol=0.05)
        assert not net.weights[f"bias_{i}"].any()
        seen.append(scaled.flatten())
    drawn = torch.cat(seen)
    assert len(drawn.unique()) > 0.9 * len(drawn)  # layers, places and runs differ
    assert net.weights["norm_weight"].sum() == 3 * 50 and not net.weights["norm_bias"].any()


@pytest.mark.parametrize("per_run", [False, True])
def test_log_linear_logits(per_run: bool) -> None:
    features, start, offset = table(2, 4, 6, 5), table(2, 5), table(6)
    given = features if per_run else features[0]
    net = LogLinear(given, start=start, offset=offset, per_run=per_run)
    assert (net.batch_shape, net.num_contexts, net.vocab) == ((2,), 4, 6)
    contexts = torch.tensor([[3, 0, 3], [1, 1, 2]])
    for run in range(2):
        expected = offset + features[run if per_run else 0] @ start[run]
        torch.testing.assert_close(net.logits()[run], expected)
        torch.testing.assert_close(net.logits(contexts)[run], expected[contexts[run]])
    net.logits()[0].sum().backward()
    grad = net.weights["theta"].grad
    assert grad is not None and not grad[1].any()
    torch.testing.assert_close(grad[0], features[0].sum((0, 1)))


def test_log_linear_starts_at_its_offset() -> None:
    for net in (
        LogLinear(table(6, 5), runs=3, offset=table(6)),
        LogLinear(table(3, 6, 5), per_run=True, offset=table(6)),
    ):
        assert (net.batch_shape, net.num_contexts) == ((3,), 1)
        assert torch.equal(net.logits(), table(6).expand(3, 1, 6))
    assert LogLinear(table(6, 5)).logits().shape == (1, 6)


# Trees


def test_contexts_are_numbered_once_each() -> None:
    tree = Tree(Table(table(S * NODES, V)), S, DEPTH)
    tokens = all_responses(V, DEPTH).expand(S, -1, -1)
    found = tree.context_index(torch.arange(S)[:, None], tokens)
    seen: dict[tuple[int, ...], int] = {}
    for s in range(S):
        for k, response in enumerate(tokens[s].tolist()):
            for t in range(DEPTH):
                assert found[s, k, t] == number(s, response[:t])
                seen[(s, *response[:t])] = int(found[s, k, t])
    assert sorted(seen.values()) == list(range(S * NODES))
    features = context_features(S, V, DEPTH)
    assert features.shape == (S * NODES, S + (DEPTH - 1) * (V + 1) + DEPTH)
    assert len(features.unique(dim=0)) == S * NODES
    for (s, *prefix), index in seen.items():
        held = [*prefix, *[V] * (DEPTH - 1 - len(prefix))]
        ones = [s, *(S + i * (V + 1) + a for i, a in enumerate(held))]
        ones.append(S + (DEPTH - 1) * (V + 1) + len(prefix))
        assert features[index].nonzero().flatten().tolist() == ones
    with pytest.raises(AssertionError, match="3 tokens, not 2"):
        tree.score(*on(torch.arange(S)), tokens[..., :2], tokens[..., :2] >= 0)
    with pytest.raises(AssertionError, match="contexts"):
        Tree(Table(table(5, V)), S, DEPTH)


@pytest.mark.parametrize("runs", [(), (2,)])
def test_score_and_joint_by_enumeration(runs: tuple[int, ...]) -> None:
    logits = table(*runs, S * NODES, V)
    tree = Tree(Table(logits), S, DEPTH)
    assert isinstance(tree, Policy) and tree.batch_shape == runs
    joint = tree.log_joint().detach()
    torch.testing.assert_close(joint.exp().sum(-1), torch.ones(*runs, S, dtype=torch.float64))
    tokens = all_responses(V, DEPTH)
    prompt, mask = on(torch.tensor([1, 0]).expand(*runs, 2))
    held = tokens.expand(*runs, 2, -1, -1)
    scored = tree.score(prompt, mask, held, torch.ones_like(held, dtype=torch.bool)).detach()
    logp = logits.log_softmax(-1)
    for i, s in enumerate((1, 0)):
        for k, response in enumerate(tokens.tolist()):
            for t, a in enumerate(response):
                expected = logp[..., number(s, response[:t]), a]
                torch.testing.assert_close(scored[..., i, k, t], expected)
            torch.testing.assert_close(scored[..., i, k, :].sum(-1), joint[..., s, k])


def test_some_contexts_give_what_all_give() -> None:
    net = Watched(Mlp(
        context_features(S, V, DEPTH), keys(2), V, (32,),
        activation="tanh", norm_first=False, gain=3.0, dtype=torch.float64,
    ))  # fmt: skip
    tree, other = Tree(net, S, DEPTH), Tree(net.copy(), S, DEPTH)
    for _, w in other.tensors():
        w.mul_(0.5)
    many = tree.sample(*on(torch.tensor([[1, 0, 1], [0, 0, 1]])), 6, draws(keys(2), 3, 6), 0)
    few = many.take(torch.tensor([2])).at(torch.tensor([[[5, 2]], [[0, 3]]]))
    names = frozenset({"logp", "collision"})
    whole, part = tree.outputs(many, names), tree.outputs(few, names)
    whole["kl"], part["kl"] = tree.step_kl(other, many), tree.step_kl(other, few)
    assert net.asked == [
        None,
        None,
        None,
        5,
        5,
        None,
        5,
    ]  # 1 prompt and 2 responses: 1 + 2 * 2 contexts
    for name, values in whole.items():
        picked = torch.stack([values[0, 2][[5, 2]], values[1, 2][[0, 3]]]).unsqueeze(1)
        torch.testing.assert_close(part[name], picked)
    masked = tree.score(few.prompt, few.prompt_mask, few.tokens, few.mask & (torch.arange(3) < 2))
    assert not masked[..., 2].any() and torch.equal(masked[..., :2], part["logp"][..., :2])
    picked = torch.stack([whole["logp"][0, 2][[5, 2]], whole["logp"][1, 2][[0, 3]]]).unsqueeze(1)
    weight, weights = table(2, 1, 2, 3), [w for _, w in tree.named_parameters()]
    torch.testing.assert_close(
        torch.autograd.grad((part["logp"] * weight).sum(), weights),
        torch.autograd.grad((picked * weight).sum(), weights),
    )


def test_collision_and_kl_by_enumeration() -> None:
    logits = table(2, S * NODES, V)
    tree, other = Tree(Table(logits[0]), S, DEPTH), Tree(Table(logits[1]), S, DEPTH)
    drawn = tree.sample(*on(torch.tensor([1, 0])), 4, draws(torch.tensor(0), 2, 4), 0)
    (_, collision), *others = tree.outputs(drawn, frozenset({"collision"})).items()
    assert not others and tree.outputs(drawn, frozenset({"logp"})).keys() == {"logp"}
    kl = tree.step_kl(other, drawn)
    p, q = logits.softmax(-1)
    for i, s in enumerate((1, 0)):
        for k, response in enumerate(drawn.tokens[i].tolist()):
            for t in range(DEPTH):
                c = number(s, response[:t])
                torch.testing.assert_close(collision[i, k, t], (p[c] ** 2).sum().log())
                torch.testing.assert_close(kl[i, k, t], (p[c] * (p[c] / q[c]).log()).sum())
    assert not collision.requires_grad and not kl.requires_grad


@pytest.mark.parametrize("responses", [2, 40])
def test_samples_are_those_of_sample_index(responses: int) -> None:
    """Token by token, each from its own distribution, by few contexts and by all."""
    logits = table(2, S * NODES, V)
    tree = Tree(net := Watched(Table(logits)), S, DEPTH)
    states, stream = torch.tensor([[1, 0], [0, 0]]), draws(keys(2), 2, responses)
    drawn = tree.sample(*on(states), responses, stream, 7)
    few = responses == 2
    assert net.asked == ([2, 4, 4] if few else [None])
    p = logits.softmax(-1)
    for r in range(2):
        for i in range(2):
            for k in range(responses):
                prefix: list[int] = []
                for t in range(DEPTH):
                    u = stream(t, (2, 2, responses))[r, i, k]
                    prefix.append(int(sample_index(p[r, number(int(states[r, i]), prefix)], u)))
                assert drawn.tokens[r, i, k].tolist() == prefix
    assert bool(drawn.mask.all()) and bool(drawn.finished.all()) and bool((drawn.origin == 7).all())
    assert torch.equal(drawn.row, states) and drawn.logp is not None
    scored = tree.score(drawn.prompt, drawn.prompt_mask, drawn.tokens, drawn.mask).detach()
    torch.testing.assert_close(drawn.logp, scored)
    assert few or torch.equal(drawn.logp, scored)


def test_draws_at_the_edges() -> None:
    """A draw of 0 finds no token of probability 0, and one that rounds to 1 none past the last."""
    logits = torch.tensor([[-torch.inf, 0.0, 0.0]], dtype=torch.float64)
    u = torch.tensor([0.0, 0.25, 0.5, 0.75, 1 - 2**-53, 1.0], dtype=torch.float64)
    prompt, mask = on(torch.tensor([0]))
    drawn = Tree(Table(logits), 1).sample(prompt, mask, 6, lambda t, shape: u.view(shape), 0)
    expected = sample_index(logits.log_softmax(-1).exp().expand(6, -1).contiguous(), u)
    assert drawn.tokens.flatten().tolist() == expected.tolist()
    assert expected[0] == 1 and expected[-1] == 2


@pytest.mark.parametrize("states", [2, 50])
@pytest.mark.parametrize("runs", [(), (3,)])
def test_at_depth_one_a_table_is_a_categorical(runs: tuple[int, ...], states: int) -> None:
    logits = table(*runs, states, 5)
    tree, flat = Tree(net := Watched(Table(logits)), states), Categorical(logits)
    other, flat_other = Tree(Table(logits.flip(-1)), states), Categorical(logits.flip(-1))
    prompt, mask = on(torch.tensor([1, 0, 1, 1]).expand(*runs, 4))
    run_keys = keys(*runs) if runs else torch.tensor(0)
    a = tree.sample(prompt, mask, 20, draws(run_keys, 4, 20), 3)
    b = flat.sample(prompt, mask, 20, draws(run_keys, 4, 20), 3)
    for name in ("tokens", "mask", "finished", "origin", "row", "prompt"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    names = frozenset({"logp", "collision"})
    outs = tree.outputs(a, names), flat.outputs(a, names)
    for name in names:
        torch.testing.assert_close(outs[0][name], outs[1][name])
    torch.testing.assert_close(a.logp, b.logp)
    assert a.logp is not None and torch.equal(a.logp, outs[0]["logp"])
    assert net.asked == [None if states == 2 else 4] * 3  # not 4 * 20: responses share contexts
    torch.testing.assert_close(tree.step_kl(other, a), flat.step_kl(flat_other, a))
    torch.testing.assert_close(tree.log_joint(), flat.logits.log_softmax(-1))
    weight = table(*a.tokens.shape)
    for o in outs:
        (o["logp"] * weight).sum().backward()
    torch.testing.assert_close(tree.parameters()[0].grad, flat.logits.grad)


@pytest.mark.parametrize("runs, responses", [(1, 20000), (10000, 2)])
def test_samples_follow_the_distribution(runs: int, responses: int) -> None:
    """By all contexts, and by those of one prompt and two responses."""
    one = table(S * 4, V)
    net = Watched(Table(one.expand(runs, -1, -1)))
    tree = Tree(net, S, 2)
    drawn = tree.sample(
        *on(torch.ones(runs, 1, dtype=torch.int64)), responses, draws(keys(runs), 1, responses), 0
    )
    assert net.asked == ([None] if responses > 2 else [1, 2])
    counts = torch.bincount((drawn.tokens @ torch.tensor([V, 1])).flatten(), minlength=V**2)
    expected = 20000 * tree.log_joint()[0, 1].exp().detach()
    assert float(((counts - expected) ** 2 / expected).sum()) < 26.1  # 99.9 %, 8 degrees


def test_a_frozen_copy_stays_and_follows() -> None:
    for net in (Table(table(2, S * NODES, V)), LogLinear(table(S * NODES, V, 4), start=table(2, 4)),
                Mlp(context_features(S, V, DEPTH), keys(2), V, (18,), activation="tanh",
                    norm_first=True, gain=1.0)):  # fmt: skip
        tree = Tree(net, S, DEPTH)
        copy, before = tree.frozen_copy(), {n: w.detach().clone() for n, w in tree.tensors()}
        assert not copy.parameters() and not copy.log_joint().requires_grad
        assert [n for n, _ in tree.named_parameters()] == [n for n, _ in copy.tensors()]
        with torch.no_grad():
            for p in tree.parameters():
                p.add_(1.0)
        assert all(torch.equal(w, before[n]) for n, w in copy.tensors())
        copy.follow(tree, 0.75)
        assert all(torch.equal(w, before[n].lerp(before[n] + 1, 0.25)) for n, w in copy.tensors())
        assert not copy.parameters() and len(tree.parameters()) == len(before)
    with pytest.raises(AssertionError, match="controls"):
        tree.condition(*on(torch.zeros(2, 1, dtype=torch.int64)), torch.ones(2, 1) > 0)


class Largest(TorchDispatchMode):
    """The most elements of a tensor that an operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor) and x.is_contiguous():  # an expanded view takes no room
                self.seen = max(self.seen, x.numel())
        return out


def test_no_distribution_is_repeated_for_responses() -> None:
    """2 runs, 6 prompts in 4 states, 50 responses of one of 100 tokens."""
    tree = Tree(Table(table(2, 4, 100)), 4)
    prompt, mask = on(torch.tensor([0, 1, 2, 3, 0, 1]).expand(2, 6))
    stream = draws(keys(2), 6, 50)
    with Largest() as sampling:
        drawn = tree.sample(prompt, mask, 50, stream, 0)
    with Largest() as scoring:
        tree.score(drawn.prompt, drawn.prompt_mask, drawn.tokens, drawn.mask).sum().backward()
    assert sampling.seen == 2 * 6 * 100  # a distribution for each prompt
    assert scoring.seen == 2 * 4 * 100  # one for each state


# Runs stay apart


def bandit_net(keys: Tensor) -> Mlp:
    g = torch.Generator().manual_seed(0)
    return Mlp(
        torch.randn(10, 100, generator=g), keys, 100, (50, 256, 256),
        activation="relu", norm_first=True, gain=1e-2,
    )  # fmt: skip


def tree_net(keys: Tensor) -> Mlp:
    return Mlp(
        context_features(8, 6, 3), keys, 6, (32, 32), activation="tanh", norm_first=False, gain=1.0
    )


def start(keys: Tensor, *shape: int) -> Tensor:
    count = torch.Size(shape).numel()
    return normal(keys[:, None], torch.arange(count)).float().view(-1, *shape)


SETTINGS: dict[str, tuple[Callable[[Tensor], Net], int, int, int, int]] = {
    # net, states, depth, prompts, responses
    "table": (lambda k: Table(start(k, 10, 100)), 10, 1, 10, 10),
    "table, some": (lambda k: Table(start(k, 30, 7)), 30, 1, 5, 10),
    "bandit": (bandit_net, 10, 1, 10, 10),
    "bandit, some": (bandit_net, 10, 1, 5, 10),
    "tree": (tree_net, 8, 3, 8, 40),
    "tree, some": (tree_net, 8, 3, 5, 7),
    "log-linear": (
        lambda k: LogLinear(table(10, 100, 7).float(), start=start(k, 7)), 10, 1, 10, 10,
    ),
    "log-linear, a run each": (
        lambda k: LogLinear(start(k, 100, 7), start=start(k, 7), per_run=True), 1, 1, 1, 10,
    ),
    "log-linear tree, some": (
        lambda k: LogLinear(table(344, 6, 7).float(), start=start(k, 7)), 8, 3, 4, 10,
    ),
}  # fmt: skip


def history(setting: str, keys: Tensor) -> dict[str, Tensor]:
    """What three steps of the runs of these keys draw, score and learn: each [R, ...]."""
    make, states, depth, n, k = SETTINGS[setting]
    tree, found = Tree(make(keys), states, depth), {}
    reference = tree.frozen_copy()
    for step in range(3):
        prompt = (uniform(keys[:, None], 7, step, torch.arange(n)) * states).long()
        drawn = tree.sample(*on(prompt), k, draws(keys + step, n, k), step)
        out = tree.outputs(drawn, frozenset({"logp", "collision"}))
        assert (old := drawn.logp) is not None
        weight = normal(keys[:, None, None, None], 8, step, torch.arange(k)[:, None])
        ratio = (out["logp"] - old).exp()
        weights = tree.named_parameters()
        loss = (ratio * weight.float()).sum() + out["logp"].square().sum()
        grads = torch.autograd.grad(loss, [w for _, w in weights])
        now = {"tokens": drawn.tokens, "drawn": old, "kl": tree.step_kl(reference, drawn)}
        now |= {"joint": tree.log_joint()} | out
        for (name, w), g in zip(weights, grads, strict=True):
            now |= {f"grad of {name}": g, name: w}
            w.data.sub_(g, alpha=0.01)
        found |= {f"{name} at {step}": x.detach().clone() for name, x in now.items()}
    return found


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_run_does_not_depend_on_those_beside(setting: str) -> None:
    torch.set_num_threads(1)
    for runs, alone in ((7, range(7)), (64, (0, 33, 63))):
        together = history(setting, keys(runs))
        order = torch.randperm(runs, generator=torch.Generator().manual_seed(2))
        cases = [torch.tensor([r]) for r in alone] + [order[: 7 if runs == 7 else 10]]
        for index in cases:
            for name, x in history(setting, keys(runs)[index]).items():
                assert torch.equal(x, together[name][index]), (name, index)
        assert not torch.equal(together["tokens at 2"][0], together["tokens at 2"][1])
