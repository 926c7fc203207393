"""A sampler's side: one call draws K responses to each prompt.

    python benchmarks/samplers.py JOB

JOB is JSON: `side` (ours, transformers or vllm), `model` (a folder), `prompts` (token ids),
`samples`, `tokens` (at most so many new ones), `ends` (ids of end tokens). Each step draws anew.
Answers count generated tokens, each response's end token with it.
"""

import json
import os
import sys
from collections.abc import Callable
from typing import Any

from workers import Answer, Channel, serve

Draw = Callable[[int], list[list[int]]]
"""Of a call's number: the responses' token ids."""


def counted(responses: list[list[int]], ends: list[int]) -> Answer:
    """Tokens up to and with the first end token, and how many responses ended."""
    tokens = ended = 0
    for ids in responses:
        place = next((i for i, token in enumerate(ids) if token in ends), None)
        tokens += len(ids) if place is None else place + 1
        ended += place is not None
    return {"tokens": tokens, "ended": ended / len(responses)}


def padded(prompts: list[list[int]]) -> tuple[Any, Any]:
    """Prompts padded on the left, and their mask."""
    import torch

    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    return ids, torch.tensor([[False] * (width - len(p)) + [True] * len(p) for p in prompts])


def ours(job: dict[str, Any]) -> Draw:
    """`Transformer.sample`, with a stream of numbers as an on-policy source has it."""
    import torch

    from preftune import huggingface
    from preftune.numerics import stream_key, uniform
    from preftune.policies.transformer import Transformer
    from preftune.sampling.decoding import Decoding

    model = huggingface.load_model(job["model"], torch.bfloat16)
    policy = Transformer(
        model, end_ids=job["ends"], decoding=Decoding(max_new_tokens=job["tokens"])
    )
    prompt, mask = padded(job["prompts"])

    def draw(number: int) -> list[list[int]]:
        key = stream_key(number, "benchmark")

        def stream(t: int, shape: tuple[int, ...]) -> Any:
            places = torch.arange(shape[0] * shape[1]).view(shape)
            return uniform(key, t, places)

        drawn = policy.sample(prompt, mask, job["samples"], stream, 0)
        rows = zip(drawn.tokens.flatten(0, 1), drawn.mask.flatten(0, 1), strict=True)
        return [tokens[keep].tolist() for tokens, keep in rows]

    return draw


def transformers(job: dict[str, Any]) -> Draw:
    """`generate` from the model's whole distribution."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.bfloat16).eval()
    prompt, mask = padded(job["prompts"])

    def draw(number: int) -> list[list[int]]:
        torch.manual_seed(number)
        out = model.generate(
            input_ids=prompt, attention_mask=mask.long(), do_sample=True, temperature=1.0,
            top_k=0, top_p=1.0, num_return_sequences=job["samples"],
            max_new_tokens=job["tokens"], eos_token_id=job["ends"], pad_token_id=job["ends"][0],
        )  # fmt: skip
        return out[:, prompt.shape[1] :].tolist()

    return draw


def vllm(job: dict[str, Any]) -> Draw:
    """The engine as it comes: compiled, and a prompt's samples share its prefill."""
    from vllm import LLM, SamplingParams

    # a model of 135 million weights, and room for its longest answers
    longest = max(map(len, job["prompts"])) + job["tokens"]
    engine = LLM(
        model=job["model"], dtype="bfloat16", max_model_len=longest, enable_prefix_caching=True
    )
    prompts: Any = [{"prompt_token_ids": ids} for ids in job["prompts"]]

    def draw(number: int) -> list[list[int]]:
        settings = SamplingParams(
            n=job["samples"], temperature=1.0, max_tokens=job["tokens"],
            stop_token_ids=job["ends"], detokenize=False,
        )  # fmt: skip
        outputs = engine.generate(prompts, settings, use_tqdm=False)
        # the next call is of another policy, so nothing of this one may be of use to it
        engine.reset_prefix_cache()
        return [list(one.token_ids) for out in outputs for one in out.outputs]

    return draw


def environment(side: str) -> dict[str, str]:
    """What this side is started with, besides the environment as it is."""
    if side == "ours":
        from ours import environment

        return environment()
    if side == "vllm":
        cores = sorted(os.sched_getaffinity(0))
        return {
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}-{cores[-1]}",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
    return {}


def main() -> None:
    """Load the sampler, then draw whenever asked."""
    job = json.loads(sys.argv[1])
    channel = Channel()
    draw = {"ours": ours, "transformers": transformers, "vllm": vllm}[job["side"]](job)
    calls = iter(range(10**6))
    serve(channel, lambda: counted(draw(next(calls)), job["ends"]), {})


if __name__ == "__main__":
    main()
