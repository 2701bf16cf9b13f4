"""What the README says is so: its code runs, its commands are the ones that are tested."""

import ast
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from _launch import torchrun

from recipes import compare
from recipes.experiment import FOLDER, read_experiment
from recipes.recipe import parse

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)


def blocks(language):
    return [text for name, text in BLOCKS if name == language]


def is_distributed(code):
    return code.startswith("# torchrun")


# Upstream's: of Lightning at every fit, and of torch.distributed.checkpoint in one process.
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable:UserWarning")
@pytest.mark.parametrize("code", [code for code in blocks("python") if not is_distributed(code)])
def test_python_blocks_run(code):
    torch.manual_seed(0)
    exec(compile(code, "README.md", "exec"), {})


def test_blocks_for_torchrun_run_on_two_processes(tmp_path):
    (code,) = [code for code in blocks("python") if is_distributed(code)]
    (tmp_path / "train.py").write_text(code)
    finished = torchrun([tmp_path / "train.py"], 2, timeout=120)
    assert finished.returncode == 0, finished.stderr
    first, second = re.findall(r"\{.*?\}", finished.stdout)  # older torch prints of its own
    assert first == second  # both know the same norms
    assert set(ast.literal_eval(first)) == {"0.weight", "2.weight"}


def test_the_diff_applies_to_an_existing_loop():
    (diff,) = blocks("diff")
    lines = diff.splitlines()
    after = "\n".join(line[1:] for line in lines)
    names = {"torch": torch, "model": torch.nn.Linear(2, 2)}
    exec(after, names)
    assert len(names["optimizer"].targets) == 1
    assert sum(line.startswith("+") for line in lines) <= 3
    assert not any(line.startswith("-") for line in lines)


def test_recipe_commands_parse():
    commands = [
        shlex.split(line, comments=True)
        for text in blocks("sh")
        for line in text.splitlines()
        if "-m recipes.train" in line and not line.startswith("python3 -m venv")
    ]
    assert len(commands) >= 5
    outputs = ["runs/digits"]
    for command in commands:
        arguments = command[command.index("recipes.train") + 1 :]
        outputs.append(str(parse(arguments)[1].output))
    assert len(set(outputs)) == len(outputs)  # run one after the other, none is in the way


def test_comparison_commands_parse(monkeypatch):
    seen = []
    monkeypatch.setattr(compare, "compare", lambda experiment, output, _: seen.append(output))
    commands = [
        shlex.split(line, comments=True)
        for text in blocks("sh")
        for line in text.splitlines()
        if "-m recipes.compare" in line
    ]
    for command in commands:
        compare.main(command[command.index("recipes.compare") + 1 :])
    assert len(set(seen)) == len(commands) >= 3


def test_the_axes_of_an_experiment_are_ones(tmp_path):
    (axes,) = blocks("yaml")
    content = yaml.safe_load((FOLDER / "digits.yaml").read_text()) | yaml.safe_load(axes)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
    experiment = read_experiment(str(tmp_path / "mine.yaml"))
    assert len(experiment.cells) == 2 * 2 * 2


def test_the_two_commands_create_their_environment():
    first, second, *_ = blocks("sh")
    assert first.endswith("-m recipes.train digits\n")
    assert second.endswith("-m pytest\n")
    for command in (first, second):
        assert command.startswith("python3 -m venv .venv && .venv/bin/pip install -e")
    ci = (ROOT / ".ci" / "run").read_text()
    assert "Run the tests:" in ci


def test_pictures_and_files_it_links_to_exist():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).is_file(), target
