"""Models of mlx-lm with random weights: the attention of the real ones, little else."""

from __future__ import annotations

import importlib

import mlx.core as mx
from mlx.utils import tree_map_with_path

VOCABULARY = 128
WINDOW = 24
_COMMON = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "vocab_size": VOCABULARY,
    "num_hidden_layers": 4,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 1024,
}
_EXPERTS = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
_LATENT = {
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    **_EXPERTS,
}
_LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 2,
}
_WIDE = {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256}
# Name of the module: what its arguments are beyond those of all.
_MODELS = {
    "llama": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64},
    "phi3": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "gemma2": _WIDE | {"query_pre_attn_scalar": 200, "attn_logit_softcapping": 5.0},
    "gemma3_text": _WIDE | {"sliding_window": WINDOW, "sliding_window_pattern": 2},
    "gemma4_text": _WIDE
    | {
        "num_key_value_heads": 2,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "global_head_dim": 512,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": VOCABULARY,
        "rope_parameters": {
            "full_attention": {
                "partial_rotary_factor": 0.25,
                "rope_theta": 1000000.0,
                "rope_type": "proportional",
            },
            "sliding_attention": {
                "partial_rotary_factor": 1.0,
                "rope_theta": 10000.0,
                "rope_type": "default",
            },
        },
    },
    "qwen3_5": _WIDE | _LINEAR,
    "qwen3_next": _WIDE
    | _LINEAR
    | _EXPERTS
    | {
        "num_experts": 4,
        "decoder_sparse_step": 1,
        "shared_expert_intermediate_size": 32,
        "mlp_only_layers": [],
        "partial_rotary_factor": 0.25,
    },
    "deepseek_v3": _LATENT | {"qk_nope_head_dim": 128, "v_head_dim": 128},
    "glm4_moe_lite": _LATENT | {"qk_nope_head_dim": 192, "v_head_dim": 256},
    "gpt_oss": {
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "sliding_window": WINDOW,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
        },
    },
    "mimo_v2_flash": {
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "head_dim": 192,
        "v_head_dim": 128,
        "swa_head_dim": 192,
        "swa_v_head_dim": 128,
        "partial_rotary_factor": 0.5,
        "swa_rope_theta": 10000.0,
        "layernorm_epsilon": 1e-6,
        "sliding_window_size": WINDOW,
        "hybrid_layer_pattern": [1, 0, 1, 0],
        "moe_layer_freq": [0, 1, 1, 1],
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "n_shared_experts": None,
        "n_routed_experts": 4,
        "routed_scaling_factor": 1.0,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "n_group": 1,
        "topk_group": 1,
        **_EXPERTS,
    },
    "llama4": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "attention_bias": False,
        "attention_chunk_size": WINDOW,
        "interleave_moe_layer_step": 2,
        "intermediate_size_mlp": 96,
        "num_experts_per_tok": 1,
        "num_local_experts": 4,
        "rope_scaling": None,
        "use_qk_norm": True,
    },
}
NAMES = tuple(_MODELS)


def tiny_model(name: str, dtype: mx.Dtype = mx.float32, seed: int = 0):
    """The same weights every time."""
    module = importlib.import_module(f"mlx_lm.models.{name}")
    arguments = {"model_type": name, **_COMMON, **_MODELS[name]}
    if name == "llama4":
        arguments = {"model_type": name, "text_config": arguments}
    mx.random.seed(seed)
    model = module.Model(module.ModelArgs.from_dict(arguments))

    def spread(path: str, weight: mx.array) -> mx.array:
        # Random initialisation leaves scores near 0, where every mask looks alike.
        if path.endswith(("sinks", "attention_sink_bias")):
            weight = mx.random.normal(weight.shape)
        elif weight.ndim > 1 and "norm" not in path and "conv" not in path:
            weight = 3 * weight
        return weight.astype(dtype) if mx.issubdtype(weight.dtype, mx.floating) else weight

    model.update(tree_map_with_path(spread, model.parameters()))
    mx.eval(model.parameters())
    return model
