"""What an estimate counts is what a run then does; what is exact is exact; advice fits."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from preftune import automatic, building, cli, loop, phases
from preftune import config as configs
from preftune.estimating import advice, hollow, probing, times
from preftune.estimating.counts import Counts, Rehearsal, counted, rehearsal
from preftune.estimating.estimate import estimate
from preftune.estimating.hollow import Draw, Log
from preftune.estimating.memory import memory
from preftune.parts import make_settings, make_world
from preftune.preparing import prepare
from preftune.training import train as run

Settings = dict[str, Any]


@pytest.fixture
def given(here: Path, tiny_model: str, pairs_file: str) -> Settings:
    """Of a short offline run."""
    return {
        "model": tiny_model, "data": pairs_file, "method": "dpo", "max_steps": 4,
        "batch_size": 3, "max_new_tokens": 4, "output": str(here / "out"),
    }  # fmt: skip


def counts_of(settings: Settings) -> tuple[Rehearsal, Counts]:
    of = rehearsal(configs.load(settings))
    return of, counted(of)


def watched(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, int]]:
    """Tokens of each phase of every update of a run that follows."""
    found: list[dict[str, int]] = []
    times_of = loop._times

    def keep(spent: phases.Recorder, taken: float) -> loop.Metrics:
        found.append(dict(spent.tokens))
        return times_of(spent, taken)

    monkeypatch.setattr(loop, "_times", keep)
    return found


@pytest.mark.parametrize(
    "changes",
    [
        {"reference_cache": False, "micro_batch_tokens": 60},
        {"method": "binary_reward_conditioning", "epochs": 2, "max_steps": None, "packing": False},
        {"method": "reward", "adapter": "lora"},
    ],
)
def test_tokens_of_offline_rows_are_those_of_the_run(
    given: Settings, changes: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {k: v for k, v in {**given, **changes}.items() if v is not None}
    of, counts = counts_of(given)
    tokens = watched(monkeypatch)
    done = run(given)
    assert counts.steps == len(tokens) == done.metrics[-1]["step"]
    assert [u.tokens for u in counts.updates] == tokens
    assert of.parts.micro_batch_tokens == done.parts.micro_batch_tokens


def test_rows_that_sample_draw_as_many_and_are_judged_as_often(
    given: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    given |= {"method": "rwr", "reward": "length:within=2", "min_new_tokens": 3, "passes": 2}
    of, _ = counts_of(given)
    counts = counted(of, lambda u: torch.full(u.shape, 4))  # as long as they will be
    tokens = watched(monkeypatch)
    done = run(given)
    assert sum(u.judged for u in counts.updates) == done.metrics[-1]["reward_queries"]
    prompts = [sum(d.prompt for d in u.done.draws) for u in counts.updates]
    assert prompts == [t.get("prefill", 0) for t in tokens]
    drawn = sum(d.tokens for u in counts.updates for d in u.done.draws)
    assert drawn >= sum(t.get("decode", 0) for t in tokens) > 0.5 * drawn


def test_pairs_of_fresh_samples_are_trained_on(given: Settings) -> None:
    """None of them ties, though no reward was asked."""
    _, counts = counts_of(given | {"method": "on_policy_dpo", "reward": "length:within=2"})
    assert [bool(u.tokens["train"]) for u in counts.updates] == [True] * 4


def test_passes_are_as_large_as_the_model_is_given_them(given: Settings) -> None:
    """Padding with them, by the layout of a real trunk."""
    for layout in ({"share_prefix": False}, {"packing": False, "share_prefix": True}):
        settings = given | layout | {"reference_cache": False, "max_steps": 1}
        of, counts = counts_of(settings)
        parts = prepare(configs.load(settings))
        assert parts.model.packing == of.model.packing
        seen: list[int] = []
        forward = parts.model.trunk.forward

        def watch(module: Any, layout: Any, seen=seen, forward=forward, **options: Any) -> Any:
            seen.append(layout.input_ids.numel())
            return forward(module, layout, **options)

        parts.model.trunk.forward = watch  # type: ignore[method-assign]
        assert parts.reference is not None
        parts.reference.trunk.forward = watch  # type: ignore[method-assign]
        loop.update(loop.start(parts.method, make_world(parts), make_settings(parts)),
                    make_settings(parts))  # fmt: skip
        assert [p.tokens for p in counts.updates[0].done.passes] == seen


@pytest.mark.parametrize("changes", [{"adapter": "lora"}, {"method": "ppo"}])
def test_sizes_are_those_of_the_model_and_of_its_files(given: Settings, changes: Settings) -> None:
    given |= {"save_every": 1, "max_steps": 2, "reward": "length:within=2"} | changes
    of, counts = counts_of(given)
    fixed = memory(of, counts).fixed
    done = run(given)
    model = done.parts.model.model
    trained = sum(p.numel() * p.element_size() for p in done.parts.model.parameters())
    assert fixed["weights"] == sum(p.numel() * p.element_size() for p in model.parameters())
    assert fixed["gradients"] == trained and fixed["optimizer"] == 2 * trained
    assert fixed["model"] == held(done.folder / "model", "")
    states = held(done.folder / "checkpoints" / "step-000002", "policy/", "optimizer/")
    assert fixed["checkpoint"] == states
    assert counts.kept_checkpoints == len(list((done.folder / "checkpoints").iterdir()))


def held(folder: Path, *prefixes: str) -> int:
    """Bytes of the tensors in a folder's files, by the beginnings of their names."""
    size = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            tensors = [file.get_tensor(n) for n in file.keys() if n.startswith(prefixes)]  # noqa: SIM118
        size += sum(t.numel() * t.element_size() for t in tensors)
    return size


def test_activations_are_told_without_weights(tiny_model: str) -> None:
    """As from the real model, but for what its packed attention keeps in place of torch's."""
    config = configs.Config(model=tiny_model, dtype="float32")
    with torch.device("meta"):
        model = hollow.outline(config)
    plain = hollow.activation_bytes(model, None)
    lean = hollow.activation_bytes(model, None, recomputed=True)
    real = building.make_policy(config, None, None).trunk
    assert plain == pytest.approx(real.activation_bytes(), rel=0.25)
    automatic.apply(real, compiled=False, recomputed=True)
    assert lean == pytest.approx(real.activation_bytes(), rel=0.25)
    assert all(p.device.type == "meta" for p in model.parameters())


def test_what_will_not_fit_is_not_loaded_and_what_is_advised_fits(
    given: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    given |= {"method": "dpo", "save_every": 1, "reference_cache": False}
    of, counts = counts_of(given)
    whole = memory(of, counts)
    lora = rehearsal(configs.load(given | {"adapter": "lora"}))
    least = memory(lora, counted(lora)).peak
    between = (least + whole.peak) // 2
    monkeypatch.setattr(automatic, "free_memory", lambda device: between)
    monkeypatch.setattr(advice, "_HELPS", 0.0)  # next to the process everything is small here
    monkeypatch.setattr(probing, "probe", lambda *_: pytest.fail("it was loaded"))
    found = estimate(configs.load(given))
    assert not found.memory.fits and found.changes and found.changes[-1].fits
    assert not any(c.fits for c in found.changes[:-1])
    assert all(c.peak < whole.peak for c in found.changes)
    last = found.changes[-1]
    again = rehearsal(
        configs.load({k: v for k, v in (given | last.settings).items() if v is not None})
    )
    assert memory(again, counted(again)).peak == last.peak


def test_command_prints_one_document(
    given: Settings, train: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["estimate", *train("--json", max_steps="2")[1:]]
    capsys.readouterr()
    assert cli.run(arguments) == 0
    out, _ = capsys.readouterr()
    found = json.loads(out)
    assert set(found) == {
        "fits", "memory", "time", "disk", "facts", "changes", "notes",
    }  # fmt: skip
    assert found["fits"] and found["changes"] == [] and found["time"]["measured"]
    assert sum(found["memory"]["parts"].values()) == found["memory"]["peak"]
    stages = found["time"]["stages"]
    assert found["time"]["seconds"] == pytest.approx(sum(s["seconds"] for s in stages.values()))
    assert found["time"]["low"] < found["time"]["seconds"] < found["time"]["high"]
    assert stages["train"]["tokens"] > 0 and not Path("out").exists()
    assert cli.run([a for a in arguments if a != "--json"] + ["--no-probe"]) == 0
    assert "rough, from a table" in capsys.readouterr().out


def test_a_step_and_a_row_are_told_apart() -> None:
    def draw(rows: int, steps: int) -> Draw:
        return Draw(
            prompts=rows, rows=rows, prompt=9, steps=steps, tokens=rows * steps, longest=9, most=99
        )

    found = [(d, 0.5 * d.steps + 0.01 * d.tokens) for d in (draw(32, 10), draw(8, 7))]
    assert probing.fitted(found) == pytest.approx((0.5, 0.01))
    assert probing.fitted(found[:1]) == pytest.approx((0.82, 0.0))
    rates = times.Rates(
        train=0.0, step=0.0, forward=0.0, prefill=0.0, decode_step=0.5, decode_row=0.01
    )
    log = Log(draws=[draw(32, 10)])
    assert times._stage(log, rates).seconds == pytest.approx(found[0][1])


def test_responses_that_were_cut_go_on_as_the_others_ended() -> None:
    u = torch.linspace(0, 1, 1001, dtype=torch.float64)[:-1]
    ended = hollow.observed([3, 5, 7, 9], [True] * 4, 64)(u)
    assert sorted(set(ended.tolist())) == [3, 5, 7, 9] and ended.double().mean() == 6
    half = hollow.observed([4, 8, 8, 8], [True, True, False, False], 64)(u)
    assert (half > 8).float().mean() == pytest.approx(0.5, abs=0.1)
    # 2 ends in 28 tokens: 14 more in the mean, of half of them
    assert half.double().mean() == pytest.approx(3 + 0.5 * (8 + 13.5), rel=0.1)
    assert hollow.observed([8, 8], [False, False], 8)(u).max() == 8
