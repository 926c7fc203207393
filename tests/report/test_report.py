"""The report: what it shows of run folders written by hand, and that a browser draws it offline."""

import html
import json
import math
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from preftune.errors import UserError
from preftune.report import write_report
from preftune.report.figures import charts
from preftune.report.frame import embed_json
from preftune.report.read import best_of_n, read_runs
from preftune.report.tables import decimals_for, number

ATTACK = "</script><script>window.pwned = 1; document.title = 'pwned'</script><img src=x onerror=1>"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PROMPTS = [
    "Name a fruit that floats in water.",
    "Why is the sky blue? One sentence.",
    "Give a polite way to leave a party early.",
]
ANSWERS = {
    "reference": "There are many fruits that float in water, and the answer depends on how ripe "
    "they are. Apples, for example, are about a quarter air, and so are many other",
    "pref_ft": "An apple floats, because about a quarter of its volume is air between the cells.",
    "dpo": "Apple.",
    "hypo": "An apple floats in water.",
}


def estimate(value: float | None, half: float = 0.0) -> dict[str, float | None]:
    if value is None or not half:
        return {"value": value, "low": None, "high": None}
    return {"value": value, "low": value - half, "high": value + half}


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_samples(folder: Path, name: str, step: int, response: str | None = None) -> None:
    rows = [
        {
            "step": at,
            "set": "eval",
            "row": number,
            "prompt": prompt if number else [{"role": "user", "content": prompt}],
            "response": (response or ANSWERS.get(name, "Yes.")) if at == step else "too early",
            "reward": -3.25,
            "tokens": 48 if name == "reference" else 9,
            "finished": name != "reference",
        }
        for at in sorted({0, step})
        for number, prompt in enumerate(PROMPTS)
    ]
    rows.append(rows[-1] | {"set": "train", "prompt": "a prompt of the training set"})
    write_lines(folder / "samples.jsonl", rows)


def reference(root: Path) -> Path:
    folder = root / "reference"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("method: reference\nmodel: smollm2-135m\n")
    found = {
        "reward": estimate(-20.5, 1.5),
        "length": estimate(38.2, 1),
        "no_end": estimate(0.63, 0.08),
    }
    (folder / "evaluation.json").write_text(json.dumps(found))
    write_samples(folder, "reference", 0)
    return folder


def trained(root: Path, name: str, *, folder: str = "", strength: float = 1.0) -> Path:
    path = root / (folder or name)
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(
        f"method: {name}\nmodel: smollm2-135m\ndata: builtin\nreward: length:within=20\n"
        "label_source: 'true'\nseed: 0\nlearning_rate: 2.0e-05\n"
        f"beta: {0.1 * strength}\nterms:\n- {{objective: {name}, weight: 1}}\n"
    )
    rows: list[dict[str, Any]] = []
    for step in range(31):
        done = strength / (1 + math.exp(6 - step / 2.5))
        row: dict[str, Any] = {"step": step}
        if step:
            row |= {
                "loss": 0.69 - 0.6 * done + 0.04 * math.sin(2.7 * step),
                "seconds": 2.1,
                "log_ratio_chosen": -12 * done,
                "log_ratio_rejected": -40 * done,
            }
        if step % 5 == 0:
            reward, kl = -20.5 + 18 * done, 16 * done * done
            row |= {"eval_reward": reward, "eval_reward_low": reward - 1.4}
            row |= {"eval_reward_high": reward + 1.4, "eval_kl": kl}
            row |= {"eval_kl_low": 0.9 * kl, "eval_kl_high": 1.1 * kl}
        rows.append(row)
    write_lines(path / "metrics.jsonl", rows)
    found = {
        "reward": estimate(-20.5 + 18 * strength, 1.4),
        "kl": estimate(16.04 * strength * strength, 1.6),
        "win_rate": estimate(0.97, 0.02),
        "length": estimate(12.3, 0.8),
        "no_end": estimate(0.0),
        "seconds": estimate(119.4),
    }
    (path / "evaluation.json").write_text(json.dumps(found))
    write_samples(path, name, 30)
    return path


def quickstart(root: Path) -> list[Path]:
    strengths = {"pref_ft": 0.25, "dpo": 1.0, "hypo": 0.75}
    runs = [trained(root, name, strength=strength) for name, strength in strengths.items()]
    return [*runs, reference(root)]


def page_of(folders: list[Path], tmp_path: Path, **more: str) -> str:
    output = write_report(folders, tmp_path / "out" / "report.html", **more)
    return output.read_text(encoding="utf-8")


def own_part(page: str) -> str:
    """The page without plotly's own script (4.8 MB)."""
    scripts = re.findall(r"<script>.*?</script>", page, re.DOTALL)
    return page.replace(max(scripts, key=len, default=""), "")


def table(page: str) -> dict[str, str]:
    """The methods' table: a run's label to the text of its row."""
    inside = re.search(r'id="methods">.*?</table>', page, re.DOTALL)
    assert inside
    rows = re.findall(r"<tr><th scope=row>(.*?)</th>(.*?)</tr>", inside[0])
    return {plain(label): plain(cells.replace("</td>", " | ")) for label, cells in rows}


def plain(markup: str) -> str:
    return html.unescape(re.sub(r"<[^>]*>", "", markup)).strip()


def embedded(page: str) -> dict[str, Any]:
    inside = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page)
    assert inside
    return json.loads(inside[1])


class Tags(HTMLParser):
    """Counts elements, as an HTML parser sees them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.count: dict[str, int] = {}
        self.links: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        self.links += [f"{tag} {name}" for name, _ in attrs if name in ("src", "href", "srcset")]


def test_table_of_methods_starts_with_the_reference_and_shows_intervals(tmp_path: Path) -> None:
    rows = table(page_of(quickstart(tmp_path), tmp_path))
    assert list(rows) == ["reference", "pref_ft", "dpo", "hypo"]
    assert rows["dpo"].split(" | ") == [
        "−2.50 [−3.90, −1.10]",
        "16.04 [14.44, 17.64]",
        "97 % [95, 99]",
        "12.3 [11.5, 13.1]",
        "0 %",
        "119 |",
    ]
    assert rows["reference"].startswith("−20.50 [−22.00, −19.00] | – | – | 38.2")


def test_header_note_and_settings(tmp_path: Path) -> None:
    page = own_part(
        page_of(
            quickstart(tmp_path), tmp_path, title="Quickstart", note="First.\n\nNot <b>better</b>."
        )
    )
    assert "<title>Quickstart</title>" in page and "<h1>Quickstart</h1>" in page
    assert "<p>First.</p><p>Not &lt;b&gt;better&lt;/b&gt;.</p>" in page
    for shown in (
        "smollm2-135m",
        "builtin",
        "length:within=20",
        "true (the reward is the task itself)",
    ):
        assert f"<dd>{shown}</dd>" in page
    settings = page[page.index('<section id="settings">') :]
    places = [
        settings.index(f"<th scope=row>{key}<")
        for key in ("beta", "terms.0.objective", "model", "seed")
    ]
    assert places == sorted(places), "what differs comes first"
    assert "<td colspan=4>smollm2-135m</td>" in settings


def test_charts_are_valid_plotly_and_hold_the_data(tmp_path: Path) -> None:
    import plotly.graph_objects as go

    folders = quickstart(tmp_path)
    found = embedded(page_of(folders, tmp_path))
    assert list(found) == [
        "eval-reward", "eval-kl", "log-ratio-chosen", "log-ratio-rejected", "loss", "frontier"
    ]  # fmt: skip
    for data, layout in found.values():
        go.Figure(data=data, layout=layout)  # raises at a key or value that plotly does not know
        axes = [axis for name, axis in layout.items() if re.match(r"[xy]axis", name)]
        assert axes and all(axis["title"]["text"] for axis in axes)
    data, layout = found["log-ratio-rejected"]
    assert [trace["name"] for trace in data] == ["pref_ft", "dpo", "hypo"]
    assert len(data[1]["y"]) == 30 and data[1]["y"][-1] == pytest.approx(-40 / (1 + math.exp(-6)))
    assert layout["yaxis"]["range"] == found["log-ratio-chosen"][1]["yaxis"]["range"]
    final = {trace["name"]: trace for trace in found["frontier"][0] if "error_x" in trace}
    assert final["dpo"]["x"] == [pytest.approx(16.04)] and final["reference"]["x"] == [0.0]
    assert final["dpo"]["error_y"]["array"] == [pytest.approx(1.4)]
    colours = {
        (trace["name"], trace["line"]["color"])
        for data, _ in found.values() for trace in data if "line" in trace
    }  # fmt: skip
    assert len(colours) == 4, "one colour a run in all charts"


def with_figures(folder: Path, **figures: dict[str, float | None]) -> Path:
    found = json.loads((folder / "evaluation.json").read_text())
    (folder / "evaluation.json").write_text(json.dumps(found | figures))
    return folder


def curve(ending: str = "", top: float = -12.0, most: int = 16) -> dict[str, Any]:
    """best_of_1 at -20, up to `top` at the largest n."""
    sizes = [2**i for i in range(most.bit_length())]
    return {
        f"best_of_{n}{ending}": estimate(-20.0 + (top + 20) * i / (len(sizes) - 1), 0.5)
        for i, n in enumerate(sizes)
    }


def heads(page: str) -> list[str]:
    inside = re.search(r'id="methods">.*?</thead>', page, re.DOTALL)
    assert inside
    return [plain(head) for head in re.findall(r"<th scope=col>(.*?)</th>", inside[0])]


def test_a_ranking_by_the_training_reward_is_headed_proxy(tmp_path: Path) -> None:
    page = page_of(quickstart(tmp_path), tmp_path)
    assert heads(page)[1] == "Reward (proxy)tokens"
    found = embedded(page)
    assert "Reward (proxy) against KL" in page and "Held-out reward (proxy)" in page
    assert found["frontier"][1]["yaxis"]["title"]["text"] == "Proxy reward (tokens)"
    assert found["eval-reward"][1]["yaxis"]["title"]["text"] == "Proxy reward (tokens)"
    assert "eval-gold" not in found


def test_a_gold_reward_comes_first_and_ranks(tmp_path: Path) -> None:
    gold = "reward:tests.py:gold"
    folders = quickstart(tmp_path)
    for at, folder in enumerate(folders):
        with_figures(folder, **{gold: estimate(0.25 * at, 0.05)})
        rows = [{"step": s, "eval_kl": 1.0 * s, f"eval_{gold}": 0.1 * s} for s in range(3)]
        if folder.name != "reference":
            write_lines(folder / "metrics.jsonl", rows)
    page = page_of(folders, tmp_path)
    assert heads(page)[1:3] == ["Gold rewardtests.py:gold", "Reward (proxy)tokens"]
    assert table(page)["dpo"].startswith("0.250 [0.200, 0.300] | −2.50")
    assert "Gold reward against KL" in page and "Reward (proxy) against KL" not in page
    found = embedded(page)
    assert next(iter(found)) == "eval-gold" and found["eval-gold"][0][0]["y"] == [0, 0.1, 0.2]
    data, layout = found["frontier"]
    assert layout["yaxis"]["title"]["text"] == "Gold reward (the reward&#x27;s own unit)"
    final = {trace["name"]: trace["y"] for trace in data if "error_x" in trace}
    assert final["dpo"] == [0.25] and final["hypo"] == [0.5]


def test_best_of_n_is_on_the_plot_of_reward_and_kl(tmp_path: Path) -> None:
    import plotly.graph_objects as go

    folders = quickstart(tmp_path)
    with_figures(folders[0], **curve(most=4), best_of_n_share=estimate(1.5, 0.25))
    with_figures(folders[1], **curve(), best_of_n_share=estimate(0.5, 0.25))
    page = page_of(folders, tmp_path)
    data, layout = embedded(page)["frontier"]
    go.Figure(data=data, layout=layout)
    (best,) = [trace for trace in data if trace["name"] == "best-of-n"]
    assert best["customdata"] == [1, 2, 4, 8, 16], "the longest of those measured, drawn once"
    bound = [math.log(n) - (n - 1) / n for n in best["customdata"]]
    assert best["x"] == pytest.approx(bound) and best["y"][-1] == -12
    assert best["error_y"]["array"] == pytest.approx([0.5] * 5) and best["meta"] == -1
    assert best["text"] == ["", "", "", "", "best of 16"]
    assert "best of n answers of the untrained" in page
    place = heads(page).index("Share of best-of-nof its gain at equal KL")
    assert table(page)["pref_ft"].split(" | ")[place - 1] == "150 % † [125, 175]"
    assert table(page)["dpo"].split(" | ")[place - 1] == "50 % † [25, 75]", "16 nats are beyond 16"
    assert "compared with the gain of that n" in page


def test_best_of_n_by_gold_is_shown_with_gold(tmp_path: Path) -> None:
    folder = trained(tmp_path, "dpo", strength=0.25)  # 1.0 nat, within best-of-16
    figures = curve() | curve(":g", top=-18.0) | {"reward:g": estimate(-19.0)}
    figures["best_of_n_share"], figures["best_of_n_share:g"] = estimate(0.5), estimate(-0.25)
    page = page_of([with_figures(folder, **figures)], tmp_path)
    (run,) = read_runs([folder])
    assert best_of_n(run)[16].value == -12.0 and best_of_n(run, "reward:g")[16].value == -18.0
    (best,) = [t for t in embedded(page)["frontier"][0] if t["name"] == "best-of-n"]
    assert best["y"][-1] == -18.0
    assert "−25 % |" in table(page)["dpo"] and "†" not in page


def test_all_figures_stand_in_one_table(tmp_path: Path) -> None:
    folders = quickstart(tmp_path)
    with_figures(folders[2], implicit_accuracy=estimate(0.75, 0.125))
    page = own_part(page_of(folders, tmp_path))
    inside = page[page.index("<details id=all-figures>") : page.index("</details>")]
    row = re.search(r"<tr><th scope=row>implicit_accuracy</th>(.*?)</tr>", inside)
    assert row
    cells = plain(row[1].replace("</td>", " | ")).split(" | ")
    assert cells[:4] == ["–", "–", "–", "0.750 [0.625, 0.875] |"], "the reference, then the rest"


def test_answers_stand_side_by_side_with_the_cut_mark(tmp_path: Path) -> None:
    page = own_part(page_of(quickstart(tmp_path), tmp_path))
    articles = re.findall(r"<article>.*?</article>", page, re.DOTALL)
    assert len(articles) == len(PROMPTS)
    assert all(article.count("<div class=answer>") == 4 for article in articles)
    assert "<span class=role>user</span>Name a fruit" in articles[0]
    assert articles[0].count(">cut</mark>") == 1 and "48 tokens" in articles[0]
    assert "<p>Apple.</p>" in articles[0] and "reward −3.25" in articles[0]
    assert "too early" not in page and "a prompt of the training set" not in page


def test_at_most_twelve_prompts_and_those_that_all_answered_first(tmp_path: Path) -> None:
    folders = [trained(tmp_path, "dpo"), trained(tmp_path, "hypo")]
    rows = [
        {"step": 1, "set": "eval", "prompt": f"only dpo {at}", "response": "x"} for at in range(20)
    ]
    shared = {"step": 1, "set": "eval", "prompt": "both", "response": ""}
    write_lines(folders[0] / "samples.jsonl", [*rows, shared])
    write_lines(folders[1] / "samples.jsonl", [shared])
    page = own_part(page_of(folders, tmp_path))
    articles = re.findall(r"<article>.*?</article>", page, re.DOTALL)
    assert len(articles) == 12
    assert "<p>both</p>" in articles[0] and articles[0].count("(empty answer)") == 2


def test_everything_from_data_is_escaped(tmp_path: Path) -> None:
    """The elements of a page about hostile text are those of the same page about harmless text."""
    counts = []
    for name, attack in (("harmless", "harmless"), ("hostile", ATTACK)):
        folder = trained(tmp_path / name, "dpo")
        config = {
            "method": {"name": f"m {attack}"},
            "model": attack,
            "seed": attack,
            attack: attack,
        }
        config |= {"label_source": attack, "reward": attack}
        (folder / "config.yaml").write_text(json.dumps(config))
        found = json.loads((folder / "evaluation.json").read_text())
        (folder / "evaluation.json").write_text(
            json.dumps(found | {f"reward:{attack}": estimate(1.0, 0.5)})
        )
        prompt = [{"role": attack, "content": attack}]
        row = {"step": 1, "set": "eval", "prompt": prompt, "response": attack, "reward": 1.0}
        write_lines(folder / "samples.jsonl", [row, row | {"prompt": attack}])
        page = page_of([folder], tmp_path / name, title=attack, note=attack)
        if name == "hostile":
            assert ATTACK not in page
            assert f"<p>{html.escape(ATTACK)}</p></div>" in page
        tags = Tags(own_part(page))
        assert not tags.links, "nothing is loaded from anywhere"
        counts.append(tags.count)
    assert counts[0] == counts[1]


def test_embedded_json_cannot_end_its_script_element() -> None:
    hostile = {"name": "</SCRIPT><!--<script>&\u2028"}
    encoded = embed_json(hostile)
    assert not re.search("[<>&\u2028]", encoded) and json.loads(encoded) == hostile


def test_not_finite_numbers_are_dashes_and_gaps(tmp_path: Path) -> None:
    folder = trained(tmp_path, "dpo")
    (folder / "evaluation.json").write_text(
        '{"reward": {"value": NaN, "low": NaN, "high": 1}, "kl": {"value": Infinity, "low": 1},'
        ' "win_rate": {"value": 0.5, "low": NaN, "high": 0.6}, "length": null}'
    )
    rows = [{"step": at, "loss": loss} for at, loss in enumerate([0.7, math.nan, None, 0.5])]
    rows[1] |= {"eval_reward": math.inf, "eval_kl": 0.1}
    rows[3] |= {"eval_reward": 1.0, "eval_kl": math.nan}
    write_lines(folder / "metrics.jsonl", rows)
    page = page_of([folder], tmp_path)
    assert table(page)["dpo"] == "– | – | 50 % | – | – | – |"
    body = own_part(page).split("<body>")[1].split("<script")[0]
    assert not re.search(r"\b(nan|inf|infinity|null|none)\b", body, re.I)
    found = embedded(page)
    assert found["loss"][0][0]["y"] == [0.7, None, None, 0.5]
    assert "frontier" not in found, "no evaluation has both numbers"


def test_numbers() -> None:
    assert [number(-0.001), number(-1234.5, 0), number(None)] == ["0.00", "−1,234", "–"]
    assert [decimals_for([x]) for x in (0.0, 0.00123, 0.5, 16.0, 160.0, 1600.0)] == [
        2,
        5,
        3,
        2,
        1,
        0,
    ]


def test_single_run_and_missing_files(tmp_path: Path) -> None:
    folder = trained(tmp_path, "dpo")
    page = page_of([folder], tmp_path)
    assert list(table(page)) == ["dpo"] and len(embedded(page)) == 6
    (folder / "evaluation.json").unlink()
    assert table(page_of([folder], tmp_path))["dpo"].startswith("−2.54 [−3.94, −1.14] | 15.92")
    (folder / "samples.jsonl").unlink()
    assert "<article>" not in page_of([folder], tmp_path)
    (folder / "metrics.jsonl").unlink()
    bare = page_of([folder], tmp_path)
    assert table(bare)["dpo"] == "– | – | – | – | – | – |"
    assert 'id="charts"' not in bare and len(bare) < 50_000


def test_equal_method_names_are_told_apart_by_folder(tmp_path: Path) -> None:
    a, b = trained(tmp_path, "dpo", folder="seed-0"), trained(tmp_path, "dpo", folder="seed-1")
    c = trained(tmp_path, "hypo")
    assert [run.label for run in read_runs([a, c, b, a])] == [
        "dpo (seed-0)",
        "hypo",
        "dpo (seed-1)",
    ]
    d, e = trained(tmp_path / "x", "ipo"), trained(tmp_path / "y", "ipo")
    assert [run.label for run in read_runs([d, e])] == ["ipo (x/ipo)", "ipo (y/ipo)"]
    assert 'data-run=1><i class="swatch"' in page_of([a, b], tmp_path)


def test_many_runs_and_many_points(tmp_path: Path) -> None:
    runs = [trained(tmp_path, f"m{at}") for at in range(8)]
    write_lines(runs[0] / "metrics.jsonl", [{"step": at, "loss": 1.0} for at in range(2500)])
    loss = next(chart for chart in charts(read_runs(runs)) if chart.name == "loss")
    assert len({(trace["line"]["color"], trace["line"]["dash"]) for trace in loss.data}) == 8
    steps = loss.data[0]["x"]
    assert len(steps) <= 1001 and (steps[0], steps[-1]) == (0, 2499)


@pytest.mark.parametrize("tail", [b'{"step": 31, "lo', '{"response": "caf\u00e9'.encode()[:-1]])
def test_half_written_last_line_is_left_out(tmp_path: Path, tail: bytes) -> None:
    folder = trained(tmp_path, "dpo")
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(tail)
    assert len(read_runs([folder])[0].metrics) == 31


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("metrics.jsonl", '{"step": 1}\n{oops\n{"step": 3}\n', "line 2"),
        ("samples.jsonl", "[1, 2]\n", "line 1 is not a JSON object"),
        ("evaluation.json", "{", "cannot be read"),
        ("config.yaml", "a: [", "cannot be read"),
        ("config.yaml", "a: !!python/object/apply:os.system ['true']", "cannot be read"),
        ("config.yaml", "just text", "no settings"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, content: str, says: str) -> None:
    folder = trained(tmp_path, "dpo")
    (folder / name).write_text(content)
    output = tmp_path / "report.html"
    output.write_text("the page before")
    with pytest.raises(UserError, match=says) as error:
        write_report([folder], output)
    assert str(folder / name) in str(error.value)
    assert output.read_text() == "the page before", "nothing half-written"


def test_folders_that_are_no_runs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.yaml.*preftune train"):
        write_report([tmp_path], tmp_path / "report.html")
    with pytest.raises(UserError, match="at least one"):
        write_report([], tmp_path / "report.html")
    with pytest.raises(UserError, match="is a folder"):
        write_report([trained(tmp_path, "dpo")], tmp_path)
    assert not list(tmp_path.glob("*.html"))


def test_a_failed_write_leaves_the_old_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, output = trained(tmp_path, "dpo"), tmp_path / "report.html"
    output.write_text("the page before")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report([folder], output)
    assert output.read_text() == "the page before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dpo", "report.html"]


def browse(page: Path, scratch: Path) -> tuple[str, str, list[str]]:
    """The page's DOM after its scripts ran, the browser's log and the addresses it requested."""
    assert CHROMIUM
    netlog = scratch / "net.json"
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
            "--no-first-run", "--disable-background-networking", "--disable-component-update",
            "--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND", "--disable-dev-shm-usage",
            f"--user-data-dir={scratch / 'profile'}", "--enable-logging=stderr", "--v=0",
            f"--log-net-log={netlog}", "--window-size=1280,2400", "--virtual-time-budget=15000",
            "--dump-dom", page.as_uri(),
        ],
        capture_output=True, timeout=120, check=True, env=os.environ | {"HOME": str(scratch)},
    )  # fmt: skip
    return done.stdout.decode(), done.stderr.decode(), requests_of_page(netlog)


def requests_of_page(netlog: Path) -> list[str]:
    """Addresses in the browser's network log that the page asked for.

    The browser itself also calls home (time, updates); it marks those as "not an origin".
    """
    log = json.loads(netlog.read_text(encoding="utf-8"))
    types = log["constants"]["logEventTypes"]
    started = [
        event["params"]
        for event in log["events"]
        if event["type"] == types["URL_REQUEST_START_JOB"] and "url" in event.get("params", {})
    ]
    assert all("initiator" in request for request in started)
    return [request["url"] for request in started if request["initiator"] != "not an origin"]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_a_browser_draws_the_page_without_errors_or_network(tmp_path: Path) -> None:
    folders = quickstart(tmp_path)
    write_samples(folders[1], "dpo", 30, ATTACK)
    folders.append(trained(tmp_path, "hostile"))
    (folders[-1] / "config.yaml").write_text(json.dumps({"method": {"name": ATTACK}}))
    page = write_report(folders, tmp_path / "report.html", title="Opened in a browser")

    dom, log, addresses = browse(page, tmp_path)

    assert 'data-charts="6"' in dom, log
    assert "<title>Opened in a browser</title>" in dom and "<img" not in dom
    paths = re.findall(r'<path class="js-line"[^>]* d="(M[^"]+)"', dom)
    # Lines: 5 of reward (the reference's too), 4 each of KL, two log-ratios, loss and frontier.
    assert len(paths) >= 25 and all(len(path) > 10 for path in paths)
    assert dom.count('class="main-svg"') >= 6
    assert "CONSOLE" not in log
    assert [address for address in addresses if not address.startswith(("file:", "data:"))] == []


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_the_browser_check_sees_errors_and_requests(tmp_path: Path) -> None:
    """The check above would notice a console error and a request to a server."""
    page = tmp_path / "page.html"
    page.write_text("<img src='http://elsewhere.test/x.png'><script>undefinedFunction()</script>")
    _, log, addresses = browse(page, tmp_path)
    assert "CONSOLE" in log and addresses == ["http://elsewhere.test/x.png"]
