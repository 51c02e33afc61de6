"""Small models whose layers hold more than keys and values, for tests of several folders."""

import transformers

SMALL = dict(
    vocab_size=99, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    initializer_range=0.2, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=None,
)  # fmt: skip
LINEAR = dict(
    linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=16, linear_value_head_dim=16, num_experts=2,
    num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32,
)  # fmt: skip


def falcon_h1():
    return transformers.FalconH1Config(
        head_dim=32, num_key_value_heads=2, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_n_groups=1,
        mamba_d_state=16, mamba_chunk_size=32, **SMALL,
    )  # fmt: skip


def glm_5():
    return transformers.GlmMoeDsaConfig(
        num_key_value_heads=4, kv_lora_rank=32, q_lora_rank=32, qk_rope_head_dim=16, qk_nope_head_dim=16,
        v_head_dim=32, index_topk=20, index_head_dim=32, index_n_heads=4, moe_intermediate_size=32, n_routed_experts=2,
        num_experts_per_tok=2, n_group=1, topk_group=1, mlp_layer_types=["dense", "sparse"], **SMALL,
    )  # fmt: skip
