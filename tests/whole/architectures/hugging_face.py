"""Architectures of transformers, built small from a config, with random weights.

Owns: one small configuration each, and its losses.
Does not know: how results are compared.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .registry import Problem, alive, architecture

NEEDS = ("transformers",)
VOCABULARY, LENGTH, BATCH = 61, 7, 3


def _model(kind: str, config: Any, dtype: torch.dtype = torch.float64) -> nn.Module:
    import transformers

    config.use_cache = False
    model = getattr(transformers, kind)(config)
    return alive(model.to(dtype).eval())


def _config(kind: str, **sizes: Any) -> Any:
    import transformers

    return getattr(transformers, kind)(**sizes)


def _tokens(number: int, length: int = LENGTH, vocabulary: int = VOCABULARY) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randint(3, vocabulary, (BATCH, length), generator=generator)


def _token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over the positions of each example."""
    return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").mean(1)


def _causal(model: nn.Module) -> Problem:
    def losses(number: int) -> Tensor:
        ids = _tokens(number)
        return _token_losses(model(input_ids=ids).logits[:, :-1], ids[:, 1:])

    return Problem(model, losses)


def _masked(model: nn.Module) -> Problem:
    """A bidirectional encoder, with padding at the end of some examples."""

    def losses(number: int) -> Tensor:
        ids = _tokens(number)
        mask = torch.ones_like(ids)
        mask[1, -2:] = 0
        logits = model(input_ids=ids, attention_mask=mask).logits
        return F.cross_entropy(logits.transpose(1, 2), ids, reduction="none").mul(mask).sum(1)

    return Problem(model, losses)


def _hf(name: str, **how: Any) -> Any:
    return architecture(f"hf-{name}", "transformers", needs=NEEDS, **how)


_SIZES = {"vocab_size": VOCABULARY, "hidden_size": 24, "num_hidden_layers": 2,
          "num_attention_heads": 4, "intermediate_size": 40}  # fmt: skip


@_hf("gpt2")
def gpt2() -> Problem:
    config = _config("GPT2Config", vocab_size=VOCABULARY, n_embd=24, n_layer=2, n_head=4,
                     n_positions=16)  # fmt: skip
    return _causal(_model("GPT2LMHeadModel", config))


@_hf("llama")
def llama() -> Problem:
    return _causal(_model("LlamaForCausalLM", _config("LlamaConfig", **_SIZES,
                                                      num_key_value_heads=2)))  # fmt: skip


@_hf("qwen3")
def qwen3() -> Problem:
    config = _config("Qwen3Config", **_SIZES, num_key_value_heads=2, head_dim=8)
    return _causal(_model("Qwen3ForCausalLM", config))


@_hf("gemma3")
def gemma3() -> Problem:
    config = _config("Gemma3TextConfig", **_SIZES, num_key_value_heads=2, head_dim=8,
                     sliding_window=4)  # fmt: skip
    return _causal(_model("Gemma3ForCausalLM", config))


def _mixtral(experts: str, dtype: torch.dtype = torch.float64) -> Problem:
    """A mixture of experts: tokens of all examples are sorted by expert."""
    config = _config("MixtralConfig", **_SIZES, num_key_value_heads=2, num_local_experts=4,
                     num_experts_per_tok=2)  # fmt: skip
    config._experts_implementation = experts
    return _causal(_model("MixtralForCausalLM", config, dtype))


@_hf("mixtral", dtype=torch.float32)
def mixtral() -> Problem:
    """All experts by one fused product, which torch has in single precision only."""
    return _mixtral("grouped_mm", torch.float32)


@_hf("mixtral-batched")
def mixtral_batched() -> Problem:
    """The weights of its experts gathered for every token."""
    return _mixtral("batched_mm")


@_hf("mixtral-loop")
def mixtral_loop() -> Problem:
    """A Python loop over experts."""
    return _mixtral("eager")


@_hf("bert")
def bert() -> Problem:
    return _masked(_model("BertForMaskedLM", _config("BertConfig", **_SIZES)))


@_hf("roberta")
def roberta() -> Problem:
    return _masked(_model("RobertaForMaskedLM", _config("RobertaConfig", **_SIZES)))


@_hf("deberta2")
def deberta2() -> Problem:
    config = _config("DebertaV2Config", **_SIZES, relative_attention=True, position_buckets=4,
                     pos_att_type=["c2p", "p2c"], norm_rel_ebd="layer_norm")  # fmt: skip
    return _masked(_model("DebertaV2ForMaskedLM", config))


@_hf("opt")
def opt() -> Problem:
    config = _config("OPTConfig", vocab_size=VOCABULARY, hidden_size=24, num_hidden_layers=2,
                     num_attention_heads=4, ffn_dim=40, max_position_embeddings=16,
                     word_embed_proj_dim=24)  # fmt: skip
    return _causal(_model("OPTForCausalLM", config))


@_hf("neox")
def neox() -> Problem:
    return _causal(_model("GPTNeoXForCausalLM", _config("GPTNeoXConfig", **_SIZES)))


@_hf("bloom")
def bloom() -> Problem:
    config = _config("BloomConfig", vocab_size=VOCABULARY, hidden_size=24, n_layer=2, n_head=4)
    return _causal(_model("BloomForCausalLM", config))


@_hf("mamba")
def mamba() -> Problem:
    config = _config("MambaConfig", vocab_size=VOCABULARY, hidden_size=24, num_hidden_layers=2,
                     state_size=4, time_step_rank=4)  # fmt: skip
    return _causal(_model("MambaForCausalLM", config))


@_hf("rwkv")
def rwkv() -> Problem:
    config = _config("RwkvConfig", vocab_size=VOCABULARY, hidden_size=24, num_hidden_layers=2,
                     attention_hidden_size=24, intermediate_size=40, context_length=16)  # fmt: skip
    return _causal(_model("RwkvForCausalLM", config))


def _deepseek(experts: str, dtype: torch.dtype = torch.float64) -> Problem:
    """Latent attention; shared and routed experts."""
    config = _config(
        "DeepseekV3Config", **_SIZES, num_key_value_heads=4, moe_intermediate_size=12,
        n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1, first_k_dense_replace=1,
        kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8,
        n_shared_experts=1,
    )  # fmt: skip
    config._experts_implementation = experts
    return _causal(_model("DeepseekV3ForCausalLM", config, dtype))


@_hf("deepseekv3", dtype=torch.float32)
def deepseekv3() -> Problem:
    return _deepseek("grouped_mm", torch.float32)


@_hf("deepseekv3-loop")
def deepseekv3_loop() -> Problem:
    return _deepseek("eager")


@_hf("t5")
def t5() -> Problem:
    """Encoder and decoder of different lengths; relative position biases."""
    config = _config("T5Config", vocab_size=VOCABULARY, d_model=24, d_kv=6, d_ff=40, num_layers=2,
                     num_heads=4)  # fmt: skip
    config.decoder_start_token_id = 0
    model = _model("T5ForConditionalGeneration", config)

    def losses(number: int) -> Tensor:
        source, target = _tokens(number, 9), _tokens(number + 10, 5)
        mask = torch.ones_like(source)
        mask[0, -3:] = 0
        given = torch.cat([torch.zeros(BATCH, 1, dtype=torch.long), target[:, :-1]], 1)
        logits = model(input_ids=source, attention_mask=mask, decoder_input_ids=given).logits
        return _token_losses(logits, target)

    return Problem(model, losses)


@_hf("whisper")
def whisper() -> Problem:
    config = _config(
        "WhisperConfig", vocab_size=VOCABULARY, d_model=24, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=40,
        decoder_ffn_dim=40, num_mel_bins=8, max_source_positions=12, max_target_positions=16,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    model = _model("WhisperForConditionalGeneration", config)

    def losses(number: int) -> Tensor:
        generator = torch.Generator().manual_seed(number)
        sound = torch.randn(BATCH, 8, 24, dtype=torch.float64, generator=generator)
        ids = _tokens(number, 6)
        logits = model(input_features=sound, decoder_input_ids=ids).logits
        return _token_losses(logits[:, :-1], ids[:, 1:])

    return Problem(model, losses)


@_hf("wav2vec2")
def wav2vec2() -> Problem:
    """Convolutions over raw sound, a weight-normalised positional convolution, CTC loss."""
    config = _config(
        "Wav2Vec2Config", **{**_SIZES, "vocab_size": 12}, conv_dim=(8, 8), conv_stride=(4, 2),
        conv_kernel=(8, 4), num_feat_extract_layers=2, num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=4,
    )  # fmt: skip
    model = _model("Wav2Vec2ForCTC", config)

    def losses(number: int) -> Tensor:
        generator = torch.Generator().manual_seed(number)
        sound = torch.randn(BATCH, 160, dtype=torch.float64, generator=generator)
        logits = model(input_values=sound).logits.log_softmax(-1).transpose(0, 1)
        steps = torch.full((BATCH,), logits.shape[0])
        targets = torch.randint(1, 12, (BATCH, 4), generator=generator)
        return F.ctc_loss(logits, targets, steps, torch.full((BATCH,), 4), reduction="none")

    return Problem(model, losses)


@_hf("clip-towers")
def clip_towers() -> Problem:
    """Text and image tower; the loss of a pair is its own distance, not a contrast with others."""
    text = {"vocab_size": VOCABULARY, "hidden_size": 24, "intermediate_size": 40,
            "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 16,
            "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}  # fmt: skip
    image = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
             "num_attention_heads": 4, "image_size": 16, "patch_size": 8}  # fmt: skip
    config = _config("CLIPConfig", text_config=text, vision_config=image, projection_dim=12)
    model = _model("CLIPModel", config)

    def losses(number: int) -> Tensor:
        generator = torch.Generator().manual_seed(number)
        pixels = torch.randn(BATCH, 3, 16, 16, dtype=torch.float64, generator=generator)
        ids = _tokens(number)
        ids[:, -1] = 2
        out = model(input_ids=ids, pixel_values=pixels)
        likeness = (out.text_embeds * out.image_embeds).sum(1) * model.logit_scale.exp()
        return F.softplus(-likeness)

    return Problem(model, losses)


def _peft(kind: str, **config: Any) -> Problem:
    """A Llama with adapters by peft: only these are trained."""
    import peft

    base = _model("LlamaForCausalLM", _config("LlamaConfig", **_SIZES, num_key_value_heads=2))
    model = peft.get_peft_model(base, getattr(peft, kind)(**config)).double().eval()
    return _causal(alive(model))


@architecture("hf-llama-lora-peft", "transformers", needs=("transformers", "peft"))
def llama_lora() -> Problem:
    """LoRA by peft: only the low-rank factors are trained."""
    targets = ["q_proj", "v_proj", "down_proj"]
    return _peft("LoraConfig", r=4, target_modules=targets, lora_dropout=0.1)


@architecture("hf-llama-dora-peft", "transformers", needs=("transformers", "peft"))
def llama_dora() -> Problem:
    """Low-rank additions whose sum with the weight is normalised; the head is trained whole."""
    return _peft("LoraConfig", r=4, target_modules=["q_proj", "down_proj"], use_dora=True,
                 modules_to_save=["lm_head"])  # fmt: skip


@architecture("hf-llama-oft-peft", "transformers", needs=("transformers", "peft"))
def llama_oft() -> Problem:
    """The weight times a learned orthogonal matrix, made of blocks."""
    return _peft("OFTConfig", oft_block_size=4, target_modules=["q_proj"])


@architecture("hf-llama-ia3-peft", "transformers", needs=("transformers", "peft"))
def llama_ia3() -> Problem:
    """Scales on keys and on the inside of the perceptrons."""
    return _peft("IA3Config", target_modules=["k_proj", "down_proj"],
                 feedforward_modules=["down_proj"])  # fmt: skip


@_hf("llama-checkpointed")
def llama_checkpointed() -> Problem:
    """Activation checkpointing as the trainer turns it on; in training mode, without dropout."""
    problem = llama()
    model = problem.params
    model.gradient_checkpointing_enable()
    model.train()
    return problem
