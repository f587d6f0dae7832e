"""One block, drafted the plain way: the contract of `drafter` spelled out, with nothing shared, packed or compiled.

Read this to see what DFlash computes; tests hold the training code and vLLM to it.
"""

import torch
from torch import Tensor

from dflash_serve.training.drafter import DFlashDrafter


def draft_block(drafter: DFlashDrafter, embedding: Tensor, head: Tensor, features: Tensor, bonus_token: int) -> Tensor:
    """Logits [block_size - 1, vocab] of the draft slots after a context.

    Args:
        embedding, head: [vocab, hidden], the target's.
        features: [P, hidden * len(target_layer_ids)], the target's joined hidden states of all P context tokens.
        bonus_token: the target's token at position P, which has no features yet.
    """
    config, weights = drafter.config, {name: tensor.detach().double() for name, tensor in drafter.state_dict().items()}
    context_length, d = len(features), config.head_dim

    def norm(x: Tensor, name: str) -> Tensor:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + config.rms_norm_eps) * weights[name]

    def turn(x: Tensor, position: int) -> Tensor:
        """Rotary embedding of one head vector [d]: pairs (i, i + d/2) turn by position / theta^(2i/d)."""
        half = torch.arange(d // 2, dtype=torch.float64)
        angle = position / config.rope_theta ** (2 * half / d)
        first, second = x[: d // 2], x[d // 2 :]
        return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()])

    context = norm(features.double() @ weights["fc.weight"].T, "hidden_norm.weight")
    tokens = [bonus_token] + [config.mask_token_id] * (config.block_size - 1)
    x = embedding.double()[tokens]
    for i in range(config.num_layers):
        name = f"layers.{i}."
        inputs = norm(x, name + "input_layernorm.weight")
        query = (inputs @ weights[name + "self_attn.q_proj.weight"].T).view(len(tokens), config.num_heads, d)
        sources = torch.cat([context, inputs])  # the context has no input_layernorm
        key = (sources @ weights[name + "self_attn.k_proj.weight"].T).view(len(sources), config.num_kv_heads, d)
        value = (sources @ weights[name + "self_attn.v_proj.weight"].T).view(len(sources), config.num_kv_heads, d)
        query, key = norm(query, name + "self_attn.q_norm.weight"), norm(key, name + "self_attn.k_norm.weight")
        heads = []
        for h in range(config.num_heads):
            kv = h // (config.num_heads // config.num_kv_heads)
            queries = torch.stack([turn(query[s, h], context_length + s) for s in range(len(tokens))])
            keys = torch.stack([turn(key[s, kv], s) for s in range(len(sources))])
            heads.append(torch.softmax(queries @ keys.T / d**0.5, dim=-1) @ value[:, kv])
        x = x + torch.cat(heads, dim=-1) @ weights[name + "self_attn.o_proj.weight"].T
        inputs = norm(x, name + "post_attention_layernorm.weight")
        gate = inputs @ weights[name + "mlp.gate_proj.weight"].T
        up = inputs @ weights[name + "mlp.up_proj.weight"].T
        x = x + (gate * torch.sigmoid(gate) * up) @ weights[name + "mlp.down_proj.weight"].T
    return norm(x, "norm.weight")[1:] @ head.double().T
