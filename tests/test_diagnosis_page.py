"""What a diagnosis draws: coverage by hand, feature directions, and the page's own parts."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from preftune.diagnosis import page
from preftune.diagnosis.charts import charts
from preftune.diagnosis.coverage import by_direction, optimum_coverage
from preftune.diagnosis.measure import Measured, Surveyed
from preftune.diagnosis.reading import figures


def test_coverage_of_an_optimum_by_hand() -> None:
    # weights of 1/6, 1/6, 1/6, 1/2 in one prompt and equal ones in the other
    reward = torch.tensor([[0.0, 0.0, 0.0, math.log(3)], [1.0, 1.0, 1.0, 1.0]])
    found = optimum_coverage(reward, 1.0, [1, 1.9, 2, 2.1])
    assert found == pytest.approx([0.75, 0.25, 0.25, 0])
    assert optimum_coverage(reward, 1e6, [0.9, 1.1]) == [1, 0], "a KL that costs all"


def differing(count: int, size: int, scale: Tensor, seed: int) -> Tensor:
    made = torch.Generator().manual_seed(seed)
    return torch.randn(count, size, generator=made, dtype=torch.float64) * scale


def test_directions_that_the_pairs_lack_stand_out() -> None:
    wide, thin = torch.tensor([1.0, 1.0, 0.01]), torch.tensor([1.0, 1.0, 1.0])
    chosen, rejected = differing(200, 3, wide, 0), differing(200, 3, wide, 1)
    own = torch.stack([differing(200, 3, thin, s) for s in range(2, 6)], 1)
    found = by_direction(own, chosen, rejected)
    assert found is not None
    ratio = found.own / found.pairs
    assert ratio[:2] == pytest.approx(torch.ones(2).double(), rel=0.3)
    assert ratio[2] > 1000
    alike = by_direction(torch.stack([chosen, rejected], 1), chosen, rejected)
    assert alike is not None and alike.own == pytest.approx(alike.pairs)


def test_no_directions_of_few_or_equal_pairs() -> None:
    x = differing(40, 3, torch.ones(3), 0)
    own = torch.stack([x, -x], 1)
    assert by_direction(own[:19], x[:19], -x[:19]) is None
    assert by_direction(own, x, x) is None
    assert by_direction(own[:, :1], x, -x) is None


def surveyed(answers: int, seed: int, policy: bool = False, prompts: int = 40) -> Surveyed:
    """Responses of one to six tokens, with everything measured of them at random."""
    made = torch.Generator().manual_seed(seed)
    shape = (prompts, answers, 6)
    length = torch.randint(1, 7, shape[:2], generator=made)
    mask = torch.arange(6) < length[..., None]

    def draw(*more: int) -> Tensor:
        return torch.rand(*shape[:2], *more, generator=made)

    logp = -draw(6) * mask
    return Surveyed(
        row=torch.arange(prompts), tokens=mask.long(), mask=mask,
        finished=torch.ones(shape[:2], dtype=torch.bool), ref_logp=logp, entropy=0.5 * mask,
        variance=0.2 * mask, hidden=draw(8) * length[..., None], reward=-length.double(),
        logp=logp + 0.3 * mask if policy else None,
        step_kl=0.1 * draw(6) * mask if policy else None,
    )  # fmt: skip


ALL = {"map", "reach", "surprisal", "features", "coverage", "optimum"}


def test_charts_are_those_that_there_is_something_for() -> None:
    def names(measured: Measured) -> set[str]:
        return {c.name for c in charts(measured, figures(measured))}

    data, drawn = surveyed(2, 0, policy=True), surveyed(8, 1)
    assert names(Measured(data=data)) == {"surprisal"}
    assert names(Measured(data=data, drawn=drawn)) == ALL
    assert names(Measured(data=data, drawn=drawn, own=surveyed(8, 2, policy=True))) == ALL


def test_coverage_is_of_the_policy_where_there_is_one() -> None:
    data, drawn = surveyed(2, 0, policy=True), surveyed(8, 1)
    before = Measured(data=data, drawn=drawn)
    after = Measured(data=data, drawn=drawn, own=surveyed(8, 2, policy=True))
    for measured, whose in ((before, "optimum"), (after, "policy")):
        (chart,) = (c for c in charts(measured, figures(measured)) if c.name == "coverage")
        assert whose in chart.title
        for trace in chart.data:
            assert all(0 <= y <= 1 for y in trace["y"])
            assert trace["y"] == sorted(trace["y"], reverse=True), "falling"
    # each of its tokens is .3 nats likelier than under the reference
    first = chart.data[0]
    assert after.own is not None
    least = float((after.own.lengths() * 0.3 >= math.log(2)).double().mean())
    share = next(y for n, y in zip(first["x"], first["y"], strict=True) if n >= 2)
    assert share == pytest.approx(least, abs=1e-5)


def test_the_headline_stands_out_and_runners_up_belong_to_it(tmp_path: Path) -> None:
    data = Measured(data=surveyed(2, 0))
    health = {"rows": 40, "distinct_rows": 40, "distinct_prompts": 40, "findings": {}, "rules": {}}
    lines = ["advice: <x>", "  else y", "labels: z"]
    path = page.write_page(tmp_path / "p.html", data, figures(data), {}, health, lines)
    text = path.read_text()
    assert '<p class="headline">advice: &lt;x&gt;</p>' in text
    assert '<p class="under">else y</p><p class="more">labels: z</p>' in text
    assert page.NOTE in text and "<h1>Which method fits?</h1>" in text
    path = page.write_page(
        tmp_path / "p.html", data, figures(data), {}, health, lines, note="Up to <b>."
    )
    assert "Up to &lt;b&gt;. Brackets" in path.read_text() and page.NOTE not in path.read_text()
