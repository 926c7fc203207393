"""What the pieces of one seed and problem stand on: a reference, pairs and a reward model; what a
policy does there; and the checks of a device.
"""

import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from gpu import Check
from study_parts import (
    Rows,
    Say,
    Stop,
    Study,
    distinct_prompts,
    facts_of,
    keep,
    kept,
    new_model,
    repeatable,
    run_loop,
    texts_of,
)
from torch import Tensor

from preftune import huggingface, loop, methods
from preftune.collecting import Source
from preftune.evaluate import Answers, answer
from preftune.figures import wins
from preftune.fingerprint import of_weights
from preftune.numerics import masked_sum, stream_key, uniform
from preftune.policies.scoring import micro_batches, score_all
from preftune.policies.transformer import Transformer
from preftune.reward_kinds import Judged, Length
from preftune.reward_model import RewardModel
from preftune.rounds import World
from preftune.samples import Samples, pad_stack
from preftune.sampling.decoding import Decoding
from preftune.sources import Offline

LONGEST_PROMPT = 256
"""Tokens; longer prompts of a file are left out."""


def aimed_at(problem: str, mode: int) -> Length:
    """The true reward."""
    return Length("mode", mode) if problem == "mode" else Length("min")


def judged(reward: Length, lengths: Tensor) -> Tensor:
    """Rewards of responses of these lengths."""
    found = reward(Judged(prompts=[], completions=[], tokens=lengths.flatten().tolist()))
    return torch.tensor(found, dtype=torch.float64).view(lengths.shape)


def cut(rows: Rows, mean: float, key: int, end: int) -> Rows:
    """Responses ended after exponential numbers of tokens, of this mean, where they are longer."""
    n, k, width = rows.tokens.shape
    u = uniform(key, torch.arange(n)[:, None], torch.arange(k))
    most = (1 - mean * (1 - u).log()).long().clamp(max=width - 1)
    long = rows.lengths() > most
    place = torch.arange(width)
    here = long.unsqueeze(-1) & (place == most.unsqueeze(-1))
    short = place <= most.unsqueeze(-1)
    return replace(
        rows, tokens=rows.tokens.masked_fill(here, end), finished=rows.finished | long,
        mask=torch.where(long.unsqueeze(-1), short, rows.mask),
    )  # fmt: skip


def ranked(rows: Rows, reward: Length) -> Rows:
    """Pairs, the better response first; ties are left out."""
    value = judged(reward, rows.lengths())
    order = value.argsort(dim=-1, descending=True, stable=True)
    return rows.ordered(order).at((value[:, 0] != value[:, 1]).nonzero().squeeze(-1))


@dataclass(kw_only=True)
class Ground:
    """What the pieces of one seed and problem stand on; made where it is not there."""

    study: Study
    seed: int
    problem: str
    folder: Path
    device: torch.device
    stop: Stop = lambda: False
    say: Say = lambda text: None

    @property
    def home(self) -> Path:
        """Of the seed."""
        return self.folder / f"seed-{self.seed}"

    @property
    def reference_folder(self) -> Path:
        """Given, or the seed's own."""
        return Path(self.study.model) if self.study.model else self.home / "reference"

    def make(self) -> None:
        """Everything that is kept."""
        _ = self.reference, self.pairs, self.proxy

    def take_over(self, other: "Ground") -> None:
        """What another problem of the same seed has made: it is the same."""
        names = ("model", "reference", "fingerprint", "drawn", "asked", "mode")
        self.__dict__.update({n: other.__dict__[n] for n in names if n in other.__dict__})

    @cached_property
    def tokenizer(self) -> Any:
        """Of a model from a folder; the generated language has none."""
        return huggingface.load_tokenizer(self.study.model) if self.study.model else None

    @cached_property
    def model(self) -> Any:
        """The reference's weights, float32."""
        if not self.study.model and not kept(self.reference_folder):
            with repeatable(self.device):
                self._train_reference()
        loaded = huggingface.load_model(str(self.reference_folder), torch.float32)
        return loaded.to(self.device)

    def policy(self, value_head: bool = False) -> Transformer:
        """A policy that begins as the reference."""
        model = copy.deepcopy(self.model).requires_grad_(True)
        return self._policy(model, value_head)

    def _policy(self, model: Any, value_head: bool = False) -> Transformer:
        return Transformer(
            model, end_ids=huggingface.end_ids(model, self.tokenizer), autocast=self.study.autocast,
            decoding=Decoding(max_new_tokens=self.study.max_new_tokens), value_head=value_head,
            **self.study.layouts,
        )  # fmt: skip

    def world(self, policy: Any, **more: Any) -> World:
        """What rounds are made from, most of it left out."""
        parts: dict[str, Any] = {
            "reference": None, "data": None, "prompts": None, "reward": None, "seed": self.seed,
            "batch_size": self.study.batch, "micro_batch_tokens": self.study.pass_tokens,
        }  # fmt: skip
        return World(policy=policy, **(parts | more))

    def _train_reference(self) -> None:
        study, began = self.study, time.perf_counter()
        self.say(f"seed {self.seed}: training a reference ({study.shape})")
        texts = texts_of(study, self.seed)
        policy = self._policy(new_model(study, self.seed).to(self.device))
        settings = loop.Settings(
            max_steps=study.sft_steps, learning_rate=study.sft_rate, lr_schedule="cosine",
            log_every=max(1, study.sft_steps // 4),
        )  # fmt: skip
        world = self.world(policy, data=texts, batch_size=study.sft_batch)
        log = run_loop(methods.get("sft"), world, settings, self.stop)
        facts = {
            "weights": sum(p.numel() for p in policy.parameters()), "loss": log.last["loss"],
            "seconds": time.perf_counter() - began,
            "text_lengths": texts.lengths().double().mean().item(),
        }  # fmt: skip
        keep(policy.model, self.reference_folder, facts)
        self.say(
            f"  {facts['seconds']:.0f} s, {facts['weights']} weights, loss {facts['loss']:.3f}"
        )

    @cached_property
    def reference(self) -> Transformer:
        """The frozen policy that pairs are drawn from and KL is measured to."""
        return self._policy(self.model).frozen_copy()

    @cached_property
    def fingerprint(self) -> str:
        """Of the reference's weights: pieces of one seed must stand on the same."""
        return of_weights(self.model)[:16]

    def prompts(self) -> tuple[Tensor, Tensor]:
        """Those that are trained on, then those that are held out; no two are alike."""
        count = self.study.pairs + self.study.held_out
        if not self.study.model:
            return distinct_prompts(self.study, self.seed, "pairs", count)
        ids = file_prompts(self.study, self.model, self.tokenizer)
        order = uniform(stream_key(self.seed, "file"), torch.arange(len(ids))).argsort()
        return pad_stack([torch.tensor(ids[i]) for i in order[:count].tolist()], left=True)

    @cached_property
    def drawn(self) -> Rows:
        """Two answers of the reference to each prompt."""
        prompt, mask = self.prompts()
        key = stream_key(self.seed, "drawn")

        def stream(t: int, shape: tuple[int, ...]) -> Tensor:
            return uniform(key, t, torch.arange(shape[0])[:, None], torch.arange(shape[1]))

        s = self.reference.sample(prompt, mask, 2, stream, -1)
        return Rows(
            prompt=prompt, prompt_mask=mask, tokens=s.tokens, mask=s.mask, finished=s.finished
        )

    @cached_property
    def asked(self) -> str:
        """Fingerprint of the prompts: what was trained on others may have seen these held-out
        ones."""
        rows = self.drawn
        return f"{stream_key(rows.prompt.masked_fill(~rows.prompt_mask, -1).tolist()):016x}"

    @cached_property
    def mode(self) -> int:
        """The most frequent length of the reference's answers to the prompts trained on; of those
        that ended, where any did: all that are cut are equally long."""
        rows = self.drawn.at(torch.arange(len(self.drawn))[: -self.study.held_out])
        lengths = rows.lengths()[rows.finished] if rows.finished.any() else rows.lengths()
        return max(1, int(lengths.flatten().bincount().argmax()))

    @property
    def gold(self) -> Length:
        """The true reward, which nothing learned is asked for."""
        return aimed_at(self.problem, self.mode)

    @cached_property
    def pairs(self) -> Rows:
        """Of the prompts trained on; ranked by the true reward."""
        return self._ranked(slice(None, -self.study.held_out))

    @cached_property
    def held_out(self) -> Rows:
        """Pairs of other prompts."""
        return self._ranked(slice(-self.study.held_out, None))

    def _ranked(self, which: slice) -> Rows:
        drawn = self.drawn
        if self.problem == "skew":
            mean = self.study.skew * float(drawn.lengths().double().mean())
            end = self.reference.end_ids[0]
            drawn = cut(drawn, mean, stream_key(self.seed, "skew"), end)
        found = ranked(drawn.at(torch.arange(len(drawn))[which]), self.gold)
        if not len(found):
            raise ValueError(
                f"{self.problem}: the reference's answers to a prompt are all of one length, so no "
                "pair is left. Raise --max-new-tokens: answers that are cut are equally long."
            )
        return found

    @cached_property
    def judged_prompts(self) -> Rows:
        """The held-out prompts, all of them: those whose pair ties too."""
        return self.drawn.at(torch.arange(len(self.drawn))[-self.study.held_out :])

    @cached_property
    def proxy(self) -> Callable[[Samples], Tensor]:
        """What fresh samples are judged by: the learned reward or the true one."""
        if self.study.reward == "true":
            return self.true_reward
        folder = self.home / f"reward-{self.problem}"
        if not kept(folder) or facts_of(folder).get("prompts") != self.asked:
            with repeatable(self.device):
                self._train_reward(folder)
        model = huggingface.classifier_from(str(folder), torch.float32).to(self.device)
        model = RewardModel(model, autocast=self.study.autocast, **self.study.layouts)
        return lambda samples: self.scores(model, samples)

    def true_reward(self, samples: Samples) -> Tensor:
        """By the length alone."""
        return judged(self.gold, samples.lengths() - samples.finished.long())

    @torch.no_grad()
    def scores(self, model: RewardModel, samples: Samples) -> Tensor:
        """A reward model's, in passes that fit."""
        out = torch.zeros(samples.finished.shape, dtype=torch.float64)
        for index in micro_batches(samples, self.study.pass_tokens):
            part = samples.take(index).trimmed()
            out[index] = model.score(part.prompt, part.prompt_mask, part.tokens, part.mask).double()
        return out

    def _train_reward(self, folder: Path) -> None:
        study, began = self.study, time.perf_counter()
        self.say(f"seed {self.seed}, {self.problem}: training a reward model")
        pairs = self.pairs  # the reference is there after this
        loaded = huggingface.classifier_from(str(self.reference_folder), torch.float32)
        model = RewardModel(loaded.to(self.device), autocast=study.autocast, **study.layouts)
        settings = loop.Settings(
            max_steps=study.reward_steps, learning_rate=study.reward_rate, lr_schedule="cosine",
            log_every=study.reward_steps,
        )  # fmt: skip
        world = self.world(model, data=pairs)
        log = run_loop(methods.get("reward"), world, settings, self.stop)
        score = self.scores(model, self.held_out.everything())
        facts = {
            "loss": log.last["loss"], "accuracy": float(wins(score[:, 0], score[:, 1]).mean()),
            "pairs": len(pairs), "prompts": self.asked, "seconds": time.perf_counter() - began,
        }  # fmt: skip
        keep(model.model, folder, facts)
        self.say(f"  {facts['seconds']:.0f} s, accuracy on held-out pairs {facts['accuracy']:.3f}")

    def facts(self) -> dict[str, Any]:
        """What is known of it, for a piece's file; all of it is there afterwards."""
        self.make()
        lengths = self.drawn.lengths().double()
        found: dict[str, Any] = {
            "reference": self.fingerprint, "prompts": self.asked,
            "pairs": len(self.pairs), "mode": self.mode,
            "reference_length": float(lengths.mean()), "length_deviation": float(lengths.std()),
            "pair_lengths": self.pairs.lengths().double().mean(0).tolist(),
        }  # fmt: skip
        if not self.study.model:
            found["sft"] = facts_of(self.reference_folder)
        if self.study.reward == "learned":
            found["reward_model"] = facts_of(self.home / f"reward-{self.problem}")
        return found

    # --- what a policy does

    @cached_property
    def pair_logp(self) -> Tensor:
        """Log-probs of all pairs by the reference, [n, 2, T]."""
        return score_all(self.reference, self.pairs.everything(), self.study.pass_tokens)

    def known(self, source: Source, samples: Samples) -> Tensor | None:
        """Those of a source that reads whole pairs and nothing else; see `World.known`."""
        whole = isinstance(source, Offline) and source.take == "all"
        return self.pair_logp[samples.row] if whole else None

    @cached_property
    def held_out_logp(self) -> Tensor:
        """Of each response of the held-out pairs, [n, 2]."""
        return self.summed(self.reference)

    def summed(self, policy: Transformer) -> Tensor:
        """Log-probs of whole responses of the held-out pairs."""
        s = self.held_out.everything()
        return masked_sum(score_all(policy, s, self.study.pass_tokens), s.mask).double()

    def answers(self, policy: Transformer) -> Answers:
        """To the held-out prompts, judged by both rewards; the same random numbers each time."""
        judges = {"proxy": self.proxy, "gold": self.true_reward}
        return answer(
            policy, self.reference, self.judged_prompts, judges,
            samples_per_prompt=self.study.samples, seed=self.seed,
            micro_batch_tokens=self.study.pass_tokens, batch_prompts=len(self.judged_prompts),
        )  # fmt: skip

    @cached_property
    def base_gold(self) -> Tensor:
        """True rewards of the reference's answers."""
        return self.answers(self.reference).rewards["gold"]

    def figures(self, policy: Transformer) -> dict[str, float]:
        """Of a checkpoint, by the names of `FIGURES`."""
        found = self.answers(policy)
        gold, proxy = (found.rewards[n].double() for n in ("gold", "proxy"))
        assert found.kl is not None, "answers are measured against the reference"
        ratio = self.summed(policy) - self.held_out_logp
        error = gold.mean(-1).std() / math.sqrt(len(gold)) if len(gold) > 1 else torch.nan
        return {
            "gold": float(gold.mean()), "gold_error": float(error), "proxy": float(proxy.mean()),
            "win_rate": float(wins(gold, self.base_gold).mean()),
            "kl": float(found.kl.mean()), "length": float(found.lengths().double().mean()),
            "no_end": float((~found.samples.finished).double().mean()),
            "log_ratio_chosen": float(ratio[:, 0].mean()),
            "log_ratio_rejected": float(ratio[:, 1].mean()),
            "accuracy": float(wins(ratio[:, 0], ratio[:, 1]).mean()),
        }  # fmt: skip


def file_prompts(study: Study, model: Any, tokenizer: Any) -> list[list[int]]:
    """Prompts of a file as the model's own tokenizer and template have them, each once."""
    from preftune.data.chat import Renderer

    package = Path(huggingface.__file__).parent / "data" / "default" / "prompts.jsonl"
    path = Path(study.prompts) if study.prompts else package
    renderer = Renderer(tokenizer, end_ids=huggingface.end_ids(model, tokenizer))
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    found = [renderer.prompt_ids(row.get("prompt") or row["instruction"]) for row in rows]
    context = getattr(model.config, "max_position_embeddings", None) or 10**9
    room = min(LONGEST_PROMPT, context - study.max_new_tokens)
    found = [list(ids) for ids in dict.fromkeys(map(tuple, found)) if len(ids) <= room]
    if len(found) < 2 * study.held_out:
        raise ValueError(
            f"{path}: {len(found)} prompts are too few for {study.held_out} held-out ones and as "
            "many to train on. Lower --held-out."
        )
    return found


# --- checks ---------------------------------------------------------------------------------------

TOLERANCES = {"float32": (1e-3, 1e-4), "bfloat16": (0.25, 0.03)}
"""Nats that a token's log-prob may be away from float64 at most, and in the mean. bfloat16 has
eight bits: a logit of 10 is known to 0.04."""
AT_START = {"float32": (1e-5, 1e-5), "bfloat16": (1e-2, 1e-2)}
"""The first DPO loss less ln 2, and the KL before the first update, nats."""


def checks(ground: Ground) -> list[Check]:
    """Of this device: log-probs against float64, and a policy that has not moved."""
    study, found = ground.study, []
    rows = ground.pairs.at(torch.arange(min(8, len(ground.pairs)))).everything().trimmed()
    ends = ground.reference.end_ids
    exact = Transformer(
        copy.deepcopy(ground.model).double(), end_ids=ends, packing=False, share_prefix=False
    )
    truth = score_all(exact, rows, None)[rows.mask]
    for name, autocast in (("float32", None), ("bfloat16", torch.bfloat16)):
        model = copy.deepcopy(ground.model)
        policy = Transformer(model, end_ids=ends, autocast=autocast, **study.layouts)
        mine = score_all(policy, rows, None)
        off = (mine[rows.mask].double() - truth).abs()
        most, mean = TOLERANCES[name]
        found.append(Check(f"{name} against float64: a log-prob, nats", float(off.max()), most))
        found.append(Check(f"{name} against float64: mean, nats", float(off.mean()), mean))
    loss, kl = AT_START[study.dtype]
    first = float(first_loss(ground)) - math.log(2)
    found.append(Check(f"{study.dtype}: first DPO loss less ln 2", abs(first), loss))
    base = ground.answers(ground.policy()).kl
    assert base is not None, "answers are measured against the reference"
    found.append(Check(f"{study.dtype}: KL before training", float(base.abs().max()), kl))
    return found


def first_loss(ground: Ground) -> float:
    """Of DPO, by the loop's own update at rate 0."""
    row = methods.resolve(methods.get("dpo"))
    world = ground.world(ground.policy(), reference=ground.reference, data=ground.pairs)
    settings = loop.Settings(max_steps=1, learning_rate=0.0)
    return loop.update(loop.start(row, world, settings), settings)["loss"]
