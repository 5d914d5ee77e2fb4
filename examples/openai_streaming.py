"""Takes audio as it is made: raw samples into speech.wav, then server-sent events into speech.opus.

python openai_streaming.py [http://localhost:8778/v1]
"""

import base64
import json
import sys
import time
import wave

from openai import OpenAI

TEXT = "Nobody had expected the river to rise so quickly."

base_url = sys.argv[1] if len(sys.argv) > 1 else "http://localhost:8778/v1"
client = OpenAI(base_url=base_url, api_key="none")
model = client.models.list().data[0].id

start = time.perf_counter()
with (
    client.audio.speech.with_streaming_response.create(
        model=model, voice="en_man", input=TEXT, response_format="pcm"
    ) as reply,
    wave.open("speech.wav", "wb") as file,
):
    file.setnchannels(1)
    file.setsampwidth(2)  # 16-bit
    file.setframerate(int(reply.headers["x-sample-rate"]))
    for index, chunk in enumerate(reply.iter_bytes()):
        if index == 0:
            print(f"first audio after {time.perf_counter() - start:.3f} s")
        file.writeframes(chunk)
print("speech.wav")

with (
    client.audio.speech.with_streaming_response.create(
        model=model, voice="en_man", input=TEXT, response_format="opus", stream_format="sse"
    ) as reply,
    open("speech.opus", "wb") as file,
):
    for line in reply.iter_lines():
        if not line.startswith("data: "):
            continue
        event = json.loads(line.removeprefix("data: "))
        if event["type"] == "speech.audio.delta":
            file.write(base64.b64decode(event["audio"]))
        elif event["type"] == "speech.audio.done":
            print("speech.opus:", event["usage"]["output_tokens"], "output tokens")
        else:
            sys.exit(f"failed: {event['error']['message']}")
