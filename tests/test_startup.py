"""What `tlt` loads before it works: help and completion answer without the heavy libraries."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

HEAVY = {"torch", "transformers", "numpy", "scipy", "safetensors", "tokenizers", "huggingface_hub"}
COMMANDS = ["", "demo", "eval", "factor", "fold", "generate", "grow", "inspect", "merge", "slice", "train"]


def loaded_by(code: str) -> set[str]:
    """The heavy libraries that a fresh interpreter has loaded after some code."""
    report = "import sys; print('LOADED', *{name.partition('.')[0] for name in sys.modules})"
    script = f"try:\n    {code}\nfinally:\n    {report}"
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False).stdout
    (line,) = [line for line in output.splitlines() if line.startswith("LOADED")]
    return HEAVY & set(line.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_help_loads_nothing_heavy(command: str) -> None:
    arguments = [*command.split(), "--help"]
    assert loaded_by(f"import sys; from tlt_cli.cli import app; app({arguments})") == set()


def test_what_is_heavy_would_be_seen() -> None:
    assert loaded_by("import numpy") == {"numpy"}
    assert "safetensors" in loaded_by("from tlt_cli.cli import app; import safetensors; app(['--help'])")


def completions(shell: str, words: str, position: int) -> str:
    """What a shell is told when the user presses tab."""
    environment = {**os.environ, "_TLT_COMPLETE": f"complete_{shell}", "COMP_WORDS": words, "COMP_CWORD": str(position)}
    environment |= {"_TYPER_COMPLETE_ARGS": words, "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    command = [sys.executable, "-c", "from tlt_cli.cli import main; main()"]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False).stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_lists_commands_and_options(shell: str) -> None:
    offered = completions(shell, "tlt ", 1)
    assert all(command in offered for command in COMMANDS)
    assert "--context" in completions(shell, "tlt eval --con", 2)
    assert "inspect" in completions(shell, "tlt ins", 1) and "eval" not in completions(shell, "tlt ins", 1)
