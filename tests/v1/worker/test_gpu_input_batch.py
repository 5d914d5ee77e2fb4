"""Row bookkeeping by random operations against a rebuild from scratch."""

import dataclasses
import random

import pytest
import torch

from vllm.sampling_params import SamplingParams
from vllm.v1.worker.gpu_input_batch import InputBatch


def flatten(value):
    if dataclasses.is_dataclass(value):
        return {
            f.name: flatten(getattr(value, f.name))
            for f in dataclasses.fields(value)
            if f.name != "rows"
        }
    return value.tolist() if isinstance(value, torch.Tensor) else value


def random_params(rng):
    return SamplingParams(
        temperature=rng.choice([0.0, 0.7, 1.0]),
        top_k=rng.choice([-1, 5, 50]),
        top_p=rng.choice([0.9, 1.0]),
        ras_window_length=rng.choice([0, 7, 20]),
        ras_max_num_repeat=rng.choice([0, 2]),
        ras_mode=rng.choice(["redraw", "block"]),
    )


@pytest.mark.parametrize("trial", range(3))
def test_random_operations_equal_a_rebuild(trial):
    rng = random.Random(trial)
    batch, alive = InputBatch(6, 1026, "cpu"), {}
    for number in range(200):
        if alive and (len(alive) == 6 or rng.random() < 0.4):
            req_id = rng.choice(sorted(alive))
            row = batch.rows[req_id]
            assert batch.remove_request(req_id) == row
            del alive[req_id]
        else:
            request = random_params(rng), rng.getrandbits(64)
            alive[str(number)] = request
            batch.add_request(str(number), *request)
        batch.check_integrity()
        assert len(batch.rows) == len(alive)
        scheduled = rng.sample(sorted(alive), rng.randint(0, len(alive)))
        if not scheduled:
            continue
        rebuilt = InputBatch(6, 1026, "cpu")
        rows = [rebuilt.add_request(req_id, *alive[req_id]) for req_id in scheduled]
        kept = batch.sampling_metadata([batch.rows[req_id] for req_id in scheduled])
        assert kept.rows.tolist() == [batch.rows[req_id] for req_id in scheduled]
        assert flatten(kept) == flatten(rebuilt.sampling_metadata(rows))


def test_metadata_is_kept_while_rows_and_owners_stay():
    batch = InputBatch(3, 1026, "cpu")
    batch.add_request("a", SamplingParams(), 1)
    batch.add_request("b", SamplingParams(), 2)
    first = batch.sampling_metadata([0, 1])
    assert batch.sampling_metadata([0, 1]) is first
    assert batch.sampling_metadata([1]) is not first
    first = batch.sampling_metadata([0, 1])
    batch.remove_request("b")
    batch.add_request("c", SamplingParams(), 3)
    assert batch.sampling_metadata([0, 1]).seed.tolist() == [1, 3]


def test_what_no_row_needs_is_absent():
    batch = InputBatch(2, 1026, "cpu")
    plain = SamplingParams(top_k=-1, top_p=1.0, ras_window_length=0)
    batch.add_request("a", plain, 2**64 - 1)
    metadata = batch.sampling_metadata([0])
    assert metadata.filters is metadata.ras_redraw is metadata.ras_block is None
    assert metadata.temperature.divisor is metadata.temperature.is_greedy is None
    assert metadata.history_width == 0
    assert metadata.seed.tolist() == [-1]


@pytest.mark.parametrize(("window", "repeats"), [(0, 2), (7, 0)])
def test_zero_in_either_ras_value_switches_it_off(window, repeats):
    batch = InputBatch(2, 1026, "cpu")
    params = SamplingParams(ras_window_length=window, ras_max_num_repeat=repeats)
    batch.add_request("a", params, 1)
    assert batch.sampling_metadata([0]).ras_redraw is None


def test_rows_run_out_loudly():
    batch = InputBatch(1, 1026, "cpu")
    batch.add_request("a", SamplingParams(), 1)
    with pytest.raises(AssertionError, match="no free row"):
        batch.add_request("b", SamplingParams(), 1)
