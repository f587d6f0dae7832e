import logging
import os
import pickle
import socket
from pathlib import Path

import pytest
from gateway_client import CHAT, HELLO, LOCAL, REMOTE, serve

from dflash_serve.gateway import ApiKeys, load_api_keys
from dflash_serve.gateway.peers import is_local_origin, is_local_peer, local_addresses

KEYS = ("sk-first", "sk-second")


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer sk-first"},
        {"authorization": "bearer  sk-second "},
        {"x-api-key": "sk-second"},
        {"authorization": "Bearer wrong", "x-api-key": "sk-first"},
    ],
)
async def test_a_key_opens(headers: dict[str, str]) -> None:
    assert (await serve(keys=KEYS)(json_body=HELLO, headers=headers, client=REMOTE)).status == 200


async def test_the_first_of_two_headers_counts_as_in_the_app() -> None:
    served = serve(keys=KEYS)
    right, wrong = ("authorization", "Bearer sk-first"), ("authorization", "Bearer wrong")
    assert (await served(json_body=HELLO, headers=[right, wrong])).status == 200
    assert (await served(json_body=HELLO, headers=[wrong, right])).status == 401


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer sk-firs"},
        {"authorization": "Bearer sk-first1"},
        {"authorization": "Bearer"},
        {"authorization": "Bearer "},
        {"authorization": "Basic sk-first"},
        {"authorization": "sk-first"},
        {"authorization": "Bearer sk-first,sk-second"},
        {"authorization": "Bearer \xff"},
        {"x-api-key": ""},
    ],
)
async def test_no_key_or_a_wrong_one_does_not(headers: dict[str, str]) -> None:
    served = serve(keys=KEYS)
    reply = await served(json_body=HELLO, headers=headers)  # from this machine, which does not help
    assert (reply.status, reply.headers["www-authenticate"]) == (401, "Bearer")
    assert reply.error["type"] == "invalid_request_error"
    assert reply.error["code"] == "invalid_api_key"
    assert reply.error["param"] is None
    assert served.inner.requests == []
    assert served.record.outcome == "rejected"


async def test_only_health_is_open_without_a_key() -> None:
    served = serve(keys=KEYS)
    assert (await served("GET", "/health", client=REMOTE)).status == 200
    assert (await served("GET", "/v1/models")).status == 401
    assert (await served("GET", "/v1/models/demo")).status == 401


async def test_an_anthropic_client_is_refused_in_its_own_words() -> None:
    reply = await serve(keys=KEYS)(path="/v1/messages", json_body=HELLO)
    assert reply.status == 401
    assert reply.json()["type"] == "error"
    assert reply.error["type"] == "authentication_error"


async def test_keys_do_not_leak(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    served = serve(keys=KEYS)
    await served(json_body=HELLO, headers={"authorization": "Bearer sk-first"})
    await served(json_body=HELLO, headers={"authorization": "Bearer sk-wrong"})
    said = (
        caplog.text + repr(served.records) + repr(served.gateway._config) + repr(vars(served.gateway._config.api_keys))
    )
    assert "sk-" not in said
    assert b"sk-" not in pickle.dumps(served.gateway._config)


def test_keys_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DFLASH_TEST_KEYS", " a, b\nc ,,\n")
    keys = load_api_keys("DFLASH_TEST_KEYS", None)
    assert keys is not None
    assert len(keys) == 3
    assert all(map(keys.accepts, [b"a", b"b", b"c"]))
    assert not keys.accepts(b"")


def test_no_source_means_no_keys() -> None:
    assert load_api_keys(None, None) is None


def test_a_named_source_without_keys_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DFLASH_TEST_KEYS", " , ")
    for variable in ("DFLASH_TEST_KEYS", "DFLASH_TEST_UNSET"):
        with pytest.raises(ValueError, match=f"environment variable {variable}: set it"):
            load_api_keys(variable, None)
    empty = tmp_path / "keys"
    empty.write_text("# none yet\n\n")
    with pytest.raises(ValueError, match="it has no keys"):
        load_api_keys(None, empty)
    with pytest.raises(ValueError, match="missing: No such file"):
        load_api_keys(None, tmp_path / "missing")
    with pytest.raises(ValueError, match="give at least one"):
        ApiKeys()


def rewrite(file: Path, text: str) -> None:
    new = file.with_suffix(".new")
    new.write_text(text)
    os.replace(new, file)


def test_keys_rotate_with_their_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("dflash_serve.gateway.auth.RELOAD_INTERVAL_SECONDS", 0.0)
    monkeypatch.setenv("DFLASH_TEST_KEYS", "fixed")
    file = tmp_path / "keys"
    file.write_text("# of team A\nold\n")
    keys = load_api_keys("DFLASH_TEST_KEYS", file)
    assert keys is not None
    assert keys.accepts(b"old")
    assert not keys.accepts(b"# of team A")

    rewrite(file, "new\n")
    assert keys.accepts(b"new")
    assert not keys.accepts(b"old")
    assert keys.accepts(b"fixed")

    rewrite(file, "\n")  # a mistake: locks nobody out
    assert keys.accepts(b"new")
    file.unlink()
    assert keys.accepts(b"new")
    assert caplog.text.count("API keys stay as they were") == 2

    file.write_text("newest\n")
    assert keys.accepts(b"newest")
    assert not keys.accepts(b"new")


def test_a_key_file_is_not_looked_at_for_every_request(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("old\n")
    keys = ApiKeys(file=file)
    assert keys.accepts(b"old")
    rewrite(file, "new\n")
    assert keys.accepts(b"old")  # within the second


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.8.8.8", "::1", "[::1]", "[::1]:80", "127.0.0.1:80", "::ffff:127.0.0.1", "10.1.2.3"]
)
def test_local(host: str) -> None:
    assert is_local_peer(host, {"10.1.2.3", "fe80::1"})


@pytest.mark.parametrize(
    "host", [None, "", "unknown", "localhost", "10.1.2.4", "::ffff:10.1.2.4", "fe80::2%eth0", "127.0.0.1.evil.example"]
)
def test_not_local(host: str | None) -> None:
    assert not is_local_peer(host, {"10.1.2.3", "fe80::1"})


def test_zones_do_not_matter() -> None:
    assert is_local_peer("fe80::1%eth0", {"fe80::1"})


def test_this_machine_knows_its_addresses() -> None:
    assert "127.0.0.1" in local_addresses()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
    assert all(is_local_peer(address, ()) for address in local_addresses() if address.startswith("127."))


@pytest.mark.parametrize(
    ("client", "headers", "status"),
    [
        (LOCAL, {}, 200),
        (("::1", 1), {}, 200),
        (REMOTE, {}, 401),
        (None, {}, 401),
        (LOCAL, {"x-forwarded-for": "127.0.0.1, ::1"}, 200),
        (LOCAL, {"x-forwarded-for": "203.0.113.7"}, 401),
        (LOCAL, {"x-forwarded-for": "127.0.0.1, 203.0.113.7"}, 401),
        (LOCAL, {"x-forwarded-for": "unknown"}, 401),
        (LOCAL, {"x-real-ip": "203.0.113.7"}, 401),
        (LOCAL, {"forwarded": 'for=127.0.0.1;proto=http, for="[2001:db8::1]:4711"'}, 401),
        (LOCAL, {"forwarded": "for=127.0.0.1;proto=http"}, 200),
        (LOCAL, {"forwarded": "for=_hidden"}, 401),
        (REMOTE, {"x-forwarded-for": "127.0.0.1"}, 401),
    ],
)
async def test_without_keys_this_machine_is_served(
    client: tuple[str, int] | None, headers: dict[str, str], status: int
) -> None:
    served = serve()
    reply = await served(json_body=HELLO, client=client, headers=headers)
    assert reply.status == status
    if status == 401:
        for mend in ("auth.keys_env", "auth.keys_file", "auth.anonymous: anywhere"):
            assert mend in reply.error["message"]
        assert served.inner.requests == []


async def test_without_keys_probes_from_anywhere_pass() -> None:
    assert (await serve()("GET", "/health", client=REMOTE)).status == 200


async def test_anywhere_is_anywhere() -> None:
    served = serve(anonymous="anywhere")
    headers = {"origin": "https://chat.example", "x-forwarded-for": "203.0.113.7"}
    assert (await served(json_body=HELLO, client=REMOTE, headers=headers)).status == 200


@pytest.mark.parametrize(
    ("origin", "local"),
    [
        ("http://localhost:3000", True),
        ("http://app.localhost", True),
        ("http://127.0.0.1:8080", True),
        ("http://[::1]:8080", True),
        ("https://evil.example", False),
        ("http://localhost.evil.example", False),
        ("null", False),
        ("", False),
        ("http://[::1", False),
    ],
)
async def test_without_keys_a_web_page_from_elsewhere_is_refused(origin: str, local: bool) -> None:
    assert is_local_origin(origin, ()) is local
    served = serve()
    reply = await served(json_body=HELLO, headers={"origin": origin})
    assert reply.status == (200 if local else 403)
    asks = {"origin": origin, "access-control-request-method": "POST"}
    assert (await served("OPTIONS", CHAT, headers=asks)).status == (200 if local else 403)
