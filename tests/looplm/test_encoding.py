"""The token that begins a text, for tokenizers of any alphabet."""

import pytest
from tokenizers import Tokenizer, models, processors

from looplm.encoding import added_ids, begin_id, encode


@pytest.mark.parametrize("letter", ["a", "1", "\u4e16"])
def test_the_token_before_a_text_is_found_whatever_the_vocabulary(letter: str) -> None:
    tokenizer = Tokenizer(models.BPE({"<s>": 0, "</s>": 1, letter: 2}, []))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    assert added_ids(tokenizer) == ([0], [1])
    assert encode(tokenizer, letter, begin_id(tokenizer)) == [0, 2]
