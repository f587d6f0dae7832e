"""What vLLM runs in each of its processes at start (entry point group `vllm.general_plugins`)."""

from __future__ import annotations

import logging

logger = logging.getLogger("vllm.dflash_serve")

DRAFTER_ARCHITECTURE = "DFlashDraftModel"
DRAFTER = "dflash_serve.vllm_ext.drafter:DFlashDrafter"


def register() -> None:
    """Have our drafter class, which extends vLLM's, few KV cache groups, a quick manager of them, and right sampling on
    CPUs."""
    from vllm.model_executor.models import ModelRegistry

    from dflash_serve.vllm_ext import kv_groups

    kv_groups.install()
    try:
        from dflash_serve.vllm_ext import allocation
    except ImportError as error:
        logger.warning("KV cache: vLLM's own manager stays (%s)", error)
    else:
        allocation.install()
    _mend_cpu_sampling()
    module, _, name = DRAFTER.partition(":")
    extended = ("vllm.model_executor.models.qwen3_dflash", "DFlashQwen3ForCausalLM")
    entry = ModelRegistry.models.get(DRAFTER_ARCHITECTURE)
    registered = (getattr(entry, "module_name", None), getattr(entry, "class_name", None))
    if registered == extended:
        ModelRegistry.register_model(DRAFTER_ARCHITECTURE, DRAFTER)
    elif registered != (module, name):
        logger.warning(
            "DFlash drafter: %s is %s here, not %s which dflash-serve extends; dflash-serve stands aside",
            DRAFTER_ARCHITECTURE,
            registered,
            extended,
        )


def _mend_cpu_sampling() -> None:
    from vllm.platforms import current_platform

    from dflash_serve.vllm_ext import cpu_sampling

    if not current_platform.is_cpu():
        return
    try:
        cpu_sampling.install()
    except (ImportError, AttributeError) as error:
        logger.warning("sampling with drafts on CPU is vLLM's own (%s)", error)
