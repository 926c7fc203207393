"""Drawing a token: inverting the cumulative distribution, and what is cut off before."""

from typing import Any

import pytest
import torch
from torch import Tensor

from preftune.sampling import choosing
from preftune.sampling.choosing import choose, restricted
from preftune.sampling.decoding import Decoding

NONE = torch.tensor([], dtype=torch.long)
LAST = 1 - 2.0**-53
"""The largest uniform number."""


def pick(logits: Tensor, u: Tensor, ends: Tensor = NONE, early: Any = False, **settings: Any):
    rows = torch.as_tensor(early).expand(len(logits))
    return choose(logits, u.double(), Decoding(**settings), ends, rows)


@pytest.fixture
def logits() -> Tensor:
    g = torch.Generator().manual_seed(0)
    return 2 * torch.randn(6, 9, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [1, 3, 255, 256, 257, 1000])
def test_the_first_token_whose_cumulative_probability_passes_u(
    vocabulary: int, dtype: torch.dtype
) -> None:
    g = torch.Generator().manual_seed(vocabulary)
    one = (3 * torch.randn(vocabulary, generator=g)).to(dtype)
    u = torch.rand(500, generator=g, dtype=torch.float64)
    chosen = pick(one.expand(500, -1), u)
    cumulative = one.double().softmax(-1).cumsum(-1)
    clear = (u[:, None] - cumulative).abs().amin(-1) > 1e-6
    expected = (cumulative <= u[:, None]).sum(-1)
    assert clear.sum() > 400 or vocabulary == 1000
    assert torch.equal(chosen.token[clear], expected[clear])
    assert chosen.logp.dtype == torch.promote_types(dtype, torch.float32)
    exact = one.double().log_softmax(-1)[chosen.token]
    torch.testing.assert_close(chosen.logp.double(), exact, rtol=0, atol=2e-6)
    assert torch.equal(chosen.logp, chosen.sampled_logp)


@pytest.mark.parametrize("u", [0.0, 2.0**-60, 0.5, LAST])
@pytest.mark.parametrize("vocabulary", [5, 700])
def test_what_has_no_mass_is_never_drawn(u: float, vocabulary: int) -> None:
    logits = torch.full((1, vocabulary), -torch.inf)
    logits[0, [2, vocabulary - 2]] = torch.tensor([0.0, 1.0])
    chosen = pick(logits, torch.tensor([u]))
    first = u < 1 / (1 + torch.e)
    assert int(chosen.token) == (2 if first else vocabulary - 2)


def test_every_number_gives_a_token_of_the_vocabulary() -> None:
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(200, 300, generator=g)
    for u in (0.0, LAST):
        token = pick(logits, torch.full((200,), u)).token
        assert bool(((token >= 0) & (token < 300)).all())
        assert torch.equal(token, torch.full((200,), 0 if u == 0 else 299))


def test_rows_do_not_matter_to_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(2)
    logits, u = torch.randn(7, 600, generator=g), torch.rand(7, generator=g)
    whole = pick(logits, u, top_p=0.9)
    monkeypatch.setattr(choosing, "_CHUNK", 1300)  # two rows at a time
    for a, b in zip(whole, pick(logits, u, top_p=0.9), strict=True):
        assert torch.equal(a, b)
    for i in range(7):
        assert int(pick(logits[i : i + 1], u[i : i + 1], top_p=0.9).token) == int(whole.token[i])


def test_logits_that_are_not_numbers_show() -> None:
    for bad in (float("nan"), float("inf"), -float("inf")):
        logits = torch.zeros(2, 4)
        logits[1] = torch.tensor([0.0, bad, 0.0, 0.0]) if bad > 0 or bad != bad else bad
        chosen = pick(logits, torch.tensor([0.1, 0.9]))
        assert not chosen.logp[0].isnan() and chosen.logp[1].isnan()


# --- what is cut off ----------------------------------------------------------------------------


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


@pytest.mark.parametrize("candidates", [2, 1024])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 3, 50])
@pytest.mark.parametrize("top_p", [0.01, 0.4, 0.9, 1.0])
def test_what_is_sampled(
    logits: Tensor, temperature: float, top_k: int, top_p: float, candidates: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(choosing, "_CANDIDATES", candidates)
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    decoding = Decoding(**settings)
    found = restricted(logits, decoding).softmax(-1)
    expected = torch.stack([brute_force(r.tolist(), temperature, top_k, top_p) for r in logits])
    torch.testing.assert_close(found, expected)
    plain = temperature == 1 and top_k == 0 and top_p == 1
    assert decoding.unmodified == plain
    if plain:
        torch.testing.assert_close(found, logits.softmax(-1))
    chosen = pick(logits, torch.rand(6, generator=torch.Generator().manual_seed(3)), **settings)
    places = chosen.token[:, None]
    own = logits.log_softmax(-1).gather(-1, places).squeeze(-1)
    torch.testing.assert_close(chosen.logp, own)
    sampled = expected.log().gather(-1, places).squeeze(-1)
    torch.testing.assert_close(chosen.sampled_logp, sampled)


def test_greedy_is_certain(logits: Tensor) -> None:
    chosen = pick(logits, torch.full((6,), LAST), temperature=0.0)
    assert torch.equal(chosen.token, logits.argmax(-1))
    assert not chosen.sampled_logp.any()
    torch.testing.assert_close(chosen.logp, logits.log_softmax(-1).amax(-1))


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.0}, {"top_k": 1}, {"top_p": 0.1}])
def test_end_tokens_of_early_rows(logits: Tensor, settings: dict[str, Any]) -> None:
    """They are barred before the best are taken, and their log-prob stays the model's own."""
    ends = logits.argmax(-1).unique()
    early = torch.arange(6) % 2 == 0
    u = torch.full((6,), 0.999)
    chosen = pick(logits, u, ends, early, min_new_tokens=3, **settings)
    barred = logits.index_fill(-1, ends, -torch.inf)
    expected = torch.where(early[:, None], barred, logits)
    again = pick(expected, u, **settings)
    assert torch.equal(chosen.token, again.token)
    torch.testing.assert_close(chosen.sampled_logp, again.sampled_logp)
    own = logits.log_softmax(-1).gather(-1, chosen.token[:, None]).squeeze(-1)
    torch.testing.assert_close(chosen.logp, own)
    assert not Decoding(min_new_tokens=1).unmodified
