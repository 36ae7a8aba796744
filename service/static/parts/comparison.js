/** Jobs side by side: their curves, a figure over a parameter, the table of what differs, and their texts at a quarter. */
import { signal } from "@preact/signals";
import { html } from "htm/preact";
import { useEffect, useMemo, useRef, useState } from "preact/hooks";
import { get } from "../api.js";
import { ByParameter } from "../charts/by_parameter.js";
import { curveOf, meanOf } from "../charts/envelopes.js";
import { HeatMap } from "../charts/heat_map.js";
import { Overlay } from "../charts/overlay.js";
import { count, figure } from "../format.js";
import { language, t } from "../i18n.js";
import { href, queryList, queryString, route, setQuery } from "../router.js";
import { metricNames } from "../schema.js";
import { ErrorBox, Section, Skeleton, Status, loadStyle, useData } from "./basics.js";
import { colorsOf, figuresOf, hasSeeds, inOrder, labelOf, nameOf, newestOf, reachedBy, rowFigure, rowsOf, spreadOf, valueText } from "./compared.js";
import { QuarterTexts } from "./quarter_texts.js";

await loadStyle("compare");

const METRICS = ["loss", "perplexity", "accuracy", "tok_per_sec"];
const QUARTERS = ["last", "best", "0", "25", "50", "75", "100"];
const ENDED = ["succeeded", "failed", "cancelled"];
const FEW_ROWS = 100;
const FEW_TEXTS = 4;

/**
 * `selection`: `{sweep}`, `{tag}` or `{job: [...]}`. `asked`: `{metric, perplexity}` that are compared where the
 * address names none. As long as a job has not ended, it is read again and again.
 */
export function Comparison({ selection, asked }) {
  const { query } = route.value;
  const metrics = queryList("metric").length ? queryList("metric") : (asked?.metric ?? METRICS);
  const perplexity = query.perplexity ?? asked?.perplexity ?? null;
  const wanted = { ...selection, metric: metrics, perplexity, at: query.at ? `step:${query.at}` : null };
  const key = queryString(wanted);
  const [every, setEvery] = useState(0);
  const compared = useData((abort) => get("/compare", wanted, { signal: abort }), [key, every], { every });
  const series = useData((abort) => get("/compare/series", selection, { signal: abort }), [queryString(selection), every], { every });
  useEffect(() => {
    const jobs = compared.data?.jobs ?? [];
    if (compared.data) setEvery(jobs.every(({ status }) => ENDED.includes(status)) ? 0 : jobs.length > 100 ? 10 : 2);
  }, [compared.data]);
  // What is shown belongs together: the figures and the curves of one selection.
  const found = compared.data;
  if (!found) return html`<${ErrorBox} error=${compared.error} />${!compared.error && html`<${Skeleton} lines="12" />`}`;
  if (!found.jobs.length) return html`<p class="muted">${t("compare.empty")}</p>`;
  return html`<${ErrorBox} error=${compared.error ?? series.error} />
    <${Loaded} found=${found} series=${series.data} wanted=${wanted} metrics=${metrics} isStale=${compared.isStale} />`;
}

function Loaded({ found, series, wanted, metrics, isStale }) {
  const { query } = route.value;
  const isGrouped = hasSeeds(found) && query.each !== "1";
  const rows = useMemo(() => rowsOf(found, isGrouped), [found, isGrouped]);
  const pointed = useMemo(() => signal(null), []);
  const metric = metrics.includes(query.show) ? query.show : metrics[0];
  const isLarger = found.larger_is_better.includes(metric);
  const quarter = QUARTERS.includes(query.quarter) ? query.quarter : "last";
  const parameters = found.parameters.filter(({ name }) => !isGrouped || name !== "seed");
  const colors = useMemo(() => colorsOf(rows, parameters), [rows]);
  const view = { found, rows, isSweep: Boolean(wanted.sweep), colors, parameters, metrics, metric, isLarger, quarter, pointed, isGrouped };
  return html`
    <${Toolbar} ...${view} wanted=${wanted} />
    <div class="two-charts ${parameters.length ? "" : "alone"}">
      <${CurvesCard} ...${view} series=${series} />
      ${parameters.length > 0 && html`<${ParameterCard} ...${view} />`}
    </div>
    <${RowTable} ...${view} isStale=${isStale} />
    <${Texts} ...${view} />
  `;
}

function Choice({ label, value, options, onChange }) {
  return html`<label class="choice"><span>${label}</span>
    <select value=${value} onChange=${(event) => onChange(event.target.value)}>
      ${options.map(([one, name]) => html`<option value=${one} selected=${one === value}>${name}</option>`)}
    </select>
  </label>`;
}

/** A metric as it is written in a heading. */
const metricText = (name) => t(`compare.metric.${name}`) === `compare.metric.${name}` ? name : t(`compare.metric.${name}`);

/** Whether a chosen quarter is the same one for every job. */
const isFixed = (quarter) => quarter !== "last" && quarter !== "best";

/** Whether groups of jobs all have come to the same quarter, so that their newest figures may be compared. */
const areEquallyFar = (groups) => new Set(groups.map(newestOf)).size <= 1;

const quarterText = (quarter) => (["last", "best"].includes(quarter) ? t(`compare.quarter.${quarter}`) : `${quarter} %`);

function Toolbar({ found, metrics, metric, quarter, isGrouped, wanted }) {
  const { query } = route.value;
  const [all, setAll] = useState(metrics);
  useEffect(() => void metricNames().then(setAll, () => {}), []);
  const toggle = (name) => {
    const chosen = metrics.includes(name) ? metrics.filter((one) => one !== name) : [...metrics, name];
    if (chosen.length) setQuery({ metric: chosen });
  };
  const file = (format) => `/compare${queryString({ ...wanted, format, lang: format === "html" ? language.value.slice(0, 2) : null })}`;
  return html`<div class="toolbar">
    <${Choice} label=${t("compare.metric")} value=${metric} options=${metrics.map((name) => [name, metricText(name)])}
      onChange=${(show) => setQuery({ show })} />
    <${Choice} label=${t("compare.at_quarter")} value=${quarter} options=${QUARTERS.map((one) => [one, quarterText(one)])}
      onChange=${(one) => setQuery({ quarter: one === "last" ? null : one })} />
    <label class="choice"><span>${t("compare.at_step")}</span>
      <input type="number" min="1" value=${query.at ?? ""} placeholder="–"
        onChange=${(event) => setQuery({ at: event.target.value || null })} /></label>
    <label class="choice"><span>${t("compare.until")}</span>
      <input type="number" min="1" step="any" value=${wanted.perplexity ?? ""} placeholder="–"
        onChange=${(event) => setQuery({ perplexity: event.target.value || null })} /></label>
    ${hasSeeds(found) &&
    html`<button type="button" aria-pressed=${isGrouped} onClick=${() => setQuery({ each: isGrouped ? "1" : null })}>${t("compare.group_seeds")}</button>`}
    <details class="pick">
      <summary class="button">${t("compare.columns")}</summary>
      <div class="card">
        ${all.map(
          (name) => html`<label key=${name}><input type="checkbox" checked=${metrics.includes(name)} onChange=${() => toggle(name)} /> ${metricText(name)}</label>`,
        )}
      </div>
    </details>
    <span class="space"></span>
    <a class="button" href=${file("html")} download>${t("compare.save")}</a>
    <a class="button" href=${file("csv")} download=${"comparison.csv"}>CSV</a>
  </div>`;
}

function CurvesCard({ rows, colors, series, pointed, isGrouped }) {
  const { query } = route.value;
  const log = query.log ?? "";
  const range = useMemo(() => query.zoom?.split("-").map(Number) ?? null, [query.zoom]);
  const curves = useMemo(() => {
    if (!series) return null;
    const byJob = new Map(series.jobs.map((one) => [one.job_id, one]));
    return rows.map((row, index) => {
      const envelopes = row.jobs.flatMap(({ job_id, status }) => {
        const envelope = byJob.get(job_id);
        return envelope ? [{ ...envelope, isWhole: status === "succeeded" }] : [];
      });
      const curve = envelopes.length === 1 ? curveOf(envelopes[0]) : meanOf(envelopes);
      return { key: row.key, label: row.label, color: colors[index], ...curve };
    });
  }, [rows, series, colors]);
  const hasSteps = curves?.some(({ x }) => x.length) ?? false;
  const flip = (axis) => setQuery({ log: log.includes(axis) ? log.replace(axis, "") : log + axis });
  return html`<section class="card" aria-label=${t("compare.curves")}>
    <div class="part-head">
      <h2>${t("compare.curves")}</h2>
      <span class="actions">
        ${query.zoom && html`<button type="button" class="small" onClick=${() => setQuery({ zoom: null })}>${t("compare.unzoom")}</button>`}
        <button type="button" class="small" aria-pressed=${log.includes("x")} onClick=${() => flip("x")}>log x</button>
        <button type="button" class="small" aria-pressed=${log.includes("y")} onClick=${() => flip("y")}>log y</button>
      </span>
    </div>
    ${!curves && html`<${Skeleton} lines="8" />`}
    ${curves && !hasSteps && html`<p class="muted">${t("compare.no_steps")}</p>`}
    ${hasSteps &&
    html`<${Overlay}
      label=${t("compare.curves_label", { n: curves.length })}
      curves=${curves}
      pointed=${pointed}
      logX=${log.includes("x")}
      logY=${log.includes("y")}
      range=${range}
      onZoom=${(ends) => setQuery({ zoom: ends && ends.join("-") })}
      step=${query.at ? Number(query.at) : null}
      onStep=${(step) => setQuery({ at: step })}
    />`}
    ${hasSteps && html`<p class="note">${t(isGrouped ? "compare.note_groups" : "compare.note_jobs")}</p>`}
  </section>`;
}

/** A figure over a parameter, with a line for each value of a second one; or a map of both. */
function ParameterCard({ rows, parameters, metric, isLarger, quarter, pointed, isGrouped }) {
  const { query } = route.value;
  const names = parameters.map(({ name }) => name);
  const x = names.includes(query.x) ? query.x : (names.find((name) => name !== "seed") ?? names[0]);
  const others = names.filter((name) => name !== x);
  // Where each value of x stands for a single row, a second parameter says nothing more.
  const isCrossed = rows.length > parameters.find(({ name }) => name === x).values.length;
  const usual = isCrossed ? (others.find((name) => name !== "seed") ?? null) : null;
  const second = others.includes(query.line) ? query.line : query.line === "none" ? null : usual;
  const isMap = Boolean(second) && query.map === "1";
  const isLog = query.logp === "1";
  const valuesOf = (name) => inOrder(parameters.find((one) => one.name === name).values);
  const xs = valuesOf(x);
  const seconds = second ? valuesOf(second) : [null];
  const cells = useMemo(() => {
    const places = new Map(xs.map((value, index) => [JSON.stringify(value), index]));
    const numbers = new Map(seconds.map((value, index) => [JSON.stringify(value), index]));
    const table = seconds.map(() => xs.map(() => []));
    for (const row of rows) {
      const line = second ? numbers.get(JSON.stringify(row.values[second])) : 0;
      const place = places.get(JSON.stringify(row.values[x]));
      table[line][place].push(...row.jobs);
    }
    return table;
  }, [rows, x, second]);
  const figures = useMemo(
    () => cells.map((line) => line.map((jobs) => figuresOf(jobs, metric, quarter, isLarger).filter((value) => value !== null))),
    [cells, metric, quarter],
  );
  const mean = (values) => (values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : null);
  const means = useMemo(() => figures.map((line) => line.map(mean)), [figures]);
  const known = means.flat().filter((value) => value !== null);
  const [low, high] = [Math.min(...known), Math.max(...known)];
  const areEven = isFixed(quarter) || areEquallyFar(cells.flat().filter((jobs) => jobs.length));
  const shownQuarter = quarter === "last" && areEven && known.length ? `${newestOf(rows[0].jobs)} %` : quarterText(quarter);
  const title = t("compare.over", { metric: metricText(metric), quarter: shownQuarter, name: x });
  const lines = figures.map((points, index) => ({
    key: String(index), label: second ? `${second}=${valueText(seconds[index])}` : "", color: `series-${index % 8}`, points,
  }));
  return html`<section class="card" aria-label=${title}>
    <div class="part-head">
      <h2>${title}</h2>
      <span class="actions">
        ${names.length > 1 && html`<${Choice} label="x" value=${x} options=${names.map((name) => [name, name])} onChange=${(one) => setQuery({ x: one, line: null })} />`}
        ${others.length > 0 &&
        html`<${Choice} label=${t("compare.lines")} value=${second ?? "none"} options=${[["none", "–"], ...others.map((name) => [name, name])]}
          onChange=${(line) => setQuery({ line })} />`}
        ${second && html`<button type="button" class="small" aria-pressed=${isMap} onClick=${() => setQuery({ map: isMap ? null : "1" })}>${t("compare.map")}</button>`}
        ${!isMap && html`<button type="button" class="small" aria-pressed=${isLog} onClick=${() => setQuery({ logp: isLog ? null : "1" })}>log y</button>`}
      </span>
    </div>
    ${known.length === 0
      ? html`<p class="muted">${t("compare.no_figures")}</p>`
      : isMap
        ? html`<${HeatMap}
            label=${title}
            rows=${seconds.map(valueText)}
            columns=${xs.map(valueText)}
            rowName=${second}
            columnName=${x}
            values=${means}
            scale=${(value) => (high === low ? 0.5 : (isLarger ? value - low : high - value) / (high - low))}
            format=${(value) => figure(value, 3)}
          />
          <p class="note">${t("compare.map_note")}</p>`
        : html`<${ByParameter} label=${title} values=${xs.map(valueText)} lines=${lines} xName=${x} logY=${isLog} height=${280} />`}
    ${known.length > 0 && !areEven && html`<p class="note">${t("compare.uneven")}</p>`}
  </section>`;
}

/** `0.396 ± 0.012`, the spread smaller. */
const Spread = ({ of: spread }) =>
  spread === null
    ? "–"
    : html`${figure(spread.mean)}${spread.std !== null && html`<small title=${`${figure(spread.min)} – ${figure(spread.max)}, n = ${spread.n}`}> ± ${figure(spread.std, 2)}</small>`}`;

function RowTable({ found, rows, isSweep, colors, parameters, metrics, metric, isLarger, quarter, pointed, isGrouped, isStale }) {
  const { query } = route.value;
  const [isWhole, showWhole] = useState(false);
  const body = useRef();
  const sort = query.sort ?? "";
  const [by, sign] = sort.startsWith("-") ? [sort.slice(1), -1] : [sort, 1];
  const hasUntil = rows.some((row) => row.jobs.some((job) => job.steps_until));
  const hasStep = rows.some((row) => row.jobs.some((job) => job.at_step));
  const allDone = found.jobs.every(({ status }) => status === "succeeded");
  const areEven = isFixed(quarter) || areEquallyFar(rows.map(({ jobs }) => jobs));
  const reached = rows.map(({ jobs }) => reachedBy(jobs, quarter));
  const hasReached = !areEven || reached.some(({ n }, index) => n > 0 && n < rows[index].jobs.length);
  const bestName = `${metric}.best`;
  const columns = [
    ...metrics.map((name) => ({
      name, title: metricText(name),
      value: (row) => rowFigure(row, name, quarter, found.larger_is_better.includes(name)),
    })),
    ...(quarter === "best" ? [] : [{ name: bestName, title: t("compare.best_of", { metric: metricText(metric) }), value: (row) => rowFigure(row, metric, "best", isLarger) }]),
    ...(hasUntil ? [{ name: "until", title: t("compare.steps_until"), value: (row) => spreadOfJobs(row, (job) => job.steps_until?.step) },
      { name: "seconds", title: t("compare.seconds_until"), value: (row) => spreadOfJobs(row, (job) => job.steps_until?.seconds) }] : []),
    ...(hasStep ? [{ name: "at", title: t("compare.loss_at", { step: query.at }), value: (row) => spreadOfJobs(row, (job) => job.at_step?.train_loss) }] : []),
  ];
  const cells = useMemo(() => rows.map((row) => columns.map((column) => column.value(row))), [rows, metrics.join(), metric, quarter, hasUntil, hasStep]);
  const order = useMemo(() => {
    const indices = rows.map((_, index) => index);
    const column = columns.findIndex(({ name }) => name === by);
    const key = column >= 0 ? (index) => cells[index][column]?.mean ?? null : by ? (index) => rows[index].values[by] : null;
    if (!key) return indices;
    return indices.sort((a, b) => {
      const [left, right] = [key(a), key(b)];
      if (left === null || left === undefined) return 1;
      if (right === null || right === undefined) return -1;
      return sign * (left < right ? -1 : left > right ? 1 : 0);
    });
  }, [cells, sort]);
  const bestOf = columns.map(({ name }, column) => {
    const values = cells.map((row) => row[column]?.mean).filter((value) => value !== undefined);
    if (!areEven) return null;
    if (new Set(values).size < 2) return null;
    return found.larger_is_better.includes(name.replace(/\.best$/, "")) ? Math.max(...values) : Math.min(...values);
  });
  useEffect(
    () =>
      pointed.subscribe((key) => {
        body.current?.querySelector(".pointed")?.classList.remove("pointed");
        if (key) body.current?.querySelector(`[data-key="${key}"]`)?.classList.add("pointed");
      }),
    [pointed, order],
  );
  const Head = ({ name, title, isNumber }) => html`<th class=${isNumber ? "number" : ""} aria-sort=${by === name ? (sign > 0 ? "ascending" : "descending") : null}>
    <button type="button" class="plain small" onClick=${() => setQuery({ sort: sort === name ? `-${name}` : sort === `-${name}` ? null : name })}>
      ${title}${by === name ? (sign > 0 ? " ↑" : " ↓") : ""}</button>
  </th>`;
  const shown = isWhole ? order : order.slice(0, FEW_ROWS);
  const title = isGrouped ? t("compare.groups", { n: rows.length }) : t("compare.jobs", { n: rows.length });
  return html`<${Section} title=${title} actions=${html`<span class="muted">${t(isGrouped ? "compare.table_note" : "compare.table_note_each", { quarter: quarterText(quarter) })}</span>`}>
    <div class="scroll" tabindex="0" role="group" aria-label=${title}>
      <table class="compared" aria-busy=${isStale}>
        <thead>
          <tr>
            <th><span class="hidden">${t("compare.color")}</span></th>
            ${parameters.map(({ name }) => html`<${Head} key=${name} name=${name} title=${name} isNumber=${false} />`)}
            <th>${isGrouped ? t("compare.seeds") : t("compare.job")}</th>
            ${!allDone && html`<th>${t("compare.status")}</th>`}
            ${hasReached && html`<th class="number">${t("compare.at_quarter")}</th>`}
            ${columns.map(({ name, title: text }) => html`<${Head} key=${name} name=${name} title=${text} isNumber=${true} />`)}
          </tr>
        </thead>
        <tbody
          ref=${body}
          onPointerOver=${(event) => (pointed.value = event.target.closest("tr")?.dataset.key ?? null)}
          onPointerLeave=${() => (pointed.value = null)}
        >
          ${shown.map(
            (index) => html`<tr key=${rows[index].key} data-key=${rows[index].key}>
              <td><span class="hue ${colors[index]}"></span></td>
              ${parameters.map(({ name }) => html`<td key=${name} class="mono">${valueText(rows[index].values[name])}</td>`)}
              <td class="jobs">${rows[index].jobs.map((job) => html`<a key=${job.job_id} href=${href(["jobs", job.job_id])} title=${nameOf(job)}>${isGrouped && "seed" in job.values ? job.values.seed : isSweep ? `#${index + 1}` : nameOf(job)}</a> `)}</td>
              ${!allDone && html`<td><${Statuses} jobs=${rows[index].jobs} /></td>`}
              ${hasReached && html`<td class="number"><${Reached} ...${reached[index]} all=${rows[index].jobs.length} /></td>`}
              ${cells[index].map(
                (spread, column) => html`<td key=${columns[column].name} class="number ${spread && spread.mean === bestOf[column] ? "best" : ""}"><${Spread} of=${spread} /></td>`,
              )}
            </tr>`,
          )}
        </tbody>
      </table>
    </div>
    ${shown.length < order.length && html`<button type="button" onClick=${() => showWhole(true)}>${t("compare.show_all", { n: count(order.length) })}</button>`}
  <//>`;
}

const spreadOfJobs = (row, read) => spreadOf(row.jobs.map(read));

/** `100 %`, and of how many of the jobs where not all have come so far. */
const Reached = ({ percent, n, all }) =>
  n === 0 ? "–" : html`${percent} %${n < all && html` <small>${t("compare.n_of", { n, all })}</small>`}`;

function Statuses({ jobs }) {
  const counts = {};
  for (const { status } of jobs) counts[status] = (counts[status] ?? 0) + 1;
  return Object.entries(counts).map(([status, n]) => html`<span key=${status}>${jobs.length > 1 && `${n} `}<${Status} status=${status} /> </span>`);
}

/** The texts of the first jobs of some rows, at a quarter that all of them may have. */
function Texts({ rows, colors, quarter }) {
  const { query } = route.value;
  const [n, setN] = useState(FEW_TEXTS);
  const recorded = rows.map((row) => row.jobs[0].quarters.map(({ percent }) => percent));
  const percents = [...new Set(recorded.flat())].sort((a, b) => a - b);
  const shared = percents.filter((percent) => recorded.every((its) => its.includes(percent)));
  const newest = (shared.length ? shared : percents)[(shared.length || percents.length) - 1];
  const chosen = percents.includes(Number(query.text)) ? Number(query.text) : newest;
  if (!percents.length) return null;
  const choices = html`<span class="actions" role="group" aria-label=${t("compare.at_quarter")}>
    ${percents.map((percent) => html`<button key=${percent} type="button" class="small" aria-pressed=${percent === chosen} onClick=${() => setQuery({ text: percent })}>${percent} %</button>`)}
  </span>`;
  const columns = rows.slice(0, n).map((row, index) => ({ jobId: row.jobs[0].job_id, percent: chosen, title: row.label, color: colors[index] }));
  return html`<${Section} title=${t("compare.texts")} actions=${choices}>
    <${QuarterTexts} columns=${columns.filter((_, index) => rows[index].jobs[0].quarters.some(({ percent }) => percent === chosen))} />
    ${n < rows.length && html`<button type="button" onClick=${() => setN(n + FEW_TEXTS)}>${t("compare.more_texts")}</button>`}
  <//>`;
}
