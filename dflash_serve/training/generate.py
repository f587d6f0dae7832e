"""Answers by the target itself: batched greedy decoding with a preallocated KV cache.

Decoding is bound by reading the cache, so: prompts of like length share a batch, attention reads the cache only up to
its present length, the query heads of a KV head are read as query positions (the cache is never repeated), and
finished sequences are dropped from the batch on the way.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dflash_serve.training.data import Corpus, Prompt
from dflash_serve.training.target import Attend, Target, decoder_layer, rotary_tables

LENGTH_STEP = 64
"""The part of the cache that attention reads grows in steps of this many tokens."""

PREFILL_TOKENS = 131_072
"""Prompt tokens in one forward pass of the prefill."""

SYNC_STEPS = 16
"""Decode steps between two looks at how many sequences are done (each waits for the device)."""

COMPACT_BELOW = 0.85
"""Finished sequences leave the batch when fewer than this share of it is still running."""


@dataclass(frozen=True)
class Answers:
    """tokens: one array a prompt, end-of-sequence token included; finished: whether that token came."""

    tokens: list[NDArray[np.int64]]
    finished: list[bool]


@dataclass
class DecodeTimes:
    """Where the time of `greedy` went; `steps` counts decode steps of all batches."""

    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    steps: int = 0
    tokens: int = 0


class CachePool:
    """One flat buffer, taken once; each batch views it as [layers, 2, B, kv_heads, T, head_dim].

    It starts as zeros: columns that the mask hides are multiplied by zero, which old values survive and NaN would not.
    """

    def __init__(self, target: Target, capacity_tokens: int) -> None:
        config = target.config
        self.token_elements = config.num_kv_heads * config.head_dim
        self.head_shape = (config.num_kv_heads, config.head_dim)
        self.capacity_tokens = capacity_tokens
        shape = (config.num_layers, 2, capacity_tokens * self.token_elements)
        self.buffer = torch.zeros(shape, device=target.device, dtype=target.dtype)

    def view(self, batch: int, length: int) -> Tensor:
        kv_heads, head_dim = self.head_shape
        layers = self.buffer.shape[0]
        return self.buffer[:, :, : batch * length * self.token_elements].view(
            layers, 2, batch, kv_heads, length, head_dim
        )


def default_capacity_tokens(target: Target) -> int:
    """Cache tokens that fill half of the free device memory (on a CPU: 65,536)."""
    if target.device.type != "cuda":
        return 65_536
    torch.cuda.empty_cache()  # an earlier pool may still be held by the allocator
    config = target.config
    token_bytes = 2 * config.num_layers * config.num_kv_heads * config.head_dim * target.dtype.itemsize
    return torch.cuda.mem_get_info(target.device)[0] // 2 // token_bytes


def greedy(
    target: Target,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    end_tokens: Sequence[int],
    pool: CachePool,
    batch_size: int,
    stop_fraction: float = 1.0,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[Answers, DecodeTimes]:
    """Greedy answers to tokenised prompts.

    Args:
        stop_fraction: end a batch when this share of it has finished; the rest keep what they have, unfinished.
        progress: called with the number of prompts answered so far.
    """
    longest = max(map(len, prompts)) + max_new_tokens
    if longest > target.config.max_positions:
        raise ValueError(
            f"prompts: the longest needs {longest} positions, the target has {target.config.max_positions}"
        )
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    tokens: list[NDArray[np.int64]] = [np.empty(0, dtype=np.int64)] * len(prompts)
    finished = [False] * len(prompts)
    times = DecodeTimes()
    position = 0
    while position < len(order):
        # Left padding to a multiple of 16 keeps the masks aligned for the memory-efficient attention kernel.
        prompt_columns = _round_up(len(prompts[order[position]]), 16)
        columns = _round_up(prompt_columns + max_new_tokens, LENGTH_STEP)
        batch = min(batch_size, pool.capacity_tokens // columns, len(order) - position)
        if batch == 0:
            raise ValueError(f"cache: {pool.capacity_tokens} tokens cannot hold one sequence of {columns}")
        chosen = order[position : position + batch]
        out = _decode_batch(
            target,
            [prompts[i] for i in chosen],
            prompt_columns,
            columns,
            max_new_tokens,
            end_tokens,
            pool,
            stop_fraction,
            times,
        )
        for i, row in zip(chosen, out, strict=True):
            ends = np.flatnonzero(np.isin(row, end_tokens))
            finished[i] = len(ends) > 0
            tokens[i] = row[: ends[0] + 1] if finished[i] else row[row >= 0]
            times.tokens += len(tokens[i])
        position += batch
        progress(position)
    return Answers(tokens, finished), times


@torch.inference_mode()
def _decode_batch(
    target: Target,
    prompts: Sequence[Sequence[int]],
    prompt_columns: int,
    columns: int,
    max_new_tokens: int,
    end_tokens: Sequence[int],
    pool: CachePool,
    stop_fraction: float,
    times: DecodeTimes,
) -> NDArray[np.int64]:
    """New tokens [B, max_new_tokens] of one batch, -1 where none was made."""
    device, batch = target.device, len(prompts)
    padded = np.zeros((batch, prompt_columns), dtype=np.int64)
    for row, prompt in zip(padded, prompts, strict=True):
        row[prompt_columns - len(prompt) :] = prompt
    padding = torch.tensor([prompt_columns - len(p) for p in prompts], device=device)
    cache = pool.view(batch, columns)
    ends = torch.tensor(list(end_tokens), device=device)

    started = _now(device)
    with _masked_kernel(device):
        tokens = _prefill(target, torch.from_numpy(padded).to(device), padding, cache)
    times.prefill_seconds += _now(device) - started

    # Additive mask, one row for each query head of a KV head; a column opens when its token is written.
    group = target.config.num_heads // target.config.num_kv_heads
    hidden = torch.arange(columns, device=device) < padding[:, None]
    hidden[:, prompt_columns:] = True
    mask = torch.zeros(batch, 1, group, columns, device=device, dtype=target.dtype)
    mask.masked_fill_(hidden[:, None, None, :], float("-inf"))

    out = torch.full((batch, max_new_tokens), -1, device=device)
    rows = torch.arange(batch, device=device)
    done = torch.zeros(batch, dtype=torch.bool, device=device)
    started = _now(device)
    with _masked_kernel(device):
        for step in range(max_new_tokens):
            out[rows, step] = tokens
            done |= torch.isin(tokens, ends)
            if step + 1 == max_new_tokens:
                break
            if (step + 1) % SYNC_STEPS == 0:
                running = int((~done).sum())
                if running <= (1 - stop_fraction) * batch:
                    break
                if running < COMPACT_BELOW * len(rows):
                    kept = torch.nonzero(~done).squeeze(1)
                    cache = _keep_rows(cache, kept, prompt_columns + step)
                    rows, tokens, padding, mask, done = rows[kept], tokens[kept], padding[kept], mask[kept], done[kept]
            tokens = _decode_step(target, tokens, prompt_columns + step, padding, cache, mask)
            times.steps += 1
    result = out.cpu().numpy()
    times.decode_seconds += _now(device) - started
    return result


def _prefill(target: Target, tokens: Tensor, padding: Tensor, cache: Tensor) -> Tensor:
    """Fill the cache's first columns from left-padded prompts [B, L]; returns the first new token [B]."""
    batch, length = tokens.shape
    config = target.config
    column = torch.arange(length, device=tokens.device)
    causal = column[None, :] <= column[:, None]
    # A padding query sees itself, for a softmax over nothing is NaN.
    itself = torch.eye(length, dtype=torch.bool, device=tokens.device)
    group = config.num_heads // config.num_kv_heads
    first = []

    def filling(part: slice, layer: int, bias: Tensor) -> Attend:
        def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            cache[layer, 0, part, :, :length] = key
            cache[layer, 1, part, :, :length] = value
            key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
            return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)

        return attention

    rows_a_pass = max(1, PREFILL_TOKENS // length)
    for low in range(0, batch, rows_a_pass):
        part = slice(low, min(low + rows_a_pass, batch))
        visible = column[None, None, :] >= padding[part, None, None]
        mask = ((visible & causal) | itself)[:, None]
        bias = torch.zeros(mask.shape, device=tokens.device, dtype=target.dtype).masked_fill_(~mask, float("-inf"))
        positions = (column[None, :] - padding[part, None]).clamp_min(0)
        cos, sin = rotary_tables(positions, config.head_dim, config.rope_theta, target.dtype)
        x = F.embedding(tokens[part], target.embedding)
        for i, weights in enumerate(target.layers):
            x = decoder_layer(x, weights, cos, sin, config, filling(part, i, bias))
        first.append(target.next_tokens(x[:, -1]))
    return torch.cat(first)


def _decode_step(target: Target, tokens: Tensor, column: int, padding: Tensor, cache: Tensor, mask: Tensor) -> Tensor:
    """One token for every sequence: tokens [B] are written at `column` of the cache; returns the next ones [B]."""
    config = target.config
    read = _round_up(column + 1, LENGTH_STEP)
    mask[..., column] = 0
    cos, sin = rotary_tables((column - padding)[:, None], config.head_dim, config.rope_theta, target.dtype)
    x = F.embedding(tokens[:, None], target.embedding)
    batch, kv_heads, group = len(tokens), config.num_kv_heads, config.num_heads // config.num_kv_heads
    bias = mask[..., :read].expand(-1, kv_heads, -1, -1)
    for i, weights in enumerate(target.layers):

        def attention(query: Tensor, key: Tensor, value: Tensor, i: int = i) -> Tensor:
            cache[i, 0, :, :, column] = key[:, :, 0]
            cache[i, 1, :, :, column] = value[:, :, 0]
            grouped = query.reshape(batch, kv_heads, group, config.head_dim)
            attended = F.scaled_dot_product_attention(
                grouped, cache[i, 0, :, :, :read], cache[i, 1, :, :, :read], attn_mask=bias
            )
            return attended.reshape(batch, config.num_heads, 1, config.head_dim)

        x = decoder_layer(x, weights, cos, sin, config, attention)
    return target.next_tokens(x[:, 0])


def _keep_rows(cache: Tensor, kept: Tensor, columns: int) -> Tensor:
    """Move the kept sequences to the front of the cache, layer by layer (`columns` are in use); returns their view."""
    for layer in cache:
        layer[:, : len(kept), :, :columns] = layer[:, kept, :, :columns]
    return cache[:, :, : len(kept)]


def _masked_kernel(device: torch.device) -> AbstractContextManager[Any]:
    """On a GPU: the memory-efficient kernel, which takes a mask and a strided cache as they are, for any length.

    Flash attention refuses masks, the plain one copies the cache, and cuDNN's plans anew for every length.
    """
    return sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION) if device.type == "cuda" else nullcontext()


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


class Chat:
    """The target's tokenizer and chat template."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        if not self.tokenizer.chat_template:
            raise ValueError(f"target: the tokenizer in {folder} has no chat template; training prompts are chats")
        if self.tokenizer.eos_token_id is None:
            raise ValueError(f"target: the tokenizer in {folder} names no eos_token")
        self.end_tokens = [int(self.tokenizer.eos_token_id)]

    def encode(self, conversations: Sequence[list[dict[str, str]]]) -> list[list[int]]:
        """Prompt tokens of conversations, generation prompt included."""
        texts = [
            self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            for messages in conversations
        ]
        encoded: list[list[int]] = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return encoded

    def decode(self, tokens: NDArray[np.int64]) -> str:
        return str(self.tokenizer.decode(tokens.tolist(), skip_special_tokens=True))


def answer_prompts(
    target: Target,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    batch_size: int,
    stop_fraction: float = 1.0,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[Corpus, DecodeTimes]:
    """The target's greedy answers to every turn of every prompt; later turns have the earlier answers as history."""
    chat = Chat(target.folder)
    pool = CachePool(target, default_capacity_tokens(target))
    histories: list[list[dict[str, str]]] = [[] for _ in prompts]
    encoded: list[list[int]] = []
    answers: list[NDArray[np.int64]] = []
    finished: list[bool] = []
    tasks: list[str] = []
    times = DecodeTimes()
    for turn in range(max(len(prompt.turns) for prompt in prompts)):
        asked = [i for i, prompt in enumerate(prompts) if turn < len(prompt.turns)]
        for i in asked:
            histories[i].append({"role": "user", "content": prompts[i].turns[turn]})
        turn_prompts = chat.encode([histories[i] for i in asked])
        answered = len(answers)
        result, turn_times = greedy(
            target,
            turn_prompts,
            max_new_tokens=max_new_tokens,
            end_tokens=chat.end_tokens,
            pool=pool,
            batch_size=batch_size,
            stop_fraction=stop_fraction,
            progress=lambda done, answered=answered: progress(answered + done),  # type: ignore[misc]
        )
        for i, tokens in zip(asked, result.tokens, strict=True):
            histories[i].append({"role": "assistant", "content": chat.decode(tokens)})
        encoded += turn_prompts
        answers += result.tokens
        finished += result.finished
        tasks += [prompts[i].task for i in asked]
        for name in ("prefill_seconds", "decode_seconds", "steps", "tokens"):
            setattr(times, name, getattr(times, name) + getattr(turn_times, name))
    return Corpus.build(encoded, answers, finished, tasks, target.config.vocab_size), times
