"""The benchmarks' own arithmetic, and the protocol between a benchmark and its sides."""

import json
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(FOLDER))

import flops  # noqa: E402
import workers  # noqa: E402
from results import Failed, Plan, Row  # noqa: E402

SHAPE = flops.Shape(layers=2, width=4, heads=2, kv_heads=1, head_dim=2, inner=8, vocabulary=10)


def test_weights_by_hand():
    # a layer: queries 4x4, keys and values 4x2 each, output 4x4, three products 4x8
    assert SHAPE.body == 2 * (16 + 8 + 8 + 16 + 3 * 32)
    assert SHAPE.head == 40


def test_weights_are_those_of_a_model():
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=10, hidden_size=4, intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    assert flops.Shape.of(config.to_dict()) == SHAPE
    products = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert sum(m.weight.numel() for m in products) == SHAPE.body + SHAPE.head


def test_attended_pairs_by_counting():
    """A prompt of 3 with responses of 2 and 1, against the mask written out."""
    prompt, responses = 3, (2, 1)
    owner = [0] * prompt + [1] * 2 + [2]
    seen = sum(
        j <= i and owner[j] in (0, owner[i]) for i in range(len(owner)) for j in range(len(owner))
    )
    assert flops.attended(prompt, responses) == seen


def test_useful_operations_by_hand():
    # 6 a weight and position; 6 + 9 + 4 pairs attended, each 12 x layers x heads x head_dim
    needed = 6 * (SHAPE.body * 6 + SHAPE.head * 3) + 12 * 2 * 2 * 2 * 19
    assert flops.attended(3, (2, 1)) == 19
    assert flops.useful(SHAPE, 3, (2, 1)) == needed


def test_typical_drops_the_first_steps():
    answers = [{"seconds": s} for s in (9.0, 8.0, 1.0, 2.0, 3.0)]
    assert workers.typical(answers, Plan()) == 2.0
    assert workers.typical(answers[:1], Plan()) == 9.0


@pytest.mark.parametrize(("slow", "turns"), [(40.0, 7), (-1.0, 5)])
def test_slow_sides_take_fewer_turns(
    slow: float, turns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Side:
        def ask(self, command: str) -> dict[str, float]:
            return {"seconds": 0.0, "waited": 0.0, "used_waiting": 0.0}

    monkeypatch.setattr(workers, "SLOW", slow)
    over: list[int] = []
    found = workers.take_turns({"a": Side(), "b": Side()}, 7, over.append)  # type: ignore[dict-item]
    assert [len(x) for x in found.values()] == [turns, turns]
    assert over == list(range(1, turns + 1))


def test_digest_is_of_the_rows_in_any_order():
    rows = [[[1, 2], [3]], [[4], [5, 6]]]
    assert workers.digest(rows) == workers.digest([rows[1], rows[0], rows[1]])
    assert workers.digest(rows) != workers.digest([[[1], [2, 3]], [[4], [5, 6]]])


def test_a_row_is_one_line_of_json():
    line = Row("dpo_step", 1.23456, 1.8).line("a machine")
    assert json.loads(line) == {
        "name": "dpo_step", "ratio": 1.235, "target": 1.8, "hardware": "a machine"
    }  # fmt: skip


WORKER = """
import json, os, sys
sys.path.insert(0, {folder!r})
from workers import Channel, serve
job = json.loads(sys.argv[1])
channel = Channel({{"double": lambda: 2 * job["number"]}})
print("a library's chatter")
count = iter(range(10))
def step():
    taken = next(count)
    if taken == 2:
        raise RuntimeError("the third step breaks")
    return {{"taken": taken, "seen": os.environ.get("BENCHMARKS_SIDE")}}
serve(channel, step, {{"digest": "x"}})
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "worker.py"
    path.write_text(WORKER.format(folder=str(FOLDER)))
    return str(path)


def test_two_sides_step_in_turn(script):
    with (
        workers.Worker(script, {"number": 1}, environment={"BENCHMARKS_SIDE": "a"}) as one,
        workers.Worker(script, {"number": 2}) as two,
    ):
        assert one.ready == {"digest": "x"}
        found = workers.take_turns({"one": one, "two": two}, 2)
        assert [a["taken"] for a in found["two"]] == [0, 1]
        assert [a["seen"] for a in found["one"]] == ["a", "a"]
        assert all(a["seconds"] >= 0 for side in found.values() for a in side)
        assert two.ask("double") == {"double": 4}
        assert 10**6 < two.ask("peak")["peak"] < 10**9  # of the worker, not of this process


def test_a_side_that_breaks_says_why(script):
    with workers.Worker(script, {"number": 1}) as side:
        side.ask("step")
        side.ask("step")
        with pytest.raises(Failed, match="the third step breaks"):
            side.ask("step")


def test_a_row_is_made_of_exactly_so_many_tokens():
    """The word list holds for the default model's tokenizer where it is at hand; here, one whose
    words are tokens."""
    import inputs

    class Words:
        eos_token = " END"

        def __call__(self, text, add_special_tokens):
            return {"input_ids": text.split()}

    (row,) = inputs.made_pairs(Words(), 1, 5, 3)
    assert [len(row[k].split()) for k in ("prompt", "chosen", "rejected")] == [5, 2, 2]
    with pytest.raises(Failed, match="tokens, not"):
        inputs.made_pairs(lambda text, **_: {"input_ids": [0]}, 1, 5, 3)


@pytest.mark.slow
def test_both_sides_make_the_same_updates(tiny_model):
    """The same token ids, and in float32 the same losses: the sides differ in speed alone."""
    import dpo

    rows = [
        {"prompt": f"Say {n} again:", "chosen": f" {n}", "rejected": f" I would say {n} now"}
        for n in range(dpo.BATCH)
    ]
    plan = Plan(turns=3, model=tiny_model)
    exact = {**dpo.SAME, "dtype": "float32", "learning_rate": 1e-3}
    theirs = {**dpo.TRL_SAME, "bf16": False, "learning_rate": 1e-3}
    with (
        dpo.our_side(rows, plan, exact) as own,
        dpo.trl_side(rows, plan, plan.turns + 1, **theirs) as other,
    ):
        dpo.same_work(own, other)
        found = workers.take_turns({"ours": own, "trl": other}, plan.turns)
    ours, trl = ([answer["loss"] for answer in found[side]] for side in ("ours", "trl"))
    assert ours[-1] < ours[0] - 0.01
    assert ours == pytest.approx(trl, abs=1e-4)
