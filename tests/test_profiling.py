"""The table of --profile: arithmetic on a trace written by hand, and a run as people start it."""

import gzip
import json
import re
import signal
import time

import numpy as np
import pytest

import train_gpt
from conftest import ROOT, clean_environment, start, tiny_options, trainer
from data.shards import write_shard
from forked import Forked
from records import check
from records.log import parse
from trainer import options, profile
from trainer.profile import STEP, length, self_times, table, uncovered, union

VOCAB = 50304


def event(cat: str, name: str, ts: float, dur: float, tid: int = 1, **args) -> dict:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid, "args": args}


def op(number: int, name: str, ts: float, *dims, tid: int = 1, types=()) -> dict:
    return event("cpu_op", name, ts, 5, tid, **{
        "External id": number, "Input Dims": list(dims), "Input type": list(types)})


def kernel(number: int | None, name: str, ts: float, dur: float, **args) -> dict:
    if number is not None:
        args["External id"] = number
    return event("kernel", name, ts, dur, 7, **args)


def gpu_step(t: float) -> list[dict]:
    """1000 us that start at t: the host launches in the first 200, the device works on.

    0-100 product of a block, 100-140 attention, 140-240 product of the head, 240-340 softmax,
    340-440 its backward, 440-500 attention backward, 500-700 NCCL of which 500-600 is covered by
    a fused kernel, 700-750 nothing, 750-850 Newton-Schulz, 850-900 optimizer, 900-910 copy, then
    nothing up to 1000.
    """
    n = int(t)
    return [
        event("user_annotation", STEP, t, 1000),
        event("gpu_user_annotation", STEP, t, 1000),
        op(n + 1, "aten::mm", t + 1, [32768, 768], [768, 3072]),
        op(n + 2, "speedrun::packed_attention", t + 10, [32768, 6, 128]),
        op(n + 3, "aten::_scaled_mm", t + 20, [32768, 768], [768, VOCAB], [], []),
        op(n + 4, "aten::_log_softmax", t + 30, [32768, VOCAB], []),
        event("cpu_op", "autograd::engine::evaluate_function: Backward", t + 50, 50, 2),
        op(n + 5, "aten::_log_softmax_backward_data", t + 60, [32768, VOCAB], tid=2),
        op(n + 6, "speedrun::packed_attention_backward", t + 70, [32768, 6, 128], tid=2),
        op(n + 7, "triton_poi_fused_add_mul_3", t + 80, [1000, 1000], [1000, 1000], tid=2,
           types=("c10::BFloat16", "float")),
        event("user_annotation", "Optimizer.step#Muon.step", t + 110, 80),
        op(n + 8, "aten::baddbmm", t + 120, [4, 768, 768], [4, 768, 768], [4, 768, 768]),
        op(n + 9, "aten::mul", t + 130, [4, 768, 768]),
        kernel(n + 1, "nvjet_hsh_128x256_64x4_TNT", t, 100),
        kernel(n + 2, "void flash::flash_fwd_kernel<...>", t + 100, 40),
        # One product, two kernels: its FLOPs count once.
        kernel(n + 3, "sm90_xmma_gemm_e4m3bf16_e4m3f32_f32_tn", t + 140, 60),
        kernel(n + 3, "cublasLt::splitKreduce_kernel<32, 16>", t + 200, 40),
        kernel(n + 4, "void (anonymous)::cunn_SoftMaxForward<8>", t + 240, 100),
        kernel(n + 5, "void vectorized_elementwise_kernel<4>", t + 340, 100),
        kernel(n + 6, "void flash::flash_bwd_dq_dk_dv_loop", t + 440, 60),
        kernel(n + 7, "triton_poi_fused_add_mul_3", t + 500, 100),
        kernel(None, "ncclDevKernel_ReduceScatter_Sum_f32_RING_LL", t + 500, 200,
               **{"Collective name": "_reduce_scatter_base", "In msg nelems": 8_000_000,
                  "Out msg nelems": 1_000_000, "dtype": "Float", "Group size": 8}),
        kernel(n + 8, "nvjet_tst_64x64", t + 750, 100),
        kernel(n + 9, "void vectorized_elementwise_kernel<4>", t + 850, 50),
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", t + 900, 10, 7, bytes=131072),
    ]


def test_a_gpu_trace_becomes_the_table_that_its_author_computed():
    found = table([*gpu_step(5000), *gpu_step(6000)], VOCAB)
    ms = {name: row.us / found.num_steps for name, row in found.rows.items()}
    assert found.num_steps == 2 and found.us == 2000
    assert ms == {
        "block GEMMs": 100, "attention forward": 40, "head GEMMs, fp8": 100,
        "softmax and loss": 200, "attention backward": 60, "elementwise and norms": 100,
        "communication": 200, "Newton-Schulz": 100, "optimizer elementwise": 50, "copies": 10}
    # Half of NCCL's 200 us lie under a fused kernel; 50 + 90 us of each step are empty.
    assert found.exposed_us / 2 == 100
    assert found.idle_us / 2 == 50 + 90
    assert found.rows["head GEMMs, fp8"].calls == 4
    # 2 x 32768 x 768 x 3072 FLOP in 100 us; 8M fp32 through a ring of 8 in 200 us.
    assert found.rows["block GEMMs"].rate == "1546 TFLOP/s"
    assert found.rows["head GEMMs, fp8"].rate == f"{2 * 32768 * 768 * VOCAB / 100e-6 / 1e12:.0f}" \
                                                 " TFLOP/s"
    assert found.rows["Newton-Schulz"].rate == f"{2 * 4 * 768 ** 3 / 100e-6 / 1e12:.0f} TFLOP/s"
    assert found.rows["communication"].rate == f"{8e6 * 4 * 7 / 8 / 200e-6 / 1e9:.0f} GB/s"
    assert found.rows["elementwise and norms"].rate == f"{6e6 / 100e-6 / 1e9:.0f} GB/s"
    assert found.rows["softmax and loss"].rate == ""
    assert found.phases["optimizer"] == 2 * 150
    assert found.phases["backward"] == 2 * (100 + 60 + 100)


@pytest.mark.parametrize("name, wide, phase, kind", [
    ("aten::addmm", False, "forward", "products, blocks"),
    ("aten::mm", True, "backward", "products, head"),
    ("aten::linear", False, "forward", "products, blocks"),
    ("aten::linalg_vector_norm", False, "backward", "elementwise and norms"),
    ("aten::baddbmm", False, "optimizer", "optimizer"),
    ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", False, "backward", "attention"),
    ("aten::mul_", True, "forward", "softmax and loss"),
    ("aten::mul_", False, "forward", "elementwise and norms"),
    ("aten::copy_", False, "forward", "copies"),
    ("aten::embedding_dense_backward", True, "backward", "embedding"),
    ("c10d::allreduce_", False, "optimizer", "communication"),
    ("CompiledFunctionBackward", False, "backward", "fused by compiling"),
    ("TorchDynamo Cache Lookup", False, "forward", "other"),
])
def test_operators_are_classed_by_name_and_phase(name, wide, phase, kind):
    assert profile.operator_class(name, wide, phase) == kind


@pytest.mark.parametrize("name, size", [
    ("c10::BFloat16", 2), ("Half", 2), ("float", 4), ("Float", 4), ("long int", 8), ("double", 8),
    ("c10::Float8_e4m3fn", 1), ("unsigned char", 1), ("bool", 1), ("int", 4), ("", 0), (None, 0)])
def test_traces_words_for_types(name, size):
    assert profile.item_bytes(name) == size


def test_the_kernels_of_this_repository_have_a_class():
    """A new one says where it belongs; "other" is for what nobody knows."""
    named = {m for path in (ROOT / "kernels").glob("*.py")
             for m in re.findall(r"^def (_\w*kernel)\(", path.read_text(), re.M)}
    assert named
    for name in named:
        assert profile.kernel_class(name, "", False, "forward") != "other", name


def test_what_is_covered_twice_counts_once():
    assert union([(5, 6), (0, 2), (1, 3), (3, 4)]) == [(0, 4), (5, 6)]
    assert length(union([(0, 2), (1, 3)])) == 3
    assert uncovered([(0, 10)], [(2, 4), (3, 5), (9, 20)]) == 6
    assert uncovered([(0, 1)], []) == 1 and uncovered([], [(0, 1)]) == 0


def test_communication_under_compute_is_not_exposed_and_twice_the_steps_halve_a_row():
    trace = gpu_step(0)
    covered = [*trace, kernel(None, "triton_red_fused_norm", 600, 100)]
    assert table(trace, VOCAB).exposed_us == 100
    assert table(covered, VOCAB).exposed_us == 0
    two = [*trace, event("user_annotation", STEP, 1000, 1000)]  # an empty second step
    row = "communication " + " " * 9
    line = next(x for x in table(two, VOCAB).lines() if x.startswith(row))
    assert line.split()[1] == "0.10"  # 200 us in two steps


def test_what_was_recorded_before_the_first_step_is_left_out():
    """The profiler's first use is a step that no range marks, with kernels of its own."""
    unmarked = [e for e in gpu_step(4000) if e["name"] != STEP]
    assert table([*unmarked, *gpu_step(5000)], VOCAB) == table(gpu_step(5000), VOCAB)


def test_a_trace_without_steps_is_refused():
    with pytest.raises(ValueError, match="no range named 'train step'"):
        table([e for e in gpu_step(0) if e["name"] != STEP], VOCAB)


def test_the_table_fits_a_narrow_terminal():
    lines = table(gpu_step(0), VOCAB).lines()
    assert max(map(len, lines)) <= 60
    assert lines[0].split() == ["class", "ms/step", "share", "rate", "calls"]


@pytest.mark.parametrize("name, op_name, wide, phase, kind", [
    ("nvjet_sm90_hsh_128x128", "aten::mm", True, "forward", "head GEMMs"),
    ("cutlass_80_tensorop_bf16_s16816gemm", "aten::mm", False, "backward", "block GEMMs"),
    ("_product_kernel", "speedrun::linear_relu2", False, "forward", "block GEMMs"),
    ("_symmetric_kernel", "speedrun::gram", False, "optimizer", "Newton-Schulz"),
    ("_transpose_kernel", "speedrun::transpose_fp8", True, "forward", "copies"),
    ("flash_bwd_convert_dq_kernel", "", False, "backward", "attention backward"),
    ("cutlass::device_kernel<flash::FlashAttnFwdSm90>", "", False, "forward", "attention forward"),
    ("triton_red_fused__log_softmax_sigmoid_2", "", False, "forward", "softmax and loss"),
    ("_loss_kernel", "speedrun::softcapped_loss_", True, "forward", "softmax and loss"),
    ("triton_poi_fused_attention_add", "", False, "forward", "elementwise and norms"),
    ("triton_poi_fused_add", "", False, "optimizer", "optimizer elementwise"),
    ("embedding_backward_feature_kernel", "aten::embedding_dense_backward", True, "backward",
     "embedding"),
    ("void at::native::elementwise_kernel<2>", "aten::tanh", True, "forward", "softmax and loss"),
    ("Memset (Device)", "", False, "forward", "copies"),
    ("ncclDevKernel_AllGather_RING_LL", "", False, "optimizer", "communication"),
    ("somebodys_kernel", "", False, "forward", "other"),
])
def test_kernels_are_classed_by_name_operator_and_phase(name, op_name, wide, phase, kind):
    assert profile.kernel_class(name, op_name, wide, phase) == kind


def test_time_inside_an_operator_is_that_of_the_inner_one():
    outer, inner, innermost, after = (event("cpu_op", n, ts, dur) for n, ts, dur in (
        ("a", 0, 100), ("b", 10, 50), ("c", 20, 10), ("d", 100, 7)))
    found = [(o["name"], us, around and around["name"])
             for o, us, around in self_times([after, innermost, inner, outer])]
    assert found == [("a", 50, None), ("b", 40, "a"), ("c", 10, "b"), ("d", 7, None)]


# --- as people start it ---------------------------------------------------------------------------

@pytest.fixture(scope="module")
def profiled(tiny_data, tmp_path_factory):
    """A tiny run under --profile 2: (finished process, its log folder)."""
    folder = tmp_path_factory.mktemp("profiled") / "logs"
    words = tiny_options("--data_dir", tiny_data, "--log_dir", folder, "--profile", "2")
    return start(*words, COLUMNS="60"), folder


def test_a_profiled_run_prints_its_table_and_stops(profiled):
    done, folder = profiled
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "USDT" not in done.stderr
    assert "stopped after step 6: profiled" in done.stdout
    names = {line.split("  ")[0] for line in done.stdout.splitlines()}
    assert {"products, blocks", "products, head", "optimizer", "attention", "softmax and loss",
            "exposed communication", "between operators"} <= names
    assert re.search(r"^a step \(operators\) +\d+\.\d\d 100\.0%", done.stdout, re.M)
    assert sorted(p.name.partition(".")[2] for p in folder.iterdir()) == ["trace.json.gz", "txt"]


def test_the_trace_says_what_the_table_says(profiled):
    done, folder = profiled
    (trace,) = folder.glob("*.trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    found = table(events, 320)
    assert found.num_steps == 2
    updates = [e["ts"] for e in events if e["name"].startswith("Optimizer.step")]
    assert min(updates) < min(e["ts"] for e in events if e["name"] == STEP)  # one more, before
    assert set(found.lines()) <= set(done.stdout.splitlines())
    # Nothing is lost and nothing twice: on one thread the classes and the gaps are the step.
    assert sum(row.us for row in found.rows.values()) + found.idle_us == pytest.approx(
        found.us, rel=1e-3)
    # Of each of 2 layers: qkv, out, fc, proj; each once forward and twice backward, and no copy.
    assert found.rows["products, blocks"].calls == 2 * 2 * 4 * 3
    tokens, width = 384, 32
    flops = 2 * 3 * 2 * tokens * 2 * 12 * width ** 2
    assert found.rows["products, blocks"].flops == flops
    assert found.rows["products, head"].flops == 2 * 3 * 2 * tokens * width * 320


def test_a_profiled_run_is_no_record(profiled):
    (log,) = profiled[1].glob("*.txt")
    (run,) = parse(log)
    assert run.result["status"] == "preempted" and run.result["profiled_steps"] == 2
    assert "incomplete" in {reason.name for reason in check.run_reasons(run, "run", closed=True)}


@pytest.mark.parametrize("words, says", [
    (("--profile", "-1"), "--profile: expected a number of steps from 1, got -1"),
    (("--profile", "5", "--runs", "2"), "--profile: looks at one run, got --runs 2"),
    (("--profile", "much"), "--profile: expected a whole number, got 'much'"),
    (("--profile",), "--profile: expected a value, got nothing"),
])
def test_a_wrong_profile_is_refused_with_what_would_do(words, says):
    with pytest.raises(options.OptionError, match=re.escape(says)):
        options.parse(list(words), has_cuda=False)


def test_too_few_steps_are_refused_before_anything_is_written(tiny_data, tmp_path, capsys):
    folder = tmp_path / "logs"
    assert train_gpt.main(tiny_options("--data_dir", tiny_data, "--log_dir", folder,
                                       "--profile", "20")) == 2
    said = capsys.readouterr().err
    assert "--num_iterations of at least 24" in said and len(said.splitlines()) == 1
    assert not list(folder.glob("*"))
    profile.check_profile(3, 0, 7)  # enough: 4 before, 3 to look at
    with pytest.raises(ValueError, match="at least 8"):
        profile.check_profile(3, 1, 7)  # but not from step 1 on


def test_ctrl_c_while_profiling_leaves_a_log_and_no_trace(tmp_path):
    folder, data = tmp_path / "logs", tmp_path / "data"
    data.mkdir()
    for part, count in (("train", 100_000), ("val", 1100)):
        tokens = np.arange(count) % 256
        tokens[::100] = 256
        write_shard(data / f"long_{part}_000001.bin", tokens.astype(np.uint16))
    words = tiny_options("--data_dir", data, "--log_dir", folder, "--num_iterations", "3000",
                         "--profile", "2900", "--batch_tokens", "32")
    said = tmp_path / "said"
    process = Forked(trainer, words, environment=clean_environment(), out=said)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        logs = list(folder.glob("*.txt"))
        if logs and b"step:9/" in logs[0].read_bytes():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    code, text = process.wait(60), said.read_text()
    assert code == 0 and "Traceback" not in text, text
    assert re.search(r"no profile: stopped after \d+ of 2900 steps", text), text
    assert not list(folder.glob("*.trace*")) and not list(folder.glob("*.tmp"))


@pytest.mark.ranks
def test_two_ranks_profile_the_first_and_show_their_communication(train):
    done, (log,) = train("--profile", "2", nproc=2)
    assert done.returncode == 0, done.stderr
    line = next(x for x in done.stdout.splitlines() if x.startswith("communication"))
    assert float(line.split()[1]) > 0
    assert done.stdout.count("profile of 2 steps on rank 0 of 2") == 1
    assert len(list(log.parent.glob("*.trace.json.gz"))) == 1
