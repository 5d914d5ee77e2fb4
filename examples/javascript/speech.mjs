// Speaks a sentence into speech.mp3, then streams another into speech.pcm as it is made.
//
//   npm install && node speech.mjs [http://localhost:8778/v1]
import { createWriteStream } from "node:fs";
import { writeFile } from "node:fs/promises";
import { Readable } from "node:stream";
import { pipeline } from "node:stream/promises";
import OpenAI from "openai";

const baseURL = process.argv[2] ?? "http://localhost:8778/v1";
const client = new OpenAI({ baseURL, apiKey: "none" });
const model = (await client.models.list()).data[0].id;

const whole = await client.audio.speech.create({
  model,
  voice: "en_woman",
  input: "The train to the coast leaves from platform four.",
  response_format: "mp3",
  seed: 42, // not OpenAI's; the same seed gives the same audio
});
await writeFile("speech.mp3", Buffer.from(await whole.arrayBuffer()));
console.log(`speech.mp3, seed ${whole.headers.get("x-seed")}`);

const streamed = await client.audio.speech.create({
  model,
  voice: "en_man",
  input: "Good morning.",
  response_format: "pcm",
});
await pipeline(Readable.fromWeb(streamed.body), createWriteStream("speech.pcm"));
console.log(`speech.pcm, ${streamed.headers.get("x-sample-rate")} Hz, 16-bit mono`);
