"""What a shell offers after `preftune`, asked of a real bash."""

import shutil
import subprocess

import pytest

from preftune import cli, completion, methods


@pytest.fixture(scope="module")
def found() -> completion.Offered:
    few = {n: c for n, c in cli._commands().items() if n in ("train", "compare", "report", "env")}
    return completion.offered(few, list(methods.table()))


def bash(found: completion.Offered, *words: str) -> list[str]:
    """What bash offers for the last word."""
    line = " ".join(f"'{w}'" for w in ("preftune", *words))
    asked = (
        f"{completion.script('bash', found)}\nCOMP_WORDS=({line}); COMP_CWORD={len(words)}; "
        '_preftune; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "--norc"], input=asked, capture_output=True, text=True, check=True
    )
    assert not done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "offers"),
    [
        (["co"], ["compare"]),
        (["--v"], ["--version"]),
        (["train", "--lr-"], ["--lr-schedule"]),
        (["train", "--lr-schedule", ""], ["constant", "linear", "cosine"]),
        (["train", "--method", "on_policy_d"], ["on_policy_dpo"]),
        (["train", "--json", "--max-sk"], ["--max-skipped"]),
        (["train", "--config", ""], []),
        (["report", "run"], []),
        (["env", ""], ["--json", "--help"]),
    ],
)
def test_bash_offers(found: completion.Offered, words: list[str], offers: list[str]) -> None:
    if shutil.which("bash") is None:
        pytest.skip("no bash on this machine")
    assert sorted(bash(found, *words)) == sorted(offers)


def test_every_flag_of_training_is_offered(found: completion.Offered) -> None:
    from preftune import flags

    given = {f"--{n.replace('_', '-')}" for n in flags.TRAIN}
    assert given <= set(found["train"])
    assert found["train"]["--dtype"] == ["auto", "float32", "bfloat16", "float64"]


def test_other_shells(found: completion.Offered) -> None:
    fish = completion.script("fish", found)
    assert (
        "complete -c preftune -n '__fish_seen_subcommand_from train' -l method -x -a 'sft" in fish
    )
    zsh = completion.script("zsh", found)
    assert zsh.index("bashcompinit") < zsh.index("complete -o default")


def test_a_shell_that_is_not_known(refused, capsys) -> None:
    assert "bash, zsh, fish" in refused("completion", "tcsh")
