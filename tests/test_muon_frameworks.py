"""README's snippets of muon.py, run as printed: each trains like a plain loop, to 1e-9 in fp64.

The plain loop knows nothing of muon.py: Muon by singular values and the published polynomials of
Polar Express, Adam by torch.optim.AdamW, the batches of all ranks in one process. The frameworks
are those of tests/requirements-frameworks.txt; where one is absent its tests are skipped.
"""

import functools
import os
import re

import muon_helpers as h
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import muon
from conftest import ROOT

LEARNING_RATES = 0.02, 3e-4  # as the snippets have them: of Muon, of Adam
STEPS, SAVED = 5, 3  # of a training; the step after which some are resumed


@functools.cache
def snippets() -> dict[str, str]:
    """Code by name: the words after "# snippet:" up to the first punctuation."""
    section = (ROOT / "README.md").read_text().split("\n## Muon in your own training\n")[1]
    code = "\n".join(re.findall(r"```python\n(.*?)```", section.split("\n## ")[0], re.DOTALL))
    _, *parts = re.split(r"^# snippet: ([\w ]+).*\n", code, flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def run(*names: str, **variables) -> dict:
    """These snippets in turn, after "groups", in one namespace, which is returned."""
    for name in ("groups", *names):
        exec(compile(snippets()[name], f"README.md, snippet {name}", "exec"), variables)
    return variables


class Tiny(nn.Module):
    """A language model of 16 tokens in fp64; forward gives the mean loss of rows x_BT."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(16, 8)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 8)) for _ in range(2))
        self.head = nn.Linear(8, 16, bias=False)
        self.double()

    def forward(self, x_BT):
        h_BTD = self.embed(x_BT[:, :-1])
        for layer in self.layers:
            h_BTD = h_BTD + layer(h_BTD)
        return F.cross_entropy(self.head(h_BTD).flatten(0, 1), x_BT[:, 1:].flatten())


def token_batches(steps=STEPS):
    """Batches of 4 rows of 7 tokens."""
    return list(torch.randint(16, (steps, 4, 7), generator=h.generator(1)))


class Plain:
    """The reference optimizer; step(factor) takes a step with both learning rates times factor."""

    def __init__(self, model):
        named = list(model.named_parameters())
        self.hidden = [p for n, p in named if "layers." in n and p.ndim == 2]
        rest = [p for _, p in named if not any(p is q for q in self.hidden)]
        self.adam = torch.optim.AdamW(rest, weight_decay=0)
        self.buffers = [torch.zeros_like(p) for p in self.hidden]

    @torch.no_grad()
    def step(self, factor=1.0):
        self.adam.param_groups[0]["lr"] = LEARNING_RATES[1] * factor
        self.adam.step()
        lr = LEARNING_RATES[0] * factor
        for p, buffer in zip(self.hidden, self.buffers):
            buffer.mul_(0.95).add_(0.05 * p.grad)
            U, S, Vh = torch.linalg.svd(0.95 * buffer + 0.05 * p.grad, full_matrices=False)
            S = h.scalar_map(h.RECORD_LIST, S / (1.02 * S.norm()))
            scale = max(1, p.shape[0] / p.shape[1]) ** 0.5
            p.mul_(1 - lr * 0.1).sub_(lr * scale * U @ torch.diag(S) @ Vh)


def trained_plainly(model, batches, factors=(1.0,) * STEPS, clip=None):
    """`model` after a step of the reference for each batch and factor."""
    optimizer = Plain(model)
    for x, factor in zip(batches, factors, strict=True):
        model.zero_grad()
        model(x).backward()
        if clip is not None:
            assert nn.utils.clip_grad_norm_(model.parameters(), clip) > clip
        optimizer.step(factor)
    return model


def factors_of(make_schedule, steps=STEPS):
    """lr over its peak at every step of a torch scheduler."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule, factors = make_schedule(optimizer), []
    for _ in range(steps):
        factors.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return factors


def cosine():
    return factors_of(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, STEPS))


def assert_same_weights(model, expected, atol=1e-9):
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        p = p.full_tensor() if hasattr(p, "full_tensor") else p
        torch.testing.assert_close(p, q, rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


# --------------------------------------------------------------------------------- torch alone


def test_the_loop_trains_like_the_plain_one():
    model = run("one process", "loop", model=Tiny(), batches=token_batches(), torch=torch)["model"]
    assert_same_weights(model, trained_plainly(Tiny(), token_batches(), cosine()))


def test_bf16_parameters_are_rounded_fp32_weights():
    """The same gradients go to fp32 weights: what bf16 alone would lose, 3e-4 of 1, is kept."""
    model, wide = Tiny().bfloat16(), Tiny().bfloat16().float()
    optimizer, reference = run("one process", model=model)["optimizer"], Plain(wide)
    for x in token_batches(20):
        model(x).backward()
        for p, q in zip(model.parameters(), wide.parameters()):
            q.grad = p.grad.float()
        optimizer.step()
        optimizer.zero_grad()
        reference.step()
    for p, q in zip(model.parameters(), wide.parameters()):
        master = optimizer.state[p]["master"]
        torch.testing.assert_close(master, q.detach(), rtol=0, atol=1e-5)
        assert torch.equal(p, master.bfloat16())


def test_the_new_rule_is_lion(monkeypatch):
    """Chen et al. 2023, algorithm 2, by hand."""
    w, lr, decay = h.gaussian(5, 3).double(), 1e-2, 0.1
    p, mean = nn.Parameter(w.clone()), torch.zeros(5, 3, dtype=torch.float64)
    monkeypatch.setitem(muon.RULES, "lion", None)  # and away with it after this test
    run("a new rule")
    optimizer = muon.Muon([{"params": [p], "rule": "lion", "lr": lr, "weight_decay": decay}])
    for step in range(4):
        grad = h.gaussian(5, 3, seed=step).double()
        h.step_with(optimizer, [grad])
        w = w - lr * ((0.9 * mean + 0.1 * grad).sign() + decay * w)
        mean = 0.99 * mean + 0.01 * grad
    torch.testing.assert_close(p.detach(), w, rtol=0, atol=1e-12)


def test_a_model_converted_after_the_optimizer_was_made_can_be_resumed():
    """As accelerate does: it makes the optimizer, moves the model, then loads the state."""
    model, twin = Tiny().float(), Tiny().float()
    ours = muon.Adam(model.parameters())
    theirs = torch.optim.AdamW(twin.parameters(), weight_decay=0)
    for step, x in enumerate(token_batches()):
        for m, optimizer in ((model, ours), (twin, theirs)):
            optimizer.zero_grad()
            m(x).backward()
            optimizer.step()
            if step == SAVED:
                m.double()
                optimizer.load_state_dict(optimizer.state_dict())
    assert_same_weights(model, twin, atol=1e-6)


# ------------------------------------------------------------------------------- several ranks


def rows_of(batches, rank, world_size):
    return [x.tensor_split(world_size)[rank] for x in batches]


def clip_half(model):
    def before_step(*_):
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    return before_step


def in_ranks(rank, world_size):
    batches = token_batches()
    given = {"batches": rows_of(batches, rank, world_size), "torch": torch}
    model = run("one process", "loop", model=Tiny(), **given)["model"]
    assert_same_weights(model, trained_plainly(Tiny(), batches, cosine()))

    names = run("one process", model=Tiny())
    for x in given["batches"]:
        exec(snippets()["overlap"], names | {"x": x})
        names["optimizer"].step()
        names["optimizer"].zero_grad()
    assert_same_weights(names["model"], trained_plainly(Tiny(), batches))

    expected = trained_plainly(Tiny(), batches, cosine(), clip=0.5)
    for way in ("DDP", "FSDP2"):
        names = run(way, model=Tiny(), **given)
        names["optimizer"].register_step_pre_hook(clip_half(names["model"]))
        exec(snippets()["loop"], names)
        assert_same_weights(names["model"], expected)


@pytest.mark.ranks
def test_ranks_train_like_one_process(tmp_path):
    h.run_ranks(2, tmp_path, in_ranks)


# ---------------------------------------------------------------------------------- frameworks


@pytest.mark.filterwarnings("default")
def test_lightning_trains_with_a_schedule_and_resumes(tmp_path):
    lightning = pytest.importorskip("lightning")
    from lightning.pytorch.callbacks import ModelCheckpoint

    one_cycle = functools.partial(torch.optim.lr_scheduler.OneCycleLR, total_steps=STEPS,
                                  cycle_momentum=False)
    batches = token_batches()

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = Tiny()

        def training_step(self, *_):
            return self.model(batches[self.global_step])

        def configure_optimizers(self):
            optimizer = run("Lightning")["configure_optimizers"](self)
            schedule = one_cycle(optimizer, max_lr=list(LEARNING_RATES))
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def fit(**options):
        module = Module()
        keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=SAVED, save_top_k=-1)
        trainer = lightning.Trainer(
            accelerator="cpu", max_steps=STEPS, callbacks=keep, logger=False,
            enable_progress_bar=False, enable_model_summary=False)
        trainer.fit(module, torch.utils.data.DataLoader(range(99)), **options)
        return module.model

    model = fit()
    factors = factors_of(lambda o: one_cycle(o, max_lr=1.0))
    assert_same_weights(model, trained_plainly(Tiny(), batches, factors))
    assert_same_weights(fit(ckpt_path=tmp_path / f"step={SAVED}.ckpt"), model, atol=0)


def with_accelerate(rank, world_size, folder):
    """Train, save, go on; then the same from what was saved."""
    import accelerate
    from safetensors.torch import load_file

    accelerator, batches = accelerate.Accelerator(cpu=True), token_batches()

    def prepared():
        loader = torch.utils.data.DataLoader(torch.cat(batches), batch_size=4 // world_size)
        names = run("accelerate", model=Tiny(), accelerator=accelerator, batches=loader)
        return [names[name] for name in ("model", "optimizer", "batches")]

    def train(model, optimizer, x):
        accelerator.backward(model(x))
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer, loader = prepared()
    for step, x in enumerate(loader):
        if step == SAVED:
            accelerator.save_state(f"{folder}/state")
            accelerator.save_model(model, f"{folder}/model")
            accelerator.wait_for_everyone()
        train(model, optimizer, x)
    assert_same_weights(model, trained_plainly(Tiny(), batches))
    at_saved = trained_plainly(Tiny(), batches[:SAVED], (1.0,) * SAVED).state_dict()
    for saved in ("state", "model"):  # all of it
        weights = load_file(f"{folder}/{saved}/model.safetensors")
        torch.testing.assert_close(weights, dict(at_saved), rtol=0, atol=1e-9)

    accelerator.free_memory()
    resumed, optimizer, _ = prepared()
    accelerator.load_state(f"{folder}/state")
    for x in rows_of(batches[SAVED:], rank, world_size):
        train(resumed, optimizer, x)
    assert_same_weights(resumed, model, atol=0)


@pytest.mark.filterwarnings("default")
def test_accelerate_saves_everything_and_resumes(tmp_path):
    pytest.importorskip("accelerate")
    with_accelerate(0, 1, str(tmp_path))


def with_transformers(rank, world_size, folder):
    """Train a tiny Llama by transformers.Trainer, resume another one, compare both."""
    import transformers

    class Llama(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
                vocab_size=16, hidden_size=8, intermediate_size=24, num_hidden_layers=2,
                num_attention_heads=2, max_position_embeddings=16)).double()

        def forward(self, x):
            return self.model(input_ids=x, labels=x).loss

    def train(checkpoint=None):
        args = transformers.TrainingArguments(
            folder, max_steps=STEPS, save_steps=SAVED, max_grad_norm=0.5, use_cpu=True,
            per_device_train_batch_size=4 // world_size, train_sampling_strategy="sequential",
            report_to=[], disable_tqdm=True)
        data = [{"input_ids": row, "labels": row} for row in torch.cat(token_batches())]
        model = Llama().model
        run("transformers", model=model, args=args, data=data,
            Trainer=transformers.Trainer)["trainer"].train(resume_from_checkpoint=checkpoint)
        return model

    model, factors = train(), [1 - step / STEPS for step in range(STEPS)]
    expected = trained_plainly(Llama(), token_batches(), factors, clip=0.5)
    assert_same_weights(model, expected.model)
    assert_same_weights(train(f"{folder}/checkpoint-{SAVED}"), model, atol=0)


@pytest.mark.filterwarnings("default")
def test_transformers_trains_with_a_schedule_and_resumes(tmp_path):
    pytest.importorskip("transformers")
    with_transformers(0, 1, str(tmp_path))


def frameworks_in_ranks(rank, world_size, folder):
    for name, number in (("RANK", rank), ("WORLD_SIZE", world_size)):  # as torchrun does
        os.environ[name] = os.environ[f"LOCAL_{name}"] = str(number)
    with_accelerate(rank, world_size, f"{folder}/accelerate")
    with_transformers(rank, world_size, f"{folder}/transformers")


@pytest.mark.ranks
def test_accelerate_and_transformers_on_two_ranks(tmp_path):
    """accelerate saves the optimizer's state on all ranks, the Trainer of transformers on one."""
    pytest.importorskip("accelerate")
    pytest.importorskip("transformers")
    h.run_ranks(2, tmp_path, frameworks_in_ranks, str(tmp_path))
