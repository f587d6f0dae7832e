"""The bundled pair on a GPU, through the same application. Skipped without one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import yaml

from benchmarks.local_server import MODEL, ROOT, Server, replica_logs, serving
from dflash_serve.bench.servers import family

pytestmark = [
    pytest.mark.integration,
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.fixture(scope="module")
def gpu_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    args = yaml.safe_load((ROOT / "benchmarks" / "settings" / "smollm2-gpu.yaml").read_text())
    with serving(tmp_path_factory.mktemp("gpu"), args) as running:
        yield running


def test_the_model_runs_in_the_engines_process(gpu_server: Server) -> None:
    lines = [line for line in replica_logs(gpu_server) if "Using executor class" in line]
    assert lines
    assert all("UniProcExecutor" in line for line in lines)
    commands = [" ".join(process.cmdline()) for process in family(gpu_server.process.pid)]
    assert any("EngineCore" in command for command in commands)
    assert not any("RayWorker" in command for command in commands)


def test_dflash_drafts_well_on_a_gpu(gpu_server: Server) -> None:
    with gpu_server.client() as client:
        answer = client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "Natalia had 48 clips and sold half of them. How many are left?"}],
            temperature=0,
            max_tokens=128,
        )
    assert answer.choices[0].message.content
    assert answer.usage is not None
    details = answer.usage.completion_tokens_details
    assert details is not None
    assert details.accepted_prediction_tokens is not None
    assert details.rejected_prediction_tokens is not None
    verifications = (details.accepted_prediction_tokens + details.rejected_prediction_tokens) / 7
    acceptance_length = 1 + details.accepted_prediction_tokens / verifications
    print(f"ready after {gpu_server.start_seconds:.0f} s; acceptance length {acceptance_length:.2f} at K=7")
    # a drafter that reads the wrong hidden states comes to 1.2 or less
    assert acceptance_length > 2
