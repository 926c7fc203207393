"""The way in which samples share their prompt, against a forward pass of each row by itself."""

import copy
import logging
from typing import Any

import pytest
import torch
from test_local import ENDS, draw, sampler, texts
from torch import Tensor

import tiny_models as tiny
from preftune.errors import GuardStop
from preftune.phases import recording
from preftune.policies.transformer import Transformer
from preftune.sampling import local, shared
from preftune.sampling.decoding import Decoding
from preftune.sampling.shared import SharedDecoder

SHARING = ["llama", "llama_tied", "gpt2", "qwen3", "granite", "cohere"]
WINDOWED = ["mistral", "gemma3"]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def ids(count: int, seed: int) -> list[int]:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(2, tiny.VOCAB, (count,), generator=g).tolist()


class Play:
    """A decoder, and what each of its rows has been given so far."""

    def __init__(self, model: Any, **options: Any) -> None:
        self.twin = copy.deepcopy(model.eval())  # whose attention stays its own
        settings = {"num_responses": 3, "max_rows": 6, "prompt": 20, "longest": 40} | options
        self.decoder = SharedDecoder(model, **settings)
        self.rows: list[list[int]] = []
        self.count = 0

    def check(self, logits: Tensor, rows: list[list[int]]) -> None:
        for found, row in zip(logits, rows, strict=True):
            expected = self.twin(input_ids=torch.tensor([row]), use_cache=False).logits[0, -1]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)

    def enter(self, *lengths: int) -> None:
        new = [ids(n, 100 + len(self.rows) + n) for n in lengths]
        self.check(self.decoder.enter([torch.tensor(p) for p in new], 3), new)
        self.rows += [list(p) for p in new for _ in range(3)]

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            self.count += 1
            tokens = ids(len(self.rows), self.count)
            for row, token in zip(self.rows, tokens, strict=True):
                row.append(token)
            self.check(self.decoder.step(torch.tensor(tokens)), self.rows)

    def keep(self, *stay: int) -> None:
        self.decoder.keep(torch.tensor(stay, dtype=torch.long))
        self.rows = [self.rows[i] for i in stay]


@torch.no_grad()
@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("name", SHARING)
def test_each_step_is_that_of_the_row_by_itself(
    name: str, fixed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts enter late, rows leave unevenly, responses outgrow their buffers, groups go."""
    monkeypatch.setattr(SharedDecoder, "_capture", lambda self: False)
    play = Play(tiny.make(name), max_rows=9, fixed=fixed)
    with play.decoder.running():
        play.enter(5, 1)
        play.step(2)
        play.keep(0, 2, 3, 5)
        play.step()
        play.enter(20)
        play.step(2)
        play.keep(1, 4, 5, 6)
        play.step(14)  # beyond the first width of the buffers for the older rows
        if not fixed:
            play.enter(3)
        play.keep(*range(1, len(play.rows)))
        play.step(2)
        play.keep(0)
        play.step(18)
        play.keep()
        play.enter(4, 7)
        play.step(2)


@torch.no_grad()
def test_a_prefill_may_take_several_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "_PREFILL_TOKENS", 6)
    play = Play(tiny.make("llama"), max_rows=12)
    with play.decoder.running():
        play.enter(5, 1, 9, 2)
        play.step(2)


@torch.no_grad()
def test_a_captured_step_reads_its_buffers_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph replays the same work on the same memory."""

    class Graph:
        def __init__(self, decoder: SharedDecoder) -> None:
            self.decoder, self.places = decoder, [x.data_ptr() for x in decoder.inputs]
            decoder.output = decoder._whole_step()

        def replay(self) -> None:
            assert [x.data_ptr() for x in self.decoder.inputs] == self.places
            self.decoder.output.copy_(self.decoder._whole_step())

    monkeypatch.setattr(SharedDecoder, "_capture", lambda self: Graph(self))
    play = Play(tiny.make("llama"), fixed=True)
    with play.decoder.running():
        play.enter(5, 1)
        play.step(3)
        play.keep(1, 2)
        play.enter(8)
        play.step(3)


@pytest.mark.parametrize("name", SHARING + WINDOWED)
def test_it_draws_what_the_plain_way_draws(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = sampler(name)
    assert local.can_share(policy.model) and (policy.trunk.window > 99) == (name in SHARING)
    quick = draw(policy)
    monkeypatch.setattr(local, "can_share", lambda model: False)
    plain = draw(policy)
    assert texts(quick) == texts(plain) and torch.equal(quick.finished, plain.finished)
    assert quick.logp is not None and plain.logp is not None
    torch.testing.assert_close(quick.logp, plain.logp, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", WINDOWED)
def test_a_window_that_never_bites_is_none(name: str) -> None:
    model = tiny.make(name, sliding_window=64)
    policy = Transformer(model, end_ids=ENDS, decoding=Decoding(max_new_tokens=9))
    assert policy.trunk.window == 64 and local.can_share(model)
    s = draw(policy)
    assert s.logp is not None
    torch.testing.assert_close(s.logp, tiny.score(policy, s).detach(), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("longest", "shares"), [(51, True), (52, False)])
def test_a_window_counts_prompt_and_response(
    longest: int, shares: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.make("mistral", sliding_window=64)
    policy = Transformer(model, end_ids=(), decoding=Decoding(max_new_tokens=longest))
    entered = []
    original = SharedDecoder.enter

    def spy(self: Any, *args: Any) -> Tensor:
        entered.append(1)
        return original(self, *args)

    monkeypatch.setattr(SharedDecoder, "enter", spy)
    assert local.can_share(model)
    entered.clear()
    s = draw(policy, count=2)  # the longest prompt has 13 tokens
    assert bool(entered) == shares and s.logp is not None
    torch.testing.assert_close(s.logp, tiny.score(policy, s).detach(), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("count", "slots"), [(2, 8), (5, 10)])
def test_a_fixed_grid_has_no_more_slots_than_responses(
    count: int, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four prompts, at most ten rows together: on an accelerator every slot is computed."""
    grids = []

    class Fixed(SharedDecoder):
        def __init__(self, model: Any, **options: Any) -> None:
            super().__init__(model, **options, fixed=True)
            grids.append(self.cache.grid)

        def _capture(self) -> Any:
            return False

    policy = sampler("llama")
    assert local.can_share(policy.model)
    plain = draw(policy, count=count)
    monkeypatch.setattr(local, "MAX_ROWS", 10)
    monkeypatch.setattr(local, "SharedDecoder", Fixed)
    found = draw(policy, count=count)
    assert [g.groups * g.slots for g in grids] == [slots]
    assert texts(found) == texts(plain)


def test_prompts_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "MAX_ROWS", 10)
    policy = sampler("llama")
    with recording() as found:
        s = draw(policy, count=5)
    assert found.tokens["prefill"] == 5 + 1 + 13 + 8
    # what is fed again: all but the last token of each response
    assert found.tokens["decode"] == int(s.mask.sum()) - 20


@pytest.mark.parametrize("name", ["bloom", "gemma2"])
def test_others_go_the_plain_way_and_it_is_said_once(
    name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = sampler(name, torch.float32)
    monkeypatch.setattr(policy.trunk, "window", 10**6)  # as if its attention were an ordinary one
    with caplog.at_level(logging.WARNING, logger="preftune"):
        s = draw(policy)
        draw(policy)
    assert sum("prompts cannot be shared" in r.message for r in caplog.records) == 1
    assert s.logp is not None
    torch.testing.assert_close(s.logp, tiny.score(policy, s).detach(), rtol=0, atol=1e-4)


def test_a_model_that_attends_otherwise_is_found_out(caplog: pytest.LogCaptureFixture) -> None:
    """One layer asks nobody how to attend, and would see no prompt."""
    model = tiny.make("llama")
    model.model.layers[1].self_attn.config = copy.deepcopy(model.config)
    policy = Transformer(model, end_ids=ENDS, decoding=Decoding(max_new_tokens=9))
    s = draw(policy)
    assert not local.can_share(model) and s.logp is not None
    assert "logits differ" in caplog.text
    torch.testing.assert_close(s.logp, tiny.score(policy, s).detach(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("broken", [False, True])
def test_the_models_own_attention_is_put_back(broken: bool) -> None:
    model = tiny.make("llama")
    policy = Transformer(model, end_ids=ENDS, decoding=Decoding(max_new_tokens=4))
    before = model.config._attn_implementation
    if broken:
        assert local.can_share(model)
        with torch.no_grad():
            model.lm_head.weight[5] = float("nan")
        with pytest.raises(GuardStop, match="not numbers"):
            draw(policy)
    else:
        draw(policy)
    assert model.config._attn_implementation == before != shared._NAME
    assert not shared._active
    assert not any("forward" in vars(m) for m in model.modules())
