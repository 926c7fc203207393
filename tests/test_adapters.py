"""Adapters from the config: step 0, what is trained, what is saved and read back, resume."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import adapted
import tiny_models as tiny
from preftune import adapters, cli, train
from preftune.config import Config
from preftune.errors import UserError
from preftune.huggingface import load_model
from preftune.policies.transformer import Transformer
from preftune.preparing import prepare
from preftune.reward_model import RewardModel
from preftune.sampling.decoding import Decoding

pytestmark = pytest.mark.long

LN2 = math.log(2)
Settings = Callable[..., dict[str, Any]]


def base_settings(tiny_model: str, pairs_file: str, output: Any, **changes: Any) -> dict[str, Any]:
    given = {"model": tiny_model, "data": pairs_file, "method": "dpo", "output": str(output)}
    given |= {"max_steps": 2, "batch_size": 12, "learning_rate": 0.002, "adapter": "lora"}
    given |= {"lr_schedule": "constant", "warmup_ratio": 0.0, "max_new_tokens": 4}
    given |= {"eval_fraction": 0.0, "reference_cache": False}
    return {k: v for k, v in (given | changes).items() if v is not None}


@pytest.fixture
def settings(here: Path, tiny_model: str, pairs_file: str) -> Settings:
    """Settings of a short run into a folder of that name."""
    return lambda output, **changes: base_settings(tiny_model, pairs_file, output, **changes)


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory, tiny_model: str) -> dict[str, str]:
    """Folders of adapters that change the model, by their kind."""
    folder = tmp_path_factory.mktemp("earlier")
    kinds = ("lora", "rslora", "dora")
    return {kind: adapted.write(folder / kind, tiny_model, kind) for kind in kinds}


def losses(run: Any) -> list[float]:
    return [row["loss"] for row in run.metrics]


def score_of(folder: str | Path) -> torch.Tensor:
    """Log-probs by what a folder holds, of some responses."""
    model = adapters.load(str(folder), torch.float32)
    return tiny.score(Transformer(model, end_ids=[1]), tiny.ragged()).detach()


# --- the reference is the model as it starts -----------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_a_new_adapter_starts_at_ln_2(settings: Settings, kind: str) -> None:
    run = train(settings("a", adapter={"kind": kind, "rank": 4}))
    assert losses(run)[0] == pytest.approx(LN2, abs=1e-6) and losses(run)[1] < LN2 - 1e-4
    assert run.parts.reference is not None and run.parts.reference.trunk.kept == ()


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_adapter_goes_on_from_where_it_was(
    settings: Settings, earlier: dict[str, str], kind: str
) -> None:
    run = train(settings("b", model=earlier[kind], adapter=None))
    assert losses(run)[0] == pytest.approx(LN2, abs=1e-6) and losses(run)[1] < LN2 - 1e-4
    reference = run.parts.reference
    assert reference is not None and reference.trunk.kept == ("start_default",)
    before = tiny.score(reference, tiny.ragged())
    torch.testing.assert_close(before, score_of(earlier[kind]), rtol=0, atol=1e-6)
    after = tiny.score(run.policy, tiny.ragged()).detach()
    assert float((after - before).abs().max()) > 1e-4
    names = load_file("b/model/adapter_model.safetensors")
    assert names.keys() == load_file(Path(earlier[kind], "adapter_model.safetensors")).keys()
    torch.testing.assert_close(score_of("b"), after, rtol=0, atol=1e-6)


def test_a_new_adapter_on_top_of_an_earlier_one(
    settings: Settings, earlier: dict[str, str], tiny_model: str
) -> None:
    """The earlier one stays in the reference, and the run leaves one adapter that holds both."""
    asked = {"kind": "rslora", "rank": 2, "target_modules": ["q_proj", "down_proj"]}
    run = train(settings("b", model=earlier["lora"], adapter=asked))
    assert losses(run)[0] == pytest.approx(LN2, abs=1e-6) and losses(run)[1] < LN2 - 1e-4
    reference = run.parts.reference
    assert reference is not None and reference.trunk.kept == ("default",)
    before = tiny.score(reference, tiny.ragged())
    torch.testing.assert_close(before, score_of(earlier["lora"]), rtol=0, atol=1e-6)
    assert all(".trained." in name for name, _ in run.policy.named_parameters())
    saved = json.loads(Path("b/model/adapter_config.json").read_text())
    assert saved["r"] == 6 and set(saved["rank_pattern"].values()) == {4}
    after = tiny.score(run.policy, tiny.ragged()).detach()
    torch.testing.assert_close(score_of("b"), after, rtol=0, atol=1e-6)
    assert float((after - before).abs().max()) > 1e-4


def test_two_that_cannot_be_saved_as_one(settings: Settings, earlier: dict[str, str]) -> None:
    for model, kind in (("dora", "lora"), ("lora", "dora")):
        with pytest.raises(UserError, match="preftune merge FOLDER --output DIR"):
            train(settings("b", model=earlier[model], adapter=kind))


def test_an_object_with_a_trained_adapter(settings: Settings, earlier: dict[str, str]) -> None:
    """As a folder: its frozen copy is the reference."""
    model = adapters.trainable(adapters.load(earlier["rslora"], torch.float32))
    run = train(settings("b", adapter=None), model=model)
    assert losses(run)[0] == pytest.approx(LN2, abs=1e-6) and losses(run)[1] < LN2 - 1e-4


def test_the_loss_is_that_of_peft_and_torch(settings: Settings, tiny_model: str) -> None:
    """Two updates by hand: DPO's loss on plain rows, one at a time, and torch's AdamW."""
    run = train(settings("a", learning_rate=0.01, max_grad_norm=1e9, dtype="float64"))
    parts = prepare(Config(**settings("x", dtype="float64")))
    rows, model = parts.data, parts.policy.model
    assert rows is not None
    s = rows.samples(list(range(12)))
    plain = load_model(tiny_model, torch.float64)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01, weight_decay=0)
    found = []
    for _ in range(2):
        total = torch.zeros((), dtype=torch.float64)
        for i in range(12):
            prompt = s.prompt[i][s.prompt_mask[i]].tolist()
            ratio = []
            for k in range(2):
                ids = [*prompt, *s.tokens[i, k][s.mask[i, k]].tolist()]
                at = torch.arange(len(prompt) - 1, len(ids) - 1)
                both = [m(torch.tensor([ids])).logits[0].log_softmax(-1) for m in (model, plain)]
                own, ref = (x[at, torch.tensor(ids)[at + 1]].sum() for x in both)
                ratio.append(own - ref.detach())
            total = total - torch.nn.functional.logsigmoid(0.1 * (ratio[0] - ratio[1])) / 12
        found.append(float(total.detach()))
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    assert losses(run) == pytest.approx(found, abs=1e-9)


# --- what is trained, kept and saved -------------------------------------------------------------


def test_the_base_stays_and_the_reference_with_it(settings: Settings, tiny_model: str) -> None:
    parts = prepare(Config(**settings("x")))
    start = tiny.score(parts.policy, tiny.ragged()).detach()
    run = train(settings("a", save_every=1, dtype="bfloat16"))
    before = dict(load_model(tiny_model, torch.float32).named_parameters())
    for name, tensor in run.policy.model.get_base_model().named_parameters():
        if "lora_" in name:
            assert tensor.dtype == torch.float32 and tensor.requires_grad
            continue
        own = before[name.replace(".base_layer", "")]
        assert not tensor.requires_grad
        assert torch.equal(tensor, own) or torch.equal(tensor, own.bfloat16()), name
    assert run.parts.reference is not None
    assert run.policy.frozen_copy().trunk.kept == ("start_default",), "also of a narrow base"
    now = tiny.score(run.parts.reference, tiny.ragged())
    torch.testing.assert_close(now, start, rtol=0, atol=0.05)
    held = load_file("a/checkpoints/step-000002/state.safetensors")
    weights = [name for name in held if name.startswith(("policy/", "optimizer/"))]
    assert weights and all("lora_" in name for name in weights)
    saved = load_file("a/model/adapter_model.safetensors")
    assert {t.dtype for t in saved.values()} == {torch.float32}
    assert sorted(p.name for p in Path("a/model").glob("*.safetensors")) == [
        "adapter_model.safetensors"
    ]


def test_peft_reads_what_is_saved(earlier: dict[str, str]) -> None:
    import peft

    for folder in earlier.values():
        model: Any = peft.AutoPeftModelForCausalLM.from_pretrained(folder).eval()
        given = tiny.score(Transformer(model, end_ids=[1]), tiny.ragged()).detach()
        torch.testing.assert_close(given, score_of(folder), rtol=0, atol=1e-6)


def test_commands_take_the_folder(
    earlier: dict[str, str], pairs_file: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--max-new-tokens", "3", "--max-rows", "2")
    given = ("--model", earlier["lora"], "--prompts", pairs_file)
    assert cli.run(["sample", *given, *flags]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    more = ("--reference", earlier["dora"], "--reward", "length:min", "--json")
    assert cli.run(["evaluate", *given, *flags, *more]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kl"]["value"] != 0


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_resumed_run_is_the_same_bit_for_bit(
    settings: Settings, earlier: dict[str, str], kind: str
) -> None:
    changes: dict[str, Any] = {"batch_size": 4, "save_every": 1}
    if kind == "lora":
        changes |= {"model": earlier["lora"], "adapter": {"rank": 2}}
    else:
        changes |= {"adapter": {"kind": "dora", "rank": 2}}
    whole = train(settings("whole", max_steps=3, **changes))
    train(settings("half", max_steps=2, **changes))
    again = train(settings("half", max_steps=3, resume=True, **changes))
    assert losses(again)[2] == losses(whole)[2]
    held, saved = (load_file(f"{n}/model/adapter_model.safetensors") for n in ("whole", "half"))
    assert all(torch.equal(held[name], saved[name]) for name in held)


# --- with other methods --------------------------------------------------------------------------


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_samples_agree_with_the_forward_pass(
    tiny_model: str, kind: str, autocast: torch.dtype | None
) -> None:
    """The sampler's working copies have the adapter in the policy, and not in the reference."""
    options: dict[str, Any] = {"end_ids": [1], "decoding": Decoding(max_new_tokens=6)}
    options["autocast"] = autocast
    policy = Transformer(adapted.fresh(tiny_model, kind), **options)
    reference = policy.frozen_copy()
    adapted.moved(policy.model, size=0.3)
    plain = Transformer(load_model(tiny_model, torch.float32), **options)
    s, near = tiny.ragged(), 1e-5 if autocast is None else 0.02
    for one, by in ((policy, policy), (reference, reference), (reference, plain)):
        drawn = one.sample(s.prompt, s.prompt_mask, 2, lambda t, n: torch.rand(n), 0)
        given = tiny.score(by, drawn).detach()
        torch.testing.assert_close(drawn.logp, given, rtol=0, atol=near)
    apart = tiny.score(policy, drawn).detach() - tiny.score(plain, drawn).detach()
    assert float(apart.abs().max()) > 5 * near


def test_ppo_and_hypo(settings: Settings) -> None:
    more = {"reward": "length:min", "batch_size": 2, "max_steps": 1}
    run = train(settings("p", method="ppo", prompts_per_round=2, **more))
    names = {n for n, _ in run.policy.named_parameters()}
    assert {"value_head.weight", "value_head.bias"} < names
    assert all("lora_" in n or n.startswith("value_head") for n in names)
    held = load_file("p/model/value_head.safetensors")
    assert torch.equal(held["weight"], run.policy.value_head.weight) and held["weight"].any()
    gone_on = prepare(Config(**settings("q", method="ppo", model="p", adapter=None, **more)))
    assert torch.equal(gone_on.policy.value_head.weight, held["weight"])
    run = train(settings("h", method="hypo", **more))
    assert losses(run)[0] == pytest.approx(LN2, abs=1e-6), "and no KL to begin with"


def test_a_reward_model_and_a_run_that_uses_it(settings: Settings) -> None:
    run = train(settings("rm", method="reward", eval_fraction=None))
    assert losses(run)[0] == pytest.approx(LN2, abs=1e-6) and losses(run)[1] < LN2
    assert isinstance(run.policy, RewardModel)
    kinds = {n.split(".")[-3] for n, _ in run.policy.named_parameters()}
    assert kinds == {"lora_A", "lora_B", "modules_to_save"}
    again = train(settings("more", method="reward", model="rm", adapter=None, eval_fraction=None))
    assert losses(again)[0] < LN2 - 1e-4
    used = train(settings("u", method="rloo", reward="rm", batch_size=2, max_steps=1))
    assert math.isfinite(used.metrics[0]["reward"])
