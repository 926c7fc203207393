"""The GPU script's counting, against the numbers it was specified by, and all of it on a CPU."""

import json
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(FOLDER))

import flops  # noqa: E402
import gpu  # noqa: E402

H200 = gpu.Ceilings(product=790e12, copy=4.3e12)
SHAPES = {name: model.shape for name, model in gpu.MODELS.items()}


def by_hand(name: str) -> tuple[int, int]:
    """Weights of the layers' products and of the head."""
    return {
        "pythia-1.4b": (24 * (4 * 2048**2 + 2 * 2048 * 8192), 2048 * 50304),
        "qwen2.5-0.5b": (24 * (2 * 896**2 + 2 * 896 * 128 + 3 * 896 * 4864), 896 * 151936),
        "smollm2-135m": (30 * (2 * 576**2 + 2 * 576 * 192 + 3 * 576 * 1536), 576 * 49152),
    }[name]


@pytest.mark.parametrize("name", ["pythia-1.4b", "qwen2.5-0.5b", "smollm2-135m"])
def test_weights_by_hand(name: str):
    assert (SHAPES[name].body, SHAPES[name].head) == by_hand(name)


@pytest.mark.parametrize("name", list(gpu.MODELS))
def test_weights_are_those_of_a_model(name: str):
    import transformers

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(gpu.MODELS[name].config())
    products = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    shape = SHAPES[name]
    assert sum(m.weight.numel() for m in products) == shape.body + shape.head


@pytest.mark.parametrize(
    ("case", "name", "tera"),
    [
        (0, "smollm2-135m", 21), (0, "qwen2.5-0.5b", 70), (0, "pythia-1.4b", 223),
        (1, "qwen2.5-0.5b", 134), (1, "pythia-1.4b", 368),
        (2, "qwen2.5-0.5b", 40), (2, "pythia-1.4b", 111),
    ],
)  # fmt: skip
def test_useful_operations_of_a_step(case: int, name: str, tera: int):
    """Against figures worked out by hand for 64 pairs, rounded."""
    found = gpu.step_operations(SHAPES[name], gpu.PAIRS[case]) / 1e12
    assert found == pytest.approx(tera, rel=0.02)


def test_counting_agrees_with_the_other_benchmarks():
    shape = SHAPES["smollm2-135m"]
    other = flops.Shape.of(gpu.MODELS["smollm2-135m"].config().to_dict())
    assert gpu.useful(shape, 100, (30, 20)) == flops.useful(other, 100, (30, 20))


FLOORS = [
    # one sample to a prompt; ms of prefill, decode, score, train
    ("HyPO", "smollm2-135m", (7, 11, 1, 25)),
    ("HyPO", "qwen2.5-0.5b", (22, 16, 4, 86)),
    ("HyPO", "pythia-1.4b", (75, 96, 11, 277)),
    ("online", "smollm2-135m", (2, 76, 13, 46)),
    ("online", "qwen2.5-0.5b", (7, 99, 48, 166)),
    ("online", "pythia-1.4b", (25, 670, 128, 458)),
]


@pytest.mark.parametrize(("case", "name", "milliseconds"), FLOORS)
def test_floor_of_an_on_policy_step(case: str, name: str, milliseconds: tuple[int, ...]):
    """Against figures worked out by hand at the ceilings that they assume."""
    work = replace(gpu.FRESH[0], samples=1) if case == "HyPO" else gpu.FRESH[2]
    found = gpu.floor(SHAPES[name], work, H200)
    assert tuple(found) == ("prefill", "decode", "score", "train")
    for seconds, expected in zip(found.values(), milliseconds, strict=True):
        assert abs(1e3 * seconds - expected) <= 0.5 + 0.03 * expected


def test_everything_of_a_hypo_step_is_more():
    shape, work = SHAPES["pythia-1.4b"], gpu.FRESH[0]
    least, more = (gpu.floor(shape, work, H200, everything=x) for x in (False, True))
    assert more["prefill"] == least["prefill"] and more["decode"] == least["decode"]
    assert more["score"] == pytest.approx(least["score"] + least["prefill"])
    fresh = 6 * (shape.body * (384 + 106) + shape.head * 106) * 64 / 790e12
    assert more["train"] == pytest.approx(least["train"] + fresh)


def test_targets_are_the_least_of_the_better_modes():
    bench = gpu.Bench(torch.device("cpu"), quick=False)
    bench.rows = [
        gpu.Row("dpo", "pythia-1.4b", "a, eager", fraction=0.4),
        gpu.Row("dpo", "pythia-1.4b", "a, compiled", fraction=0.6),
        gpu.Row("dpo", "pythia-1.4b", "b, eager", fraction=0.5),
        gpu.Row("dpo", "smollm2-135m", "b, eager", fraction=0.1),
    ]
    assert gpu.targets(bench) == {}  # nothing is measured on a CPU
    bench.device = torch.device("cuda")
    assert gpu.targets(bench) == {"gpu_dpo_1b4": 0.5}


def test_a_broken_part_loses_no_other():
    bench = gpu.Bench(torch.device("cpu"), quick=False)
    bench.run("broken", 5, lambda: [][0])
    bench.run("good", 5, lambda: bench.add(gpu.Row("x", "y", "z")))
    assert bench.failures == ["broken: IndexError: list index out of range"]
    assert [r.part for r in bench.rows] == ["x"] and not bench.stopped


def test_a_late_part_is_left_out_and_is_no_failure():
    bench = gpu.Bench(torch.device("cpu"), quick=True)
    bench.began -= 1000
    bench.run("late", 5, lambda: bench.add(gpu.Row("x", "y", "z")))
    assert bench.stopped == ["late after 0 s"] and not bench.rows and not bench.failures


def test_time_is_limited():
    with pytest.raises(gpu.OutOfTime), gpu.limited(0.05):
        time.sleep(5)
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_not_a_number_fails_a_check():
    assert not gpu.Check("x", float("nan"), 1.0).holds
    assert gpu.Check("x", 1.0, 1.0).holds


def test_every_part_runs_on_a_cpu(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    arguments = ["--device", "cpu", "--model", "tiny", "--quick", "--output", str(tmp_path)]
    assert gpu.main(arguments) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    (data,) = (json.loads(p.read_text()) for p in tmp_path.glob("*-gpu.json"))
    assert {row["part"] for row in data["rows"]} >= {
        "ceiling", "piece", "dpo", "on-policy", "sampling",
    }  # fmt: skip
    assert all(check["holds"] for check in data["checks"]) and len(data["checks"]) > 30
    assert not data["failures"] and not data["stopped"] and not data["targets"]
    assert "| part" in out and not [x for x in out.splitlines() if x.startswith("{")]
    assert next(tmp_path.glob("*-gpu.md")).read_text().startswith("# On a GPU")
