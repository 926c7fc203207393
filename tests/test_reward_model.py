"""The reward model against transformers' own classifiers, on both layouts."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import tiny_models as tiny
from preftune import huggingface
from preftune.errors import UserError
from preftune.huggingface import classifier_from
from preftune.objectives import bradley_terry
from preftune.policies.base import Trainable
from preftune.policies.packing import pack
from preftune.policies.trunk import Trunk
from preftune.reward_model import RewardModel, padding_id
from preftune.rewards import Classifier, Judged
from preftune.samples import Samples

SCORE = frozenset({"score"})
_SHAPE: dict[str, Any] = {
    "vocab_size": tiny.VOCAB,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 160,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": tiny.END,
    "pad_token_id": tiny.END,
}
_WIDE = {"intermediate_size": 24, "num_key_value_heads": 2}
_GPT2 = {"vocab_size": tiny.VOCAB, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 160}
_ENDS = {"bos_token_id": 0, "eos_token_id": tiny.END, "pad_token_id": tiny.END}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _SHAPE | _WIDE),
    "gpt2": ("GPT2Config", _GPT2 | _ENDS | {"initializer_range": 0.3}),
    "gpt_neox": ("GPTNeoXConfig", _SHAPE | {"intermediate_size": 24, "hidden_dropout": 0.1}),
    "opt": (
        "OPTConfig",
        _SHAPE | {"ffn_dim": 24, "word_embed_proj_dim": 12, "init_std": 0.3, "dropout": 0.1},
    ),
    "qwen2": ("Qwen2Config", _SHAPE | _WIDE),
}
EXACT = ["gpt2", "gpt_neox"]
"""Float64 throughout; the norms of others compute in float32, whatever the weights."""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def causal_folder(name: str, folder: Path, tiny_model: str, **changes: Any) -> str:
    """A random causal language model with the tokenizer of conftest (pad = end)."""
    kind, settings = CONFIGS[name]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**(settings | changes))
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    huggingface.load_tokenizer(tiny_model).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tiny_model: str) -> dict[str, str]:
    root = tmp_path_factory.mktemp("causal")
    return {name: causal_folder(name, root / name, tiny_model) for name in CONFIGS}


def build(folder: str, dtype: torch.dtype = torch.float64, **options: Any) -> RewardModel:
    """With a head that was moved off zero."""
    made = RewardModel(classifier_from(folder, dtype), **options)
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        made.model.score.weight.copy_(torch.randn(made.model.score.weight.shape, generator=g))
    return made


def scores(of: RewardModel, s: Samples) -> Tensor:
    return of.outputs(s, SCORE)["score"]


def rows_of(s: Samples) -> list[list[int]]:
    return [[*prompt, *response] for _, _, prompt, response in tiny.unpadded(s)]


# --- building -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_a_new_head_is_zero_and_the_rest_is_the_model(name: str, folders: dict[str, str]) -> None:
    model = classifier_from(folders[name], torch.float32)
    causal = huggingface.load_model(folders[name], torch.float32)
    assert not model.training and model.num_labels == 1 and model.dtype == torch.float32
    assert not model.score.weight.any()
    ids = torch.tensor([[0, 5, 6, 7]])
    trunk, same = (
        m.base_model(input_ids=ids, use_cache=False).last_hidden_state for m in (model, causal)
    )
    assert torch.equal(trunk, same)
    reward, s = RewardModel(model), tiny.ragged()
    assert isinstance(reward, Trainable) and reward.share_prefix
    given = scores(reward, s)
    assert given.shape == (4, 3) and not given.any()
    losses = bradley_terry(given[:, 0], given[:, 1])
    assert losses.tolist() == pytest.approx([math.log(2)] * 4, abs=1e-7)
    losses.mean().backward()
    assert model.score.weight.grad is not None and bool(model.score.weight.grad.any())
    with pytest.raises(AssertionError, match="gives no logp"):
        reward.outputs(s, frozenset({"logp"}))


def test_the_default_name_is_resolved(
    monkeypatch: pytest.MonkeyPatch, folders: dict[str, str]
) -> None:
    monkeypatch.setattr(huggingface, "resolve_model", lambda name: folders["llama"])
    assert not classifier_from(huggingface.DEFAULT_MODEL, torch.float32).score.weight.any()


def rewritten(folder: str, target: Path, **changes: Any) -> str:
    """A folder whose configuration says something else."""
    from safetensors.torch import load_file, save_file

    target.mkdir()
    drop = changes.pop("without", None)
    weights = load_file(Path(folder) / "model.safetensors")
    weights = {k: v for k, v in weights.items() if k != drop}
    save_file(weights, target / "model.safetensors", {"format": "pt"})
    config = json.loads((Path(folder) / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps(config))
    return str(target)


def test_what_is_refused(tmp_path: Path, folders: dict[str, str], tiny_model: str) -> None:
    norm = "model.layers.1.input_layernorm.weight"
    holes = rewritten(folders["llama"], tmp_path / "holes", without=norm)
    with pytest.raises(UserError, match=r"lack 1 of the weights \(model.layers.1.input_layernorm"):
        classifier_from(holes, torch.float32)

    made = build(folders["llama"], torch.float32)
    made.save(tmp_path / "made", huggingface.load_tokenizer(tiny_model))
    headless = rewritten(str(tmp_path / "made"), tmp_path / "headless", without="score.weight")
    with pytest.raises(UserError, match=r"lack 1 of the weights \(score.weight\)"):
        classifier_from(headless, torch.float32)

    config = transformers.LlamaConfig(**(_SHAPE | _WIDE), num_labels=3)
    transformers.LlamaForSequenceClassification(config).save_pretrained(tmp_path / "three")
    with pytest.raises(UserError, match="has 3 outputs; a reward model has one"):
        classifier_from(str(tmp_path / "three"), torch.float32)
    with pytest.raises(UserError, match="no such folder"):
        classifier_from(str(tmp_path / "none"), torch.float32)


@pytest.mark.parametrize(("name", "kind"), [("granite", "Granite"), ("cohere", "Cohere")])
def test_an_architecture_without_a_classifier_is_refused(
    name: str, kind: str, tmp_path: Path
) -> None:
    tiny.make(name, torch.float32).save_pretrained(tmp_path / name)
    with pytest.raises(UserError, match=f"is {kind}ForCausalLM, of which transformers has no"):
        classifier_from(str(tmp_path / name), torch.float32)


def test_models_that_are_no_decoders_are_refused(tmp_path: Path) -> None:
    shape = {"vocab_size": 50, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    bert = transformers.BertConfig(**shape, num_attention_heads=1)
    transformers.BertForSequenceClassification(
        transformers.BertConfig(**shape, num_attention_heads=1, num_labels=1)
    ).save_pretrained(tmp_path / "classifier")
    with pytest.raises(UserError, match="does not read the last token"):
        classifier_from(str(tmp_path / "classifier"), torch.float32)
    vit = transformers.ViTConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        image_size=4, patch_size=2,
    )  # fmt: skip
    transformers.ViTModel(vit).save_pretrained(tmp_path / "vit")
    with pytest.raises(UserError, match="is ViTModel, not a causal language model"):
        classifier_from(str(tmp_path / "vit"), torch.float32)
    assert bert.num_labels == 2


# --- scores -------------------------------------------------------------------------------------


@torch.no_grad()
def plain_score(model: Any, row: list[int]) -> Tensor:
    """One row, no padding: the head on the very last token."""
    hidden = model.base_model(input_ids=torch.tensor([row]), use_cache=False).last_hidden_state
    return model.score(hidden[0, -1]).squeeze()


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_one_row_at_a_time(
    name: str, dtype: torch.dtype, share: bool, folders: dict[str, str]
) -> None:
    """Ragged rows, the end token counted, what padding holds ignored."""
    reward, s = build(folders[name], dtype, share_prefix=share), tiny.ragged()
    assert reward.share_prefix == share
    given = scores(reward, s).detach()
    assert given.dtype == dtype and float(given.std()) > 0.2
    expected = torch.stack([plain_score(reward.model, row) for row in rows_of(s)]).view(4, 3)
    near = 1e-10 if dtype == torch.float64 and name in EXACT else 1e-5
    torch.testing.assert_close(given, expected, rtol=0, atol=near)
    cut = torch.stack([plain_score(reward.model, row[:-1]) for row in rows_of(s)]).view(4, 3)
    assert float((given - cut).abs().min()) > 1e-4
    dirty = reward.score(
        torch.where(s.prompt_mask, s.prompt, 77), s.prompt_mask,
        torch.where(s.mask, s.tokens, 99), s.mask,
    )  # fmt: skip
    assert torch.equal(dirty, given)
    for i in range(4):
        alone = scores(reward, s.take(torch.tensor([i])))[0].detach()
        torch.testing.assert_close(alone, given[i], rtol=0, atol=near)


def gradients(reward: RewardModel, s: Samples) -> dict[str, Tensor]:
    given = scores(reward, s)
    (
        given * torch.linspace(-1, 1, given.numel(), dtype=given.dtype).view(given.shape)
    ).sum().backward()
    found = {}
    for key, parameter in reward.named_parameters():
        assert parameter.grad is not None, key
        found[key] = parameter.grad
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_layouts_agree_in_gradients(name: str, folders: dict[str, str]) -> None:
    s = tiny.ragged()
    one, other = (gradients(build(folders[name], share_prefix=x), s) for x in (True, False))
    for key, grad in one.items():
        scale = max(1.0, float(other[key].abs().max()))
        near = (1e-10 if name in EXACT else 1e-5) * scale
        torch.testing.assert_close(grad, other[key], rtol=0, atol=near)
    assert bool(one["score.weight"].any())


def test_a_prompt_is_computed_once(
    monkeypatch: pytest.MonkeyPatch, folders: dict[str, str]
) -> None:
    seen: list[tuple[int, ...]] = []
    original = Trunk.forward

    def spy(self: Trunk, module: Any, layout: Any, **options: Any) -> Any:
        seen.append(tuple(layout.input_ids.shape))
        return original(self, module, layout, **options)

    reward = build(folders["llama"], packing=False)
    plain = build(folders["llama"], share_prefix=False, packing=False)
    monkeypatch.setattr(Trunk, "forward", spy)
    s = tiny.samples([[5, 6, 7]], [[[8, 9, 1], [10, 1]]])
    scores(reward, s)
    scores(plain, s)
    assert seen == [(1, 3 + 3 + 2), (2, 3 + 3)]  # the last tokens too: the score is read there
    layout = pack(s.prompt, s.prompt_mask, s.tokens, s.mask, shared=True)
    assert layout.input_ids.shape == (1, 6)


def test_rows_longer_than_the_window_are_not_shared(tmp_path: Path) -> None:
    tiny.make("mistral", torch.float32).save_pretrained(tmp_path / "mistral")
    reward, s = build(str(tmp_path / "mistral")), tiny.ragged()
    assert reward.share_prefix and reward.trunk.window == tiny.WINDOW
    expected = torch.stack([plain_score(reward.model, row) for row in rows_of(s)]).view(4, 3)
    torch.testing.assert_close(scores(reward, s).detach(), expected, rtol=0, atol=1e-5)


def test_an_empty_response_is_read_at_the_prompt(folders: dict[str, str]) -> None:
    reward = build(folders["gpt2"])
    given = scores(reward, tiny.samples([[5, 6], [7]], [[[], [10, 1]], [[11], []]])).detach()
    rows = [[5, 6], [5, 6, 10, 1], [7, 11], [7]]
    expected = torch.stack([plain_score(reward.model, row) for row in rows]).view(2, 2)
    torch.testing.assert_close(given, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_under_autocast_weights_and_scores_stay_wide(name: str, folders: dict[str, str]) -> None:
    s = tiny.ragged()
    exact = scores(build(folders[name], torch.float32), s).detach()
    reward = build(folders[name], torch.float32, autocast=torch.bfloat16)
    given = scores(reward, s)
    assert given.dtype == torch.float32
    assert 0 < float((given.detach() - exact).abs().max()) < 0.5
    with torch.autocast("cpu", torch.bfloat16):  # one that a caller left on misses the head
        assert torch.equal(scores(reward, s), given)
    given.sum().backward()
    for key, parameter in reward.named_parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32, key


def test_the_loss_falls_by_its_gradient(folders: dict[str, str]) -> None:
    """A finite difference along the gradient of a Bradley-Terry loss."""
    reward, s = build(folders["gpt2"]), tiny.ragged()

    def loss() -> Tensor:
        given = scores(reward, s)
        return bradley_terry(given[:, 0], given[:, 1]).mean()

    loss().backward()
    steps = [(p, p.grad) for p in reward.parameters() if p.grad is not None]
    slope = sum(float(g.square().sum()) for _, g in steps)
    values = []
    for h in (1e-5, -2e-5):
        with torch.no_grad():
            for parameter, grad in steps:
                parameter.add_(h * grad)
        values.append(float(loss().detach()))
    assert (values[0] - values[1]) / 2e-5 == pytest.approx(slope, rel=1e-5)


# --- saved --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_plain_transformers_reads_what_was_saved(
    name: str, folders: dict[str, str], tiny_model: str, tmp_path: Path
) -> None:
    """Single rows and batches padded on the right, by its own forward and its own tokenizer."""
    reward, s = build(folders[name], torch.float32), tiny.ragged()
    expected = scores(reward, s).detach().flatten()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model, padding_side="left")
    reward.save(tmp_path / "saved", tokenizer)
    assert tokenizer.pad_token_id == tiny.END  # the caller's own is as it was
    assert tokenizer.padding_side == "left"
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "saved", dtype=torch.float32
    ).eval()
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert type(model).__name__.endswith("ForSequenceClassification")
    pad = model.config.pad_token_id
    assert model.config.num_labels == 1 and pad == theirs.pad_token_id
    assert pad not in huggingface.end_ids(model, theirs) == [tiny.END]
    rows = rows_of(s)
    assert all(row[-1] == tiny.END for row in rows)
    with torch.no_grad():
        single = torch.cat([model(input_ids=torch.tensor([row])).logits[0] for row in rows])
        batch = theirs.pad({"input_ids": rows}, return_tensors="pt")
        assert batch["input_ids"].shape[1] == max(map(len, rows))
        assert bool((batch["input_ids"][0, len(rows[0]) :] == pad).all())
        padded = model(**batch).logits.squeeze(-1)
    torch.testing.assert_close(single, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(padded, expected, rtol=0, atol=1e-5)
    # with the end token as padding, as the model came, it reads another place
    model.config.pad_token_id = tiny.END
    with torch.no_grad():
        wrong = torch.cat([model(input_ids=torch.tensor([row])).logits[0] for row in rows])
    assert float((wrong - expected).abs().max()) > 1e-2

    again = RewardModel(classifier_from(str(tmp_path / "saved"), torch.float32))
    torch.testing.assert_close(scores(again, s).detach().flatten(), expected, rtol=0, atol=1e-6)
    assert torch.equal(again.model.score.weight, reward.model.score.weight)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_reward_of_a_saved_folder_agrees(
    name: str, folders: dict[str, str], tiny_model: str, tmp_path: Path
) -> None:
    reward, s = build(folders[name], torch.float32), tiny.ragged()
    reward.save(tmp_path / "saved", huggingface.load_tokenizer(tiny_model))
    model, _ = huggingface.load_classifier(str(tmp_path / "saved"), torch.float32)
    rows = rows_of(s)
    classifier = Classifier("saved", model, lambda prompt, *_: rows[prompt])
    numbers: list[Any] = list(range(len(rows)))
    judged = Judged(prompts=numbers, completions=[""] * len(rows), tokens=[1] * len(rows))
    given = torch.tensor(classifier(judged))
    torch.testing.assert_close(given, scores(reward, s).detach().flatten(), rtol=0, atol=1e-5)


def test_a_folder_without_tokenizer_is_saved_too(
    folders: dict[str, str], tmp_path: Path, tiny_model: str
) -> None:
    """The configuration alone names no token but the end's: none is better than a wrong one."""
    reward = build(folders["llama"], torch.float32)
    reward.save(tmp_path / "saved", None)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "saved")
    assert config.pad_token_id is None and not (tmp_path / "saved" / "tokenizer.json").exists()


def vocabulary(special: dict[int, str], template: str | None = None, **named: int) -> Any:
    """A tokenizer's special tokens."""
    given: dict[str, Any] = {"pad_token_id": None, "unk_token_id": None, "bos_token_id": None}
    added = {i: SimpleNamespace(content=text, special=True) for i, text in special.items()}
    return SimpleNamespace(**(given | named), added_tokens_decoder=added, chat_template=template)


def needing(eos: Any, pad: int | None, size: int = 100) -> Any:
    config = SimpleNamespace(pad_token_id=pad, vocab_size=size, eos_token_id=eos)
    config.get_text_config = lambda: config
    return SimpleNamespace(config=config, generation_config=None)


@pytest.mark.parametrize(
    ("model", "tokenizer", "expected"),
    [
        (needing(1, 5), vocabulary({}, eos_token_id=1), 5),  # the model's own
        (needing(1, 1), vocabulary({}, eos_token_id=1, pad_token_id=4), 4),
        (needing(0, 0), vocabulary({0: "<|endoftext|>", 1: "<|padding|>"}, eos_token_id=0), 1),
        (needing(2, 2), vocabulary({0: "<unk>", 1: "<s>"}, unk_token_id=0, bos_token_id=1), 0),
        (needing(2, None), vocabulary({1: "<s>", 2: "</s>"}, bos_token_id=1), 1),
        (needing([7, 8], 8), vocabulary({7: "<e>", 8: "<t>", 9: "<im>", 6: "<o>"}, "<im>"), 6),
        (needing([7, 8], 8), vocabulary({7: "<e>", 8: "<t>", 9: "<im>"}, "<im>"), 9),
        (needing(2, 2, size=5), vocabulary({9: "<pad>", 2: "</s>"}, pad_token_id=9), None),
        (needing(0, None), vocabulary({0: "<|endoftext|>"}, bos_token_id=0, unk_token_id=0), None),
    ],
)  # fmt: skip
def test_padding_is_no_end_token(model: Any, tokenizer: Any, expected: int | None) -> None:
    assert padding_id(model, tokenizer) == expected


def test_end_ids_of_the_generation_config_are_no_padding(
    folders: dict[str, str], tmp_path: Path, tiny_model: str
) -> None:
    """A chat model may end responses by more than its tokenizer's end token."""
    folder = rewritten(folders["qwen2"], tmp_path / "chat", pad_token_id=2)
    generation = transformers.GenerationConfig(eos_token_id=[1, 2])
    generation.save_pretrained(folder)
    tokenizer = huggingface.load_tokenizer(tiny_model)
    reward = build(folder, torch.float32)
    assert padding_id(reward.model, tokenizer) not in (1, 2, None)
    reward.save(tmp_path / "saved", tokenizer)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "saved")
    assert config.pad_token_id not in (1, 2, None)


def test_without_another_token_batches_are_refused_and_rows_are_right(
    folders: dict[str, str], tmp_path: Path, tiny_model: str
) -> None:
    reward = build(folders["gpt2"], torch.float32)
    bare = vocabulary({}, eos_token_id=1)
    assert padding_id(reward.model, bare) is None
    reward.save(tmp_path / "saved", None)
    model: Any = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="no padding token"):
        model(input_ids=torch.tensor([[5, 1], [6, 1]]))
    s = tiny.samples([[5]], [[[6, 1]]])
    given = model(input_ids=torch.tensor([[5, 6, 1]])).logits.detach()
    torch.testing.assert_close(given, scores(reward, s).detach(), rtol=0, atol=1e-5)


def test_a_reward_model_with_an_adapter(folders: dict[str, str]) -> None:
    """Only the adapter and the head, which peft copies, are trained; both are in the score."""
    import peft

    plain, s = build(folders["llama"]), tiny.ragged()
    expected = scores(plain, s).detach()
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS")
    model = peft.get_peft_model(plain.model, config, autocast_adapter_dtype=False).double()
    reward = RewardModel(model)
    given = scores(reward, s)
    torch.testing.assert_close(given.detach(), expected, rtol=0, atol=1e-10)
    given.square().sum().backward()
    names = {name for name, _ in reward.named_parameters()}
    assert names == {n for n in names if "lora" in n or "score" in n}
    assert all(p.grad is not None for p in reward.parameters())
    with torch.no_grad():
        for parameter in reward.parameters():
            parameter.add_(0.1)
    assert float((scores(reward, s).detach() - expected).abs().min()) > 1e-3
