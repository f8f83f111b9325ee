"""Continue texts with a trained model, in the terminal and into a file.

python -m looplm.generate --checkpoint runs/quickstart/gate --prompt "def parse(" --kv_cache last --exit_threshold 0.9
python -m looplm.generate --checkpoint runs/quickstart/gate --interactive true --temperature 0.7
python -m looplm.generate --checkpoint runs/ouro-tiny/sft --chat true --prompt "What is 17 plus 25?" --temperature 0
"""

import codecs
import io
import json
import os
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

from looplm.bounds import path_field, positive, require, require_file_place
from looplm.chat import ANSWERS, ChatTemplate, Message
from looplm.checkpoint import COMPANION_FOLDER, OpenedModel, open_model
from looplm.cli import parse_config, run_main
from looplm.failures import UserError
from looplm.files import is_unicode, write_whole
from looplm.huggingface.config_json import TokenIds
from looplm.imported_template import ImportedTemplate, imported_template
from looplm.inference.generator import Generator
from looplm.inference.request import Generation, Request
from looplm.inference.settings import GenerationConfig
from looplm.inference.text_stream import Token
from looplm.megatron import process_groups
from looplm.megatron.settings import DTYPES

with suppress(ImportError):  # Python may be built without it
    import readline  # noqa: F401  # input() then takes lines that the terminal would cut at 4095 bytes

_SEPARATOR = "---"
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_COLORS = (39, 45, 49, 118, 190, 220, 208, 196)  # xterm's, from blue (exited early) to red (ran long)


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(GenerationConfig):
    """Continue texts with a trained model.

    Args:
        checkpoint: a step directory, or a training directory, of which the newest checkpoint is taken.
        prompt: text to continue.
        prompts: file of texts to continue, separated by lines of three dashes.
        interactive: read lines from the terminal, and continue the growing text after each; /reset starts over, /quit
            or the end of input leaves, Ctrl-C ends an answer.
        chat: treat each prompt as a user's message, which the model answers in its chat template: that which came with
            imported weights, otherwise ours; for models tuned on conversations.
        output: file to write the samples to, one JSON object per line.
        num_samples: continuations per prompt, each with its own seed.
        add_bos: put the token that begins a text (BOS) before each prompt that does not start with it; null does so if
            the model's texts began so in training, or if an imported model's tokenizer does. A conversation (chat)
            begins without it.
        precision: of weights and computation, fp32 or bf16.
    """

    checkpoint: str = path_field()
    prompt: str = ""
    prompts: str | None = path_field(None)
    interactive: bool = False
    chat: bool = False
    output: str | None = path_field(None)
    num_samples: int = positive(1)
    add_bos: bool | None = None
    precision: Literal["fp32", "bf16"] = "fp32"

    def __post_init__(self) -> None:
        super().__post_init__()
        given, fix = [self.prompt, self.prompts, self.interactive], "give one of prompt, prompts and interactive"
        require(sum(map(bool, given)) == 1, "prompt", self.prompt, fix)
        fix = "it belongs to prompt and prompts; leave it out with interactive"
        require(self.output is None or not self.interactive, "output", self.output, fix)
        require_file_place(self.output, "output")
        fix = "all samples of a prompt are the same at temperature 0; give 1, or raise temperature"
        require(self.num_samples == 1 or self.temperature > 0, "num_samples", self.num_samples, fix)
        fix = "a conversation begins without it; leave it out with chat"
        require(not (self.chat and self.add_bos), "add_bos", True, fix)


def main(argv: list[str]) -> None:
    """Generate texts, print them, and write them to a file if one is named."""
    config = parse_config(GenerateConfig, argv, prog="python -m looplm.generate", description=str(__doc__))
    prompts = read_prompts(config.prompts) if config.prompts else [config.prompt]
    groups = process_groups.start(config.seed)
    try:
        opened = open_model(config.checkpoint, groups, DTYPES[config.precision])
        config.exit_rule(opened.model.model_config, opened.about.gate_trained)  # raise before the first line is read
        generator = Generator.of(opened, False if config.chat else config.add_bos)
        printer = Printer(opened.model.model_config.num_loops)
        template = _chat_template(opened) if config.chat else None
        if config.interactive:
            converse(generator, config, printer, template)
        else:
            continue_prompts(generator, config, prompts, printer, template)
    finally:
        process_groups.stop()


def _chat_template(opened: OpenedModel) -> ChatTemplate | ImportedTemplate:
    ids = TokenIds(opened.about.bos_id, opened.about.eos_ids, opened.about.pad_id)
    known = {f"{name}_token": opened.tokenizer.id_to_token(found[0]) for name, found in ids.known().items()}
    imported = imported_template(opened.folder / COMPANION_FOLDER, opened.tokenizer, known)
    if imported is not None:
        return imported
    template = ChatTemplate(opened.tokenizer, f"chat: {opened.folder}/tokenizer.json")
    fix = "the model was not tuned on conversations; leave chat false, or give a checkpoint of a stage that did so"
    require(template.end_id in opened.about.eos_ids, "chat", True, fix)
    return template


def read_prompts(path: str) -> list[str]:
    """Return the texts of a file. Lines of three dashes separate them; the newlines next to one belong to no text.

    Lines end in a newline, or in Windows' carriage return and newline, which is read as a newline. All other characters
    are text, except a byte-order mark at the start.
    """
    where = f"prompts: {path}"
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror}); name a UTF-8 text file") from error
    if content.startswith(_UTF_16) or max(content[::2].count(0), content[1::2].count(0)) > 0.4 * len(content):
        raise UserError(f"{where}: is UTF-16 text; save it as UTF-8")
    try:
        lines = content.decode("utf-8-sig").replace("\r\n", "\n").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        number, byte = content.count(b"\n", 0, error.start) + 1, content[error.start]
        raise UserError(f"{where}:{number}: not UTF-8 (byte 0x{byte:02x}); save the file as UTF-8") from error
    prompts: list[list[str]] = [[]]
    for line in lines:
        if line.rstrip(" \t") == _SEPARATOR:
            prompts.append([])
        else:
            prompts[-1].append(line)
    texts = ["\n".join(prompt) for prompt in prompts]
    for number, text in enumerate(texts, start=1):
        where = f"prompts: {path}: prompt {number} of {len(texts)}"
        require(text.strip() != "", where, text, "it is empty; write some text or remove a separator")
    return texts


def continue_prompts(
    generator: Generator,
    config: GenerateConfig,
    prompts: list[str],
    printer: "Printer",
    template: ChatTemplate | ImportedTemplate | None,
) -> None:
    """Continue or answer each prompt ``num_samples`` times."""
    texts = [prompt for prompt in prompts for _ in range(config.num_samples)]
    asked = texts if template is None else [template.ask([Message("user", text)]) for text in texts]
    alone = len(texts) == 1  # several texts grow side by side and would be printed into one another
    start = time.perf_counter()
    if alone:
        printer.prompt(texts[0])
    generations = generator.generate(asked, config, (lambda _, token: printer.token(token)) if alone else None)
    generations = [replace(generation, prompt=text) for generation, text in zip(generations, texts, strict=True)]
    seconds = time.perf_counter() - start
    for generation in generations if not alone else ():
        printer.prompt(generation.prompt)
        for token in generation.tokens:
            printer.token(token)
    printer.end(generations, seconds)
    valid = [generation for generation in generations if generation.error is None]
    if config.output is not None and valid:
        write_samples(Path(config.output), valid, config, printer.trained_loops)
    for index, generation in enumerate(generations):
        if generation.error is not None:
            raise UserError(f"prompt {index // config.num_samples + 1} of {len(prompts)}: {generation.error}")


def write_samples(path: Path, generations: list[Generation], config: GenerationConfig, trained_loops: int) -> None:
    """Write one JSON object per line, the file whole or not at all."""
    settings = {field.name: getattr(config, field.name) for field in fields(GenerationConfig)}
    common, lines = {"settings": settings, "trained_loops": trained_loops}, []
    for generation in generations:
        tokens = [{"text": token.text, "depth": token.depth} for token in generation.tokens]
        sample = {"prompt": generation.prompt, "text": generation.text, "tokens": tokens, "finish": generation.finish}
        lines.append(json.dumps({**sample, **common}, ensure_ascii=False) + "\n")
    write_whole(path, "".join(lines))


def converse(
    generator: Generator, config: GenerateConfig, printer: "Printer", template: ChatTemplate | ImportedTemplate | None
) -> None:
    """Read lines, and after each continue the whole text so far, or with a template answer; until the input ends.

    The oldest part of the text is dropped, with a note, when it would leave no room for an answer. An imported template
    renders the whole conversation again for each answer, because it may treat earlier turns in any way.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a line that is not UTF-8 is refused below, not a traceback
    text, turn, messages = list[int](), 0, list[Message]()
    begin = [] if generator.begin_id is None else [generator.begin_id]
    context = generator.model.model_config.max_sequence_length - len(begin)
    room = max(1, context - min(config.max_new_tokens, context // 2))  # an answer may end early, a question may not

    def encode(words: str) -> list[int]:
        return generator.tokenizer.encode(words, add_special_tokens=False).ids

    while (line := _read_line()) not in (None, "/quit"):
        if line == "/reset":
            text, messages = [], []
            continue
        if not is_unicode(line or ""):
            print("error: the line is not UTF-8; set the terminal to UTF-8 and type it again", file=sys.stderr)
            continue
        said = Message("user", line or "")
        messages.append(said)
        if isinstance(template, ImportedTemplate):
            try:
                text = template.ask(messages)
            except UserError as error:
                print(f"error: {error}", file=sys.stderr)
                messages.pop()
                continue
        else:
            text += encode(f"{line}\n") if template is None else template.ask([said])
        if len(text) > room:
            print(f"note: the oldest {len(text) - room} tokens no longer fit and are dropped", file=sys.stderr)
            text = text[-room:]
        answer = list[Token]()

        def show(_: int, token: Token, answer: list[Token] = answer) -> None:
            answer.append(token)
            printer.token(token)

        start = time.perf_counter()
        try:
            [generation] = generator.generate([Request(begin + text, seed=config.seed + turn)], config, show)
            if generation.error is not None:
                print(f"error: {generation.error}", file=sys.stderr)
            else:
                printer.end([generation], time.perf_counter() - start)
        except KeyboardInterrupt:
            print()
        text += [token.id for token in answer]
        if isinstance(template, ImportedTemplate):
            messages.append(Message(ANSWERS, "".join(token.text for token in answer)))
        elif template is not None:
            text += template.close()
        elif answer and not answer[-1].text.endswith("\n"):
            text += encode("\n")
        turn += 1


def _read_line() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "")
    except (EOFError, KeyboardInterrupt):
        return None


class Printer:
    """Prints texts. On a terminal, a token's color shows its depth."""

    def __init__(self, trained_loops: int) -> None:
        self.trained_loops = trained_loops
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # a terminal without UTF-8 shows "?" instead of a traceback
        self._colored = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        self._separator = ""

    def prompt(self, text: str) -> None:
        """Print the text that the next tokens continue."""
        print(self._separator + (f"\033[1m{text}\033[0m" if self._colored else text), end="", flush=True)
        self._separator = f"\n{_SEPARATOR}\n"

    def token(self, token: Token) -> None:
        """Print the next token."""
        print(self._paint(token.text, token.depth), end="", flush=True)

    def end(self, generations: list[Generation], seconds: float) -> None:
        """Print the legend of the colors, and speed and mean depth of the tokens."""
        depths = [depth for generation in generations for depth in generation.depths]
        legend = " ".join(self._paint(str(depth), depth) for depth in sorted(set(depths)))
        mean, trained = sum(depths) / max(1, len(depths)), self.trained_loops
        print(f"\n\n{len(depths)} tokens, {len(depths) / seconds:.1f} per second; ", end="")
        print(f"mean depth {mean:.2f} of {trained} trained loops (depths: {legend})")
        if beyond := sum(depth > trained for depth in depths):
            print(f"{beyond} of them ran deeper than the model was trained")
        if drafted := sum(generation.drafted for generation in generations):
            accepted = sum(generation.accepted for generation in generations)
            print(f"{accepted} of {drafted} drafted tokens accepted ({accepted / drafted:.0%})")

    def _paint(self, text: str, depth: int) -> str:
        if not self._colored:
            return text
        last = len(_COLORS) - 1
        color = _COLORS[min(last, int((depth - 1) / max(1, self.trained_loops - 1) * last))]
        return f"\033[38;5;{color}m{text}\033[0m"


if __name__ == "__main__":
    run_main(main)
