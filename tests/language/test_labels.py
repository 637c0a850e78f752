"""Ids and labels of talks, against ids that are built one by one and against transformers' own mask."""

import pytest

pytest.importorskip("transformers")


from dinokit.data.talks import MARK, Talk, Turn
from dinokit.language.labels import IGNORED, Collate, Counter, Labels, marked, padded, render
from dinokit.language.recipe import Language


def labels_of(model, length=500):
    count = Counter(model.processor, model.tiled)
    return Labels(model.tokenizer, model.model.generation_config.eos_token_id, count, length)


@pytest.fixture(scope="module")
def words(answering):
    return answering.answerer()


@pytest.fixture(scope="module")
def chatml(answering, tmp_path_factory):
    folder = answering.language_folder(tmp_path_factory.mktemp("lm"))
    return answering.answerer(language=Language(name="folder", path=str(folder)))


def test_ids_and_labels_are_those_built_one_by_one(answering, words) -> None:
    ids, labels = labels_of(words)(
        answering.talk("what colour is the disc", "light red", "how many things", "two")
    )
    vocabulary = words.tokenizer.get_vocab()
    want, supervised = [vocabulary["<bos>"], vocabulary["<user>"]], [IGNORED] * 2
    want += [vocabulary["<image>"]] * 16
    supervised += [IGNORED] * 16
    for text, said in (
        ("what colour is the disc", False), ("<assistant>", False), ("light red <eos>", True),
        ("<user> how many things <assistant>", False), ("two <eos>", True),
    ):  # fmt: skip
        for word in text.split():
            number = vocabulary.get(word, vocabulary["<unk>"])
            want.append(number)
            supervised.append(number if said else IGNORED)
    assert ids == want
    assert labels == supervised


def test_labels_are_where_the_template_marks_what_the_assistant_says(answering, words) -> None:
    made = answering.talk("where is the red disc", "top left", "is there a cross", "no")
    labels = labels_of(words)
    ids, found = labels(made)
    messages = [{"role": turn.role, "content": turn.text} for turn in labels.expanded(made)]
    theirs = words.tokenizer.apply_chat_template(
        messages, return_assistant_tokens_mask=True, return_dict=True
    )
    assert ids == list(theirs["input_ids"])
    assert [int(label != IGNORED) for label in found] == list(theirs["assistant_masks"])


def test_of_chatml_the_end_symbol_is_said_and_the_line_break_after_it_is_not(answering, chatml) -> None:
    ids, labels = labels_of(chatml)(answering.talk("what is it?", "A cat.", "sure?", "Yes"))
    tokenizer = chatml.tokenizer
    said = tokenizer.decode([label for label in labels if label != IGNORED])
    assert said == "A cat.<|im_end|>Yes<|im_end|>"
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert stop in chatml.model.generation_config.eos_token_id
    assert tokenizer.decode(ids).count("<|im_end|>\n") == 4


def test_padding_is_masked_by_place_even_where_its_symbol_is_the_end(answering, words) -> None:
    made = [
        answering.talk("what colour is the disc", "red"),
        answering.talk("how many things are there", "two", "why", "no"),
    ]
    words.tokenizer.pad_token, before = words.tokenizer.eos_token, words.tokenizer.pad_token
    try:
        batch = Collate(words.processor, labels_of(words))(made)
    finally:
        words.tokenizer.pad_token = before
    ends = (batch["labels"] == words.tokenizer.eos_token_id).sum(1)
    assert ends.tolist() == [1, 2]
    assert batch["attention_mask"].sum(1).tolist() == [len(labels_of(words)(each)[0]) for each in made]


def test_padding_stands_left_for_answers_and_right_for_training() -> None:
    assert padded([[1, 2], [3]], 0)[0].tolist() == [[1, 2], [3, 0]]
    table, mask = padded([[1, 2], [3]], 0, left=True)
    assert table.tolist() == [[1, 2], [0, 3]]
    assert mask.tolist() == [[1, 1], [0, 1]]


def test_long_talks_lose_whole_turns_and_never_an_image(answering, words) -> None:
    made = answering.talk("what colour is the disc", "red", "how many things are there", "two")
    whole = labels_of(words)(made)[0]
    short = labels_of(words, len(whole) - 1)
    ids, labels = short(made)
    assert (short.checked, short.cut) == (1, 1)
    assert whole[: len(ids)] == ids
    assert labels[-1] == words.tokenizer.eos_token_id
    two = answering.talk("what", "red", "and here", "two")
    later = Talk("b", two.images * 2, (*two.turns[:2], Turn("user", f"{MARK} and"), two.turns[3]))
    first = labels_of(words)(Talk("a", two.images, two.turns[:2]))[0]
    batch = Collate(words.processor, labels_of(words, len(first)))([later])
    assert len(batch["pixel_values"]) == 1
    assert batch["input_ids"][0].tolist() == first
    with pytest.raises(ValueError, match=r"a talk: .* more than length=10"):
        labels_of(words, 10)(made)


def test_a_text_cannot_end_a_turn(answering, words) -> None:
    with pytest.raises(ValueError, match="contains <eos>, a symbol of the language model"):
        labels_of(words)(answering.talk("what <eos> is it", "red"))


def test_templates_that_cannot_be_learnt_from_are_errors(answering, words, chatml) -> None:
    tokenizer = chatml.tokenizer
    before = tokenizer.chat_template
    try:
        tokenizer.chat_template = before.replace("<|im_end|>' + '", "")
        with pytest.raises(ValueError, match="ends an answer with no symbol"):
            labels_of(chatml)(answering.talk("what is it?", "A cat."))
        tokenizer.chat_template = "{{ messages | length }}" + before
        with pytest.raises(ValueError, match="otherwise when more turns follow"):
            render(tokenizer, [Turn("user", "a"), Turn("assistant", "b")])
    finally:
        tokenizer.chat_template = before


def test_a_processor_counts_the_tokens_that_the_model_makes(answering) -> None:
    tiled = answering.answerer(answering.backbone(size=16), name="tiles")
    count = Counter(tiled.processor, tiled.tiled)
    numbers = set()
    for height, width in ((16, 16), (40, 20), (20, 40), (64, 16), (16, 64), (33, 57)):
        image = answering.picture(0, height, width)
        batch = tiled.processor(images=[image], text=[MARK], return_tensors="pt")
        made = tiled.model.get_image_features(batch["pixel_values"], batch["image_sizes"])
        features = getattr(made, "pooler_output", made)[0]
        assert count(image) == len(features)
        numbers.add(len(features))
    assert len(numbers) > 2


def test_a_talk_is_shown_with_what_is_learnt_in_brackets(answering, words) -> None:
    made = answering.talk("what colour is it", "red", "how many", "two")
    shown = marked(words.tokenizer, made)
    assert shown == (
        "<bos> <user> <image> what colour is it <assistant>[[ red <eos>]]"
        " <user> how many <assistant>[[ two <eos>]]"
    )
