"""A model with random weights, of a few hundred thousand numbers: a folder that vLLM loads, made in a second.

May import torch and safetensors. Weights are scaled so that attention is peaked, and what is said depends on the KV.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LAYERS, HIDDEN, HEADS, KV_HEADS, WIDTH, WORDS = 4, 128, 4, 2, 32, 2048


def make(folder: Path, seed: int = 0) -> Path:
    """A llama in float32, without a tokenizer."""
    import torch
    from safetensors.torch import save_file

    numbers = torch.Generator().manual_seed(seed)

    def random(rows: int, columns: int, scale: float) -> Any:
        return torch.randn(rows, columns, generator=numbers) * scale

    usual, inner = HIDDEN**-0.5, 2 * HIDDEN
    tensors = {
        "model.embed_tokens.weight": random(WORDS, HIDDEN, 1.0),
        "lm_head.weight": random(WORDS, HIDDEN, usual),
        "model.norm.weight": torch.ones(HIDDEN),
    }
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{at}.{norm}.weight"] = torch.ones(HIDDEN)
        for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            tensors[f"{at}.self_attn.{name}_proj.weight"] = random(heads * WIDTH, HIDDEN, 1.5 * usual)
        tensors[f"{at}.self_attn.o_proj.weight"] = random(HIDDEN, HEADS * WIDTH, 1.5 * usual)
        tensors[f"{at}.mlp.gate_proj.weight"] = random(inner, HIDDEN, usual)
        tensors[f"{at}.mlp.up_proj.weight"] = random(inner, HIDDEN, usual)
        tensors[f"{at}.mlp.down_proj.weight"] = random(HIDDEN, inner, inner**-0.5)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": inner,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": WIDTH,
        "vocab_size": WORDS,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": "float32",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
