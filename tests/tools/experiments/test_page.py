"""The page of an experiment: what a reader finds on it, and the files beside it."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from looplm.failures import UserError
from tests.support.experiments import a_row, an_experiment, some_rows
from tools.experiments.experiment import Decides, Retired
from tools.experiments.page import write_page
from tools.experiments.rows import Row

SOURCE = "# asked first\nquestion: Is it better?\n\nfigures: [test.accuracy]\n"
COMMAND = "python -m tools.experiment run configs/experiments/words.yaml"


def written(folder: Path, rows: list[Row], **values) -> str:
    write_page(folder, "words", an_experiment(**values), rows, source=SOURCE, command=COMMAND)
    return (folder / "words.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder: Path = tmp_path_factory.mktemp("evidence")
    written(folder, some_rows())
    return folder


@pytest.fixture(scope="module")
def text(folder) -> str:
    return (folder / "words.md").read_text(encoding="utf-8")


def test_the_page_begins_with_question_claim_and_verdict(text):
    assert text.split("\n\n")[:4] == [
        "# words",
        "Is one layer looped eight times better than the same layer once?",
        "Claim, fixed before the runs: looped − once in test.accuracy is above 0.05.",
        "**Yes.** The difference is 0.336 [0.302, 0.369] (5 seeds, 95 % interval).",
    ]


@pytest.mark.parametrize(("margin", "answer"), [(0.31, "Undecided"), (0.4, "No")])
def test_the_margin_changes_the_verdict(tmp_path, margin, answer):
    decides = Decides(figure="test.accuracy", better="looped", than="once", margin=margin)
    assert f"\n\n**{answer}.** The difference is" in written(tmp_path, some_rows(), decides=decides)


def test_every_plot_is_on_the_page_and_beside_it(folder, text):
    linked = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert linked == [
        "words-test.accuracy.svg",
        "words-longer.accuracy.svg",
        "words-test.accuracy-by-level.svg",
        "words-test.accuracy-by-depth.svg",
    ]
    assert {file.name for file in folder.iterdir()} == {*linked, "words.md", "words.tex"}


def test_an_experiment_that_is_not_finished_says_so(tmp_path):
    verdict = write_page(tmp_path, "words", an_experiment(), some_rows(), source=SOURCE, command=COMMAND, missing=2)
    assert verdict.reason.endswith(" Not finished: 2 of 25 planned runs are missing.")
    assert f"**Yes.** {verdict.reason}\n" in (tmp_path / "words.md").read_text(encoding="utf-8")


def test_arms_of_other_revisions_than_their_seeds_are_named(tmp_path):
    commits = {("deep", 1): "fedcba9", ("once", 3): "fedcba9-dirty"}
    rows = [replace(row, commit=commits.get((row.arm, row.seed), row.commit)) for row in some_rows()]
    text = written(tmp_path, rows)
    assert "- seed 1 is of 0123456, but deep of fedcba9\n- seed 3 is of 0123456, but once of fedcba9-dirty\n" in text


def test_problems_and_reasons_are_told(text):
    assert "- looped − deep, test.accuracy: seed 4 of looped without a partner in deep\n" in text
    assert re.search(
        r"^- looped − once, test\.accuracy(; .*)?: paired t, because Shapiro-Wilk p = ", text, re.MULTILINE
    )
    assert "adjusted over all 4 comparisons" in " ".join(text.split())


def test_a_reason_that_all_comparisons_share_is_told_once(tmp_path):
    text = written(tmp_path, [row for row in some_rows() if row.seed in (0, 1, 2, 100)])
    assert "- each comparison: sign flips, because 3 seeds cannot show " in text and text.count("sign flips, bec") == 1


def test_the_runs_can_be_repeated_from_the_page(text):
    assert f"- command: `{COMMAND}`\n" in text
    assert "- runs: 14 final, 9 in the sweep\n- seeds: 0, 1, 2, 3, 4 final, 100 in the sweep\n" in text
    assert "- machine: 2 cores, x86\\_64\n- commit: 0123456\n" in text
    assert "- time: 1.7 h in all, 6.5 min for the longest run\n- tokens: 70.7 M trained in all\n" in text


def test_the_page_names_arms_that_its_command_does_not_repeat(tmp_path, text):
    assert "retired" not in text
    found = written(tmp_path, some_rows(), retired=Retired(revision="0123abc", arms=("deep",)))
    assert "- deep: retired; revision 0123abc is the last that runs them\n" in found


def test_the_experiment_stands_as_it_was_written(text):
    assert text.endswith("    # asked first\n    question: Is it better?\n\n    figures: [test.accuracy]\n")


def test_headings_make_anchors(text):
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    assert len(set(headings)) == len(headings) and all(re.fullmatch(r"[\w ]+", heading) for heading in headings)


def test_the_latex_file_holds_the_tables(folder):
    latex = (folder / "words.tex").read_text()
    assert latex.count(r"\toprule") == 3 and r"looped $-$ once & test.accuracy & 0." in latex


def test_the_same_rows_give_the_same_bytes_in_any_order(folder, tmp_path):
    written(tmp_path, some_rows()[::-1])
    for file in folder.iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_page_without_sweep_or_curves_says_so(tmp_path):
    rows = [a_row(arm=arm, seed=seed) for arm in ("looped", "once") for seed in (0, 1)]
    text = written(tmp_path, rows, figures=("test.accuracy",))
    assert "- No learning rate was swept" in text and "none in the sweep" in text and "Bands" not in text
    assert "**Undecided.** All 2 differences are 0.0000" in text
    assert (tmp_path / "words.tex").read_text().count(r"\toprule") == 2


def test_bad_input_gives_a_one_line_error(tmp_path):
    sweep = [row for row in some_rows() if row.trial == "sweep"]
    with pytest.raises(UserError, match="words: no final run is recorded; run the experiment before its report"):
        written(tmp_path, sweep)
    with pytest.raises(UserError, match="name: 'a/b' is not allowed; give the name of a file"):
        write_page(tmp_path, "a/b", an_experiment(), some_rows(), source=SOURCE, command=COMMAND)
    rows = [a_row(arm=arm, curves={"a by depth": (1.0,), "a: by depth": (1.0,)}) for arm in ("looped", "once")]
    with pytest.raises(UserError, match=r"its plot would be words-a-by-depth.svg, a name that is taken"):
        written(tmp_path, rows, figures=("test.accuracy",), curves=("a by depth", "a: by depth"))
    assert not list(tmp_path.iterdir()), "nothing is written then"
