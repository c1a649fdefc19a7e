"""What the README and the examples show is true: their commands run, and the tree names the files that exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest
from family_zoo import make_checkpoint
from safetensors.torch import load_file, save_file
from warm import quick

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLES = sorted((ROOT / "examples").glob("*.sh"))

# Words of a command line, for where there is no jq: `jq .a.b`.
JQ = """#!{python}
import json, sys
value = json.load(sys.stdin)
for key in sys.argv[1].strip(".").split("."):
    value = value[key]
print(json.dumps(value))
"""


def blocks(text: str, *languages: str) -> list[str]:
    """The contents of fenced blocks in one of the languages."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [content for language, content in fenced if language in languages]


def scripts(text: str) -> list[str]:
    """What a reader would type: sh blocks as they are, of console blocks the lines behind the prompt."""
    typed = [re.findall(r"^\$ (.*)$", block, re.MULTILINE) for block in blocks(text, "console")]
    return [*("\n".join(lines) + "\n" for lines in typed), *blocks(text, "sh")]


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A folder with the files that the README speaks of, made on the spot."""
    folder = make_checkpoint(tmp_path / "model", "llama", vocab_size=300)
    config = (folder / "config.json").read_text()
    for name in ("small.safetensors", "small.st"):
        save_file(load_file(folder / "model.safetensors"), tmp_path / name, {"format": "pt", "config": config})
    (tmp_path / "t.txt").write_text("Once upon a time there was a small model. " * 20)
    return tmp_path


def runs(script: str, workspace: Path, *, whole: bool = False) -> subprocess.CompletedProcess[str]:
    """Run a script in the workspace, with a tlt first on the path that has its imports behind it, or with `whole` the
    one that is installed here; any failing command ends it."""
    shims = workspace / "bin"
    shims.mkdir(exist_ok=True)
    (shims / "jq").write_text(JQ.format(python=sys.executable))
    (shims / "jq").chmod(0o755)
    here = str(Path(sys.executable).parent)
    path = os.pathsep.join([*([] if whole else [str(quick())]), here, os.environ["PATH"], str(shims)])
    return subprocess.run(
        ["bash", "-c", f"set -euo pipefail\n{script}"],
        cwd=workspace,
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("script", scripts(README), ids=lambda script: script.splitlines()[0])
def test_the_readme_runs(script: str, workspace: Path) -> None:
    result = runs(script, workspace)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_the_examples_run(example: Path, workspace: Path) -> None:
    result = runs(f"bash {example}", workspace)
    assert result.returncode == 0, result.stderr


def test_what_the_readme_prints(workspace: Path) -> None:
    """Where a console block shows a line of output, a command of the block prints it."""
    for block in blocks(README, "console"):
        shown = [line for line in block.splitlines() if not line.startswith("$ ")]
        if shown:
            (script,) = scripts(f"```console\n{block}```\n")
            printed = runs(script, workspace, whole=True).stdout.splitlines()
            assert [line for line in shown if line not in printed] == []


@pytest.mark.parametrize(
    "line",
    [
        "tlt grwo small.safetensors --to-dim 512",
        "tlt eval missing.st --data t.txt",
        "tlt inspect missing.st --json | jq .axes",
    ],
)
def test_a_line_that_does_not_work_is_seen(line: str, workspace: Path) -> None:
    (script,) = scripts(f"text\n```console\n$ tlt inspect small.st\n$ {line}\nsmall.st\n```\n")
    assert script == f"tlt inspect small.st\n{line}\n"
    assert runs(script, workspace).returncode != 0


def test_every_command_is_shown() -> None:
    from tlt_cli.cli import app

    commands = {command.name for command in app.registered_commands}
    shown = {words for script in scripts(README) for words in re.findall(r"\btlt (\w+)", script)}
    listed = set(re.findall(r"^\| `tlt (\w+)`", README, re.MULTILINE))
    assert listed == commands
    assert shown | {"demo"} >= commands  # the demo takes minutes: it has a test of its own


def tree(readme: str) -> Iterator[str]:
    """The paths below tlt_cli/ that the README's tree names; indentation says in which folder."""
    (block,) = [block for block in blocks(readme, "") if block.startswith("tlt_cli/\n")]
    folder = ""
    for line in block.splitlines()[1:]:
        name = line.split()[0]
        if name.endswith("/"):
            folder = name
        else:
            yield (folder if line.startswith("    ") else "") + name


def untrue(entries: list[str], files: set[str]) -> set[str]:
    """Files that no entry names, and entries that name no file. What a folder's __init__.py is, its own line says."""
    nameless = {f for f in files if not f.endswith("/__init__.py") and not any(fnmatch(f, e) for e in entries)}
    return nameless | {entry for entry in entries if not any(fnmatch(file, entry) for file in files)}


def test_the_tree_names_every_file() -> None:
    package = ROOT / "tlt_cli"
    files = {
        path.relative_to(package).as_posix() for end in ("py", "toml", "json") for path in package.rglob(f"*.{end}")
    }
    assert untrue(list(tree(README)), files) == set()
    assert untrue([*tree(README), "cli/imagined.py"], files) == {"cli/imagined.py"}
    assert untrue(list(tree(README)), {*files, "surgery/forgotten.py"}) == {"surgery/forgotten.py"}


def test_there_is_one_test_command() -> None:
    """.ci/run takes the test command from the README: it must find exactly one."""
    pattern = re.search(r"sed -n 's/(\^python3.*)/\\1/p'", (ROOT / ".ci" / "run").read_text())
    assert pattern is not None
    found = re.findall(pattern[1].replace(r"\(", "(").replace(r"\)", ")"), README, re.MULTILINE)
    assert found == ["python -m pytest -n auto --dist worksteal"]
