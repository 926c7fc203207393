"""Settings and rewards that cannot be used: exit code 2, one message with the cure."""

import pytest
import torch
import yaml

from preftune import cli

REWARDS = """
def boom(prompts, completions, **columns):
    return {}["missing"]
def leaves(prompts, completions, **columns):
    raise SystemExit(0)
def short(prompts, completions, **columns): return [1.0]
def nan(prompts, completions, **columns): return [float("nan")] * len(completions)
def nothing(prompts, completions, **columns): pass
def some_none(prompts, completions, **columns): return [None] * len(completions)
def number(prompts, completions, **columns): return 3.0
def text(prompts, completions, **columns): return "1" * len(completions)
def mapping(prompts, completions, **columns): return {i: 1 for i in range(len(completions))}
def other(a, b): return [1.0]
def column(prompts, completions, answer): return [1.0] * len(completions)
"""


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--leraning-rate", "1"], ["--leraning-rate", "'--learning-rate'"]),
        (["--output-dir", "x"], ["'--output-dir'", "'--output'"]),
        (["--per-device-train-batch-size", "8"], ["'--batch-size'"]),
        (["--num_generations", "8"], ["'--samples-per-prompt'"]),
        (["--beta"], ["'--beta'", "value is missing"]),
        (["--beta", "-1"], ["'beta'", "greater than 0"]),
        (["--beta", "0"], ["'beta'", "greater than 0"]),
        (["--beta", "nan"], ["'beta'", "finite"]),
        (["--beta", "abc"], ["'beta' is 'abc'", "number"]),
        (["--dtype", "nonsense"], ["'dtype' is 'nonsense'", "float32"]),
        (["--truncation", "middle"], ["'truncation'", "'left'"]),
        (["--threads", "0"], ["'threads'"]),
        (["--eval-fraction", "1"], ["'eval_fraction'"]),
        (["--temperature", "-1"], ["'temperature'"]),
        (["--device", "nonsense"], ["device 'nonsense'", "Give auto or cpu"]),
        (["--template", "none.jinja"], ["none.jinja"]),
        (["--tau", "0.1"], ["'tau' has no use", "It has 'beta'"]),
        (["--passes", "2"], ["'passes' has no use in the method 'dpo'"]),
        (["--samples-per-prompt", "2"], ["'samples_per_prompt' has no use"]),
        (["--baseline", "none"], ["'baseline' has no use"]),
        (["--method", "dppo"], ["method 'dppo'", "'dpo'"]),
        (["--method", "ipo", "--beta", "0.1"], ["'beta' has no use", "It has 'tau'"]),
        (["--method", "hypo", "--baseline", "lo"], ["baseline", "leave_one_out"]),
        (["--method", "hypo", "--passes", "2"], ["passes: 1", "kl"]),
        (["--method", "hypo", "--temperature", "0.7"], ["temperature 1", "0.7"]),
        (["--method", "on_policy_dpo"], ["reward:", "--reward length:within=20"]),
        (["--resume"], ["give the run's folder with --output"]),
    ],
)
def test_wrong_flags(refused, train, flags, words):
    given = train(*flags)
    if flags == ["--resume"]:
        place = given.index("--output")
        del given[place : place + 2]
    message = refused(*given)
    assert all(word in message for word in words), message


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what the test lacks")
def test_no_such_device(refused, train):
    assert "device 'cuda': not usable here" in refused(*train("--device", "cuda"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--samples-per-prompt", "0"], "'samples_per_prompt' is '0'"),
        (["--samples-per-prompt", "1"], "Give 2 or more"),
        (["--prompts-per-round", "1"], "Lower batch_size or raise prompts_per_round"),
    ],
)
def test_wrong_sampling(refused, train, flags, message):
    args = train("--reward", "length:min", *flags, method="on_policy_dpo")
    assert message in refused(*args)


def test_flags_of_another_command(refused):
    assert "flag '--beta': preftune evaluate has no use for it" in refused(
        "evaluate", "--beta", "1"
    )


def test_unknown_commands(refused, capsys):
    assert "Did you mean 'train'" in refused("trian")
    assert "Did you mean 'hypo'" in refused("methods", "hyppo")
    assert cli.run([]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "usage" in err


def test_report_of_no_run(refused, here):
    (here / "empty").mkdir()
    assert "no such folder 'nope'" in refused("report", "nope")
    assert "not a run folder" in refused("report", "empty")
    assert "at least one" in refused("report")


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        ("beta", ["PATH=VALUE"]),
        ("batch_sise=1", ["'batch_size'"]),
        ("num_generations=1", ["'samples_per_prompt'"]),
        ("beta=x", ["'beta' is 'x'"]),
        ("terms.5.weight=1", ["'5' must be a number below 2"]),
        ("terms.0.wieght=1", ["Did you mean 'weight'"]),
        ("terms.0.weight=abc", ["terms.0.weight: must be a number"]),
        ("terms.0.settings.betta=1", ["terms.0.settings.betta", "'beta'"]),
        ("terms.0.source.tke=all", ["terms.0.source.tke", "'take'"]),
        ("terms.0.source.take=chosn", ["terms.0.source.take", "'chosen'"]),
        ("terms.0.beta=-1", ["terms.0.settings.beta: must be above 0"]),
        ("terms.1.source.samples_per_prompt=two", ["whole number"]),
        ("terms.0.weight=[", ["plain YAML"]),
    ],
)
def test_wrong_paths(refused, train, pair, words):
    message = refused(*train("--set", pair, method="hypo"))
    assert all(word in message for word in words), message


# --- YAML -----------------------------------------------------------------------------------------


def test_yaml_never_runs_code(refused, here):
    (here / "a.yaml").write_text("method: !!python/object/apply:os.system ['touch pwned']\n")
    message = refused("train", "--config", "a.yaml")
    assert "'a.yaml', line 1" in message and not (here / "pwned").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- a\n", ["holds a list", "mapping"]),
        ("", ["holds nothing"]),
        ("a: [\n", ["line 2"]),
        ("betta: 1\nnum_generations: 2\n1: 2\n", ["'beta'", "'samples_per_prompt'", "'1'"]),
        ("beta: -1\nbatch_size: many\n", ["'beta' is -1", "'batch_size' is 'many'"]),
        ("method: {nme: mine, terms: []}\n", ["method.nme", "Did you mean 'name'"]),
        ("method: {name: mine, terms: 3}\n", ["'terms' must be a list"]),
    ],
)
def test_wrong_yaml(refused, here, text, words):
    (here / "a.yaml").write_text(text)
    message = refused("train", "--config", "a.yaml")
    assert all(word in message for word in words), message


def test_no_such_yaml(refused, here):
    (here / "run.yaml").write_text("method: dpo\n")
    assert "Did you mean 'run.yaml'" in refused("train", "--config", "rum.yaml")
    assert "is a folder" in refused("train", "--config", str(here))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": {"take": "all"}}, "terms.0.source: 'name' is missing"),
        ({"source": "os:getcwd"}, "terms.0.source: 'os:getcwd'"),
        ({"source": {"name": "on_policy"}}, "reads the data's own responses"),
        ({"source": {"name": "on_policy", "passes": 0}}, "terms.0.source.passes: must be 1"),
        ({"labeller": "demonstration"}, "compares chosen and rejected"),
        ({"labeller": "nope"}, "terms.0.labeller: 'nope' is unknown"),
        ({"objective": "rienforce"}, "Did you mean 'reinforce'"),
        ({"objective": "nomodule:x"}, "'nomodule:x' cannot be used"),
        ({"objective": "math:sqrt", "settings": {}}, "nothing provides 'x'"),
        ({"settings": {}}, "dpo needs 'beta'"),
        ({"settings": 3}, "terms.0.settings: must be a mapping"),
        ({"settings": {"beta": "high"}}, "terms.0.settings.beta: must be a number"),
        ({"settings": {"beta": 1, "divergence": "kl"}}, "unknown divergence 'kl'"),
        ({"settings": {"beta": 1, "label_smoothing": 0.9}}, "label_smoothing: must be"),
        ({"share": 0}, "terms.0.share"),
        ({"level": "word"}, "terms.0.level"),
    ],
)
def test_a_wrong_row_of_the_users_own(refused, train, here, change, message):
    term = {"source": "offline", "labeller": "given_preference", "objective": "dpo"}
    term |= {"settings": {"beta": 0.1}} | change
    (here / "a.yaml").write_text(yaml.safe_dump({"method": {"name": "mine", "terms": [term]}}))
    args = train("--config", "a.yaml")
    place = args.index("--method")
    assert message in refused(*args[:place], *args[place + 2 :])


# --- rewards --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lenght:min", ["'length:min'"]),
        ("length:max", ["'length:max'", "Did you mean"]),
        ("length:within", ["length:within=20"]),
        ("length:within=-3", ["above 0"]),
        ("nothing", ["'nothing' is unknown", "length:min"]),
        ("no/such/folder", ["'no/such/folder': no such folder", "preftune reward"]),
        ("rewards.py", ["rewards.py:boom"]),
        ("rewards.py:bom", ["Did you mean 'boom'"]),
        ("rewads.py:boom", ["no such file 'rewads.py'", "'rewards.py'"]),
        ("rewards.py:other", ["(prompts, completions, **columns)"]),
        ("broken.py:f", ["SyntaxError", "broken.py, line 2"]),
        ("leaves.py:f", ["SystemExit", "leaves.py, line 1"]),
        ("nomodule.sub:f", ["'nomodule.sub' cannot be imported"]),
    ],
)
def test_wrong_rewards(refused, train, here, name, words):
    (here / "rewards.py").write_text(REWARDS)
    (here / "broken.py").write_text("x = 1\ndef f(:\n")
    (here / "leaves.py").write_text("raise SystemExit(0)\n")
    message = refused(*train("--reward", name))
    assert all(word in message for word in words), message


def test_a_reward_that_is_no_reward_model(refused, train, tiny_model):
    assert f"reward '{tiny_model}'" in refused(*train("--reward", tiny_model))


def test_reward_weights(refused, train):
    two = ("--reward-weights", "1", "2")
    assert "2 weights for 1 rewards" in refused(*train("--reward", "length:min", *two))
    assert "no reward to weigh" in refused(*train(*two))


FAILING = [
    ("boom", ["KeyError: 'missing'", "rewards.py, line 3"]),
    ("leaves", ["SystemExit", "rewards.py, line 5"]),
    ("short", ["one a response", "1 for"]),
    ("nan", ["returned nan", "finite number"]),
    ("nothing", ["list of numbers", "not None"]),
    ("some_none", ["returned None", "finite number"]),
    ("number", ["list of numbers", "not 3.0"]),
    ("text", ["list of numbers"]),
    ("mapping", ["list of numbers"]),
    ("column", ["column 'answer'"]),
]


@pytest.mark.parametrize(("name", "words"), FAILING)
@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_failing_rewards(train, tiny_model, pairs_file, here, capsys, command, name, words):
    (here / "rewards.py").write_text(REWARDS)
    reward = ("--reward", f"rewards.py:{name}", "--max-new-tokens", "4")
    rest = ("evaluate", "--model", tiny_model, "--prompts", pairs_file, *reward)
    args = train(*reward, method="on_policy_dpo") if command == "train" else rest
    assert cli.run(list(args)) == 2
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    assert all(word in err for word in [f"rewards.py:{name}", *words]), err
    assert "not JSON" not in err


def test_a_failing_reward_leaves_no_folder(refused, train, here):
    (here / "rewards.py").write_text(REWARDS)
    refused(*train("--reward", "rewards.py:boom", method="on_policy_dpo"))
