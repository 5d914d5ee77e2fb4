"""What every neural audio codec offers: codes to samples, and back where it can.

Knows neither requests nor windows; one call is one self-contained stretch of audio.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

__all__ = ["Codec"]


class Codec(nn.Module, ABC):
    """A codec with its weights, ready to run.

    Attributes:
        sample_rate: samples per second, in and out.
        hop_length: samples per frame.
        num_codebooks: codes per frame, K.
        codebook_size: codes lie in ``0 .. codebook_size - 1``.
        context_frames: frames on either side of a frame that its samples depend on. A window with
            that much context reproduces a decode of the whole.
        can_encode: whether ``encode`` has its weights.
        fingerprint: hash of what gives codes their sound (sizes, codebooks, decoder). Equal for a
            codec and its decode-only copy, so codes can be shipped for either.
        encoder_fingerprint: hash of what gives samples their codes; keys stored encodings.
    """

    sample_rate: int
    hop_length: int
    num_codebooks: int
    codebook_size: int
    context_frames: int
    can_encode: bool
    fingerprint: str

    @property
    def frame_rate(self) -> float:
        """Frames per second."""
        return self.sample_rate / self.hop_length

    @property
    @abstractmethod
    def encoder_fingerprint(self) -> str: ...

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """Codes int64 [batch, K, num_frames] to float32 [batch, num_frames * hop] in [-1, 1].

        Every code must be below ``codebook_size``.
        """

    def decode_part(self, codes: Tensor, first: int, last: int) -> Tensor:
        """Samples of frames ``first .. last - 1``, float32 [batch, (last - first) * hop].

        The other frames are context. A codec that need not compute all of their samples does so
        here; what comes out equals that part of ``decode``.
        """
        return self.decode(codes)[:, first * self.hop_length : last * self.hop_length]

    @abstractmethod
    def encode(self, samples: Tensor) -> Tensor:
        """Samples float32 [batch, n], n a multiple of the hop, to int64 [batch, K, n / hop].

        Raises:
            InvalidRequestError: the codec has no encoder, or n is not such a multiple.
        """
