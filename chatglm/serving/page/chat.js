/* The chat page: a list of conversations, the one that is open, and a line to ask in.

   What happens in a conversation is its data (storage.js); the page shows it. An answer goes on
   while another conversation is open. The address names the open conversation, so that reload,
   back and a second tab work by themselves. */

import { ServerError, fetchModels, streamAnswer } from "./completions.js";
import { element, icon } from "./elements.js";
import { RoundView, errorText } from "./rounds.js";
import { EndFollower } from "./scrolling.js";
import { SettingsDialog } from "./settings.js";
import {
  deleteConversation,
  loadConversation,
  loadConversations,
  loadLanguage,
  newConversation,
  onConversationOfAnotherTab,
  saveConversation,
  saveLanguage,
} from "./storage.js";
import { label, setLanguage, text } from "./texts.js";

const NOTICE_MS = 8000;
const LEAVING_MS = 500;

const byId = (id) => document.getElementById(id);
const question = byId("question");
const end = new EndFollower(byId("scroller"), byId("rounds"), byId("to-latest"));
const settings = new SettingsDialog(byId("settings"), onSettingChanged);
const conversations = new Map(loadConversations().map((found) => [found.id, found]));
const running = new Map(); // round: the AbortController of its answer
const views = new Map(); // round: its RoundView, of the open conversation only
const changed = new Set(); // rounds to be shown anew in the next frame
let current;

// ---- asking

function send() {
  const asked = question.value.trim();
  if (asked === "" || isRunning()) return;
  question.value = "";
  fitQuestion();
  const round = { question: asked, answer: "", state: "running" };
  current.rounds.push(round);
  if (!conversations.has(current.id)) history.replaceState(null, "", `#${current.id}`);
  conversations.set(current.id, current);
  addView(round);
  showWelcome();
  ask(current, round);
}

const lastRound = () => current.rounds.at(-1);
const isRunning = () => running.has(lastRound());

/** Ask the server for the answer of a round; an answer that it already has is replaced. */
async function ask(conversation, round) {
  const controller = new AbortController();
  const answerBefore = round.answer;
  running.set(round, controller);
  Object.assign(round, { answer: "", state: "running" });
  for (const name of ["error", "tokens", "speed"]) delete round[name];
  end.stick();
  keep(conversation);
  show(round);
  announce(text("answering"));
  try {
    await receive(conversation, round, controller.signal);
  } catch (error) {
    // The browser breaks the connections of a page before it leaves it: nothing to complain of.
    if (error.kind === "broken") await new Promise((resolve) => setTimeout(resolve, LEAVING_MS));
    fail(round, error);
    round.answer ||= answerBefore;
  }
  running.delete(round);
  keep(conversation);
  show(round);
  announce(round.error ? "" : text("answered") + round.answer);
}

async function receive(conversation, round, signal) {
  const stream = streamAnswer(messagesUntil(conversation, round), settings.values, signal);
  let startedAt, endedAt;
  let state = "done";
  for await (const { piece, finish, tokens } of stream) {
    if (piece !== undefined) {
      startedAt ??= performance.now();
      endedAt = performance.now();
      round.answer += piece;
      showInNextFrame(round);
    }
    if (finish === "length") state = "length";
    if (tokens !== undefined) {
      Object.assign(round, { tokens, speed: speedOf(tokens, startedAt, endedAt) });
    }
  }
  round.state = state;
}

/** Tokens per second after the first one, whose time is that of the question. */
function speedOf(tokens, startedAt, endedAt) {
  const seconds = (endedAt - startedAt) / 1000;
  return tokens > 1 && seconds > 0.1 ? (tokens - 1) / seconds : undefined;
}

function fail(round, error) {
  if (error.name === "AbortError") {
    round.state = "stopped";
    return;
  }
  if (!(error instanceof ServerError)) console.error(error);
  const { kind = "failed", message, seconds } = error;
  const retryAt = seconds === undefined ? undefined : Date.now() + seconds * 1000;
  Object.assign(round, { state: "failed", error: { kind, message, retryAt } });
  if (kind === "key") openKey();
}

/** What the model is told: the rounds that have an answer, and the question. */
function messagesUntil({ rounds }, asked) {
  const before = rounds.slice(0, rounds.indexOf(asked)).filter(({ answer }) => answer !== "");
  const messages = before.flatMap((round) => [
    { role: "user", content: round.question },
    { role: "assistant", content: round.answer },
  ]);
  return [...messages, { role: "user", content: asked.question }];
}

// ---- showing

function open(conversation) {
  current = conversation;
  views.forEach((view) => view.close());
  views.clear();
  byId("rounds").replaceChildren();
  conversation.rounds.forEach(addView);
  showWelcome();
  showList();
  showSendButton();
  end.stick();
}

function openFromAddress() {
  open(conversations.get(location.hash.slice(1)) ?? newConversation());
  closeList();
}

function openNew() {
  history.pushState(null, "", location.pathname + location.search);
  openFromAddress();
  question.focus();
}

function addView(round) {
  const view = new RoundView(round, {
    onRetry: () => ask(current, round),
    onSettings: openKey,
  });
  views.set(round, view);
  byId("rounds").append(view.element);
}

function show(round) {
  views.get(round)?.update();
  showSendButton();
}

function showInNextFrame(round) {
  if (changed.size === 0) requestAnimationFrame(showChanged);
  changed.add(round);
}

function showChanged() {
  for (const round of changed) views.get(round)?.update();
  changed.clear();
}

function showWelcome() {
  byId("welcome").hidden = current.rounds.length > 0;
  const examples = text("examples").map((example) =>
    element("button", { type: "button", onclick: () => askExample(example) }, example),
  );
  byId("examples").replaceChildren(...examples);
}

function askExample(example) {
  question.value = example;
  send();
  question.focus();
}

function showSendButton() {
  const button = byId("send");
  const name = isRunning() ? "stop" : "send";
  if (button.dataset.label !== name) button.firstElementChild.replaceWith(icon(name));
  label(button, name);
  button.disabled = !isRunning() && question.value.trim() === "";
}

function fitQuestion() {
  question.style.height = "auto";
  question.style.height = `${question.scrollHeight}px`;
  showSendButton();
}

function announce(words) {
  byId("announcer").textContent = words;
}

/** Say something in one line, with a button for what can be done about it. */
function notify(words, actionName, action) {
  const notice = byId("notice");
  const onclick = () => {
    notice.replaceChildren();
    action();
  };
  const button = element("button", { type: "button", class: "quiet", onclick }, text(actionName));
  const line = element("p", {}, element("span", {}, words), button);
  notice.replaceChildren(line);
  return line;
}

// ---- the list of conversations

/** Save a conversation, unless it was deleted while its answer came. */
function keep(conversation) {
  if (!conversations.has(conversation.id)) return;
  conversation.changedAt = Date.now();
  if (!saveConversation(conversation)) notify(text("errorStorage"), "close", () => {});
  showList();
}

function showList() {
  const sorted = [...conversations.values()].sort((one, other) => other.changedAt - one.changedAt);
  byId("conversations").replaceChildren(...sorted.map(listItem));
  byId("no-conversations").hidden = sorted.length > 0;
}

function listItem(conversation) {
  const title = conversation.rounds[0].question;
  const isCurrent = conversation === current ? "true" : undefined;
  const onclick = () => remove(conversation);
  const button = element("button", { type: "button", class: "round-button", onclick });
  button.append(icon("delete"));
  label(button, "deleteChat");
  const address = { href: `#${conversation.id}`, "aria-current": isCurrent };
  return element("li", {}, element("a", { ...address, title }, title), button);
}

function remove(conversation) {
  running.get(conversation.rounds.at(-1))?.abort();
  conversations.delete(conversation.id);
  deleteConversation(conversation);
  if (conversation === current) openNew();
  else showList();
  const line = notify(text("deleted"), "undo", () => {
    conversations.set(conversation.id, conversation);
    saveConversation(conversation);
    showList();
  });
  setTimeout(() => line.remove(), NOTICE_MS);
}

function openList() {
  document.body.classList.add("list-open");
  document.querySelector("main").inert = true;
  byId("close-list").focus();
}

function closeList() {
  document.body.classList.remove("list-open");
  document.querySelector("main").inert = false;
}

function takeFromAnotherTab(id) {
  if (running.has(conversations.get(id)?.rounds.at(-1))) return;
  const found = loadConversation(id);
  if (found) conversations.set(id, found);
  else conversations.delete(id);
  if (id === current.id) open(found ?? newConversation());
  else showList();
}

// ---- settings and language

async function loadModels() {
  try {
    settings.offerModels(await fetchModels(settings.values.apiKey));
    byId("notice").replaceChildren();
  } catch (error) {
    if (!(error instanceof ServerError)) throw error;
    if (error.kind === "key") notify(errorText(error), "settings", openKey);
    else notify(errorText(error), "retry", loadModels);
  }
  showModel();
}

function onSettingChanged(name) {
  if (name === "apiKey") loadModels();
  showModel();
}

function openKey() {
  settings.open("apiKey");
}

function showModel() {
  byId("model-name").textContent = settings.values.model || "ChatGLM";
}

function speak(language) {
  setLanguage(language);
  open(current);
}

function switchLanguage() {
  const language = text("otherLanguage");
  saveLanguage(language);
  speak(language);
}

// ---- what the user does

function onKey(event) {
  // Enter that picks a word of an input method; Safari tells only by the key code.
  if (event.isComposing || event.keyCode === 229) return;
  if (event.key !== "Enter" || event.shiftKey) return;
  event.preventDefault();
  send();
}

function onSubmit(event) {
  event.preventDefault();
  if (isRunning()) running.get(lastRound()).abort();
  else send();
}

/** A phone may end a hidden page without a word: what has come is saved now. */
function saveRunning() {
  for (const conversation of conversations.values()) {
    if (running.has(conversation.rounds.at(-1))) saveConversation(conversation);
  }
}

function start() {
  current = conversations.get(location.hash.slice(1)) ?? newConversation();
  speak(loadLanguage());
  showModel();
  question.addEventListener("keydown", onKey);
  question.addEventListener("input", fitQuestion);
  byId("composer").addEventListener("submit", onSubmit);
  byId("new-chat").addEventListener("click", openNew);
  byId("new-chat-narrow").addEventListener("click", openNew);
  byId("open-settings").addEventListener("click", () => settings.open());
  byId("model-name").addEventListener("click", () => settings.open("model"));
  byId("switch-language").addEventListener("click", switchLanguage);
  byId("open-list").addEventListener("click", openList);
  byId("close-list").addEventListener("click", closeList);
  byId("scrim").addEventListener("click", closeList);
  document.addEventListener("keydown", ({ key }) => key === "Escape" && closeList());
  document.addEventListener("visibilitychange", saveRunning);
  addEventListener("pagehide", saveRunning);
  addEventListener("popstate", openFromAddress);
  onConversationOfAnotherTab(takeFromAnotherTab);
  loadModels();
}

start();
