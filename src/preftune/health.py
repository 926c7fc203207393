"""Signs in a run's figures that it goes wrong, each said once with a cure."""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

FAR = 50.0
"""Nats between the policy and the reference, a response: samples of the one are nothing to the
other long before."""
COLLAPSED = 0.1
"""Of the entropy at the first update."""


@runtime_checkable
class Watched(Protocol):
    """What a run keeps of it."""

    step: int
    warned: set[str]
    first_entropy: float | None


def warnings(run: Watched, metrics: Mapping[str, Any]) -> Iterator[str]:
    """What is to be said after an update; nothing of a study's runs.

    Args:
        metrics: the update's figures; some may be missing.
    """
    if metrics["loss"] is None and _once(run, "ties"):
        yield (
            f"step {run.step}: no item remained (all rewards tied), so no update was made. "
            "Sample more responses a prompt, raise the temperature, or use a finer reward."
        )
    kl = metrics.get("kl")
    if isinstance(kl, float) and kl > FAR and _once(run, "kl"):
        yield (
            f"step {run.step}: the policy is {kl:.0f} nats from the reference, and a reward that "
            "grows there is seldom worth having. Lower learning_rate, or hold it by target_kl, kl "
            "or beta."
        )
    entropy = metrics.get("entropy")
    if not isinstance(entropy, float):
        return
    if run.first_entropy is None:
        run.first_entropy = entropy
    if entropy < COLLAPSED * run.first_entropy and _once(run, "entropy"):
        yield (
            f"step {run.step}: samples have lost nine tenths of their entropy ({entropy:.3f} nats "
            f"a token, {run.first_entropy:.3f} at first): the policy repeats itself. Lower "
            "learning_rate or passes, raise the KL's weight, or stop at an earlier checkpoint."
        )


def _once(run: Watched, name: str) -> bool:
    new = name not in run.warned
    run.warned.add(name)
    return new
