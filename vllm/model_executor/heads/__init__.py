"""From a hidden state to the content of the next position."""

from vllm.model_executor.heads.codebooks import (
    CodebookState,
    FrameStatus,
    NextFrame,
    RowSnapshot,
)

__all__ = ["CodebookState", "FrameStatus", "NextFrame", "RowSnapshot"]
