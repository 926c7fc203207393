"""References: a copy that follows, and a base model behind an adapter that is off."""

import copy
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import tiny_models as tiny
from preftune.errors import UserError
from preftune.numerics import uniform
from preftune.policies.transformer import Transformer
from preftune.sampling.decoding import Decoding

ALL = frozenset({"logp", "value", "collision"})


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def moved(policy: Transformer, seed: int = 0) -> None:
    """Every trained weight is moved."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=g).to(parameter))


def weights(policy: Transformer) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in policy.tensors()}


# --- every weight by name -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2"])
def test_tensors_are_all_weights_once(name: str) -> None:
    policy = tiny.policy(name, value_head=True)
    list(policy.parameters())[0].requires_grad_(False)
    names = [n for n, _ in policy.tensors()]
    assert names[:-2] == [n for n, _ in policy.model.named_parameters()]
    assert names[-2:] == ["value_head.weight", "value_head.bias"]
    assert len(set(names)) == len(names)
    assert ("lm_head.weight" in names) == (name == "llama")
    assert [n for n, _ in policy.named_parameters()] == names[1:]
    copied = policy.frozen_copy()
    assert [n for n, _ in copied.tensors()] == names[:-2] and copied.value_head is None
    assert not list(copied.parameters()) and len(list(policy.parameters())) == len(names) - 1
    with pytest.raises(AssertionError, match="without a value head"):
        copied.outputs(tiny.ragged(), frozenset({"value"}))


# --- following ----------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("name", ["llama", "llama_tied", "gemma2"])
def test_a_copy_follows_in_place(name: str, decay: float) -> None:
    policy = tiny.policy(name, torch.float32, value_head=True)
    reference = policy.frozen_copy()
    before = weights(reference)
    places = {n: t.data_ptr() for n, t in reference.tensors()}
    moved(policy)
    theirs = weights(policy)
    reference.follow(policy, decay)
    for n, tensor in reference.tensors():
        exact = decay * before[n].double() + (1 - decay) * theirs[n].double()
        torch.testing.assert_close(tensor.double(), exact, rtol=0, atol=1e-6)
        assert not tensor.requires_grad and tensor.data_ptr() == places[n]
        if decay in (0, 1):
            assert torch.equal(tensor, theirs[n] if decay == 0 else before[n])
    assert all(torch.equal(t, theirs[n]) for n, t in policy.tensors())
    if decay == 0:
        assert torch.equal(
            tiny.score(reference, tiny.ragged()), tiny.score(policy, tiny.ragged()).detach()
        )


def test_another_architecture_cannot_be_followed() -> None:
    policy = tiny.policy("llama")
    for other in (tiny.make("gpt2"), tiny.make("llama", hidden_size=32)):
        reference = policy.with_model(other)
        before = weights(reference)
        with pytest.raises(UserError, match="reference_update needs a reference of the model's"):
            reference.follow(policy, 0.5)
        assert all(torch.equal(t, before[n]) for n, t in reference.tensors())


# --- adapters -----------------------------------------------------------------------------------


def with_lora(name: str = "llama", dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """A model with a fresh LoRA adapter, and the model as it was."""
    model = tiny.make(name, dtype)
    plain = copy.deepcopy(model).eval()
    targets = ["c_attn"] if name == "gpt2" else ["q_proj", "v_proj", "down_proj"]
    config = peft.LoraConfig(
        r=2, lora_alpha=4, target_modules=targets, task_type="CAUSAL_LM", lora_dropout=0.1,
        fan_in_fan_out=name == "gpt2", **options,
    )  # fmt: skip
    return peft.get_peft_model(model, config, autocast_adapter_dtype=False).to(dtype), plain


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2", "gemma2", "granite"])
def test_the_reference_is_the_base_with_the_adapter_off(name: str) -> None:
    model, plain = with_lora(name)
    s = tiny.ragged()
    policy = Transformer(model, end_ids=[tiny.END], value_head=True)
    assert policy._whole_model == (name in ("gemma2", "granite"))
    assert policy.share_prefix == (name != "gemma2")
    reference = policy.frozen_copy()
    start = tiny.score(reference, s)
    assert torch.equal(start, tiny.score(policy, s).detach())
    assert torch.equal(start, tiny.score(Transformer(plain, end_ids=[tiny.END]), s).detach())
    trained = {n for n, _ in policy.named_parameters()}
    assert trained == {n for n in trained if "lora" in n or n.startswith("value_head")} != set()

    moved(policy)
    assert torch.equal(tiny.score(reference, s), start)
    assert bool((tiny.score(policy, s) != start)[s.mask].all())
    assert not tiny.score(reference, s).requires_grad
    out = reference.outputs(s, frozenset({"logp", "collision"}))
    assert torch.equal(out["logp"], start)
    kl = policy.step_kl(reference, s)
    for i, k, prompt, response in tiny.unpadded(s):
        p = tiny.next_log_probs(model, prompt, response)
        q = tiny.next_log_probs(plain, prompt, response)
        direct = (p.exp() * (p - q)).sum(-1)
        torch.testing.assert_close(kl[i, k, : len(response)], direct, rtol=0, atol=1e-5)
    assert float(kl.sum()) > 1e-4


def test_the_base_is_held_once_and_not_trained() -> None:
    model, _ = with_lora()
    policy = Transformer(model, end_ids=[tiny.END])
    reference = policy.frozen_copy()
    assert reference.model is policy.model
    own = {n: t.data_ptr() for n, t in policy.tensors()}
    assert {n: t.data_ptr() for n, t in reference.tensors()} == own
    assert not list(reference.parameters()) and not list(reference.named_parameters())
    assert not reference.frozen_copy().trunk.model.training
    assert list(policy.parameters())


def test_training_beside_the_reference_reaches_the_adapter_alone() -> None:
    """A forward with the adapter off, between forward and backward, takes no gradient away."""
    model, _ = with_lora()
    s = tiny.ragged()
    policy = Transformer(model, end_ids=[tiny.END])
    moved(policy)
    held = next(p for n, p in policy.named_parameters() if "lora_A" in n)
    held.requires_grad_(False)
    reference = policy.frozen_copy()
    trained = [n for n, _ in policy.named_parameters()]
    logp = tiny.score(policy, s)
    ref_logp = tiny.score(reference, s)
    (logp - ref_logp).sum().backward()
    assert [n for n, _ in policy.named_parameters()] == trained
    assert held.grad is None and not held.requires_grad
    for n, parameter in policy.model.named_parameters():
        assert (parameter.grad is not None) == (n in trained), n
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in policy.parameters())
    assert model.get_model_status().enabled is True


def test_the_reference_samples_without_the_adapter() -> None:
    model, plain = with_lora()
    decoding = Decoding(max_new_tokens=6)
    policy = Transformer(model, end_ids=[tiny.END], decoding=decoding)
    reference = policy.frozen_copy()
    moved(policy)
    s = tiny.ragged()

    def draw(one: Transformer) -> Any:
        return one.sample(
            s.prompt, s.prompt_mask, 2, lambda t, n: uniform(3, t, torch.arange(8)).view(n), 0
        )

    base = Transformer(plain, end_ids=[tiny.END], decoding=decoding)
    drawn = draw(reference)
    assert torch.equal(drawn.tokens, draw(base).tokens)
    assert not torch.equal(drawn.tokens, draw(policy).tokens)
    torch.testing.assert_close(drawn.logp, tiny.score(reference, drawn), rtol=0, atol=1e-6)
    mine = draw(policy)
    torch.testing.assert_close(mine.logp, tiny.score(policy, mine).detach(), rtol=0, atol=1e-6)


def test_modules_saved_whole_are_off_too() -> None:
    """The head is replaced by a trained copy: no plain product any more."""
    model, plain = with_lora(modules_to_save=["lm_head"])
    policy, s = Transformer(model, end_ids=[tiny.END]), tiny.ragged()
    assert policy._whole_model
    reference = policy.frozen_copy()
    moved(policy)
    expected = tiny.score(Transformer(plain, end_ids=[tiny.END]), s).detach()
    given = tiny.score(reference, s)
    torch.testing.assert_close(given, expected, rtol=0, atol=1e-10)
    assert not given.requires_grad  # peft lets gradients into the head that it puts back
    assert float((tiny.score(policy, s).detach() - expected).abs().max()) > 1e-2


def test_of_an_adapter_that_changes_the_model_a_copy_is_kept() -> None:
    """The reference is the model as it is now, and what is trained stays what it was."""
    model, _ = with_lora(modules_to_save=["lm_head"])
    policy, s = Transformer(model, end_ids=[tiny.END]), tiny.ragged()
    assert policy.frozen_copy().trunk.kept == ()
    moved(policy)
    trained = [n for n, _ in policy.named_parameters()]
    before = tiny.score(policy, s).detach()
    reference = policy.frozen_copy()
    assert reference.trunk.kept == ("start_default",)
    assert [n for n, _ in policy.named_parameters()] == trained
    assert torch.equal(tiny.score(reference, s), before)
    moved(policy)
    assert torch.equal(tiny.score(reference, s), before)
    assert not torch.equal(tiny.score(policy, s), before)
    assert torch.equal(tiny.score(reference.frozen_copy(), s), before)


def test_an_adapter_s_reference_cannot_follow() -> None:
    model, _ = with_lora()
    policy = Transformer(model, end_ids=[tiny.END])
    reference = policy.frozen_copy()
    before = weights(policy)
    with pytest.raises(UserError, match="reference_update .* Set reference_update to fixed"):
        reference.follow(policy, 0.5)
    assert all(torch.equal(t, before[n]) for n, t in policy.tensors())
    full = policy.with_model(tiny.make("llama", seed=3))
    with pytest.raises(UserError, match="reference_update"):
        full.follow(policy, 0.5)


def test_an_adapter_that_trains_the_base_s_biases_has_no_reference() -> None:
    """With the adapter off they would stay as trained: the reference would move."""
    model, _ = with_lora("gpt2", bias="all")
    policy = Transformer(model, end_ids=[tiny.END])
    with pytest.raises(UserError, match="adapter: bias 'all' trains weights of the base model"):
        policy.frozen_copy()


def test_tokens_before_the_prompt_are_refused() -> None:
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny.make("llama", torch.float32), config)
    with pytest.raises(UserError, match="puts tokens before the prompt"):
        Transformer(model, end_ids=[tiny.END])


def test_values_with_an_adapter_under_autocast() -> None:
    model, _ = with_lora(dtype=torch.float32)
    policy = Transformer(model, end_ids=[tiny.END], value_head=True, autocast=torch.bfloat16)
    moved(policy)
    out = policy.outputs(tiny.ragged(), ALL)
    assert {x.dtype for x in out.values()} == {torch.float32}
    (out["logp"].sum() + out["value"].sum()).backward()
    for name, parameter in policy.named_parameters():
        assert parameter.grad is not None and bool((parameter.grad != 0).any()), name


# --- weights kept as autocast computes in them ---------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "llama_tied", "qwen3"])
def test_a_narrow_reference_is_the_wide_one_bit_for_bit(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Half the memory of its matrices; it scores and samples as before, and never slower."""
    decoding = Decoding(max_new_tokens=6)
    policy = tiny.policy(name, torch.float32, autocast=torch.bfloat16, decoding=decoding)
    wide, narrow = policy.frozen_copy(), policy.frozen_copy()
    narrow.trunk.narrow()
    assert narrow.model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert narrow.model.get_output_embeddings().weight.dtype == torch.float32
    s = tiny.ragged()
    with torch.no_grad():
        assert torch.equal(tiny.score(narrow, s), tiny.score(wide, s))
        assert torch.equal(tiny.score(narrow, s), tiny.score(policy, s)), "at step 0 ratios are 1"

    def draw(of: Transformer) -> Tensor:
        stream = lambda t, shape: uniform(7, t, torch.arange(shape[0])[:, None], torch.arange(3))  # noqa: E731
        return of.sample(s.prompt, s.prompt_mask, 3, stream, -1).tokens

    assert torch.equal(draw(narrow), draw(wide))
    assert "slower" not in caplog.text


def test_without_autocast_nothing_is_narrowed() -> None:
    reference = tiny.policy("llama", torch.float32).frozen_copy()
    reference.trunk.narrow()
    assert {p.dtype for p in reference.model.parameters()} == {torch.float32}
