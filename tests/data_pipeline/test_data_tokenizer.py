"""Trained and existing tokenizers."""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from datatrove.data import Document
from megatron.core.datasets.indexed_dataset import IndexedDataset
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from data_pipeline import train_tokenizer as module
from data_pipeline.config import TokenizerConfig
from data_pipeline.manifest import read_manifest, write_manifest
from data_pipeline.text_encoder import TextEncoder, rewriting
from data_pipeline.train_tokenizer import (
    TextStream,
    load_tokenizer,
    sample_texts,
    special_ids,
    train_tokenizer,
    vocab_size,
)
from data_pipeline.verify import check_prefix
from looplm.failures import UserError


@pytest.fixture
def trained(corpus: Any) -> Tokenizer:
    return train_tokenizer(corpus.documents(30), TokenizerConfig(vocab_size=400))


@pytest.mark.parametrize(
    "text", ["", " a  b\n\n\tc ", "Grüße, 世界 🙂\x00\ud7ff", "12345 and 1.5e-3", "def f(x):\n    return x\r\n"]
)
def test_decoding_restores_the_text(trained: Tokenizer, text: str) -> None:
    assert trained.decode(trained.encode(text).ids, skip_special_tokens=False) == text


def test_training_is_repeatable_and_special_tokens_have_ids(corpus: Any, trained: Tokenizer) -> None:
    again = train_tokenizer(type(corpus)().documents(30), TokenizerConfig(vocab_size=400))
    assert again.to_str() == trained.to_str()
    assert special_ids(trained, TokenizerConfig(vocab_size=400)) == (0, 1, 2, None)
    assert vocab_size(trained) == 400


def encode(tokenizer: Tokenizer, config: TokenizerConfig, text: str) -> list[int]:
    return next(TextEncoder(tokenizer, config, "t").encode_texts([Document(text, "id")])).tokens


def test_special_tokens_in_a_text_are_text(trained: Tokenizer) -> None:
    trained.enable_truncation(3)
    trained.enable_padding(pad_id=2)
    text = "before <|eos|> and <|pad|> and <|bos|> after"
    ids = encode(trained, TokenizerConfig(vocab_size=400), text)
    assert ids[-1] == 1 and not {0, 1, 2} & set(ids[:-1])
    assert trained.decode(ids[:-1]) == text


def stream(letter: str, count: int, size: int, length: int = 10) -> TextStream:
    """Return a stream of ``count`` texts of ``length`` equal letters."""
    return TextStream(size, lambda: [Document(letter * length, "id")] * count)


@pytest.mark.parametrize(
    ("streams", "budget", "taken"),
    [
        ([stream("a", 2, 1), stream("b", 50, 1), stream("c", 50, 1)], 300, {"a": 20, "b": 140, "c": 140}),
        ([stream("a", 2, 1), stream("b", 50, 1), stream("c", 50, 1)], 10**6, {"a": 20, "b": 500, "c": 500}),
        ([*(stream("a", 9, 1) for _ in range(64)), stream("b", 900, 576)], 1000, {"a": 100, "b": 900}),
        ([stream(letter, 1, 5) for letter in "abcdefgh"], 30, {"a": 10, "c": 10, "f": 10}),  # one text per file
    ],
)
def test_sample_spreads_the_budget(streams: list[TextStream], budget: int, taken: dict[str, int]) -> None:
    assert Counter("".join(sample_texts(streams, budget))) == taken


def test_the_command_learns_from_every_file(tmp_path: Path, jsonl: Any, monkeypatch: Any) -> None:
    for letter, count in (("a", 40), ("b", 40), ("c", 80)):
        jsonl(letter, [letter * 10] * count)
    jsonl("limited1", ["x" * 10] * 2), jsonl("limited2", ["x" * 10] * 78)
    (tmp_path / "c.yaml").write_text(
        f"output_dir: x\nsources:\n  - {{name: a, kind: jsonl, paths: ['{tmp_path}/[abc].jsonl']}}\n"
        f"  - {{name: x, kind: jsonl, paths: ['{tmp_path}/l*.jsonl'], limit: 5}}\n"
        "tokenizer: {vocab_size: 300, train_chars: 600}\n"
    )
    learned = list[str]()

    def train(texts: Iterable[str], settings: TokenizerConfig) -> Tokenizer:
        learned.extend(texts)
        return train_tokenizer(learned, settings)

    monkeypatch.setattr(module, "train_tokenizer", train)
    module.main(["--config", str(tmp_path / "c.yaml"), "--output", str(tmp_path / "t.json")])
    assert Counter("".join(learned)) == {"a": 140, "b": 140, "c": 270, "x": 50}


def save_tokenizer(path: Path, vocabulary: dict[str, int], **options: Any) -> TokenizerConfig:
    Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")).save(str(path))
    return TokenizerConfig(path=str(path), **options)


WORDS = {"<unk>": 0, "<|eos|>": 1, "<|pad|>": 2, "a": 3}


@pytest.mark.parametrize(
    ("vocabulary", "options", "message"),
    [
        ({"<unk>": 0, "<|pad|>": 1}, {}, "tokenizer.eos_token: .* has no token '<|eos|>'"),
        ({"<unk>": 0, "<|eos|>": 1}, {}, "tokenizer.pad_token: .* has no token '<|pad|>'"),
        (WORDS, {"bos_token": "<|bos|>"}, "tokenizer.bos_token: .* has no token"),
        (WORDS, {"bos_token": "<|pad|>"}, "pad needs its own id"),
        (WORDS | {"z": 70_000}, {}, "5 tokens but ids up to 70000"),
    ],
)
def test_existing_tokenizers_that_are_refused(tmp_path: Path, vocabulary: dict, options: dict, message: str) -> None:
    config = save_tokenizer(tmp_path / "t.json", vocabulary, **({"bos_token": None} | options))
    with pytest.raises(UserError, match=message):
        load_tokenizer(config)


MERGING: dict[str, Any] = {"vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}


def test_existing_tokenizer(tmp_path: Path) -> None:
    config = save_tokenizer(tmp_path / "t.json", WORDS, bos_token=None)
    assert special_ids(load_tokenizer(config), config) == (None, 1, 2, None)
    (tmp_path / "t.json").write_text(json.dumps({"not": "one"}))
    with pytest.raises(UserError, match=r"cannot be read as a tokenizer\.json .* in tokenizer\.path"):
        load_tokenizer(config)
    with pytest.raises(UserError, match="is not a file"):
        load_tokenizer(TokenizerConfig(path=str(tmp_path / "none.json")))
    prefix_longer_than_a_token = {"type": "BPE", "continuing_subword_prefix": "x" * 9} | MERGING
    (tmp_path / "t.json").write_text(json.dumps({"version": "1.0", "model": prefix_longer_than_a_token}))
    with pytest.raises(UserError, match=r"cannot be read as a tokenizer\.json \(range end index"):  # a panic in Rust
        load_tokenizer(config)


NAMED = "a <|eos|> b<|eos|><|pad|>c  <|eos|>  d <|bos|>"
MARKS = ["<|bos|>", "<|eos|>", "<|pad|>"]


def with_bytes(special: bool = True, **flags: Any) -> Tokenizer:
    """Return a byte-level BPE of bytes alone, with the marks and an ordinary word as added tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: index for index, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    added = [AddedToken(name, special=special, normalized=False, **flags) for name in MARKS]
    (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(added)
    tokenizer.add_tokens(["<word>"])
    return tokenizer


def with_merges_to_eos() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Split("x", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.train_from_iterator(["<|eos|>"] * 9, trainers.BpeTrainer(initial_alphabet=sorted({*NAMED})))
    assert tokenizer.encode("<|eos|>").tokens == ["<|eos|>"]
    tokenizer.add_special_tokens(MARKS)
    return tokenizer


def unigram(*pieces: str) -> Tokenizer:
    """Return a tokenizer of SentencePiece's kind, which has its control tokens among the pieces of its model."""
    scores = [(piece, 0.0) for piece in ("<unk>", *pieces)] + [
        (letter, -5.0) for letter in sorted({*NAMED, "▁"} - {" "})
    ]
    tokenizer = Tokenizer(models.Unigram(scores, 0, False))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.add_special_tokens(["<unk>", *MARKS])
    return tokenizer


@pytest.mark.promise(
    text="The name of eos, pad or bos in a text stays text, whatever a given tokenizer says of the token",
    expected="one eos, at the end of the document, and the text is restored",
)
@pytest.mark.parametrize(
    "make",
    [
        lambda: with_bytes(special=True),
        lambda: with_bytes(special=False),
        lambda: with_bytes(special=False, lstrip=True, rstrip=True),
        lambda: with_bytes(special=True, single_word=True),
        with_merges_to_eos,
        lambda: unigram(*MARKS),
    ],
)
def test_names_of_control_tokens_stay_text(make: Any, record_property: Any) -> None:
    tokenizer, config = make(), TokenizerConfig(path="t.json")
    control = {tokenizer.token_to_id(name) for name in MARKS}
    ids = encode(tokenizer, config, NAMED)
    assert ids[-1] == tokenizer.token_to_id("<|eos|>") and not control & set(ids[:-1])
    assert tokenizer.decode(ids[:-1], skip_special_tokens=False).replace("▁", " ") == NAMED
    if (word := tokenizer.token_to_id("<word>")) is not None:  # other added tokens are found, under their own ids
        assert encode(tokenizer, config, "a<word>")[-2] == word
    record_property("seen", "one eos, at the end of the document, and the text is restored")


def test_a_name_that_a_word_tokenizer_knows_becomes_unknown_text() -> None:
    tokenizer = Tokenizer(models.WordLevel(WORDS, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    encoder = TextEncoder(tokenizer, TokenizerConfig(path="t.json", bos_token=None), "t")
    assert next(encoder.encode_texts([Document("a <|eos|> a b", "id")])) == ([3, 0, 3, 0, 1], 2, 0)


def test_a_merge_that_needs_the_token_is_refused_in_one_line(tmp_path: Path) -> None:
    tokenizer = with_merges_to_eos()
    settings = json.loads(tokenizer.to_str())
    settings["model"]["vocab"]["<|eos|>a"] = 70
    settings["model"]["merges"].append(["<|eos|>", "a"])
    (tmp_path / "t.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"the text '<\|eos\|>' becomes the control token") as caught:
        load_tokenizer(TokenizerConfig(path=str(tmp_path / "t.json")))
    assert "\n" not in str(caught.value)


@pytest.mark.promise(
    text="A given tokenizer whose eos is not special does not cut documents in two, and verify --deep would notice",
    expected="as many eos ids as documents; a data set with one more is refused",
)
def test_names_in_documents_end_no_document(
    tmp_path: Path, jsonl: Any, config: Any, build: Any, record_property: Any
) -> None:
    texts = [f"{index} {NAMED}" for index in range(16)]
    with_bytes(special=False, lstrip=True).save(str(tmp_path / "t.json"))
    given = TokenizerConfig(path=str(tmp_path / "t.json"))
    output = build(config({"a": jsonl("a", texts)}, tokenizer=given, validation_fraction=0.0))
    prefix, tokenizer = output / "a_train", load_tokenizer(given)
    manifest, stored = check_prefix(prefix, deep=True), IndexedDataset(str(prefix))
    eos = manifest.tokenizer.eos_id
    assert sorted(tokenizer.decode(list(stored[row])[:-1], skip_special_tokens=False) for row in range(16)) == sorted(
        texts
    )
    assert sum(list(stored[row]).count(eos) for row in range(16)) == 16

    data = bytearray(Path(f"{prefix}.bin").read_bytes())
    data[:2] = eos.to_bytes(2, "little")
    Path(f"{prefix}.bin").write_bytes(data)
    write_manifest(prefix, source="a", split="train", vocab_size=260, tokenizer=manifest.tokenizer, config_sha256="x")
    with pytest.raises(UserError, match=rf"holds eos \({eos}\) 17 times in 16 documents"):
        check_prefix(prefix, deep=True)
    record_property("seen", "16 eos ids in 16 documents; 17 are refused")


def lossy(unknown: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>" if unknown else None))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [*MARKS, "<unk>"] if unknown else MARKS
    tokenizer.train_from_iterator(["the fox he fox"] * 9, trainers.BpeTrainer(vocab_size=40, special_tokens=special))
    return tokenizer


@pytest.mark.promise(
    text="A given tokenizer that drops characters is refused before any work, or the dropped ones are counted",
    expected="one line that shows a text and what is left of it; with allow_loss the number in log and manifest",
)
def test_lost_characters_are_refused_or_counted(
    tmp_path: Path, jsonl: Any, config: Any, build: Any, capsys: Any, record_property: Any
) -> None:
    lossy().save(str(tmp_path / "t.json"))
    source = {"a": jsonl("a", ["the fox", "The QUICK fox: 42 €", "he fox he"])}
    given = TokenizerConfig(path=str(tmp_path / "t.json"))
    with pytest.raises(UserError, match="loses characters, 'The QUICK fox: 42 €' becomes 'he fox'") as caught:
        build(config(source, tokenizer=given, validation_fraction=0.0))
    assert "\n" not in str(caught.value) and not (tmp_path / "out.partial").exists()
    allowed = TokenizerConfig(path=given.path, allow_loss=True)
    output = build(config(source, tokenizer=allowed, validation_fraction=0.0))
    lost = len("The QUICK fox: 42 €") - len("he") - len("fox")
    assert read_manifest(output / "a_train").lost_characters == lost
    assert capsys.readouterr().out.count(f"{lost} lost characters") == 2
    record_property("seen", f"'The QUICK fox: 42 €' becomes 'he fox': refused; {lost} lost characters with allow_loss")


def test_a_loss_behind_the_first_documents_ends_the_build(tmp_path: Path, jsonl: Any, config: Any, build: Any) -> None:
    lossy().save(str(tmp_path / "t.json"))
    source = {"a": jsonl("a", [*["the fox he"] * 120, "the € fox"])}
    given = TokenizerConfig(path=str(tmp_path / "t.json"))
    with pytest.raises(UserError, match="loses characters, 'the € fox' becomes 'the fox'"):
        build(config(source, tokenizer=given, validation_fraction=0.0))
    assert not (tmp_path / "out").exists()


def test_unknown_tokens_are_counted(tmp_path: Path, jsonl: Any, config: Any, build: Any, capsys: Any) -> None:
    lossy(unknown=True).save(str(tmp_path / "t.json"))
    given = TokenizerConfig(path=str(tmp_path / "t.json"))
    source = {"a": jsonl("a", ["the fox € he", "the fox", "the x €"])}
    output = build(config(source, tokenizer=given, validation_fraction=0.0))
    manifest = check_prefix(output / "a_train", deep=True)
    assert (manifest.unknown_tokens, manifest.lost_characters) == (2, 0)
    assert capsys.readouterr().out.count("2 unknown tokens") == 2


def test_a_normalizer_that_changes_the_text_is_named() -> None:
    tokenizer = with_bytes()
    assert rewriting(tokenizer) == ""
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(" ", "▁")])
    assert rewriting(tokenizer) == "NFKC"
    tokenizer.normalizer = normalizers.Sequence([normalizers.Strip(), normalizers.Lowercase()])
    assert rewriting(tokenizer) == "Strip, Lowercase"
    with pytest.raises(UserError, match="loses characters, ' a' becomes 'a'"):
        encode(tokenizer, TokenizerConfig(path="t.json"), " a")
    tokenizer.normalizer = normalizers.Lowercase()
    assert encode(tokenizer, TokenizerConfig(path="t.json"), "Aé")[:-1] == tokenizer.encode("aé").ids


@pytest.mark.promise(
    text="A bos or eos that a given tokenizer adds to each text is in the data once, and an export agrees",
    expected="bos, the text, eos; other tokens around a text are refused",
)
def test_tokens_that_a_tokenizer_adds_are_in_the_data_once(record_property: Any, tmp_path: Path) -> None:
    tokenizer, config = with_bytes(), TokenizerConfig(path=str(tmp_path / "t.json"))
    ids, plain = special_ids(tokenizer, config), tokenizer.encode("ab").ids
    for single, begin, stored in (
        ("<|bos|> $A", ids.bos, [ids.bos, *plain, ids.eos]),
        ("<|bos|> $A <|eos|>", ids.bos, [ids.bos, *plain, ids.eos]),
        ("$A <|eos|>", None, [*plain, ids.eos]),
        ("<|eos|> $A", ids.eos, [*plain, ids.eos]),  # GPT-2's way: the eos of the document before is the begin
    ):
        marks = [(name, tokenizer.token_to_id(name)) for name in MARKS]
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=marks)
        assert special_ids(tokenizer, config).begin == begin
        assert encode(tokenizer, config, "ab") == stored
    for single in ("<|bos|> <|eos|> $A", "$A <|bos|>", "<|pad|> $A"):
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=marks)
        tokenizer.save(str(tmp_path / "t.json"))
        with pytest.raises(UserError, match=r"puts .* before each text and .* after it; change its post_processor"):
            load_tokenizer(config)
    record_property("seen", "bos, the text, eos; other tokens around a text are refused")


def test_the_command(tmp_path: Path, corpus: Any, jsonl: Any, capsys: pytest.CaptureFixture) -> None:
    path = jsonl("a", corpus.documents(20))
    (tmp_path / "c.yaml").write_text(
        f"output_dir: x\nsources: [{{name: a, kind: jsonl, paths: [{path}]}}]\ntokenizer: {{vocab_size: 300}}\n"
    )
    module.main(["--config", str(tmp_path / "c.yaml"), "--output", str(tmp_path / "t" / "t.json")])
    assert vocab_size(Tokenizer.from_file(str(tmp_path / "t" / "t.json"))) == 300
    assert "300 tokens" in capsys.readouterr().out
    text = (tmp_path / "c.yaml").read_text()
    (tmp_path / "c.yaml").write_text(text.replace("name: a", "name: a, filters: [c4], language: amh"))
    with pytest.raises(UserError, match=r"sources\.a\.filters: \['c4'\] is not allowed; c4 cannot judge"):
        module.main(["--config", str(tmp_path / "c.yaml")])


def test_digits_are_tokens_of_their_own():
    tokenizer = train_tokenizer(["2024 2024 2024"] * 50, TokenizerConfig(vocab_size=320))
    assert not [token for token in tokenizer.get_vocab() if sum(map(str.isdigit, token)) > 1]
