"""Shows `preftune inspect`'s facts to a person."""

from collections.abc import Mapping
from typing import Any


def show(facts: Mapping[str, Any]) -> None:
    """Print rows token by token (prompt dim, trained tokens bold, the end token reversed), then counts."""
    from rich.console import Console
    from rich.text import Text

    console = Console()
    for row in facts["rows"]:
        console.rule(row["where"], align="left")
        for response in row["responses"]:
            text = Text(f"{response['name']}: ", style="cyan")
            for token in (*row["prompt"], *response["tokens"]):
                style = "reverse" if token["part"] == "end" else "bold" if token["loss"] else "dim"
                text.append(token["text"], style=style)
            console.print(text)
    console.rule("dim: prompt, bold: trained, reversed: end token", align="left")
    for name, value in facts.items():
        if name != "rows":
            console.print(f"{name}: {value}", markup=False, highlight=False)
