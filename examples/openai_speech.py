"""Speaks a sentence into speech.mp3 with OpenAI's Python package.

python openai_speech.py [http://localhost:8778/v1]
"""

import sys

from openai import OpenAI

base_url = sys.argv[1] if len(sys.argv) > 1 else "http://localhost:8778/v1"
client = OpenAI(base_url=base_url, api_key="none")
model = client.models.list().data[0].id

reply = client.audio.speech.create(
    model=model,
    voice="en_woman",
    input="The train to the coast leaves from platform four.",
    response_format="mp3",
    extra_body={"seed": 42},  # the same seed gives the same audio
)
reply.write_to_file("speech.mp3")
print(f"speech.mp3: {len(reply.content)} bytes, seed {reply.response.headers['x-seed']}")
