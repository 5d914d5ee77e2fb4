import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from training.alphabet import split
from training.batches import delay
from training.decoder import Decoder
from training.encoder import Encoder
from training.export import export_codec, export_lm, export_voices
from training.import_weights import import_decoder, import_encoder, import_lm
from training.lexicon import load_lexicon
from training.network import Network, Sizes
from training.prompt import BETWEEN, NUM_TOKENS, PREFIX, SUFFIX, TOKEN_ID
from training.train_encoder import quantize
from vllm.entrypoints.llm import LLM
from vllm.model_executor.codecs import load_codec
from vllm.prompts import SpeechPrompt
from vllm.sampling_params import SamplingParams


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    made = Network(Sizes(NUM_TOKENS, num_hidden_layers=3)).eval()
    for weight in made.parameters():  # as the file has it
        weight.data = weight.data.bfloat16().float()
    made.audio_lm_head.weight.data *= 8  # so that the best code is clearly the best
    return made


@pytest.fixture(scope="module")
def decoder():
    torch.manual_seed(1)
    return Decoder(64, width=64).eval()


@pytest.fixture(scope="module")
def codebooks():
    return torch.randn(8, 1024, 64, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, network, decoder, codebooks):
    out = tmp_path_factory.mktemp("exported")
    export_lm(out / "lm", network.state_dict())
    export_codec(out / "codec", codebooks, decoder.state_dict())
    export_voices(out / "voices")
    return out


@torch.no_grad()
def test_the_exported_codec_decodes_as_the_trained_decoder(folder, decoder, codebooks):
    codes = torch.randint(1024, (1, 8, 12), generator=torch.Generator().manual_seed(3))
    vectors = torch.stack([book[row] for book, row in zip(codebooks, codes[0], strict=True)])
    wanted = decoder(vectors.sum(0).T[None])
    codec = load_codec(folder / "codec", device="cpu")
    assert not codec.can_encode
    torch.testing.assert_close(codec.decode(codes), wanted.clamp(-1, 1), atol=5e-3, rtol=0)


@torch.no_grad()
def test_the_exported_codec_encodes_as_the_trained_encoder(tmp_path, decoder, codebooks):
    torch.manual_seed(5)
    encoder = Encoder(64, torch.full((64,), 8.0)).eval()
    export_codec(tmp_path / "codec", codebooks, decoder.state_dict(), encoder.state_dict())
    samples = 0.1 * torch.randn(1, 24 * 960, generator=torch.Generator().manual_seed(6))
    vectors = encoder(samples)[0]
    assert vectors.std(0)[:64].min() > 0.01  # frames differ
    codec = load_codec(tmp_path / "codec", device="cpu")
    assert codec.can_encode
    found = codec.encode(samples)[0].T
    # Weights were rounded to 16 bits, so a code on the border may fall on its other side.
    assert (found == quantize(vectors, codebooks))[:, 0].float().mean() > 0.7
    assert codec.decode(found.T[None]).shape == samples.shape
    import_encoder(tmp_path, tmp_path)
    encoder.load_state_dict(load_file(tmp_path / "encoder.safetensors"))
    assert (found == quantize(encoder(samples)[0], codebooks))[:, 0].float().mean() > 0.9


@pytest.fixture(scope="module")
def llm(folder):
    engine = LLM(
        folder / "lm",
        audio_tokenizer=folder / "codec",
        voices_dir=folder / "voices",
        device="cpu",
        max_model_len=256,
        max_num_seqs=1,
    )
    yield engine
    engine.shutdown()


def symbol_ids(text):
    lexicon = load_lexicon()
    return [TOKEN_ID[each] for each in split(" ".join(map(lexicon.get, text.split())) + ".")]


@torch.no_grad()
@pytest.mark.parametrize("with_clip", [False, True])
def test_the_exported_model_generates_what_the_trained_network_does(llm, network, with_clip):
    params = SamplingParams(temperature=0, max_tokens=8, ras_window_length=0)
    said, spoken = symbol_ids("hello"), symbol_ids("this is a test")
    clip = np.random.default_rng(7).integers(0, 1024, (8, 5))
    columns = delay(clip.T)
    if with_clip:
        slot = TOKEN_ID["<|AUDIO_OUT|>"]
        head = [*PREFIX, *said, *SUFFIX]
        prompt = SpeechPrompt(
            prompt_token_ids=[*head, *[slot] * len(columns), *BETWEEN, *spoken, *SUFFIX],
            prompt_codes=[clip],
        )
        ids = [*head, *BETWEEN, *spoken, *SUFFIX]
    else:
        prompt = SpeechPrompt(text="This is a test")
        head, columns = list(PREFIX), columns[:0]
        ids = [*PREFIX, *spoken, *SUFFIX]
    output = llm.generate(prompt, params, use_tqdm=False)[0]
    made = np.asarray(output.delayed_codes).astype(np.int64)
    frames = torch.from_numpy(np.concatenate([columns, made[:-1]]))[None]
    places = torch.arange(len(ids) + frames.shape[1])
    after = len(ids) - len(head)
    order = [places[: len(head)], places[len(head) + len(columns) :][:after]]
    order += [places[len(head) :][: len(columns)], places[len(ids) + len(columns) :]]
    none_padded = torch.zeros(1, dtype=torch.long)
    hidden, _ = network(torch.tensor([ids]), none_padded, frames, torch.cat(order)[None])
    logits = network.logits(hidden[0, len(columns) :], 0, 8)[..., :1024]
    free = torch.from_numpy(made[1:])
    is_free = free < 1024  # neither BOS of the ramp nor the end
    assert is_free.sum() > 20
    assert torch.equal(logits.argmax(-1)[is_free], free[is_free])


def test_only_the_trained_voice_speaks(folder):
    from vllm.entrypoints.bosonai.voices import VoiceLibrary

    library = VoiceLibrary.without_engine(folder / "voices")
    assert library.default_id == "en_woman"
    assert [each["id"] for each in library.list() if each["speaks"]] == ["en_woman"]
    assert len(library.names) == 6


def test_exported_weights_can_be_trained_on(folder, network, decoder, tmp_path):
    import_lm(folder, tmp_path)
    import_decoder(folder, tmp_path)
    torch.testing.assert_close(load_file(tmp_path / "lm.safetensors"), network.state_dict())
    resumed = Decoder(64, width=64).eval()
    resumed.load_state_dict(load_file(tmp_path / "decoder.safetensors"))
    vectors = torch.randn(1, 64, 6, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        torch.testing.assert_close(resumed(vectors), decoder(vectors), atol=5e-3, rtol=0)


def test_temperatures_are_taken_out_of_what_is_trained_on(network, tmp_path):
    temperatures = (0.5, 0.25)
    export_lm(tmp_path / "lm", network.state_dict(), temperatures=temperatures)
    exported = load_file(tmp_path / "lm" / "model.safetensors")["audio_lm_head.weight"]
    assert not torch.equal(exported.float(), network.audio_lm_head.weight)
    import_lm(tmp_path, tmp_path, temperatures=temperatures)
    torch.testing.assert_close(load_file(tmp_path / "lm.safetensors"), network.state_dict())
