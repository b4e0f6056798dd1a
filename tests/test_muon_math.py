"""Orthogonalisation and the other steepest directions against exact mathematics."""

import math

import muon_helpers as h
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import muon
from muon import (
    CUBIC,
    JORDAN,
    NORMS,
    coefficients,
    normalize,
    normuon,
    orthogonalize,
    polar_express,
    steepest,
)

# What each method makes of singular values in [0.01, 1] of the norm (see the scalar maps), computed
# from the published coefficients here, not from the code under test.
GRID = torch.logspace(-2, 0, 20001, dtype=torch.float64)
PUBLISHED = {"polar_express": h.RECORD_LIST, "jordan": (JORDAN,) * 5, "cubic": (CUBIC,) * 12}
SAFETY = {"polar_express": 1.02, "jordan": 1.0, "cubic": 1.0}


def close_to(got, published, tolerance):
    return all(
        abs(a - b) <= tolerance * abs(b)
        for ours, theirs in zip(got, published, strict=True)
        for a, b in zip(ours, theirs, strict=True)
    )


def test_generated_coefficients_are_the_published_ones():
    assert close_to(polar_express(5), h.RECORD_LIST, 1e-12)
    assert close_to(polar_express(5, safety=1.0, cushion=0.0), h.CANS_LIST, 1e-12)
    paper = polar_express(8, safety=1.0, cushion=h.PAPER_CUSHION)
    assert close_to(paper[:6], h.PAPER_LIST[:6], 1e-12)
    assert close_to(paper[6:], h.PAPER_LIST[6:], 1e-7)
    assert close_to(polar_express(10, safety=1.01)[:6], h.AUTHORS_LIST[:6], 1e-12)


@pytest.mark.parametrize("steps", range(3, 10))
def test_generated_maps_stay_positive_and_bounded_up_to_their_safety(steps):
    x = torch.cat((torch.logspace(-6, 0, 4000), torch.linspace(1.0, 1.02, 200))).double()
    y = h.scalar_map(polar_express(steps), x)
    assert y.min() > 0  # a published set turns negative at 0.88: it would step uphill
    least = {3: 1.9, 4: 1.6}.get(steps, 1.15)
    assert y.max() < least
    if steps >= 5:
        on = y[(x >= 1e-3) & (x <= 1)]
        assert on.min() > 0.85 and (steps < 8 or (on - 1).abs().max() < 1e-4)


SHAPES = ((96, 96), (72, 288), (192, 48), (3, 70, 70), (2, 2, 24, 60))


@pytest.mark.parametrize("path, slack", [("fp32", 1e-3), ("bf16", 0.025)])
@pytest.mark.parametrize("method", PUBLISHED)
def test_singular_values_end_where_the_polynomials_send_them(method, path, slack):
    published = PUBLISHED[method]
    for seed, shape in enumerate(SHAPES):
        G = h.gaussian(*shape, seed=seed)
        with h.on(path, muon) as mode:
            X = orthogonalize(G, method, len(published), mode=mode)
        U, S, Vh = torch.linalg.svd(G.double(), full_matrices=False)
        norm = S.square().sum(-1, keepdim=True).sqrt() * SAFETY[method]
        want = h.scalar_map(published, S / norm)
        got = (U.mT @ X.double() @ Vh.mT).diagonal(dim1=-2, dim2=-1)
        large = (S / norm).gt(1e-2)
        low, high = h.scalar_map(published, GRID).aminmax()
        assert got[large].min() > low - slack and got[large].max() < high + slack
        if path == "fp32":
            assert (got - want)[large].abs().max() < 2e-3


def test_svd_is_the_polar_factor_and_methods_converge_to_it():
    for seed, shape in enumerate(SHAPES):
        G = h.gaussian(*shape, seed=seed).double()
        want = h.exact(G)
        assert (orthogonalize(G, "svd") - want).abs().max() < 1e-10
        assert (orthogonalize(G, "polar_express", 20) - want).abs().max() < 1e-6
        assert (orthogonalize(G, "cubic", 60) - want).abs().max() < 1e-6


@pytest.mark.parametrize("path", h.PATHS)
@pytest.mark.parametrize("method", ["svd", "jordan", "polar_express"])
def test_the_update_always_descends(method, path):
    inputs = [h.low_rank(r, 96, 70)[0] for r in (1, 8)]
    inputs += [h.gaussian(80, 80), h.spectrum([1 / n for n in range(1, 71)], 70, 128).float()]
    for G in inputs:
        with h.on(path, muon) as mode:
            X = orthogonalize(G, method, mode=mode)
        dual = (G * X).sum() / torch.linalg.matrix_norm(G, "nuc")
        assert 0.65 <= dual <= 1.21


@settings(max_examples=40, deadline=None)
@given(
    exponent=st.integers(-100, 100), seed=st.integers(0, 99), rows=st.integers(1, 90),
    cols=st.integers(1, 90), path=st.sampled_from(list(h.PATHS)),
)  # fmt: skip
def test_powers_of_two_change_no_bit_and_signs_only_the_sign(exponent, seed, rows, cols, path):
    G = h.gaussian(rows, cols, seed=seed)
    with h.on(path, muon) as mode:
        X = orthogonalize(G, mode=mode)
        assert torch.equal(orthogonalize(G * 2.0**exponent, mode=mode), X)
        assert torch.equal(orthogonalize(-G, mode=mode), -X)
        if rows != cols:  # a square has no short side to tell which way to iterate
            assert torch.equal(orthogonalize(G.mT.contiguous(), mode=mode), X.mT)
            assert torch.equal(orthogonalize(G.mT, mode=mode), X.mT)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e-12, 1e12, 1e20, 1e30])
def test_gradients_of_any_scale_give_the_same_update(scale):
    G = h.gaussian(64, 96)
    for method in ("jordan", "polar_express", "svd"):
        X = orthogonalize(G, method)
        assert (orthogonalize(G * scale, method) - X).norm() < 2e-5 * X.norm()
    # torch.optim.Muon's eps on request: the norm is at least eps
    small = orthogonalize(G * 1e-12, "jordan", eps=1e-7)
    assert small.norm() < 0.1 * orthogonalize(G, "jordan").norm()
    assert torch.equal(orthogonalize(G, "jordan", eps=1e-7), orthogonalize(G, "jordan"))


@pytest.mark.parametrize("path, bound", [("fp32", 1e-5), ("bf16", 0.06)])
def test_rotations_and_permutations_go_through(path, bound):
    G = h.gaussian(72, 128)
    Q, R = torch.linalg.qr(h.gaussian(72, 72, seed=1))[0], torch.linalg.qr(h.gaussian(128, 128))[0]
    order = torch.randperm(72, generator=h.generator())
    with h.on(path, muon) as mode:
        X = orthogonalize(G, mode=mode)
        assert (orthogonalize(Q @ G @ R, mode=mode) - Q @ X @ R).norm() < bound * 8
        assert (orthogonalize(G[order], mode=mode) - X[order]).norm() < bound * 8


def test_low_rank_momentum_does_not_become_rounding_noise():
    for rank, rows, cols in ((8, 256, 256), (8, 192, 768), (32, 256, 512)):
        G, *spaces = h.low_rank(rank, rows, cols)
        with h.on("fp32", muon) as mode:
            for method in ("jordan", "polar_express"):
                X = orthogonalize(G, method, mode=mode)
                assert h.noise_energy(X, *spaces) < 1e-6
    with h.on("bf16", muon) as mode:
        assert h.noise_energy(orthogonalize(G, mode=mode), *spaces) > 0.1
        assert h.noise_energy(orthogonalize(G), *spaces) < 1e-6  # the default is "accurate"


@pytest.mark.parametrize("path", h.PATHS)
def test_modes_mean_the_same_whatever_precision_the_program_chose(path):
    """bf16 products would blow up the Gram form, which only fp32 stands: 1e4 times the norm."""
    G, *spaces = h.low_rank(8, 80, 256)
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    with h.on(path, muon) as mode:
        want = {method: orthogonalize(G, method, mode=mode) for method in ("svd", "jordan")}
        try:
            torch.set_float32_matmul_precision("medium")
            chosen = matmul.fp32_precision
            for method, X in want.items():
                assert torch.equal(orthogonalize(G, method, mode=mode), X)
                assert matmul.fp32_precision == chosen
        finally:
            torch.set_float32_matmul_precision("highest")
            matmul.fp32_precision = before
    assert h.noise_energy(want["svd"], *spaces) < 1e-6


def test_fp16_storage_keeps_noise_below_two_percent(monkeypatch):
    """The mode that GPUs use by default, by a CPU: fp16 storage, fp32 norm and accumulation."""
    monkeypatch.setattr(muon, "storage_dtype", lambda mode, device: torch.float16)
    for rows, cols in ((256, 256), (192, 768)):
        G, *spaces = h.low_rank(8, rows, cols)
        for scale in (1e-30, 1.0, 1e30):
            X = muon.orthogonalize(G * scale)
            assert h.noise_energy(X, *spaces) < 0.03
        want = orthogonalize(G.double())
        assert (X - want).norm() < 0.2 * want.norm()
    assert muon.orthogonalize(torch.zeros(8, 8)).eq(0).all()


@pytest.mark.parametrize("units", [True, False])
def test_storage_follows_mode_and_device(monkeypatch, units):
    monkeypatch.setattr(muon, "bf16_units", lambda: units)
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert muon.storage_dtype(None, cuda) == muon.storage_dtype("accurate", cuda) == torch.float16
    assert muon.storage_dtype(None, cpu) == muon.storage_dtype("accurate", cpu) == torch.float32
    assert muon.storage_dtype("fast", cuda) == torch.bfloat16
    # products that no hardware has are no faster: plain fp32, to the bit
    assert muon.storage_dtype("fast", cpu) == (torch.bfloat16 if units else torch.float32)
    G = h.gaussian(40, 24)
    alike = torch.equal(orthogonalize(G, mode="fast"), orthogonalize(G, mode="accurate"))
    assert alike != units
    wide = G.double()  # fp64 stays fp64
    assert torch.equal(orthogonalize(wide, mode="fast"), orthogonalize(wide, mode="accurate"))
    with pytest.raises(ValueError, match="mode"):
        muon.storage_dtype("exact", cpu)


@pytest.mark.parametrize("method", ["svd", "jordan", "polar_express", "cubic"])
def test_zero_stays_zero_and_nan_stays_at_home(method):
    G = h.gaussian(4, 24, 40)
    G[1] = 0.0
    X = orthogonalize(G, method)
    assert X[1].eq(0).all() and X.isfinite().all()
    if method == "svd":
        return  # LAPACK refuses NaN altogether
    for bad in (math.nan, math.inf):
        broken = G.clone()
        broken[2, 3, 3] = bad
        Y = orthogonalize(broken, method)
        assert torch.equal(Y[[0, 1, 3]], X[[0, 1, 3]]) and not Y[2].isfinite().all()


@pytest.fixture
def one_thread():
    """Several threads cut an fp32 product of one matrix otherwise than that of a batch."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("path", h.PATHS)
@pytest.mark.parametrize("shape", [(72, 72), (40, 96), (130, 80)])
def test_a_batch_is_its_matrices_and_padding_is_harmless(shape, path, one_thread):
    G = h.gaussian(6, *shape)
    padded = torch.nn.functional.pad(G, (0, 16, 0, 8))
    with h.on(path, muon) as mode:
        X, Y = orthogonalize(G, mode=mode), orthogonalize(padded, mode=mode)
        for k in range(6):
            assert torch.equal(orthogonalize(G[k], mode=mode), X[k])
        assert torch.equal(orthogonalize(G.view(2, 3, *shape), mode=mode).view(6, *shape), X)
    assert Y[:, shape[0] :].eq(0).all() and Y[..., shape[1] :].eq(0).all()
    slack = 1e-5 if path == "fp32" else 2e-2
    assert (Y[:, : shape[0], : shape[1]] - X).abs().max() < slack


def test_wide_matrices_by_their_gram_matrix_alone_agree_with_the_plain_iteration():
    """fp32 takes the cheaper form from 2:1 on; power laws and low rank are its hard inputs."""
    power = h.spectrum([1 / n for n in range(1, 65)], 64, 256)
    for G in (h.gaussian(64, 256).double(), power, h.low_rank(8, 64, 256)[0].double()):
        for method in ("jordan", "polar_express", "cubic"):
            S = torch.linalg.svdvals(G)
            published = coefficients(method, 5)[0]
            want = h.scalar_map(published, S / (S.norm() * SAFETY[method]))
            got = orthogonalize(G.float(), method)
            U, _, Vh = torch.linalg.svd(G, full_matrices=False)
            error = U @ torch.diag(want) @ Vh - got.double()
            assert error.norm() < 5e-3 * want.norm(), method


def test_products_handed_in_are_used_and_change_nothing():
    calls = []

    def gram(X):
        calls.append("gram")
        return torch.bmm(X, X.mT)

    def polynomial(A, b, c):
        calls.append("polynomial")
        return torch.baddbmm(A, A, A, beta=b, alpha=c)

    G = h.gaussian(3, 32, 40)
    for path in h.PATHS:
        calls.clear()
        with h.on(path, muon) as mode:
            X = orthogonalize(G, mode=mode, products=(gram, polynomial))
            assert torch.equal(X, orthogonalize(G, mode=mode))
        assert calls == ["gram", "polynomial"] * 5


def test_bad_calls_say_what_to_do():
    with pytest.raises(ValueError, match=r"\(\.\.\., rows, cols\)"):
        orthogonalize(torch.ones(3))
    with pytest.raises(ValueError, match="method"):
        orthogonalize(torch.ones(3, 3), "newton")
    with pytest.raises(ValueError, match="ns_coefficients"):
        orthogonalize(torch.ones(3, 3), ns_coefficients=((1, 2),))


# -------------------------------------------------------------------------------- other norms


def ball(norm, T):
    """The norm of T, written out."""
    if norm == "spectral":
        return torch.linalg.matrix_norm(T, 2)
    if norm == "sign":
        return T.abs().max()
    if norm == "l2":
        return T.square().sum().sqrt()
    return max(row.square().sum().sqrt() for row in (T if norm == "row" else T.T))


def dual(norm, G):
    """max <G, T> over the unit ball, by the dual norm's definition."""
    if norm == "spectral":
        return torch.linalg.svdvals(G).sum()
    if norm == "sign":
        return G.abs().sum()
    if norm == "l2":
        return G.square().sum().sqrt()
    return sum(row.square().sum().sqrt() for row in (G if norm == "row" else G.T))


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 12), cols=st.integers(1, 12), seed=st.integers(0, 999))
def test_each_direction_maximises_the_inner_product_over_its_unit_ball(rows, cols, seed):
    G = h.gaussian(rows, cols, seed=seed).double()
    for norm in NORMS:
        options = {"method": "svd"} if norm == "spectral" else {}
        T = steepest(G, norm, **options)
        assert ball(norm, T) <= 1 + 1e-9
        best = dual(norm, G)
        assert abs((G * T).sum() - best) <= 1e-9 * best
        for trial in range(5):  # and nothing else in the ball does better
            other = h.gaussian(rows, cols, seed=seed + trial + 1).double()
            assert (G * other).sum() / ball(norm, other) <= best + 1e-9
        for scale in (1e-30, 1e30):
            assert (steepest(G.float() * scale, norm, **options) - T).abs().max() < 1e-4
        assert steepest(torch.zeros(rows, cols), norm, **options).eq(0).all()


def test_normalize_divides_by_the_norm():
    G = torch.stack([h.gaussian(300, 700) * 10.0**n for n in (-38, -20, -9, 0, 9, 20, 35)])
    G[3, 5] = 0.0  # zero rows and tiny ones are not rare
    G[3, 6] *= 1e-30
    for matrices in (G, G[3:4]):
        norms = matrices.double().square().sum((-2, -1), keepdim=True).sqrt()
        X = normalize(matrices, (-2, -1))
        assert (X.double() - matrices.double() / norms).norm() < 3e-7
        assert torch.equal(X[-1], normalize(matrices[-1:], (-2, -1))[0])
    G = h.gaussian(3, 5, 7).double()
    assert torch.allclose(normalize(G, (-2, -1)).square().sum((-2, -1)), torch.ones(3).double())
    assert torch.allclose(normalize(G, -1, 2.0).square().sum(-1), torch.full((3, 5), 0.25).double())


# ------------------------------------------------------------------------------------- NorMuon


@pytest.mark.parametrize("axis", ["row", "col"])
def test_normuon_by_hand(axis):
    X, v = h.gaussian(2, 6, 10), torch.rand(2, 6, 1, generator=h.generator())
    if axis == "col":
        X, v = X.mT.contiguous(), v.mT.contiguous()
    dim = -1 if axis == "row" else -2
    squares = X.double().square().mean(dim, keepdim=True)
    want_v = 0.9 * v.double() + 0.1 * squares
    out = normuon(X, v, 0.9, axis)  # v in place
    assert torch.allclose(v.double(), want_v, rtol=1e-5)
    want = X.double() / want_v.sqrt()
    for k in range(2):
        want[k] *= X[k].double().norm() / want[k].norm()
        assert torch.allclose(out[k].norm(), X[k].norm(), rtol=1e-5)
    assert torch.allclose(out.double(), want, rtol=1e-4)
    # from rest all rows come out alike; zero stays zero
    flat = normuon(X, torch.zeros_like(v), 0.95, axis)
    rms = flat.square().mean(dim)
    assert torch.allclose(rms, rms.mean(-1, keepdim=True).expand_as(rms), rtol=1e-4)
    assert normuon(torch.zeros(3, 4), torch.zeros(3, 1), 0.9, "row").eq(0).all()
