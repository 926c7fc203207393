"""What `auto` becomes, and that compiled and recomputed blocks give the same gradients."""

import copy
from typing import Any

import pytest
import torch

import tiny_models as tiny
from preftune import automatic, methods
from preftune.config import Config
from preftune.data import Rows
from preftune.errors import UserError
from preftune.policies import blocks
from preftune.policies.transformer import Transformer


def data(prompt: int, *responses: int) -> Rows:
    """Three rows of these lengths."""
    return Rows(
        prompts=[[1] * prompt] * 3, responses=[tuple([1] * n for n in responses)] * 3,
        finished=[(True,) * len(responses)] * 3, columns={}, texts=["a"] * 3, where=["1"] * 3,
        kind="pairs",
    )  # fmt: skip


def trunk() -> Any:
    return tiny.policy("llama").trunk


def test_prompts_are_shared_where_that_saves_tokens() -> None:
    dpo = methods.resolve(methods.get("dpo"))
    long, short = trunk(), trunk()
    said = automatic.choose_layout(Config(), long, dpo, data(96, 96, 96))
    assert long.share_prefix and "25% fewer tokens" in said[0]
    assert automatic.choose_layout(Config(), short, dpo, data(1, 40, 40)) == []
    assert not short.share_prefix
    asked = trunk()
    automatic.choose_layout(Config(share_prefix=True), asked, dpo, data(1, 40, 40))
    assert asked.share_prefix


def test_long_runs_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    of = trunk()
    weights = sum(p.numel() for p in of.model.parameters())
    tokens = automatic.COMPILE_FROM * automatic.RATES["cpu"] / 6 / weights
    monkeypatch.setattr(automatic, "can_compile", lambda device: True)
    assert automatic.compiles(Config(), of, tokens, 2)
    assert not automatic.compiles(Config(), of, tokens, 0)
    assert not automatic.compiles(Config(compile=False), of, tokens, 2)
    assert automatic.compiles(Config(compile=True), of, 1, 1)
    monkeypatch.setattr(automatic, "can_compile", lambda device: False)
    assert not automatic.compiles(Config(), of, tokens, 2)
    with pytest.raises(UserError, match="compiler"):
        automatic.compiles(Config(compile=True), of, tokens, 2)


def test_activations_of_a_model_of_few_words() -> None:
    few = tiny.make("llama", torch.float32)
    few.resize_token_embeddings(5)
    assert Transformer(few, end_ids=[tiny.END]).trunk.activation_bytes() > 0


def test_activations_are_recomputed_where_they_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    of = trunk()
    each = of.activation_bytes()
    assert each > 0
    monkeypatch.setattr(automatic, "free_memory", lambda device: int(1000 * each))
    assert not automatic.recomputes(Config(), of, 500)
    assert automatic.recomputes(Config(), of, 700)
    assert not automatic.recomputes(Config(activation_checkpointing=False), of, 700)
    assert automatic.row_budget(Config(), of) == 600
    assert automatic.row_budget(Config(micro_batch_tokens=77), of) == 77


def test_bytes_of_activations_are_counted_right() -> None:
    """By hand for one product and one square: 4 x 3 inputs and 4 x 5 outputs are kept."""
    weight = torch.randn(3, 5, requires_grad=True)
    x = torch.randn(4, 3)
    with blocks.counting_kept() as total:
        (x @ weight).square().sum()
    assert total[0] == 4 * (4 * 3 + 4 * 5)


def gradient(policy: Transformer) -> torch.Tensor:
    policy.model.zero_grad()
    tiny.score(policy, tiny.ragged()).sum().backward()
    return torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None])


def test_recomputed_activations_give_the_same_gradient_and_keep_less() -> None:
    model = tiny.make("llama").eval()
    plain = Transformer(copy.deepcopy(model), end_ids=[tiny.END])
    lean = Transformer(copy.deepcopy(model), end_ids=[tiny.END])
    automatic.apply(lean.trunk, compiled=False, recomputed=True)
    assert torch.equal(gradient(lean), gradient(plain))
    assert lean.trunk.activation_bytes() < 0.3 * plain.trunk.activation_bytes()


@pytest.mark.slow
@pytest.mark.long  # checks of shapes are no part of what is compiled
def test_compiled_blocks_give_the_same_gradient() -> None:
    if not blocks.can_compile(torch.device("cpu")):
        pytest.skip("no C++ compiler")
    model = tiny.make("llama").eval()
    plain = Transformer(copy.deepcopy(model), end_ids=[tiny.END])
    fast = Transformer(copy.deepcopy(model), end_ids=[tiny.END])
    names = [name for name, _ in fast.named_parameters()]
    automatic.apply(fast.trunk, compiled=True, recomputed=False)
    assert [name for name, _ in fast.named_parameters()] == names
    # norms are in float32, which a fused sum rounds otherwise
    torch.testing.assert_close(gradient(fast), gradient(plain), rtol=1e-5, atol=1e-5)
    copied = fast.frozen_copy()
    assert copied.trunk.compiled
    wanted = tiny.score(plain, tiny.ragged()).detach()
    torch.testing.assert_close(tiny.score(copied, tiny.ragged()), wanted, rtol=1e-6, atol=1e-6)
