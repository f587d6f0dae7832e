"""`dflash-serve bench run --url` against the session's server, and what `bench overhead` tells vLLM."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path

import pytest
import yaml

from benchmarks.local_server import Server
from dflash_serve.bench.report import Report
from dflash_serve.bench.servers import COMMAND, vllm_config
from dflash_serve.settings import Cluster, resolve
from dflash_serve.settings.translate import engine_kwargs
from tests.integration.conftest import API_KEYS

pytestmark = pytest.mark.integration


def test_a_served_pair_is_measured_with_its_acceptance(server: Server, tmp_path: Path) -> None:
    conversations = tmp_path / "mine.jsonl"
    conversations.write_text(
        '{"prompt": "Count from 1 to 30, separated by commas."}\n'
        '{"turns": ["Write the numbers from 5 to 20.", "Now backwards."]}\n'
    )
    result = subprocess.run(
        [
            *(*COMMAND, "bench", "run", "--url", f"{server.url}/v1", "--api-key-env", "KEY"),
            *("--tasks", str(conversations), "--samples", "2", "--concurrency", "1,2", "--max-tokens", "40"),
            *("--ignore-eos", "--out", str(tmp_path / "out")),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={"PATH": "", "KEY": API_KEYS[0], "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    report = Report.read(tmp_path / "out.json")
    for row, sample, concurrency in zip(report.rows, report.samples, (1, 2), strict=True):
        assert (row.task, row.concurrency, row.requests, row.failed) == ("mine", concurrency, 3, 0)
        assert row.completion_tokens == 120
        assert row.acceptance_source == "responses"
        assert row.acceptance_length is not None
        assert row.acceptance_length > 1.5
        assert len(row.acceptance_by_position) == 5
        assert sum(row.acceptance_by_position) == pytest.approx(row.acceptance_length - 1)
        assert row.gap_ms is not None
        assert row.tpot_ms is not None
        # how long apart they are read is the machine's matter; how many there are is not
        events = sample.gaps.count + row.requests
        assert row.requests < events < row.completion_tokens / 1.5, "an event carries several tokens"


def test_vllm_reads_the_settings_of_our_replica_from_its_file(tmp_path: Path) -> None:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    settings = resolve({"profile": "smollm2-cpu"}, Cluster(cpus=2, gpus={})).settings
    path = tmp_path / "vllm.yaml"
    path.write_text(yaml.safe_dump(vllm_config(settings, 1234)))
    read = vars(make_arg_parser(FlexibleArgumentParser()).parse_args(["--config", str(path)]))
    wanted = engine_kwargs(settings)
    speculative = wanted.pop("speculative_config")
    assert wanted.items() <= read.items()
    assert read["speculative_config"]["num_speculative_tokens"] == speculative["num_speculative_tokens"]
    assert Path(read["speculative_config"]["model"]).is_dir()
    assert read["port"] == 1234
    assert importlib.util.find_spec("vllm.entrypoints.openai.api_server") is not None
