"""Real files and tokenizers that the data tests share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from preftune import huggingface

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"


@pytest.fixture(scope="session")
def shared_file() -> Callable[[str], Path]:
    """The path of a real data file; the test is skipped where it is missing."""

    def find(name: str) -> Path:
        if not (SHARED / name).exists():
            pytest.skip(f"real data {SHARED / name} is not here")
        return SHARED / name

    return find


@pytest.fixture(scope="session")
def smollm() -> Any:
    """The tokenizer of the embedded default model (pad id = end id)."""
    try:
        return huggingface.load_tokenizer("smollm2-135m")
    except Exception as error:
        pytest.skip(f"smollm2-135m is not here: {error}")


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Any]:
    """Make a tokenizer of single characters, and of pairs of them that merge.

    Ids: 0 <s>, 1 </s>, then the printable ASCII characters and the newline, then the merges.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, processors
    from transformers import PreTrainedTokenizerFast

    def make(
        *,
        merges: tuple[tuple[str, str], ...] = (),
        bos: bool = False,
        eos: bool = False,
        trim: bool = False,
        chat: str | None = None,
    ) -> Any:
        """`bos` and `eos` add these tokens to a text; `trim` keeps blanks out of offsets."""
        symbols = ["<s>", "</s>", *map(chr, range(32, 127)), "\n", *(a + b for a, b in merges)]
        core = Tokenizer(models.BPE({s: i for i, s in enumerate(symbols)}, list(merges)))
        core.decoder = decoders.Fuse()
        core.add_special_tokens([AddedToken("<s>"), AddedToken("</s>")])
        if bos or eos:
            core.post_processor = processors.TemplateProcessing(
                single="<s> " * bos + "$A" + " </s>" * eos,
                special_tokens=[("<s>", 0), ("</s>", 1)],
            )
        if trim:
            core.post_processor = processors.ByteLevel(trim_offsets=True)
        made = PreTrainedTokenizerFast(
            tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="</s>"
        )
        made.chat_template = chat
        return made

    return make
