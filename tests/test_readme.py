"""The README's commands exist and its Python runs: a reader can trust the first screen."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from hrmtext.cli import main as cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


def commands(program: str) -> list[list[str]]:
    joined = "\n".join(blocks("bash")).replace("\\\n", " ")
    lines = [line.split("  #")[0].strip() for line in joined.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith(program + " ")]


@pytest.mark.parametrize("arguments", commands("make"), ids=" ".join)
def test_a_make_target_of_the_readme_exists(arguments):
    done = subprocess.run(
        ["make", "--dry-run", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("arguments", commands("hrm-text"), ids=" ".join)
def test_a_command_of_the_readme_parses(arguments, capsys):
    """Its verb and every option are known; `--help` stops it before it runs."""
    verb = arguments[:2] if arguments[0] == "data" else arguments[:1]
    with pytest.raises(SystemExit) as stopped:
        cli.main([*verb, "--help"])
    assert stopped.value.code == 0
    known = capsys.readouterr().out
    for option in (a.split("=")[0] for a in arguments if a.startswith("--")):
        assert option in known, f"hrm-text {' '.join(verb)} has no option {option}"


@pytest.mark.parametrize("path", re.findall(r"\(((?:docs|configs)/[\w./-]+)\)", README))
def test_a_link_of_the_readme_leads_somewhere(path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize(
    "path", re.findall(r"configs/[\w/.-]+\.yaml", "\n".join(blocks("bash"))) or [""]
)
def test_a_recipe_that_the_readme_names_exists(path):
    assert (ROOT / path).is_file()
