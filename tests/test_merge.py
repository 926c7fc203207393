"""`preftune merge`: a full model that computes what base and adapter compute."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import adapted
from preftune import adapters, cli
from preftune.adapter_saving import save_model
from preftune.huggingface import load_model, load_tokenizer
from preftune.merging import merge

IDS = torch.tensor([[0, 9, 33, 70, 12, 1], [0, 5, 6, 7, 8, 200]])


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_the_logits_are_those_with_the_adapter_on(here: Path, tiny_model: str, kind: str) -> None:
    folder = adapted.write(here / "adapter", tiny_model, kind)
    assert merge(folder, here / "whole") == here / "whole"
    with_adapter = logits(adapters.load(folder, torch.float32))
    whole = logits(load_model("whole", torch.float32))
    torch.testing.assert_close(whole, with_adapter, rtol=0, atol=1e-5)
    assert float((logits(load_model(tiny_model, torch.float32)) - whole).abs().max()) > 1e-2
    theirs = load_tokenizer("whole")
    assert theirs.chat_template == load_tokenizer(tiny_model).chat_template
    assert not list(here.glob(".tmp-*"))


def test_a_stack_of_two_becomes_one_model(here: Path, tiny_model: str) -> None:
    first = adapted.write(here / "first", tiny_model, alpha=4)
    recipe = adapters.Recipe(
        kind="rslora", rank=2, alpha=3, target_modules=["q_proj"], seed=1, scores=False
    )
    model = adapted.moved(adapters.attach(adapters.load(first, torch.float32), recipe))
    both = logits(model)
    save_model(model, None, here / "both")
    torch.testing.assert_close(
        logits(adapters.load("both", torch.float32)), both, rtol=0, atol=1e-5
    )
    config = here / "both" / "adapter_config.json"
    config.write_text(config.read_text().replace(tiny_model, "/gone/away"))
    merge("both", here / "whole", tiny_model)
    torch.testing.assert_close(logits(load_model("whole", torch.float32)), both, rtol=0, atol=1e-5)
    assert load_tokenizer("whole").chat_template, "the base model's"


def test_a_reward_model_is_merged_with_its_head(here: Path, tiny_model: str) -> None:
    import transformers

    folder = adapted.write(here / "adapter", tiny_model, scores=True)
    merge(folder, here / "whole")
    read = transformers.AutoModelForSequenceClassification.from_pretrained("whole")
    model, _ = adapters.load_classifier(folder, torch.float32)
    found = logits(read)
    torch.testing.assert_close(found, logits(model), rtol=0, atol=1e-5)
    assert float(found.abs().max()) > 1e-3


def test_the_command(
    here: Path, tiny_model: str, capsys: pytest.CaptureFixture[str], refused: Callable[..., str]
) -> None:
    """A run's folder; a base that has moved; what is refused."""
    adapted.write(here / "run" / "model", tiny_model)
    config = here / "run" / "model" / "adapter_config.json"
    config.write_text(config.read_text().replace(tiny_model, "/gone/away"))
    message = refused("merge", "run", "--output", "whole")
    assert "'/gone/away' is not there" in message and "--base MODEL" in message
    given = ("merge", "run", "--base", tiny_model, "--output", "whole", "--dtype", "bfloat16")
    assert cli.run([*given, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"folder": "whole"}
    assert json.loads((here / "whole" / "config.json").read_text())["dtype"] == "bfloat16"
    assert "is there already" in refused(*given)
    assert "whole model already" in refused("merge", "whole", "--output", "again")
    assert "no such folder" in refused("merge", "nowhere", "--output", "again")
    assert "--output DIR" in refused("merge", "run")
    assert "bfloat16" in refused("merge", "run", "--output", "a", "--dtype", "int8")


def test_it_appears_whole(here: Path, tiny_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = adapted.write(here / "adapter", tiny_model)

    def stop(point: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("preftune.durable.reach", stop)
    with pytest.raises(OSError, match="space"):
        merge(folder, here / "whole")
    assert sorted(p.name for p in here.iterdir()) == ["adapter"]


def test_another_base_is_refused(
    here: Path, tiny_model: str, make_tiny_model: Callable[..., str], refused: Callable[..., str]
) -> None:
    adapted.write(here / "adapter", tiny_model)
    make_tiny_model(here / "other", hidden_size=32)
    message = refused("merge", "adapter", "--base", "other", "--output", "whole")
    assert "does not fit its base model 'other'" in message
    make_tiny_model(here / "deep", num_hidden_layers=1)
    message = refused("merge", "adapter", "--base", "deep", "--output", "whole")
    assert "does not fit its base model 'deep'" in message
