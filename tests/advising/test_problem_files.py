"""Problem files: what they hold, how pairs are drawn, what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from preftune.advising import files
from preftune.advising.drawing import FAMILIES, draw, name_of
from preftune.advising.files import load
from preftune.advising.problem import FORMAT, judge_of, save
from preftune.errors import UserError


def small(**changes: object) -> dict:
    """Two states, two tokens of two."""
    plain = {
        "format": FORMAT, "name": "small", "family": "hand", "states": 2, "vocab": 2, "length": 2,
        "reference": [[0.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]],
        "reward": [[0.0, 1.0, 2.0, 3.0], [3.0, 2.0, 1.0, 0.0]],
        "pairs": [[0, 3, 0], [1, 0, 3]], "labels": {"source": "human"},
        "prices": {"label": 3.0, "sample": 1.0}, "beta": 0.1, "budget": 500.0,
    }  # fmt: skip
    return plain | changes


def written(folder: Path, **changes: object) -> Path:
    path = folder / "small.json"
    path.write_text(json.dumps(small(**changes)))
    return path


def test_a_problem_comes_back_as_it_was_drawn(tmp_path: Path) -> None:
    one = draw(3)
    again = load(save(one, tmp_path))
    assert again.name == name_of(3) == "expert-0003" and again.labels.source == one.labels.source
    assert again.pairs == one.pairs and again.prices == one.prices
    torch.testing.assert_close(again.ref_logp(), one.ref_logp(), atol=1e-3, rtol=0)
    assert draw(3).pairs == one.pairs, "by number alone"
    assert draw(3, seed_base=1).pairs != one.pairs


def test_each_family_is_what_it_says() -> None:
    drawn = {p.family: p for p in map(draw, range(len(FAMILIES)))}
    assert set(drawn) == set(FAMILIES)

    def mean_reward(family: str) -> tuple[float, float]:
        p = drawn[family]
        state, chosen, rejected = p.pair_table().unbind(-1)
        reward = p.true_reward()
        both = torch.cat([reward[state, chosen], reward[state, rejected]])
        return float(both.mean() / reward.std()), float(
            (p.ref_logp().exp() * reward).sum(-1).mean()
        )

    assert mean_reward("expert")[0] > 1 > -0.5 > mean_reward("anti")[0]

    def tied(family: str) -> float:
        p = drawn[family]
        likely = p.ref_logp().exp() > p.ref_logp().exp().median(-1, keepdim=True).values
        reward = p.true_reward()
        return float(reward[likely].mean() - reward[~likely].mean())

    assert tied("likely") > 0.2 and tied("unlikely") < 0
    p = drawn["noisy"]
    state, chosen, rejected = p.pair_table().unbind(-1)
    gap = p.true_reward()[state, chosen] - p.true_reward()[state, rejected]
    assert 0.4 < float((gap > 0).double().mean()) < 0.75, "a quarter of the labels is wrong"


def test_a_data_policy_stands_for_pairs(tmp_path: Path) -> None:
    data = {"policy": [[0, 0, 0, 9], [9, 0, 0, 0]], "pairs": 400, "noise": 0.0}
    plain = small(data=data)
    del plain["pairs"]
    (tmp_path / "small.json").write_text(json.dumps(plain))
    table = load(tmp_path / "small.json").pair_table()
    assert len(table) == 400
    best = torch.where(table[:, 0] == 0, 3, 0)
    assert (table[:, 1] == best).double().mean() > 0.95


def test_the_model_of_the_pairs_knows_the_pairs(tmp_path: Path) -> None:
    pairs = [[0, 3, 0], [0, 3, 1], [0, 2, 0], [1, 0, 3]] * 20
    own = load(written(tmp_path, labels={"source": "rm_same"}, pairs=pairs))
    judge = judge_of(own)
    assert judge[0, 3] > judge[0, 0] and judge[1, 0] > judge[1, 3]
    human = replace(own, labels=replace(own.labels, source="human"))
    assert torch.equal(judge_of(human), own.true_reward())


@pytest.mark.parametrize(("changes", "words"), [
    ({"format": "other"}, "'format'"),
    ({"reward": [[1.0, 2.0]]}, "'reward' is not a finite table of 2 x 4"),
    ({"reference": [[float("nan")] * 4] * 2}, "'reference'"),
    ({"pairs": [[0, 9, 0]]}, "'pairs'"),
    ({"pairs": []}, "'pairs'"),
    ({"labels": {"source": "crowd"}}, "labels.source 'crowd'"),
    ({"labels": {"source": "rm_other", "reward": [[1.0]]}}, "'labels.reward'"),
    ({"prices": {"label": -1.0, "sample": 1.0}}, "price"),
    ({"beta": 0}, "'beta'"),
    ({"vocab": 100, "length": 6}, "more than 4096"),
    ({"length": 10**9}, "more than 4096"),
    ({"states": True}, "whole numbers"),
    ({"beta": float("nan")}, "'beta'"),
    ({"budget": 10**400}, ""),
    ({"prices": {"label": float("inf"), "sample": 1.0}}, "price"),
    ({"prices": None}, ""),
    ({"pairs": [[0.5, 1, 2]]}, "'pairs'"),
    ({"pairs": [[0, 1, 2, 0, 1, 2]]}, "'pairs'"),
    ({"labels": {"source": "human", "features": "eyes"}}, "labels.features 'eyes'"),
    ({"labels": {"source": "rm_same", "ridge": -5.0}}, "labels.ridge"),
    ({"data": {"policy": [[0.0]], "pairs": 5}}, "'data.policy'"),
    ({"data": {"policy": [[0.0] * 4] * 2, "pairs": -3}}, "'data.pairs'"),
    ({"family": ["a"]}, "'family'"),
    ({"unknown": 1}, "unknown"),
])  # fmt: skip
def test_what_is_wrong_is_said_with_its_place(tmp_path: Path, changes: dict, words: str) -> None:
    path = written(tmp_path, **changes)
    with pytest.raises(UserError) as error:
        files.load(path)
    assert words in str(error.value) and "small.json" in str(error.value)


def test_two_of_one_name_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path)
    (tmp_path / "second.json").write_text(path.read_text())
    with pytest.raises(UserError, match=r"second.json and small.json are both called 'small'"):
        files.load_all(tmp_path)
    path.unlink()
    assert [p.name for p in files.load_all(tmp_path)] == ["small"]


def test_a_missing_part_and_no_json(tmp_path: Path) -> None:
    plain = small()
    del plain["labels"]
    (tmp_path / "small.json").write_text(json.dumps(plain))
    with pytest.raises(UserError, match="'labels' is missing"):
        files.load(tmp_path / "small.json")
    (tmp_path / "torn.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        files.load(tmp_path / "torn.json")
    with pytest.raises(UserError, match="no .json file"):
        files.load_all(tmp_path / "nowhere")
