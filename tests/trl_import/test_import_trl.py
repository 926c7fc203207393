"""import-trl and export-trl on the command line: what they print, and what they refuse."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from preftune import building, cli, from_trl
from preftune.config import load
from preftune.errors import UserError

TABLE = from_trl.table()
# As in TRL's documentation (examples/scripts/dpo.py), and some more.
DPO = """
model_name_or_path: Qwen/Qwen2-0.5B-Instruct
dtype: bfloat16
dataset_name: trl-lib/ultrafeedback_binarized
learning_rate: 5e-7
num_train_epochs: 1
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
gradient_checkpointing: true
logging_steps: 25
eval_strategy: steps
eval_steps: 50
output_dir: Qwen2-0.5B-DPO
no_remove_unused_columns: true
warmup_steps: 3
adam_beta2: 0.95
bata: 0.3
"""


@pytest.fixture
def convert(here: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """The JSON document of import-trl."""

    def run(*args: str, file: str | None = None) -> dict[str, Any]:
        if file is not None:
            (here / "trl.yaml").write_text(file)
            args = ("trl.yaml", *args)
        before = args.index("--") if "--" in args else len(args)
        code = cli.run(["import-trl", *args[:before], "--json", *args[before:]])
        out, err = capsys.readouterr()
        assert code == 0, err
        found = json.loads(out)
        load(found["config"])
        return found

    return run


def named(entries: list[dict[str, Any]], name: str) -> dict[str, Any]:
    (found,) = [e for e in entries if e["trl"] == name]
    return found


def test_a_file_becomes_a_config_and_everything_is_accounted_for(convert):
    found = convert("--trainer", "dpo", file=DPO)
    expected = {
        "method": "dpo", "beta": 0.1, "model": "Qwen/Qwen2-0.5B-Instruct", "batch_size": 16,
        "data": "trl-lib/ultrafeedback_binarized", "learning_rate": 5e-7, "epochs": 1,
        "log_every": 25, "eval_every": 50, "warmup_steps": 3, "lr_schedule": "linear",
        "output": "Qwen2-0.5B-DPO", "seed": 42, "dtype": "bfloat16", "truncation": "right",
        "max_grad_norm": 1.0, "activation_checkpointing": True,
    }  # fmt: skip
    assert expected.items() <= found["config"].items()
    assert "max_length" not in found["config"], "a model of a shorter context would be refused"
    said = {e["trl"] for kind in ("mapped", "differs", "ignored") for e in found[kind]}
    assert said >= {line.partition(":")[0].removeprefix("no_") for line in DPO.split("\n")} - {""}
    assert "0.999" in named(found["differs"], "adam_beta2")["preftune"]
    assert "'beta'" in named(found["ignored"], "bata")["why"]


def test_a_launched_command_line(convert):
    line = (
        "accelerate launch --config_file fsdp2.yaml --num_processes 4 examples/scripts/rloo.py "
        "--model-name-or-path m --dataset_name d/e --reward_funcs my.mod.f other.g "
        "--reward_weights 1 0.5 --num_generations 4 --learning_rate=3e-6 --no_bf16"
    )
    found = convert("--", *line.split())
    assert found == convert(line), "a quoted line says the same"
    expected = {
        "method": "rloo", "kl": 0.05, "samples_per_prompt": 4, "batch_size": 8, "model": "m",
        "reward": ["my.mod:f", "other:g"], "reward_weights": [1, 0.5], "learning_rate": 3e-6,
        "dtype": "float32", "max_new_tokens": 512, "epochs": 3.0,
    }  # fmt: skip
    assert expected.items() <= found["config"].items()
    assert "launcher" in named(found["ignored"], "config_file")["why"]
    assert "dropout" in named(found["differs"], "disable_dropout")["preftune"]


@pytest.mark.parametrize(
    ("trainer", "values", "expected"),
    [
        ("dpo", {"loss_type": "robust", "label_smoothing": 0.2},
         {"method": "robust_dpo", "label_smoothing": 0.2}),
        ("dpo", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1, 0.2]},
         {"method": "dpo_nll", "weight": 0.2}),
        ("online_dpo", {"reward_model_path": "r/m"},
         {"method": "on_policy_dpo", "passes": 1, "temperature": 0.9, "max_new_tokens": 64,
          "max_length": 512, "learning_rate": 5e-7, "reward": "r/m"}),
        ("grpo", {"beta": 0.01}, {"method": "grpo", "weight": 0.01, "batch_size": 1}),
        ("reward", {"seed": 1}, {"method": "reward", "learning_rate": 1e-4, "truncation": "drop"}),
        ("sft", {"seed": 1}, {"method": "sft", "unit": "token", "learning_rate": 2e-5}),
        ("kto", {"beta": 0.2}, {"method": "kto", "beta": 0.2}),
        ("dpo", {"datasets": [{"path": "json", "data_files": "a.jsonl"}]}, {"data": "a.jsonl"}),
        ("dpo", {"warmup_ratio": 0.1, "max_grad_norm": 0},
         {"warmup_ratio": 0.1, "max_grad_norm": 1e9}),
        ("dpo", {"max_steps": 200, "save_steps": 0.25}, {"max_steps": 200, "save_every": 50}),
    ],
)  # fmt: skip
def test_settings_of_trainers(convert, trainer, values, expected):
    found = convert("--trainer", trainer, file=json.dumps(values))
    assert expected.items() <= found["config"].items(), found["config"]


def test_what_has_no_name_is_spelled_out():
    def row(trainer: str, **values: Any) -> Any:
        given = from_trl.Given(trainer=trainer, values=values)
        return building.method_of(load(from_trl.convert(TABLE, given).config)).terms[0]

    ipo = row("dpo", loss_type="ipo", beta=0.3)
    assert ipo.level == "mean" and ipo.settings["tau"] == 0.3
    stale = row("rloo", num_iterations=2, epsilon=0.1, steps_per_generation=4)
    assert stale.objective.__name__ == "ppo_clip" and stale.settings["clip"] == 0.1
    assert (stale.source.passes, stale.source.prompts_per_round) == (2, 16)
    plain = row("grpo")  # without a KL
    assert plain.objective.__name__ == "ppo_clip" and plain.settings == {"clip": 0.2}
    assert row("online_dpo", missing_eos_penalty=1.5).labeller.shaping.no_end_penalty == 1.5


def test_what_a_ratio_does_not_allow_is_said(convert):
    """TRL's ratio is of the policy at the temperature of sampling, preftune's of the model's."""
    asked = {"temperature": 0.8, "top_p": 0.9, "top_k": 20, "max_completion_length": 16}
    for trainer in ("grpo", "rloo"):
        found = convert("--trainer", trainer, file=json.dumps(asked))
        building.method_of(load(found["config"]))  # can be trained as it is
        for name in ("temperature", "top_p", "top_k"):
            assert name not in found["config"]
            assert "as it is" in named(found["differs"], name)["preftune"]
    # pairs of samples need no ratio
    found = convert("--trainer", "online_dpo", file=json.dumps({"temperature": 0.8, "top_k": 20}))
    assert found["config"]["temperature"] == 0.8 and found["config"]["top_k"] == 20


def test_a_file_is_written_whole_and_trains(here, tiny_model, pairs_file, capsys):
    (here / "t.yaml").write_text(
        f"model_name_or_path: {tiny_model}\nper_device_train_batch_size: 2\nmax_steps: 1\n"
        f"output_dir: out\nbf16: false\ndatasets:\n- path: json\n  data_files: {pairs_file}\n"
    )
    assert cli.run(["import-trl", "t.yaml", "--trainer", "dpo", "--output", "deep/p.yaml"]) == 0
    assert cli.run(["train", "--config", "deep/p.yaml"]) == 0
    assert (here / "out" / "model").is_dir()
    capsys.readouterr()
    assert cli.run(["export-trl", "deep/p.yaml", "--json"]) == 0
    back = json.loads(capsys.readouterr().out)
    assert back["trainer"] == "dpo" and back["lost"] == []


def test_an_adapter_goes_there_and_back(here, capsys):
    (here / "t.yaml").write_text(
        "dataset_name: a/b\nbeta: 0.1\nuse_peft: true\nlora_r: 8\nreport_to: tensorboard\n"
        "lora_target_modules: [all-linear]\nwarmup_stps: 3\n"
    )
    assert cli.run(["import-trl", "t.yaml", "--trainer", "dpo", "--output", "p.yaml"]) == 0
    said = capsys.readouterr()
    assert "rank 8" in said.err and "warmup_stps" in said.err
    assert cli.run(["export-trl", "p.yaml"]) == 0
    back = yaml.safe_load(capsys.readouterr().out)
    assert (
        back["use_peft"] and back["lora_r"] == 8 and back["lora_target_modules"] == ["all-linear"]
    )


@pytest.mark.parametrize(
    ("text", "flags", "words"),
    [
        ("beta: 0.1\n", ["--trainer", "dpoo"], "Did you mean 'dpo'"),
        ("beta: 0.1\n", [], "--trainer dpo or online_dpo"),
        ("", ["--trainer", "dpo"], "holds nothing"),
        ("beta: !!python/object/apply:os.system [ls]\n", [], "Only plain YAML"),
        ("a: &a [*a]\n", ["--trainer", "dpo"], "aliases"),
        ("1: 2\n", [], "the key 1 is no text"),
        ("loss_type: bco_pair\n", ["--trainer", "dpo"], "preftune has no bco_pair"),
        ("beta: high\n", ["--trainer", "dpo"], "'high' is no number"),
        ("beta: -1\n", ["--trainer", "dpo"], "greater than 0"),
        ("num_generations: 3\n", ["--trainer", "rloo"], "does not divide the 8 responses"),
        ("datasets: [{path: a}, {path: b}]\n", ["--trainer", "dpo"], "Join their rows"),
        ("reward_funcs: [nobody]\n", ["--trainer", "rloo"], "no dotted path"),
    ],
)
def test_what_is_refused(here, refused, text, flags, words):
    (here / "t.yaml").write_text(text)
    assert words in refused("import-trl", "t.yaml", *flags)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("method: hypo\n", "no trainer for it. The nearest that it has is 'dpo"),
        ("method: ipo\n", "differs in terms.0.level"),
        ("method: rloo\nkl: 0.1\ntarget_kl: 3\n", "target_kl: TRL has no such rule"),
        ("method: rloo\nreward: length:within=20\n", "TRL takes functions in modules"),
    ],
)
def test_what_is_not_exported(here, refused, text, words):
    (here / "p.yaml").write_text(text)
    assert words in refused("export-trl", "p.yaml")


def test_an_export_says_what_does_not_go_along(here, capsys):
    (here / "p.yaml").write_text("method: dpo\ndata: a/b\nbad_rows: 0.2\ngold: length:min\n")
    assert cli.run(["export-trl", "p.yaml", "--json"]) == 0
    lost = {x["preftune"] for x in json.loads(capsys.readouterr().out)["lost"]}
    assert lost == {"bad_rows", "gold"}


ODD = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8),
    st.lists(st.one_of(st.integers(), st.text(max_size=4), st.none()), max_size=3),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
)  # fmt: skip
NAMES = sorted({f.name for f in TABLE.fields})


@settings(max_examples=30, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    trainer=st.sampled_from(sorted(TABLE.trainers)),
    values=st.dictionaries(st.sampled_from(NAMES), ODD, min_size=1, max_size=4),
)
@example(trainer="rloo", values={"num_generations": {"": 1}})  # found so
def test_odd_values_are_user_errors(trainer, values):
    try:
        from_trl.convert(TABLE, from_trl.Given(trainer=trainer, values=values))
    except UserError as error:
        assert len(str(error)) < 2000
