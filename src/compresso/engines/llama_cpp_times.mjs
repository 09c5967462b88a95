// Times single forwards of GGUF files in llama.cpp (npm package node-llama-cpp), the files in turn.
// Arguments: the folder of node_modules. Standard input: {"files", "prompt": [id, ...], "phase", "forwards", "rounds", "threads"}.
// Printed: [[milliseconds, ...], ...], one row a file; the first turn of each is not counted.
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const asked = JSON.parse(readFileSync(0, "utf8"));
const { getLlama, LlamaLogLevel } = await import(pathToFileURL(join(process.argv[2], "node-llama-cpp", "dist", "index.js")).href);
const llama = await getLlama({
  gpu: false, build: "never", progressLogs: false, maxThreads: asked.threads, logLevel: LlamaLogLevel.error,
});
const decoding = asked.phase === "decode", forwards = decoding ? asked.forwards : 1;
const length = decoding ? Math.max(1, asked.prompt.length - Math.floor(forwards / 2)) : asked.prompt.length;
const ids = asked.prompt.slice(0, length);
const sequences = [];
for (const modelPath of asked.files) {
  const model = await llama.loadModel({ modelPath });
  const context = await model.createContext({
    contextSize: length + forwards + 8, batchSize: length + 8, threads: asked.threads,
  });
  sequences.push(context.getSequence());
}
const told = sequences.map(() => []);
for (let round = 0; round <= asked.rounds; round++) {
  for (const [i, sequence] of sequences.entries()) {
    await sequence.clearHistory();
    const begun = performance.now();
    await sequence.evaluateWithoutGeneratingNewTokens(decoding ? ids.slice(0, -1) : ids);
    if (!decoding) {
      if (round > 0) told[i].push(performance.now() - begun);
      continue;
    }
    let last = performance.now(), n = 0;
    for await (const _ of sequence.evaluate(ids.slice(-1), { temperature: 0, yieldEogToken: true })) {
      const now = performance.now();
      if (round > 0) told[i].push(now - last);
      last = now;
      if (++n >= forwards) break;
    }
  }
}
process.stdout.write(JSON.stringify(told) + "\n", () => process.exit(0));
