"""The working copy: the same products as the layers', and no trace of it afterwards."""

from typing import Any

import pytest
import torch
from torch import Tensor

from preftune.sampling.weights import working_copy


class Model(torch.nn.Module):
    """What the copy asks of a model, with layers of several kinds."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(24, 40)
        self.second = torch.nn.Linear(40, 8, bias=False)
        self.derived = type("Derived", (torch.nn.Linear,), {})(8, 8)
        self.dtype = dtype
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.derived(self.second(self.first(x).tanh()))


def given(*shape: int) -> Tensor:
    return torch.randn(*shape, 24, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (1, 130), (7,)])
@pytest.mark.parametrize(
    ("dtype", "autocast", "near"),
    [
        (torch.bfloat16, False, 2e-2),
        (torch.float32, True, 2e-2),
        (torch.float32, False, 0),
        (torch.float64, False, 0),
    ],
)
def test_the_products_are_those_of_the_layers(
    dtype: torch.dtype, autocast: bool, near: float, shape: tuple[int, ...]
) -> None:
    model, x = Model(dtype), given(*shape).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = model(x)
        with working_copy(model):
            replaced = ["forward" in vars(m) for m in (model.first, model.second, model.derived)]
            found = model(x)
    assert replaced == [near > 0, near > 0, False]
    assert found.dtype == expected.dtype and found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=near, atol=near)
    assert not any("forward" in vars(m) for m in model.modules())


@torch.no_grad()
def test_it_is_a_copy_and_is_taken_anew() -> None:
    model, x = Model(torch.bfloat16), given(3).bfloat16()
    with working_copy(model):
        before = model(x)
    model.first.weight.mul_(2.0)
    with working_copy(model):
        after = model(x)
    torch.testing.assert_close(after, model(x), rtol=2e-2, atol=2e-2)
    assert not torch.allclose(after, before, rtol=2e-2, atol=2e-2)


def test_it_goes_on_errors_and_leaves_what_others_replaced() -> None:
    model = Model(torch.bfloat16)

    def theirs(x: Any) -> Any:
        return x

    model.second.forward = theirs  # as accelerate does
    with pytest.raises(KeyError), working_copy(model):
        assert model.second.forward is theirs
        raise KeyError
    assert model.second.forward is theirs and "forward" not in vars(model.first)
