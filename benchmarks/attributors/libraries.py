"""Scores (Q, N) by each library, from fitting on: EK-FAC, and inner products ("identity").

EK-FAC with the labels of the data set, one damping of .1 x the mean eigenvalue for each layer, and
weight and bias as one block, in all of them. The peers leave out 1/N.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from attributors.workloads import Workload

DAMPING = 0.1


def pergrad(work: Workload, method: str, folder: Path) -> Tensor:
    """`curvature` and `influence`, of the parameters of the layers that all serve."""
    import pergrad

    named = dict(work.model.named_parameters())
    own = {n: p for n, p in named.items() if n.rpartition(".")[0] in work.layers}

    def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return work.losses(model, *batch)

    job = pergrad.Job(work.model, work.data, losses, params=own)
    size = {"batch_size": work.batch, "progress": False}
    if method == "identity":
        return pergrad.influence(job, work.queries, folder / "found", **size).scores
    fit = pergrad.curvature(job, folder / "fit", labels="given", damping=DAMPING, **size)
    found = pergrad.influence(job, work.queries, folder / "found", curvature=fit, refine=0, **size)
    return found.scores * len(work.data)


def kronfluence(work: Workload, method: str, folder: Path) -> Tensor:
    """README: a Task, `prepare_model`, `fit_all_factors`, `compute_pairwise_scores`."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    class Own(Task):
        def compute_train_loss(self, batch: list, model: nn.Module, sample: bool = False) -> Tensor:
            return work.losses(model, *batch).sum()

        def compute_measurement(self, batch: list, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return work.layers

    task = Own()
    if not hasattr(work.model, "prepared"):
        prepare_model(work.model, task)
        work.model.prepared = True
    analyzer = Analyzer(
        "bench", work.model, task, cpu=True, output_dir=str(folder), disable_tqdm=True,
        disable_model_save=True,
    )  # fmt: skip
    analyzer.fit_all_factors(
        "factors", work.data, per_device_batch_size=work.batch,
        factor_args=FactorArguments(method, use_empirical_fisher=True),
    )  # fmt: skip
    analyzer.compute_pairwise_scores(
        "scores", "factors", work.queries, work.data, per_device_query_batch_size=work.batch,
        per_device_train_batch_size=work.batch, score_args=ScoreArguments(damping_factor=None),
    )  # fmt: skip
    return analyzer.load_pairwise_scores("scores")["all_modules"].float()


class Named(torch.utils.data.Dataset):
    """Items as a dict, as its collator takes them."""

    def __init__(self, data: torch.utils.data.TensorDataset) -> None:
        self.x, self.y = data.tensors

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.x[i], "labels": self.y[i]}


def dattri_llm(work: Workload, method: str, folder: Path) -> Tensor:
    """README, "attribution on the fly": a task and an attributor."""
    from dattri_llm import (
        AttributionArguments,
        AttributionTask,
        EKFACAttributor,
        HookManagerConfig,
        TracInAttributor,
    )

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return work.losses(model, batch["input_ids"], batch["labels"]).sum()

    arguments = AttributionArguments(
        output_dir=str(folder), per_device_train_batch_size=work.batch,
        per_device_eval_batch_size=work.batch, use_cpu=True,
    )  # fmt: skip
    task = AttributionTask(loss, work.model)
    hooks = HookManagerConfig(hook_types=dict.fromkeys(work.layers, "linear_io"))
    data, queries = Named(work.data), Named(work.queries)
    if method == "identity":
        found = TracInAttributor(arguments, task=task).attribute(data, queries, hook_config=hooks)
    else:
        found = EKFACAttributor(arguments, task=task).attribute(
            data, queries, hook_config=hooks, damping=DAMPING, relative_damping=True
        )
    return found.agnostic_matrix()[1].mT


LIBRARIES = {"pergrad": pergrad, "kronfluence": kronfluence, "dattri-llm": dattri_llm}
