"""The speech server: its application, the speech route, the voices and the engine it rests on.

Empty on purpose, so that ``python -m vllm.entrypoints.bosonai.api_server`` loads only its own.
"""
