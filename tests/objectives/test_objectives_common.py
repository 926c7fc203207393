"""What every objective promises: elementwise, no gradient into data, right gradient elsewhere."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from preftune import objectives as o

PAIR = ("logp_chosen", "logp_rejected")
REF_PAIR = ("ref_logp_chosen", "ref_logp_rejected")
LENGTHS = ("len_chosen", "len_rejected")
COLLISIONS = ("collision_chosen", "collision_rejected")


@dataclass(frozen=True)
class Case:
    name: str
    loss: Callable[..., Tensor]
    trained: tuple[str, ...]
    data: tuple[str, ...] = ()
    settings: dict[str, float] = field(default_factory=dict)
    options: dict[str, str] = field(default_factory=dict)
    surrogate: bool = False  # value and gradient differ by design

    def __call__(self, inputs: dict[str, Tensor], **settings: float | Tensor) -> Tensor:
        return self.loss(**inputs, **self.options, **(settings or self.settings))


CASES = [
    Case("dpo", o.dpo, PAIR, REF_PAIR, {"beta": 0.3, "label_smoothing": 0.1}),
    *(
        Case(f"dpo_{name}", o.dpo, PAIR, REF_PAIR, {"beta": 0.3}, {"divergence": name})
        for name in ("forward_kl", "js")
    ),
    Case("dpo_alpha", o.dpo, PAIR, REF_PAIR, {"beta": 0.3, "alpha": 0.3}, {"divergence": "alpha"}),
    Case("ipo", o.ipo, PAIR, REF_PAIR, {"tau": 0.2}),
    Case("nll", o.nll, ("logp",)),
    Case("weighted_nll", o.weighted_nll, ("logp",), ("weight",)),
    Case("reinforce", o.reinforce, ("logp",), ("advantage",)),
    Case("ppo_clip", o.ppo_clip, ("logp",), ("logp_old", "advantage"), {"clip": 0.2}),
    Case("value_clip", o.value_clip, ("value",), ("value_old", "target"), {"clip": 0.4}),
    Case("reverse_kl", o.reverse_kl, ("logp",), ("ref_logp", "baseline"), surrogate=True),
    *(
        Case(f"kl_loss_{name}", o.kl_loss, ("logp",), ("ref_logp",), {}, {"estimator": name})
        for name in ("k1", "k2", "k3")
    ),
    Case(
        "bradley_terry",
        o.bradley_terry,
        ("score_chosen", "score_rejected"),
        (),
        {"margin": 0.4, "label_smoothing": 0.1},
    ),
    Case("simpo", o.simpo, PAIR, LENGTHS, {"beta": 2.0, "gamma": 0.5}),
    Case("orpo", o.orpo, PAIR, LENGTHS, {"odds_weight": 0.3}),
    Case("cpo", o.cpo, PAIR, (), {"beta": 0.3, "nll_weight": 0.7}),
    Case("dpop", o.dpop, PAIR, REF_PAIR, {"beta": 0.3, "penalty": 5.0}),
    Case("robust_dpo", o.robust_dpo, PAIR, REF_PAIR, {"beta": 0.3, "label_smoothing": 0.1}),
    Case("chi_po", o.chi_po, PAIR, REF_PAIR, {"beta": 0.1, "clip": 4.0}),
    Case(
        "wpo",
        o.wpo,
        PAIR,
        (*REF_PAIR, *COLLISIONS, *LENGTHS),
        {"beta": 0.3, "label_smoothing": 0.1},
        surrogate=True,
    ),
    Case(
        "kto",
        o.kto,
        ("logp",),
        ("ref_logp", "label", "kl"),
        {"beta": 0.3, "weight_good": 1.3, "weight_bad": 0.6},
    ),
]


def each(cases: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


every_case = each(CASES)


def inputs_of(case: Case, shape: tuple[int, ...] = (2, 3), dtype=torch.float64):
    """Normal draws about 0; log-probs about -5, all below 0; lengths at least 1 and not whole, so
    that a gradient into them would show."""
    generator = torch.Generator().manual_seed(7)

    def draw_one(name: str) -> Tensor:
        x = torch.randn(shape, generator=generator, dtype=dtype)
        if "logp" in name:
            return x - 5
        return 1 + x.abs() if name in LENGTHS else x

    draw = {name: draw_one(name) for name in (*case.trained, *case.data)}
    return {name: x.requires_grad_() for name, x in draw.items()}


def test_all_objectives_are_covered() -> None:
    assert {case.loss.__name__ for case in CASES} == set(o.__all__)


@each([case for case in CASES if not case.surrogate])
def test_gradient_of_trained_arguments(case: Case) -> None:
    """Central differences in float64; the surrogates have their own tests, in
    test_divergence and test_dpo_variants."""
    inputs = inputs_of(case)
    data = {name: inputs[name].detach() for name in case.data}

    def loss(*trained: Tensor) -> Tensor:
        return case({**dict(zip(case.trained, trained, strict=True)), **data})

    assert torch.autograd.gradcheck(loss, [inputs[name] for name in case.trained])


@every_case
def test_only_trained_arguments_receive_gradient(case: Case) -> None:
    inputs = inputs_of(case)
    case(inputs).sum().backward()
    for name in case.trained:
        grad = inputs[name].grad
        assert grad is not None and grad.abs().sum() > 0, name
    for name in case.data:
        assert inputs[name].grad is None, f"{name} is data"


@every_case
@pytest.mark.parametrize("shape", [(), (4,), (2, 0), (2, 1, 3)], ids=str)
def test_leading_dims_are_free(case: Case, shape: tuple[int, ...]) -> None:
    assert case(inputs_of(case, shape)).shape == shape


@every_case
def test_samples_are_not_coupled(case: Case) -> None:
    """Each entry equals the loss of that entry alone, and so does its gradient."""
    inputs = inputs_of(case, (5,))
    loss = case(inputs)
    loss.sum().backward()
    for i in range(5):
        alone = {name: x.detach()[i].requires_grad_() for name, x in inputs.items()}
        loss_alone = case(alone)
        loss_alone.backward()
        torch.testing.assert_close(loss_alone, loss[i], rtol=1e-12, atol=0)
        for name in case.trained:
            grad, grad_alone = inputs[name].grad, alone[name].grad
            assert grad is not None and grad_alone is not None
            torch.testing.assert_close(grad_alone, grad[i], rtol=1e-12, atol=0)


@each([case for case in CASES if case.settings])
def test_settings_may_be_tensors_of_the_run_axis(case: Case) -> None:
    """[2, 1] settings give run 0 and run 1 each their own, as numbers would."""
    inputs = inputs_of(case)
    by_run = {
        k: torch.tensor([[v], [1.5 * v]], dtype=torch.float64) for k, v in case.settings.items()
    }
    together = case(inputs, **by_run)
    for run, factor in enumerate((1.0, 1.5)):
        alone = {name: x[run] for name, x in inputs.items()}
        numbers = {k: factor * v for k, v in case.settings.items()}
        torch.testing.assert_close(together[run], case(alone, **numbers), rtol=1e-12, atol=0)


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dtype_is_kept(case: Case, dtype: torch.dtype) -> None:
    assert case(inputs_of(case, dtype=dtype)).dtype == dtype
