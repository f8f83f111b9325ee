"""Continue texts with a trained model, in the terminal and into a file.

python -m looplm.generate --checkpoint runs/quickstart/gate --prompt "def parse(" --kv_cache last --exit_threshold 0.9
python -m looplm.generate --checkpoint runs/quickstart/gate --interactive true --temperature 0.7
python -m looplm.generate --checkpoint runs/ouro-tiny/sft --chat true --prompt "What is 17 plus 25?" --temperature 0
"""

import dataclasses
import io
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from looplm.chat import ChatTemplate, Message
from looplm.checkpoint import OpenedModel, open_model
from looplm.cli import UserError, parse_config, require, run_main
from looplm.files import write_whole
from looplm.inference.generator import Generation, GenerationConfig, Generator, Request
from looplm.inference.text_stream import Token
from looplm.megatron import process_groups

_SEPARATOR = "---"
_COLOURS = (39, 45, 49, 118, 190, 220, 208, 196)  # xterm's, from blue (left early) to red (ran long)
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(GenerationConfig):
    """Continue texts with a trained model.

    Args:
        checkpoint: a training directory (its newest checkpoint is taken) or a step directory.
        prompt: text to continue.
        prompts: file of texts to continue, separated by lines of three dashes.
        interactive: read lines from the terminal and continue the growing text after each; /reset forgets it, /quit or
            the end of input leaves, Ctrl-C ends an answer.
        chat: a prompt is what a user says, and the model answers it in its chat template; for models tuned on conversations.
        output: file to write the samples to, one JSON object a line.
        num_samples: continuations per prompt, each with a seed of its own.
        precision: what to compute in, fp32 or bf16.
    """

    checkpoint: str
    prompt: str = ""
    prompts: str = ""
    interactive: bool = False
    chat: bool = False
    output: str | None = None
    num_samples: int = 1
    precision: Literal["fp32", "bf16"] = "fp32"

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [self.prompt != "", self.prompts != "", self.interactive]
        fix = "give some text, or in prompts a file of texts, or interactive; one of the three"
        require(sum(given) == 1, "prompt", self.prompt, fix)
        require(not self.interactive or self.output is None, "output", self.output, "it belongs to prompt and prompts; leave it out with interactive")  # fmt: skip
        require(self.num_samples >= 1, "num_samples", self.num_samples, "give at least 1")
        if self.output is not None:
            path = Path(self.output)
            require(path.parent.is_dir(), "output", self.output, "its directory does not exist; make it first")
            require(not path.is_dir(), "output", self.output, "it is a directory; name a file")


def main(argv: list[str]) -> None:
    """Generate, show, and write."""
    config = parse_config(GenerateConfig, argv, prog="python -m looplm.generate", description=str(__doc__))
    prompts = [config.prompt] if config.prompt else read_prompts(config.prompts) if config.prompts else []
    groups = process_groups.start(config.seed)
    try:
        opened = open_model(config.checkpoint, groups, _DTYPES[config.precision])
        generator = Generator(opened.model, opened.tokenizer, opened.about.eos_id, opened.about.gate_trained)
        printer = Printer(opened.model.model_config.num_loops)
        template = _template(opened) if config.chat else None
        if config.interactive:
            converse(generator, config, printer, template)
        else:
            _continue_prompts(generator, config, prompts, printer, template)
    finally:
        process_groups.stop()


def _template(opened: OpenedModel) -> ChatTemplate:
    template = ChatTemplate(opened.tokenizer, f"chat: {opened.folder}/tokenizer.json")
    fix = "it was not tuned on conversations: leave chat false, or give the checkpoint of a stage whose data.train holds some"
    require(opened.about.eos_id == template.end_id, "chat", True, fix)
    return template


def _continue_prompts(
    generator: Generator,
    config: GenerateConfig,
    prompts: list[str],
    printer: "Printer",
    template: ChatTemplate | None,
) -> None:
    repeated = [prompt for prompt in prompts for _ in range(config.num_samples)]
    alone = len(repeated) == 1

    def show(index: int, token: Token) -> None:
        printer.token(token)

    start = time.perf_counter()
    if alone:
        printer.prompt(repeated[0])
    asked = repeated if template is None else [template.ask([Message("user", prompt)]) for prompt in repeated]
    generations = generator.generate(asked, config, show if alone else None)
    if template is not None:
        generations = [
            dataclasses.replace(one, prompt=prompt) for one, prompt in zip(generations, repeated, strict=True)
        ]
    seconds = time.perf_counter() - start
    if not alone:  # side by side they would be written into one another
        for generation in generations:
            printer.prompt(generation.prompt)
            for token in generation.tokens:
                printer.token(token)
    printer.end(generations, seconds)
    whole = [generation for generation in generations if generation.error is None]
    if config.output is not None and whole:
        write_samples(Path(config.output), whole, config, printer.trained_loops)
    for index, generation in enumerate(generations):
        if generation.error is not None:
            raise UserError(f"prompt {index // config.num_samples + 1} of {len(prompts)}: {generation.error}")


def converse(generator: Generator, config: GenerateConfig, printer: "Printer", template: ChatTemplate | None) -> None:
    """Lines in, continuations of the whole text so far out, until the input ends; with a template, answers.

    The oldest part of a text that leaves no room for an answer is forgotten.
    """
    config.exit_rule(printer.trained_loops, generator.gate_trained)  # refused before the first line is asked for
    context, text, turn = generator.model.model_config.max_sequence_length, list[int](), 0
    room = max(1, context - config.max_new_tokens)

    def encode(words: str) -> list[int]:
        return generator.tokenizer.encode(words, add_special_tokens=False).ids

    while (line := _ask()) not in (None, "/quit"):
        if line == "/reset":
            text = []
            continue
        said = encode(f"{line}\n") if template is None else template.ask([Message("user", line or "")])
        text = (text + said)[-room:]
        answer = list[Token]()

        def hear(_: int, token: Token, answer: list[Token] = answer) -> None:
            answer.append(token)
            printer.token(token)

        start = time.perf_counter()
        try:
            [generation] = generator.generate([Request(text, seed=config.seed + turn)], config, hear)
            if generation.error is not None:
                print(f"error: {generation.error}", file=sys.stderr)
            else:
                printer.end([generation], time.perf_counter() - start)
        except KeyboardInterrupt:
            print()
        text += [token.id for token in answer]
        if template is not None:
            text += template.close()
        elif answer and not answer[-1].text.endswith("\n"):
            text += encode("\n")
        turn += 1


def _ask() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "")
    except (EOFError, KeyboardInterrupt):
        return None


def read_prompts(path: str) -> list[str]:
    """The texts of a file, separated by lines of three dashes; the line ends next to a separator are not part of them."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompts: {path}: cannot be read ({error}); name a UTF-8 text file") from error
    prompts: list[list[str]] = [[]]
    for line in lines:
        if line.rstrip() == _SEPARATOR:
            prompts.append([])
        else:
            prompts[-1].append(line)
    texts = ["\n".join(prompt) for prompt in prompts]
    for index, text in enumerate(texts):
        require(text.strip() != "", f"prompts: {path}: prompt {index + 1} of {len(texts)}", text, "it is empty; write some text or remove a separator")  # fmt: skip
    return texts


def write_samples(path: Path, generations: list[Generation], config: GenerateConfig, trained_loops: int) -> None:
    """One JSON object a line, whole or not at all."""
    common = {"settings": _settings(config), "trained_loops": trained_loops}
    lines = []
    for generation in generations:
        tokens = [{"text": token.text, "depth": token.depth} for token in generation.tokens]
        sample = {"prompt": generation.prompt, "text": generation.text, "tokens": tokens, "finish": generation.finish}
        lines.append(json.dumps({**sample, **common}, ensure_ascii=False) + "\n")
    write_whole(path, "".join(lines))


def _settings(config: GenerateConfig) -> dict[str, Any]:
    """How the text was made: the keys of :class:`GenerationConfig`."""
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(GenerationConfig)}


class Printer:
    """Text on the terminal; each token in the colour of its depth if that is a terminal, plain otherwise."""

    def __init__(self, trained_loops: int) -> None:
        self.trained_loops = trained_loops
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # a terminal that knows no UTF-8 shows "?", not a traceback
        self.coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        self._first = True

    def prompt(self, text: str) -> None:
        """What the next tokens continue."""
        separator = "" if self._first else f"\n{_SEPARATOR}\n"
        bold, plain = ("\033[1m", "\033[0m") if self.coloured else ("", "")
        sys.stdout.write(f"{separator}{bold}{text}{plain}")
        sys.stdout.flush()
        self._first = False

    def token(self, token: Token) -> None:
        """The next token."""
        sys.stdout.write(self._paint(token.text, token.depth))
        sys.stdout.flush()

    def end(self, generations: list[Generation], seconds: float) -> None:
        """What the colours mean, and how deep and fast it went."""
        depths = [depth for generation in generations for depth in generation.depths]
        legend = " ".join(self._paint(str(depth), depth) for depth in sorted(set(depths)))
        mean = sum(depths) / max(1, len(depths))
        print(
            f"\n\n{len(depths)} tokens, {len(depths) / seconds:.1f} per second; "
            f"mean depth {mean:.2f} of {self.trained_loops} trained loops (depths: {legend})"
        )
        beyond, drafted = (sum(getattr(g, key) for g in generations) for key in ("beyond_training", "drafted"))
        if beyond:
            print(f"{beyond} of them ran deeper than the model was trained")
        if drafted:
            accepted = sum(generation.accepted for generation in generations)
            print(f"{accepted} of {drafted} drafted tokens accepted ({accepted / drafted:.0%})")

    def _paint(self, text: str, depth: int) -> str:
        if not self.coloured:
            return text
        share = (depth - 1) / max(1, self.trained_loops - 1)
        return f"\033[38;5;{_COLOURS[min(len(_COLOURS) - 1, int(share * (len(_COLOURS) - 1)))]}m{text}\033[0m"


if __name__ == "__main__":
    run_main(main)
