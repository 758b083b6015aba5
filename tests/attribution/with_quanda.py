"""quanda's own metrics on pergrad's influences: `make quanda`. No test that others collect.

quanda asks for some twenty packages, among them a torchvision that may not load next to a CPU
torch: all of them are in a folder of their own, the first argument.
"""

import sys

import torch
from torch import nn

import pergrad


def main(folder: str) -> None:
    sys.path.append(folder)
    # torchvision expects two compiled operators on import, which its CUDA build cannot load
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float threshold) -> Tensor")
    from quanda.metrics.downstream_eval import ClassDetectionMetric, MislabelingDetectionMetric

    torch.manual_seed(0)
    inputs, asked = torch.randn(60, 5), torch.randn(8, 5)
    labels, wrong = inputs[:, :3].argmax(1), [3, 17, 40]
    labels[wrong] = (labels[wrong] + 1) % 3
    data = torch.utils.data.TensorDataset(inputs, labels)
    model = nn.Linear(5, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    torch.save(model.state_dict(), weights := f"{folder}/weights.pt")

    metric = MislabelingDetectionMetric(
        model=model, train_dataset=data, mislabeling_indices=wrong, checkpoints=weights,
        explainer_cls=pergrad.QuandaExplainer, expl_kwargs={"refine": 0, "progress": False},
    )  # fmt: skip
    found = float(metric.compute()["score"])
    sys.stdout.write(f"mislabelling detection, self-influence: {found:.3f}\n")
    assert found > 0.9

    explainer = pergrad.QuandaExplainer(model, data, progress=False)
    classes = asked[:, :3].argmax(1)
    metric = ClassDetectionMetric(model=model, checkpoints=weights, train_dataset=data)
    scores = explainer.explain(test_data=asked, targets=classes)
    metric.update(scores, classes)
    found = float(metric.compute()["score"])
    sys.stdout.write(f"class detection: {found:.3f}\n")
    same = labels[scores.topk(5).indices] == classes[:, None]  # what it is the mean of
    assert abs(found - float(same.float().mean())) < 1e-6


if __name__ == "__main__":
    main(sys.argv[1])
