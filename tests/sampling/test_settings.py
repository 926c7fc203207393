"""From settings to what is drawn: stop strings and the least length, by the command line too."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from preftune import building, cli, huggingface
from preftune.config import Config
from preftune.errors import UserError


def test_settings_reach_the_decoding() -> None:
    given = {"max_new_tokens": 9, "min_new_tokens": 2, "stop": ["\n", "END"], "top_k": 3}
    decoding = building.decoding_of(Config(**given))
    assert decoding.stop == ("\n", "END") and decoding.min_new_tokens == 2
    assert not decoding.unmodified
    assert building.decoding_of(Config(stop=["x"])).unmodified


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"stop": ["a", ""]}, "stop"),
        ({"min_new_tokens": 64}, "min_new_tokens: 64"),
        ({"min_new_tokens": 4, "max_new_tokens": 3}, "max_new_tokens"),
    ],
)
def test_settings_that_cannot_be_met(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        building.decoding_of(Config(**settings))


def test_stop_strings_need_a_tokenizer(tiny_model: str) -> None:
    model = huggingface.load_model(tiny_model, torch.float32)
    with pytest.raises(UserError, match="tokenizer"):
        building.make_policy(Config(stop=["x"]), model, None)


def test_sampled_responses_stop_at_a_text(
    here: Path, tiny_model: str, pairs_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a random model over bytes, whose responses are cut otherwise."""

    def sampled(*more: str) -> list[dict[str, Any]]:
        flags = ["--model", tiny_model, "--prompts", pairs_file, "--max-new-tokens", "60"]
        assert cli.run(["sample", *flags, "--min-new-tokens", "5", *more]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    free, stopped = sampled(), sampled("--stop", "a", "e")
    cut = 0
    for one, other in zip(free, stopped, strict=True):
        assert other["tokens"] >= 4 and other["finished"] or other["tokens"] == 60
        if other["tokens"] < one["tokens"]:  # what ends a response is not shown
            cut += 1
            assert one["response"].removeprefix(other["response"])[0] in "ae"
    assert cut > 3
