"""Folders that are whole or not there."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from preftune import durable
from preftune.durable import Damaged

POINTS = ["begun", "filled", "listed", "flushed", "aside", "renamed"]


def fill(text: str):
    def write(folder: Path) -> None:
        (folder / "a.txt").write_text(text)
        (folder / "b.bin").write_bytes(bytes(range(256)))

    return write


def test_a_folder_holds_what_was_written_and_says_so(tmp_path: Path) -> None:
    durable.write_folder(tmp_path / "new" / "one", fill("x"))
    durable.verify(tmp_path / "new" / "one")
    assert (tmp_path / "new" / "one" / "a.txt").read_text() == "x"
    listed = json.loads((tmp_path / "new" / "one" / "manifest.json").read_text())["files"]
    # of the letter x, by the sha256sum command
    digest = "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"
    assert listed["a.txt"] == {"bytes": 1, "sha256": digest}
    assert listed.keys() == {"a.txt", "b.bin"}


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("point", POINTS)
def test_an_end_at_any_point_leaves_the_old_or_the_new(
    point: str, before: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exception stands for a power cut: nothing is tidied up."""

    class Cut(BaseException):
        pass

    target = tmp_path / "one"
    if before:
        durable.write_folder(target, fill("old"))

    def reach(name: str) -> None:
        if name == point:
            raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(durable, "reach", reach)
        patch.setattr(durable.shutil, "rmtree", lambda *_, **__: None)
        try:
            durable.write_folder(target, fill("new"))
        except Cut:
            assert point != "aside" or before
    if point == "aside" and before:  # the only moment without either: others stand beside it
        assert not target.exists()
    elif target.exists():
        durable.verify(target)
        new = point in ("renamed", "aside")
        assert (target / "a.txt").read_text() == ("new" if new else "old")
    else:
        assert not before and point != "renamed"
    durable.write_folder(target, fill("newer"))
    assert [p.name for p in tmp_path.iterdir()] == ["one"]
    assert (target / "a.txt").read_text() == "newer"


def test_an_error_while_writing_leaves_nothing(tmp_path: Path) -> None:
    def broken(folder: Path) -> None:
        fill("x")(folder)
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        durable.write_folder(tmp_path / "one", broken)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("durable") / "one"
    durable.write_folder(folder, fill("some text"))
    return folder


@pytest.fixture
def copy(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "copy"))


@pytest.mark.parametrize("name", ["a.txt", "b.bin", "manifest.json"])
def test_every_change_of_a_file_is_seen(name: str, copy: Path) -> None:
    path = copy / name
    data = path.read_bytes()
    changes = [data[:-1], data + b"\n", b"", data[:3] + bytes([data[3] ^ 1]) + data[4:]]
    for changed in changes:
        path.write_bytes(changed)
        if name == "manifest.json" and changed == data + b"\n":
            continue  # white space
        with pytest.raises(Damaged):
            durable.verify(copy)
    path.unlink()
    with pytest.raises(Damaged, match="missing|stand there"):
        durable.verify(copy)


def test_files_that_do_not_belong_there(copy: Path) -> None:
    (copy / "c.txt").write_text("more")
    with pytest.raises(Damaged, match=r"c\.txt"):
        durable.verify(copy)
    (copy / "c.txt").unlink()
    (copy / "a.txt").unlink()
    (copy / "a.txt").symlink_to("b.bin")
    with pytest.raises(Damaged):
        durable.verify(copy)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)
near = st.fixed_dictionaries(
    {
        "files": st.dictionaries(
            st.sampled_from(["a.txt", "b.bin", "../a.txt", "/etc/passwd", ""]) | st.text(),
            plain | st.fixed_dictionaries({"bytes": plain, "sha256": plain}),
        )
    }
)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    manifest=st.binary()
    | plain.map(json.dumps).map(str.encode)
    | near.map(json.dumps).map(str.encode)
)
def test_no_manifest_of_another_makes_a_folder_whole(manifest: bytes, written: Path) -> None:
    good = (written / "manifest.json").read_bytes()
    try:
        (written / "manifest.json").write_bytes(manifest)
        if manifest.strip() != good.strip():
            with pytest.raises(Damaged):
                durable.verify(written)
    finally:
        (written / "manifest.json").write_bytes(good)


@pytest.mark.parametrize("text", ["[" * 200_000, "9" * 2**20 + "9"])
def test_a_bomb_for_a_manifest(text: str, copy: Path) -> None:
    (copy / "manifest.json").write_text(text)
    with pytest.raises(Damaged):
        durable.verify(copy)


@pytest.mark.parametrize("size", ["Infinity", "-1", "null", "1e400", '"x"', "[]"])
def test_no_size(size: str, copy: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    text = json.dumps(manifest).replace(str(manifest["files"]["a.txt"]["bytes"]), size, 1)
    (copy / "manifest.json").write_text(text)
    with pytest.raises(Damaged):
        durable.verify(copy)


def test_a_sweep_brings_back_what_was_put_aside(tmp_path: Path, monkeypatch) -> None:
    """Killed between the old one's leaving and the new one's coming."""
    target = tmp_path / "checkpoints" / "step-1"
    durable.write_folder(target, lambda work: (work / "a").write_text("old"))

    def crash(point: str) -> None:
        if point == "aside":
            raise SystemExit

    monkeypatch.setattr(durable, "reach", crash)
    with pytest.raises(SystemExit):
        durable.write_folder(target, lambda work: (work / "a").write_text("new"))
    assert not target.exists()
    (tmp_path / ".tmp-x").write_text("unfinished")
    durable.sweep(tmp_path)
    durable.verify(target)
    assert (target / "a").read_text() == "old"
    assert not list(tmp_path.rglob(".tmp-*"))
