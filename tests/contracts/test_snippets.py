"""Every Python and shell block in README.md and docs/ runs, offline, with a tiny model in place of the named ones.

The blocks of a page run in order and share their names. A page that uses `outputs/<name>` which another page makes
finds it: that page runs first. A block that cannot run has `<!-- not run: the reason -->` in the line above it; the
commands and files that it names are checked all the same.
"""

import ast
import contextlib
import importlib
import json
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.contracts.test_docs import ALL_PAGES, ROOT
from tests.tiny import pair_rows, save_tiny_model, tiny_tokenizer


FENCE = re.compile(r"^(?P<mark><!-- [^\n]*? -->\n)?```(?P<kind>\w+)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
MODEL = re.compile(r"\b(?:Qwen|HuggingFaceTB)/[\w.-]+")
OUTPUT = re.compile(r"outputs/\w+")
MADE = re.compile(r'output_dir(?:="| )(outputs/\w+)')
# What replaces a block's own arguments, so that it takes a moment. Values that a block gives itself are kept.
QUICK = {"use_cpu": True, "bf16": False, "max_steps": 1}
TRAINING = ("reward", "orm", "prm", "segment", "ensemble")


class Block(NamedTuple):
    page: str
    line: int
    kind: str
    code: str
    reason: str | None  # why it does not run


def read_blocks(page: str) -> list[Block]:
    blocks = []
    for match in FENCE.finditer(ALL_PAGES[page]):
        if match["kind"] not in ("python", "bash"):
            continue
        mark = (match["mark"] or "").strip()
        reason = re.fullmatch(r"<!-- (?:not run: (\S.*)|command: (\w+)) -->", mark)
        why = reason and (reason[1] or f".ci/run runs the command {reason[2]!r}")
        line = ALL_PAGES[page][: match.start("code")].count("\n") + 1
        blocks.append(Block(page, line, match["kind"], match["code"], why))
    return blocks


BLOCKS = {page: read_blocks(page) for page in ALL_PAGES}
RUN = [page for page, blocks in BLOCKS.items() if any(block.reason is None for block in blocks)]
# Which page makes outputs/<name>: the page of a trainer before README.md.
MAKERS = {name: page for page in reversed([*RUN[1:], RUN[0]]) for name in MADE.findall(ALL_PAGES[page])}


class Quick(ast.NodeTransformer):
    """Adds the arguments of a short run on a CPU to every config that trains."""

    def visit_Call(self, node: ast.Call) -> ast.Call:
        self.generic_visit(node)
        given = {keyword.arg for keyword in node.keywords}
        if isinstance(node.func, ast.Name) and node.func.id.endswith("Config") and "output_dir" in given:
            added = {name: value for name, value in QUICK.items() if name not in given}
            if "Reward" in node.func.id and not given & {"max_tokens_per_batch", "per_device_train_batch_size"}:
                added["per_device_train_batch_size"] = 2
            node.keywords += [ast.keyword(arg=name, value=ast.Constant(value)) for name, value in added.items()]
        return node


class Site:
    """Runs pages, each once, in a folder that looks like a clone of the repository."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.done: set[str] = set()
        self.model = str(save_tiny_model(folder / "model", tokenizer=tiny_tokenizer("llama", chat=True)))
        (folder / "pairs").mkdir()
        rows = "".join(json.dumps(row) + "\n" for row in pair_rows(40))
        (folder / "pairs" / "train.jsonl").write_text(rows, encoding="utf-8")

    def path(self, page: str) -> Path:
        return self.folder / page.removesuffix(".md").replace("/", "-")

    def offline(self, code: str) -> str:
        """The code with the tiny model and a small data set in place of the named ones."""
        return MODEL.sub(self.model, code).replace("trl-lib/ultrafeedback_binarized", str(self.folder / "pairs"))

    def run(self, page: str) -> None:
        if page in self.done:
            return
        self.done.add(page)
        needed = set(OUTPUT.findall("".join(block.code for block in BLOCKS[page] if block.reason is None)))
        made = set(MADE.findall(ALL_PAGES[page]))
        (self.path(page) / "outputs").mkdir(parents=True)
        for name in ("configs", "docs", "examples"):
            (self.path(page) / name).symlink_to(ROOT / name)
        for name in sorted(needed - made):
            if name in MAKERS:
                self.run(MAKERS[name])
                (self.path(page) / name).symlink_to(self.path(MAKERS[name]) / name)
        names: dict = {"__name__": "__main__"}
        with contextlib.chdir(self.path(page)):
            for block in BLOCKS[page]:
                if block.reason is None:
                    try:
                        self.run_block(block, names)
                    except BaseException as error:
                        error.add_note(f"in the block at line {block.line} of {page}")
                        raise

    def run_block(self, block: Block, names: dict) -> None:
        code = self.offline(block.code)
        if block.kind == "python":
            tree = ast.fix_missing_locations(Quick().visit(ast.parse(code)))
            exec(compile(tree, f"{block.page}:{block.line}", "exec"), names)
            return
        for words in shell_commands(code):
            if words[0] == "export":
                assert re.fullmatch(r"\w+=\S+", words[1])
                continue
            assert words[0] == "trl-ext", f"mark what this test cannot run with its reason: {shlex.join(words)}"
            status = importlib.import_module("trl_ext.cli.main").main(self.quick_flags(words[1:]))
            assert status == 0, shlex.join(words)

    def quick_flags(self, words: list[str]) -> list[str]:
        if words[0] not in TRAINING:
            return words
        given = set(words)
        added = ["--max_steps", "1", "--bf16", "false", "--per_device_train_batch_size", "2"]
        if "--use_cpu" not in given:
            added += ["--use_cpu"]
        if "--config" in given:
            added += ["--model_name_or_path", self.model]
        return words + added


def shell_commands(code: str) -> list[list[str]]:
    """The commands of a block, each as its words, without comments and variables in front."""
    lines = code.replace("\\\n", " ").splitlines()
    commands = [shlex.split(line, comments=True) for line in lines]
    return [[word for word in words if words[0] == "export" or "=" not in word] for words in commands if words]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return Site(tmp_path_factory.mktemp("site"))


@pytest.mark.parametrize("page", RUN)
def test_blocks_run(site, page, monkeypatch, capsys):
    monkeypatch.delenv("WANDB_DISABLED", raising=False)  # the page on W&B logs offline
    site.run(page)


def test_there_are_blocks():
    blocks = [block for blocks in BLOCKS.values() for block in blocks]
    assert len(blocks) >= 50
    assert sum(block.reason is None for block in blocks) >= 40


def test_blocks_that_do_not_run_name_files_and_flags_that_exist():
    from trl_ext.cli.main import COMMANDS

    waiting = [block for blocks in BLOCKS.values() for block in blocks if block.reason and block.kind == "bash"]
    assert waiting
    for block in waiting:
        for path in re.findall(r"(?:configs|examples)/[\w./-]+", block.code):
            assert (ROOT / path).exists(), f"{block.page}: {path}"
        for name in re.findall(r"trl-ext ([\w-]+)", block.code):
            assert name in COMMANDS, f"{block.page}: {name}"
