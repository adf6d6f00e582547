"""The random numbers of trainings: numpy's Philox words, also by torch's integers, and what is made of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nestgen import philox
from nestgen.randomness import key_of

UNIFORM = [[0.2711285360206923, 0.5299757020305731], [0.07880835077585091, 0.7492664388394352]]
PERMUTATION = [0, 3, 2, 6, 5, 4, 7, 1]
NORMAL = [0.7778251767158508, 0.8782284259796143, 1.0128099918365479]


@pytest.mark.parametrize("first", [0, 2**32 - 3, 2**40 + 12345, 2**62])
def test_integer_operations_give_numpys_words(first: int) -> None:
    """As on a GPU, with counters and keys of all 64 bits."""
    for seed in range(5):
        key = key_of(seed, "words")
        halves = torch.tensor([philox._signed(key & 2**64 - 1), philox._signed(key >> 64)])
        found = philox.philox(torch.arange(7) + (first + 1), halves)
        wanted = np.random.Philox(key=key, counter=first).random_raw(28)
        assert np.array_equal(found.numpy().view(np.uint64).ravel(), wanted)


def test_a_row_depends_on_its_number_only() -> None:
    whole = philox.normal(3, "noise", range(20, 60), (5, 3, 3))
    assert torch.equal(whole[7:20], philox.normal(3, "noise", range(27, 40), (5, 3, 3)))
    assert torch.equal(philox.uniform(3, "u", range(9), 7)[4:], philox.uniform(3, "u", range(4, 9), 7))
    for other in (
        philox.normal(4, "noise", range(20, 60), (5, 3, 3)),
        philox.normal(3, "no", range(20, 60), (5, 3, 3)),
    ):
        assert abs(torch.corrcoef(torch.stack([whole.flatten(), other.flatten()]))[0, 1]) < 0.1


def test_normal_numbers_are_normal() -> None:
    x = philox.normal(0, "normal", range(2000), (16, 16, 1)).double()
    assert x.mean() == pytest.approx(0, abs=0.005)
    assert x.square().mean() == pytest.approx(1, abs=0.01)
    assert x.pow(4).mean() == pytest.approx(3, abs=0.05)
    below = [(x < bound).double().mean().item() for bound in (-3, -2, -1, 0, 1, 2, 3)]
    assert below == pytest.approx([0.00135, 0.02275, 0.15866, 0.5, 0.84134, 0.97725, 0.99865], abs=0.002)
    assert 4.5 < x.abs().max() < 6.7
    # neither the two numbers of a pair nor neighbours know of each other, nor do their squares
    first, second = x.flatten(1)[:, :128], x.flatten(1)[:, 128:]
    for a, b in ((first, second), (first[:, 1:], first[:, :-1])):
        for power in (1, 2):
            assert abs(torch.corrcoef(torch.stack([a.flatten() ** power, b.flatten() ** power]))[0, 1]) < 0.01


def test_torch_makes_of_the_words_what_numpy_makes() -> None:
    """But for rounding: as a GPU does, whose logarithms and cosines are its own."""
    pairs = 24
    bits = philox.words(1, "noise", range(3, 9), -(-6 * pairs // 32)).view(torch.int32)
    out = torch.empty(6, 2 * pairs)
    radii, angles = (bits[:, :pairs] & 0x7FFFFFFF).float(), bits.view(torch.int16)[:, 2 * pairs : 3 * pairs].float()
    philox._box_muller(radii, angles, out, torch)
    torch.testing.assert_close(out, philox.normal(1, "noise", range(3, 9), (4, 4, 3)).flatten(1), rtol=1e-5, atol=1e-6)


def test_numbers_are_the_same_in_every_version_of_numpy() -> None:
    """A training is a function of its seed: these decide it."""
    u = philox.uniform(0, "pinned", range(2), 2)
    assert ((u * 2**53) == (u * 2**53).round()).all()
    assert u.tolist() == UNIFORM
    assert philox.permutation(0, "pinned", 1, 8).tolist() == PERMUTATION
    assert sorted(philox.permutation(0, "pinned", 2, 1001)) == list(range(1001))
    normal = philox.normal(0, "pinned", range(1), (1, 1, 3))
    torch.testing.assert_close(normal.flatten(), torch.tensor(NORMAL), rtol=1e-6, atol=0)
