"""What the README says is so: its code runs, its commands are the ones that are tested."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from recipes.recipe import parse

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)


def blocks(language):
    return [text for name, text in BLOCKS if name == language]


# Upstream's: of Lightning at every fit, and of torch.distributed.checkpoint in one process.
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable:UserWarning")
@pytest.mark.parametrize("code", blocks("python"))
def test_python_blocks_run(code):
    torch.manual_seed(0)
    exec(compile(code, "README.md", "exec"), {})


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
        if line.startswith(".venv/bin/python -m recipes.train")
    ]
    assert len(commands) >= 3
    outputs = ["runs/digits"]
    for _, _, module, *arguments in commands:
        assert module == "recipes.train"
        outputs.append(str(parse(arguments)[1].output))
    assert len(set(outputs)) == len(outputs)  # run one after the other, none is in the way


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
