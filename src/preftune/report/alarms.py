"""What went wrong in the runs, as they said it, and whether equal runs of other seeds agree."""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from preftune.report.drawing import styles
from preftune.report.read import RunFolder, finite, last_evaluation
from preftune.report.tables import number, swatch, text

APART = ("seed", "micro_batch_tokens", "threads", "compile", "activation_checkpointing")
"""Settings in which two runs of one experiment may differ: the seed, and what the machine had."""
LESS, ERRORS = 0.8, 3.0
"""Seeds disagree where they agree in less than that of what one policy would with itself, and by
more standard errors than these."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How often runs that differ in their seed alone give a prompt the same answer."""

    labels: tuple[str, ...]
    prompts: int
    """Those that at least two runs answered."""
    comparisons: int
    """Over all couples of runs."""
    share: float
    """Of them with the same most frequent answer."""
    entropy: float | None
    """Nats a response, the mean of the runs."""

    @property
    def least(self) -> float | None:
        """How often two draws of one policy of that entropy agree at least: by Jensen's inequality
        the sum of p^2 is no less than exp(-entropy)."""
        return None if self.entropy is None else math.exp(-max(0.0, self.entropy))

    @property
    def by_chance(self) -> bool:
        """The seeds are sure of their answers, and not of the same ones."""
        if self.least is None:
            return False
        # a prompt's comparisons hang together: what counts is the number of prompts
        error = math.sqrt(self.least * (1 - self.least) / self.prompts)
        return self.share < min(LESS * self.least, self.least - ERRORS * error)


def agreement(answers: Sequence[Mapping[str, Sequence[str]]]) -> tuple[int, int, float]:
    """Prompts of two runs and more, comparisons of their most frequent answers, and the share of
    these in which they are the same.

    Args:
        answers: of each run, by prompt, one or more responses.
    """
    modes = [{p: Counter(found).most_common(1)[0][0] for p, found in a.items()} for a in answers]
    both = [(p, a[p] == b[p]) for a, b in combinations(modes, 2) for p in a if p in b]
    same = sum(equal for _, equal in both)
    return len({p for p, _ in both}), len(both), same / max(1, len(both))


def of_seeds(runs: Sequence[RunFolder]) -> list[Agreement]:
    """The agreement of each set of runs that differ in their seed alone."""
    groups: dict[str, list[RunFolder]] = defaultdict(list)
    for run in runs:
        if run.answers and not run.is_reference:
            shared = {k: v for k, v in run.settings.items() if k not in APART}
            groups[json.dumps(shared, sort_keys=True)].append(run)
    found: list[Agreement] = []
    for group in groups.values():
        if len({run.settings.get("seed") for run in group}) < len(group) or len(group) < 2:
            continue
        prompts, count, share = agreement([_responses(run) for run in group])
        entropies = [last_evaluation(run, "entropy").value for run in group]
        known = [h for h in entropies if h is not None]
        mean = sum(known) / len(known) if len(known) == len(group) else None
        labels = tuple(run.label for run in group)
        if count:
            found.append(
                Agreement(
                    labels=labels, prompts=prompts, comparisons=count, share=share, entropy=mean
                )
            )  # fmt: skip
    return found


def _responses(run: RunFolder) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for row in run.answers:
        found[json.dumps(row.get("prompt"), sort_keys=True)].append(str(row.get("response")))
    return found


def alarms(runs: Sequence[RunFolder]) -> str:
    """What each run said, and how far seeds agree; nothing where there is neither."""
    rows = "".join(
        f"<tr><th scope=row>{swatch(style)}{text(run.label)}</th>"
        f"<td>{number(finite(row.get('step')), 0)}</td><td>{text(row.get('title', ''))}</td>"
        f"<td>{text(row.get('measured', ''))}</td><td>{text(row.get('cure', ''))}</td></tr>"
        for run, style in zip(runs, styles(runs), strict=True)
        for row in run.alarms
    )
    heads = "".join(f"<th scope=col>{h}</th>" for h in ("Run", "Step", "Alarm", "Measured", "Cure"))
    table = (
        f"<div class=scroll><table class=settings><thead><tr>{heads}</tr></thead>"
        f"<tbody>{rows}</tbody></table></div>"
    )
    said = "".join(f"<p>{text(_sentence(found))}</p>" for found in of_seeds(runs))
    return (table if rows else "") + said


def _sentence(found: Agreement) -> str:
    said = (
        f"{', '.join(found.labels)} differ in their seed alone. Two of them give the same answer "
        f"to a held-out prompt in {found.share:.0%} of {found.comparisons} comparisons"
    )
    if found.least is None:
        return f"{said}."
    said += f"; two draws of one policy as sure of itself would in at least {found.least:.0%}."
    if not found.by_chance:
        return said
    return (
        f"{said} Alarm: which answers are left is chance. Hold the policies nearer to the "
        "reference (target_kl, kl), lower learning_rate, or take a method that keeps several "
        "answers (best_of_n, rwr)."
    )
