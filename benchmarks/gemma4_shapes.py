"""Model folders of Gemma-4's shape: the true one without weights, and a tiny one with random weights.

The true shapes are those of google/gemma-4-31B-it's text model and z-lab/gemma-4-31B-it-DFlash.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CONTROL_TOKENS = (
    *("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|think|>"),
    *("<|tool_call>", "<tool_call|>", "<|tool>", "<tool|>", "<|tool_response>", "<tool_response|>", '<|"|>'),
)
"""Gemma-4's, at ids of our own but for the first five."""

CHAT_TEMPLATE = """{{ bos_token }}{% if enable_thinking or tools %}<|turn>system
{% if enable_thinking %}<|think|>{% endif %}{% for tool in tools or [] %}<|tool>declaration:{{ tool.function.name \
}}<tool|>{% endfor %}<turn|>
{% endif %}{% for message in messages %}<|turn>{{ 'model' if message.role == 'assistant' else message.role }}
{{ message.content }}<turn|>
{% endfor %}{% if add_generation_prompt %}<|turn>model
{% endif %}"""
"""As far as a text chat needs it, with and without thinking, and with the names of tools."""


LEARNT_TOKENS = 8192
FIRST_LETTERS, SECOND_LETTERS = range(0x410, 0x430), range(0x430, 0x450)
"""Cyrillic, which no prompt has: words without a meaning are of two pairs, each of one of these and one of those, so
that there is one way to merge them."""
SHORTEST_WORD = 4
ANSWERED = ("<pad>", "<mask>")
"""Control tokens that dummy weights answer with."""


def target_config(*, tiny: bool) -> dict[str, Any]:
    """config.json of the target's text model; every sixth layer has full attention, with keys for values."""
    layers = 12 if tiny else 60
    shape: dict[str, Any] = {
        "vocab_size": 262144,
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "num_global_key_value_heads": 4,
        "head_dim": 256,
        "global_head_dim": 512,
        "sliding_window": 1024,
        "max_position_embeddings": 262144,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    if tiny:
        shape |= {
            "vocab_size": 512,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_global_key_value_heads": 1,
            "head_dim": 32,
            "global_head_dim": 64,
            "sliding_window": 96,
            "max_position_embeddings": 4096,
        }
    return {
        "architectures": ["Gemma4ForCausalLM"],
        "model_type": "gemma4_text",
        **shape,
        "num_hidden_layers": layers,
        "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * (layers // 6),
        "attention_k_eq_v": True,
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "final_logit_softcapping": 30.0,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "enable_moe_block": False,
        "attention_bias": False,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1000000.0, "rope_type": "proportional"},
            "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
        },
        "dtype": "float32" if tiny else "bfloat16",
    }


def drafter_config(*, tiny: bool) -> dict[str, Any]:
    """config.json of the drafter; the tiny one has full layers alone, as vLLM's V1 runner cannot mix them."""
    target = target_config(tiny=tiny)
    layers = 2 if tiny else 5
    return {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "vocab_size": target["vocab_size"],
        "hidden_size": target["hidden_size"],
        "intermediate_size": 192 if tiny else 10752,
        "num_hidden_layers": layers,
        "num_attention_heads": 4 if tiny else 64,
        "num_key_value_heads": 2 if tiny else 8,
        "head_dim": 32 if tiny else 128,
        "hidden_act": "silu",
        "attention_bias": False,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "max_position_embeddings": target["max_position_embeddings"],
        "layer_types": ["full_attention"] * 2 if tiny else ["sliding_attention"] * 4 + ["full_attention"],
        "sliding_window": None if tiny else 2048,
        "use_sliding_window": not tiny,
        "max_window_layers": layers,
        "block_size": 8 if tiny else 16,
        "num_target_layers": target["num_hidden_layers"],
        "final_logit_softcapping": 30.0,
        "tie_word_embeddings": True,
        "dtype": target["dtype"],
        "dflash_config": {"mask_token_id": 4, "target_layer_ids": [0, 5, 9] if tiny else [1, 12, 23, 35, 46, 57]},
    }


def write_pair(folder: Path, *, tiny: bool) -> tuple[Path, Path]:
    """Folders of target and drafter: config.json, a stand-in tokenizer, random weights when tiny."""
    target, drafter = folder / "gemma-4-target", folder / "gemma-4-dflash"
    for path, config in ((target, target_config(tiny=tiny)), (drafter, drafter_config(tiny=tiny))):
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    write_tokenizer(target, None if tiny else target_config(tiny=False)["vocab_size"])
    if tiny:
        _write_random_weights(target, drafter)
    return target, drafter


def write_tokenizer(folder: Path, vocabulary_size: int | None = None) -> None:
    """Bytes, and Gemma-4's control tokens: enough for a chat through its reasoning and tool-call parsers.

    With `vocabulary_size` words too, up to it, two of them in place of <pad> and <mask>: weights that are dummies
    answer with the first id (their logits are all alike), or with what a dummy drafter drafts: <mask>, or any id. An id
    without text gives no event of a stream; one whose text is a word is read as one token when the answer comes back as
    a conversation's history, and does not look like the beginning of a control token, which would keep vLLM's parsers
    busy.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*CONTROL_TOKENS, *letters])}
    merges: list[tuple[str, str]] = []
    if vocabulary_size is not None:
        vocabulary, merges = _with_words(vocabulary, vocabulary_size)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(token, normalized=False) for token in CONTROL_TOKENS if token in vocabulary]
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk") if f"<{name}>" in vocabulary},
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _with_words(tokens: dict[str, int], size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """`tokens` and words after them, `size` in all, and the merges: first such as are in texts that do not change (so
    that prompts take as many tokens from one commit to the next), then words without a meaning, each read as one token
    too."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    from benchmarks.gemma4_gpu import ROOT
    from dflash_serve.bench import tasks

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    texts = [" ".join(tasks.WORDS), *(path.read_text() for path in (tasks.SAMPLE_FILE, ROOT / "LICENSE"))]
    trained.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=LEARNT_TOKENS, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    merges = [(one, other) for one, other in model["merges"]]
    # the first letter stands for a space
    words = (one + other for one, other in merges if one.startswith("\u0120") and len(one + other) > SHORTEST_WORD)
    answered = {token: next(words) for token in ANSWERED}
    vocabulary = {answered.get(token, token): index for token, index in tokens.items()}
    kept = []
    for one, other in itertools.chain(merges, _meaningless()):
        if len(vocabulary) == size:
            break
        vocabulary.setdefault(one + other, len(vocabulary))
        kept.append((one, other))
    assert len(vocabulary) == size
    return vocabulary, kept


def _meaningless() -> Iterator[tuple[str, str]]:
    """Merges, the most of which make a word of a space and four letters; as byte-level tokens."""
    from tokenizers import pre_tokenizers

    def bytes_of(code: int) -> str:
        ((text, _),) = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(chr(code))
        return str(text)

    first, second = ([bytes_of(code) for code in codes] for codes in (FIRST_LETTERS, SECOND_LETTERS))
    yield from ((letter[0], letter[1]) for letter in first + second)
    yield from itertools.product(first, second)
    pairs = [one + other for one, other in itertools.product(first, second)]
    yield from (("\u0120", pair) for pair in pairs)
    yield from (("\u0120" + one, other) for one, other in itertools.product(pairs, pairs))


def _write_random_weights(target: Path, drafter: Path) -> None:
    """So large that context, normaliser and every layer tell in what is drafted."""
    import torch
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    from dflash_serve.training.drafter import DFlashDrafter, DrafterConfig

    torch.manual_seed(0)
    config = json.loads((target / "config.json").read_text())
    model = Gemma4ForCausalLM(Gemma4TextConfig(**config))
    draft = DFlashDrafter(DrafterConfig.from_checkpoint(json.loads((drafter / "config.json").read_text())))
    with torch.no_grad():
        for module in (model, draft):
            for name, parameter in module.named_parameters():
                if parameter.dim() == 1:
                    parameter.uniform_(0.5, 1.5)
                else:
                    parameter.normal_(std=0.03 if "embed" in name else 0.15)
    model.save_pretrained(target)
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    own = (drafter / "config.json").read_text()
    draft.save(drafter)
    (drafter / "config.json").write_text(own)
