"""What the README says is so: its code runs, its commands and ids exist, its links lead somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import gymnasium
import pytest

import emuworld  # noqa: F401  registers the ids
from emuworld import command_help
from emuworld.checkpoint_folder import BUILTIN, FILES
from emuworld.command_table import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    """The fenced code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.M | re.S)


@pytest.mark.skipif(
    any(not (BUILTIN["small"] / name).is_file() for name in FILES),
    reason="emuworld/weights/small is not complete: the built-in model has not been trained yet",
)
@pytest.mark.timeout(900)
def test_code_of_the_readme_runs(tmp_path: Path) -> None:
    """All blocks one after the other in a fresh process, as a reader would type them."""
    script = tmp_path / "readme.py"
    script.write_text("\n".join(blocks(README, "python")), encoding="utf-8")
    command = [sys.executable, "-W", "error::DeprecationWarning:__main__", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=850, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(re.findall(r"^(?:turn right|move forward) \d+\.\d dB$", done.stdout, flags=re.M)) == 2
    assert "brightness turn left" in done.stdout and "look down (256, 256, 3) False" in done.stdout


def test_setup_is_two_commands() -> None:
    first, *_ = blocks(README, "sh")
    assert first.splitlines() == ["./run emuworld demo", "./run pytest"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page: Path) -> None:
    """Every `emuworld COMMAND choice=… setting=…` and `scripts/…` that a page names."""
    text = page.read_text(encoding="utf-8").replace("\\\n", "")
    for line in code_lines(text):
        found = re.match(r"(?:\./run )?emuworld (\w+)(?: ([\w-]+=?[\w-]*))?", line)
        if found is None or found[1] == "COMMAND":
            continue
        name, (key, equals, value) = found[1], (found[2] or "").partition("=")
        assert name in COMMANDS, f"{page.name} names the command {name}"
        if COMMANDS[name].choice and (key == COMMANDS[name].choice or (key and not equals)):
            choice = value if equals else key
            assert choice in (*COMMANDS[name].targets, "NAME"), f"{page.name} has the line {line}"
            targets = [choice] if choice in COMMANDS[name].targets else []
        else:
            targets = list(COMMANDS[name].targets)
        settings = {one.key for target in targets for one in command_help.settings(name, target)}
        for key in re.findall(r" ([\w.]+)=", line.partition(" # ")[0]) if settings else []:
            assert key in (*settings, COMMANDS[name].choice, "parallel"), f"{page.name} has the line {line}"
    for path in re.findall(r"\b((?:scripts|tests|configs|docs|tasks|envs)/[\w/.-]*\w)", text):
        assert (ROOT / path).exists(), f"{page.name} names {path}"


def code_lines(text: str) -> list[str]:
    """Everything in a page that is set as code: lines of shell blocks, and spans between backticks."""
    spans = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)
    return [*(line for block in blocks(text, "sh") for line in block.splitlines()), *spans]


def test_ids_are_those_that_are_registered() -> None:
    named = set(re.findall(r"^\| `(EmuWorld/\w+-v\d+)`", README, flags=re.M))
    assert named == {name for name in gymnasium.registry if name.startswith("EmuWorld/")}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("path", ["run", ".ci/run"])
def test_scripts_can_be_run(path: str) -> None:
    assert os.access(ROOT / path, os.X_OK), f"{path} is not executable: chmod +x {path}"
    shell = "bash" if "bash" in (ROOT / path).read_text().splitlines()[0] else "sh"
    subprocess.run([shell, "-n", str(ROOT / path)], check=True)
