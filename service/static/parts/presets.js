/** The ready experiments of the service. */
import { html } from "htm/preact";
import { useState } from "preact/hooks";
import { get, mayChange, post } from "../api.js";
import { pick, t } from "../i18n.js";
import { Skeleton, attempt, useData } from "./basics.js";
import { valueText } from "./compared.js";
import { withCode } from "./inline_code.js";

let asked = null;

/** The ready experiments, asked for once; null until they are there, and an empty list where they cannot be had. */
export function usePresets() {
  const { data, error } = useData(() => {
    asked ??= get("/presets").then(({ data: found }) => found);
    asked.catch(() => (asked = null));
    return asked;
  }, []);
  return data ?? (error && error.code !== "unreachable" ? [] : null);
}

/** What an experiment trains, in words: `6 jobs: dropout 0, 0.2; 3 seeds`. */
function runsText({ grid, points, seeds = 1 }) {
  const names = [...new Set(points?.flatMap(Object.keys) ?? Object.keys(grid ?? {}))];
  const valuesOf = (name) => (points ? points.filter((point) => name in point).map((point) => point[name]) : grid[name]);
  const nOfGrid = Object.values(grid ?? {}).reduce((n, values) => n * values.length, 1);
  // A text that varies is too long to be shown.
  const varied = names.map((name) => (name === "text" ? name : `${name} ${valuesOf(name).map(valueText).join(", ")}`));
  const n = (points?.length ?? nOfGrid) * seeds;
  return t("sweeps.runs", { n, what: [...varied, t("sweeps.seeds", { n: seeds })].join("; ") });
}

/** The ready experiments, each with a button that runs it. `onRun(sweep, preset)` is called once it is submitted. */
export function PresetList({ presets, onRun }) {
  const [busy, setBusy] = useState(null);
  if (!presets) return html`<${Skeleton} />`;
  const run = async (preset) => {
    setBusy(preset.name);
    await attempt(async () => onRun(await post("/sweeps", { ...preset.sweep, name: preset.name }), preset));
    setBusy(null);
  };
  return html`<ul class="experiments">
    ${presets.map(
      (preset) => html`<li key=${preset.name} class="card">
        <h3>${preset.name}</h3>
        <p>${withCode(pick(preset.look_at))}</p>
        <p class="runs">${runsText(preset.sweep)}</p>
        <button type="button" disabled=${busy !== null || !mayChange()} onClick=${() => run(preset)} aria-label=${t("sweeps.run_named", { name: preset.name })}>
          ${t(busy === preset.name ? "sweeps.submitting" : "sweeps.run")}</button>
      </li>`,
    )}
  </ul>`;
}
