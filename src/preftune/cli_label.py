"""preftune label: preferences by people, on a local page."""

from functools import partial
from pathlib import Path
from typing import Any

from preftune.cli_train import JSON, print_json
from preftune.errors import UserError

FLAGS = [
    ("models", str | None, None, "A,B in place of --model: one response of each; who wins?"),
    ("blind", bool, False, "with --models: do not show which model wrote what"),
    ("pairs", int | None, None, "to be judged; default: one a prompt"),
    ("overlap", float, 0.0, "share of pairs that two annotators judge, for their agreement"),
    ("port", int, 0, "of the page; 0: a free one"),
    ("open", bool, False, "open the page in the browser"),
    JSON,
]


def label(args: list[str]) -> int:
    """The command."""
    from preftune import config, flags
    from preftune.progress import stderr, working

    text = "Two fresh responses side by side on a local page; what people prefer, as training data."
    given, own = flags.parse("label", text, flags.LABEL, args, FLAGS)
    output = Path(given.pop("output", "labels.jsonl"))
    names = _names(given, own)
    settings, console = config.load(given), stderr()
    with working(console, "loading"):
        from preftune.labelling import agreement, drawing
        from preftune.labelling.book import Book
        from preftune.labelling.supply import Supply

        each = drawing.writers(settings, names)
    count = own["pairs"] or len(each[0].rows)
    book = Book(output)
    pairs = partial(drawing.draw, each, settings.seed)
    supply = Supply(book, pairs, count=count, overlap=own["overlap"], seed=settings.seed)
    try:
        server = _listening(supply, own, len(names) == 2)
        console.print(f"label here: {server.address}", markup=False, highlight=False,
                      soft_wrap=True)  # fmt: skip
        console.print("Finish on the page, or Ctrl-C here.", highlight=False)
        if own["open"]:
            _open(server.address)
        ended = _serve(server)
    finally:
        supply.close()
        book.close()
    found, judged = book.snapshot()
    result = agreement.summary(found, judged, names) | {"output": str(output)}
    if own["json"]:
        print_json(result)
    else:
        print("\n".join(lines(result)))
    if server.failed is not None:
        raise server.failed
    return ended


def _names(given: dict[str, Any], own: dict[str, Any]) -> list[str]:
    """The models; flags that do not go together are refused."""
    if own["pairs"] is not None and own["pairs"] < 1:
        raise UserError(f"flag '--pairs': is {own['pairs']}. Give 1 or more.")
    if not 0 <= own["overlap"] <= 1:
        raise UserError(f"flag '--overlap': is {own['overlap']:g}. Give 0 to 1.")
    if not 0 <= own["port"] < 2**16:
        raise UserError(f"flag '--port': is {own['port']}. Give 0 to 65535.")
    if given.get("output") and Path(given["output"]).is_dir():
        raise UserError(f"output '{given['output']}': is a folder. Give a file, as labels.jsonl.")
    if own["models"] is None:
        if own["blind"]:
            raise UserError("flag '--blind': goes with --models A,B.")
        from preftune.config import Config

        return [given.get("model", Config.model_fields["model"].get_default())]
    names = [n.strip() for n in own["models"].split(",") if n.strip()]
    if len(names) != 2 or names[0] == names[1] or "model" in given:
        raise UserError("flag '--models': give two different ones, as A,B, and no --model.")
    return names


def _listening(supply: Any, own: dict[str, Any], two: bool) -> Any:
    from preftune.labelling.server import Server

    try:
        return Server(supply, names=two and not own["blind"], port=own["port"])
    except OSError as error:
        raise UserError(
            f"port {own['port']}: {error.strerror}. Give another --port, or none."
        ) from None


def _serve(server: Any) -> int:
    """Until the page says that it is enough (0) or the terminal does (130)."""
    try:
        server.serve_forever(poll_interval=0.2)
        return 0
    except KeyboardInterrupt:
        return 130
    finally:
        server.server_close()


def _open(address: str) -> None:
    import webbrowser

    webbrowser.open(address)


def lines(result: dict[str, Any]) -> list[str]:
    """For the terminal."""
    out = [
        f"{result['judgements']} judgements of {result['pairs']} pairs: {result['preferences']} "
        f"preferences, {result['ties']} ties, {result['skipped']} skipped"
    ]
    if result["agreement"] is not None:
        alpha = "" if result["alpha"] is None else f"; Krippendorff's alpha {result['alpha']:.2f}"
        out.append(f"annotators agree on {_share(result['agreement'])}{alpha}")
    if result["left_chosen"] is not None:
        out.append(f"the left response was chosen in {_share(result['left_chosen'])}")
    for name, won in (result.get("win_rate") or {}).items():
        if won is not None:
            out.append(f"{name} wins {_share(won)}, ties half, over prompts")
    return [*out, f"pairs for training: {result['output']}"]


def _share(figure: dict[str, Any]) -> str:
    if figure["low"] is None:
        return f"{100 * figure['value']:.0f} %"
    low, high = 100 * figure["low"], 100 * figure["high"]
    return f"{100 * figure['value']:.0f} % [{low:.0f}, {high:.0f}]"
