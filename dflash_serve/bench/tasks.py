"""Prompts: the five tasks of the model card, a bundled sample, random words, or a JSONL file of one's own.

A conversation is a list of user turns; MT-Bench's have two. Templates and data sets are those that the DFlash authors
use (github.com/z-lab/dflash, dflash/benchmark.py).
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Conversation = list[str]

SAMPLE = "sample"
SAMPLE_FILE = Path(__file__).parent / "prompts.jsonl"
RANDOM = "random"
SHUFFLE_SEED = 42
WORDS = (
    *("river", "stone", "window", "garden", "paper", "market", "winter", "engine", "letter", "mountain", "silver"),
    *("kitchen", "bridge", "shadow", "music", "harbour", "forest", "candle", "basket", "copper", "village", "thunder"),
)


class TaskError(ValueError):
    """A task that is unknown, or whose prompts cannot be read."""


@dataclass(frozen=True)
class HubTask:
    """A data set on the Hugging Face hub and what a row of it becomes."""

    dataset: str
    config: str
    split: str
    conversation: Callable[[Mapping[str, Any]], Conversation]


def _boxed(problem: str) -> Conversation:
    return [f"{problem}\nPlease reason step by step, and put your final answer within \\boxed{{}}."]


HUB_TASKS = {
    "math500": HubTask("HuggingFaceH4/MATH-500", "default", "test", lambda row: _boxed(row["problem"])),
    "gsm8k": HubTask("openai/gsm8k", "main", "test", lambda row: _boxed(row["question"])),
    "humaneval": HubTask(
        "openai/openai_humaneval",
        "openai_humaneval",
        "test",
        lambda row: [
            "Write a solution to the following problem and make sure that it passes the tests:\n"
            f"```python\n{row['prompt']}\n```"
        ],
    ),
    "mbpp": HubTask("google-research-datasets/mbpp", "sanitized", "test", lambda row: [row["prompt"]]),
    "mt_bench": HubTask("HuggingFaceH4/mt_bench_prompts", "default", "train", lambda row: list(row["prompt"])),
}


def load(names: Iterable[str], *, folder: Path | None, samples: int, words: int) -> dict[str, list[Conversation]]:
    """Task -> at most `samples` conversations, the same in every run.

    Args:
        names: Of HUB_TASKS; `sample` (bundled), `random` (`words` random words), or the path of a JSONL file.
        folder: Holds `<task>.jsonl` for tasks of HUB_TASKS; None takes them from the hub.
        samples: Conversations a task.
        words: Length of a random prompt.

    Raises:
        TaskError: An unknown name, a file that is missing or has a bad line, or a hub out of reach.
    """
    tasks: dict[str, list[Conversation]] = {}
    for name in names:
        if name == SAMPLE:
            tasks[SAMPLE] = _interleaved(read_jsonl(SAMPLE_FILE))[:samples]
        elif name == RANDOM:
            tasks[RANDOM] = random_conversations(samples, words)
        elif name in HUB_TASKS:
            tasks[name] = _some(_read_folder(folder, name) if folder else read_hub(name), samples)
        elif name.endswith(".jsonl"):
            task = Path(name).stem
            if task in tasks or task in HUB_TASKS:
                hint = f", or give its folder by --data and the task {task}" if task in HUB_TASKS else ""
                raise TaskError(f"--tasks: {name} would be called {task}, as another task is; rename it{hint}")
            tasks[task] = read_jsonl(Path(name))[:samples]
        else:
            known = ", ".join([*HUB_TASKS, SAMPLE, RANDOM])
            raise TaskError(f"--tasks: no task {name!r}; there are {known}, and the path of a .jsonl file")
    return tasks


def _read_folder(folder: Path, name: str) -> list[Conversation]:
    path = folder / f"{name}.jsonl"
    if not path.is_file():
        raise TaskError(f"--data: there is no {path}; put it there, or leave --data away to take {name} from the hub")
    return read_jsonl(path)


def read_jsonl(path: Path) -> list[Conversation]:
    """One conversation a line, from its "turns" or "prompt"."""
    try:
        lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    except OSError as error:
        raise TaskError(f"--tasks: {path}: {error.strerror}") from None
    return [_conversation(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def _conversation(line: str, where: str) -> Conversation:
    try:
        item = json.loads(line)
        turns = item["turns"] if "turns" in item else [item["prompt"]]
    except (ValueError, KeyError, TypeError):
        raise TaskError(f'{where}: must be a JSON object with "prompt" or "turns"') from None
    if not (isinstance(turns, list) and turns and all(isinstance(turn, str) for turn in turns)):
        raise TaskError(f'{where}: "turns" must be a list of texts, "prompt" a text')
    return turns


def read_hub(name: str) -> list[Conversation]:
    """A task's prompts from the hub's own Parquet copy, which every public data set has at the same place."""
    import pyarrow.parquet
    from huggingface_hub import hf_hub_download

    task = HUB_TASKS[name]
    try:
        path = hf_hub_download(
            task.dataset,
            f"{task.config}/{task.split}/0000.parquet",
            repo_type="dataset",
            revision="refs/convert/parquet",
        )
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise TaskError(
            f"{name}: cannot take {task.dataset} from the hub ({reason}); give a folder with {name}.jsonl by --data, "
            f"or --tasks {SAMPLE}"
        ) from None
    return [task.conversation(row) for row in pyarrow.parquet.read_table(path).to_pylist()]


def random_conversations(count: int, words: int) -> list[Conversation]:
    """Prompts that share no prefix, so that no cache answers them."""
    numbers = random.Random(SHUFFLE_SEED)
    return [[" ".join(numbers.choice(WORDS) for _ in range(words))] for _ in range(count)]


def _some(conversations: list[Conversation], count: int) -> list[Conversation]:
    """All in their order when they are few, else a fixed choice."""
    if len(conversations) <= count:
        return conversations
    return random.Random(SHUFFLE_SEED).sample(conversations, count)


def _interleaved(conversations: list[Conversation], kinds: int = 3) -> list[Conversation]:
    """The bundled file holds maths, code and chat in turn blocks; the first few are to be of all kinds."""
    block = len(conversations) // kinds
    return [conversations[start + index] for index in range(block) for start in range(0, block * kinds, block)]
