"""The loss of a head of transformers, taken apart: exact, or refused by the op's name.

Each loss is held against one forward pass for each example. `make integrations` installs
transformers and runs these.
"""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import naive
import pytest
import torch
from helpers import assert_agrees
from torch import Tensor, nn

import pergrad

pytestmark = [
    pytest.mark.integrations,
    pytest.mark.filterwarnings("ignore"),  # theirs
]

B, T, WORDS = 3, 7, 20
Batch = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def bert(head: str, **more: Any) -> nn.Module:
    import transformers as hf

    config = hf.BertConfig(
        vocab_size=WORDS, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=12, max_position_embeddings=16, pad_token_id=0, **more,
    )  # fmt: skip
    return getattr(hf, head)(config)


def gpt2(head: str, **more: Any) -> nn.Module:
    import transformers as hf

    config = hf.GPT2Config(
        vocab_size=WORDS, n_positions=16, n_embd=8, n_layer=1, n_head=2, bos_token_id=1,
        eos_token_id=1, pad_token_id=0, **more,
    )  # fmt: skip
    return getattr(hf, head)(config)


def decoder(name: str, **more: Any) -> nn.Module:
    import transformers as hf

    config = getattr(hf, f"{name}Config")(
        vocab_size=WORDS, hidden_size=8, intermediate_size=12, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16, head_dim=4,
        bos_token_id=1, eos_token_id=1, pad_token_id=0, **more,
    )  # fmt: skip
    return getattr(hf, f"{name}ForCausalLM")(config)


def seq2seq(name: str) -> nn.Module:
    import transformers as hf

    if name == "T5":
        config = hf.T5Config(vocab_size=WORDS, d_model=8, d_kv=4, d_ff=12, num_layers=1,
                             num_heads=2, decoder_start_token_id=0)  # fmt: skip
    else:
        config = hf.BartConfig(
            vocab_size=WORDS, d_model=8, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=12,
            decoder_ffn_dim=12, encoder_attention_heads=2, decoder_attention_heads=2,
            max_position_embeddings=16, pad_token_id=0, bos_token_id=1, eos_token_id=1,
            decoder_start_token_id=1, forced_eos_token_id=None,
        )  # fmt: skip
    return getattr(hf, f"{name}ForConditionalGeneration")(config)


def pictures(head: str) -> nn.Module:
    import transformers as hf

    if head.startswith("ViT"):
        config = hf.ViTConfig(
            image_size=8, patch_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=12, num_labels=4, encoder_stride=4,
        )  # fmt: skip
    elif head.startswith("Segformer"):
        config = hf.SegformerConfig(
            num_encoder_blocks=2, depths=[1, 1], sr_ratios=[1, 1], hidden_sizes=[8, 8],
            patch_sizes=[3, 3], strides=[2, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2],
            decoder_hidden_size=8, num_labels=4, reshape_last_stage=True,
        )  # fmt: skip
    else:
        config = hf.ConvNextConfig(
            num_stages=2, hidden_sizes=[8, 8], depths=[1, 1], patch_size=2, num_labels=4
        )
    return getattr(hf, head)(config)


def speech(head: str) -> nn.Module:
    import transformers as hf

    config = hf.Wav2Vec2Config(
        vocab_size=WORDS, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=12, conv_dim=(8, 8), conv_stride=(5, 2), conv_kernel=(10, 3),
        num_feat_extract_layers=2, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
        num_labels=4, pad_token_id=0, mask_time_prob=0.0, classifier_proj_size=8,
        feat_extract_norm="layer",
    )  # fmt: skip
    return getattr(hf, head)(config)


def ids(shape: tuple[int, ...] = (B, T)) -> Tensor:
    return torch.randint(2, WORDS, shape)


def masked(labels: Tensor) -> Tensor:
    """Examples of different lengths."""
    labels = labels.clone()
    for b in range(1, B):
        labels[b, labels.shape[1] - b :] = -100
    return labels


def text(**labels: Any) -> Batch:
    return {"input_ids": ids(), "attention_mask": torch.ones(B, T, dtype=torch.long), **labels}


def causal() -> Batch:
    batch = text()
    return batch | {"labels": masked(batch["input_ids"])}


def by_token(high: int = WORDS) -> Batch:
    return text(labels=masked(torch.randint(high, (B, T))))


def one_label(high: int = 4) -> Batch:
    return text(labels=torch.randint(high, (B,)))


def answers() -> Batch:
    return text(start_positions=torch.randint(T, (B,)), end_positions=torch.randint(T, (B,)))


def of_pictures(labels: Tensor | None = None) -> Batch:
    labels = torch.randint(4, (B,)) if labels is None else labels
    return {"pixel_values": torch.randn(B, 3, 8, 8), "labels": labels}


def equally(_: Batch) -> Tensor:
    return torch.ones(B)


def tokens(batch: Batch) -> Tensor:
    return (batch["labels"] != -100).sum(1)


def shifted(batch: Batch) -> Tensor:
    return (batch["labels"][:, 1:] != -100).sum(1)


Head = tuple[Callable[[], nn.Module], Callable[[], Batch], Callable[[Batch], Tensor], str]
HEADS: dict[str, Head] = {  # model, batch, an example's share of the loss, what `parts` says
    "GPT2LMHeadModel": (lambda: gpt2("GPT2LMHeadModel"), causal, shifted, ""),
    "LlamaForCausalLM": (lambda: decoder("Llama"), causal, shifted, ""),
    "MistralForCausalLM": (lambda: decoder("Mistral"), causal, shifted, ""),
    "Qwen3ForCausalLM": (lambda: decoder("Qwen3"), causal, shifted, ""),
    "GemmaForCausalLM": (lambda: decoder("Gemma"), causal, shifted, ""),
    "GPT2ForSequenceClassification": (
        lambda: gpt2("GPT2ForSequenceClassification", num_labels=4), one_label, equally, ""
    ),
    "GPT2ForTokenClassification": (
        lambda: gpt2("GPT2ForTokenClassification", num_labels=4), lambda: by_token(4), tokens, ""
    ),
    "T5ForConditionalGeneration": (lambda: seq2seq("T5"), by_token, tokens, ""),
    "BartForConditionalGeneration": (lambda: seq2seq("Bart"), by_token, tokens, ""),
    "BertForMaskedLM": (lambda: bert("BertForMaskedLM"), by_token, tokens, ""),
    "BertForSequenceClassification": (
        lambda: bert("BertForSequenceClassification", num_labels=4), one_label, equally, ""
    ),
    "BertForSequenceClassification, regression": (
        lambda: bert("BertForSequenceClassification", num_labels=1),
        lambda: text(labels=torch.randn(B)), equally, "",
    ),
    "BertForSequenceClassification, several labels": (
        lambda: bert("BertForSequenceClassification", num_labels=4,
                     problem_type="multi_label_classification"),
        lambda: text(labels=torch.randint(2, (B, 4)).float()), equally, "",
    ),
    "BertForTokenClassification": (
        lambda: bert("BertForTokenClassification", num_labels=4), lambda: by_token(4), tokens, ""
    ),
    "BertForQuestionAnswering": (lambda: bert("BertForQuestionAnswering"), answers, equally, ""),
    "BertForMultipleChoice": (
        lambda: bert("BertForMultipleChoice"),
        lambda: {"input_ids": ids((B, 4, T)), "labels": torch.randint(4, (B,))}, equally, "",
    ),
    "BertForNextSentencePrediction": (
        lambda: bert("BertForNextSentencePrediction"), lambda: one_label(2), equally, ""
    ),
    "ViTForImageClassification": (
        lambda: pictures("ViTForImageClassification"), of_pictures, equally, ""
    ),
    "ConvNextForImageClassification": (
        lambda: pictures("ConvNextForImageClassification"), of_pictures, equally, ""
    ),
    "SegformerForSemanticSegmentation": (
        lambda: pictures("SegformerForSemanticSegmentation"),
        lambda: of_pictures(torch.randint(4, (B, 8, 8))), equally, "",
    ),
    "Wav2Vec2ForSequenceClassification": (
        lambda: speech("Wav2Vec2ForSequenceClassification"),
        lambda: {"input_values": torch.randn(B, 120), "labels": torch.randint(4, (B,))},
        equally, "",
    ),
    "Wav2Vec2ForCTC": (
        lambda: speech("Wav2Vec2ForCTC"),
        lambda: {"input_values": torch.randn(B, 120), "labels": torch.randint(1, WORDS, (B, 2))},
        lambda batch: torch.ones(B), "`sum`",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADS)
def test_heads(name: str) -> None:
    build, drawn, share, refused = HEADS[name]
    torch.manual_seed(0)
    model = build().double().eval()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in drawn().items()}
    each = [model(**{k: v[b : b + 1] for k, v in batch.items()}).loss for b in range(B)]
    weights = share(batch).double()
    sums = name.endswith("CTC") and model.config.ctc_loss_reduction == "sum"
    losses = torch.stack(each) * (1 if sums else weights / weights.sum())
    norms = naive.norms(naive.loop_grads(losses, model))
    loss = model(**batch).loss
    tolerance = 1e-9 if loss.dtype == torch.float64 else 1e-5  # some heads cast logits to float32
    assert_agrees(loss, losses.sum(), 1.0, tolerance, name)
    if refused:
        with pytest.raises(pergrad.UnsupportedError, match=refused):
            pergrad.parts(loss, B)
    else:
        assert_agrees(pergrad.parts(loss, B), losses, losses.abs(), tolerance, name)
    with pergrad.reading(loss, model, B) as read:
        loss.backward()
    assert_agrees(read.norms, norms, norms, tolerance, name)
