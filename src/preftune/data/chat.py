"""Text to token ids: one rendering of prompt and response, and where in it the response stands.

The whole conversation is rendered once, as text, and tokenised once. What stands before the
response is found in the rendered text, never by the length of a prompt tokenised by itself: a
token that straddles the boundary belongs to the response.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from preftune.data.canonical import Example, Message, Prompt
from preftune.data.trial import excess, little_memory
from preftune.errors import UserError, nearest

Spans = list[tuple[int, int]] | None
_PROBE = "preftune7probe"  # a response that no template changes or contains
_tried: set[str] = set()
"""Templates that take no more than they may."""


class RowError(ValueError):
    """One row cannot be rendered; the message is the reason."""


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Token ids of one example."""

    prompt: list[int]
    responses: tuple[list[int], ...]
    """The end token is their last where the response is finished."""
    boundary_merged: bool
    """The prompt ends otherwise here than where it is given for sampling (tokens merged)."""


class Renderer:
    """Renders examples by a tokenizer's chat template, or as they are.

    Args:
        tokenizer: of Hugging Face's kind.
        template: "auto" (the tokenizer's chat template; as "none" where it has none), "none"
            (text as it is, BOS where the tokenizer adds one, the end token), or the path of a
            .jinja file.
        system_prompt: given to conversations that begin with no system turn.
        end_ids: tokens that end a response; by default the tokenizer's own end token.

    Raises:
        UserError: no such template, a template that cannot be rendered, or no end token.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        template: str = "auto",
        system_prompt: str | None = None,
        end_ids: Sequence[int] = (),
    ):
        self.tokenizer = tokenizer
        own = tokenizer.eos_token_id
        self.end_ids: tuple[int, ...] = tuple(end_ids) or (() if own is None else (own,))
        if not self.end_ids:
            raise UserError("tokenizer: it has no end token. Set eos_token in its configuration.")
        self.end_id: int = next((i for i in self.end_ids if i == own), self.end_ids[0])
        self.bos_id: int | None = tokenizer.bos_token_id
        self.chat, self._template = _choose(tokenizer, template)
        if system_prompt is not None and not self.chat:
            raise UserError(
                "system_prompt: there is no chat template to put it into. Leave it out, "
                "or give `template` the path of a .jinja file."
            )
        self.system_prompt = system_prompt
        self._add_bos = not self.chat and _adds_bos(tokenizer)
        self._tail, self._template_ends = "", False
        if self.chat:
            self._try()
            with little_memory():  # the template is compiled here, which can take what running does
                self._tail, self._template_ends = self._probe()

    @property
    def template_text(self) -> Any:
        """The chat template in use, as the tokenizer holds it; None takes text as it is."""
        return (self._template or self.tokenizer.chat_template) if self.chat else None

    def prompt_text(self, prompt: Prompt) -> str:
        """The rendered prompt, with what the template opens the answer by.

        Raises:
            RowError: the template refuses the turns.
            UserError: turns, and no chat template.
        """
        if self.chat:
            return self._render(self._turns(prompt), open_answer=True)
        if isinstance(prompt, str):
            return prompt
        raise UserError(
            "template: the data has role/content turns, and there is no chat template to render "
            "them by. Give `template` the path of a .jinja file, or a model that has one."
        )

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """The prompt as it is given for sampling."""
        ids, _ = self._tokenise([self.prompt_text(prompt)])[0]
        if not ids:
            raise RowError("the prompt has no token")
        return ids

    def encode(self, example: Example) -> Encoded:
        """Prompt and responses; all responses stand on one identical prompt.

        Raises:
            RowError: the template refuses or changes the conversation.
        """
        if not example.responses:
            alone = self.prompt_ids(example.prompt)
            return Encoded(prompt=alone, responses=(), boundary_merged=False)
        head = self.prompt_text(example.prompt)
        whole = [self._whole(example.prompt, head, text) for text in example.responses]
        # Text behind the response is needed only where it holds the end token.
        texts = [
            text if done and self._template_ends else text[:end]
            for (text, end), done in zip(whole, example.finished, strict=True)
        ]
        (alone, _), *coded = self._tokenise([head, *texts])
        prompts, answers = [], []
        for text, (_, end), done, (ids, spans) in zip(
            texts, whole, example.finished, coded, strict=True
        ):
            prompts.append(ids[: _boundary(alone, ids, spans, text, len(head))])
            answers.append(self._ended(ids, spans, text, end) if done else ids)
        cut = _common(prompts)
        if cut == 0:
            raise RowError("no token of the prompt stands before the response")
        prompt = prompts[0][:cut]
        return Encoded(
            prompt=prompt,
            responses=tuple(ids[cut:] for ids in answers),
            boundary_merged=prompt != alone,
        )

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens left out."""
        return self._text(ids, skip_special_tokens=True)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text of each id by itself, special tokens shown."""
        return [self._text([i], skip_special_tokens=False) for i in ids]

    def _text(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return self.tokenizer.decode(
            list(ids),
            skip_special_tokens=skip_special_tokens,
            clean_up_tokenization_spaces=False,  # it would drop blanks before punctuation
        )

    def _turns(self, prompt: Prompt) -> list[Message]:
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if self.system_prompt is None or turns[0]["role"] in ("system", "developer"):
            return turns
        return [{"role": "system", "content": self.system_prompt}, *turns]

    def _render(self, turns: list[Message], *, open_answer: bool) -> str:
        try:
            return self._apply(turns, open_answer)
        except Exception as error:  # a template may raise what it likes, by raise_exception or not
            raise RowError(f"the chat template refuses the turns: {error}") from error

    def _apply(self, turns: list[Message], open_answer: bool) -> str:
        return self.tokenizer.apply_chat_template(
            turns,
            chat_template=self._template,
            tokenize=False,
            add_generation_prompt=open_answer,
        )

    def _whole(self, prompt: Prompt, head: str, response: str) -> tuple[str, int]:
        """The rendered conversation, and where in it the response ends."""
        if not self.chat:
            return head + response, len(head) + len(response)
        turns = [*self._turns(prompt), {"role": "assistant", "content": response}]
        full = self._render(turns, open_answer=False)
        if not full.startswith(head):
            raise RowError("the rendered prompt is no prefix of the rendered conversation")
        end = len(full) - len(self._tail)
        body = full[len(head) : end]
        # Templates may strip the response, or put an empty thought before it.
        if not full.endswith(self._tail) or not body.rstrip().endswith(response.strip()):
            raise RowError("the chat template changes the response")
        return full, end

    def _try(self) -> None:
        """Render two turns elsewhere first: a template is a program, and not one of ours."""
        template = str(self.template_text)
        if template in _tried:
            return
        asked = self._turns("x")
        answered = [*asked, {"role": "assistant", "content": _PROBE}]
        reason = excess(lambda: len(self._apply(asked, True)) + len(self._apply(answered, False)))
        if reason is not None:
            raise UserError(
                f"template: rendering a prompt of one letter {reason}, as with a template that is "
                "damaged or hostile. Give `template` another .jinja file."
            )
        _tried.add(template)

    def _probe(self) -> tuple[str, bool]:
        """What the template puts behind a response, and whether an end token is in it."""
        try:
            turns = self._turns("x")
            head = self._render(turns, open_answer=True)
            answer = {"role": "assistant", "content": _PROBE}
            full = self._render([*turns, answer], open_answer=False)
        except RowError as error:
            raise UserError(f"template: {error}. Give `template` another .jinja file.") from error
        before, probe, tail = full.rpartition(_PROBE)
        if not probe or not full.startswith(head):
            raise UserError(
                "template: rendered with add_generation_prompt, a prompt must be the beginning "
                "of the rendered conversation, and the answer must follow. It is not so here. "
                "Give `template` the path of a .jinja file that does so."
            )
        end = len(before) + len(_PROBE)
        ids, spans = self._tokenise([full])[0]
        return tail, self._first_end(ids, spans, full, end) is not None

    def _first_end(self, ids: list[int], spans: Spans, text: str, end: int) -> int | None:
        """Index of the first end token behind the response, whose own text may hold others."""
        if spans is None:
            inside = self._tokenise([text[:end]])[0][0]
            before = sum(i in self.end_ids for i in inside)
            places = [n for n, i in enumerate(ids) if i in self.end_ids]
            return places[before] if before < len(places) else None
        for n, (i, (_, stop)) in enumerate(zip(ids, spans, strict=True)):
            if stop > end and i in self.end_ids:
                return n
        return None

    def _ended(self, ids: list[int], spans: Spans, text: str, end: int) -> list[int]:
        """Ids up to the end token, which is appended where the template puts none."""
        if self._template_ends:
            last = self._first_end(ids, spans, text, end)
            assert last is not None, "the template ended its probe, and not this response"
            return ids[: last + 1]
        # Text taken as it is may bring its end token along.
        return ids if not self.chat and ids[-1] in self.end_ids else [*ids, self.end_id]

    def _tokenise(self, texts: list[str]) -> list[tuple[list[int], Spans]]:
        """Ids, and the characters each stands for (None where the tokenizer cannot tell)."""
        out = self.tokenizer(
            texts,
            add_special_tokens=False,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=bool(self.tokenizer.is_fast),
            verbose=False,
        )
        ids: list[list[int]] = out["input_ids"]
        spans: list[Spans] = out["offset_mapping"] if self.tokenizer.is_fast else [None] * len(ids)
        return [self._one_bos(i, s) for i, s in zip(ids, spans, strict=True)]

    def _one_bos(self, ids: list[int], spans: Spans) -> tuple[list[int], Spans]:
        """One BOS where the tokenizer adds one; never two, though the text brings its own."""
        bos = self.bos_id
        if self._add_bos and bos is not None and ids[:1] != [bos]:
            return [bos, *ids], None if spans is None else [(0, 0), *spans]
        while bos is not None and ids[:2] == [bos, bos]:
            ids, spans = ids[1:], None if spans is None else spans[1:]
        return ids, spans


def _choose(tokenizer: Any, template: str) -> tuple[bool, str | None]:
    """Whether a chat template is used, and its text where it is not the tokenizer's own."""
    if template in ("auto", "none"):
        return template == "auto" and bool(tokenizer.chat_template), None
    path = Path(template).expanduser()
    if path.suffix != ".jinja":
        raise UserError(
            f"template '{template}': is none of auto, none, or the path of a .jinja file."
            f"{nearest(template, ('auto', 'none'))}"
        )
    try:
        return True, path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"template '{template}': cannot be read ({error}).") from error


def _adds_bos(tokenizer: Any) -> bool:
    with_special = tokenizer("x", verbose=False)["input_ids"]
    bos = tokenizer.bos_token_id
    return bos is not None and bool(with_special) and with_special[0] == bos


def _common(rows: Sequence[Sequence[int]]) -> int:
    """Length of the longest prefix that all rows share."""
    return sum(1 for _ in takewhile(lambda ids: len(set(ids)) == 1, zip(*rows, strict=False)))


def _boundary(alone: list[int], ids: list[int], spans: Spans, text: str, start: int) -> int:
    """How many of `ids` stand wholly before character `start`, where the response begins."""
    common = _common([alone, ids])
    # Tokenizers may report blanks as outside of their token, so offsets cannot tell on which side
    # of the boundary a blank stands; what both tokenisations share is before it in any case.
    if spans is None or common == len(alone) or text[start : start + 1].isspace():
        return common
    return sum(1 for _ in takewhile(lambda span: span[1] <= start, spans))
