"""Responses drawn by a vLLM server, with weights that follow the trainer's.

Prompts go and responses come as token ids. Each response says which weights drew it, and one that
others drew than were asked for is no response. Seeds are of our own streams, so that a run asks
again what it asked before; vLLM does not promise to answer the same, bit by bit.
"""

import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from preftune.asking import Again, Patience, Refused, once, patiently
from preftune.errors import UserError
from preftune.phases import count, phase
from preftune.samples import Samples, pad_stack
from preftune.sampling.decoding import Decoding, Uniform

WORKERS = 64
"""Prompts asked about at once; the server puts them into one batch."""
_LARGEST = 2**30
"""Bytes of an answer that are read: a few hundred a token."""
_SEEDS = 2**48


class Response(NamedTuple):
    """One response of a server."""

    tokens: list[int]
    logp: list[float]
    """Of each token under the unmodified distribution, nats."""
    finished: bool


@runtime_checkable
class Carrier(Protocol):
    """What brings the trainer's weights to the server."""

    def carry(self, server: "Server") -> None:
        """Load them into it; no request is under way."""
        ...


@dataclass(frozen=True, kw_only=True)
class Server:
    """A vLLM server, and how patient to be with it."""

    url: str
    patience: Patience = Patience(timeout=600.0)
    gone: Callable[[], str] = lambda: ""
    """Why it is no longer there, where that is known; empty while it may be."""
    command: str = ""
    """What starts such a server, for whoever must."""

    def ask(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """What it answers, after as many tries as it takes.

        Raises:
            UserError: it cannot be reached, or refuses.
        """
        return self.asked(lambda left: self.once(path, body))

    def asked(self, attempt: Callable[[int], Any]) -> Any:
        """What an attempt gives, after as many tries as it takes (`asking.patiently`).

        Raises:
            UserError: none gave anything, or the server refuses.
        """
        try:
            return patiently(self._while_there(attempt), self.patience)
        except Again as error:
            raise UserError(
                f"sampler '{self.url}': no whole answer after {self.patience.tries} tries "
                f"({error}). {self._cure()}"
            ) from error
        except Refused as error:
            raise UserError(
                f"sampler '{self.url}': it refuses ({error}). {self._cure()}"
            ) from error

    def once(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """One try; see `asking.once`."""
        return once(self.url + path, body, timeout=self.patience.timeout, largest=_LARGEST)

    def _while_there(self, attempt: Callable[[int], Any]) -> Callable[[int], Any]:
        """The attempt, which is not repeated once the server is known to be gone."""

        def tried(left: int) -> Any:
            try:
                return attempt(left)
            except Again as error:
                if reason := self.gone():
                    raise UserError(reason) from error
                raise

        return tried

    def _cure(self) -> str:
        return f"Start it anew: {self.command}" if self.command else "Look into its log."

    def score(self, tokens: Sequence[int]) -> list[float]:
        """Log-probs by the server of each token but the first given those before it, nats."""
        sampling = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0, "detokenize": False}
        body = {"token_ids": list(tokens), "sampling_params": sampling}
        found = self.ask("/inference/v1/generate", body)
        try:
            rows = found["prompt_logprobs"][1:]
            return [float(row[str(t)]["logprob"]) for row, t in zip(rows, tokens[1:], strict=True)]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"sampler '{self.url}': it gives no log-probs of a prompt. {self._cure()}"
            ) from error


@dataclass(kw_only=True)
class Engine:
    """Draws for a policy that is being trained."""

    server: Server
    carrier: Carrier
    decoding: Decoding
    end_ids: Sequence[int]
    max_staleness: int = 0
    """Updates by which the server's weights may be behind."""
    arrived: Callable[[Server], None] = lambda server: None
    """Looks whether new weights are there; raises where they are not."""
    batch_shape: tuple[int, ...] = ()
    version: int | None = None
    """Of the server's weights: optimizer steps that they have seen. None: not brought yet."""
    run: str = field(default_factory=lambda: uuid.uuid4().hex[:8])
    """Tells our weights from those that another trainer brings to the same server."""

    def sample(
        self,
        prompt: Int[Tensor, "n P"],
        prompt_mask: Bool[Tensor, "n P"],
        num_responses: int,
        uniform: Uniform,
        origin: int,
    ) -> Samples:
        """See `Policy.sample`; `origin` is the policy's version, and each response carries that of
        the weights that drew it, which may be older by `max_staleness`."""
        version = self.version
        if version is None or not 0 <= origin - version <= self.max_staleness:
            with phase("sync"):
                self._bring(origin)
            version = origin
        prompts = [ids[mask].tolist() for ids, mask in zip(prompt, prompt_mask, strict=True)]
        draws = uniform(0, (len(prompts), num_responses))[:, 0].double()
        seeds = (draws * _SEEDS).long().tolist()
        with phase("decode"):
            drawn = self._draw(prompts, num_responses, seeds)
        flat = [response for of_prompt in drawn for response in of_prompt]
        count("decode", sum(len(r.tokens) for r in flat))
        tokens, mask = pad_stack([torch.tensor(r.tokens) for r in flat])
        logp, _ = pad_stack([torch.tensor(r.logp) for r in flat])
        shape = len(prompts), num_responses
        return Samples(
            prompt=prompt,
            prompt_mask=prompt_mask,
            tokens=tokens.view(*shape, -1),
            mask=mask.view(*shape, -1),
            finished=torch.tensor([r.finished for r in flat]).view(shape),
            origin=torch.full(shape, version),
            row=torch.full(shape[:1], -1),
            logp=logp.view(*shape, -1),
        )

    def _bring(self, version: int) -> None:
        """Bring the weights as they are, and forget what the old ones left in caches.

        Whatever the server still works on is of a request that nobody waits for any more.
        """
        self.version = None  # until all of it is done
        self.server.ask("/pause?mode=abort", {})
        self.carrier.carry(self.server)
        self.server.asked(self._reset)
        self.server.ask("/update_weight_version", {"new_version": self._name(version)})
        self.server.ask("/resume", {})
        self.arrived(self.server)
        self.version = version

    def _reset(self, left: int) -> None:
        """Empty the prefix cache: what it holds was computed with the old weights."""
        found = self.server.once("/reset_prefix_cache", {})
        if not isinstance(found, dict) or found.get("success") is not True:
            raise Again("its prefix cache is still in use")

    def _name(self, version: int | None) -> str:
        return f"{self.run}:{version}"

    def _draw(
        self, prompts: list[list[int]], num_responses: int, seeds: list[int]
    ) -> list[list[Response]]:
        """Responses to each prompt, all prompts at once."""
        with ThreadPoolExecutor(max_workers=min(WORKERS, len(prompts))) as pool:
            asked = [
                pool.submit(self._respond, ids, num_responses, seed)
                for ids, seed in zip(prompts, seeds, strict=True)
            ]
            try:
                return [one.result() for one in asked]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _respond(self, ids: list[int], num_responses: int, seed: int) -> list[Response]:
        """A prompt's responses, from one answer that holds them all."""
        sampling = self._sampling(num_responses, seed)

        def attempt(left: int) -> list[Response]:
            name = uuid.uuid4().hex  # of this try alone, so that no late answer stands for another
            body = {"request_id": name, "token_ids": ids, "sampling_params": sampling}
            found = self.server.once("/inference/v1/generate", body)
            return self._whole(found, name, num_responses)

        return self.server.asked(attempt)

    def _sampling(self, num_responses: int, seed: int) -> dict[str, Any]:
        """Every setting of how tokens are drawn; what is left out would be the server's to fill."""
        d = self.decoding
        return {
            "n": num_responses, "seed": seed, "max_tokens": d.max_new_tokens,
            "min_tokens": d.min_new_tokens, "temperature": d.temperature, "top_p": d.top_p,
            "top_k": d.top_k, "min_p": 0.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
            "repetition_penalty": 1.0, "ignore_eos": True, "stop_token_ids": list(self.end_ids),
            "logprobs": 0, "detokenize": False,
        }  # fmt: skip

    def _whole(self, found: Any, name: str, num_responses: int) -> list[Response]:
        """The responses of an answer.

        Raises:
            Again: it is not ours, or not whole.
            UserError: other weights than ours drew it.
        """
        try:
            if not found["request_id"].endswith(name):
                raise Again("an answer to another question")
            choices = sorted(found["choices"], key=lambda choice: choice["index"])
            if [choice["index"] for choice in choices] != list(range(num_responses)):
                raise Again(f"{len(choices)} responses where {num_responses} were asked for")
            return [self._response(choice) for choice in choices]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise Again("an answer that is cut off or of another form") from error

    def _response(self, choice: Mapping[str, Any]) -> Response:
        """A response, if it is whole."""
        tokens = [int(t) for t in choice["token_ids"]]
        finished = bool(tokens) and tokens[-1] in self.end_ids
        full = len(tokens) == self.decoding.max_new_tokens
        whole = {"stop": finished, "length": full}.get(choice["finish_reason"], False)
        scored = choice["logprobs"]["content"]
        if not whole or [s["token_id"] for s in scored] != tokens:
            raise Again(f"a response of {len(tokens)} tokens, '{choice['finish_reason']}'")
        drawn_by = {span["version"] for span in choice["weight_versions"]}
        if drawn_by != {self._name(self.version)}:
            raise UserError(
                f"sampler '{self.server.url}': it answers with weights {sorted(drawn_by)}, not "
                f"with this run's. Another run uses the same server: give each one of its own."
            )
        return Response(tokens, [float(s["logprob"]) for s in scored], finished)
