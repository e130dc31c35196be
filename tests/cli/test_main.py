"""``swiftmoe``: commands, help, and what it says of a command that does not exist."""

import importlib

import pytest

from lightning_swiftmoe import __version__
from lightning_swiftmoe.cli import main as cli


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_an_entry_point(command):
    assert callable(importlib.import_module(cli.COMMANDS[command][0]).main)


def test_help_names_every_command(capsys):
    for args in ([], ["--help"], ["help"]):
        assert cli.main(args) == 0
        lines = capsys.readouterr().out.splitlines()
        assert all(any(line.startswith(f"  {command} ") for line in lines) for command in cli.COMMANDS)


def test_help_on_a_family_names_its_members(capsys):
    for word in ("-h", "--help"):
        assert cli.main(["checkpoint", word]) == 0
        lines = capsys.readouterr().out.splitlines()
        named = [name for name in cli.COMMANDS if any(line.startswith(f"  {name} ") for line in lines)]
        assert named == ["checkpoint info", "checkpoint verify", "checkpoint consolidate"]


@pytest.mark.parametrize("family", ["bench", "checkpoint"])
def test_a_family_alone_names_its_members(capsys, family):
    """As ``swiftmoe`` alone names all commands."""
    members = [name for name in cli.COMMANDS if name.startswith(f"{family} ")]
    assert cli.main([family]) == 0
    captured = capsys.readouterr()
    lines = [line.strip() for line in captured.out.splitlines()]
    for name in members:
        (line,) = (line for line in lines if line.startswith(f"{name} "))
        assert line.endswith(cli.COMMANDS[name][1])
    assert not any(line.startswith(name) for line in lines for name in cli.COMMANDS if name not in members)
    assert captured.err == ""


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"swiftmoe {__version__}\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["trian"], "error: unknown command 'trian'; did you mean 'train'?\n"),
        (["bench", "kernel"], "error: unknown command 'bench kernel'; did you mean 'bench kernels'?\n"),
        (["xyzzy"], f"error: unknown command 'xyzzy'; there are {', '.join(cli.COMMANDS)}\n"),
    ],
)
def test_unknown_commands(capsys, args, message):
    assert cli.main(args) == 2
    assert capsys.readouterr().err == message


def test_a_package_that_is_missing(capsys, monkeypatch):
    def fail(name):
        raise ModuleNotFoundError("No module named 'deepspeed'", name="deepspeed")

    monkeypatch.setattr(importlib, "import_module", fail)
    assert cli.main(["bench", "step"]) == 2
    assert (
        capsys.readouterr().err == "error: swiftmoe bench step needs the package 'deepspeed', which is not installed\n"
    )


def test_a_rank_that_lightning_starts_is_told_to_train(monkeypatch):
    """Lightning repeats this process's arguments, where the command's name is gone."""
    seen = []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr("lightning_swiftmoe.cli.train.main", lambda args: seen.append(args))
    assert cli.main(["recipes=quickstart", "hydra.mode=RUN"]) == 0
    assert seen == [["recipes=quickstart", "hydra.mode=RUN"]]


def test_recipes_are_listed_with_what_they_are(capsys):
    assert cli.main(["recipes"]) == 0
    out = capsys.readouterr().out
    for name in ("quickstart", "gpt_small_a100_16x1", "gpt_medium_a100_16x1", "gpt_large_a100_16x1"):
        (line,) = (line for line in out.splitlines() if line.startswith(f"{name} "))
        assert len(line.split()) > 5


@pytest.mark.parametrize("word", ["foo=1", "hf", "--all"])
def test_recipes_take_no_arguments(capsys, word):
    assert cli.main(["recipes", word]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line == (
        f"error: recipes takes no arguments, got {word}: swiftmoe recipes lists all, "
        "swiftmoe train recipes=NAME runs one"
    )


def test_help_of_recipes(capsys):
    assert cli.main(["recipes", "--help"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "usage: swiftmoe recipes"


@pytest.mark.parametrize(
    ("command", "override", "message"),
    [
        ("bench step", "peers=ours", "peers must be a list, got 'ours': write peers=[ours]"),
        ("bench step", "peers=null", "peers must be a list, got null: write peers=[...]"),
        ("bench skew", "workloads=zipf", "workloads must be a list, got 'zipf': write workloads=[zipf]"),
        ("bench skew", "systems=exact", "systems must be a list, got 'exact': write systems=[exact]"),
        ("bench skew", "systems=[]", "systems must be a list that is not empty, got []"),
        ("bench scaling", "ranks=2", "ranks must be a list, got 2: write ranks=[2]"),
        ("bench scaling", "alone=alone", "alone must be a list, got 'alone': write alone=[alone]"),
        ("bench scaling", "systems=exact", "systems must be a list, got 'exact': write systems=[exact]"),
        ("bench network", "policies=static", "policies must be a list: write policies=[...]"),
        ("bench rows", "travel=0.5", "travel must be a list: write travel=[...]"),
    ],
)
def test_a_list_is_written_in_brackets(capfd, tmp_path, monkeypatch, command, override, message):
    monkeypatch.chdir(tmp_path)
    assert cli.main([*command.split(), override]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line == f"error: {message}"
    assert list(tmp_path.iterdir()) == []


def test_bench_kernels_mistake(capsys):
    assert cli.main(["bench", "kernels", "shape=a"]) == 2
    assert capsys.readouterr().err.startswith("error: unknown setting 'shape'; valid names: shapes, ")


@pytest.mark.parametrize("command", ["bench step", "bench skew", "bench scaling"])
def test_help_of_a_benchmark(capsys, command):
    assert cli.main([*command.split(), "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"usage: swiftmoe {command} [GROUP=FILE | KEY=VALUE] ..."
    assert any(line.startswith("rounds: ") for line in lines)
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("command", ["train", "simulate", "plan"])
def test_help_of_a_command_shows_what_can_be_overridden(capsys, command):
    assert cli.main([command, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"usage: swiftmoe {command} [GROUP=FILE | KEY=VALUE] ..."
    assert any("model: " in line for line in lines)
    assert not any(line.startswith("hydra:") for line in lines)
    assert len(lines) < 60
    assert max(map(len, lines)) <= 120
