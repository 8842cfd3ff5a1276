import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, normalizers, pre_tokenizers
from vocabularies import (
    TEXT,
    byte_level_metadata,
    naive_sentencepiece,
    sentencepiece_metadata,
    train_byte_level,
)

from tiered.checkpoints.gguf_header import Metadata, read_header
from tiered.text.split_patterns import SPLITS
from tiered.text.tokenizer import load_tokenizer

VOCABS = os.environ.get("TIERED_VOCABS", "")  # the folder `models` of llama.cpp's source
LLAMA_CPP_VOCABS = (
    "command-r", "deepseek-coder", "deepseek-llm", "falcon", "gpt-2", "llama-bpe", "llama-spm",
    "mpt", "phi-3", "qwen2", "qwen35", "refact", "starcoder",
)  # fmt: skip
TRAINED = train_byte_level()
BYTE_LEVEL = load_tokenizer(byte_level_metadata(TRAINED))
SENTENCEPIECE = load_tokenizer(sentencepiece_metadata())
TOKENIZERS = [BYTE_LEVEL, SENTENCEPIECE]


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["byte-level", "sentencepiece"])
@given(text=st.text() | st.text("the a\n🙂é", max_size=60))
@settings(max_examples=200)
def test_a_text_survives(tokenizer, text):
    text = text.replace("\u2581", "_")  # SentencePiece cannot tell it from a space
    for parse_special in (True, False):
        ids = tokenizer.encode(text, parse_special=parse_special)
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["byte-level", "sentencepiece"])
@given(ids=st.lists(st.integers(0, 600), max_size=40))
def test_a_stream_says_what_decoding_says(tokenizer, ids):
    stream = tokenizer.stream(skip_special=False)
    pieces = [stream.push(token) for token in ids]
    whole = b"".join(tokenizer.token_bytes(token) for token in ids).decode(errors="replace")
    assert "".join(pieces) + stream.finish() == whole


def test_a_stream_waits_for_whole_characters():
    ids = BYTE_LEVEL.encode("\N{SLOTH}")  # several tokens
    stream = BYTE_LEVEL.stream()
    assert [stream.push(token) for token in ids] == [*[""] * (len(ids) - 1), "\N{SLOTH}"]
    assert stream.finish() == ""
    assert len(ids) > 1 and stream.push(ids[0]) == ""
    assert stream.finish() == "\ufffd"


@given(text=st.text() | st.text("the a'\n12🙂é", max_size=60))
def test_byte_level_equals_the_library(text):
    assert BYTE_LEVEL.encode(text, parse_special=False) == TRAINED.encode(text).ids


@given(text=st.text("aehrintg. T", max_size=40))
def test_sentencepiece_equals_naive_merging(text):
    expected = naive_sentencepiece(sentencepiece_metadata(), text)
    assert SENTENCEPIECE.encode(text, add_bos=False) == expected


def test_sentencepiece_equals_the_library(tmp_path):
    library = pytest.importorskip("sentencepiece")
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(TEXT * 8, encoding="utf-8")
    library.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(tmp_path / "model"),
        model_type="bpe",
        vocab_size=360,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    model = library.SentencePieceProcessor(str(tmp_path / "model.model"))
    kinds = [
        2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i) else 1
        for i in range(model.vocab_size())
    ]
    tokenizer = load_tokenizer(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": [model.id_to_piece(i) for i in range(model.vocab_size())],
            "tokenizer.ggml.scores": [model.get_score(i) for i in range(model.vocab_size())],
            "tokenizer.ggml.token_type": kinds,
            "tokenizer.ggml.bos_token_id": model.bos_id(),
            "tokenizer.ggml.eos_token_id": model.eos_id(),
        }
    )
    for text in [TEXT, "jumping foxes   and dogs", " a", "", "日本語 🙃 unseen: Ω", "return\n\n\n"]:
        assert tokenizer.encode(text, add_bos=False) == model.encode(text)
        assert tokenizer.encode(text) == [model.bos_id(), *model.encode(text)]


def test_special_tokens_steer_only_if_parsed():
    end = BYTE_LEVEL.token_id("<|im_end|>")
    assert BYTE_LEVEL.encode("a<|im_end|>") == [*BYTE_LEVEL.encode("a"), end]
    plain = BYTE_LEVEL.encode("a<|im_end|>", parse_special=False)
    assert end not in plain and BYTE_LEVEL.decode(plain) == "a<|im_end|>"
    extra = BYTE_LEVEL.token_id("<extra>")  # a user's own token is always one
    assert BYTE_LEVEL.encode("<extra>", parse_special=False) == [extra]
    assert BYTE_LEVEL.decode([end, extra], skip_special=True) == "<extra>"
    assert BYTE_LEVEL.stream().push(end) == ""
    assert BYTE_LEVEL.eos_ids == (end,)


def test_beginning_of_sequence():
    assert SENTENCEPIECE.encode("the")[0] == SENTENCEPIECE.bos_id == 1
    assert SENTENCEPIECE.encode("<s>the") == [1, *SENTENCEPIECE.encode("the", add_bos=False)]
    assert SENTENCEPIECE.encode("", add_bos=True) == [1]
    assert BYTE_LEVEL.encode("") == []
    assert BYTE_LEVEL.encode("a", add_bos=True)[0] == BYTE_LEVEL.bos_id
    metadata = sentencepiece_metadata()
    del metadata["tokenizer.ggml.bos_token_id"]
    without = load_tokenizer(metadata)
    assert without.encode("the") == SENTENCEPIECE.encode("the", add_bos=False)
    with pytest.raises(ValueError, match="no beginning-of-sequence"):
        without.encode("the", add_bos=True)


def test_ids_beyond_the_vocabulary_are_empty():
    assert BYTE_LEVEL.token_bytes(BYTE_LEVEL.vocab_size) == b""
    assert BYTE_LEVEL.token_bytes(-1) == b""


@pytest.mark.parametrize("name", SPLITS)
def test_every_pre_tokenizer_loads_and_keeps_the_text(name):
    tokenizer = load_tokenizer(byte_level_metadata(TRAINED, name))
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


def test_patterns_cut_where_the_models_do():
    def words(name, text):
        steps = [pre_tokenizers.Split(Regex(p), "isolated") for p in SPLITS[name].patterns]
        return [word for word, _ in pre_tokenizers.Sequence(steps).pre_tokenize_str(text)]

    assert words("gpt-2", "it's 2024  now") == ["it", "'s", " 2024", " ", " now"]
    assert words("smollm", "a 2024") == ["a", " ", "2", "0", "2", "4"]
    assert words("llama-bpe", "A 12345") == ["A", " ", "123", "45"]
    assert words("qwen2", "IT'S 12") == ["IT", "'S", " ", "1", "2"]
    assert words("gpt-4o", "HelloWorld") == ["Hello", "World"]
    assert words("deepseek-v3", "a.b 日本x") == ["a", ".b", " ", "日本", "x"]


def test_an_unknown_pre_tokenizer_is_warned_about(caplog):
    tokenizer = load_tokenizer(byte_level_metadata(TRAINED, "tomorrow's"))
    assert "tomorrow's" in caplog.text
    assert tokenizer.encode(TEXT) == BYTE_LEVEL.encode(TEXT)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model", None, "no tokenizer.ggml.model"),
        ("model", "rwkv", "kind 'rwkv'"),
        ("tokens", None, "no tokenizer.ggml.tokens"),
        ("token_type", [1], "1 token types"),
        ("merges", ["ab"], "'ab' is no merge"),
        ("merges", ["qqq zzz"], "damaged GGUF vocabulary"),
        ("eos_token_id", 10**9, "eos_token_id is 1000000000"),
        ("bos_token_id", "one", "bos_token_id"),
        ("tokens", 3, "tokens must be a list"),
    ],
)
def test_damaged_metadata_is_refused(key, value, message):
    metadata = byte_level_metadata(TRAINED)
    metadata[f"tokenizer.ggml.{key}"] = value
    with pytest.raises(ValueError, match=message):
        load_tokenizer(metadata)


def test_scores_must_match():
    with pytest.raises(ValueError, match="1 scores"):
        load_tokenizer({**sentencepiece_metadata(), "tokenizer.ggml.scores": [0.0]})


@pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["byte-level", "sentencepiece"])
def test_a_saved_folder_is_the_same_tokenizer(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    for text in (TEXT, "", " the there<|im_end|>", "</s>x"):
        assert loaded.encode(text) == tokenizer.encode(text)
        assert loaded.decode(loaded.encode(text)) == tokenizer.decode(tokenizer.encode(text))
    assert loaded.bos_id == tokenizer.bos_id
    assert loaded.eos_ids == tokenizer.eos_ids
    assert loaded.chat_template == tokenizer.chat_template


def test_what_the_files_of_a_folder_say(tmp_path):
    TRAINED.save(str(tmp_path / "tokenizer.json"))
    templates = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    config = {"bos_token": {"content": "A"}, "eos_token": "B", "chat_template": templates}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    (tmp_path / "config.json").write_text('{"eos_token_id": 8}')
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.chat_template == "yes"
    assert tokenizer.bos_id == TRAINED.token_to_id("A")
    assert tokenizer.eos_ids == (TRAINED.token_to_id("B"), 7, 8)
    assert tokenizer.encode("x") == TRAINED.encode("x").ids  # nothing says to put A in front
    (tmp_path / "chat_template.jinja").write_text("file")
    assert load_tokenizer(tmp_path).chat_template == "file"


def test_a_metaspace_folder(tmp_path):
    """SentencePiece as newer tokenizer.json files write it: by a pre-tokenizer."""
    SENTENCEPIECE.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    description = json.loads(file.read_text())
    description["normalizer"] = None
    description["pre_tokenizer"] = {
        "type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False,
    }  # fmt: skip
    file.write_text(json.dumps(description))
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode("the there") == SENTENCEPIECE.encode("the there")
    assert loaded.decode(loaded.encode("the there")) == "the there"


def test_unusable_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json is damaged"):
        load_tokenizer(tmp_path)
    wordy = train_byte_level()
    wordy.decoder = None
    wordy.normalizer = normalizers.Lowercase()
    wordy.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="only byte-level BPE and"):
        load_tokenizer(tmp_path)


@pytest.mark.skipif(not VOCABS, reason="TIERED_VOCABS does not name llama.cpp's folder `models`")
@pytest.mark.parametrize("name", LLAMA_CPP_VOCABS)
def test_llama_cpp_vectors(name):
    file = Path(VOCABS) / f"ggml-vocab-{name}.gguf"
    tokenizer = load_tokenizer(Metadata(read_header(file).values))
    texts = Path(f"{file}.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    lines = Path(f"{file}.out").read_text().split("\n")
    expected = [[int(i) for i in line.split()] for line in lines]
    for text, ids in zip(texts, expected, strict=True):
        assert tokenizer.encode(text, add_bos=False, parse_special=False) == ids
        assert tokenizer.decode(ids) == text
