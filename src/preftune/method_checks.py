"""What a row cannot mean, refused before anything is loaded."""

from collections.abc import Sequence

import torch

from preftune import objectives as o
from preftune.collecting import Source
from preftune.errors import UserError
from preftune.labellers import Member
from preftune.method import Method, resolve
from preftune.samples import DATA
from preftune.sampling.decoding import Decoding
from preftune.sources import origins
from preftune.terms import Term, prompts_per_update, together


def check(method: Method, decoding: Decoding, batch_size: int) -> None:
    """Refuse a row that cannot mean what it says, before anything is loaded.

    Raises:
        UserError: the setting and the cure.
    """
    for places in together(method.terms):
        _check_group([method.terms[i] for i in places], decoding, batch_size)
    if method.reference_update != "fixed" and "ref_logp" not in method.needs:
        raise UserError(
            f"reference_update: the method '{method.name}' has no use for a reference. "
            "Leave it out."
        )
    if method.reference_update != "ema" and method.ema_decay != Method.ema_decay:
        raise UserError(
            f"ema_decay: the reference is no moving average ('{method.reference_update}'). Set "
            "reference_update to ema, or leave it out."
        )
    _check_budget(method, decoding)
    if method.patience is not None and not _judges_fresh(method):
        raise UserError(
            f"patience: the method '{method.name}' has no rewards of fresh samples to watch. "
            "Leave it out, or stop by best_by."
        )


def _judges_fresh(method: Method) -> bool:
    return any(t.source.on_policy and "reward" in t.needs for t in method.terms)


def _check_group(terms: Sequence[Term], decoding: Decoding, batch_size: int) -> None:
    """Refuse terms on the same samples that these cannot serve."""
    source = terms[0].source
    _check_responses(terms)
    update = prompts_per_update(terms, batch_size, source.num_responses)
    if source.prompts_per_round is not None and source.prompts_per_round < update:
        raise UserError(
            f"prompts_per_round: {source.prompts_per_round} is less than the {update} prompts "
            f"of one update (batch_size {batch_size}). Lower batch_size "
            "or raise prompts_per_round."
        )
    stale = source.passes > 1 or (source.prompts_per_round or update) > update
    for term in terms:
        name, of_policy = term.objective.__name__, min(term.origins) >= 0
        ratio = "logp_old" in term.parameters
        if term.penalises_kl and (not of_policy or (term.objective is o.reverse_kl and stale)):
            raise UserError(
                f"{name} needs fresh samples: an on_policy source with passes: 1 and rounds of one "
                "update, and no others. For reused samples put the KL into the reward (kl), or "
                "give the term a source of its own."
            )
        if term.penalises_kl and term.settings.get("estimator") == "k1":
            raise UserError(
                f"{name}: the estimator k1 has gradient zero in the mean. Use k2, whose gradient "
                "is that of the KL, or reverse_kl."
            )
        if ratio and not of_policy:
            raise UserError(
                f"{name} weighs samples by policy now / policy that drew them, and data (or the "
                "reference's samples) do not say what drew them. Use the source on_policy, or an "
                "objective without a ratio (weighted_nll, dpo)."
            )
        if term.penalises_kl or ratio:
            _check_unmodified(name, decoding)
        elif source.on_policy and _is_on(getattr(term.labeller, "kl", 0.0)):
            _check_unmodified("kl: the KL in the reward", decoding)


def _is_on(strength: float | tuple[float, ...]) -> bool:
    return any(strength) if isinstance(strength, tuple) else bool(strength)


def _check_unmodified(what: str, decoding: Decoding) -> None:
    """Log-probs are the policy's own, so what is told of it by its samples needs them as it draws
    them."""
    if not decoding.unmodified:
        raise UserError(
            f"{what} needs samples of the policy itself: temperature 1, top_p 1, top_k 0, "
            f"min_new_tokens 0 (given: {decoding.temperature:g}, {decoding.top_p:g}, "
            f"{decoding.top_k}, {decoding.min_new_tokens})."
        )


def _check_responses(terms: Sequence[Term]) -> None:
    """Refuse numbers of responses that a labeller does not work with, or that nothing takes."""
    source = terms[0].source
    count, drawn = source.num_responses, [origin != DATA for origin in origins(source)]
    for labeller in (t.labeller for t in terms):
        if count < labeller.least:
            raise UserError(
                f"samples_per_prompt: {count} is too few for {type(labeller).__name__}, which "
                f"compares responses. Give {labeller.least} or more."
            )
        if isinstance(labeller, Member):
            _check_member(labeller, source)
    unused = [a and not any(b) for a, *b in zip(drawn, *(t.taken for t in terms), strict=True)]
    if any(unused):
        raise UserError(
            f"samples_per_prompt: of the {count} responses to a prompt the method learns from "
            f"{count - sum(unused)}, and the others would be drawn for nothing. Give fewer."
        )


def _check_member(member: Member, source: Source) -> None:
    """Refuse a member that is not there, or whose place says another response than it did."""
    found = origins(source)
    if not member.is_at(torch.tensor(found)).any():
        raise UserError(
            f"member: its source gives no response {member.place} of the origin {member.origin}. "
            "Name another origin, or a lower place."
        )
    if member.origin is None and len(found) > member.place + 1 and any(x != DATA for x in found):
        raise UserError(
            f"member.place: {member.place} counts among all {len(found)} responses to a prompt, "
            "and is another one at another samples_per_prompt. Say whose it is: "
            "origin: policy, reference or data."
        )


def _check_budget(method: Method, decoding: Decoding) -> None:
    """A KL budget needs a KL to steer, measured on samples of the policy itself."""
    if method.target_kl is None:
        return
    steered = [t for t in resolve(method).terms if t.source.on_policy and t.kl_coefficient]
    if not steered:
        rewarded = any(t.source.on_policy and hasattr(t.labeller, "kl") for t in method.terms)
        cure = "Give --kl 0.05 too" if rewarded else "Use a method with one (hypo, ppo)"
        raise UserError(
            f"target_kl: the method '{method.name}' has no KL on fresh samples to steer. {cure}."
        )
    _check_unmodified("target_kl", decoding)
