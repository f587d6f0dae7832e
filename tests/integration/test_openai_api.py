"""The served API, through the openai client, over the real engine."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

from benchmarks.local_server import MODEL, Server, metrics_discovery
from dflash_serve import metrics
from tests.integration.conftest import API_KEYS

pytestmark = pytest.mark.integration

QUESTION: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
COUNT: list[Any] = [{"role": "user", "content": "Count from 1 to 30, separated by commas."}]


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return server.client(API_KEYS[0])


def test_it_answers_soon_after_it_was_started(
    server: Server, client: openai.OpenAI, record_property: Callable[[str, object], None]
) -> None:
    # the target is 60 s on two cores that do nothing else, which a test machine cannot promise
    record_property("`dflash-serve up` to the first healthy answer, seconds", round(server.start_seconds, 1))
    assert server.start_seconds < 120
    assert client.models.list().data


def test_chat_says_what_was_accepted(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL, messages=COUNT, temperature=0, max_completion_tokens=60
    )
    answer = raw.parse()
    assert answer.choices[0].message.content
    assert answer.usage is not None
    details = answer.usage.completion_tokens_details
    assert details is not None
    assert details.accepted_prediction_tokens is not None
    assert details.accepted_prediction_tokens > 0
    assert details.rejected_prediction_tokens is not None
    assert float(raw.headers["x-dflash-acceptance-length"]) > 1.2
    assert raw.headers["x-request-id"]
    assert "," not in raw.headers["x-request-id"], "once, not twice"


def test_the_target_is_in_its_right_mind(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_tokens=20)
    assert "Paris" in (answer.choices[0].message.content or "")


def test_sampled_answers_come_from_the_target_too(client: openai.OpenAI) -> None:
    def answer(seed: int) -> str:
        options: dict[str, Any] = {"temperature": 0.1, "seed": seed, "max_tokens": 20}
        return (
            client.chat.completions.create(model=MODEL, messages=QUESTION, **options).choices[0].message.content or ""
        )

    answers = [answer(seed) for seed in range(8)]
    # 25 of 32 answers said it; what vLLM sampled without the mend did not once
    assert sum("Paris" in text for text in answers) >= 2, answers


def test_streams_give_the_same_text_and_the_usage_asked_for(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=COUNT, temperature=0, max_tokens=50)
    chunks = list(
        client.chat.completions.create(
            model=MODEL,
            messages=COUNT,
            temperature=0,
            max_tokens=50,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.completion_tokens_details is not None
    assert usage.completion_tokens_details.accepted_prediction_tokens
    assert len(chunks) < usage.completion_tokens, "several tokens come with one verification"


def test_usage_says_what_the_prefix_cache_gave(client: openai.OpenAI) -> None:
    question = [{"role": "user", "content": "Which of these are animals? " + "dog, chair, cat, table, " * 80}]

    def cached() -> int:
        usage = client.chat.completions.create(model=MODEL, messages=question, max_tokens=2).usage  # type: ignore[arg-type]
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        return usage.prompt_tokens_details.cached_tokens or 0

    first, again = cached(), cached()
    assert first < 32 < again


def test_streams_without_usage_stay_without(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=5, stream=True))
    assert all(chunk.usage is None for chunk in chunks)
    assert all(chunk.choices for chunk in chunks)


def test_completions_responses_and_models(client: openai.OpenAI) -> None:
    completion = client.completions.create(model=MODEL, prompt="1, 2, 3, 4,", temperature=0, max_tokens=12)
    assert "5" in completion.choices[0].text
    response = client.responses.create(model=MODEL, input="Say hello.", max_output_tokens=20, temperature=0)
    assert response.output_text
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def test_both_keys_open_and_x_api_key_too(server: Server) -> None:
    for headers in ({"authorization": f"Bearer {API_KEYS[1]}"}, {"x-api-key": API_KEYS[0]}):
        assert httpx.get(f"{server.url}/v1/models", headers=headers).status_code == 200


async def test_concurrent_requests(server: Server) -> None:
    client = server.async_client(API_KEYS[0])
    prompts = [f"Write the number {i} and then the next five numbers." for i in range(8)]
    answers = await asyncio.gather(
        *(
            client.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": prompt}], temperature=0, max_tokens=24
            )
            for prompt in prompts
        )
    )
    assert len({answer.id for answer in answers}) == 8
    assert all(answer.choices[0].message.content for answer in answers)


async def test_too_many_at_once_get_429_in_openais_shape(server: Server) -> None:
    client = server.async_client(API_KEYS[0])

    async def ask() -> int:
        try:
            await client.chat.completions.create(model=MODEL, messages=COUNT, max_tokens=60)
        except openai.RateLimitError as error:
            assert isinstance(error.body, dict)
            assert error.body["message"]
            assert int(error.response.headers["retry-after"]) >= 1
            return 429
        return 200

    statuses = await asyncio.gather(*(ask() for _ in range(24)))
    assert statuses.count(200) >= 12
    assert statuses.count(429) >= 1
    assert set(statuses) == {200, 429}


def exported(server: Server, metric: metrics.Metric, label: str = "") -> float:
    """A metric's sum over what Ray exports, every 10 s, with `label` among the labels; 0 when there is none."""
    groups = json.loads(metrics_discovery(server).read_text())
    texts = [httpx.get(f"http://{target}/metrics").text for group in groups for target in group["targets"]]
    lines = [line for text in texts for line in text.splitlines() if line.startswith(f"{metric.exported_name}{{")]
    return sum(float(line.rpartition(" ")[2]) for line in lines if label in line)


def test_a_disconnect_frees_the_engine(server: Server, record_property: Callable[[str, object], None]) -> None:
    left_before = exported(server, metrics.REQUESTS, 'outcome="disconnected"')
    made_before = exported(server, metrics.VLLM_GENERATION_TOKENS)
    headers = {"authorization": f"Bearer {API_KEYS[0]}"}
    body = {"model": MODEL, "messages": COUNT, "max_tokens": 256, "stream": True, "ignore_eos": True}
    streams = 12  # as many as may run at once: were they not freed, the next request would get 429
    for _ in range(streams):
        with httpx.stream(
            "POST", f"{server.url}/v1/chat/completions", json=body, headers=headers, timeout=60
        ) as stream:
            next(stream.iter_lines())
    deadline = time.monotonic() + 15
    while True:
        answer = httpx.post(
            f"{server.url}/v1/chat/completions",
            json={"model": MODEL, "messages": QUESTION, "max_tokens": 4},
            headers=headers,
            timeout=60,
        )
        if answer.status_code == 200 or time.monotonic() > deadline:
            break
        time.sleep(0.5)
    assert answer.status_code == 200, answer.text
    # the engine, not only the gateway's count: it runs nothing, and made a small part of what was asked for
    deadline = time.monotonic() + 30
    while exported(server, metrics.REQUESTS, 'outcome="disconnected"') < left_before + streams:
        assert time.monotonic() < deadline, "Ray exported no disconnects"
        time.sleep(0.5)
    deadline = time.monotonic() + 12
    while exported(server, metrics.RUNNING_REQUESTS) > 0:
        assert time.monotonic() < deadline, "the engine goes on with what nobody reads"
        time.sleep(0.5)
    made = exported(server, metrics.VLLM_GENERATION_TOKENS) - made_before
    record_property("12 streams of 256 tokens left at once: tokens made", int(made))
    assert made < streams * 256 / 2


def test_a_wrong_key(server: Server) -> None:
    with pytest.raises(openai.AuthenticationError) as caught:
        server.client("wrong").models.list()
    assert caught.value.code == "invalid_api_key"
    assert httpx.get(f"{server.url}/health").status_code == 200


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        (b"{not json", 400, None, None),
        (b"[1]", 400, None, None),
        ({"model": "gpt-none", "messages": QUESTION}, 404, "model_not_found", "model"),
        (
            {"model": MODEL, "messages": [{"role": "user", "content": "word " * 3000}]},
            400,
            "context_length_exceeded",
            "messages",
        ),
        ({"model": MODEL, "messages": QUESTION, "max_tokens": 100_000}, 400, None, "max_tokens"),
        ({"model": MODEL, "messages": QUESTION, "n": 1000}, 400, None, "n"),
        ({"model": MODEL, "messages": QUESTION, "temperature": "hot"}, 400, None, "temperature"),
        ({"model": MODEL}, 400, None, "messages"),
        (b"x" * 200_000, 413, None, None),
    ],
)
def test_bad_requests_get_openais_errors(
    server: Server, body: Any, status: int, code: str | None, param: str | None
) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = httpx.post(
        f"{server.url}/v1/chat/completions",
        content=content,
        headers={"authorization": f"Bearer {API_KEYS[0]}", "content-type": "application/json"},
        timeout=60,
    )
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error.keys() >= {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    if code is not None:
        assert error["code"] == code
    if param is not None and status != 404 and code is None:
        assert error["param"] == param
    assert "Traceback" not in answer.text


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/invocations"),
        ("POST", "/scale_elastic_ep"),
        ("GET", "/docs"),
        ("GET", "/metrics"),
        ("GET", "/openapi.json"),
    ],
)
def test_other_routes_are_closed(server: Server, method: str, path: str) -> None:
    answer = httpx.request(method, server.url + path, headers={"x-api-key": API_KEYS[0]})
    assert answer.status_code == 404
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_the_log_has_a_line_a_request_and_no_secret(server: Server, client: openai.OpenAI) -> None:
    from benchmarks.local_server import replica_logs

    client.chat.completions.create(
        model=MODEL, messages=QUESTION, max_tokens=4, extra_headers={"x-request-id": "find-me-123"}
    )
    deadline = time.monotonic() + 10
    lines: list[str] = []
    while not lines and time.monotonic() < deadline:
        lines = [line for line in replica_logs(server) if '"request_id": "find-me-123"' in line]
        time.sleep(0.2)
    record = json.loads(re.sub(r"^[^{]*", "", lines[0]))
    assert record["status"] == 200
    assert record["route"] == "/v1/chat/completions"
    assert record["completion_tokens"] >= 1
    everything = "\n".join(replica_logs(server))
    assert not any(key in everything for key in API_KEYS)
    assert "capital of France" not in everything
