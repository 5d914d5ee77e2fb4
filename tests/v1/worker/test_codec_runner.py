import threading
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm.checkpoints.make_codec import make_codec
from vllm.model_executor.codecs import ClipCache, Codec, load_codec
from vllm.model_executor.codecs.streaming import Window, WindowPlan
from vllm.player import Listener
from vllm.v1.outputs import CodecStats
from vllm.v1.worker import codec_runner
from vllm.v1.worker.codec_runner import CodecRunner
from vllm.v1.worker.cuda_graphs import NoGraphs
from vllm.v1.worker.window_decoder import WindowDecoder

HOP = 960
LIMIT_S = 100.0  # bounds a hang


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    folder = tmp_path_factory.mktemp("codec")
    make_codec(folder, layout="transformers", size="tiny", seed=5)
    return load_codec(folder, device="cpu")


@pytest.fixture
def make_runner():
    runners = []

    def make(codec, **options):
        runners.append(CodecRunner(codec, **options))
        return runners[-1]

    yield make
    for runner in runners:
        runner.shutdown()


class ScriptedCodec(torch.nn.Module):
    """Frames sound as their first code says: loud above 0, silent at 0, an error at 9."""

    sample_rate, hop_length, num_codebooks, codebook_size, context_frames = 8000, 4, 2, 10, 2
    can_encode, fingerprint, encoder_fingerprint = True, "scripted", "scripted"

    def __init__(self):
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(1))
        self.num_encoded = 0
        self.batches = []

    def decode(self, codes):
        self.batches.append(tuple(codes.shape))
        if (codes == 9).any():
            raise RuntimeError("scripted failure")
        loudness = torch.where(codes[:, 0] > 0, 0.5, 9e-4)
        return loudness.repeat_interleave(self.hop_length, dim=1)

    decode_part = Codec.decode_part

    def encode(self, samples):
        self.num_encoded += 1
        if samples.isnan().any():
            raise RuntimeError("scripted failure")
        return torch.ones(1, 2, samples.shape[1] // self.hop_length, dtype=torch.int64)


def random_frames(num_frames, seed=0):
    return np.random.default_rng(seed).integers(0, 1024, (8, num_frames)).astype(np.int16)


def scripted_frames(*first_codes):
    return np.array([first_codes, [1] * len(first_codes)], np.int16)


def drain(runner):
    chunks, clips = [], []
    while runner.has_work():
        results = runner.poll(LIMIT_S)
        assert results, "no result although there was work"
        chunks += results.chunks
        clips += results.clips
    return chunks, clips


def samples_of(chunks, request_id):
    mine = [chunk for chunk in chunks if chunk.request_id == request_id]
    assert [chunk.final for chunk in mine] == [False] * (len(mine) - 1) + [True]
    assert all(chunk.num_frames * HOP == len(chunk.samples) for chunk in mine)
    return np.concatenate([chunk.samples for chunk in mine])


def run_alone(codec, frames):
    runner = CodecRunner(codec, threaded=False)
    runner.open("solo", max_silence_frames=None)
    runner.push("solo", frames, final=True)
    return samples_of(drain(runner)[0], "solo")


@pytest.mark.parametrize("num_frames", [1, 4, 5, 14, 15, 90])
def test_stream_equals_one_shot_with_no_tail_lost(codec, num_frames):
    frames = random_frames(num_frames)
    with torch.inference_mode():
        expected = codec.decode(torch.from_numpy(frames).long()[None])[0].numpy()
    assert len(expected) == num_frames * HOP
    np.testing.assert_allclose(run_alone(codec, frames), expected, rtol=0, atol=1e-5)


@given(
    totals=st.lists(st.integers(0, 60), min_size=1, max_size=4),
    threaded=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=12, deadline=None)
def test_bits_do_not_depend_on_arrival_or_on_other_requests(codec, totals, threaded, seed):
    rng = np.random.default_rng(seed)
    frames = {str(i): random_frames(total, seed=i) for i, total in enumerate(totals)}
    runner = CodecRunner(codec, threaded=threaded)
    chunks = []
    for request_id in frames:
        runner.open(request_id, max_silence_frames=None)
    sent = dict.fromkeys(frames, 0)
    open_ids = list(frames)
    while open_ids:
        request_id = str(rng.choice(open_ids))
        start = sent[request_id]
        size = int(rng.integers(0, frames[request_id].shape[1] - start, endpoint=True))
        sent[request_id] += size
        is_all = sent[request_id] == frames[request_id].shape[1]
        final = is_all and bool(rng.integers(2))
        runner.push(request_id, frames[request_id][:, start : start + size], final=final)
        if final:
            open_ids.remove(request_id)
        chunks += runner.poll().chunks
    chunks += drain(runner)[0]
    runner.shutdown()
    for request_id, all_frames in frames.items():
        assert np.array_equal(samples_of(chunks, request_id), run_alone(codec, all_frames))


def test_the_first_chunk_comes_before_the_end(codec, make_runner):
    runner = make_runner(codec)
    runner.open("a", max_silence_frames=None)
    runner.push("a", random_frames(13), final=False)
    assert not runner.has_work()
    runner.push("a", random_frames(1), final=False)
    (chunk,) = runner.poll(LIMIT_S).chunks
    assert (chunk.num_frames, chunk.final) == (4, False)


def test_an_empty_request_ends_with_an_empty_chunk(codec, make_runner):
    runner = make_runner(codec)
    runner.open("a", max_silence_frames=3)
    runner.push("a", random_frames(0), final=True)
    ((chunk,), _) = drain(runner)
    assert (chunk.num_frames, chunk.final, chunk.error) == (0, True, None)


@given(
    codes=st.lists(st.sampled_from([0, 0, 1]), min_size=1, max_size=40),
    limit=st.integers(1, 6),
    sizes=st.lists(st.integers(1, 9), min_size=1),
)
@settings(deadline=None)
def test_silence_is_cut_at_the_frame_where_it_lasted_too_long(codes, limit, sizes):
    runner = CodecRunner(ScriptedCodec(), ramp=(2, 3), threaded=False)
    runner.open("a", max_silence_frames=limit)
    chunks, sent = [], 0
    while sent < len(codes):
        size = sizes[sent % len(sizes)]
        piece = codes[sent : sent + size]
        sent += size
        runner.push("a", scripted_frames(*piece), final=sent >= len(codes))
        chunks += runner.poll().chunks
    chunks += drain(runner)[0]
    runs = [all(c == 0 for c in codes[i - limit : i]) for i in range(limit, len(codes) + 1)]
    expected = limit + runs.index(True) if True in runs else None
    assert chunks[-1].final
    assert chunks[-1].cut_frame == expected
    assert sum(c.num_frames for c in chunks) == (len(codes) if expected is None else expected)
    assert sum(len(c.samples) for c in chunks) == 4 * sum(c.num_frames for c in chunks)


def test_frames_after_a_cut_are_ignored(make_runner):
    runner = make_runner(ScriptedCodec(), ramp=(2,))
    runner.open("a", max_silence_frames=1)
    runner.push("a", scripted_frames(0, 0, 0, 0), final=False)
    ((chunk,), _) = drain(runner)
    assert chunk.cut_frame == 1
    runner.push("a", scripted_frames(1, 1, 1, 1), final=True)
    assert drain(runner) == ([], [])


def test_without_the_guard_silence_is_kept(make_runner):
    runner = make_runner(ScriptedCodec())
    runner.open("a", max_silence_frames=None)
    runner.push("a", scripted_frames(*[0] * 30), final=True)
    chunks, _ = drain(runner)
    assert sum(chunk.num_frames for chunk in chunks) == 30
    assert chunks[-1].cut_frame is None


def test_a_failure_ends_only_its_own_request(make_runner):
    runner = make_runner(ScriptedCodec())
    for request_id in ("bad", "good"):
        runner.open(request_id, max_silence_frames=None)
    runner.push("bad", scripted_frames(9, 1), final=True)
    runner.push("good", scripted_frames(1, 1), final=True)
    chunks, _ = drain(runner)
    bad, good = sorted(chunks, key=lambda chunk: chunk.request_id)
    assert (bad.final, bad.num_frames) == (True, 0)
    assert "scripted failure" in bad.error
    assert (good.final, good.num_frames, good.error) == (True, 2, None)


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (np.full((8, 2), 1024, np.int16), "allowed are 0..1023"),
        (np.full((8, 2), -1, np.int16), "allowed are 0..1023"),
        (np.zeros((7, 2), np.int16), "expected"),
    ],
)
def test_impossible_codes_end_the_request_by_name(codec, make_runner, frames, message):
    runner = make_runner(codec)
    runner.open("a", max_silence_frames=None)
    runner.push("a", frames, final=False)
    ((chunk,), _) = drain(runner)
    assert chunk.final
    assert message in chunk.error


def test_close_drops_queued_work_and_unread_chunks(codec, make_runner):
    runner = make_runner(codec, threaded=False)
    for request_id in ("a", "b"):
        runner.open(request_id, max_silence_frames=None)
        runner.push(request_id, random_frames(20), final=True)
    runner.close("a")
    runner.close("never opened")
    chunks, _ = drain(runner)
    assert {chunk.request_id for chunk in chunks} == {"b"}
    runner.open("a", max_silence_frames=None)  # the name is free again


def test_a_result_in_flight_does_not_reach_a_new_request_of_the_same_name(make_runner):
    scripted = ScriptedCodec()
    entered, go_on = threading.Event(), threading.Event()
    decode = scripted.decode

    def slow_decode(codes):
        entered.set()
        assert go_on.wait(LIMIT_S)
        return decode(codes)

    scripted.decode = slow_decode
    runner = make_runner(scripted)
    runner.open("a", max_silence_frames=None)
    runner.push("a", scripted_frames(1, 1, 1), final=True)
    assert entered.wait(LIMIT_S)
    runner.close("a")
    runner.open("a", max_silence_frames=None)
    runner.push("a", scripted_frames(1), final=True)
    go_on.set()
    ((chunk,), _) = drain(runner)
    assert chunk.num_frames == 1


def test_requests_take_turns(codec, make_runner):
    runner = make_runner(codec, threaded=False)
    for request_id in ("a", "b"):
        runner.open(request_id, max_silence_frames=None)
        runner.push(request_id, random_frames(40), final=True)
    chunks, _ = drain(runner)
    assert [chunk.request_id for chunk in chunks] == ["a", "b"] * 4


def test_on_a_cpu_each_window_is_decoded_alone(make_runner):
    scripted = ScriptedCodec()
    runner = make_runner(scripted, threaded=False)
    for request_id in ("a", "b"):
        runner.open(request_id, max_silence_frames=None)
        runner.push(request_id, scripted_frames(1, 1), final=True)
    drain(runner)
    assert [shape[0] for shape in scripted.batches] == [1, 1]


def test_where_batches_are_allowed_equal_windows_share_a_call(make_runner):
    scripted = ScriptedCodec()
    runner = make_runner(scripted, threaded=False)
    runner._max_batch = 2
    for request_id, codes in (("a", [1, 1]), ("b", [1]), ("c", [1, 9]), ("d", [1, 1])):
        runner.open(request_id, max_silence_frames=None)
        runner.push(request_id, scripted_frames(*codes), final=True)
    chunks, _ = drain(runner)
    # "c" fails together with "a", so both are tried again alone.
    assert scripted.batches == [(2, 2, 2), (1, 2, 2), (1, 2, 2), (1, 2, 1), (1, 2, 2)]
    assert {c.request_id for c in chunks if c.error is None} == {"a", "b", "d"}


def test_clips_are_encoded_once_and_padded(tmp_path, make_runner):
    scripted = ScriptedCodec()
    runner = make_runner(scripted, clip_cache=ClipCache(tmp_path))
    clip = np.ones(9, np.float32)
    runner.encode("one", clip)
    runner.encode("two", clip)
    _, clips = drain(runner)
    assert [encoded.key for encoded in clips] == ["one", "two"]
    assert all(e.codes.dtype == np.int16 and e.codes.shape == (2, 3) for e in clips)
    assert scripted.num_encoded == 1
    other = make_runner(scripted, clip_cache=ClipCache(tmp_path))
    other.encode("three", clip)
    assert drain(other)[1][0].codes.shape == (2, 3)
    assert scripted.num_encoded == 1


def test_stats_count_windows_and_clips(tmp_path, make_runner):
    runner = make_runner(ScriptedCodec(), ramp=(2,), clip_cache=ClipCache(tmp_path), threaded=False)
    tone = np.ones(8, np.float32)
    for key in ("first", "again"):
        runner.encode(key, tone)
    runner.encode("bad", np.full(8, np.nan, np.float32))
    runner.open("a", max_silence_frames=None)
    runner.push("a", scripted_frames(1, 2, 3, 4, 5), final=True)
    assert runner.stats().num_waiting == 1
    drain(runner)
    stats = runner.stats()
    assert (stats.num_windows, stats.num_waiting) == (3, 0)
    assert (stats.num_clips, stats.num_known_clips) == (2, 1)
    assert stats.decode_time_s > 0
    assert stats.encode_time_s > 0
    runner.reset_stats()
    assert runner.stats() == CodecStats()


class Clock:
    """Stands for the ``time`` module of the runner."""

    now = 1000.0

    def monotonic(self):
        return self.now

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(codec_runner, "time", clock)
    return clock


def served(runner):
    """Ids of requests and keys of clips, in the order in which they are done."""
    order = []
    while runner.has_work():
        results = runner.poll()
        order += [chunk.request_id for chunk in results.chunks]
        order += [clip.key for clip in results.clips]
    return order


def test_urgent_windows_come_before_clips_and_a_bad_clip_ends_alone(make_runner, clock):
    runner = make_runner(ScriptedCodec(), threaded=False)
    runner.encode("bad", np.full(4, np.nan, np.float32))
    runner.encode("good", np.ones(4, np.float32))
    runner.open("a", max_silence_frames=None, listener=Listener(speed=1.0, dry_at=clock.now))
    runner.push("a", scripted_frames(1), final=True)
    first = runner.poll()
    assert (len(first.chunks), len(first.clips)) == (1, 0)
    _, clips = drain(runner)
    assert clips[0].codes is None
    assert "scripted failure" in clips[0].error
    assert clips[1].error is None


def test_whose_listener_has_least_comes_first(make_runner, clock):
    runner = make_runner(ScriptedCodec(), ramp=(2,), threaded=False)
    ahead = {"nobody": None, "plenty": 5.0, "little": 1.0, "waiting": -3.0}
    for name, seconds in ahead.items():
        listener = None if seconds is None else Listener(1.0, dry_at=clock.now + seconds)
        runner.open(name, max_silence_frames=None, listener=listener)
        runner.push(name, scripted_frames(1, 1), final=True)
    assert served(runner) == ["waiting", "little", "plenty", "nobody"]


def test_audio_that_was_decoded_counts_as_ahead(make_runner, clock):
    """8 samples are a millisecond; each window gives two frames of 4 samples."""
    runner = make_runner(ScriptedCodec(), ramp=(2,), threaded=False)
    for name, seconds, speed in (("a", 0.0, 2.0), ("b", 0.0006, 1.0)):
        runner.open(
            name,
            max_silence_frames=None,
            listener=Listener(speed=speed, dry_at=clock.now + seconds),
        )
        runner.push(name, scripted_frames(1, 1, 1, 1, 1, 1), final=True)
    # a: 0, 0.5, 1.0; b: 0.6, 1.6, 2.6
    assert served(runner) == ["a", "a", "b", "a", "b", "b"]


def test_nothing_is_put_off_for_ever(make_runner, clock):
    """Ten listeners in need keep the codec busy; what nobody hears is decoded all the same."""
    runner = make_runner(ScriptedCodec(), ramp=(1,), threaded=False)
    runner.encode("clip", np.ones(4, np.float32))
    runner.open("nobody", max_silence_frames=None)
    runner.push("nobody", scripted_frames(1), final=True)
    listeners = [f"l{index}" for index in range(10)]
    for name in listeners:
        runner.open(name, max_silence_frames=None, listener=Listener(speed=1.0, dry_at=clock.now))
        runner.push(name, scripted_frames(1, 1), final=False)  # what a window looks ahead
    order = []
    for _ in range(14):
        for name in listeners:
            runner.push(name, scripted_frames(1), final=False)
        for _ in range(10):
            results = runner.poll()
            order += [chunk.request_id for chunk in results.chunks]
            order += [clip.key for clip in results.clips]
            clock.now += 0.1
    assert 10 <= order.index("clip") <= 20
    assert 100 <= order.index("nobody") <= 120
    assert min(order.count(name) for name in listeners) >= 10


def test_a_codec_without_encoder_says_so(tmp_path, make_runner):
    make_codec(tmp_path, layout="transformers", size="tiny", seed=1, decode_only=True)
    runner = make_runner(load_codec(tmp_path, device="cpu"))
    runner.encode("clip", np.zeros(HOP, np.float32))
    ((clip,),) = drain(runner)[1:]
    assert "ref_audio" in clip.error


def test_opening_twice_is_a_mistake(codec, make_runner):
    runner = make_runner(codec)
    runner.open("a", max_silence_frames=None)
    with pytest.raises(ValueError, match="already open"):
        runner.open("a", max_silence_frames=None)


def test_own_thread_count_leaves_the_callers_alone(codec, make_runner):
    before = torch.get_num_threads()
    make_runner(codec, num_threads=before + 1)
    assert torch.get_num_threads() == before


def test_poll_without_work_returns_at_once(codec, make_runner):
    assert not make_runner(codec).poll(3600.0)


class PartialCodec(ScriptedCodec):
    """Notes what was computed."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def decode_part(self, codes, first, last):
        self.shapes.append((codes.shape[2], first, last))
        return self.decode(codes)[:, first * 4 : last * 4]


def test_windows_with_a_recorded_part_share_a_batch():
    """Of two in the middle of their streams no more is computed than both emit."""
    codec = PartialCodec()
    decoder = WindowDecoder(codec, torch.device("cpu"))
    plan = WindowPlan(codec.context_frames, (4, 8), widens_last=True)
    decoder.record(NoGraphs(), plan.usual_shapes, max_batch=4)
    codes = np.random.default_rng(0).integers(0, 2, (2, 24)).astype(np.int16)

    middle, other, end = Window(2, 14, 4, 12), Window(10, 22, 12, 20), Window(12, 24, 15, 24)
    assert decoder.shape_of(middle) == decoder.shape_of(other) == (12, 2, 10)
    assert decoder.shape_of(end) == (12, 2, 12)
    short = Window(0, 5, 2, 5)  # of a length that no long stream has
    assert decoder.shape_of(short) == (5, 2, 5)

    for batch in ([middle, other], [end], [short]):
        inputs = [(codes[:, each.start : each.stop], each) for each in batch]
        for window, samples in zip(batch, decoder.decode(inputs), strict=True):
            emitted = codes[0, window.emit_start : window.emit_stop]
            expected = np.where(emitted > 0, np.float32(0.5), np.float32(9e-4))
            np.testing.assert_array_equal(samples, expected.repeat(codec.hop_length))
    # NoGraphs calls what it recorded.
    assert codec.shapes == [(12, 2, 10), (12, 2, 12), (5, 2, 5)]


@pytest.mark.parametrize("num_streams", [1, 3])
def test_recorded_batches_give_the_samples_of_windows_alone(monkeypatch, num_streams):
    monkeypatch.setattr(codec_runner, "MAX_CUDA_BATCH", 4)
    scripted = ScriptedCodec()
    frames = [scripted_frames(*([1, 0, 1, 1] * (5 + 3 * i))) for i in range(num_streams)]
    expected = [scripted.decode(torch.from_numpy(f).long()[None])[0].numpy() for f in frames]
    runner = CodecRunner(scripted, ramp=(4, 8), threaded=False, graphs=NoGraphs())
    runner._max_batch = 4  # as on CUDA
    for index, each in enumerate(frames):
        runner.open(str(index), max_silence_frames=None)
        runner.push(str(index), each, final=True)
    scripted.batches.clear()
    chunks, _ = drain(runner)
    for index, samples in enumerate(expected):
        mine = [chunk.samples for chunk in chunks if chunk.request_id == str(index)]
        np.testing.assert_array_equal(np.concatenate(mine), samples)
    # Padded to the next size.
    sizes = {shape[0] for shape in scripted.batches}
    assert 4 in sizes if num_streams == 3 else sizes == {1}
    # The end of a stream makes no length of its own.
    assert {shape[2] for shape in scripted.batches} <= {6, 12, 14}


def test_clips_are_encoded_beside_the_steps(make_runner, monkeypatch):
    scripted = ScriptedCodec()
    runner = make_runner(scripted, threaded=False)
    entered = []

    @contextmanager
    def on_stream():
        entered.append(scripted.num_encoded)
        yield
        entered.append(scripted.num_encoded)

    monkeypatch.setattr(runner._decoder, "on_stream", on_stream)
    runner.encode("clip", np.ones(8, np.float32))
    drain(runner)
    assert entered == [0, 1]
