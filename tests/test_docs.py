"""The generated pages agree with the code."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    """Reading the sources takes seconds a page."""
    spec = importlib.util.spec_from_file_location("make_docs", ROOT / "scripts" / "make_docs.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {name: make() for name, make in module.PAGES.items()}


@pytest.mark.parametrize(
    "name", ["methods.md", "metrics.md", "rows.md", "config.md", "papers.md", "coming-from-trl.md"]
)
def test_a_page_is_what_the_code_says(name, pages):
    assert (ROOT / "docs" / name).read_text() == pages[name], "run scripts/make_docs.py"


def test_the_row_in_the_docs_is_one(tmp_path):
    """The YAML of docs/rows.md builds a row."""
    import yaml

    from preftune import building
    from preftune.config import load

    text = (ROOT / "docs" / "rows.md").read_text()
    block = text.split("```yaml\n")[1].split("```")[0]
    row = building.method_of(load(yaml.safe_load(block)))
    assert row.target_kl == 3.0 and len(row.terms) == 2 and row.on_policy
