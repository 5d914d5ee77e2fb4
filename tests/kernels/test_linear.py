"""Row padding: products stay right, and a row's bits do not depend on its company."""

import pytest
import torch
import torch.nn.functional as F

from vllm.kernels import linear as kernel


@pytest.mark.parametrize("rows", [1, 3, 4, 7])
def test_linear_is_the_plain_product(rows):
    x, weight = torch.randn(rows, 48), torch.randn(24, 48)
    torch.testing.assert_close(kernel.linear(x, weight), F.linear(x, weight))


def test_rows_are_padded_to_the_quantum_only():
    assert kernel.pad_rows(torch.ones(5, 2), 4).shape == (8, 2)
    assert not kernel.pad_rows(torch.ones(5, 2), 4)[5:].any()
    whole = torch.ones(8, 2)
    assert kernel.pad_rows(whole, 4) is whole
    assert kernel.pad_rows(torch.ones(1, 2), 1).shape == (1, 2)


def cancelling(rows, columns):
    """Rows [rows, columns] that add up to nothing: products with ones are rounding errors alone."""
    half = torch.randn(rows, columns // 2)
    return torch.cat([half, -half[:, torch.randperm(columns // 2)]], 1)


def treats_rows_alone(weight, quantum):
    x = torch.ones(300, weight.shape[1], dtype=weight.dtype)
    whole = kernel.linear(x, weight, quantum)
    return all(
        torch.equal(
            kernel.linear(x[start : start + rows], weight, quantum), whole[start : start + rows]
        )
        for rows in (*range(1, 65), 130)
        for start in (0, 7)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(512, 256), (384, 2560), (512, 3072)])
@pytest.mark.parametrize("is_input_major", [True, False])
def test_at_the_quantum_found_rows_are_alone(shape, dtype, is_input_major):
    weight = cancelling(*shape).to(dtype)
    if is_input_major:
        weight = weight.t().contiguous().t()
    for form in (weight, kernel.pack_weight(weight)):
        assert treats_rows_alone(form, kernel.find_row_quantum([form]))


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_packed_weight_gives_the_plain_product(rows):
    x, weight = torch.randn(rows, 48), torch.randn(24, 48)
    packed = kernel.pack_weight(weight)
    assert packed.shape == weight.shape
    torch.testing.assert_close(kernel.linear(x, packed), F.linear(x, weight))


def test_only_float32_is_packed():
    weight = torch.randn(24, 48, dtype=torch.bfloat16)
    assert kernel.pack_weight(weight) is weight


def test_quantum_is_raised_where_a_small_one_differs(monkeypatch):
    def depends_on_rows(x, weight):
        return torch.full((x.shape[0], weight.shape[0]), float(x.shape[0] % 16))

    monkeypatch.setattr(kernel.F, "linear", depends_on_rows)
    assert kernel.find_row_quantum([torch.zeros(8, 8)]) == 16


def test_full_shapes_are_tried_where_slices_agree(monkeypatch):
    """As matrix-vector products do, which libraries take for one row of a wide matrix."""

    def one_row_differs_when_wide(x, weight):
        differs = x.shape[0] == 1 and weight.shape[0] > 256
        return torch.full((x.shape[0], weight.shape[0]), float(differs))

    monkeypatch.setattr(kernel.F, "linear", one_row_differs_when_wide)
    assert kernel.find_row_quantum([torch.zeros(200, 8)]) == 1
    assert kernel.find_row_quantum([torch.zeros(200, 8), torch.zeros(512, 8)]) == 2


def test_without_a_quantum_that_suffices_the_largest_is_taken(monkeypatch):
    def depends_on_rows(x, weight):
        return torch.full((x.shape[0], weight.shape[0]), float(x.shape[0]))

    monkeypatch.setattr(kernel.F, "linear", depends_on_rows)
    assert kernel.find_row_quantum([torch.zeros(8, 8)]) == 64
