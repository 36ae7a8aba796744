/** What every view is made of: loading data, statuses, figures, errors, dialogs, notices. */
import { signal } from "@preact/signals";
import { html } from "htm/preact";
import { useEffect, useId, useRef, useState } from "preact/hooks";
import { mayChange } from "../api.js";
import { t } from "../i18n.js";

/**
 * Data of the API for a component: `{data, error, isStale, reload}`.
 *
 * `load(signal)` returns a promise; it is called anew when one of `inputs` changes, every `every` seconds while the page
 * can be seen, and by `reload`. The old data stays until the new is there, and while nobody answers.
 */
export function useData(load, inputs, { every = 0 } = {}) {
  const [state, setState] = useState({ data: null, error: null, isStale: true });
  const reload = useRef(() => {});
  useEffect(() => {
    let timer = 0;
    let aborter = null;
    let isOver = false;
    const run = async () => {
      clearTimeout(timer);
      aborter?.abort();
      const mine = (aborter = new AbortController());
      let again = every;
      try {
        const data = await load(mine.signal);
        if (!mine.signal.aborted) setState({ data, error: null, isStale: false });
      } catch (error) {
        if (mine.signal.aborted) return;
        // A service that restarts is no error of what was asked.
        if (error.code === "unreachable" || error.status === 503) again = 1;
        setState((before) => ({ ...before, error, isStale: false }));
      }
      if (again && !isOver && mine === aborter) timer = setTimeout(wake, again * 1000);
    };
    const wake = () => {
      if (document.visibilityState === "visible") run();
    };
    reload.current = run;
    setState((before) => ({ ...before, isStale: true }));
    run();
    document.addEventListener("visibilitychange", wake);
    return () => {
      isOver = true;
      clearTimeout(timer);
      aborter?.abort();
      document.removeEventListener("visibilitychange", wake);
    };
  }, inputs);
  return { ...state, reload: () => reload.current() };
}

/** Set the title of the document while a component is shown. */
export function useTitle(title) {
  useEffect(() => {
    document.title = title ? `${title} · nanomoe` : "nanomoe";
  }, [title]);
}

/** A value that follows `value` once it has been the same for `ms` milliseconds. */
export function useSettled(value, ms = 250) {
  const [settled, settle] = useState(value);
  useEffect(() => {
    const timer = setTimeout(() => settle(value), ms);
    return () => clearTimeout(timer);
  }, [value, ms]);
  return settled;
}

/** A number that grows whenever the colours change: something that paints on a canvas takes it as an input. */
export function useTheme() {
  const [n, setN] = useState(0);
  useEffect(() => {
    const changed = () => setN((before) => before + 1);
    const system = matchMedia("(prefers-color-scheme: dark)");
    addEventListener("nanomoe:theme", changed);
    system.addEventListener("change", changed);
    return () => {
      removeEventListener("nanomoe:theme", changed);
      system.removeEventListener("change", changed);
    };
  }, []);
  return n;
}

const styles = new Set();

/** Load `style/NAME.css`; a module waits for it at its top, so that nothing is painted without. */
export function loadStyle(name) {
  if (styles.has(name) || document.querySelector(`link[href="/static/style/${name}.css"]`)) return Promise.resolve();
  styles.add(name);
  const link = Object.assign(document.createElement("link"), { rel: "stylesheet", href: `/static/style/${name}.css` });
  return new Promise((resolve) => {
    link.onload = link.onerror = resolve;
    document.head.append(link);
  });
}

/** A colour of base.css as a canvas takes it: `cssColor("accent")` is `rgb(11, 92, 173)`. */
export function cssColor(name) {
  const probe = document.createElement("span");
  probe.style.color = `var(--${name})`;
  document.body.append(probe);
  const color = getComputedStyle(probe).color;
  probe.remove();
  return color;
}

const SIGNS = { queued: "○", running: "◐", paused: "‖", succeeded: "●", failed: "✕", cancelled: "⊘" };

/** A job's or a sweep's status: a sign, a colour and the word, so that none of them is needed alone. */
export const Status = ({ status }) => html`<span class="status ${status}">
  <span class="sign" aria-hidden="true">${SIGNS[status]}</span>${t(`common.status.${status}`)}
</span>`;

/** A progress bar with its percentage, of 100. */
export const Progress = ({ percent, label }) => html`<span
  class="bar"
  role="progressbar"
  aria-valuenow=${Math.round(percent)}
  aria-valuemin="0"
  aria-valuemax="100"
  aria-label=${label}
>
  <span style=${{ inlineSize: `${percent}%` }}></span>
</span>`;

/** Why what changes something is not there, or cannot be pressed, for one who may only read; nothing for others. */
export const OnlyReads = () => (mayChange() ? null : html`<p class="muted">${t("common.only_reads")}</p>`);

/** Lines in the place of what is still to come. */
export const Skeleton = ({ lines = 3 }) => html`<div class="skeleton" aria-hidden="true">
  ${Array.from({ length: lines }, (_, n) => html`<span key=${n}></span>`)}
</div>`;

/** An error of the API, in its own words. Nothing for one that will pass: the frame says that the connection is lost. */
export function ErrorBox({ error }) {
  if (!error || error.code === "unreachable" || error.status === 503) return null;
  return html`<div class="error" role="alert">
    <p>${error.message}</p>
    ${error.errors?.length > 0 &&
    html`<ul>
      ${error.errors.map(({ loc, msg }) => html`<li><code>${loc.join(".")}</code> ${msg}</li>`)}
    </ul>`}
  </div>`;
}

/** A heading of a part of a view, with what can be done there on its right. */
export const Section = ({ title, actions, children, id }) => html`<section class="part" id=${id}>
  <div class="part-head">
    <h2>${title}</h2>
    ${actions}
  </div>
  ${children}
</section>`;

/** A question mark that shows a text about `label` on hover, focus and touch. */
export function Help({ text, label }) {
  const id = useId();
  return html`<span class="help">
    <button type="button" aria-label=${t("common.help_on", { label })} aria-describedby=${id}>?</button>
    <span class="bubble" role="tooltip" id=${id}>${text}</span>
  </span>`;
}

/** Text to copy: a block of code with a button. */
export function Code({ text, label }) {
  const [copied, setCopied] = useState(false);
  const copy = async () => {
    await navigator.clipboard.writeText(text);
    setCopied(true);
    setTimeout(() => setCopied(false), 1500);
  };
  return html`<div class="code">
    <pre tabindex="0" aria-label=${label}><code>${text}</code></pre>
    <button type="button" class="small" onClick=${copy}>${copied ? t("common.copied") : t("common.copy")}</button>
  </div>`;
}

/** A dialog that asks before something that cannot be undone. */
export function Confirm({ title, text, action, onConfirm, onClose }) {
  const dialog = useRef();
  useEffect(() => dialog.current.showModal(), []);
  return html`<dialog ref=${dialog} onClose=${onClose} aria-labelledby="confirm-title">
    <h2 id="confirm-title">${title}</h2>
    <p>${text}</p>
    <form method="dialog" class="actions">
      <button>${t("common.no")}</button>
      <button class="danger" onClick=${onConfirm}>${action}</button>
    </form>
  </dialog>`;
}

const notices = signal([]);
let lastNotice = 0;

/** Say something at the page's edge for some seconds: what was done, or why it was not. */
export function notify(text, kind = "info") {
  const id = ++lastNotice;
  notices.value = [...notices.value, { id, text, kind }];
  setTimeout(() => {
    notices.value = notices.value.filter((one) => one.id !== id);
  }, kind === "error" ? 10_000 : 4000);
}

/** Do something and say why where it fails. Returns whether it did. */
export async function attempt(action) {
  try {
    await action();
    return true;
  } catch (error) {
    notify(error.code === "unreachable" ? t("common.unreachable") : error.message, "error");
    return false;
  }
}

/** Where notices show. */
export const Toasts = () => html`<div class="toasts" role="status">
  ${notices.value.map((one) => html`<p key=${one.id} class=${one.kind}>${one.text}</p>`)}
</div>`;
