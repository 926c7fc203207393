"""What may be wrong with preference data, in words, and when it is worth saying."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from preftune.data.rows import Rows

PLACES = 3
"""Rows that a finding names."""

MEANINGS: dict[str, tuple[str, str]] = {
    "duplicates": ("The prompt and its responses stood in an earlier row.", "Remove the repeats."),
    "repeated_prompts": (
        "The prompt stood in an earlier row, so the row is no independent observation.",
        "Split and resample by prompt.",
    ),
    "near_duplicates": (
        "Prompt and responses are nearly those of an earlier row.",
        "Keep one of each, and keep them on one side of a split.",
    ),
    "contradictions": (
        "The same comparison was decided both ways, so the two rows cancel.",
        "Drop both, or keep the majority or a probability.",
    ),
    "cycles": (
        "The preferences among one prompt's responses run in a circle (A > B > C > A).",
        "Drop one of each circle, or judge these again.",
    ),
    "noise": (
        "At least these labels are wrong: most judgements of the same comparison say otherwise.",
        "Take the majority, or label_smoothing of about this share.",
    ),
    "disagreement": (
        "Two annotators of one comparison decided it differently.",
        "Take the majority, and expect no accuracy above their agreement.",
    ),
    "identical": (
        "Chosen and rejected are the same, which teaches nothing.",
        "Remove these rows.",
    ),
    "same_beginning": (
        "The two responses differ only in their last few tokens.",
        "Look whether the difference matters; if not, remove these rows.",
    ),
    "ties": ("The labels say that neither response is better.", "Remove them, or use probability."),
    "inverted": (
        "Score, margin or probability says that the rejected response is the better.",
        "Swap the two, or check what the column means.",
    ),
    "single_source": (
        "The data show who wrote it, not what is better: its writers always win or always lose.",
        "Compare responses of one source, or of sources on both sides.",
    ),
    "unfinished": (
        "The response has no end token, so it does not teach to end.",
        "Mark as unfinished only what was cut off, and raise max_length.",
    ),
    "unlike_ends": (
        "One response of the pair ends and the other does not, so the end token tells them apart.",
        "Drop these pairs, or cut both alike.",
    ),
    "end_inside": (
        "An end token stands before the response's end.",
        "Remove it from the text, or end the response there.",
    ),
    "doubled_bos": (
        "The prompt begins with BOS twice.",
        "Take it out of the text, or out of the chat template.",
    ),
    "role_markers": (
        "A marker of turns stands in the text as plain tokens, which the model would learn to say.",
        "Give turns as role/content lists, or cut the response before the marker.",
    ),
    "empty": ("The response says nothing.", "Remove these rows."),
    "cut": (
        "The response has the very largest length, as many others: it was cut there.",
        "Mark it as unfinished (chosen_finished: false), or raise the limit it was made with.",
    ),
    "overlap": (
        "The prompt is held out for evaluation, too.",
        "Take it out of training: the evaluation would measure memory.",
    ),
    "near_overlap": (
        "The prompt is nearly one that is held out for evaluation.",
        "Take it out of training.",
    ),
}
"""Of each finding what it means and the cure."""

ANY = 0.0
"""Said of a single row: it is a fault in making the data, and more may be behind it."""
FEW = 0.01
"""Below a hundredth the weight of such rows is lost in the noise of sampling."""
SOME = 0.05
"""Up to a twentieth a model gains little by learning it, and accuracy moves by less than that."""
MOST = 0.9
"""Nearly all of the data, so that training sees little else."""
LIMITS = {
    **dict.fromkeys(("identical", "inverted", "end_inside", "doubled_bos", "empty"), ANY),
    **dict.fromkeys(("overlap", "near_overlap"), ANY),
    **dict.fromkeys(("duplicates", "near_duplicates", "contradictions", "cycles"), FEW),
    **dict.fromkeys(("role_markers", "cut"), FEW),
    **dict.fromkeys(("same_beginning", "ties", "unfinished", "unlike_ends", "noise"), SOME),
    "disagreement": 0.3,  # people agree on about 70 % of such comparisons
    "single_source": MOST,
}
"""Share above which `warnings` speaks; of repeated_prompts it never does."""
RULE_FAR = 0.2
"""From 1/2: at 70 % a rule predicts as well as reward models do on held-out human preferences."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Finding:
    """One thing that may be wrong, and the rows with it."""

    name: str
    count: int | None
    """Rows, or responses where the mask is of responses; None: the data cannot tell."""
    of: int
    """What the count is out of."""
    mask: Tensor | None
    """[N] of the rows or [N, K] of the responses, bool; None where the count is None."""
    where: tuple[str, ...]
    """A few places."""

    @property
    def share(self) -> float | None:
        """Count over `of`; None if it cannot be told."""
        return None if self.count is None or not self.of else self.count / self.of

    @property
    def meaning(self) -> str:
        """In one sentence."""
        return MEANINGS[self.name][0]

    @property
    def cure(self) -> str:
        """What to do."""
        return MEANINGS[self.name][1]


@dataclass(frozen=True, kw_only=True, eq=False)
class Health:
    """All findings that apply to this kind of rows, N of them."""

    rows: int
    distinct_rows: int
    distinct_prompts: int
    """The n of intervals."""
    findings: dict[str, Finding]
    rules: dict[str, Tensor]
    """Of pairs, [N] float64 by rule: 1 where it prefers the chosen response, 0, or 1/2."""
    held_out_seen: Tensor | None
    """[M] bool, of the held-out rows those whose prompt is in the rows, exactly or nearly."""


def warnings(found: Health) -> list[str]:
    """What matters of it, in the order of LIMITS and then the rules: what, where and the cure."""
    said = []
    for name, limit in LIMITS.items():
        f = found.findings.get(name)
        if f is not None and f.share is not None and f.share > limit:
            more = ", ..." if (f.count or 0) > len(f.where) else ""
            said.append(
                f"data: {name}: {f.count} of {f.of} ({f.share:.1%}; {', '.join(f.where)}{more}). "
                f"{f.meaning} {f.cure}"
            )
    noise = found.distinct_prompts**-0.5 if found.distinct_prompts else 1.0  # two standard errors
    for name, values in found.rules.items():
        share = float(values.mean()) if len(values) else 0.5
        # "shorter" is the other side of "longer", and "source" chose its side from the data.
        far = share - 0.5 if name in ("longer", "shorter", "source") else abs(share - 0.5)
        if far >= RULE_FAR and far > noise:
            other = "wrong" if share > 0.5 else "right"
            said.append(
                f"data: the rule '{name}' predicts {share:.0%} of the preferences, which can be "
                f"learned without reading. Add pairs that it gets {other}, or report every "
                "accuracy beside its own."
            )
    return said


def finding(
    name: str, rows: Rows, mask: Tensor, *, of: int | None = None, like: Sequence[str] = ()
) -> Finding:
    """The finding of that name about the rows of a mask.

    Args:
        of: what the count is out of; by default all that the mask has.
        like: of each row, the other that it is like, or empty.
    """
    hit = mask.flatten(1).any(-1) if mask.dim() > 1 else mask
    places = [
        f"{rows.where[i]} like {like[i]}" if like else rows.where[i]
        for i in hit.nonzero().flatten().tolist()[:PLACES]
    ]
    return Finding(
        name=name,
        count=int(mask.sum()),
        of=mask.numel() if of is None else of,
        mask=mask,
        where=tuple(places),
    )


def unknown(name: str) -> Finding:
    """The finding of that name where the data cannot tell."""
    return Finding(name=name, count=None, of=0, mask=None, where=())


def bools(values: Sequence[Any]) -> Tensor:
    """A mask of them."""
    return torch.tensor(list(values), dtype=torch.bool)
