import pytest
import torch

from training.muon import Muon
from training.network import Network, Sizes
from training.prompt import NUM_TOKENS
from training.train_lm import _entropies, _label_entropy


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return Network(Sizes(NUM_TOKENS, hidden_size=64, intermediate_size=96, num_hidden_layers=3))


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(NUM_TOKENS, (2, 9), generator=generator)
    frames = torch.randint(1024, (2, 7, 8), generator=generator)
    return text, torch.tensor([0, 3]), frames


def test_more_padding_changes_nothing(network, inputs):
    text, num_padding, frames = inputs
    hidden, taught = network.train()(text, num_padding, frames)
    wider = torch.cat([torch.zeros(2, 4, dtype=torch.int64), text], 1)
    longer = torch.cat([frames, frames[:, :2]], 1)
    other_hidden, other_taught = network(wider, num_padding + 4, longer)
    torch.testing.assert_close(other_hidden[:, :7], hidden, atol=1e-5, rtol=1e-4)
    for one, other in zip(taught, other_taught, strict=True):
        torch.testing.assert_close(other[:, :7, 4:], one, atol=1e-4, rtol=1e-4)


def test_the_last_layer_gives_the_same_as_if_it_had_read_on(network, inputs):
    text, num_padding, frames = inputs
    hidden, _ = network.eval()(text, num_padding, frames)
    early, _ = network(text, num_padding, frames[:, :4])
    torch.testing.assert_close(early, hidden[:, :4], atol=1e-5, rtol=1e-4)


def test_bfloat16_products_give_nearly_the_same(network, inputs):
    exact, _ = network.eval()(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        rough, _ = network(*inputs)
    assert rough.dtype == torch.float32
    assert (rough - exact).norm() < 0.03 * exact.norm()


def test_the_sound_costs_what_all_of_its_codes_together_lack():
    labels = torch.tensor([0, 0, 1, 2])
    logits = torch.tensor([[0.3, 1.0, -0.5, 0.1, 9.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    shares = logits[:, :4].softmax(-1)
    wanted = -(shares[0, 0] + shares[0, 1]).log()
    # The second frame is the end, 4, and not spoken.
    assert _label_entropy(logits, torch.tensor([1, 4]), labels) == pytest.approx(float(wanted))


def test_frames_without_a_target_do_not_count():
    logits = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[1, -100], [2, 3], [-100, -100]])
    found = _entropies(logits, targets)
    log_shares = logits.log_softmax(-1)
    wanted = [-(log_shares[0, 0, 1] + log_shares[1, 0, 2]) / 2, -log_shares[1, 1, 3]]
    torch.testing.assert_close(found, torch.stack(wanted))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muon_moves_every_direction_about_equally_far(dtype):
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(24, 16))
    weight.grad = torch.randn(24, 16) * torch.logspace(0, -2, 16)
    Muon([weight], lr=1.0, dtype=dtype).step()
    lengths = torch.linalg.svdvals(weight.detach()) / (24 / 16) ** 0.5
    assert 0.4 < float(lengths.min()) <= float(lengths.max()) < 1.4
