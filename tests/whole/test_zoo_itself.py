"""The zoo is what it says: the two references agree, unless examples interact.

No pergrad here: a case that fails in this file is wrong itself.
"""

import naive
import pytest
import torch
import zoo
from helpers import assert_rows_agree


@pytest.mark.parametrize(("case", "B"), zoo.each_batch())
def test_losses_are_a_vector_with_a_graph(case: zoo.Case, B: int) -> None:
    run = case.run(B)
    assert run.losses.shape == (B,)
    assert run.losses.dtype == torch.float64
    assert run.losses.requires_grad
    assert run.losses.isfinite().all()
    assert torch.equal(run.again(), run.losses)


@pytest.mark.parametrize(("case", "B"), zoo.each_batch(mixes=("no",)))
def test_the_references_agree(case: zoo.Case, B: int) -> None:
    if not case.deterministic:
        return
    run = case.run(B)
    loop = zoo.reference(case.name, B)
    alone = naive.alone_grads(run.alone, run.params, B)
    assert_rows_agree(alone, loop, norms=naive.norms(loop), what="alone")


@pytest.mark.parametrize(("case", "B"), zoo.each_batch(mixes=("yes", "maybe")))
def test_the_references_disagree_where_examples_interact(case: zoo.Case, B: int) -> None:
    if B < 2:
        return
    run = case.run(B)
    if case.name == "batch_norm_train":  # it does not even take one example
        with pytest.raises(ValueError, match="more than 1 value"):
            run.alone(0)
        return
    alone = naive.alone_grads(run.alone, run.params, B)
    loop = zoo.reference(case.name, B)
    with pytest.raises(AssertionError, match="differ"):
        assert_rows_agree(alone, loop, norms=naive.norms(loop))


@pytest.mark.parametrize(("case", "B"), zoo.each_batch())
def test_every_case_has_a_gradient_to_measure(case: zoo.Case, B: int) -> None:
    if B and case.name != "all_gradients_zero":
        assert naive.norms(zoo.reference(case.name, B)).max() > 0.01


def test_examples_with_zero_gradient_are_exactly_zero() -> None:
    for name in ("dead_relu", "zero_losses"):
        assert naive.norms(zoo.reference(name, 3))[1] == 0
