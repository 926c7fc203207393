"""Rendering once, the boundary of prompt and response, BOS, and the end token."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from preftune.data import Example, Renderer, RowError, load_examples
from preftune.errors import UserError

Tiny = Callable[..., Any]
CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def example(prompt: Any, *responses: str, finished: Sequence[bool] | None = None) -> Example:
    return Example(
        prompt=prompt,
        responses=responses,
        finished=tuple(finished if finished is not None else [True] * len(responses)),
        columns={},
        where="here:1",
    )


def texts(renderer: Renderer, row: Example) -> tuple[str, ...]:
    """Prompt and responses as the tokens spell them."""
    encoded = renderer.encode(row)
    return tuple("".join(renderer.pieces(i)) for i in (encoded.prompt, *encoded.responses))


# The embedded default model: pad id = end id = <|im_end|>


def test_smollm_response_ends_with_the_end_token_and_not_the_newline(smollm: Any):
    renderer = Renderer(smollm)
    row = example("What is 2 + 2?", "It is 4.", "Five")
    prompt, good, bad = texts(renderer, row)
    assert prompt.endswith("<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n")
    assert (good, bad) == ("It is 4.<|im_end|>", "Five<|im_end|>")
    encoded = renderer.encode(row)
    assert encoded.prompt == renderer.prompt_ids(row.prompt) and not encoded.boundary_merged
    for ids in encoded.responses:
        assert ids.count(smollm.eos_token_id) == 1 and ids[-1] == smollm.eos_token_id


def test_the_text_of_the_end_token_inside_a_response_does_not_end_it(smollm: Any):
    renderer = Renderer(smollm)
    inside, last = "say <|im_end|> now", "finish with <|im_end|>"
    _, *responses = texts(renderer, example("p", inside, last))
    assert responses == [inside + "<|im_end|>", last + "<|im_end|>"]


def test_the_text_of_special_tokens_in_a_prompt_stays_in_the_prompt(smollm: Any):
    renderer = Renderer(smollm)
    prompt = "what is <|im_end|>\n<|im_start|>assistant\n?"
    rendered, response = texts(renderer, example(prompt, "a mark"))
    assert rendered == renderer.prompt_text(prompt) and response == "a mark<|im_end|>"


def test_an_unfinished_response_has_no_end_token(smollm: Any):
    renderer = Renderer(smollm)
    row = example("p", "cut off he", "whole.", finished=[False, True])
    assert texts(renderer, row)[1:] == ("cut off he", "whole.<|im_end|>")


def test_real_rows_are_the_tokens_of_the_whole_text(
    smollm: Any, shared_file: Callable[[str], Path]
):
    renderer = Renderer(smollm)
    for name in ("hh_helpful.jsonl.gz", "alpaca_judged.jsonl.xz", "chat_pairs.jsonl"):
        for row in load_examples(shared_file(name), max_rows=40).examples:
            encoded = renderer.encode(row)
            turns = row.prompt
            if isinstance(turns, str):
                turns = [{"role": "user", "content": turns}]
            for text, ids in zip(row.responses, encoded.responses, strict=True):
                whole = smollm.apply_chat_template(
                    [*turns, {"role": "assistant", "content": text}], tokenize=True
                )["input_ids"]
                assert encoded.prompt + ids == whole[:-1]  # all but the template's newline
                assert renderer.decode(ids) == text


# Text as it is


def test_template_none_adds_bos_where_the_tokenizer_does_and_the_end_token(tiny: Tiny):
    row = example("Q: a\nA:", " b", " c", finished=[True, False])
    assert texts(Renderer(tiny(bos=True)), row) == ("<s>Q: a\nA:", " b</s>", " c")
    assert texts(Renderer(tiny()), row) == ("Q: a\nA:", " b</s>", " c")


def test_an_end_token_that_the_tokenizer_adds_is_not_trained_on_a_cut_response(tiny: Tiny):
    row = example("Q", "A", "B", finished=[True, False])
    for bos in (False, True):
        start = "<s>" * bos
        assert texts(Renderer(tiny(bos=bos, eos=True)), row) == (start + "Q", "A</s>", "B")
    assert texts(Renderer(tiny(bos=True, eos=True, chat=CHAT)), row)[1:] == ("A</s>", "B")


def test_text_that_brings_its_own_bos_or_end_token_gets_no_second(tiny: Tiny):
    row = example("<s>Q", "A</s>")
    assert texts(Renderer(tiny(bos=True)), row) == ("<s>Q", "A</s>")
    assert texts(Renderer(tiny(bos=True)), example("<s><s>Q", "A")) == ("<s>Q", "A</s>")
    assert Renderer(tiny(bos=True)).prompt_ids("<s>Q").count(0) == 1


def test_template_none_v_auto(smollm: Any, tiny: Tiny):
    row = example("Hello", " there")
    assert texts(Renderer(smollm, template="none"), row) == ("Hello", " there<|im_end|>")
    assert texts(Renderer(smollm), row)[0].endswith("<|im_start|>assistant\n")
    assert texts(Renderer(tiny()), row) == ("Hello", " there</s>")  # auto, and no chat template


def test_turns_without_a_chat_template_are_refused(tiny: Tiny, smollm: Any):
    turns = [{"role": "user", "content": "a"}]
    for renderer in (Renderer(tiny()), Renderer(smollm, template="none")):
        with pytest.raises(UserError, match=r"no chat template.*\.jinja"):
            renderer.encode(example(turns, "b"))


def test_system_prompt(smollm: Any, tiny: Tiny):
    renderer = Renderer(smollm, system_prompt="Be brief.")
    assert renderer.prompt_text("p").startswith("<|im_start|>system\nBe brief.<|im_end|>\n")
    own = [{"role": "system", "content": "Be long."}, {"role": "user", "content": "p"}]
    assert "brief" not in renderer.prompt_text(own)
    assert texts(renderer, example("p", "a"))[0] == renderer.prompt_text("p")
    for make in (lambda: tiny(), lambda: smollm):
        with pytest.raises(UserError, match="system_prompt"):
            Renderer(make(), template="none", system_prompt="x")


# The boundary


def test_a_token_that_straddles_the_boundary_belongs_to_the_response(tiny: Tiny):
    renderer = Renderer(tiny(merges=((" ", "y"),), bos=True))
    encoded = renderer.encode(example("A: ", "yes"))
    assert renderer.pieces(encoded.prompt) == ["<s>", "A", ":"]
    assert renderer.pieces(encoded.responses[0]) == [" y", "e", "s", "</s>"]
    assert encoded.boundary_merged
    assert renderer.pieces(renderer.prompt_ids("A: ")) == ["<s>", "A", ":", " "]


def test_all_responses_stand_on_one_prompt_though_only_one_merges(tiny: Tiny):
    renderer = Renderer(tiny(merges=((" ", "y"),)))
    encoded = renderer.encode(example("A: ", "yes", "no"))
    assert renderer.pieces(encoded.prompt) == ["A", ":"]
    assert [renderer.pieces(i) for i in encoded.responses] == [
        [" y", "e", "s", "</s>"],
        [" ", "n", "o", "</s>"],
    ]
    assert encoded.boundary_merged


@pytest.mark.parametrize("trim", [False, True])
def test_a_response_that_begins_with_a_blank_may_merge_too(tiny: Tiny, trim: bool):
    renderer = Renderer(tiny(merges=((":", " "),), trim=trim))
    encoded = renderer.encode(example("A:", " b"))
    assert renderer.pieces(encoded.prompt) == ["A"]
    assert renderer.pieces(encoded.responses[0]) == [": ", "b", "</s>"]


def test_blanks_left_out_of_offsets(smollm: Any):
    # Byte-level tokenizers report " yes" as the characters "yes"; the blank is the prompt's here.
    renderer = Renderer(smollm, template="none")
    encoded = renderer.encode(example("Answer: ", "yes"))
    assert "".join(renderer.pieces(encoded.prompt)) == "Answer:"
    assert renderer.pieces(encoded.responses[0]) == [" yes", "<|im_end|>"]
    assert encoded.boundary_merged


def test_a_prompt_that_merges_away_is_refused(tiny: Tiny):
    renderer = Renderer(tiny(merges=((" ", "y"),)))
    with pytest.raises(RowError, match="no token of the prompt"):
        renderer.encode(example(" ", "yes"))


def test_slow_tokenizer_gives_the_same(tiny: Tiny, smollm: Any):
    class Slow:
        """A tokenizer without offsets."""

        is_fast = False

        def __init__(self, fast: Any):
            self.fast = fast

        def __getattr__(self, name: str) -> Any:
            return getattr(self.fast, name)

        def __call__(self, text: Any, **options: Any) -> Any:
            assert not options.pop("return_offsets_mapping", False)
            return self.fast(text, **options)

    rows = [
        example("A: ", "yes", "no <|im_end|> or </s> so", finished=[False, True]),
        example("A:", " yes <|im_end|>", "</s>"),
    ]
    fast = [smollm, tiny(merges=((" ", "y"),), bos=True), tiny(chat=CHAT)]
    for tokenizer in fast:
        for row in rows:
            assert Renderer(Slow(tokenizer)).encode(row) == Renderer(tokenizer).encode(row)


# Chat templates of other kinds


def test_a_template_that_trims_and_holds_bos(tiny: Tiny):
    row = example("  p ", " a \n", " b ", finished=[True, False])
    renderer = Renderer(tiny(bos=True, chat=CHAT))
    assert texts(renderer, row) == ("<s>[user]p</s>\n[assistant]", "a</s>", "b")
    assert renderer.encode(row).prompt.count(0) == 1


def test_a_template_that_doubles_bos_gets_one(tiny: Tiny):
    doubled = "{{ bos_token }}" + CHAT
    assert (
        texts(Renderer(tiny(chat=doubled)), example("p", "a"))[0] == "<s>[user]p</s>\n[assistant]"
    )


def test_a_template_without_end_token_gets_the_tokenizers(tiny: Tiny):
    plain = CHAT.replace("{{ eos_token }}", "")
    renderer = Renderer(tiny(chat=plain, merges=(("a", "\n"),)))
    assert texts(renderer, example("p", "a", "b", finished=[True, False]))[1:] == ("a</s>", "b")


def test_the_first_of_several_end_tokens_is_the_last_of_the_response(tiny: Tiny):
    renderer = Renderer(
        tiny(chat=CHAT.replace("{{ eos_token }}", "~{{ eos_token }}")), end_ids=(1, 96)
    )
    assert texts(renderer, example("p", "a"))[1] == "a~"


def test_a_template_that_puts_an_empty_thought_before_the_answer(tiny: Tiny):
    thinking = CHAT.replace(
        "[{{ m.role }}]", "[{{ m.role }}]{% if m.role == 'assistant' %}<t></t>{% endif %}"
    )
    renderer = Renderer(tiny(chat=thinking))
    assert texts(renderer, example("p", "t", "</s> t", finished=[False, True]))[1:] == (
        "<t></t>t",
        "<t></t></s> t</s>",
    )


def test_a_jinja_file_is_a_template(tiny: Tiny, tmp_path: Path):
    path = tmp_path / "chat.jinja"
    path.write_text(CHAT)
    assert texts(Renderer(tiny(), template=str(path)), example("p", "a"))[1] == "a</s>"
    path.write_text("{% if %}")
    with pytest.raises(UserError, match="template"):
        Renderer(tiny(), template=str(path))
    with pytest.raises(UserError, match="cannot be read"):
        Renderer(tiny(), template=str(tmp_path / "none.jinja"))
    with pytest.raises(UserError, match="Did you mean 'auto'"):
        Renderer(tiny(), template="atuo")


def test_templates_that_cannot_be_used_are_refused_at_once(tiny: Tiny):
    other = CHAT.replace("[assistant]{% endif %}", "[bot]{% endif %}")
    silent = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    )
    for chat in (other, silent):
        with pytest.raises(UserError, match="add_generation_prompt"):
            Renderer(tiny(chat=chat))
    tokenizer = tiny(chat=CHAT)
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no end token"):
        Renderer(tokenizer)


def test_rows_that_the_template_refuses_or_changes(tiny: Tiny):
    strict = "{% if messages|length > 2 %}{{ raise_exception('too many') }}{% endif %}" + CHAT
    long = [{"role": "user", "content": "a"}] * 2
    with pytest.raises(RowError, match="refuses the turns: too many"):
        Renderer(tiny(chat=strict)).encode(example(long, "b"))
    cutting = CHAT.replace("m.content | trim", "(m.content | trim).split('</think>')[-1]")
    with pytest.raises(RowError, match="changes the response"):
        Renderer(tiny(chat=cutting)).encode(example("p", "a</think>b"))
    last = CHAT.replace(
        "m.content | trim", "(m.content if loop.last else m.content | replace('A', 'B'))"
    )
    with pytest.raises(RowError, match="no prefix"):
        Renderer(tiny(chat=last)).encode(example([{"role": "user", "content": "Ab"}], "b"))


def test_decode_leaves_special_tokens_out_and_blanks_in(smollm: Any):
    renderer = Renderer(smollm)
    ids = renderer.encode(example("p", "Well , do n't .")).responses[0]
    assert renderer.decode(ids) == "Well , do n't ."
