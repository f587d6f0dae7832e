from __future__ import annotations

import pytest

from deployments.app import check
from deployments.up import last_words
from dflash_serve.settings import SettingsError

BARE = {"profile": "gemma4-31b-b300"}


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.7.7", None])
def test_an_open_server_without_keys_is_refused(host: str | None) -> None:
    with pytest.raises(SettingsError, match=r"auth: no API keys, and http_options\.host is .*auth\.keys_env"):
        check(BARE, http_host=host)


def test_an_open_server_with_keys_or_on_purpose_is_not() -> None:
    assert check(BARE | {"auth": {"keys_env": "KEYS"}}, http_host="0.0.0.0").profile == "gemma4-31b-b300"
    assert check(BARE | {"auth": {"anonymous": "anywhere"}}, http_host="0.0.0.0").settings.auth.anonymous == "anywhere"
    assert check(BARE, http_host="127.0.0.1").settings.auth.anonymous == "loopback"


def test_a_router_that_ray_tells_too_little_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"routing\.policy: prefix_aware does not work.*leave it out"):
        check(BARE | {"routing": {"policy": "prefix_aware"}}, http_host="127.0.0.1")


def test_last_words_are_the_cause_not_the_traceback() -> None:
    message = (
        "Deploying app 'dflash' failed with exception:\n"
        "Traceback (most recent call last):\n"
        '  File "a.py", line 1, in f\n'
        "    g()\n"
        "dflash_serve.settings.parse.SettingsError: engine.max_modl_len: vLLM has no such argument\n"
        "limits: too low\n"
    )
    assert last_words(message) == "engine.max_modl_len: vLLM has no such argument\nlimits: too low"
    assert last_words("no traceback here") == "no traceback here"
