"""Tier 3 of `preftune diagnose`: a probe run and what its answers show, on a tiny model."""

import hashlib
import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from preftune import cli, fingerprint, training
from preftune.config import Config, load
from preftune.diagnosis import cost, job, page, probe, reading
from preftune.diagnosis.measure import Measured, Surveyed
from preftune.errors import GuardStop, Saved, UserError
from preftune.runs import RunFolder

pytestmark = pytest.mark.long

FIGURES = {
    "probe_kl", "probe_kl_by_tokens", "probe_gap", "probe_feature_ratio", "probe_feature_shift",
    "probe_ensemble_ratio",
}  # fmt: skip
STEPS = 4


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Forty-one pairs of forty-one prompts."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = (
        {"prompt": f"Say {n}.", "chosen": f"{n % 7}{n}", "rejected": f"no {n} no {n % 5}"}
        for n in range(41)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def settings(here: Path, tiny_model: str, pairs: str) -> Config:
    return load(
        {"model": tiny_model, "data": pairs, "max_new_tokens": 3, "output": "out",
         "learning_rate": 0.01, "batch_size": 4}
    )  # fmt: skip


def contents(folder: str) -> dict[str, str]:
    return {
        str(p): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(Path(folder).rglob("*"))
        if p.is_file()
    }


def test_a_probe_from_the_command_line(here, tiny_model, pairs, capsys, monkeypatch) -> None:
    """Its figures stand in --json and on the page, its folder in the output's; the model stays as
    it was, on disk and in memory."""
    made = []
    original = job._prepare
    monkeypatch.setattr(job, "_prepare", lambda *a: made.append(original(*a)) or made[-1])
    before = contents(tiny_model)
    args = ["diagnose", "--model", tiny_model, "--data", pairs, "--max-new-tokens", "3"]
    args += ["--output", "out", "--probe-steps", str(STEPS), "--learning-rate", "0.03"]
    assert cli.run([*args, "--reward", "length:min", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert set(printed["figures"]) >= FIGURES | {"ensemble_ratio", "ensemble_accuracy"}
    found = {name: printed["figures"][name] for name in FIGURES}
    assert all(x["trusted"] and x["low"] <= x["value"] <= x["high"] for x in found.values()), found
    assert found["probe_kl_by_tokens"]["low"] > reading.LEAST_KL and found["probe_gap"]["low"] > 0
    assert printed["facts"]["probe_steps"] == STEPS
    text = (here / "out" / "diagnosis.html").read_text()
    for name in FIGURES:
        assert f"<th>{name}</th>" in text and page.meaning(name) == reading.DOCUMENTED[name]
        assert page._text(reading.DOCUMENTED[name]) in text
    (folder,) = (here / "out").glob("probe-*")
    assert [r["step"] for r in RunFolder(folder).read("metrics.jsonl")] == list(range(1, STEPS + 1))
    assert {p.name for p in here.iterdir()} == {"out"}, "nothing stands elsewhere"
    assert contents(tiny_model) == before
    ((prepared, *_),) = made
    assert (
        prepared.identity == original(load({"model": tiny_model, "data": pairs}), None)[0].identity
    )
    weights = json.loads(prepared.identity)["model"]
    assert fingerprint.of_weights(prepared.reference.model) == weights


def test_it_goes_on_where_it_was_cut_off(settings, monkeypatch) -> None:
    """Stopped in training, it takes up the checkpoint; stopped later, the model and the pieces."""
    first = job.diagnose(settings.model_copy(update={"output": "whole"}), probe_steps=STEPS)
    whole, drawn, own = first.figures, first.measured.drawn, first.measured.probe
    assert drawn is not None and own is not None and drawn.tokens.shape == own.tokens.shape
    alike = float((drawn.tokens == own.tokens)[drawn.mask & own.mask].double().mean())
    assert alike > 0.2, "of 261 tokens, with the same random numbers"

    def stop(stage: str):
        def tick(done: int, total: int) -> None:
            if stage == "probe" and done == 2:
                os.kill(os.getpid(), signal.SIGTERM)

        return tick

    with pytest.raises(Saved, match="with --output out goes on"):
        job.diagnose(settings, probe_steps=STEPS, tick=stop)
    (folder,) = Path("out").glob("probe-*")
    assert not (folder / "model").exists()
    steps: list[int] = []

    def follow(stage: str):
        return lambda done, total: steps.append(done) if stage == "probe" else None

    again = job.diagnose(settings, probe_steps=STEPS, tick=follow).figures
    assert steps == [3, 4] and again == whole
    assert not (folder / "checkpoints").exists()
    monkeypatch.setattr(training, "train", lambda *a, **k: pytest.fail("trained again"))
    drawn_anew = list(Path("out/pieces").glob("probe-8-*"))
    for piece in drawn_anew:
        piece.unlink()
    assert len(drawn_anew) == 3, "of sixteen prompts each"
    assert job.diagnose(settings, probe_steps=STEPS).figures == whole
    monkeypatch.setattr(probe.loading, "model_of", _only(settings.model, probe.loading.model_of))
    assert job.diagnose(settings, probe_steps=STEPS).figures == whole, "all of it is in pieces"


def _only(name: str, original):
    def load_it(config, asked):
        assert asked == name, "the probe's model is not loaded"
        return original(config, asked)

    return load_it


def test_another_run_is_another_probe(settings) -> None:
    made, *_ = job._prepare(settings, None)

    def folder(**changes: object) -> Path:
        return probe.Probe(settings.model_copy(update=changes), made, STEPS, lambda s: print).folder

    assert folder() == folder(threads=1) == folder(reward="length:min")
    assert len({folder(), folder(learning_rate=0.02), folder(seed=3), folder(beta=0.3)}) == 4
    given = {name: getattr(settings, name) for name in ("model", "data", "output")}
    plain = [probe.Probe(load(given), made, n, lambda s: print).learning_rate for n in (20, 500)]
    assert plain == pytest.approx([5e-6, 1e-6]), "as far as 100 updates at the row's own rate"
    other = probe.Probe(settings, made, STEPS + 1, lambda s: print)
    assert other.learning_rate == 0.01
    assert other.folder != folder() and other.folder.parent == Path("out")


def test_one_that_diverges_says_so(settings, monkeypatch) -> None:
    def diverge(*_: object) -> None:
        raise GuardStop("the loss is <not> finite")

    monkeypatch.setattr(probe.Probe, "_train", diverge)
    found = job.diagnose(settings, probe_steps=STEPS).figures
    assert found["feature_ratio"].trusted
    for name in FIGURES:
        assert not found[name].trusted and "<not> finite" in found[name].note
    table = page._table(found)
    assert "&lt;not&gt;" in table and "<not>" not in table


@pytest.mark.parametrize(
    ("changes", "steps", "words"),
    [
        ({}, -1, "is -1"),
        ({"output": None}, 2, "needs a folder"),
        ({"data": "completions.jsonl"}, 2, "these are completions"),
    ],
)
def test_mistakes(changes, steps, words, settings) -> None:
    rows = ({"prompt": f"a{n}", "completion": "b"} for n in range(4))
    Path("completions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    with pytest.raises(UserError, match=words):
        job.diagnose(settings.model_copy(update=changes), probe_steps=steps)


def test_a_mistake_on_the_command_line(refused, tiny_model, pairs) -> None:
    message = refused("diagnose", "--model", tiny_model, "--data", pairs, "--probe-steps", "-1")
    assert "--probe-steps" in message


def test_how_long_it_is(settings) -> None:
    """A twentieth of the longer run, at least sixteen updates, at most all of it."""
    made, *_ = job._prepare(settings, None)

    def steps(count: int, spend: float | None = None, given: int | None = None) -> int:
        many = replace(made, rows=made.rows.select([0] * count))
        planned = probe.planned(settings, many, given, spend)
        assert planned is not None and planned.asked == (given is not None)
        assert planned.pairs == settings.batch_size == 4
        return planned.steps

    assert steps(800) == 30, "three epochs of 800 pairs, four at a time, are 600 updates"
    assert steps(800, spend=8 * 1000) == 50
    assert steps(200) == 16 and steps(4) == 3
    assert steps(800, given=7) == 7
    assert probe.planned(settings, made, 0, None) is None


def test_what_it_takes_of_a_budget() -> None:
    """Training of 100 pairs at .1 s a forward pass, .3 of an update, and loading: 38.3 s."""
    speeds = cost.Speeds(row=0.1, prompt=1.0, load=5.0)
    auto = cost.Probe(steps=25, pairs=4, asked=False)
    asked = replace(auto, asked=True)
    training_takes = 5 + 100 * 0.1 / 0.3
    assert auto.training(speeds) == pytest.approx(training_takes)
    plain = cost.sizes(None, speeds, 900, 1)
    assert cost.sizes(None, speeds, 900, 1, auto) == plain, "nobody asked"
    whole = cost.sizes(None, speeds, 900, 1, asked)
    assert whole.probe_steps == 25
    everything = plain.expected + training_takes + 200 * speeds.probed
    assert whole.expected == pytest.approx(everything)
    assert cost.sizes(everything + 1, speeds, 900, 1, auto).probe_steps == 25
    short = cost.sizes(everything - 1, speeds, 900, 1, auto)
    assert (short.probe_steps, short.rows, short.prompts) == (0, 500, 200), "all else comes first"
    assert "no probe" in short.no_probe and not short.note
    squeezed = cost.sizes(everything / 2, speeds, 900, 1, asked)
    assert squeezed.probe_steps == 25 and 16 <= squeezed.prompts < 200
    assert squeezed.expected <= everything / 2
    none = cost.sizes(10, speeds, 900, 1, asked)
    assert none.probe_steps == 0 and "25 updates and what" in none.no_probe
    assert none.no_probe.endswith("38 s")
    assert replace(none, no_probe="") == cost.sizes(10, speeds, 900, 1)


def test_a_budget_says_what_it_counts_on(settings, monkeypatch) -> None:
    said: list[str] = []
    trained: list[int] = []

    def leave(asked: probe.Probe) -> None:
        trained.append(asked.steps)
        raise GuardStop("left out")

    monkeypatch.setattr(probe.Probe, "_train", leave)
    job.diagnose(settings, budget="1h", spend=8.0 * 3, note=said.append)
    assert any("a probe of 3 updates: about" in line for line in said), said
    assert trained == [3]
    job.diagnose(settings)
    assert trained == [3], "without a budget nothing is trained"


def surveyed(answers: int, seed: int, step_kl: float = 0.0) -> Surveyed:
    """Responses of one to six tokens, with everything measured of them at random."""
    made = torch.Generator().manual_seed(seed)
    shape = (60, answers, 6)
    length = torch.randint(1, 7, shape[:2], generator=made)
    mask = torch.arange(6) < length[..., None]
    logp = -torch.rand(shape, generator=made) * mask
    wide = torch.randn(60, answers, 8, generator=made)
    if answers == 2:
        wide[:, 0] += 1
    return Surveyed(
        row=torch.arange(60), tokens=mask.long(), mask=mask,
        finished=torch.ones(shape[:2], dtype=torch.bool), ref_logp=logp, entropy=0.5 * mask,
        variance=0.2 * mask, hidden=wide * length[..., None], logp=logp + step_kl * mask,
        step_kl=step_kl * mask,
    )  # fmt: skip


def test_a_probe_that_hardly_moved_is_not_read() -> None:
    data, drawn = surveyed(2, 0), surveyed(8, 1)

    def of(step_kl: float) -> reading.Figures:
        own = surveyed(8, 2, step_kl)
        return reading.figures(Measured(data=data, drawn=drawn, probe=own, probe_data=data))

    still, moved = of(0.001), of(0.1)
    assert set(still) == set(moved) >= FIGURES
    for name in FIGURES - {"probe_kl", "probe_kl_by_tokens"}:
        assert moved[name].trusted, name
        assert still[name].value is None and "hardly moved" in still[name].note
    assert still["probe_kl_by_tokens"].trusted and still["ensemble_ratio"].trusted
    before, after = still["feature_ratio"].value, moved["probe_feature_ratio"].value
    assert before and after
    assert moved["probe_feature_shift"].value == pytest.approx(after / before, rel=0.02)
