/* Every text of the page, in both languages, and how it gets there.

   In index.html, data-text names the text of an element, data-label its name for screen readers
   and its tooltip, data-placeholder its placeholder. */

const TEXTS = {
  zh: {
    language: "English",
    otherLanguage: "en",
    title: "ChatGLM 对话",
    newChat: "新对话",
    conversations: "对话记录",
    noConversations: "还没有对话",
    openList: "打开对话记录",
    closeList: "关闭对话记录",
    deleteChat: "删除对话",
    deleted: "对话已删除",
    undo: "撤销",
    greeting: "今天想聊点什么？",
    examples: [
      "从南京到上海，一天怎么玩？",
      "用 Python 写一个快速排序，并解释它为什么快",
      "用表格比较绿茶、红茶和乌龙茶",
      "写一首关于秋天的短诗",
    ],
    question: "你的问题",
    askHere: "输入问题……",
    hint: "Enter 发送，Shift + Enter 换行。模型会出错，重要的事请核实。",
    send: "发送",
    stop: "停止回答",
    toLatest: "回到最新内容",
    you: "你",
    answering: "正在回答",
    answered: "回答完毕：",
    copy: "复制",
    copied: "已复制",
    regenerate: "重新回答",
    retry: "重试",
    stopped: "已停止",
    cutByLength: "回答到了长度上限，没有写完。可以在设置里放宽“最大长度”，或者让它“继续”。",
    tokens: "{tokens} token",
    speed: "{speed} token/s",
    settings: "设置",
    close: "关闭",
    model: "模型",
    temperature: "温度",
    temperatureHelp: "越低越稳定，越高越多样；0 总是选最可能的词。",
    topP: "Top-p",
    topPHelp: "只在概率最高、合计达到这个值的词里选。",
    maxTokens: "最大长度（token）",
    noLimit: "不限",
    seed: "随机种子",
    random: "随机",
    seedHelp: "种子相同、问题相同，回答就相同。",
    systemMessage: "系统提示",
    systemMessageHint: "例如：你是一位耐心的老师，回答要简短。",
    apiKey: "API 密钥",
    apiKeyHelp: "服务器要求时才需要。只保存在这个浏览器里。",
    showKey: "显示密钥",
    reset: "恢复默认",
    errorBusy: "服务器正忙，请在 {seconds} 秒后重试。",
    errorBusyOver: "服务器刚才正忙，现在可以重试了。",
    errorKey: "服务器需要 API 密钥，或者这个密钥不对。请在设置里填写，然后重试。",
    errorGone: "连不上服务器。请确认它在运行、网络通畅，然后重试。",
    errorBroken: "连接在回答中途断了。请重试。",
    errorRefused: "服务器没有接受这个问题：{message}",
    errorFailed: "服务器出错了：{message} 请重试。",
    errorStorage: "浏览器的存储空间不可用或已满，这个对话不会被保存。可以删除一些旧对话。",
  },
  en: {
    language: "中文",
    otherLanguage: "zh",
    title: "ChatGLM chat",
    newChat: "New chat",
    conversations: "Conversations",
    noConversations: "No conversations yet",
    openList: "Open the conversations",
    closeList: "Close the conversations",
    deleteChat: "Delete conversation",
    deleted: "Conversation deleted",
    undo: "Undo",
    greeting: "What’s on your mind today?",
    examples: [
      "How do I spend one day between Nanjing and Shanghai?",
      "Write quicksort in Python and explain why it is fast",
      "Compare green, black and oolong tea in a table",
      "Write a short poem about autumn",
    ],
    question: "Your question",
    askHere: "Ask a question…",
    hint: "Enter sends, Shift + Enter breaks the line. Models make mistakes: check what matters.",
    send: "Send",
    stop: "Stop the answer",
    toLatest: "To the latest text",
    you: "You",
    answering: "Answering",
    answered: "Answered: ",
    copy: "Copy",
    copied: "Copied",
    regenerate: "Answer again",
    retry: "Try again",
    stopped: "Stopped",
    cutByLength:
      "The answer reached its length limit. Allow more tokens in the settings, or ask it to go on.",
    tokens: "{tokens} tokens",
    speed: "{speed} tokens/s",
    settings: "Settings",
    close: "Close",
    model: "Model",
    temperature: "Temperature",
    temperatureHelp: "Lower is steadier, higher more varied; 0 always takes the likeliest word.",
    topP: "Top-p",
    topPHelp: "Chooses among the likeliest words that together reach this probability.",
    maxTokens: "Longest answer (tokens)",
    noLimit: "no limit",
    seed: "Seed",
    random: "random",
    seedHelp: "The same seed and question give the same answer.",
    systemMessage: "System message",
    systemMessageHint: "For example: You are a patient teacher. Answer briefly.",
    apiKey: "API key",
    apiKeyHelp: "Only if the server asks for one. It is kept in this browser only.",
    showKey: "Show the key",
    reset: "Back to the defaults",
    errorBusy: "The server is busy. Try again in {seconds} s.",
    errorBusyOver: "The server was busy. You can try again now.",
    errorKey:
      "The server needs an API key, or this one is wrong. Enter it in the settings and try again.",
    errorGone: "The server can’t be reached. See that it is running, then try again.",
    errorBroken: "The connection broke in the middle of the answer. Try again.",
    errorRefused: "The server did not accept the question: {message}",
    errorFailed: "The server failed: {message} Try again.",
    errorStorage:
      "The browser’s storage is full or switched off, so this conversation is not kept. " +
      "Deleting old ones may help.",
  },
};

let language = "en";

/** A text in the language of the page, its {names} filled in. */
export function text(name, values = {}) {
  const found = TEXTS[language][name];
  if (found === undefined) throw new Error(`there is no text ${name}`);
  if (typeof found !== "string") return found;
  return found.replace(/\{(\w+)\}/g, (_, value) => values[value]);
}

/** The language that the browser asks for. */
export function preferredLanguage() {
  return navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en";
}

/** Speak this language from now on, in everything that index.html holds. */
export function setLanguage(chosen) {
  language = chosen in TEXTS ? chosen : preferredLanguage();
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  document.title = text("title");
  for (const element of document.querySelectorAll("[data-text]")) {
    element.textContent = text(element.dataset.text);
  }
  for (const element of document.querySelectorAll("[data-label]")) {
    label(element, element.dataset.label);
  }
  for (const element of document.querySelectorAll("[data-placeholder]")) {
    element.placeholder = text(element.dataset.placeholder);
  }
}

/** Name an element for screen readers and in its tooltip. */
export function label(element, name) {
  element.dataset.label = name;
  element.setAttribute("aria-label", text(name));
  element.title = text(name);
}
