"""The language study of `benchmarks/study_gpu.py`: all of it on a CPU with next to no training,
what it may import, and its statistics by hand."""

import json
import math
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(FOLDER))

import study_gpu  # noqa: E402
import study_ground  # noqa: E402
import study_parts  # noqa: E402
import study_table  # noqa: E402

from preftune import methods  # noqa: E402
from preftune.policies.scoring import score_all  # noqa: E402

NOT_THERE = (
    "pydantic", "plotly", "rich", "datasets", "tyro", "peft", "trl", "pandas", "pyarrow", "wandb",
)  # fmt: skip
"""Packages that a GPU machine need not have: nobody finds them."""
ALLOWED = ("torch", "numpy", "safetensors", "jaxtyping", "transformers")
"""What our own modules may import besides Python's."""
CODE = """
import builtins, json, sys
calls, names, allowed, path = json.loads(sys.argv[1])
sys.modules.update(dict.fromkeys(names))  # importing one of them raises
ours, plain, beyond = ("preftune", "study_", "gpu"), builtins.__import__, set()

def watched(name, globals=None, locals=None, fromlist=(), level=0):
    top, who = name.partition(".")[0], (globals or {}).get("__name__", "")
    known = top in sys.stdlib_module_names or top in allowed or top.startswith(ours)
    if who.startswith(ours) and level == 0 and not known:
        beyond.add(f"{who} imports {name}")
    return plain(name, globals, locals, fromlist, level)

builtins.__import__ = watched
sys.path.insert(0, path)
import study_gpu
codes, found = [study_gpu.main(c) for c in calls], sorted(beyond)
try:
    import preftune.config  # which needs one of them: it is noticed
except ImportError:
    found = [found, sorted(beyond)]
print(json.dumps([codes, found]))
"""
SMALL = (
    "--shape 1x32 --vocabulary 40 --median 3 --max-new-tokens 8 --sft-steps 10 --sft-batch 16 "
    "--texts 64 --pairs 24 --held-out 12 --reward-steps 3 --steps 2 --batch 4 --checkpoints 1"
).split()


def call(folder: Path, *arguments: str) -> list[str]:
    """A command line."""
    return [*arguments, "--device", "cpu", "--tiny", "--output", str(folder)]


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study whose first pieces were made by a process without the packages `NOT_THERE`."""
    folder = tmp_path_factory.mktemp("study")
    calls = [
        [*call(folder, "prepare", "--problems", "min"), *SMALL],
        call(folder, "run", "--method", "dpo", "--rate", "1e-3"),
        call(folder, "run", "--method", "ppo", "--problem", "skew", "--rate", "1e-3"),
    ]
    given = json.dumps([calls, NOT_THERE, ALLOWED, str(FOLDER)])
    found = subprocess.run([sys.executable, "-c", CODE, given], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-3000:]
    codes, beyond = json.loads(found.stdout.splitlines()[-1])
    assert codes == [0, 0, 0], found.stderr[-3000:]
    assert beyond == [[], ["preftune.config imports pydantic"]]
    return folder


def pieces(folder: Path) -> dict[str, dict[str, Any]]:
    return {p.stem: json.loads(p.read_text()) for p in (folder / "pieces").glob("*.json")}


# --- all of it ------------------------------------------------------------------------------------


def test_whole_runs_need_only_what_a_gpu_machine_has(begun: Path):
    found = pieces(begun)
    assert set(found) >= {"min-dpo-rate0.001-seed0", "skew-ppo-rate0.001-seed0"}
    for piece in found.values():
        assert [c["step"] for c in piece["curve"]] == [0, 2] and not piece["diverged"]
        assert piece["curve"][0]["kl"] == 0 and piece["curve"][0]["win_rate"] == 0.5
        assert piece["curve"][1]["kl"] > 0
        assert set(study_parts.FIGURES) <= set(piece["curve"][1])
        assert {"train", "evaluate", "total"} <= set(piece["seconds"])
        assert piece["dtype"] == "float32" and piece["hardware"].startswith("CPU")
        assert piece["tokens_per_second"]["train"] > 0 and piece["peak_gib"] > 0
        assert all(c["holds"] for c in piece["checks"]) and len(piece["checks"]) >= 7
        assert piece["ground"]["reward_model"]["pairs"] == piece["ground"]["pairs"]
    ppo = found["skew-ppo-rate0.001-seed0"]
    assert ppo["seconds"]["decode"] > 0 and ppo["curve"][1]["reward_queries"] == 4
    assert found["min-dpo-rate0.001-seed0"]["axes"]["negative_gradient"]


def test_the_reference_is_small_enough_to_be_carried(begun: Path):
    folder = begun / "seed-0" / "reference"
    assert study_parts.kept(folder) and (begun / "seed-0" / "reward-min" / "facts.json").is_file()
    study = study_parts.Study()
    with torch.device("meta"):
        model = study_parts.new_model(study, 0)
    weights = sum(p.numel() for p in model.parameters())
    assert 15e6 < weights < 17e6 and 2 * weights < 48 * 2**20


def test_pieces_that_are_there_are_not_run_again(begun: Path, capsys: pytest.CaptureFixture[str]):
    path = begun / "pieces" / "min-dpo-rate0.001-seed0.json"
    before = path.read_bytes(), path.stat().st_mtime_ns
    arguments = ["--problems", "min", "--methods", "dpo,hypo", "--seeds", "0", "--rates", "1e-3"]
    assert study_gpu.main(call(begun, "all", *arguments, "--weights", "0.01,0.1")) == 0
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    said = capsys.readouterr()
    assert "2 pieces run, 3 of 3 there" in said.err and "training a reference" not in said.err
    found = pieces(begun)
    weak, strong = (found[f"min-hypo-rate0.001-weight{w}-seed0"] for w in ("0.01", "0.1"))
    assert weak["weight"] == 0.01 and weak["curve"][1]["kl"] != strong["curve"][1]["kl"]
    assert weak["curve"][0] == {**strong["curve"][0]}

    assert study_gpu.main(call(begun, "table")) == 0
    out = capsys.readouterr().out
    lines = [json.loads(x) for x in out.splitlines() if x.startswith("{")]
    assert [x["name"] for x in lines] == ["ppo", "dpo", "hypo"]
    assert all(x["few_seeds"] and x["seeds"] == [0] for x in lines)
    assert "| problem | method" in out and "few seeds (1 of some cells)" in out
    data = json.loads((begun / "results.json").read_text())
    assert len(data["rows"]) == 4 and data["methods"] == lines
    assert data["rows"][1]["gold"]["low"] is None  # one seed has no interval


def test_what_is_missing_is_made_again_and_the_same(begun: Path):
    study = study_parts.Study(**json.loads((begun / "study.json").read_text()))
    known = pieces(begun)["min-dpo-rate0.001-seed0"]["ground"]
    other = begun.parent / "elsewhere"
    ground = study_ground.Ground(
        study=study, seed=0, problem="min", folder=other, device=torch.device("cpu")
    )
    assert ground.fingerprint == known["reference"] and len(ground.pairs) == known["pairs"]
    (other / "seed-0" / "reference" / "facts.json").write_text("{}")  # a damaged one is not used
    assert not study_parts.kept(other / "seed-0" / "reference")


def test_known_log_probs_are_those_of_whole_pairs_alone(begun: Path):
    """A source that sets an own sample beside the chosen response reads the data, too."""
    study = study_parts.Study(**json.loads((begun / "study.json").read_text()))
    ground = study_ground.Ground(
        study=study, seed=0, problem="min", folder=begun, device=torch.device("cpu")
    )
    rows = ground.pairs.samples(torch.tensor([2, 0]))
    sources = {n: methods.get(n).terms[0].source for n in ("dpo", "chosen_vs_own", "pref_ft")}
    found = {n: ground.known(source, rows) for n, source in sources.items()}
    assert found["chosen_vs_own"] is None and found["pref_ft"] is None
    torch.testing.assert_close(found["dpo"], score_all(ground.reference, rows, None))


def test_what_is_expected_of_a_piece(begun: Path, tmp_path: Path):
    study = study_parts.Study(**json.loads((begun / "study.json").read_text()))
    bench = study_gpu.Bench(begun, study, torch.device("cpu"), 100.0)
    job = study_gpu.Job(problem="min", method="dpo", seed=0, rate=1.0)
    took = [p["seconds"]["total"] for p in pieces(begun).values() if p["method"] == "dpo"]
    assert study_gpu.expected(bench, job) == pytest.approx(1.2 * max(took))
    facts = [study_parts.facts_of(p)["seconds"] for p in (begun / "seed-0").glob("re*")]
    other = study_gpu.Job(problem="min", method="dpo", seed=9, rate=1.0)
    beyond = study_gpu.expected(bench, other) - 1.2 * max(took)
    assert 1.2 * max(facts) < beyond <= 2.4 * max(facts)  # a reference and a reward model
    fresh = study_gpu.Bench(tmp_path, study, torch.device("cuda"), 100.0)
    assert study_gpu.expected(fresh, job) == 3 * study_gpu.UNKNOWN


def test_out_of_time_keeps_nothing_by_halves(begun: Path, capsys: pytest.CaptureFixture[str]):
    before = set(pieces(begun))
    arguments = ["run", "--method", "ipo", "--rate", "1e-3", "--limit", "0"]
    assert study_gpu.main(call(begun, *arguments)) == 1
    assert "out of time" in capsys.readouterr().err and set(pieces(begun)) == before


def test_other_settings_are_refused(begun: Path, capsys: pytest.CaptureFixture[str]):
    assert study_gpu.main([*call(begun, "table"), "--steps", "7"]) == 2
    assert "begun with other settings: steps 7 (here 2)" in capsys.readouterr().err
    assert study_gpu.main(call(begun, "all", "--methods", "dpo,magic")) == 2
    assert study_gpu.main(call(begun, "run", "--method", "pref_ft", "--beta", "0.1")) == 2
    assert "'beta' has no use" in capsys.readouterr().err


def test_a_failed_check_is_told_by_the_exit_status(begun: Path, tmp_path: Path):
    (tmp_path / "pieces").mkdir()
    piece = pieces(begun)["min-dpo-rate0.001-seed0"]
    piece["checks"][0]["holds"] = False
    (tmp_path / "pieces" / "a.json").write_text(json.dumps(piece))  # the study is told by it
    assert study_gpu.main(call(tmp_path, "table")) == 1


def test_a_failed_start_is_one_piece_s_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    device = study_gpu.Check("of the device", 0.0, 1.0)
    starts = [study_gpu.Check("KL at step 0", found, 0.5) for found in (1.0, 0.0)]

    def train(*_: Any) -> dict[str, Any]:
        point = {"gold": -1.0, "proxy": 0.0, "kl": 0.0, "length": 1.0}
        return {
            "curve": [{"step": 0} | point, {"step": 2} | point], "diverged": "",
            "seconds": {"total": 0.0, "evaluate": 0.0}, "tokens_per_second": {},
            "checks": [starts.pop(0)],
        }  # fmt: skip

    monkeypatch.setattr(study_gpu, "train", train)
    monkeypatch.setattr(study_gpu, "checks", lambda ground: [device])
    facts = {"reference": "a", "prompts": "a"}
    monkeypatch.setattr(study_ground.Ground, "facts", lambda ground: dict(facts))
    arguments = ["--problems", "min", "--methods", "dpo", "--seeds", "0", "--rates", "1e-2,2e-2"]
    assert study_gpu.main(call(tmp_path, "all", *arguments)) == 1, "it is told all the same"
    assert "FAILED check: KL at step 0" in capsys.readouterr().out
    found = pieces(tmp_path)
    first, second = (found[f"min-dpo-rate{rate}-seed0"]["checks"] for rate in (0.01, 0.02))
    assert [c["holds"] for c in first] == [True, False]
    assert [c["holds"] for c in second] == [True, True]


def test_a_model_from_a_folder(tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Its own tokenizer and template, prompts that come with the package."""
    given = [*SMALL, "--model", tiny_model, "--layout", "padded", "--reward", "true"]
    arguments = ["run", "--method", "rloo", "--problem", "skew", "--rate", "1e-3"]
    assert study_gpu.main([*call(tmp_path, *arguments), *given]) == 0
    (piece,) = pieces(tmp_path).values()
    assert "sft" not in piece["ground"] and piece["curve"][1]["proxy"] == piece["curve"][1]["gold"]
    assert not (tmp_path / "seed-0").exists()
    arguments = ["run", "--method", "rloo", "--problem", "min", "--rate", "1e-3"]
    assert study_gpu.main(call(tmp_path, *arguments)) == 2  # none of its answers ends
    assert "Raise --max-new-tokens" in capsys.readouterr().err


# --- the generated language and the problems ------------------------------------------------------


def test_lengths_of_the_texts_are_by_their_law():
    study = study_parts.Study(texts=8000, median=6.0, max_new_tokens=24, vocabulary=64)
    law = study_parts.length_law(study)
    # P(1 word) is the log-normal's mass below 1.5, of what lies below 23.5
    below = [0.5 * (1 + math.erf(math.log(x / 6) / 0.5 / math.sqrt(2))) for x in (0.5, 1.5, 23.5)]
    assert law[0] == pytest.approx((below[1] - below[0]) / (below[2] - below[0]))
    assert len(law) == 23 and law.sum() == pytest.approx(1)
    texts = study_parts.texts_of(study, 3)
    seen = texts.lengths().flatten().bincount(minlength=24)[1:] / 8000
    assert (seen - law).abs().max() < 0.016
    last = texts.tokens[texts.mask].view(-1)
    assert (last == study_parts.END).sum() == 8000 and int(texts.tokens.max()) < 64
    assert bool((texts.tokens[:, 0, 0] >= study_parts.FIRST).all())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_prompt_is_both_trained_on_and_held_out(seed: int, tmp_path: Path):
    study = study_parts.Study()
    ground = study_ground.Ground(
        study=study, seed=seed, problem="min", folder=tmp_path, device=torch.device("cpu")
    )
    prompt, mask = ground.prompts()
    rows = {tuple(p[m].tolist()) for p, m in zip(prompt, mask, strict=True)}
    assert len(rows) == len(prompt) == study.pairs + study.held_out
    before, told = study_parts.prompts_of(study, seed, "pairs", 40)
    first = [p[m].tolist() for p, m in zip(before, told, strict=True)]
    assert prompt[0][mask[0]].tolist() == first[0], "the same draws, less the repetitions"


def test_a_language_with_too_few_prompts_says_so():
    study = study_parts.Study(vocabulary=18)  # a word a topic: 16 x 6 prompts
    prompt, _ = study_parts.distinct_prompts(study, 0, "pairs", 96)
    assert len(prompt.unique(dim=0)) == 96
    with pytest.raises(ValueError, match="has 96 prompts, not the 97"):
        study_parts.distinct_prompts(study, 0, "pairs", 97)


def test_prompts_of_a_file_count_once(tiny_model: str, tmp_path: Path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"say {i % 6}"}) + "\n" for i in range(30)))
    study = study_parts.Study(model=tiny_model, prompts=str(path), held_out=3, pairs=10)
    ground = study_ground.Ground(
        study=study, seed=0, problem="min", folder=tmp_path, device=torch.device("cpu")
    )
    prompt, _ = ground.prompts()
    assert len(prompt) == len(prompt.unique(dim=0)) == 6
    few = study_parts.Study(model=tiny_model, prompts=str(path), held_out=4)
    with pytest.raises(ValueError, match="6 prompts are too few"):
        study_ground.file_prompts(few, ground.model, ground.tokenizer)


def test_a_reward_model_of_other_prompts_is_trained_anew(
    begun: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its pairs may hold prompts that are held out now."""
    study = study_parts.Study(**json.loads((begun / "study.json").read_text()))
    folder, trained = begun / "seed-0" / "reward-min", list[Path]()
    monkeypatch.setattr(
        study_ground.Ground, "_train_reward", lambda ground, where: trained.append(where)
    )
    known = pieces(begun)["min-dpo-rate0.001-seed0"]["ground"]["prompts"]
    for asked, anew in ((known, []), ("others", [folder])):
        monkeypatch.setattr(study_ground.Ground, "asked", asked)
        ground = study_ground.Ground(
            study=study, seed=0, problem="min", folder=begun, device=torch.device("cpu")
        )
        assert ground.proxy and trained == anew


def _rows(*lengths: tuple[int, int]) -> study_parts.Rows:
    """Pairs of responses of so many words, each with its end token."""
    words = torch.tensor(lengths)
    place = torch.arange(8)
    tokens = torch.where(place < words[..., None], 7, study_parts.END)
    return study_parts.Rows(
        prompt=torch.ones(len(words), 1).long(), prompt_mask=torch.ones(len(words), 1).bool(),
        tokens=tokens, mask=place <= words[..., None], finished=torch.ones(len(words), 2).bool(),
    )  # fmt: skip


def test_pairs_are_ranked_by_the_true_reward_without_ties():
    rows = _rows((2, 5), (4, 3), (6, 6), (2, 6))
    shorter = study_ground.ranked(rows, study_ground.aimed_at("min", 4))
    assert shorter.lengths().tolist() == [[2, 5], [3, 4], [2, 6]]
    nearer = study_ground.ranked(rows, study_ground.aimed_at("mode", 4))
    assert nearer.lengths().tolist() == [[5, 2], [4, 3]]  # 2 and 6 are as far from 4


def test_cut_responses_end():
    rows = _rows(*[(7, 7)] * 4000)
    short = study_ground.cut(rows, 2.0, 5, study_parts.END)
    length = short.lengths()
    assert bool(short.finished.all()) and int(length.min()) == 1 and int(length.max()) == 7
    ends = short.tokens.gather(-1, length.unsqueeze(-1))
    assert bool((ends == study_parts.END).all())
    assert bool((short.mask.sum(-1) == length + 1).all())
    # P(one word) = P(exponential of mean 2 < 1)
    assert (length == 1).double().mean() == pytest.approx(1 - math.exp(-0.5), abs=0.015)


# --- statistics -----------------------------------------------------------------------------------


def piece(method: str, seed: int, rate: float, gold: float, **more: Any) -> dict[str, Any]:
    """What the table reads of a piece."""
    curve = [
        {"step": 0, "gold": -10.0, "kl": 0.0, "proxy": 0.0},
        {"step": 4, "gold": gold, "kl": more.pop("kl", 1.0), "proxy": 2.0},
    ]
    return {
        "problem": "min", "method": method, "seed": seed, "rate": rate, "beta": None,
        "weight": None, "curve": curve, "diverged": "", "seconds": {"total": 3.0},
        "tokens_per_second": {}, "peak_gib": 1.0, "hardware": "CPU", "checks": [],
    } | more  # fmt: skip


def test_interval_over_two_seeds_by_hand():
    """Resamples of (0, 1) have means 0, ½, 1 with probabilities ¼, ½, ¼."""
    assert study_table.over_seeds([0.0, 1.0]) == {"value": 0.5, "low": 0.0, "high": 1.0}
    assert study_table.over_seeds([2.0, 2.0]) == {"value": 2.0, "low": 2.0, "high": 2.0}
    assert study_table.over_seeds([3.0]) == {"value": 3.0, "low": None, "high": None}


def test_rates_are_chosen_by_the_other_seeds():
    """Seed 0 has its best at rate 1, the others theirs at rate 2: seed 0 gets rate 2, and the
    others, of which seed 0 is one, the rate with the better mean of the rest."""
    gold = {(0, 1.0): -1, (1, 1.0): -6, (2, 1.0): -6, (0, 2.0): -5, (1, 2.0): -4, (2, 2.0): -4}
    found = [piece("dpo", s, r, float(g)) for (s, r), g in gold.items()]
    best = study_table.chosen(found)
    # for seed 1: rate 1 has (-1 - 6) / 2 = -3.5, rate 2 (-5 - 4) / 2 = -4.5
    assert {s: p["rate"] for s, p in best.items()} == {0: 2.0, 1: 1.0, 2: 1.0}
    found[4]["diverged"] = "not finite"  # seed 1 at rate 2: others do not take that rate
    assert {s: p["rate"] for s, p in study_table.chosen(found).items()} == {0: 1.0, 1: 1.0, 2: 1.0}


def test_rates_are_chosen_by_seeds_that_all_of_them_have():
    """Seed 1 is hard: rate 1, alone there, is not the worse for it. Seeds differ in their starts,
    too: gains count."""
    gold = {(0, 1.0): -5, (1, 1.0): -9, (2, 1.0): -4, (0, 2.0): -6, (2, 2.0): -5}
    found = [piece("dpo", s, r, float(g)) for (s, r), g in gold.items()]
    assert study_table.judges(found, 0) == [2] and study_table.judges(found, 2) == [0]
    assert [p["rate"] for p in study_table.chosen(found).values()] == [1.0] * 3
    alone = [piece("dpo", 0, 1.0, -5.0), piece("dpo", 1, 1.0, -3.0), piece("dpo", 0, 2.0, -4.0)]
    assert study_table.judges(alone, 0) == [0], "rate 2 has no other seed: not even rate 1 does"
    assert study_table.chosen(alone)[0]["rate"] == 2.0
    line = study_table.method_line(alone, "dpo", "CPU")["problems"]["min"]
    assert line["chosen_on_itself"] == [0]
    harder = [piece("dpo", s, r, float(g)) for s, r, g in ((0, 1, -5), (1, 1, -8), (1, 2, -9))]
    harder += [piece("dpo", 0, 2.0, -6.0), piece("dpo", 2, 1.0, -8.0), piece("dpo", 2, 2.0, -7.0)]
    harder[1]["curve"][0]["gold"] = -12.0  # seed 1 gains 4 at rate 1, 1 at rate 2
    assert study_table.chosen(harder)[0]["rate"] == 1.0


def test_seeds_without_a_frontier_are_counted():
    """Seed 1's DPO never beats its start, seed 2 has no HyPO."""
    found = [piece("dpo", s, 1.0, g, kl=2.0) for s, g in enumerate((-6.0, -10.0, -6.0))]
    found += [piece("hypo", s, 1.0, -6.0) for s in range(2)]
    line = study_table.method_line(found, "hypo", "CPU")["problems"]["min"]
    assert line["frontier_log_kl_over_dpo"]["value"] == pytest.approx(math.log(0.5))
    assert line["frontier_seeds_dropped"] == [1, 2]
    (note,) = (n for n in study_table.notes_of(found) if "frontier" in n)
    assert note.startswith("min: the frontier of HyPO against DPO is without 2 seeds (1, 2)")
    both = [p for p in found if p["seed"] == 0]
    assert not any("frontier" in n for n in study_table.notes_of(both))


def test_frontiers_by_hand():
    """Levels -9 ... -2 from -10 to -2 by 1: mine needs 1 nat up to -6 and 4 beyond; the other 2."""
    mine, other = [(1.0, -6.0), (4.0, -2.0)], [(2.0, -2.0), (9.0, -1.0)]
    found = study_table.log_kl_ratio(mine, other, -10.0)
    assert found == pytest.approx((4 * math.log(0.5) + 4 * math.log(2)) / 8)
    assert study_table.log_kl_ratio(mine, [(3.0, -11.0)], -10.0) is None
    small = study_table.log_kl_ratio([(0.0, -2.0)], [(0.02, -2.0)], -10.0)
    assert small == pytest.approx(math.log(0.5))  # a KL under 0.01 counts as 0.01


def test_a_method_is_compared_with_dpo_seed_by_seed():
    found = [piece("dpo", s, 1.0, g, kl=2.0) for s, g in enumerate((-6.0, -4.0))]
    found += [piece("hypo", s, 1.0, g) for s, g in enumerate((-5.0, -2.0))]
    line = study_table.method_line(found, "hypo", "CPU")["problems"]["min"]
    assert line["gold_less_dpo"] == {"value": 1.5, "low": 1.0, "high": 2.0}
    assert line["gold_gain"]["value"] == 6.5 and line["kl"]["value"] == 1.0
    assert line["frontier_log_kl_over_dpo"]["value"] == pytest.approx(math.log(0.5))
    assert "gold_less_dpo" not in study_table.method_line(found, "dpo", "CPU")["problems"]["min"]
    rows = study_table.summary(found)
    assert [(r["method"], r["seeds"], r["gold gain"]["value"]) for r in rows] == [
        ("dpo", [0, 1], 5.0), ("hypo", [0, 1], 6.5)
    ]  # fmt: skip


def test_pieces_of_two_references_are_said_to_be_unpaired(tmp_path: Path):
    (tmp_path / "pieces").mkdir()
    study = asdict(study_parts.Study())
    for i, made in enumerate((study, study, {**study, "steps": 3})):
        ground = {"reference": str(i), "prompts": "a"}
        own = piece("dpo", 0, 1.0 + i, -1.0, study=made, ground=ground)
        (tmp_path / "pieces" / f"{i}.json").write_text(json.dumps(own))
    found, notes = study_table.read(tmp_path, study)
    assert len(found) == 2 and len(notes) == 2
    assert "2.json was made with other settings" in notes[0]
    assert "seed 0 stand on 2 references" in notes[1]


def test_pieces_whose_held_out_prompts_were_trained_on_say_so(tmp_path: Path):
    (tmp_path / "pieces").mkdir()
    study = asdict(study_parts.Study())
    own = piece("dpo", 0, 1.0, -1.0, study=study, ground={"reference": "a"})
    (tmp_path / "pieces" / "0.json").write_text(json.dumps(own))
    _, (note,) = study_table.read(tmp_path, study)
    assert "seed 0" in note and "held out were trained on" in note


def test_jobs_and_their_files():
    arguments = "all --output x --seeds 1 --problems min --methods dpo,hypo --rates 1e-5 dpo=1e-4"
    asked = study_gpu.given([*arguments.split(), "--betas", "0.1,0.3"])
    assert [job.name for job in study_gpu.jobs_of(asked)] == [
        "min-dpo-rate0.0001-beta0.1-seed1", "min-dpo-rate0.0001-beta0.3-seed1",
        "min-hypo-rate1e-05-seed1",
    ]  # fmt: skip
