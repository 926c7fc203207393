"""Preference data: any file to examples, examples to token ids, ids to `Samples`."""

from preftune.data.canonical import Example, Message, Prompt
from preftune.data.chat import Encoded, Renderer, RowError
from preftune.data.files import parse
from preftune.data.formats import Loaded, Rejected, check_bad_rows, load_examples, write_rejected
from preftune.data.inspection import check_end_token, inspect_rows, trivial_rules
from preftune.data.rows import Report, Rows, build_rows

__all__ = [
    "Encoded",
    "Example",
    "Loaded",
    "Message",
    "Prompt",
    "Rejected",
    "Renderer",
    "Report",
    "RowError",
    "Rows",
    "build_rows",
    "check_bad_rows",
    "check_end_token",
    "inspect_rows",
    "load_examples",
    "parse",
    "trivial_rules",
    "write_rejected",
]
