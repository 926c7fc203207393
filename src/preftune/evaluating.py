"""`preftune evaluate`: every figure of a model that the settings allow, and notes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from preftune import automatic, building, held_out, judges, judging, loading, rewards
from preftune.config import Config
from preftune.data import Renderer, Rows
from preftune.evaluate import Answers, answer, best_of_n, figures, forward_kl
from preftune.figures import Figures, displacement
from preftune.likelihoods import pair_figures, plain_text, retention, windows
from preftune.policies.transformer import Transformer
from preftune.runs import RunFolder

Tick = Callable[[str], Callable[[int, int], None]]
"""The name of a stage to its progress (done, total)."""


@dataclass(kw_only=True)
class _Job:
    """What is evaluated, and what was found of it."""

    config: Config
    policy: Transformer
    reference: Transformer | None
    tokenizer: Any
    rows: Rows
    renderer: Renderer
    reward: rewards.Reward | None
    gold: rewards.Reward | None
    pairs: Rows | None
    """Held-out pairs, where `data` holds them."""
    tick: Tick
    found: Figures = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def budget(self) -> int:
        """Tokens in one forward pass."""
        return self.config.micro_batch_tokens or automatic.CPU_ROW_BUDGET

    def answers(
        self,
        of: Transformer,
        stage: str,
        away_from: Transformer | None = None,
        samples: int | None = None,
        prompts: int | None = None,
    ) -> Answers:
        """Judged answers of one policy."""
        named = {
            r.name: judges.judge_of(r, self.rows, self.renderer)
            for r in (self.reward, self.gold)
            if r is not None
        }
        return answer(
            of, away_from, self.rows, named, seed=self.config.seed, num_prompts=prompts,
            samples_per_prompt=samples or self.config.samples_per_prompt or 1,
            micro_batch_tokens=self.budget, log_ratio=away_from is not None,
            own=building.decoding_of(self.config).unmodified, progress=self.tick(stage),
        )  # fmt: skip


def evaluate(
    config: Config,
    tick: Tick = lambda stage: lambda done, total: None,
    best_of: int | None = None,
) -> tuple[Figures, list[str]]:
    """The figures of `preftune.evaluate.DOCUMENTED`, and notes for the user.

    Args:
        best_of: reference samples a prompt for best-of-n, on all prompts; 0 leaves it out, None
            takes 16 on so many prompts that the cost stays within a few evaluations.
    Raises:
        UserError: something given cannot be used.
    """
    server = None if config.judge is None else judging.connect(config.judge)
    if server is not None:
        judging.check(server)  # before models are loaded and samples drawn
    texts = None if config.retention is None else plain_text(config.retention)
    job = _load(config, tick)
    mine = job.answers(job.policy, "samples", away_from=job.reference)
    if not mine.own:
        job.notes.append(
            "decoding is not temperature 1, top-p 1, top-k 0 without a least length: no KL, "
            "entropy and best-of-n, which would be those of another distribution"
        )
    against = None
    if job.reference is not None:
        against = job.answers(job.reference, "reference")
    job.found |= figures(mine, against, config.seed)
    job.found |= held_out.spread_figures(job.reward, mine, job.rows, job.renderer, config.seed)
    if job.reference is not None and against is not None:
        job.found |= forward_kl(job.policy, job.reference, against, job.budget, config.seed)
        _best_of_n(job, mine, best_of)
    _judge(job, server, mine, against)
    _pairs(job)
    _retention(job, texts)
    _say_what_is_missing(job)
    return job.found, job.notes


def _load(config: Config, tick: Tick) -> _Job:
    """The models, prompts and rewards."""
    device = building.pick_device(config.device)
    reward = judges.make_reward(config.reward, config.reward_weights, device)
    gold = judges.make_reward(config.gold, None, device)
    run = _run_of(config)
    reference_name = config.reference or run.get("reference") or run.get("model")
    policy, tokenizer = loading.model_of(config, config.model)
    rows, renderer = loading.prompts_of(config, policy, tokenizer)
    reference = None
    notes = []
    if reference_name is not None:
        reference = building.make_reference(
            config.model_copy(update={"reference": reference_name}), policy
        )
        notes.append(f"reference: {reference_name}")
    else:
        notes.append("no reference given: no KL, no win rate, no best-of-n")
    if rewards.is_open(reward) or rewards.is_open(gold):
        target = judges.measured_mode(reference or policy, rows)
        reward, gold = (r and rewards.aimed(r, target) for r in (reward, gold))
    if reward is not None and run.get("reward") in (reward.name, config.reward):
        notes.append(
            "reward is a proxy: the run was trained or watched by it. --gold takes a reward that "
            "it has never seen"
        )
    if gold is not None and run.get("reward") in (gold.name, config.gold):
        notes.append("gold is the reward of the run itself, so it is no gold: read it as a proxy")
    return _Job(
        config=config, policy=policy, reference=reference, tokenizer=tokenizer, rows=rows,
        renderer=renderer, reward=reward, gold=gold, tick=tick, notes=notes,
        pairs=_pairs_of(config, policy, reference, renderer, notes),
    )  # fmt: skip


def _pairs_of(
    config: Config,
    policy: Transformer,
    reference: Transformer | None,
    renderer: Renderer,
    notes: list[str],
) -> Rows | None:
    """The pairs in `data`, or a note on why there are none to measure."""
    if config.data is None:
        return None
    rows, _, _ = loading.load_rows(
        config.data, config, renderer, want="any", context=building.context_of(policy.model)
    )
    if rows.kind != "pairs":
        notes.append(f"no figures of pairs: data holds {rows.kind}")
    elif reference is None:
        notes.append("no figures of the pairs in data: they need a reference")
    else:
        return rows
    return None


def _run_of(config: Config) -> Mapping[str, Any]:
    """The settings of the run whose model is evaluated, where it is a run's."""
    for folder in (Path(config.model), Path(config.model).parent):
        if (folder / "config.yaml").is_file():
            return RunFolder(folder).read_config()
    return {}


def _best_of_n(job: _Job, mine: Answers, samples: int | None) -> None:
    """Best-of-n from the reference, and the policy's share of its gain."""
    if job.reference is None or samples == 0 or not mine.rewards or not mine.own:
        return
    asked = len(job.rows)
    prompts = asked if samples else held_out.best_of_prompts(asked, held_out.BEST_OF)
    m = samples or held_out.BEST_OF
    drawn = job.answers(job.reference, "best of n", samples=m, prompts=prompts)
    found, notes = best_of_n(drawn, mine.first(prompts), job.config.seed)
    job.found |= found
    if prompts < asked:
        notes.append(
            f"best-of-n: {m} samples to each of {prompts} prompts; --best-of-n 64 takes 64 to each "
            f"of the {asked}"
        )
    job.notes += notes


def _judge(
    job: _Job, server: judging.Server | None, mine: Answers, against: Answers | None
) -> None:
    if server is None:
        return
    if against is None:
        job.notes.append("no judge_win_rate: it is against a reference, and none is given")
        return
    job.found |= held_out.judge_figures(
        server, mine, against, job.rows, job.renderer, job.config.seed, job.tick("judge")
    )
    share = job.found["judge_malformed"]["value"]
    if share:
        job.notes.append(f"judge: {share:.1%} of its answers named no winner; they count as ties")


def _pairs(job: _Job) -> None:
    """Figures of held-out pairs."""
    if job.pairs is None or job.reference is None:
        return
    job.found |= pair_figures(
        job.policy, job.reference, job.pairs, job.budget, job.config.seed, job.tick("pairs")
    )
    warning = displacement(job.found)
    if warning:
        job.notes.append(warning)


def _retention(job: _Job, texts: list[str] | None) -> None:
    """Likelihood of plain text."""
    if texts is None:
        return
    config = job.config
    context = building.context_of(job.policy.model)
    size = min(config.max_length or loading.DEFAULT_MAX_LENGTH, context or 10**9)
    job.found |= retention(
        job.policy, job.reference, windows(texts, job.tokenizer, size), job.budget,
        config.seed, job.tick("plain text"),
    )  # fmt: skip


def _say_what_is_missing(job: _Job) -> None:
    """A figure that needs what was not given is left out, and said."""
    found, notes = job.found, job.notes
    if job.reward is None:
        notes.append("no reward given: no reward, win rate and best-of-n")
    if "win_rate" in found and "win_rate_length_controlled" not in found:
        notes.append(
            "no win_rate_length_controlled: every answer is longer than the reference's, or every "
            "one shorter, so nothing is known of equal lengths"
        )
    if "best_of_1" in found and "best_of_n_share" not in found:
        notes.append(
            "no best_of_n_share: the KL is under 0.01 nats, or best-of-n's gain there cannot be "
            "told from none"
        )
