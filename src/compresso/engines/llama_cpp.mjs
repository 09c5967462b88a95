// Opens a GGUF file in llama.cpp (npm package node-llama-cpp) and prints what it computes, as one line of JSON.
// Arguments: the folder of node_modules. Standard input: {"file", "texts", "new_tokens"}.
// Printed: {"tokens": [[id, ...], ...], "greedy": [[id, ...], ...], "probabilities": [[[p of id 0, ...], ...], ...]}, one entry a text.
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const asked = JSON.parse(readFileSync(0, "utf8"));
const { getLlama, LlamaLogLevel } = await import(pathToFileURL(join(process.argv[2], "node-llama-cpp", "dist", "index.js")).href);
const lines = [];
const llama = await getLlama({
  gpu: false, build: "never", progressLogs: false, maxThreads: 1, logLevel: LlamaLogLevel.warn, logger: (_, message) => lines.push(message),
});
try {
  const model = await llama.loadModel({ modelPath: asked.file });
  const result = { tokens: [], greedy: [], probabilities: [] };
  for (const text of asked.texts) {
    const ids = [...(model.tokens.shouldPrependBosToken ? [model.tokens.bos] : []), ...model.tokenize(text)];
    // in half precision the cache, and flash attention, would differ from transformers by up to 1e-2
    const context = await model.createContext({
      contextSize: ids.length + asked.new_tokens + 8,
      flashAttention: false, experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32",
    });
    const greedy = [], probabilities = [];
    const steps = context.getSequence().evaluateWithMetadata(ids, { probabilities: true }, { temperature: 0, yieldEogToken: true });
    if (asked.new_tokens > 0) for await (const step of steps) {
      greedy.push(step.token);
      const row = [];
      for (const [id, p] of step.probabilities) row[id] = p;
      probabilities.push(Array.from(row, (p) => p ?? 0));
      if (greedy.length >= asked.new_tokens) break;
    }
    await context.dispose();
    result.tokens.push(ids);
    result.greedy.push(greedy);
    result.probabilities.push(probabilities);
  }
  process.stdout.write(JSON.stringify(result) + "\n", () => process.exit(0));
} catch (error) {
  console.error([...lines.map((line) => line.trim()).filter((line) => line), String(error)].slice(-4).join("; ").replaceAll("\n", " "));
  process.exit(1);
}
