"""The bundled target as it is served: the real package, converted."""

from pathlib import Path
from typing import Any

import pytest

from dflash_serve import demo

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def folder() -> Path:
    return demo.ensure_target()


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_it_answers(folder: Path, tokenizer: Any) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=32, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


@pytest.mark.parametrize(
    "text",
    [
        "12345 3.14 2024-11-05",
        "def f(x):\n\treturn x**2  # ok\n\n\n    y = [1, 2]\r\n",
        "naïve café, “quotes”, 東京, Привет, مرحبا, 🙂👩‍👩‍👧",
        "<|im_start|>user\nhi<|im_end|>\n",
        "  both ends   ",
    ],
)
def test_text_survives_the_tokenizer(tokenizer: Any, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    pieces = tokenizer.convert_ids_to_tokens(ids)
    assert all(len(piece) == 1 for piece in pieces if any(letter.isascii() and letter.isdigit() for letter in piece))


def test_special_tokens_are_one_id_each(tokenizer: Any) -> None:
    ids = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True)["input_ids"]
    assert [ids.count(tokenizer.convert_tokens_to_ids(token)) for token in ("<|im_start|>", "<|im_end|>")] == [3, 2]
    assert tokenizer.decode(ids, skip_special_tokens=True).endswith("What is the capital of France?\nassistant\n")
