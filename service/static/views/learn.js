/** The first lesson, in ten minutes: six steps, each with a button that does it and its result in place. */
import { html } from "htm/preact";
import { useEffect, useState } from "preact/hooks";
import { get, mayChange, post } from "../api.js";
import { HeatMap } from "../charts/heat_map.js";
import { Curves } from "../charts/curves.js";
import { duration, figure, percent as share } from "../format.js";
import { pick, t } from "../i18n.js";
import { ErrorBox, OnlyReads, Progress, Skeleton, Status, attempt, loadStyle, useData, useTitle } from "../parts/basics.js";
import { Comparison } from "../parts/comparison.js";
import { Continuations } from "../parts/continuations.js";
import { withCode } from "../parts/inline_code.js";
import { PresetList, usePresets } from "../parts/presets.js";
import { QuarterTexts } from "../parts/quarter_texts.js";
import { SweepProgress, useSweep } from "../parts/sweep_controls.js";
import { href, route, setQuery } from "../router.js";

await Promise.all([loadStyle("compare"), loadStyle("generate"), loadStyle("learn")]);

const ENDED = ["succeeded", "failed", "cancelled"];

/** What may be changed in the third step: a name of i18n, and the config. */
const CHANGES = { dropout: { dropout: 0 }, lr: { lr: 5e-3 }, narrow: { n_embd: 32 } };

/** The mixture grows out of the first job: its MLPs are copied into every expert, and trained on for a while. */
const GROWN = { use_moe: true, n_experts: 8, k: 2, epochs: 60 };

export default function Learn() {
  const { query } = route.value;
  useTitle(t("learn.title"));
  const presets = usePresets();
  const reference = presets?.find(({ name }) => name === "reference");
  const text = reference?.sweep.text;
  const first = useJob(query.job);
  const changed = useJob(query.changed);
  const grown = useJob(query.grown);
  const isTrained = first.job?.status === "succeeded";
  const submit = (name, body) =>
    attempt(async () => setQuery({ [name]: (await post("/jobs", { text, tags: { lesson: "first" }, ...body })).id }));
  return html`<div class="learn">
    <h1>${t("learn.title")}</h1>
    <p class="lead">${t("learn.lead")}</p>
    <${OnlyReads} />
    <ol>
      <${Lesson} name="train">
        ${text ? html`<blockquote>${text}</blockquote>` : html`<${Skeleton} />`}
        <${Do} label=${t("learn.train_do")} isDone=${Boolean(query.job)} disabled=${!text} onDo=${() => submit("job", { name: t("learn.job_name") })} />
        <${JobResult} ...${first} />
      <//>
      <${Lesson} name="read">
        ${query.job ? html`<${Quarters} job=${first.job} />` : html`<${Wait} />`}
      <//>
      <${Lesson} name="continue">
        ${isTrained ? html`<${Continue} jobId=${query.job} text=${text} />` : html`<${Wait} />`}
      <//>
      <${Lesson} name="change">
        <div class="actions">
          ${Object.entries(CHANGES).map(
            ([name, config]) => html`<button key=${name} type="button" disabled=${!query.job || !text || !mayChange()}
              onClick=${() => submit("changed", { name: t(`learn.changed.${name}`), config })}>${t(`learn.change.${name}`)}</button>`,
          )}
        </div>
        ${!query.job && html`<${Wait} />`}
        <${JobResult} ...${changed} />
        ${changed.job && first.job && changed.job.status !== "queued" && html`<${Beside} jobs=${[first.job, changed.job]} />`}
      <//>
      <${Lesson} name="experiment">
        ${query.sweep
          ? html`<${Experiment} id=${query.sweep} presets=${presets} />`
          : html`<${PresetList} presets=${presets?.filter(({ name }) => name !== "reference")} onRun=${(sweep) => setQuery({ sweep: sweep.id })} />`}
      <//>
      <${Lesson} name="grow">
        <${Do} label=${t("learn.grow_do")} isDone=${Boolean(query.grown)} disabled=${!isTrained || !text}
          onDo=${() => submit("grown", { name: t("learn.grown_name"), config: { ...GROWN, init_from: { job_id: query.job, checkpoint: 100 } } })} />
        ${!isTrained && html`<${Wait} />`}
        <${JobResult} ...${grown} />
        ${grown.job && html`<${Mixture} job=${grown.job} />`}
      <//>
    </ol>
    <p>${t("learn.end")} ${mayChange() && html`<a href=${href(["new"])}>${t("common.view.new")}</a> · `}<a href=${href(["sweeps"])}>${t("common.view.sweeps")}</a> · <a href=${href(["generate"])}>${t("common.view.generate")}</a></p>
  </div>`;
}

/** A job that a step has submitted, kept new until it has ended. */
function useJob(id) {
  const [isOver, setOver] = useState(false);
  useEffect(() => setOver(false), [id]);
  const { data, error } = useData((abort) => (id ? get(`/jobs/${id}`, {}, { signal: abort }) : null), [id, isOver], { every: id && !isOver ? 1 : 0 });
  useEffect(() => {
    if (data && data.id === id && ENDED.includes(data.status)) setOver(true);
  }, [data]);
  return { job: data && data.id === id ? data : null, error: id ? error : null };
}

const Lesson = ({ name, children }) => html`<li class="card">
  <h2>${t(`learn.${name}`)}</h2>
  <p>${t(`learn.${name}_text`)}</p>
  ${children}
</li>`;

const Wait = () => html`<p class="muted">${t("learn.wait")}</p>`;

const Do = ({ label, isDone, disabled, onDo }) => html`<p>
  <button type="button" class=${isDone ? "" : "primary"} disabled=${disabled || !mayChange()} onClick=${onDo}>${isDone ? t("learn.again") : label}</button>
</p>`;

/** Status, progress, and the curve of the loss as it falls. */
function JobResult({ job, error }) {
  const isMoving = job && !ENDED.includes(job.status);
  const { data: metrics } = useData((abort) => (job ? get(`/jobs/${job.id}/metrics`, { points: 300, tokens: false }, { signal: abort }) : null), [job?.id, isMoving], { every: isMoving ? 1 : 0 });
  if (!job) return html`<${ErrorBox} error=${error} />`;
  const { step, total_steps: total, percent, eta_seconds: left } = job.progress;
  const series = metrics?.steps.step.length ? [{ label: t("learn.train_loss"), x: metrics.steps.step, y: metrics.steps.train_loss }] : null;
  return html`<div class="result">
    <p class="sweep-progress">
      <a href=${href(["jobs", job.id])}>${job.name}</a> <${Status} status=${job.status} />
      ${isMoving && html`<${Progress} percent=${percent} label=${t("learn.progress")} /> <span class="muted">${step} / ${total ?? "–"}${left > 0 ? `, ${t("learn.left", { time: duration(left) })}` : ""}</span>`}
    </p>
    ${job.status === "queued" && html`<p class="muted">${t("learn.queued")}</p>`}
    ${job.error && html`<p class="error">${job.error.message}</p>`}
    ${series && html`<${Curves} label=${t("learn.train_loss")} series=${series} height=${150} />`}
  </div>`;
}

/** The text of each quarter as the model sees it, as they come. */
function Quarters({ job }) {
  const isMoving = job && !ENDED.includes(job.status);
  const { data } = useData((abort) => (job ? get(`/jobs/${job.id}/checkpoints`, {}, { signal: abort }) : null), [job?.id, isMoving], { every: isMoving ? 1 : 0 });
  if (!data?.data.length) return html`<${Wait} />`;
  const columns = data.data.map(({ percent }) => ({ jobId: job.id, percent, title: `${percent} %` }));
  return html`<${QuarterTexts} columns=${columns} />`;
}

/** A prompt of one's own, continued from 25 and from 100 percent. */
function Continue({ jobId, text }) {
  const [prompt, setPrompt] = useState(text.split(" ").slice(0, 4).join(" "));
  const [run, setRun] = useState(null);
  const ask = (event) => {
    event.preventDefault();
    const targets = [25, 100].map((checkpoint) => ({ key: `${jobId}@${checkpoint}`, job_id: jobId, checkpoint }));
    setRun({ number: (run?.number ?? 0) + 1, prompt, targets, body: { temperature: 0, seed: 0 } });
  };
  return html`<form class="actions" onSubmit=${ask}>
      <input aria-label=${t("learn.prompt")} value=${prompt} onInput=${(event) => setPrompt(event.target.value)} />
      <button class="primary" disabled=${!prompt}>${t("learn.continue_do")}</button>
      <a href=${href(["generate"], { checkpoint: [25, 100].map((percent) => `${jobId}@${percent}`), prompt, temperature: 0 })}>${t("learn.in_generate")}</a>
    </form>
    ${run && html`<${Continuations} run=${run} titleOf=${({ checkpoint }) => `${checkpoint} %`} />`}`;
}

/** Two jobs in one table: the figures of their newest quarters. */
function Beside({ jobs }) {
  const ids = jobs.map(({ id }) => id);
  const isMoving = jobs.some(({ status }) => !ENDED.includes(status));
  const { data } = useData((abort) => get("/compare", { job: ids }, { signal: abort }), [ids.join(), isMoving], { every: isMoving ? 1 : 0 });
  if (!data) return html`<${Skeleton} />`;
  return html`<div class="scroll" tabindex="0" role="group" aria-label=${t("learn.change")}><table>
      <thead><tr><th>${t("learn.which")}</th>${data.parameters.map(({ name }) => html`<th key=${name}>${name}</th>`)}
        <th class="number">${t("learn.quarter")}</th><th class="number">${t("compare.metric.loss")}</th><th class="number">${t("compare.metric.perplexity")}</th><th class="number">${t("compare.metric.accuracy")}</th></tr></thead>
      <tbody>
        ${data.jobs.map((job) => {
          const newest = job.quarters[job.quarters.length - 1];
          return html`<tr key=${job.job_id}><td>${job.name}</td>
            ${data.parameters.map(({ name }) => html`<td key=${name} class="mono">${JSON.stringify(job.values[name])}</td>`)}
            <td class="number">${newest ? `${newest.percent} %` : "–"}</td><td class="number">${figure(newest?.metrics.loss)}</td>
            <td class="number">${figure(newest?.metrics.perplexity)}</td><td class="number">${share(newest?.metrics.accuracy)}</td></tr>`;
        })}
      </tbody>
    </table></div>
    <p><a href=${href(["compare"], { job: ids })}>${t("learn.compare")}</a></p>`;
}

function Experiment({ id, presets }) {
  const { sweep, error } = useSweep(id);
  if (!sweep) return html`<${ErrorBox} error=${error} />`;
  const preset = presets?.find(({ name }) => name === sweep.name);
  return html`
    ${preset && html`<p class="look-at">${withCode(pick(preset.look_at))}</p>`}
    <${SweepProgress} sweep=${sweep} />
    ${presets && html`<${Comparison} selection=${{ sweep: id }} asked=${preset?.compare} />`}
    <p class="actions"><button type="button" onClick=${() => setQuery({ sweep: null })}>${t("learn.another")}</button>
      <a href=${href(["sweeps", id])}>${t("learn.open_sweep")}</a></p>`;
}

/** How the experts of a grown mixture share the tokens, at the newest quarter. */
function Mixture({ job }) {
  const isMoving = !ENDED.includes(job.status);
  const { data } = useData((abort) => get(`/jobs/${job.id}/metrics`, { points: 8, tokens: false }, { signal: abort }), [job.id, isMoving], { every: isMoving ? 1 : 0 });
  const newest = data?.checkpoints[data.checkpoints.length - 1];
  if (!newest?.moe) return null;
  const { layers, mean } = newest.moe;
  const most = Math.max(...layers.flatMap(({ load }) => load));
  return html`<div class="result">
    <p>${t("learn.at_start", { perplexity: figure(data.checkpoints[0].perplexity), now: figure(newest.perplexity), percent: newest.percent })}</p>
    <${HeatMap} label=${t("learn.load")} rows=${layers.map(({ layer }) => t("learn.layer", { n: layer }))} columns=${layers[0].load.map((_, n) => String(n))}
      values=${layers.map(({ load }) => load)} scale=${(value) => value / most} format=${(value) => share(value)} columnName=${t("learn.load")} />
    <p class="note">${t("learn.load_note", { entropy: figure(mean.load_entropy, 3), dead: figure(mean.dead_experts, 2) })}</p>
  </div>`;
}
