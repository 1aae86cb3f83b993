/* The settings: a dialog whose every change holds at once and is kept. */

import { element } from "./elements.js";
import { DEFAULT_SETTINGS, loadSettings, saveSettings } from "./storage.js";

const NUMBERS = ["temperature", "topP", "maxTokens", "seed"];

export class SettingsDialog {
  values = loadSettings();

  /** Calls `onChange` with the name of a setting once its change is complete. */
  constructor(dialog, onChange) {
    this.dialog = dialog;
    this.form = dialog.querySelector("form");
    this.form.addEventListener("input", ({ target }) => this.#take(target));
    this.form.addEventListener("change", ({ target }) => onChange(target.name));
    this.form.addEventListener("submit", (event) => this.#close(event));
    dialog.addEventListener("click", ({ target }) => target === dialog && dialog.close());
    dialog.querySelector("#reset").addEventListener("click", () => this.#reset());
    dialog.querySelector("#show-key").addEventListener("change", ({ target }) => {
      this.form.elements.apiKey.type = target.checked ? "text" : "password";
    });
    this.#show();
  }

  /** Open the dialog at a field. */
  open(name = undefined) {
    this.#show();
    if (!this.dialog.open) this.dialog.showModal();
    if (name) this.form.elements[name].focus();
  }

  /** Offer these models; a chosen one that is gone gives way to the first. */
  offerModels(models) {
    const { model } = this.form.elements;
    model.replaceChildren(...models.map((id) => element("option", { value: id }, id)));
    if (models.length && !models.includes(this.values.model)) this.#set("model", models[0]);
    this.#show();
  }

  #take(field) {
    if (!(field.name in DEFAULT_SETTINGS) || !field.validity.valid) return;
    const isNumber = NUMBERS.includes(field.name) && field.value !== "";
    this.#set(field.name, isNumber ? Number(field.value) : field.value.trim());
    this.#showNumbers();
  }

  #set(name, value) {
    this.values[name] = value;
    saveSettings(this.values);
  }

  #reset() {
    // The key and the model say where one is, not how answers shall be.
    const { model, apiKey } = this.values;
    this.values = { ...DEFAULT_SETTINGS, model, apiKey };
    saveSettings(this.values);
    this.#show();
  }

  #close(event) {
    event.preventDefault();
    this.dialog.close();
  }

  #show() {
    for (const [name, value] of Object.entries(this.values)) {
      const field = this.form.elements[name];
      if (field) field.value = value;
    }
    this.#showNumbers();
  }

  #showNumbers() {
    for (const output of this.form.querySelectorAll("output")) {
      output.value = Number(this.form.elements[output.htmlFor.value].value).toFixed(2);
    }
  }
}
