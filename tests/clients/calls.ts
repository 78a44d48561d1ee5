// The calls of the README through openapi-fetch and the types that openapi-typescript made: checked by tsc, then run.
// `node calls.js URL IMAGE`; the image is a PNG of the served network's size.
import { strict as assert } from "node:assert";
import { readFile } from "node:fs/promises";
import createClient from "openapi-fetch";
import type { components, paths } from "./unstir.js";

const [url, place] = process.argv.slice(2) as [string, string];
const client = createClient<paths, `application/${string}json`>({ baseUrl: url, headers: { accept: "application/json" } });
const file = new Blob([new Uint8Array(await readFile(place))], { type: "image/png" });
const base64 = Buffer.from(await file.arrayBuffer()).toString("base64");

/** The fields as a form: files as they are, lists as a field that is sent several times. */
function bodySerializer(fields: object = {}): FormData {
  const form = new FormData();
  for (const [name, value] of Object.entries(fields))
    for (const item of [value].flat()) form.append(name, item instanceof Blob ? item : String(item));
  return form;
}

function the<T>(answer: { data?: T; error?: unknown }): T {
  assert(answer.data !== undefined, JSON.stringify(answer.error));
  return answer.data;
}

// The service.
const model = the(await client.GET("/model"));
const label = model.classes.at(-1)!;
assert.equal(the(await client.GET("/readyz")).status, "ready");

// Sample: JSON, a form, and the same request as a PNG.
const request = { label, seed: 7, steps: 4 };
const first = the(await client.POST("/sample", { body: request }));
assert("images" in first);
assert.deepEqual([first.seeds, first.sampler, first.steps, first.label], [[7], "ddim", 4, label]);
assert.equal(first.trajectory, undefined);
const ddpm = the(await client.POST("/sample", { body: { ...request, sampler: "ddpm" }, bodySerializer }));
assert("images" in ddpm && ddpm.sampler === "ddpm");
const headers = { accept: "image/png" };
const answer = await client.POST("/sample", { body: request, headers, parseAs: "blob" });
const png: Blob = the(answer);
assert.equal(png.type, "image/png");
assert.equal(answer.response.headers.get("x-nfe"), "4");

// Invert: by file, and in base64; the latent is sampled again.
const code = the(await client.POST("/invert", { body: { image: file, steps: 4, label, embed: "none" }, bodySerializer }));
assert("decode" in code);
assert.equal(typeof code.psnr, "number");
const same = the(await client.POST("/invert", { body: { image: base64, steps: 4, label, fit: "resize" } }));
assert("decode" in same && same.nfe === code.nfe);
const again = the(await client.POST("/sample", { body: { ...code.decode, latent: { npy: code.latent }, embed: "none" } }));
assert("images" in again);
assert.deepEqual(again.images, [code.reconstruction]);

// Interpolate: seeds, files, both, weights and a grid.
const ends = the(await client.POST("/interpolate", { body: { a: 7, b: { seed: 8 }, frames: 3, steps: 2 } }));
assert("images" in ends && ends.images.length === 3);
const files = { a: file, b: file, frames: 2, steps: 2 };
const between = the(await client.POST("/interpolate", { body: files, bodySerializer }));
assert("latents" in between && between.latents.length === 2);
const blend = { latents: [file, 5, file], weights: [0.5, 0.25, 0.25], steps: 2 };
const blended = the(await client.POST("/interpolate", { body: blend, bodySerializer }));
assert("weights" in blended);
assert.deepEqual(blended.weights, [[0.5, 0.25, 0.25]]);
const corners = { latents: [1, { seed: 2 }, { npy: first.latents[0]! }, { image: base64 }], grid: [2, 3], steps: 2 };
const grid = the(await client.POST("/interpolate", { body: corners }));
assert("grid" in grid);
assert.deepEqual(grid.grid, [2, 3]);

// A job to its end, another that is cancelled, and a problem.
const params = { header: { Prefer: "respond-async", "Idempotency-Key": "calls-of-typescript" } };
const accepted = await client.POST("/sample", { body: request, params });
let job = the(accepted);
assert("state" in job);
assert.equal(accepted.response.headers.get("location"), `/jobs/${job.id}`);
const path = { identifier: job.id };
while (job.state === "waiting" || job.state === "running") {
  await new Promise((resolve) => setTimeout(resolve, 20));
  job = the(await client.GET("/jobs/{identifier}", { params: { path } }));
}
assert.equal(job.state, "done");
const result = the(await client.GET("/jobs/{identifier}/result", { params: { path } }));
assert("seeds" in result);
assert.deepEqual(result.seeds, [7]);
const prefer = { header: { Prefer: "respond-async" } };
const long = the(await client.POST("/sample", { body: { sampler: "ddpm", n: 8 }, params: prefer }));
assert("id" in long);
const cancelled = the(await client.DELETE("/jobs/{identifier}", { params: { path: { identifier: long.id } } }));
assert.equal(cancelled.state, "cancelled");
const { error } = await client.POST("/sample", { body: { steps: 0 } });
assert(error && error.code === "invalid_field" && error.errors);
assert.deepEqual([error.status, error.errors[0]!.field, error.errors[0]!.value], [422, "steps", 0]);
console.log("done");
