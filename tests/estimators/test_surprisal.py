"""z is (0, 1) on own samples of any length, larger for others, and finds a bad first token."""

import math
from functools import cache

import numpy as np
import pytest
import torch
from enumerable import gen, holds, normal
from torch import Tensor

from preftune.estimators.surprisal import (
    Surprisal,
    surprisal,
    surprisal_excess,
)
from preftune.numerics import next_token_moments

VOCABULARY, LONGEST, END = 8, 40, 0


def chain(seed: int, sharp: float = 1.5) -> Tensor:
    """log p(next | last) [V, V]; the end token has a probability of about 1/8."""
    return (sharp * normal(gen(seed), VOCABULARY, VOCABULARY)).log_softmax(-1)


def text(
    g: torch.Generator, count: int, samples: int, proposal: Tensor, first: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Tokens and mask [N, K, T] of a chain that begins after token 1, cut at LONGEST."""
    last = torch.ones(count, samples, dtype=torch.long)
    alive = torch.ones(count, samples, dtype=torch.bool)
    tokens, mask = [], []
    for t in range(LONGEST):
        p = (proposal if t or first is None else first)[last].exp()
        drawn = torch.multinomial(p.flatten(0, 1), 1, generator=g).view(count, samples)
        tokens.append(drawn)
        mask.append(alive)
        alive, last = alive & (drawn != END), drawn
    return torch.stack(tokens, -1), torch.stack(mask, -1)


def measured(tokens: Tensor, mask: Tensor, reference: Tensor) -> tuple[Tensor, ...]:
    start = torch.ones_like(tokens[..., :1])
    logp = reference[torch.cat([start, tokens[..., :-1]], -1)]
    return logp.gather(-1, tokens[..., None])[..., 0], *next_token_moments(logp), mask


def of_own(seed: int, count: int = 200) -> Surprisal:
    reference = chain(seed)
    return surprisal(*measured(*text(gen(seed + 1), count, 4, reference), reference))


@cache
def few_of_own(seed: int, draw: int) -> Surprisal:
    """Of one draw, whose figures are checked one after another."""
    reference = chain(seed)
    return surprisal(*measured(*text(gen(draw), 60, 4, reference), reference), positions=1)


def test_by_hand() -> None:
    """p = (¾, ¼): H = .5623, Var = (log 3)² · 3/16 = .2263. Two tokens, the likely and the other:
    z = (.2877 + 1.3863 - 2 · .5623) / √.4526 = .8165; alone, (.2877 - .5623) / √.2263 = -.5774."""
    p = torch.tensor([0.75, 0.25], dtype=torch.float64)
    entropy, variance = next_token_moments(p.log())
    assert entropy.item() == pytest.approx(0.5623, abs=1e-4)
    assert variance.item() == pytest.approx(0.2263, abs=1e-4)
    logp = p.log().expand(1, 2, 2)
    mask = torch.tensor([[[True, True], [True, False]]])
    z = surprisal_excess(logp, entropy.expand(1, 2, 2), variance.expand(1, 2, 2), mask)
    assert z[0].tolist() == pytest.approx([0.8165, -0.5774], abs=1e-4)


def test_positions_by_hand() -> None:
    """As above, 24 prompts: the unlikely token first, (1.3863 - .5623) / √.2263 = 1.7321, then
    the likely one, -.5774; half of the prompts end before it."""
    p = torch.tensor([0.75, 0.25], dtype=torch.float64)
    entropy, variance = (x.expand(24, 1, 2) for x in next_token_moments(p.log()))
    mask = torch.ones(24, 1, 2, dtype=torch.bool)
    mask[::2, :, 1] = False
    found = surprisal(p.log().flip(0).expand(24, 1, 2), entropy, variance, mask)
    values = [one.value for one in found.by_position]
    assert values == pytest.approx([1.7321, -0.5774], abs=1e-4)


def test_a_certain_token() -> None:
    """One possible continuation: taken, it says nothing; not taken, it is the end of it."""
    logp = torch.tensor([[[0.0], [-3.0]]])
    zero, mask = torch.zeros(1, 2, 1), torch.ones(1, 2, 1, dtype=torch.bool)
    assert surprisal_excess(logp, zero, zero, mask)[0].tolist() == [0.0, math.inf]
    with pytest.raises(AssertionError, match="without tokens"):
        surprisal_excess(logp, zero, zero, ~mask)


def test_moments_of_a_distribution_without_mass_somewhere() -> None:
    logp = torch.tensor([0.5, 0.5, 0.0]).log()
    entropy, variance = next_token_moments(logp)
    assert entropy.item() == pytest.approx(math.log(2)) and variance.item() == pytest.approx(0)


def test_own_samples_have_mean_zero_and_sd_one() -> None:
    own = of_own(0, 2000)
    assert own.mean.value == pytest.approx(0, abs=0.05), own.mean
    assert own.sd.value == pytest.approx(1, abs=0.06), own.sd


def test_zero_and_one_are_held() -> None:
    holds(lambda g: few_of_own(0, g.initial_seed()).mean, 0.0)
    # nearly 1, see `surprisal_excess`
    holds(lambda g: few_of_own(0, g.initial_seed()).sd, 1.0, least=0.75)


def test_others_stand_out() -> None:
    reference, g = chain(0), gen(7)
    flat = torch.zeros(VOCABULARY, VOCABULARY, dtype=torch.float64).log_softmax(-1)
    uniform = surprisal(*measured(*text(g, 200, 4, flat), reference))
    cold = surprisal(*measured(*text(g, 200, 4, (3 * reference).log_softmax(-1)), reference))
    assert uniform.mean.low is not None and uniform.mean.low > 1.5, uniform.mean
    assert uniform.sd.low is not None and uniform.sd.low > 1.2, uniform.sd
    assert cold.mean.high is not None and cold.mean.high < -0.3, cold.mean


def test_there_is_no_length_bias() -> None:
    """Own samples cut at lengths that have nothing to do with them: z does not depend on the
    length, while the log-prob is little but length."""
    endless = chain(3)
    endless[:, END] = -torch.inf
    endless = endless.log_softmax(-1)
    logp, entropy, variance, mask = measured(*text(gen(4), 1500, 2, endless), endless)
    length = torch.randint(1, LONGEST + 1, (1500, 2), generator=gen(5))
    mask = mask & (torch.arange(LONGEST) < length[..., None])
    z = surprisal_excess(logp, entropy, variance, mask).flatten().numpy()
    n = length.flatten().numpy().astype(float)
    raw = logp.where(mask, 0.0).sum(-1).flatten().numpy()
    assert abs(np.corrcoef(z, n)[0, 1]) < 0.06, np.corrcoef(z, n)[0, 1]  # 3 / sqrt(3000)
    assert np.corrcoef(raw, n)[0, 1] < -0.85
    for few in (1, 2, 4):
        assert z[n <= few].mean() == pytest.approx(0, abs=4 / math.sqrt((n <= few).sum()))


def test_given_its_length_a_response_is_not_centred() -> None:
    """What the docstring warns of: with an end that is rarer than other tokens, those that ended
    early are strange and the rest tame. z's mean is then a little off; the pooled one is not."""
    reference = chain(3)
    logp, entropy, variance, mask = measured(*text(gen(4), 3000, 1, reference), reference)
    z, n = surprisal_excess(logp, entropy, variance, mask), mask.sum(-1)
    ends = reference[:, END].exp()
    assert 0.0 < ends.mean() < 0.3
    assert z[n <= 2].mean() > 0.3 and 0.05 < z.mean() < 0.15
    holds(lambda g: few_of_own(3, g.initial_seed()).excess, 0.0)
    holds(lambda g: few_of_own(3, g.initial_seed()).dispersion, 1.0)


def test_a_template_fault_shows_at_its_position() -> None:
    """The first token comes from another chain; later ones are the reference's own."""
    reference, g = chain(0), gen(5)
    flat = torch.zeros(VOCABULARY, VOCABULARY, dtype=torch.float64).log_softmax(-1)
    found = surprisal(*measured(*text(g, 300, 4, reference, first=flat), reference))
    first, *later = found.by_position
    assert first.low is not None and first.low > 0.3, first
    for t, other in enumerate(later[:4], 1):
        assert other.value == pytest.approx(0, abs=0.12), (t, other)


def test_a_position_that_few_reach_is_not_judged() -> None:
    reference = chain(0)
    found = surprisal(*measured(*text(gen(1), 6, 1, reference), reference))
    assert not found.by_position[0].trusted and "not 10" in found.by_position[0].note
    assert of_own(0, 50).by_position[0].trusted
