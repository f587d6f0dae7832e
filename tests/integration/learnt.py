"""A tiny Gemma-4-shaped target that has learnt some conversations by heart, so that a real engine writes what Gemma-4
would: thinking, tool calls and their control tokens."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, Gemma4ForCausalLM, Gemma4TextConfig

ENOUGH = 0.01
"""Mean cross-entropy of an answer's token: its chance is 0.99."""
MAX_STEPS = 300


@dataclass(frozen=True)
class Conversation:
    """What is asked, and what the model answers: words and control tokens, in order."""

    question: str
    answer: list[str]
    thinking: bool = False
    tools: list[dict[str, Any]] = field(default_factory=list)

    @property
    def messages(self) -> list[dict[str, str]]:
        return [{"role": "user", "content": self.question}]


def teach(target: Path, conversations: list[Conversation]) -> None:
    """Replace the weights in `target` (see `benchmarks.gemma4_shapes`) by some that give these answers, greedily.

    Raises AssertionError when they are not learnt.
    """
    torch.manual_seed(0)
    # for tensors this small a second thread only waits
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    tokenizer: Any = AutoTokenizer.from_pretrained(target)
    # a token each, so that there is little to learn; the control tokens are there
    frame = [f"{role}\n" for role in ("system", "user", "model")]
    tokenizer.add_tokens([*frame, *(word for c in conversations for word in (c.question, *c.answer))])
    tokenizer.save_pretrained(target)
    config = json.loads((target / "config.json").read_text())
    turn_end = tokenizer.convert_tokens_to_ids("<turn|>")
    rows = []
    for conversation in conversations:
        prompt = tokenizer.apply_chat_template(
            conversation.messages,
            tools=conversation.tools or None,
            enable_thinking=conversation.thinking,
            add_generation_prompt=True,
            return_dict=False,
        )
        answer = [*tokenizer.encode("".join(conversation.answer), add_special_tokens=False), turn_end]
        assert len(answer) == len(conversation.answer) + 1
        rows.append((prompt + answer, [-100] * len(prompt) + answer))
    longest = max(len(tokens) for tokens, _ in rows)
    # padded on the right, which causal attention does not see
    tokens = torch.tensor([tokens + [0] * (longest - len(tokens)) for tokens, _ in rows])
    labels = torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in rows])
    model: Any = Gemma4ForCausalLM(Gemma4TextConfig(**config))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    loss = float("inf")
    for _ in range(MAX_STEPS):
        out = model(tokens, labels=labels)
        loss = out.loss.item()
        if loss < ENOUGH:
            break
        optimizer.zero_grad()
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    torch.set_num_threads(threads)
    assert loss < ENOUGH, f"not learnt in {MAX_STEPS} steps: {loss}"
    model.save_pretrained(target)
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    # as Gemma-4's: an answer ends with the turn
    (target / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, turn_end]}) + "\n")
