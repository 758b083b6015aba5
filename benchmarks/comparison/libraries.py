"""Each library by its own documented recipe for per-example gradients or their norms.

A recipe takes a model, its input, the labels, and a folder for what it writes, and returns the
norms (B,), with the names of the parameters that they cover where the library itself says which.
The loss is cross entropy; where a library wants a mean or a sum, it gets that.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Result = tuple[Tensor, set[str] | None]
Recipe = Callable[[nn.Module, Tensor, Tensor, Path], Result]


def pergrad(model: nn.Module, x: Tensor, y: Tensor, folder: Path) -> Result:
    import pergrad

    return pergrad.norms(F.cross_entropy(model(x), y, reduction="none"), model), None


def opacus_hooks(model: nn.Module, x: Tensor, y: Tensor, folder: Path) -> Result:
    """README of `grad_sample`: `GradSampleModule(model)`, then `p.grad_sample`."""
    from opacus import GradSampleModule

    wrapped = GradSampleModule(model, loss_reduction="sum")
    F.cross_entropy(wrapped(x), y, reduction="sum").backward()
    rows = [p.grad_sample for p in wrapped.parameters() if p.requires_grad]
    return torch.stack([g.flatten(1).square().sum(1) for g in rows]).sum(0).sqrt(), None


def opacus_ghost(model: nn.Module, x: Tensor, y: Tensor, folder: Path) -> Result:
    """Tutorial "building text classifier with fast gradient clipping", without the optimizer."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    wrapped = GradSampleModuleFastGradientClipping(
        model, loss_reduction="mean", max_grad_norm=1.0, use_ghost_clipping=True
    )
    F.cross_entropy(wrapped(x), y).backward()
    return wrapped.get_norm_sample(), None


def backpack(model: nn.Module, x: Tensor, y: Tensor, folder: Path) -> Result:
    """Example "individual gradients": `extend` the model, `BatchL2Grad` in the backward pass."""
    from backpack import backpack, extend
    from backpack.extensions import BatchL2Grad

    model = extend(model)
    loss = extend(nn.CrossEntropyLoss(reduction="sum"))(model(x), y)
    with backpack(BatchL2Grad()):
        loss.backward()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    squares = {name: p.batch_l2 for name, p in named.items() if hasattr(p, "batch_l2")}
    if not squares:
        raise NotImplementedError("no parameter has batch_l2")
    return torch.stack(list(squares.values())).sum(0).sqrt(), set(squares)


def _captum(model: nn.Module, x: Tensor, y: Tensor, folder: Path, together: bool) -> Result:
    from captum.influence import TracInCP
    from torch.utils.data import TensorDataset

    file = folder / "checkpoint.pt"
    torch.save(model.state_dict(), file)

    def load(model: nn.Module, path: str) -> float:
        model.load_state_dict(torch.load(path))
        return 1.0

    tracin = TracInCP(
        model, TensorDataset(x, y), [str(file)], load, batch_size=len(x),
        loss_fn=nn.CrossEntropyLoss(reduction="sum" if together else "none"),
        sample_wise_grads_per_batch=together,
    )  # fmt: skip
    if not together:
        return tracin.self_influence((x, y)).sqrt(), None
    served = (nn.Linear, nn.Conv2d)  # says the documentation of `sample_wise_grads_per_batch`
    covered = {
        f"{name}.{leaf}"
        for name, module in model.named_modules() if type(module) in served
        for leaf, _ in module.named_parameters()
    }  # fmt: skip
    return tracin.self_influence((x, y)).sqrt(), covered


def captum_loop(model: nn.Module, x: Tensor, y: Tensor, folder: Path) -> Result:
    """Tutorial "TracIn": as by default, one backward pass for each example."""
    return _captum(model, x, y, folder, together=False)


def captum_together(model: nn.Module, x: Tensor, y: Tensor, folder: Path) -> Result:
    """The same with `sample_wise_grads_per_batch=True`, the faster way."""
    return _captum(model, x, y, folder, together=True)


def kronfluence(model: nn.Module, x: Tensor, y: Tensor, folder: Path) -> Result:
    """Example "uci": a Task, `prepare_model`, `compute_self_scores`; strategy "identity"."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments
    from kronfluence.task import Task
    from torch.utils.data import TensorDataset

    class Classification(Task):
        def compute_train_loss(self, batch: list, model: nn.Module, sample: bool = False) -> Tensor:
            return F.cross_entropy(model(batch[0]), batch[1], reduction="sum")

        def compute_measurement(self, batch: list, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

    task, names = Classification(), {name: id(p) for name, p in model.named_parameters()}
    model = prepare_model(model, task)
    analyzer = Analyzer(
        "case", model, task, cpu=True, output_dir=str(folder), disable_tqdm=True,
        disable_model_save=True,
    )  # fmt: skip
    data = TensorDataset(x, y)
    analyzer.fit_all_factors(
        "factors", data, per_device_batch_size=len(x), factor_args=FactorArguments("identity")
    )
    analyzer.compute_self_scores("scores", "factors", data, per_device_train_batch_size=len(x))
    from kronfluence.module.utils import get_tracked_module_names

    tracked = {
        id(p)
        for name in get_tracked_module_names(model)
        for p in model.get_submodule(name).parameters()
    }
    covered = {name for name, number in names.items() if number in tracked}
    scores = analyzer.load_self_scores("scores")
    return scores["all_modules"].float().sqrt(), covered


def dattri(model: nn.Module, x: Tensor, y: Tensor, folder: Path) -> Result:
    """README: `AttributionTask` and `TracInAttributor`; its random projection switched off."""
    from dattri.algorithm.tracin import TracInAttributor
    from dattri.task import AttributionTask
    from torch.func import functional_call
    from torch.utils.data import DataLoader, TensorDataset

    def loss(params: dict[str, Tensor], example: Sequence[Tensor]) -> Tensor:
        image, label = (t[None] for t in example)
        return F.cross_entropy(functional_call(model, params, image), label)

    task = AttributionTask(loss_func=loss, model=model, checkpoints=model.state_dict())
    attributor = TracInAttributor(task, weight_list=torch.ones(1), normalized_grad=False)
    attributor.projector_kwargs = None
    loader = DataLoader(TensorDataset(x, y), batch_size=len(x))
    return attributor.attribute(loader, loader).diagonal().sqrt(), None


def dattri_llm(model: nn.Module, x: Tensor, y: Tensor, folder: Path) -> Result:
    """README: `HookManager` around the backward pass, with its default configuration."""
    from dattri_llm import HookManager
    from dattri_llm.gradient.callbacks.capture_callback import CaptureCallback

    capture = CaptureCallback()
    with HookManager(model, callbacks=[capture]).collect(deregister_on_exit=True):
        F.cross_entropy(model(x), y, reduction="sum").backward()
    assert capture.record is not None, "nothing was captured"
    own = capture.record.gradient
    return own.similarity(own, reduce="all").diagonal().sqrt(), None


def bergson(model: nn.Module, x: Tensor, y: Tensor, folder: Path) -> Result:
    """`InMemoryCollector` around the backward pass, biases included, no projection."""
    from bergson import GradientProcessor, IndexConfig, InMemoryCollector
    from datasets import Dataset

    model.device = torch.device("cpu")  # it reads that of transformers' models
    collector = InMemoryCollector(
        model=model, data=Dataset.from_dict({"length": [1] * len(x)}),
        cfg=IndexConfig(run_path=str(folder), include_bias=True),
        processor=GradientProcessor(include_bias=True),
    )  # fmt: skip
    collector.setup()
    with collector:
        losses = F.cross_entropy(model(x), y, reduction="none")
        losses.sum().backward()
        collector.process_batch(list(range(len(x))), losses=losses)
    collector.teardown()
    rows = [g.float() for g in collector.gradients.values()]
    names = set()
    for name, (_, _, biased) in collector.target_info.items():
        names |= {f"{name}.weight"} | ({f"{name}.bias"} if biased else set())
    return torch.stack([g.square().sum(1) for g in rows]).sum(0).sqrt(), names


def torchjd(model: nn.Module, x: Tensor, y: Tensor, folder: Path) -> Result:
    """Example "IWRM with autogram": the Gramian of the losses; its diagonal."""
    from torchjd.autogram import Engine

    engine = Engine(model, batch_dim=0)
    losses = F.cross_entropy(model(x), y, reduction="none")
    return engine.compute_gramian(losses).diagonal().sqrt(), None


def vmap(model: nn.Module, x: Tensor, y: Tensor, folder: Path) -> Result:
    """torch's tutorial "per-sample gradients"."""
    from torch.func import functional_call, grad, vmap

    params = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(params: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, params, image[None]), label[None])

    rows = vmap(grad(loss), (None, 0, 0))(params, x, y)
    return torch.stack([g.flatten(1).square().sum(1) for g in rows.values()]).sum(0).sqrt(), None


LIBRARIES: dict[str, Recipe] = {
    "pergrad": pergrad,
    "Opacus, hooks": opacus_hooks,
    "Opacus, ghost": opacus_ghost,
    "BackPACK": backpack,
    "captum, loop": captum_loop,
    "captum, together": captum_together,
    "kronfluence": kronfluence,
    "dattri": dattri,
    "dattri-llm": dattri_llm,
    "bergson": bergson,
    "TorchJD": torchjd,
    "vmap": vmap,
}
