/* The server's /v1 calls: the list of models, and an answer as it is written.

   Addresses are relative, so that the page works below a path of a proxy as well. EventSource
   can't POST; the stream is read by hand. Its bytes may be split anywhere, also inside a
   character, and a line that starts with ":" only keeps the connection alive. */

const SECONDS_IF_UNSAID = 5;

/** What went wrong: busy, key, gone, broken, refused or failed. */
export class ServerError extends Error {
  constructor(kind, message = "", seconds = undefined) {
    super(message);
    this.kind = kind;
    this.seconds = seconds;
  }
}

/** The ids of the models and adapters that the server has. */
export async function fetchModels(apiKey) {
  const response = await request("v1/models", { headers: headersFor(apiKey) });
  return (await response.json()).data.map(({ id }) => id);
}

/**
 * The answer to the messages, as it comes: {piece}, then {finish: "stop" or "length"}, then
 * {tokens}. Throws a ServerError; when the signal aborts, an AbortError.
 */
export async function* streamAnswer(messages, settings, signal) {
  const response = await request("v1/chat/completions", {
    method: "POST",
    headers: { ...headersFor(settings.apiKey), "Content-Type": "application/json" },
    body: JSON.stringify(bodyFor(messages, settings)),
    signal,
  });
  for await (const data of eventsOf(response.body)) {
    if (data === "[DONE]") return;
    const { error, choices, usage } = JSON.parse(data);
    if (error) throw new ServerError("failed", error.message);
    const choice = choices[0];
    if (choice?.delta.content) yield { piece: choice.delta.content };
    if (choice?.finish_reason) yield { finish: choice.finish_reason };
    if (usage) yield { tokens: usage.completion_tokens };
  }
  throw new ServerError("broken");
}

const headersFor = (apiKey) => (apiKey ? { Authorization: `Bearer ${apiKey}` } : {});

/** The request; what the user left empty is left to the server. */
function bodyFor(messages, { model, temperature, topP, maxTokens, seed, systemMessage }) {
  const system = systemMessage.trim() ? [{ role: "system", content: systemMessage }] : [];
  return {
    model: model === "" ? undefined : model,
    messages: [...system, ...messages],
    stream: true,
    stream_options: { include_usage: true },
    temperature,
    top_p: topP,
    max_tokens: maxTokens === "" ? undefined : maxTokens,
    seed: seed === "" ? undefined : seed,
  };
}

async function request(address, options) {
  const response = await untilGone("gone", () => fetch(address, options));
  if (!response.ok) throw await errorOf(response);
  return response;
}

/** The data of each server-sent event. */
async function* eventsOf(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  try {
    while (true) {
      const { done, value } = await untilGone("broken", () => reader.read());
      if (done) return;
      const lines = (rest + decoder.decode(value, { stream: true })).split(/\r?\n/);
      rest = lines.pop();
      for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
    }
  } finally {
    reader.cancel().catch(() => {}); // of a stream that broke, it would tell the same again
  }
}

/** A lost connection is a TypeError in every browser; an abort is none and passes. */
async function untilGone(kind, call) {
  try {
    return await call();
  } catch (error) {
    if (error instanceof TypeError) throw new ServerError(kind);
    throw error;
  }
}

async function errorOf(response) {
  const message = await messageOf(response);
  const { status } = response;
  if (status === 401 || status === 403) return new ServerError("key", message);
  if (status === 429 || status === 503) {
    return new ServerError("busy", message, secondsOf(response.headers.get("Retry-After")));
  }
  return new ServerError(status < 500 ? "refused" : "failed", message);
}

async function messageOf(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `HTTP ${response.status}`; // a proxy's page, not our server's words
  }
}

function secondsOf(retryAfter) {
  const seconds = /^\d+$/.test(retryAfter ?? "") ? Number(retryAfter) : NaN;
  const untilDate = Math.ceil((Date.parse(retryAfter ?? "") - Date.now()) / 1000);
  return [seconds, untilDate].find((value) => value >= 0) ?? SECONDS_IF_UNSAID;
}
