"""The token bandit as it is usually written: one model call a sample and a pair's member.

The slow side of `bandit_step`, and its oracle: the same loss and gradient, by plain modules.
"""

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """Pre-LayerNorm attention and MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend, self.merge = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(-2, -3)
            for t in self.attend(self.norm_1(x)).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.merge(mixed.transpose(-2, -3).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm_2(x)), approximate="tanh"))


class PlainGPT(nn.Module):
    """One run of `StackedTransformer`, with the same weights."""

    def __init__(self, weights: dict[str, Tensor], heads: int = 3) -> None:
        """
        Args:
            weights: of one run, by the names of `StackedTransformer.tensors`.
        """
        super().__init__()
        vocab, width = weights["token"].shape
        self.token = nn.Embedding.from_pretrained(weights["token"].clone(), freeze=False)
        self.position = nn.Embedding.from_pretrained(weights["position"].clone(), freeze=False)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(len(weights["merge"])))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocab, bias=False)
        self.to(weights["token"].dtype)  # before the copies, which would be rounded
        w = weights
        with torch.no_grad():
            self.norm.weight.copy_(w["gain"])
            self.norm.bias.copy_(w["shift"])
            self.head.weight.copy_(w["head"].T)
            for i, b in enumerate(self.blocks):
                for norm, name in ((b.norm_1, "attend"), (b.norm_2, "mlp")):
                    norm.weight.copy_(w[f"{name}_gain"][i])
                    norm.bias.copy_(w[f"{name}_shift"][i])
                for layer, name in (
                    (b.attend, "attend"), (b.merge, "merge"), (b.up, "up"), (b.down, "down"),
                ):  # fmt: skip
                    layer.weight.copy_(w[name][i].T)
                    layer.bias.copy_(w[f"{name}_bias"][i])

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [b, t, V] of the next token."""
        x = self.token(tokens) + self.position.weight[: tokens.shape[-1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def log_prob(self, prompt: Tensor, response: Tensor) -> Tensor:
        """Of one response [T] to one prompt [1], shifted."""
        text = torch.cat([prompt, response])
        logp = self(text[None, :-1]).log_softmax(-1)[0]
        return logp.gather(-1, response[:, None]).sum()


def ipo_loss(
    policy: PlainGPT,
    reference: PlainGPT,
    prompt: Tensor,
    tokens: Tensor,
    reward: Tensor,
    tau: float,
) -> Tensor:
    """Mean over all pairs of (h_w - h_l - 1 / (2 tau))^2, each member by a call of its own.

    Args:
        prompt: [n, 1]; tokens: [n, K, T]; reward: [n, K]. Ties are left out.
    """
    losses = []
    for s in range(len(prompt)):
        for i, j in itertools.combinations(range(tokens.shape[1]), 2):
            if reward[s, i] == reward[s, j]:
                continue
            w, l = (i, j) if reward[s, i] > reward[s, j] else (j, i)  # noqa: E741
            h = 0.0
            for k, sign in ((w, 1), (l, -1)):
                with torch.no_grad():
                    ref = reference.log_prob(prompt[s], tokens[s, k])
                h = h + sign * (policy.log_prob(prompt[s], tokens[s, k]) - ref)
            losses.append((h - 1 / (2 * tau)) ** 2)
    return torch.stack(losses).mean()


def step(
    policy: PlainGPT, reference: PlainGPT, optimizer: torch.optim.Optimizer, prompt: Tensor,
    tokens: Tensor, reward: Tensor, tau: float,
) -> Tensor:  # fmt: skip
    """One update; the loss."""
    optimizer.zero_grad()
    loss = ipo_loss(policy, reference, prompt, tokens, reward, tau)
    loss.backward()
    optimizer.step()
    return loss.detach()
