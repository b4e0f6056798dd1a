"""The rules of every track, as data. A record must meet these rules, and no others.

    target      mean final validation loss to reach
    metric      ranks records, smaller is better, most important first
    test        "t": one-sided t-test of the runs' losses against the target, p < alpha
                "fixed_sigma": (target - mean) * sqrt(n) >= margin, the spread sigma being known
    data_digest the corpus every run must have used, where one is prescribed
    fixed       fields of the recipe that a record may not change (`model.` reaches into the model)
"""

from __future__ import annotations

from dataclasses import dataclass, field

METRICS = ("train_time_ms", "tokens", "steps")
FINEWEB_VAL_TOKENS = 10_485_760


@dataclass(frozen=True)
class Track:
    """The rules of one track; the fields are explained at the top of the file."""

    name: str
    title: str
    corpus: str
    target: float
    metric: tuple[str, ...]
    test: str
    alpha: float | None = None
    sigma: float | None = None
    margin: float | None = None
    systems_exempt: bool = False  # a change that leaves the mathematics alone needs no p
    min_runs: int = 2
    device: str | None = None  # "cuda" or "cpu"
    gpu: str | None = None  # part of the GPU's name
    gpu_count: int | None = None
    data_digest: str | None = None
    fixed: dict = field(default_factory=dict)
    published: str | None = None  # whose public records and curves a run is held against
    archive: str | None = None  # folder of the track in a clone of the public records

    def __post_init__(self) -> None:
        assert self.test in ("t", "fixed_sigma"), self.test
        assert self.metric and set(self.metric) <= set(METRICS), self.metric

    @property
    def rule(self) -> str:
        """The rule in words."""
        if self.test == "fixed_sigma":
            return f"(target - mean) * sqrt(n) >= {self.margin:g}"
        return f"p < {self.alpha:g} over at least {self.min_runs} runs"


TRACKS = {
    track.name: track
    for track in (
        Track(
            "short",
            title="GPT-2 small, 3.28 on FineWeb, eight H100",
            corpus="FineWeb",
            target=3.28,
            metric=("train_time_ms",),
            test="t",
            alpha=0.01,
            systems_exempt=True,
            device="cuda",
            gpu="H100",
            gpu_count=8,
            fixed={"val_tokens": FINEWEB_VAL_TOKENS},
            published="short",
            archive="track_1_short",
        ),
        Track(
            "solo",
            title="GPT-2 small, 3.28 on FineWeb, one GPU",
            corpus="FineWeb",
            target=3.28,
            metric=("train_time_ms",),
            test="t",
            alpha=0.01,
            systems_exempt=True,
            device="cuda",
            gpu_count=1,
            fixed={"val_tokens": FINEWEB_VAL_TOKENS},
        ),
        Track(
            "medium",
            title="GPT-2 medium, 2.92 on FineWeb, eight H100",
            corpus="FineWeb",
            target=2.92,
            metric=("train_time_ms",),
            test="t",
            alpha=0.01,
            systems_exempt=True,
            device="cuda",
            gpu="H100",
            gpu_count=8,
            fixed={"val_tokens": FINEWEB_VAL_TOKENS},
            published="medium",
            archive="track_2_medium",
        ),
        Track(
            "steps",
            title="fewest steps to 3.28, architecture and batch fixed",
            corpus="FineWeb",
            target=3.28,
            metric=("steps",),
            test="fixed_sigma",
            sigma=0.0013,
            margin=0.004,
            min_runs=1,
            archive="track_3_optimization",
            fixed={
                "val_tokens": FINEWEB_VAL_TOKENS,
                "batch_tokens": 524_288,
                "model.num_layers": 12,
                "model.num_heads": 6,
                "model.head_dim": 128,
            },
        ),
        Track(
            "pocket",
            title="a pocket GPT on the built-in corpus, on a CPU",
            corpus="built-in",
            # The loss of a GPT-2 with AdamW, learning rate swept, on ten times the tokens of a
            # pocket run, about five minutes on two cores: bench/pocket_target.py.
            target=1.77,
            metric=("tokens", "train_time_ms"),
            test="t",
            alpha=0.01,
            min_runs=5,
            device="cpu",
            # data.corpus builds it with pinned versions, equal on every machine.
            data_digest="189a4142082cffb039f75331c2ff0185e553710f389bd0431359bbe9b200d527",
            fixed={"val_tokens": 131_072},
        ),
    )
}


def track(name: str) -> Track:
    """The rules of one track; ValueError names those that exist."""
    if name not in TRACKS:
        raise ValueError(f"track: expected one of {', '.join(TRACKS)}, got {name!r}")
    return TRACKS[name]
