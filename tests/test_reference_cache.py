"""Log-probs of the data under the reference: computed once, kept on disk, the same in every bit."""

import gc
import json
import math
import multiprocessing
import shutil
import weakref
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from preftune import config as configs
from preftune import first_gradient, loop, methods, reference_cache, train
from preftune.block_store import Store
from preftune.errors import UserError
from preftune.events import Event
from preftune.fingerprint import of_weights
from preftune.labellers import Demonstration
from preftune.parts import Parts, make_settings, make_world
from preftune.preparing import prepare
from preftune.reference_cache import attach, obstacle, text_settings
from preftune.resuming import resumed
from preftune.rounds import World, group_terms, next_minibatch, read, refill, visited
from preftune.sources import Offline
from preftune.terms import Term

pytestmark = pytest.mark.long

CACHED = ("dpo", "ipo", "kto", "hypo", "half_and_half")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own."""
    monkeypatch.setenv("PREFTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "reference"


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Prompts of each forward pass that fills a cache."""
    seen: list[int] = []
    plain = reference_cache.score_all

    def counted(model: Any, samples: Any, budget: Any) -> Tensor:
        seen.append(len(samples.row))
        return plain(model, samples, budget)

    monkeypatch.setattr(reference_cache, "score_all", counted)
    return seen


@pytest.fixture(scope="module")
def settings_in(tiny_model: str, pairs_file: str):
    def make(folder: Path, output: str = "r", **more: Any) -> dict[str, Any]:
        return {
            "model": tiny_model, "data": pairs_file, "output": str(folder / output),
            "batch_size": 4, "max_steps": 5, "learning_rate": 1e-2, "max_new_tokens": 6,
            "threads": 1, "micro_batch_tokens": 60, **more,
        }  # fmt: skip

    return make


@pytest.fixture
def settings(settings_in, tmp_path: Path):
    return partial(settings_in, tmp_path)


@pytest.fixture(scope="module")
def whole(settings_in, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict], Path]:
    """What a run logged, and the cache folder that it left, for tests to copy."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFTUNE_CACHE", str(folder / "cache"))
        return timeless(train(settings_in(folder))), folder / "cache" / "reference"


def begin(values: dict[str, Any], **more: Any) -> tuple[Parts, World]:
    """A run's parts, the reference moved off the policy so that ratios are not 0, and the world."""
    parts = prepare(configs.load(values), **more)
    if parts.reference is not None and not parts.reference.trunk.adapter_off:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in parts.reference.model.parameters():
                p.add_(0.02 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return parts, make_world(parts)


def attached(parts: Parts, world: World, **more: Any) -> World:
    assert parts.renderer is not None
    text = text_settings(parts.renderer, parts.config.truncation, parts.config.max_length)
    return attach(world, parts.method, make_settings(parts).max_steps, text, **more)


def keys(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()} if folder.is_dir() else set()


def losses(run: Any) -> list[float]:
    return [m["loss"] for m in run.metrics if "loss" in m]


def timeless(run: Any) -> list[dict[str, Any]]:
    timed = ("seconds", "tokens_per_second")
    return [{k: v for k, v in m.items() if not k.startswith(timed)} for m in run.metrics]


def far(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """An objective of every response by itself."""
    return (logp - ref_logp).square()


def gradients(
    parts: Parts, world: World, method: methods.Method, updates: int = 3
) -> tuple[list[float], Tensor]:
    """Losses of a few minibatches and the sum of their gradients."""
    for p in world.policy.parameters():
        p.grad = None
    groups = group_terms(method)
    found = [float(loop.gradient(groups, world, 0).loss) for _ in range(updates)]
    return found, torch.cat([p.grad.flatten().double() for p in world.policy.parameters()])


@pytest.mark.parametrize("dtype,near", [("float64", 1e-12), ("float32", 1e-5)])
@pytest.mark.parametrize("method", [*CACHED, "conditioned"])
def test_losses_and_gradients_are_those_without_it(method, dtype, near, settings):
    name = {"conditioned": "binary_reward_conditioning"}.get(method, method)
    parts, world = begin(settings(method=name, dtype=dtype, reward="length:min"))
    if method == "conditioned":
        term = Term(source=Offline(take="conditioned"), labeller=Demonstration(), objective=far)
        parts.method = methods.Method(name="far", terms=(term,))
        parts.reference = parts.policy.frozen_copy()
        with torch.no_grad():
            next(parts.reference.model.parameters()).mul_(1.1)
        world = replace(world, reference=parts.reference)
    plain, plain_grad = gradients(parts, world, parts.method)
    assert plain[0] != plain[1]
    kept = attached(parts, world)
    assert kept.known is not None
    again, grad = gradients(parts, kept, parts.method)
    assert again == pytest.approx(plain, rel=near, abs=near)
    torch.testing.assert_close(grad, plain_grad, rtol=near, atol=near * float(plain_grad.norm()))


@pytest.mark.parametrize("method", CACHED)
def test_every_value_is_the_reference_s_own(method, settings):
    """Also of the mismatched response, which stands under another row's prompt."""
    parts, world = begin(settings(method=method, reward="length:min", dtype="float64"))
    kept = attached(parts, world)
    group = next(g for g in group_terms(parts.method) if not g.source.draws)
    assert kept.known is not None and parts.reference is not None
    rows = visited(group, world, 5)[torch.tensor([7, 2, 0])]
    samples = read(group, world, rows)
    known = kept.known(group.source, samples)
    assert known is not None and known.dtype == torch.float64
    right = parts.reference.outputs(samples, frozenset({"logp"}))["logp"]
    torch.testing.assert_close(known, right, atol=1e-11, rtol=0)
    assert (known[~samples.mask] == 0).all()


def test_step_one_starts_at_the_reference(settings):
    run = train(settings(max_steps=1))
    assert run.metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(run.metrics[0]["log_ratio_chosen"]) < 1e-4


def test_a_second_run_reads_and_does_not_score(settings, cache, forwards):
    first = train(settings("a"))
    assert sum(forwards) == 12 and len(forwards) > 1 and len(keys(cache)) == 1
    forwards.clear()
    again = train(settings("b"))
    assert forwards == [] and timeless(first) == timeless(again)
    train(settings("c", beta=0.7))
    train(settings("d", seed=5))  # another order of the same rows
    train(settings("e", method="ipo"))
    assert forwards == [] and len(keys(cache)) == 1


def test_a_run_is_the_same_whatever_ran_before(settings, cache):
    """The rows of a short run are scored in blocks of their own, not picked from those of all."""
    alone = train(settings("a", max_steps=2))
    shutil.rmtree(cache)
    train(settings("b", max_steps=1))
    train(settings("c", seed=3))
    after = train(settings("d", max_steps=2))
    assert timeless(alone) == timeless(after)


TEMPLATE = (
    "{{ bos_token }}>{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def changed_template(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "own.jinja").write_text(TEMPLATE)
    return {"template": str(tmp_path / "own.jinja")}


def changed_rows(tmp_path: Path) -> dict[str, Any]:
    """Of the same lengths."""
    rejected = "I would SAY {} now"
    rows = [
        {"prompt": f"Say {n}.", "chosen": f"{n}", "rejected": rejected.format(n)} for n in range(12)
    ]
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return {"data": str(tmp_path / "other.jsonl")}


@pytest.mark.parametrize(
    "change",
    [
        changed_template,
        changed_rows,
        lambda tmp_path: {"truncation": "left"},
        lambda tmp_path: {"max_length": 100},
        lambda tmp_path: {"dtype": "float64"},
        lambda tmp_path: {"dtype": "bfloat16"},
        lambda tmp_path: {"max_steps": 1},
        lambda tmp_path: {"system_prompt": "Be short."},
        lambda tmp_path: {"method": "kto"},
        lambda tmp_path: {"micro_batch_tokens": 200},
    ],
    ids="template rows truncation length f64 bf16 steps system take blocks".split(),
)  # fmt: skip
def test_what_changes_values_changes_the_key(change, settings, cache, forwards, tmp_path):
    parts, world = begin(settings())
    attached(parts, world)
    forwards.clear()
    other, its_world = begin(settings(**change(tmp_path)))
    attached(other, its_world)
    assert len(keys(cache)) == 2 and forwards


def test_any_weight_or_setting_of_the_model_changes_the_key(settings, cache, forwards):
    parts, world = begin(settings())
    attached(parts, world)
    assert parts.reference is not None
    model = parts.reference.model
    before = of_weights(model)
    with torch.no_grad():
        list(model.parameters())[-1].view(-1)[-1] += 1e-7
    assert of_weights(model) != before
    attached(parts, world)
    assert len(keys(cache)) == 2
    model.config.rms_norm_eps *= 2  # the same weights, other values
    attached(parts, world)
    assert len(keys(cache)) == 3


def test_code_is_a_part_of_the_key(settings, cache, monkeypatch, tmp_path):
    parts, world = begin(settings())
    attached(parts, world)
    monkeypatch.setattr(reference_cache, "FORMAT", 2)
    attached(parts, world)
    monkeypatch.setattr("preftune.__version__", "9")
    attached(parts, world)
    monkeypatch.setattr("preftune.fingerprint._CODE", ("numerics.py",))
    attached(parts, world)
    assert len(keys(cache)) == 4


def flip(folder: Path) -> None:
    data = bytearray((folder / "values.bin").read_bytes())
    data[-3] ^= 4
    (folder / "values.bin").write_bytes(data)


def half(name: str):
    def damage(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])

    return damage


def torn_page(folder: Path) -> None:
    """A crash left the checksums and lost the values."""
    data = (folder / "values.bin").read_bytes()
    (folder / "values.bin").write_bytes(data[:200] + bytes(len(data) - 200))


def longer(folder: Path) -> None:
    with open(folder / "values.bin", "ab") as out:
        out.write(bytes(8))


def other_meta(folder: Path) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    meta["rows"]["count"] += 1
    (folder / "meta.json").write_text(json.dumps(meta))


def removed(folder: Path) -> None:
    (folder / "values.bin").unlink()


DAMAGES = {
    "flip": (flip, False), "half": (half("values.bin"), True), "torn": (torn_page, False),
    "longer": (longer, True), "meta": (half("meta.json"), True), "other": (other_meta, True),
    "removed": (removed, True),
}  # fmt: skip


@pytest.mark.parametrize("name", list(DAMAGES))
def test_damage_is_seen_and_made_good(name, whole, settings, cache, forwards):
    damage, anew = DAMAGES[name]
    logged, kept = whole
    shutil.copytree(kept, cache)
    (key,) = keys(cache)
    before = (cache / key / "values.bin").read_bytes()
    meta = json.loads((cache / key / "meta.json").read_text())
    damage(cache / key)
    again = train(settings())
    assert (cache / key / "values.bin").read_bytes() == before
    assert json.loads((cache / key / "meta.json").read_text()) == meta
    assert logged == timeless(again)
    assert sum(forwards) == 12 if anew else 0 < sum(forwards) < 12


def test_only_visited_rows_are_scored(settings, cache, forwards):
    train(settings(max_steps=2, batch_size=3))
    assert sum(forwards) == 6
    (key,) = keys(cache)
    assert json.loads((cache / key / "meta.json").read_text())["rows"]["count"] == 6


def test_terms_of_one_source_with_different_shares(settings, cache):
    """They go through the data at their own pace; one cache holds the rows of both."""
    parts, world = begin(settings(max_steps=2))
    (term,) = parts.method.terms
    both = (replace(term, share=0.5), replace(term, share=1.0))
    parts.method = methods.Method(name="both", terms=both)
    kept = attached(parts, world)
    assert len(keys(cache)) == 1
    gradients(parts, kept, parts.method, updates=2)


@pytest.mark.parametrize("take", ["all", "chosen", "conditioned", "mismatched"])
@pytest.mark.parametrize("updates,batch_size", [(1, 4), (3, 5), (2, 6), (4, 5), (3, 1)])
def test_rows_visited_are_those_that_a_run_takes(take, updates, batch_size, settings):
    parts, world = begin(settings(method="binary_reward_conditioning", batch_size=batch_size))
    term = Term(source=Offline(take=take), labeller=Demonstration(), objective=far)
    method = methods.Method(name="far", terms=(term,))
    world = replace(world, reference=parts.policy)
    (group,) = group_terms(method)
    seen: set[int] = set()
    for _ in range(updates):
        if group.round is None or group.round.spent:
            refill(group, world, 0)
        seen |= set(next_minibatch(group)[0].row.tolist())
    (fresh,) = group_terms(method)
    planned = set(visited(fresh, world, updates).tolist())
    assert fresh.cursor.drawn == 0  # it is asked, not moved
    # a prompt by itself makes two of a row that is conditioned: two updates
    assert planned == seen or (take == "conditioned" and batch_size == 1 and planned > seen)


def test_a_reference_that_nothing_asks_for_is_freed(settings):
    for method, held, gone in (("dpo", 0, True), ("hypo", 0, False), ("dpo", 0.25, False)):
        at_step: list[bool] = []
        made: list[Any] = []
        plain = reference_cache.attach

        def spy(world: World, *args: Any, made=made, plain=plain, **more: Any) -> World:
            made.append(weakref.ref(world.reference.model))
            return plain(world, *args, **more)

        def look(event: Event, at_step=at_step, made=made) -> None:
            if event.kind == "step" and event.step == 1:
                gc.collect()
                at_step.append(made[0]() is None)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reference_cache, "attach", spy)
            more = {"method": method, "eval_fraction": held, "reward": "length:min", "max_steps": 2}
            train(settings(f"{method}{held}", **more), callbacks=[look])
        assert at_step == [gone]


def lora(tiny_model: str) -> Any:
    import peft

    from preftune.huggingface import load_model

    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return peft.get_peft_model(load_model(tiny_model, torch.float32), config)


def test_a_base_model_s_values_serve_every_adapter_on_it(settings, tiny_model, cache, tmp_path):
    """The key holds what the reference computes with: not the adapter that is trained."""
    plain = train(settings("a"))
    (key,) = keys(cache)
    given = train(settings("b"), model=lora(tiny_model))
    train(settings("c", adapter={"kind": "dora", "rank": 3, "target_modules": ["up_proj"]}))
    assert keys(cache) == {key}
    assert losses(given)[0] == losses(plain)[0]
    earlier = str(tmp_path / "c")
    kept = train(settings("d", model=earlier, reference_cache=True))
    (other,) = keys(cache) - {key}
    assert losses(train(settings("e", model=earlier))) == losses(kept)
    assert keys(cache) == {key, other}
    off = train(settings("f", model=earlier, reference_cache=False))
    assert losses(off) == pytest.approx(losses(kept), abs=1e-5)


@pytest.mark.parametrize("update", ["round", "ema"])
def test_a_moving_reference_is_not_kept(update, settings, cache):
    run = train(settings("a", reference_update=update))
    assert keys(cache) == set()
    assert losses(run) != losses(train(settings("b")))
    with pytest.raises(UserError, match="reference moves"):
        train(settings("c", reference_update=update, reference_cache=True))


@pytest.mark.parametrize("method", ["sft", "on_policy_dpo", "reward", "chosen_vs_own"])
def test_where_no_source_of_data_takes_it_nothing_is_kept(method, settings, cache):
    held = 0.25 if method == "sft" else None  # held-out prompts bring a reference
    more = {"method": method, "max_steps": 1, "eval_fraction": held}
    train(settings("a", **more), reward=lambda prompts, completions: [
        float(len(c)) for c in completions
    ])  # fmt: skip
    assert keys(cache) == set()
    assert obstacle(methods.get(method), None) is not None


def test_it_can_be_switched_off_and_stands_in_the_config(settings, cache, tmp_path):
    off = train(settings("a", reference_cache=False))
    assert keys(cache) == set() and off.parts.reference is not None
    on = train(settings("b"))
    assert losses(on) == pytest.approx(losses(off), rel=1e-5)
    assert off.folder.joinpath("config.yaml").read_text().count("reference_cache: false") == 1
    assert on.folder.joinpath("config.yaml").read_text().count("reference_cache: true") == 1


def test_first_gradient_does_not_use_it(settings, cache):
    values = {k: v for k, v in settings().items() if k != "output"}
    first_gradient(values)
    assert keys(cache) == set()


@pytest.mark.parametrize("deleted", [False, True])
@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_a_resumed_run_is_bitwise_the_same(method, deleted, settings, cache, forwards):
    class Stop(BaseException):
        """As being killed: nothing is saved."""

    def stop(event: Event) -> None:
        if event.kind == "step" and event.step == 4:
            raise Stop

    more = {"method": method, "save_every": 3, "max_steps": 6, "batch_size": 5}
    straight = train(settings("a", **more))
    broken = settings("b", **more)
    with pytest.raises(Stop):
        train(broken, callbacks=[stop])
    if deleted:
        shutil.rmtree(cache)
        train(settings("c", **(more | {"max_steps": 1})))  # others have been here
    forwards.clear()
    again = train(resumed({"output": broken["output"], "resume": True}))
    assert timeless(straight) == timeless(again)
    assert bool(forwards) == deleted


def test_a_run_from_before_the_setting_resumes(settings, tmp_path):
    values = settings("a", save_every=2, max_steps=4)
    train(values)
    config = tmp_path / "a" / "config.yaml"
    config.write_text(config.read_text().replace("reference_cache: true\n", ""))
    longer = train(resumed({"output": values["output"], "resume": True, "max_steps": 5}))
    assert longer.metrics[-1]["step"] == 5


def test_without_a_disk_the_run_goes_on(settings, cache, tmp_path):
    right = train(settings("a"))
    shutil.rmtree(cache)
    cache.write_text("in the way")
    notes: list[str] = []
    run = train(settings("b"), callbacks=[lambda e: notes.append(e.message)])
    assert any("could not be kept" in n for n in notes)
    assert losses(run) == pytest.approx(losses(right), rel=1e-5)


def test_a_full_disk_in_the_middle_leaves_the_run_whole(settings, monkeypatch):
    right, calls = train(settings("a", reference_cache=False)), []

    def full(self: Store, i: int, values: np.ndarray) -> None:
        calls.append(i)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Store, "put", full)
    notes: list[str] = []
    run = train(settings("b"), callbacks=[lambda e: notes.append(e.message)])
    assert any("No space left" in n for n in notes) and timeless(run) == timeless(right)


def test_long_work_is_told_of(settings, monkeypatch):
    clock = [0.0]

    def now() -> float:
        clock[0] += 0.4
        return clock[0]

    monkeypatch.setattr("preftune.reference_cache.time.perf_counter", now)
    told: list[Event] = []
    train(settings(), callbacks=[told.append])
    stages = [e for e in told if e.kind == "stage"]
    assert stages and all(0 < e.step <= e.total for e in stages)
    last = {e.message: e for e in stages}
    assert {"hashing weights", "reference log-probs"} <= set(last)
    assert all(e.step == e.total for e in last.values())
    started = next(i for i, e in enumerate(told) if e.kind == "start")
    assert all(told.index(e) < started for e in stages)


def store(folder: Path, **more: Any) -> Store:
    return Store(folder, {"what": "numbers", **more}, COUNTS, np.dtype(np.float32))


COUNTS = [300, 1, 7, 2000, 64]


def block(i: int, shift: float = 0) -> np.ndarray:
    return np.arange(COUNTS[i], dtype=np.float32) + i + np.float32(shift)


def write_often(folder: Path, gate: Any, shift: float) -> None:
    gate.wait()
    for _ in range(150):
        mine = store(folder)
        for i in range(len(COUNTS)):
            mine.put(i, block(i, shift))


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_two_processes_that_fill_at_once(shift, tmp_path):
    """The same bytes from both: whole. Others (another processor's rounding): one's or seen."""
    context = multiprocessing.get_context("fork")
    gate = context.Barrier(2)
    jobs = [
        context.Process(target=write_often, args=(tmp_path / "s", gate, s)) for s in (0.0, shift)
    ]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert [job.exitcode for job in jobs] == [0, 0]
    found = store(tmp_path / "s")
    for i in range(len(COUNTS)):
        values = found.values[found.start[i] : found.start[i + 1]]
        is_one_s = any(np.array_equal(values, block(i, s)) for s in (0.0, shift))
        assert is_one_s or not found.holds(i)
        assert found.holds(i) or shift


def test_a_store_that_is_made_anew_beside_its_reader(tmp_path):
    """The reader goes on with its own file, whole."""
    first = store(tmp_path / "s")
    first.put(0, block(0))
    (tmp_path / "s" / "meta.json").unlink()
    second = store(tmp_path / "s")
    assert not second.holds(0) and first.holds(0)
    first.put(1, block(1))
    assert first.holds(1) and np.array_equal(first.values[300:301], block(1))
    second.put(0, block(0))
    assert store(tmp_path / "s").holds(0)


def test_a_cache_that_may_only_be_read_serves(tmp_path):
    whole = store(tmp_path / "s")
    for i in range(len(COUNTS)):
        whole.put(i, block(i))
    (tmp_path / "s" / "values.bin").chmod(0o444)
    (tmp_path / "s").chmod(0o555)
    try:
        assert all(store(tmp_path / "s").holds(i) for i in range(len(COUNTS)))
    finally:
        (tmp_path / "s").chmod(0o755)
