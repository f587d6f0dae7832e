"""What the scheduler needs of the settings, on its way through vLLM's `additional_config`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dflash_serve.speculation.controller import EXPLORATION, default_choices
from dflash_serve.speculation.step_cost import StepCosts, generic

KEY = "dflash_serve"


@dataclass(frozen=True)
class AdaptiveConfig:
    """The K to choose from, what steps cost to begin with, and the share of time that trials may lose."""

    choices: tuple[int, ...]
    costs: StepCosts
    exploration: float = EXPLORATION

    def to_additional(self) -> dict[str, Any]:
        """Plain values for `additional_config`."""
        return {
            KEY: {
                "draft_token_choices": list(self.choices),
                "step_costs": self.costs.to_json(),
                "exploration": self.exploration,
            }
        }

    @classmethod
    def from_additional(cls, additional_config: Any, max_draft_tokens: int) -> AdaptiveConfig:
        """What `to_additional` gave; defaults for whatever is missing.

        Raises ValueError when a choice is more than the engine can draft.
        """
        values = additional_config.get(KEY, {}) if isinstance(additional_config, Mapping) else {}
        choices = tuple(values.get("draft_token_choices") or default_choices(max_draft_tokens))
        if choices[-1] > max_draft_tokens:
            raise ValueError(
                f"draft_token_choices: {choices[-1]} is more than num_speculative_tokens={max_draft_tokens}"
            )
        costs = values.get("step_costs")
        return cls(
            choices,
            StepCosts.from_json(costs) if costs else generic(),
            float(values.get("exploration", EXPLORATION)),
        )


def batch_size_schedule(choices: Sequence[int], max_requests: int) -> list[list[int]]:
    """vLLM's `num_speculative_tokens_per_batch_size` that names every choice.

    The V2 runner captures CUDA graphs for the numbers in it alone (vllm/v1/worker/gpu/cudagraph_utils.py), and vLLM
    widens the captured sizes by how many requests each may have. Long drafts are for few requests and short ones for
    many. With fewer requests than choices, the longest are named.
    """
    falling = sorted(choices, reverse=True)[:max_requests]
    edges = [round(max_requests ** ((index + 1) / len(falling))) for index in range(len(falling))]
    schedule: list[list[int]] = []
    start = 1
    for index, count in enumerate(falling):
        left = len(falling) - index - 1
        end = min(max(edges[index], start), max_requests - left)
        schedule.append([start, end, count])
        start = end + 1
    schedule[-1][1] = max_requests
    return schedule
