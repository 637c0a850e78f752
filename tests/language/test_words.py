"""The tokenizer of whole words, its chat template, and what a missing package says."""

import sys

import pytest

from dinokit.data.scenes.sentences import VOCABULARY
from dinokit.language.words import SPECIAL, word_tokenizer

transformers = pytest.importorskip("transformers")


def test_ids_follow_the_vocabulary_and_text_comes_back() -> None:
    tokenizer = word_tokenizer(("red", "disc", "a"), chat=False)
    ids = tokenizer("a red disc")["input_ids"]
    assert ids == [1, 9, 7, 8, 2]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a red disc"
    assert tokenizer("a teapot")["input_ids"] == [1, 9, 3, 2]
    assert len(tokenizer) == len(SPECIAL) + 3
    batch = tokenizer(["red", "a red disc"], padding=True)
    assert batch["input_ids"] == [[1, 7, 2, 0, 0], [1, 9, 7, 8, 2]]
    assert batch["attention_mask"] == [[1, 1, 1, 0, 0], [1] * 5]


def test_the_mask_of_a_chat_is_what_the_assistant_says_and_its_end() -> None:
    tokenizer = word_tokenizer(VOCABULARY, chat=True)
    chat = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what colour is the disc"}]},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": "how many things are there"},
        {"role": "assistant", "content": [{"type": "text", "text": "two"}]},
    ]
    found = tokenizer.apply_chat_template(chat, return_assistant_tokens_mask=True, return_dict=True)
    words = tokenizer.convert_ids_to_tokens(found["input_ids"])
    expected = [
        "<bos>",
        "<user>",
        "<image>",
        "what",
        "colour",
        "is",
        "the",
        "disc",
        "<assistant>",
        "red",
        "<eos>",
        "<user>",
        "how",
        "many",
        "things",
        "are",
        "there",
        "<assistant>",
        "two",
        "<eos>",
    ]
    assert words == expected
    marked = [word for word, mask in zip(words, found["assistant_masks"], strict=True) if mask]
    assert marked == ["red", "<eos>", "two", "<eos>"]


def test_a_prompt_ends_where_the_assistant_begins() -> None:
    tokenizer = word_tokenizer(VOCABULARY, chat=True)
    question = [{"role": "user", "content": "where is the red disc"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True)[
        "input_ids"
    ]
    answered = tokenizer.apply_chat_template(
        [*question, {"role": "assistant", "content": "top left"}], return_dict=True
    )["input_ids"]
    assert answered[: len(prompt)] == prompt
    assert tokenizer.decode(answered[len(prompt) :]) == "top left <eos>"
    assert "<bos>" not in tokenizer.decode(tokenizer("top left")["input_ids"]), "the template writes it once"


def test_repeated_image_tokens_without_spaces_are_tokens() -> None:
    tokenizer = word_tokenizer(VOCABULARY, chat=True)
    assert tokenizer("<image><image> what")["input_ids"][:2] == [SPECIAL.index("<image>")] * 2


def test_it_is_the_same_after_saving(tmp_path) -> None:
    tokenizer = word_tokenizer(VOCABULARY, chat=True)
    tokenizer.save_pretrained(tmp_path)
    opened = transformers.AutoTokenizer.from_pretrained(tmp_path)
    chat = [{"role": "user", "content": "how many things"}, {"role": "assistant", "content": "one"}]
    settings = {"return_assistant_tokens_mask": True, "return_dict": True}
    assert opened.apply_chat_template(chat, **settings) == tokenizer.apply_chat_template(chat, **settings)
    assert (opened.pad_token_id, opened.bos_token_id, opened.eos_token_id) == (0, 1, 2)


@pytest.mark.parametrize("words", [("red", "red"), ("dark red",), ("",), ("<pad>", "red")])
def test_words_that_could_not_be_tokens_are_refused(words) -> None:
    with pytest.raises(ValueError, match="has each word once"):
        word_tokenizer(words, chat=False)


def test_a_missing_package_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"needs tokenizers.*dinokit\[language\]"):
        word_tokenizer(("red",), chat=False)
