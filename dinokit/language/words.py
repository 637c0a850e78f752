"""A tokenizer of whole words, for language models that learn a small closed vocabulary from nothing."""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dinokit.language import needed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"
IMAGE, USER, ASSISTANT = "<image>", "<user>", "<assistant>"
SPECIAL = (PAD, BOS, EOS, UNK, IMAGE, USER, ASSISTANT)  # the first ids, in this order

# A message is {"role": "user" or "assistant", "content": text or a list of {"type": "image"} and
# {"type": "text", "text": ...}}, as in transformers. What the assistant says and the end symbol are marked:
# apply_chat_template(return_assistant_tokens_mask=True) finds what a model is trained to say.
TEMPLATE = (
    "{%- macro said(content) -%}"
    "{%- if content is string -%}{{ content }}"
    "{%- else -%}{%- for part in content -%}"
    "{{ '<image>' if part['type'] == 'image' else part['text'] }}{{ '' if loop.last else ' ' }}"
    "{%- endfor -%}{%- endif -%}"
    "{%- endmacro -%}"
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{ ' <user> ' + said(message['content']) }}"
    "{%- elif message['role'] == 'assistant' -%}{{ ' <assistant> ' }}"
    "{%- generation -%}{{ said(message['content']) + ' ' + eos_token }}{%- endgeneration -%}"
    "{%- else -%}{{ raise_exception('A message is of the user or of the assistant.') }}{%- endif -%}"
    "{%- endfor -%}"
    "{{- ' <assistant>' if add_generation_prompt else '' -}}"
)


def word_tokenizer(vocabulary: Sequence[str], chat: bool) -> "PreTrainedTokenizerFast":
    """A tokenizer of transformers whose tokens are words between spaces; others become the unknown one.

    Args:
        vocabulary: the words; the ids follow those of SPECIAL, in this order.
        chat: with a chat template, and then a text gets no start and no end of its own, as the template
            writes them. Otherwise every text is put between the start and the end symbol.

    Returns:
        One that pads on the right, and that save_pretrained writes as a folder of plain files.

    Raises:
        ValueError: if a word is there twice or has a space, or if transformers is not installed.
    """
    words, times = list(vocabulary), Counter(vocabulary)
    wrong = sorted(word for word in times if word.split() != [word] or times[word] > 1)
    if wrong or set(words) & set(SPECIAL):
        listed = ", ".join(repr(word) for word in wrong or sorted(set(words) & set(SPECIAL)))
        raise ValueError(
            f"A vocabulary has each word once, without spaces and without the symbols {' '.join(SPECIAL)}; "
            f"it has {listed}."
        )
    transformers, tokenizers = needed("transformers"), needed("tokenizers")
    ids = {word: number for number, word in enumerate([*SPECIAL, *words])}
    plain: Any = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token=UNK))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    if not chat:
        plain.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{BOS} $A {EOS}", special_tokens=[(BOS, ids[BOS]), (EOS, ids[EOS])]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        additional_special_tokens=[IMAGE, USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
        padding_side="right",
        model_input_names=["input_ids", "attention_mask"],
        chat_template=TEMPLATE if chat else None,
    )
