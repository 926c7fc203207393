"""`preftune completion SHELL`: what a shell offers after preftune, and after each command.

The flags and their choices are those that `preftune COMMAND --help` prints, so they are never old.
"""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout

SHELLS = ("bash", "zsh", "fish")
Offered = Mapping[str, Mapping[str, Sequence[str]]]
"""By command: its flags, and the values of each; none where a file's name is as likely."""

_FLAG = re.compile(r"(?<![\w-])(--[a-z][a-z-]*)(?: (?:\{None\}\|)?(?:\{(?!None)([^}]*)\})?)?")


def offered(commands: Mapping[str, Callable[[list[str]], int]], rows: Sequence[str]) -> Offered:
    """Flags and choices of each command, from its own help.

    Args:
        commands: by name; each prints its help when asked, and ends.
        rows: names of the table of methods.
    """
    found = {}
    for name, command in commands.items():
        text = io.StringIO()
        with redirect_stdout(text):
            try:
                command(["--help"])
            except SystemExit:
                pass
        pairs = _FLAG.findall(re.sub(r"\s+", " ", text.getvalue()))
        flags = {flag: [v for v in values.split(",") if v] for flag, values in pairs}
        found[name] = {f: rows if f in ("--method", "--methods") else v for f, v in flags.items()}
    return found


def script(shell: str, found: Offered) -> str:
    """What `shell` reads to complete preftune."""
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](found)


def _bash(found: Offered) -> str:
    cases = []
    for command, flags in found.items():
        cases.append(f'    {command},) words="{" ".join(flags)}" ;;')
        cases += [
            f'    {command},{flag}) words="{" ".join(values)}" ;;'
            for flag, values in flags.items()
            if values
        ]
    names = " ".join(found)
    return "\n".join((
        "_preftune() {",
        '  local word="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}" words=""',
        '  [[ "$word" == -* || "$before" != --* ]] && before=""',
        "  if [[ $COMP_CWORD -eq 1 ]]; then",
        f'    words="{names} --help --version"',
        '  else case "${COMP_WORDS[1]},$before" in',
        *cases,
        "  esac; fi",
        '  COMPREPLY=($(compgen -W "$words" -- "$word"))',
        "}",
        "complete -o default -F _preftune preftune",
        "",
    ))  # fmt: skip


def _zsh(found: Offered) -> str:
    return "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n" + (
        _bash(found)
    )


def _fish(found: Offered) -> str:
    lines = [f"complete -c preftune -n __fish_use_subcommand -f -a '{' '.join(found)}'"]
    for command, flags in found.items():
        here = f"complete -c preftune -n '__fish_seen_subcommand_from {command}'"
        for flag, values in flags.items():
            choices = f" -x -a '{' '.join(values)}'" if values else ""
            lines.append(f"{here} -l {flag.removeprefix('--')}{choices}")
    return "\n".join(lines) + "\n"
