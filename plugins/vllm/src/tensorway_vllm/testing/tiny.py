"""A model with random weights, of a few hundred thousand numbers: a folder that vLLM loads, made in a second.

`python -m tensorway_vllm.testing.tiny FOLDER` makes one with words. May import torch and safetensors. Weights are
scaled so that attention is peaked, and what is said depends on the KV.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Final

LAYERS, HIDDEN, HEADS, KV_HEADS, WIDTH, WORDS = 4, 128, 4, 2, 32, 2048


def make(folder: Path, kind: str = "llama", seed: int = 0) -> Path:
    """In float32, without a tokenizer. `llama`, or `gemma2`, of which every other layer sees a window only."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = _weights(kind, torch.Generator().manual_seed(seed))
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**_COMMON, **_OF_KIND[kind]}), encoding="utf-8")
    return folder


def add_words(folder: Path) -> Path:
    """A tokenizer beside the weights, for text and chat: token 17 is the word `t17`, and a chat is its words."""
    words = {word: number for number, word in enumerate((*_SPECIAL, *(f"t{n}" for n in range(len(_SPECIAL), WORDS))))}
    kept = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [{"id": words[word], "content": word, **kept} for word in _SPECIAL],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"},
        **dict.fromkeys(("truncation", "padding", "normalizer", "post_processor", "decoder")),
    }
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{name}_token": word for name, word in zip(("pad", "bos", "eos", "unk"), _SPECIAL, strict=True)},
        "model_max_length": _COMMON["max_position_embeddings"],
        "chat_template": "{% for message in messages %}{{ message['content'] }} {% endfor %}",
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(about), encoding="utf-8")
    return folder


def _weights(kind: str, numbers: Any) -> dict[str, Any]:
    import torch

    def random(rows: int, columns: int, scale: float) -> Any:
        return torch.randn(rows, columns, generator=numbers) * scale

    usual, inner = HIDDEN**-0.5, 2 * HIDDEN
    # A gemma adds one to what a norm multiplies by, and says words with what it reads them with.
    one = torch.zeros(HIDDEN) if kind == "gemma2" else torch.ones(HIDDEN)
    tensors = {"model.embed_tokens.weight": random(WORDS, HIDDEN, usual if kind == "gemma2" else 1.0)}
    tensors["model.norm.weight"] = one.clone()
    if kind != "gemma2":
        tensors["lm_head.weight"] = random(WORDS, HIDDEN, usual)
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        for norm in _NORMS[kind]:
            tensors[f"{at}.{norm}_layernorm.weight"] = one.clone()
        for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            tensors[f"{at}.self_attn.{name}_proj.weight"] = random(heads * WIDTH, HIDDEN, 1.5 * usual)
        tensors[f"{at}.self_attn.o_proj.weight"] = random(HIDDEN, HEADS * WIDTH, 1.5 * usual)
        tensors[f"{at}.mlp.gate_proj.weight"] = random(inner, HIDDEN, usual)
        tensors[f"{at}.mlp.up_proj.weight"] = random(inner, HIDDEN, usual)
        tensors[f"{at}.mlp.down_proj.weight"] = random(HIDDEN, inner, inner**-0.5)
    return tensors


_SPECIAL: Final = ("<pad>", "<s>", "</s>", "<unk>")
_NORMS: Final = {
    "llama": ("input", "post_attention"),
    "gemma2": ("input", "post_attention", "pre_feedforward", "post_feedforward"),
}
_COMMON: Final = {
    "hidden_size": HIDDEN,
    "intermediate_size": 2 * HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": WIDTH,
    "vocab_size": WORDS,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_OF_KIND: Final[dict[str, dict[str, Any]]] = {
    "llama": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "mlp_bias": False,
    },
    "gemma2": {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": WIDTH,
        "sliding_window": 64,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "tie_word_embeddings": True,
    },
}

if __name__ == "__main__":
    add_words(make(Path(sys.argv[1])))
