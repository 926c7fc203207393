"""The rows of a run: what it trains on, the prompts that it answers, what is held out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from preftune import building, following, loading
from preftune.data import Rejected, Report, Rows, write_rejected
from preftune.errors import BadRows, UserError
from preftune.method import Method
from preftune.parts import Parts
from preftune.team import current

HELD_OUT_SHARE, HELD_OUT_LEAST, HELD_OUT_MOST = 0.05, 200, 64


def load_data(parts: Parts, data: Any, trains: bool) -> None:
    """Data, prompts and held-out rows; refused rows go beside the output."""
    config = parts.config
    if parts.renderer is None:
        return
    draws = any(t.source.draws or t.source.on_policy for t in parts.method.terms)
    reserve = config.max_new_tokens if draws else 0
    # room for the control behind a prompt
    controls = building.controls_of(parts.method, parts.renderer.tokenizer) or ([],)
    reserve += max(map(len, controls))
    rejected: list[Rejected] = []
    try:
        if data is not None:
            _load_training(parts, data, reserve, rejected, trains)
        if config.prompts is not None:
            parts.prompts, _ = _load_rows(parts, config.prompts, "prompts", reserve, rejected)
        if trains and config.eval_data is not None:
            # pairs among them are measured too
            room, want = (0, "pairs") if parts.scores else (config.max_new_tokens, "any")
            parts.held_out, _ = _load_rows(parts, config.eval_data, want, room, rejected)
    except BadRows as error:
        rejected.extend(error.rejected)
        raise
    finally:
        if trains:
            _keep_rejected(parts, rejected)
    if trains and config.eval_data is None:
        _hold_out(parts)
    data = parts.data
    if parts.followed is not None and data is not None:  # those that are answered stay the same
        data = data.select(range(parts.followed.ends[0]))
    parts.prompts = parts.prompts or data


def _load_training(
    parts: Parts, data: Any, reserve: int, rejected: list[Rejected], trains: bool
) -> None:
    """The data that are trained on, and the row fitted to them."""
    want = loading.want_of(parts.method)
    waves: list[list[str]] = []
    path = Path(str(parts.config.data))
    if trains and parts.config.follow is not None:
        waves = following.begun(parts.output, parts.config)
        data = following.Wave(path, waves[0])
    parts.data, report = _load_rows(parts, data, want, reserve, rejected)
    parts.notes.append(loading.describe(parts.data, report, len(rejected)))
    parts.notes += loading.unused(parts.method, parts.data)
    scored = parts.reward is None and loading.has_scores(parts.data)
    parts.method = loading.fitted(parts.method, parts.data, scored=scored)
    if trains and "reward" in parts.method.needs and not (parts.reward or scored):
        raise no_reward(parts.method)
    if waves:

        def load(wave: following.Wave) -> tuple[Rows, list[Rejected]]:
            refused: list[Rejected] = []
            # a wave is few rows, of which one would be too large a share
            rows, _ = _load_rows(parts, wave, want, reserve, refused, bad_rows=1.0)
            return rows, refused

        def refuse(more: list[Rejected]) -> None:
            rejected.extend(more)
            _keep_rejected(parts, rejected)

        parts.followed = following.Followed(
            path=path, times=following.times_of(parts.config), load=load, refuse=refuse,
            scored=scored, waves=waves, rows=parts.data, ends=[len(parts.data)],
        )  # fmt: skip


def _load_rows(
    parts: Parts, source: Any, want: str, reserve: int, rejected: list[Rejected],
    bad_rows: float | None = None,
) -> tuple[Rows, Report]:  # fmt: skip
    """Rows of one source; what it refuses is added to `rejected`."""
    assert parts.renderer is not None, "a tokenizer is loaded where there is data"
    context = building.context_of(parts.model.model)
    config = parts.config
    if bad_rows is not None:
        config = config.model_copy(update={"bad_rows": bad_rows})
    rows, report, refused = loading.load_rows(
        source, config, parts.renderer, want=want, context=context, reserve=reserve
    )
    rejected.extend(refused)
    return rows, report


def _keep_rejected(parts: Parts, rejected: Sequence[Rejected]) -> None:
    """Refused rows stand beside the output, whether or not the run begins."""
    if rejected and current().main:
        path = Path(f"{parts.output}.rejected.jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_rejected(rejected, path)
        parts.notes.append(f"refused rows were kept in {path}")


def _hold_out(parts: Parts) -> None:
    """Set rows of the data aside for evaluation."""
    rows, config = parts.data, parts.config
    if rows is None:
        return
    if config.eval_fraction is not None:
        count = round(config.eval_fraction * len(rows))
    elif (parts.reward or parts.scores) and not parts.followed and len(rows) >= HELD_OUT_LEAST:
        count = min(int(HELD_OUT_SHARE * len(rows)), HELD_OUT_MOST)
    else:
        count = 0
    if count == 0:
        parts.notes.append(
            "no held-out prompts: give eval_data or eval_fraction to see reward and KL"
        )
        return
    if count == len(rows):
        raise UserError(
            f"eval_fraction: {config.eval_fraction} of {len(rows)} rows leaves none to train on."
        )
    kept, held = loading.split_off(rows, count, config.seed)
    if not held:
        parts.notes.append("no held-out prompts: every row has the same prompt; give eval_data")
        return
    parts.data, parts.held_out = rows.select(kept), rows.select(held)
    parts.notes.append(f"{len(held)} rows held out for evaluation")


def no_reward(method: Method) -> UserError:
    """What a row that judges responses says without a reward."""
    return UserError(
        f"reward: the method '{method.name}' judges responses and needs one, "
        "e.g. --reward length:within=20."
    )
