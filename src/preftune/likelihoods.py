"""Figures of given texts: held-out pairs under policy and reference, and plain text.

What the policy would say itself is in `preftune.evaluate`.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from preftune.collecting import Data
from preftune.data.files import ending, read_file
from preftune.errors import UserError
from preftune.figures import Figures, clustered, ratio, wins
from preftune.numerics import masked_sum
from preftune.policies.base import Policy
from preftune.policies.scoring import score_all
from preftune.samples import DATA, Samples, pad_stack

BATCH = 32
"""Rows made into samples at once."""


def pair_figures(
    policy: Policy,
    reference: Policy,
    pairs: Data,
    budget: int | None,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
    ref_logp: Tensor | None = None,
) -> Figures:
    """Accuracy and margin of the implicit reward on pairs, and the log-ratios it is made of.

    Pairs of equal prompts are resampled together.

    Args:
        pairs: rows whose first response is the chosen one, whose second the rejected one.
        budget: tokens in one forward pass.
        ref_logp: `pair_logp` of the reference, where it is known.
    """
    ratios: list[Tensor] = []
    clusters: dict[tuple[int, ...], int] = defaultdict(lambda: len(clusters))
    places: list[int] = []
    for samples in pair_batches(pairs):
        mine = response_logp(policy, samples, budget)
        if ref_logp is None:
            theirs = response_logp(reference, samples, budget)
        else:
            theirs = ref_logp[len(places) : len(places) + len(mine)]
        ratios.append(mine - theirs)
        for ids, mask in zip(samples.prompt, samples.prompt_mask, strict=True):
            places.append(clusters[tuple(ids[mask].tolist())])
        progress(len(places), len(pairs))
    chosen, rejected = torch.cat(ratios).unbind(-1)
    margin = chosen - rejected
    cluster = torch.tensor(places)
    found = {
        "implicit_accuracy": wins(chosen, rejected),
        "implicit_margin": margin,
        "log_ratio_chosen": chosen,
        "log_ratio_rejected": rejected,
    }
    return {name: clustered(x, cluster, seed=seed) for name, x in found.items()}


def pair_logp(policy: Policy, pairs: Data, budget: int | None) -> Tensor:
    """Summed log-probs of the chosen and the rejected response of each pair, [N, 2], float64."""
    return torch.cat([response_logp(policy, part, budget) for part in pair_batches(pairs)])


def pair_batches(rows: Data) -> Iterator[Samples]:
    """The chosen and the rejected response of all rows, some rows at a time."""
    for start in range(0, len(rows), BATCH):
        index = torch.arange(start, min(start + BATCH, len(rows)))
        yield rows.samples(index, responses=[0, 1])


def response_logp(policy: Policy, samples: Samples, budget: int | None) -> Tensor:
    """Summed log-prob of each response, [N, K], float64."""
    return masked_sum(score_all(policy, samples, budget), samples.mask).double()


def plain_text(source: str) -> list[str]:
    """The documents of a file: a .txt is one; of other kinds each row is one, in `text`.

    Raises:
        UserError: no such file, or rows without text.
    """
    path = Path(source).expanduser()
    if not path.is_file():
        raise UserError(f"retention '{source}': no such file. Give a .txt or JSONL of plain text.")
    if ending(path) is None:
        raise UserError(f"retention '{source}': unknown ending. Give .txt or .jsonl, plain or .gz.")
    try:
        rows = list(read_file(path))
    except UserError as error:
        raise UserError(f"retention{str(error).removeprefix('data')}") from error
    if ending(path) == ".txt":
        return ["\n".join(row["prompt"] for _, row in rows)]
    texts = []
    for where, row in rows:
        text = row.get("text") if isinstance(row, Mapping) else row
        if not isinstance(text, str) or not text.strip():
            raise UserError(
                f"retention '{source}': row {where} has no text. Each row is an object with 'text'."
            )
        texts.append(text)
    return texts


def windows(documents: Sequence[str], tokenizer: Any, size: int) -> list[list[int]]:
    """Token ids of the documents in pieces of at most `size` tokens (2 or more each).

    Raises:
        UserError: no document has two tokens.
    """
    pieces = []
    for text in documents:
        ids = tokenizer(text)["input_ids"]  # with BOS, where the tokenizer adds one
        pieces += [ids[start : start + size] for start in range(0, len(ids), size)]
    pieces = [piece for piece in pieces if len(piece) > 1]
    if not pieces:
        raise UserError("retention: the text has no two tokens. Give more of it.")
    return pieces


def retention(
    policy: Policy,
    reference: Policy | None,
    pieces: Sequence[list[int]],
    budget: int | None,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Figures:
    """-log-prob of plain text a token, of the policy and of the reference, and their difference.

    Each piece stands alone: its first token is given and not scored. Pieces are resampled.
    """
    order = sorted(pieces, key=len)
    sums: dict[str, list[Tensor]] = {"mine": [], "reference": [], "tokens": []}
    for start in range(0, len(order), BATCH):
        part = order[start : start + BATCH]
        samples = _as_samples(part)
        sums["tokens"].append(samples.lengths().sum(-1).double())
        for name, of in (("mine", policy), ("reference", reference)):
            if of is not None:
                sums[name].append(-response_logp(of, samples, budget).sum(-1))
        progress(start + len(part), len(order))
    tokens, mine = torch.cat(sums["tokens"]), torch.cat(sums["mine"])
    out = {"retention_nll": ratio(mine, tokens, seed)}
    if reference is not None:
        theirs = torch.cat(sums["reference"])
        out["retention_nll_reference"] = ratio(theirs, tokens, seed)
        out["retention_change"] = ratio(mine - theirs, tokens, seed)
    return out


def _as_samples(pieces: Sequence[list[int]]) -> Samples:
    """The first token as the prompt, the rest as the one response."""
    prompt = torch.tensor([[piece[0]] for piece in pieces])
    tokens, mask = pad_stack([torch.tensor(piece[1:]) for piece in pieces])
    shape = (len(pieces), 1)
    return Samples(
        prompt=prompt,
        prompt_mask=torch.ones_like(prompt, dtype=torch.bool),
        tokens=tokens.unsqueeze(1),
        mask=mask.unsqueeze(1),
        finished=torch.zeros(shape, dtype=torch.bool),
        origin=torch.full(shape, DATA),
        row=torch.arange(len(pieces)),
    )
