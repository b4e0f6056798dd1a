"""What a device computes in a recipe's own dtypes, against fp64 on a CPU: loss, gradients, updates.

On a GPU: eager and compiled, the fp8 head, each Triton kernel, the optimizer in each mode. On a CPU
one small case of each, so that the test is known to run and to fail. Bounds are what bf16 rounding
costs the same recipe on a CPU, measured: 3e-5 of the loss and 0.009 of the gradients; times 3 and
more. fp8 rounds gradients to three bits.
"""

import golden
import pytest
import torch

import muon
import recipes
import train_gpt
from kernels import symmetric
from kernels.attention import activate_flash_attention
from trainer.compile import compile_segments
from trainer.dist import World

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
DTYPES = ("compute_dtype", "stream_dtype", "embed_dtype", "head_dtype", "head")


def small(record: int) -> recipes.Recipe:
    """A recipe at pocket scale in the dtypes of full size; an eps that would depend on them is set,
    so that fp64 can have the same."""
    full = recipes.RECORDS[record]
    dtypes = {name: getattr(full, name, None) or getattr(full.model, name) for name in DTYPES}
    if not ON_GPU and dtypes["head"] == "fp8":  # emulated, for minutes
        dtypes["head"] = "bf16"
    eps = full.model.norm_eps or 2.0**-23
    return recipes.edit(recipes.pocket(full), **dtypes, norm_eps=eps)


def distance(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """||found - wanted|| / ||wanted|| of all tensors together."""
    both = [(found[name].cpu().double(), wanted[name].double()) for name in wanted]
    return (sum((a - b).square().sum() for a, b in both)
            / sum(b.square().sum() for _, b in both)).sqrt().item()


def loss_and_gradients(model, recipe, folder, device) -> tuple[float, dict[str, torch.Tensor]]:
    """Of the mean loss of one step's tokens. Documents, windows and targets are the recipe's."""
    world = World(rank=0, local_rank=0, size=1, device=device)
    model.set_phase(recipes.phase(0, recipe))
    with train_gpt.make_loader(recipe, golden.data_in(folder), world, None) as loader:
        batch = next(loader)
    loss = model(batch.inputs_BT, batch.targets_BT, batch.docs_B2) / batch.inputs_BT.numel()
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()
                         if p.grad is not None}


def gradients_differ(record: int, folder, compiled: bool,
                     kernels: frozenset = frozenset()) -> tuple[float, float]:
    """Relative error of loss and gradients on the device."""
    golden.write_tokens(folder)
    recipe = small(record)
    activate_flash_attention(DEVICE)
    model = train_gpt.build_model(recipe, 0, DEVICE, kernels)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(golden.noise(name, p.shape).to(DEVICE))
    reference_recipe = recipes.edit(recipe, **golden.FP64)
    reference = train_gpt.build_model(reference_recipe, 0, torch.device("cpu")).double()
    reference.load_state_dict(model.state_dict())
    if compiled:
        compile_segments(model)
    loss, grads = loss_and_gradients(model, recipe, folder, DEVICE)
    wanted, wanted_grads = loss_and_gradients(reference, reference_recipe, folder,
                                              torch.device("cpu"))
    assert grads.keys() == wanted_grads.keys()
    return abs(loss - wanted) / wanted, distance(grads, wanted_grads)


CASES = [(1, False, ""), (6, False, ""), (12, False, ""), (23, False, ""), (62, False, ""),
         (6, True, ""), (23, True, ""), (62, True, ""), (23, False, "relu2"), (23, False, "loss"),
         (62, True, "relu2,loss")]
ON_CPU = [(6, False, ""), (23, False, "")]


@pytest.mark.gpu
@pytest.mark.parametrize("record, compiled, kernels", CASES if ON_GPU else ON_CPU)
def test_loss_and_gradients_are_those_of_fp64(record, compiled, kernels, tmp_path):
    loss, grads = gradients_differ(record, tmp_path, compiled,
                                   frozenset(kernels.split(",")) - {""})
    fp8 = ON_GPU and recipes.RECORDS[record].model.head == "fp8"
    assert loss < (1e-2 if fp8 else 3e-4)
    assert grads < (0.25 if fp8 else 0.03)


# Bounds: five times the error of iterates in fp16 (4e-4) and bf16 (3e-3), emulated on a CPU.
MUON = {"rule": "muon", "lr": 0.02, "weight_decay": 0.1, "method": "polar_express"}
RULES = {
    "accurate": (MUON, 2e-3),
    "fast": (MUON | {"mode": "fast"}, 0.01),
    "NorMuon": (MUON | {"second_moment": "row"}, 2e-3),
    "heads": (MUON | {"split": 4, "momentum_form": "heavy_ball", "scale": "unit_rms"}, 2e-3),
    "rows": (MUON | {"norm": "row"}, 1e-4),
    "adam": ({"rule": "adam", "lr": 0.02, "weight_decay": 0.1}, 1e-4),
}
SHAPES = [(256, 256), (256, 256), (1024, 256), (256, 1024)]


def weights_after(options: dict, dtype: torch.dtype, device: torch.device, **settings) -> dict:
    """Of three steps with the same gradients everywhere; exact ones of bf16 parameters."""
    torch.manual_seed(0)
    starts = [torch.randn(shape).bfloat16() for shape in SHAPES]
    params = [torch.nn.Parameter(p.clone().to(device, dtype)) for p in starts]
    optimizer = muon.Muon([{"params": params, **options}], **settings)
    for _ in range(3):
        for p in params:
            p.grad = torch.randn(p.shape).bfloat16().to(device, dtype)
        optimizer.step()
    return {str(n): optimizer.state[p].get("master", p).detach().cpu().double() - start.double()
            for n, (p, start) in enumerate(zip(params, starts))}


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True] if ON_GPU else [False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES)
def test_updates_are_those_of_fp64(rule, dtype, compiled):
    options, bound = RULES[rule]
    products = (symmetric.gram, symmetric.polynomial) if ON_GPU and rule == "fast" else None
    wanted = weights_after(options, torch.float64, torch.device("cpu"))
    found = weights_after(options, dtype, DEVICE, compile=compiled, products=products)
    assert distance(found, wanted) < bound
