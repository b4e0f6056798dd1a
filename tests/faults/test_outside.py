"""What lies outside: Weights & Biases, and secrets that must not get out."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

import train_gpt
from faults.helpers import assert_refused, result_of
from trainer import report

SECRET = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def wandb(monkeypatch):
    """wandb(fails_in) puts a module in its place that raises there."""
    calls = []

    def install(fails_in: str) -> list[str]:
        def act(name: str):
            def function(*_, **__):
                calls.append(name)
                if name == fails_in:
                    raise ConnectionError(f"{name}: no server, your key was {SECRET}")
                return SimpleNamespace(log=act("log"), finish=act("finish"))
            return function

        module = ModuleType("wandb")
        module.init = act("init")
        monkeypatch.setitem(sys.modules, "wandb", module)
        return calls
    return install


@pytest.mark.parametrize("fails_in", ["init", "log", "finish"])
def test_wandb_that_fails_stops_nothing_and_tells_no_secret(train, wandb, monkeypatch, fails_in):
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    calls = wandb(fails_in)
    ran = train("--wandb")
    assert ran.code == 0 and result_of(ran.logs[0])["status"] == "complete"
    assert fails_in in calls
    if fails_in != "finish":
        assert "wandb: " in ran.out and calls.count(fails_in) == 1  # tried once, not at every step
    assert SECRET not in ran.out + ran.err + ran.logs[0].read_text()


def test_wandb_that_never_answers_at_the_end(train, wandb, monkeypatch):
    import threading

    wandb("nowhere")
    asleep = threading.Event()
    monkeypatch.setattr(report.Reporter, "_finish_wandb", lambda self: asleep.wait())
    monkeypatch.setattr(report, "WANDB_PATIENCE_S", 0.2)
    ran = train("--wandb")
    asleep.set()
    assert ran.code == 0 and result_of(ran.logs[0])["status"] == "complete"


def test_wandb_that_is_not_installed(train, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    ran = train("--wandb", "--num_iterations", "2")
    assert ran.code == 0 and "wandb: not logging" in ran.out


def test_secrets_of_the_environment_never_reach_a_log(train, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "A1b2" * 8)
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setattr(sys, "argv", ["train_gpt.py", "--data_dir", f"/data/{SECRET}"])
    ran = train("--num_iterations", "2")
    text = ran.logs[0].read_text()
    assert "command: train_gpt.py --data_dir /data/[WANDB_API_KEY]" in text
    for secret in (SECRET, "A1b2A1b2"):
        assert secret not in text + ran.out + ran.err


def test_a_source_with_a_secret_in_it_is_refused(train, monkeypatch):
    """Every log contains the sources."""
    monkeypatch.setenv("HF_TOKEN", "hf_" + "Zz9y" * 8)
    sources = train_gpt.local_sources()
    monkeypatch.setattr(train_gpt, "local_sources", lambda: sources | {
        "train_gpt.py": sources["train_gpt.py"] + "TOKEN = '" + "hf_" + "Zz9y" * 8 + "'\n"})
    ran = train()
    assert_refused(ran, "train_gpt.py contains the value of HF_TOKEN")
    assert "Zz9y" not in ran.out + ran.err and not ran.folder.exists()


@pytest.mark.parametrize("text, shown", [
    ("fetch https://me:pass@host/x", "fetch https://[login]@host/x"),
    ("--data_dir hf_abcdefghij0123456789", "--data_dir [token]"),
    ("run --api_key=abc123 now", "run --api_key=[secret] now"),
    ("password: none was given", "password: none was given"),
    ("step:3/6 val_loss:5.4562 train_time:64ms", "step:3/6 val_loss:5.4562 train_time:64ms"),
])
def test_what_looks_like_a_secret_is_blacked_out(text, shown):
    assert report.without_secrets(text) == shown
