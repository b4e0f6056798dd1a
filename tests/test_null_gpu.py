"""bench/null_gpu.c by itself: what it counts is what it was asked for. Flat programs on it need a
CUDA build of torch, which CI does not have; bench/null_gpu.py trains on it."""

import ctypes
import shutil
import subprocess
import sys

import pytest
import torch

from bench import null_gpu
from bench.gpu import write_documents
from conftest import free_port
from flat import __main__ as flat

GIB = 2**30


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if shutil.which("gcc") is None:
        pytest.skip("no gcc")
    if not any((folder / "cuda_runtime_api.h").is_file() for folder in null_gpu.header_folders()):
        pytest.skip("no CUDA headers: Triton's package brings them on Linux for x86-64")
    return null_gpu.build(tmp_path_factory.mktemp("null_gpu"))


@pytest.fixture
def cuda(library, monkeypatch, tmp_path):
    """A copy of its own for each test: the counters are global."""
    monkeypatch.setenv("NULL_GPU_GIB", "2")
    return ctypes.CDLL(str(shutil.copy(library, tmp_path / "libcuda.so.1")))


def counted(cuda, name):
    return ctypes.c_uint64.in_dll(cuda, f"null_gpu_{name}").value


def left(cuda):
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    assert cuda.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total)) == 0
    assert total.value == 2 * GIB
    return free.value


def allocate(cuda, size):
    pointer = ctypes.c_void_p()
    return cuda.cudaMalloc(ctypes.byref(pointer), ctypes.c_size_t(size)), pointer


def test_memory_is_counted_and_ends(cuda):
    before = left(cuda)
    status, first = allocate(cuda, GIB)
    assert status == 0 and left(cuda) == before - GIB
    status, second = allocate(cuda, GIB)
    assert status == 2 and not second  # cudaErrorMemoryAllocation
    assert cuda.cudaGetLastError() == 2 and cuda.cudaGetLastError() == 0
    assert cuda.cudaFree(first) == 0 and left(cuda) == before
    assert allocate(cuda, GIB)[0] == 0


def test_memory_that_the_driver_gives_in_pieces_is_counted_by_the_piece(cuda):
    before, address, piece = left(cuda), ctypes.c_void_p(), ctypes.c_void_p()
    assert cuda.cuMemAddressReserve(ctypes.byref(address), ctypes.c_size_t(8 * GIB)) == 0
    assert left(cuda) == before
    assert cuda.cuMemCreate(ctypes.byref(piece), ctypes.c_size_t(GIB)) == 0
    assert left(cuda) == before - GIB
    assert cuda.cuMemCreate(ctypes.byref(piece), ctypes.c_size_t(GIB)) == 2
    assert cuda.cuMemRelease(piece) == 0 and left(cuda) == before


def test_bytes_move_between_host_and_device_alone(cuda):
    _, here = allocate(cuda, 4096)
    _, there = allocate(cuda, 4096)
    said, back = ctypes.create_string_buffer(b"text", 5), ctypes.create_string_buffer(5)
    size = ctypes.c_size_t(5)
    for to, source in ((here, said), (there, here), (back, here)):
        assert cuda.cudaMemcpyAsync(to, source, size, 4, None) == 0
    assert back.value == b"text" and ctypes.string_at(there, 5) == bytes(5)
    assert counted(cuda, "copies") == 3 and counted(cuda, "waits") == 0
    assert cuda.cudaStreamSynchronize(None) == 0 and counted(cuda, "waits") == 1


def test_launches_are_counted_under_their_names(cuda, tmp_path):
    host = ctypes.c_char_p(b"any address")
    cuda.__getattr__("__cudaRegisterFunction")(None, host, None, b"a_kernel")
    file = tmp_path / "names"
    cuda.null_gpu_names(str(file).encode())
    for _ in range(3):
        cuda.cudaLaunchKernel(host)
    cuda.cublasGemmEx()
    cuda.null_gpu_names(None)
    cuda.cudaLaunchKernel(host)
    assert file.read_text().split() == ["a_kernel"] * 3 + ["cublasGemmEx"]
    assert (counted(cuda, "launches"), counted(cuda, "products")) == (4, 1)


@pytest.mark.skipif(torch.version.cuda is not None, reason="this build of torch knows CUDA")
def test_a_cpu_build_of_torch_is_refused_with_the_reason():
    done = subprocess.run([sys.executable, null_gpu.__file__], text=True, capture_output=True)
    assert done.returncode == 2 and "is a CPU build" in done.stderr


@pytest.mark.skipif(torch.version.cuda is None, reason="needs a CUDA build of torch")
@pytest.mark.parametrize("record, ranks", [("6", 1), ("23", 2), ("62", 1)])
def test_a_flat_program_runs_at_full_size(library, tmp_path, record, ranks):
    """Its lines for GPUs, but with three layers, and eager: compiling takes minutes."""
    write_documents(tmp_path, 1_500_000)
    small = "--num_layers 3 --num_iterations 2 --val_every 2 --val_tokens 262144"
    (tmp_path / "record.py").write_text(flat.program(record, small.split()))
    env = null_gpu.environment(library, 139) | {
        "TORCH_COMPILE_DISABLE": "1", "NULL_GPU_COUNT": str(ranks), "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    running = [subprocess.Popen([sys.executable, "record.py", "."], cwd=tmp_path, text=True,
                                env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)
               for rank in range(ranks)]
    done = [(*process.communicate(timeout=200), process.returncode) for process in running]
    assert [code for *_, code in done] == [0] * ranks, done[-1][1]
    assert "step:2/2 val_loss:" in done[0][0]
