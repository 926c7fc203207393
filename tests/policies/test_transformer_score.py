"""`Transformer.score` against plain Hugging Face forwards of one unpadded row at a time."""

from typing import Any

import pytest
import torch
from torch import Tensor

import tiny_models as tiny
from preftune import huggingface
from preftune.data.canonical import Example
from preftune.data.chat import Renderer
from preftune.data.rows import build_rows
from preftune.policies.capabilities import UNLIMITED, head_is_a_product, share_window
from preftune.policies.packing import pack
from preftune.policies.scoring import micro_batches, score_all, sizes
from preftune.policies.transformer import Transformer
from preftune.policies.trunk import Trunk
from preftune.samples import Samples

NEAR = {torch.float64: 1e-10, torch.float32: 1e-5}
EAGER_NEAR = 1e-6
"""Of models without sdpa: their softmax is in float32, whatever the weights."""
SHARING = ["llama", "llama_tied", "gpt2", "qwen3", "granite", "cohere"]
WINDOWED = ["mistral", "gemma3"]
NEVER = ["gemma2", "bloom"]
EXAMPLES = [
    ("Name a sea.", "The Baltic.", "I do not know of any"),
    ("Hi", "Hello!", "?"),
    ("Why do birds sing?", "To find each other", "Birds"),
]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tokenizer(tiny_model: str) -> Any:
    made = huggingface.load_tokenizer(tiny_model)
    assert made.pad_token_id == made.eos_token_id == tiny.END
    return made


def real_rows(tokenizer: Any, template: str, *, finished: bool = True) -> Samples:
    examples = [
        Example(prompt=p, responses=(a, b), finished=(True, finished), columns={}, where=f"{i}")
        for i, (p, a, b) in enumerate(EXAMPLES)
    ]
    rows, report = build_rows(examples, Renderer(tokenizer, template=template), max_length=None)
    assert report.kept == len(EXAMPLES)
    return rows.samples(range(len(rows)))


def reference(model: Any, s: Samples, flaw: str | None = None) -> Tensor:
    """[n, K, T] by plain forwards; `flaw` names a mistake to make."""
    out = torch.zeros(s.mask.shape, dtype=model.dtype)
    for i, k, prompt, response in tiny.unpadded(s):
        if flaw == "end_left_out":
            response = response[:-1]
        if flaw == "pad_counted" and len(response) < s.tokens.shape[-1]:
            response = [*response, tiny.END]
        logp = tiny.plain_log_probs(model, prompt, response)
        if flaw == "unshifted":
            table = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0]
            logp = table[len(prompt) :].log_softmax(-1)
            logp = logp.gather(-1, torch.tensor(response)[:, None]).squeeze(-1).detach()
        out[i, k, : len(logp)] = logp
    return out


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_equals_one_row_at_a_time(name: str, dtype: torch.dtype, share: bool) -> None:
    model, s = tiny.make(name, dtype).eval(), tiny.ragged()
    expected = reference(model, s)
    assert float(expected[s.mask].std()) > 0.2  # the model is no uniform one
    near = max(NEAR[dtype], EAGER_NEAR if name in NEVER else 0)
    scored = tiny.score(Transformer(model, end_ids=[tiny.END], share_prefix=share), s).detach()
    assert scored.dtype == dtype
    assert not scored[~s.mask].any()
    torch.testing.assert_close(scored, expected, rtol=0, atol=near)


@pytest.mark.parametrize("template", ["none", "auto"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "gemma2"])
def test_real_rows_with_and_without_chat_template(tokenizer: Any, name: str, template: str) -> None:
    model = tiny.make(name).eval()
    s = real_rows(tokenizer, template, finished=False)
    ended = [response[-1] == tiny.END for *_, response in tiny.unpadded(s)]
    assert ended == [True, False] * len(EXAMPLES)
    expected = reference(model, s)
    for share in (True, False):
        scored = tiny.score(Transformer(model, end_ids=[tiny.END], share_prefix=share), s)
        near = EAGER_NEAR if name in NEVER else 1e-10
        torch.testing.assert_close(scored.detach(), expected, rtol=0, atol=near)


@pytest.mark.parametrize("template", ["none", "auto"])
@pytest.mark.parametrize("flaw", ["end_left_out", "pad_counted", "unshifted"])
def test_a_wrong_reference_differs(tokenizer: Any, flaw: str, template: str) -> None:
    """The comparison sees a missing end token, a counted pad (its id is the end's), no shift."""
    model, s = tiny.make("llama").eval(), real_rows(tokenizer, template)
    scored = tiny.score(Transformer(model, end_ids=[tiny.END]), s).detach().sum(-1)
    torch.testing.assert_close(scored, reference(model, s).sum(-1), rtol=0, atol=1e-10)
    wrong = (scored - reference(model, s, flaw).sum(-1)).abs()
    longest = s.lengths() == s.tokens.shape[-1]
    assert bool((wrong > 1e-3)[~longest].all())


@pytest.mark.parametrize("name", SHARING)
def test_responses_share_a_prompt(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = tiny.policy(name, packing=False)
    assert scorer.share_prefix
    assert rows_of_a_forward(scorer, tiny.ragged(), monkeypatch) == 4


@pytest.mark.parametrize("name", NEVER)
def test_models_that_cannot_share_fall_back(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    scorer = tiny.policy(name, share_prefix=True)
    assert not scorer.share_prefix
    assert "share_prefix: not possible" in caplog.text
    assert rows_of_a_forward(scorer, tiny.ragged(), monkeypatch) == 12


@pytest.mark.parametrize("name", WINDOWED)
def test_rows_longer_than_the_window_are_not_shared(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shared row's mask holds no window. A probe with short rows would not notice."""
    model, s = tiny.make(name).eval(), tiny.ragged()
    scorer = Transformer(model, end_ids=[tiny.END], packing=False)
    assert scorer.share_prefix and share_window(model) == tiny.WINDOW
    assert rows_of_a_forward(scorer, s, monkeypatch) == 12
    short = tiny.samples([[5, 6, 7], [8]], [[[9, 10, 3, 4, 1], [12, 1]], [[2, 1], [13, 14, 1]]])
    assert rows_of_a_forward(scorer, short, monkeypatch) == 2
    torch.testing.assert_close(
        tiny.score(scorer, short).detach(), reference(model, short), rtol=0, atol=1e-10
    )
    # the rows above are such that a missing window shows
    scorer.trunk.window = UNLIMITED
    assert float((tiny.score(scorer, s).detach() - reference(model, s)).abs().max()) > 1e-2


def rows_of_a_forward(scorer: Transformer, s: Samples, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many rows the decoder is given."""
    seen = []

    def spy(self: Trunk, module: Any, layout: Any, **options: Any) -> Any:
        seen.append(len(layout.input_ids))
        return original(self, module, layout, **options)

    original = Trunk.forward
    with monkeypatch.context() as patch:
        patch.setattr(Trunk, "forward", spy)
        tiny.score(scorer, s)
    (rows,) = seen
    return rows


@pytest.mark.parametrize("unheard", ["attention_mask", "position_ids"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_model_that_does_not_heed_the_layout_is_found(dtype: torch.dtype, unheard: str) -> None:
    """Weights as small as a fresh model's, whose log-probs would hardly tell."""
    for spread in (0.02, 0.3):
        model = tiny.make("llama", dtype, initializer_range=spread)
        assert Transformer(model, end_ids=[tiny.END]).share_prefix
        inner, forward = model.base_model, model.base_model.forward

        def deaf(
            input_ids: Tensor, attention_mask: Any = None, position_ids: Any = None,
            forward: Any = forward, **more: Any,
        ) -> Any:  # fmt: skip
            heard = {"attention_mask": attention_mask, "position_ids": position_ids}
            return forward(input_ids, **(heard | {unheard: None}), **more)

        inner.forward = deaf
        assert not Transformer(model, end_ids=[tiny.END]).share_prefix


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_probe_is_not_rounded_by_autocast(name: str) -> None:
    trunks = [tiny.policy(name, torch.float32, autocast=x).trunk for x in (None, torch.bfloat16)]
    for shared in (True, False):
        exact, same = (trunk.probe(shared=shared) for trunk in trunks)
        assert torch.equal(exact, same)


def test_share_window_reads_the_configuration() -> None:
    assert share_window(tiny.make("llama")) == UNLIMITED
    assert share_window(tiny.make("mistral", sliding_window=None)) == UNLIMITED
    assert share_window(tiny.make("gemma3", layer_types=["full_attention"] * 2)) == UNLIMITED
    assert share_window(tiny.make("llama", attn_implementation="eager")) == 0
    recurrent = tiny.make("qwen3")
    recurrent.config.layer_types = ["linear_attention", "full_attention"]
    assert share_window(recurrent) == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_heads_that_do_more_than_a_product_are_found(dtype: torch.dtype) -> None:
    found = {name: head_is_a_product(tiny.make(name, dtype).eval()) for name in tiny.ARCHITECTURES}
    assert {name for name, product in found.items() if not product} == {
        "gemma2",
        "granite",
        "cohere",
    }


def test_a_cap_shows_though_logits_are_small() -> None:
    """30 tanh(x / 30) is x for the logits of a model of small weights."""
    model = tiny.make("gemma2", initializer_range=1e-3, final_logit_softcapping=30.0)
    assert not head_is_a_product(model)
    assert head_is_a_product(tiny.make("gemma2", final_logit_softcapping=None))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_half_precision_weights_can_share(name: str, dtype: torch.dtype) -> None:
    scorer, s = tiny.policy(name, dtype), tiny.ragged()
    assert scorer.share_prefix
    scored = tiny.score(scorer, s).detach()
    assert scored.dtype == torch.float32
    exact = tiny.score(Transformer(scorer.model.double(), end_ids=[1]), s).detach()
    assert float((scored - exact).abs().max()) < 0.5


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_bfloat16_autocast_is_near(name: str) -> None:
    s = tiny.ragged()
    exact = tiny.score(tiny.policy(name, torch.float32), s)
    scorer = tiny.policy(name, torch.float32, autocast=torch.bfloat16)
    assert scorer.share_prefix == (name != "gemma2") and not scorer.exact_sampler
    scored = tiny.score(scorer, s)
    assert scored.dtype == torch.float32
    difference = (scored - exact).detach().abs()
    assert 0 < float(difference.max()) < 0.5


def test_scores_do_not_depend_on_the_rows_beside() -> None:
    s, scorer = tiny.ragged(), tiny.policy("gpt2")
    together = tiny.score(scorer, s).detach()
    for i in range(4):
        alone = s.take(torch.tensor([i]))
        torch.testing.assert_close(tiny.score(scorer, alone)[0].detach(), together[i])
    for budget in (None, 1, 30, 1000):
        torch.testing.assert_close(score_all(scorer, s, budget), together)


def test_micro_batches_cover_every_prompt_within_the_budget() -> None:
    s = tiny.ragged()
    size = sizes(s)
    assert size == [5 + 16, 1 + 14, 13 + 6, 8 + 25]
    for budget in (1, 40, 66, 1000):
        parts = micro_batches(s, budget)
        assert sorted(torch.cat(parts).tolist()) == [0, 1, 2, 3]
        for part in parts:
            held = [size[i] for i in part.tolist()]
            assert len(part) == 1 or sum(held) <= budget
            assert len(part) == 1 or len(part) * max(held) <= 2 * budget


def test_what_padding_holds_does_not_matter() -> None:
    s, scorer = tiny.ragged(), tiny.policy("llama")
    dirty_prompt = torch.where(s.prompt_mask, s.prompt, 77)
    dirty_tokens = torch.where(s.mask, s.tokens, 99)
    again = scorer.score(dirty_prompt, s.prompt_mask, dirty_tokens, s.mask)
    assert torch.equal(again, tiny.score(scorer, s))


@pytest.mark.parametrize("shared", [True, False])
def test_the_last_token_is_not_computed(shared: bool) -> None:
    """Nothing is predicted from it."""
    s = tiny.samples([[5, 6, 7]], [[[8, 9, 1], [10, 1]]])
    layout = pack(s.prompt, s.prompt_mask, s.tokens, s.mask, shared=shared)
    assert layout.input_ids.shape == ((1, 6) if shared else (2, 5))
    assert len(layout.predict) == 5


def test_an_empty_response_scores_nothing() -> None:
    s = tiny.samples([[5, 6], [7, 8, 9]], [[[], [10, 1]], [[11, 12, 1], []]])
    scored = tiny.score(tiny.policy("llama"), s)
    assert scored.sum(-1)[0, 0] == scored.sum(-1)[1, 1] == 0
    assert bool((scored[s.mask] < 0).all())
