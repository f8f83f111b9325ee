"""``python -m looplm.generate``: prompts, files of prompts, conversations, terminal output and sample files."""

import json
import os
import pty
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from looplm import cli
from looplm import generate as command
from looplm.failures import UserError
from looplm.inference import Generation, GenerationConfig, Generator, Request
from looplm.inference import generator as library
from looplm.inference.text_stream import Token
from looplm.megatron import process_groups
from tests.support.generation_oracle import BOS, EOS, GATES, MLA, build, byte_tokenizer

TOKENIZER = byte_tokenizer()
GREEDY = GenerationConfig(temperature=0.0, max_new_tokens=16)


@pytest.fixture(scope="module")
def generator(single_process: ProcessGroupCollection) -> Generator:
    return Generator(build(MLA, GATES["lru"], single_process), TOKENIZER, EOS)


class About(NamedTuple):
    gate_trained: bool = True
    eos_ids: tuple[int, ...] = (EOS,)
    bos_id: int | None = BOS
    begin_id: int | None = None


class Opened(NamedTuple):
    """The result of ``open_model``, as far as the command uses it."""

    model: object
    about: About = About()
    tokenizer: object = TOKENIZER


@pytest.fixture
def checkpoint(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> str:
    """Make the command open the small model, and keep this process's groups when it ends."""
    for module in (command, library):
        monkeypatch.setattr(module, "open_model", lambda *_: Opened(generator.model))
    monkeypatch.setattr(process_groups, "stop", lambda: None)
    return "--checkpoint=runs/any"


def test_the_command_writes_samples(
    checkpoint: str, generator: Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, output = tmp_path / "prompts.txt", tmp_path / "samples.jsonl"
    prompts.write_text("def f(x):\n    return\n---\nnaïve\n", encoding="utf-8")
    settings = ["--max_new_tokens=9", "--kv_cache=last", "--exit_threshold=0.6", '--stop=["\\n\\n\\n", "zzz"]']
    command.main([checkpoint, f"--prompts={prompts}", f"--output={output}", "--num_samples=2", *settings])
    samples = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [sample["prompt"] for sample in samples] == ["def f(x):\n    return"] * 2 + ["naïve"] * 2
    assert samples[0]["text"] != samples[1]["text"]
    for sample in samples:
        assert "".join(token["text"] for token in sample["tokens"]) == sample["text"]
        assert {token["depth"] for token in sample["tokens"]} <= {1, 2, 3, 4}
        assert sample["trained_loops"] == 4 and sample["settings"]["exit_threshold"] == 0.6
        assert sample["settings"]["stop"] == ["\n\n\n", "zzz"] and "checkpoint" not in sample["settings"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.txt", "samples.jsonl"]
    printed = capsys.readouterr().out
    assert "\033" not in printed and printed.count("\n---\n") == 3 and "of 4 trained loops" in printed


def test_the_command_counts_accepted_drafts_and_tokens_beyond_training(
    checkpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command.main([checkpoint, "--prompt=ab", "--max_new_tokens=8", "--temperature=0", "--speculate=2", "--depth=5"])
    printed = capsys.readouterr().out
    assert "8 of them ran deeper than the model was trained" in printed and "drafted tokens accepted (" in printed


def type_lines(monkeypatch: pytest.MonkeyPatch, *lines: str | type[BaseException]) -> None:
    """Type lines at the terminal, then end the input."""
    pending = iter([*lines, EOFError])

    def ask(_: str) -> str:
        line = next(pending)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", ask)


@pytest.mark.slow
def test_a_terminal_takes_a_line_of_any_length() -> None:
    """A terminal in its usual mode keeps 4095 bytes of a line and drops the others."""
    child, terminal = pty.fork()
    if child == 0:
        code = "from looplm import generate; print('read', len(generate._read_line()))"
        os.execv(sys.executable, [sys.executable, "-W", "ignore", "-c", code])
    seen, line = b"", [b"x" * 1000] * 5 + [b"\n"]
    typist = threading.Thread(target=lambda: [os.write(terminal, part) for part in line])
    with suppress(OSError):  # Linux's end of a terminal
        while part := os.read(terminal, 65536):
            seen += part
            if b"> " in seen and not typist.ident:
                typist.start()
    os.waitpid(child, 0)
    assert b"read 5000" in seen


def test_each_answer_continues_the_conversation_and_reset_starts_over(
    checkpoint: str, generator: Generator, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    type_lines(monkeypatch, "def f(x):", "return", "/reset", "return")
    command.main([checkpoint, "--interactive=true", "--max_new_tokens=5", "--temperature=0"])
    config = replace(GREEDY, max_new_tokens=5)
    conversation, answers = list[int](), []
    for line in ("def f(x):\n", "return\n"):
        conversation += TOKENIZER.encode(line).ids
        (answer,) = generator.generate([conversation], config)
        conversation += answer.ids + ([] if answer.text.endswith("\n") else TOKENIZER.encode("\n").ids)
        answers.append(answer.text)
    answers.append(generator.generate(["return\n"], config)[0].text)
    printed = capsys.readouterr().out
    assert printed.count("5 tokens, ") == 3
    for text in answers:
        _, found, printed = printed.partition(text + "\n\n5 tokens, ")
        assert found


def test_a_conversation_drops_its_oldest_text_and_survives_an_interrupted_answer(
    checkpoint: str, generator: Generator, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[list[int]] = []
    generate = Generator.generate

    def recorded(self: Generator, prompts: list[Request], config: GenerationConfig, hear: Any) -> list[Generation]:
        prompt = prompts[0].prompt
        assert not isinstance(prompt, str)
        asked.append(list(prompt))
        if len(asked) == 2:
            hear(0, Token(65, "b", 4))
            raise KeyboardInterrupt
        return generate(self, prompts, config, hear)

    monkeypatch.setattr(Generator, "generate", recorded)
    type_lines(monkeypatch, "x" * 500, "y", "z")
    command.main([checkpoint, "--interactive=true", "--max_new_tokens=20"])
    assert [len(ids) for ids in asked] == [108] * 3
    assert "note: the oldest 393 tokens no longer fit and are dropped" in capsys.readouterr().err
    newline = TOKENIZER.encode("\n").ids
    assert asked[2][-4:] == [65, *newline, *TOKENIZER.encode("z").ids, *newline]


def test_the_checkpoint_is_opened_as_asked(
    generator: Generator, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = list[tuple[str, torch.dtype]]()

    def open_model(path: str, _: object, dtype: torch.dtype) -> Opened:
        asked.append((path, dtype))
        return Opened(generator.model)

    monkeypatch.setattr(command, "open_model", open_model)
    monkeypatch.setattr(process_groups, "stop", lambda: None)
    for words in ([], ["--precision=bf16"]):
        command.main(["--checkpoint=runs/any", "--prompt=a", "--max_new_tokens=1", *words])
    assert asked == [("runs/any", torch.float32), ("runs/any", torch.bfloat16)]


def test_a_question_is_read_although_a_whole_answer_would_not_fit(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Answers usually end early. The context has 128 tokens, as many as the default answer."""
    type_lines(monkeypatch, "x" * 40)
    command.main([checkpoint, "--interactive=true", "--max_new_tokens=128", "--temperature=0"])
    shown = capsys.readouterr()
    assert "no longer fit" not in shown.err and "87 tokens, " in shown.out


def test_a_conversation_has_no_second_beginning(checkpoint: str) -> None:
    with pytest.raises(UserError, match="add_bos: True is not allowed; a conversation begins without it"):
        command.main([checkpoint, "--prompt=a", "--chat=true", "--add_bos=true"])


@pytest.mark.parametrize("place", ["/dev/null", "{tmp}/link", "{tmp}/nowhere/x", "{tmp}"])
def test_samples_take_the_place_of_no_device_link_or_folder(checkpoint: str, place: str, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "other")
    with pytest.raises(UserError, match=r"output: .* is not allowed; (it is|its directory)"):
        command.main([checkpoint, "--prompt=a", f"--output={place.format(tmp=tmp_path)}"])


def open_with(monkeypatch: pytest.MonkeyPatch, generator: Generator, about: About) -> None:
    for module in (command, library):
        monkeypatch.setattr(module, "open_model", lambda *_: Opened(generator.model, about))


@pytest.mark.parametrize("key, begins", [("null", True), ("true", True), ("false", False)])
def test_a_prompt_begins_with_the_checkpoints_bos_unless_a_key_says_otherwise(
    key: str,
    begins: bool,
    checkpoint: str,
    generator: Generator,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    open_with(monkeypatch, generator, About(begin_id=BOS))
    command.main([checkpoint, "--prompt=ab", "--max_new_tokens=6", "--temperature=0", f"--add_bos={key}"])
    ids = TOKENIZER.encode("ab").ids
    config = replace(GREEDY, max_new_tokens=6)
    texts = [generator.generate([begin + ids], config)[0].text for begin in ([], [BOS])]
    assert texts[0] != texts[1] and f"ab{texts[begins]}\n\n6 tokens" in capsys.readouterr().out

    type_lines(monkeypatch, "ab")
    command.main([checkpoint, "--interactive=true", "--max_new_tokens=6", "--temperature=0", f"--add_bos={key}"])
    line = TOKENIZER.encode("ab\n").ids
    expected = generator.generate([[BOS, *line] if begins else line], config)[0].text
    assert capsys.readouterr().out.startswith(f"{expected}\n\n6 tokens")


def test_a_bos_that_is_not_known_is_refused(
    checkpoint: str, generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_with(monkeypatch, generator, About(bos_id=None))
    with pytest.raises(UserError, match="add_bos: True is not allowed; the checkpoint knows no token that begins"):
        command.main([checkpoint, "--prompt=ab", "--add_bos=true"])


def test_an_opened_generator_equals_one_that_is_built(checkpoint: str, generator: Generator) -> None:
    opened = Generator.open(checkpoint)
    assert opened.generate(["ab"], GREEDY) == generator.generate(["ab"], GREEDY)
    assert opened.generate(["ab"])[0].error is None, "the settings are not optional"


@pytest.mark.parametrize("prompt", ["a", "[1, 2]", "x: y", "{", "null"])
def test_the_command_streams_one_prompt(
    prompt: str, checkpoint: str, generator: Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    command.main([checkpoint, f"--prompt={prompt}", "--max_new_tokens=4", "--temperature=0"])
    (generation,) = generator.generate([prompt], replace(GREEDY, max_new_tokens=4))
    assert capsys.readouterr().out.startswith(prompt + generation.text + "\n\n4 tokens")


def test_a_terminal_shows_depths_as_colors(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    command.main([checkpoint, "--prompt=a", "--max_new_tokens=2", "--depth=1"])
    assert capsys.readouterr().out.startswith("\033[1ma\033[0m\033[38;5;39m")


@pytest.mark.promise(
    text="Wrong input of looplm.generate, such as bytes that are not UTF-8, ends in one line, and nothing is written",
    expected="status 2, one line",
)
@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "prompt: "),
        (["--prompt=a", "--prompts=b"], "prompt: "),
        (["--prompt="], "prompt: "),
        (["--prompt=a", "--interactive=true"], "prompt: "),
        (["--interactive=true", "--output={tmp}/samples.jsonl"], "output: "),
        (["--prompts={tmp}/absent.txt"], "absent.txt"),
        (["--prompts={tmp}/hole.txt"], "prompt 2 of 3"),
        (["--prompt=a", "--kv_cache=shared"], "kv_cache"),
        (["--prompt=a", "--exit_threshold=2"], "exit_threshold: 2.0"),
        (["--prompt=a", "--exit_treshold=0.5"], "did you mean exit_threshold?"),
        (["--prompt=a", "--output={tmp}/no/samples.jsonl"], "output: "),
        (["--prompt=a", "--output={tmp}"], "output: "),
        (["--prompt=caf\udce9"], r"b'--prompt=caf\xe9': an argument that is not UTF-8"),
        (["--prompt", "caf\udce9"], r"b'caf\xe9': an argument that is not UTF-8"),
        (["--prompt=a", '--stop=["\udce9"]'], r"""b'--stop=["\xe9"]': an argument that is not UTF-8"""),
        (["--prompts={tmp}/\udce9.txt"], "an argument that is not UTF-8"),
        (["--prompts={tmp}/latin1.txt"], "latin1.txt:2: not UTF-8 (byte 0xe9); save the file as UTF-8"),
        (["--prompts={tmp}/utf16.txt"], "utf16.txt: is UTF-16 text; save it as UTF-8"),
        (["--prompts={tmp}/utf16_bare.txt"], "utf16_bare.txt: is UTF-16 text; save it as UTF-8"),
        (
            ["--prompt=a", "--num_samples=2", "--temperature=0"],
            "num_samples: 2 is not allowed; all samples of a prompt are the same at temperature 0; give 1, or raise",
        ),
        (["--prompts={tmp}/empty.txt"], "prompt 1 of 1: '' is not allowed; it is empty"),
        (["--prompts={tmp}"], "cannot be read (Is a directory); name a UTF-8 text file"),
        (["--prompts={tmp}/long.txt", "--output={tmp}/samples.jsonl"], "prompt 1 of 1: the prompt has 128"),
    ],
)
def test_the_command_refuses_wrong_input_in_one_line(
    arguments: list[str],
    message: str,
    checkpoint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    record_property: Callable[[str, object], None],
) -> None:
    (tmp_path / "hole.txt").write_text("a\n---\n\n---\nb\n")
    (tmp_path / "long.txt").write_text("x" * 128)
    (tmp_path / "latin1.txt").write_bytes(b"a\ncaf\xe9\n")
    (tmp_path / "utf16.txt").write_text("caf\u00e9\n", encoding="utf-16")
    (tmp_path / "utf16_bare.txt").write_text("a cat\n", encoding="utf-16-be")
    (tmp_path / "empty.txt").touch()
    monkeypatch.setattr("sys.argv", ["generate", checkpoint, *(a.format(tmp=tmp_path) for a in arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.run_main(command.main)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and message in error and error.count("\n") == 1 and error.startswith("error: ")
    assert not (tmp_path / "samples.jsonl").exists()
    record_property("seen", f"status {ended.value.code}, one line")


@pytest.mark.promise(
    text="A prompts file is read as it is: a BOM is no text, and only a newline ends a line", expected="the same text"
)
@pytest.mark.parametrize(
    "content, texts",
    [
        (b"\xef\xbb\xbfa\n---\nb", ["a", "b"]),
        (b"a\x0cb\x0bc\x1cd\x1ee\n", ["a\x0cb\x0bc\x1cd\x1ee"]),
        ("a\u2028b\u2029c\x85d\n".encode(), ["a\u2028b\u2029c\x85d"]),
        (b"a\r\nb\r\n---\r\nc\r\n", ["a\nb", "c"]),
        (b"50 %\r100 %\n", ["50 %\r100 %"]),
        (b"\na\n\n--- \nb\n\n", ["\na\n", "b\n"]),
        (b"a\x00bc\n", ["a\x00bc"]),
        (b" a \t", [" a \t"]),
        (b"x = 1 ---\n----\n", ["x = 1 ---\n----"]),
    ],
    ids=str,
)
def test_a_prompts_file_is_read_as_it_is(
    content: bytes, texts: list[str], tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    (tmp_path / "prompts.txt").write_bytes(content)
    assert command.read_prompts(str(tmp_path / "prompts.txt")) == texts
    record_property("seen", "the same text")


def test_a_prompt_of_special_tokens_alone_is_continued(
    checkpoint: str, generator: Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    command.main([checkpoint, "--prompt=<pad><bos>", "--max_new_tokens=4", "--temperature=0"])
    (answer,) = generator.generate([[258, BOS]], replace(GREEDY, max_new_tokens=4))
    assert capsys.readouterr().out.startswith(f"<pad><bos>{answer.text}\n\n4 tokens")


def test_a_line_that_is_not_utf_8_is_refused_and_the_conversation_continues(
    checkpoint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    type_lines(monkeypatch, "caf\udce9", "cafe")
    command.main([checkpoint, "--interactive=true", "--max_new_tokens=3"])
    captured = capsys.readouterr()
    assert captured.err == "error: the line is not UTF-8; set the terminal to UTF-8 and type it again\n"
    assert captured.out.count("3 tokens, ") == 1


def test_the_quickstarts_prompts_are_read() -> None:
    prompts = command.read_prompts(str(Path(__file__).parents[2] / "configs" / "quickstart" / "prompts.txt"))
    assert len(prompts) == 4 and any("\n" in prompt for prompt in prompts)
