"""What is measured once, in pieces that stand on disk as they come; figures are read off later.

Data are scored by the reference (tier 0), prompts are answered by it (1), answers are judged (2).
With a finished policy the same is done of its own answers, and of a probe's (3).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from preftune.data import Rows
from preftune.diagnosis.pieces import Pieces
from preftune.numerics import masked_sum, permutation, stream_key, uniform
from preftune.policies.scoring import micro_batches, score_all
from preftune.policies.transformer import Transformer
from preftune.samples import Samples

ROWS_AT_ONCE, PROMPTS_AT_ONCE = 32, 16
"""Of a piece: what is lost at most when a diagnosis is cut off."""
Tick = Callable[[int, int], None]
Judge = Callable[[Samples], Tensor]


@dataclass(frozen=True, kw_only=True)
class Surveyed:
    """Responses, and what one pass of the reference said of each.

    N prompts, K responses, T tokens.
    """

    row: Tensor
    """[N]: the rows of the data whose prompts these are."""
    tokens: Tensor
    mask: Tensor
    """[N, K, T]."""
    finished: Tensor
    """[N, K]: ended by themselves."""
    ref_logp: Tensor
    entropy: Tensor
    variance: Tensor
    """[N, K, T], of the reference: see `Transformer.survey`."""
    hidden: Tensor
    """[N, K, D]: sums of last hidden states."""
    logp: Tensor | None = None
    """[N, K, T], of the policy that is diagnosed."""
    step_kl: Tensor | None = None
    """[N, K, T]: KL of the policy's next-token distribution from the reference's."""
    reward: Tensor | None = None
    """[N, K], float64."""

    def take(self, index: Tensor) -> "Surveyed":
        """The prompts at these places."""
        held: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        taken: dict[str, Any] = {k: None if x is None else x[index] for k, x in held.items()}
        return Surveyed(**taken)

    def lengths(self) -> Tensor:
        """[N, K], the end token counted."""
        return self.mask.sum(-1)

    def ref_logps(self) -> Tensor:
        """Summed log-probs under the reference, [N, K], float64."""
        return masked_sum(self.ref_logp.double(), self.mask)

    def log_ratio(self) -> Tensor:
        """log(policy / reference) of each response, [N, K], float64."""
        assert self.logp is not None, "there is a policy besides the reference"
        return masked_sum(self.logp.double(), self.mask) - self.ref_logps()

    def features(self) -> Tensor:
        """Mean last hidden state of each response, [N, K, D]."""
        return self.hidden / self.lengths().clamp(min=1)[..., None]


def same_prompts(data: Surveyed, drawn: Surveyed) -> tuple[Surveyed, Surveyed]:
    """Both to the prompts that both have, in one order."""
    places = {int(row): i for i, row in enumerate(data.row)}
    both = [(places[int(row)], j) for j, row in enumerate(drawn.row) if int(row) in places]
    mine, theirs = torch.tensor(both, dtype=torch.long).view(-1, 2).unbind(1)
    return data.take(mine), drawn.take(theirs)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """All that figures are read off; None where it was not asked for, or there is nothing."""

    data: Surveyed | None = None
    """The data's responses, the chosen first, then the rejected."""
    drawn: Surveyed | None = None
    """The reference's own."""
    own: Surveyed | None = None
    """The policy's own."""
    probe: Surveyed | None = None
    """A probe's own, drawn with the random numbers of `drawn`."""
    probe_data: Surveyed | None = None
    """The data's responses to these prompts, `logp` the probe's."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """Whose data, and by whom they are scored, answered and judged."""

    reference: Transformer
    policy: Transformer | None
    rows: Rows
    judge: Judge | None
    seed: int
    budget: int | None
    """Tokens of a forward pass."""
    pieces: Pieces
    identity: str = ""
    """Hashes of the reference and the rows."""


def order(job: Job) -> Tensor:
    """Rows in the order in which they are taken: the first n are a fair sample, whatever n is."""
    return permutation(stream_key(job.seed, "diagnose"), 0, len(job.rows))


def distinct(job: Job, count: int) -> Tensor:
    """The first rows in that order whose prompts differ, at most `count`."""
    seen: dict[tuple[int, ...], int] = {}
    for i in order(job).tolist():
        if len(seen) == count:
            break
        seen.setdefault(tuple(job.rows.prompts[i]), i)
    return torch.tensor(list(seen.values()), dtype=torch.long)


def data(job: Job, rows: Tensor, tick: Tick = lambda done, total: None) -> Surveyed:
    """Score the data's responses of `rows`."""

    def one(index: Tensor) -> dict[str, Tensor]:
        samples = job.rows.samples(index)
        return _surveyed(job, samples, policy=job.policy)

    return _in_pieces(job, "data", rows, ROWS_AT_ONCE, one, tick)


def drawn(
    job: Job, rows: Tensor, num_responses: int, tick: Tick = lambda done, total: None
) -> Surveyed:
    """Answers of the reference to the prompts of `rows`."""

    def one(index: Tensor) -> dict[str, Tensor]:
        return _surveyed(job, answers(job, job.reference, index, num_responses, "reference"))

    name = f"drawn-{num_responses}"
    return _in_pieces(job, name, rows, PROMPTS_AT_ONCE, one, tick)


def own(
    job: Job,
    of: Callable[[], Transformer],
    rows: Tensor,
    num_responses: int,
    tick: Tick = lambda done, total: None,
    name: str = "own",
    stream: str = "policy",
) -> Surveyed:
    """Answers of a policy, with its KL from the reference.

    Args:
        of: gives the policy; not asked where every piece is on disk.
        name: of the pieces.
        stream: of the random numbers; "reference" for those of `drawn`.
    """

    def one(index: Tensor) -> dict[str, Tensor]:
        policy = of()
        samples = answers(job, policy, index, num_responses, stream)
        found = _surveyed(job, samples, policy=policy)
        found["step_kl"] = torch.zeros(samples.mask.shape)
        for part in micro_batches(samples, job.budget):
            found["step_kl"][part] = policy.step_kl(job.reference, samples.take(part)).float()
        return found

    return _in_pieces(job, f"{name}-{num_responses}", rows, PROMPTS_AT_ONCE, one, tick)


def rescored(
    job: Job,
    of: Callable[[], Transformer],
    surveyed: Surveyed,
    tick: Tick = lambda done, total: None,
    name: str = "own-data",
) -> Surveyed:
    """Responses of the data, as surveyed, with their log-probs under a policy (see `own`)."""
    width, found, done = surveyed.mask.shape[-1], [], 0

    def one(index: Tensor) -> dict[str, Tensor]:
        return {"logp": score_all(of(), job.rows.samples(index), job.budget).float()}

    for number, index in enumerate(surveyed.row.split(ROWS_AT_ONCE)):
        logp = job.pieces.get(f"{name}-{number:04d}", index, lambda i=index: one(i))["logp"]
        found.append(torch.nn.functional.pad(logp, (0, width - logp.shape[-1])))
        done += len(index)
        tick(done, len(surveyed.row))
    return replace(surveyed, logp=torch.cat(found))


def answers(job: Job, of: Transformer, rows: Tensor, num_responses: int, name: str) -> Samples:
    """Answers to the prompts of `rows`, by the stream of random numbers of that name."""
    key = stream_key(job.seed, "diagnose", name)

    def stream(t: int, shape: tuple[int, ...]) -> Tensor:
        return uniform(key, t, rows[:, None], torch.arange(shape[-1]))

    samples = of.sample(*job.rows.prompts_only(rows), num_responses, stream, 0)
    return replace(samples, row=rows)


def _surveyed(job: Job, samples: Samples, policy: Transformer | None = None) -> dict[str, Tensor]:
    """The fields of `Surveyed`, in forward passes of bounded size."""
    found: dict[str, Tensor] = {
        "row": samples.row, "tokens": samples.tokens, "mask": samples.mask,
        "finished": samples.finished,
    }  # fmt: skip
    parts = micro_batches(samples, job.budget)
    passes = [job.reference.survey(samples.take(index)) for index in parts]
    back = torch.argsort(torch.cat(parts))
    for name in ("logp", "entropy", "variance", "hidden"):
        whole = torch.cat([p[name].float() for p in passes])[back]
        found["ref_logp" if name == "logp" else name] = whole
    if policy is not None:
        found["logp"] = score_all(policy, samples, job.budget).float()
    if job.judge is not None:
        found["reward"] = job.judge(samples).double()
    return found


def _in_pieces(
    job: Job,
    name: str,
    rows: Tensor,
    size: int,
    make: Callable[[Tensor], dict[str, Tensor]],
    tick: Tick,
) -> Surveyed:
    """Make the pieces that are not there yet, and put all together."""
    found, done = [], 0
    for number, index in enumerate(rows.split(size)):
        found.append(job.pieces.get(f"{name}-{number:04d}", index, lambda i=index: make(i)))
        done += len(index)
        tick(done, len(rows))
    return _joined(found)


def _joined(pieces: list[dict[str, Tensor]]) -> Surveyed:
    """Pieces of unlike widths, padded to the widest."""
    tokens = dict(_over_tokens(pieces))
    rest = {name: torch.cat([p[name] for p in pieces]) for name in pieces[0] if name not in tokens}
    return Surveyed(**tokens, **rest)


_PER_TOKEN = ("tokens", "mask", "ref_logp", "entropy", "variance", "logp", "step_kl")


def _over_tokens(pieces: list[dict[str, Tensor]]) -> Iterator[tuple[str, Any]]:
    width = max(p["mask"].shape[-1] for p in pieces)
    for name in (n for n in _PER_TOKEN if n in pieces[0]):
        padded = [torch.nn.functional.pad(p[name], (0, width - p[name].shape[-1])) for p in pieces]
        yield name, torch.cat(padded)


OFTEN = 0.1
"""Share of the responses above which another limit is spoken of."""


def other_limit(data: Surveyed, limit: int) -> str | None:
    """What to say where the data's responses were cut at another length than the answers are.

    Args:
        limit: of the answers, in tokens.
    """
    length = data.mask.sum(-1)
    longer = float((length > limit).double().mean())
    cure = "ranks, told_apart and what is reached then compare lengths. Draw as the data were drawn"
    if longer > OFTEN:
        return (
            f"{longer:.0%} of the data's responses are longer than the answers' {limit} tokens: "
            f"{cure}, with a larger --max-new-tokens."
        )
    cut = length[~data.finished]
    if len(cut) > OFTEN * length.numel() and int(cut.max()) < limit:
        most = int(cut.max())
        return (
            f"the data's cut responses have {most} tokens at most, answers up to {limit}: {cure}, "
            f"with --max-new-tokens {most}."
        )
    return None
