/** The meaning of a knob in the chosen language: the API's own words, or the translation of `i18n/LANGUAGE/knobs.js`. */
import { language, loadTexts, t } from "../i18n.js";

await loadTexts("knobs");

export function knobHelp({ name, help }) {
  if (language.value === "en") return help;
  const key = `knobs.${name}`;
  const text = t(key);
  return text === key ? help : text;
}
