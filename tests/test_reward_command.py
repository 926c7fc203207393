"""`preftune reward`: a reward model from a causal model, and the runs that use it."""

import json
import math
from pathlib import Path

import pytest
import torch

from preftune import cli, train
from preftune.reward_evaluation import calibration_error, figures
from preftune.runs import RunFolder

pytestmark = pytest.mark.long


@pytest.fixture
def pairs(here):
    """Forty prompts with ten pairs each; the shorter answer is chosen."""
    rows = [
        {
            "prompt": f"Say {n % 40}.", "chosen": f"{n}", "rejected": f"I would say {n}",
            "chosen_model": "short" if n % 3 else "long", "rejected_model": "long",
        }
        for n in range(400)
    ]  # fmt: skip
    (here / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return "pairs.jsonl"


@pytest.fixture
def trained(pairs, tiny_model, capsys):
    """A reward model's run, and what the command printed."""
    flags = ("--max-steps", "12", "--learning-rate", "1e-2", "--output", "rm", "--json")
    assert cli.run(["reward", "--model", tiny_model, "--data", pairs, *flags]) == 0
    return json.loads(capsys.readouterr().out)


def test_it_starts_at_ln_2_and_learns(trained):
    rows = RunFolder(Path("rm")).read("metrics.jsonl")
    first = next(r for r in rows if r["step"] == 1)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-7) and first["margin"] == 0
    found = trained["evaluation"]
    assert found["accuracy"]["value"] > 0.9 > found["accuracy_longer"]["value"]
    assert found["accuracy_shorter"]["value"] == 1.0 and found["nll"]["value"] < math.log(2)
    assert {"accuracy_writer", "accuracy_ref_logp", "calibration_error"} <= set(found)


def test_prompts_are_held_out_whole(trained, pairs, tiny_model, here):
    from preftune.config import Config
    from preftune.preparing import prepare

    given = Config(method="reward", model=tiny_model, data=pairs, output="x", eval_fraction=0.1)
    parts = prepare(given)
    kept = {tuple(p) for p in parts.data.prompts}
    held = {tuple(p) for p in parts.held_out.prompts}
    assert len(held) == 4 and len(parts.held_out) == 40 and not kept & held


def test_runs_use_it_by_the_folder_and_say_who_judged(trained, pairs, tiny_model, here):
    """The run's own pairs trained it, so its labels are `rm_same`; on other data `rm_other`."""
    (here / "other.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    for name, data, told in (("a", pairs, "rm_same"), ("b", "other.jsonl", "rm_other")):
        run = train(
            {"method": "rloo", "model": tiny_model, "data": data, "reward": "rm", "max_steps": 2,
             "max_new_tokens": 4, "batch_size": 2, "output": name, "max_rows": 8}
        )  # fmt: skip
        assert run.folder.joinpath("config.yaml").read_text().count(f"label_source: {told}") == 1
        assert all(math.isfinite(m["reward"]) for m in run.metrics)
        assert run.metrics[-1]["reward_queries"] == 16


def test_an_ensemble_of_two_is_less_than_its_mean(trained, tiny_model, pairs, here):
    from preftune import judges
    from preftune.rewards import Judged

    asked = Judged(prompts=["Say 1."] * 2, completions=["1", "I would say 1"], tokens=[1, 5])
    flags = ("--max-steps", "6", "--learning-rate", "1e-2", "--output", "rm2", "--seed", "1")
    assert cli.run(["reward", "--model", tiny_model, "--data", pairs, *flags]) == 0
    both = [judges.make_reward(n, None)(asked) for n in ("rm", "rm2")]
    careful = judges.make_reward("ensemble:rm,rm2;kappa=1", None)(asked)
    for a, b, c in zip(*both, careful, strict=True):
        mean, spread = (a + b) / 2, torch.tensor([a, b]).std()
        assert c == pytest.approx(mean - float(spread), abs=1e-5)


def test_figures_by_hand():
    """Margins 2, -1, 0 of prompts 0, 0, 1: right 1, 0, 1/2. Only the first pair's lengths match."""
    scores = torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 1.0]]).double()
    rules = {"longer": torch.tensor([1.0, 0.0, 0.0]).double()}
    lengths = torch.tensor([[10, 11], [5, 9], [3, 1]])
    found = figures(scores, rules, lengths, [0, 0, 1])
    assert found["accuracy"]["value"] == pytest.approx(0.5)
    assert found["accuracy_gain"]["value"] == pytest.approx(0.5 - 1 / 3)
    assert found["gain_over_longer"] == found["accuracy_gain"]  # the only rule is the best
    assert found["accuracy_length_matched"]["value"] == 1.0
    assert found["length_matched"]["value"] == pytest.approx(1 / 3)
    nll = sum(math.log(1 + math.exp(-m)) for m in (2, -1, 0)) / 3
    assert found["nll"]["value"] == pytest.approx(nll)


def test_calibration_error_by_hand():
    """Confidences s(0.5), s(1), s(2), each in a bin of its own: right, wrong, right."""
    s = [1 / (1 + math.exp(-m)) for m in (0.5, 1.0, 2.0)]
    expected = ((1 - s[0]) + s[1] + (1 - s[2])) / 3
    margin = torch.tensor([0.5, -1.0, 2.0]).double()
    assert calibration_error(margin) == pytest.approx(expected)


def test_several_rewards_are_summed_and_each_is_logged(pairs, tiny_model, here):
    run = train(
        {"method": "rloo", "model": tiny_model, "data": pairs, "max_steps": 1, "batch_size": 2,
         "reward": ["length:min", "length:within=2"], "reward_weights": [1.0, 0.5],
         "max_new_tokens": 4, "output": "two", "max_rows": 8}
    )  # fmt: skip
    row = run.metrics[0]
    assert row["reward"] == pytest.approx(
        row["reward:length:min"] + 0.5 * row["reward:length:within=2"]
    )


def test_a_conditioned_model_asks_for_good_responses(pairs, tiny_model, here, capsys):
    """Its chat template carries the control, for a prompt and before an answer."""
    from preftune.huggingface import load_tokenizer

    train(
        {"method": "binary_reward_conditioning", "model": tiny_model, "data": pairs, "max_steps": 1,
         "reward": "length:min", "max_new_tokens": 4, "output": "brc", "max_rows": 8,
         "eval_fraction": 0.25}
    )  # fmt: skip
    talk = [{"role": "user", "content": "Hi"}]
    plain, asked = (load_tokenizer(n) for n in (tiny_model, "brc/model"))
    ids = [t.apply_chat_template(talk, add_generation_prompt=True, tokenize=False)
           for t in (plain, asked)]  # fmt: skip
    assert ids[1] == ids[0] + "[good]\n"
    whole = asked.apply_chat_template(
        [*talk, {"role": "assistant", "content": "Yo"}], tokenize=False
    )
    assert whole.startswith(ids[1]) and whole.endswith("Yo</s>")
    assert cli.run(["inspect", "--model", "brc", "--data", pairs, "--rows", "1"]) == 0
    assert "[good]" in capsys.readouterr().out
