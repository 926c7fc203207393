"""`preftune diagnose` on a tiny model: what it measures, resumes, refuses and advises."""

import contextlib
import io
import json
import shutil
from pathlib import Path

import pytest
import torch

from preftune import cli
from preftune.config import load
from preftune.diagnosis import cost, job, measure, page
from preftune.diagnosis.pieces import Pieces
from preftune.diagnosis.reading import DOCUMENTED
from preftune.errors import UserError
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
    assert printed["validated"]["mean_regret"] < printed["validated"]["best_fixed_regret"]
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


def test_a_torn_piece_is_made_again(tmp_path: Path) -> None:
    pieces, index = Pieces(tmp_path, "s"), torch.arange(2)
    made = pieces.get("a", index, lambda: {"x": torch.ones(2)})
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for torn in (b"", whole[:20], whole[:-1], whole + b"0"):
        path.write_bytes(torn)
        again = pieces.get("a", index, lambda: {"x": torch.ones(2)})
        assert torch.equal(again["x"], made["x"]) and path.read_bytes() == whole
    assert pieces.found == 0
    pieces.get("a", index, lambda: {})
    assert pieces.found == 1
    other = Pieces(tmp_path, "t").get("a", index, lambda: {"x": torch.zeros(2)})
    assert not other["x"].any(), "of other settings"


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


def test_prompts_alone_are_refused(here_with, refused, here) -> None:
    (here / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    given = [a for a in here_with if a not in ("--output", "out")]
    message = refused(*given, "--data", "prompts.jsonl", leaves=())
    assert "prompts alone" in message


@pytest.mark.parametrize(
    ("text", "expected"), [("90s", 90), ("10m", 600), ("1h", 3600), ("1.5m", 90), ("30", 30)]
)
def test_times(text: str, expected: float) -> None:
    assert cost.seconds(text) == expected


@pytest.mark.parametrize("text", ["", "m", "-5m", "1d", "1m30s", "inf"])
def test_no_times(text: str) -> None:
    with pytest.raises(UserError, match="give a time"):
        cost.seconds(text)


def test_the_price_of_a_sample() -> None:
    """In units of training on one response of the data, of which a forward pass is three tenths."""
    # eight samples take .8 s, the two responses of a row .4 s to score
    speeds = cost.Speeds(row=0.4, prompt=2.0, drawing=0.8)
    assert speeds.sample_price(2) == pytest.approx(0.1 * cost.SCORE / 0.2)
    long = cost.Speeds(row=40.0, prompt=2.0, drawing=0.8)
    assert 0 < long.sample_price(2) < 0.01, "cheap, not free, beside responses that are long"


def test_what_fits_a_budget() -> None:
    assert cost.left(100, 20) == pytest.approx(72)
    assert cost.left(10, 20) == 1, "as little as can be"
    speeds = cost.Speeds(row=0.1, prompt=1.0)
    whole = cost.sizes(None, speeds, 900, 1)
    assert (whole.rows, whole.prompts, whole.note) == (cost.ROWS, cost.PROMPTS, "")
    assert whole.expected == pytest.approx(50 + 200)
    half = cost.sizes(100, speeds, 900, 1)
    assert half.expected <= 100 and half.rows == 250 and half.prompts == 75
    assert "250 of 500 rows" in half.note and "75 of 200 prompts" in half.note
    two = cost.sizes(100, speeds, 900, 2)
    assert two.prompts == 37, "two policies answer"
    short = cost.sizes(10, speeds, 900, 1)
    assert short.prompts == 0 and "no answers are drawn" in short.note
    assert cost.sizes(10_000, speeds, 900, 1).note == ""


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


def lengths(*each: tuple[int, bool]) -> measure.Surveyed:
    """Responses of so many tokens, with an end or without."""
    mask = torch.arange(80) < torch.tensor([n for n, _ in each])[:, None, None]
    nothing = torch.zeros(mask.shape)
    return measure.Surveyed(
        row=torch.arange(len(each)), tokens=nothing.long(), mask=mask,
        finished=torch.tensor([[end] for _, end in each]), ref_logp=nothing, entropy=nothing,
        variance=nothing, hidden=torch.zeros(len(each), 1, 2), reward=None,
    )  # fmt: skip


def test_another_limit_than_the_datas_is_said() -> None:
    """Cut at 48 and answered up to 64; longer than 32; and of the same limit, nothing."""
    data = lengths((48, False), (48, False), (20, True), (30, True))
    assert "have 48 tokens at most, answers up to 64" in str(measure.other_limit(data, 64))
    assert "50% of the data's responses are longer" in str(measure.other_limit(data, 32))
    assert measure.other_limit(data, 48) is None
    assert measure.other_limit(lengths((20, True), (30, True)), 64) is None
