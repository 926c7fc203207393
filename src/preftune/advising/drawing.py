"""Draws problems of known character, by family."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from preftune.advising.problem import (
    Features,
    Labels,
    Problem,
    draw_pairs,
    fit_reward,
)
from preftune.advising.stated import LabelSource, Prices
from preftune.numerics import stream_key
from preftune.policies.tree import all_responses, response_features
from preftune.theory.closed_form import tilted

STATES, VOCAB, LENGTH = 8, 6, 3
SIZE = VOCAB**LENGTH
BETAS = (0.05, 0.15, 0.4)
PAIRS = (400, 1200)
EPOCHS = (3.0, 6.0)
"""Of the pairs that the budget would pay for, if nothing else cost anything."""
MODELS = {"network": 0.5, "neighbours": 0.25, "tokens": 0.25}
"""What reward models see."""
RARE_NATS = 6.0
SHARED = 0.7
"""Of the variance of a random table, in what is the same for every state: what is learnt of one
prompt tells of another."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What a family decides: [S, A] each."""

    reference: Tensor
    """Log-probs."""
    reward: Tensor
    chosen_law: Tensor
    """Probabilities that a pair's first response is drawn from."""
    rejected_law: Tensor
    """And its second."""
    by_origin: bool = False
    """The first is always the chosen one; otherwise by Bradley-Terry."""
    noise: float = 0.0
    """Share of labels flipped."""
    features: Features | None = None
    """That reward models see; None: by chance."""


class _Draw:
    """Random tables of one problem, and the pieces that families are made from."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.seen = response_features(VOCAB, LENGTH)
        self.rare = bool(rng.random() < 0.5)
        """A token that the reference hardly ever says, in responses that are worth least."""

    def smooth(self) -> Tensor:
        """A random sum of features, of mean 0 and variance 1 in each state: a part that all states
        share, and a part of each."""
        size = self.seen.shape[1]
        weight = SHARED**0.5 * torch.from_numpy(self.rng.normal(size=(1, 1, size)))
        own = (1 - SHARED) ** 0.5 * torch.from_numpy(self.rng.normal(size=(STATES, 1, size)))
        return _standard(((weight + own) * self.seen).sum(-1))

    def reference(self) -> Tensor:
        energy = self.smooth() * self.rng.choice([0.7, 1.3])
        if self.rare:
            energy = energy - RARE_NATS * self._rare_count()
        return energy.log_softmax(-1)

    def reward(self, reference: Tensor, tie: float = 0.0, shape: Tensor | None = None) -> Tensor:
        """Of standard deviation 0.7 or 1.5; `tie` is its correlation with the log-probs."""
        free = self.smooth() if shape is None else _standard(shape)
        covered = torch.where(self._rare_count() > 0, torch.nan, reference)
        likely = _standard(covered.nan_to_num(float(np.nanmin(covered.numpy()))))
        reward = _standard(tie * likely + (1 - tie**2) ** 0.5 * free)
        reward = reward.clamp(-2.5, 2.5) * self.rng.choice([0.7, 1.5])
        if self.rare:
            reward = torch.where(self._rare_count() > 0, reward.min(), reward)
        return reward

    def modes(self) -> Tensor:
        """Likeness to the nearest of a few anchors."""
        tokens = all_responses(VOCAB, LENGTH)
        count = int(self.rng.integers(2, 5))
        anchors = torch.from_numpy(self.rng.integers(0, VOCAB, (STATES, count, LENGTH)))
        same = (tokens[None, None] == anchors[:, :, None]).double().mean(-1)
        return same.square().amax(1) + 0.05 * self.smooth()

    def _rare_count(self) -> Tensor:
        if not self.rare:
            return torch.zeros(SIZE).double()
        return (all_responses(VOCAB, LENGTH) == VOCAB - 1).sum(-1).double()


def _standard(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True)


def _plain(d: _Draw, tie: float = 0.0, **more: Any) -> Scene:
    ref = d.reference()
    law = more.pop("law", ref.exp())
    reward = more.pop("reward", None)
    reward = d.reward(ref, tie) if reward is None else reward
    return Scene(reference=ref, reward=reward, chosen_law=law, rejected_law=law, **more)


def _likely(d: _Draw) -> Scene:
    """The reward peaks where the reference is likely; data are its own."""
    return _plain(d, tie=0.7)


def _unlikely(d: _Draw) -> Scene:
    """The reward peaks where the reference is unlikely; data are its own."""
    return _plain(d, tie=-0.7)


def _narrow(d: _Draw) -> Scene:
    """Data are of a cold policy on half of the responses."""
    ref = d.reference()
    some = torch.from_numpy(d.rng.random((STATES, SIZE)) < 0.5)
    law = (2.5 * ref + d.smooth()).masked_fill(~some, -torch.inf).softmax(-1)
    return Scene(reference=ref, reward=d.reward(ref), chosen_law=law, rejected_law=law)


def _expert(d: _Draw) -> Scene:
    """Both responses of a pair are an expert's."""
    ref = d.reference()
    reward = d.reward(ref)
    law = (reward / 0.3).softmax(-1)
    return Scene(reference=ref, reward=reward, chosen_law=law, rejected_law=law)


def _anti(d: _Draw) -> Scene:
    """Data avoid what is good."""
    ref = d.reference()
    reward = d.reward(ref)
    law = (-reward / 0.5).softmax(-1)
    return Scene(reference=ref, reward=reward, chosen_law=law, rejected_law=law)


def _stale(d: _Draw) -> Scene:
    """Data are of an older policy; the reference has improved on it."""
    old = d.reference()
    reward = d.reward(old)
    new = tilted(old, reward, 0.7)
    return Scene(reference=new, reward=reward, chosen_law=old.exp(), rejected_law=old.exp())


def _several(d: _Draw) -> Scene:
    """Data of three policies: the reference, another model, one at random."""
    ref = d.reference()
    other = (1.3 * d.smooth()).softmax(-1)
    law = (ref.exp() + other + torch.full_like(other, 1 / SIZE)) / 3
    return Scene(reference=ref, reward=d.reward(ref), chosen_law=law, rejected_law=law)


def _noisy(d: _Draw) -> Scene:
    """A quarter of the labels are wrong."""
    return _plain(d, noise=0.25)


def _misspecified(d: _Draw) -> Scene:
    """Reward models see tokens alone, the reward lies in neighbours."""
    return _plain(d, features="tokens")


def _several_modes(d: _Draw) -> Scene:
    """Several equal peaks."""
    ref = d.reference()
    reward = d.reward(ref, shape=d.modes())
    return Scene(reference=ref, reward=reward, chosen_law=ref.exp(), rejected_law=ref.exp())


def _broad(d: _Draw) -> Scene:
    """Data are uniform."""
    ref = d.reference()
    law = torch.full_like(ref, 1 / SIZE)
    return Scene(reference=ref, reward=d.reward(ref), chosen_law=law, rejected_law=law)


def _strong(d: _Draw) -> Scene:
    """The chosen is a strong model's, the rejected the reference's own, whatever they are worth."""
    ref = d.reference()
    reward = d.reward(ref)
    strong = (d.smooth() + reward / 0.5).softmax(-1)
    return Scene(
        reference=ref, reward=reward, chosen_law=strong, rejected_law=ref.exp(), by_origin=True
    )


FAMILIES: dict[str, Callable[[_Draw], Scene]] = {
    "likely": _likely, "unlikely": _unlikely, "narrow": _narrow, "expert": _expert,
    "anti": _anti, "stale": _stale, "several_policies": _several, "noisy": _noisy,
    "misspecified": _misspecified, "several_modes": _several_modes, "broad": _broad,
    "strong_against_own": _strong,
}  # fmt: skip
SOURCES: dict[LabelSource, float] = {"rm_same": 0.4, "rm_other": 0.25, "human": 0.35}


def name_of(number: int) -> str:
    """Of a problem, and of its file."""
    return f"{list(FAMILIES)[number % len(FAMILIES)]}-{number:04d}"


def draw(number: int, seed_base: int = 0) -> Problem:
    """Problem `number`; families take turns, all else is by chance."""
    rng = np.random.default_rng([seed_base, number])
    family = list(FAMILIES)[number % len(FAMILIES)]
    d = _Draw(rng)
    scene = FAMILIES[family](d)
    pairs = int(rng.choice(PAIRS))
    table = _pairs(scene, pairs, stream_key(seed_base, number, "pairs"))
    source = source_of(rng)
    features: Features = scene.features or rng.choice(list(MODELS), p=list(MODELS.values())).item()
    other = _other_model(scene, features, stream_key(seed_base, number, "other"))
    return Problem(
        name=name_of(number), family=family, states=STATES, vocab=VOCAB, length=LENGTH,
        reference=scene.reference.tolist(), reward=scene.reward.tolist(), pairs=table.tolist(),
        labels=Labels(
            source=source, features=features,
            reward=other.tolist() if source == "rm_other" else None,
        ),
        about={"rare_token": d.rare, "noise": scene.noise}, **stakes(source, pairs, rng),
    )  # fmt: skip


def source_of(rng: np.random.Generator) -> LabelSource:
    """Who labels."""
    return rng.choice(list(SOURCES), p=list(SOURCES.values())).item()


def stakes(source: LabelSource, pairs: int, rng: np.random.Generator) -> dict[str, Any]:
    """Prices, beta and budget."""
    label = float(rng.choice([3.0, 10.0, 30.0] if source == "human" else [0.1, 0.3]))
    prices = Prices(label=label, sample=float(rng.choice([0.3, 1.0, 3.0])))
    beta, epochs = float(rng.choice(BETAS)), float(rng.choice(EPOCHS))
    return {"prices": prices, "beta": beta, "budget": 2.0 * pairs * epochs}


def _pairs(scene: Scene, count: int, key: int) -> Tensor:
    laws = torch.stack([scene.chosen_law, scene.rejected_law])
    return draw_pairs(
        laws, scene.reward, count, key, noise=scene.noise, by_origin=scene.by_origin
    )  # fmt: skip


def _other_model(scene: Scene, features: Features, key: int) -> Tensor:
    """A reward model of 1600 other pairs: half the reference's, half at random, one label in ten
    wrong."""
    half = torch.full_like(scene.reward, 0.5 / SIZE) + 0.5 * scene.reference.exp()
    other = Scene(
        reference=scene.reference, reward=scene.reward, chosen_law=half, rejected_law=half,
        noise=0.1,
    )  # fmt: skip
    return fit_reward(_pairs(other, 1600, key), (STATES, VOCAB, LENGTH), features, 0.03)
