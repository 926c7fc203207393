"""Which pairs still teach, and how many answers a prompt has: by hand."""

import math

import pytest
import torch

import tables
import tiny_models as tiny
from preftune import informative, methods
from preftune.figures import agreement
from preftune.labellers import GivenPreference
from preftune.rounds import group_terms
from preftune.samples import Batch, Samples
from preftune.sources import Offline
from preftune.terms import Term
from tables import f64


def settled(name: str, margins: list[float]) -> list[bool]:
    """Of a row's pairs with these margins above a reference (or at ten tokens of -1 nat each)."""
    (term,) = (t for t in methods.get(name).terms if t.labeller == GivenPreference())
    margin = f64([margins])
    given = {
        "logp_chosen": margin - 10, "logp_rejected": torch.full_like(margin, -10.0),
        "ref_logp_chosen": torch.full_like(margin, -10.0),
        "ref_logp_rejected": torch.full_like(margin, -10.0),
        "len_chosen": torch.full_like(margin, 10.0), "len_rejected": torch.full_like(margin, 10.0),
        **term.settings,
    }  # fmt: skip
    arguments = {k: v for k, v in given.items() if k in term.parameters}
    return informative.settled(term.objective, arguments)[0].tolist()


def test_a_pair_is_settled_by_its_own_objective() -> None:
    """DPO: σ(-0.1 m) < 0.05; IPO: m is a tenth short of 5 nats or beyond; and no pair at all of an
    objective whose target is out of reach."""
    edge = math.log(19) / 0.1
    assert settled("dpo", [-50.0, 0.0, edge - 0.01, edge + 0.01]) == [False, False, False, True]
    assert settled("ipo", [0.0, 4.49, 4.51, 9.0]) == [False, False, True, True]
    assert settled("cpo", [0.0, edge - 0.01, edge + 0.01]) == [False, False, True]
    assert settled("simpo", [0.0]) == [False] and settled("simpo", [9.0]) == [False]
    assert settled("simpo", [20.0]) == [True], "σ(1 - 2 · 2) is a fifteenth of σ(1)"
    assert settled("cdpo", [-50.0, 0.0, 22.0, 60.0]) == [False, False, True, True]


def three_pairs() -> tuple[Samples, Batch]:
    """Pairs of ten tokens: the same but for the last token, but for the last two, and from the
    first on."""
    base = list(range(10, 20))
    groups = [[base, [*base[:9], 99]], [base, [*base[:8], 98, 99]], [base, [99, *base[1:]]]]
    samples = tiny.samples([[5]] * 3, groups)
    return samples, Batch(index=torch.tensor([[[0, 1]]] * 3), roles=("chosen", "rejected"))


def test_a_shared_beginning() -> None:
    samples, batch = three_pairs()
    assert informative.shared_prefix(samples, batch.index).tolist() == [[9], [8], [0]]
    swapped = informative.shared_prefix(samples, batch.index.flip(-1))
    assert swapped.tolist() == [[9], [8], [0]]


def test_padding_is_no_shared_beginning() -> None:
    samples = tiny.samples([[5]], [[[7, 8], [7, 8, 0, 0]]])
    index = torch.tensor([[[0, 1]]])
    assert informative.shared_prefix(samples, index).tolist() == [[2]]


@pytest.mark.parametrize("level", ["sequence", "mean"])
def test_the_shares_of_pairs(level: str) -> None:
    """The first pair is alike, the second's rejected response has 1 in 148 a token."""
    samples, batch = three_pairs()
    dpo = methods.get("dpo").terms[0]
    term = Term(source=Offline(), labeller=GivenPreference(), objective=dpo.objective,
                settings=dpo.settings, level=level)  # fmt: skip
    unit = 10 if level == "sequence" else 1
    logp = f64([[-4.5], [-5.0], [-4.5]]) * unit
    flat = {f"{n}logp_{r}": logp for n in ("", "ref_") for r in ("chosen", "rejected")}
    found = informative.of_pairs(term, samples, batch, {**flat, **term.settings})
    assert {name: x.flatten().tolist() for name, x in found.items()} == {
        "settled_pairs": [False, False, False],
        "unlikely_pairs": [False, True, False],
        "alike_pairs": [True, False, False],
        "informative_pairs": [False, False, True],
    }


def test_different_answers_of_a_prompt() -> None:
    """All the same, two of three, all; padding and what does not count do not tell apart."""
    same, other = [7, 8], [8, 7]
    samples = tiny.samples([[5]] * 4, [[same] * 3, [same, other, same], [same, other, [7]],
                                       [same, other, [9]]])  # fmt: skip
    samples.tokens[0, 1, 2:] = 77  # padding
    of = torch.ones(4, 3, dtype=torch.bool)
    of[3, 1:] = torch.tensor([False, True])
    shares = informative.distinct(samples.tokens, samples.mask, of)
    assert shares.tolist() == [0.0, 0.5, 1.0, 1.0]
    one = informative.distinct(samples.tokens[:, :1], samples.mask[:, :1], of[:, :1])
    assert one.tolist() == [0.0] * 4  # no figure: it is masked where it is measured


def test_responses_do_not_collide() -> None:
    """All words of three letters of 24, and no two alike."""
    words = torch.cartesian_prod(*[torch.arange(24)] * 3)[:4000]
    tokens = words.unsqueeze(0)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    assert float(informative.distinct(tokens, mask, mask[..., 0])) == 1.0


def test_a_study_measures_none_of_it() -> None:
    """It has no alarms, and its figures must not depend on how runs are joined."""
    table = tables.Table(runs=(2,))
    alone = tables.gradient(group_terms(tables.row_of("dpo")), tables.make_world("dpo"), 0)[1]
    world = tables.make_world("dpo", table=table, seed=0)
    both = tables.gradient(group_terms(tables.row_of("dpo")), world, 0)[1]
    assert alone.keys() - both.keys() == {
        "informative_pairs", "settled_pairs", "unlikely_pairs", "alike_pairs"
    }  # fmt: skip


def test_agreement_of_two_rewards() -> None:
    """Sixteen prompts with one answer each against 0: right in the near half but for one that
    ties, wrong in three quarters of the far half; two more tie by gold, and do not count."""
    kl = torch.arange(18.0)[:, None]
    gold = torch.ones(18, 1)
    gold[[7, 17]] = 0.0
    by = torch.ones(18, 1)
    by[0], by[9:15] = 0.0, -1.0
    zero = torch.zeros(18, 1)
    found = agreement((by, zero), (gold, zero), kl)
    near, far = 7.5 / 8, 2 / 8
    assert found["agreement_near"]["value"] == near
    assert found["agreement_far"]["value"] == far
    assert found["agreement"]["value"] == (7.5 + 2) / 16
    low, high = found["agreement_far"]["low"], found["agreement_far"]["high"]
    assert low is not None and high is not None and 0 <= low < far < high < 0.7
    few = agreement((by[:8], zero[:8]), (gold[:8], zero[:8]), kl[:8])
    assert few == {}, "seven pairs that gold tells apart"
    assert agreement((by, zero), (gold, zero), 0 * kl).keys() == {"agreement", "agreement_near"}
