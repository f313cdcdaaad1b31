// Replicate's official JavaScript client: node examples/javascript/replicate_client.mjs [folder for the images]
// REPLICATE_API_TOKEN is read by the client; REPLICATE_BASE_URL names another server that speaks Replicate's API.
import { mkdir, readFile, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import Replicate from "replicate";

const base = process.env.REPLICATE_BASE_URL;
const replicate = new Replicate(base ? { baseUrl: `${base}/v1` } : {});
const model = process.env.FLUX_MODEL ?? "your-name/flux";
const webhook = process.env.FLUX_WEBHOOK; // an address of yours that is told when a prediction ends
const folder = process.argv[2] ?? ".";
const quick = { model: "schnell", num_inference_steps: 4, megapixels: "0.25", output_format: "png" };
const example = (name) => readFile(fileURLToPath(new URL(`../${name}`, import.meta.url)));

// Runs the model and saves its first image; the client decodes data URIs and fetches addresses by itself.
async function make(name, input) {
  const [image] = await replicate.run(model, { input: { ...quick, ...input } });
  const file = join(folder, name);
  await writeFile(file, image);
  console.log(`wrote ${file}`);
}

await mkdir(folder, { recursive: true });
const photo = await example("photo.jpg"); // a Buffer or Blob is uploaded by the client
const mask = await example("mask.png");
await make("text.png", { prompt: "a red circle on a white background" });
await make("image.png", { prompt: "a green heart on a white background", image: photo });
await make("mask.png", { prompt: "a red square on a white background", image: photo, mask });
const lora = process.env.FLUX_LORA ?? "huggingface.co/owner/name";
await make("lora.png", { prompt: "a red circle on a white background", replicate_weights: lora });

let later = await replicate.predictions.create({
  model,
  input: { ...quick, prompt: "a blue star on a yellow background" },
  ...(webhook ? { webhook, webhook_events_filter: ["completed"] } : {}),
});
later = await replicate.wait(later);
console.log(`later: ${later.status}`);

let slow = await replicate.predictions.create({
  model,
  input: { prompt: "a blue star on a yellow background", num_inference_steps: 50 },
});
while (!["canceled", "succeeded", "failed"].includes(slow.status)) {
  await replicate.predictions.cancel(slow.id); // and again: a server may lose the one that comes with the prediction itself
  await new Promise((resolve) => setTimeout(resolve, 500));
  slow = await replicate.predictions.get(slow.id);
}
console.log(`slow: ${slow.status}`);
