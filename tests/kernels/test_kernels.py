"""The compiled loops against plain ones in float64, and what happens where they cannot be had."""

import ctypes
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import naive
import pytest
import torch
from helpers import without_kernels
from torch import Tensor, nn

import pergrad
from pergrad import folders
from pergrad.factors import Correlation, Outer, constants
from pergrad.factors.correlation import norms as correlation_norms
from pergrad.factors.guard import KAPPA_LIMIT
from pergrad.factors.methods import fused as fused_norms
from pergrad.factors.workspace import workspace
from pergrad.kernels import Norms, build, fused, grid_of, why_not

loops = sys.modules["pergrad.kernels.fused"]
CPU = torch.device("cpu")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
THREADS = pytest.mark.parametrize("threads", [1, 2, 3])


@pytest.fixture(autouse=True, scope="module")
def _compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Also where the other tests run without kernels."""
    folder = str(tmp_path_factory.mktemp("kernels"))
    with mock.patch.dict(os.environ, {"PERGRAD_KERNELS": folder}):
        loops._fused.cache_clear()
        yield
    loops._fused.cache_clear()


@pytest.fixture
def anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A process that has no library yet, and an empty folder for it."""
    monkeypatch.setenv("PERGRAD_KERNELS", str(tmp_path / "kernels"))
    loops._fused.cache_clear()
    yield tmp_path / "kernels"
    loops._fused.cache_clear()
    loops._parallel.cache_clear()


def error(got: Tensor, wanted: Tensor) -> float:
    return ((got.double() - wanted) / wanted).abs().max().item()


def loose(dtype: torch.dtype) -> float:
    return 30 * torch.finfo(dtype).eps


def by_kernel(g: Tensor, a: Tensor) -> Norms:
    kernel = fused_norms.kernel_for(g, a)
    assert kernel is not None
    return fused_norms.fused_gram(kernel, g, a)


# (B, N, T, p, d): fewer positions than a vector has places, more than a block; odd everything.
SHAPES = [(3, 1, 5, 7, 9), (2, 3, 33, 20, 300), (1, 1, 300, 5, 600), (9, 2, 64, 16, 32),
          (2, 1, 513, 17, 31), (1, 1, 1, 1, 1), (7, 1, 2, 3, 1)]  # fmt: skip


def lying(kind: str, x: Tensor) -> Tensor:
    """The same numbers, otherwise in memory."""
    if kind == "turned":
        return x.mT.contiguous().mT
    if kind == "apart":
        return torch.stack([x, x], -1)[..., 0]
    return x[:1].expand_as(x) if kind == "repeated" else x


@DTYPES
@THREADS
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["plain", "turned", "apart", "repeated"])
def test_norms_by_fused_grams(shape, kind, dtype, threads):
    B, N, T, p, d = shape
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    g, a = torch.randn(B, N, T, p, dtype=dtype), torch.randn(B, N, T, d, dtype=dtype)
    g, a = lying(kind, g), lying(kind, a)
    G, A = g.double(), a.double()
    wanted = (G.mT @ A).square().sum((1, 2, 3))
    sizes = (G.square().sum((2, 3)) * A.square().sum((2, 3))).sum(1)
    found = by_kernel(g, a)
    assert found.results.dtype == dtype
    assert error(found.results[0], wanted) < loose(dtype)
    assert error(found.results[1], sizes) < loose(dtype)
    assert found.doubtful[0] == 0
    if N == 1:
        assert error(found.results[2], G.sum(2).square().sum((1, 2))) < 20 * loose(dtype)
        assert found.doubtful[1] == 0  # they are to be trusted


def test_long_sums_keep_their_digits():
    """Cotangents below a softmax over many classes: one large number and thousands of tiny ones."""
    torch.manual_seed(0)
    g = torch.full((2, 1, 64, 30_000), 1 / 30_000)
    g[..., 0] -= 1
    a = torch.randn(2, 1, 64, 64) + 1
    for side in ((g, a), (a, g)):
        norms, sizes = by_kernel(*side).results[:2]
        G, A = g.double(), a.double()
        assert error(norms, (G.mT @ A).square().sum((1, 2, 3))) < 2e-6  # one running sum: 3e-5
        assert error(sizes, (G.square().sum((1, 2, 3)) * A.square().sum((1, 2, 3)))) < 2e-6


@DTYPES
@pytest.mark.parametrize("shape", SHAPES)
def test_results_do_not_depend_on_threads(shape, dtype):
    B, N, T, p, d = shape
    torch.manual_seed(0)
    g, a = torch.randn(B, N, T, p, dtype=dtype), torch.randn(B, N, T, d, dtype=dtype)
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(by_kernel(g, a).results[0])
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("side", ["g", "a"])
@pytest.mark.parametrize("budget", [None, 2000])
@pytest.mark.parametrize("shape", [(4, 1, 40, 64, 48), (3, 1, 290, 200, 180)])
def test_norms_and_those_of_sums_in_every_dtype(shape, side, dtype, budget):
    B, N, T, p, d = shape
    torch.manual_seed(0)
    shared, own = (torch.randn(B, N, T, n).to(dtype) for n in (d, p))
    g, a = (own, shared) if side == "a" else (shared, own)
    with workspace(budget):
        results = by_kernel(g, a).results
    wanted = (g.double().mT @ a.double()).square().sum((1, 2, 3))
    assert error(results[0], wanted) < loose(results.dtype)
    for row, x in ((2, g), (4, a)):
        assert error(results[row], x.double().sum(2).square().sum((1, 2))) < 1e-3


WINDOWS = [  # spatial sizes, kernel, stride, padding, dilation
    ((40,), (3,), (1,), (1,), (1,)),
    ((9,), (4,), (2,), (0,), (2,)),
    ((7, 6), (3, 2), (1, 2), (1, 0), (1, 1)),
    ((16, 16), (3, 3), (1, 1), (1, 1), (1, 1)),
    ((18, 17), (3, 3), (2, 2), (1, 1), (1, 1)),
    ((8, 8), (2, 2), (2, 2), (0, 0), (1, 1)),
    ((5, 5), (1, 1), (2, 2), (0, 0), (1, 1)),
    ((4, 5, 6), (2, 3, 1), (1, 1, 2), (1, 1, 0), (1, 2, 1)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@THREADS
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("window", WINDOWS)
def test_norms_of_convolutions_by_shifts(window, groups, last, dtype, threads):
    size, kernel, stride, padding, dilation = window
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    sizes = zip(size, kernel, stride, padding, dilation, strict=True)
    out = [(n + 2 * p - e * (k - 1) - 1) // s + 1 for n, k, s, p, e in sizes]
    x, g = torch.randn(4, 6, *size).to(dtype), torch.randn(4, 2, *out).to(dtype)
    if last:
        x, g = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (x, g))
    f = Correlation(g, x, kernel=kernel, stride=stride, padding=padding, dilation=dilation,
                    groups=groups)  # fmt: skip
    convolve = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[len(size) - 1]
    weight = torch.zeros(2, 6 // groups, *kernel, dtype=torch.float64, requires_grad=True)
    y = convolve(x.double(), weight, None, stride, padding, dilation, groups)
    wanted = torch.stack([
        torch.autograd.grad(y[b], weight, g[b].double(), retain_graph=True)[0].square().sum()
        for b in range(4)
    ])  # fmt: skip
    with workspace(None):
        for name in ("fused shift", "fused"):
            (method,) = (m for m in correlation_norms.METHODS if m.name == name)
            assert error(f.sq_norms_by(method).settled(), wanted) < 10 * loose(f.dtype)


def test_pixels_beyond_the_window_are_left_out():
    grid = grid_of((5, 6), (2, 2), (2, 3), (2, 2), (0, 1), (1, 1))
    assert grid.places == 4 * 5  # one row below, one column on the right: no patch has them
    assert grid.pixels.view(5, 6).tolist()[1] == [6, 7, 8, 9, -1, -1]
    assert grid.pixels.view(5, 6)[4].tolist() == [-1] * 6
    assert grid.corners.tolist() == [0, 2, 10, 12]
    assert grid.offsets.tolist() == [0, 1, 2, 5, 6, 7]


@DTYPES
@THREADS
@pytest.mark.parametrize("shape", [(1, 1000, 24), (3, 5, 33), (9, 130, 7), (2, 4, 256)])
@pytest.mark.parametrize("centred", [True, False])
def test_sums_of_layer_norms(shape, centred, dtype, threads):
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    g, x = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    mean, scale = torch.randn(shape[:2], dtype=dtype), torch.rand(shape[:2], dtype=dtype)
    got = fused(CPU, dtype).layer(g, x, mean if centred else None, scale)
    made = (x - mean[..., None] if centred else x).double() * scale[..., None].double()
    for (sums, norms), wanted in zip(got, (made * g.double(), g.double()), strict=True):
        assert (sums - wanted.sum(1)).abs().max() < loose(dtype) * shape[1] ** 0.5
        assert error(norms, wanted.sum(1).square().sum(1)) < 10 * loose(dtype)


def test_one_bad_example_leaves_the_others_alone():
    for bad in (float("nan"), float("inf"), 1e30):
        g, a = torch.randn(4, 1, 40, 64), torch.randn(4, 1, 40, 64)
        wanted = (g.double().mT @ a.double()).square().sum((1, 2, 3))
        a[2, 0, 7, 3] = bad
        found = by_kernel(g, a)
        norms, trusted = found.results[0], found.doubtful[0] == 0
        assert error(norms[[0, 1, 3]], wanted[[0, 1, 3]]) < 1e-5
        assert not trusted or not norms[2].isfinite()


@DTYPES
@pytest.mark.parametrize("turned", [False, True])
def test_sums_that_cancel_are_told(turned, dtype):
    """A bias whose gradient is far smaller than the rows that it sums."""
    torch.manual_seed(0)
    g, a = torch.randn(3, 1, 40, 64, dtype=dtype), torch.randn(3, 1, 40, 32, dtype=dtype)
    g[1] -= g[1].mean(1, keepdim=True)
    found = by_kernel(*((a, g) if turned else (g, a)))
    sums, sizes = found.results[4:] if turned else found.results[2:4]
    assert found.doubtful[0] == 0
    assert found.doubtful[2 if turned else 1] == 1
    assert error(sizes, 40 * g.double().square().sum((1, 2, 3))) < loose(dtype)
    limit = KAPPA_LIMIT[dtype] ** 2
    assert (sizes > limit * sums).tolist() == [False, True, False]


class Small(nn.Module):
    """Linear layers over positions, a layer norm and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 64, 3, padding=1)
        self.one, self.norm, self.two = nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.convolution(x).flatten(2).mT
        return self.two(self.norm(self.one(y)).tanh()).mean(1)


def test_numbers_whose_signs_are_not_in_memory_are_not_read():
    g, x = torch.randn(2, 1, 40, 64), torch._neg_view(torch.randn(2, 1, 40, 64))
    assert x.is_neg()
    assert fused_norms.kernel_for(g, g) is not None
    assert fused_norms.kernel_for(g, x) is None
    model, data = nn.LayerNorm(8).double(), torch.randn(3, 5, 8).double()

    def losses() -> Tensor:
        made = model(data)
        made.register_hook(torch._neg_view)  # a gradient that is such a view
        return made.sum((1, 2))

    got = pergrad.gradients(losses(), model).dense()
    wanted = naive.flat(naive.loop_grads(losses(), model))
    assert (naive.flat(got) - wanted).abs().max() < 1e-12


@pytest.mark.parametrize("threads", [1, 2])
def test_with_and_without_kernels(threads, monkeypatch):
    """The same model by kernels, without them, and by the loop."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model, x, y = Small().double(), torch.randn(5, 3, 6, 6).double(), torch.arange(5)

    def losses(m: nn.Module) -> Tensor:
        return nn.functional.cross_entropy(m(x), y, reduction="none")

    wanted = naive.norms(naive.loop_grads(losses(model), model))
    for compiled in (True, False):
        if not compiled:
            without_kernels(monkeypatch)
        assert (fused(CPU, torch.float64) is not None) == compiled
        assert error(pergrad.norms(losses(model), model), wanted) < 1e-12
        methods = {row.method for row in pergrad.explain(losses(model), model).rows}
        assert bool(methods & {"fused", "fused shift"}) == compiled


def test_shorter_vectors(anew, monkeypatch):
    """What is compiled for any processor of the kind: shorter vectors."""
    flag = {"x86_64": "-march=x86-64", "aarch64": "-mcpu=generic"}[platform.machine()]
    monkeypatch.setattr(build, "_NATIVE", {platform.machine(): flag})
    for dtype in (torch.float32, torch.float64):
        assert why_not(CPU, dtype) is None
        for shape in SHAPES:
            test_norms_by_fused_grams(shape, "plain", dtype, 2)
            test_norms_by_fused_grams(shape, "turned", dtype, 1)
        for window in WINDOWS:
            test_norms_of_convolutions_by_shifts(window, 2, False, dtype, 1)
        test_sums_of_layer_norms((3, 5, 33), True, dtype, 1)


# -- where there is none ---------------------------------------------------------------------------


def test_an_empty_variable_says_none(anew, monkeypatch):
    monkeypatch.setenv("PERGRAD_KERNELS", "")
    assert fused(CPU, torch.float32) is None
    assert "the environment variable PERGRAD_KERNELS is empty" in why_not(CPU, torch.float32)


def test_a_user_without_home(anew, monkeypatch):
    for name in ("PERGRAD_KERNELS", "PERGRAD_COSTS", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    with mock.patch.object(Path, "expanduser", side_effect=RuntimeError("no home directory")):
        assert "there is no home folder" in why_not(CPU, torch.float32)
        assert constants.folder() is None
        constants.forget()
        assert constants.constants(CPU, torch.float32) == constants.DEFAULT


def test_what_it_does_not_serve():
    assert "not in torch.float16" in why_not(CPU, torch.float16)
    assert "not on cuda so far" in why_not(torch.device("cuda"), torch.float32)
    assert why_not(CPU, torch.float32) is None


def test_no_compiler(anew, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CC", raising=False)
    assert fused(CPU, torch.float32) is None
    assert "no C compiler (cc, gcc, clang) on the PATH" in why_not(CPU, torch.float32)
    assert not anew.exists()
    # and it is not looked for again with every product
    with mock.patch.object(build, "_compile", side_effect=AssertionError):
        assert fused(CPU, torch.float32) is None


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo 'unknown flag' >&2; exit 1", "cannot compile it, and says: unknown flag"),
        ("exit 0", "cannot compile it, and says: nothing"),
        ("exec sleep 60", "took more than 0.2 s"),
        ('while [ "$1" != -o ]; do shift; done; echo text > "$2"', "invalid ELF header|too short"),
    ],
)
def test_a_compiler_that_does_not_work(anew, monkeypatch, script, said):
    compiler = anew.parent / "compiler"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setattr(build, "_PATIENCE", 0.2)
    assert fused(CPU, torch.float32) is None
    found = why_not(CPU, torch.float32)
    assert any(part in found for part in said.split("|")), found


def test_a_library_that_is_wrong_is_not_used(anew, monkeypatch):
    text = loops._SOURCE.read_text()
    assert text.count("norm += sums[PRODUCTS];") == 1
    source = anew.parent / "fused.c"
    source.write_text(text.replace("norm += sums[PRODUCTS];", "norm += 1.01 * sums[PRODUCTS];"))
    monkeypatch.setattr(loops, "_SOURCE", source)
    assert fused(CPU, torch.float32) is None
    assert "is wrong by 1.0e-02 on this machine" in why_not(CPU, torch.float32)
    g, a = torch.randn(2, 40, 64), torch.randn(2, 40, 64)
    wanted = (g.double().mT @ a.double()).square().sum((1, 2))
    assert error(Outer(g, a).sq_norms(), wanted) < 1e-5


def test_a_damaged_library_is_compiled_again(anew):
    assert fused(CPU, torch.float32) is not None
    (path,) = anew.iterdir()
    half = path.read_bytes()[:-100]
    path.unlink()  # not written over: this process has it open
    path.write_bytes(half)
    loops._fused.cache_clear()
    assert fused(CPU, torch.float32) is not None
    assert len(list(anew.iterdir())) == 1


def test_it_is_compiled_once(anew):
    assert fused(CPU, torch.float32) is not None
    loops._fused.cache_clear()
    with mock.patch.object(build, "_compile", side_effect=AssertionError):
        assert fused(CPU, torch.float32) is not None


@pytest.mark.parametrize("what", ["folder", "above", "file"])
def test_what_others_may_write_is_not_loaded(anew, what):
    assert fused(CPU, torch.float32) is not None
    (path,) = anew.iterdir()
    assert path.stat().st_mode & 0o777 == 0o600
    assert anew.stat().st_mode & 0o777 == 0o700
    place = {"folder": anew, "above": anew.parent, "file": path}[what]
    place.chmod(0o777)
    loops._fused.cache_clear()
    with mock.patch.object(ctypes, "CDLL", side_effect=AssertionError):
        assert fused(CPU, torch.float32) is None
    assert f"others may write to {place}" in why_not(CPU, torch.float32)
    assert "chmod go-w" in why_not(CPU, torch.float32)


def test_what_belongs_to_somebody_else_is_not_loaded(anew, monkeypatch):
    assert fused(CPU, torch.float32) is not None
    loops._fused.cache_clear()
    real = os.stat
    foreign = os.stat_result((0o100600, *([1] * 3), 4242, *([1] * 5)))
    monkeypatch.setattr(folders.os, "stat", lambda path, **more: (
        foreign if str(path).endswith(".so") else real(path, **more)))  # fmt: skip
    assert fused(CPU, torch.float32) is None
    assert "belongs to somebody else" in why_not(CPU, torch.float32)


def test_a_fifo_in_the_place_of_a_library_is_not_waited_for(anew):
    assert fused(CPU, torch.float32) is not None
    (path,) = anew.iterdir()
    path.unlink()
    os.mkfifo(path)
    loops._fused.cache_clear()
    assert fused(CPU, torch.float32) is not None  # compiled again, in its place
    assert path.is_file()


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ('echo text > "$out"', "loading it says"),
        ('cc -shared -nostdlib -o "$out" -x c /dev/null', "fused_sizes"),
        ('cc "${all[@]}" && truncate -s 4100 "$out"', "loading it says"),
    ],
    ids=["garbage", "nothing in it", "cut short"],
)
def test_what_cannot_be_loaded_is_not_tried_again(anew, monkeypatch, script, said):
    compiler = anew.parent / "compiler"
    out = 'all=("$@"); while [ "$1" != -o ]; do shift; done; out=$2'
    compiler.write_text(f"#!/bin/bash\n{out}\n{script}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    model, x = nn.Linear(64, 64), torch.randn(4, 40, 64)
    norms = pergrad.norms(model(x).square().sum((1, 2)), model)  # never an error
    assert norms.shape == (4,)
    assert said in why_not(CPU, torch.float32)
    assert [path.suffix for path in anew.iterdir()] == [".refused"]
    loops._fused.cache_clear()
    with mock.patch.object(build, "_compile", side_effect=AssertionError):
        assert "found earlier; delete" in why_not(CPU, torch.float32)
    monkeypatch.delenv("CC")  # another compiler has its own chance
    loops._fused.cache_clear()
    assert fused(CPU, torch.float32) is not None


def test_a_compiler_may_say_whatever_it_likes(anew, monkeypatch):
    compiler = anew.parent / "compiler"
    compiler.write_text(
        "#!/bin/sh\nprintf '\\033[31m\\377 red\\n'; yes no | head -c 9000000; exit 1\n"
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    assert fused(CPU, torch.float32) is None
    said = why_not(CPU, torch.float32)
    assert "\x1b" not in said
    assert " red" in said
    assert len(said) < 1000


@pytest.mark.parametrize("value", ["relative/folder", "./x", "../x"])
def test_a_relative_folder_is_made_absolute(anew, monkeypatch, value):
    monkeypatch.chdir(anew.parent)
    monkeypatch.setenv("PERGRAD_KERNELS", value)
    assert folders.folder("PERGRAD_KERNELS", "kernels") == Path(value).absolute()
    monkeypatch.delenv("PERGRAD_KERNELS")
    monkeypatch.setenv("XDG_CACHE_HOME", value)  # its specification: to be ignored
    monkeypatch.setenv("HOME", str(anew))
    assert folders.folder("PERGRAD_KERNELS", "k") == anew / ".cache" / "pergrad" / "k"


def test_files_are_written_through_no_link(tmp_path):
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "precious")
    folders.write(tmp_path / "link", b"new", durable=True)
    assert (tmp_path / "precious").read_text() == "mine"
    assert (tmp_path / "link").read_bytes() == b"new"
    with mock.patch("secrets.token_hex", return_value="known"):
        (tmp_path / ".known.tmp").symlink_to(tmp_path / "precious")
        with pytest.raises(FileExistsError):
            folders.write(tmp_path / "other", b"new")
    assert (tmp_path / "precious").read_text() == "mine"


def test_a_folder_that_cannot_be_written(anew):
    anew.write_text("a file where a folder should be")
    assert fused(CPU, torch.float32) is None
    assert str(anew) in why_not(CPU, torch.float32)


def test_a_full_disk_leaves_nothing_behind(anew):
    with mock.patch("os.replace", side_effect=OSError("No space left on device")):
        assert fused(CPU, torch.float32) is None
    assert "No space left on device" in why_not(CPU, torch.float32)
    assert list(anew.iterdir()) == []


@pytest.mark.parametrize(("system", "machine"), [("Darwin", "x86_64"), ("Linux", "riscv64")])
def test_other_machines(anew, system, machine):
    with (
        mock.patch("platform.system", return_value=system),
        mock.patch("platform.machine", return_value=machine),
    ):
        assert f"not on {system} with {machine} so far" in why_not(CPU, torch.float32)


def test_without_torchs_threads_it_serves_one_thread_alone(anew):
    loops._parallel.cache_clear()
    with mock.patch.object(ctypes, "CDLL", side_effect=OSError):
        assert loops._parallel() is None
    g, a = torch.randn(2, 1, 40, 64), torch.randn(2, 1, 40, 64)
    assert fused_norms.kernel_for(g, a) is not None
    torch.set_num_threads(2)
    assert fused_norms.kernel_for(g, a) is None


def test_half_a_file_is_never_seen(anew):
    """Processes that compile at once."""
    code = "import torch; from pergrad.kernels import fused; import sys;" \
           "sys.exit(fused(torch.device('cpu'), torch.float32) is None)"  # fmt: skip
    started = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(3)]
    assert [process.wait() for process in started] == [0, 0, 0]
    assert len(list(anew.iterdir())) == 1
