"""What a comparison says in words: which one, by how much, and what cannot be told."""

from collections.abc import Mapping, Sequence
from typing import Any

FEW_SEEDS = 3
"""Seeds below which differences between methods of this size are often chance."""
PROXY = {
    "rm_same": "a reward model of the same pairs: what it gets wrong, it gets wrong here, too",
    "rm_other": "a reward model", "judge": "a model that judged",
    "human": "humans", "true": "a reward that is taken for the task itself",
}  # fmt: skip


def unit(reward: str | None) -> str:
    """Of a reward: tokens, or nothing where it is not known."""
    return "tokens" if reward is not None and reward.startswith("length:") else ""


def number(value: float) -> str:
    """Three digits or so, with a true minus."""
    size = abs(value)
    text = f"{value:.0f}" if size >= 100 else f"{value:.1f}" if size >= 10 else f"{value:.2f}"
    return text.replace("-", "−") if float(text) else text.lstrip("-")


def amount(value: float, unit: str) -> str:
    """A number with its unit."""
    return f"{number(value)} {unit}".rstrip()


def interval(e: Mapping[str, Any]) -> str:
    """`[low, high]`, or that nothing is known of it."""
    if e["low"] is None or e["high"] is None:
        return "[no interval]"
    return f"[{number(e['low'])}, {number(e['high'])}]"


def ranked(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The competitors that have figures, the highest reward first."""
    able = [m for m in found["methods"] if m["figures"]]
    return sorted(able, key=lambda m: -m["figures"][found["judged_by"]]["value"])


def verdict(found: Mapping[str, Any]) -> list[str]:
    """Sentences, the answer first."""
    order = ranked(found)
    if len(order) < 2:
        return ["Fewer than two methods have a result, so nothing is compared."]
    best, by = order[0], found["judged_by"]
    pairs = {(p["a"], p["b"]): p for p in found["pairs"]}
    beaten, alike = [], []
    for other in order[1:]:
        pair = _from(pairs, best["name"], other["name"])
        told = pair is not None and pair["better"] == best["name"]
        words = _by_how_much(other["name"], pair, found["unit"])
        (beaten if told else alike).append(words)
    lines = [_headline(best, by, beaten, alike, found)]
    if beaten:
        lines.append(f"{best['name']} is better than {_listed(beaten)}.")
    if alike:
        lines.append(f"It cannot be told from {_listed(alike)}.")
    lines += [_against_reference(best, found), _against_best_of_n(best, found)]
    return [line for line in lines if line]


def _headline(
    best: Mapping[str, Any], by: str, beaten: Sequence[str], alike: Sequence[str],
    found: Mapping[str, Any],
) -> str:  # fmt: skip
    figure = best["figures"][by]
    kl = best["figures"].get("kl")
    at = f" at a KL of {number(kl['value'])} nats" if kl else ""
    what = "gold reward" if by == "gold" else "reward"
    said = f"{what} {amount(figure['value'], found['unit'])} {interval(figure)}{at}"
    if not beaten:
        return f"No winner: {best['name']} has the highest {said}, within chance of the others."
    if alike:
        return f"{best['name']} leads, but not alone: {said}."
    return f"{best['name']}: {said}, the best of {len(beaten) + 1}."  # those that have a result


def _from(
    pairs: Mapping[tuple[str, str], Mapping[str, Any]], a: str, b: str
) -> dict[str, Any] | None:
    """The difference a − b."""
    if (a, b) in pairs:
        return dict(pairs[a, b])
    if (b, a) not in pairs:
        return None
    p = pairs[b, a]
    low, high = (None if p[end] is None else -p[end] for end in ("high", "low"))
    return {**p, "a": a, "b": b, "value": -p["value"], "low": low, "high": high}


def _by_how_much(name: str, pair: Mapping[str, Any] | None, unit: str) -> str:
    if pair is None:
        return f"{name} (no seed in common)"
    return f"{name} (by {amount(pair['value'], unit)} {interval(pair)})"


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _against_reference(best: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    gain = best["gains"].get(found["judged_by"])
    if gain is None:
        return ""
    by = f"{amount(gain['value'], found['unit'])} {interval(gain)}"
    if gain["low"] is not None and gain["low"] > 0:
        return f"Over the untrained model it gains {by}."
    return f"Even so it cannot be told from the untrained model: its gain is {by}."


def _against_best_of_n(best: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """Whether sampling alone does as well, nearer to the untrained model."""
    by, kl = found["judged_by"], best["figures"].get("kl")
    reward = best["figures"][by]["value"]
    enough = [b for b in found["reference"]["best_of_n"].get(by, []) if b["value"] >= reward]
    if not enough or kl is None or enough[0]["n"] < 2:
        return ""
    least = enough[0]
    return (
        f"Without any training, the best of {least['n']} answers of the untrained model reaches "
        f"{amount(least['value'], found['unit'])} at a KL of at most {number(least['kl'])} nats."
    )


def notes(found: Mapping[str, Any]) -> list[str]:
    """What limits the answer."""
    out, facts = [], found["facts"]
    if facts["gold"] is None:
        source = PROXY.get(facts["label_source"] or "", "the same reward")
        out.append(
            f"Judged by what labels fresh samples and chooses rates: {source}. There is no gold "
            "reward, so a method that exploits this one's mistakes looks good here: read the "
            "texts. --gold takes a reward that nothing is trained or chosen by."
        )
    seeds = found["plan"]["seeds"]
    if seeds <= FEW_SEEDS:
        out.append(
            f"{seeds} training seeds are few: intervals are as long as that makes them, and a "
            "difference that they do not show may still be there. --seeds takes more."
        )
    count = len(found["pairs"])
    if count > 1:
        out.append(
            f"{count} pairs of methods are compared. A difference counts where Holm's p over all "
            "of them is at most 5 %; each interval is one of 95 % for itself, so an interval "
            "without 0 may not be enough."
        )
    edges = [(m["name"], m["choice"]["edge"]) for m in found["methods"]
             if m["choice"] and m["choice"]["edge"]]  # fmt: skip
    if edges:
        said = _listed([f"{name} the {edge}" for name, edge in edges])
        out.append(
            f"The chosen learning rate stands at the end of the grid ({said}): beyond it may be a "
            "better one. --rates takes a grid of your own."
        )
    short = {m["name"]: m for m in found["methods"] if m["runs"] and len(m["runs"]) < m["asked"]}
    if short:
        out.append(
            f"Runs of {_listed(list(short))} failed and are left out of the means, which flatters "
            "a method that diverges at some seeds."
        )
    return out
