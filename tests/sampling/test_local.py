"""Sampling: what is drawn, and that it depends on nothing but its own prompt and random numbers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny_models as tiny
from preftune.errors import GuardStop
from preftune.numerics import stream_key, uniform
from preftune.policies.transformer import Transformer
from preftune.samples import Samples
from preftune.sampling import local
from preftune.sampling.decoding import Decoding
from preftune.sampling.local import probabilities

ENDS = tuple(range(40))
"""Many end tokens, so that responses of random models end at all lengths."""
LONGEST = 9
NAMES = ["llama", "llama_tied", "gpt2", "mistral", "gemma3", "qwen3", "granite", "cohere"]
EAGER = ["gemma2", "bloom"]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def sampler(name: str, dtype: torch.dtype = torch.float64, **decoding: Any) -> Transformer:
    settings = Decoding(**({"max_new_tokens": LONGEST} | decoding))
    return tiny.policy(name, dtype, end_ids=ENDS, decoding=settings)


def draw(
    policy: Transformer, rows: tuple[int, ...] = (0, 1, 2, 3), count: int = 5, seed: int = 0
) -> Samples:
    """Responses to prompts of 5, 1, 13 and 8 tokens, each with random numbers of its own."""
    s, index = tiny.ragged(), torch.tensor(rows)
    key = stream_key(seed)

    def stream(t: int, shape: tuple[int, ...]) -> Tensor:
        assert shape == (len(rows), count)
        return uniform(key, t, index[:, None], torch.arange(count))

    return policy.sample(s.prompt[index], s.prompt_mask[index], count, stream, 3)


def texts(s: Samples) -> dict[tuple[int, int], list[int]]:
    return {(i, k): response for i, k, _, response in tiny.unpadded(s)}


# --- log-probs, ends ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype", "near"),
    [(name, torch.float64, 1e-10) for name in NAMES]
    + [(name, torch.float32, 1e-4) for name in (*NAMES, *EAGER)],
)
def test_log_probs_are_those_of_score(name: str, dtype: torch.dtype, near: float) -> None:
    policy = sampler(name, dtype)
    s = draw(policy)
    assert s.logp is not None and s.logp.dtype == dtype
    assert not s.logp[~s.mask].any()
    scored = tiny.score(policy, s).detach()
    torch.testing.assert_close(s.logp, scored, rtol=0, atol=near)
    for i, k, prompt, response in tiny.unpadded(s):
        plain = tiny.plain_log_probs(policy.model, prompt, response)
        torch.testing.assert_close(s.logp[i, k, : len(response)], plain, rtol=0, atol=near)


def test_responses_end_by_their_end_token_or_are_cut() -> None:
    s = draw(sampler("llama"), count=40)
    assert s.tokens.shape == s.mask.shape == (4, 40, LONGEST)
    assert bool((s.origin == 3).all()) and s.finished.shape == (4, 40)
    seen = set()
    for i, k, _, response in tiny.unpadded(s):
        inside, last = response[:-1], response[-1]
        assert not set(inside) & set(ENDS)
        finished = last in ENDS
        assert bool(s.finished[i, k]) == finished
        assert finished or len(response) == LONGEST
        assert s.mask[i, k].tolist() == [t < len(response) for t in range(LONGEST)]
        assert not s.tokens[i, k][~s.mask[i, k]].any()
        seen.add((finished, len(response) == LONGEST))
    # one that ends with its very last token is finished, not cut
    assert seen == {(True, False), (True, True), (False, True)}


@pytest.mark.parametrize(("ends", "length", "finished"), [(range(261), 1, True), ((), 4, False)])
def test_all_end_at_once_or_none(ends: Any, length: int, finished: bool) -> None:
    policy = tiny.policy("llama", end_ids=ends, decoding=Decoding(max_new_tokens=4))
    s = draw(policy)
    assert s.tokens.shape[-1] == length and bool(s.mask.all())
    assert bool((s.finished == finished).all())


# --- nothing beside a response matters ----------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "mistral"])
@pytest.mark.parametrize("rows", [(0,), (1,), (2,), (3, 1), (2, 0, 3)])
def test_neither_the_prompts_nor_the_number_of_responses_matter(
    name: str, rows: tuple[int, ...]
) -> None:
    """The prompts are ragged, so neither does padding on the left."""
    policy = sampler(name)
    whole = texts(draw(policy, count=4))
    few = texts(draw(policy, rows=rows, count=2))
    assert few == {(i, k): whole[row, k] for i, row in enumerate(rows) for k in range(2)}


@pytest.mark.parametrize("rows", [1, 5, 7, 10, 19])
def test_the_number_decoded_together_does_not_matter(
    monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    policy = sampler("gpt2")
    whole = draw(policy)
    monkeypatch.setattr(local, "MAX_ROWS", rows)
    parts = draw(policy)
    assert torch.equal(parts.tokens, whole.tokens) and torch.equal(parts.mask, whole.mask)
    assert torch.equal(parts.finished, whole.finished)


@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "mistral"])
def test_finished_rows_leave_and_others_go_on(
    monkeypatch: pytest.MonkeyPatch, name: str, share: float
) -> None:
    policy = sampler(name)
    monkeypatch.setattr(local, "_LEAVE_SHARE", 2.0)
    sizes = batch_sizes(policy, monkeypatch)
    stayed = draw(policy, count=20)
    assert set(sizes[1:]) == {80}
    monkeypatch.setattr(local, "_LEAVE_SHARE", share)
    sizes.clear()
    left = draw(policy, count=20)
    assert sizes[0] == 4 and len(set(sizes[1:])) > 1 and sizes[-1] < 60
    assert texts(left) == texts(stayed)
    assert torch.equal(left.finished, stayed.finished)
    torch.testing.assert_close(left.logp, stayed.logp, rtol=0, atol=1e-10)


def batch_sizes(policy: Transformer, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Filled with the rows of each forward pass."""
    sizes: list[int] = []
    original: Callable[..., Any] = local._step

    def spy(*args: Any, **inputs: Tensor) -> Any:
        sizes.append(len(inputs["input_ids"]))
        return original(*args, **inputs)

    monkeypatch.setattr(local, "_step", spy)
    return sizes


def test_other_random_numbers_give_other_responses() -> None:
    policy = sampler("llama")
    assert texts(draw(policy)) == texts(draw(policy))
    assert texts(draw(policy, seed=1)) != texts(draw(policy))


# --- distributions ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_temperature_zero_is_greedy(name: str) -> None:
    policy = sampler(name, temperature=0.0)
    s = draw(policy, count=2)
    for _, k, prompt, response in tiny.unpadded(s):
        greedy: list[int] = []
        while len(greedy) < LONGEST and (not greedy or greedy[-1] not in ENDS):
            ids = torch.tensor([prompt + greedy])
            with torch.no_grad():
                greedy.append(int(policy.model(input_ids=ids).logits[0, -1].argmax()))
        assert response == greedy, k
    scored = tiny.score(policy, s).detach()  # log-probs stay those of the model itself
    torch.testing.assert_close(s.logp, scored, rtol=0, atol=1e-10)


def brute_force(logits: list[float], temperature: float, top_k: int, top_p: float) -> Tensor:
    """Temperature, the k best, then the fewest of these that reach top_p; no ties."""
    p = (torch.tensor(logits, dtype=torch.float64) / temperature).softmax(-1)
    order = sorted(range(len(logits)), key=lambda i: -float(p[i]))
    order = order[: top_k or None]
    total, mass, kept = sum(float(p[i]) for i in order), 0.0, []
    for i in order:
        if mass >= top_p:
            break
        kept.append(i)
        mass += float(p[i]) / total
    out = torch.zeros_like(p)
    out[kept] = p[kept]
    return out / out.sum()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 3, 50])
@pytest.mark.parametrize("top_p", [0.01, 0.4, 0.9, 1.0])
def test_probabilities(temperature: float, top_k: int, top_p: float) -> None:
    g = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(6, 9, generator=g, dtype=torch.float64)
    decoding = Decoding(temperature=temperature, top_k=top_k, top_p=top_p)
    found = probabilities(logits, decoding)
    found = found / found.sum(-1, keepdim=True)
    expected = torch.stack([brute_force(r.tolist(), temperature, top_k, top_p) for r in logits])
    torch.testing.assert_close(found, expected)
    plain = temperature == 1 and top_k == 0 and top_p == 1
    assert decoding.unmodified == plain
    if plain:
        torch.testing.assert_close(found, logits.softmax(-1))


@pytest.mark.parametrize("decoding", [{}, {"temperature": 0.5}, {"top_k": 4}, {"top_p": 0.95}])
def test_first_tokens_come_as_often_as_they_should(decoding: dict[str, Any]) -> None:
    """Of 4000 draws, against the probabilities of a plain forward: chi-square, 99.9 %."""
    count, vocab = 4000, 12
    model = tiny.make("llama", vocab_size=vocab)
    settings = Decoding(max_new_tokens=1, **decoding)
    policy = Transformer(model, end_ids=[1], decoding=settings)
    prompt = torch.tensor([[3, 7, 5]])
    s = policy.sample(
        prompt, prompt.bool(), count, lambda t, shape: uniform(0, t, torch.arange(count))[None], 0
    )
    with torch.no_grad():
        logits = model(input_ids=prompt).logits[:, -1]
    p = brute_force(logits[0].tolist(), settings.temperature, settings.top_k, settings.top_p)
    counts = torch.bincount(s.tokens.flatten(), minlength=vocab)
    likely = p > 0
    assert not counts[~likely].any()
    statistic = ((counts - count * p) ** 2)[likely] / (count * p[likely])
    limit = [0, 10.8, 13.8, 16.3, 18.5, 20.5, 22.5, 24.3, 26.1, 27.9, 29.6, 31.3]
    freedom = int(likely.sum()) - 1
    assert freedom > 0 and float(statistic.sum()) < limit[freedom]


def test_a_diverged_model_stops_the_run() -> None:
    model = tiny.make("llama")
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    with pytest.raises(GuardStop, match="not numbers"):
        draw(Transformer(model, end_ids=ENDS))


def test_sampling_under_autocast_is_near_but_not_exact() -> None:
    settings = Decoding(max_new_tokens=LONGEST)
    options = {"end_ids": ENDS, "decoding": settings, "autocast": torch.bfloat16}
    policy = tiny.policy("llama", torch.float32, **options)
    s = draw(policy)
    assert s.logp is not None and s.logp.dtype == torch.float32 and not policy.exact_sampler
    assert float((s.logp - tiny.score(policy, s).detach()).abs().max()) < 0.5
