"""Uploads a clip as a voice, speaks with it into voice.mp3, and deletes it again.

python openai_voices.py CLIP "What the clip says." [http://localhost:8778/v1]
"""

import sys
from pathlib import Path

from openai import OpenAI

clip, transcript = Path(sys.argv[1]), sys.argv[2]
base_url = sys.argv[3] if len(sys.argv) > 3 else "http://localhost:8778/v1"
client = OpenAI(base_url=base_url, api_key="none")
model = client.models.list().data[0].id

voice = client.audio.voices.create(
    name="My own voice",
    audio_sample=(clip.name, clip.read_bytes(), "audio/wav"),
    consent="The speaker agreed on 2026-03-01.",  # kept with the voice
    extra_body={"transcript": transcript},  # not OpenAI's; the model is shown the words too
)
print(f"made {voice.id}")

reply = client.audio.speech.create(
    model=model,
    voice={"id": voice.id},
    input="The train to the coast leaves from platform four.",
    response_format="mp3",
)
reply.write_to_file("voice.mp3")
print(f"voice.mp3: {len(reply.content)} bytes in the voice {reply.response.headers['x-voice']}")

client.audio.voices.delete(voice.id)
print(f"deleted {voice.id}")
