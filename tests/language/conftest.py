"""What the tests of models that answer share: small backbones, recipes and a language model in a folder."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dinokit.data.talks import MARK, Talk, Turn
from dinokit.language.model import build_model
from dinokit.language.recipe import Config, Language, Run, View
from dinokit.models import build

tokenizers, transformers = (pytest.importorskip(name) for name in ("tokenizers", "transformers"))

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
RAW = {"name": "raw_patches", "size": 32, "patch": 8, "cell": 4}
TINY = Language(width=32, depth=2, heads=2, hidden=48)


def backbone(**keys):
    """A vit of two blocks, whose every value is random."""
    torch.manual_seed(1)
    vit = build({"name": "vit", "size": 32, "width": 32, "depth": 2, "heads": 2, "patch": 8, **keys}).eval()
    with torch.no_grad():
        for parameter in vit.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return vit


def answerer(net=None, language=TINY, **view):
    """A model at its start."""
    cfg = Config(view=View(**view), language=language, run=Run(seed=3))
    return build_model(cfg, net if net is not None else build(RAW))


def picture(seed=0, height=32, width=32):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def talk(*texts, images=1, key="a talk"):
    """Turns by turns of user and assistant; the first has the marks of the images."""
    first = " ".join([MARK] * images + [texts[0]])
    roles = ("user", "assistant")
    turns = tuple(Turn(roles[n % 2], text) for n, text in enumerate([first, *texts[1:]]))
    return Talk(key, tuple(picture(n) for n in range(images)), turns)


def language_folder(path: Path) -> Path:
    """A Qwen2 of two layers with a fast tokenizer of bytes and the template ChatML."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    symbols = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    plain = tokenizers.Tokenizer(tokenizers.models.BPE({c: n for n, c in enumerate(alphabet)}, []))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<|endoftext|>", eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"], chat_template=CHATML,
    )  # fmt: skip
    assert set(symbols) <= set(tokenizer.get_vocab())
    torch.manual_seed(2)
    config = transformers.Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True, initializer_range=0.1,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    transformers.Qwen2ForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def answering():
    """The functions above."""
    return SimpleNamespace(
        RAW=RAW, TINY=TINY, backbone=backbone, answerer=answerer, picture=picture, talk=talk,
        language_folder=language_folder,
    )  # fmt: skip
