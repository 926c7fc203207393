"""What the places of a trainer's row take, made of one or more of TRL's values, and back."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from preftune.errors import UserError
from preftune.from_trl.rules import Theirs

DIVERGENCES = {"forward_kl": "forward_kl", "js_divergence": "js", "alpha_divergence": "alpha"}
ABSENT = None
"""A place that is left out of the row."""


@dataclass(frozen=True)
class Derived:
    """What a place takes, made of TRL's values; `back` makes TRL's values of it."""

    there: Callable[[Theirs], Any]
    back: Callable[[Any], dict[str, Any]]


def losses(theirs: Theirs) -> list[str]:
    """The losses that are summed."""
    given = theirs.values.get("loss_type", [])
    return [str(x) for x in (given if isinstance(given, list) else [given])]


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{name}: {value!r} is no number.")
    return float(value)


def weight(place: int) -> Callable[[Theirs], float]:
    """The weight of the loss at that place."""

    def found(theirs: Theirs) -> float:
        given = theirs.values.get("loss_weights")
        if given is None:
            return 1.0
        if not isinstance(given, list) or len(given) != len(losses(theirs)) or not given:
            raise UserError("loss_weights: give one for each of loss_type.")
        return _number("loss_weights", given[place])

    return found


def _beta(theirs: Theirs) -> float:
    given = theirs.values["beta"]
    return _number("beta", given[0] if isinstance(given, list) and given else given)


def _per_round(theirs: Theirs) -> int | None:
    """Prompts of a generation batch; None where it is one update's worth."""
    size, every = "generation_batch_size", "steps_per_generation"
    device = theirs.whole("per_device_train_batch_size", least=1)
    device *= theirs.whole("num_processes", least=1)
    if theirs.values.get(size) is None and theirs.values.get(every) is None:
        return None
    told = theirs.values.get(size) is not None
    whole = theirs.whole(size, least=1) if told else device * theirs.whole(every, least=1)
    group = theirs.whole("num_generations", least=2)
    if whole % group:
        raise UserError(f"num_generations: {group} does not divide the {whole} of a generation.")
    update = device * theirs.whole("gradient_accumulation_steps", least=1)
    return None if whole == update else whole // group


def _stale(theirs: Theirs) -> bool:
    """Some update is not of the policy that drew its samples."""
    return theirs.whole("num_iterations", least=1) > 1 or _per_round(theirs) is not None


def _limit(theirs: Theirs) -> float | None:
    given = theirs.values.get("reward_clip_range")
    if given is None:
        return None
    if isinstance(given, list) and len(given) == 2:
        low, high = (_number("reward_clip_range", x) for x in given)
        if low == -high:
            return high
    raise UserError(f"reward_clip_range: {given!r}. Rewards are clipped to [-x, x] alone.")


_SCALES = {"group": ("prompt", "none"), "none": ("none", "prompt")}
"""Of `scale_rewards`: what is whitened, and the baseline where nothing is."""


def _scale(theirs: Theirs) -> tuple[str, str]:
    given = theirs.values["scale_rewards"]
    name = {"True": "group", "False": "none", "None": "none"}.get(str(given), str(given))
    if name not in _SCALES:
        raise UserError(f"scale_rewards: '{name}' has no counterpart. Give group or none.")
    return _SCALES[name]


def _of_scale(place: int) -> Callable[[Any], dict[str, Any]]:
    return lambda x: {"scale_rewards": next(k for k, v in _SCALES.items() if v[place] == x)}


def _divergence(theirs: Theirs) -> str | None:
    name = str(theirs.values["f_divergence_type"])
    if name not in (*DIVERGENCES, "reverse_kl"):
        raise UserError(f"f_divergence_type: '{name}' is unknown.")
    return DIVERGENCES.get(name, ABSENT)


def _alpha(theirs: Theirs) -> float | None:
    return theirs.values["f_alpha_divergence_coef"] if _divergence(theirs) == "alpha" else ABSENT


def _divergence_back(value: Any) -> dict[str, Any]:
    named = {v: k for k, v in DIVERGENCES.items()}
    return {"f_divergence_type": named.get(value, "reverse_kl")}


def _weights_back(place: int) -> Callable[[Any], dict[str, Any]]:
    return lambda x: {"loss_weights": {place: x}}


def _unless_none(name: str) -> Callable[[Any], dict[str, Any]]:
    return lambda x: {} if x is None else {name: x}


DERIVED: Mapping[str, Derived] = {
    "losses": Derived(losses, lambda x: {"loss_type": list(x)}),
    "first_weight": Derived(weight(0), _weights_back(0)),
    "second_weight": Derived(weight(1), _weights_back(1)),
    "beta": Derived(_beta, lambda x: {"beta": x}),
    "divergence": Derived(_divergence, _divergence_back),
    "alpha": Derived(_alpha, _unless_none("f_alpha_divergence_coef")),
    "stale": Derived(_stale, lambda x: {}),
    "prompts_per_round": Derived(_per_round, lambda x: {"prompts_per_round": x}),
    "whiten_round": Derived(
        lambda t: "round" if t.values["normalize_advantages"] else "none",
        lambda x: {"normalize_advantages": {"round": True, "none": False}[x]},
    ),
    "whiten_prompt": Derived(lambda t: _scale(t)[0], _of_scale(0)),
    "prompt_baseline": Derived(lambda t: _scale(t)[1], _of_scale(1)),
    "reward_limit": Derived(_limit, lambda x: {} if x is None else {"reward_clip_range": [-x, x]}),
    "end_penalty": Derived(
        lambda t: t.values["missing_eos_penalty"], _unless_none("missing_eos_penalty")
    ),
}
