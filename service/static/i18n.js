/**
 * The page's languages. `t("jobs.title")` is the text of a key in the chosen one; `{name}` in it is replaced.
 *
 * The texts of `i18n/LANGUAGE/PART.js` are loaded with the part of the page that shows them; the part's name is the first
 * word of its keys. A key that a language lacks fails a test. Numbers, dates and plural forms are `Intl`'s.
 */
import { signal } from "@preact/signals";

/** Tag -> the language's name in itself. */
export const LANGUAGES = { en: "English", "pt-BR": "Português" };

/** The chosen language's tag. What reads it is painted again when it changes. */
export const language = signal("en");

const texts = {};
const parts = new Set();

function preferred() {
  const stored = localStorage.getItem("nanomoe.language");
  if (stored in LANGUAGES) return stored;
  const first = navigator.languages.find((tag) => /^(en|pt)\b/i.test(tag)) ?? "en";
  return first.toLowerCase().startsWith("pt") ? "pt-BR" : "en";
}

const load = async (tag, names) => {
  const loaded = await Promise.all(names.map((name) => import(`./i18n/${tag}/${name}.js`)));
  texts[tag] = Object.assign(texts[tag] ?? {}, ...loaded.map((module) => module.default));
};

/** Choose a language, for later visits too; without a tag, the one of last time, or the browser's. */
export async function chooseLanguage(tag) {
  if (tag) localStorage.setItem("nanomoe.language", tag);
  const chosen = tag ?? preferred();
  await load(chosen, [...parts]);
  document.documentElement.lang = chosen;
  language.value = chosen;
}

/** Load the texts of some parts of the page in the chosen language. */
export async function loadTexts(...names) {
  for (const name of names) parts.add(name);
  await load(language.value, names);
}

const rules = {};
const pluralRules = (tag) => (rules[tag] ??= new Intl.PluralRules(tag));

/** The text of a key. `values.n` chooses between `one` and `other`, where the text has these forms. Nothing is `other` in
 * Portuguese, too, whose rules for numbers put 0 with 1. */
export function t(key, values = {}) {
  let text = texts[language.value]?.[key] ?? key;
  if (typeof text === "object") text = (values.n === 0 ? null : text[pluralRules(language.value).select(values.n)]) ?? text.other;
  return text.replace(/\{(\w+)\}/g, (whole, name) => values[name] ?? whole);
}

/** `{en, pt}`, as the API sends a text of its own, in the chosen language. */
export const pick = (both) => both[language.value.slice(0, 2)] ?? both.en;
