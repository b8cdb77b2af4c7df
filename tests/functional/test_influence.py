"""The terms of the learning dynamics against hand-worked numbers, autograd's Jacobians and real steps of a toy."""

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import jacobian

from cpt_lightning.functional import kernel_bound, log_prob_change, residual_squared


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_hand_worked_norms():
    """Logits 0 and log 3 are probabilities 1/4 and 3/4, ||pi||^2 = 10/16. A = [[3/4, -3/4], [-1/4, 1/4]] has
    ||A||^2 = 20/16 = 2 - 2 + 2 * 10/16. y - pi = (3/4, -3/4) for the first token, of squared norm 18/16, and a quarter
    of that at temperature 2 if the logits are twice as large. An update to logits 0 and 0 takes the first token from
    log 1/4 to log 1/2, and the second from log 3/4 to log 1/2."""
    hidden, weight, y = double(1.0)[:, None], double(1.0, 3.0)[:, None].log(), torch.tensor([0])
    torch.testing.assert_close(residual_squared(hidden, weight, y), double(18 / 16))
    torch.testing.assert_close(residual_squared(2 * hidden, weight, y, 2.0), double(18 / 64))
    found = log_prob_change(hidden, weight, 0 * hidden, weight, y)
    gain, loss = double(2.0).log(), double(2 / 3).log()
    torch.testing.assert_close(found.of_token, gain)
    torch.testing.assert_close(found.squared, gain**2 + loss**2)
    torch.testing.assert_close(found.jacobian_squared, double(20 / 16))
    torch.testing.assert_close(kernel_bound(found.squared, found.jacobian_squared, 18 / 16), found.squared * 256 / 360)


class Toy(nn.Module):
    """Two layers from 3 inputs over 4 hidden units to a vocabulary of 5, in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 4, bias=False, dtype=torch.float64)
        self.outer = nn.Linear(4, 5, bias=False, dtype=torch.float64)

    def hidden(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(x))

    def logits(self, x: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
        inner, outer = weights
        return torch.tanh(x @ inner.T) @ outer.T


@pytest.fixture
def toy() -> Toy:
    torch.manual_seed(3)
    return Toy()


def texts() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_u of 3 positions and x_v of 2, with their tokens."""
    generator = torch.Generator().manual_seed(4)
    x_u, x_v = (torch.randn(size, 3, dtype=torch.float64, generator=generator) for size in (3, 2))
    return x_u, torch.tensor([0, 3, 3]), x_v, torch.tensor([1, 4])


def loss_of(logits: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits, y)


def dynamics(toy: Toy) -> tuple[Tensor, Tensor, Tensor]:
    """A(x_v) ``[2, 5, 5]``, K ``[10, 15]`` and G ``[3, 5]``, each by autograd as it is defined."""
    x_u, y_u, x_v, _ = texts()
    weights = tuple(weight.detach() for weight in toy.parameters())

    def kernel_factor(x: Tensor) -> Tensor:
        parts = jacobian(lambda *w: toy.logits(x, w).flatten(), weights)
        return torch.cat([part.flatten(1) for part in parts], dim=1)

    a = torch.stack([jacobian(lambda z: z.log_softmax(dim=0), z) for z in toy.logits(x_v, weights)])
    g = jacobian(lambda z: loss_of(z, y_u), toy.logits(x_u, weights))
    return a, kernel_factor(x_v) @ kernel_factor(x_u).T, g


def step(toy: Toy, eta: float) -> tuple[Tensor, Tensor]:
    """Hidden states of x_v and the output matrix after one gradient step on x_u."""
    x_u, y_u, x_v, _ = texts()
    stepped = Toy()
    stepped.load_state_dict(toy.state_dict())
    loss_of(stepped.outer(stepped.hidden(x_u)), y_u).backward()
    torch.optim.SGD(stepped.parameters(), lr=eta).step()
    return stepped.hidden(x_v).detach(), stepped.outer.weight.detach()


@torch.no_grad()
def test_norms_are_those_of_autograds_jacobians(toy):
    x_u, y_u, x_v, y_v = texts()
    a, _, g = dynamics(toy)
    found = log_prob_change(toy.hidden(x_v), toy.outer.weight, toy.hidden(x_v), toy.outer.weight, y_v)
    torch.testing.assert_close(found.jacobian_squared, a.square().sum(dim=(1, 2)))
    # The loss is a mean over 3 positions: 1/3 is its derivative by each log-probability.
    residual = residual_squared(toy.hidden(x_u), toy.outer.weight, y_u, chunk_logits=10)
    torch.testing.assert_close(residual / 9, g.square().sum(dim=1))


def test_a_real_step_changes_what_the_formula_says_up_to_its_second_order(toy):
    """-eta A K G for every token of x_v; the relative error of a step of a tenth is a tenth."""
    _, _, x_v, y_v = texts()
    a, k, g = dynamics(toy)
    predicted = -torch.einsum("mij,mj->mi", a, (k @ g.flatten()).view(2, 5))
    errors = []
    for eta in (1e-2, 1e-3):
        new_hidden, new_weight = step(toy, eta)
        old = (toy.hidden(x_v) @ toy.outer.weight.T).log_softmax(dim=1)
        real = (new_hidden @ new_weight.T).log_softmax(dim=1) - old
        errors.append(((real - eta * predicted).norm() / (eta * predicted).norm()).item())
        found = log_prob_change(toy.hidden(x_v), toy.outer.weight, new_hidden, new_weight, y_v, chunk_logits=5)
        torch.testing.assert_close(found.of_token, real.gather(1, y_v[:, None])[:, 0])
        torch.testing.assert_close(found.squared, real.square().sum(dim=1))
    assert errors[1] < 1e-3
    assert errors[1] == pytest.approx(errors[0] / 10, rel=0.1)


def test_the_bound_lies_below_the_kernel(toy):
    """eta^2 ||K||^2, and not far: a bound that is 0 would lie below it too."""
    _, _, x_v, y_v = texts()
    _, k, g = dynamics(toy)
    eta = 1e-3
    found = log_prob_change(toy.hidden(x_v), toy.outer.weight, *step(toy, eta), y_v)
    bound = kernel_bound(found.squared.sum(), found.jacobian_squared.sum(), g.square().sum().item())
    assert 1e-3 < bound / (eta**2 * k.square().sum()) < 1
