"""Attention over a pack and its row order, against a naive loop over samples and heads, values and gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
from higgs_tune.train.model import attention
from higgs_tune.train.model.attention import (
    BLOCK,
    causal_attention,
    plain_attention,
    plain_rope_and_reorder,
    rope_and_reorder,
)

LENGTHS = [[1], [BLOCK - 1, BLOCK, BLOCK + 1], [1, 2 * BLOCK + 5, 7], [300]]


def naive(q_NhD: torch.Tensor, k_NhD: torch.Tensor, v_NhD: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """By definition, in float64: each query row over the rows up to it of its own sample."""
    q, k, v = (x.double() for x in (q_NhD, k_NhD, v_NhD))
    rows, shared = [], q.shape[1] // k.shape[1]
    for begin, end in itertools.pairwise([0, *itertools.accumulate(lengths)]):
        for row in range(begin, end):
            keys, values = k[begin : row + 1], v[begin : row + 1]
            heads = [
                torch.softmax(keys[:, head // shared] @ q[row, head] / q.shape[2] ** 0.5, 0) @ values[:, head // shared]
                for head in range(q.shape[1])
            ]
            rows.append(torch.stack(heads))
    return torch.stack(rows)


def assert_same(got: torch.Tensor, expected: torch.Tensor, given: list[torch.Tensor]) -> None:
    """Values and the gradients of a random weighting of them."""
    torch.testing.assert_close(got, expected.float(), atol=2e-6, rtol=1e-5)
    weighting = torch.randn(got.shape)
    for one, other in zip(
        torch.autograd.grad((got * weighting).sum(), given),
        torch.autograd.grad((expected * weighting).sum(), given, retain_graph=True),
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.fast
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("kernel", ["blocked", "blocked, plain softmax", "plain"])
def test_attention_is_causal_within_a_sample(
    lengths: list[int], groups: int, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lengths around the block's, one to four query heads for a key head, inputs that are views of wider rows."""
    monkeypatch.setattr(attention, "_has_softmax_backward", lambda: kernel == "blocked")
    attend = plain_attention if kernel == "plain" else causal_attention
    torch.manual_seed(0)
    wide = torch.randn(sum(lengths), 4 + 2 * groups, 16)
    q, k, v = (x.requires_grad_() for x in wide.split([4, groups, groups], 1))
    cu_lengths = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    assert_same(attend(q, k, v, lengths, cu_lengths), naive(q, k, v, lengths), [q, k, v])


def test_no_samples_are_no_rows() -> None:
    empty = torch.zeros(0, 4, 16)
    assert causal_attention(empty, empty, empty, [], torch.zeros(1, dtype=torch.int32)).shape == (0, 4, 16)


def rotated(x_NhD: torch.Tensor, cos_ND: torch.Tensor, sin_ND: torch.Tensor) -> torch.Tensor:
    first, second = x_NhD.chunk(2, -1)
    return x_NhD * cos_ND[:, None] + torch.cat([-second, first], -1) * sin_ND[:, None]


@pytest.mark.fast
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("turned", [False, True])
def test_rows_are_turned_and_put_in_order(ordered: bool, turned: bool) -> None:
    """Against Llama's formula and an index."""
    torch.manual_seed(0)
    x_NhD = torch.randn(20, 3, 8, requires_grad=True)
    angles_ND = torch.rand(20, 4).repeat(1, 2)
    to_sequence = torch.randperm(20) if ordered else None
    to_sorted = None if to_sequence is None else torch.argsort(to_sequence)
    angles = (angles_ND.cos(), angles_ND.sin()) if turned else ()
    expected = rotated(x_NhD, *angles) if turned else x_NhD * 1
    for rope in (rope_and_reorder, plain_rope_and_reorder):
        assert_same(
            rope(x_NhD, to_sequence, to_sorted, *angles),
            expected if to_sequence is None else expected[to_sequence],
            [x_NhD],
        )
