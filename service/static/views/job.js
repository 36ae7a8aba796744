/** One job: what it is and does, its curves, its quarters, its mixture, and how to run it again. */
import { html } from "htm/preact";
import { useState } from "preact/hooks";
import { mayChange, patch, post, remove } from "../api.js";
import { ago, bytes, count, duration, moment, percent, short } from "../format.js";
import { t } from "../i18n.js";
import { attempt, Confirm, ErrorBox, loadStyle, Progress, Skeleton, Status, useTitle } from "../parts/basics.js";
import { href, navigate } from "../router.js";
import { ConfigPart } from "./job/config.js";
import { CurvesPart } from "./job/curves.js";
import { useJob, useTokens } from "./job/data.js";
import { Downloads, Events, Repeat } from "./job/ends.js";
import { Mixture } from "./job/mixture.js";
import { Quarters } from "./job/quarters.js";

await loadStyle("job");

const TERMINAL = ["succeeded", "failed", "cancelled"];

export default function JobView({ id: reference }) {
  const { job, metrics, events, error, reload } = useJob(reference);
  const course = job?.status === "running" ? `${percent(job.progress.percent / 100)} ` : "";
  useTitle(job ? `${course}${job.name ?? job.id.slice(0, 12)}` : t("job.title"));
  const tokens = useTokens(job?.id, metrics?.checkpoints);
  if (!job) {
    return error ? html`<h1>${t("job.title")}</h1><${ErrorBox} error=${error} />` : html`<h1 class="hidden">${t("job.title")}</h1><${Skeleton} lines="12" />`;
  }
  return html`
    <${Head} job=${job} reload=${reload} />
    ${job.error && html`<div class="error" role="alert"><p><b>${job.error.code}</b> ${job.error.message}</p></div>`}
    ${job.warnings.map(({ code, message }) => html`<div class="warning" key=${code + message}><p><b>${code}</b> ${message}</p></div>`)}
    <${Figures} job=${job} />
    <${CurvesPart} job=${job} metrics=${metrics} />
    <${Quarters} job=${job} checkpoints=${metrics?.checkpoints ?? []} tokens=${tokens} />
    ${job.config.use_moe && html`<${Mixture} job=${job} checkpoints=${metrics?.checkpoints ?? []} tokens=${tokens} />`}
    <${ConfigPart} job=${job} />
    <div class="two">
      <${Events} job=${job} events=${events} />
      <${Downloads} job=${job} checkpoints=${metrics?.checkpoints ?? []} />
    </div>
    <${Repeat} job=${job} />
  `;
}

function Head({ job, reload }) {
  const [asks, ask] = useState(false);
  const [names, rename] = useState(false);
  const act = (name) => attempt(() => post(`/jobs/${job.id}/${name}`)).then(reload);
  const isOver = TERMINAL.includes(job.status);
  const save = async (event) => {
    event.preventDefault();
    const name = new FormData(event.target).get("name").trim();
    if (await attempt(() => patch(`/jobs/${job.id}`, { name: name || null }))) {
      rename(false);
      reload();
    }
  };
  return html`<header class="job-head">
    <div>
      ${names
        ? html`<form class="actions" onSubmit=${save}>
            <input name="name" value=${job.name ?? ""} maxlength="200" aria-label=${t("job.name")} autofocus />
            <button class="primary">${t("job.save")}</button>
            <button type="button" onClick=${() => rename(false)}>${t("job.back")}</button>
          </form>`
        : html`<h1 class=${job.name ? "" : "mono"}>
            ${job.name ?? job.id} ${mayChange() && html`<button class="small plain" onClick=${() => rename(true)} aria-label=${t("job.rename")}>✎</button>`}
          </h1>`}
      <p class="about">
        <${Status} status=${job.status} />
        ${job.status_reason && html`<span>${job.status_reason}</span>`}
        ${job.name && html`<span class="mono muted">${job.id}</span>`}
        ${Object.entries(job.tags).filter(([key]) => key !== "sweep").map(
          ([key, value]) => html`<a class="chip" href=${href(["jobs"], { tag: value ? `${key}=${value}` : key })}>${value ? `${key}=${value}` : key}</a>`,
        )}
        ${job.sweep_id && html`<a href=${href(["sweeps", job.sweep_id])}>${t("job.of_sweep")}</a>`}
        ${job.parent && html`<a href=${href(["jobs", job.parent.job_id])}>${t("job.from_parent", { percent: job.parent.checkpoint })}</a>`}
      </p>
    </div>
    <div class="actions">
      ${mayChange() && !isOver && job.status !== "paused" && html`<button onClick=${() => act("pause")}>${t("job.pause")}</button>`}
      ${mayChange() && job.status === "paused" && html`<button onClick=${() => act("resume")}>${t("job.resume")}</button>`}
      ${mayChange() && !isOver && html`<button class="danger" onClick=${() => act("cancel")}>${t("job.cancel")}</button>`}
      <a class="button" href=${href(["generate"], { job: job.id })}>${t("job.generate")}</a>
      ${mayChange() && html`<a class="button primary" href=${href(["new"], { from: job.id })}>${t("job.change")}</a>`}
      ${mayChange() && isOver && html`<button class="danger" onClick=${() => ask(true)}>${t("job.delete")}</button>`}
    </div>
    ${asks &&
    html`<${Confirm}
      title=${t("job.delete_title")}
      text=${t("job.delete_text")}
      action=${t("job.delete")}
      onClose=${() => ask(false)}
      onConfirm=${async () => {
        if (await attempt(() => remove(`/jobs/${job.id}`))) navigate(href(["jobs"]));
      }}
    />`}
  </header>`;
}

/** The job in one line of figures. */
function Figures({ job }) {
  const { progress, model, text, execution } = job;
  const figures = [
    [t("job.steps"), progress.total_steps === null ? count(progress.step) : `${count(progress.step)} / ${count(progress.total_steps)}`],
    [t("job.epoch"), count(progress.epoch)],
    [t("job.speed"), progress.tok_per_sec ? `${short(progress.tok_per_sec)} tok/s` : "–"],
    [t("job.parameters"), model.n_active_params && model.n_active_params !== model.n_params
      ? t("job.active", { all: short(model.n_params), active: short(model.n_active_params) })
      : short(model.n_params)],
    [t("job.text"), `${text.n_tokens === null ? "–" : count(text.n_tokens)} ${t("job.tokens")}, ${bytes(text.n_bytes)}`],
    [t("job.device"), execution?.device ? `${execution.device}, ${execution.precision ?? ""}` : "–"],
    job.cohort && [t("job.cohort"), t("job.cohort_of", { n: count(job.cohort.size) }), job.cohort.id],
    [t("job.submitted"), ago(job.created_at), moment(job.created_at)],
    [t("job.took"), job.started_at && job.finished_at ? duration((Date.parse(job.finished_at) - Date.parse(job.started_at)) / 1000) : "–"],
  ].filter(Boolean);
  return html`<div class="card figures">
    ${!TERMINAL.includes(job.status) &&
    html`<div class="whole">
      <${Progress} percent=${progress.percent} label=${t("job.progress")} />
      <span>${percent(progress.percent / 100)}</span>
      <span class="muted">
        ${job.status === "running" && progress.eta_seconds !== null && t("job.left", { time: duration(progress.eta_seconds) })}
        ${job.status === "queued" && job.queue_position !== null && t("job.position", { n: job.queue_position })}
      </span>
    </div>`}
    <dl>
      ${figures.map(([name, value, title]) => html`<div key=${name} title=${title}><dt>${name}</dt><dd>${value}</dd></div>`)}
    </dl>
  </div>`;
}
