"""Reward models as rewards of runs: what they are given to read, and where they compute."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from byte_model import CHAT_TEMPLATE, CONTEXT
from preftune import building, judges, train
from preftune.config import Config, load
from preftune.data import Example
from preftune.errors import UserError
from preftune.huggingface import classifier_from, load_tokenizer
from preftune.preparing import prepare
from preftune.reward_model import RewardModel
from preftune.rewards import Classifier, Ensemble, Judged, Weighted
from preftune.samples import Samples, pad_stack

pytestmark = pytest.mark.long

SYSTEM = {"role": "system", "content": "Be long."}
USER = {"role": "user", "content": "Hi"}
ODD = "Be \"brief\", \\n{{ x }} %} 😀\nand 'é'."
STRICT = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
CUTTING = CHAT_TEMPLATE.replace("m['content'] }}", "m['content'].split('</think>')[-1] }}")


@pytest.fixture(scope="module")
def saved(
    tmp_path_factory: pytest.TempPathFactory, make_tiny_model: Callable[..., str]
) -> Callable[..., str]:
    """Folders of reward models whose scores differ from response to response."""

    def save(name: str, template: str | None = None, **shape: int) -> str:
        folder = tmp_path_factory.mktemp(name)
        base = make_tiny_model(folder / "base", **shape)
        reward = RewardModel(classifier_from(base, torch.float32))
        torch.nn.init.normal_(reward.model.score.weight)
        tokenizer = load_tokenizer(base)
        tokenizer.chat_template = template or tokenizer.chat_template
        reward.save(folder / "rm", tokenizer)
        return str(folder / "rm")

    return save


def made(name: Any) -> Classifier:
    reward = judges.make_reward(name, None)
    assert isinstance(reward, Classifier)
    return reward


def conversation(prompt: Any, finished: bool = True) -> Example:
    return Example(prompt=prompt, responses=("Yo",), finished=(finished,), columns={}, where="")


@pytest.mark.parametrize(
    ("given", "prompts"),
    [
        ({"template": "none"}, ["Hi"]),
        ({"system_prompt": ODD}, ["Hi", [USER], [SYSTEM, USER]]),
        ({}, ["Hi", [SYSTEM, USER]]),
    ],
)
@pytest.mark.parametrize("adapter", [None, "lora"])
def test_it_reads_conversations_as_it_was_trained_to(
    given, prompts, adapter, tiny_model, pairs_file, here
) -> None:
    settings = {"method": "reward", "model": tiny_model, "data": pairs_file, "max_steps": 1,
                "batch_size": 2, "output": "rm"}  # fmt: skip
    run = train({**settings, **given, **({"adapter": {"kind": adapter}} if adapter else {})})
    reward, renderer = made("rm"), run.parts.renderer
    assert renderer is not None
    for prompt in prompts:
        for finished in (True, False):
            trained = renderer.encode(conversation(prompt, finished))
            seen = reward.encode(prompt, "Yo", finished)
            assert seen == [*trained.prompt, *trained.responses[0]]
    assert run.parts.tokenizer.chat_template == CHAT_TEMPLATE, "the user's own stays as it was"


def test_a_response_that_was_cut_has_no_end_token(saved, tiny_model, pairs_file, here) -> None:
    reward = made(saved("cut"))
    parts = prepare(
        load({"method": "reward", "model": tiny_model, "data": pairs_file, "output": "x"})
    )
    assert parts.data is not None and parts.renderer is not None
    encoded = [parts.renderer.encode(conversation(parts.data.texts[0], f)) for f in (True, False)]
    tokens, mask = pad_stack([torch.tensor(e.responses[0]) for e in encoded])
    prompt, prompt_mask = parts.data.prompts_only([0])
    samples = Samples(
        prompt=prompt, prompt_mask=prompt_mask, tokens=tokens[None], mask=mask[None],
        finished=torch.tensor([[True, False]]), origin=torch.zeros(1, 2, dtype=torch.long),
        row=torch.tensor([0]),
    )  # fmt: skip
    scores = judges.judge_of(reward, parts.data, parts.renderer)(samples)
    trained = RewardModel(reward.model).score(prompt, prompt_mask, tokens[None], mask[None])
    torch.testing.assert_close(scores.float(), trained.detach(), rtol=0, atol=1e-5)
    assert abs(float(scores[0, 0] - scores[0, 1])) > 1e-4


def runs(tiny_model: str, data: Path, reward: Any, **more: Any) -> Config:
    given = {"method": "rloo", "model": tiny_model, "data": str(data), "output": "out"}
    return load(given | {"reward": reward} | more)


@pytest.mark.parametrize("kind", ["alone", "summed", "ensemble"])
def test_turns_that_its_template_refuses_are_named_before_the_run(
    kind, saved, tiny_model, here
) -> None:
    rows = [f'{{"prompt": "Say {n}."}}\n' for n in range(4)]
    turns = '{"prompt": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]}\n'
    (here / "data.jsonl").write_text("".join([*rows, turns]))
    strict = saved("strict", STRICT + CHAT_TEMPLATE)
    others = {"alone": strict, "summed": [strict, "length:min"],
              "ensemble": f"ensemble:{saved('plain')},{strict}"}  # fmt: skip
    with pytest.raises(UserError, match=r"cannot read data\.jsonl:5: .*no system.*Leave the row"):
        prepare(runs(tiny_model, here / "data.jsonl", others[kind]))
    assert not (here / "out").exists()


def test_prompts_beyond_its_context_are_named_before_the_run(saved, tiny_model, here) -> None:
    (here / "data.jsonl").write_text('{"prompt": "a"}\n{"prompt": "' + "b" * 50 + '"}\n')
    short = saved("short", max_position_embeddings=64)
    fits = 64 - 53  # <s><|user|> and <|assistant|> stand around the prompt
    prepare(runs(tiny_model, here / "data.jsonl", short, max_new_tokens=fits))
    with pytest.raises(UserError, match=r"takes 64 tokens, and data\.jsonl:2 may have 65"):
        prepare(runs(tiny_model, here / "data.jsonl", short, max_new_tokens=fits + 1))
    # prompts that nothing answers need no room
    pair = '{"prompt": "' + "b" * 50 + '", "chosen": "a", "rejected": "b"}\n'
    (here / "pairs.jsonl").write_text(pair * 2)
    dpo = {"method": "dpo", "model": tiny_model, "data": str(here / "pairs.jsonl")}
    prepare(load(dpo | {"reward": short, "max_new_tokens": 64, "output": "out"}))


def test_a_response_beyond_its_context_is_a_sentence(saved) -> None:
    asked = Judged(prompts=["Hi"], completions=["x" * CONTEXT], tokens=[CONTEXT], where=["f:7"])
    with pytest.raises(UserError, match=f"takes {CONTEXT} tokens, and f:7 may have {CONTEXT + 6}"):
        made(saved("plain"))(asked)


def test_a_response_that_its_template_changes_is_read_as_it_was_drawn(saved) -> None:
    """A run must not end by what its policy happened to say."""
    reward, plain = made(saved("cutting", CUTTING)), made(saved("plain"))
    for finished in (True, False):
        for said in ("so</think>it is", "so it is"):
            assert reward.encode("Hi", said, finished) == plain.encode("Hi", said, finished)


def test_it_computes_where_the_run_does(saved, monkeypatch, tiny_model, here) -> None:
    folder, moved = saved("plain"), []

    class Device:
        """Stands for an accelerator, of which there may be none here."""

    monkeypatch.setattr(building, "pick_device", lambda name: Device)
    monkeypatch.setattr(
        torch.nn.Module, "to", lambda self, *a, **k: moved.append((type(self), a)) or self
    )
    judges.make_reward(f"ensemble:{folder},{saved('other')}", None, Device)  # type: ignore[arg-type]
    assert [a for _, a in moved] == [(Device,)] * 2
    (here / "data.jsonl").write_text('{"prompt": "a"}\n')
    asked: list[Any] = []

    def make(given: Any, weights: Any, device: Any = None) -> None:
        asked.append(device)

    monkeypatch.setattr(judges, "make_reward", make)
    with pytest.raises(UserError, match="judges responses and needs one"):
        prepare(runs(tiny_model, here / "data.jsonl", folder))
    assert asked == [Device, Device]


def test_it_is_given_tokens_where_its_weights_are() -> None:
    asked: list[torch.device] = []

    def score(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        asked.extend((input_ids.device, attention_mask.device))
        return SimpleNamespace(logits=torch.zeros(len(input_ids), 1))

    class Model:
        device = torch.device("meta")

        def __call__(self, **given: Any) -> Any:
            return score(**given)

    of = Weighted(((1.0, Ensemble((Classifier("rm", Model(), lambda *_: [1, 2]),))),))
    assert of(Judged(prompts=["a"], completions=["b"], tokens=[1])) == [0.0]
    assert asked == [torch.device("meta")] * 2
