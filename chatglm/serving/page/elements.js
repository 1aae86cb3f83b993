/* Elements made from code, and elements made to equal a tree.

   Text reaches the page as text nodes only and every tag is named in our own files; innerHTML
   appears nowhere, so nothing a model writes can become markup.

   A tree node is a string or {tag, attributes, children}. `patch` changes only what differs: text
   that the reader has selected, a scrolled code block and a focused button outlive the growth of
   an answer. Rebuilding would drop them at every token. */

const SVG = "http://www.w3.org/2000/svg";

/** An element; attributes that start with "on" are listeners, absent ones are left out. */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

/** One of the icons that index.html defines. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  const use = document.createElementNS(SVG, "use");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  use.setAttribute("href", `#icon-${name}`);
  svg.append(use);
  return svg;
}

/** A tree node for `patch`. */
export function node(tag, attributes, children) {
  return { tag, attributes, children };
}

/** Make the children of an element equal to tree nodes. */
export function patch(parent, children) {
  children.forEach((child, position) => patchChild(parent, position, child));
  removeFrom(parent, children.length);
}

/** Make the child at this position equal to a tree node. */
export function patchChild(parent, position, child) {
  const old = parent.childNodes[position];
  if (!old) parent.append(create(child));
  else if (!isSame(old, child)) old.replaceWith(create(child));
  else if (typeof child === "string") extendText(old, child);
  else patch(old, child.children);
}

export function removeFrom(parent, position) {
  while (parent.childNodes.length > position) parent.lastChild.remove();
}

function create(child) {
  if (typeof child === "string") return document.createTextNode(child);
  return element(child.tag, child.attributes, ...child.children.map(create));
}

function isSame(old, child) {
  if (typeof child === "string") return old.nodeType === Node.TEXT_NODE;
  return (
    old.localName === child.tag &&
    Object.entries(child.attributes).every(([name, value]) => old.getAttribute(name) === value)
  );
}

function extendText(old, text) {
  if (old.data === text) return;
  if (text.startsWith(old.data)) old.appendData(text.slice(old.data.length));
  else old.data = text;
}
