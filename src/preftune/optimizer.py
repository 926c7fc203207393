"""AdamW for one model, and for R runs that advance together: a rate, a norm and a count a run."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.optim.adamw import adamw

from preftune.numerics import whole

BETAS, EPS = (0.9, 0.999), 1e-8
ALIGNED = 16
"""Numbers that a fused update takes at once: of a size that this divides, no run has a remainder,
which is computed (and rounded) by other instructions than the rest."""


@runtime_checkable
class Optimizer(Protocol):
    """What an update asks for, one model or many."""

    def zero_grad(self) -> None:
        """Forget the gradients."""
        ...

    def clip(self, max_norm: float) -> Float[Tensor, "*R"]:
        """Scale each run's whole gradient to at most that norm; its norm before."""
        ...

    def step(self, rate: float | Tensor, active: Bool[Tensor, "*R"]) -> None:
        """Move the weights of the active runs, each at its rate (one, or [*R])."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """As torch's optimizers give it."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The reverse."""
        ...


def make(
    parameters: Iterable[Tensor], batch_shape: tuple[int, ...], weight_decay: float
) -> Optimizer:
    """AdamW (Loshchilov and Hutter 2017, arXiv 1711.05101) for a policy of that batch shape."""
    found = list(parameters)
    if batch_shape:
        return Stacked(found, batch_shape[0], weight_decay)
    return Single(found, weight_decay)


class Single:
    """torch's own, fused, for one model."""

    def __init__(self, parameters: list[Tensor], weight_decay: float) -> None:
        self._parameters = parameters
        self._own = torch.optim.AdamW(
            parameters, betas=BETAS, eps=EPS, weight_decay=weight_decay, fused=True
        )

    def zero_grad(self) -> None:
        """See `Optimizer.zero_grad`."""
        self._own.zero_grad(set_to_none=True)

    def clip(self, max_norm: float) -> Float[Tensor, ""]:
        """See `Optimizer.clip`."""
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, max_norm)
        return whole(norm).cpu()

    def step(self, rate: float | Tensor, active: Bool[Tensor, ""]) -> None:
        """See `Optimizer.step`."""
        if not active:
            return
        for group in self._own.param_groups:
            group["lr"] = float(rate)
        self._own.step()

    def state_dict(self) -> dict[str, Any]:
        """See `Optimizer.state_dict`."""
        return self._own.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Optimizer.load_state_dict`."""
        self._own.load_state_dict(dict(state))


class Stacked:
    """The same for R runs whose parameters are [R, ...].

    Neighbouring runs of one rate and one count of steps are updated together. What a run gets does
    not depend on who its neighbours are, to the last bit.
    """

    def __init__(self, parameters: list[Tensor], runs: int, weight_decay: float) -> None:
        assert all(p.shape[0] == runs for p in parameters), "parameters begin with the run axis"
        self._parameters, self._runs, self._decay = parameters, runs, weight_decay
        self._mean = [torch.zeros_like(p) for p in parameters]
        self._square = [torch.zeros_like(p) for p in parameters]
        self._steps = torch.zeros(runs)

    def zero_grad(self) -> None:
        """See `Optimizer.zero_grad`."""
        for p in self._parameters:
            p.grad = None

    def clip(self, max_norm: float) -> Float[Tensor, " R"]:
        """See `Optimizer.clip`."""
        grads = [p.grad for p in self._parameters if p.grad is not None]
        squares = [torch.linalg.vector_norm(g.flatten(1), dim=1).double().square() for g in grads]
        norm = torch.stack(squares).sum(0).sqrt()
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        if bool(
            (factor < 1).any()
        ):  # a factor of 1 changes no bit: who else is cut does not matter
            for g in grads:
                g.mul_(_wide(factor, g))
        return norm

    @torch.no_grad()
    def step(self, rate: float | Tensor, active: Bool[Tensor, " R"]) -> None:
        """See `Optimizer.step`."""
        rates = torch.as_tensor(rate, dtype=torch.float64).expand(self._runs)
        blocks = list(_blocks(rates, self._steps, active))
        plain = [i for i, p in enumerate(self._parameters) if p[0].numel() % ALIGNED]
        fused = [i for i in range(len(self._parameters)) if i not in plain]
        for block, own_rate in blocks:
            self._fused(fused, block, own_rate)
        self._steps += active
        for i in plain:
            self._plain(i, rates, active)

    def _fused(self, which: list[int], block: slice, rate: float) -> None:
        """One pass over memory for the runs of a block."""
        which = [i for i in which if self._parameters[i].grad is not None]
        if not which:
            return
        grads = [g[block] for i in which if (g := self._parameters[i].grad) is not None]
        adamw(
            [self._parameters[i].detach()[block] for i in which],
            grads,
            [self._mean[i][block] for i in which],
            [self._square[i][block] for i in which],
            [],
            [self._steps[block.start].clone() for _ in which],
            fused=True, foreach=False, amsgrad=False, maximize=False,
            beta1=BETAS[0], beta2=BETAS[1], lr=rate, weight_decay=self._decay, eps=EPS,
        )  # fmt: skip

    def _plain(self, i: int, rates: Tensor, active: Tensor) -> None:
        """The same in separate operations, which round alike wherever a run stands."""
        p, grad = self._parameters[i], self._parameters[i].grad
        if grad is None:
            return
        mean, square = self._mean[i], self._square[i]
        on = None if bool(active.all()) else _wide(active, p)
        steps = self._steps.double().clamp(min=1)
        scale = (1 - BETAS[1] ** steps).sqrt()
        rate = rates / (1 - BETAS[0] ** steps)
        new_mean = mean.lerp(grad, 1 - BETAS[0])
        new_square = (square * BETAS[1]).addcmul_(grad, grad, value=1 - BETAS[1])
        move = new_mean / new_square.sqrt().div_(_wide(scale, p)).add_(EPS)
        new = p.detach() * _wide(1 - rates * self._decay, p) if self._decay else p.detach()
        new = torch.addcmul(new, move, _wide(rate, p), value=-1.0)
        for old, value in ((mean, new_mean), (square, new_square), (p.detach(), new)):
            old.copy_(value if on is None else torch.where(on, value, old))

    def state_dict(self) -> dict[str, Any]:
        """See `Optimizer.state_dict`."""
        state = {
            i: {"exp_avg": m, "exp_avg_sq": s, "step": self._steps}
            for i, (m, s) in enumerate(zip(self._mean, self._square, strict=True))
        }
        return {"state": state, "param_groups": []}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Optimizer.load_state_dict`."""
        for i, found in state["state"].items():
            self._mean[i].copy_(found["exp_avg"])
            self._square[i].copy_(found["exp_avg_sq"])
            self._steps.copy_(found["step"])


def _wide(x: Tensor, like: Tensor) -> Tensor:
    """[R] as [R, 1, ...], of the other's type unless boolean."""
    x = x if x.dtype == torch.bool else x.to(like.dtype)
    return x.reshape(-1, *[1] * (like.ndim - 1))


def _blocks(rates: Tensor, steps: Tensor, active: Tensor) -> Iterator[tuple[slice, float]]:
    """Longest stretches of active runs with one rate and one count of steps."""
    start, key = 0, None
    marks = [*zip(active.tolist(), rates.tolist(), steps.tolist(), strict=True), None]
    for i, mark in enumerate(marks):
        if mark != key:
            if key is not None and key[0]:
                yield slice(start, i), key[1]
            start, key = i, mark
