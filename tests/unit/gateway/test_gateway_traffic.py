"""Traffic classes: bounded whatever a client says."""

from __future__ import annotations

import hashlib

import pytest

from dflash_serve.gateway import TrafficClasses
from dflash_serve.gateway.traffic import trace_id
from tests.unit.gateway.gateway_client import HELLO, serve


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


async def test_a_header_names_one_of_the_listed_classes() -> None:
    served = serve(traffic=TrafficClasses(("chat", "batch")))
    for asked in ("chat", " batch ", "Chat", "x" * 5000, "other", "chat\xff"):
        await served(json_body=HELLO, headers={"x-dflash-traffic-class": asked})
    await served(json_body=HELLO)
    assert [record.traffic_class for record in served.records] == ["chat", "batch", *["other"] * 5]


async def test_without_classes_no_header_counts() -> None:
    served = serve()
    await served(json_body=HELLO, headers={"x-dflash-traffic-class": "chat"})
    assert served.record.traffic_class == "other"


async def test_a_key_decides_before_the_header() -> None:
    served = serve(
        keys=["sk-batch", "sk-any"],
        traffic=TrafficClasses(("chat", "batch"), "x-class", {digest("sk-batch"): "batch"}),
    )
    for key in ("sk-batch", "sk-any"):
        await served(json_body=HELLO, headers={"authorization": f"Bearer {key}", "x-class": "chat"})
    await served(json_body=HELLO, headers={"x-api-key": "sk-batch"})
    assert [record.traffic_class for record in served.records] == ["batch", "chat", "batch"]


def test_a_key_of_an_unknown_class_is_refused() -> None:
    with pytest.raises(ValueError, match=r"traffic_class_keys: 'batch' is not in traffic_classes \(chat\)"):
        TrafficClasses(("chat",), by_key_digest={digest("sk"): "batch"})


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "0af7651916cd43dd8448eb211c80319c"),
        (b"00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01", None),
        (b"rubbish", None),
        (b"", None),
    ],
)
def test_the_trace_id_is_the_w3c_one(header: bytes, expected: str | None) -> None:
    assert trace_id({b"traceparent": header}) == expected
