"""Rows that cannot mean what they say are refused when the configuration is built."""

import pytest
import yaml

pytestmark = pytest.mark.long

PAIRS = {
    "source": "offline", "labeller": "given_preference", "objective": "dpo",
    "settings": {"beta": 0.1},
}  # fmt: skip
RATIO = {
    "source": "on_policy", "labeller": {"name": "advantage", "baseline": "leave_one_out"},
    "objective": "ppo_clip", "settings": {"clip": 0.2}, "level": "token",
}  # fmt: skip
FRESH_KL = {"source": "on_policy", "labeller": "unlabelled", "objective": "reverse_kl"}


@pytest.fixture
def row(refused, train, here):
    """The message for a row in YAML, with further flags."""

    def check(*terms: dict, flags: tuple[str, ...] = (), **more: object) -> str:
        mine = {"method": {"name": "mine", "terms": list(terms), **more}}
        (here / "mine.yaml").write_text(yaml.safe_dump(mine))
        args = train("--config", "mine.yaml", "--reward", "length:min", *flags)
        place = args.index("--method")
        return refused(*args[:place], *args[place + 2 :])

    return check


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"source": "offline"}, ["ppo_clip", "do not say what drew them", "on_policy"]),
        ({"labeller": {"name": "advantage", "baselin": "none"}}, ["Did you mean 'baseline'"]),
        ({"labeller": {"name": "advantage", "baseline": "mean"}}, ["baseline", "leave_one_out"]),
        ({"labeller": {"name": "advantage", "gamma": 2}}, ["gamma", "0 to 1"]),
        ({"labeller": {"name": "advantage", "shaping": {"limt": 1}}}, ["limt", "'limit'"]),
        ({"source": {"name": "pool", "members": ["on_policy"]}}, ["two sources"]),
        (
            {"source": {"name": "pool", "members": ["on_policy", "ofline"]}},
            ["members.1", "offline"],
        ),
        ({"source": {"name": "on_policy", "samples_per_prompt": 1}}, ["2 or more"]),
        ({"max_ratio": -1}, ["max_ratio", "above 0"]),
        (
            {"objective": "value_clip", "settings": {"clip": 0.2}},
            ["value_clip learns the targets", "baseline: value"],
        ),
        (
            {"objective": "value_clip", "settings": {"clip": 0.2}, "level": "sequence"},
            ["level: token"],
        ),
    ],
)
def test_a_clipped_ratio(row, change, words):
    message = row(RATIO | change)
    assert all(word in message for word in words), message


def test_pairs_need_a_labeller_that_makes_them(row):
    message = row(PAIRS | {"labeller": "demonstration"})
    assert "compares chosen and rejected" in message


@pytest.mark.parametrize("objective", ["reverse_kl", "kl_loss"])
def test_a_kl_is_of_samples_of_the_policy_itself(row, objective):
    term = FRESH_KL | {"objective": objective}
    assert "temperature 1" in row(PAIRS, term, flags=("--temperature", "0.7"))
    offline = term | {"source": "offline", "labeller": {"name": "unlabelled", "baseline": "none"}}
    assert "fresh samples" in row(PAIRS, offline)


def test_the_plain_log_ratio_is_no_loss(row):
    term = FRESH_KL | {"objective": "kl_loss", "settings": {"estimator": "k1"}}
    message = row(PAIRS, term)
    assert "gradient zero" in message and "k2" in message


def test_stale_samples_have_no_reverse_kl(row):
    message = row(FRESH_KL | {"source": {"name": "on_policy", "passes": 2}})
    assert "put the KL into the reward" in message


def test_a_budget_needs_a_kl(row, refused, train):
    assert "no KL on fresh samples to steer" in row(PAIRS, target_kl=1.0)
    args = train("--reward", "length:min", "--target-kl", "1", method="rloo")
    assert "Give --kl 0.05 too" in refused(*args)
    args = train("--target-kl", "1", "--temperature", "0.5", method="ppo")
    assert "temperature 1" in refused(*args, "--reward", "length:min")
    assert "above 0" in row(PAIRS, target_kl=-1.0)


def test_a_reference_that_nothing_reads(refused, train):
    assert "no use for a reference" in refused(*train("--reference-update", "ema", method="sft"))


def test_ppo_without_its_values(refused, train):
    """The term that learns them cannot have another baseline; `--baseline` leaves it out."""
    args = train(
        "--reward", "length:min", "--set", "terms.1.labeller.baseline=running", method="ppo"
    )
    assert "baseline: value" in refused(*args)


def test_rewards_of_offline_responses(refused, train):
    assert "reward: the method 'offline_rwr'" in refused(*train(method="offline_rwr"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--beta", "1"], ["'--beta'", "no use"]),
        (["--max-new-tokens", "4"], ["'--max-new-tokens'", "no use"]),
        (["--label-smoothing", "0.7"], ["label_smoothing", "0.5"]),
        (["--set", "terms.0.labeller.margn=none"], ["margn", "'margin'"]),
    ],
)
def test_reward_flags(refused, tiny_model, pairs_file, flags, words):
    message = refused("reward", "--model", tiny_model, "--data", pairs_file, *flags)
    assert all(word in message for word in words), message


def test_prompts_are_no_data_of_a_reward_model(refused, tiny_model, here):
    (here / "p.jsonl").write_text('{"prompt": "a"}\n')
    message = refused("reward", "--model", tiny_model, "--data", "p.jsonl")
    assert "Wanted: chosen and rejected" in message
