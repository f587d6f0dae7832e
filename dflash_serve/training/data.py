"""Prompts, answered prompts (the corpus), and the packing of documents into rows of fixed length."""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

HELD_OUT_FRACTION = 0.02
"""Share of the training prompts that is never trained on, for validation."""

BENCH_TASKS = ("gsm8k", "humaneval", "math500", "mbpp", "mt_bench")


@dataclass(frozen=True)
class Prompt:
    """The user's turns of one conversation, and the task it belongs to."""

    task: str
    turns: tuple[str, ...]


def read_prompts(path: Path) -> list[Prompt]:
    """Read JSONL with "prompt" (one turn) or "turns", and optionally "source" (the task; the file's name otherwise)."""
    if not path.is_file():
        raise FileNotFoundError(f"prompts: {path} does not exist")
    prompts = []
    # not splitlines(): a JSON string may hold a bare U+2028, which that takes for the end of a line
    for number, line in enumerate(path.read_text(encoding="utf-8").rstrip("\n").split("\n"), start=1):
        item = json.loads(line)
        turns = item.get("turns") or ([item["prompt"]] if "prompt" in item else [])
        if not turns:
            raise ValueError(f'prompts: line {number} of {path} has neither "prompt" nor "turns"')
        prompts.append(Prompt(item.get("source", path.stem), tuple(turns)))
    return prompts


def read_bench(folder: Path) -> list[Prompt]:
    """The prompts of the five benchmark tasks, from FOLDER/<task>.jsonl."""
    return [prompt for task in BENCH_TASKS for prompt in read_prompts(folder / f"{task}.jsonl")]


@dataclass(frozen=True)
class Corpus:
    """Documents: a prompt and the target's answer to it, as tokens.

    Attributes:
        tokens: all documents one after the other.
        offsets: [documents + 1], where each document starts in `tokens`.
        prompt_lengths: [documents], tokens of each document before its answer.
        finished: [documents], whether the answer ends with an end-of-sequence token (else it was cut short).
        tasks: [documents], a name for each document's kind.
    """

    tokens: NDArray[np.generic]
    offsets: NDArray[np.int64]
    prompt_lengths: NDArray[np.int64]
    finished: NDArray[np.bool_]
    tasks: NDArray[np.str_]

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.offsets)

    def prompt(self, index: int) -> NDArray[np.generic]:
        start = self.offsets[index]
        return self.tokens[start : start + self.prompt_lengths[index]]

    def answer(self, index: int) -> NDArray[np.generic]:
        return self.tokens[self.offsets[index] + self.prompt_lengths[index] : self.offsets[index + 1]]

    def save(self, path: Path) -> None:
        """Write a compressed .npz, whole or not at all."""
        part = path.with_suffix(".part")
        with part.open("wb") as file:
            np.savez_compressed(
                file,
                tokens=self.tokens,
                offsets=self.offsets,
                prompt_lengths=self.prompt_lengths.astype(np.uint16),
                finished=self.finished,
                tasks=self.tasks,
            )
        os.replace(part, path)

    @classmethod
    def load(cls, path: Path) -> "Corpus":
        if not path.is_file():
            raise FileNotFoundError(f"answers: {path} does not exist; make it with the `generate` command")
        with np.load(path) as data:
            return cls(
                data["tokens"],
                data["offsets"],
                data["prompt_lengths"].astype(np.int64),
                data["finished"],
                data["tasks"],
            )

    @classmethod
    def build(
        cls,
        prompts: Sequence[Sequence[int]],
        answers: Sequence[Sequence[int] | NDArray[np.int64]],
        finished: Sequence[bool],
        tasks: Sequence[str],
        vocab_size: int,
    ) -> "Corpus":
        documents = [np.concatenate([np.asarray(p), np.asarray(a)]) for p, a in zip(prompts, answers, strict=True)]
        return cls(
            tokens=np.concatenate(documents).astype(np.uint16 if vocab_size <= 2**16 else np.uint32),
            offsets=np.cumsum([0, *map(len, documents)]).astype(np.int64),
            prompt_lengths=np.array([len(p) for p in prompts], dtype=np.int64),
            finished=np.array(finished, dtype=bool),
            tasks=np.array(tasks, dtype=np.str_),
        )


def split_held_out(num_documents: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(training, held-out) document indices; the same split for the same seed and number."""
    order = np.random.default_rng(seed).permutation(num_documents)
    num_held_out = max(1, round(num_documents * HELD_OUT_FRACTION))
    return np.sort(order[num_held_out:]), np.sort(order[:num_held_out])


@dataclass(frozen=True)
class Rows:
    """Documents packed into rows of equal length; all arrays are [rows, length].

    Attributes:
        tokens: token ids, 0 where a row is padded.
        document_start: index in the row of the first token of each token's document.
        document_end: index in the row after the last token of each token's document.
        is_answer: whether the token belongs to an answer.
        document: which document of the corpus the token comes from, -1 where padded.
    """

    tokens: NDArray[np.int32]
    document_start: NDArray[np.int32]
    document_end: NDArray[np.int32]
    is_answer: NDArray[np.bool_]
    document: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.tokens)


def pack_rows(corpus: Corpus, documents: Iterable[int], row_length: int, multiple_of: int = 1) -> Rows:
    """Pack whole documents, in the order given, into rows. A document longer than a row is cut.

    The number of rows is padded to `multiple_of` with empty rows. Padding forms a document of its own with no answer.
    """
    chosen = np.fromiter(documents, dtype=np.int64)
    lengths = np.minimum(corpus.lengths[chosen], row_length)
    starts = np.empty(len(chosen), dtype=np.int64)
    used = 0
    for i, length in enumerate(lengths.tolist()):
        if used % row_length + length > row_length:
            used += row_length - used % row_length
        starts[i] = used
        used += length
    num_rows = -(-max(used, 1) // row_length)
    num_rows += -num_rows % multiple_of

    size = num_rows * row_length
    # Where each packed token goes and comes from: document base + place in the document.
    place = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    to = np.repeat(starts, lengths) + place
    tokens = np.zeros(size, dtype=np.int32)
    tokens[to] = corpus.tokens[np.repeat(corpus.offsets[chosen], lengths) + place]
    document = np.full(size, -1, dtype=np.int32)
    document[to] = np.repeat(chosen, lengths)
    is_answer = np.zeros(size, dtype=bool)
    is_answer[to] = place >= np.repeat(corpus.prompt_lengths[chosen], lengths)

    column = np.tile(np.arange(row_length, dtype=np.int32), num_rows)
    row_start = np.arange(size) - column
    boundary = np.ones(size, dtype=bool)
    boundary[1:] = (document[1:] != document[:-1]) | (column[1:] == 0)
    document_start = np.maximum.accumulate(np.where(boundary, np.arange(size), 0)) - row_start
    begins = np.flatnonzero(boundary)
    ends = np.append(begins[1:], size)
    document_end = np.repeat(ends, ends - begins) - row_start

    shape = (num_rows, row_length)
    return Rows(
        tokens=tokens.reshape(shape),
        document_start=document_start.astype(np.int32).reshape(shape),
        document_end=document_end.astype(np.int32).reshape(shape),
        is_answer=is_answer.reshape(shape),
        document=document.reshape(shape),
    )
