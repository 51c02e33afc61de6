"""Tiny random models of many kinds, built from configurations alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

VOCABULARY = 199
PROMPT_LENGTH = 200
PADDING = 41
IMAGE_TOKEN = 198
SLIDING_WINDOW = 64

SMALL = dict(vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=None)
DECODER = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=1024,
    **SMALL,
)
# Every expert is asked: which ones are chosen would turn a small error of a state into a large one, by chance.
EXPERTS = dict(num_experts=2, num_experts_per_tok=2, moe_intermediate_size=32)
SLIDING_AND_FULL = dict(sliding_window=SLIDING_WINDOW, layer_types=["sliding_attention", "full_attention"])
SHARED = dict(
    num_hidden_layers=4,
    sliding_window=SLIDING_WINDOW,
    layer_types=["sliding_attention", "full_attention"] * 2,
    num_kv_shared_layers=2,
    hidden_size_per_layer_input=16,
    vocab_size_per_layer_input=VOCABULARY,
)
LATENT = dict(kv_lora_rank=32, q_lora_rank=32, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=32)
# Fewer keys than the prompt has tokens, but most of them: a small error seldom lets the indexer choose others.
INDEXER = dict(index_topk=160, index_head_dim=32, index_n_heads=4)
LATENT_EXPERTS = dict(moe_intermediate_size=32, n_routed_experts=2, num_experts_per_tok=2, n_group=1, topk_group=1)
SPARSE = {**DECODER, "num_key_value_heads": 4, **LATENT, **INDEXER, **LATENT_EXPERTS}
DENSE_AND_SPARSE = dict(mlp_layer_types=["dense", "sparse"])
ENCODER_DECODER = dict(
    vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=1, eos_token_id=None, decoder_start_token_id=0
)
HALVES = dict(
    d_model=64,
    encoder_layers=3,
    decoder_layers=2,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=96,
    decoder_ffn_dim=96,
)


@dataclass(frozen=True)
class Family:
    """One kind of model.

    Attributes:
        title: as the page of the docs calls it.
        config: makes the configuration.
        std: standard deviation of the weights; the larger, the more a small error of a state grows.
        seed: of the weights; one whose text is lively.
        encoder: what an encoder-decoder model's encoder reads: "text" or "audio"; None for the others.
        images: whether the prompt has an image.
        needs: name of the configuration in transformers, where not every supported release has it.
    """

    title: str
    config: Callable[[], PretrainedConfig]
    std: float = 0.25
    seed: int = 7
    encoder: str | None = None
    images: bool = False
    needs: str | None = None

    @property
    def is_known(self) -> bool:
        """Whether this release of transformers has such models."""
        return self.needs is None or hasattr(transformers, self.needs)

    def build(self) -> PreTrainedModel:
        """Return the model in float32."""
        torch.manual_seed(self.seed)
        model = self._auto_class.from_config(self.config(), dtype=torch.float32).eval()
        embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
        if head.weight is embeddings.weight:
            # A model whose output is its input's table says what it heard last, over and over.
            head.weight = torch.nn.Parameter(head.weight.detach().clone())
        for parameter in model.parameters():
            if parameter.dim() in (2, 3):
                torch.nn.init.normal_(parameter, std=self.std)
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding):
                torch.nn.init.normal_(module.weight, std=1.0)
        for settings in (model.generation_config, model.config.get_text_config(decoder=True)):
            settings.pad_token_id, settings.eos_token_id = 0, None
        model.generation_config.forced_eos_token_id = None
        return model

    @property
    def _auto_class(self) -> Any:
        if self.images:
            return transformers.AutoModelForImageTextToText
        kinds = {"text": transformers.AutoModelForSeq2SeqLM, "audio": transformers.AutoModelForSpeechSeq2Seq}
        return kinds.get(self.encoder or "", transformers.AutoModelForCausalLM)

    def inputs(self, *, padded: bool = False) -> dict[str, torch.Tensor]:
        """Return two prompts of 200 tokens; where padded, one of them is 41 shorter."""
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(2, IMAGE_TOKEN, (2, PROMPT_LENGTH), generator=generator)
        mask = torch.ones_like(ids)
        if padded:
            ids[0, :PADDING], mask[0, :PADDING] = 0, 0
        if self.encoder is None:
            given = {"input_ids": ids, "attention_mask": mask}
            if self.images:
                ids[:, 100:116] = IMAGE_TOKEN
                given["pixel_values"] = torch.randn(2, 3, 32, 32, generator=generator)
            return given
        ids[:, 0] = 0  # what the decoder starts with
        given = {"decoder_input_ids": ids, "decoder_attention_mask": mask}
        if self.encoder == "audio":
            return {"input_features": torch.randn(2, 8, 280, generator=generator), **given}
        text = torch.randint(2, VOCABULARY, (2, 140), generator=generator)
        seen = torch.ones_like(text)
        if padded:
            text[0, 100:], seen[0, 100:] = 0, 0
        return {"input_ids": text, "attention_mask": seen, **given}


def _llava() -> PretrainedConfig:
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    text = transformers.LlamaConfig(head_dim=32, **DECODER)
    return transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN, vision_feature_layer=-1
    )


FAMILIES = {
    "llama": Family("Llama", lambda: transformers.LlamaConfig(head_dim=32, **DECODER)),
    "mistral": Family(
        "Mistral", lambda: transformers.MistralConfig(head_dim=32, sliding_window=SLIDING_WINDOW, **DECODER)
    ),
    "qwen2": Family("Qwen2", lambda: transformers.Qwen2Config(**DECODER)),
    "qwen3": Family("Qwen3", lambda: transformers.Qwen3Config(head_dim=32, **DECODER), seed=8),
    "qwen3_moe": Family("Qwen3-MoE", lambda: transformers.Qwen3MoeConfig(head_dim=32, **EXPERTS, **DECODER), seed=8),
    "gemma2": Family(
        "Gemma 2",
        lambda: transformers.Gemma2Config(head_dim=32, query_pre_attn_scalar=32, **SLIDING_AND_FULL, **DECODER),
        seed=8,
    ),
    "gemma3": Family(
        "Gemma 3",
        lambda: transformers.Gemma3TextConfig(head_dim=32, query_pre_attn_scalar=32, **SLIDING_AND_FULL, **DECODER),
        seed=8,
    ),
    "gemma3n": Family(
        "Gemma 3n",
        lambda: transformers.Gemma3nTextConfig(
            head_dim=32, laurel_rank=8, activation_sparsity_pattern=None, **{**DECODER, **SHARED}
        ),
        seed=8,
    ),
    "gemma4": Family(
        "Gemma 4", lambda: transformers.Gemma4TextConfig(head_dim=32, global_head_dim=32, **{**DECODER, **SHARED})
    ),
    "phi3": Family("Phi-3", lambda: transformers.Phi3Config(**{**DECODER, "num_key_value_heads": 4})),
    "gpt2": Family("GPT-2", lambda: transformers.GPT2Config(n_embd=64, n_layer=2, n_head=2, n_positions=1024, **SMALL)),
    "gpt_neox": Family(
        "GPT-NeoX",
        lambda: transformers.GPTNeoXConfig(
            hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, **SMALL
        ),
        std=0.1,
    ),
    "opt": Family(
        "OPT",
        lambda: transformers.OPTConfig(
            hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=64, **SMALL
        ),
    ),
    "falcon": Family(
        "Falcon",
        lambda: transformers.FalconConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, **SMALL),
        std=0.1,
        seed=8,
    ),
    "bloom": Family(
        "Bloom", lambda: transformers.BloomConfig(hidden_size=64, n_layer=2, n_head=2, **SMALL), std=0.1, seed=8
    ),
    "cohere2": Family("Cohere 2", lambda: transformers.Cohere2Config(head_dim=32, **SLIDING_AND_FULL, **DECODER)),
    "llama4": Family(
        "Llama 4",
        lambda: transformers.Llama4TextConfig(
            head_dim=32,
            intermediate_size_mlp=96,
            num_local_experts=2,
            num_experts_per_tok=2,
            attention_chunk_size=SLIDING_WINDOW,
            no_rope_layers=[1, 0],
            layer_types=["chunked_attention", "full_attention"],
            **DECODER,
        ),
        seed=8,
    ),
    "gpt_oss": Family(
        "gpt-oss",
        lambda: transformers.GptOssConfig(
            head_dim=32, num_local_experts=2, num_experts_per_tok=2, **SLIDING_AND_FULL, **DECODER
        ),
    ),
    "deepseek_v3": Family(
        "DeepSeek-V3",
        lambda: transformers.DeepseekV3Config(
            moe_intermediate_size=32,
            n_routed_experts=2,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
            kv_lora_rank=32,
            q_lora_rank=None,
            qk_rope_head_dim=16,
            qk_nope_head_dim=16,
            v_head_dim=32,
            first_k_dense_replace=1,
            **{**DECODER, "num_key_value_heads": 4},
        ),
    ),
    "deepseek_v32": Family(
        "DeepSeek-V3.2",
        lambda: transformers.DeepseekV32Config(first_k_dense_replace=1, **SPARSE),
        std=0.2,
        seed=12,
        needs="DeepseekV32Config",
    ),
    "glm_moe_dsa": Family(
        "GLM-5",
        lambda: transformers.GlmMoeDsaConfig(**DENSE_AND_SPARSE, **SPARSE),
        std=0.15,
        needs="GlmMoeDsaConfig",
    ),
    "axk2": Family(
        "A.X K2", lambda: transformers.AXK2Config(**DENSE_AND_SPARSE, **SPARSE), std=0.2, seed=12, needs="AXK2Config"
    ),
    "hy_v4": Family(
        "HY 4", lambda: transformers.HYV4Config(**DENSE_AND_SPARSE, **SPARSE), std=0.2, seed=12, needs="HYV4Config"
    ),
    "dots3_note": Family(
        "dots3.note",
        lambda: transformers.Dots3NoteTextConfig(
            sliding_window=SLIDING_WINDOW,
            layer_types=["sliding_attention", "indexed_attention"],
            swa_num_attention_heads=4,
            swa_num_key_value_heads=4,
            swa_q_lora_rank=32,
            swa_kv_lora_rank=32,
            swa_head_dim=32,
            swa_qk_nope_head_dim=16,
            swa_qk_rope_head_dim=16,
            swa_v_head_dim=32,
            **DENSE_AND_SPARSE,
            **SPARSE,
        ),
        std=0.2,
        seed=12,
        needs="Dots3NoteTextConfig",
    ),
    "qwen3_next": Family(
        "Qwen3-Next",
        lambda: transformers.Qwen3NextConfig(
            head_dim=32,
            shared_expert_intermediate_size=32,
            linear_num_key_heads=2,
            linear_num_value_heads=2,
            linear_key_head_dim=16,
            linear_value_head_dim=16,
            layer_types=["linear_attention", "full_attention"],
            **EXPERTS,
            **DECODER,
        ),
    ),
    "jamba": Family(
        "Jamba",
        lambda: transformers.JambaConfig(
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=2,
            expert_layer_offset=1,
            num_experts=2,
            num_experts_per_tok=2,
            mamba_d_state=8,
            use_mamba_kernels=False,
            **{**DECODER, "num_hidden_layers": 4},
        ),
    ),
    "falcon_h1": Family(
        "Falcon-H1",
        lambda: transformers.FalconH1Config(
            head_dim=32,
            mamba_d_ssm=64,
            mamba_n_heads=4,
            mamba_d_head=16,
            mamba_n_groups=1,
            mamba_d_state=16,
            mamba_chunk_size=32,
            **DECODER,
        ),
    ),
    "zamba2": Family(
        "Zamba 2",
        lambda: transformers.Zamba2Config(
            mamba_d_state=16,
            mamba_headdim=32,
            n_mamba_heads=4,
            mamba_ngroups=1,
            chunk_size=32,
            layers_block_type=["linear_attention", "hybrid"] * 2,
            num_mem_blocks=1,
            **{**DECODER, "num_hidden_layers": 4, "num_key_value_heads": 4},
        ),
        std=0.15,
        seed=8,
    ),
    "zaya": Family(
        "ZAYA1",
        lambda: transformers.ZayaConfig(
            head_dim=32,
            sliding_window=SLIDING_WINDOW,
            layer_types=["hybrid_sliding", "hybrid"],
            num_experts=2,
            num_experts_per_tok=1,
            moe_intermediate_size=32,
            **DECODER,
        ),
        std=0.15,
        needs="ZayaConfig",
    ),
    "t5": Family(
        "T5",
        lambda: transformers.T5Config(
            d_model=64, d_kv=32, d_ff=96, num_layers=3, num_decoder_layers=2, num_heads=2, **ENCODER_DECODER
        ),
        encoder="text",
        std=0.1,
    ),
    "bart": Family(
        "BART",
        lambda: transformers.BartConfig(max_position_embeddings=1024, **HALVES, **ENCODER_DECODER),
        encoder="text",
        std=0.1,
    ),
    "whisper": Family(
        "Whisper",
        lambda: transformers.WhisperConfig(
            num_mel_bins=8,
            max_source_positions=140,
            max_target_positions=1024,
            suppress_tokens=None,
            begin_suppress_tokens=None,
            **HALVES,
            **ENCODER_DECODER,
        ),
        encoder="audio",
        std=0.1,
    ),
    "llava": Family("LLaVA (vision and language)", _llava, images=True),
}
