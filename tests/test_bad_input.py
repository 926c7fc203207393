"""Models, data and outputs that cannot be used: exit code 2, one message with the cure.

Nothing half-written: the fixture `refused` looks for what the command left behind.
"""

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from preftune import cli

pytestmark = pytest.mark.long

GOOD = [{"prompt": f"Say {n}.", "chosen": f"{n}", "rejected": f"not {n}"} for n in range(12)]
BROKEN = [
    "{broken",
    {"prompt": "a", "chosen": "", "rejected": "b"},
    {"prompt": "a", "chosen": 5, "rejected": "b"},
    {"prompt": "a", "chosen": "b", "rejected": "b"},
]


def write_rows(path: Path, rows: list[Any]) -> str:
    """JSON lines; text is written as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines))
    return path.name


def copy_model(tiny_model: str, folder: Path) -> Path:
    """A model folder to be spoilt."""
    shutil.copytree(tiny_model, folder)
    return folder / "model.safetensors"


# --- models ---------------------------------------------------------------------------------------


def test_no_such_model(refused, train):
    assert "model 'nope': no such folder" in refused(*train(model="nope"))


def test_a_file_as_model(refused, train, pairs_file):
    assert "is a file" in refused(*train(model=pairs_file))


def test_a_folder_without_a_model(refused, train, here):
    (here / "empty").mkdir()
    message = refused(*train(model="empty"))
    assert "'empty'" in message and "config.json" in message


def run_folder(here: Path) -> str:
    (here / "run" / "model").mkdir(parents=True)
    (here / "run" / "config.yaml").write_text("method: dpo\n")
    (here / "run" / "model" / "config.json").write_text("{}")
    return "run"


@pytest.mark.parametrize("command", ["train", "evaluate", "sample", "inspect"])
def test_a_run_folder_as_model_stands_for_the_model_in_it(
    refused, train, pairs_file, here, command
):
    """Here that one is broken, and is named."""
    name = run_folder(here)
    source = "--data" if command == "inspect" else "--prompts"
    rest = (command, "--model", name, source, pairs_file)
    message = refused(*(train(model=name) if command == "train" else rest))
    assert "model 'run" in message and "weights" in message


def test_a_run_folder_names_its_model(refused, train, here):
    assert "run/model" in refused(*train(model=run_folder(here)))


@pytest.mark.parametrize("left_out", ["lm_head.weight", "model.layers.1.mlp.up_proj.weight"])
def test_missing_weights(refused, train, tiny_model, here, left_out):
    from safetensors.torch import load_file, save_file

    weights = copy_model(tiny_model, here / "partial")
    tensors = {k: v for k, v in load_file(weights).items() if k != left_out}
    save_file(tensors, weights, metadata={"format": "pt"})
    message = refused(*train(model="partial"))
    assert "'partial'" in message and left_out in message


def test_no_tokenizer(refused, train, tiny_model, here):
    copy_model(tiny_model, here / "mute")
    for path in (here / "mute").glob("tokeni*"):
        path.unlink()
    message = refused(*train(model="mute"))
    assert "'mute'" in message and "tokenizer.json" in message


def test_nothing_left_to_train_on(refused, train):
    assert "eval_fraction" in refused(*train("--eval-fraction", "0.99"))


def test_an_adapter_as_model(refused, train, here):
    (here / "adapter").mkdir()
    (here / "adapter" / "adapter_config.json").write_text("{}")
    message = refused(*train(model="adapter"))
    assert "adapter" in message and "base model" in message


def test_pickled_weights(refused, train, tiny_model, here):
    weights = copy_model(tiny_model, here / "pickled")
    torch.save({}, here / "pickled" / "pytorch_model.bin")
    weights.unlink()
    message = refused(*train(model="pickled"))
    assert "pickled" in message and "safetensors" in message


@pytest.mark.parametrize("damage", ["half", "garbage"])
def test_damaged_weights(refused, train, tiny_model, here, damage):
    weights = copy_model(tiny_model, here / "damaged")
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2] if damage == "half" else b"\0garbage" * 99)
    assert "'damaged'" in refused(*train(model="damaged"))


def test_a_broken_model_configuration(refused, train, tiny_model, here):
    copy_model(tiny_model, here / "broken")
    (here / "broken" / "config.json").write_text("{not json")
    assert "config.json" in refused(*train(model="broken"))


def test_a_reference_of_another_vocabulary(refused, train, here, make_tiny_model):
    make_tiny_model(here / "other", vocab_size=300)
    message = refused(*train(reference="other"))
    assert "reference 'other'" in message and "tokenizer" in message


# --- data -----------------------------------------------------------------------------------------


def test_no_such_data(refused, train, here):
    write_rows(here / "pairs.jsonl", GOOD)
    message = refused(*train(data="pears.jsonl"))
    assert "data 'pears.jsonl': no such file" in message and "'pairs.jsonl'" in message


@pytest.mark.parametrize("setting", ["prompts", "eval_data"])
def test_the_setting_of_a_missing_file_is_named(refused, train, setting):
    assert f"{setting} 'none.jsonl': no such file" in refused(*train(**{setting: "none.jsonl"}))


def test_no_usable_column(refused, train, here):
    message = refused(*train(data=write_rows(here / "a.jsonl", [{"question": "a", "good": "b"}])))
    assert "'a.jsonl'" in message
    assert "Found: question, good." in message and "Wanted: chosen and rejected" in message


def test_too_many_unusable_rows(refused, train, here):
    name = write_rows(here / "a.jsonl", GOOD + BROKEN)
    message = refused(*train(data=name), leaves=("out.rejected.jsonl",))
    assert "data 'a.jsonl': 4 of 16 rows" in message and "bad_rows" in message
    kept = (here / "out.rejected.jsonl").read_text().splitlines()
    assert len(kept) == 4  # refused rows are kept even where the run does not begin
    for reason in ("malformed JSON: 1 (a.jsonl:13)", "empty chosen", "not text", "identical"):
        assert reason in message


def test_few_unusable_rows_are_put_aside(train, here, capsys):
    name = write_rows(here / "a.jsonl", GOOD + BROKEN)
    assert cli.run(train("--bad-rows", "0.5", data=name)) == 0
    assert "4 refused" in capsys.readouterr().err
    rows = [json.loads(r) for r in (here / "out.rejected.jsonl").read_text().splitlines()]
    assert [r["where"] for r in rows] == [f"a.jsonl:{n}" for n in (13, 14, 15, 16)]
    assert ["JSON", "empty", "text", "identical"] == [
        word for r, word in zip(rows, ["JSON", "empty", "text", "identical"], strict=True)
        if word in r["reason"]
    ]  # fmt: skip
    assert rows[0]["row"] == "{broken"


def test_no_usable_row(refused, train, here):
    assert "no row of 4" in refused(*train(data=write_rows(here / "a.jsonl", BROKEN)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", b"", "empty"),
        ("cut.jsonl.gz", gzip.compress(json.dumps(GOOD).encode())[:-20], "truncated"),
        ("binary.jsonl", bytes(range(256)) * 9, "binary"),
        ("weights.bin", bytes(range(256)), "unknown ending '.bin'"),
        ("latin.jsonl", '{"prompt": "é"}'.encode("latin1"), "not UTF-8"),
        ("cut.parquet", b"PAR1abc", "Parquet"),
        ("cut.json", b'[{"prompt": "a"', "JSON"),
    ],
)
def test_files_that_cannot_be_read(refused, train, here, name, content, message):
    (here / name).write_bytes(content)
    said = refused(*train(data=name))
    assert f"'{name}'" in said and message in said


def test_a_folder_without_data(refused, train, here):
    (here / "folder").mkdir()
    assert "'folder': the folder holds no data file" in refused(*train(data="folder"))


def test_prompts_longer_than_the_context(refused, train, here):
    long = {"prompt": "x" * 300, "chosen": "a", "rejected": "b"}
    name = write_rows(here / "some.jsonl", [*GOOD, long])
    some = refused(*train(data=name), leaves=("out.rejected.jsonl",))
    assert "'some.jsonl'" in some and "longer than the context" in some
    every = refused(*train(data=write_rows(here / "all.jsonl", [long] * 3)))
    assert "data 'all.jsonl': no row is left" in every and "truncation" in every


def test_truncation_error_names_the_row(refused, train, here):
    long = {"prompt": "x", "chosen": "a" * 300, "rejected": "b"}
    name = write_rows(here / "a.jsonl", [*GOOD, long])
    assert "data a.jsonl:13: 305 tokens" in refused(*train("--truncation", "error", data=name))


def test_max_length_above_the_context(refused, train):
    message = refused(*train("--max-length", "4000"))
    assert message.startswith("error: max_length: 4000") and "Give 128 or less" in message


def test_no_room_for_a_prompt(refused, train):
    rest = ("--reward", "length:min")
    assert "max_new_tokens: 4000" in refused(
        *train(*rest, method="on_policy_dpo", max_new_tokens="4000")
    )


@pytest.mark.parametrize("command", ["evaluate", "sample"])
def test_no_prompts(refused, tiny_model, command):
    assert "give --prompts" in refused(command, "--model", tiny_model)


# --- output ---------------------------------------------------------------------------------------


def test_output_that_is_taken(refused, train, here):
    (here / "full").mkdir()
    (here / "full" / "note").write_text("mine")
    (here / "file").write_text("mine")
    assert "'full' is not empty" in refused(*train(output="full"))
    assert "'file' is a file" in refused(*train(output="file"))
    assert "file" in refused(*train(output="file/below"))
    assert (here / "full" / "note").read_text() == "mine"


def test_resume_under_other_settings(refused, train, here):
    assert cli.run(train()) == 0
    kept = (here / "out" / "config.yaml").read_text()
    message = refused(
        "train", "--output", "out", "--resume", "--beta", "0.3", "--learning-rate", "0.001"
    )
    assert "learning_rate" in message and "0.001" in message
    assert "0.1" in message and "0.3" in message
    assert (here / "out" / "config.yaml").read_text() == kept
