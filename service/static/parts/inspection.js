/** Inside a checkpoint at a text: what each head attends to, which experts each token is sent to, what comes next. */
import { signal } from "@preact/signals";
import { html } from "htm/preact";
import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import { post } from "../api.js";
import { HeatMap } from "../charts/heat_map.js";
import { figure, percent as share } from "../format.js";
import { t } from "../i18n.js";
import { route, setQuery } from "../router.js";
import { ErrorBox, Skeleton, cssColor, useData, useTheme } from "./basics.js";
import { Bar } from "./continuations.js";
import { groupsOf } from "./characters.js";
import { Tokens, visible } from "./tokens.js";

const THUMBNAIL = 52;
const LARGE = 320;

/** Tokens with a `name`, the character that several of them share; as their `text` only the first of these has it. */
function namedTokens(tokens, prompt) {
  const groups = groupsOf(tokens, new TextEncoder().encode(prompt));
  return groups.flatMap(({ text, tokens: group }) => group.map((token, index) => ({ ...token, name: text, text: index ? "" : text })));
}

/** `run`: `{number, prompt, targets}`; one of the targets is looked into at a time. */
export function Inspection({ run, titleOf }) {
  const [chosen, choose] = useState(run.targets[0].key);
  const target = run.targets.find(({ key }) => key === chosen) ?? run.targets[0];
  const { job_id, checkpoint } = target;
  const { data, error, isStale } = useData((abort) => post("/inspect", { job_id, checkpoint, prompt: run.prompt }, { signal: abort }), [run.number, target.key]);
  const shown = useMemo(() => data && { ...data, tokens: namedTokens(data.tokens, run.prompt) }, [data]);
  return html`
    ${run.targets.length > 1 &&
    html`<div class="ways" role="group" aria-label=${t("generate.checkpoints")}>
      ${run.targets.map((one) => html`<button key=${one.key} type="button" class="small" aria-pressed=${one === target} onClick=${() => choose(one.key)}>${titleOf(one)}</button>`)}
    </div>`}
    <${ErrorBox} error=${error} />
    ${!data && !error && html`<${Skeleton} lines="8" />`}
    ${data && html`<div aria-busy=${isStale}><${Inside} data=${shown} /></div>`}
  `;
}

function Inside({ data }) {
  const { query } = route.value;
  const pointed = useMemo(() => signal(null), []);
  const [pinned, pin] = useState(null);
  const last = data.tokens.length - 1;
  const at = Math.min(pointed.value ?? pinned ?? last, last);
  const layer = Math.min(Number(query.layer ?? 0), data.attention.length - 1);
  const head = Math.min(Number(query.head ?? 0), data.attention[0].length - 1);
  return html`
    ${data.n_unread > 0 && html`<p class="muted">${t("generate.unread", { n: data.n_unread })}</p>`}
    <div class="inside">
      <section class="card attention" aria-label=${t("generate.attention")}>
        <h2>${t("generate.attention")}</h2>
        <p class="note">${t("generate.attention_note")}</p>
        <${Attended} tokens=${data.tokens} weights=${data.attention[layer][head]} at=${at} pointed=${pointed} onPick=${(index) => pin(index === pinned ? null : index)} />
        <p class="pointed-at" aria-live="polite">${t("generate.attends", { token: visible(data.tokens[at].name), layer, head, list: strongest(data, layer, head, at) })}</p>
        <div class="heads-and-map" tabindex="0" role="group" aria-label=${t("generate.heads")}>
          <${Heads} attention=${data.attention} layer=${layer} head=${head} />
          <${Matrix} weights=${data.attention[layer][head]} size=${LARGE} at=${at} pointed=${pointed}
            label=${t("generate.matrix", { layer, head })} />
        </div>
      </section>
      <section class="card" aria-label=${t("generate.likeliest")}>
        <h2>${t("generate.likeliest")}</h2>
        <div class="alternatives">${data.likeliest.map((one) => html`<${Bar} key=${one.token} text=${one.text} probability=${one.probability} />`)}</div>
      </section>
      ${data.routing.length > 0 && html`<${Routing} data=${data} at=${at} />`}
    </div>
  `;
}

/** The three tokens that a head attends to most from a token, in words. */
function strongest({ tokens, attention }, layer, head, at) {
  const weights = attention[layer][head][at];
  return weights
    .map((weight, index) => ({ weight, text: visible(tokens[index].name) }))
    .sort((a, b) => b.weight - a.weight)
    .slice(0, 3)
    .map(({ weight, text }) => `“${text}” ${share(weight)}`)
    .join(", ");
}

const tokenText = (token) => token.text;

/** The text, each token as strongly coloured as the one at `at` attends to it. */
function Attended({ tokens, weights, at, pointed, onPick }) {
  const row = weights[at];
  const most = Math.max(...row);
  const style = (_, index) =>
    index <= at ? { background: `color-mix(in srgb, var(--accent) ${Math.round((55 * row[index]) / most)}%, transparent)` } : { opacity: 0.4 };
  const kind = (_, index) => (index === at ? "moved" : "");
  return html`<${Tokens} tokens=${tokens} text=${tokenText} kind=${kind} style=${style} pointed=${pointed} onPick=${onPick} label=${t("generate.attended_text")} />`;
}

function Heads({ attention, layer, head }) {
  const choose = (one, other) => setQuery({ layer: one, head: other });
  return html`<table class="heads">
    <caption class="hidden">${t("generate.heads")}</caption>
    <thead><tr><th></th>${attention[0].map((_, n) => html`<th key=${n}>${t("generate.head", { n })}</th>`)}</tr></thead>
    <tbody>
      ${attention.map(
        (heads, one) => html`<tr key=${one}>
          <th>${t("generate.layer", { n: one })}</th>
          ${heads.map(
            (weights, other) => html`<td key=${other}><button type="button" class="plain" aria-pressed=${one === layer && other === head}
              aria-label=${t("generate.matrix", { layer: one, head: other })} onClick=${() => choose(one, other)}><${Matrix} weights=${weights} size=${THUMBNAIL} /></button></td>`,
          )}
        </tr>`,
      )}
    </tbody>
  </table>`;
}

/** Attention as a triangle: a row for each token that attends, a column for each that is attended to; the darkest of a row
 * is its largest. */
function Matrix({ weights, size, at = null, pointed = null, label = null }) {
  const canvas = useRef();
  const theme = useTheme();
  useEffect(() => {
    const element = canvas.current;
    const n = weights.length;
    element.width = element.height = n;
    const ctx = element.getContext("2d");
    const image = ctx.createImageData(n, n);
    const ink = cssColor("accent").match(/\d+/g).map(Number);
    weights.forEach((row, y) => {
      const most = Math.max(...row);
      row.forEach((weight, x) => {
        image.data.set([...ink.slice(0, 3), Math.round((255 * weight) / most)], 4 * (y * n + x));
      });
    });
    ctx.putImageData(image, 0, 0);
  }, [weights, theme]);
  const point = (event) => {
    const box = canvas.current.getBoundingClientRect();
    pointed.value = Math.min(Math.max(Math.floor(((event.clientY - box.top) / box.height) * weights.length), 0), weights.length - 1);
  };
  const listeners = pointed ? { onPointerMove: point, onPointerLeave: () => (pointed.value = null) } : {};
  return html`<span class="matrix" style=${{ inlineSize: `${size}px` }}>
    <canvas ref=${canvas} role=${label ? "img" : null} aria-label=${label} aria-hidden=${label ? null : "true"} ...${listeners}></canvas>
    ${at !== null && html`<span class="row" style=${{ insetBlockStart: `${(100 * at) / weights.length}%`, blockSize: `${Math.max(100 / weights.length, 0.6)}%` }}></span>`}
  </span>`;
}

/** Where the routers send a token: the probability of each expert in each layer. */
function Routing({ data, at }) {
  const values = useMemo(() => data.routing.map(({ probabilities }) => probabilities[at]), [data, at]);
  const names = useMemo(() => data.routing.map(({ layer }) => t("generate.layer", { n: layer })), [data]);
  const experts = useMemo(() => values[0].map((_, index) => String(index)), [values]);
  const scale = useMemo(() => (value) => value, []);
  const chosen = data.routing.map(({ layer, chosen: experts_, gates }) => `${t("generate.layer", { n: layer })}: ${experts_[at].map((expert, k) => `${expert} (${figure(gates[at][k], 2)})`).join(", ")}`);
  return html`<section class="card" aria-label=${t("generate.routing")}>
    <h2>${t("generate.routing")}</h2>
    <p class="note">${t("generate.routing_note", { token: visible(data.tokens[at].name) })}</p>
    <${HeatMap} label=${t("generate.routing")} rows=${names} columns=${experts} values=${values} scale=${scale}
      format=${(value) => share(value)} rowName="" columnName=${t("generate.expert")} />
    <p class="note">${t("generate.chosen")} ${chosen.join(" · ")}</p>
  </section>`;
}
