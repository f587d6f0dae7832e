"""vLLM's DFlash drafter, mended where vLLM computes something else than DFlash.

Registered by `plugin` in the place of vLLM's. Where nothing is to be mended it is vLLM's.
"""

from __future__ import annotations

import logging

from vllm.config import VllmConfig
from vllm.model_executor.models.qwen3_dflash import DFlashQwen3ForCausalLM, DFlashQwen3Model
from vllm.platforms import current_platform

from dflash_serve.gemma import conventions
from dflash_serve.vllm_ext.cpu_drafter import CpuDFlashModel, grouped_rms_norm_works
from dflash_serve.vllm_ext.gemma_drafter import CpuGemmaDFlashModel, GemmaDFlashModel

logger = logging.getLogger("vllm.dflash_serve")


class DFlashDrafter(DFlashQwen3ForCausalLM):
    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        target = vllm_config.model_config.hf_text_config
        gemma = conventions(target.model_type, target.hidden_size, getattr(target, "final_logit_softcapping", None))
        cpu = current_platform.is_cpu() and not grouped_rms_norm_works()
        self.model_cls = model_class(gemma=gemma is not None, cpu=cpu)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        if cpu:
            logger.info("DFlash drafter: context keys are normalised by dflash-serve on CPU")
        if gemma is None:
            return
        if self.logits_processor.soft_cap is None:
            self.logits_processor.soft_cap = gemma.logit_cap
        else:
            logger.info("DFlash drafter: vLLM caps Gemma's logits itself; dflash-serve stands aside")
        logger.info(
            "DFlash drafter for %s: embeddings times %g, logits capped at %s",
            target.model_type,
            self.model.get_buffer("normalizer").item(),
            self.logits_processor.soft_cap,
        )


def model_class(*, gemma: bool, cpu: bool) -> type[DFlashQwen3Model]:
    """vLLM's model under the mends that are needed."""
    if gemma:
        return CpuGemmaDFlashModel if cpu else GemmaDFlashModel
    return CpuDFlashModel if cpu else DFlashQwen3Model
