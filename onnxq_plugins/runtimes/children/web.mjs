// Run a model in onnxruntime-web, in node. `job.json`: file, samples, modules (where node_modules is), times (seconds).
import { createRequire } from "node:module";
import fs from "node:fs";
import path from "node:path";

const folder = process.argv[2];
const job = JSON.parse(fs.readFileSync(path.join(folder, "job.json"), "utf-8"));
const ARRAYS = {
  float32: Float32Array, float64: Float64Array, float16: Uint16Array, int8: Int8Array, uint8: Uint8Array, int16: Int16Array,
  uint16: Uint16Array, int32: Int32Array, uint32: Uint32Array, int64: BigInt64Array, uint64: BigUint64Array, bool: Uint8Array,
};
const answer = {};
try {
  let ort;
  try {
    ort = createRequire(path.join(job.modules, "any.js"))("onnxruntime-web");
  } catch (error) {
    answer.missing = true;
    throw error;
  }
  answer.version = ort.env.versions.web;
  ort.env.wasm.numThreads = 1;
  const options = { executionProviders: ["wasm"], graphOptimizationLevel: "all", enableProfiling: true };
  const session = await ort.InferenceSession.create(job.file, options);
  const feeds = job.samples.map((sample) =>
    Object.fromEntries(Object.entries(sample).map(([name, entry]) => {
      const bytes = new Uint8Array(fs.readFileSync(entry.file));
      return [name, new ort.Tensor(entry.dtype, new ARRAYS[entry.dtype](bytes.buffer), entry.shape)];
    })));
  answer.outputs = [];
  for (const [number, feed] of feeds.entries()) {
    const outputs = await session.run(feed);
    answer.outputs.push(Object.fromEntries(session.outputNames.map((name, place) => {
      const { data, dims, type } = outputs[name];
      const file = `output${number}_${place}.bin`;
      fs.writeFileSync(path.join(folder, file), new Uint8Array(data.buffer, data.byteOffset, data.byteLength));
      return [name, { file, dtype: type, shape: [...dims] }];
    })));
  }
  session.endProfiling(); // prints it
  const taken = [];
  const timed = feeds.length ? await ort.InferenceSession.create(job.file, { ...options, enableProfiling: false }) : null;
  const warm = performance.now(); // until the engine has compiled all that runs often
  while (timed && performance.now() - warm < 2000 * job.times) await timed.run(feeds[0]);
  const enough = () => taken.length >= 3 && taken.reduce((a, b) => a + b, 0) >= 1000 * job.times;
  while (timed && !enough()) {
    const start = performance.now();
    await timed.run(feeds[0]);
    taken.push(performance.now() - start);
  }
  taken.sort((a, b) => a - b);
  answer.milliseconds = taken.length ? taken[Math.floor(taken.length / 10)] : null;
} catch (error) {
  answer.error = String(error && error.message ? error.message : error);
}
fs.writeFileSync(path.join(folder, "answer.json"), JSON.stringify(answer));
