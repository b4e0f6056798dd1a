"""The model: GPT-2's shape with what the speedrun found, every idea one named, deletable piece.

A model is a list of blocks, a block a list of pieces (pieces.py), and a piece a few lines that act
on the residual stream. `GPT(config)` is decided when it is built: a piece that a recipe does not
use is not there, and the forward pass has no branch that asks. `print(model)` reads as what the
recipe computes. To add an idea: write a piece, put it where it acts (`Block`, `Attention`, `GPT`),
and give its parameters a rule in `init_rules` and a role in `param_role`.

What changes while training (windows, rotary frequencies, targets, tied or not) is a `Stage`:
`model.set_stage(stage)` between two steps.

Shapes: B rows, T tokens a row, C model_dim, H heads, D head_dim, V vocabulary (padded).
A tensor's name ends in its shape: x_BTC, q_BTHD, logits_BTV.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import pieces
from kernels import DTYPES
from kernels.attention import Keys, document_ids, packed_keys
from kernels.loss import KERNELS, TWINS, Softcap, head_loss, targets_ahead
from kernels.relu2 import mlp_relu2
from pieces import Given, Linear, Norm, Table, Then, norm


@dataclass(frozen=True)
class GPTConfig:
    """What a model is. Defaults: record #2 (2024-06-06), GPT-2's size with rotary positions."""

    # sizes
    num_layers: int = 12
    num_heads: int = 12
    head_dim: int = 64
    vocab_size: int = 50257         # true tokens; the last one opens a document
    pad_vocab: bool = False         # tables padded to a multiple of 64 rows (#5)
    seq_len: int = 1024             # tokens of the longest row in training
    max_seq_len: int | None = None  # of any row, in validation; none: seq_len
    mlp_ratio: int = 4
    architecture: str = "gpt"       # gpt, or gpt2: record #1's, in gpt2.py

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

    # values
    value_residual: bool = False    # mixed with the first layer's values (#9)
    value_embeds: str = "none"      # tables: none, all (#14), mirror (#15), ends (#17)
    value_mix: str = "one"          # (1-l) v + l e (#14), two lambdas (#15), add (#47), gate (#55)

    # residual stream
    embed_norm: bool = False        # RMSNorm right after the embedding (#8)
    x0_lambdas: bool = False        # x = a x + b x0 at the start of each block (#9)
    resid_lambda: float = 1.0       # initial a; 1.1 from #45
    unet: str = "none"              # skips: weight (#11), sigmoid (#32), single (#45), gate (#55)
    smear: bool = False             # a token's embedding takes some of the one before (#34)
    backout: bool = False           # subtract a middle layer's output at the end (#40)
    bigram: bool = False            # hashed bigram embedding into every block (#62)
    bigram_factor: int = 5          # its rows, in vocabularies

    # layers left out
    drop_attention: bool = False    # the layer behind the middle has no attention (#17)
    drop_mlp: bool = False          # the first layer has no MLP (#30)
    drop_first: bool = False        # the first layer is gone; num_layers counts what is left (#35)

    # MLP, head, loss
    activation: str = "gelu"        # gelu, or relu2 (#5)
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
    head_init_std: float = 0.0      # of an untied head; 0.005 from #51
    value_embed_init_std: float = 1.0   # 0 from #53

    # precision
    compute_dtype: str = "bf16"     # of matrix products and attention; matrices stay fp32
    stream_dtype: str = "fp32"      # of the residual stream; bf16 from #10
    embed_dtype: str = "fp32"       # of the embedding tables; bf16 from #10
    head_dtype: str = "fp32"        # of the head's table; bf16 from #32
    head: str = "bf16"              # of the head's product in training; fp8 from #19
    fp8_factors: tuple[float, ...] = ()  # of x, w and the summed loss's gradient, before the cast

    @property
    def model_dim(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the tables: a multiple of 64 keeps the head's products on fast tiles."""
        return 64 * math.ceil(self.vocab_size / 64) if self.pad_vocab else self.vocab_size

    @property
    def bos_id(self) -> int:
        """The token that opens a document: GPT-2's 50256, the built-in corpus's 256."""
        return self.vocab_size - 1

    @property
    def bigram_rows(self) -> int:
        return self.bigram_factor * self.padded_vocab_size


class Stage(NamedTuple):
    """What of a model changes while it trains; see recipes.stage."""

    window: int | None = None           # tokens that a long layer sees, self included
    short_window: int | None = None     # and a short one
    yarn_windows: tuple[int, ...] = ()  # the windows so far, for the rotary frequencies
    target_weights: tuple[float, ...] = (1.0,)  # of the next token, the one after it, ...
    tied: bool = False                  # the embedding is the head's table for now (#51)


# --- which layer has what: lists derived from num_layers ------------------------------------------

class Layer(NamedTuple):
    """What one layer takes besides the stream."""

    keys: str = "long"                  # long, short, paired: what its attention sees
    value_table: int | None = None
    skip_from: int | None = None        # the layer whose output comes back here


def layer_plan(config: GPTConfig) -> list[Layer]:
    """One Layer for each of num_layers; with 12 (11 where the first is gone) as in the records."""
    L = config.num_layers
    long = {L // 3, L - 1} | (set() if config.drop_first else {0})
    if config.windows == "one":
        long = set(range(L))
    paired = {p * L // 11 for p in (0, 2, 5, 9)} - long if config.paired_heads else set()
    keys = ["paired" if i in paired else "long" if i in long else "short" for i in range(L)]

    ends = max(1, (L + 1) // 4)  # tables of the sparse layout: first and last layers
    gone = int(config.drop_first)
    first = {i: i + gone for i in range(ends - gone)}
    last = {L - ends + i: i for i in range(ends)}
    tables = {"none": {}, "all": {i: i for i in range(L)},
              "mirror": {i: min(i, L - 1 - i) for i in range(L)},
              "ends": first | last}[config.value_embeds]

    half = L // 2
    mirror = {2 * half - 1 - i: i for i in range(half)}
    silent = dropped_attention(config)
    skips = {"none": {}, "weight": mirror, "sigmoid": mirror}.get(
        config.unet, {silent: min(L // 3, silent - 1)})
    if config.drop_attention:
        tables.pop(silent, None)
    return [Layer(keys[i], tables.get(i), skips.get(i)) for i in range(L)]


def dropped_attention(config: GPTConfig) -> int:
    """The layer that record #17 leaves without attention: 7 of 12, 6 of 11."""
    return 7 * config.num_layers // 12


def backout_layer(config: GPTConfig) -> int:
    return 2 * config.num_layers // 3


# --- positions ------------------------------------------------------------------------------------

def rotary_frequencies(config: GPTConfig) -> Tensor:
    """(D/2,) radians a position, fp64: geometric from 1 down to 1/base (record #2). With
    rotary_half the second half of the pairs stays put, and the rest spans the whole range (#17)."""
    if config.rotary_half:
        turning = config.rotary_base ** -torch.linspace(0, 1, config.head_dim // 4,
                                                        dtype=torch.float64)
        return torch.cat([turning, torch.zeros_like(turning)])
    return config.rotary_base ** -(
        torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim)


def yarn(freqs: Tensor, windows: tuple[int, ...]) -> tuple[Tensor, float]:
    """Frequencies and attention's temperature after the window grew through `windows` (tokens).

    YaRN (Peng et al. 2023; record #31): a pair that turns more than 32 times in the old window
    keeps its frequency, one that turns once or less slows down by old/new, between them linear;
    attention gets sharper by 1 + 0.2 ln(new/old).
    """
    sharper = 1.0
    for old, new in itertools.pairwise(windows):
        if new != old:
            turns = old * freqs / (2 * math.pi)
            keep = ((turns - 1) / 31).clamp(0, 1)
            freqs = freqs * (old / new + keep * (1 - old / new))
            sharper *= 1 + 0.2 * math.log(new / old)
    return freqs, sharper


# --- a layer --------------------------------------------------------------------------------------

def value_piece(config: GPTConfig, layer: Layer) -> dict[str, nn.Module]:
    if config.value_residual:
        return {"residual": pieces.MixOne("first_v_BTHD")}
    if layer.value_table is None:
        sparse = config.value_embeds == "ends" and config.value_mix == "two"
        return {"scale": pieces.ScaleValue()} if sparse else {}
    make = {"one": lambda: pieces.MixOne("value_BTHD"), "two": pieces.MixTwo,
            "add": pieces.AddValue, "gate": lambda: pieces.GateValue(config.num_heads)}
    return {"embed": make[config.value_mix]()}


class Attention(nn.Module):
    """Causal self-attention; adds to the residual stream."""

    def __init__(self, config: GPTConfig, layer: Layer):
        super().__init__()
        dim, dtype, heads = config.model_dim, DTYPES[config.compute_dtype], config.num_heads
        linear = pieces.ScaledLinear if config.qkv_lambda else Linear
        scale = config.head_dim ** -0.5 if config.attn_scale is None else config.attn_scale
        self.head_dim = config.head_dim
        self.qkv = linear(dim, 3 * dim, dtype)
        self.on_v = Then(value_piece(config, layer))
        # A pair of heads in one stream of 2T positions: queries of one see keys of both (#58).
        # Which two heads share a stream is only a name; here it is h and h + H/2.
        self.streams = heads // 2 if layer.keys == "paired" else heads
        self.on_qk = Then({
            "none": lambda: {"rotary": pieces.Rotary()},
            "after": lambda: {"rotary": pieces.Rotary(), "norm": Norm()},
            "before": lambda: {"norm": Norm(), "rotary": pieces.Rotary()}}[config.qk_norm]())
        looks_back = config.key_offset and layer.keys == "long"
        self.on_k = Then({"offset": pieces.KeyOffset()} if looks_back else {})
        self.scores = pieces.Scores(scale)
        self.on_y = Then({"gate": pieces.HeadGate(heads)} if config.attn_gate else {})
        self.out = linear(dim, dim, dtype)
        self.on_out = Then({"damping": pieces.Damping((2 * config.num_layers) ** -0.5)}
                           if config.attn_damping else {})

    def forward(self, x_BTC: Tensor, given: Given) -> Tensor:
        h_BTC = norm(x_BTC)
        q_BTHD, k_BTHD, v_BTHD = self.qkv(h_BTC).unflatten(-1, (3, -1, self.head_dim)).unbind(2)
        v_BTHD = self.on_v(v_BTHD, h_BTC, given).type_as(q_BTHD)
        q, k, v = (x.reshape(x.size(0), -1, self.streams, self.head_dim)
                   for x in (q_BTHD, k_BTHD, v_BTHD))
        q, k = self.on_qk(q, given), self.on_k(self.on_qk(k, given), given)
        y_BTHD = self.on_y(self.scores(q, k, v, given).reshape_as(q_BTHD), h_BTC)
        return x_BTC + self.on_out(self.out(y_BTHD.flatten(-2)))


class MLP(nn.Module):
    """Two matrices with GELU or ReLU^2 (So et al. 2021; record #5) between them."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        dim, dtype = config.model_dim, DTYPES[config.compute_dtype]
        self.fc = Linear(dim, config.mlp_ratio * dim, dtype)
        self.activation = {"gelu": nn.GELU, "relu2": pieces.ReLU2}[config.activation]()
        self.proj = Linear(config.mlp_ratio * dim, dim, dtype)

    def forward(self, x_BTC: Tensor, given: Given) -> Tensor:
        return x_BTC + self.proj(self.activation(self.fc(norm(x_BTC))))


class FusedMLP(MLP):
    """The same with ReLU^2 inside the products, in Triton."""

    def forward(self, x_BTC: Tensor, given: Given) -> Tensor:
        dtype = self.fc.compute_dtype
        fc_FC, proj_CF = self.fc.weight.to(dtype), self.proj.weight.to(dtype)
        y_NC = mlp_relu2(norm(x_BTC).to(dtype).flatten(0, 1), fc_FC, proj_CF)
        return x_BTC + y_NC.view_as(x_BTC)


class Block(Then):
    """One layer: its pieces, in the order in which they act on x."""

    def __init__(self, config: GPTConfig, index: int, layer: Layer,
                 kernels: frozenset[str] = frozenset()):
        parts: dict[str, nn.Module] = {}
        if layer.skip_from is not None:
            kinds = {"weight": pieces.Skip, "gate": pieces.GatedSkip}
            parts["skip"] = kinds.get(config.unet, pieces.SigmoidSkip)()
        if config.x0_lambdas:
            parts["x0"] = pieces.MixX0()
        if config.bigram:
            parts["bigram"] = pieces.AddBigram()
        if not (config.drop_attention and index == dropped_attention(config)):
            parts["attn"] = Attention(config, layer)
        if not (config.drop_mlp and index == 0):
            fused = "relu2" in kernels and config.activation == "relu2"
            parts["mlp"] = (FusedMLP if fused else MLP)(config)
        super().__init__(parts)
        self.layer = layer

    def extra_repr(self) -> str:
        table, source = self.layer.value_table, self.layer.skip_from
        return ", ".join(
            [f"{self.layer.keys} window"] * ("attn" in self)
            + [f"value table {table}"] * (table is not None)
            + [f"skip from layer {source}"] * (source is not None))


def run_block(block: nn.Module, recompute: bool, x_BTC: Tensor, *given) -> Tensor:
    """One layer. With `recompute` backward has only its input and computes the layer again: a third
    more work, a tenth of the memory."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, x_BTC, *given, use_reentrant=False, preserve_rng_state=False)
    return block(x_BTC, *given)


# --- the whole ------------------------------------------------------------------------------------

def softcap_piece(config: GPTConfig) -> dict[str, nn.Module]:
    if config.logit_softcap is None:
        return {}
    div = config.logit_softcap if config.softcap_div is None else config.softcap_div
    div *= math.sqrt(config.model_dim) if config.softcap_sqrt_dim else 1.0
    cap = {"tanh": pieces.TanhCap, "sigmoid": pieces.SigmoidCap}[config.softcap_kind]
    return {"softcap": cap(config.logit_softcap, div, config.softcap_shift)}


class GPT(nn.Module):
    """tokens -> embedding -> blocks -> head -> loss. `kernels`: what runs in Triton of "relu2" (the
    MLPs' two matrices with ReLU^2 between) and "loss"."""

    def __init__(self, config: GPTConfig, kernels: frozenset[str] = frozenset()):
        super().__init__()
        self.config = config
        dim, rows, dtype = config.model_dim, config.padded_vocab_size, DTYPES[config.compute_dtype]
        table_dtype = DTYPES[config.embed_dtype]
        self.stream_dtype = DTYPES[config.stream_dtype]
        self.plan = layer_plan(config)

        self.embed = Table(rows, dim, dtype=table_dtype)
        self.on_embed = Then({"smear": pieces.Smear()} if config.smear else {})
        if config.embed_norm:
            self.on_embed["norm"] = Norm()
        tables = {layer.value_table for layer in self.plan} - {None}
        self.value_embeds = nn.ModuleDict({
            str(i): Table(rows, dim, dtype=table_dtype) for i in sorted(tables)})
        self.blocks = nn.ModuleList(
            Block(config, i, layer, kernels) for i, layer in enumerate(self.plan))
        self.on_end = Then({"backout": pieces.Backout(backout_layer(config))}
                           if config.backout else {})
        head_dtype = DTYPES[config.head_dtype]
        self.lm_head = Linear(dim, rows, DTYPES[config.head], head_dtype) if (
            config.head != "fp8") else pieces.Fp8Head(
                dim, rows, dtype, config.fp8_factors, head_dtype)
        if config.tied_head:
            self.lm_head.weight = self.embed.weight
        self.on_logits = Then(softcap_piece(config))
        self.softcap = self.on_logits["softcap"].softcap if len(self.on_logits) else Softcap()
        self.loss_bodies = KERNELS if "loss" in kernels else TWINS

        # What all layers are given, made once a forward pass from (tokens, x0): Given's fields.
        self.shared: dict[str, Callable[[Tensor, Tensor], Tensor]] = {}
        if config.x0_lambdas:
            self.shared["x0_BTC"] = self.embedding_again
        if config.value_residual:
            self.shared["first_v_BTHD"] = self.first_values
        if config.bigram:
            self.bigram = pieces.Bigrams(config.bigram_rows, dim, dtype=table_dtype)
            self.shared["bigram_BTC"] = self.bigrams
        self.see = self.see_documents if config.packed else self.see_row
        self.segments = [range(config.num_layers)]  # the trainer cuts it where it compiles
        self.recomputed = 0  # the trainer's too: backward computes the first so many layers again

        # Rotary tables of every position; two positions a token where heads share a stream.
        positions = (config.max_seq_len or config.seq_len) * (2 if config.paired_heads else 1)
        for name in ("cos", "sin"):
            self.register_buffer(name, torch.empty(positions, config.head_dim // 2),
                                 persistent=False)
        self.register_buffer("target_weights", torch.ones(1), persistent=False)
        self.stage: Stage | None = None
        self.set_stage(Stage())

    @torch.no_grad()
    def set_stage(self, stage: Stage) -> None:
        """Take what `stage` says; call it when the stage changes. A few small kernels, and the
        rotary tables only where the windows that they follow changed; the host waits for nothing.
        """
        if self.stage is None or stage.yarn_windows != self.stage.yarn_windows:
            self.set_rotary(stage.yarn_windows)
        self.stage = stage
        self.embeds_from = "lm_head" if stage.tied else "embed"
        if len(stage.target_weights) != len(self.target_weights):
            self.target_weights = torch.ones(len(stage.target_weights), device=self.cos.device)
        for ahead, weight in enumerate(stage.target_weights):
            self.target_weights[ahead].fill_(weight)

    def set_rotary(self, windows: tuple[int, ...]) -> None:
        """Cos and sin of every position. q and k both carry the root of YaRN's temperature, so
        that no kernel sees a new number."""
        freqs, sharper = yarn(rotary_frequencies(self.config), windows)
        positions = torch.arange(len(self.cos), dtype=torch.float64, device=self.cos.device)
        angle = torch.outer(positions, freqs.to(self.cos.device, non_blocking=True))
        self.cos.copy_(angle.cos() * math.sqrt(sharper))
        self.sin.copy_(angle.sin() * math.sqrt(sharper))

    @torch.no_grad()
    def untie(self) -> None:
        """The embedding becomes a copy of the head's table that was used in its place (#51)."""
        self.embed.weight.copy_(self.lm_head.weight)

    def embedding_again(self, tokens_BT: Tensor, x0_BTC: Tensor) -> Tensor:
        return x0_BTC

    def bigrams(self, tokens_BT: Tensor, x0_BTC: Tensor) -> Tensor:
        return self.bigram(tokens_BT).to(self.stream_dtype)

    def first_values(self, tokens_BT: Tensor, x0_BTC: Tensor) -> Tensor:
        """(B, T, H, D): layer 0's values. Computed ahead, since its input is x0 up to a factor."""
        attn = self.blocks[0]["attn"]
        weight = attn.qkv.weight[2 * self.config.model_dim:].to(attn.qkv.compute_dtype)
        return F.linear(norm(x0_BTC).to(weight.dtype), weight).unflatten(-1, (-1, attn.head_dim))

    def see_row(self, tokens_BT: Tensor, docs_B2: Tensor | None) -> dict[str, Keys | None]:
        return {"long": None}

    def see_documents(self, tokens_BT: Tensor, docs_B2: Tensor | None) -> dict[str, Keys]:
        """Documents and windows, once for all layers of a kind."""
        doc_BT, T = document_ids(tokens_BT, self.config.bos_id), tokens_BT.size(1)
        long, short = self.stage.window or T, self.stage.short_window or T
        of = {"long": (doc_BT, long), "short": (doc_BT, short),
              "paired": (doc_BT.repeat_interleave(2, 1), short)}
        dtype = DTYPES[self.config.compute_dtype]
        docs = {"long": docs_B2, "short": docs_B2,
                "paired": docs_B2 if docs_B2 is None else docs_B2 * torch.tensor([1, 2])}
        return {kind: packed_keys(*of[kind], dtype, docs[kind])
                for kind in {x.keys for x in self.plan}}

    def hidden(self, tokens_BT: Tensor, docs_B2: Tensor | None = None) -> Tensor:
        """(B, T) tokens -> (B, T, C), normed, ready for the head. `docs_B2`: see packed_keys."""
        x_BTC, given, values = self.enter(tokens_BT)
        x_BTC = x_BTC.view_as(x_BTC)  # if it were given.x0_BTC, layer 0 would be a graph of its own
        keys = self.see(tokens_BT, docs_B2)
        outputs: dict[int | None, Tensor | None] = {None: None}
        for layers in self.segments:
            x_BTC = self.run_layers(layers, x_BTC, given, keys, values, outputs)
        return self.leave(x_BTC, outputs)

    def enter(self, tokens_BT: Tensor) -> tuple[Tensor, Given, dict[int | None, Tensor | None]]:
        """The embedding, what all layers are given, and the value embeddings by their table."""
        table = getattr(self, self.embeds_from).weight
        x_BTC = self.on_embed(F.embedding(tokens_BT, table).to(self.stream_dtype))
        given = Given((self.cos, self.sin), **{
            name: make(tokens_BT, x_BTC) for name, make in self.shared.items()})
        return x_BTC, given, {None: None} | {
            int(i): table(tokens_BT).to(self.stream_dtype).unflatten(-1, (-1, self.config.head_dim))
            for i, table in self.value_embeds.items()}

    def run_layers(self, layers: range, x_BTC: Tensor, given: Given, keys: dict[str, Keys | None],
                   values: dict, outputs: dict) -> Tensor:
        """Consecutive layers; each one's output is added to `outputs` for the skips behind it."""
        for i in layers:
            layer = self.plan[i]
            own = given._replace(keys=keys[layer.keys], value_BTHD=values[layer.value_table],
                                 skip_BTC=outputs[layer.skip_from])
            x_BTC = outputs[i] = run_block(self.blocks[i], i < self.recomputed, x_BTC, own)
        return x_BTC

    def leave(self, x_BTC: Tensor, outputs: dict) -> Tensor:
        return norm(self.on_end(x_BTC, outputs))

    def logits(self, x_BTC: Tensor) -> Tensor:
        """(B, T, C) -> (B, T, V) in fp32; the columns past vocab_size are padding."""
        return self.on_logits(self.lm_head(x_BTC).float())

    def head_loss(self, x_BTC: Tensor, targets_BT: Tensor) -> Tensor:
        """Cross-entropy in nats, summed over the B*T tokens: fp32 scalar. With several targets
        (multi-token prediction, #53) each has its weight; they do not reach into the next row."""
        targets_NK = targets_ahead(targets_BT, len(self.target_weights))
        return head_loss(x_BTC.flatten(0, 1), self.lm_head.weight, targets_NK, self.target_weights,
                         self.softcap, self.lm_head.compute_dtype,
                         self.lm_head.fp8_factors if self.training else None, self.loss_bodies)

    def forward(self, inputs_BT: Tensor, targets_BT: Tensor,
                docs_B2: Tensor | None = None) -> Tensor:
        """The summed cross-entropy of predicting targets from inputs, both (B, T).

        A sum, because the trainer divides by the tokens of the whole global batch: then no split
        into ranks or micro-batches, even an uneven one, changes the gradient.
        """
        return self.head_loss(self.hidden(inputs_BT, docs_B2), targets_BT)

    def init_rules(self) -> dict[str, tuple]:
        """Ending of a parameter's name -> ("uniform" or "normal", std) or ("constant", value)."""
        c = self.config
        dim = c.model_dim
        qkv_std = c.init_std if c.qkv_init_std is None else c.qkv_init_std
        zero = ("constant", 0.0)

        def matrix(std: float, fan_in: int) -> tuple:
            return ("uniform", std * fan_in ** -0.5)

        def out(fan_in: int) -> tuple:
            return zero if c.zero_proj else matrix(c.init_std, fan_in)

        return {
            "embed.weight": matrix(3 ** -0.5, dim) if c.tied_head else ("normal", 1.0),
            "lm_head.weight": ("normal", c.head_init_std),
            "qkv.weight": matrix(qkv_std, dim), "out.weight": out(dim),
            "fc.weight": matrix(c.init_std, dim), "proj.weight": out(c.mlp_ratio * dim),
            "value_embeds": ("normal", c.value_embed_init_std), "bigram.weight": zero,
            "attn_gate": zero, "value_gate": zero, "skip_gate": zero, "smear_gate": zero,
            "value_lambda": ("constant", 0.5), "embed_lambda": ("constant", 0.5),
            "resid_lambda": ("constant", c.resid_lambda), "x0_lambda": zero,
            "bigram_lambda": ("constant", 0.1), "smear_lambda": zero,
            "backout_lambda": ("constant", 0.5),
            "skip_lambda": ("constant", 1.0 if c.unet == "weight" else -1.5),
            "qkv.factor": ("constant", 0.5), "out.factor": ("constant", 1.0),
        }


# --- about parameters -----------------------------------------------------------------------------

def init_rule(model: nn.Module, name: str) -> tuple:
    """The rule of init_rules that names this parameter. Raises ValueError where none does: a
    forgotten parameter must not train."""
    rules = model.init_rules()
    key = "value_embeds" if name.startswith("value_embeds.") else next(
        (ending for ending in rules if name.endswith(ending)), None)
    if key is None:
        raise ValueError(f"no initialisation for parameter {name}: add a rule to init_rules of "
                         f"{type(model).__name__}")
    return rules[key]


@torch.no_grad()
def init_weights(model: nn.Module, seed: int) -> None:
    """Set every parameter, by name, from one seed; the same values on every device and rank."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        kind, number = init_rule(model, name)
        if kind == "constant" or number == 0:
            p.fill_(number)
        elif kind == "uniform":
            bound = math.sqrt(3) * number
            p.copy_(torch.empty(p.shape).uniform_(-bound, bound, generator=generator))
        else:
            p.copy_(torch.empty(p.shape).normal_(0, number, generator=generator))


def param_role(name: str) -> str:
    """What a parameter is to the optimizer; see recipes.optimizer_groups."""
    if name.startswith("value_embeds."):
        return "value_embed"
    of_name = {"embed.weight": "embed", "lm_head.weight": "head", "bigram.weight": "bigram",
               "position.weight": "embed", "qkv.weight": "attn_in", "out.weight": "attn_out",
               "fc.weight": "mlp_in", "proj.weight": "mlp_out"}
    last = name.rpartition(".")[2]
    role = next((role for ending, role in of_name.items() if name.endswith(ending)), None)
    if role is not None:
        return role
    if last.endswith("_gate"):
        return last
    return "x0_lambda" if last == "x0_lambda" else "scalar"


def num_parameters(model: nn.Module) -> int:
    """Trained numbers, a tied head counted once."""
    return sum(p.numel() for p in model.parameters())


def mean_keys(seq_len: int, window: int | None) -> float:
    """Keys a token sees on average in a row without document bounds."""
    W = min(window or seq_len, seq_len)
    return W - W * (W - 1) / (2 * seq_len)


def flops_per_token(model: nn.Module, stage: Stage | None = None,
                    seq_len: int | None = None) -> float:
    """Forward and backward FLOPs a token: 6 x parameters of matrix products, plus 12 C times the
    keys a token attends to on average, per attention layer. The softmax that backward recomputes
    is not counted; neither are document bounds, which only take keys away.
    """
    stage, seq_len = stage or model.stage, seq_len or model.config.seq_len
    matmul_parameters = sum(m.weight.numel() for m in model.modules() if isinstance(m, Linear))
    windows = {"long": stage.window, "short": stage.short_window, "paired": stage.short_window}
    keys = sum(mean_keys(seq_len, windows[block.layer.keys])
               for block in model.blocks if "attn" in block)
    return 6 * matmul_parameters + 12 * model.config.model_dim * keys
