"""`train` on a tiny transformer: first step, exact resume, objects, what a run leaves."""

import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from preftune import methods, train
from preftune.errors import GuardStop, Saved, UserError
from preftune.events import Event
from preftune.huggingface import load_tokenizer
from preftune.resuming import resumed

pytestmark = pytest.mark.long

ROWS = list(methods.table())


def length_reward(prompts: list, completions: list, **columns: object) -> list[float]:
    """Longer is better; bytes make ties rare."""
    return [float(len(str(c))) for c in completions]


def settings(tiny_model: str, pairs_file: str, output: Path, **more) -> dict:
    return {
        "model": tiny_model, "data": pairs_file, "output": str(output), "batch_size": 4,
        "max_steps": 5, "learning_rate": 1e-2, "max_new_tokens": 6, "threads": 1, **more,
    }  # fmt: skip


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def same(a: Path, b: Path) -> bool:
    x, y = weights(a), weights(b)
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


def timeless(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


class Stop(BaseException):
    """Ends a run from a callback, as being killed would: nothing is saved."""


def stop_at(step: int):
    def callback(event: Event) -> None:
        if event.kind == "step" and event.step == step:
            raise Stop

    return callback


def ask_to_end(event: Event) -> None:
    if event.kind == "step":
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.long
@pytest.mark.parametrize("method", ROWS)
def test_a_run_stopped_at_every_step_ends_with_the_same_weights_bit_for_bit(
    method, tiny_model, pairs_file, tmp_path
):
    """In mid-epoch, and inside of a round, between passes, for rows that have them."""
    more = {"method": method, "max_steps": 4}
    straight = train(settings(tiny_model, pairs_file, tmp_path / "a", **more), reward=length_reward)
    broken = settings(tiny_model, pairs_file, tmp_path / "b", **more)
    for step in range(1, 5):
        with pytest.raises(Saved, match=f"step-{step:06d}"):
            train(resumed({**broken, "resume": True}), reward=length_reward, callbacks=[ask_to_end])
    again = train(resumed({**broken, "resume": True}), reward=length_reward)
    assert same(straight.folder, again.folder)
    assert timeless(straight.metrics) == timeless(again.metrics)
    assert [m["step"] for m in again.metrics] == [1, 2, 3, 4]


@pytest.mark.parametrize("method", ["dpo", "ppo", "hypo"])
def test_a_crash_after_a_checkpoint_loses_the_steps_since(method, tiny_model, pairs_file, tmp_path):
    """Stopped in step 4, resumed from step 3."""
    more = {"method": method, "save_every": 3}
    straight = train(settings(tiny_model, pairs_file, tmp_path / "a", **more), reward=length_reward)
    broken = settings(tiny_model, pairs_file, tmp_path / "b", **more)
    with pytest.raises(Stop):
        train(broken, reward=length_reward, callbacks=[stop_at(4)])
    again = train(resumed({**broken, "resume": True}), reward=length_reward)
    assert same(straight.folder, again.folder)
    assert timeless(straight.metrics) == timeless(again.metrics)
    assert [m["step"] for m in again.metrics] == [1, 2, 3, 4, 5]


def test_the_best_checkpoint_is_kept_and_its_model_left(tiny_model, pairs_file, tmp_path):
    """A figure that is best at step 2 of 6: its weights are those of a run that ended there."""
    values = iter([0.0, 1.0, 5.0, 2.0, 3.0, 1.0, 0.5])

    def judged(completions, **_):
        return [now["value"]] * len(completions)

    now = {"value": next(values)}

    def next_value(event: Event) -> None:
        if event.kind == "step" and event.step:
            now["value"] = next(values, 0.0)

    more = {
        "method": "dpo", "lr_schedule": "constant", "warmup_ratio": 0, "eval_every": 1,
        "eval_fraction": 0.25, "save_every": None,
    }  # fmt: skip
    now["value"] = next(values)
    run = train(
        settings(tiny_model, pairs_file, tmp_path / "a", best_by="reward", max_steps=6, **more),
        reward=judged, callbacks=[next_value],
    )  # fmt: skip
    rewards = [m["eval_reward"] for m in run.metrics if "eval_reward" in m]
    assert rewards, sorted(run.metrics[-1])
    best = next(m["step"] for m in run.metrics if m.get("eval_reward") == max(rewards))
    assert 0 < best < 6
    short = train(
        settings(tiny_model, pairs_file, tmp_path / "b", max_steps=best, **more), reward=judged
    )
    assert same(run.folder, short.folder)
    assert (run.folder / "checkpoints" / f"step-{best:06d}").is_dir()


def test_updates_that_are_not_finite_are_left_out_up_to_a_number(tiny_model, pairs_file, tmp_path):
    from preftune.huggingface import load_model

    def run(name: str, bad: int, **more):
        """The first `bad` updates give no number."""
        model = load_model(tiny_model, torch.float32)
        reached: list[int] = []

        def spoil(module, inputs, output):
            spoiled = torch.is_grad_enabled() and reached and reached[-1] < bad
            return output * float("nan") if spoiled else output

        model.model.norm.register_forward_hook(spoil)
        return train(
            settings(tiny_model, pairs_file, tmp_path / name, method="sft", max_steps=5, **more),
            model=model, tokenizer=load_tokenizer(tiny_model),
            callbacks=[lambda e: reached.append(e.step) if e.kind in ("start", "step") else None],
        )  # fmt: skip

    with pytest.raises(GuardStop, match=r"guard\.json"):
        run("a", 1)
    dumped = json.loads((tmp_path / "a" / "guard.json").read_text())
    assert dumped["step"] == 1 and len(dumped["batch"][0]["rows"]) == 4
    assert run("b", 2, max_skipped=2).metrics[-1]["updates_not_finite"] == 2
    with pytest.raises(GuardStop, match="step 3"):
        run("c", 3, max_skipped=2)


@pytest.mark.parametrize("method", [m for m in ROWS if methods.get(m).needs >= {"ref_logp"}])
def test_step_one_starts_at_the_reference(method, tiny_model, pairs_file, tmp_path):
    run = train(
        settings(tiny_model, pairs_file, tmp_path / "r", method=method, max_steps=1),
        reward=length_reward,
    )
    first = run.metrics[0]
    assert first.get("log_ratio_chosen", 0) == 0 and first.get("log_ratio_rejected", 0) == 0
    # at collection: the sampler's own log-probs, which differ from the trainer's by rounding
    assert first.get("kl", 0) == pytest.approx(0, abs=1e-3)
    assert {"log_ratio_chosen", "kl"} & set(first) or method == "kto"
    if method in ("dpo", "on_policy_dpo", "ln_dpo", "half_and_half", "chosen_vs_own"):
        assert run.metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_hypo_at_weight_zero_equals_dpo_bit_for_bit(tiny_model, pairs_file, tmp_path):
    zero = train(settings(tiny_model, pairs_file, tmp_path / "a", method="hypo", weight=0))
    plain = train(settings(tiny_model, pairs_file, tmp_path / "b", method="dpo"))
    assert same(zero.folder, plain.folder)
    assert [m["loss"] for m in zero.metrics] == [m["loss"] for m in plain.metrics]


@pytest.mark.parametrize("method", ["dpo", "hypo", "on_policy_best_of_n"])
def test_size_of_micro_batches_does_not_matter(method, tiny_model, pairs_file, tmp_path):
    losses = []
    for name, budget in (("a", 40), ("b", 100_000)):
        out = settings(
            tiny_model,
            pairs_file,
            tmp_path / name,
            method=method,
            dtype="float64",
            micro_batch_tokens=budget,
        )
        losses.append([m["loss"] for m in train(out, reward=length_reward).metrics])
    assert losses[0] == pytest.approx(losses[1], abs=1e-8)


def test_objects_replace_names(tiny_model, pairs_file, tmp_path):
    from preftune.huggingface import load_model

    rows = [json.loads(line) for line in Path(pairs_file).read_text().splitlines()]
    by_name = train(settings(tiny_model, pairs_file, tmp_path / "a"))
    config = {
        k: v
        for k, v in settings(tiny_model, pairs_file, tmp_path / "b").items()
        if k not in ("model", "data")
    }
    by_object = train(
        config,
        model=load_model(tiny_model, torch.float32),
        tokenizer=load_tokenizer(tiny_model),
        data=rows,
    )
    assert same(by_name.folder, by_object.folder)


def test_what_a_run_leaves_behind(tiny_model, pairs_file, tmp_path):
    kinds: list[str] = []
    config = settings(tiny_model, pairs_file, tmp_path / "r", eval_fraction=0.25, eval_every=2)
    run = train(config, reward=length_reward, callbacks=[lambda e: kinds.append(e.kind)])
    assert {p.name for p in run.folder.iterdir()} == {
        "config.yaml", "metrics.jsonl", "times.jsonl", "samples.jsonl", "evaluation.json", "model",
        "report.html", ".lock",
    }  # fmt: skip
    times = [json.loads(x) for x in (run.folder / "times.jsonl").read_text().splitlines()]
    assert [t["step"] for t in times] == [1, 2, 3, 4, 5]
    last = sum(v for k, v in times[-1].items() if k.startswith("seconds_"))
    before, after = run.metrics[-2]["seconds"], run.metrics[-1]["seconds"]
    assert last == pytest.approx(after - before, abs=1e-6), "phases and idle time add up"
    assert [m["step"] for m in run.metrics] == [0, 1, 2, 3, 4, 5]
    assert [m["step"] for m in run.metrics if "eval_kl" in m] == [0, 2, 4, 5]
    assert run.metrics[0]["eval_kl"] == 0 and run.metrics[0]["eval_win_rate"] == 0.5
    found = json.loads((run.folder / "evaluation.json").read_text())
    assert {"reward", "kl", "win_rate", "length", "no_end"} <= set(found)
    assert kinds[-1] == "end" and kinds.count("step") == 6

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(run.folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(run.folder / "model")
    ids = tokenizer("Say 1.", return_tensors="pt")
    assert (
        model.generate(**ids, max_new_tokens=3, do_sample=False).shape[-1]
        > ids["input_ids"].shape[-1]
    )
    assert tokenizer.chat_template


@pytest.mark.parametrize("method", ["dpo", "reward"])
def test_the_model_keeps_the_template_that_it_was_trained_with(
    method, tiny_model, pairs_file, tmp_path
):
    text = (
        "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}"
        "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    (tmp_path / "own.jinja").write_text(text)
    given = {"template": str(tmp_path / "own.jinja"), "method": method, "max_steps": 1}
    run = train(settings(tiny_model, pairs_file, tmp_path / "r", **given))
    assert load_tokenizer(str(run.folder / "model")).chat_template == text
    assert run.parts.tokenizer.chat_template != text, "the user's own stays as it was"


def test_resume_refuses_other_settings_and_lists_them(tiny_model, pairs_file, tmp_path):
    config = settings(tiny_model, pairs_file, tmp_path / "r", save_every=2)
    train(config)
    with pytest.raises(UserError, match=r"learning_rate: 0.01 became 0.5"):
        train(resumed({**config, "learning_rate": 0.5, "resume": True}))


def test_resume_of_a_finished_run_does_nothing(tiny_model, pairs_file, tmp_path):
    config = settings(tiny_model, pairs_file, tmp_path / "r")
    first = train(config)
    before = (first.folder / "metrics.jsonl").read_bytes()
    again = train(resumed({"output": config["output"], "resume": True}))
    assert (again.folder / "metrics.jsonl").read_bytes() == before


def test_resume_goes_on_to_more_steps(tiny_model, pairs_file, tmp_path):
    config = settings(
        tiny_model, pairs_file, tmp_path / "r", save_every=1, lr_schedule="constant", warmup_ratio=0
    )
    train(config)
    longer = train(resumed({"output": config["output"], "resume": True, "max_steps": 7}))
    assert [m["step"] for m in longer.metrics] == list(range(1, 8))


def test_a_pair_with_no_difference_left_is_no_update(tiny_model, pairs_file, tmp_path):
    notes: list[str] = []
    config = settings(tiny_model, pairs_file, tmp_path / "r", method="on_policy_dpo", max_steps=2)
    run = train(
        config, reward=lambda prompts, completions: [1.0] * len(completions),
        callbacks=[lambda e: notes.append(e.message) if e.kind == "note" else None],
    )  # fmt: skip
    assert [m["loss"] for m in run.metrics] == [None, None]
    assert any("tied" in n for n in notes)


def test_a_model_object_brings_its_own_tokenizer(tiny_model, pairs_file, tmp_path):
    from preftune.huggingface import load_model

    config = settings(tiny_model, pairs_file, tmp_path / "r")
    del config["model"]
    run = train(config, model=load_model(tiny_model, torch.float32))
    assert len(run.parts.tokenizer) == run.policy.model.config.vocab_size


def test_a_tokenizer_of_another_model_is_refused(tiny_model, pairs_file, tmp_path):
    from preftune.huggingface import load_model

    tokenizer = load_tokenizer(tiny_model)
    tokenizer.add_tokens(["<extra>"])
    config = settings(tiny_model, pairs_file, tmp_path / "r")
    with pytest.raises(UserError, match="tokenizer: it has"):
        train(config, model=load_model(tiny_model, torch.float32), tokenizer=tokenizer)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("where", ["reward", "gold", "list"])
def test_a_bare_length_mode_is_measured_wherever_it_stands(where, tiny_model, pairs_file, tmp_path):
    given = {
        "reward": {"reward": "length:mode"},
        "gold": {"reward": "length:min", "gold": "length:mode"},
        "list": {"reward": ["length:min", "length:mode"], "reward_weights": [0.5, 1.0]},
    }[where]
    config = settings(tiny_model, pairs_file, tmp_path / "r", max_steps=1, eval_fraction=0.25)
    run = train({**config, **given})
    judge = run.parts.gold if where == "gold" else run.parts.reward
    assert "length:mode=" in judge.name
