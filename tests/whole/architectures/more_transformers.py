"""Many more architectures of transformers, as bare models, by a line each.

Owns: a small configuration for each, and a loss that any output has.
Does not know: what is inside the models; nobody chose them for being easy.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .registry import Problem, alive, architecture

BATCH, LENGTH, VOCABULARY = 4, 4, 50  # batch, length and heads coincide: shapes tell nothing

TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 40, "max_position_embeddings": 32,
}  # fmt: skip
IMAGE = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 40, "image_size": 32, "patch_size": 8}  # fmt: skip
SOUND = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 40, "vocab_size": 12, "conv_dim": (8, 8), "conv_stride": (4, 2),
         "conv_kernel": (8, 4), "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8,
         "num_conv_pos_embedding_groups": 4}  # fmt: skip
BOTH = {"vocab_size": VOCABULARY, "d_model": 24, "encoder_layers": 2, "decoder_layers": 2,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 40,
        "decoder_ffn_dim": 40, "pad_token_id": 1}  # fmt: skip
GROUPED = {**TEXT, "num_key_value_heads": 2}
EXPERTS = {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "_experts": "eager"}


def spread(output: Any) -> Tensor:
    """(B,): a smooth function of every number that the model returns for an example."""
    values = next(
        (
            value
            for name in ("last_hidden_state", "logits")
            if (value := getattr(output, name, None)) is not None
        ),
        None,
    )
    values = output[0] if values is None else values
    weights = torch.linspace(-1, 1, values[0].numel(), dtype=values.dtype)
    return (values.flatten(1) * weights).sin().sum(1)


def _random(number: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(BATCH, *shape, dtype=torch.float64, generator=generator)


def _ids(number: int, length: int = LENGTH) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randint(5, VOCABULARY, (BATCH, length), generator=generator)


def _padded(model: nn.Module, number: int) -> Any:
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[1, -1:] = 0
    return model(input_ids=_ids(number), attention_mask=mask)


def _boxes(number: int) -> Tensor:
    left, top = _ids(number), _ids(number + 1)
    return torch.stack([left, top, left + 5, top + 5], -1)


CALLS: dict[str, Callable[[nn.Module, int], Any]] = {
    "text": lambda model, k: model(input_ids=_ids(k)),
    "padded text": _padded,
    "long text": lambda model, k: model(input_ids=_ids(k, 24)),
    "page": lambda model, k: model(input_ids=_ids(k), bbox=_boxes(k)),
    "two texts": lambda model, k: model(input_ids=_ids(k, 8), decoder_input_ids=_ids(k + 5)),
    "image": lambda model, k: model(pixel_values=_random(k, 3, 32, 32)),
    "video": lambda model, k: model(pixel_values=_random(k, 4, 3, 32, 32)),
    "sound": lambda model, k: model(input_values=_random(k, 400)),
    "spectrum": lambda model, k: model(input_values=_random(k, 32, 16)),
    "series": lambda model, k: model(past_values=_random(k, 16, 2)),
}

# name -> (config, its sizes, what the model is given)
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "distilbert": ("DistilBert", {"vocab_size": VOCABULARY, "dim": 24, "hidden_dim": 40,
                                  "n_layers": 2, "n_heads": 4}, "padded text"),
    "albert": ("Albert", {**TEXT, "embedding_size": 12}, "padded text"),
    "electra": ("Electra", {**TEXT, "embedding_size": 12}, "padded text"),
    "longformer": ("Longformer", {**TEXT, "attention_window": 4, "pad_token_id": 1}, "padded text"),
    "bigbird": ("BigBird", {**TEXT, "attention_type": "original_full"}, "padded text"),
    "bigbird-sparse": ("BigBird", {**TEXT, "max_position_embeddings": 64, "block_size": 2,
                                   "attention_type": "block_sparse", "num_random_blocks": 1},
                       "long text"),
    "mpnet": ("MPNet", {**TEXT, "pad_token_id": 1}, "padded text"),
    "xlnet": ("XLNet", {"vocab_size": VOCABULARY, "d_model": 24, "n_layer": 2, "n_head": 4,
                        "d_inner": 40}, "text"),
    "gptj": ("GPTJ", {"vocab_size": VOCABULARY, "n_embd": 24, "n_layer": 2, "n_head": 4,
                      "rotary_dim": 4, "n_positions": 32}, "padded text"),
    "codegen": ("CodeGen", {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4,
                            "rotary_dim": 4, "n_positions": 32}, "padded text"),
    "gpt-neo": ("GPTNeo", {"vocab_size": VOCABULARY, "hidden_size": 24, "num_layers": 2,
                           "attention_types": [[["global", "local"], 1]], "num_heads": 4,
                           "window_size": 4}, "padded text"),
    "falcon": ("Falcon", TEXT, "padded text"),
    "phi": ("Phi", {**TEXT, "hidden_size": 32, "partial_rotary_factor": 0.5}, "text"),
    "phi3": ("Phi3", {**TEXT, "pad_token_id": 0}, "padded text"),
    "starcoder2": ("Starcoder2", GROUPED, "padded text"),
    "mistral": ("Mistral", {**GROUPED, "sliding_window": 4}, "padded text"),
    "cohere": ("Cohere", TEXT, "padded text"),
    "olmo2": ("Olmo2", TEXT, "padded text"),
    "gemma2": ("Gemma2", {**GROUPED, "head_dim": 8}, "padded text"),
    "stablelm": ("StableLm", GROUPED, "padded text"),
    "persimmon": ("Persimmon", {**TEXT, "hidden_size": 32}, "text"),
    "granite": ("Granite", GROUPED, "padded text"),
    "glm": ("Glm", {**GROUPED, "head_dim": 8, "pad_token_id": 0}, "padded text"),
    "nemotron": ("Nemotron", GROUPED, "padded text"),
    "qwen2-moe": ("Qwen2Moe", {**EXPERTS, "moe_intermediate_size": 12,
                               "shared_expert_intermediate_size": 12}, "padded text"),
    "olmoe": ("Olmoe", EXPERTS, "padded text"),
    "qwen3-next": ("Qwen3Next", {**EXPERTS, "head_dim": 8, "moe_intermediate_size": 12,
                                 "shared_expert_intermediate_size": 12, "linear_num_key_heads": 2,
                                 "linear_num_value_heads": 2, "linear_key_head_dim": 8,
                                 "linear_value_head_dim": 8,
                                 "layer_types": ["linear_attention", "full_attention"]},
                   "padded text"),
    "gpt-oss": ("GptOss", {**GROUPED, "head_dim": 8, "num_local_experts": 4, "sliding_window": 4,
                           "num_experts_per_tok": 2, "_experts": "eager"}, "padded text"),
    "llama4": ("Llama4Text", {**GROUPED, "head_dim": 8, "num_local_experts": 2,
                              "intermediate_size_mlp": 40}, "padded text"),
    "mamba2": ("Mamba2", {"vocab_size": VOCABULARY, "hidden_size": 24, "num_hidden_layers": 2,
                          "state_size": 4, "num_heads": 4, "head_dim": 12, "n_groups": 1,
                          "chunk_size": 4}, "text"),
    "jamba": ("Jamba", {**GROUPED, "attn_layer_period": 2, "attn_layer_offset": 1,
                        "expert_layer_period": 2, "num_experts": 2, "mamba_d_state": 4,
                        "mamba_dt_rank": 4, "use_mamba_kernels": False, "_experts": "eager"},
              "padded text"),
    "bamba": ("Bamba", {**GROUPED, "mamba_n_heads": 4, "mamba_d_head": 12, "mamba_d_state": 4,
                        "mamba_chunk_size": 4, "attn_layer_indices": [1]}, "padded text"),
    "recurrent-gemma": ("RecurrentGemma", {**GROUPED, "lru_width": 24,
                                           "attention_window_size": 8}, "padded text"),
    "xlstm": ("xLSTM", {"vocab_size": VOCABULARY, "hidden_size": 24, "num_heads": 2,
                        "num_blocks": 2, "chunkwise_kernel": "chunkwise--native_autograd",
                        "sequence_kernel": "native_sequence__native", "step_kernel": "native"},
              "text"),
    "modernbert": ("ModernBert", {**TEXT, "pad_token_id": 0, "local_attention": 4}, "padded text"),
    "esm": ("Esm", {**TEXT, "pad_token_id": 1, "mask_token_id": 4,
                    "position_embedding_type": "rotary"}, "padded text"),
    "roformer": ("RoFormer", TEXT, "padded text"),
    "fnet": ("FNet", TEXT, "text"),
    "yoso": ("Yoso", {**TEXT, "use_expectation": True}, "text"),
    "squeezebert": ("SqueezeBert", {**TEXT, "embedding_size": 24}, "padded text"),
    "convbert": ("ConvBert", {**TEXT, "embedding_size": 24}, "padded text"),
    "ibert": ("IBert", TEXT, "padded text"),
    "rembert": ("RemBert", {**TEXT, "input_embedding_size": 12}, "text"),
    "layoutlm": ("LayoutLM", {**TEXT, "max_2d_position_embeddings": 64}, "page"),
    "lilt": ("Lilt", {**TEXT, "max_2d_position_embeddings": 64, "channel_shrink_ratio": 2,
                      "pad_token_id": 1}, "page"),
    "bart": ("Bart", {**BOTH, "max_position_embeddings": 32}, "two texts"),
    "led": ("LED", {**BOTH, "attention_window": 4, "max_encoder_position_embeddings": 32,
                    "max_decoder_position_embeddings": 32}, "two texts"),
    "longt5": ("LongT5", {"vocab_size": VOCABULARY, "d_model": 24, "d_kv": 6, "d_ff": 40,
                          "num_layers": 2, "num_heads": 4, "local_radius": 3,
                          "global_block_size": 4,
                          "encoder_attention_type": "transient-global"}, "two texts"),
    "switch": ("SwitchTransformers", {"vocab_size": VOCABULARY, "d_model": 24, "d_kv": 6,
                                      "d_ff": 40, "num_layers": 2, "num_decoder_layers": 2,
                                      "num_sparse_encoder_layers": 1, "num_heads": 4,
                                      "num_sparse_decoder_layers": 1, "num_experts": 3,
                                      "expert_capacity": 16, "router_jitter_noise": 0.0},
               "two texts"),
    "prophetnet": ("ProphetNet", {"vocab_size": VOCABULARY, "hidden_size": 24,
                                  "encoder_ffn_dim": 40, "num_encoder_layers": 2,
                                  "num_encoder_attention_heads": 4, "decoder_ffn_dim": 40,
                                  "num_decoder_layers": 2, "num_decoder_attention_heads": 4,
                                  "max_position_embeddings": 32}, "two texts"),
    "dinov2": ("Dinov2", IMAGE, "image"),
    "data2vec-vision": ("Data2VecVision", IMAGE, "image"),
    "yolos": ("Yolos", {**IMAGE, "image_size": [32, 32], "num_detection_tokens": 4}, "image"),
    "segformer": ("Segformer", {"hidden_sizes": [8, 16], "num_encoder_blocks": 2, "depths": [1, 1],
                                "sr_ratios": [2, 1], "num_attention_heads": [1, 2],
                                "patch_sizes": [7, 3], "strides": [4, 2], "mlp_ratios": [2, 2],
                                "decoder_hidden_size": 16}, "image"),
    "convnextv2": ("ConvNextV2", {"hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1]},
                   "image"),
    "hiera": ("Hiera", {"embed_dim": 12, "image_size": [32, 32], "patch_stride": [4, 4],
                        "depths": [1, 1], "num_heads": [1, 2], "mlp_ratio": 2.0,
                        "num_query_pool": 1, "masked_unit_size": [2, 2], "query_stride": [2, 2],
                        "embed_dim_multiplier": 2.0}, "image"),
    "videomae": ("VideoMAE", {**IMAGE, "num_frames": 4}, "video"),
    "timesformer": ("Timesformer", {**IMAGE, "num_frames": 4}, "video"),
    "vivit": ("Vivit", {**IMAGE, "num_frames": 4, "tubelet_size": [2, 8, 8]}, "video"),
    "hubert": ("Hubert", SOUND, "sound"),
    "wavlm": ("WavLM", SOUND, "sound"),
    "sew": ("SEW", {**SOUND, "squeeze_factor": 1}, "sound"),
    "wav2vec2-conformer": ("Wav2Vec2Conformer", {**SOUND, "position_embeddings_type": "relative"},
                           "sound"),
    "audio-spectrogram": ("AST", {"hidden_size": 24, "num_hidden_layers": 2,
                                  "num_attention_heads": 4, "intermediate_size": 40,
                                  "max_length": 32, "num_mel_bins": 16, "patch_size": 8,
                                  "frequency_stride": 8, "time_stride": 8}, "spectrum"),
    "patchtst": ("PatchTST", {"num_input_channels": 2, "context_length": 16, "patch_length": 4,
                              "patch_stride": 4, "d_model": 16, "num_hidden_layers": 2,
                              "num_attention_heads": 2, "ffn_dim": 24}, "series"),
    "patchtsmixer": ("PatchTSMixer", {"num_input_channels": 2, "context_length": 16,
                                      "patch_length": 4, "patch_stride": 4, "d_model": 16,
                                      "num_layers": 2}, "series"),
}  # fmt: skip


def _build(kind: str, sizes: dict[str, Any], call: str) -> Problem:
    import transformers

    experts = sizes.get("_experts")
    config = getattr(transformers, f"{kind}Config")(
        **{name: value for name, value in sizes.items() if name != "_experts"}
    )
    if experts is not None:
        config._experts_implementation = experts
    if hasattr(config, "use_cache"):
        config.use_cache = False
    model = alive(transformers.AutoModel.from_config(config).double().eval())
    return Problem(model, lambda number: spread(CALLS[call](model, number)))


for _name, _what in MODELS.items():
    architecture(f"more-{_name}", "transformers, bare models", needs=("transformers",))(
        partial(_build, *_what)
    )
