// OpenAI's npm package against a server, as its users write it; prints what it saw as JSON.
//
//   node openai_client.mjs BASE_URL CASE
import OpenAI, { AuthenticationError, BadRequestError, InternalServerError, NotFoundError } from "openai";

const [baseURL, name] = process.argv.slice(2);
const model = "tts-1";
const input = "Hello.";
const messages = [{ role: "user", content: input }];
const client = new OpenAI({ baseURL, apiKey: "right", maxRetries: 0 });

const speak = (fields = {}, options = {}) =>
  client.audio.speech.create({ model, voice: "alloy", input, ...fields }, options);

async function refusal(promise, kind) {
  try {
    await promise;
  } catch (error) {
    const { status, code, param, message } = error;
    return { isKind: error instanceof kind, status, code, param, message };
  }
  return { isKind: false };
}

const cases = {
  async formats() {
    const seen = {};
    for (const response_format of ["mp3", "opus", "aac", "flac", "wav", "pcm"]) {
      const data = Buffer.from(await (await speak({ response_format })).arrayBuffer());
      seen[response_format] = { size: data.length, head: data.subarray(0, 4).toString("latin1") };
    }
    return seen;
  },

  async streaming() {
    const reply = await speak({ response_format: "pcm" });
    let size = 0;
    for await (const piece of reply.body) size += piece.length;
    const events = await (await speak({ stream_format: "sse" })).text();
    return { size, type: reply.headers.get("content-type"), events: events.match(/speech\.audio\.\w+/g) };
  },

  async chat() {
    const audio = { voice: "alloy", format: "wav" };
    const reply = await client.chat.completions.create({ model, modalities: ["text", "audio"], audio, messages });
    const spoken = reply.choices[0].message.audio;
    return {
      finish: reply.choices[0].finish_reason,
      transcript: spoken.transcript,
      head: Buffer.from(spoken.data, "base64").subarray(0, 4).toString("latin1"),
      audioTokens: reply.usage.completion_tokens_details.audio_tokens,
    };
  },

  async chatStreamed() {
    const chunks = await client.chat.completions.create({
      model,
      modalities: ["text", "audio"],
      audio: { voice: "alloy", format: "pcm16" },
      messages,
      stream: true,
      stream_options: { include_usage: true },
    });
    const seen = { ids: [], transcript: "", size: 0, finish: null, tokens: 0 };
    for await (const chunk of chunks) {
      const audio = chunk.choices[0]?.delta.audio;
      if (audio?.id) seen.ids.push(audio.id);
      seen.transcript += audio?.transcript ?? "";
      seen.size += Buffer.from(audio?.data ?? "", "base64").length;
      seen.finish = chunk.choices[0]?.finish_reason ?? seen.finish;
      seen.tokens = chunk.usage?.completion_tokens ?? seen.tokens;
    }
    return seen;
  },

  // The package has no methods for voices before its version for Node 22; it sends any form.
  async voices() {
    const body = new FormData();
    body.set("name", "Anna B");
    body.set("transcript", "What the clip says.");
    body.set("consent", "cons_1");
    body.set("audio_sample", new Blob([await tone()], { type: "audio/wav" }), "anna.wav");
    const created = await client.post("/audio/voices", { body });
    const spoken = await speak({ voice: { id: created.id } });
    const deleted = await client.delete(`/audio/voices/${created.id}`);
    const unknown = await refusal(speak({ voice: created.id }), BadRequestError);
    return { created, voice: spoken.headers.get("x-voice"), deleted, unknown };
  },

  async errors() {
    const stranger = new OpenAI({ baseURL, apiKey: "wrong", maxRetries: 0 });
    return {
      model: await refusal(speak({ model: "gpt-9" }), NotFoundError),
      field: await refusal(speak({ speed: 9 }), BadRequestError),
      key: await refusal(stranger.models.list(), AuthenticationError),
    };
  },

  failure: () => refusal(speak({}, { maxRetries: 2 }), InternalServerError),

  retry: async () => ({ size: (await (await speak({ response_format: "pcm" }, { maxRetries: 2 })).arrayBuffer()).byteLength }),
};

async function tone() {
  const samples = Int16Array.from({ length: 24000 }, (_, index) => 9000 * Math.sin(index / 20));
  const header = Buffer.alloc(44);
  header.write("RIFF", 0);
  header.writeUInt32LE(36 + samples.byteLength, 4);
  header.write("WAVEfmt ", 8);
  header.writeUInt32LE(16, 16);
  header.writeUInt16LE(1, 20); // PCM
  header.writeUInt16LE(1, 22); // mono
  header.writeUInt32LE(24000, 24);
  header.writeUInt32LE(48000, 28);
  header.writeUInt16LE(2, 32);
  header.writeUInt16LE(16, 34);
  header.write("data", 36);
  header.writeUInt32LE(samples.byteLength, 40);
  return Buffer.concat([header, Buffer.from(samples.buffer)]);
}

console.log(JSON.stringify(await cases[name]()));
