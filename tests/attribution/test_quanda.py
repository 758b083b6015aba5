"""The explainer for quanda, called as quanda 0.5 calls explainers."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from crews import queries, task

import pergrad
from pergrad.errors import UsageError


def explainer(**more: Any) -> pergrad.QuandaExplainer:
    own = task()
    return pergrad.QuandaExplainer(model=own.model, train_dataset=own.data, **more)


def test_scores_are_those_of_influence(tmp_path: Path) -> None:
    own, asked = task(), queries()
    inputs, classes = torch.utils.data.default_collate(asked)
    mine = explainer(folder=tmp_path / "kept", refine=2)
    found = mine.explain(test_data=inputs, targets=classes.tolist())
    fit = pergrad.curvature(own, tmp_path / "fit")
    want = pergrad.influence(own, asked, tmp_path / "found", curvature=fit, refine=2).scores
    torch.testing.assert_close(found, want)
    assert (tmp_path / "kept" / "curvature" / "manifest.json").exists()
    dots = explainer(curvature=None).explain(inputs, classes)
    torch.testing.assert_close(dots, pergrad.influence(own, asked, tmp_path / "dots").scores)


def test_self_influence_is_the_diagonal() -> None:
    own = task()
    inputs, classes = torch.utils.data.default_collate(own.data)
    mine = explainer(curvature=None)
    want = mine.explain(inputs, classes).diagonal()
    torch.testing.assert_close(mine.self_influence(batch_size=4), want)


def test_the_last_checkpoint_is_loaded(tmp_path: Path) -> None:
    files = []
    for k in range(2):
        weights = {n: (k + 2) * t for n, t in task().model.state_dict().items()}
        files.append(str(tmp_path / f"{k}.pt"))
        torch.save(weights, files[-1])
    for mine in (explainer(checkpoints=files), explainer(checkpoints=files[1])):
        torch.testing.assert_close(mine.model[0].weight, 3 * task().model[0].weight)
    told = []
    explainer(checkpoints=files, checkpoints_load_func=lambda model, file: told.append(file))
    assert told == files[1:]


def test_the_face_is_quandas() -> None:
    """Names of arguments, by which quanda passes them."""
    names = list(inspect.signature(pergrad.QuandaExplainer).parameters)
    assert names[:5] == ["model", "train_dataset", "task", "checkpoints", "checkpoints_load_func"]
    own = list(inspect.signature(pergrad.QuandaExplainer.explain).parameters)
    assert own == ["self", "test_data", "targets"]


def test_what_is_no_picture_with_a_class_is_refused() -> None:
    with pytest.raises(UsageError, match=r"task is 'causal_lm'(.|\n)*pass its scores to quanda"):
        explainer(task="causal_lm")
    with pytest.raises(UsageError, match=r"test_data is a dict; pass a tensor"):
        explainer().explain({"input_ids": torch.ones(2)}, [0, 1])
    with pytest.raises(UsageError, match=r"shape \(3,\), for 2 test samples\. Pass one class"):
        explainer().explain(torch.ones(2, 6), [0, 1, 2])
