from __future__ import annotations

import platform

import pytest

from dflash_serve.vllm_ext.openmp import SPIN, intel_openmp, preload_intel_openmp

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="Intel's OpenMP is for x86")


def test_the_cpu_extra_brings_the_library() -> None:
    library = intel_openmp()
    assert library is not None
    assert library.name == "libiomp5.so"


def test_it_goes_before_what_is_preloaded() -> None:
    environment = {"LD_PRELOAD": "/usr/lib/libtcmalloc.so"}
    library = preload_intel_openmp(environment)
    assert environment.pop("LD_PRELOAD") == f"{library}:/usr/lib/libtcmalloc.so"
    assert environment == SPIN


def test_one_that_is_there_stays() -> None:
    environment = {"LD_PRELOAD": "/opt/intel/libiomp5.so"}
    assert preload_intel_openmp(environment) is None
    assert environment == {"LD_PRELOAD": "/opt/intel/libiomp5.so"}
