"""The rows of a run: what it trains on, the prompts that it answers, what is held out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from preftune import building, following, loading
from preftune.data import Rejected, Report, Rows, write_rejected
from preftune.errors import BadRows, UserError
from preftune.method import Method
from preftune.parts import Parts
from preftune.samples import DATA
from preftune.sources import origins
from preftune.team import current

HELD_OUT_SHARE, HELD_OUT_LEAST, HELD_OUT_MOST = 0.05, 200, 64


def load_data(parts: Parts, data: Any, trains: bool) -> None:
    """Data, prompts and held-out rows; refused rows go beside the output."""
    config = parts.config
    if parts.renderer is None:
        return
    _check_prompts(parts, trains)
    draws = parts.method.draws
    reserve = (config.max_new_tokens if draws else 0) + _control(parts)
    rejected: list[Rejected] = []
    try:
        if data is not None:
            _load_training(parts, data, reserve, rejected, trains)
        if config.prompts is not None:
            parts.prompts, _ = _load_rows(parts, config.prompts, "prompts", reserve, rejected)
        if trains and config.eval_data is not None:
            # pairs among them are measured too
            room, want = (0, "pairs") if parts.scores else (config.max_new_tokens, "any")
            room += _control(parts)
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
    if parts.prompts is None and data is not None:  # of which a method may draw nothing
        able = range(len(data)) if draws else _with_room(parts, data)
        parts.prompts = data.select(able) if 0 < len(able) < len(data) else data


def _control(parts: Parts) -> int:
    """Tokens of the longest control that stands behind a prompt."""
    assert parts.renderer is not None, "a tokenizer is loaded where there is data"
    return max(map(len, building.controls_of(parts.method, parts.renderer.tokenizer) or ([],)))


def _with_room(parts: Parts, rows: Rows) -> list[int]:
    """Rows whose prompts leave room for an answer in the model's context; a reward model answers
    nothing."""
    context = building.context_of(parts.model.model)
    if context is None or parts.scores:
        return list(range(len(rows)))
    most = context - parts.config.max_new_tokens - _control(parts)
    return [i for i, prompt in enumerate(rows.prompts) if len(prompt) <= most]


def _check_prompts(parts: Parts, trains: bool) -> None:
    """Refuse prompts of their own where their responses come from the data, and say where nothing
    is drawn to them."""
    if parts.config.prompts is None or not trains:
        return
    drawing = [t.source for t in parts.method.terms if t.source.draws]
    if any(source.reads for source in drawing):
        raise UserError(
            "prompts: the method sets the data's responses beside samples to the same prompts, so "
            "its prompts are those of the data. Leave prompts out."
        )
    if not drawing:
        parts.notes.append(
            f"prompts are not used: the method '{parts.method.name}' draws no responses to them"
        )


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
    judged = [t.source for t in parts.method.terms if "reward" in t.needs]
    # of what is drawn the data know no score
    known = scored and all(origin == DATA for source in judged for origin in origins(source))
    if trains and judged and not (parts.reward or known):
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
    if context is not None:  # a control stands before the response
        most = config.max_length or min(loading.DEFAULT_MAX_LENGTH, context)
        if most <= context < most + _control(parts):
            config = config.model_copy(update={"max_length": context - _control(parts)})
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
    """Set rows of the data aside for evaluation; where there are prompts alone, some of them, if
    they are asked for."""
    config = parts.config
    place = "data" if parts.data is not None else "prompts"
    rows: Rows | None = getattr(parts, place)
    if rows is None:
        return
    if config.eval_fraction is not None:
        count = round(config.eval_fraction * len(rows))
    elif place == "data" and _holds_by_itself(parts, rows):
        count = min(int(HELD_OUT_SHARE * len(rows)), HELD_OUT_MOST)
    else:
        count = 0
    if count == 0:
        _hold_nothing(parts, "give eval_data or eval_fraction to see reward and KL")
        return
    if count == len(rows):
        raise UserError(
            f"eval_fraction: {config.eval_fraction} of {len(rows)} rows leaves none to train on."
        )
    _, chosen = loading.split_off(rows, count, config.seed)
    if not chosen:
        _hold_nothing(parts, "every row has the same prompt; give eval_data")
        return
    able = set(_with_room(parts, rows))
    held = [i for i in chosen if i in able]
    if len(held) < len(chosen):
        parts.notes.append(
            f"{len(chosen) - len(held)} rows are not held out, and trained on: max_new_tokens does "
            "not fit behind their prompts"
        )
    if not held:
        _hold_nothing(parts, "lower max_new_tokens")
        return
    setattr(parts, place, rows.select(sorted(set(range(len(rows))) - set(held))))
    parts.held_out = rows.select(held)
    parts.notes.append(f"{len(held)} rows held out for evaluation")


def _holds_by_itself(parts: Parts, rows: Rows) -> bool:
    """Whether some rows are held out though nobody asked for it."""
    judged = parts.reward or parts.scores
    return bool(judged) and not parts.followed and len(rows) >= HELD_OUT_LEAST


def _hold_nothing(parts: Parts, cure: str) -> None:
    """Say so; what only an evaluation uses would be ignored.

    Raises:
        UserError: such a setting is given.
    """
    config = parts.config
    asked = [n for n in ("best_by", "judge", "retention") if getattr(config, n) is not None]
    if asked and config.eval_fraction != 0:  # who gives 0 wants none
        raise UserError(f"{asked[0]}: there are no held-out prompts: {cure}.")
    parts.notes.append(f"no held-out prompts: {cure}")


def no_reward(method: Method) -> UserError:
    """What a row that judges responses says without a reward."""
    return UserError(
        f"reward: the method '{method.name}' judges responses and needs one, "
        "e.g. --reward length:within=20."
    )
