"""What the documentation tells people to type exists: modules, files, make targets, links and their anchors; and what it
tells them to submit is understood, by the launcher and by the command that it starts."""

import os
import re
import shlex
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest

from data_pipeline.config import PipelineConfig
from looplm.cli import parse_config
from looplm.config import RunConfig
from pretrain.cluster.submit import SubmitConfig

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}
FOLDERS = ("looplm", "pretrain", "data_pipeline", "tools", "configs", "tests", "docs")
# LOG.md tells what was run when; a file that it names may be gone.
CURRENT = [name for name in TEXTS if name != "docs/LOG.md"]


def code(text: str) -> str:
    """What stands between backticks: blocks and words."""
    blocks = re.findall(r"^```.*?^```$", text, re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return "\n".join([*blocks, *re.findall(r"`([^`\n]+)`", prose)])


@pytest.mark.parametrize("name", CURRENT)
def test_every_module_that_is_run_exists(name: str) -> None:
    modules = set(re.findall(rf"-m ((?:{'|'.join(FOLDERS)})[\w.]*)", code(TEXTS[name])))
    missing = [module for module in modules if not (ROOT / (module.replace(".", "/") + ".py")).is_file()]
    assert not missing


@pytest.mark.parametrize("name", CURRENT)
def test_every_file_that_is_named_exists(name: str) -> None:
    """A path below one of our folders, as far as it is spelled out: no NAME, no star, no brace."""
    paths = set(re.findall(rf"(?<![\w./-])(?:{'|'.join(FOLDERS)})/[\w./*{{}}-]*", code(TEXTS[name])))
    spelled = [path.rstrip(".") for path in paths if not re.search(r"[*{}]|[A-Z]{4}|…", path)]
    assert not [path for path in spelled if not (ROOT / path).exists()]


@pytest.mark.parametrize("name", CURRENT)
def test_every_make_target_exists(name: str) -> None:
    rules = "\n".join(path.read_text() for path in (ROOT / "Makefile", *(ROOT / "configs").rglob("*.mk")))
    targets = set(re.findall(r"^([a-z][a-z0-9-]*):", rules, re.MULTILINE))
    asked = set(re.findall(r"(?:^|[\s`])make ([a-z][a-z0-9-]*)", code(TEXTS[name])))
    assert asked <= targets, sorted(asked - targets)


def typed(program: str) -> list[list[str]]:
    """The words of every command line of ``program`` whose files are ours to look at."""
    lines = [line.strip() for name in CURRENT for line in code(TEXTS[name]).replace("\\\n", " ").splitlines()]
    commands = [
        shlex.split(line, comments=True) for line in lines if line.startswith(f"{program} ") and "…" not in line
    ]
    return [words for words in commands if all((ROOT / path).exists() for path in configs(words))]


def configs(words: list[str]) -> list[str]:
    return [value for key, value in pairwise(words) if key == "--config"]


@pytest.mark.parametrize("words", typed("sbatch"), ids=" ".join)
def test_every_job_that_is_submitted_is_understood(words: list[str]) -> None:
    launcher = next(word for word in words if word.endswith(".sbatch"))
    arguments = words[words.index(launcher) + 1 :]
    plain = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    command = ["bash", launcher, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=plain | {"DRY_RUN": "1"}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(("srun ", "python -m data_pipeline.tokenize "))
    if "--config" in arguments:
        read = PipelineConfig if launcher.endswith("preprocess.sbatch") else RunConfig
        parse_config(read, arguments, prog="test", description="")


@pytest.mark.parametrize("words", typed("python -m pretrain.chain"), ids=" ".join)
def test_every_chain_that_is_submitted_is_understood(words: list[str]) -> None:
    parse_config(SubmitConfig, words[3:], prog="test", description="")


def test_the_jobs_of_the_cluster_page_are_among_them() -> None:
    assert len(typed("sbatch")) >= 4 and len(typed("python -m pretrain.chain")) >= 4


def anchors(text: str) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", TEXTS)
def test_every_link_leads_somewhere(name: str) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[name]):
        if target.startswith(("http:", "https:")):
            continue
        path, _, anchor = target.partition("#")
        page = (ROOT / name).parent / path if path else ROOT / name
        if not page.exists() or (anchor and anchor not in anchors(page.read_text(encoding="utf-8"))):
            broken.append(target)
    assert not broken
