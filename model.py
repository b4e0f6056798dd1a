"""The model: GPT-2's shape with what the speedrun found, each idea an `if` on the config.

`forward` reads from top to bottom as the model computes: GPT embeds tokens and runs the blocks, a
Block is Attention and MLP on the residual stream, the head gives the loss. Every idea is an `if` on
its field of GPTConfig, where it acts, with the record that brought it and its source.

To add an idea: a field in GPTConfig, an `if` where it acts, and, if it has parameters, one line
each in `parameter_table` (initialisation, and role for the optimizer). recipes.py turns it on.

What changes during training (windows, rotary frequencies, targets, tied or not) is a `Phase`:
`model.set_phase(phase)` between two steps.

Shapes: B rows, T tokens a row, C model_dim, H heads, D head_dim, V vocabulary (padded).
A tensor's name ends in its shape: x_BTC, q_BTHD, logits_BTV.
"""

import itertools
import math
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels import DTYPES
from kernels.attention import Keys, attention, document_ids, packed_keys
from kernels.loss import KERNELS, REFERENCES, Softcap, head_loss, softcapped, targets_ahead
from kernels.norm import FP32_EPS
from kernels.norm import rms_norm as norm
from kernels.relu2 import mlp_relu2, relu_squared

GATE_DIM = 12  # first channels of the stream, which gates look at (#28)
SIGN_ROWS = 8192    # of the table of signs (#83)
MIXER_DIM = 64      # hidden units of Mixer (#81)
MIXER_SCALE = 0.1   # factor of its output


@dataclass(frozen=True)
class GPTConfig:
    """Hyper-parameters of the model. Defaults: GPT-2 (124M) with rotary positions, as in #2."""

    # sizes
    num_layers: int = 12
    num_heads: int = 12
    head_dim: int = 64
    vocab_size: int = 50257         # true tokens; the last one opens a document
    pad_vocab: bool = False         # tables padded to a multiple of 64 rows (#5)
    seq_len: int = 1024             # tokens of the longest row in training
    max_seq_len: int | None = None  # of any row, in validation; none: seq_len
    mlp_ratio: int = 4

    # GPT-2 as record #1 trained it; all of it went with #2
    learned_positions: bool = False     # an embedding of positions in place of rotary
    layer_norm: bool = False        # LayerNorm with weight and bias in place of RMSNorm
    biases: bool = False            # in all matrices but the head
    gpt2_init: bool = False         # normal with 0.02

    # positions
    rotary_base: float = 10_000.0
    rotary_half: bool = False       # half of the dimensions stay put (#17)
    yarn: bool = False              # rotary frequencies follow the window (#31)

    # attention
    qk_norm: str = "none"           # RMSNorm of q and k: none, after (#5) or before (#6) rotary
    attn_scale: float | None = None     # of q k^T; none: 1/sqrt(head_dim); 0.12 in #20
    attn_damping: bool = False      # attention's output times 1/sqrt(2 num_layers) (#2 to #4)
    packed: bool = False            # documents do not see each other (#12)
    windows: str = "one"            # of all layers one, or long and short ones (#20)
    attn_gate: bool = False         # heads gated by the stream (#28)
    key_offset: bool = False        # keys of long layers half from the token before (#49)
    paired_heads: bool = False      # two heads share one stream in some short layers (#58)
    qkv_lambda: bool = False        # learned factors of QKV and output weights (#47)
    dc_window: int | None = None    # the last layer's heads mixed for each token, over so many keys
                                    # (dynamic composition, #85)
    xsa: bool = False               # attention's output without its own value's direction (#82)
    qk_apart: bool = False          # Q and K in one matrix, V in another, for Muon (#80)

    # values
    value_residual: bool = False    # mixed with the first layer's values (#9)
    value_embeds: str = "none"      # tables: none, all (#14), mirror (#15), ends (#17), apart
                                    # (#63), later (#70)
    value_mix: str = "one"          # (1-l) v + l e (#14), two (#15), add (#47), gate (#55, #70)

    # residual stream
    norm_eps: float | None = FP32_EPS   # of RMSNorms: 1e-6 (#2 to #4); none: that of the input's
                                    # dtype, 2^-7 for bf16 (#5 to #18, torch before 2025)
    embed_norm: bool = False        # RMSNorm right after the embedding (#8)
    x0_lambdas: bool = False        # x = a x + b x0 at the start of each block (#9)
    resid_lambda: float = 1.0       # initial a; 1.1 from #45, its root twice a layer from #73
    sublayer_lambdas: bool = False  # attention and MLP weighed by themselves, x0 between (#73)
    late_input: bool = False        # attention of the last layers reads a middle one's output (#77)
    mudd: bool = False              # a small MLP weighs earlier outputs for each token (#81)
    token_gates: bool = False       # x0, bigram, XSA, attention, skip weighed by tokens too (#85)
    unet: str = "none"              # skips: weight (#11), sigmoid (#32), single (#45), gate (#55),
                                    # token (#85)
    smear: bool = False             # a token's embedding takes some of the one before (#34)
    backout: bool = False           # subtract a middle layer's output at the end (#40)
    bigram: bool = False            # hashed bigram embedding into every block (#62)
    bigram_factor: float = 5        # its rows, in vocabularies
    bigram_frac: float = 1.0        # its width, of the stream's, whose first channels take it (#83)
    bigram_signs: bool = False      # times a fixed row of signs, by another hash (#83)
    bigram_lambda: float = 0.1      # initial factor; 0.05 from #73

    # layers left out
    drop_attention: bool = False    # the layer behind the middle has no attention (#17)
    drop_mlp: bool = False          # the first layer has no MLP (#30)
    drop_first: bool = False        # no first layer; num_layers counts the others (#35)

    # MLP, head, loss
    activation: str = "gelu"        # gelu, gelu_tanh (#1), or relu2 (#5)
    tied_head: bool = True          # head and embedding share one table; untied from #8
    logit_softcap: float | None = None  # cap * tanh(z / cap) (#9), or cap * sigmoid (#19)
    softcap_kind: str = "tanh"
    softcap_div: float | None = None    # what z is divided by; none: cap
    softcap_shift: float = 0.0      # added to z before
    softcap_sqrt_dim: bool = False  # divide by sqrt(model_dim) as well (#22 to #27)

    # start: standard deviations of matrices in units of 1/sqrt(fan_in), drawn uniformly
    init_std: float = 3 ** -0.5     # torch's own for nn.Linear; 0.5 from #19
    qkv_init_std: float | None = None   # none: init_std; 1.0 in #53
    zero_proj: bool = False         # output matrices start at zero (#5)
    out_init_std: float | None = None   # of attention's alone, all the same; 0.5 from #64
    head_init_std: float = 0.0      # of an untied head; 0.005 from #51
    value_embed_init_std: float = 1.0   # 0 from #53

    # precision
    compute_dtype: str = "bf16"     # of matmuls and attention; matrices are stored in fp32
    stream_dtype: str = "fp32"      # of the residual stream; bf16 from #10
    embed_dtype: str = "fp32"       # of the embedding tables; bf16 from #10
    head_dtype: str = "fp32"        # of the head's table; bf16 from #32
    head: str = "bf16"              # of the head's matmul in training; fp8 from #19
    fp8_factors: tuple[float, ...] = ()  # of x, w and the summed loss's gradient, before the cast

    @property
    def model_dim(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the tables: a multiple of 64 keeps the head's matmuls on fast tiles."""
        return 64 * math.ceil(self.vocab_size / 64) if self.pad_vocab else self.vocab_size

    @property
    def bos_id(self) -> int:
        """The token that opens a document: GPT-2's 50256, the built-in corpus's 256."""
        return self.vocab_size - 1

    @property
    def bigram_rows(self) -> int:
        return int(self.bigram_factor * self.padded_vocab_size)

    @property
    def bigram_dim(self) -> int:
        return round(self.bigram_frac * self.model_dim)

    @property
    def softcap(self) -> Softcap:
        """The curve of the logits: cap * tanh(z / div) (Gemma 2; #9), or from #19 cap * sigmoid(z /
        div), the same curve moved up, which softmax does not see; #54 shifts it."""
        if self.logit_softcap is None:
            return Softcap()
        div = self.logit_softcap if self.softcap_div is None else self.softcap_div
        div *= math.sqrt(self.model_dim) if self.softcap_sqrt_dim else 1.0
        return Softcap(self.softcap_kind, self.logit_softcap, div, self.softcap_shift)


# The values of fields that are words; recipes.check refuses others.
CHOICES = {
    "qk_norm": ("none", "after", "before"),
    "windows": ("one", "two"),
    "value_embeds": ("none", "all", "mirror", "ends", "apart", "later"),
    "value_mix": ("one", "two", "add", "gate", "gate_both"),
    "unet": ("none", "weight", "sigmoid", "single", "gate", "token"),
    "activation": ("gelu", "gelu_tanh", "relu2"),
    "softcap_kind": ("tanh", "sigmoid"),
    **dict.fromkeys(("compute_dtype", "stream_dtype", "embed_dtype", "head_dtype"), tuple(DTYPES)),
    "head": (*DTYPES, "fp8"),
}


class Phase(NamedTuple):
    """Settings of the model that change while it trains; see recipes.phase."""

    window: int | None = None           # tokens that a long layer sees, self included
    short_window: int | None = None     # and a short one
    yarn_windows: tuple[int, ...] = ()  # the windows so far, for the rotary frequencies
    target_weights: tuple[float, ...] = (1.0,)  # of the next token, the one after it, ...
    prefix_weight: float = 0.0          # of the longest token that the next one begins with (#88)
    tied: bool = False                  # the embedding is the head's table for now (#51)


# --- the layers: derived from num_layers ----------------------------------------------------------

class Layer(NamedTuple):
    """How one layer differs from the others."""

    keys: str = "long"                  # the kind of keys that its queries see
    value_table: int | None = None
    skip_from: int | None = None        # the layer whose output comes back here
    attn_from: int | None = None        # the layer whose output attention reads; none: the stream
    xsa: bool = False                   # attention excludes its own value's direction
    gated: bool = True                  # its heads have a gate, where any have


def layer_plan(config: GPTConfig) -> list[Layer]:
    """One Layer for each of num_layers; with 12 (11 without the first) as in the records."""
    L = config.num_layers
    long = {L // 3, L - 1} | (set() if config.drop_first else {0})
    if config.windows == "one":
        long = set(range(L))
    paired = {p * L // 11 for p in (0, 2, 5, 9)} - long if config.paired_heads else set()
    keys = ["paired" if i in paired else "long" if i in long else "short" for i in range(L)]
    silent = dropped_attention(config)
    attends = {i for i in range(L) if not (config.drop_attention and i == silent)}

    ends = max(1, (L + 1) // 4)  # tables of the sparse layout: first and last layers
    gone = int(config.drop_first)
    first = {i: i + gone for i in range(ends - gone)}
    last = {L - ends + i: i for i in range(ends)}
    early = range(max(1, ends - gone))
    tables = {"none": {}, "all": {i: i for i in range(L)},
              "mirror": {i: min(i, L - 1 - i) for i in range(L)},
              "ends": first | last,
              "apart": _numbered(attends & {*early, *last}),
              "later": _numbered(attends & {*(i + 1 for i in early), *last})}[config.value_embeds]

    half = L // 2
    mirror = {2 * half - 1 - i: i for i in range(half)}
    skips = {"none": {}, "weight": mirror, "sigmoid": mirror}.get(
        config.unet, {silent: skip_layer(config)})
    tables = {i: table for i, table in tables.items() if i in attends}
    late = late_layer(config)
    attn_from = dict.fromkeys(range(late + 1, L), late) if config.late_input else {}
    xsa = attends - paired if config.xsa else set()
    gated = set(range(L))
    if config.token_gates:  # (#85)
        xsa, gated = xsa - attn_from.keys(), long
    return [Layer(keys[i], tables.get(i), skips.get(i), attn_from.get(i), i in xsa, i in gated)
            for i in range(L)]


def gates_layer(config: GPTConfig) -> int:
    """The layer whose input decides the token gates from there on (#85): 4 of 11."""
    return min(config.num_layers // 3 + 1, dropped_attention(config))


def gate_plan(config: GPTConfig, layers: range) -> list[tuple[int, str, int, float]]:
    """(layer, field of Extras, how many, their start) of the token gates of `layers` (#85)."""
    H, found = config.num_heads, []
    for i, layer in enumerate(layer_plan(config)):
        last = i == config.num_layers - 1
        if i in layers:
            found += [(i, "xsa_BTH", H, 0.0)] * layer.xsa
            found += [(i, "attn_gate_BTH", H, 0.25)] * (config.attn_gate and layer.gated)
            if not last and i != dropped_attention(config):
                found += [(i, "x0_BT1", 1, 0.0), (i, "bigram_BT1", 1, config.bigram_lambda)]
            found += [(i, "skip_BT1", 1, 0.5)] * (layer.skip_from is not None)
            if last and config.dc_window is not None:
                found += [(i, "dc_in_BTH", H, 1.0), (i, "dc_out_BTH", H, 0.0)]
    return found


def _numbered(layers: set[int]) -> dict[int, int]:
    return {layer: i for i, layer in enumerate(sorted(layers))}


def dropped_attention(config: GPTConfig) -> int:
    """The layer that record #17 leaves without attention: 7 of 12, 6 of 11."""
    return 7 * config.num_layers // 12


def backout_layer(config: GPTConfig) -> int:
    """The layer whose output record #40 subtracts at the end: 8 of 12, 7 of 11."""
    return 2 * config.num_layers // 3


def late_layer(config: GPTConfig) -> int:
    """The layer whose output the attention of those behind it reads (#77): 7 of 11."""
    return min(backout_layer(config), config.num_layers - 2)


def skip_layer(config: GPTConfig) -> int:
    """The layer whose output comes back in the layer without attention: 4 of 12, 3 of 11."""
    return min(config.num_layers // 3, dropped_attention(config) - 1)


def sources_of_the_end(config: GPTConfig) -> set[int]:
    """The layers whose output final_norm reads."""
    found = {backout_layer(config)} if config.backout else set()
    if config.mudd:
        found |= {late_layer(config), config.num_layers - 2, skip_layer(config)}
    return found


# --- parameters: initialisation and role ----------------------------------------------------------

class Init(NamedTuple):
    """How a parameter starts: uniform or normal with a standard deviation, or constant, with one
    number or one each."""

    kind: str
    number: float | tuple[float, ...]


def parameter_table(config: GPTConfig) -> dict[str, tuple[str, Init]]:
    """Pattern of a parameter's name -> (role, initialisation).

    The role chooses the parameter's optimizer group, see recipes.optimizer_groups. A parameter that
    no pattern fits is refused.
    """
    c, dim = config, config.model_dim
    zero = Init("constant", 0.0)

    def matrix(std: float, fan_in: int) -> Init:
        return Init("uniform", std * fan_in ** -0.5)

    if c.gpt2_init:  # (#1) what is added to the stream smaller by sqrt(2 num_layers)
        embed = into_layer = Init("normal", 0.02)
        out = proj = Init("normal", 0.02 * (2 * c.num_layers) ** -0.5)
        qkv = into_layer
    else:
        # an untied embedding is standard normal (#8)
        embed = matrix(3 ** -0.5, dim) if c.tied_head else Init("normal", 1.0)
        into_layer = matrix(c.init_std, dim)
        qkv = into_layer if c.qkv_init_std is None else matrix(c.qkv_init_std, dim)
        if c.out_init_std is not None:  # (#64)
            out = matrix(c.out_init_std, dim)
        else:
            out = zero if c.zero_proj else matrix(c.init_std, dim)
        proj = zero if c.zero_proj else matrix(c.init_std, c.mlp_ratio * dim)
    # coefficients of Block.mixed and GPT.final_norm, in their order
    last_layer = mixer_start((0, 0, 0, 0, 0, 0, 2, 2, c.resid_lambda, 1, 0, c.bigram_lambda,
                              c.resid_lambda, 1))
    end = mixer_start((0, -0.5, 0, 0, 0))
    return {
        "embed.weight": ("embed", embed),
        "position.weight": ("embed", embed),
        "lm_head.weight": ("head", Init("normal", c.head_init_std)),
        "value_embeds.*.weight": ("value_embed", Init("normal", c.value_embed_init_std)),
        "bigram.weight": ("bigram", zero),
        "*.qkv.weight": ("attn_in", qkv),
        "*.qk.weight": ("attn_qk", qkv),
        "*.v.weight": ("attn_v", qkv),
        "*.out.weight": ("attn_out", out),
        "*.fc.weight": ("mlp_in", into_layer),
        "*.proj.weight": ("mlp_out", proj),
        "gates_*.w1.weight": ("token_gate", matrix(3 ** -0.5, dim)),
        "gates_*.w2.weight": ("token_gate", zero),
        "gates_early.start": ("token_gate_start", gates_start(c, range(gates_layer(c)))),
        "gates_late.start": ("token_gate_start",
                             gates_start(c, range(gates_layer(c), c.num_layers))),
        "gates_*.scale": ("token_gate_start", Init("constant", MIXER_SCALE)),
        "*mudd.w1.weight": ("mudd", matrix(3 ** -0.5, dim)),
        "*mudd.w2.weight": ("mudd", zero),
        "blocks.*.mudd.start": ("mudd_start", last_layer),
        "mudd.start": ("mudd_start", end),
        "*.bias": ("scalar", zero),
        "*ln.weight": ("scalar", Init("constant", 1.0)),
        "*.attn_gate": ("attn_gate", zero),
        "*.value_gate": ("value_gate", zero),
        "*.skip_gate": ("skip_gate", zero),
        "smear_gate": ("smear_gate", zero),
        "*.qkv.factor": ("scalar", Init("constant", 0.5)),
        "*.v.factor": ("scalar", Init("constant", 0.5)),
        "*.out.factor": ("scalar", Init("constant", 1.0)),
        "*.value_lambda": ("scalar", Init("constant", 0.5)),
        "*.embed_lambda": ("scalar", Init("constant", 0.5)),
        "*.resid_lambda": ("scalar", Init("constant", c.resid_lambda)),
        "*.attn_resid": ("resid_lambda", Init("constant", c.resid_lambda)),
        "*.mlp_resid": ("resid_lambda", Init("constant", c.resid_lambda)),
        "*.attn_post": ("post_lambda", Init("constant", 1.0)),
        "*.mlp_post": ("post_lambda", Init("constant", 1.0)),
        "*.x0_lambda": ("post_lambda" if c.sublayer_lambdas else "x0_lambda", zero),
        "*.bigram_lambda": ("post_lambda" if c.sublayer_lambdas else "scalar",
                            Init("constant", c.bigram_lambda)),
        "*.xsa": ("post_lambda", zero),
        "*.skip_lambda": ("scalar", Init("constant", 1.0 if c.unet == "weight" else -1.5)),
        "smear_lambda": ("scalar", zero),
        "backout_lambda": ("scalar", Init("constant", 0.5)),
    }


def mixer_start(coefficients: tuple[float, ...]) -> Init:
    return Init("constant", tuple(x / MIXER_SCALE for x in coefficients))


def gates_start(config: GPTConfig, layers: range) -> Init:
    return mixer_start(tuple(start for _, _, count, start in gate_plan(config, layers)
                             for _ in range(count)))


def parameter_entry(name: str, config: GPTConfig) -> tuple[str, Init]:
    """(role, initialisation) of the parameter `name`; ValueError where the table has none."""
    for pattern, entry in parameter_table(config).items():
        if fnmatchcase(name, pattern):
            return entry
    raise ValueError(f"no role and no initialisation for parameter {name}: add a line to "
                     "parameter_table in model.py")


@torch.no_grad()
def init_weights(model: "GPT", seed: int) -> None:
    """Set every parameter, by name, from one seed; the same values on every device and rank."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        _, (kind, number) = parameter_entry(name, model.config)
        if kind == "constant" or number == 0:
            p.copy_(torch.tensor(number, dtype=torch.float64))
        elif kind == "uniform":
            bound = math.sqrt(3) * number
            p.copy_(torch.empty(p.shape).uniform_(-bound, bound, generator=generator))
        else:
            p.copy_(torch.empty(p.shape).normal_(0, number, generator=generator))


# --- building blocks ------------------------------------------------------------------------------

class Linear(nn.Module):
    """y = x W^T; the weight (out, in) is cast where it is used."""

    def __init__(self, in_dim: int, out_dim: int, compute_dtype: torch.dtype,
                 dtype: torch.dtype | None = None, bias: bool = False, factor: bool = False):
        super().__init__()
        stored = dtype or torch.promote_types(compute_dtype, torch.float32)
        self.weight = nn.Parameter(torch.empty(out_dim, in_dim, dtype=stored))
        self.bias = nn.Parameter(torch.empty(out_dim)) if bias else None
        self.factor = scalar() if factor else None
        self.compute_dtype = compute_dtype

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.compute_dtype
        # (#47) on QKV the factor acts on the values alone, because q and k are normed
        weight = self.weight if self.factor is None else self.factor * self.weight
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.linear(x.to(dtype), weight.to(dtype), bias)

    def extra_repr(self) -> str:
        out_dim, in_dim = self.weight.shape
        return f"{in_dim} -> {out_dim}, {str(self.compute_dtype).removeprefix('torch.')}"


class Embedding(nn.Embedding):
    """nn.Embedding without its default initialisation (7 s for the tables of record 62)."""

    def reset_parameters(self) -> None:
        pass


def scalar() -> nn.Parameter:
    """A learned number. 0-dimensional, so that it does not lift a bf16 stream to fp32."""
    return nn.Parameter(torch.empty(()))


def gate_weight(num_gates: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(num_gates, GATE_DIM))


def gate(weight: Tensor, x_BTC: Tensor) -> Tensor:
    """(B, T, gates) between 0 and 1, from the first channels of the stream (#28)."""
    x = x_BTC[..., :GATE_DIM]
    return torch.sigmoid(F.linear(x, weight.to(x.dtype)))


class Mixer(nn.Module):
    """Coefficients for each token from a small MLP on the stream x, (B, T, coefficients):
    scale (W2 GELU(W1 x) + start), which begin as constants, because W2 is 0 at first (#81).
    After multiway dynamic dense connections, MUDDFormer (Xiao et al. 2025)."""

    def __init__(self, dim: int, num_coefficients: int, dtype: torch.dtype,
                 learned_scale: bool = False):
        super().__init__()
        self.w1 = Linear(dim, MIXER_DIM, dtype)
        self.w2 = Linear(MIXER_DIM, num_coefficients, dtype)
        self.start = nn.Parameter(torch.empty(num_coefficients))   # fp32, and so are coefficients
        self.scale = scalar() if learned_scale else None

    def forward(self, x_BTC: Tensor) -> Tensor:
        scale = MIXER_SCALE if self.scale is None else self.scale
        return scale * (self.w2(F.gelu(self.w1(x_BTC))) + self.start)


class Extras(NamedTuple):
    """What a layer is given for each token, where it is given any."""

    value_BTC: Tensor | None = None     # added to the values (#81)
    ve_gate_BTH: Tensor | None = None   # of the value embedding, in place of its own gate (#81)
    xsa_BTH: Tensor | None = None       # in place of learned numbers (#85): of the own value
    attn_gate_BTH: Tensor | None = None
    x0_BT1: Tensor | None = None
    bigram_BT1: Tensor | None = None
    skip_BT1: Tensor | None = None
    dc_in_BTH: Tensor | None = None     # dynamic composition: of the heads whose weights are mixed
    dc_out_BTH: Tensor | None = None    # and of those that take the mixture


def by_layer(gates_BTN: Tensor, plan: list[tuple[int, str, int, float]]) -> dict[int, Extras]:
    """Token gates as each layer takes them (#85)."""
    parts = gates_BTN.split([count for _, _, count, _ in plan], -1)
    found: dict[int, dict[str, Tensor]] = {}
    for (layer, name, _, _), part_BTN in zip(plan, parts):
        found.setdefault(layer, {})[name] = part_BTN
    return {layer: Extras(**given) for layer, given in found.items()}


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pair (i, i + D/2) of x's last dimension by an angle."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1).type_as(x)


def rotary(x_BTHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (Su et al. 2021; #2): token t rotates by position t of the tables."""
    T = x_BTHD.size(1)
    return rotate(x_BTHD, cos[:T, None], sin[:T, None])


def paired_rotary(x_BTHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Even heads of token t rotate by position 2t, odd heads by 2t+1 (#58)."""
    T = x_BTHD.size(1)
    pairs = x_BTHD.unflatten(2, (-1, 2))  # (B, T, H/2, 2, D)
    tables = (table[:2 * T].unflatten(0, (T, 1, 2)) for table in (cos, sin))
    return rotate(pairs, *tables).flatten(2, 3)


def rotary_frequencies(config: GPTConfig) -> Tensor:
    """(D/2,) radians a position, fp64: geometric from 1 down to 1/base (#2). With rotary_half the
    second half of the pairs stays put, and the rest spans the whole range (#17)."""
    if config.rotary_half:
        turning = config.rotary_base ** -torch.linspace(0, 1, config.head_dim // 4,
                                                        dtype=torch.float64)
        return torch.cat([turning, torch.zeros_like(turning)])
    return config.rotary_base ** -(
        torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim)


def yarn(freqs: Tensor, windows: tuple[int, ...]) -> tuple[Tensor, float]:
    """Frequencies and attention's temperature after the window grew through `windows` (tokens).

    YaRN (Peng et al. 2023; #31): a pair that turns more than 32 times in the old window keeps its
    frequency, one that turns once or less slows down by old/new, between them linear; the logits of
    attention grow by 1 + 0.2 ln(new/old).
    """
    attn_temperature = 1.0
    for old, new in itertools.pairwise(windows):
        if new != old:
            turns = old * freqs / (2 * math.pi)
            keep = ((turns - 1) / 31).clamp(0, 1)
            freqs = freqs * (old / new + keep * (1 - old / new))
            attn_temperature *= 1 + 0.2 * math.log(new / old)
    return freqs, attn_temperature


def shift_still_half(k_BTHD: Tensor) -> Tensor:
    """Take the dimensions that do not rotate from the position before, so that a head can look for
    "what followed this token" in one layer (#49)."""
    t1, s1, t2, s2 = k_BTHD.chunk(4, dim=-1)  # turning, still, turning, still
    s1, s2 = (torch.cat([s[:, :1], s[:, :-1]], dim=1) for s in (s1, s2))
    return torch.cat([t1, s1, t2, s2], dim=-1)


def composed_heads(q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, extras: Extras, scale: float,
                   doc_BT: Tensor, window: int) -> Tensor:
    """What dynamic composition (Xiao et al. 2024; #85) adds to attention's output.

    Each token mixes the attention weights of its heads, over its last `window` keys, self included,
    and weighs for each head what that mixture takes of the head's values. Queries go in blocks of
    `window`, which see their own keys and those of the block before.
    """
    T, W = q_BTHD.size(1), window
    short = -T % W
    q_BnqHD = F.pad(q_BTHD, (0, 0, 0, 0, 0, short)).unflatten(1, (-1, W))
    k_BnHDk, v_BnHDk = (F.pad(x, (0, 0, 0, 0, W, short)).unfold(1, 2 * W, W)
                        for x in (k_BTHD, v_BTHD))
    doc_Bnq1 = F.pad(doc_BT, (0, short), value=-1).unflatten(1, (-1, W, 1))
    doc_Bnk = F.pad(doc_BT, (W, short), value=-1).unfold(1, 2 * W, W)
    back = torch.arange(W, 2 * W, device=doc_BT.device)[:, None] - torch.arange(
        2 * W, device=doc_BT.device)
    seen_Bnqk = (back >= 0) & (back < W) & (doc_Bnq1 == doc_Bnk.unsqueeze(2))

    scores_BnHqk = scale * torch.einsum("bnqhd,bnhdk->bnhqk", q_BnqHD, k_BnHDk)
    scores_BnHqk = scores_BnHqk.masked_fill(~seen_Bnqk.unsqueeze(2), -torch.inf)
    heads_BTH = F.rms_norm(extras.dc_in_BTH, extras.dc_in_BTH.shape[-1:], eps=1e-6).type_as(q_BTHD)
    heads_BnqH = F.pad(heads_BTH, (0, 0, 0, short)).unflatten(1, (-1, W))
    mixed_Bnqk = torch.einsum("bnhqk,bnqh->bnqk", scores_BnHqk.softmax(-1), heads_BnqH)
    y_BnqHD = torch.einsum("bnqk,bnhdk->bnqhd", mixed_Bnqk, v_BnHDk)
    return extras.dc_out_BTH.unsqueeze(-1) * y_BnqHD.flatten(1, 2)[:, :T]


def exclude_own_value(y_BTHD: Tensor, v_BTHD: Tensor, xsa_H: Tensor) -> Tensor:
    """y - tanh(xsa) of y's part along v, each head's value of the same token (#82): the stream
    holds that already. `xsa_H`: or one of each token, xsa_BTH (#85)."""
    along = (y_BTHD * v_BTHD).sum(-1, keepdim=True)
    along = along / v_BTHD.square().sum(-1, keepdim=True).clamp(min=1e-8)
    return y_BTHD - torch.tanh(xsa_H).unsqueeze(-1).type_as(y_BTHD) * along * v_BTHD


def smear(e_BTC: Tensor, weight: Tensor, strength: Tensor) -> Tensor:
    """e_t + l sigmoid(W e_t) e_{t-1} (#34). Documents are not kept apart here."""
    now, before = e_BTC[:, 1:], e_BTC[:, :-1]
    return torch.cat([e_BTC[:, :1], now + strength * gate(weight, now) * before], dim=1)


def bigram_hash(tokens_BT: Tensor, num_rows: int) -> Tensor:
    """(B, T) row of the bigram table for (token before, token) (#62). Position 0 takes the last
    row, whose number also replaces its token in the hash of position 1, as in the record. Products
    wrap as int32."""
    last = num_rows - 1
    tokens = F.pad(tokens_BT[:, 1:].long(), (1, 0), value=last)
    now, before = (36313 * tokens[:, 1:]).int(), (27191 * tokens[:, :-1]).int()
    return F.pad(torch.bitwise_xor(now, before) % last, (1, 0), value=last)


def sign_hash(tokens_BT: Tensor) -> Tensor:
    """(B, T) row of the table of signs for (token before, token) (#83): of two pairs that share a
    row of the bigram table each reads it with other signs. Row 0 at position 0."""
    tokens = tokens_BT.long()
    return F.pad(torch.bitwise_xor(tokens[:, 1:], tokens[:, :-1]) % SIGN_ROWS, (1, 0))


# --- a layer --------------------------------------------------------------------------------------
# Blocks take tensors or None, never ints: an int that differs from layer to layer, or changes while
# training, makes torch.compile build a graph for each value; alike blocks share one graph.

class Attention(nn.Module):
    """Causal self-attention: what it adds to the residual stream."""

    def __init__(self, config: GPTConfig, layer: Layer, last: bool = False):
        super().__init__()
        c = self.config = config
        dim, dtype = c.model_dim, DTYPES[c.compute_dtype]
        self.scale = c.head_dim ** -0.5 if c.attn_scale is None else c.attn_scale
        self.paired = layer.keys == "paired"
        self.shifts_keys = c.key_offset and layer.keys == "long"
        # (#17) two lambdas: layers without a table keep the factor of their values
        self.scales_value = c.value_embeds == "ends" and c.value_mix == "two"
        has_table = layer.value_table is not None
        if c.layer_norm:
            self.ln = nn.LayerNorm(dim)
        if c.qk_apart:  # (#80)
            self.qk = Linear(dim, 2 * dim, dtype, bias=c.biases)
            self.v = Linear(dim, dim, dtype, bias=c.biases, factor=c.qkv_lambda)
        else:
            self.qkv = Linear(dim, 3 * dim, dtype, bias=c.biases, factor=c.qkv_lambda)
        if c.value_residual or (has_table and c.value_mix in ("one", "two")) or self.scales_value:
            self.value_lambda = scalar()
        if has_table and c.value_mix == "two":
            self.embed_lambda = scalar()
        if has_table and c.value_mix in ("gate", "gate_both") and not (c.mudd and last):
            self.value_gate = gate_weight(c.num_heads)
        if c.attn_gate and layer.gated and not c.token_gates:
            self.attn_gate = gate_weight(c.num_heads)
        self.xsa = None
        if layer.xsa and not c.token_gates:
            self.xsa = nn.Parameter(torch.empty(c.num_heads))
        self.out = Linear(dim, dim, dtype, bias=c.biases, factor=c.qkv_lambda)

    def forward(self, x_BTC: Tensor, shared: dict[str, Tensor], ve_BTHD: Tensor | None,
                keys: Keys | None, extras: Extras | None) -> Tensor:
        """`x_BTC`: what attention reads, the stream or an earlier one (#77)."""
        c = self.config
        h_BTC = self.ln(x_BTC) if c.layer_norm else norm(x_BTC, c.norm_eps)
        if c.qk_apart:  # (#80)
            q_BTHD, k_BTHD = self.qk(h_BTC).unflatten(-1, (2, -1, c.head_dim)).unbind(2)
            v_BTHD = self.v(h_BTC).unflatten(-1, (-1, c.head_dim))
        else:
            q_BTHD, k_BTHD, v_BTHD = self.qkv(h_BTC).unflatten(-1, (3, -1, c.head_dim)).unbind(2)

        if c.value_residual:  # (#9) Zhou et al. 2024
            v_BTHD = (1 - self.value_lambda) * v_BTHD + self.value_lambda * shared["v1"]
        elif ve_BTHD is not None:
            if c.value_mix == "one":  # (#14)
                v_BTHD = (1 - self.value_lambda) * v_BTHD + self.value_lambda * ve_BTHD
            elif c.value_mix == "two":  # (#15)
                v_BTHD = self.value_lambda * v_BTHD + self.embed_lambda * ve_BTHD
            elif c.value_mix == "add":  # (#47)
                v_BTHD = v_BTHD + ve_BTHD
            elif c.mudd and extras.ve_gate_BTH is not None:  # (#81)
                v_BTHD = v_BTHD + extras.ve_gate_BTH.unsqueeze(-1) * ve_BTHD
            elif c.value_mix == "gate":  # (#55) a gate for each head, 1 at the start
                v_BTHD = v_BTHD + 2 * gate(self.value_gate, h_BTC).unsqueeze(-1) * ve_BTHD
            else:  # (#70) that sees the value embedding as well
                half = GATE_DIM // 2
                ve_BTC = ve_BTHD.flatten(-2).type_as(h_BTC)
                seen_BTC = torch.cat([h_BTC[..., :half], ve_BTC[..., :half]], dim=-1)
                v_BTHD = v_BTHD + 2 * gate(self.value_gate, seen_BTC).unsqueeze(-1) * ve_BTHD
        elif self.scales_value:  # (#17)
            v_BTHD = self.value_lambda * v_BTHD
        if c.mudd and extras.value_BTC is not None:  # (#81)
            v_BTHD = v_BTHD + extras.value_BTC.unflatten(-1, (-1, c.head_dim))
        v_BTHD = v_BTHD.type_as(q_BTHD)

        q, k, v = q_BTHD, k_BTHD, v_BTHD
        if c.qk_norm == "before":  # (#6)
            q, k = norm(q, c.norm_eps), norm(k, c.norm_eps)
        if self.paired:  # (#58)
            cos, sin = shared["cos"], shared["sin"]
            q, k = paired_rotary(q, cos, sin), paired_rotary(k, cos, sin)
            # heads h and h + H/2 of token t become positions 2t and 2t+1 of one stream
            q, k, v = (x.reshape(x.size(0), -1, c.num_heads // 2, c.head_dim) for x in (q, k, v))
        elif not c.learned_positions:
            cos, sin = shared["cos"], shared["sin"]
            q, k = rotary(q, cos, sin), rotary(k, cos, sin)  # (#2)
        if c.qk_norm == "after":  # (#5)
            q, k = norm(q, c.norm_eps), norm(k, c.norm_eps)
        if self.shifts_keys:  # (#49)
            k = shift_still_half(k)

        y_BTHD = attention(q, k, v, self.scale, keys).reshape(q_BTHD.shape)
        if c.dc_window is not None and extras.dc_in_BTH is not None:  # (#85)
            y_BTHD = y_BTHD + composed_heads(q, k, v, extras, self.scale, shared["docs"],
                                             c.dc_window)
        if c.token_gates:  # (#85) as below, with a number of each token; no sigmoid
            if extras.xsa_BTH is not None:
                y_BTHD = exclude_own_value(y_BTHD, v_BTHD, extras.xsa_BTH)
            if extras.attn_gate_BTH is not None:
                y_BTHD = extras.attn_gate_BTH.unsqueeze(-1) * y_BTHD
        else:
            if c.xsa and self.xsa is not None:  # (#82)
                y_BTHD = exclude_own_value(y_BTHD, v_BTHD, self.xsa)
            if c.attn_gate:  # (#28) each head's output times sigmoid(W h)
                y_BTHD = y_BTHD * gate(self.attn_gate, h_BTC).unsqueeze(-1)
        y_BTC = self.out(y_BTHD.flatten(-2))
        if c.attn_damping:  # (#2)
            y_BTC = y_BTC * (2 * c.num_layers) ** -0.5
        return y_BTC


class MLP(nn.Module):
    """Two matrices with an activation between: what they add to the residual stream."""

    def __init__(self, config: GPTConfig, triton: bool = False):
        super().__init__()
        c = self.config = config
        dim, dtype = c.model_dim, DTYPES[c.compute_dtype]
        if c.layer_norm:
            self.ln = nn.LayerNorm(dim)
        self.fc = Linear(dim, c.mlp_ratio * dim, dtype, bias=c.biases)
        self.proj = Linear(c.mlp_ratio * dim, dim, dtype, bias=c.biases)
        self.triton = triton and c.activation == "relu2"

    def forward(self, x_BTC: Tensor) -> Tensor:
        c = self.config
        h_BTC = self.ln(x_BTC) if c.layer_norm else norm(x_BTC, c.norm_eps)
        if self.triton:  # relu^2 inside the matmuls
            dtype = self.fc.compute_dtype
            weights = self.fc.weight.to(dtype), self.proj.weight.to(dtype)
            return mlp_relu2(h_BTC.to(dtype).flatten(0, 1), *weights).view_as(x_BTC)
        h = self.fc(h_BTC)
        if c.activation == "relu2":  # (#5) So et al. 2021
            h = relu_squared(h)
        elif c.activation == "gelu_tanh":  # (#1)
            h = F.gelu(h, approximate="tanh")
        else:
            h = F.gelu(h)
        return self.proj(h)


class Block(nn.Module):
    """One layer: skips and embeddings into the stream, then attention and MLP."""

    def __init__(self, config: GPTConfig, index: int, layer: Layer, triton_mlp: bool = False):
        super().__init__()
        c = self.config = config
        self.layer = layer
        if layer.skip_from is not None:
            self.skip_lambda = scalar()
            if c.unet == "gate":
                self.skip_gate = gate_weight(1)
        attends = not (c.drop_attention and index == dropped_attention(c))  # (#17)
        no_mlp = c.drop_mlp and index == 0  # (#30)
        self.mudd = None
        if c.mudd and index == c.num_layers - 1:  # (#81)
            self.mudd = Mixer(c.model_dim, 14, DTYPES[c.compute_dtype])
        elif c.sublayer_lambdas:  # (#73)
            self.mlp_resid, self.mlp_post = scalar(), scalar()
            if attends:
                self.attn_resid, self.attn_post = scalar(), scalar()
                if not c.token_gates:
                    self.x0_lambda, self.bigram_lambda = scalar(), scalar()
            self.takes_bigram = index > 0   # layer 0 begins with it
        else:
            if c.x0_lambdas:
                self.resid_lambda, self.x0_lambda = scalar(), scalar()
            if c.bigram:
                self.bigram_lambda = scalar()
        self.attn = Attention(c, layer, index == c.num_layers - 1) if attends else None
        self.mlp = None if no_mlp else MLP(c, triton_mlp)

    def forward(self, x_BTC: Tensor, shared: dict[str, Tensor], ve_BTHD: Tensor | None,
                keys: Keys | None, skip_BTC: Tensor | None, late_BTC: Tensor | None,
                extras: Extras | None) -> Tensor:
        c = self.config
        if skip_BTC is not None:  # output of an earlier layer (U-net, #11)
            if c.unet == "weight":  # (#11)
                x_BTC = x_BTC + self.skip_lambda * skip_BTC
            elif c.unet == "token":  # (#85)
                opened = torch.sigmoid(self.skip_lambda) * extras.skip_BT1
                x_BTC = (x_BTC + opened * skip_BTC).type_as(x_BTC)
            elif c.unet == "gate":  # (#55)
                opened = 2 * torch.sigmoid(self.skip_lambda) * gate(self.skip_gate, shared["x0"])
                x_BTC = x_BTC + opened * skip_BTC
            else:  # (#32); a single skip from #45 on
                x_BTC = x_BTC + torch.sigmoid(self.skip_lambda) * skip_BTC
        if c.mudd and self.mudd is not None:  # (#81)
            return self.mixed(x_BTC, shared, ve_BTHD, keys, late_BTC, extras)
        if c.sublayer_lambdas:  # (#73)
            return self.weighed(x_BTC, shared, ve_BTHD, keys, late_BTC, extras)
        if c.x0_lambdas:  # the embedding again (#9)
            x_BTC = self.resid_lambda * x_BTC + self.x0_lambda * shared["x0"]
        if c.bigram:  # (#62)
            x_BTC = x_BTC + self.bigram_lambda * shared["bigram"]
        if self.attn is not None:
            x_BTC = x_BTC + self.attn(x_BTC, shared, ve_BTHD, keys, extras)
        if self.mlp is not None:
            x_BTC = x_BTC + self.mlp(x_BTC)
        return x_BTC

    def weighed(self, x_BTC: Tensor, shared: dict[str, Tensor], ve_BTHD: Tensor | None,
                keys: Keys | None, late_BTC: Tensor | None, extras: Extras | None) -> Tensor:
        """Attention and MLP with a factor for the stream and one for what is added (#73); the
        embeddings enter between them."""
        c = self.config
        if self.attn is not None:
            source_BTC = x_BTC if late_BTC is None else late_BTC    # (#77)
            y_BTC = self.attn(source_BTC, shared, ve_BTHD, keys, extras)
            if c.token_gates:  # (#85)
                again, bigram = extras.x0_BT1, extras.bigram_BT1
            else:
                again, bigram = self.x0_lambda, self.bigram_lambda
            x = self.attn_resid * x_BTC + self.attn_post * y_BTC + again * shared["x0"]
            if self.takes_bigram:
                x = x + bigram * shared["bigram"]
            x_BTC = x.type_as(x_BTC)
        return self.mlp_resid * x_BTC + self.mlp_post * self.mlp(x_BTC)

    def mixed(self, x_BTC: Tensor, shared: dict[str, Tensor], ve_BTHD: Tensor,
              keys: Keys | None, late_BTC: Tensor, extras: Extras) -> Tensor:
        """The last layer: every factor is a coefficient of the token, and what entered layer 0 and
        a middle layer's output come back, in the stream and in the values (#81)."""
        (v_first, v_late, v_x, first, late, more, gate_a, gate_b, resid, post, again, bigram,
         mlp_resid, mlp_post) = self.mudd(x_BTC).split(1, -1)
        first_BTC, half = shared["first"], self.config.num_heads // 2
        extras = extras._replace(
            value_BTC=v_first * first_BTC + v_late * late_BTC + v_x * x_BTC,
            ve_gate_BTH=torch.cat([gate_a.expand(-1, -1, half), gate_b.expand(-1, -1, half)], -1))
        y_BTC = self.attn(late_BTC, shared, ve_BTHD, keys, extras)
        x = (1 + more) * x_BTC + first * first_BTC + late * late_BTC
        x = resid * x + post * y_BTC + again * first_BTC + bigram * shared["bigram"]
        x_BTC = x.type_as(x_BTC)
        return (mlp_resid * x_BTC + mlp_post * self.mlp(x_BTC)).type_as(x_BTC)

    def extra_repr(self) -> str:
        table, source, late = self.layer[1:4]
        return ", ".join(
            [f"{self.layer.keys} window"] * (self.attn is not None)
            + [f"value table {table}"] * (table is not None)
            + [f"skip from layer {source}"] * (source is not None)
            + [f"attends from layer {late}"] * (late is not None))


# --- the whole ------------------------------------------------------------------------------------

class GPT(nn.Module):
    """tokens -> embedding -> blocks -> head -> loss. `kernels`: what runs in Triton of "relu2" (the
    MLPs' two matrices with ReLU^2 between) and "loss"."""

    def __init__(self, config: GPTConfig, kernels: frozenset[str] = frozenset()):
        super().__init__()
        c = self.config = config
        dim, rows, dtype = c.model_dim, c.padded_vocab_size, DTYPES[c.compute_dtype]
        table_dtype, self.stream_dtype = DTYPES[c.embed_dtype], DTYPES[c.stream_dtype]
        self.plan = layer_plan(c)

        self.embed = Embedding(rows, dim, dtype=table_dtype)
        if c.learned_positions:
            self.position = Embedding(c.max_seq_len or c.seq_len, dim, dtype=table_dtype)
        if c.smear:
            self.smear_gate, self.smear_lambda = gate_weight(1), scalar()
        tables = {layer.value_table for layer in self.plan} - {None}
        self.value_embeds = nn.ModuleDict({
            str(i): Embedding(rows, dim, dtype=table_dtype) for i in sorted(tables)})
        self.blocks = nn.ModuleList(
            Block(c, i, layer, "relu2" in kernels) for i, layer in enumerate(self.plan))
        if c.layer_norm:
            self.ln = nn.LayerNorm(dim)
        if c.mudd:
            self.mudd = Mixer(dim, 5, dtype)
        if c.token_gates:  # (#85)
            self.plan_early = gate_plan(c, range(gates_layer(c)))
            self.plan_late = gate_plan(c, range(gates_layer(c), c.num_layers))
            self.gates_early, self.gates_late = (
                Mixer(dim, sum(row[2] for row in plan), dtype, learned_scale=True)
                for plan in (self.plan_early, self.plan_late))
        if c.backout:
            self.backout_lambda = scalar()
        # fp8 matmuls (#19) are for training; validation takes compute_dtype
        self.lm_head = Linear(dim, rows, dtype if c.head == "fp8" else DTYPES[c.head],
                              DTYPES[c.head_dtype])
        if c.tied_head:
            self.lm_head.weight = self.embed.weight
        if c.bigram:
            self.bigram = Embedding(c.bigram_rows, c.bigram_dim, dtype=table_dtype)
        if c.bigram_signs:  # (#83) of one seed for all runs: part of the architecture
            signs = torch.randint(2, (SIGN_ROWS, c.bigram_dim), device="cpu",
                                  generator=torch.Generator().manual_seed(0))
            self.register_buffer("signs", (2 * signs - 1).to(table_dtype), persistent=False)

        # Rotary tables of every position.
        # Two positions a token where heads share a stream (#58).
        positions = (c.max_seq_len or c.seq_len) * (2 if c.paired_heads else 1)
        for name in ("cos", "sin"):
            self.register_buffer(name, torch.empty(positions, c.head_dim // 2), persistent=False)
        self.register_buffer("target_weights", torch.ones(1), persistent=False)
        # (#88) the longest token that each token begins with, or -1; from the trainer
        self.register_buffer("prefixes", None, persistent=False)
        self.phase: Phase | None = None
        self.set_phase(Phase())

        # Set by the trainer: layers that are compiled as one graph, and how many of the first
        # layers backward computes again (activation checkpointing).
        self.segments = [range(c.num_layers)]
        self.recomputed = 0
        self.loss_bodies = KERNELS if "loss" in kernels else REFERENCES

    @torch.no_grad()
    def set_phase(self, phase: Phase) -> None:
        """Switch to `phase`. A few small kernels, and the
        rotary tables only where the windows that they follow changed; no sync with the host."""
        if self.phase is None or phase.yarn_windows != self.phase.yarn_windows:
            self.set_rotary(phase.yarn_windows)
        self.phase = phase
        self.tied = phase.tied
        weights = phase.target_weights + (phase.prefix_weight,) * (phase.prefix_weight > 0)
        if len(weights) != len(self.target_weights):
            self.target_weights = torch.ones(len(weights), device=self.cos.device)
        for target, weight in enumerate(weights):
            self.target_weights[target].fill_(weight)

    def set_rotary(self, windows: tuple[int, ...]) -> None:
        """Cos and sin of every position. Both q and k carry the root of YaRN's temperature (#31),
        so that no kernel sees a new number."""
        freqs, attn_temperature = yarn(rotary_frequencies(self.config), windows)
        positions = torch.arange(len(self.cos), dtype=torch.float64, device=self.cos.device)
        angle = torch.outer(positions, freqs.to(self.cos.device, non_blocking=True))
        self.cos.copy_(angle.cos() * math.sqrt(attn_temperature))
        self.sin.copy_(angle.sin() * math.sqrt(attn_temperature))

    @torch.no_grad()
    def untie(self) -> None:
        """The embedding becomes a copy of the head's table that was used in its place (#51)."""
        self.embed.weight.copy_(self.lm_head.weight)

    def forward(self, inputs_BT: Tensor, targets_BT: Tensor,
                docs_B2: Tensor | None = None) -> Tensor:
        """The summed cross-entropy of predicting targets from inputs, both (B, T).

        A sum, because the trainer divides by the tokens of the whole global batch: then no split
        into ranks or micro-batches, even an uneven one, changes the gradient.
        """
        return self.head_loss(self.hidden(inputs_BT, docs_B2), targets_BT)

    def hidden(self, tokens_BT: Tensor, docs_B2: Tensor | None = None) -> Tensor:
        """(B, T) tokens -> (B, T, C), normed, ready for the head. `docs_B2`: see packed_keys."""
        c = self.config
        x_BTC, shared, values = self.embed_tokens(tokens_BT)
        x_BTC = x_BTC.view_as(x_BTC)  # as shared["x0"] itself layer 0 would be a graph of its own
        keys = self.attention_keys(tokens_BT, docs_B2)
        extras = by_layer(shared["gates"], self.plan_early) if c.token_gates else {}
        outputs: dict[int, Tensor] = {}
        for layers in self.segments:
            x_BTC = self.run_layers(layers, x_BTC, shared, values, keys, extras, outputs)
        return self.final_norm(x_BTC, shared, values, outputs)

    def embed_tokens(self, tokens_BT: Tensor) -> tuple[Tensor, dict[str, Tensor], dict]:
        """The embedding and what all layers share. The value embeddings by their table (#14)."""
        c, stream = self.config, self.stream_dtype
        table = self.lm_head if self.tied else self.embed  # (#51) tied until two thirds
        x_BTC = F.embedding(tokens_BT, table.weight).to(stream)
        if c.learned_positions:  # (#1)
            x_BTC = x_BTC + self.position.weight[:tokens_BT.size(1)]
        if c.smear:  # (#34)
            x_BTC = smear(x_BTC, self.smear_gate, self.smear_lambda)
        if c.embed_norm:  # (#8)
            x_BTC = norm(x_BTC, c.norm_eps)

        shared = {"cos": self.cos, "sin": self.sin}
        if c.x0_lambdas:  # (#9)
            shared["x0"] = x_BTC
        if c.value_residual:  # (#9) layer 0's values, from its input up to a factor
            attn = self.blocks[0].attn
            weight = attn.qkv.weight[2 * c.model_dim:].to(attn.qkv.compute_dtype)
            v1_BTC = F.linear(norm(x_BTC, c.norm_eps).to(weight.dtype), weight)
            shared["v1"] = v1_BTC.unflatten(-1, (-1, c.head_dim))
        if c.bigram:  # (#62)
            pairs_BTC = self.bigram(bigram_hash(tokens_BT, c.bigram_rows)).to(stream)
            if c.bigram_signs:  # (#83)
                pairs_BTC = pairs_BTC * F.embedding(sign_hash(tokens_BT), self.signs).to(stream)
            if c.bigram_frac < 1:  # (#83)
                pairs_BTC = F.pad(pairs_BTC, (0, c.model_dim - c.bigram_dim))
            shared["bigram"] = pairs_BTC
            if c.sublayer_lambdas:  # (#73) into layer 0 before attention, behind it elsewhere
                if c.token_gates:  # (#85) of x0, for layers 0 to 3
                    shared["gates"] = self.gates_early(x_BTC)
                    factor = by_layer(shared["gates"], self.plan_early)[0].bigram_BT1
                else:
                    factor = self.blocks[0].bigram_lambda
                x_BTC = (x_BTC + factor * pairs_BTC).type_as(x_BTC)
            if c.bigram_frac < 1:  # (#83) there in place, so that later layers' x0 has it too
                shared["x0"] = x_BTC
        if c.mudd:  # (#81)
            shared["first"] = x_BTC
        if c.dc_window is not None:  # (#85)
            shared["docs"] = document_ids(tokens_BT, c.bos_id)
        values = {int(i): embed(tokens_BT).to(stream).unflatten(-1, (-1, c.head_dim))
                  for i, embed in self.value_embeds.items()}  # (#14)
        return x_BTC, shared, values

    def attention_keys(self, tokens_BT: Tensor, docs_B2: Tensor | None) -> dict[str, Keys | None]:
        """Which keys the layers of each kind see: documents (#12) and windows (#13, #20)."""
        c = self.config
        if not c.packed:
            return {"long": None}  # plainly causal
        doc_BT, T = document_ids(tokens_BT, c.bos_id), tokens_BT.size(1)
        long, short = self.phase.window or T, self.phase.short_window or T
        dtype = DTYPES[c.compute_dtype]
        keys = {"long": packed_keys(doc_BT, long, dtype, docs_B2)}
        if c.windows == "two":  # (#20)
            keys["short"] = packed_keys(doc_BT, short, dtype, docs_B2)
        if c.paired_heads:  # (#58) two positions a token
            docs = None if docs_B2 is None else docs_B2 * torch.tensor([1, 2])
            keys["paired"] = packed_keys(doc_BT.repeat_interleave(2, 1), short, dtype, docs)
        return keys

    def run_layers(self, layers: range, x_BTC: Tensor, shared: dict[str, Tensor],
                   values: dict[int, Tensor], keys: dict[str, Keys | None],
                   extras: dict[int, Extras], outputs: dict[int, Tensor]) -> Tensor:
        """Consecutive layers; each one's output is added to `outputs` for the skips behind it, and
        on the way the token gates of the later layers to `extras`."""
        c = self.config
        for i in layers:
            if c.token_gates and i == gates_layer(c):  # (#85)
                extras |= by_layer(self.gates_late(x_BTC), self.plan_late)
            layer, block = self.plan[i], self.blocks[i]
            inputs = (x_BTC, shared, values.get(layer.value_table), keys[layer.keys],
                      outputs.get(layer.skip_from), outputs.get(layer.attn_from),
                      extras.get(i, Extras()) if c.mudd else None)
            if i < self.recomputed and torch.is_grad_enabled():
                # keeps its input alone: a third more work, a tenth of the memory
                x_BTC = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                x_BTC = block(*inputs)
            outputs[i] = x_BTC
        return x_BTC

    def final_norm(self, x_BTC: Tensor, shared: dict[str, Tensor], values: dict[int, Tensor],
                   outputs: dict[int, Tensor]) -> Tensor:
        c = self.config
        if c.mudd:  # (#81) for each token; at the start that is the backout alone
            sources = (shared["first"], outputs[late_layer(c)], outputs[c.num_layers - 2],
                       values[0].flatten(-2), outputs[skip_layer(c)])
            mixed = sum(n * source for n, source in zip(self.mudd(x_BTC).split(1, -1), sources))
            x_BTC = (x_BTC + mixed).type_as(x_BTC)
        if c.backout:  # (#40) take back what the middle layers needed and the head does not
            x_BTC = x_BTC - self.backout_lambda * outputs[backout_layer(c)]
        return self.ln(x_BTC) if c.layer_norm else norm(x_BTC, c.norm_eps)

    def logits(self, x_BTC: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, V) in fp32; the columns past vocab_size are padding."""
        return softcapped(self.lm_head(x_BTC).float(), self.config.softcap)

    def head_loss(self, x_BTC: Tensor, targets_BT: Tensor) -> Tensor:
        """Cross-entropy in nats, summed over the B*T tokens: fp32 scalar. With several targets
        (multi-token prediction, #53) each has its weight; they do not reach into the next row."""
        c, head = self.config, self.lm_head
        targets_NK = targets_ahead(targets_BT, len(self.phase.target_weights))
        if self.phase.prefix_weight > 0:  # (#88) of the same logits
            targets_NK = torch.cat([targets_NK, self.prefixes[targets_BT].view(-1, 1)], dim=1)
        fp8_factors = c.fp8_factors if c.head == "fp8" and self.training else None  # (#19)
        return head_loss(x_BTC.flatten(0, 1), head.weight, targets_NK, self.target_weights,
                         c.softcap, head.compute_dtype, fp8_factors, self.loss_bodies)


# --- sizes ----------------------------------------------------------------------------------------

def num_parameters(model: nn.Module) -> int:
    """Trained numbers, a tied head counted once."""
    return sum(p.numel() for p in model.parameters())


def mean_keys(seq_len: int, window: int | None) -> float:
    """Keys a token sees on average in a row without document bounds."""
    W = min(window or seq_len, seq_len)
    return W - W * (W - 1) / (2 * seq_len)


def flops_per_token(model: GPT, phase: Phase | None = None, seq_len: int | None = None) -> float:
    """Forward and backward FLOPs a token: 6 x parameters of matmuls, plus 12 C times the keys a
    token attends to on average, per attention layer. The softmax that backward recomputes is not
    counted; neither are document bounds, which only take keys away.
    """
    phase, seq_len = phase or model.phase, seq_len or model.config.seq_len
    matmul_parameters = sum(m.weight.numel() for m in model.modules() if isinstance(m, Linear))
    windows = {"long": phase.window, "short": phase.short_window, "paired": phase.short_window}
    keys = sum(mean_keys(seq_len, windows[block.layer.keys])
               for block in model.blocks if block.attn is not None)
    if model.config.dc_window is not None:
        keys += mean_keys(seq_len, model.config.dc_window)
    return 6 * matmul_parameters + 12 * model.config.model_dim * keys
