"""The documentation names modules, files, make targets and links that exist, and its generated pages are up to date.

The launcher and the commands accept the jobs that the pages submit.
"""

import ast
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
from looplm.files import sha256_of
from pretrain.cluster.submit import SubmitConfig
from tests.support import promises
from tools import config_docs, history

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}
FOLDERS = ("looplm", "pretrain", "data_pipeline", "tools", "configs", "tests", "docs", "examples")
# The log and the changelog describe the past, so the files that they name may be gone.
CURRENT = [name for name in TEXTS if name not in ("docs/LOG.md", "CHANGELOG.md")]


def code(text: str) -> str:
    """Return a page's code blocks and inline code."""
    blocks = re.findall(r"^```.*?^```$", text, re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return "\n".join([*blocks, *re.findall(r"`([^`\n]+)`", prose)])


@pytest.mark.parametrize("name", CURRENT)
def test_every_module_that_a_page_runs_exists(name: str) -> None:
    modules = set(re.findall(rf"-m ((?:{'|'.join(FOLDERS)})[\w.]*)", code(TEXTS[name])))
    paths = {module: ROOT / module.replace(".", "/") for module in modules}
    missing = [m for m, path in paths.items() if not any(map(Path.is_file, (Path(f"{path}.py"), path / "__main__.py")))]
    assert not missing


@pytest.mark.parametrize("name", CURRENT)
def test_every_file_that_a_page_names_exists(name: str) -> None:
    """Only literal paths below our folders count: no NAME, no star, no brace."""
    paths = set(re.findall(rf"(?<![\w./-])(?:{'|'.join(FOLDERS)})/[\w./*{{}}-]*", code(TEXTS[name])))
    spelled = [path.rstrip(".") for path in paths if not re.search(r"[*{}]|[A-Z]{4}|…", path)]
    assert not [path for path in spelled if not (ROOT / path).exists()]


@pytest.mark.parametrize("name", CURRENT)
def test_every_make_target_exists(name: str) -> None:
    rules = "\n".join(path.read_text() for path in (ROOT / "Makefile", *(ROOT / "configs").rglob("*.mk")))
    targets = set(re.findall(r"^([a-z][a-z0-9-]*):", rules, re.MULTILINE))
    asked = set(re.findall(r"(?:^|[\s`])make ([a-z][a-z0-9-]*)", code(TEXTS[name])))
    assert asked <= targets, sorted(asked - targets)


def command_lines(program: str) -> list[list[str]]:
    """Return the words of each command line of ``program`` in the pages whose configs are all in the repository."""
    lines = [line.strip() for name in CURRENT for line in code(TEXTS[name]).replace("\\\n", " ").splitlines()]
    commands = [
        shlex.split(line, comments=True) for line in lines if line.startswith(f"{program} ") and "…" not in line
    ]
    return [words for words in commands if all((ROOT / path).exists() for path in configs(words))]


def configs(words: list[str]) -> list[str]:
    return [value for key, value in pairwise(words) if key == "--config"]


@pytest.mark.slow
@pytest.mark.parametrize("words", command_lines("sbatch"), ids=" ".join)
def test_every_submitted_job_is_valid(words: list[str]) -> None:
    launcher = next(word for word in words if word.endswith(".sbatch"))
    arguments = words[words.index(launcher) + 1 :]
    outside = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    command = ["bash", launcher, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=outside | {"DRY_RUN": "1"}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(("srun ", "python -m data_pipeline.tokenize "))
    if "--config" in arguments:
        config_type = PipelineConfig if launcher.endswith("preprocess.sbatch") else RunConfig
        parse_config(config_type, arguments, prog="test", description="")


@pytest.mark.parametrize("words", command_lines("python -m pretrain.chain"), ids=" ".join)
def test_every_submitted_sequence_of_stages_is_valid(words: list[str]) -> None:
    parse_config(SubmitConfig, words[3:], prog="test", description="")


def test_there_are_submitted_jobs_to_check() -> None:
    assert len(command_lines("sbatch")) >= 4 and len(command_lines("python -m pretrain.chain")) >= 4


def anchors(text: str) -> set[str]:
    """Return the anchors of a page's headings, which GitHub and mkdocs form alike except for repeated hyphens."""
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    found = [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.*)$", prose, re.MULTILINE)]
    assert len(set(found)) == len(found) and not any("--" in anchor for anchor in found)
    return set(found)


@pytest.mark.parametrize("name", TEXTS)
def test_every_link_has_a_target(name: str) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[name]):
        if target.startswith(("http:", "https:")):
            continue
        path, _, anchor = target.partition("#")
        page = (ROOT / name).parent / path if path else ROOT / name
        if not page.exists() or (anchor and anchor not in anchors(page.read_text(encoding="utf-8"))):
            broken.append(target)
    assert not broken


def test_the_readme_is_short() -> None:
    readme = TEXTS["README.md"]
    assert readme.count("\n") <= 150 and len(readme.split()) <= 1300


def test_the_list_of_configuration_keys_is_up_to_date() -> None:
    assert config_docs.page() == TEXTS["docs/config.md"], "run python -m tools.config_docs"


def test_the_page_of_promises_lists_exactly_those_of_the_tests() -> None:
    page = TEXTS["docs/reliability.md"]
    assert promises.listed(page) == promises.in_source(), "run make faults"
    assert promises.FAILED not in page, "repair what make faults found"


def test_the_plot_of_repeated_runs_is_up_to_date() -> None:
    assert sha256_of(history.TABLE) in history.PLOT.read_text(), "run python -m tools.history plot"
    assert sha256_of(history.TABLE) in history.plot()


def test_every_page_is_in_the_navigation_of_the_site() -> None:
    listed = re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    pages = [str(page.relative_to(ROOT / "docs")) for page in PAGES if ROOT / "docs" in page.parents]
    pages = [page for page in pages if not page.startswith("gpu/")]  # records of machines, not_in_nav
    assert sorted(listed) == sorted(pages)


def test_every_documented_module_exists() -> None:
    for module in re.findall(r"^::: ([\w.]+)$", "\n".join(TEXTS.values()), re.MULTILINE):
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), module


def test_make_docs_installs_the_extra_named_docs() -> None:
    (docs,) = re.findall(r'"docs": (\[.*\])', (ROOT / "setup.py").read_text())
    declared = [re.split("[><=]", requirement)[0] for requirement in ast.literal_eval(docs)]
    (installed,) = re.findall(r"pip install --quiet -c constraints.txt (mkdocs .*)", (ROOT / "Makefile").read_text())
    assert shlex.split(installed) == declared


def test_every_console_command_runs_an_existing_module() -> None:
    (names,) = re.findall(r"for command in (\(.*\))", (ROOT / "setup.py").read_text())
    source = (ROOT / "tools/commands.py").read_text()
    for command in ast.literal_eval(names):
        (module,) = re.findall(rf'^def {command}\(.*\n.*\n    _run\("([\w.]+)"\)', source, re.MULTILINE)
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file()


def test_every_entry_of_the_log_is_in_its_index() -> None:
    log = re.sub(r"<!--.*?-->", "", TEXTS["docs/LOG.md"], flags=re.DOTALL)
    entries = {anchor for anchor in anchors(log) if re.match(r"20\d\d-", anchor)}
    rows = re.findall(r"^\| 20\S+ \| .* \| \[(.*)\]\(#(.*)\) \|$", log, re.MULTILINE)
    assert {anchor for _, anchor in rows} == entries
    assert not [answer for answer, _ in rows if len(answer.split()) > 12]


def test_one_version_is_named_everywhere() -> None:
    files = {"setup.py": r'version="(.*)"', "CITATION.cff": r"^version: (.*)$", "CHANGELOG.md": r"^## ([\d.]+)"}
    found = {name: re.search(pattern, (ROOT / name).read_text(), re.MULTILINE) for name, pattern in files.items()}
    assert len({match and match[1] for match in found.values()}) == 1
