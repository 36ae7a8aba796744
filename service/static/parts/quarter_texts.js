/** What checkpoints say of their training text, side by side: figures, the text coloured by its loss, the continuation. */
import { signal } from "@preact/signals";
import { html } from "htm/preact";
import { useMemo } from "preact/hooks";
import { get, request } from "../api.js";
import { figure, percent as share } from "../format.js";
import { t } from "../i18n.js";
import { href } from "../router.js";
import { ErrorBox, Skeleton, loadStyle, useData } from "./basics.js";
import { groupsOf, hasBroken } from "./characters.js";
import { Tokens, lossClass, visible } from "./tokens.js";

await loadStyle("compare");

const MOST_TOKENS = 300;

/** The step series is not looked at here: as few of it as the API gives. */
const FEWEST_POINTS = 8;

const kept = new Map();

const tokenText = (token) => token.target;

/** The first bytes of a job's text; the rest of a long one is not waited for. */
async function firstBytes(jobId, n, abort) {
  const reader = (await request("GET", `/jobs/${jobId}/text`, { signal: abort })).body.getReader();
  const found = new Uint8Array(n);
  for (let length = 0; length < n; ) {
    const { done, value } = await reader.read();
    if (done) return found.subarray(0, length);
    found.set(value.subarray(0, n - length), length);
    length += value.length;
  }
  reader.cancel().catch(() => {});
  return found;
}

/** Tokens that share a character as one, with the text that they make together and the largest of their losses. */
const joined = (tokens, bytes) =>
  groupsOf(tokens, bytes).map(({ text, tokens: group }) => {
    if (group.length === 1) return group[0];
    const isRight = group.every(({ target, predicted }) => target === predicted);
    const predicted = isRight ? text : group.map((token) => token.predicted).join("");
    return { target: text, predicted, loss: Math.max(...group.map(({ loss }) => loss)) };
  });

async function reconstruction(jobId, percent, abort) {
  const { data: tokens, n_tokens: n } = await get(`/jobs/${jobId}/checkpoints/${percent}/reconstruction`, { count: MOST_TOKENS + 1 }, { signal: abort });
  const isCut = n > MOST_TOKENS;
  const shown = tokens.slice(0, MOST_TOKENS);
  const last = tokens[MOST_TOKENS] ?? null;
  if (!hasBroken(shown, tokenText)) return { tokens: shown, isCut };
  // A token that is a part of a character cannot be shown by itself: the text says which character it is.
  const end = last?.byte_offset ?? shown[shown.length - 1].byte_offset + 4;
  return { tokens: joined(shown, await firstBytes(jobId, end, abort)), isCut };
}

/** A checkpoint with the first of its reconstruction; what was recorded does not change, so it is asked for once. */
function read(jobId, percent, abort) {
  const key = `${jobId}@${percent}`;
  if (!kept.has(key)) {
    const both = Promise.all([
      get(`/jobs/${jobId}/metrics`, { points: FEWEST_POINTS, tokens: false }, { signal: abort }),
      reconstruction(jobId, percent, abort),
    ]).then(([{ checkpoints }, found]) => ({ ...checkpoints.find((one) => one.percent === percent), ...found }));
    kept.set(key, both);
    both.catch(() => kept.delete(key));
  }
  return kept.get(key);
}

/** `columns`: `[{jobId, percent, title, color}]`. A token that is pointed at in one column is so in all. */
export function QuarterTexts({ columns }) {
  const pointed = useMemo(() => signal(null), []);
  return html`<div class="texts">
    ${columns.map((column) => html`<${Column} key=${`${column.jobId}@${column.percent}`} ...${column} pointed=${pointed} />`)}
  </div>`;
}

function Column({ jobId, percent, title, color, pointed }) {
  const { data, error } = useData((abort) => read(jobId, percent, abort), [jobId, percent]);
  return html`<article class="card" aria-label=${`${title}, ${percent} %`}>
    <h3>${color && html`<span class="hue ${color}"></span>`}<a href=${href(["jobs", jobId], { quarter: percent })}>${title}</a></h3>
    <${ErrorBox} error=${error} />
    ${data ? html`<${Checkpoint} data=${data} pointed=${pointed} />` : html`<${Skeleton} lines="6" />`}
  </article>`;
}

const tokenKind = (token) => `${lossClass(token.loss)} ${token.predicted === token.target ? "" : "wrong"}`;

function Checkpoint({ data, pointed }) {
  const { tokens, isCut } = data;
  const { prompt, text } = data.continuation ?? {};
  return html`
    <p class="measured">
      ${t("compare.figures", { loss: figure(data.loss), perplexity: figure(data.perplexity), accuracy: share(data.accuracy, 1) })}
    </p>
    <${Tokens} tokens=${tokens} text=${tokenText} kind=${tokenKind} pointed=${pointed} label=${t("compare.reconstruction")} />
    ${isCut && html`<p class="note">${t("compare.cut", { n: MOST_TOKENS })}</p>`}
    <${Pointed} tokens=${tokens} pointed=${pointed} />
    ${text !== undefined && html`<p class="said"><span class="muted">${prompt}</span>${visible(text)}</p>`}
  `;
}

/** What the checkpoint predicted in the place of the token that is pointed at. */
function Pointed({ tokens, pointed }) {
  const token = tokens[pointed.value ?? -1];
  return html`<p class="pointed-at" aria-live="polite">
    ${token
      ? html`<b>${visible(token.target)}</b> ← ${visible(token.predicted)} <span class="muted">${t("compare.token_loss", { loss: figure(token.loss, 3) })}</span>`
      : html`<span class="muted">${t("compare.point")}</span>`}
  </p>`;
}
