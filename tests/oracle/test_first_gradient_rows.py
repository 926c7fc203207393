"""`first_gradient` of the other rows of the table against losses written here from the papers.

The losses stand in `row_losses.py`, each beside deliberately wrong versions of itself, which must
differ from `first_gradient`: the comparison is able to fail. `xpo` and `reward` have files of their
own, `best_of_n` stands with the main rows.
"""

from itertools import combinations
from pathlib import Path

import pytest
from row_cases import LABELLED, ROWS, Case, far
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from worlds import (
    CUT_PAIRS,
    PAIRS,
    SFT_ROWS,
    TOLERANCE,
    VISIBLE,
    World,
    assert_same,
    exact_norm,
    largest_difference,
)


@pytest.fixture(autouse=True)
def only_losses_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama's norm in float64 on both sides."""
    monkeypatch.setattr(LlamaRMSNorm, "forward", exact_norm)


# --- every row ----------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", ["own", "far"])
@pytest.mark.parametrize("method", ROWS)
def test_gradient_of_every_row(world: World, method: str, reference: str, tmp_path: Path) -> None:
    """Default settings; a reference with other weights makes signs, beta and KL visible."""
    folder = far(world, method) if reference == "far" else None
    case = Case(world, method, tmp_path, reference=folder)
    assert_same(case.actual(), case.expected())


@pytest.mark.parametrize("method", [name for name, row in ROWS.items() if row.changed])
def test_changed_settings(either: World, method: str, tmp_path: Path) -> None:
    config = ROWS[method].changed
    case = Case(either, method, tmp_path, reference=far(either, method), config=config)
    assert_same(case.actual(), case.expected())


@pytest.mark.parametrize("method", ROWS)
def test_gradient_under_the_chat_template(
    worlds: dict[str, World], method: str, tmp_path: Path
) -> None:
    """Plain text becomes one user and one assistant turn; a control follows the turn's opening."""
    world = worlds["gpt2-bos"]
    case = Case(world, method, tmp_path, reference=far(world, method), template="auto")
    assert_same(case.actual(), case.expected())


@pytest.mark.parametrize("method", ROWS)
def test_micro_batches_change_nothing(
    worlds: dict[str, World], method: str, tmp_path: Path
) -> None:
    """Whitening, counts of tokens and KTO's KL are of the whole round or minibatch."""
    world = worlds["llama-tied-bos"]
    case = Case(world, method, tmp_path, reference=far(world, method))
    assert_same(case.actual(micro_batch_tokens=24), case.expected())


# --- other data ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", ["binary_feedme", "binary_reward_conditioning", "kto", "offline_rwr"]
)
def test_single_labelled_responses(either: World, method: str, tmp_path: Path) -> None:
    """prompt, completion, label: as many good as bad ones is not assumed."""
    rows = LABELLED[1:]
    case = Case(either, method, tmp_path, reference=either.other, rows=rows)
    assert_same(case.actual(), case.expected())


def test_own_samples_against_demonstrations(either: World, tmp_path: Path) -> None:
    case = Case(either, "chosen_vs_own", tmp_path, reference=either.other, rows=SFT_ROWS)
    assert_same(case.actual(), case.expected())


def test_scores_of_the_data_are_rewards(either: World, tmp_path: Path) -> None:
    rows = [
        row | {"score_chosen": 0.7 - n, "score_rejected": 0.4 * n} for n, row in enumerate(PAIRS)
    ]
    case = Case(either, "offline_rwr", tmp_path, rows=rows)
    assert_same(case.actual(), case.expected())


OF_DATA = [name for name, row in ROWS.items() if not row.rewards]


@pytest.mark.parametrize("method", OF_DATA)
def test_cut_responses_get_no_end_token(
    worlds: dict[str, World], method: str, tmp_path: Path
) -> None:
    world = worlds["gpt2-bos"]
    case = Case(world, method, tmp_path, reference=far(world, method), rows=CUT_PAIRS)
    assert_same(case.actual(), case.expected())


@pytest.mark.parametrize("method", ["ppo", "reinforce", "rloo"])
def test_without_kl_the_reference_is_not_seen(either: World, method: str, tmp_path: Path) -> None:
    case = Case(either, method, tmp_path, reference=either.other, config={"kl": 0.0})
    expected = Case(either, method, tmp_path, config={"kl": 0.0}).expected()
    assert_same(case.actual(), expected)


def test_kto_clamps_its_kl(either: World, tmp_path: Path) -> None:
    """Policy and reference exchanged turn the sign of the estimate: once it is 0, once it is not.

    Each wrong version is seen on its side.
    """
    one = Case(either, "kto", tmp_path, reference=either.other)
    turned = Case(either, "kto", tmp_path, reference=either.policy, policy=either.other)
    estimate = float(one.oracle().mismatched(one.material()))
    positive, negative = (one, turned) if estimate > 0 else (turned, one)
    assert abs(estimate) > 0.1
    for case, wrong, same in (
        (positive, "kl_left_out", "not_clamped"),
        (negative, "not_clamped", "kl_left_out"),
    ):
        actual = case.actual()
        assert_same(actual, case.expected())
        assert_same(actual, case.expected(same))
        assert largest_difference(actual, case.expected(wrong)) > VISIBLE


MINIBATCHES = {"kto": (4, 2), "dpo_nll": (2, 2), "ppo": (1, 1), "rloo": (2, 2)}
"""batch_size, and the rows or prompts that it takes."""
DYADIC = [[0.25, 1.0], [1.5, -0.5], [-2.0, -1.0]]


@pytest.mark.parametrize("method", MINIBATCHES)
def test_minibatch_of_a_larger_round(either: World, method: str, tmp_path: Path) -> None:
    """The order is the loop's; the gradient is that of one set of rows and of no other.

    Whitening is over the round, the mean and its counts are of the minibatch, KTO's next row is
    the next of the data whether drawn or not.
    """
    batch_size, taken = MINIBATCHES[method]
    rewards = DYADIC if ROWS[method].rewards else ()
    case = Case(either, method, tmp_path, reference=either.other, rewards=rewards)
    actual = case.actual(batch_size=batch_size)
    differences = [
        largest_difference(actual, case.expected(minibatch=minibatch))
        for minibatch in combinations(range(len(case.data)), taken)
    ]
    assert sum(difference <= TOLERANCE for difference in differences) == 1, differences
    assert sorted(differences)[1] > VISIBLE


# --- the comparison is able to fail -------------------------------------------------------------


@pytest.fixture(scope="module")
def actual_of() -> dict[str, dict[str, Tensor]]:
    """Gradients that several flaws are compared with."""
    return {}


@pytest.mark.parametrize(
    ("method", "flaw"), [(method, flaw) for method, row in ROWS.items() for flaw in row.flaws]
)
def test_wrong_oracle_differs(
    worlds: dict[str, World],
    method: str,
    flaw: str,
    tmp_path: Path,
    actual_of: dict[str, dict[str, Tensor]],
) -> None:
    world = worlds[ROWS[method].seen_in]
    config = ROWS[method].changed
    case = Case(world, method, tmp_path, reference=far(world, method), config=config)
    if method not in actual_of:
        actual_of[method] = case.actual()
    assert largest_difference(actual_of[method], case.expected(flaw)) > VISIBLE
