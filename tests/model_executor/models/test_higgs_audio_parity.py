"""The decoder against transformers' own class, and its bits against changes of company."""

from itertools import pairwise

import pytest
import torch

from vllm.forward_context import set_forward_context
from vllm.kernels import attention, native
from vllm.kernels import linear as linear_kernel
from vllm.kernels.attention import DecodeMetadata, PrefillMetadata, PrefillSequence
from vllm.kernels.cache import allocate_kv_caches, clear_blocks
from vllm.model_executor.models import load_model

BLOCK = 16
MAX_BLOCKS = 12
NUM_BLOCKS = 70 * MAX_BLOCKS


class Sequence:
    """A mixed prompt: text, reference audio, text, then frames to decode."""

    def __init__(self, spec, seed, num_text=9, num_audio=14, num_tail=12, num_frames=6):
        generator = torch.Generator().manual_seed(seed)
        kinds = [False] * num_text + [True] * num_audio + [False] * num_tail
        self.is_audio = torch.tensor(kinds)
        self.ids = torch.randint(4, 250, (len(kinds),), generator=generator)
        shape = (num_audio + num_frames, spec.num_codebooks)
        codes = torch.randint(0, spec.codebook_size, shape, generator=generator)
        self.prompt_codes, self.frames = codes[:num_audio], codes[num_audio:]

    def __len__(self):
        return len(self.ids)

    def embed(self, model):
        """[positions, H] in position order."""
        hidden = torch.empty(len(self), model.spec.hidden_size)
        hidden[~self.is_audio] = model.embed_text(self.ids[~self.is_audio])
        hidden[self.is_audio] = model.embed_codes(self.prompt_codes)
        return hidden


def new_caches(model, tables, dtype=None):
    """Caches whose blocks hold numbers where ``tables`` own them, and nothing sensible elsewhere."""
    spec = model.spec
    sizes = (spec.num_layers, NUM_BLOCKS, BLOCK, spec.num_kv_heads, spec.head_dim)
    caches = allocate_kv_caches(*sizes, dtype=dtype or spec.dtype)
    for cache in caches:
        cache.fill_(float("nan"))
    clear_blocks(caches, tables.flatten().tolist())
    return caches


def block_tables(num_sequences):
    generator = torch.Generator().manual_seed(9)
    shuffled = torch.randperm(NUM_BLOCKS, generator=generator)
    return shuffled[: num_sequences * MAX_BLOCKS].view(num_sequences, MAX_BLOCKS)


def prefill(model, caches, pieces):
    """Run (sequence, table, start, end) pieces as one step; hidden states of each piece."""
    is_audio = torch.cat([seq.is_audio[start:end] for seq, _, start, end in pieces])
    hidden = torch.cat([seq.embed(model)[start:end] for seq, _, start, end in pieces])
    positions = torch.cat([torch.arange(start, end) for _, _, start, end in pieces])
    order = torch.argsort(is_audio.int(), stable=True)
    row_of = torch.argsort(order)
    sequences, first = [], 0
    for _, table, start, end in pieces:
        rows = row_of[first : first + end - start]
        sequences.append(PrefillSequence(rows, table, start, end - start))
        first += end - start
    metadata = PrefillMetadata.build(sequences, BLOCK)
    with set_forward_context(metadata, caches):
        out = model.forward(hidden[order], positions[order], int((~is_audio).sum()))
    return [out[each.rows] for each in sequences]


def decode(model, caches, codes, tables, lens):
    metadata = DecodeMetadata.build(tables[:, : -(-max(lens) // BLOCK)], lens, BLOCK)
    with set_forward_context(metadata, caches):
        return model.forward(model.embed_codes(codes), torch.tensor(lens) - 1, 0)


@pytest.fixture(scope="session")
def models(checkpoint_folders):
    return {
        layout: load_model(folder, max_model_len=256, with_text_head=True)
        for layout, folder in checkpoint_folders.items()
    }


@pytest.fixture(scope="session")
def model(models):
    return models["boson"]


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


@pytest.fixture(params=["in parts", "fused"])
def attention_form(request, monkeypatch):
    """Attention as on a CPU, and as on CUDA with the operations that stand for it on a CPU."""
    if request.param == "fused":
        monkeypatch.setattr(attention, "_is_fused", lambda cache: True)


def reference_hidden(folder, sequence):
    transformers = pytest.importorskip("transformers")
    network = transformers.HiggsAudioV2ForConditionalGeneration.from_pretrained(
        folder, use_text_head=True
    ).eval()
    codes = torch.cat([sequence.prompt_codes, sequence.frames])
    placeholder = network.config.audio_token_id
    ids = sequence.ids.masked_fill(sequence.is_audio, placeholder)
    ids = torch.cat([ids, torch.full((len(sequence.frames),), placeholder)]).unsqueeze(0)
    hidden = network.model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        audio_input_ids=codes.unsqueeze(0),
        audio_input_ids_mask=torch.ones(1, len(codes), dtype=torch.bool),
    ).last_hidden_state[0]
    return network.audio_lm_head(hidden), network.text_lm_head(hidden)


@pytest.mark.parametrize("layout", ["boson", "transformers"])
def test_prefill_and_cached_decode_give_transformers_logits(
    checkpoint_folders, models, layout, attention_form
):
    model = models[layout]
    sequence = Sequence(model.spec, seed=0)
    expected_audio, expected_text = reference_hidden(checkpoint_folders["transformers"], sequence)
    tables = block_tables(1)
    caches = new_caches(model, tables)
    (hidden,) = prefill(model, caches, [(sequence, tables[0], 0, len(sequence))])
    steps = [hidden]
    for step, frame in enumerate(sequence.frames):
        steps.append(decode(model, caches, frame[None], tables, [len(sequence) + step + 1]))
    hidden = torch.cat(steps)
    audio, text = model.audio_logits(hidden).flatten(1), model.text_logits(hidden)
    # The bound is for logits of unit spread; those of our random checkpoints are spread by three,
    # where float32 itself, in either implementation, is 1e-5 away from float64.
    for ours, expected in ((audio, expected_audio), (text, expected_text)):
        spread = expected.std().clamp(min=1.0)
        torch.testing.assert_close(ours / spread, expected / spread, atol=1e-5, rtol=0)


def test_both_layouts_load_to_equal_tensors(models):
    boson, transformers = (models[layout].state_dict() for layout in ("boson", "transformers"))
    assert boson.keys() == transformers.keys()
    for name in boson:
        ours, theirs = (each[name].to_dense() for each in (boson, transformers))
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("cuts", [[1], [9], [20, 23], [16, 32]])
def test_chunked_prefill_has_the_bits_of_whole_prefill(model, cuts):
    sequence, tables = Sequence(model.spec, seed=1), block_tables(2)
    caches = new_caches(model, tables)
    (whole,) = prefill(model, caches, [(sequence, tables[0], 0, len(sequence))])
    bounds = [0, *cuts, len(sequence)]
    chunks = [
        prefill(model, caches, [(sequence, tables[1], start, end)])[0]
        for start, end in pairwise(bounds)
    ]
    assert torch.equal(torch.cat(chunks), whole)


def test_packed_prefill_has_the_bits_of_solo_prefill_in_any_order(model):
    lengths = [(9, 14, 12), (1, 80, 2), (60, 0, 40), (3, 0, 0)]
    tables = block_tables(len(lengths))
    sequences = [
        Sequence(model.spec, seed, *sizes, num_frames=1) for seed, sizes in enumerate(lengths)
    ]
    pieces = [(seq, tables[i], 0, len(seq)) for i, seq in enumerate(sequences)]
    solo = [prefill(model, new_caches(model, tables), [piece])[0] for piece in pieces]
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        packed = prefill(model, new_caches(model, tables), [pieces[i] for i in order])
        assert all(torch.equal(packed[at], solo[i]) for at, i in enumerate(order))


def test_filling_the_cache_stores_what_a_forward_pass_stores(model, attention_form):
    sequence, tables = Sequence(model.spec, seed=4), block_tables(1)

    class Filler:
        spec, embed_text, embed_codes = model.spec, model.embed_text, model.embed_codes

        @staticmethod
        def forward(*inputs):
            model.fill_cache(*inputs)
            return inputs[0]

    filled, expected = new_caches(model, tables), new_caches(model, tables)
    for runner, caches in ((Filler, filled), (model, expected)):
        prefill(runner, caches, [(sequence, tables[0], 0, len(sequence))])
    for ours, theirs in zip(filled, expected, strict=True):
        assert torch.equal(ours[:, tables[0]], theirs[:, tables[0]])


def test_decode_of_1_to_64_rows_has_the_bits_of_solo_decode(model):
    num_rows = 64
    tables = block_tables(num_rows)
    caches = new_caches(model, tables)
    sequences = [
        Sequence(model.spec, seed, 2, 1 + 2 * seed % 97, 3, num_frames=1)
        for seed in range(num_rows)
    ]
    prefill(model, caches, [(seq, tables[i], 0, len(seq)) for i, seq in enumerate(sequences)])
    codes = torch.cat([seq.frames for seq in sequences])
    lens = [len(seq) + 1 for seq in sequences]

    def logits(first, count):
        rows = slice(first, first + count)
        hidden = decode(model, caches, codes[rows], tables[rows], lens[rows])
        return model.audio_logits(hidden)

    solo = torch.cat([logits(row, 1) for row in range(num_rows)])
    for count in (2, 3, 4, 5, 7, 8, 13, 32, 64):
        for first in {0, num_rows - count}:
            assert torch.equal(logits(first, count), solo[first : first + count]), count


def test_models_of_one_process_pad_rows_each_in_its_own_way(checkpoint_folders, monkeypatch):
    with native.disabled():
        one, other = (
            load_model(checkpoint_folders["boson"], dtype="float32", max_model_len=64)
            for _ in range(2)
        )
    one.set_row_quantum(8)
    other.set_row_quantum(1)
    rows = []
    product = linear_kernel._product
    monkeypatch.setattr(
        linear_kernel, "_product", lambda x, weight: rows.append(len(x)) or product(x, weight)
    )
    hidden = torch.randn(3, one.spec.hidden_size)
    for model in (one, other, one):
        model.audio_logits(hidden)
    assert rows == [8, 3, 8]


def test_text_head_is_left_out_unless_asked_for(checkpoint_folders):
    model = load_model(checkpoint_folders["boson"], max_model_len=64)
    with pytest.raises(RuntimeError, match="without its text head"):
        model.text_logits(torch.zeros(1, model.spec.hidden_size))


def test_pages_in_fp8_follow_those_in_float32(model, monkeypatch):
    monkeypatch.setattr(attention, "_is_fused", lambda cache: True)
    sequence, tables = Sequence(model.spec, seed=6), block_tables(1)

    def hidden(dtype):
        caches = new_caches(model, tables, dtype)
        (prompt,) = prefill(model, caches, [(sequence, tables[0], 0, len(sequence))])
        frame = decode(model, caches, sequence.frames[:1], tables, [len(sequence) + 1])
        return torch.cat([prompt, frame])

    expected, narrow = hidden(torch.float32), hidden(torch.float8_e4m3fn)
    for rows in (slice(0, -1), slice(-1, None)):  # of the prompt, and of the decode step
        error = (narrow[rows] - expected[rows]).norm() / expected[rows].norm()
        assert 0 < error < 0.1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_follows_float32(checkpoint_folders, model, dtype):
    half = load_model(checkpoint_folders["transformers"], dtype=dtype, max_model_len=64)
    assert half.spec.dtype == getattr(torch, dtype)
    sequence, tables = Sequence(model.spec, seed=2), block_tables(1)
    pieces = [(sequence, tables[0], 0, len(sequence))]
    (expected,) = prefill(model, new_caches(model, tables), pieces)

    class Cast:
        spec = half.spec
        embed_text = staticmethod(model.embed_text)
        embed_codes = staticmethod(model.embed_codes)

        @staticmethod
        def forward(hidden, positions, num_text_rows):
            return half.forward(hidden.to(half.spec.dtype), positions, num_text_rows).float()

    (hidden,) = prefill(Cast, new_caches(half, tables), pieces)
    assert (hidden - expected).norm() / expected.norm() < 0.03
