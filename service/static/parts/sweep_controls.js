/** How far a sweep is, and what can be done with it. */
import { html } from "htm/preact";
import { useEffect, useState } from "preact/hooks";
import { get, mayChange, post, remove } from "../api.js";
import { count, duration } from "../format.js";
import { t } from "../i18n.js";
import { Confirm, Progress, Status, attempt, loadStyle, useData } from "./basics.js";
import { valueText } from "./compared.js";

await loadStyle("compare");

/** Number of a sweep's jobs with some statuses. */
const countOf = (sweep, ...statuses) => statuses.reduce((sum, status) => sum + (sweep.counts[status] ?? 0), 0);

/** Number of a sweep's jobs. */
export const sizeOf = (sweep) => Object.values(sweep.counts).reduce((sum, n) => sum + n, 0);

/** What varies, in words: `lr 1e-4, 5e-3; seed 42 – 44`. */
export const variesText = (sweep) =>
  sweep.parameters
    .map(({ name, values }) => `${name} ${values.length > 5 ? `${valueText(values[0])} … ${valueText(values[values.length - 1])}` : values.map(valueText).join(", ")}`)
    .join("; ");

/** A sweep, read again and again until all of its jobs have ended. */
export function useSweep(id) {
  const [every, setEvery] = useState(0);
  const { data: sweep, error, reload } = useData((abort) => get(`/sweeps/${id}`, {}, { signal: abort }), [id, every], { every });
  useEffect(() => {
    if (sweep) setEvery(countOf(sweep, "queued", "running", "paused") ? 2 : 0);
  }, [sweep]);
  return { sweep, error, reload };
}

/** Status, counts, a bar, and the time that is left. */
export function SweepProgress({ sweep }) {
  const n = sizeOf(sweep);
  return html`<div class="sweep-progress">
    <${Status} status=${sweep.status} />
    ${sweep.progress && countOf(sweep, "queued", "running", "paused") > 0 && html`<${Progress} percent=${sweep.progress.percent} label=${t("sweeps.progress")} />`}
    <span>${t("sweeps.done_of", { done: count(countOf(sweep, "succeeded", "failed", "cancelled")), n, all: count(n) })}</span>
    ${countOf(sweep, "failed") > 0 && html`<span class="status failed">✕ ${t("sweeps.failed", { n: countOf(sweep, "failed") })}</span>`}
    ${sweep.eta_seconds > 0 && html`<span class="muted">${t("sweeps.left", { time: duration(sweep.eta_seconds) })}</span>`}
    <span class="muted">${variesText(sweep)}</span>
  </div>`;
}

/** Buttons for what the sweep's state allows; none for one who may only read. */
export function SweepActions({ sweep, onDone, onDeleted, small }) {
  const [asks, ask] = useState(null);
  if (!mayChange()) return null;
  const size = small ? "small" : "";
  const act = (verb) => attempt(() => post(`/sweeps/${sweep.id}/${verb}`)).then(onDone);
  if (!mayChange()) return null;
  const isMoving = countOf(sweep, "queued", "running") > 0;
  const isPaused = countOf(sweep, "paused") > 0;
  return html`<span class="actions">
    ${isMoving && html`<button type="button" class=${size} onClick=${() => act("pause")}>${t("sweeps.pause")}</button>`}
    ${isPaused && html`<button type="button" class=${size} onClick=${() => act("resume")}>${t("sweeps.resume")}</button>`}
    ${(isMoving || isPaused) && html`<button type="button" class=${size} onClick=${() => ask("cancel")}>${t("sweeps.cancel")}</button>`}
    ${!isMoving && !isPaused && html`<button type="button" class="${small ? "plain" : "danger"} ${size}" onClick=${() => ask("delete")}>${t("sweeps.delete")}</button>`}
    ${asks === "cancel" &&
    html`<${Confirm} title=${t("sweeps.cancel_title")} text=${t("sweeps.cancel_text")} action=${t("sweeps.cancel")}
      onConfirm=${() => act("cancel")} onClose=${() => ask(null)} />`}
    ${asks === "delete" &&
    html`<${Confirm} title=${t("sweeps.delete_title")} text=${t("sweeps.delete_text", { n: sizeOf(sweep) })} action=${t("sweeps.delete")}
      onConfirm=${async () => (await attempt(() => remove(`/sweeps/${sweep.id}`))) && onDeleted?.()} onClose=${() => ask(null)} />`}
  </span>`;
}
