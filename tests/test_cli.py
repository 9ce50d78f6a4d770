"""The command line: help that teaches, errors that help, settings from dataclass, yaml and words in this
order.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from emuworld import cli, command_help
from emuworld.command_table import COMMANDS
from emuworld.tasks.generate import Generate

TARGETS = [(name, choice) for name, command in COMMANDS.items() for choice in command.targets]


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"  {name} " in said for name in COMMANDS)
    assert cli.main([]) == 0


@pytest.mark.parametrize(("name", "choice"), TARGETS)
def test_help_of_a_command_shows_settings_and_examples(
    name: str, choice: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [name, *([f"{COMMANDS[name].choice}={choice}"] if choice else []), "--help"]
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert "settings (key=default):" in said and "examples:" in said and "out=" in said
    assert cli.main([name, "--help"]) == 0


@pytest.mark.parametrize(("name", "choice"), TARGETS)
def test_defaults_that_help_shows_can_be_typed_as_they_stand(name: str, choice: str) -> None:
    shown = {one.key: one.default for one in command_help.settings(name, choice)}
    words = [f"{key}={default}" for key, default in shown.items() if "${" not in default]
    assert len(words) >= len(shown) - 1
    assert cli.compose(name, choice, words)[0] == cli.compose(name, choice, [])[0]


def test_examples_are_those_of_the_choice(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["train", "stage=detector", "--help"])
    cli.main(["train", "stage=sft1", "--help"])
    examples = [one.split("\n")[0].strip() for one in capsys.readouterr().out.split("examples:\n")[1:]]
    assert examples == ["emuworld train stage=detector device=cuda", "emuworld train stage=sft1"]


def test_help_does_not_wait_for_torch_or_the_simulator() -> None:
    code = (
        "import sys; from emuworld import cli; cli.main(['--help']); cli.main(['eval', 't2i', '--help']);"
        "print([m for m in ('torch', 'mujoco', 'hydra') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]"), done.stdout[-200:]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["demoo"], "did you mean demo"),
        (["train"], "say which: stage=text or stage=tokenizer"),
        (["train", "stage=tokeniser"], "did you mean tokenizer"),
        (["generate", "promt=x"], "did you mean prompt"),
        (["generate", "prompt"], "expected key=value"),
        (["generate", "n=many"], "n must be a whole number, got 'many'"),
        (["generate", "n=[1"], "--help"),
        (["generate", "commands=go"], "commands must be"),
        (["eval", "suite=t2i", "num_promtps=3"], "did you mean num_prompts"),
    ],
)
def test_mistakes_are_answered_with_what_would_be_right(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("emuworld: ") and said in error and "Traceback" not in error


def test_a_setting_with_no_meaning_is_refused_before_anything_runs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["generate", "mode=dance"]) == 2
    assert "expected one of t2i" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "choice"), TARGETS)
def test_every_command_has_a_yaml_that_fits_its_schema(name: str, choice: str) -> None:
    config, values = cli.compose(name, choice, ["out=/tmp/elsewhere"])
    assert str(config.out) == "/tmp/elsewhere" and values["out"] == "/tmp/elsewhere"


def test_words_win_over_yaml_and_yaml_over_the_dataclass() -> None:
    assert cli.compose("eval", "t2i", [])[0].out == "outputs/eval/t2i"
    assert cli.compose("eval", "t2i", ["out=here"])[0].out == "here"


def test_a_folder_named_after_a_setting_follows_what_is_typed() -> None:
    """`out: outputs/eval/robot-331/${agent}`: each agent has a folder of its own."""
    for agent in ("planner", "scripted"):
        config, values = cli.compose("eval", "robot-331", [f"agent={agent}"])
        assert config.out == values["out"] == f"outputs/eval/robot-331/{agent}"
    assert cli.compose("eval", "robot-331", ["out=to/${agent}"])[0].out == "to/${agent}"


def test_text_is_taken_literally() -> None:
    prompt = "a 'room' with, say, [two] {balls}: 50 % \"red\" = $5 \\ ünï"
    config, _ = cli.compose("generate", "", [f"prompt={prompt}"])
    assert isinstance(config, Generate) and config.prompt == prompt
    assert cli.compose("generate", "", ["prompt="])[0].prompt == ""
    assert cli.compose("train", "pretrain", ["init_from=null"])[0].init_from is None


def test_lists_numbers_and_null_are_understood() -> None:
    config, _ = cli.compose(
        "generate", "", ["mode=explore", "commands=[turn left, look up]", "size_px=64", "temperature=null"]
    )
    assert (config.commands, config.size_px, config.temperature) == (("turn left", "look up"), 64, None)
    nested, _ = cli.compose("train", "detector", ["training.max_steps=7"])
    assert nested.training.max_steps == 7


def test_a_command_runs_and_keeps_its_settings(
    tiny_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["generate", f"model={tiny_folder}", "device=cpu", "size_px=64", "n=1", f"out={tmp_path}"]
    assert cli.main(words) == 0
    assert (tmp_path / "sheet.png").exists()
    stored = (tmp_path / "generate.config.yaml").read_text()
    assert "size_px: 64" in stored and "seed: 0" in stored
    assert "sheet.png" in capsys.readouterr().out
    assert cli.main([*words, f"model={tmp_path}/nothing"]) == 1
    assert (tmp_path / "generate.config.yaml").read_text() == stored, "a run that is refused leaves it alone"


def test_a_run_that_fails_says_why_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", f"model={tmp_path}/nothing", f"out={tmp_path}", "device=cpu"]) == 1
    error = capsys.readouterr().err
    assert "nothing" in error and "Traceback" not in error and cli.DEBUG_VARIABLE in error


def test_what_the_system_refuses_is_said_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert cli.main(["generate", f"out={tmp_path}/file/folder"]) == 1
    error = capsys.readouterr().err
    assert f"{tmp_path}/file" in error and "Not a directory" in error and "Traceback" not in error


def test_a_reader_that_goes_away_is_no_error() -> None:
    command = f"{sys.executable} -m emuworld.cli train stage=pretrain --help | head -n 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("emuworld train") and done.stderr == ""


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("emuworld 0.")


def test_without_a_terminal_long_work_says_how_far_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with cli._progress() as on_progress:
        for done in (1, 2, 3, 3):
            on_progress("walks", done, 3)
    assert capsys.readouterr().err == "walks: 3 of 3\n"
    monkeypatch.setattr(cli, "_SILENCE_S", -1.0)
    with cli._progress() as on_progress:
        on_progress("walks", 1, 3)
        on_progress("walks", 2, 3)
    assert capsys.readouterr().err == "walks: 1 of 3\nwalks: 2 of 3\n"
