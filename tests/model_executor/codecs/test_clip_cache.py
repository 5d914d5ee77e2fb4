import numpy as np
import pytest

from vllm.model_executor.codecs import ClipCache

CODES = np.arange(16, dtype=np.int16).reshape(8, 2)


def test_codes_come_back_from_memory_and_from_disk(tmp_path):
    cache = ClipCache(tmp_path / "clips")
    assert cache.get("k") is None
    cache.put("k", CODES)
    assert np.array_equal(cache.get("k"), CODES)
    assert np.array_equal(ClipCache(tmp_path / "clips").get("k"), CODES)
    assert [path.name for path in (tmp_path / "clips").iterdir()] == ["k.npy"]


def test_memory_keeps_the_clips_used_last():
    cache = ClipCache(max_clips=2)
    for key in ("a", "b"):
        cache.put(key, CODES)
    cache.get("a")
    cache.put("c", CODES)
    assert [cache.get(key) is not None for key in ("a", "b", "c")] == [True, False, True]


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY\x01", b"not codes at all"])
def test_a_damaged_file_is_no_entry_and_is_replaced(tmp_path, content):
    (tmp_path / "k.npy").write_bytes(content)
    cache = ClipCache(tmp_path)
    assert cache.get("k") is None
    cache.put("k", CODES)
    assert np.array_equal(ClipCache(tmp_path).get("k"), CODES)


def test_a_file_of_another_kind_is_no_entry(tmp_path):
    np.save(tmp_path / "k.npy", CODES.astype(np.float32))
    assert ClipCache(tmp_path).get("k") is None


def test_a_disk_that_refuses_is_survived(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    cache = ClipCache(tmp_path / "file")
    cache.put("k", CODES)
    assert np.array_equal(cache.get("k"), CODES)
    assert "cannot keep an encoded clip" in caplog.text


def test_keys_depend_on_the_samples_and_on_the_encoder():
    clip = np.zeros(4, np.float32)
    other = clip.copy()
    other[2] = 1e-6
    keys = {ClipCache.key(clip, "x"), ClipCache.key(other, "x"), ClipCache.key(clip, "y")}
    assert len(keys) == 3
    assert ClipCache.key(clip, "x") == ClipCache.key(np.zeros(8, np.float32)[::2], "x")
