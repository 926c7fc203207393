"""Settings of adapters, and folders from elsewhere that are looked at before they are used."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import adapted
from preftune import adapters, building, cli, config
from preftune.adapter_folder import CONFIG, WEIGHTS, describe
from preftune.config import Adapter, Config
from preftune.errors import UserError
from preftune.preparing import prepare

pytestmark = pytest.mark.long

Refused = Callable[..., str]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_model: str) -> str:
    return adapted.write(tmp_path_factory.mktemp("adapters") / "whole", tiny_model)


@pytest.fixture
def changed(here: Path, whole: str) -> Callable[..., Path]:
    """A copy of the folder with other values in its configuration."""

    def make(**values: Any) -> Path:
        shutil.rmtree(here / "bad", ignore_errors=True)
        shutil.copytree(whole, here / "bad")
        given = json.loads((here / "bad" / CONFIG).read_text())
        (here / "bad" / CONFIG).write_text(json.dumps(given | values))
        return here / "bad"

    return make


# --- settings ------------------------------------------------------------------------------------


def test_spellings(here: Path) -> None:
    bare = config.load({"adapter": "rslora"}).adapter
    assert bare == Adapter(kind="rslora") and (bare.rank, bare.alpha) == (16, 32)
    (here / "c.yaml").write_text("adapter: {kind: dora, rank: 4, target_modules: [q_proj]}\n")
    found = config.load("c.yaml").adapter
    assert found == Adapter(kind="dora", rank=4, target_modules=["q_proj"])
    both = config.load({"adapter": {"target_modules": "q_proj,v_proj"}}).adapter
    assert both is not None and both.target_modules == ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("lola", "'adapter.kind' is 'lola'"),
        ({"r": 8}, "'adapter.r' is no setting. Did you mean 'rank'?"),
        ({"rank": 0}, "'adapter.rank' is 0"),
        ({"dropout": 0.1}, "'adapter.dropout' is 0.1"),
        ({"target_modules": "(a+)+$"}, "all-linear or names of modules"),
        ({"quantize": "2bit"}, "'adapter.quantize' is '2bit'"),
        (["lora"], "'adapter' is"),
    ],
)
def test_wrong_values(value: Any, said: str) -> None:
    with pytest.raises(UserError) as caught:
        config.load({"adapter": value})
    assert said in str(caught.value)


def test_flags(here: Path, train: Callable[..., list[str]], refused: Refused) -> None:
    given = train("--adapter", "rslora", "--set", "adapter.rank=2", max_steps="1")
    assert cli.run([*given, "--set", "adapter.target_modules=[q_proj]"]) == 0
    found = config.load(Path("out/config.yaml")).adapter
    assert found == Adapter(kind="rslora", rank=2, target_modules=["q_proj"])
    assert cli.run([*given, "--set", "adapter.target_modules=[q_proj]", "--resume"]) == 0
    assert cli.run(["train", "--output", "out", "--resume"]) == 0
    other = ["--set", "adapter.rank=3", "--resume"]
    message = refused("train", "--output", "out", *other)
    assert "differ: adapter.rank: 2 became 3. " in message
    assert "kind" not in message and "target_modules" not in message
    assert cli.run(["train", "--output", "out", "--resume", "--adapter", "rslora"]) == 0
    assert "there is no 'adapter.rnk'" in refused("train", "--set", "adapter.rnk=2")
    assert "Did you mean '--adapter'" in refused("train", "--lora-r", "2")
    wrong = ("--adapter", "lora", "--set", "adapter.target_modules=[no_proj]")
    message = refused(*train(*wrong, output="other"))
    assert "no_proj" in message and "target_modules" in message


def test_a_moving_reference_is_refused_at_the_start(
    train: Callable[..., list[str]], refused: Refused
) -> None:
    message = refused(*train("--adapter", "lora", reference_update="ema"))
    assert "reference_update: ema" in message and "fixed" in message


def test_a_quantised_base_needs_cuda_and_bitsandbytes(
    train: Callable[..., list[str]], refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One message, before the model is looked for."""
    asked = ("--adapter", "lora", "--set", "adapter.quantize=4bit")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("preftune.adapters.util.find_spec", lambda name: None)
    message = refused(*train(*asked, model="no/such/place"))
    assert "4bit needs a CUDA device and the package bitsandbytes" in message
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "needs the package bitsandbytes" in refused(*train(*asked, model="no/such/place"))
    monkeypatch.setattr("preftune.adapters.util.find_spec", lambda name: name)
    message = refused(*train(*asked, model="no/such/place", device="cpu"))
    assert "needs a CUDA device." in message
    assert "no such folder" in refused(*train(*asked, model="no/such/place"))


def test_the_start_follows_from_the_seed(tiny_model: str) -> None:
    made = []
    for seed in (0, 0, 1):
        torch.rand(seed + 3)
        before = torch.get_rng_state()
        given = Config(model=tiny_model, adapter=Adapter(rank=2), seed=seed)
        policy = building.make_policy(given, None, None, building.method_of(given))
        assert torch.equal(torch.get_rng_state(), before)
        made.append(dict(policy.named_parameters()))
    name = next(n for n in made[0] if "lora_A" in n)
    assert torch.equal(made[0][name], made[1][name])
    assert not torch.equal(made[0][name], made[2][name])


# --- folders from elsewhere ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"peft_type": "PROMPT_TUNING"}, "peft_type"),
        ({"peft_type": ["LORA"]}, "peft_type"),
        ({"task_type": {"a": 1}}, "task_type"),
        ({"base_model_name_or_path": 7}, "base_model_name_or_path"),
        ({"base_model_name_or_path": None}, "names no base model"),
        ({"base_model_name_or_path": "/etc/none"}, "is not there"),
        ({"base_model_name_or_path": "a\0b"}, "base_model_name_or_path"),
        ({"base_model_name_or_path": "bad"}, "is an adapter itself"),
        ({"r": 10**12}, "r 1000000000000"),
        ({"r": "4"}, "r '4'"),
        ({"r": True}, "r True"),
        ({"lora_alpha": "1e999"}, "lora_alpha"),
        ({"lora_alpha": 1e300}, "lora_alpha"),
        ({"alpha_pattern": {"(a+)+$": 1}}, "alpha_pattern"),
        ({"alpha_pattern": [1]}, "alpha_pattern"),
        ({"alpha_pattern": {"q_proj": "x"}}, "q_proj"),
        ({"use_dora": "yes"}, "use_dora"),
        ({"bias": 3}, "bias"),
        ({"bias": ["none"]}, "bias"),
        ({"modules_to_save": "lm_head"}, "modules_to_save"),
        ({"modules_to_save": ["(.*)*"]}, "modules_to_save"),
        ({"layer_replication": [[0, 4]]}, "layer_replication"),
        ({"megatron_config": {"a": 1}, "megatron_core": "antigravity"}, "megatron_config"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"init_lora_weights": ["gaussian"]}, "init_lora_weights"),
        ({"use_dora": True}, "does not fit"),
    ],
)
def test_hostile_values(
    changed: Callable[..., Path], tiny_model: str, values: dict[str, Any], said: str
) -> None:
    folder = changed(**values)
    with pytest.raises(UserError) as caught:
        adapters.load(str(folder), torch.float32)
    assert said in str(caught.value) and "bad" in str(caught.value)


def test_patterns_are_never_run(changed: Callable[..., Path], whole: str) -> None:
    """What the weights are named decides, not an expression that takes for ever."""
    slow = "(" * 20 + "a" + "*)" * 20 + "$"
    folder = changed(
        target_modules=slow, rank_pattern={slow: 2}, exclude_modules=slow, layers_pattern=slow,
        layers_to_transform=[0], auto_mapping={"parent_library": "antigravity"}, unknown=1,
    )  # fmt: skip
    assert describe(folder).settings == describe(whole).settings


def test_hostile_files(
    changed: Callable[..., Path], whole: str, tiny_model: str, refused: Refused, pairs_file: str
) -> None:
    def said() -> str:
        return refused("sample", "--model", "bad", "--prompts", pairs_file)

    path = changed() / CONFIG
    for text in ("", "[]", '"x"', "[" * 10**5, '{"a": NaN', "\ud800".encode("utf-8", "replace")):
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        assert "adapter_config.json" in said()
    path.write_bytes(b" " * (2**24 + 1))
    assert "larger than" in said()

    path = changed() / WEIGHTS
    path.write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    assert "cannot be read as safetensors" in said()
    path.rename(path.with_suffix(".bin"))
    assert "pickled weights" in said()
    path.with_suffix(".bin").unlink()
    assert "holds no adapter_model.safetensors" in said()

    good = load_file(Path(whole, WEIGHTS))
    save_file({"a": torch.zeros(2)}, path)
    assert "no weights of LoRA" in said()
    save_file(good | {"base_model.model.extra.weight": torch.zeros(2)}, path)
    assert "does not fit" in said()
    save_file(dict(list(good.items())[1:]), path)
    assert "does not fit" in said()


def test_a_stray_config_does_not_hide_an_adapter(
    changed: Callable[..., Path], tiny_model: str
) -> None:
    """transformers would follow adapter_config.json; so is it looked at."""
    folder = changed(base_model_name_or_path="/gone")
    shutil.copy(Path(tiny_model, "config.json"), folder)
    with pytest.raises(UserError, match="is not there"):
        adapters.load(str(folder), torch.float32)


def test_kinds_of_adapters_in_their_places(
    here: Path, tiny_model: str, whole: str, pairs_file: str
) -> None:
    scores = adapted.write(here / "rm", tiny_model, scores=True)
    with pytest.raises(UserError, match="adapter of a reward model"):
        adapters.load(scores, torch.float32)
    with pytest.raises(UserError, match="adapter of a causal language model"):
        adapters.load_classifier(whole, torch.float32)
    assert adapters.is_classifier(scores) and not adapters.is_classifier(whole)
    given = Config(model=whole, method="reward", data=pairs_file, output="x")
    with_it = prepare(given).model  # a language model's adapter is merged beneath the head
    plain = prepare(given.model_copy(update={"model": tiny_model})).model
    own, base = (dict(m.named_parameters()) for m in (with_it, plain))
    assert own.keys() == base.keys()
    name = next(n for n in own if "q_proj" in n)
    assert not torch.equal(own[name], base[name])
