"""Checkpoints of a table: which is taken, which are kept, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from preftune import checkpoint, loop
from preftune.alarms import after_evaluation, after_update
from preftune.durable import verify
from preftune.errors import GuardStop, UserError
from tables import begin, make_world, row_of

pytestmark = pytest.mark.long


def started(name: str = "ppo", **more) -> tuple[loop.State, loop.Settings]:
    return begin(row_of(name), make_world(name), **more)


def advance(state: loop.State, settings: loop.Settings, folder: Path, steps: int) -> None:
    for _ in range(steps):
        loop.update(state, settings)
        checkpoint.save(state, folder)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_the_last_two_and_the_best_are_kept(tmp_path: Path) -> None:
    state, settings = started()
    advance(state, settings, tmp_path, 2)
    state.best = (2, 1.0)
    advance(state, settings, tmp_path, 3)
    assert names(tmp_path) == ["step-000002", "step-000004", "step-000005"]
    for path in tmp_path.iterdir():
        verify(path)


def test_the_newest_whole_one_is_taken(tmp_path: Path) -> None:
    state, settings = started()
    advance(state, settings, tmp_path, 3)
    assert checkpoint.newest(tmp_path) == (tmp_path / "step-000003", [])
    weights = tmp_path / "step-000003" / "state.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    (tmp_path / ".tmp-step-000004").mkdir()
    found, notes = checkpoint.newest(tmp_path)
    assert found == tmp_path / "step-000002"
    assert len(notes) == 1 and "step-000003" in notes[0] and "state.safetensors" in notes[0]
    with pytest.raises(UserError, match="cannot be used"):
        checkpoint.load(state, tmp_path / "step-000003")
    (tmp_path / "step-000002" / "manifest.json").unlink()
    assert checkpoint.newest(tmp_path)[0] is None
    assert checkpoint.newest(tmp_path / "none") == (None, [])


def test_everything_comes_back(tmp_path: Path) -> None:
    state, settings = started()
    state.skipped, state.identity = 3, {"reference": "abc"}
    seen = {"loss": 0.1, "kl": 60.0, "entropy": 1.25}
    state.watch, _ = after_evaluation(after_update(state.watch, 1, seen)[0], 1, {"eval_kl": 0.1})
    advance(state, settings, tmp_path, 3)
    state.world = replace(state.world, micro_batch_tokens=4)
    path = checkpoint.save(state, tmp_path)
    other, _ = started()
    checkpoint.load(other, path)
    assert (other.step, other.version, other.skipped) == (3, 3, 3)
    assert other.watch == state.watch and other.watch.said == ("kl",)
    assert other.watch.sums == {"kl": 60.0, "entropy": 1.25} and other.watch.evaluations.count == 1
    assert other.world.micro_batch_tokens == 4
    for _ in range(3):
        loop.update(state, settings)
        loop.update(other, settings)
    for a, b in zip(state.world.policy.parameters(), other.world.policy.parameters(), strict=True):
        assert torch.equal(a, b)


def test_another_reference_is_refused(tmp_path: Path) -> None:
    state, settings = started()
    state.identity = {"reference": "abc"}
    advance(state, settings, tmp_path, 1)
    other, _ = started()
    other.identity = {"reference": "abd"}
    with pytest.raises(UserError, match="weights of the reference"):
        checkpoint.load(other, tmp_path / "step-000001")
    assert other.step == 0


def test_another_shape_is_refused_before_anything_is_changed(tmp_path: Path) -> None:
    state, settings = started("dpo")
    advance(state, settings, tmp_path, 1)
    other, _ = begin(row_of("dpo"), make_world("dpo", shape=(6, 4)))
    before = other.world.policy.logits.detach().clone()
    with pytest.raises(UserError, match=r"policy/.*\(6, 5\).*\(6, 4\)"):
        checkpoint.load(other, tmp_path / "step-000001")
    assert torch.equal(before, other.world.policy.logits) and other.step == 0


def test_weights_that_are_not_numbers_are_not_saved(tmp_path: Path) -> None:
    state, settings = started("dpo")
    advance(state, settings, tmp_path, 1)
    with torch.no_grad():
        state.world.policy.logits[0, 0] = float("inf")
    with pytest.raises(GuardStop, match="policy/logits"):
        checkpoint.save(state, tmp_path)
    assert names(tmp_path) == ["step-000001"]


def test_a_manifest_is_no_licence(tmp_path: Path) -> None:
    """A folder whose hashes are right, with content that is not ours."""
    import hashlib

    state, settings = started("dpo")
    advance(state, settings, tmp_path, 1)
    folder = tmp_path / "step-000001"
    for text in ("{}", "[]", "null", '{"step": "one"}', "[" * 100_000):
        plain = folder / "state.json"
        plain.write_text(text)
        manifest = json.loads((folder / "manifest.json").read_text())
        digest = hashlib.sha256(text.encode()).hexdigest()
        manifest["files"]["state.json"] = {"bytes": len(text), "sha256": digest}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        verify(folder)
        with pytest.raises(UserError, match="cannot be used"):
            checkpoint.load(started("dpo")[0], folder)
