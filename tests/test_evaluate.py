"""Measured figures against hand numbers, and policies compared on the same random numbers."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny_models as tiny
from fake_judge import Judge, longer_wins
from preftune import cli, held_out
from preftune.errors import UserError
from preftune.evaluate import (
    DOCUMENTED,
    Answers,
    answer,
    best_of_n,
    figures,
    forward_kl,
    interval,
)
from preftune.figures import best_of_kl
from preftune.likelihoods import pair_figures, pair_logp, plain_text, retention, windows
from preftune.policies.categorical import Categorical
from preftune.policies.transformer import Transformer
from preftune.samples import Samples
from preftune.sampling.decoding import Decoding

pytestmark = pytest.mark.long


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


class Prompts:
    """Held-out prompts of ragged lengths."""

    def __init__(self, s: Samples) -> None:
        self.s = s

    def __len__(self) -> int:
        return len(self.s.prompt)

    def prompts_only(self, index: Tensor) -> tuple[Tensor, Tensor]:
        mask = self.s.prompt_mask[index]
        keep = mask.any(0)  # as padded as these prompts need
        return self.s.prompt[index][:, keep], mask[:, keep]

    def samples(self, index: Tensor, *, responses: list[int] | None = None) -> Samples:
        raise NotImplementedError


def short(s: Samples) -> Tensor:
    return -s.lengths().double()


def policy(seed: int = 0) -> Transformer:
    settings = Decoding(max_new_tokens=6)
    return tiny.policy("llama", seed=seed, end_ids=range(40), decoding=settings)


def asked(one: Any, other: Any = None, **options: Any) -> Answers:
    settings = {"samples_per_prompt": 3, "seed": 0} | options
    return answer(one, other, Prompts(tiny.ragged()), {"short": short}, **settings)


def made(lengths: list[list[int]], finished: list[list[bool]], rewards: Any) -> Answers:
    s = tiny.samples([[5]] * len(lengths), [[[7] * n for n in group] for group in lengths])
    object.__setattr__(s, "finished", torch.tensor(finished))
    object.__setattr__(s, "logp", torch.where(s.mask, -0.5, 0.0))
    rewards = {k: torch.tensor(v, dtype=torch.float64) for k, v in rewards.items()}
    kl, log_ratio = torch.tensor([[1.0, 3.0], [2.0, 6.0]]), torch.tensor([[-1.0, 4.0], [2.0, 5.0]])
    return Answers(samples=s, rewards=rewards, kl=kl, log_ratio=log_ratio)


def test_figures_of_hand_numbers() -> None:
    mine = made(
        [[3, 1], [2, 6]], [[True, True], [True, False]],
        {"a": [[1.0, 2.0], [3.0, 6.0]], "b": [[0.0, 0.0], [1.0, 1.0]]},
    )  # fmt: skip
    other = made([[1, 1], [1, 1]], [[True] * 2] * 2, {"a": [[1.0, 3.0], [2.0, 5.0]]})
    found = {name: figure["value"] for name, figure in figures(mine, other).items()}
    controlled = found.pop("win_rate_length_controlled")
    assert controlled is not None and 0 < controlled < 0.625, "the winners were the longer ones"
    assert found == {
        "reward": 3.0,
        "reward_gain": 3.0 - (1 + 3 + 2 + 5) / 4,
        "reward:b": 0.5,
        "kl": 3.0,
        "kl_k1": 2.5,
        "win_rate": (0.5 + 0 + 1 + 1) / 4,
        "length": (2 + 0 + 1 + 6) / 4,  # the end token is not counted
        "no_end": 0.25,
        "entropy": (1.5 + 0.5 + 1 + 3) / 4,
        "entropy_per_token": 0.5,
        "distinct_1": 1 / 9,  # one token, nine times
        "distinct_2": 1 / 6,
    }
    assert "win_rate" not in figures(mine)


def test_intervals_are_over_prompts() -> None:
    g = torch.Generator().manual_seed(0)
    by_prompt = torch.randn(64, 1, generator=g, dtype=torch.float64)
    found = interval(by_prompt)
    assert found == interval(by_prompt)
    assert found["low"] is not None and found["high"] is not None and found["value"] is not None
    assert found["low"] < found["value"] < found["high"]
    half = 1.96 * float(by_prompt.std(unbiased=False)) / 8
    assert (found["high"] - found["low"]) / 2 == pytest.approx(half, rel=0.1)
    # the same answers ten times over are no new evidence
    assert interval(by_prompt.expand(-1, 10))["low"] == pytest.approx(found["low"])
    assert interval(torch.full((5, 2), 2.5)) == {"value": 2.5, "low": 2.5, "high": 2.5}
    assert interval(torch.tensor([[1.0, 2.0]])) == {"value": 1.5, "low": None, "high": None}


def test_a_policy_against_itself() -> None:
    """Common random numbers: the same answers, and no distance."""
    one, twin = policy(), policy().frozen_copy()
    mine, theirs = asked(one, twin), asked(twin)
    assert torch.equal(mine.samples.tokens, theirs.samples.tokens) and theirs.kl is None
    found = figures(mine, theirs)
    assert found["win_rate"] == {"value": 0.5, "low": 0.5, "high": 0.5}
    assert found["kl"] == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_kl_sums_the_exact_steps() -> None:
    one, other = policy(), policy(1)
    answers = asked(one, other, micro_batch_tokens=30)
    assert answers.kl is not None
    s = answers.samples
    for i, k, prompt, response in tiny.unpadded(s):
        p = tiny.next_log_probs(one.model, prompt, response)
        q = tiny.next_log_probs(other.model, prompt, response)
        direct = float((p.exp() * (p - q)).sum())
        assert float(answers.kl[i, k]) == pytest.approx(direct, abs=1e-9)
    assert torch.equal(answers.rewards["short"], -s.lengths().double())
    assert s.row.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("batch", [1, 3, 48])
def test_answers_do_not_depend_on_the_batch(batch: int) -> None:
    one = policy()
    told: list[tuple[int, int]] = []
    whole = asked(one).samples
    found = asked(
        one, batch_prompts=batch, progress=lambda done, total: told.append((done, total))
    ).samples
    assert tiny.unpadded(found) == tiny.unpadded(whole)
    assert told[-1] == (4, 4) and len(told) == -(-4 // batch)


def test_more_samples_or_fewer_prompts_keep_the_answers() -> None:
    one = policy()
    whole = {(i, k): response for i, k, _, response in tiny.unpadded(asked(one).samples)}
    for settings in ({"samples_per_prompt": 2}, {"samples_per_prompt": 5}, {"num_prompts": 2}):
        for i, k, _, response in tiny.unpadded(asked(one, **settings).samples):
            assert k >= 3 or response == whole[i, k]
    assert len(asked(one, num_prompts=2).samples.row) == 2
    other = {(i, k): r for i, k, _, r in tiny.unpadded(asked(one, seed=1).samples)}
    assert other != whole


def test_a_categorical_is_measured_too() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    one, other = Categorical(logits), Categorical(torch.zeros_like(logits))
    prompts = Prompts(tiny.samples([[0], [1]], [[[0]], [[0]]]))
    answers = answer(one, other, prompts, {}, samples_per_prompt=4, seed=0)
    logp = logits.log_softmax(-1)
    exact = (logp.exp() * (logp + torch.tensor(3.0).log())).sum(-1)
    assert answers.kl is not None
    torch.testing.assert_close(answers.kl, exact[:, None].expand(2, 4), rtol=0, atol=1e-6)
    found = figures(answers)
    assert set(found) == {"kl", "length", "no_end", "entropy", "entropy_per_token"}


# --- divergences ----------------------------------------------------------------------------------


def exact_kl(logits: Tensor, other: Tensor) -> Tensor:
    p, q = logits.log_softmax(-1), other.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def table(seed: int = 0, arms: int = 5) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(3, arms, generator=g, dtype=torch.float64)


def drawn(logits: Tensor, other: Tensor | None, count: int = 4000, **options: Any) -> Answers:
    prompts = Prompts(tiny.samples([[0], [1], [2]], [[[0]]] * 3))
    rest = None if other is None else Categorical(other)
    settings = {"samples_per_prompt": count, "seed": 0} | options
    return answer(Categorical(logits), rest, prompts, {}, **settings)


def test_both_estimates_of_the_kl_and_the_entropy_are_right() -> None:
    mine, other = table(), table(1)
    answers = drawn(mine, other, log_ratio=True)
    exact = exact_kl(mine, other)
    assert answers.kl is not None and answers.log_ratio is not None
    torch.testing.assert_close(answers.kl[:, 0], exact, rtol=0, atol=1e-9)
    torch.testing.assert_close(answers.log_ratio.mean(-1), exact, rtol=0, atol=0.06)
    assert float(answers.kl.std(-1).max()) < 1e-9 < float(answers.log_ratio.std(-1).min())
    found = figures(answers)
    entropy = -(mine.log_softmax(-1) * mine.softmax(-1)).sum(-1).mean()
    assert found["entropy"]["value"] == pytest.approx(float(entropy), abs=0.03)
    assert "kl_k1" in found and "kl_k1" not in figures(drawn(mine, other, 3))


def test_forward_kl_is_the_other_way_round() -> None:
    mine, other = table(), table(1)
    against = drawn(other, None, 2)
    found = forward_kl(Categorical(mine), Categorical(other), against, None)["forward_kl"]
    assert found["value"] == pytest.approx(float(exact_kl(other, mine).mean()))
    assert found["value"] != pytest.approx(float(exact_kl(mine, other).mean()), abs=1e-3)


def test_k1_of_a_language_model_is_its_plain_log_ratio() -> None:
    one, other = policy(), policy(1)
    answers = asked(one, other, micro_batch_tokens=30, log_ratio=True)
    assert answers.log_ratio is not None
    for i, k, prompt, response in tiny.unpadded(answers.samples):
        direct = tiny.plain_log_probs(one.model, prompt, response).sum()
        direct = direct - tiny.plain_log_probs(other.model, prompt, response).sum()
        assert float(answers.log_ratio[i, k]) == pytest.approx(float(direct), abs=1e-9)


def test_a_policy_whose_sampler_rounds_is_scored_again() -> None:
    one, other = policy(), policy(1)
    exact = asked(one, other, log_ratio=True).log_ratio
    one.exact_sampler = False
    real = one.sample

    def rounded(*args: Any) -> Samples:
        samples = real(*args)
        assert samples.logp is not None
        object.__setattr__(samples, "logp", samples.logp + 1)
        return samples

    one.sample = rounded  # pyright: ignore[reportAttributeAccessIssue]
    again = asked(one, other, log_ratio=True).log_ratio
    assert exact is not None and again is not None
    torch.testing.assert_close(again, exact)


def test_samples_of_another_distribution_have_no_kl_and_no_entropy() -> None:
    answers = asked(policy(), policy(1), own=False, log_ratio=True)
    assert answers.kl is None and answers.log_ratio is None
    assert not {"kl", "kl_k1", "entropy", "entropy_per_token"} & set(figures(answers))
    assert forward_kl(policy(), policy(1), answers, None) == {}
    assert best_of_n(answers, None) == ({}, [])


# --- best of n ------------------------------------------------------------------------------------


def judged_on(s: Samples, by: Tensor) -> Tensor:
    return by[s.tokens.squeeze(-1)]


def test_best_of_n_is_compared_with_the_policy_at_its_own_kl() -> None:
    """The policy that best-of-4 is: its own gain, and its KL, which the bound exceeds."""
    arms = 6
    reference = torch.zeros(3, arms, dtype=torch.float64)
    worth, gold = torch.arange(arms).double(), -torch.arange(arms).double()
    cdf = torch.arange(arms + 1).double() / arms
    best = (cdf[1:] ** 4 - cdf[:-1] ** 4).log().expand(3, arms)
    judges = {
        "r": lambda s: judged_on(s, worth), "g": lambda s: judged_on(s, gold),
        "h": lambda s: judged_on(s, 3 * worth + 1),
    }  # fmt: skip
    prompts = Prompts(tiny.samples([[0], [1], [2]], [[[0]]] * 3))

    def answers(logits: Tensor, count: int, seed: int) -> Answers:
        return answer(
            Categorical(logits), Categorical(reference), prompts, judges,
            samples_per_prompt=count, seed=seed,
        )  # fmt: skip

    found, notes = best_of_n(answers(reference, 64, 0), answers(best, 2000, 1))
    assert not notes
    assert [n for n in found if n.startswith("best_of_") and ":" not in n] == [
        *(f"best_of_{2**i}" for i in range(7)), "best_of_n_share",
    ]  # fmt: skip
    exact = float((best[0].exp() * worth).sum())
    assert found["best_of_4"]["value"] == pytest.approx(exact, abs=0.25)
    assert found["best_of_4:g"]["value"] == pytest.approx(-exact, abs=0.25), "chosen by r, not by g"
    assert exact_kl(best, reference)[0] < best_of_kl(4)
    share = found["best_of_n_share"]["value"]
    assert share is not None and 1.0 < share < 1.4, "the bound makes it rather too high"
    assert found["best_of_n_share:h"]["value"] == pytest.approx(share)
    assert "best_of_n_share:g" not in found, "the best by r loses by g: no gain to share"
    far = answers(torch.tensor([[0.0] * (arms - 1) + [20.0]] * 3, dtype=torch.float64), 4, 1)
    _, notes = best_of_n(answers(reference, 2, 0), far)
    assert len(notes) == 1 and "beyond best-of-2's" in notes[0]


def test_best_of_n_without_the_policy_is_the_curve_alone() -> None:
    reference = asked(policy(1), samples_per_prompt=4)
    found, notes = best_of_n(reference, None)
    assert list(found) == ["best_of_1", "best_of_2", "best_of_4"] and not notes
    unjudged = replace(reference, rewards={})
    assert best_of_n(unjudged, None) == ({}, [])


# --- given texts ----------------------------------------------------------------------------------


class Pairs(Prompts):
    """The first two responses of each prompt as chosen and rejected."""

    def samples(self, index: Tensor, *, responses: list[int] | None = None) -> Samples:
        assert responses == [0, 1]
        part = self.s.take(index)
        return replace(part, tokens=part.tokens[:, :2], mask=part.mask[:, :2],
                       finished=part.finished[:, :2], origin=part.origin[:, :2])  # fmt: skip


def test_figures_of_pairs_against_plain_forwards() -> None:
    one, other = policy(), policy(1)
    s = tiny.ragged()
    found = pair_figures(one, other, Pairs(s), 40)
    ratios = {
        (i, k): float(
            (tiny.plain_log_probs(one.model, p, r) - tiny.plain_log_probs(other.model, p, r)).sum()
        )
        for i, k, p, r in tiny.unpadded(s)
    }
    chosen, rejected = ([ratios[i, k] for i in range(4)] for k in (0, 1))
    margins = [c - r for c, r in zip(chosen, rejected, strict=True)]
    values = {name: figure["value"] for name, figure in found.items()}
    assert values == pytest.approx({
        "implicit_accuracy": sum(0.5 if abs(m) < 1e-9 else float(m > 0) for m in margins) / 4,
        "implicit_margin": sum(margins) / 4,
        "log_ratio_chosen": sum(chosen) / 4,
        "log_ratio_rejected": sum(rejected) / 4,
    }, abs=1e-9)  # fmt: skip
    same = pair_figures(one, one, Pairs(s), None)
    assert same["implicit_accuracy"] == {"value": 0.5, "low": 0.5, "high": 0.5}


def test_pairs_of_one_prompt_are_one_unit() -> None:
    s = tiny.ragged()
    often = pair_figures(policy(), policy(1), Pairs(s.take(torch.tensor([0, 1, 2, 3] * 9))), None)
    once = pair_figures(policy(), policy(1), Pairs(s), None)
    assert often["implicit_margin"]["low"] == pytest.approx(once["implicit_margin"]["low"])


def test_a_reference_that_is_known_is_not_asked() -> None:
    many = Pairs(tiny.ragged().take(torch.arange(40) % 4))  # more than one batch
    known = pair_logp(policy(1), many, 40)
    found = pair_figures(policy(), policy(2), many, 40, ref_logp=known)
    assert found == pair_figures(policy(), policy(1), many, 40)


def test_retention_against_plain_forwards() -> None:
    one, other = policy(), policy(1)
    pieces = [[5, 9, 30, 7], [8, 6], [5, 9, 30, 7, 11, 12, 100]]
    found = {n: f["value"] for n, f in retention(one, other, pieces, 12).items()}

    def nll(of: Transformer) -> float:
        sums = [tiny.plain_log_probs(of.model, p[:1], p[1:]).sum() for p in pieces]
        return -float(sum(sums)) / sum(len(p) - 1 for p in pieces)

    assert found["retention_nll"] == pytest.approx(nll(one), abs=1e-9)
    assert found["retention_nll_reference"] == pytest.approx(nll(other), abs=1e-9)
    assert found["retention_change"] == pytest.approx(nll(one) - nll(other), abs=1e-9)
    assert set(retention(one, None, pieces, None)) == {"retention_nll"}


def test_plain_text_is_read_and_cut(tmp_path: Path, tiny_model: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    (tmp_path / "a.txt").write_text("one line\n\nanother\n")
    (tmp_path / "b.jsonl").write_text('{"text": "first"}\n"second one"\n')
    assert plain_text(str(tmp_path / "a.txt")) == ["one line\nanother"]
    assert plain_text(str(tmp_path / "b.jsonl")) == ["first", "second one"]
    pieces = windows(["abcdefgh", "x"], tokenizer, 4)
    assert [len(p) for p in pieces] == [4, 4, 2], (
        "BOS and eight bytes, a last byte alone; BOS and x"
    )
    assert pieces[0][0] == pieces[2][0] == tokenizer.bos_token_id


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.txt", None, "no such file"), ("a.pdf", "x", "unknown ending"),
        ("a.jsonl", '{"txt": "x"}\n', "row a.jsonl:1 has no text"), ("a.txt", "", "file is empty"),
    ],
)  # fmt: skip
def test_plain_text_that_is_none(tmp_path: Path, name: str, content: Any, words: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=f"retention '.*{words}"):
        plain_text(str(tmp_path / name))


# --- the command and the end of a run -------------------------------------------------------------


@pytest.fixture
def run(here: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[Any, str]]:
    def run(*args: str) -> tuple[Any, str]:
        capsys.readouterr()
        code = cli.run([*args, "--json"])
        out, err = capsys.readouterr()
        assert code == 0, err
        return json.loads(out), err

    return run


@pytest.fixture
def judge() -> Iterator[Judge]:
    made = Judge()
    yield made
    made.stop()


def evaluated(model: str, prompts: str, **more: str) -> list[str]:
    given = {"model": model, "prompts": prompts, "max_new_tokens": "6"} | more
    return ["evaluate", *(x for k, v in given.items() for x in (f"--{k.replace('_', '-')}", v))]


BASIC = {"length", "no_end", "entropy", "entropy_per_token", "distinct_1", "distinct_2"}
AGAINST = {"kl", "kl_k1", "forward_kl"}
REWARDED = {"reward", "reward_gain", "win_rate"}
PAIRED = {"implicit_accuracy", "implicit_margin", "log_ratio_chosen", "log_ratio_rejected"}
KEPT = {"retention_nll", "retention_nll_reference", "retention_change"}


def test_every_figure_from_the_command_line(
    run: Any,
    here: Path,
    tiny_model: str,
    pairs_file: str,
    make_tiny_model: Any,
    judge: Judge,
) -> None:
    other = make_tiny_model(here / "other", seed=1, hidden_size=32)
    (here / "text.txt").write_text("Some plain text.\n" * 20)
    judge.reply = longer_wins
    found, err = run(*evaluated(
        tiny_model, pairs_file, reference=other, data=pairs_file, reward="length:min",
        gold="length:within=2", retention="text.txt", judge=judge.url, best_of_n="4",
    ))  # fmt: skip
    expected = BASIC | AGAINST | REWARDED | PAIRED | KEPT
    expected |= {"reward:length:within=2", "reward_gain:length:within=2"}
    expected |= {f"best_of_{n}{g}" for n in (1, 2, 4) for g in ("", ":length:within=2")}
    expected |= {"judge_win_rate", "judge_malformed"}
    optional = {"win_rate_length_controlled", "judge_win_rate_length_controlled"}
    optional |= {"best_of_n_share", "best_of_n_share:length:within=2"}
    assert expected <= set(found) <= expected | optional
    for name, figure in found.items():
        assert set(figure) == {"value", "low", "high"}, name
        assert figure["low"] <= figure["value"] <= figure["high"], name
        plain = name.partition(":")[0] + (":NAME" if name.startswith("reward:") else "")
        known = DOCUMENTED.keys() | {f"best_of_{n}" for n in (1, 2, 4)}
        assert plain in known, name
    assert found["kl"]["value"] > 0 and found["forward_kl"]["value"] > 0
    margin = found["log_ratio_chosen"]["value"] - found["log_ratio_rejected"]["value"]
    assert found["implicit_margin"]["value"] == pytest.approx(margin)
    assert len(judge.asked) == 1 + 2 * 12
    assert "proxy" not in err, "no run was trained on the reward"


def test_what_is_not_given_is_left_out_and_said(run: Any, tiny_model: str, pairs_file: str) -> None:
    found, err = run(*evaluated(tiny_model, pairs_file, data=pairs_file))
    assert set(found) == BASIC
    for words in ("no reference given", "no reward given", "pairs in data: they need a reference"):
        assert words in err
    found, err = run(*evaluated(tiny_model, pairs_file, reference=tiny_model, temperature="0.7"))
    assert set(found) == BASIC - {"entropy", "entropy_per_token"}
    assert "decoding is not temperature 1" in err
    found, _ = run(*evaluated(tiny_model, pairs_file, reference=tiny_model))
    assert set(found) == BASIC | AGAINST
    same = {"reference": tiny_model, "reward": "length:min", "best_of_n": "0"}
    found, _ = run(*evaluated(tiny_model, pairs_file, **same))
    assert set(found) == BASIC | AGAINST | REWARDED | {"win_rate_length_controlled"}
    assert found["win_rate_length_controlled"]["value"] == 0.5


def test_best_of_n_keeps_its_cost_down_unless_told(
    run: Any, tiny_model: str, pairs_file: str
) -> None:
    given = evaluated(tiny_model, pairs_file, reference=tiny_model, reward="length:min")
    found, err = run(*given)
    assert {f"best_of_{2**i}" for i in range(5)} <= set(found) and "best_of_32" not in found
    assert "16 samples to each of 8 prompts" in err and "no best_of_n_share" in err
    assert held_out.best_of_prompts(64, 16) == 16 and held_out.best_of_prompts(5, 16) == 5


def test_a_judge_that_is_away_is_said_before_the_work(
    refused: Any, tiny_model: str, pairs_file: str
) -> None:
    message = refused(*evaluated("no-such-model", pairs_file, judge="http:/x"))
    assert "is no address" in message


def test_the_end_of_a_run_has_every_figure(
    train: Any,
    run: Any,
    here: Path,
    judge: Judge,
) -> None:
    (here / "text.txt").write_text("Some plain text.\n" * 20)
    judge.reply = longer_wins
    more = ("--reward", "length:min", "--gold", "length:within=3", "--eval-fraction", "0.4")
    more += ("--retention", "text.txt", "--judge", f"{judge.url}#m", "--learning-rate", "0.1")
    run(*train(*more, max_steps="3"))
    found = json.loads((here / "out" / "evaluation.json").read_text())
    expected = BASIC | AGAINST | REWARDED | PAIRED | KEPT
    expected |= {"judge_win_rate", "judge_malformed", "best_of_16", "best_of_16:length:within=3"}
    assert expected <= set(found)
    rows = [json.loads(line) for line in (here / "out" / "metrics.jsonl").open()]
    last = rows[-1]
    assert last["eval_implicit_margin"] == found["implicit_margin"]["value"]
    assert not any(name.startswith("eval_best_of_") for name in last)
    assert "eval_forward_kl" not in rows[0] and "eval_reward:length:within=3_low" in rows[0]
    _, err = run(*evaluated("out/model", found_pairs(train), reward="length:min"))
    assert "reward is a proxy" in err
    _, err = run(*evaluated("out/model", found_pairs(train), gold="length:min"))
    assert "it is no gold" in err


def found_pairs(train: Any) -> str:
    arguments = train()
    return arguments[arguments.index("--data") + 1]


def test_displacement_is_said_by_the_command(
    train: Any, run: Any, tiny_model: str, pairs_file: str
) -> None:
    """Against a reference that was trained on the chosen answers, the bare model has lost them."""
    run(*train("--learning-rate", "0.03", method="pref_ft", max_steps="6"))
    other = {"reference": "out/model", "data": pairs_file}
    found, err = run(*evaluated(tiny_model, pairs_file, **other))
    assert found["log_ratio_chosen"]["high"] < 0
    assert "likelihood displacement" in err and "dpo_nll" in err
    found, err = run(*evaluated("out/model", pairs_file, data=pairs_file))
    assert found["log_ratio_chosen"]["low"] > 0 and "displacement" not in err


def test_a_spread_of_an_ensemble(
    train: Any, run: Any, tiny_model: str, pairs_file: str, here: Path
) -> None:
    save_reward_models(tiny_model, here)
    given = {"reward": "ensemble:rm0,rm1;kappa=1", "gold": "rm0"}
    found, _ = run(*evaluated(tiny_model, pairs_file, **given))
    assert found["reward_spread"]["value"] > 0
    plain, _ = run(*evaluated(tiny_model, pairs_file, reward="ensemble:rm0,rm1"))
    less = plain["reward"]["value"] - found["reward_spread"]["value"]
    assert found["reward"]["value"] == pytest.approx(less, abs=1e-6)
    run(*train("--reward", "ensemble:rm0,rm1", "--eval-fraction", "0.4"))
    assert json.loads((here / "out" / "evaluation.json").read_text())["reward_spread"]["value"] > 0


def save_reward_models(tiny_model: str, here: Path) -> None:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

    for seed in (0, 1):
        torch.manual_seed(seed)
        config = LlamaConfig.from_pretrained(tiny_model, num_labels=1)
        folder = here / f"rm{seed}"
        LlamaForSequenceClassification(config).save_pretrained(folder)
        AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
