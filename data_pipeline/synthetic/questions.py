"""Write conversations of questions with one right answer, about numbers, strings and lists.

Each line is {"messages": [{role, content}, ...], "text": the same as plain text}. A data source reads it for
fine-tuning with `chat: {messages_key: messages}`, and for a mid-training stage with `text_key: text`. The same seed
writes the same file.

    python -m data_pipeline.synthetic.questions --output questions.jsonl --count 4000
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from looplm.bounds import check_bounds, path_field, positive
from looplm.cli import parse_config, run_main
from looplm.failures import UserError
from looplm.files import write_whole

WORDS = ("apple", "blue", "cat", "data", "east", "file", "green", "house", "index", "line", "moon", "north", "open")
SYSTEM = "Answer briefly."
_SYSTEM_SHARE, _TWO_TURNS_SHARE = 0.25, 0.25

Question = tuple[str, str]  # and its answer


@dataclass(frozen=True, kw_only=True)
class QuestionsConfig:
    """A file of conversations.

    Args:
        output: file to write, one conversation per line.
        count: number of conversations.
        seed: seed of the questions.
    """

    output: str = path_field()
    count: int = positive(4000, at_most=10_000_000)
    seed: int = 1234

    def __post_init__(self) -> None:
        check_bounds(self, "")


def main(argv: list[str]) -> None:
    prog = "python -m data_pipeline.synthetic.questions"
    config = parse_config(QuestionsConfig, argv, prog=prog, description=__doc__ or "")
    rng = random.Random(config.seed)
    lines = [json.dumps(conversation(rng)) + "\n" for _ in range(config.count)]
    try:
        write_whole(Path(config.output), "".join(lines))
    except OSError as error:
        raise UserError(f"output: {config.output} cannot be written ({error.strerror}); name another file") from error
    print(f"{config.output}: {config.count:,} conversations")


def conversation(rng: random.Random) -> dict[str, object]:
    """Return one or two questions with their answers, some after a system message."""
    pairs = [rng.choice(QUESTIONS)(rng) for _ in range(2 if rng.random() < _TWO_TURNS_SHARE else 1)]
    messages = [{"role": "system", "content": SYSTEM}] if rng.random() < _SYSTEM_SHARE else []
    for question, answer in pairs:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    text = "\n".join(f"Question: {question}\nAnswer: {answer}" for question, answer in pairs)
    return {"messages": messages, "text": text}


def _sum(rng: random.Random) -> Question:
    a, b = rng.randrange(50), rng.randrange(50)
    return f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}."


def _difference(rng: random.Random) -> Question:
    a, b = sorted((rng.randrange(50), rng.randrange(50)))
    return f"What is {b} minus {a}?", f"{b} minus {a} is {b - a}."


def _larger(rng: random.Random) -> Question:
    a, b = rng.sample(range(100), 2)
    return f"Which is larger, {a} or {b}?", f"{max(a, b)} is larger."


def _length(rng: random.Random) -> Question:
    word = rng.choice(WORDS)
    return f'What is len("{word}") in Python?', f"It is {len(word)}."


def _upper(rng: random.Random) -> Question:
    word = rng.choice(WORDS)
    return f'What is "{word}".upper() in Python?', f'It is "{word.upper()}".'


def _item(rng: random.Random) -> Question:
    items, index = rng.sample(WORDS, 3), rng.randrange(3)
    return f"What is {json.dumps(items)}[{index}] in Python?", f'It is "{items[index]}".'


QUESTIONS: tuple[Callable[[random.Random], Question], ...] = (_sum, _difference, _larger, _length, _upper, _item)

if __name__ == "__main__":
    run_main(main)
