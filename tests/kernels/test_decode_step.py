"""The native decode step against the model's forward pass and the torch sampler."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vllm.checkpoint_config import HiggsAudioConfig
from vllm.forward_context import set_forward_context
from vllm.kernels import native
from vllm.kernels.attention import DecodeMetadata
from vllm.kernels.cache import allocate_kv_caches
from vllm.kernels.decode_step import DecoderRows, DecodeStep, can_decode
from vllm.kernels.quantize import WeightFormat
from vllm.model_executor.framing import DelayPattern
from vllm.model_executor.heads import CodebookState
from vllm.model_executor.models.higgs_audio import HiggsAudioModel
from vllm.sampling_params import SamplingParams
from vllm.v1.sample import RowSettings, Sampler, SamplingMetadata

pytestmark = pytest.mark.skipif(
    native.loaded_library() is None, reason="the native library is not built"
)

CPU = torch.device("cpu")
BLOCK_SIZE, MAX_LEN, NUM_ROWS = 16, 200, 5
BLOCKS_PER_ROW = -(-MAX_LEN // BLOCK_SIZE)
CODEBOOK_SIZE = 34


@pytest.fixture(scope="module", params=native.supported_isas(), autouse=True)
def isa(request):
    before = native.isa()
    native.select_isa(request.param)
    yield
    native.select_isa(before)


@pytest.fixture(scope="module")
def model(isa):
    return make_model()


@pytest.fixture(scope="module")
def torch_model():
    """The same weights; to be called where the library is switched off."""
    with native.disabled():
        return make_model()


def make_model(quantization=None, dtype=torch.float32):
    torch.manual_seed(0)
    config = HiggsAudioConfig(
        architecture="HiggsAudioV2ForConditionalGeneration",
        layout="transformers",
        vocab_size=40,
        hidden_size=96,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        num_codebooks=4,
        codebook_size=CODEBOOK_SIZE,
        stream_bos_id=32,
        stream_eos_id=33,
        audio_token_id=30,
        audio_out_bos_token_id=31,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        rope_scaling=None,
        **dict.fromkeys(
            (
                *("dtype", "audio_in_token_id", "audio_delay_token_id", "audio_eos_token_id"),
                *("bos_token_id", "eos_token_id", "pad_token_id"),
            )
        ),
    )
    model = HiggsAudioModel(config, dtype=dtype, max_model_len=MAX_LEN)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2 if parameter.dim() > 1 else 1.0)
    model.pack(quantization)
    return model


class Engine:
    """Rows in the middle of their utterances: positions, pages, streams and settings."""

    def __init__(self, model, params, *, lengths, kv_dtype=torch.float32):
        config = model.config
        self.model = model
        self.pattern = DelayPattern(config.num_codebooks, 32, 33)
        self.state = CodebookState(self.pattern, NUM_ROWS)
        self.settings = RowSettings(NUM_ROWS)
        self.positions = np.array(lengths, np.int64)
        num_blocks = NUM_ROWS * BLOCKS_PER_ROW + 1
        self.caches = allocate_kv_caches(
            config.num_hidden_layers,
            num_blocks,
            BLOCK_SIZE,
            config.num_key_value_heads,
            config.head_dim,
            dtype=kv_dtype,
        )
        generator = torch.Generator().manual_seed(1)
        order = torch.randperm(num_blocks, generator=generator)[:-1]
        self.tables = order.view(NUM_ROWS, BLOCKS_PER_ROW).contiguous()
        for cache in self.caches:
            cache.copy_(torch.randn(cache.shape, generator=generator))
        for row, each in enumerate(params):
            self.settings.set_row(row, each, seed=row)
            self.state.add_row(row, eos_rule=each.eos_rule, frame_limit=90)
            self.state.start(torch.tensor([row]))

    def native_step(self):
        rows = DecoderRows(
            kv_caches=self.caches,
            block_tables=self.tables.numpy(),
            positions=self.positions,
            streams=self.state.memory,
            sampling=self.settings.memory,
        )
        return DecodeStep(self.model.decoder_weights(), rows)

    @torch.inference_mode()
    @native.disabled()
    def torch_step(self, rows):
        index = torch.from_numpy(rows)
        lens = (self.positions[rows] + 1).tolist()
        metadata = DecodeMetadata.build(self.tables[index], lens, BLOCK_SIZE)
        hidden = self.model.embed_codes(self.state.last_frame[index])
        with set_forward_context(metadata, self.caches):
            hidden = self.model.forward(hidden, metadata.context_lens - 1, 0)
        sampling = SamplingMetadata.of_rows(rows, self.settings, CODEBOOK_SIZE, CPU)
        width = sampling.history_width
        frames = Sampler(self.pattern)(
            self.model.audio_logits(hidden),
            sampling,
            self.state.next_frame(index),
            self.state.recent(index, width) if width else None,
        )
        return frames.numpy(), self.state.advance(index, frames).numpy()


PARAMS = [
    SamplingParams(temperature=0.0, ras_window_length=0),
    SamplingParams(),
    SamplingParams(top_p=0.7, top_k=-1, ras_mode="block"),
    SamplingParams(temperature=0.5, eos_rule="reference"),
    SamplingParams(temperature=0.0),
]
LENGTHS = [3, 15, 16, 63, 100]


def test_steps_equal_those_of_torch(model, torch_model):
    ours = Engine(model, PARAMS, lengths=LENGTHS)
    theirs = Engine(torch_model, PARAMS, lengths=LENGTHS)
    step = ours.native_step()
    rows = np.arange(NUM_ROWS)
    for _ in range(60):
        our_frames, our_status = step(rows)
        their_frames, their_status = theirs.torch_step(rows)
        assert (our_frames == their_frames).all()
        assert (our_status == their_status).all()
        for our_cache, their_cache in zip(ours.caches, theirs.caches, strict=True):
            torch.testing.assert_close(our_cache, their_cache, atol=1e-4, rtol=1e-4)
        ours.positions[rows] += 1
        theirs.positions[rows] += 1
        rows = rows[our_status == 0][::-1].copy()
        if len(rows) == 0:
            break
    assert torch.equal(ours.state.memory.counters, theirs.state.memory.counters)
    assert torch.equal(ours.state.memory.history, theirs.state.memory.history)


@pytest.mark.parametrize(
    ("weights", "kv_dtype"),
    [
        ({"dtype": torch.bfloat16}, torch.bfloat16),
        ({"dtype": torch.bfloat16}, torch.float32),
        ({"quantization": WeightFormat.INT8}, torch.bfloat16),
        ({}, torch.bfloat16),
    ],
)
def test_rounded_steps_follow_those_of_torch(weights, kv_dtype):
    """A sum that ends elsewhere in its last bit may be rounded to a neighbour, so each step starts
    where the native one before it ended."""
    model = make_model(**weights)
    with native.disabled():
        torch_model = make_model(**weights)
    ours = Engine(model, PARAMS, lengths=LENGTHS, kv_dtype=kv_dtype)
    theirs = Engine(torch_model, PARAMS, lengths=LENGTHS, kv_dtype=kv_dtype)
    step, rows = ours.native_step(), np.arange(NUM_ROWS)
    num_equal = 0
    for _ in range(30):
        our_frames, _ = step(rows)
        their_frames, _ = theirs.torch_step(rows)
        num_equal += (our_frames == their_frames).sum()
        for our_cache, their_cache in zip(ours.caches, theirs.caches, strict=True):
            error = (our_cache.float() - their_cache.float()).abs().amax()
            assert error < 0.02 * our_cache.float().abs().amax()
            their_cache.copy_(our_cache)
        for name in ("last_frame", "counters", "history"):
            getattr(theirs.state.memory, name).copy_(getattr(ours.state.memory, name))
        ours.positions += 1
        theirs.positions += 1
    assert num_equal > 0.97 * 30 * NUM_ROWS * 4


@pytest.mark.parametrize(
    ("num_threads", "weights", "kv_dtype"),
    [
        (1, {}, torch.float32),
        (2, {}, torch.float32),
        (3, {}, torch.bfloat16),
        (2, {"dtype": torch.bfloat16}, torch.bfloat16),
        (2, {"quantization": WeightFormat.INT8}, torch.float32),
        (3, {"quantization": WeightFormat.INT8}, torch.bfloat16),
        (1, {"quantization": WeightFormat.INT4}, torch.float32),
    ],
)
def test_a_row_is_alone_in_its_bits(num_threads, weights, kv_dtype):
    """Codes, keys and values of a row are those of its run alone, whoever is beside it."""
    model = make_model(**weights)
    alone = Engine(model, PARAMS, lengths=LENGTHS, kv_dtype=kv_dtype)
    step = alone.native_step()
    for row in range(NUM_ROWS):
        for _ in range(12):
            step(np.array([row]))
            alone.positions[row] += 1
    together = Engine(model, PARAMS, lengths=LENGTHS, kv_dtype=kv_dtype)
    step = together.native_step()
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        for _ in range(12):
            step(np.arange(NUM_ROWS))
            together.positions += 1
    finally:
        torch.set_num_threads(before)
    assert torch.equal(alone.state.memory.history, together.state.memory.history)
    for one, other in zip(alone.caches, together.caches, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.bfloat16])
def test_pages_that_no_row_may_see_are_not_read(model, kv_dtype):
    engine = Engine(model, PARAMS, lengths=LENGTHS, kv_dtype=kv_dtype)
    for cache in engine.caches:
        kept = cache.clone()
        cache.fill_(float("nan"))
        for row, length in enumerate(LENGTHS):
            for position in range(length):
                block = engine.tables[row, position // BLOCK_SIZE]
                offset = position % BLOCK_SIZE
                cache[:, block, :, offset] = kept[:, block, :, offset]
    clean = Engine(model, PARAMS, lengths=LENGTHS, kv_dtype=kv_dtype)
    ours, theirs = engine.native_step(), clean.native_step()
    for _ in range(10):
        frames, _ = ours(np.arange(NUM_ROWS))
        expected, _ = theirs(np.arange(NUM_ROWS))
        assert (frames == expected).all()
        engine.positions += 1
        clean.positions += 1


def test_what_is_not_served():
    fitting = {
        "activation_dtype": torch.float32,
        "kv_dtype": torch.float32,
        "head_dim": 32,
        "codebook_size": 1026,
    }
    assert can_decode(CPU, **fitting)
    assert can_decode(CPU, **fitting | {"kv_dtype": torch.bfloat16})
    assert not can_decode(torch.device("cuda"), **fitting)
    for unfitting in (
        {"activation_dtype": torch.bfloat16},
        {"kv_dtype": torch.float16},
        {"head_dim": 24},
        {"codebook_size": 4097},
    ):
        assert not can_decode(CPU, **fitting | unfitting)
    with native.disabled():
        assert not can_decode(CPU, **fitting)
