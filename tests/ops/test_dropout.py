"""The random bytes of dropout: known answers, the same on every instruction set, and what is made of them."""

from __future__ import annotations

import pytest
import torch
from implementations import Implementation

from bert_fast import _C
from bert_fast.ops import _dropout

#: Philox4x32-7 in the test vectors of Random123 (Salmon et al., 2011): counter and key, all zeros and all ones.
KNOWN_ANSWERS = {
    0: (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48),
    -1: (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662),
}


@pytest.mark.parametrize(("seed", "words"), KNOWN_ANSWERS.items())
def test_known_answers(seed: int, words: tuple[int, ...]) -> None:
    counter = torch.tensor(seed & 0xFFFFFFFF)
    assert tuple(map(int, _dropout.philox(torch.tensor(seed), *[counter] * 4))) == words


@pytest.mark.parametrize("seed", [0, -1, 2**62 + 12345])
@pytest.mark.parametrize("columns", [0, 1, 40, 300], ids=str)
def test_cpp_has_the_bytes_of_the_definition(implementation: Implementation, seed: int, columns: int) -> None:
    if implementation.name != "cpp":
        pytest.skip("Triton's are compared in test_dropout_triton")
    first = 2**33 + 5
    rows = torch.arange(first, first + 3)
    expected = _dropout.random_bytes(torch.tensor(seed), rows, columns, plane=7)
    assert torch.equal(_C.dropout_bytes(seed, first, 3, columns, 7).long(), expected)


@pytest.mark.parametrize(("p", "threshold"), [(0.0, 0), (1e-9, 1), (0.1, 26), (0.5, 128), (1 - 1e-9, 255), (1.0, 256)])
def test_threshold(p: float, threshold: int) -> None:
    assert _dropout.threshold(p) == threshold


def test_dropout_drops_its_share_and_keeps_the_expectation() -> None:
    x = torch.ones(4000, 100)
    out = _dropout.dropout(x, 0.1, torch.tensor(5))
    share = 26 / 256
    deviation = (share * (1 - share) / x.numel()) ** 0.5  # of the share, for independent elements
    assert abs((out == 0).double().mean() - share) < 5 * deviation
    assert out.unique().tolist() == pytest.approx([0, 256 / 230])


def test_neighbours_rows_and_planes_are_independent() -> None:
    rows = torch.arange(512)
    first, other_seed, other_plane = (
        _dropout.random_bytes(torch.tensor(seed), rows, 256, plane).double() for seed, plane in ((1, 0), (2, 0), (1, 1))
    )
    pairs = ((first, other_seed), (first, other_plane), (first[:, 1:], first[:, :-1]), (first[1:], first[:-1]))
    for a, b in pairs:
        correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
        assert abs(correlation) < 5 / a.numel() ** 0.5


def test_nothing_without_dropout_and_all_with_one() -> None:
    x = torch.randn(3, 20)
    assert _dropout.dropout(x, 0.0, None) is x
    assert _dropout.dropout(x, 1.0, torch.tensor(1)).count_nonzero() == 0


def test_a_dropped_nan_is_zero() -> None:
    assert _dropout.dropout(torch.full((1, 4), torch.nan), 1.0, torch.tensor(1)).count_nonzero() == 0


def test_no_seed_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dropout_p is 0\.1 without a seed"):
        _dropout.dropout(torch.ones(2), 0.1, None)


def test_seeds_follow_the_generator() -> None:
    torch.manual_seed(7)
    first = _dropout.draw_seeds(4)
    torch.manual_seed(7)
    assert torch.equal(first, _dropout.draw_seeds(4))
    assert len(set(first.tolist())) == 4
