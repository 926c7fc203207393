"""`preftune label` as people use it: a real model, real requests, a real browser."""

import json
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from browser import CHROMIUM, browser
from preftune import cli, config
from preftune.labelling import drawing, server
from preftune.labelling.book import Book, Pair
from preftune.labelling.server import Server
from preftune.labelling.supply import Supply

ATTACK = "<img src=x onerror=document.title='pwned'><script>document.title='pwned'</script>"


def made(number: int) -> Pair | None:
    """A model that says markup, and now and then the same thing twice."""
    if number == 1:
        return None
    return Pair(
        id=number, row=number, prompt=[{"role": "user", "content": f"{number} {ATTACK}"}],
        responses=(f"good {number} {ATTACK}", f"bad {number}"), finished=(True, False),
        writers=("A", "B"),
    )  # fmt: skip


@pytest.fixture
def running(here: Path) -> Iterator[Server]:
    book = Book(here / "labels.jsonl")
    supply = Supply(book, made, count=5, overlap=0.5, seed=0)
    found = Server(supply, names=False)
    thread = threading.Thread(target=found.serve_forever, args=(0.02,))
    thread.start()
    yield found
    found.shutdown()
    found.server_close()
    thread.join()
    supply.close()
    book.close()


def ask(at: Server, path: str, annotator: str = "ann", **more: Any) -> dict[str, Any]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{at.server_port}{path}",
        data=json.dumps({"annotator": annotator, **more}).encode(), headers={"X-Key": at.key},
    )  # fmt: skip
    with urllib.request.urlopen(request, timeout=30) as reply:
        return json.loads(reply.read())


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_judgements_mean_what_stood_there(running: Server) -> None:
    state = ask(running, "/show")
    sides = set()
    while state["pair"]:
        left = state["pair"]["sides"][0]["text"].startswith("good")
        sides.add(left)
        shown = state["pair"]
        assert "writer" not in json.dumps(shown), "blind"
        choice = "left" if left else "right"
        state = ask(running, "/judge", pair=shown["id"], choice=choice, seconds=0.5)
    found = rows(running.supply.book.path)
    assert [r["pair"] for r in found] == [0, 2, 3, 4] and state["waiting"] is False
    assert all(r["chosen"].startswith("good") and r["rejected_finished"] is False for r in found)
    assert sides == {True, False}, "both sides"


def test_a_key_pressed_twice_is_one_judgement(running: Server) -> None:
    first = ask(running, "/show")["pair"]["id"]
    then = ask(running, "/judge", pair=first, choice="left", seconds=1)
    again = ask(running, "/judge", pair=first, choice="right", seconds=1)
    assert then["pair"] == again["pair"] and again["mine"] == 1
    back = ask(running, "/undo")
    assert back["pair"]["id"] == first and back["mine"] == 0
    assert rows(running.supply.book.path) == []


def test_two_annotators_share_some_pairs_only(running: Server) -> None:
    seen: dict[str, list[int]] = {"ann": [], "bob": []}
    for _ in range(5):
        for who, own in seen.items():
            shown = ask(running, "/show", who)["pair"]
            if shown:
                own.append(shown["id"])
                ask(running, "/judge", who, pair=shown["id"], choice="tie", seconds=1)
    both = set(seen["ann"]) & set(seen["bob"])
    assert both == {n for n in (0, 2, 3, 4) if running.supply._twice(n)} and 0 < len(both) < 4
    assert set(seen["ann"]) | set(seen["bob"]) == {0, 2, 3, 4}
    assert all(len(own) == len(set(own)) for own in seen.values())
    assert ask(running, "/show")["agreement"]["value"] == 1


@pytest.mark.parametrize(("path", "headers", "body", "status"), [
    ("/show", {"X-Key": "wrong"}, b"{}", 403),
    ("/show", {}, b"{}", 403),
    ("/show", {"Host": "evil.test:80"}, b"{}", 403),
    ("/show", {}, None, 404),
    ("/?key=wrong", {}, None, 403),
    ("/elsewhere", {"X-Key": "KEY"}, b'{"annotator": "a"}', 404),
    ("/show", {"X-Key": "KEY"}, b'{"annotator": " "}', 400),
    ("/show", {"X-Key": "KEY"}, b"[]", 400),
    ("/show", {"X-Key": "KEY"}, b"{", 400),
    ("/show", {"X-Key": "KEY"}, b" " * 20000, 413),
    ("/judge", {"X-Key": "KEY"}, b'{"annotator": "a", "pair": 0, "choice": "up"}', 400),
    ("/judge", {"X-Key": "KEY"},
     b'{"annotator": "a", "pair": 0, "choice": "left", "seconds": NaN}', 400),
])  # fmt: skip
def test_who_may_not_ask(path, headers, body, status, running: Server) -> None:
    given = {k: v.replace("KEY", running.key) for k, v in headers.items()}
    where = f"http://127.0.0.1:{running.server_port}{path}"
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(urllib.request.Request(where, data=body, headers=given), timeout=30)
    assert refused.value.code == status
    assert rows(running.supply.book.path) == []


def test_it_listens_on_this_machine_alone(running: Server) -> None:
    assert running.server_address[0] == "127.0.0.1"


def test_drawing_that_fails_is_told(here: Path) -> None:
    def broken(number: int) -> Pair | None:
        raise RuntimeError("no memory")

    book = Book(here / "labels.jsonl")
    supply = Supply(book, broken, count=5, overlap=0.0, seed=0)
    found = Server(supply, names=False)
    with pytest.raises(server.Refused, match="no memory"):
        found.state("ann", 10.0)
    assert isinstance(found.failed, RuntimeError)
    found.server_close()
    supply.close()


def test_pairs_of_a_model(tiny_model: str, pairs_file: str, here: Path) -> None:
    settings = config.load({"model": tiny_model, "prompts": pairs_file, "max_new_tokens": 6})
    one = drawing.writers(settings, [tiny_model])
    found = [p for i in range(13) if (p := drawing.draw(one, 0, i)) is not None]
    assert [p.row for p in found[:3]] == [p.row for i in range(3) if (p := drawing.draw(one, 0, i))]
    assert len({p.row for p in found}) == 12, "every prompt once, in an order by chance"
    assert found[0].row != 0 or found[1].row != 1
    assert all(a != b for a, b in (p.responses for p in found))
    assert drawing.draw(one, 0, 2) == found[2] and drawing.draw(one, 1, 2) != found[2]


def test_the_command(tiny_model: str, pairs_file: str, here: Path, capsys) -> None:
    """From flags to a summary; then on with the same file; and training reads it."""
    told: list[int] = []

    def person(count: int) -> None:
        address = wait_for_address(capsys_text)
        port, key = re.search(r":(\d+)/\?key=(\S+)", address).groups()  # type: ignore[union-attr]
        at = type("At", (), {"server_port": int(port), "key": key})()
        for _ in range(count):
            state = ask(at, "/show")
            while state["pair"] is None:
                state = ask(at, "/show")
            told.append(state["pair"]["id"])
            ask(at, "/judge", pair=state["pair"]["id"], choice="left", seconds=1)
        ask(at, "/finish")

    text: list[str] = []

    def capsys_text() -> str:
        text.append(capsys.readouterr().err)
        return "".join(text)

    args = ["label", "--model", tiny_model, "--prompts", pairs_file, "--max-new-tokens", "6",
            "--output", "labels.jsonl", "--json"]  # fmt: skip
    for count in (4, 3):
        text.clear()
        thread = threading.Thread(target=person, args=(count,))
        thread.start()
        assert cli.run(args) == 0
        thread.join()
    assert len(told) == len(set(told)) == 7, "a second session goes on with other pairs"
    assert len(rows(here / "labels.jsonl")) == 7
    trained = ["train", "--method", "dpo", "--model", tiny_model, "--data", "labels.jsonl",
               "--max-steps", "1", "--batch-size", "4", "--output", "run"]  # fmt: skip
    assert cli.run(trained) == 0


def wait_for_address(read: Any) -> str:
    for _ in range(600):
        found = re.search(r"label here: (\S+)", read())
        if found:
            return found.group(1)
        time.sleep(0.05)
    raise AssertionError("no address was told")


@pytest.mark.parametrize(("flags", "words"), [
    (["--blind"], "--models"), (["--models", "a"], "two different"),
    (["--models", "a,a"], "two different"), (["--models", "a,b", "--model", "c"], "no --model"),
    (["--overlap", "2"], "0 to 1"), (["--pairs", "0"], "1 or more"), (["--port", "-1"], "65535"),
])  # fmt: skip
def test_label_mistakes(flags: list[str], words: str, refused) -> None:
    assert words in refused("label", "--prompts", "p.jsonl", *flags)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_keys_in_a_browser(running: Server, tmp_path: Path) -> None:
    with browser(tmp_path) as page:
        page.ask("Page.navigate", url=running.address)
        page.until("document.getElementById('pair') && !document.getElementById('pair').hidden")
        text = "document.getElementById('left').querySelector('.text').textContent"
        prompt = "document.getElementById('prompt').textContent"
        assert ATTACK in page.value(prompt), "shown as text"
        left = page.value(text)
        page.press("ArrowLeft")
        page.until(f"{prompt}.includes('2 <img')")
        page.press("u")
        page.until(f"{prompt}.includes('0 <img')")
        assert page.value(text) == left and rows(running.supply.book.path) == []
        for key, number in (("1", 2), ("ArrowRight", 3), ("ArrowDown", 4)):
            page.press(key)
            page.until(f"{prompt}.includes('{number} <img')")
        page.press("s")
        page.until("document.getElementById('message').textContent.includes('last pair')")
        assert page.value("document.title") == "preftune label" and page.errors == []
    _, judged = running.supply.book.snapshot()
    first = running.supply.book.pairs[0]
    assert [s.choice for s in judged][2:] == ["tie", "skip"]
    assert first.responses[0 if judged[0].choice == "first" else 1] == left
    assert (judged[1].choice == "second") == (judged[1].left == 0), "the right one"
