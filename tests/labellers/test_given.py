"""Labels that the data bring, and samples without a label."""

import math
from dataclasses import replace

import pytest
import torch

import tables
from preftune.labellers import (
    Demonstration,
    Feedback,
    GivenPreference,
    Good,
    Member,
    Unlabelled,
)
from preftune.method import Method
from preftune.rounds import group_terms, refill
from preftune.samples import Batch
from preftune.sources import Offline
from preftune.terms import bind, loss_sum
from tables import Table, f64, scored

NAN = math.nan


def label(labeller, **more) -> Batch:
    batch, state = labeller(scored(**more), {})
    assert state == {}
    return batch


def test_a_demonstration_is_the_first_response():
    batch = label(Demonstration(), reward=[[0.0, 1.0], [5.0, 3.0]])
    assert batch.index.tolist() == [[[0]], [[0]]] and batch.keep is None and batch.data == {}


def test_good_keeps_the_chosen_of_a_pair():
    batch = label(Good(), reward=[[0.0, 1.0], [5.0, 3.0]])
    assert batch.index.tolist() == [[[0]], [[0]]]
    assert batch.keep.tolist() == [[True], [True]]


def test_good_masks_what_is_labelled_bad():
    """Labels good, bad, good; a row without a label counts as good."""
    batch = label(Good(), reward=[[0.0]] * 4, extra={"label": [1.0, 0.0, 1.0, NAN]})
    assert batch.keep.tolist() == [[True], [False], [True], [True]]


def test_a_label_column_says_nothing_of_a_pair():
    """The first of two responses is the good one, whatever a column of that name holds."""
    batch = label(Good(), reward=[[0.0, 1.0]], extra={"label": [0.0]})
    assert batch.keep.tolist() == [[True]]


def test_the_mean_is_over_the_good_rows_alone():
    """Through the source: of four completions two are good; the loss is their mean."""
    table = Table(rows=((0,), (1,), (2,), (3,)), extra={"label": (1.0, 0.0, 0.0, 1.0)})
    world = tables.make_world("binary_feedme", table=table, shape=(4, 5))
    term = tables.row_of("binary_feedme").terms[0]
    term = replace(term, source=Offline(responses=1))
    _, logged = tables.run(Method(name="x", terms=(term,)), world, 1)
    logp = tables.logits(1, 4, 5).log_softmax(-1)  # as the policy started
    assert logged[0]["loss"] == pytest.approx(-float(logp[0, 0] + logp[3, 3]) / 2, abs=1e-12)


def test_feedback_on_a_pair():
    """Two responses, the first good, and a mismatched third whose log-ratios 0.5 and -0.1 have the
    mean 0.2."""
    logp = [[-1.0, -2.0, -0.5], [-1.0, -1.0, -1.1]]
    ref = [[-9.0, 9.0, -1.0], [4.0, 4.0, -1.0]]
    batch = label(Feedback(), logp=logp, ref_logp=ref)
    assert batch.index.tolist() == [[[0], [1]]] * 2 and batch.roles == ()
    assert batch.data["label"].tolist() == [[[1.0], [0.0]]] * 2
    torch.testing.assert_close(batch.data["kl"], f64([[[0.2], [0.2]]] * 2), rtol=0, atol=1e-12)
    assert Feedback().items(3) == 2 and Feedback().least == 2


def test_feedbacks_kl_is_never_negative():
    batch = label(Feedback(), logp=[[0.0, -1.0], [0.0, -4.0]], ref_logp=[[0.0, 0.0], [0.0, -3.0]])
    assert batch.data["kl"].tolist() == [[[0.0]], [[0.0]]]


def test_the_clamp_is_of_the_mean_and_not_of_each():
    """Log-ratios 3 and -1: the mean is 1; clamped one by one it would be 1.5."""
    batch = label(Feedback(), logp=[[0.0, 3.0], [0.0, -1.0]], ref_logp=[[0.0, 0.0], [0.0, 0.0]])
    assert batch.data["kl"].tolist() == [[[1.0]], [[1.0]]]


def test_feedbacks_kl_is_summed_over_real_tokens():
    """Mismatched responses of 2 and 1 tokens: log-ratios 0.25 + 0.5 and 1, mean 0.875."""
    batch = label(
        Feedback(),
        logp=[[[0.0, 0.0], [-1.0, -1.0]], [[0.0, 0.0], [-1.0, 50.0]]],
        ref_logp=[[[0.0, 0.0], [-1.25, -1.5]], [[0.0, 0.0], [-2.0, -50.0]]],
        lengths=[[2, 2], [2, 1]],
    )
    assert batch.data["kl"].flatten().tolist() == [0.875, 0.875]


def test_feedback_by_labels_of_completions():
    """One response and the mismatched one: the label column decides."""
    batch = label(
        Feedback(),
        logp=[[0.0, 1.0]] * 3,
        ref_logp=[[0.0, 0.0]] * 3,
        extra={"label": [0.0, 1.0, NAN]},
    )
    assert batch.index.tolist() == [[[0]]] * 3
    assert batch.data["label"].tolist() == [[[0.0]], [[1.0]], [[1.0]]]


def test_feedbacks_kl_of_each_run():
    """Runs whose mismatched log-ratios have the means 1, -1 and 3."""
    logp = [[[0.0, m - 1], [0.0, m + 1]] for m in (1.0, -1.0, 3.0)]
    batch = label(Feedback(), logp=logp, ref_logp=[[[0.0, 0.0]] * 2] * 3)
    assert batch.data["kl"][..., 0].tolist() == [[[1.0]] * 2, [[0.0]] * 2, [[3.0]] * 2]
    assert batch.index.shape == (3, 2, 1, 1) and batch.data["label"].shape == (3, 2, 1, 1)


def test_a_given_preference_is_first_over_second():
    batch = label(GivenPreference(), reward=[[0.0, 9.0]])  # whatever a reward says
    assert batch.index.tolist() == [[[0, 1]]] and batch.roles == ("chosen", "rejected")
    assert batch.keep is None and batch.data == {}


@pytest.mark.parametrize("own", [0.0, 0.2])
def test_soft_labels_become_label_smoothing(own):
    """Certain to 0.9 that the chosen is better: 0.1 of the loss the other way. A row that does not
    say has the objective's own."""
    term = tables.row_of("cdpo", label_smoothing=own).terms[0]
    samples = scored(ref_logp=[[0.0, 0.0]] * 3, extra={"probability": [0.9, 0.5, NAN]})
    batch, _ = GivenPreference()(samples, {})
    bound = bind(term, samples, batch, {"logp": torch.zeros(3, 2, 1, dtype=torch.float64)})
    torch.testing.assert_close(bound["label_smoothing"], f64([[0.1], [0.5], [own]]))


def test_a_margin_of_the_data_goes_to_the_objective_unless_declined():
    extra = {"margin": [0.25, NAN], "probability": [1.0, 0.75]}
    batch = label(GivenPreference(), reward=[[0.0, 0.0]] * 2, extra=extra)
    assert batch.data["margin"].tolist() == [[0.25], [0.0]]
    declined = label(GivenPreference(margin="none"), reward=[[0.0, 0.0]] * 2, extra=extra)
    assert set(declined.data) == {"label_smoothing"}
    assert declined.data["label_smoothing"].tolist() == [[0.0], [0.25]]


def _logsig(x: float) -> float:
    return -math.log(1 + math.exp(-x))


@pytest.mark.parametrize("margin", ["data", "none"])
def test_margin_and_probability_in_the_loss_of_a_reward_model(margin):
    """-(1 - e) log s(z) - e log s(-z) with z = s_w - s_l - m, summed over two pairs by hand."""
    row = tables.row_of("reward")
    term = replace(row.terms[0], labeller=GivenPreference(margin=margin))
    samples = scored(
        reward=[[0.0, 0.0]] * 2, extra={"margin": [0.5, -1.0], "probability": [0.9, 0.6]}
    )
    batch, _ = term.labeller(samples, {})
    score = f64([[1.0, 0.25], [-0.5, 2.0]])
    got, _ = loss_sum(term, samples, batch, {"score": score})
    expected = 0.0
    for (w, lost), m, e in zip(score.tolist(), (0.5, -1.0), (0.1, 0.4), strict=True):
        z = w - lost - (m if margin == "data" else 0.0)
        expected += -(1 - e) * _logsig(z) - e * _logsig(-z)
    assert float(got) == pytest.approx(expected, abs=1e-12)


def test_columns_reach_the_loss_through_the_source():
    """Probability 0.75 of each pair: DPO at the reference is ln 2, and the gradient is halved."""
    plain, soft = Table(), Table(extra={"probability": (0.75,) * 6})
    grads = []
    for table in (plain, soft):
        world = tables.make_world("dpo", table=table, at_reference=True)
        tables.gradient(group_terms(tables.row_of("dpo")), world, 0)
        grads.append(world.policy.logits.grad)
    torch.testing.assert_close(grads[1], 0.5 * grads[0], rtol=0, atol=1e-15)


def test_unlabelled_samples_are_one_item():
    batch = label(Unlabelled(baseline="none"), reward=[[0.0] * 3] * 2)
    assert batch.index.tolist() == [[[0, 1, 2]]] * 2 and batch.data == {} and batch.roles == ()
    assert Unlabelled(baseline="none").needs == frozenset() and not Unlabelled().labelled


def test_the_baseline_of_a_sample_is_the_mean_of_the_others():
    """Log-ratios (1, 2, 6): (4, 3.5, 1.5)."""
    batch = label(Unlabelled(), logp=[[0.0, 1.0, 5.0]], ref_logp=[[-1.0, -1.0, -1.0]])
    assert batch.data["baseline"].tolist() == [[[4.0, 3.5, 1.5]]]
    assert Unlabelled().needs == {"logp", "ref_logp"}


def test_one_sample_has_no_other():
    assert label(Unlabelled(), logp=[[1.0]], ref_logp=[[0.0]]).data == {}


def test_a_member_is_the_response_at_its_place():
    batch = label(Member(place=2), reward=[[0.0, 1.0, 2.0]] * 2)
    assert batch.index.tolist() == [[[2]], [[2]]] and batch.keep is None
    assert Member(place=2).least == 3 and Member().least == 1 and not Member().labelled


def test_a_member_is_told_by_whose_it_is():
    """Wherever it stands, in each run of a study; the second of the policy's is at place 3."""
    origin = [[[0, -1, -2, 7]] * 2, [[0, -1, -2, 7]] * 2]
    places = {"policy": 0, "reference": 1, "data": 2}
    for name, place in places.items():
        batch = label(Member(origin=name), reward=[[[0.0] * 4] * 2] * 2, origin=origin)
        assert batch.index.tolist() == [[[[place]]] * 2] * 2
    second = Member(origin="policy", place=1)
    assert label(second, reward=[[[0.0] * 4] * 2] * 2, origin=origin).index.unique() == 3


def test_what_the_data_must_hold():
    given = {c: c().given for c in (Demonstration, Good, Feedback, GivenPreference, Member)}
    assert list(given.values()) == [1, 1, 1, 2, 0] and Unlabelled().given == 0


def test_the_mismatched_response_is_scored_and_not_trained():
    """Through the source: the KL is of the next row's chosen response, and no gradient flows to
    arms that only the mismatched responses hold."""
    table = Table(rows=((0, 1), (2, 3), (4, 5)))
    world = tables.make_world("kto", table=table, shape=(3, 6), batch_size=6, seed=2)
    (group,) = group_terms(tables.row_of("kto"))
    refill(group, world, 0)
    h = (world.policy.logits.log_softmax(-1) - world.reference.logits.log_softmax(-1)).detach()
    mean = float(h[0, 2] + h[1, 4] + h[2, 0]) / 3
    batch = group.round.batches[0]
    assert mean > 1 and float(batch.data["kl"][0, 0, 0]) == pytest.approx(mean, abs=1e-12)
    assert batch.index.max() == 1 and group.round.samples.tokens.shape == (3, 3, 1)
