"""The inverse of kernel matrices against torch.linalg, the released code's numbers and finite differences."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.library import opcheck

from vltok.errors import UnsupportedInputError
from vltok.methods.soft import inverse as module
from vltok.methods.soft.inverse import _kernel_inverse, kernel_inverse, released_inverse

GOLDEN = load_file(Path(__file__).parents[1] / "data" / "soft_newton.safetensors")
RIDGES = pytest.mark.parametrize("ridge", [0.0, 0.01])

# landmarks, their width and spread -> smallest eigenvalue as a share of the largest row sum
SPECTRA = {
    "one": (1, 4, 1.0),  # 1
    "apart": (16, 16, 1.0),  # 0.99
    "near": (49, 8, 0.5),  # 4e-3
    "large": (256, 16, 0.3),  # 2e-4
    "crowded": (36, 8, 0.15),  # 1e-5, eigenvalues spread evenly in between
    "plane": (49, 2, 0.2),  # 0, from 1 down without a gap
    "heap": (64, 4, 0.01),  # 0, all but one below 1e-4
}


@pytest.fixture(params=["direct", "newton"], autouse=True)
def path(request, monkeypatch):
    """Both ways: that of CPUs and that of GPUs."""
    monkeypatch.setattr(module, "_is_direct", lambda kernel: request.param == "direct")


def kernel_of(tokens: torch.Tensor) -> torch.Tensor:
    """By differences, in the dtype of the tokens."""
    return torch.exp(-(tokens.unsqueeze(-2) - tokens.unsqueeze(-3)).square().sum(-1) / 2)


def kernel(name: str, seed: int = 0) -> torch.Tensor:
    """A kernel matrix, (M, M), float64 but exact in float32."""
    count, width, spread = SPECTRA[name]
    tokens = torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * spread
    return kernel_of(tokens).float().double()


def copies(distinct: int, times: int) -> torch.Tensor:
    """The kernel matrix of groups of equal landmarks in mixed order, (M, M), float64."""
    rng = torch.Generator().manual_seed(0)
    tokens = torch.randn(distinct, 8, generator=rng, dtype=torch.float64).repeat_interleave(times, 0)
    return kernel_of(tokens[torch.randperm(len(tokens), generator=rng)]).float().double()


def identity(matrix: torch.Tensor) -> torch.Tensor:
    return torch.eye(matrix.shape[-1], dtype=matrix.dtype)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).abs().max() / expected.abs().max()).item()


def newton(matrix: torch.Tensor, alpha: torch.Tensor | float, steps: int) -> torch.Tensor:
    """The iteration as the paper writes it; autograd goes through."""
    inverse = alpha * matrix
    for _ in range(steps):
        inverse = 2 * inverse - inverse @ matrix @ inverse
    return inverse


def exact_steps(matrix: torch.Tensor) -> torch.Tensor:
    """Twenty Newton steps without rounding, eigenvalue by eigenvalue, from 1.8 / (largest row sum)^2."""
    values, vectors = torch.linalg.eigh(matrix)
    inverses = values * 1.8 / matrix.sum(-1).max() ** 2
    for _ in range(20):
        inverses = inverses * (2 - values * inverses)
    return vectors @ inverses.diag() @ vectors.mT


@pytest.mark.parametrize("case", range(4))
def test_released_inverses_and_gradients_are_the_released_codes(case):
    data = {key.removeprefix(f"c{case}."): value for key, value in GOLDEN.items() if key.startswith(f"c{case}.")}
    for variant, ridge in (("plain", 0.01), ("norm", 0.0)):
        matrix = data["in.K"].clone().requires_grad_()
        inverse = released_inverse(matrix, 20, ridge)
        (gradient,) = torch.autograd.grad((inverse * data["in.G"]).sum(), matrix)
        assert error(inverse, data[f"{variant}.inv"]) < 1e-5
        assert error(gradient, data[f"{variant}.grad"]) < 1e-5
    for steps in (5, 10):
        if f"plain.inv_iter{steps}" in data:
            assert error(released_inverse(data["in.K"], steps, 0.01), data[f"plain.inv_iter{steps}"]) < 1e-5


@pytest.mark.parametrize(
    ("case", "variant"), [(0, "plain"), (1, "plain"), (2, "plain"), (3, "plain"), (0, "norm"), (1, "norm"), (3, "norm")]
)
def test_where_the_released_iteration_converged_the_checked_inverse_is_the_same(case, variant):
    matrix = GOLDEN[f"c{case}.in.K"].clone().requires_grad_()
    inverse = kernel_inverse(matrix, 20, 0.01 if variant == "plain" else 0.0)
    (gradient,) = torch.autograd.grad((inverse * GOLDEN[f"c{case}.in.G"]).sum(), matrix)
    assert error(inverse, GOLDEN[f"c{case}.{variant}.inv"]) < 1e-5
    assert error(gradient, GOLDEN[f"c{case}.{variant}.grad"]) < 1e-5


@pytest.mark.parametrize("steps", [1, 5, 20, 60])
@pytest.mark.parametrize("name", SPECTRA)
def test_with_a_ridge_it_is_the_inverse_however_few_or_many_the_steps(name, steps):
    matrix = kernel(name)
    ridged = matrix + 0.01 * identity(matrix)
    expected = torch.linalg.inv(ridged)
    for dtype in (torch.float32, torch.float64):
        inverse = kernel_inverse(matrix.to(dtype), steps)
        assert inverse.dtype == dtype
        assert error(inverse, expected) < 1e-4
        residual = (identity(matrix) - ridged @ inverse.double()).abs().max()
        assert residual < 2e-4, "1e-4 is promised, give or take rounding"


@pytest.mark.parametrize("steps", [1, 20, 40])
@pytest.mark.parametrize("name", SPECTRA)
def test_without_a_ridge_it_is_what_twenty_exact_steps_give_however_few_or_many_the_steps(name, steps):
    matrix = kernel(name)
    for dtype in (torch.float32, torch.float64):
        inverse = kernel_inverse(matrix.to(dtype), steps, 0.0)
        assert inverse.dtype == dtype
        assert error(inverse, exact_steps(matrix)) < 1e-3
        residual = (matrix @ inverse.double() @ matrix - matrix).abs().max()
        assert residual < 1.1e-3 * matrix.sum(-1).max()


@RIDGES
@pytest.mark.parametrize("steps", [1, 20])
def test_double_precision_is_kept(steps, ridge):
    matrix = kernel("apart")
    assert error(kernel_inverse(matrix, steps, ridge), torch.linalg.inv(matrix + ridge * identity(matrix))) < 1e-12


@pytest.mark.parametrize("steps", [1, 5, 20, 60, 200])
@pytest.mark.parametrize(("distinct", "times"), [(1, 2), (1, 7), (1, 9), (3, 5), (12, 5), (7, 37)])
def test_of_equal_landmarks_it_is_the_pseudo_inverse(distinct, times, steps):
    matrix = copies(distinct, times)
    expected = torch.linalg.pinv(matrix, rtol=1e-6, hermitian=True)
    for dtype in (torch.float32, torch.float64):
        assert error(kernel_inverse(matrix.to(dtype), steps, 0.0), expected) < 1e-3


def test_of_equal_landmarks_with_a_ridge_it_is_the_inverse():
    for matrix in (torch.ones(7, 7, dtype=torch.float64), copies(3, 5)):
        ridged = matrix + 0.01 * identity(matrix)
        assert error(kernel_inverse(matrix.float()), torch.linalg.inv(ridged)) < 1e-5
    torch.testing.assert_close(kernel_inverse(torch.ones(2, 1, 1)), torch.full((2, 1, 1), 1 / 1.01))
    torch.testing.assert_close(kernel_inverse(torch.ones(2, 1, 1), ridge=0.0), torch.ones(2, 1, 1))


@pytest.mark.parametrize("steps", [1, 20])
def test_a_matrix_that_is_not_positive_is_solved_too(steps):
    matrix = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0], [0.0, 1.0, 1.0]])  # eigenvalues 1 and 1 +- 2^0.5
    for ridge in (0.0, 0.01):
        exact = torch.linalg.inv(matrix.double() + ridge * identity(matrix))
        assert error(kernel_inverse(matrix, steps, ridge), exact) < 1e-4


def test_a_ridge_lost_in_rounding_does_not_raise():
    assert kernel_inverse(torch.ones(6, 6), 20, 1e-12).shape == (6, 6)


@RIDGES
@pytest.mark.parametrize("steps", [1, 20])
def test_a_matrix_has_the_same_inverse_alone_and_in_any_batch(steps, ridge):
    rng = torch.Generator().manual_seed(0)
    for size in (9, 16, 25):
        tokens = torch.randn(6, size, 8, generator=rng)
        tokens[1] *= 0.01
        tokens[2] = 0
        tokens[3, 0] = torch.nan
        tokens[4] *= 100
        batch = kernel_of(tokens)
        together = kernel_inverse(batch, steps, ridge)
        backwards = kernel_inverse(batch.flip(0), steps, ridge).flip(0)
        for i in (0, 1, 2, 4, 5):
            alone = kernel_inverse(batch[i], steps, ridge)
            bound = 1e-3 if i == 1 and not ridge else 1e-6  # the crowded one multiplies rounding by 2^20
            assert error(together[i], alone) < bound
            assert error(backwards[i], alone) < bound


@RIDGES
@pytest.mark.parametrize("steps", [1, 20])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_visible_and_in_its_matrix(value, steps, ridge):
    batch = kernel("near").float().repeat(3, 1, 1)
    batch[1, 0, 2] = value
    inverse = kernel_inverse(batch, steps, ridge)
    assert inverse[1].isnan().all()
    assert inverse[[0, 2]].isfinite().all()


@RIDGES
def test_shapes_views_and_empty_batches_pass_and_the_input_is_left_alone(ridge):
    batch = torch.stack([kernel("apart", seed).float() for seed in range(6)])
    before = batch.clone()
    expected = kernel_inverse(batch, 20, ridge)
    assert torch.equal(batch, before)
    assert torch.equal(kernel_inverse(batch.unflatten(0, (2, 3)), 20, ridge), expected.unflatten(0, (2, 3)))
    torch.testing.assert_close(kernel_inverse(batch.mT, 20, ridge), expected)
    torch.testing.assert_close(kernel_inverse(batch[::2], 20, ridge), expected[::2])
    assert kernel_inverse(batch[:0], 20, ridge).shape == (0, 16, 16)
    with torch.inference_mode():
        assert torch.equal(kernel_inverse(batch, 20, ridge), expected)


@RIDGES
@pytest.mark.parametrize("steps", [1, 20])
def test_gradients_are_those_of_converged_iterations(steps, ridge):
    matrix = torch.stack([kernel("near", seed) for seed in range(2)]).requires_grad_()
    weights = torch.randn(matrix.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (found,) = torch.autograd.grad((kernel_inverse(matrix, steps, ridge) * weights).sum(), matrix)
    converged = newton(matrix + ridge * identity(matrix), 1.8 / matrix.detach().sum(-1).max() ** 2, 40)
    (expected,) = torch.autograd.grad((converged * weights).sum(), matrix)
    assert error(found, expected) < 1e-6


@RIDGES
@pytest.mark.parametrize("steps", [1, 30])
def test_gradients_are_those_of_finite_differences(steps, ridge):
    rng = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 5, 4, generator=rng, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: kernel_inverse(kernel_of(x), steps, ridge), tokens)
    matrix = kernel_of(tokens).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: kernel_inverse((x + x.mT) / 2, steps, ridge), matrix)


def test_gradients_of_a_singular_matrix_have_the_closed_form_of_its_pseudo_inverse():
    matrix = copies(3, 5).float().requires_grad_()
    weights = torch.randn(15, 15, generator=torch.Generator().manual_seed(0))
    inverse = kernel_inverse(matrix, 20, 0.0)
    (found,) = torch.autograd.grad((inverse * weights).sum(), matrix)
    pseudo = torch.linalg.pinv(matrix.detach().double(), rtol=1e-6, hermitian=True)
    assert error(found, -pseudo @ weights.double() @ pseudo) < 1e-4


def released_start(matrices: torch.Tensor) -> torch.Tensor:
    """The start of the released normalised variant, by a loop: one number for everything given."""
    alpha = 2 / matrices.sum(-1).max() ** 2
    for _ in range(10):
        if max((identity(each) - alpha * each @ each).abs().sum(0).max() for each in matrices) <= 1.01:
            break
        alpha = alpha / 2
    return alpha


@pytest.mark.parametrize("name", sorted(SPECTRA.keys() - {"one"}))
def test_the_released_start_is_halved_until_it_converges_at_most_ten_times(name):
    matrices = torch.stack([kernel(name, seed) for seed in range(3)]).requires_grad_()
    weights = torch.randn(matrices.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found, expected = released_inverse(matrices, 20, 0.0), newton(matrices, released_start(matrices), 20)
    assert error(found, expected) < 1e-9
    gradients = [torch.autograd.grad((each * weights).sum(), matrices)[0] for each in (found, expected)]
    assert error(*gradients) < 1e-6, "through the iteration and its start"


def test_released_normalised_inverses_depend_on_the_batch_and_ours_do_not():
    matrix, neighbour = kernel("near").float(), torch.ones(49, 49)
    alone, beside = (released_inverse(batch, 20, 0.0)[0] for batch in (matrix[None], torch.stack([matrix, neighbour])))
    assert error(beside, alone) > 0.01
    alone, beside = (kernel_inverse(batch, 20, 0.0)[0] for batch in (matrix[None], torch.stack([matrix, neighbour])))
    assert error(beside, alone) < 1e-6
    alone, beside = (released_inverse(batch)[0] for batch in (matrix[None], torch.stack([matrix, neighbour])))
    assert error(beside, alone) < 1e-6, "with a ridge every matrix has its own start in the released code, too"


@RIDGES
@pytest.mark.parametrize("function", [kernel_inverse, released_inverse])
def test_they_compile_as_one_graph(function, ridge):
    matrix = torch.stack([kernel("apart", seed).float() for seed in range(2)]).requires_grad_()
    found = torch.compile(function, fullgraph=True, backend="aot_eager")(matrix, 20, ridge)
    expected = function(matrix, 20, ridge)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(each.square().sum(), matrix)[0] for each in (found, expected)]
    torch.testing.assert_close(*gradients)


@RIDGES
def test_forward_mode_follows_the_cut_off_and_torch_func_passes(ridge):
    """Of matrices far from singular, and of two with eigenvalues at and below where they are cut off."""
    for name in ("apart", "near", "plane"):
        matrices = torch.stack([kernel(name, seed) for seed in range(2)])
        change = torch.randn(matrices.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        change = (change + change.mT) / 2
        h = 1e-5
        pair = [kernel_inverse(matrices + sign * h * change, 20, ridge) for sign in (1, -1)]
        expected = (pair[0] - pair[1]) / (2 * h)

        def invert(matrices: torch.Tensor) -> torch.Tensor:
            return kernel_inverse(matrices, 20, ridge)

        _, found = torch.func.jvp(invert, (matrices,), (change,))
        assert error(found, expected) < 1e-3, name
        one_by_one = torch.vmap(lambda x, way: torch.func.jvp(invert, (x,), (way,))[1])(matrices, change)
        assert error(one_by_one, found) < 1e-6, name
        weights = torch.randn(matrices.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        leaf = matrices.clone().requires_grad_()
        (gradient,) = torch.autograd.grad((invert(leaf) * weights).sum(), leaf)
        assert (
            error(torch.func.grad(lambda x, weights=weights: (invert(x) * weights).sum())(matrices), gradient) < 1e-9
        ), name


@RIDGES
def test_second_derivatives_are_those_of_finite_differences_or_refused(ridge):
    tokens = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: kernel_inverse(kernel_of(x), 20, ridge), tokens)
    crowded = kernel("plane").requires_grad_()
    (first,) = torch.autograd.grad(kernel_inverse(crowded, 20, ridge).square().sum(), crowded, create_graph=True)
    if ridge:
        assert torch.autograd.grad(first.sum(), crowded)[0].isfinite().all()
    else:
        with pytest.raises(UnsupportedInputError, match="no second derivatives by a backward pass"):
            first.sum().backward()


@RIDGES
@pytest.mark.parametrize("function", [kernel_inverse, released_inverse])
def test_no_matrices_have_no_inverses_and_meta_tensors_shapes(function, ridge):
    for shape, device in (((0, 3, 4, 4), "cpu"), ((2, 4, 4), "meta"), ((0, 4, 4), "meta")):
        found = function(torch.ones(shape, device=device), 20, ridge)
        assert (found.shape, found.device.type) == (shape, device)


@RIDGES
@pytest.mark.parametrize("steps", [1, 20])
def test_the_operation_keeps_torchs_rules_for_custom_ones(steps, ridge):
    batch = torch.stack([kernel("near", seed).float() for seed in range(2)])
    for matrix in (batch, batch.mT, batch[0]):
        opcheck(_kernel_inverse, (matrix.clone().requires_grad_(), steps, ridge, True))
