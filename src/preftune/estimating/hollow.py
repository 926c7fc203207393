"""Models that have shapes and no weights: a run goes through them as through the real ones, and
each pass is written down where it would be computed.

So what a run will do is counted by the code that does it: sources, labellers, layouts and
micro-batches are the run's own.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from preftune import adapters, building, huggingface
from preftune.adapter_folder import describe, is_adapter
from preftune.config import Config
from preftune.errors import UserError
from preftune.method import Method
from preftune.policies.blocks import counting_kept, recompute_blocks
from preftune.policies.capabilities import share_window
from preftune.policies.packing import Layout, bucket
from preftune.policies.transformer import Transformer
from preftune.policies.trunk import Trunk
from preftune.reward_model import RewardModel
from preftune.samples import Samples
from preftune.sampling.decoding import Uniform

Lengths = Callable[[Float[Tensor, "n K"]], Int[Tensor, "n K"]]
"""Tokens of responses, of a uniform number each."""
_SIZES = (16, 48)
"""Tokens of the rows by which activations are told: as `Trunk.activation_bytes` takes them."""


@dataclass(frozen=True, kw_only=True)
class Pass:
    """A forward pass, with its backward pass where there is one."""

    trains: bool
    tokens: int
    """That the decoder is given, padding with it."""
    read: int
    """Positions whose next token the head is asked about."""


@dataclass(frozen=True, kw_only=True)
class Draw:
    """Responses drawn together."""

    prompts: int
    rows: int
    prompt: int
    """Tokens of the prompts, each once."""
    steps: int
    """Of decoding, behind the token that a prompt's own pass gives."""
    tokens: int
    """Decoded, a row and step each."""
    longest: int
    """Tokens of the longest prompt."""
    most: int
    """Tokens of a response, at most."""


@dataclass
class Log:
    """What was done, in order."""

    passes: list[Pass] = field(default_factory=list)
    draws: list[Draw] = field(default_factory=list)

    def taken(self) -> "Log":
        """What it holds; it is empty then."""
        now = replace(self)
        self.passes, self.draws = [], []
        return now


class HollowTrunk(Trunk):
    """A trunk on the meta device."""

    def __init__(self, model: Any, config: Config, autocast: torch.dtype | None) -> None:
        self.model, self.autocast = model.eval(), autocast
        self.adapter_off, self.kept = False, ()
        self.compiled = self.narrowed = False
        self.window, self.to_come = share_window(model), 0
        # which layouts a model can be given is found by trying: most can be given both
        self.packing = config.packing is not False and self.window > 0
        self.share_prefix = config.share_prefix is not False and self.window > 0
        self.place = building.pick_device(config.device)
        self._activations: float | None = None

    @property
    def device(self) -> torch.device:
        """Where the model will be."""
        return self.place

    def layout(
        self, prompt: Tensor, prompt_mask: Tensor, tokens: Tensor, mask: Tensor, *beside: Trunk
    ) -> Layout:
        """See `Trunk.layout`; nothing is put on a device."""
        here = copy.copy(self)
        here.place = torch.device("cpu")
        return Trunk.layout(here, prompt, prompt_mask, tokens, mask, *beside)

    def size(self, layout: Layout) -> int:
        """Tokens of a layout as the device is given them."""
        tokens = layout.input_ids.numel()
        return bucket(tokens) if self.packing and self.place.type != "cpu" else tokens

    def activation_bytes(self) -> float:
        """See `Trunk.activation_bytes`: of tensors that take no memory."""
        if self._activations is None:
            self._activations = activation_bytes(self.model, self.autocast)
        return self._activations

    def without_adapter(self) -> Trunk:
        """See `Trunk.without_adapter`."""
        twin = copy.copy(self)
        twin.adapter_off, twin.kept = True, adapters.untrained(self.model)
        return twin


def outline(config: Config, *, scores: bool = False) -> Any:
    """The model of the settings with its adapter, inside `torch.device("meta")`."""
    dtype = torch.float64 if config.dtype == "float64" else torch.float32
    folder = huggingface.resolve_model(config.model)
    asked, started = config.adapter, is_adapter(folder)
    base = describe(folder).base if started else config.model
    model = huggingface.outline(base, dtype, scores=scores)
    if started and asked is None:
        settings = describe(folder).settings
        recipe = adapters.Recipe(
            kind="dora" if settings.get("use_dora") else "lora", rank=int(settings.get("r", 8)),
            alpha=float(settings.get("lora_alpha", 8)), seed=0, scores=scores,
            target_modules=settings.get("target_modules") or "all-linear",
        )  # fmt: skip
        return adapters.attach(model, recipe)
    return building.adapted(config, model, scores=scores)


def activation_bytes(
    model: Any, autocast: torch.dtype | None, *, recomputed: bool = False
) -> float:
    """Bytes that a training pass keeps for each token, weights left out.

    Args:
        model: on the meta device.
    """
    shapes = [(n, p.shape, p.dtype, p.requires_grad) for n, p in model.named_parameters()]
    key = str((model.config.to_json_string(), shapes, autocast, recomputed))
    if key not in _told:  # a moment's work, which every change that is tried would do again
        _told[key] = _activation_bytes(model, autocast, recomputed)
    return _told[key]


_told: dict[str, float] = {}


def _activation_bytes(model: Any, autocast: torch.dtype | None, recomputed: bool) -> float:
    kept, twin = [], copy.deepcopy(model)
    with FakeTensorMode():
        _fill(twin)
        whole = twin.get_base_model() if adapters.is_adapted(twin) else twin
        if recomputed:
            recompute_blocks(whole.base_model)
        for size in _SIZES:
            inputs = {
                "input_ids": torch.zeros(1, size, dtype=torch.long),
                "position_ids": torch.arange(size)[None],
                "use_cache": False,
            }
            amp = torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None)
            with counting_kept() as total, torch.enable_grad(), amp:
                whole.base_model(**huggingface.accepted(whole.base_model, inputs))
            kept.append(total[0])
    return (kept[1] - kept[0]) / (_SIZES[1] - _SIZES[0])


def _fill(model: Any) -> None:
    """Put tensors on the processor in place of those on the meta device, inside a mode in which
    they take no memory: autocast knows no meta device."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is not None and id(tensor) not in made:
                    new: Any = torch.empty(tensor.shape, dtype=tensor.dtype)
                    if isinstance(tensor, torch.nn.Parameter):
                        new = torch.nn.Parameter(new, requires_grad=tensor.requires_grad)
                    made[id(tensor)] = new
                if tensor is not None:
                    held[name] = made[id(tensor)]


class Hollow(Transformer):
    """A policy that writes passes and samples down."""

    def __init__(self, trunk: HollowTrunk, **own: Any) -> None:
        """
        Args:
            own: attributes of a policy, as `building.make_policy` would set them.
        """
        self.trunk: HollowTrunk = trunk
        self.exact_sampler = trunk.autocast is None
        for name, value in own.items():
            setattr(self, name, value)
        self.log = Log()
        self.lengths: Lengths = lambda u: torch.full(
            u.shape, max(1, self.decoding.max_new_tokens // 2)
        )
        self._anchor = torch.zeros((), requires_grad=True)

    def _outputs(
        self, prompt: Tensor, prompt_mask: Tensor, tokens: Tensor, mask: Tensor,
        names: frozenset[str],
    ) -> dict[str, Tensor]:  # fmt: skip
        layout = self.trunk.layout(prompt, prompt_mask, tokens, mask)
        trains = torch.is_grad_enabled() and names != {"collision"} and not self.trunk.adapter_off
        self._note(layout, trains)
        zeros = torch.zeros(mask.shape) + (self._anchor if trains else 0)
        return dict.fromkeys(names, zeros)

    def _note(self, layout: Layout, trains: bool) -> None:
        size = self.trunk.size(layout)
        self.log.passes.append(Pass(trains=trains, tokens=size, read=len(layout.predict)))

    def sample(
        self, prompt: Tensor, prompt_mask: Tensor, num_responses: int, uniform: Uniform, origin: int
    ) -> Samples:
        """See `Policy.sample`: tokens of no meaning, in responses of the lengths assumed."""
        shape = (len(prompt), num_responses)
        most = self.decoding.max_new_tokens
        length = self.lengths(uniform(0, shape).double()).clamp(1, most)
        mask = torch.arange(int(length.max())) < length[..., None]
        sizes = prompt_mask.sum(-1)
        self.log.draws.append(
            Draw(
                prompts=len(prompt), rows=length.numel(), prompt=int(sizes.sum()),
                steps=int(length.max()) - 1, tokens=int(length.sum()) - length.numel(),
                longest=int(sizes.max()), most=most,
            )
        )  # fmt: skip
        return Samples(
            prompt=prompt, prompt_mask=prompt_mask, tokens=torch.zeros_like(mask, dtype=torch.long),
            mask=mask, finished=length < most, origin=torch.full(shape, origin),
            row=torch.full((len(prompt),), -1), logp=torch.zeros(mask.shape),
        )  # fmt: skip

    def step_kl(self, reference: Any, samples: Samples) -> Tensor:
        """See `Policy.step_kl`: a pass of each."""
        s = samples
        layout = self.trunk.layout(s.prompt, s.prompt_mask, s.tokens, s.mask, reference.trunk)
        for of in (self, reference):
            of._note(layout, False)
        return torch.zeros(samples.mask.shape)


class HollowScores(RewardModel):
    """A reward model that writes passes down."""

    def __init__(self, trunk: HollowTrunk) -> None:
        self.trunk: HollowTrunk = trunk
        self.log = Log()
        self._anchor = torch.zeros((), requires_grad=True)

    def score(
        self, prompt: Tensor, prompt_mask: Tensor, tokens: Tensor, mask: Tensor
    ) -> Float[Tensor, "n K"]:
        """See `RewardModel.score`: each response has one more token there."""
        length = mask.sum(-1, keepdim=True)
        longer = torch.arange(mask.shape[-1] + 1) <= length
        tokens = torch.nn.functional.pad(tokens, (0, 1))
        layout = self.trunk.layout(prompt, prompt_mask, tokens, longer)
        trains = torch.is_grad_enabled()
        self.log.passes.append(Pass(trains=trains, tokens=self.trunk.size(layout), read=0))
        return torch.zeros(mask.shape[:-1]) + (self._anchor if trains else 0)


def make(config: Config, method: Method, tokenizer: Any) -> Hollow | HollowScores:
    """What the settings train, with nothing loaded.

    Raises:
        UserError: no such model, or it has no end token.
    """
    scores = "score" in method.outputs
    with torch.device("meta"):
        model = outline(config, scores=scores)
    place = building.pick_device(config.device)
    trunk = HollowTrunk(model, config, building.autocast_of(config.dtype, model, place))
    if scores:
        return HollowScores(trunk)
    ends = huggingface.end_ids(model, tokenizer)
    if not ends:
        raise UserError(
            f"model '{config.model}': has no end token. Set eos_token_id in its configuration."
        )
    head = None
    if "value" in method.outputs | method.needs:
        width = model.get_output_embeddings().weight.shape[-1]
        head = torch.nn.Linear(width, 1, device="meta")
    return Hollow(
        trunk, end_ids=tuple(ends), decoding=building.decoding_of(config), value_head=head,
        controls=building.controls_of(method, tokenizer), decode=None, _whole_model=False,
    )  # fmt: skip


def observed(lengths: Sequence[int], finished: Sequence[bool], most: int) -> Lengths:
    """Lengths as a few real samples have them; those that were cut go on as the others ended.

    Args:
        most: tokens after which a response is cut in the run.
    """
    ended = sum(finished)
    hazard = max(ended, 0.5) / max(1, sum(lengths))  # of a token to be the last
    cut = max((n for n, done in zip(lengths, finished, strict=True) if not done), default=most)
    whole = torch.tensor(sorted(n for n, done in zip(lengths, finished, strict=True) if done))
    share = ended / max(1, len(lengths))

    def length(u: Tensor) -> Tensor:
        place = (u / max(share, 1e-9) * len(whole)).long().clamp(0, max(0, len(whole) - 1))
        short = whole[place] if len(whole) else torch.zeros_like(place)
        left = (1 - u).clamp(min=1e-9) / max(1e-9, 1 - share)  # uniform among those that were cut
        longer = cut + (-left.clamp(max=1).log() / hazard).long()
        return torch.where(u < share, short, longer).clamp(1, most)

    return length
