/** What the experts of a mixture do, quarter by quarter: their load, who reads which token, and what the figures say. */
import { useSignal } from "@preact/signals";
import { html } from "htm/preact";
import { useCallback, useMemo } from "preact/hooks";
import { HeatMap } from "../../charts/heat_map.js";
import { count, figure, percent } from "../../format.js";
import { t } from "../../i18n.js";
import { Help, Section } from "../../parts/basics.js";
import { Tokens, visible } from "../../parts/tokens.js";
import { route, setQuery } from "../../router.js";

/** Colours by which eight experts can be told apart; with more, one at a time is marked. */
const N_COLOURS = 8;

const inputText = (token) => token.input ?? token.target;

export function Mixture({ job, checkpoints, tokens }) {
  const { query } = route.value;
  const recorded = checkpoints.filter((one) => one.moe);
  if (!recorded.length) return null;
  const wanted = Number(query.quarter ?? recorded[recorded.length - 1].percent);
  const place = Math.max(recorded.findLastIndex((one) => one.percent <= wanted), 0);
  const checkpoint = recorded[place];
  const before = recorded[place - 1];
  const { layers } = checkpoint.moe;
  const layerAt = Math.min(Math.max(layers.findIndex((one) => String(one.layer) === query.layer), 0), layers.length - 1);
  const expert = query.expert === undefined ? null : Number(query.expert);
  const parts = { job, checkpoint, before, tokens, layers, layerAt, expert };
  return html`<${Section} title=${t("job.mixture")} id="mixture" actions=${html`<${Help} text=${t("job.mixture_help")} label=${t("job.mixture")} />`}>
    <div class="card mixture">
      <${QuarterSlider} recorded=${recorded} place=${place} />
      <div class="mixture-halves">
        <div>
          <${LoadMap} ...${parts} />
          <${Routed} ...${parts} />
        </div>
        <${Sayings} ...${parts} recorded=${recorded} />
      </div>
    </div>
  </${Section}>`;
}

function QuarterSlider({ recorded, place }) {
  return html`<div class="slider">
    <label for="mixture-quarter">${t("job.quarter")}</label>
    <input
      id="mixture-quarter"
      type="range"
      min="0"
      max=${Math.max(recorded.length - 1, 1)}
      step="1"
      value=${place}
      disabled=${recorded.length < 2}
      aria-valuetext=${`${recorded[place].percent} %`}
      list="mixture-quarters"
      onInput=${(event) => setQuery({ quarter: recorded[Number(event.target.value)].percent })}
    />
    <datalist id="mixture-quarters">${recorded.map((one, i) => html`<option value=${i}>${one.percent} %</option>`)}</datalist>
    <output>${recorded[place].percent} % <span class="muted">${t("job.step")} ${count(recorded[place].step)}</span></output>
  </div>`;
}

/** Layers by experts: the share of the work that each has, against the share that all would have in balance. */
function LoadMap({ job, layers, layerAt, expert }) {
  const n = job.config.n_experts;
  const rows = useMemo(() => layers.map((one) => `${t("job.layer")} ${one.layer}`), [layers]);
  const columns = useMemo(() => Array.from({ length: n }, (_, e) => String(e)), [n]);
  const values = useMemo(() => layers.map((one) => one.load ?? columns.map(() => null)), [layers, columns]);
  // Half of the colour is an equal share, all of it is three times that.
  const scale = useCallback((load) => Math.min((load * n) / 3, 1), [n]);
  const format = useCallback((load) => percent(load, load * n < 10 && n <= 16 ? 1 : 0), [n]);
  const describe = (row, column) => {
    const layer = layers[row];
    const without = layer.loss_without?.[column];
    const load = layer.load?.[column];
    return html`<b>${t("job.expert_of", { layer: layer.layer, expert: column })}</b> ${t("job.load_is", {
      load: percent(load, 1),
      times: figure(load * n, 2),
    })}${typeof without === "number" ? ` ${t("job.loss_without", { loss: figure(without, 3) })}` : ""}`;
  };
  return html`<div>
    <h3>${t("job.load")}</h3>
    <${HeatMap}
      rows=${rows}
      columns=${columns}
      values=${values}
      scale=${scale}
      format=${format}
      label=${t("job.load_map", { layers: layers.length, n })}
      rowName=${t("job.layer")}
      columnName=${t("job.experts_across", { share: percent(1 / n, 1) })}
      describe=${describe}
      chosen=${useMemo(() => [layerAt, expert], [layerAt, expert])}
      onChoose=${(row, column) => setQuery({ layer: layers[row].layer, expert: expert === column && row === layerAt ? null : column })}
    />
  </div>`;
}

const SAYINGS = {
  load_entropy: (x) => (x > 0.95 ? "even" : x > 0.75 ? "uneven" : "collapsed"),
  router_entropy: (x) => (x > 0.9 ? "undecided" : x > 0.4 ? "leaning" : "sure"),
  dead_experts: (x) => (x === 0 ? "none" : "some"),
  churn: (x) => (x === null || x === undefined ? "first" : x < 0.05 ? "settled" : x < 0.3 ? "moving" : "wandering"),
  dropped_fraction: (x, config) => (config.capacity_factor === null ? "unbounded" : x === 0 ? "none" : x < 0.05 ? "few" : "many"),
  router_grad_norm: (x) => (x === 0 ? "none" : "some"),
};

const FORMATS = {
  load_entropy: (x) => figure(x, 3),
  router_entropy: (x) => figure(x, 3),
  dead_experts: (x) => count(x),
  churn: (x) => percent(x, 1),
  dropped_fraction: (x) => percent(x, 1),
  router_grad_norm: (x) => figure(x, 2),
};

/** The layer's figures at this quarter, what came before and after in small, and one sentence each. */
function Sayings({ job, checkpoint, recorded, layers, layerAt }) {
  const layer = layers[layerAt];
  return html`<div>
    <h3>
      <label>
        ${t("job.layer")}
        <select class="small" value=${layer.layer} onChange=${(event) => setQuery({ layer: event.target.value })}>
          ${layers.map((one) => html`<option value=${one.layer}>${one.layer}</option>`)}
        </select>
      </label>
    </h3>
    <dl class="sayings">
      ${Object.keys(SAYINGS).map((name) => {
        const value = layer[name] ?? null;
        return html`<div key=${name}>
          <dt>${t(`job.moe.${name}`)}</dt>
          <dd>
            <b>${FORMATS[name](value)}</b>
            <span class="course" aria-label=${t("job.course")}>
              ${recorded.map((one) => {
                const then = one.moe.layers[layerAt]?.[name] ?? null;
                return html`<span class=${one === checkpoint ? "now" : ""} title=${`${one.percent} %`}>${FORMATS[name](then)}</span>`;
              })}
            </span>
          </dd>
          <dd class="saying muted">${t(`job.moe.${name}.${SAYINGS[name](value, job.config)}`)}</dd>
        </div>`;
      })}
    </dl>
  </div>`;
}

/** The text, each token with the colour of an expert that read it; those whose experts changed are underlined. */
function Routed({ job, checkpoint, before, tokens, layers, layerAt, expert }) {
  const pointed = useSignal(null);
  const mine = tokens[checkpoint.percent];
  const earlier = before ? tokens[before.percent] : null;
  const n = job.config.n_experts;
  const choice = Math.min(Number(route.value.query.choice ?? 0), job.config.k - 1);
  const isRouted = Boolean(mine?.[0]?.experts);
  const moved = useMemo(() => {
    if (!isRouted || !earlier?.[0]?.experts) return null;
    const sorted = (token) => [...token.experts[layerAt]].sort((a, b) => a - b).join();
    return mine.map((token, i) => Boolean(earlier[i]) && sorted(token) !== sorted(earlier[i]));
  }, [mine, earlier, layerAt]);
  const kind = useCallback(
    (token, i) => {
      const experts = token.experts[layerAt];
      const classes = [];
      if (expert === null ? n <= N_COLOURS : experts.includes(expert)) classes.push(`expert-${(expert ?? experts[choice]) % N_COLOURS}`);
      else if (expert !== null) classes.push("faint");
      if (moved?.[i]) classes.push("moved");
      return classes.join(" ");
    },
    [layerAt, expert, choice, moved, n],
  );
  if (!isRouted) return null;
  const nMoved = moved?.filter(Boolean).length;
  const cards = expert === null ? null : layers[layerAt].cards?.[expert];
  const index = pointed.value;
  const token = index === null ? null : mine[index];
  return html`<div class="routed">
    <div class="part-head">
      <h3>${t("job.routed", { layer: layers[layerAt].layer })}</h3>
      <div class="actions">
        ${job.config.k > 1 &&
        expert === null &&
        html`<label class="muted">
          ${t("job.choice")}
          <select class="small" value=${choice} onChange=${(event) => setQuery({ choice: event.target.value === "0" ? null : event.target.value })}>
            ${Array.from({ length: job.config.k }, (_, i) => html`<option value=${i}>${i + 1}</option>`)}
          </select>
        </label>`}
        ${n <= N_COLOURS
          ? Array.from({ length: n }, (_, e) => html`<button
              class="small expert-key"
              aria-pressed=${expert === e}
              aria-label=${t("job.expert", { expert: e })}
              onClick=${() => setQuery({ expert: expert === e ? null : e })}
            ><i class=${`expert-${e}`}></i>${e}</button>`)
          : html`<label class="muted">
              ${t("job.only_expert")}
              <select class="small" value=${expert ?? ""} onChange=${(event) => setQuery({ expert: event.target.value || null })}>
                <option value="">${t("job.no_expert")}</option>
                ${Array.from({ length: n }, (_, e) => html`<option value=${e}>${e}</option>`)}
              </select>
            </label>`}
      </div>
    </div>
    <div class="box">
      <${Tokens} tokens=${mine} text=${inputText} kind=${kind} pointed=${pointed} label=${t("job.routed", { layer: layers[layerAt].layer })} />
    </div>
    <p class="pointed-at" aria-live="polite">
      ${token
        ? html`<b>${visible(inputText(token))}</b> ${t("job.read_by", { experts: token.experts[layerAt].join(", ") })}
            ${earlier?.[index] && html`<span class="muted">${t("job.read_before", { percent: before.percent, experts: earlier[index].experts[layerAt].join(", ") })}</span>`}`
        : html`<span class="muted">
            ${nMoved === undefined ? t("job.moved_none") : t("job.moved", { n: nMoved, all: count(mine.length), percent: before.percent })}
            ${expert === null && n > N_COLOURS ? ` ${t("job.choose_expert")}` : ""}
          </span>`}
    </p>
    ${cards &&
    html`<p class="cards"><span class="muted">${t("job.card", { expert })}</span> ${cards.map(
      (card) => html`<span class="chip" key=${card.id}>${visible(card.token)} ×${card.times}</span> `,
    )}</p>`}
  </div>`;
}
