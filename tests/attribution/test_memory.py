"""What influence takes in memory does not grow with the training set."""

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import resource, sys, torch, pergrad

class Data:
    def __init__(self, count):
        self.count = count
    def __len__(self):
        return self.count
    def __getitems__(self, rows):
        torch.manual_seed(rows[0])
        return list(zip(torch.randn(len(rows), 64), [i % 4 for i in rows]))
    def __getitem__(self, i):
        return self.__getitems__([i])[0]

def losses(model, batch):
    return torch.nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
job = pergrad.Job(model, Data(int(sys.argv[1])), losses, outputs=lambda m, b: m(b[0]))
queries, options, out = Data(512), {"batch_size": 512}, sys.argv[2]
fit = pergrad.curvature(job, out + "/fit", kind="kfac", labels="given", **options)
pergrad.influence(job, queries, out + "/solve", curvature=fit, refine=0, top=5, **options)
pergrad.influence(job, queries, out + "/dots", top=5, **options)
pergrad.sketch(job, out + "/index", curvature=fit, size=64, **options)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak_bytes(examples: int, folder: Path) -> int:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(examples), str(folder)], capture_output=True,
        text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return 1024 * int(done.stdout)


def test_memory_does_not_grow_with_the_training_set(tmp_path: Path) -> None:
    """Of 12,800 examples more, one number for each query alone would be 26 MB."""
    few, many = peak_bytes(2_560, tmp_path / "few"), peak_bytes(15_360, tmp_path / "many")
    assert many - few < 20e6
