"""vLLM's own KV cache manager, whatever the plugin did in this process."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def vllms_own_kv_cache_manager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take ours out, which another test may have put in; a test that puts it in leaves nothing behind."""
    from vllm.v1.core.kv_cache_manager import KVCacheManager

    own = KVCacheManager.__init__
    monkeypatch.setattr(KVCacheManager, "__init__", getattr(own, "__wrapped__", own))
