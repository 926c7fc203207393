"""The table of methods: axes computed from the rows, settings, and what is refused."""

import ast
from pathlib import Path

import pytest

from preftune import building, methods, spec
from preftune import objectives as o
from preftune.config import load
from preftune.errors import UserError
from preftune.labellers import BestWorst, GivenPreference
from preftune.sampling.decoding import Decoding
from preftune.sources import Offline, OnPolicy
from preftune.terms import Term

# on-policy, sample reuse, negative gradient: table 1 of arXiv 2404.14367 for its rows, and what
# follows from their construction for the others.
AXES = {
    "sft": (False, True, False),
    "pref_ft": (False, True, False),
    "binary_feedme": (False, True, False),
    "binary_reward_conditioning": (False, True, False),
    "rwr": (True, True, False),
    "offline_rwr": (False, True, False),
    "best_of_n": (False, True, False),
    "on_policy_best_of_n": (True, True, False),
    "reinforce": (True, False, True),
    "rloo": (True, False, True),
    "ppo": (True, True, True),
    "dpo": (False, True, True),
    "ipo": (False, True, True),
    "on_policy_dpo": (True, True, True),
    "on_policy_ipo": (True, True, True),
    "hypo": (False, True, True),
    "half_and_half": (True, True, True),
    "auto": (True, True, True),
    "chosen_vs_own": (True, True, True),
    "cdpo": (False, True, True),
    "robust_dpo": (False, True, True),
    "ln_dpo": (False, True, True),
    "dpo_nll": (False, True, True),
    "dpop": (False, True, True),
    "wpo": (False, True, True),
    "chi_po": (False, True, True),
    "simpo": (False, True, True),
    "orpo": (False, True, True),
    "cpo": (False, True, True),
    "kto": (False, True, True),
    "xpo": (True, False, True),
    "grpo": (True, False, True),
    "reward": (False, True, False),
}


def test_every_row_has_its_axes_and_its_source_text():
    assert set(methods.table()) == set(AXES)
    for name, row in methods.table().items():
        assert (row.on_policy, row.sample_reuse, row.negative_gradient) == AXES[name], name
        assert row.mode_seeking == (row.on_policy or row.negative_gradient)
        assert row.paper and row.equation


def test_hypo_uses_fresh_samples_without_labels():
    assert methods.get("hypo").on_policy_unlabelled
    assert not methods.get("on_policy_dpo").on_policy_unlabelled


def test_a_negative_weight_turns_imitation_into_a_negative_gradient():
    best = methods.get("on_policy_best_of_n").terms[0]
    row = methods.Method(
        name="x",
        terms=(
            best,
            Term(source=best.source, labeller=best.labeller, objective=o.nll, weight=-0.1),
        ),
    )
    assert row.negative_gradient


def test_one_pass_over_fresh_samples_is_no_reuse():
    row = methods.configure(methods.get("on_policy_dpo"), {"passes": 1})
    assert not row.sample_reuse


def test_settings_reach_every_term_that_has_them():
    row = methods.resolve(
        methods.configure(methods.get("hypo"), {"beta": 0.2, "samples_per_prompt": 4})
    )
    assert row.terms[0].settings["beta"] == 0.2
    assert row.terms[1].source.num_responses == 4
    assert row.terms[1].weight == pytest.approx(0.01)  # 0.05 x beta


def test_weight_is_the_last_terms():
    row = methods.configure(methods.get("hypo"), {"weight": 0.3})
    assert [t.weight for t in row.terms] == [1.0, 0.3]


@pytest.mark.parametrize(
    ("name", "setting", "hint"),
    [("ipo", "beta", "tau"), ("dpo", "tau", "beta"), ("dpo", "passes", "no use")],
)
def test_a_setting_without_use_is_refused_with_the_cure(name, setting, hint):
    with pytest.raises(UserError, match=hint):
        methods.configure(methods.get(name), {setting: 1})


def test_an_unknown_row_offers_the_nearest():
    with pytest.raises(UserError, match="Did you mean 'hypo'"):
        methods.get("hyppo")


@pytest.mark.parametrize(
    "settings",
    [
        {"passes": 2},
        {"prompts_per_round": 64},
        {"temperature": 0.7},
        {"top_p": 0.9},
        {"top_k": 5},
        {"min_new_tokens": 2},
    ],
)
def test_a_kl_term_needs_fresh_samples_of_the_policy_itself(settings):
    with pytest.raises(UserError, match="reverse_kl needs"):
        building.method_of(load({"method": "hypo", "batch_size": 8, **settings}))


def test_rounds_smaller_than_an_update_are_refused():
    with pytest.raises(UserError, match="prompts_per_round: 2"):
        building.method_of(
            load({"method": "on_policy_dpo", "batch_size": 8, "prompts_per_round": 2})
        )


def test_one_sample_cannot_be_compared():
    row = methods.configure(methods.get("on_policy_dpo"), {"samples_per_prompt": 1})
    with pytest.raises(UserError, match="samples_per_prompt: 1"):
        methods.check(row, Decoding(), 8)


@pytest.mark.parametrize("name", list(AXES))
def test_a_row_survives_the_way_through_plain_data(name):
    row = methods.resolve(methods.get(name))
    assert spec.from_data(name, spec.to_data(row), row) == row


def test_a_users_row_in_plain_data():
    row = spec.from_data("mine", [
        {"source": {"name": "on_policy", "samples_per_prompt": 4}, "labeller": "best_worst",
         "objective": "ipo", "settings": {"tau": 0.5}, "weight": 0.5},
        {"source": "offline", "labeller": "given_preference",
         "objective": "preftune.objectives:dpo", "settings": {"beta": 0.3}},
    ])  # fmt: skip
    assert row.terms[0] == Term(
        source=OnPolicy(samples_per_prompt=4),
        labeller=BestWorst(),
        objective=o.ipo,
        settings={"tau": 0.5},
        weight=0.5,
    )
    assert row.terms[1].source == Offline() and row.terms[1].labeller == GivenPreference()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "offlin"}, "Did you mean 'offline'"),
        ({"objective": "reinforc"}, "Did you mean 'reinforce'"),
        ({"settings": {"betta": 1}}, "beta"),
        ({"wieght": 1}, "Did you mean 'weight'"),
        ({"share": 2.0}, "share"),
        ({"source": {"name": "offline", "tke": "all"}}, "Did you mean 'take'"),
    ],
)
def test_a_wrong_row_names_the_place(change, message):
    good = {
        "source": "offline",
        "labeller": "given_preference",
        "objective": "dpo",
        "settings": {"beta": 0.1},
    }
    with pytest.raises(UserError, match=message):
        spec.from_data("mine", [{**good, **change}])


def test_the_machinery_names_no_method():
    """No string of a method's name stands in the parts that run every row alike."""
    home = Path(methods.__file__).parent
    for part in (
        "loop",
        "rounds",
        "terms",
        "measures",
        "sources",
        "kl_control",
        "collecting",
        "labellers/base",
        "labellers/given",
        "labellers/ranked",
        "labellers/weighted",
        "checkpoint",
        "training",
        "parts",
        "evaluate",
    ):
        tree = ast.parse((home / f"{part}.py").read_text())
        strings = {
            n.value
            for n in ast.walk(tree)
            if isinstance(n, ast.Constant) and isinstance(n.value, str)
        }
        # a reward is also what it is, and auto a value of settings
        assert not strings & (set(AXES) - {"reward", "auto"}), part


def test_another_baseline_takes_the_value_head_away() -> None:
    own = methods.configure(
        methods.get("ppo"), {"baseline": "leave_one_out", "samples_per_prompt": 4}
    )
    assert len(own.terms) == 1 and "value" not in own.needs
    assert len(methods.configure(methods.get("ppo"), {"baseline": "value"}).terms) == 2
