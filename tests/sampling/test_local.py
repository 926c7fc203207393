"""Sampling: what is drawn, and that it depends on nothing but its own prompt and random numbers."""

import math
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
from preftune.sampling.plain import PlainDecoder
from preftune.sampling.shared import SharedDecoder

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


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "mistral"])
@pytest.mark.parametrize("rows", [20, 45, 80])
def test_finished_rows_leave_and_waiting_prompts_enter(
    monkeypatch: pytest.MonkeyPatch, name: str, rows: int
) -> None:
    """Whatever the model's way: 4 prompts with 20 responses each."""
    policy = sampler(name)
    monkeypatch.setattr(PlainDecoder, "leave_share", 2.0)
    monkeypatch.setattr(local, "can_share", lambda model: False)
    sizes = row_counts(PlainDecoder, monkeypatch)
    stayed = draw(policy, count=20)
    assert set(sizes) == {80}
    monkeypatch.undo()
    monkeypatch.setattr(local, "MAX_ROWS", rows)
    can_share = policy.trunk.window > 99
    sizes = row_counts(SharedDecoder if can_share else PlainDecoder, monkeypatch)
    left = draw(policy, count=20)
    assert len(set(sizes)) > 1 and max(sizes) <= rows and min(sizes) < 40
    assert texts(left) == texts(stayed)
    assert torch.equal(left.finished, stayed.finished)
    torch.testing.assert_close(left.logp, stayed.logp, rtol=0, atol=1e-10)


def row_counts(kind: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Filled with the rows of each step."""
    counts: list[int] = []
    original = kind.step

    def spy(self: Any, tokens: Tensor) -> Tensor:
        counts.append(len(tokens))
        return original(self, tokens)

    monkeypatch.setattr(kind, "step", spy)
    return counts


def test_other_random_numbers_give_other_responses() -> None:
    policy = sampler("llama")
    assert texts(draw(policy)) == texts(draw(policy))
    assert texts(draw(policy, seed=1)) != texts(draw(policy))


# --- greedy -------------------------------------------------------------------------------------


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


# --- distributions of whole responses -----------------------------------------------------------

SETTINGS = [
    {}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.8}, {"min_new_tokens": 2},
    {"temperature": 1.5, "top_k": 4, "top_p": 0.9, "min_new_tokens": 1},
]  # fmt: skip


def next_distribution(
    model: Any, prompt: list[int], before: list[int], end: int, decoding: Decoding
) -> tuple[Tensor, Tensor]:
    """Log-probs of the next token [V]: the model's own, and those that are sampled."""
    with torch.no_grad():
        own = model(input_ids=torch.tensor([prompt + before])).logits[0, -1]
    allowed = own.clone()
    if len(before) < decoding.min_new_tokens:
        allowed[end] = -torch.inf
    p = (allowed / decoding.temperature).softmax(-1)
    order = p.argsort(descending=True)[: decoding.top_k or None]
    share = p[order] / p[order].sum()
    kept = order[share.cumsum(-1) - share < decoding.top_p]
    sampled = torch.zeros_like(p)
    sampled[kept] = p[kept] / p[kept].sum()
    return own.log_softmax(-1), sampled.log()


def enumerate_responses(
    model: Any, prompt: list[int], end: int, decoding: Decoding
) -> dict[tuple[int, ...], tuple[float, float]]:
    """Log-prob of every response, the model's own and as sampled."""
    out: dict[tuple[int, ...], tuple[float, float]] = {}
    open_ = [((), 0.0, 0.0)]
    while open_:
        before, own, sampled = open_.pop()
        tables = next_distribution(model, prompt, list(before), end, decoding)
        for token in range(len(tables[0])):
            if tables[1][token] == -torch.inf:
                continue
            after = (*before, token)
            one = (own + float(tables[0][token]), sampled + float(tables[1][token]))
            if token == end or len(after) == decoding.max_new_tokens:
                out[after] = one
            else:
                open_.append((after, *one))
    return out


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("shared", [True, False])
def test_responses_come_as_often_as_they_should(
    settings: dict[str, Any], shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 4000, against every response that there is, by plain forwards: chi-square, 99.9 %."""
    count, end = 4000, 1
    model = tiny.make("llama", vocab_size=6, max_position_embeddings=8)
    decoding = Decoding(max_new_tokens=3, **settings)
    monkeypatch.setattr(local, "can_share", lambda model: shared)
    monkeypatch.setattr(local, "MAX_ROWS", 8000)
    prompts = [[3, 5, 2], [4]]
    s = tiny.samples(prompts, [[[1]], [[1]]])
    drawn = local.generate(
        model, s.prompt, s.prompt_mask, count,
        lambda t, shape: uniform(7, t, torch.arange(2)[:, None], torch.arange(shape[1])),
        decoding, [end], window=99,
    )  # fmt: skip
    for i, prompt in enumerate(prompts):
        exact = enumerate_responses(model, prompt, end, decoding)
        seen: dict[tuple[int, ...], int] = {}
        for k in range(count):
            inside = drawn.mask[i, k]
            response = tuple(drawn.tokens[i, k][inside].tolist())
            if response not in seen:
                sums = (drawn.logp[i, k][inside].sum(), drawn.sampled_logp[i, k][inside].sum())
                assert [float(x) for x in sums] == pytest.approx(exact[response], abs=1e-9)
            seen[response] = seen.get(response, 0) + 1
        expected = {r: count * math.exp(sampled) for r, (_, sampled) in exact.items()}
        assert sum(expected.values()) == pytest.approx(count)
        often = [r for r, n in expected.items() if n >= 5]
        rest = count - sum(seen.get(r, 0) for r in often)
        pairs = [(seen.get(r, 0), expected[r]) for r in often]
        left = count - sum(expected[r] for r in often)
        pairs += [(rest, left)] if left > 1 else []
        statistic = sum((n - e) ** 2 / e for n, e in pairs)
        freedom = len(pairs) - 1
        # Wilson and Hilferty's approximation of the 99.9 % quantile
        part = 2 / (9 * freedom)
        assert freedom >= 3 and statistic < freedom * (1 - part + 3.09 * part**0.5) ** 3


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "gemma3"])
def test_greedy_is_what_generate_gives(name: str) -> None:
    policy = sampler(name, temperature=0.0)
    s = draw(policy, count=1)
    for _, _, prompt, response in tiny.unpadded(s):
        ids = torch.tensor([prompt])
        out = policy.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
            max_new_tokens=LONGEST, eos_token_id=list(ENDS), pad_token_id=0,
        )  # fmt: skip
        assert response == out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("least", [1, 4, LONGEST - 1])
def test_no_response_ends_before_its_least_length(least: int) -> None:
    policy = sampler("llama", min_new_tokens=least)
    lengths = [len(response) for *_, response in tiny.unpadded(draw(policy, count=20))]
    assert min(lengths) == least + 1
    free = [len(response) for *_, response in tiny.unpadded(draw(sampler("llama"), count=20))]
    assert min(free) == 1


# --- stop strings -------------------------------------------------------------------------------


def letters(ids: list[int]) -> str:
    """Two letters a token; the first of a text loses its first, as some tokenizers' blanks do."""
    return "".join(f"{chr(97 + i % 7)}{chr(97 + i % 5)}" for i in ids)[1:]


@pytest.mark.parametrize(("stop", "least"), [(("bc",), 0), (("cdd", "ee"), 0), (("bc", "e"), 5)])
def test_a_response_ends_with_the_token_that_completes_a_stop_string(
    stop: tuple[str, ...], least: int
) -> None:
    model = tiny.make("llama")
    plain = Decoding(max_new_tokens=40, min_new_tokens=least)
    free = texts(draw(Transformer(model, end_ids=[], decoding=plain)))
    settings = Decoding(max_new_tokens=40, min_new_tokens=least, stop=stop)
    s = draw(Transformer(model, end_ids=[], decoding=settings, decode=letters))
    cut = 0
    for (i, k), response in texts(s).items():
        whole = free[i, k]
        ends = [
            n
            for n in range(max(1, least), 41)
            if any(letters(whole[:n]).count(x) > letters(whole[: n - 1]).count(x) for x in stop)
        ]
        assert response == whole[: min(ends, default=40)]
        assert bool(s.finished[i, k]) == bool(ends)
        cut += bool(ends)
    assert cut > 5 and settings.unmodified == (least == 0)


def test_stop_strings_are_found_in_bounded_time() -> None:
    """Not by decoding a long response from its beginning at every token."""
    longest = 0

    def decode(ids: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return letters(ids)

    settings = Decoding(max_new_tokens=60, stop=("nowhere",))
    draw(Transformer(tiny.make("llama"), end_ids=[], decoding=settings, decode=decode))
    assert longest == len("nowhere") + 8


# --- what goes wrong ----------------------------------------------------------------------------


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
