"""The card of a model: what it was made of and what came out, and nothing of this machine."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from preftune import model_card, train

GIVEN = {"max_steps": 2, "batch_size": 2, "max_length": 64, "max_new_tokens": 8}


@pytest.fixture
def run(here: Path, tiny_model: str, pairs_file: str) -> Any:
    return train({
        **GIVEN, "method": "dpo", "model": tiny_model, "data": pairs_file, "output": "run",
        "eval_fraction": 0.25, "reward": "length:min",
    })  # fmt: skip


def card(folder: Path) -> tuple[dict[str, Any], str]:
    """What the Hub reads, and the text."""
    text = (folder / "model" / "README.md").read_text()
    _, front, rest = text.split("---\n", 2)
    return yaml.safe_load(front), rest


def test_it_tells_how_the_model_came_about(run: Any, pairs_file: str) -> None:
    front, text = card(run.folder)
    assert front == {
        "library_name": "transformers", "pipeline_tag": "text-generation",
        "tags": ["preftune", "dpo"],
    }, "a folder has no name on the Hub"  # fmt: skip
    assert text.startswith("\n# dpo on tiny\n")
    assert "2305.18290" in text and "log" in text, "paper and loss"
    digest = hashlib.sha256(Path(pairs_file).read_bytes()).hexdigest()
    assert f"trained on: 9 rows (pairs) of `pairs.jsonl`, SHA-256 `{digest}`" in text
    assert "held out: 3 rows" in text
    found = json.loads((run.folder / "evaluation.json").read_text())
    kl = found["kl"]
    assert f"| `kl` | {kl['value']:.3f} | {kl['low']:.3f} | {kl['high']:.3f} |" in text
    settings = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])
    written = yaml.safe_load((run.folder / "config.yaml").read_text())
    assert settings["terms"] == written["terms"] and settings["seed"] == 0


def test_no_folder_of_the_machine_stands_in_it(run: Any, tiny_model: str) -> None:
    _, text = card(run.folder)
    assert str(Path.home()) not in text and str(run.folder.resolve().parent) not in text
    assert tiny_model not in text and str(Path(tiny_model).parent) not in text


@pytest.mark.parametrize(
    ("value", "public"),
    [
        ("judge:http://10.0.0.3/v1", "judge"),
        ("length:min", "length:min"),
        ("trl-lib/ultrafeedback", "trl-lib/ultrafeedback"),
        (["data/mine.py:score", 0.5], ["mine.py:score", 0.5]),
        ({"a": "data/mine.py"}, {"a": "mine.py"}),
    ],
)
def test_settings_without_places(here: Path, value: Any, public: Any) -> None:
    (here / "data").mkdir()
    (here / "data" / "mine.py").touch()
    assert model_card._public(value) == public


def test_the_hub_reads_where_a_model_is_from(run: Any) -> None:
    front = model_card._front
    parts = run.parts
    named = parts.config.model_copy(update={"model": "smollm2-135m", "data": "trl-lib/lm"})
    parts.config = named
    found = front(parts, {"model": "smollm2-135m"})
    assert found["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert found["datasets"] == ["trl-lib/lm"]


def test_adapters_and_reward_models(here: Path, tiny_model: str, pairs_file: str) -> None:
    given = {**GIVEN, "model": tiny_model, "data": pairs_file}
    lora = train({**given, "method": "dpo", "adapter": "lora", "output": "lora"})
    front, text = card(lora.folder)
    assert front["library_name"] == "peft" and "preftune merge" in text
    reward = train({**given, "method": "reward", "output": "reward"})
    front, text = card(reward.folder)
    assert front["pipeline_tag"] == "text-classification"
    assert text.startswith("\n# A reward model on tiny\n") and "--reward THIS_FOLDER" in text
