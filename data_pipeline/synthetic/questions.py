"""Write questions that have one right answer, about numbers and about Python's strings and lists, as conversations.

A line is {"messages": [{role, content}, ...], "text": the same as plain text}: `chat: {messages_key: messages}` reads it for
fine-tuning, `text_key: text` for a mid-training stage. The same seed writes the same file.

python -m data_pipeline.synthetic.questions --output questions.jsonl --count 4000
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from looplm.cli import UserError, parse_config, require, run_main
from looplm.files import write_whole

WORDS = ("apple", "blue", "cat", "data", "east", "file", "green", "house", "index", "line", "moon", "north", "open")
SYSTEM = "Answer briefly."
_SYSTEM_SHARE, _TWO_TURNS_SHARE = 0.25, 0.25

Question = tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class QuestionsConfig:
    """What is written.

    Args:
        output: file to write, one conversation a line.
        count: conversations.
        seed: of what is asked.
    """

    output: str
    count: int = 4000
    seed: int = 1234

    def __post_init__(self) -> None:
        require(self.output != "", "output", self.output, "name a file")
        require(self.count > 0, "count", self.count, "give a number above 0")


def main(argv: list[str]) -> None:
    prog = "python -m data_pipeline.synthetic.questions"
    config = parse_config(QuestionsConfig, argv, prog=prog, description=str(__doc__))
    source = random.Random(config.seed)
    lines = [json.dumps(conversation(source)) + "\n" for _ in range(config.count)]
    try:
        write_whole(Path(config.output), "".join(lines))
    except OSError as error:
        raise UserError(f"output: {config.output} cannot be written ({error.strerror}); name another file") from error
    print(f"{config.output}: {config.count:,} conversations")


def conversation(source: random.Random) -> dict[str, object]:
    """One or two questions with their answers, some under a system message."""
    pairs = [source.choice(KINDS)(source) for _ in range(2 if source.random() < _TWO_TURNS_SHARE else 1)]
    messages = [{"role": "system", "content": SYSTEM}] if source.random() < _SYSTEM_SHARE else []
    for question, answer in pairs:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "text": "\n".join(f"Question: {question}\nAnswer: {answer}" for question, answer in pairs)}  # fmt: skip


def _sum(source: random.Random) -> Question:
    a, b = source.randrange(50), source.randrange(50)
    return f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}."


def _difference(source: random.Random) -> Question:
    a, b = sorted((source.randrange(50), source.randrange(50)))
    return f"What is {b} minus {a}?", f"{b} minus {a} is {b - a}."


def _larger(source: random.Random) -> Question:
    a, b = source.sample(range(100), 2)
    return f"Which is larger, {a} or {b}?", f"{max(a, b)} is larger."


def _length(source: random.Random) -> Question:
    word = source.choice(WORDS)
    return f'What is len("{word}") in Python?', f"It is {len(word)}."


def _upper(source: random.Random) -> Question:
    word = source.choice(WORDS)
    return f'What is "{word}".upper() in Python?', f'It is "{word.upper()}".'


def _item(source: random.Random) -> Question:
    items = source.sample(WORDS, 3)
    place = source.randrange(3)
    return f"What is {json.dumps(items)}[{place}] in Python?", f'It is "{items[place]}".'


KINDS: tuple[Callable[[random.Random], Question], ...] = (_sum, _difference, _larger, _length, _upper, _item)

if __name__ == "__main__":
    run_main(main)
