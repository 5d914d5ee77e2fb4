"""Row padding: products stay right, and a row's bits do not depend on its company."""

import pytest
import torch
import torch.nn.functional as F

from vllm.kernels import linear as kernel


@pytest.fixture(autouse=True)
def restore_quantum():
    before = kernel.row_quantum()
    yield
    kernel.set_row_quantum(before)


@pytest.mark.parametrize("rows", [1, 3, 4, 7])
def test_linear_is_the_plain_product(rows):
    x, weight = torch.randn(rows, 48), torch.randn(24, 48)
    torch.testing.assert_close(kernel.linear(x, weight), F.linear(x, weight))


def test_rows_are_padded_to_the_quantum_only():
    kernel.set_row_quantum(4)
    assert kernel.pad_rows(torch.ones(5, 2)).shape == (8, 2)
    assert not kernel.pad_rows(torch.ones(5, 2))[5:].any()
    whole = torch.ones(8, 2)
    assert kernel.pad_rows(whole) is whole
    kernel.set_row_quantum(1)
    assert kernel.pad_rows(torch.ones(1, 2)).shape == (1, 2)


def test_check_finds_a_quantum_at_which_rows_are_alone():
    weights = [torch.randn(512, 256), torch.randn(256, 1024)]
    quantum = kernel.check_row_invariance(weights)
    assert quantum == kernel.row_quantum()
    for weight in weights:
        x = torch.randn(300, weight.shape[1])
        whole = kernel.linear(x, weight)
        for rows in (1, 2, 5, 64, 130):
            assert torch.equal(kernel.linear(x[:rows], weight), whole[:rows])


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_packed_weight_gives_the_plain_product(rows):
    x, weight = torch.randn(rows, 48), torch.randn(24, 48)
    packed = kernel.pack_weight(weight)
    assert packed.shape == weight.shape
    torch.testing.assert_close(kernel.linear(x, packed), F.linear(x, weight))


def test_only_float32_is_packed():
    weight = torch.randn(24, 48, dtype=torch.bfloat16)
    assert kernel.pack_weight(weight) is weight


@pytest.mark.parametrize("shape", [(512, 256), (256, 1024), (512, 3072)])
def test_packed_weights_treat_rows_alone(shape):
    packed = kernel.pack_weight(torch.randn(shape))
    kernel.check_row_invariance([packed])
    x = torch.randn(300, shape[1])
    whole = kernel.linear(x, packed)
    for rows in (1, 2, 5, 64, 130):
        assert torch.equal(kernel.linear(x[7 : 7 + rows], packed), whole[7 : 7 + rows])


def test_check_raises_the_quantum_where_a_small_one_differs(monkeypatch):
    def depends_on_rows(x, weight):
        return x @ weight.T + (x.shape[0] % 16)

    monkeypatch.setattr(kernel.F, "linear", depends_on_rows)
    plain = torch.zeros(8, 8)
    assert kernel.check_row_invariance([plain]) == 16
