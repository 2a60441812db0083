"""Tiny random models of each family in Hugging Face folders, with the transformers models that they must equal."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

SHAPE = {
    "vocab_size": 199,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}

EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3}
NEMOTRON_EXPERTS = {
    "n_routed_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "moe_shared_expert_intermediate_size": 56,
}
LATENT = {
    "num_key_value_heads": 6,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
SLIDING, FULL = "sliding_attention", "full_attention"
LINEAR = "linear_attention"
WINDOW = 24
GRANITE = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.6,
    "logits_scaling": 0.4,
}

# One row for each family, and one more for each form of it that computes something else.
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SHAPE, rms_norm_eps=1e-5),
    "llama3": lambda: transformers.LlamaConfig(
        **SHAPE, rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True, attention_bias=True, mlp_bias=True
    ),
    "mistral": lambda: transformers.MistralConfig(**SHAPE, head_dim=16, sliding_window=WINDOW),
    "qwen2": lambda: transformers.Qwen2Config(**SHAPE, rope_parameters=YARN_ROPE),
    "qwen3": lambda: transformers.Qwen3Config(**SHAPE, head_dim=16, tie_word_embeddings=True),
    # A layer without experts among those that have them.
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **SHAPE, **EXPERTS, head_dim=16, moe_intermediate_size=40, norm_topk_prob=True, mlp_only_layers=[1]
    ),
    "mixtral": lambda: transformers.MixtralConfig(**SHAPE, num_local_experts=5, sliding_window=WINDOW),
    "olmoe": lambda: transformers.OlmoeConfig(**SHAPE, **EXPERTS),
    "internlm2": lambda: transformers.LlamaConfig(**SHAPE),
    "gemma2": lambda: transformers.Gemma2Config(
        **SHAPE,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=WINDOW,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=6.0,
    ),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **SHAPE,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=WINDOW,
        layer_types=[SLIDING, FULL, SLIDING],
        rope_parameters={
            SLIDING: {"rope_type": "default", "rope_theta": 1e4},
            FULL: {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        },
    ),
    # As E2B: embeddings of each layer's own, shared keys and values, and wider networks in the layers that share.
    "gemma4": lambda: transformers.Gemma4TextConfig(
        **SHAPE | {"num_hidden_layers": 5},
        head_dim=16,
        global_head_dim=32,
        sliding_window=WINDOW,
        layer_types=[SLIDING, SLIDING, FULL, SLIDING, FULL],
        num_kv_shared_layers=2,
        use_double_wide_mlp=True,
        hidden_size_per_layer_input=12,
        vocab_size_per_layer_input=199,
        final_logit_softcapping=8.0,
    ),
    # As 31B: keys that are values, and fewer of their heads, where there is no window.
    "gemma4_31b": lambda: transformers.Gemma4TextConfig(
        **SHAPE,
        head_dim=16,
        global_head_dim=32,
        num_global_key_value_heads=1,
        attention_k_eq_v=True,
        sliding_window=WINDOW,
        layer_types=[SLIDING, SLIDING, FULL],
        hidden_size_per_layer_input=0,
        final_logit_softcapping=8.0,
    ),
    # As 26B-A4B: experts beside each feed-forward network.
    "gemma4_moe": lambda: transformers.Gemma4TextConfig(
        **SHAPE,
        head_dim=16,
        global_head_dim=32,
        num_global_key_value_heads=1,
        attention_k_eq_v=True,
        sliding_window=WINDOW,
        layer_types=[SLIDING, SLIDING, FULL],
        hidden_size_per_layer_input=0,
        final_logit_softcapping=8.0,
        enable_moe_block=True,
        num_experts=6,
        top_k_experts=3,
        moe_intermediate_size=40,
    ),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **SHAPE,
        head_dim=16,
        num_local_experts=6,
        num_experts_per_tok=3,
        sliding_window=WINDOW,
        layer_types=[SLIDING, FULL, SLIDING],
        rope_parameters=YARN_ROPE | {"rope_theta": 150000.0, "truncate": False},
    ),
    # A dense layer first; two groups of experts, of which one is open.
    "glm4_moe": lambda: transformers.Glm4MoeConfig(
        **SHAPE,
        head_dim=16,
        moe_intermediate_size=40,
        n_routed_experts=6,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        routed_scaling_factor=1.5,
        use_qk_norm=True,
        attention_bias=True,
        num_nextn_predict_layers=0,
    ),
    "glm4_moe_lite": lambda: transformers.Glm4MoeLiteConfig(
        **SHAPE | LATENT, q_lora_rank=20, n_routed_experts=6, num_experts_per_tok=3, moe_intermediate_size=40
    ),
    # Two of three groups, yarn that scales scores.
    "deepseek_v3": lambda: transformers.DeepseekV3Config(
        **SHAPE | LATENT,
        q_lora_rank=20,
        n_routed_experts=6,
        num_experts_per_tok=2,
        n_group=3,
        topk_group=2,
        moe_intermediate_size=40,
        first_k_dense_replace=1,
        num_nextn_predict_layers=0,
        rope_parameters=YARN_ROPE | {"mscale": 1.0, "mscale_all_dim": 1.0},
    ),
    # As V2-Lite: queries without a latent.
    "deepseek_v2": lambda: transformers.DeepseekV2Config(
        **SHAPE | LATENT,
        q_lora_rank=None,
        n_routed_experts=6,
        num_experts_per_tok=2,
        n_group=3,
        topk_group=2,
        topk_method="group_limited_greedy",
        routed_scaling_factor=2.0,
        moe_intermediate_size=40,
        first_k_dense_replace=1,
    ),
    # The last prompt tokens of the tests lie behind the first 32 positions, from which on queries are scaled.
    "mistral4": lambda: transformers.Mistral4Config(
        **SHAPE | LATENT,
        q_lora_rank=20,
        n_routed_experts=6,
        num_experts_per_tok=3,
        routed_scaling_factor=1.5,
        moe_intermediate_size=40,
        rope_parameters=YARN_ROPE
        | {
            "original_max_position_embeddings": 32,
            "factor": 8.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    ),
    "minimax_m2": lambda: transformers.MiniMaxM2Config(
        **SHAPE,
        head_dim=16,
        num_local_experts=6,
        num_experts_per_tok=3,
        rope_parameters={"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5},
    ),
    # A dense layer, two that rotate, and one that does not and scales its queries.
    "llama4": lambda: transformers.Llama4TextConfig(
        **SHAPE | {"num_hidden_layers": 4},
        head_dim=16,
        intermediate_size_mlp=72,
        num_local_experts=4,
        moe_layers=[1, 2, 3],
        rope_parameters=LLAMA3_ROPE,
        floor_scale=16,
    ),
    "granitemoe": lambda: transformers.GraniteMoeConfig(
        **SHAPE,
        num_local_experts=6,
        num_experts_per_tok=3,
        embedding_multiplier=3.0,
        attention_multiplier=0.2,
        residual_multiplier=0.6,
        logits_scaling=0.4,
    ),
    "granitemoeshared": lambda: transformers.GraniteMoeSharedConfig(
        **SHAPE,
        num_local_experts=6,
        num_experts_per_tok=3,
        shared_intermediate_size=56,
        attention_multiplier=0.2,
    ),
    "phimoe": lambda: transformers.PhimoeConfig(**SHAPE, num_local_experts=6, attention_bias=True, lm_head_bias=True),
    "ministral3": lambda: transformers.Ministral3Config(
        **SHAPE,
        head_dim=16,
        rope_parameters=YARN_ROPE | {"llama_4_scaling_beta": 0.5, "mscale": 1.0, "mscale_all_dim": 1.0},
    ),
    "granite": lambda: transformers.GraniteConfig(
        **SHAPE, embedding_multiplier=3.0, attention_multiplier=0.2, residual_multiplier=0.6, logits_scaling=0.4
    ),
    "phi3": lambda: transformers.Phi3Config(
        **SHAPE,
        pad_token_id=0,
        sliding_window=WINDOW,
        # The reference takes the short factors for whole sequences that are shorter; here all are longer.
        original_max_position_embeddings=1,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.5,
            "attention_factor": 1.2,
            "short_factor": [1.0, 1.5],
            "long_factor": [1.25, 4.0],
        },
    ),
    "smollm3": lambda: transformers.SmolLM3Config(**SHAPE | {"num_hidden_layers": 4}, pad_token_id=0),
    "olmo2": lambda: transformers.Olmo2Config(**SHAPE, pad_token_id=0),
    "olmo3": lambda: transformers.Olmo3Config(
        **SHAPE,
        pad_token_id=0,
        sliding_window=WINDOW,
        layer_types=[SLIDING, FULL, SLIDING],
        rope_parameters={SLIDING: {"rope_type": "default", "rope_theta": 5e5}, FULL: YARN_ROPE | {"rope_theta": 5e5}},
    ),
    "exaone4": lambda: transformers.Exaone4Config(
        **SHAPE, sliding_window=WINDOW, layer_types=[SLIDING, SLIDING, FULL], rope_parameters=LLAMA3_ROPE
    ),
    "cohere": lambda: transformers.CohereConfig(**SHAPE, logit_scale=0.3),
    "cohere2": lambda: transformers.Cohere2Config(
        **SHAPE, sliding_window=WINDOW, layer_types=[SLIDING, FULL, SLIDING], logit_scale=0.3
    ),
    "seed_oss": lambda: transformers.SeedOssConfig(**SHAPE, head_dim=16),
    "stablelm": lambda: transformers.StableLmConfig(
        **SHAPE,
        use_qkv_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    ),
    "starcoder2": lambda: transformers.Starcoder2Config(**SHAPE, sliding_window=WINDOW),
    "lfm2": lambda: transformers.Lfm2Config(
        **SHAPE | {"num_hidden_layers": 4},
        layer_types=["conv", "conv", FULL, "conv"],
        block_auto_adjust_ff_dim=False,
        conv_bias=True,
        tie_word_embeddings=False,
    ),
    # As 1.2B: without biases, and with attention in the last layer.
    "lfm2_tied": lambda: transformers.Lfm2Config(
        **SHAPE, layer_types=["conv", FULL, FULL], block_multiple_of=32, conv_L_cache=4
    ),
    # A dense layer first, then a convolution and attention with experts.
    "lfm2_moe": lambda: transformers.Lfm2MoeConfig(
        **SHAPE,
        **EXPERTS,
        layer_types=["conv", "conv", FULL],
        num_dense_layers=1,
        moe_intermediate_size=40,
        routed_scaling_factor=1.5,
    ),
    "qwen3_5": lambda: transformers.Qwen3_5TextConfig(
        **SHAPE | {"num_hidden_layers": 5},
        head_dim=16,
        layer_types=[LINEAR, LINEAR, FULL, LINEAR, FULL],
        linear_num_key_heads=2,
        linear_num_value_heads=6,
        linear_key_head_dim=12,
        linear_value_head_dim=12,
        tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.5,
            "mrope_section": [2, 1, 1],
            "mrope_interleaved": True,
        },
    ),
    "qwen3_5_moe": lambda: transformers.Qwen3_5MoeTextConfig(
        **{key: value for key, value in SHAPE.items() if key != "intermediate_size"},
        head_dim=16,
        layer_types=[LINEAR, FULL, LINEAR],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=8,
        num_experts_per_tok=3,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=40,
    ),
    "qwen3_next": lambda: transformers.Qwen3NextConfig(
        **SHAPE,
        head_dim=16,
        layer_types=[LINEAR, FULL, LINEAR],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=8,
        num_experts_per_tok=3,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=40,
    ),
    # As 0.8B to 4B: as many heads of keys as of values, and a delta net in the last layer.
    "qwen3_5_small": lambda: transformers.Qwen3_5TextConfig(
        **SHAPE,
        head_dim=16,
        layer_types=[LINEAR, FULL, LINEAR],
        attention_bias=True,
        linear_num_key_heads=3,
        linear_num_value_heads=3,
        linear_key_head_dim=8,
        linear_value_head_dim=16,
        linear_conv_kernel_dim=3,
    ),
    # As H tiny and small: experts, and no rotation.
    "granitemoehybrid": lambda: transformers.GraniteMoeHybridConfig(
        **SHAPE,
        **GRANITE,
        layer_types=[LINEAR, FULL, LINEAR],
        num_local_experts=6,
        num_experts_per_tok=3,
        shared_intermediate_size=56,
        mamba_n_heads=6,
        mamba_d_state=12,
    ),
    # As H micro: no experts; and what no published model has.
    "granitemoehybrid_dense": lambda: transformers.GraniteMoeHybridConfig(
        **SHAPE,
        **GRANITE,
        layer_types=[FULL, LINEAR, LINEAR],
        num_local_experts=0,
        num_experts_per_tok=0,
        shared_intermediate_size=80,
        position_embedding_type="rope",
        attention_bias=True,
        mamba_n_heads=4,
        mamba_n_groups=2,
        mamba_d_state=8,
        mamba_d_conv=3,
        tie_word_embeddings=True,
    ),
    # As 4.0 micro, which has no recurrent layer.
    "granitemoehybrid_attention": lambda: transformers.GraniteMoeHybridConfig(
        **SHAPE,
        **GRANITE,
        layer_types=[FULL] * 3,
        num_local_experts=0,
        num_experts_per_tok=0,
        shared_intermediate_size=80,
        position_embedding_type="rope",
        mamba_n_heads=4,
        mamba_d_state=8,
    ),
    "nemotron_h": lambda: transformers.NemotronHConfig(
        **{key: value for key, value in SHAPE.items() if key != "num_hidden_layers"},
        layers_block_type=[LINEAR, "mlp", FULL, LINEAR, "mlp"],
        head_dim=16,
        mamba_num_heads=6,
        mamba_head_dim=8,
        ssm_state_size=12,
        n_groups=3,
        conv_kernel=3,
    ),
    # With what no published model has, and a mixer in the last layer.
    "nemotron_h_biased": lambda: transformers.NemotronHConfig(
        **{key: value for key, value in SHAPE.items() if key != "num_hidden_layers"},
        layers_block_type=[FULL, "mlp", LINEAR],
        head_dim=8,
        mamba_num_heads=4,
        mamba_head_dim=16,
        ssm_state_size=8,
        n_groups=1,
        use_bias=True,
        mlp_bias=True,
    ),
    # As Nemotron 3 Nano: experts in place of networks.
    "nemotron_h_moe": lambda: transformers.NemotronHConfig(
        **{key: value for key, value in SHAPE.items() if key != "num_hidden_layers"},
        **NEMOTRON_EXPERTS,
        layers_block_type=[LINEAR, "moe", FULL, "moe"],
        head_dim=16,
        mamba_num_heads=6,
        mamba_head_dim=8,
        ssm_state_size=12,
        n_groups=3,
        routed_scaling_factor=2.5,
    ),
    # As Super: experts that are narrower than the model; and a network among them, as no published model has.
    "nemotron_h_latent": lambda: transformers.NemotronHConfig(
        **{key: value for key, value in SHAPE.items() if key != "num_hidden_layers"},
        **NEMOTRON_EXPERTS,
        layers_block_type=["moe", FULL, "mlp", LINEAR],
        head_dim=8,
        mamba_num_heads=4,
        mamba_head_dim=8,
        ssm_state_size=8,
        n_groups=2,
        moe_latent_size=20,
    ),
    "falcon_h1": lambda: transformers.FalconH1Config(
        **SHAPE,
        head_dim=8,
        mamba_d_ssm=96,
        mamba_n_heads=6,
        mamba_d_state=12,
        embedding_multiplier=3.0,
        lm_head_multiplier=0.4,
        mlp_multipliers=[0.7, 0.8],
        key_multiplier=0.6,
        attention_in_multiplier=0.9,
        attention_out_multiplier=1.2,
        ssm_multipliers=[0.5, 0.8, 0.7, 1.5, 1.3],
        ssm_in_multiplier=1.1,
        ssm_out_multiplier=0.75,
    ),
    "falcon_h1_normed": lambda: transformers.FalconH1Config(
        **SHAPE,
        head_dim=8,
        mamba_d_ssm=64,
        mamba_n_heads=4,
        mamba_d_state=8,
        mamba_n_groups=2,
        mamba_rms_norm=True,
        mamba_norm_before_gate=False,
    ),
    "apertus": lambda: transformers.ApertusConfig(**SHAPE, rope_parameters=LLAMA3_ROPE),
}


def make(family: str, folder: Path, **changes):
    """Save a random model of a family in `folder`; gives the equal transformers model, in fp32 and eval mode."""
    torch.manual_seed(7)
    config = CONFIGS[family]()
    for key, value in changes.items():
        setattr(config, key, value)
    # transformers opens Mistral4Config only within a wrapper.
    build = transformers.AutoModelForCausalLM.from_config
    if isinstance(config, transformers.Mistral4Config):
        build = transformers.Mistral4ForCausalLM._from_config
    model = build(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # transformers starts norms at one and biases at zero, which would hide one that is left out.
            if name.endswith(
                ("norm.weight", "router.scale", "per_expert_scale", "layernorm_1.weight", "layernorm_2.weight")
            ):
                parameter.uniform_(0.5, 1.5)
            elif name.endswith(("A_log", "dt_bias")):
                # Drawn as for training, a state would forget all but the last tokens.
                parameter.uniform_(-2, 0)
            elif name.endswith(".D"):
                parameter.uniform_(0.5, 1.5)
            elif "act_fn" in name:
                parameter.uniform_(-0.5, 0.5)
            elif name.endswith((".bias", "proj_bias")):
                parameter.normal_(std=0.3)
            elif name.endswith(".sinks"):
                parameter.normal_(std=2)
            elif family == "gpt_oss" and name.endswith("experts.gate_up_proj"):
                # Some beyond the clamp.
                parameter.mul_(6)
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.uniform_(0.5, 1.5)
            elif name.endswith(("e_score_correction_bias", "expert_bias")):
                buffer.normal_(std=0.3)
    model.save_pretrained(folder)
    if family == "internlm2":
        _repack_as_internlm2(folder, config)
    return model


def _repack_as_internlm2(folder: Path, config) -> None:
    """Rewrite a saved Llama in InternLM2's names and its wqkv layout (transformers has no InternLM2 of its own)."""
    tensors = load_file(folder / "model.safetensors")
    names = {"model.embed_tokens": "model.tok_embeddings", "model.norm": "model.norm", "lm_head": "output"}
    layer_names = {
        "input_layernorm": "attention_norm",
        "self_attn.o_proj": "attention.wo",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
    }
    packed = {f"{new}.weight": tensors[f"{old}.weight"] for old, new in names.items()}
    kv_heads, head_dim = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    for index in range(config.num_hidden_layers):
        layer = f"model.layers.{index}"
        for old, new in layer_names.items():
            packed[f"{layer}.{new}.weight"] = tensors[f"{layer}.{old}.weight"]
        groups = [
            tensors[f"{layer}.self_attn.{p}_proj.weight"].view(kv_heads, -1, head_dim, config.hidden_size)
            for p in "qkv"
        ]
        packed[f"{layer}.attention.wqkv.weight"] = torch.cat(groups, dim=1).reshape(-1, config.hidden_size)
    save_file(packed, folder / "model.safetensors")
    raw = json.loads((folder / "config.json").read_text())
    raw |= {"architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2", "bias": False}
    (folder / "config.json").write_text(json.dumps(raw))


@torch.inference_mode()
def reference_logits(model, tokens: list[int]):
    """[len(tokens), vocab] logits of one whole, uncached forward pass."""
    return model(torch.tensor([tokens])).logits[0].numpy()


@torch.inference_mode()
def reference_states(model, tokens: list[int]):
    """[len(tokens), hidden] states after the final norm."""
    return model.model(torch.tensor([tokens])).last_hidden_state[0].numpy()
