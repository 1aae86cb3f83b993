/* What the browser keeps: settings, language and conversations.

   Each conversation has an entry of its own, so that two tabs do not overwrite each other's. A
   conversation is {id, changedAt, rounds}; a round is {question, answer, state, ...} with the
   states running, done, length, stopped and failed. Storage may be full, switched off, or hold
   what another version wrote: reading gives what can be used, writing says whether it went well. */

const PREFIX = "chatglm.";
const CONVERSATION = `${PREFIX}conversation.`;

export const DEFAULT_SETTINGS = Object.freeze({
  model: "",
  temperature: 0.95,
  topP: 0.7,
  maxTokens: "",
  seed: "",
  systemMessage: "",
  apiKey: "",
});

export function loadSettings() {
  return { ...DEFAULT_SETTINGS, ...read(`${PREFIX}settings`) };
}

export function saveSettings(settings) {
  return write(`${PREFIX}settings`, settings);
}

export function loadLanguage() {
  return read(`${PREFIX}language`);
}

export function saveLanguage(language) {
  return write(`${PREFIX}language`, language);
}

/** A conversation without rounds. crypto.randomUUID is missing on plain http. */
export function newConversation() {
  const id = Date.now().toString(36) + Math.random().toString(36).slice(2, 8);
  return { id, changedAt: Date.now(), rounds: [] };
}

/** The conversation with this id, or undefined. */
export function loadConversation(id) {
  const found = read(CONVERSATION + id);
  if (!Array.isArray(found?.rounds) || found.rounds.length === 0) return undefined;
  const last = found.rounds.at(-1);
  if (last.state === "running") last.state = "stopped"; // by the end of its page
  return found;
}

/** Every conversation, the last changed first. */
export function loadConversations() {
  return keys()
    .filter((key) => key.startsWith(CONVERSATION))
    .map((key) => loadConversation(key.slice(CONVERSATION.length)))
    .filter(Boolean)
    .sort((one, other) => other.changedAt - one.changedAt);
}

export function saveConversation(conversation) {
  return write(CONVERSATION + conversation.id, conversation);
}

export function deleteConversation({ id }) {
  attempt(() => localStorage.removeItem(CONVERSATION + id));
}

/** Call with the id of a conversation that another tab has changed or deleted. */
export function onConversationOfAnotherTab(call) {
  addEventListener("storage", ({ key }) => {
    if (key?.startsWith(CONVERSATION)) call(key.slice(CONVERSATION.length));
  });
}

const keys = () => attempt(() => Object.keys(localStorage)) ?? [];
const read = (key) => attempt(() => JSON.parse(localStorage.getItem(key))) ?? undefined;

function write(key, value) {
  return attempt(() => localStorage.setItem(key, JSON.stringify(value)) ?? true) ?? false;
}

function attempt(call) {
  try {
    return call();
  } catch {
    return undefined;
  }
}
