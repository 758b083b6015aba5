"""Wrong input is an error that names the remedy, or has the value that is stated for it."""

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator

import naive
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import zoo
from helpers import assert_agrees
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

import pergrad
from pergrad.precondition import Diagonal, Kronecker

VERBS: dict[str, Callable] = {
    "norms": pergrad.norms,
    "norms_by_parameter": pergrad.norms_by_parameter,
    "gram": pergrad.gram,
    "gradients": pergrad.gradients,
    "backward": pergrad.backward,
    "explain": pergrad.explain,
    "check": pergrad.check,
    "dots": lambda losses, params, **more: pergrad.dots(
        losses, params, against=[p.detach() for p in naive.named(params).values()], **more
    ),
}
EACH_VERB = pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
B = 3


@pytest.fixture(autouse=True)
def _settled() -> Iterator[None]:
    with zoo.settled(0):
        yield


@pytest.fixture
def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))


def losses_of(model: nn.Module) -> Tensor:
    return model(torch.randn(B, 4)).square().sum(1)


def refused(match: str, error: type[Exception] = pergrad.UsageError):
    return pytest.raises(error, match=match)


# -- losses ----------------------------------------------------------------------------------------


@EACH_VERB
def test_scalar_loss(verb: Callable, model: nn.Module) -> None:
    with refused(r'scalar(.|\n)*reduction="none"'):
        verb(losses_of(model).mean(), model)


@EACH_VERB
def test_two_dimensional_loss(verb: Callable, model: nn.Module) -> None:
    with refused(r"\(3, 2\)(.|\n)*(mean|sum)"):
        verb(model(torch.randn(B, 4)), model)


@EACH_VERB
def test_loss_without_graph(verb: Callable, model: nn.Module) -> None:
    for losses in (losses_of(model).detach(), torch.ones(B)):
        with refused(r"no graph(.|\n)*(no_grad|detach)"):
            verb(losses, model)
    with torch.no_grad():
        losses = losses_of(model)
    with refused(r"no graph(.|\n)*no_grad"):
        verb(losses, model)


@EACH_VERB
def test_loss_that_is_no_tensor(verb: Callable, model: nn.Module) -> None:
    for losses in ([1.0, 2.0], None, 3.0, [torch.ones(())]):
        with refused(r"`losses` is a \w+(.|\n)*one loss per example"):
            verb(losses, model)


@EACH_VERB
def test_complex_loss(verb: Callable, model: nn.Module) -> None:
    with refused(r"complex"):
        verb(losses_of(model) * 1j, model)


@EACH_VERB
def test_freed_graph(verb: Callable, model: nn.Module) -> None:
    losses = losses_of(model)
    losses.sum().backward()
    model.zero_grad()
    with refused(r"freed(.|\n)*retain_graph=True"):
        verb(losses, model)


@pytest.mark.parametrize("measured", [False, True])
def test_freed_graph_whose_plan_is_known_by_its_numbers(measured: bool) -> None:
    """They are asked for before anything else is."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    places = torch.randperm(5)

    def losses() -> torch.Tensor:
        out = model(torch.randn(5, 4))[places]
        if measured:
            out = torch.zeros_like(out).index_put((torch.arange(5),), out)
        return out.square().sum(1)

    pergrad.norms(losses(), model)
    for _ in range(2):
        again = losses()
        pergrad.norms(again, model)
        with refused(r"freed(.|\n)*retain_graph=True"):
            pergrad.norms(again, model)


def test_graph_freed_by_pergrad(model: nn.Module) -> None:
    losses = losses_of(model)
    pergrad.norms(losses, model)
    with refused(r"freed(.|\n)*retain_graph=True"):
        pergrad.gram(losses, model)


# -- parameters ------------------------------------------------------------------------------------


@EACH_VERB
def test_no_parameter_that_requires_grad(verb: Callable, model: nn.Module) -> None:
    losses = losses_of(model)
    frozen = nn.Linear(4, 2).requires_grad_(False)
    for params in (frozen, dict(frozen.named_parameters()), list(frozen.parameters()), {}, []):
        with refused(r"[Nn]one of the parameters requires grad(.|\n)*requires_grad_\("):
            verb(losses, params)


def test_parameters_that_are_no_tensors(model: nn.Module) -> None:
    for params in (3, None):
        with refused(r"`params`(.|\n)*model"):
            pergrad.norms(losses_of(model), params)
    for params in ([1.0], {"w": "weight"}):
        with refused(r"not a tensor"):
            pergrad.norms(losses_of(model), params)
    with refused(r"dict\(model\.named_parameters\(\)\)"):
        pergrad.norms(losses_of(model), model.named_parameters())


def test_unreached_parameter(model: nn.Module) -> None:
    """Norm 0, and explain says so."""
    both = nn.ModuleDict({"model": model, "other": nn.Linear(4, 2)})
    parts = pergrad.norms_by_parameter(losses_of(model), both)
    assert torch.equal(parts["other.weight"], torch.zeros(B))
    assert torch.equal(parts["other.bias"], torch.zeros(B))
    coverage = pergrad.explain(losses_of(model), both)
    assert {r.parameter for r in coverage.rows if r.how == "unreached"} == {
        "other.weight",
        "other.bias",
    }
    assert "unreached" in str(coverage)
    reached = sum(p.numel() for p in model.parameters())
    assert coverage.exact_share == reached / (reached + 10)
    assert coverage.unreached_share == 10 / (reached + 10)
    assert "% reached by no loss" in str(coverage)
    assert "No loss reaches `other.weight`, `other.bias`: gradients of 0." in str(coverage)
    J = pergrad.gradients(losses_of(model), both)
    assert torch.equal(J.dense()["other.weight"], torch.zeros(B, 2, 4))
    pergrad.backward(losses_of(model), both)
    grad = both["other"].weight.grad
    assert grad is None or not grad.any()


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
@pytest.mark.parametrize("what", ["another", "copy", "average"])
def test_reached_by_nothing(model: nn.Module, verb: Callable, what: str) -> None:
    other = {
        "another": lambda: nn.Linear(4, 2),
        "copy": lambda: copy.deepcopy(model),
        "average": lambda: torch.optim.swa_utils.AveragedModel(model),
    }[what]()
    with refused(r"reach none of the parameters \(`.*(.|\n)*Pass the very tensors"):
        verb(losses_of(model), other)
    with refused(r"reach none of the parameters"):
        pergrad.check(losses_of(model), other)


def test_reached_by_some_examples_alone() -> None:
    w, v, x = (nn.Parameter(torch.randn(3)) for _ in range(3))
    losses = torch.stack([(x * w).sum(), x.sum(), (x * v).sum()])
    assert torch.equal(pergrad.norms(losses, [v]).sign(), torch.tensor([0.0, 0.0, 1.0]))


def test_parameter_that_is_no_leaf(model: nn.Module) -> None:
    """Gradients of an intermediate tensor can be had, but it has no .grad to add to."""
    hidden = model[0](torch.randn(B, 4))
    losses = model[2](model[1](hidden)).square().sum(1)
    with refused(r"leaf"):
        pergrad.backward(losses, [hidden])


# -- values that are not finite --------------------------------------------------------------------

POISONED = [
    "mlp_squared_error", "linear_3d", "linear_sequence_major", "gpt_masked_mean", "embedding",
    "transformer_block", "layer_norm_3d", "rms_norm", "group_norm", "batch_norm_eval", "conv2d",
    "broadcast_arithmetic", "position_parameter", "vision_transformer", "tied_autoencoder",
    "unrolled_cell", "permuted_losses", "weight_norm", "bmm_per_head", "prelu", "layer_scale",
    "custom_with_weight", "mixture_of_experts", "einsum_forms", "distance_to_prototypes",
]  # fmt: skip


POISONED_INPUT = [
    "mlp", "linear_3d", "transformer_block", "conv2d", "layer_norm_3d", "linear_sequence_major",
    "rms_norm_by_hand", "unrolled_cell", "lstm", "multihead_batch_first",
]  # fmt: skip


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("name", POISONED)
def test_one_loss_is_not_finite(name: str, value: float) -> None:
    """Its values are not finite, the others' are right, also where the fallback serves."""
    run = zoo.CASES[name].run(B)
    assert_others_right(run, run.losses * torch.tensor([1.0, value, 1.0]))


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("name", POISONED_INPUT)
def test_one_input_is_not_finite(name: str, value: float) -> None:
    """Likewise, where rules serve. (The fallback runs an op on what all examples put in.)"""
    case = zoo.CASES[name]

    def poisoned(batch: int) -> tuple:
        params, forward, data = case.build(batch)
        data[0][1].view(-1)[0] = value
        return params, forward, data

    broken = zoo.Case(name, poisoned, case.batch, case.mixes, case.deterministic, case.rule)
    run = broken.run(B)
    assert_others_right(run, run.losses)


def assert_others_right(run: zoo.Run, losses: Tensor) -> None:
    """The judge is the loop on sound data: on these, its own weight gradients are 0 * NaN."""
    G, bad = zoo.reference(run.case.name, B), 1
    norms, good = naive.norms(G), torch.arange(B) != bad
    assert not naive.norms(naive.loop_grads(losses, run.params))[bad].isfinite()
    assert losses[good].isfinite().all()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pergrad.FallbackWarning)
        got = pergrad.norms(losses, run.params, retain_graph=True)
        gram = pergrad.gram(losses, run.params, retain_graph=True)
        J = pergrad.gradients(losses, run.params, retain_graph=True)
    assert not got[bad].isfinite()
    assert_agrees(got[good], norms[good], norms[good], what="norms")
    want = naive.gram(G)
    assert not gram[bad].isfinite().any()
    assert not gram[:, bad].isfinite().any()
    scale = norms[good][:, None] * norms[good]
    assert_agrees(gram[good][:, good], want[good][:, good], scale, what="gram")
    v = torch.ones(J.shape[1])
    assert_agrees((J @ v)[good], (naive.flat(G) @ v)[good], norms[good] * v.norm(), what="J @ v")
    assert_agrees(J[good].gram(), want[good][:, good], scale, what="rows")


# -- directions, weights, matrices -----------------------------------------------------------------


def test_direction_of_wrong_shape(model: nn.Module) -> None:
    named = dict(model.named_parameters())
    total = sum(p.numel() for p in named.values())
    J = pergrad.gradients(losses_of(model), model)
    wrong: list[tuple[object, str]] = [
        (torch.ones(total + 1), rf"\({total + 1},\)(.|\n)*{total}"),
        (torch.ones(1, total), rf"\(1, {total}\)(.|\n)*{total}"),
        ({**named, "0.weight": torch.ones(4, 5)}, r"\(4, 5\)(.|\n)*0\.weight(.|\n)*\(5, 4\)"),
        ({**named, "more": torch.ones(2)}, r"more"),
        ({n: p for n, p in named.items() if n != "2.bias"}, r"[Mm]issing(.|\n)*2\.bias"),
        (list(named.values())[1:], r"3 tensors(.|\n)*4"),
        ([p.t() for p in named.values()], r"0\.weight(.|\n)*\(5, 4\)"),
        ({**named, "0.bias": 1.0}, r"0\.bias"),
    ]
    for direction, match in wrong:
        with refused(match):
            pergrad.dots(losses_of(model), model, against=direction)
        with refused(match):
            J @ direction
    with refused(r"(int|floating)"):
        pergrad.dots(losses_of(model), model, against=torch.ones(total, dtype=torch.long))


def test_direction_that_is_a_shell(model: nn.Module) -> None:
    v = {n: p.detach() for n, p in model.named_parameters()}
    v["2.bias"] = TwoTensor(v["2.bias"], v["2.bias"])
    with refused(r"TwoTensor(.|\n)*2\.bias(.|\n)*full_tensor"):
        pergrad.dots(losses_of(model), model, against=v)


def test_weights(model: nn.Module) -> None:
    wrong: list[tuple[object, str]] = [
        (torch.ones(B, dtype=torch.long), r"int64(.|\n)*float"),
        (torch.ones(B, dtype=torch.bool), r"bool(.|\n)*float"),
        (torch.ones(B + 1), r"\(4,\)(.|\n)*\(3,\)"),
        (torch.ones(B, 1), r"\(3, 1\)(.|\n)*\(3,\)"),
        (torch.tensor(2.0), r"\(\)(.|\n)*\(3,\)"),
        (True, r"bool(.|\n)*number"),
        (["1", "2", "3"], r"list(.|\n)*tensor"),
        ([1.0, 2.0], r"\(2,\)(.|\n)*\(3,\)"),
        (np.ones(B, int), r"int64(.|\n)*astype\(float\)"),
        (lambda norms: norms[:2], r"\(2,\)(.|\n)*\(3,\)"),
        (lambda norms: (norms > 0).long(), r"int64(.|\n)*float"),
        (lambda norms: 1.0, r"float(.|\n)*tensor"),
    ]
    for weights, match in wrong:
        with refused(match):
            pergrad.backward(losses_of(model), model, weights=weights)
        assert all(p.grad is None for p in model.parameters())


def test_weights_of_squares(model: nn.Module) -> None:
    wrong: list[tuple[object, str]] = [
        (torch.ones(B, dtype=torch.long), r"int64(.|\n)*weights\.float"),
        (torch.ones(B + 1), r"\(4,\)(.|\n)*one weight per example, shape \(3,\)"),
        (torch.tensor(2.0), r"\(\)(.|\n)*one weight per example"),
        (torch.ones(B, device="meta"), r"meta(.|\n)*weights\.to\("),
        (True, r"bool(.|\n)*Pass a tensor \(B,\), or as many numbers, or one number"),
        (["1", "2", "3"], r"list(.|\n)*Pass a tensor \(B,\)"),
        (pergrad.clip(1.0), r"Clip(.|\n)*Pass a tensor \(B,\)"),
    ]
    J = pergrad.gradients(losses_of(model), model)
    for weights, match in wrong:
        with refused(match):
            pergrad.second_moments(losses_of(model), model, weights)
        with refused(match):
            J.second_moment(weights)
    with refused(r"Unknown option mean(.|\n)*retain_graph"):
        pergrad.second_moments(losses_of(model), model, mean=True)


@pytest.mark.parametrize("max_norm", [0, -1.0, float("nan"), "1", None])
def test_clip(max_norm: object) -> None:
    with refused(r"positive"):
        pergrad.clip(max_norm)


@pytest.mark.parametrize("quantile", [0, 1.0, -0.5, float("nan"), "half", True])
def test_quantile(quantile: object) -> None:
    with refused(r"quantile(.|\n)*between 0 and 1"):
        pergrad.clip(quantile=quantile)


def test_clip_by(model: nn.Module) -> None:
    with refused(r"either max_norm"):
        pergrad.clip(1.0, quantile=0.5)
    with refused(r"by(.|\n)*layer"):
        pergrad.clip(1.0, by="module")
    with refused(r"leave out by"):
        pergrad.clip(quantile=0.5, by="layer")
    with refused(r"pergrad\.backward"):
        pergrad.clip(1.0, by="layer")(torch.ones(3))


def test_matrices_that_do_not_match(model: nn.Module) -> None:
    """The error lists what differs."""
    other = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2), nn.Linear(2, 2))
    J = pergrad.gradients(losses_of(model), model)
    K = pergrad.gradients(losses_of(other), other)
    for product in (
        lambda: J @ K.T,
        lambda: J.row_dots(K),
        lambda: J.cosines(K),
        lambda: pergrad.dots(losses_of(model), model, against=K),
    ):
        with refused(r"3\.weight(.|\n)*0\.weight(.|\n)*\(5, 4\)(.|\n)*\(6, 4\)"):
            product()
    one = pergrad.gradients(losses_of(model), model[2])
    with refused(r"0\.weight"):
        J @ one.T


def test_rows_that_do_not_match(model: nn.Module) -> None:
    J = pergrad.gradients(losses_of(model), model)
    with refused(r"3(.|\n)*2(.|\n)*K\.T"):
        J.row_dots(J[:2])
    for wrong in (lambda: J @ J, lambda: J.T @ J, lambda: J.T @ J.T):
        with refused(r"J @ K\.T"):
            wrong()
    for c in (torch.ones(B + 1), torch.ones(B + 1, 1), torch.ones(1, B, 1), 1.0):
        with refused(r"\(3,\)"):
            J.T @ c
    for c in (torch.ones(B + 1), torch.ones(B, 1), 1.0):
        with refused(r"\(3,\)"):
            J.scale(c)
    with refused(r"float"):
        J.T @ torch.ones(B, dtype=torch.long)


def test_indices_out_of_range(model: nn.Module) -> None:
    J = pergrad.gradients(losses_of(model), model)
    for index in (3, -4, [0, 3], torch.tensor([-4])):
        with pytest.raises(IndexError, match=r"3 rows"):
            J[index]
    with refused(r"mask(.|\n)*2(.|\n)*3"):
        J[torch.tensor([True, False])]
    for index in ((0, 1), torch.tensor([0.5]), "0"):
        with pytest.raises((pergrad.UsageError, TypeError)):
            J[index]


def test_preconditioners_that_do_not_fit(model: nn.Module) -> None:
    J = pergrad.gradients(losses_of(model), model)
    wrong: list[tuple[object, str]] = [
        (Diagonal({"0.weight": torch.ones(4, 5)}), r"\(4, 5\)(.|\n)*0\.weight(.|\n)*\(5, 4\)"),
        (Diagonal({"0.weight": 2.0}), r"0\.weight"),
        (Diagonal({"nowhere": torch.ones(4)}), r"nowhere"),
        (Kronecker({"0.weight": (torch.eye(5), torch.eye(5))}), r"A(.|\n)*\(5, 5\)(.|\n)*\(4, 4\)"),
        (Kronecker({"0.weight": (torch.eye(4), torch.ones(4))}), r"S(.|\n)*\(4,\)(.|\n)*\(5,\)"),
        (Kronecker({"0.weight": torch.eye(4)}), r"pair"),
        (Kronecker({"nowhere": (1.0, 1.0)}), r"nowhere"),
        (torch.eye(3), r"Diagonal(.|\n)*Kronecker"),
    ]
    for P, match in wrong:
        with refused(match):
            J.precondition(P)


def test_other_devices(model: nn.Module) -> None:
    """The device without memory stands for any other."""
    J = pergrad.gradients(losses_of(model), model)
    for product in (
        lambda: J @ J.to("meta").T,
        lambda: J.to("meta") @ J.T,
        lambda: J.row_dots(J.to("meta")),
        lambda: pergrad.dots(losses_of(model), model, against=J.to("meta")),
    ):
        with refused(r"meta(.|\n)*\.to\("):
            product()
    named = {n: p.detach().to("meta") for n, p in model.named_parameters()}
    flat = torch.cat([p.flatten() for p in named.values()])
    for v in (named, flat):
        with refused(r"direction(.|\n)*meta(.|\n)*\.to\("):
            pergrad.dots(losses_of(model), model, against=v)
        with refused(r"direction(.|\n)*meta(.|\n)*\.to\("):
            J @ v
    with refused(r"weights(.|\n)*meta(.|\n)*weights\.to\("):
        pergrad.backward(losses_of(model), model, weights=torch.ones(B, device="meta"))


# -- options ---------------------------------------------------------------------------------------


@EACH_VERB
def test_option_values(verb: Callable, model: nn.Module) -> None:
    wrong = [
        ({"on_mixing": "warn"}, r'on_mixing(.|\n)*"raise"(.|\n)*"exact"'),
        ({"check_layout": "sometimes"}, r'"once"(.|\n)*"always"(.|\n)*"never"'),
        ({"check_layout": True}, r'"once"(.|\n)*"always"(.|\n)*"never"'),
        ({"chunk_bytes": 0}, r"chunk_bytes(.|\n)*positive"),
        ({"chunk_bytes": -5}, r"chunk_bytes(.|\n)*positive"),
        ({"chunk_bytes": "1MB"}, r"chunk_bytes(.|\n)*positive"),
    ]
    if verb is VERBS["explain"]:
        del wrong[0]  # explain shows what mixes, whatever the policy
    for options, match in wrong:
        with refused(match):
            verb(losses_of(model), model, **options)
    with pytest.raises((TypeError, pergrad.UsageError), match="retain_grap"):
        verb(losses_of(model), model, retain_grap=True)


def test_backward_is_not_differentiable(model: nn.Module) -> None:
    with refused(r"create_graph(.|\n)*|gradients"):
        pergrad.backward(losses_of(model), model, create_graph=True)


def test_options_of_check(model: nn.Module) -> None:
    for examples in (0, -1, 1.5, "all"):
        with refused(r"examples"):
            pergrad.check(losses_of(model), model, examples=examples)
    for rerun in (lambda i: 1.0, lambda i: losses_of(model), lambda i: torch.ones(())):
        with refused(r"rerun(.|\n)*alone"):
            pergrad.check(losses_of(model), model, rerun=rerun)


def test_reentrant_checkpoints_are_refused(model: nn.Module) -> None:
    x = torch.randn(B, 4, requires_grad=True)
    losses = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=True).square().sum(1)
    with refused(r"use_reentrant=False", pergrad.UnsupportedError):
        pergrad.norms(losses, model)


# -- tensors changed in place ----------------------------------------------------------------------


def test_saved_tensor_changed_before_the_call() -> None:
    """Inputs, outputs and weights that the backward pass needs."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Sigmoid(), nn.Linear(5, 2))

    def change(what: str) -> Tensor:
        x = torch.randn(B, 4)
        h = model[1](model[0](x))
        losses = model[2](h).square().sum(1)
        with torch.no_grad():
            {"input": x, "hidden": h, "weight": model[2].weight}[what].add_(1.0)
        return losses

    for what in ("input", "hidden", "weight"):
        for verb in (pergrad.norms, pergrad.gradients, pergrad.backward):
            with refused(r"in.?place"):
                verb(change(what), model)


CHANGED = {
    "mlp", "gpt_tied", "conv2d", "weight_norm", "lora_merged", "embedding", "layer_norm_3d",
    "mixture_of_experts", "lstm", "custom_with_weight", "encoder_and_decoder", "checkpointed",
}  # fmt: skip


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=name, marks=() if name in CHANGED else pytest.mark.slow)
     for name, case in zoo.CASES.items() if case.mixes == "no"],
)  # fmt: skip
def test_any_tensor_changed_before_the_call(case: zoo.Case) -> None:
    """An error, or the numbers of the tensors as they were: the gradient may not need it."""
    number = 0
    while True:
        params, forward, data, *_ = case.build(B)
        tensors = [*naive.named(params).values(), *data]
        if number >= len(tensors):
            return
        losses, changed = forward(*data), tensors[number]
        number += 1
        truth = naive.norms(naive.loop_grads(losses, params))
        with torch.no_grad():
            if changed.is_floating_point():
                changed.mul_(1.5).add_(0.1)
            elif changed.dim():
                changed.copy_(changed.roll(1, 0))
        if case.name.startswith("checkpointed") and changed.is_floating_point():
            # The block runs again, on what is there now; torch cannot tell, nor can pergrad.
            with contextlib.suppress(RuntimeError):
                truth = naive.norms(naive.loop_grads(losses, params))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", pergrad.FallbackWarning)
            error = ""
            try:
                norms = pergrad.norms(losses, params, retain_graph=True)
            except pergrad.UsageError as raised:
                error = str(raised)
        if error:
            assert "in place" in error
        else:
            assert_agrees(norms, truth, truth)


def test_saved_tensor_changed_after_gradients(model: nn.Module) -> None:
    x = torch.randn(B, 4)
    J = pergrad.gradients(model(x).square().sum(1), model)
    K = pergrad.gradients(losses_of(model), model)
    x.add_(1.0)
    uses: list[Callable[[], object]] = [
        J.norms, J.norms_by_parameter, J.gram, J.dense, J.flat, lambda: J @ K.T, lambda: K @ J.T,
        lambda: J.row_dots(K), lambda: K.row_dots(J), lambda: J.cosines(K), lambda: J[0],
        lambda: J.T @ torch.ones(B), lambda: J @ torch.ones(J.shape[1]), J.detach,
        lambda: J.scale(torch.ones(B)), lambda: J.precondition(Diagonal({})),
        lambda: J.to(torch.float32), lambda: pergrad.dots(losses_of(model), model, against=J),
    ]  # fmt: skip
    for use in uses:
        with refused(r"in.?place(.|\n)*clone"):
            use()
    assert K.norms().isfinite().all()


STEPPED = [
    "mlp", "gpt_tied", "conv2d", "weight_norm", "lora_merged", "called_twice", "layer_norm_3d",
    "weight_decay_term", "functions_of_weights", "latents_per_example", "elementwise_of_two",
    "unrolled_cell", "distance_to_prototypes", "custom_with_weight", "table_of_a_function",
]  # fmt: skip


@pytest.mark.parametrize("name", STEPPED)
def test_an_optimizer_step_after_gradients_changes_nothing(name: str) -> None:
    """A matrix is that of the weights at the time of the forward pass."""
    run, G = zoo.CASES[name].run(B), zoo.reference(name, B)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pergrad.FallbackWarning)
        J = pergrad.gradients(run.losses, run.params)
    with torch.no_grad():
        for p in run.named.values():
            p.mul_(0.5).add_(1.0)
    norms = naive.norms(G)
    assert_agrees(J.norms(), norms, norms, what="norms")
    assert_agrees(J.gram(), naive.gram(G), norms[:, None] * norms, what="gram")
    assert_agrees(J.flat(), naive.flat(G), norms[:, None], what="flat")


def test_cross_entropy_with_its_default_reduction(model: nn.Module) -> None:
    """The commonest mistake of all."""
    loss = F.cross_entropy(model(torch.randn(B, 4)), torch.zeros(B, dtype=torch.long))
    with refused(r'reduction="none"'):
        pergrad.norms(loss, model)


def test_a_row_is_no_name(model: nn.Module) -> None:
    J = pergrad.gradients(losses_of(model), model)
    for wrong in ("0.weight", 1.5, torch.ones(2, 2)):
        with refused(r"indexed by row(.|\n)*J\.dense\(\)"):
            J[wrong]
    assert J[[]].shape == (0, J.shape[1])


class TwiceUsed(nn.Module):
    """One layer used twice: its first factor waits for the second."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(6, 6)
        self.own = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.shared(self.own(self.shared(x)).tanh()).tanh().sum(1)


OVERWRITTEN = r"`shared\.weight` .*overwritten during the backward pass(.|\n)*Return a new tensor"


@pytest.mark.parametrize(
    "verb",
    [
        pergrad.norms,
        pergrad.gram,
        pergrad.gradients,
        lambda losses, model: pergrad.backward(losses, model, weights=pergrad.clip(1.0)),
    ],
)
def test_an_unpack_hook_that_returns_the_same_memory_again(verb: Callable) -> None:
    model, room = TwiceUsed(), torch.empty(4, 6)

    def unpack(saved: Tensor) -> Tensor:
        return room.copy_(saved) if saved.shape == room.shape else saved

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), unpack):
        losses = model(torch.randn(4, 6))
    with pytest.raises(pergrad.UsageError, match=OVERWRITTEN):
        verb(losses, model)


def test_an_unpack_hook_that_returns_the_same_memory_again_for_parameters_used_once() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)).double()
    x, room = torch.randn(4, 6, dtype=torch.float64), torch.empty(4, 6, dtype=torch.float64)

    def unpack(saved: Tensor) -> Tensor:
        return room.copy_(saved) if saved.shape == room.shape else saved

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), unpack):
        losses = model(x).square().sum(1)
    want = naive.norms(naive.loop_grads(model(x).square().sum(1), model))
    assert_agrees(pergrad.norms(losses, model), want, want)


@pytest.mark.parametrize("verb", [pergrad.gradients, pergrad.backward])
def test_a_hook_that_changes_a_gradient_in_place(verb: Callable) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))
    x = torch.randn(5, 3)
    seen: list[Tensor] = []
    z = model[0](x)
    out = model[1](z)
    out.register_hook(seen.append)

    def change(g: Tensor) -> None:
        seen[0].mul_(2)

    z.register_hook(change)
    with pytest.raises(pergrad.UsageError, match=r"hook that changes a gradient(.|\n)*a clone"):
        verb(out.square().sum(1), model)
