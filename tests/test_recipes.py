"""`recipes/`: every file runs as it stands but for its sizes, and says where each value is from."""

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

from preftune import building, cli
from preftune.config import load, read_yaml
from preftune.method import SETTINGS
from preftune.rounds import updates_per_epoch
from preftune.runs import RunFolder

pytestmark = pytest.mark.long

FOLDER = Path(__file__).parent.parent / "recipes"
RECIPES = sorted(FOLDER.glob("*/*.yaml"))
NAMES = [str(path.relative_to(FOLDER)) for path in RECIPES]
SIZES: dict[str, Any] = {
    "max_steps": 2, "batch_size": 2, "prompts_per_round": 4, "max_new_tokens": 4,
    "dtype": "float32", "device": "cpu", "threads": 1,
}  # fmt: skip
"""All that is changed of a recipe, beside the files: model, data, eval_data, reward, output."""
FILES = ("model", "data", "eval_data", "reward", "output")
TAGGED = re.compile(r"^ *(?:- )?(\w+): (.+?)  # \[(verified|recalled|ours)\] (\S.{3,})$")
SIZE = re.compile(r"^# Size: ([\d,]+) rows, ([\d,]+) updates", re.M)

INSTRUCTIONS = [{"instruction": f"Say {n}.", "input": "or so" * (n % 2)} for n in range(8)]
QUERY = "SUBREDDIT: r/x\n\nTITLE: {n}\n\nPOST: It is {n}.\n\nTL;DR:"
SOURCES: dict[str, list[dict[str, Any]]] = {
    "alpacafarm-sft": [{**row, "output": f"{n}"} for n, row in enumerate(INSTRUCTIONS)],
    "alpacafarm-prompts": INSTRUCTIONS,
    "alpacafarm-pairs": [
        {
            "prompt": (start := f"<|prompter|>Say {n}.<|endoftext|><|assistant|>"),
            "y_w": f"{start}{n}<|endoftext|>", "y_l": f"{start}I say {n}", "y_ref": "",
            "y_w_score": 1.0, "y_l_score": 0.5,
        }
        for n in range(8)
    ],
    "ultrachat": [
        {
            "prompt": f"Say {n}.", "prompt_id": f"{n}",
            "messages": [
                {"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"{n}"},
                {"role": "user", "content": "Again."}, {"role": "assistant", "content": f"{n}!"},
            ],
        }
        for n in range(4)
    ],
    "ultrafeedback": [
        {
            "prompt": f"Say {n}.", "prompt_id": f"{n}", "score_chosen": 9.0, "score_rejected": 2.0,
            "chosen": [
                {"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"{n}"},
            ],
            "rejected": [
                {"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": "No."},
            ],
            "messages": [],
        }
        for n in range(8)
    ],
    "tldr-sft": [
        {"query": QUERY.format(n=n), "reference_response": f" {n}.<|endoftext|>", "summary": f"{n}"}
        for n in range(8)
    ],
    "tldr-pairs": [
        {
            "query": QUERY.format(n=n), "chosen": f" {n}.<|endoftext|>",
            "rejected": f" Something.{n}<|endoftext|>", "query_token": [1, 2], "choice": 0,
        }
        for n in range(8)
    ],
}  # fmt: skip
"""Rows with the columns of the original data sets, by what `prepare.py` calls them."""
PYTHIA = ["<|endoftext|>", "<|padding|>"]
MISTRAL = ["<unk>", "<s>", "</s>"]
LLAMA = [
    f"<|{s}|>"
    for s in ("begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id")
]
LLAMA_TEMPLATE = (
    "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim"
    " + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
SHAPE = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip


def save_model(folder: Path, kind: str, special: list[str], **roles: str) -> Path:
    """A random model of an architecture, over bytes, with the special tokens of the real one."""
    import transformers as hf
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({s: i for i, s in enumerate([*special, *alphabet])}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(s, special=True) for s in special])
    if kind != "GPTNeoX":  # Pythia's tokenizer adds no BOS, the other two do
        first = roles["bos_token"]
        core.post_processor = processors.TemplateProcessing(
            single=f"{first} $A", special_tokens=[(first, special.index(first))]
        )
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=core, **roles)
    ids = {f"{r}_id": special.index(roles[r]) for r in ("bos_token", "eos_token")}
    heads = {} if kind == "GPTNeoX" else {"num_key_value_heads": 1}
    config = getattr(hf, f"{kind}Config")(
        vocab_size=len(tokenizer), max_position_embeddings=8192, **SHAPE, **ids, **heads
    )
    torch.manual_seed(0)
    model = getattr(hf, f"{kind}ForCausalLM")(config)
    if kind == "Llama":  # Llama 3 ends a turn by one token and a text by another
        tokenizer.chat_template = LLAMA_TEMPLATE
        model.generation_config.eos_token_id = [1, 4]
    assert sum(p.numel() for p in model.parameters()) < 100_000
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def prepare() -> ModuleType:
    """`recipes/prepare.py`, which is a script."""
    spec = importlib.util.spec_from_file_location("recipes_prepare", FOLDER / "prepare.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, prepare: ModuleType) -> Path:
    """A folder with the models, the data as `prepare.py` writes them, and a learned reward."""
    folder = tmp_path_factory.mktemp("recipes")
    end = "<|endoftext|>"
    save_model(folder / "pythia", "GPTNeoX", PYTHIA, bos_token=end, eos_token=end, unk_token=end)
    save_model(
        folder / "mistral", "Mistral", MISTRAL,
        bos_token="<s>", eos_token="</s>", unk_token="<unk>",
    )  # fmt: skip
    save_model(folder / "llama", "Llama", LLAMA, bos_token=LLAMA[0], eos_token=LLAMA[4])
    for kind, rows in SOURCES.items():
        source = folder / f"{kind}.source.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        prepare.main([kind, str(source), str(folder / f"{kind}.jsonl"), "--split", "whatever"])
    return folder


def command(path: Path, setting: str, values: dict[str, Any]) -> str:
    """What the head comment makes a file with: the kind of data that `prepare.py` is told."""
    head = re.sub(r" \\\n# +", " ", path.read_text())
    stem = Path(values[setting]).name.removesuffix(".jsonl")
    found = re.findall(r"prepare\.py ([\w-]+) .*?runs/data/([\w-]+)\.jsonl", head)
    known = {name: kind for kind, name in found}
    if stem not in known:  # "(again with --split test, into runs/data/...)"
        assert f", into runs/data/{stem}.jsonl)" in head
        return next(kind for name, kind in known.items() if stem.startswith(name))
    return known[stem]


def files_of(path: Path, values: dict[str, Any], world: Path) -> dict[str, str]:
    """The recipe's files, each in small."""
    model = {"ultrafeedback": "mistral", "chat": "llama"}.get(path.parent.name, "pythia")
    found = {"model": str(world / model)}
    for setting in ("data", "eval_data"):
        if setting in values:
            found[setting] = str(world / f"{command(path, setting, values)}.jsonl")
    if "reward" in values:
        found["reward"] = str(world / "reward")
    return found


def under(data: Any, name: str) -> Iterator[Any]:
    """Every value of that name in nested data."""
    if isinstance(data, dict):
        yield from (data[name],) if name in data else ()
    for part in data.values() if isinstance(data, dict) else data if isinstance(data, list) else ():
        yield from under(part, name)


def run(path: Path, world: Path, output: str) -> None:
    """Two updates as the command line makes them; the run's own settings are the recipe's."""
    values = read_yaml(path)
    small = {k: v for k, v in SIZES.items() if k in values or k not in SETTINGS}
    changed = {**files_of(path, values, world), **small, "output": output}
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in changed.items()]
    assert set(changed) <= {*SIZES, *FILES}
    assert cli.run(["train", "--config", str(path), *flags]) == 0
    folder = RunFolder(Path(output))
    rows = [row for row in folder.read("metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2], rows
    resolved = folder.read_config()
    for name in values.keys() - changed.keys() - {*SETTINGS, "method"}:
        assert values[name] == resolved[name], name
    for name in (values.keys() & set(SETTINGS)) - changed.keys():
        assert values[name] in list(under(resolved, name)), name
    assert not Path(f"{output}.rejected.jsonl").exists()


@pytest.fixture(scope="session")
def learned(world: Path) -> Path:
    """The recipe for the reward gives the reward of the others."""
    run(FOLDER / "alpacafarm" / "reward.yaml", world, str(world / "reward"))
    return world / "reward" / "model"


@pytest.fixture
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes name files as seen from the repository's root."""
    monkeypatch.chdir(FOLDER.parent)


def test_there_are_the_papers_recipes():
    folders = {path.parent.name for path in RECIPES}
    assert folders == {"alpacafarm", "ultrafeedback", "tldr", "chat"} and len(RECIPES) == 23


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_it_runs_as_it_stands_but_for_its_sizes(path, world, learned, at_root, tmp_path):
    run(path, world, str(tmp_path / "out"))


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_every_value_says_where_it_is_from(path):
    lines = [line for line in path.read_text().splitlines() if line.strip()]
    assert max(map(len, lines)) <= 100
    valued = [line for line in lines if not line.lstrip().startswith("#")]
    tags = [TAGGED.match(line) for line in valued]
    assert all(tags), [line for line, tag in zip(valued, tags, strict=True) if not tag]
    assert {tag[1] for tag in tags if tag} == read_yaml(path).keys()


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_its_length_is_what_it_says(path):
    """The updates that the head names follow from the rows, epochs, rounds, passes and batch."""
    config = load(path)
    assert config.max_steps is None
    said = SIZE.search(path.read_text())
    assert said is not None and "Not run at full size" in path.read_text()
    rows, updates = (int(n.replace(",", "")) for n in said.groups())
    method = building.method_of(config)
    one = updates_per_epoch(method, rows, config.batch_size)
    assert round(config.epochs * one) == updates
    given = config.model_fields_set
    assert given >= {"epochs", "learning_rate", "lr_schedule", "warmup_ratio", "weight_decay"}
    assert given >= {"method", "model", "data", "batch_size", "max_length", "truncation", "seed"}


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_the_table_lists_it(path):
    text = (FOLDER / "README.md").read_text()
    name = path.relative_to(FOLDER.parent)
    assert f"preftune train --config {name}" in path.read_text()
    assert f"`{path.relative_to(FOLDER)}`" in text


def test_the_papers_letters_are_what_the_comments_say():
    """B, C, T and M of the on-policy recipes, by hand."""
    said = {
        "ppo": (128, 1, 4, 128), "reinforce": (64, 1, 1, 64), "rwr": (64, 1, 1, 64),
        "best_of_n": (256, 4, 1, 16), "on_policy_dpo": (128, 2, 2, 64),
    }  # fmt: skip
    for name, letters in said.items():
        source = building.method_of(load(FOLDER / "alpacafarm" / f"{name}.yaml")).terms[0].source
        config = load(FOLDER / "alpacafarm" / f"{name}.yaml")
        samples = source.prompts_per_round * source.num_responses
        assert (samples, source.num_responses, source.passes, config.batch_size) == letters


def test_prepared_rows(world, prepare):
    """By hand, one row of each kind."""
    start = "<|prompter|>Say 1.\nor so<|endoftext|><|assistant|>"
    plain = "<|prompter|>Say 1.<|endoftext|><|assistant|>"
    turns = SOURCES["ultrachat"][0]["messages"]
    pair = SOURCES["ultrafeedback"][1]
    query = QUERY.format(n=1)
    expected = {
        "alpacafarm-sft": {"prompt": start, "completion": "1"},
        "alpacafarm-prompts": {"prompt": start},
        "alpacafarm-pairs": {"prompt": plain, "chosen": "1", "rejected": "I say 1"},
        "ultrachat": {"messages": turns},  # the second answer of the first conversation
        "ultrafeedback": {"chosen": pair["chosen"], "rejected": pair["rejected"]},
        "tldr-sft": {"prompt": query, "completion": " 1."},
        "tldr-pairs": {"prompt": query, "chosen": " 1.", "rejected": " Something.1"},
    }
    assert expected.keys() == prepare.KINDS.keys() == SOURCES.keys()
    for kind, row in expected.items():
        rows = [json.loads(line) for line in (world / f"{kind}.jsonl").read_text().splitlines()]
        assert rows[1] == row and len(rows) == 8, kind


def test_rows_that_cannot_be_used_are_counted(here, prepare, capsys):
    rows = [{"instruction": "", "input": "", "output": "x"}, {"instruction": "a", "output": " "}]
    Path("in.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [*rows, rows[1] | {"output": "b"}])
    )
    prepare.main(["alpacafarm-sft", "in.jsonl", "out.jsonl"])
    assert "out.jsonl: 2 rows, 1 left out" in capsys.readouterr().err
    pair = {"prompt": "p", "y_w": "q<|assistant|>a", "y_l": "r<|assistant|>b"}
    bare = {"prompt": "p", "y_w": "a", "y_l": "b<|endoftext|>"}
    assert list(prepare.convert([pair, bare], "alpacafarm-pairs")) == [
        None, {"prompt": "p", "chosen": "a", "rejected": "b"},
    ]  # fmt: skip
    text = {"prompt": "p", "chosen": "a", "rejected": "b", "score_chosen": 1.0}
    found = {"prompt": "p", "chosen": "a", "rejected": "b"}
    assert list(prepare.convert([text], "ultrafeedback")) == [found]


def test_another_data_set_is_refused_by_its_column(here, prepare):
    Path("in.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(SystemExit, match="no 'query' in a row that has text"):
        prepare.main(["tldr-sft", "in.jsonl", "out.jsonl"])


def test_parquet_is_read(here, prepare):
    from pyarrow import Table, parquet

    parquet.write_table(Table.from_pylist(SOURCES["tldr-pairs"]), "in.parquet")
    prepare.main(["tldr-pairs", "in.parquet", "out.jsonl"])
    assert len(Path("out.jsonl").read_text().splitlines()) == 8


def test_numbers_are_numbers():
    """YAML takes 1e-6 for a text."""
    for path in RECIPES:
        texts = [v for v in yaml.safe_load(path.read_text()).values() if isinstance(v, str)]
        assert not [v for v in texts if re.fullmatch(r"[\d.e+-]+", v)], path
