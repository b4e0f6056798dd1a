"""Disks, folders and checkpoints: full, read-only, damaged, foreign, half-written."""

import gc
import os
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch

import train_gpt
from faults.helpers import (
    assert_refused,
    body_of,
    checkpoints,
    differing,
    logs_in,
    result_of,
    same,
    state_of,
    tiny,
)
from records.log import parse
from trainer import checkpoint

# The newest recipe with all that changes on the way: windows, batches, targets, an embedding that
# leaves the head, Adam every second step.
NEWEST = ("--record", "62", "--num_iterations", "24", "--seq_len", "384", "--batch_tokens", "1536",
          "--num_layers", "6", "--val_tokens", "2048", "--val_every", "8")


@pytest.fixture
def tmpfs(tmp_path):
    """tmpfs(options) -> a small file system; skipped where we may not mount one."""
    mounted = []

    def mount(options: str) -> Path:
        folder = tmp_path / f"mount{len(mounted)}"
        folder.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)],
                              capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"mounting a tmpfs needs root: {done.stderr.strip()}")
        mounted.append(folder)
        return folder
    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


# --- folders and disks ----------------------------------------------------------------------------

def test_S1_output_is_a_file(train, tmp_path):
    (tmp_path / "logs").write_text("not a folder")
    ran = train()
    assert ran.code == 2 and "expected a folder to write to" in ran.err
    assert len(ran.err.strip().splitlines()) == 1
    assert (tmp_path / "logs").read_text() == "not a folder"


def test_S1_output_is_read_only(train, tmpfs):
    folder = tmpfs("ro,size=1m")
    assert_refused(train(folder=folder), "Read-only file system")
    assert_refused(train(folder=folder / "a" / "b"), "Read-only file system")


def test_a_refusal_leaves_no_folder(train, tmp_path):
    ran = train("--val_tokens", "1000", folder="new/logs")
    assert_refused(ran, "val_tokens")
    assert not (tmp_path / "new").exists()


def test_S2_a_checkpoint_that_does_not_fit_costs_the_checkpoint_only(train, tmpfs, broken):
    folder = tmpfs("size=8m")
    broken(f"full_disk:3:{folder}")
    ran = train("--checkpoint_every", "2", "--keep", "9", folder=folder)
    assert ran.code == 0
    assert "NO CHECKPOINT at step 4" in ran.out and "THE MODEL IS NOT SAVED" in ran.out
    assert list(checkpoints(folder)) == [2] and not list(folder.glob(".*"))
    assert checkpoint.load(checkpoints(folder)[2])["step"] == 2
    (log,) = ran.logs
    assert result_of(log)["status"] == "complete" and result_of(log)["checkpoint"] is None
    assert "NO CHECKPOINT at step 4" in body_of(log)


def test_S3_a_full_disk_under_the_log_ends_the_run(train, broken):
    broken("full_log:3")
    ran = train()
    assert ran.code == 1
    assert "the log cannot be written" in ran.err and "No space left" in ran.err
    (run,) = parse(ran.logs[0])
    assert run.digest is None and "status" not in run.result  # nothing that could be a record
    assert "step:6/6" not in ran.out


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_S3_no_room_for_the_log_at_the_start(train, tmpfs):
    folder = tmpfs("size=64k")
    ran = train(folder=folder)
    gc.collect()  # the log whose first write failed is closed by its collector, with a warning
    assert_refused(ran, "--log_dir", "No space left")
    assert not list(folder.iterdir())


# --- checkpoints ----------------------------------------------------------------------------------

@pytest.fixture
def three(train):
    """A folder with the checkpoints of steps 2, 4 and 6 of a finished run."""
    ran = train("--checkpoint_every", "2", "--keep", "9")
    assert ran.code == 0 and sorted(checkpoints(ran.folder)) == [2, 4, 6]
    checkpoints(ran.folder)[6].unlink()
    return ran.folder


class Attack:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("pickle_was_run"),)


def flip_a_bit(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    data = bytearray(path.read_bytes())
    data[largest.header_offset + largest.file_size // 2 + 200] ^= 4
    path.write_bytes(data)


DAMAGE = {
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-10]), "not a whole checkpoint"),
    "half": (lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]), "not a whole"),
    "empty": (lambda p: p.write_bytes(b""), "not a whole checkpoint"),
    "bit flipped": (flip_a_bit, "does not match its checksum"),
    "pickle attack": (lambda p: torch.save({"kind": "checkpoint", "x": Attack()}, p), "refused"),
    "a list": (lambda p: torch.save([1, 2], p), "expected a dict, got list"),
    "dangling link": (lambda p: (p.unlink(), p.symlink_to("nowhere")), "not there"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_S4_S10_damage_is_refused_and_auto_falls_back(train, three, damage, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    newest = checkpoints(three)[4]
    spoil, says = DAMAGE[damage]
    when = newest.stat().st_mtime_ns
    spoil(newest)
    if not newest.is_symlink():
        os.utime(newest, ns=(when, when))
    if damage == "bit flipped":  # what makes the check worth its time
        torch.load(newest, weights_only=True)
    refused = train("--resume", newest)
    assert refused.code == 2 and len(refused.err.strip().splitlines()) == 1
    assert str(newest) in refused.err
    assert says in refused.err or damage == "dangling link"
    assert len(logs_in(three)) == 1
    ran = train("--resume", "auto")
    assert ran.code == 0 and "warning: passed over" in ran.err and says in ran.err
    assert "step 2" in ran.out
    assert not (tmp_path / "pickle_was_run").exists()
    assert result_of(logs_in(three)[-1])["resumed"] is True


def test_S10_resume_from_what_is_not_there(train):
    ran = train("--resume", "logs/none.ckpt")
    assert_refused(ran, "no checkpoint at logs/none.ckpt")
    assert not ran.folder.exists()


def test_S10_nothing_to_resume_starts_at_step_0_and_says_so(train):
    ran = train("--resume", "auto")
    assert ran.code == 0 and "starting at step 0" in ran.out
    assert result_of(ran.logs[0])["resumed"] is False


def test_S5_another_configuration_is_refused_by_name(train, three):
    """Also the seed, and other data; auto takes only what fits."""
    path = checkpoints(three)[4]
    ran = train("--resume", path, "--num_layers", "3", "--matrix_lr", "0.1")
    assert ran.code == 2 and len(ran.err.strip().splitlines()) == 1
    assert "recipe.model.num_layers: checkpoint 2, this run 3" in ran.err
    assert "recipe.matrix_lr: checkpoint 0.00" in ran.err
    ran = train("--resume", path, "--seed", "5")
    assert ran.code == 2 and "seed: checkpoint 0, this run 5" in ran.err
    ran = train("--resume", "auto", "--seed", "5", "--num_iterations", "2")
    assert ran.code == 0 and "starting at step 0" in ran.out


def test_S5_other_data_are_refused(train, three, data, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(data, other)
    shard = sorted(other.glob("*train*"))[0]
    raw = bytearray(shard.read_bytes())
    raw[2000] ^= 1
    shard.write_bytes(raw)
    ran = train("--resume", checkpoints(three)[4], data=other)
    assert ran.code == 2 and "data_digest: checkpoint" in ran.err


def test_a_model_is_not_a_checkpoint(train, three):
    ran = train("--resume", next(three.glob("*.pt")))
    assert ran.code == 2 and "got model, which cannot be continued" in ran.err


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data):
    """(options, folder) of whole runs with a checkpoint of every step, by name; made once."""
    import contextlib
    import io

    made = {}

    def run(name: str) -> tuple[tuple, Path]:
        options = {"six": ("--record", "6", "--num_iterations", "20"), "newest": NEWEST}[name]
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            with contextlib.redirect_stdout(io.StringIO()):
                code = train_gpt.main(tiny(
                    "--data_dir", data, "--log_dir", folder, "--checkpoint_every", "1", "--keep",
                    "99", *options))
            assert code == 0
            made[name] = folder
        return options, made[name]
    return run


# Record 6: the first shard ends at step 15, the cooldown begins at 14, batch 0 comes twice. The
# newest: stages begin at 8 and 16, so checkpoints of 8 and 16 stand on a change; odd steps have no
# checkpoint, as half of Adam's gradients are under way there.
@pytest.mark.parametrize("name, step", [("six", 1), ("six", 10), ("six", 14), ("six", 15),
                                        ("six", 19), ("newest", 2), ("newest", 8), ("newest", 12),
                                        ("newest", 16), ("newest", 22)])
def test_S7_a_resumed_run_is_the_same_bit_for_bit(train, whole, tmp_path, name, step):
    options, folder = whole(name)
    first = tmp_path / "logs"
    first.mkdir()
    shutil.copy(checkpoints(folder)[step], first)
    ran = train(*options, "--resume", "auto", "--checkpoint_every", "1000")
    assert ran.code == 0, ran.err
    old, new = checkpoints(folder), checkpoints(first)
    assert max(new) == max(old) > step
    assert differing(old[max(old)], new[max(new)]) == []
    schedule = [[{k: v for k, v in group.items() if k != "params"} for group in
                 state_of(c[max(c)])["optimizer"]["param_groups"]] for c in (old, new)]
    assert same(*schedule)  # learning rates, momentum


def test_S7_checkpoints_change_nothing(train, whole):
    options, folder = whole("six")
    ran = train(*options)
    plain, kept = (state_of(next(f.glob("*.pt")))["model"] for f in (ran.folder, folder))
    assert same(plain, kept)


def test_adam_on_every_second_step_is_saved_between_its_collections(whole):
    assert all(step % 2 == 0 for step in checkpoints(whole("newest")[1]))


@pytest.mark.ranks
@pytest.mark.parametrize("name, step", [("six", 4), ("newest", 4)])
def test_S6_another_number_of_ranks_goes_on(ranks, whole, tmp_path, name, step):
    """1 rank -> 2 ranks; 16 and 20 steps later the loss is within 1e-3."""
    options, folder = whole(name)
    (tmp_path / "logs").mkdir()
    shutil.copy(checkpoints(folder)[step], tmp_path / "logs")
    with ranks(2, *options, "--resume", "auto") as two:
        assert two.wait() == [0, 0], two.said()
        assert "not bit for bit" in two.said()
    log = logs_in(tmp_path / "logs")[-1]
    alone = result_of(logs_in(folder)[-1])["final_val_loss"]
    assert result_of(log)["final_val_loss"] == pytest.approx(alone, abs=1e-3)
    assert result_of(log)["world_size"] == 2


def test_S8_a_finished_run_has_nothing_left_to_do(train, whole):
    options, folder = whole("six")
    before = sorted(folder.iterdir())
    ran = train(*options, "--resume", "auto", folder=folder)
    assert ran.code == 0 and "nothing is left to do" in ran.out
    assert sorted(folder.iterdir()) == before
    ran = train(*options, "--resume", checkpoints(folder)[20], folder=folder)
    assert ran.code == 0 and sorted(folder.iterdir()) == before


def test_S9_other_code_is_said(train, three, monkeypatch):
    sources = train_gpt.local_sources()
    monkeypatch.setattr(train_gpt, "local_sources",
                        lambda: sources | {"train_gpt.py": sources["train_gpt.py"] + "# new\n"})
    ran = train("--resume", "auto")
    assert ran.code == 0 and "the code has changed" in ran.err
    assert result_of(logs_in(three)[-1])["resumed"] is True  # so no record either way


def test_only_the_last_checkpoints_of_this_run_are_kept(train, tmp_path):
    (tmp_path / "logs").mkdir()
    foreign = tmp_path / "logs" / "another_run.step000001.ckpt"
    foreign.write_bytes(b"theirs")
    ran = train("--checkpoint_every", "1", "--keep", "2")
    assert ran.code == 0 and foreign.read_bytes() == b"theirs"
    foreign.unlink()
    assert sorted(checkpoints(ran.folder)) == [5, 6]


def test_a_checkpoint_holds_its_tensors_and_no_buffers(train):
    """Parameters are views of flat buffers; saved as such, each would bring the whole buffer."""
    ran = train("--checkpoint_every", "6")
    state = state_of(checkpoints(ran.folder)[6])
    size = sum(t.numel() * t.element_size() for t in state["model"].values())
    assert next(ran.folder.glob("*.pt")).stat().st_size < 1.2 * size + 50_000


@pytest.mark.ranks
def test_a_checkpoint_that_takes_longer_than_the_timeout_is_waited_for(ranks, tmp_path):
    """The others know that one rank is writing: 6 GB on a slow disk are no lost rank."""
    with ranks(2, "--checkpoint_every", 3, "--timeout_s", 3, faults=("slow_save:3:4",)) as both:
        assert both.wait(120) == [0, 0], both.said(0) + both.said(1)
        assert "no heartbeat" not in both.said(0) + both.said(1)
    assert set(checkpoints(tmp_path / "logs")) == {3, 6}
