"""The host never waits for the device while it trains: counted without a GPU.

A step is a queue of work for the device. Whoever reads a number back (`.item()`, `if tensor:`,
`nonzero`, a mask as an index, a copy to or from ordinary memory) empties that queue, and the device
idles until the host has filled it again. Here the real trainer, model and optimizer run on torch's
meta device, where shapes exist and numbers do not. Whatever would make the host wait needs a number
there, so it cannot hide: `Watch` counts it. (Fake CUDA tensors would be closer, but torch without
CUDA has no autograd for them.) On a GPU the last test asks CUDA itself.
"""

import traceback
from collections import Counter

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import kernels.attention
import recipes
import train_gpt
from conftest import tiny_options
from data.loader import Batch
from recipes import RECORDS, edit
from trainer.dist import World
from trainer.status import StepStatus

aten = torch.ops.aten
RECIPES = [2, 6, 12, 24, 38, 53, 62]
META = torch.device("meta")
ONE = World(rank=0, local_rank=0, size=1, device=META)

# What reads numbers back, or gives a shape that depends on them.
READS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.allclose,
         aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.repeat_interleave.Tensor,
         aten.bincount, aten.histc, aten._linalg_check_errors}
COPIES = {aten.copy_, aten._to_copy, aten.index_put_, aten.index_put}
# What launches nothing: views, and bookkeeping of autograd.
NO_LAUNCH = {aten.view, aten.t, aten.transpose, aten.slice, aten.detach, aten._unsafe_view,
             aten.as_strided, aten.unsqueeze, aten.squeeze, aten.select, aten.expand, aten.split,
             aten.permute, aten.alias, aten.unbind, aten.split_with_sizes, aten.empty,
             aten.empty_like, aten.new_empty, aten.lift_fresh, aten._reshape_alias, aten.diagonal,
             aten.new_empty_strided, aten.empty_strided, aten.unfold, aten.view_as_real,
             aten._local_scalar_dense}


class Made(TorchFunctionMode):
    """Notes tensors made on the device from Python numbers: a copy, of which the meta device's
    dispatcher hears nothing."""

    def __init__(self, watch: "Watch"):
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if func in (torch.tensor, torch.as_tensor) and self.watch.device == META and (
                device is not None and torch.device(device).type == "meta"):
            self.watch._note("torch.tensor on the device")
        return func(*args, **kwargs)


class Watch(TorchDispatchMode):
    """Counts what happens on `device`: `syncs` (function, operator, place) make the host wait,
    `launches` are calls by operator. On the meta device, numbers that are read are zeros."""

    def __init__(self, device: torch.device = META):
        super().__init__()
        self.device, self.syncs, self.launches = device, [], Counter()
        self._made = Made(self)

    def _here(self, values: list) -> list[torch.Tensor]:
        flat = [x for v in values for x in (v if isinstance(v, list | tuple) else [v])]
        return [x for x in flat if isinstance(x, torch.Tensor)]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, packet = kwargs or {}, func.overloadpacket
        tensors = self._here([*args, *kwargs.values()])
        ours = [x for x in tensors if x.device.type == self.device.type]
        if ours and (packet in READS or func in READS):
            self._note(str(func))
            return func(*args, **kwargs) if self.device != META else self._made_up(func, args)
        if packet in (aten.index, aten.index_put, aten.index_put_) and any(
                x.dtype == torch.bool for x in ours if x is not args[0]):
            self._note(f"{func} with a mask")
            return args[0] if "put" in str(packet) else args[0].new_empty(1)
        to = kwargs.get("device")
        to = torch.device(to) if to is not None else args[0].device if (
            args and isinstance(args[0], torch.Tensor)) else None
        if packet in (aten.copy_, aten._to_copy) and to is not None and tensors:
            source = (args[1] if packet is aten.copy_ else args[0]).device.type
            blocking = not (kwargs.get("non_blocking") or (
                packet is aten.copy_ and len(args) > 2 and args[2]))
            if source != to.type and self.device.type in (source, to.type) and blocking:
                self._note(f"{func} from {source} to {to.type}")
            if source == self.device.type != to.type:  # no numbers to copy
                return args[0] if packet is aten.copy_ else torch.zeros(
                    args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if (ours or (to is not None and to.type == self.device.type)) and packet not in NO_LAUNCH:
            self.launches[str(packet)] += 1
        # torch has no meta kernel for the first, and 2.11 has none for the second
        if func in (aten._scaled_mm.out, aten.addmm.dtype_out):
            return kwargs["out"]
        return func(*args, **kwargs)

    def _note(self, what: str) -> None:
        own = ("_note", "__torch_dispatch__", "__torch_function__")
        last = [f for f in traceback.extract_stack()
                if "/torch/" not in f.filename and f.name not in own][-1]
        self.syncs.append((last.name, what, f"{last.filename.rpartition('/')[2]}:{last.lineno}"))

    def __enter__(self):
        self._made.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._made.__exit__(*error)

    def _made_up(self, func, args):
        packet = func.overloadpacket
        if packet is aten._local_scalar_dense:
            return 0.0 if args[0].is_floating_point() else 0
        if packet in (aten.equal, aten.allclose):
            return True
        x = args[0]
        return x.new_empty((1, x.ndim), dtype=torch.long) if packet is aten.nonzero else \
            x.new_empty(1)


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """Attention as on a GPU: varlen over the bounds of documents."""
    monkeypatch.setattr(kernels.attention, "has_varlen",
                        lambda device, dtype: dtype == torch.bfloat16)


def recipe_of(record: int, num_layers: int = 3) -> recipes.Recipe:
    """The record as it is, but narrow; meta tensors cost no memory, only operators cost time."""
    return edit(RECORDS[record], num_layers=num_layers, num_heads=2, head_dim=16, vocab_size=257)


def make(recipe: recipes.Recipe, device: torch.device = META):
    """(model, optimizer, status) as train_gpt.setup makes them."""
    model = recipes.build_model(recipe, 0).to(device)
    world = World(0, 0, 1, device)
    status = StepStatus(world, model.named_parameters())
    optimizer = train_gpt.build_optimizer(model, recipe)
    optimizer.gate = status.gate
    return model, optimizer, status


def small_batch(device: torch.device = META) -> Batch:
    """Four rows with documents of 32 tokens, as a Loader of packed rows gives them."""
    tokens_BT = torch.arange(4 * 128).view(4, 128) % 256
    tokens_BT[:, ::32] = 256
    docs_B2 = torch.tensor([[4, 32]] * 4)  # documents, tokens of the longest: known to the host
    return Batch(tokens_BT.int().to(device), tokens_BT.to(device), docs_B2)


def one_step(recipe, step, model, optimizer, status, batch, num_micro=2) -> None:
    """What train_loop does between two steps' ends, but for the loader and the clock."""
    recipes.enter_phase(model, optimizer, recipes.phase(step, recipe))
    for group in optimizer.param_groups:
        group.update(recipes.group_schedule(step, group["name"], recipe))
    num_tokens = batch.inputs_BT.numel()
    train_gpt.train_step(model, optimizer, recipe, batch, num_tokens // num_micro, num_tokens,
                         status)


def interesting_steps(recipe: recipes.Recipe) -> list[int]:
    """Changes of phase with the steps behind them, and a pair in the middle of nowhere."""
    firsts = recipes.phase_steps(recipe)
    if len(firsts) > 6:  # windows that grow block by block: all changes are alike
        firsts = [firsts[1], firsts[-1]]
    steps = {0, 1, 101} | {s for first in firsts for s in (first, first + 1)}
    return sorted(s for s in steps if s < recipe.num_iterations)



@pytest.mark.parametrize("record", RECIPES)
def test_no_step_and_no_change_of_stage_waits_for_the_device(record):
    recipe, batch = recipe_of(record), small_batch()
    model, optimizer, status = make(recipe)
    for step in interesting_steps(recipe):
        with Watch() as watch:
            one_step(recipe, step, model, optimizer, status, batch)
        assert not watch.syncs, f"step {step}: {watch.syncs}"
        assert watch.launches, "nothing was watched"


def test_in_a_plain_step_there_is_not_even_a_known_wait():
    recipe, batch = recipe_of(24), small_batch()
    parts = make(recipe)
    for step in (0, 1, 100):
        with Watch() as watch:
            one_step(recipe, step, *parts, batch)
        assert not watch.syncs


# --- the watch itself can fail --------------------------------------------------------------------

CULPRITS = {
    "item": lambda x: x.sum().item(),
    "if": lambda x: bool(x.sum() > 0),
    "float": lambda x: float(x.sum()),
    "nonzero": lambda x: x.nonzero(),
    "mask as index": lambda x: x[x > 0],
    "masked_select": lambda x: x.masked_select(x > 0),
    "equal": lambda x: torch.equal(x, x),
    "to the host": lambda x: x.cpu(),
    "copied to the host": lambda x: torch.empty(x.shape).copy_(x),
    "from the host": lambda x: x.copy_(torch.zeros(x.shape)),
    "a number made on the host": lambda x: x + torch.tensor([1.0, 2.0], device=x.device)[0],
}


@pytest.mark.parametrize("culprit", CULPRITS)
def test_whatever_makes_the_host_wait_is_counted(culprit):
    with Watch() as watch:
        CULPRITS[culprit](torch.empty(4, 4, device=META))
    assert len(watch.syncs) == 1, watch.syncs


def test_what_does_not_make_it_wait_is_not_counted():
    x, host = torch.empty(4, device=META), torch.empty(4)
    with Watch() as watch:
        host.copy_(x, non_blocking=True)
        x.copy_(host, non_blocking=True)
        x[0].fill_(1.0)
        torch.where(x > 0, x, 0.0).sum()
        torch.nonzero_static(x, size=2)
        torch.tensor([1, 2])  # on the host, and stays there
    assert not watch.syncs


def test_a_model_that_reads_its_loss_back_is_caught():
    recipe = recipe_of(6)
    model, optimizer, status = make(recipe)
    forward = model.forward

    def talkative(*batch):
        loss = forward(*batch)
        assert loss.item() == 0  # the meta device's loss
        return loss

    model.forward, batch = talkative, small_batch()
    with Watch() as watch:
        one_step(recipe, 0, model, optimizer, status, batch, num_micro=2)
    assert [found[:2] for found in watch.syncs] == \
        2 * [("talkative", "aten._local_scalar_dense.default")]


# --- what the loop does besides -------------------------------------------------------------------

def test_the_host_hears_of_a_step_through_pinned_memory_and_an_event(monkeypatch):
    """send() copies without waiting; receive() waits for that copy alone, a step later."""
    order = []

    class Event:
        def record(self):
            order.append("recorded")

        def synchronize(self):
            order.append("waited")

    empty, pinned = torch.empty, []

    def counted(*size, pin_memory=False, **rest):
        pinned.append(pin_memory)
        return empty(*size, **rest)

    recipe = recipe_of(6)
    model, optimizer, status = make(recipe)
    with Watch():
        one_step(recipe, 0, model, optimizer, status, small_batch())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "empty", counted)
    status.world = World(0, 0, 1, torch.device("cuda"))
    with Watch() as watch:
        status.send(0, 1.0)
    assert not watch.syncs and pinned == [True] and order == ["recorded"]
    report = status.receive()
    assert order == ["recorded", "waited"] and report.step == 0
    assert status.receive() is None


def test_only_validation_reads_numbers_in_a_whole_run(tiny_data, tmp_path, monkeypatch):
    """The real loop on a CPU: every place that asks a tensor for its value, by function."""
    monkeypatch.setattr(train_gpt, "generate", lambda *_, **__: "")  # token by token, at the end
    with Watch(torch.device("cpu")) as watch:
        code = train_gpt.main(tiny_options(
            "--data_dir", tiny_data, "--log_dir", tmp_path, "--num_iterations", "4"))
    assert code == 0
    assert Counter(f[0] for f in watch.syncs)["evaluate"] == 3 + 1  # steps 0, 3, 4; the warm-up's
    # The optimizer looks at its numbers on CPUs only, as the tests above show.
    read = {name for name, _, place in watch.syncs if not place.startswith("muon.py")}
    assert read <= {"evaluate", "<listcomp>"}  # of the warm-up's comparison, before the clock


# --- launches -------------------------------------------------------------------------------------

def launches(record: int, num_layers: int) -> dict[str, int]:
    """Operators that reach the device in one micro-batch and in the update, on one rank; eager,
    where compiled graphs have fewer kernels. Counted on 2026-11-22, layers as in the records:

        record                   2     6    12    24    38    53    62
        forward and backward  1796  2276  2441  2246  2230  2235  2446
        optimizer              201   230   303   342   429   539   632
    """
    recipe, batch = recipe_of(record, num_layers), small_batch()
    model, optimizer, _ = make(recipe)
    recipes.enter_phase(model, optimizer, recipes.phase(1, recipe))
    for group in optimizer.param_groups:
        group["step_count"] = 1  # so that groups of every second step are due
    with Watch() as forward_backward:
        model(batch.inputs_BT, batch.targets_BT, batch.docs_B2).backward()
    with Watch() as update:
        optimizer.step()
        optimizer.zero_grad()
    return {"forward and backward": sum(forward_backward.launches.values()),
            "optimizer": sum(update.launches.values())}


@pytest.mark.parametrize("record", [6, 62])
def test_the_optimizer_launches_no_more_for_more_layers(record):
    """Matrices of one shape are updated in one batch, scalars too: 8 layers take the launches of
    4. A loop over parameters would take twice as many."""
    few, many = (launches(record, num_layers)["optimizer"] for num_layers in (4, 8))
    assert many <= 1.15 * few, f"4 layers: {few} launches, 8 layers: {many}"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
@pytest.mark.parametrize("record", [6, 24, 62])
def test_cuda_itself_sees_no_wait(record, monkeypatch):
    monkeypatch.undo()  # the GPU's own choice of attention
    device = torch.device("cuda", 0)
    recipe = recipe_of(record)
    model, optimizer, status = make(recipe, device)
    batch = small_batch(device)
    for step in (0, 1):  # the first ones allocate
        one_step(recipe, step, model, optimizer, status, batch)
    try:
        torch.cuda.set_sync_debug_mode("error")
        for step in (100, 101):
            one_step(recipe, step, model, optimizer, status, batch)
            status.send(step, 0.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


if __name__ == "__main__":  # PYTHONPATH=. python tests/test_host_syncs.py: the counts
    kernels.attention.has_varlen = lambda device, dtype: dtype == torch.bfloat16
    for record in RECIPES:
        print(record, launches(record, RECORDS[record].model.num_layers))
