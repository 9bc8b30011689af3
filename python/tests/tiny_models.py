"""Models of transformers with random weights: the attention of the real ones, little else."""

from __future__ import annotations

import os

import pytest
import torch
import transformers

VOCABULARY = 128
_COMMON = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {
    "moe_intermediate_size": 32,
    "num_experts_per_tok": 2,
}
_LATENT = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 64,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    **_EXPERTS,
}
# Name: configuration class, its attention, and how many layers.
_MODELS = {
    "llama": ("LlamaConfig", {"num_attention_heads": 4, "num_key_value_heads": 2}),
    "gemma2": (
        "Gemma2Config",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 256,
            "query_pre_attn_scalar": 200,
            "attn_logit_softcapping": 5.0,
            "sliding_window": 24,
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "sliding_window": 24,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
    ),
    "gemma4": (
        "Gemma4TextConfig",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "head_dim": 256,
            "global_head_dim": 512,
            "sliding_window": 24,
            "num_kv_shared_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": VOCABULARY,
        },
    ),
    "qwen3_next": (
        "Qwen3NextConfig",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "num_experts": 4,
            "shared_expert_intermediate_size": 32,
            **_EXPERTS,
        },
    ),
    "qwen3_5": (
        "Qwen3_5TextConfig",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 256,
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
        },
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "qk_nope_head_dim": 128,
            "v_head_dim": 128,
            **_LATENT,
        },
    ),
    "glm4_moe_lite": (
        "Glm4MoeLiteConfig",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "qk_nope_head_dim": 192,
            "v_head_dim": 256,
            **_LATENT,
        },
    ),
    "gpt_oss": (
        "GptOssConfig",
        {
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "sliding_window": 24,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "mimo_v2_flash": (
        "MiMoV2FlashConfig",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 192,
            "v_head_dim": 128,
            "sliding_window": 24,
            "n_routed_experts": 4,
            **_EXPERTS,
        },
    ),
}
NAMES = tuple(_MODELS)
# Models that do more with a mask than to pass it on, or pass more than others do.
_PARTICULAR = {
    "doge": ("DogeConfig", {"num_attention_heads": 4, "num_key_value_heads": 2}),
    "deepseek_v32": (
        "DeepseekV32Config",
        {
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "qk_nope_head_dim": 32,
            "v_head_dim": 32,
            "index_topk": 8,
            "index_head_dim": 64,
            "index_n_heads": 2,
            **_LATENT,
        },
    ),
    "deepseek_v4": (
        "DeepseekV4Config",
        {
            "num_attention_heads": 4,
            "head_dim": 64,
            "q_lora_rank": 32,
            "o_lora_rank": 32,
            "o_groups": 2,
            "sliding_window": 24,
            "index_topk": 4,
            "index_head_dim": 64,
            "index_n_heads": 2,
            "n_routed_experts": 4,
            **_EXPERTS,
        },
    ),
    "bigbird_pegasus": (
        "BigBirdPegasusConfig",
        {
            "d_model": 64,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 96,
            "decoder_ffn_dim": 96,
        },
    ),
    **{
        name: (
            "MiniMaxM3VLTextConfig",
            {
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 32,
                "rotary_dim": 16,
                "num_local_experts": 4,
                "num_experts_per_tok": 2,
                "dense_intermediate_size": 96,
                "shared_intermediate_size": 96,
                "index_n_heads": 2,
                "index_head_dim": 32,
                "index_block_size": 4,
                "index_topk_blocks": 2,
                "layer_types": [kind] * 4,
            },
        )
        for name, kind in (
            ("minimax_m3", "full_attention"), ("minimax_m3_sparse", "minimax_m3_sparse")
        )
    },
    "inkling2": ("Inkling2TextConfig", {"num_attention_heads": 4, "num_key_value_heads": 2}),
}


def tiny_model(name: str) -> torch.nn.Module:
    """In float32, the same weights every time."""
    # Threads wait for each other longer than they work on products as small as these.
    torch.set_num_threads(1)
    config_name, attention = (_MODELS | _PARTICULAR)[name]
    config_class = getattr(transformers, config_name, None)
    if config_class is None:
        is_required = "transformers" in os.environ.get("WIDEHEAD_TEST_REQUIRE", "")
        end = pytest.fail if is_required else pytest.skip
        end(f"transformers {transformers.__version__} has no {config_name}")
    config = config_class(**_COMMON, num_hidden_layers=4, **attention)
    torch.manual_seed(0)
    # Its grouped products of experts know no float64.
    config._experts_implementation = "eager"
    is_pair = config.is_encoder_decoder
    maker = transformers.AutoModelForSeq2SeqLM if is_pair else transformers.AutoModelForCausalLM
    model = maker.from_config(config).eval()
    # Random initialisation leaves scores near 0, where every mask looks alike: spread them.
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "norm" not in parameter_name:
                parameter.mul_(4.0)
            if parameter_name.endswith("sinks"):
                parameter.normal_()
    return model
