"""Influences as an explainer of quanda, so that its metrics and benchmarks run on them.

Owns: the face that quanda asks of an explainer, and how its tensors become queries.
Does not know: quanda itself, which takes whatever has this face; how influences are computed.
"""

from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any
from weakref import finalize

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from pergrad.attribution.curvature import curvature as estimated
from pergrad.attribution.fit import Fit
from pergrad.attribution.influence import influence
from pergrad.errors import UsageError
from pergrad.scans.job import Job

TASK = "image_classification"


def _losses(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def _outputs(model: nn.Module, batch: Any) -> Tensor:
    found: Tensor = model(batch[0])
    return found


class QuandaExplainer:
    """What quanda asks of an explainer, of `pergrad.influence`.

    Pass the class to quanda where it takes an `explainer_cls`, with its options as `expl_kwargs`;
    or an object's `explain` to its metrics. Classifiers whose items are pairs of an input and a
    class.

    Args:
        model: the model.
        train_dataset: pairs of an input and a class.
        task: "image_classification".
        checkpoints: a file of weights, or several, of which the last is loaded into the model.
        checkpoints_load_func: (model, file) loads them; by default a state dict of `torch.save`.
        losses: as of a `Job`. Default: cross entropy.
        curvature: the kind of a curvature, as in `pergrad.curvature`: "ekfac", "kfac", "shampoo" or
            "diagonal". None: without.
        folder: where the curvature is kept and gone on with. Default: none that stays.
        **options: of `pergrad.influence`: refine, damping, method, cosine, batch_size, ...

    Raises:
        UsageError: another task, or an argument is wrong.
        MissingExtraError: a package is missing; `pip install 'pergrad[attribution]'` brings it.

        >>> import torch, pergrad
        >>> data = [(torch.randn(4), i % 3) for i in range(20)]
        >>> explainer = pergrad.QuandaExplainer(torch.nn.Linear(4, 3), data, curvature="kfac")
        >>> explainer.explain(test_data=torch.randn(2, 4), targets=[0, 1]).shape
        torch.Size([2, 20])
    """

    accepted_tasks = (TASK,)

    def __init__(
        self,
        model: nn.Module,
        train_dataset: Any,
        task: str = TASK,
        checkpoints: str | Sequence[str] | None = None,
        checkpoints_load_func: Callable[[nn.Module, str], Any] | None = None,
        *,
        losses: Callable[[nn.Module, Any], Tensor] = _losses,
        curvature: Any = "ekfac",
        folder: str | PathLike[str] | None = None,
        **options: Any,
    ) -> None:
        if task != TASK:
            raise UsageError(
                f"task is {task!r}, and this explainer is for {TASK!r}: items of an input and a "
                "class. For texts call pergrad.influence, and pass its scores to quanda's metrics."
            )
        self.model, self.train_dataset, self.options = model, train_dataset, options
        self.device = next((str(p.device) for p in model.parameters()), "cpu")
        files = [checkpoints] if isinstance(checkpoints, str) else list(checkpoints or ())
        if files:
            (checkpoints_load_func or _load)(model, files[-1])
        self.job = Job(model, train_dataset, losses, outputs=_outputs)
        self._kind = curvature
        self._fit: Fit | None = None
        self.folder = Path(mkdtemp() if folder is None else folder)
        if folder is None:
            finalize(self, rmtree, self.folder, ignore_errors=True)

    @property
    def fit(self) -> Fit | None:
        """The curvature, estimated when it is first needed."""
        if self._fit is None and self._kind is not None:
            self._fit = estimated(
                self.job, self.folder / "curvature", kind=self._kind, progress=False
            )
        return self._fit

    def explain(self, test_data: Tensor, targets: Sequence[int] | Tensor) -> Tensor:
        """(Q, N): what each training example does for each test sample's class.

        Args:
            test_data: (Q, ...) inputs.
            targets: (Q,) the class whose loss is asked about.

        Raises:
            UsageError: they are something else, or their numbers differ.
        """
        if not isinstance(test_data, Tensor):
            raise UsageError(
                f"test_data is a {type(test_data).__name__}; pass a tensor of inputs (Q, ...)."
            )
        classes = torch.as_tensor(targets).cpu()
        if classes.shape != test_data.shape[:1]:
            raise UsageError(
                f"targets have the shape {tuple(classes.shape)}, for {len(test_data)} test "
                "samples. Pass one class for each."
            )
        queries = TensorDataset(test_data.detach().cpu(), classes)
        with TemporaryDirectory() as out:
            found = influence(
                self.job, queries, out, curvature=self.fit, **{"progress": False, **self.options}
            )
            return found.scores.to(self.device)

    def self_influence(self, batch_size: int = 32) -> Tensor:
        """(N,): what each training example does for itself.

        Cost: that of `explain` with every training example as a test sample.
        """
        found = []
        for first in range(0, len(self.train_dataset), batch_size):
            rows = range(first, min(first + batch_size, len(self.train_dataset)))
            few = [self.train_dataset[i] for i in rows]
            inputs, classes = torch.utils.data.default_collate(few)
            found.append(self.explain(inputs, classes)[:, rows.start : rows.stop].diagonal())
        return torch.cat(found)


def _load(model: nn.Module, file: str) -> None:
    model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
