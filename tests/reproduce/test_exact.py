"""Bounds and constructions by hand, and what every claim without a training loop gives."""

import math

import pytest
import torch
from small_claims import KNOWN, SMALL, f64, measure

from preftune.reproduce import charts, claims, exact
from preftune.theory import coverage
from preftune.theory.closed_form import kl


@pytest.mark.parametrize("name", SMALL)
def test_gives_numbers_rows_figure_and_notes(name: str) -> None:
    """One number a seed, or one where no seed enters; what stands beside it can be printed."""
    found = measure(name)
    assert set(found.values) == {part.name for part in KNOWN[name].parts}
    for values in found.values.values():
        assert values.dtype == torch.float64
        assert values.shape == ((1,) if KNOWN[name].seeds == 1 else (3,))
        assert torch.isfinite(values).all()
    assert all(note.endswith(".") and "nan" not in note for note in found.notes)
    assert len(found.notes) >= 2 and found.rows
    for row in found.rows:
        assert all(isinstance(x, str | int | float | list) for x in row.values()), row
        assert all(math.isfinite(x) for x in row.values() if isinstance(x, float)), row
    if name != "m3-cases":
        layout = found.figure.to_dict()["layout"]
        assert all(layout[key]["title"]["text"] for key in ("xaxis", "yaxis"))
        drawn = found.figure.to_dict()["data"]
        names = [line["name"] for line in drawn if line.get("showlegend", True)]
        assert len(set(names)) == len(names) > 1


@pytest.mark.parametrize("name", [name for name in SMALL if KNOWN[name].seeds > 1])
def test_a_seed_alone_gives_what_it_gives_among_others(name: str) -> None:
    alone, batch = measure(name, [7]), measure(name, [0, 7, 3])
    torch.testing.assert_close(alone.values[""][0], batch.values[""][1], rtol=1e-10, atol=1e-12)
    if name not in ("m3-cases", "c2-kl-bound", "d2-isomorphic"):  # which are 0 for every seed
        assert len(set(batch.values[""].tolist())) == 3


def test_the_unseen_arm() -> None:
    """1 − 1/e less .632; errors are as asked for, and the mass rises with them."""
    found = measure("c1-prop41")
    assert found.values[""].item() == pytest.approx(1 - math.exp(-1) - 0.632, abs=1e-12)
    other = measure("c1-prop41", eps=0.04, beta=0.3)
    assert other.values[""].item() == pytest.approx(1 - math.exp(-2 / 3) - 0.632, abs=1e-12)
    for row in found.rows:
        assert row["mass"] == pytest.approx(1 - math.exp(-math.sqrt(row["eps"]) / row["beta"]))
        assert row["error"] == pytest.approx(row["eps"])
        # the reference: half of the rest on each arm seen, 1e-6 on the third
        tilt = f64(0.3 / row["beta"], 0).softmax(-1) * (1 - row["mass"])
        log_p = torch.cat([tilt, f64(row["mass"])]).log()
        log_ref = f64(0.5 - 5e-7, 0.5 - 5e-7, 1e-6).log()
        assert row["kl"] == pytest.approx(kl(log_p, log_ref).item())


def test_the_bound_is_kept_and_tight(monkeypatch: pytest.MonkeyPatch) -> None:
    """No instance is beyond it, some come near; a slightly smaller one is broken."""
    found = measure("c2-kl-bound")
    assert found.values[""].tolist() == [0.0, 0.0, 0.0]
    assert all(0.95 < row["closest"] <= 1 for row in found.rows)
    assert all(row["dpo_kl"] > row["dpo_bound"] for row in found.rows)
    bound = coverage.tilt_kl_bound
    monkeypatch.setattr(coverage, "tilt_kl_bound", lambda size, beta: 0.9 * bound(size, beta))
    assert (measure("c2-kl-bound").values[""] > 0).all()


def test_the_bounded_problems_are_what_they_say() -> None:
    """Uniform, peaked and thin references in turn, no constant reward, ranges and betas."""
    log_ref, reward, beta = exact._bounded_problems([1, 2], "x", 60, 30)
    least = log_ref.log_softmax(-1).amin(-1)
    assert torch.allclose(least[:, ::3], torch.tensor(-math.log(30)).double())
    assert (least[:, 1::3] < -6).all() and (least[:, 2::3] < -25).all()
    spread = reward.amax(-1) - reward.amin(-1)
    assert (spread > 0.05).all() and (spread <= 5).all()
    assert (beta >= 0.05).all() and (beta <= 5).all() and beta.max() > 20 * beta.min()
    distinct = torch.tensor([[len(r.unique()) for r in rewards] for rewards in reward])
    two = torch.arange(60) // 3 % 2 == 1
    assert (distinct[:, two] == 2).all() and (distinct[:, ~two] == 30).all()


def test_misspecified_by_hand() -> None:
    """Comparisons of arms 1 and 3 alone, β = 1: θ = 1, E[r] = (e + 2/e)/(e + 1/e + 1)."""
    e = math.e
    alone = measure("d5-misspecified", weights=[0, 1, 0])
    assert alone.values[""].item() == pytest.approx((e + 2 / e) / (e + 1 / e + 1) - 1, abs=1e-9)
    found = measure("d5-misspecified")
    assert found.values[""].item() == pytest.approx(0.8956 - 1, abs=1e-4)
    for row in found.rows:
        assert (row["gain"] < 0) == (row["weights"][1] > 3.648), row


def test_intervals_of_a_line_are_those_of_figures() -> None:
    values = torch.stack([f64(1, 2, 3, 6), f64(5, 5, 5, 5)], -1)
    band, line = charts.mean_line("x", [10, 20], values, "#000000")
    found = claims.interval(values[:, :1])
    assert line["x"] == [10, 20] and line["y"] == [3.0, 5.0]
    assert band["x"] == [10, 20, 20, 10]
    assert band["y"] == [found["high"], 5.0, 5.0, found["low"]]
    assert measure("c3-global-suffices", [1]).values[""].shape == (1,)  # no interval to draw
    band, line = charts.mean_line("x", [10, 20], values[:1], "#000000")
    assert line["y"] == [1.0, 5.0] and band["y"] == [1.0, 5.0, 5.0, 1.0]


def test_the_two_ways_to_a_figure_are_one_style() -> None:
    """`lines` and `chart` differ in the digits of their axes alone; bars end where bands do."""
    values = torch.stack([f64(1, 2, 3, 6), f64(5, 5, 5, 7)], -1)
    drawn = charts.lines("title", "x", "y", {"a": ([1, 10], values)}, log_x=True).to_dict()
    traces = charts.mean_line("a", [1, 10], values, charts.BLUE)
    own = charts.chart("title", "x", "y", traces, log="x").to_dict()
    assert drawn["data"] == own["data"] and own["layout"]["xaxis"]["type"] == "log"
    for axis in ("xaxis", "yaxis"):
        assert own["layout"][axis].pop("exponentformat") == "power"
    assert drawn["layout"] == own["layout"]
    (bar,) = charts.bars("title", "y", {"a": values[:, 0], "b": values[:1, 0]}).to_dict()["data"]
    found = claims.interval(values[:, :1])
    assert bar["y"] == [3.0, 1.0] and found["low"] is not None and found["high"] is not None
    assert bar["error_y"]["array"] == [found["high"] - 3.0, 0.0]
    assert bar["error_y"]["arrayminus"] == [3.0 - found["low"], 0.0]
