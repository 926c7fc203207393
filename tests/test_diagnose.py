"""`preftune diagnose` on a tiny model: what it measures, resumes, refuses and advises."""

import contextlib
import io
import json
import shutil
from pathlib import Path

import pytest
import torch

from preftune import cli, loading
from preftune.config import load
from preftune.diagnosis import job, measure, page
from preftune.diagnosis.reading import DOCUMENTED
from preftune.policies.transformer import Transformer

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def own_pairs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Sixty pairs of sixty prompts."""
    path = tmp_path_factory.mktemp("own") / "pairs.jsonl"
    rows = (
        {"prompt": f"Say {n}.", "chosen": f"{n % 7}{n}", "rejected": f"no {n} no {n % 5}"}
        for n in range(60)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def arguments(tiny_model: str, own_pairs: str) -> list[str]:
    return ["diagnose", "--model", tiny_model, "--data", own_pairs, "--max-new-tokens", "5"]


@pytest.fixture
def here_with(arguments: list[str], here: Path) -> list[str]:
    return [*arguments, "--output", "out"]


@pytest.fixture(scope="module")
def measured(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a diagnosis without a reward, for tests to copy, and what it printed."""
    folder, printed = tmp_path_factory.mktemp("measured") / "out", io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert cli.run([*arguments, "--output", str(folder)]) == 0
    return folder, printed.getvalue()


def read(folder: str | Path = "out") -> dict:
    return json.loads((Path(folder) / "diagnosis.json").read_text())


def test_every_figure_has_its_shape_and_its_meaning(here_with, capsys) -> None:
    assert cli.run([*here_with, "--reward", "length:min", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == read()
    assert printed["facts"]["rows"] == 60 and printed["facts"]["prompts"] == 60
    assert printed["facts"]["label_source"] == "true"
    for name, x in printed["figures"].items():
        assert set(x) - {"note"} == {"value", "low", "high", "trusted"}
        assert x["trusted"] == (x["value"] is not None)
        assert x["trusted"] or x["note"], "what is not trusted says why"
        assert page.meaning(name)
    assert page.meaning("surprisal_spread_chosen") != page.meaning("surprisal_chosen")
    assert page.meaning("surprisal_own") == DOCUMENTED["surprisal_own"]
    assert page.meaning("rank_low_matched_chosen") != page.meaning("rank_low_chosen")
    assert {"surprisal_chosen", "feature_ratio", "reached_chosen", "optimum_kl_1"} <= set(
        printed["figures"]
    )
    for entry in printed["advice"]:
        assert set(entry) == {"method", "settings", "reason", "cost", "would_change"}
    assert printed["advice"][0]["method"] == next(iter(printed["worth"]))
    assert printed["circumstances"]["pairs"] == 60


def test_own_samples_are_not_surprising(measured) -> None:
    own = read(measured[0])["figures"]["surprisal_own"]
    assert own["low"] - 0.1 < 0 < own["high"] + 0.1 and abs(own["value"]) < 0.2


def test_without_a_reward_nothing_is_said_of_rewards(measured) -> None:
    _, out = measured
    assert "reached_chosen" not in out and "labels: nobody judges fresh samples" in out


def test_what_was_measured_is_not_measured_again(measured, here_with, monkeypatch) -> None:
    shutil.copytree(measured[0], "out")
    first = read()["figures"]
    count = []
    original = Transformer.sample
    monkeypatch.setattr(
        Transformer, "sample", lambda self, *a, **k: count.append(1) or original(self, *a, **k)
    )
    assert cli.run(here_with) == 0
    assert read()["figures"] == first
    assert len(count) == 2, "the timing alone, which is done twice"
    assert cli.run([*here_with, "--seed", "1"]) == 0
    assert read()["figures"] != first, "another seed draws its own"


def test_a_finished_run_is_measured_against_its_reference(
    here_with, here, tiny_model, own_pairs, capsys
) -> None:
    train = ["train", "--model", tiny_model, "--data", own_pairs, "--method", "dpo"]
    train += ["--max-steps", "8", "--batch-size", "8", "--learning-rate", "0.01"]
    assert cli.run([*train, "--output", "run", "--eval-fraction", "0"]) == 0
    assert cli.run([*here_with, "--policy", "run", "--json"]) == 0
    found = read()["figures"]
    assert found["kl"]["low"] > 0 and found["implicit_accuracy"]["value"] > 0.7
    assert found["gap"]["trusted"]
    assert found["kl_by_tokens"]["low"] < found["kl"]["high"]
    still = [*here_with[:-1], "still", "--policy", tiny_model]
    assert cli.run(still) == 0
    found = read("still")["figures"]
    assert found["kl"]["value"] == pytest.approx(0, abs=1e-4)
    assert found["left_16"]["value"] == 0


def test_what_a_trainer_left_is_read(here_with, here, tiny_model) -> None:
    shutil.copytree(tiny_model, here / "trl")
    (here / "trl" / "checkpoint-20").mkdir()
    log = [{"loss": 0.69, "step": 10}, {"loss": 0.5, "rewards/accuracies": 0.75, "step": 20}]
    state = {"global_step": 20, "log_history": [*log, {"train_runtime": 1.0}]}
    (here / "trl" / "checkpoint-20" / "trainer_state.json").write_text(json.dumps(state))
    assert cli.run([*here_with, "--policy", "trl"]) == 0
    facts = read()["facts"]
    assert facts["trained_steps"] == 20 and facts["loss"] == 0.5
    assert facts["rewards/accuracies"] == 0.75
    (here / "trl" / "trainer_state.json").write_text("[" * 5000)
    assert cli.run([*here_with, "--policy", "trl"]) == 2


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--budget", "soon"], "give a time"),
        (["--budget", "0m"], "give a time"),
        (["--policy", "nowhere/at/all"], "no such folder"),
        (["--data", "nowhere.jsonl"], "no such file"),
        (["--temperature", "0.5"], "has no use for it"),
    ],
)
def test_mistakes(flags, words, here_with, refused) -> None:
    given = [a for a in here_with if a not in ("--output", "out")]
    assert words in refused(*given, *flags)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--spend", "nan"), ("--spend", "inf"), ("--spend", "0"), ("--label-price", "nan"),
        ("--label-price", "inf"), ("--label-price", "-1"),
    ],
)  # fmt: skip
def test_prices_are_checked_before_anything_is_loaded(
    flag, value, arguments, refused, monkeypatch
) -> None:
    monkeypatch.setattr(loading, "model_of", lambda *_: pytest.fail("a model is loaded"))
    assert f"flag '{flag}': is {value}" in refused(*arguments, flag, value)


def test_where_to_go_on_is_said_without_an_output(arguments, here, capsys) -> None:
    given = [a if not a.endswith("pairs.jsonl") else "nowhere.jsonl" for a in arguments]
    for more in ([], ["--output", "out"]):
        assert cli.run([*given, *more]) == 2
        said = "the command with --output runs/diagnose-" in capsys.readouterr().err
        assert said == (not more)


def test_a_policy_of_another_vocabulary(here_with, here, make_tiny_model, refused) -> None:
    make_tiny_model(here / "wide", vocab_size=300)
    given = [a for a in here_with if a not in ("--output", "out")]
    message = refused(*given, "--policy", "wide")
    assert "policy 'wide': has 300 tokens, the model 261" in message


def test_prompts_alone_are_refused(here_with, refused, here) -> None:
    (here / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    given = [a for a in here_with if a not in ("--output", "out")]
    message = refused(*given, "--data", "prompts.jsonl", leaves=())
    assert "prompts alone" in message


def test_pieces_of_unlike_widths_join(tiny_model, own_pairs, here) -> None:
    settings = load({"model": tiny_model, "data": own_pairs, "max_new_tokens": 5})
    made, *_ = job._prepare(settings, None)
    rows = measure.distinct(made, 40)
    assert len(set(rows.tolist())) == 40
    whole = measure.data(made, rows)
    assert whole.mask.shape[:2] == (40, 2)
    alone = measure.data(made, rows[35:36])
    width = alone.mask.shape[-1]
    assert torch.equal(whole.take(torch.tensor([35])).tokens[..., :width], alone.tokens)
    logp = whole.take(torch.tensor([35])).ref_logps()
    assert torch.allclose(logp, alone.ref_logps(), atol=1e-4)


def test_the_page_shows_text_as_text(here, tiny_model, capsys) -> None:
    attack = "</script><script>window.pwned = 1</script>"
    rows = ({"prompt": f"{attack} {n}", "chosen": f"{n}", "rejected": attack} for n in range(12))
    (here / f"a{'<b>'}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    args = ["diagnose", "--model", tiny_model, "--data", "a<b>.jsonl", "--max-new-tokens", "4"]
    assert cli.run([*args, "--output", "out", "--reward", "length:min"]) == 0
    page_text = (here / "out" / "diagnosis.html").read_text()
    assert "<b>.jsonl" not in page_text and "a&lt;b&gt;.jsonl" in page_text
    assert "window.pwned" not in page_text
    for name in ("map", "surprisal", "optimum"):
        assert f'id="chart-{name}"' in page_text
