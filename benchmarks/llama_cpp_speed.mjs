// Times GGUF files in llama.cpp (npm package node-llama-cpp), in turn, one thread. Argument: the folder of node_modules.
// Standard input: {"files", "prompt": ids, "new_tokens", "rounds"}. Printed: {"prefill": [[s, ...], ...], "decode": [[s, ...], ...],
// "peak_kib"}, one row a file; the first round of each is not counted.
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const asked = JSON.parse(readFileSync(0, "utf8"));
const { getLlama, LlamaLogLevel } = await import(pathToFileURL(join(process.argv[2], "node-llama-cpp", "dist", "index.js")).href);
const llama = await getLlama({ gpu: false, build: "never", progressLogs: false, maxThreads: 1, logLevel: LlamaLogLevel.error });
const sequences = [];
for (const modelPath of asked.files) {
  const model = await llama.loadModel({ modelPath });
  const context = await model.createContext({ contextSize: asked.prompt.length + asked.new_tokens + 8, threads: 1 });
  sequences.push(context.getSequence());
}
const told = { prefill: asked.files.map(() => []), decode: asked.files.map(() => []) };
for (let round = 0; round <= asked.rounds; round++) {
  for (const [i, sequence] of sequences.entries()) {
    await sequence.clearHistory();
    const begun = performance.now();
    await sequence.evaluateWithoutGeneratingNewTokens(asked.prompt.slice(0, -1));
    const read = performance.now();
    let n = 0;
    for await (const _ of sequence.evaluate(asked.prompt.slice(-1), { temperature: 0, yieldEogToken: true })) if (++n >= asked.new_tokens) break;
    if (round > 0) {
      told.prefill[i].push((read - begun) / 1000);
      told.decode[i].push((performance.now() - read) / 1000);
    }
  }
}
// resourceUsage().maxRSS would count what the process that started this one held
told.peak_kib = Number(/VmHWM:\s+(\d+)/.exec(readFileSync("/proc/self/status", "utf8"))[1]);
process.stdout.write(JSON.stringify(told) + "\n", () => process.exit(0));
