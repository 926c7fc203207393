"""The command line in process: what it prints, what it leaves behind, how it is stopped."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from preftune import cli, methods
from preftune.progress import Progress

pytestmark = pytest.mark.long

LENGTH = """
def count(prompts, completions, **columns):
    return [float(len(str(c))) for c in completions]
"""


@pytest.fixture(autouse=True)
def _own_folder(here: Path) -> None:
    """Every test works in a folder of its own."""


@pytest.fixture
def out(capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a command that must do its work; gives what it printed on stdout."""

    def run(*args: str) -> str:
        capsys.readouterr()
        code = cli.run(list(args))
        printed, err = capsys.readouterr()
        assert code == 0, err
        return printed

    return run


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def steps_of(folder: Path) -> list[int]:
    return [row["step"] for row in rows_of(folder / "metrics.jsonl")]


def config_of(folder: Path) -> dict[str, Any]:
    return yaml.safe_load((folder / "config.yaml").read_text())


# --- tables and reports ---------------------------------------------------------------------------


def test_help_and_version(out):
    assert "preftune COMMAND" in out("--help")
    assert out("--version")[0].isdigit()
    for command in ("train", "evaluate", "sample", "inspect", "report", "methods", "env"):
        assert "usage: preftune" in out(command, "--help")


def test_methods_table_as_json(out):
    table = json.loads(out("methods", "--json"))
    assert [row["name"] for row in table] == list(methods.table())
    axes = ("on_policy", "sample_reuse", "on_policy_unlabelled", "negative_gradient")
    for row in table:
        assert set(row) == {"name", "terms", *axes, "mode_seeking", "paper", "equation"}
        assert all(isinstance(row[axis], bool) for axis in (*axes, "mode_seeking"))
        assert row["terms"] and all(isinstance(term, str) for term in row["terms"])


def test_methods_table_and_one_row(out):
    table = out("methods")
    assert all(name in table for name in methods.table()) and "KL only" in table
    row = out("methods", "hypo")
    assert "arXiv 2406.01462" in row and "reverse_kl" in row and "terms.1.weight" in row
    settings = json.loads(out("methods", "hypo", "--json"))["settings"]
    assert settings[1]["source"]["samples_per_prompt"] == 2


def test_env(out):
    facts = json.loads(out("env", "--json"))
    assert facts["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert {"python", "platform", "threads", "cuda", "mps"} <= set(facts)
    assert "torch" in out("env")


def test_report_of_two_runs(out, train, here):
    for name in ("a", "b"):
        assert cli.run(train(output=name)) == 0
    assert out("report", "--output", "page.html", "a", "b").strip() == "page.html"
    page = (here / "page.html").read_text()
    assert page.lstrip().lower().startswith("<!doctype html>")
    assert out("report", "b").strip() == str(Path("b/report.html"))


# --- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "reward"),
    [
        ("dpo", None),
        ("ipo", None),
        ("sft", None),
        ("hypo", "length:within=3"),
        ("on_policy_dpo", "rewards.py:count"),
        ("on_policy_best_of_n", "rewards:count"),
        ("best_of_n", "length:mode"),
    ],
)
def test_train(out, train, here, method, reward):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (here / "rewards.py").write_text(LENGTH)
    more = ["--reward", reward, "--eval-fraction", "0.25"] if reward else []
    printed = out(*train(*more, method=method, max_steps="2"))
    assert printed == f"model: {Path('out/model')}\nreport: {Path('out/report.html')}\n"
    folder = here / "out"
    assert steps_of(folder) == ([0, 1, 2] if reward else [1, 2])
    config = config_of(folder)
    assert config["method"] == method and config["max_steps"] == 2 and config["terms"]
    assert "<html" in (folder / "report.html").read_text()
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    ids = AutoTokenizer.from_pretrained(folder / "model")("hello", return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=2, do_sample=False).shape[0] == 1
    if reward:
        last = rows_of(folder / "metrics.jsonl")[-1]
        assert last["eval_reward"] is not None and last["eval_kl"] is not None
        assert rows_of(folder / "samples.jsonl")


def test_train_as_json(out, train):
    found = json.loads(out(*train("--json")))
    assert found["folder"] == "out" and found["metrics"]["step"] == 1


def test_output_has_a_name_of_its_own(out, train, here):
    args = train()
    place = args.index("--output")
    out(*args[:place], *args[place + 2 :])
    (folder,) = (here / "runs").iterdir()
    assert folder.name.startswith("dpo-") and (folder / "model").is_dir()


def test_set_reaches_one_term(out, train, here):
    out(*train("--set", "terms.1.weight=3e-1", "--set", "terms.0.beta=0.2", method="hypo"))
    terms = config_of(here / "out")["terms"]
    assert terms[1]["weight"] == 0.3 and terms[0]["settings"]["beta"] == 0.2


def test_a_row_of_the_users_own(out, train, here):
    (here / "mine.py").write_text("def loss(logp, *, scale):\n    return -scale * logp\n")
    given = {"source": "offline", "labeller": "given_preference", "objective": "ipo"}
    drawn = {"source": {"name": "on_policy", "samples_per_prompt": 3}, "labeller": "best"}
    terms = [
        given | {"settings": {"tau": 0.5}},
        drawn | {"objective": "mine:loss", "settings": {"scale": 2}, "weight": 0.1},
    ]
    (here / "a.yaml").write_text(yaml.safe_dump({"method": {"name": "mine", "terms": terms}}))
    args = train("--config", "a.yaml", "--reward", "length:min")
    place = args.index("--method")
    out(*args[:place], *args[place + 2 :])
    config = config_of(here / "out")
    assert config["method"] == "mine" and config["terms"][1]["objective"] == "mine:loss"


@pytest.mark.parametrize("method", ["dpo", "hypo", "on_policy_dpo"])
def test_a_config_can_be_given_back(out, train, here, method):
    more = ("--beta", "0.3", "--reward", "length:within=2", "--learning-rate", "1e-2")
    out(*train(*more, method=method, max_steps="3"))
    out("train", "--config", "out/config.yaml", "--output", "again")
    assert config_of(here / "out") == config_of(here / "again")
    first, second = (rows_of(here / name / "metrics.jsonl") for name in ("out", "again"))
    assert [row | {"seconds": 0} for row in first] == [row | {"seconds": 0} for row in second]


def test_the_config_of_a_users_row_can_be_given_back(out, train, here):
    term = {"source": "offline", "labeller": "given_preference", "objective": "dpo"}
    row = {"name": "mine", "terms": [term | {"settings": {"beta": 0.2}}]}
    (here / "a.yaml").write_text(yaml.safe_dump({"method": row}))
    args = train("--config", "a.yaml", "--save-every", "1")
    place = args.index("--method")
    out(*args[:place], *args[place + 2 :])
    out("train", "--config", "out/config.yaml", "--output", "again")
    assert config_of(here / "out") == config_of(here / "again")
    out("train", "--output", "out", "--resume", "--max-steps", "2")
    assert steps_of(here / "out") == [1, 2]


# --- stopping and going on ------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dpo", "hypo", "on_policy_dpo"])
def test_ctrl_c_and_resume(out, train, here, capsys, monkeypatch, method):
    follow = Progress.__call__

    def interrupt(self: Progress, event: Any) -> None:
        follow(self, event)
        if event.kind == "step" and event.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    args = train("--reward", "length:min", "--learning-rate", "1e-2", method=method, max_steps="4")
    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "__call__", interrupt)
        assert cli.run(args) == 130
    assert signal.getsignal(signal.SIGINT) is before
    message = capsys.readouterr().err
    checkpoint = Path("out/checkpoints/step-000002")
    assert (here / checkpoint / "state.safetensors").is_file()
    assert f"saved {checkpoint}" in message and "--output out --resume" in message
    assert "Traceback" not in message and not (here / "out" / "model").exists()

    out("train", "--output", "out", "--resume")
    assert steps_of(here / "out") == [1, 2, 3, 4]
    assert (here / "out" / "model" / "model.safetensors").is_file()
    out(*train(*args[args.index("--reward") :], method=method, output="whole", max_steps="4"))
    kept, whole = (rows_of(here / name / "metrics.jsonl") for name in ("out", "whole"))
    assert [r["loss"] for r in kept] == [r["loss"] for r in whole]


def test_steps_after_the_last_checkpoint_are_done_again(out, train, here, capsys, monkeypatch):
    follow = Progress.__call__

    def crash(self: Progress, event: Any) -> None:
        follow(self, event)
        if event.kind == "step" and event.step == 3:
            raise RuntimeError("the power went")

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "__call__", crash)
        assert cli.run(train("--save-every", "2", max_steps="4")) == 1
    assert steps_of(here / "out") == [1, 2, 3]
    assert "going on from" not in capsys.readouterr().err
    out("train", "--output", "out", "--resume")
    assert steps_of(here / "out") == [1, 2, 3, 4]


def test_resume_of_a_finished_run(out, train, here):
    out(*train())
    before = (here / "out" / "metrics.jsonl").read_text()
    out("train", "--output", "out", "--resume")
    assert (here / "out" / "metrics.jsonl").read_text() == before


def test_resume_without_a_run_starts_one(train, here, capsys):
    assert cli.run(train("--resume")) == 0
    assert "step 0" in capsys.readouterr().err
    assert steps_of(here / "out") == [1]


def test_exit_codes_of_a_fault_and_a_guard(train, monkeypatch, capsys):
    from preftune import training
    from preftune.errors import GuardStop

    for error, code, words in (
        (RuntimeError("oops"), 1, "please report"),
        (GuardStop("diverged"), 3, "stopped: diverged"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (PermissionError(13, "Permission denied", "/root/x"), 2, "'/root/x': Permission denied"),
    ):

        def fail(*args: object, error: BaseException = error, **kwargs: object) -> None:
            raise error

        monkeypatch.setattr(training, "train", fail)
        assert cli.run(train()) == code
        assert words in capsys.readouterr().err


# --- evaluate, sample, inspect --------------------------------------------------------------------


def test_evaluate_as_json(out, tiny_model, pairs_file):
    given = ("--model", tiny_model, "--prompts", pairs_file, "--max-new-tokens", "4")
    rewards = ("--reward", "length:within=2", "--gold", "length:min", "--reference", tiny_model)
    found = json.loads(out("evaluate", *given, *rewards, "--json"))
    assert {"reward", "reward:length:min", "kl", "win_rate", "length", "no_end"} <= set(found)
    for figure in found.values():
        assert set(figure) == {"value", "low", "high"}
        assert figure["low"] <= figure["value"] <= figure["high"]
    assert found["win_rate"]["value"] == 0.5 and abs(found["kl"]["value"]) < 1e-5
    alone = {"length", "no_end", "entropy", "entropy_per_token", "distinct_1", "distinct_2"}
    assert set(json.loads(out("evaluate", *given, "--json"))) == alone
    assert "win_rate" in out("evaluate", *given, *rewards)


def test_evaluate_a_run_takes_its_start_as_reference(out, train, pairs_file, capsys):
    out(*train("--learning-rate", "1e-1"))
    given = ("--prompts", pairs_file, "--max-new-tokens", "4", "--reward", "length:min")
    found = json.loads(out("evaluate", "--model", "out/model", *given, "--json"))
    assert found["kl"]["value"] > 0 and "win_rate" in found


def test_sample(out, tiny_model, pairs_file):
    given = ("--model", tiny_model, "--prompts", pairs_file, "--max-new-tokens", "3")
    lines = out("sample", *given, "--max-rows", "2", "--samples-per-prompt", "2").splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["row"] for row in rows] == [0, 0, 1, 1]
    assert set(rows[0]) == {"row", "prompt", "response", "logp", "tokens", "finished"}
    assert rows[0]["prompt"] == "Say 0." and rows[0]["logp"] < 0
    both = json.loads(out("sample", *given, "--max-rows", "1", "--versus", tiny_model, "--json"))
    assert both[0]["versus"]["response"] == both[0]["response"]


def test_inspect(out, tiny_model, pairs_file):
    given = ("inspect", "--model", tiny_model, "--data", pairs_file)
    facts = json.loads(out(*given, "--json"))
    assert facts["end"]["in_loss_mask"] == facts["end"]["finished"] == 24
    assert facts["bos"]["rows_by_leading_bos"] == {"1": 12}
    assert facts["rules"] == {"longer": 0.0, "shorter": 1.0}
    assert facts["higher_reference_logp"]["share"] == 1.0  # a random model prefers what is short
    assert len(facts["rows"]) == 3
    text = out(*given, "--rows", "1")
    assert "<|user|>Say 0.<|assistant|>" in text and "in the loss mask of 24 of 24" in text
    assert "shorter 100%" in text and "pairs.jsonl:2" not in text


def test_inspect_fails_without_the_end_token(refused, tiny_model, pairs_file, monkeypatch):
    from preftune import commands

    def forget(*args: Any, **kwargs: Any) -> Any:
        rows, report, rejected = load_rows(*args, **kwargs)
        rows.responses[0] = tuple(ids[:-1] for ids in rows.responses[0])
        return rows, report, rejected

    load_rows = commands.loading.load_rows
    monkeypatch.setattr(commands.loading, "load_rows", forget)
    message = refused("inspect", "--model", tiny_model, "--data", pairs_file)
    assert "end token is not in the loss mask of 1 of 12 rows" in message


def test_the_decay_of_a_moving_reference_is_kept(train, refused, here) -> None:
    assert "Set reference_update to ema" in refused(*train(ema_decay="0.5"))
    assert cli.run(train("--save-every", "1", reference_update="ema", ema_decay="0.5")) == 0
    assert cli.run(["train", "--output", "out", "--resume", "--max-steps", "2"]) == 0
    kept = yaml.safe_load((here / "out" / "config.yaml").read_text())
    assert (kept["reference_update"], kept["ema_decay"], kept["max_steps"]) == ("ema", 0.5, 2)
